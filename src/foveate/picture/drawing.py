"""Draws what a model saw: question, answer and cost, the picture with its regions, the views as they were."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from foveate.picture.geometry import Box, Size, View, ViewPlan, whole

PAPER, INK, FAINT = (255, 255, 255), (28, 28, 34), (92, 94, 102)
COLOURS = ((214, 69, 65), (31, 119, 180), (44, 140, 74), (232, 140, 28), (128, 88, 170), (0, 150, 150))
HEAT = (255, 120, 0)
PADDING, HATCH, HATCH_STEP = (246, 246, 248), (176, 178, 186), 9

# In pixels. Web pages show a drawing about 800 pixels wide: the smallest letters are then 12 pixels high.
WIDTH, MARGIN, GAP = 1200, 24, 12
INNER = WIDTH - 2 * MARGIN
ANSWER, TEXT, SMALL = 28, 21, 18
CAPTION_LINES = 6  # of each paragraph
PICTURE_WIDTH, PICTURE_HEIGHT = 610, 700  # at most, including the space for numbers around it
VIEW_SIDE, LEAST_VIEW_SIDE, SHEET_HEIGHT = 420, 84, 560
CHAIN_SIDE, CHAIN_VIEWS, CHAIN_COLUMNS = 330, 600, 8  # side of its picture, width of its views, views a row
SMALL_REGION = 48  # regions with a shorter side are framed from outside, so that the frame hides nothing
# For letters that Pillow's own font lacks; the first font with most of them is used.
FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "Arial.ttf", "Arial Unicode.ttf"),
    *("PingFang.ttc", "msyh.ttc", "segoeui.ttf"),
)
RINGS = 4  # how far from its region a number may be placed, in heights of a number

Colour: TypeAlias = tuple[int, int, int]
Edges: TypeAlias = tuple[float, float, float, float]


class Shown(NamedTuple):
    """A view as the model got it.

    Attributes:
        role: what it is.
        picture: 8-bit RGB.
        inside: the part that shows the picture, in its own pixels; the rest is padding. None: all of it.
    """

    role: str
    picture: Image.Image
    inside: Box | None = None


def draw(
    picture: Image.Image,
    regions: Sequence[Box],
    plan: ViewPlan,
    canvases: Sequence[Image.Image],
    caption: Sequence[tuple[str, bool]],
    heat: Sequence[tuple[Box, float]] = (),
    own_views: Sequence[Shown | tuple[str, Image.Image]] = (),
    chains: Sequence[tuple[str, Sequence[Box], Sequence[Image.Image]]] = (),
) -> Image.Image:
    """The drawing of an answer: `lay_out` with all views of a plan.

    Args:
        picture: the original.
        regions: boxes in its pixels.
        plan: the views.
        canvases: the picture as it lies on each of the plan's canvases, 8-bit RGB.
        caption: paragraphs, each with whether it is emphasised.
        heat: boxes in the original's pixels with weights from 0 to 1: warmer parts mattered more;
            those of weight 0 were dropped.
        own_views: views that the tower made itself, with their roles; they follow the plan's. If the plan has
            one view, they are that view at other sizes.
        chains: name, boxes in the original's pixels, and their views; drawn instead of the regions.
    """
    views = seen_views(plan, canvases, own_views)
    return lay_out(picture, regions, views, caption, heat, chains)


def seen_views(
    plan: ViewPlan,
    canvases: Sequence[Image.Image],
    own_views: Sequence[Shown | tuple[str, Image.Image]] = (),
) -> list[Shown]:
    """All views of a plan and those that the tower made itself, as for `draw`."""
    views = shown_views(plan, canvases)
    only = views[0] if len(views) == 1 else None
    for own in own_views:
        view = Shown(*own)
        if only is not None and view.inside is None:
            view = view._replace(inside=_scaled(only, view.picture))
        views.append(view)
    return views


def shown_views(plan: ViewPlan, canvases: Sequence[Image.Image], role: str | None = None) -> list[Shown]:
    """All views of a plan, each with the part that shows the picture; `role` replaces their own."""
    return [
        Shown(role or view.role, cut_view(canvases[view.canvas], view), plan.to_view(i, whole(plan.picture)))
        for i, view in enumerate(plan.views)
    ]


def _scaled(view: Shown, picture: Image.Image) -> Box | None:
    """The part that shows the original, for a picture that is a view at another size."""
    if view.inside is None:
        return None
    across, down = picture.width / view.picture.width, picture.height / view.picture.height
    left, top, right, bottom = map(float, view.inside)
    return Box(left * across, top * down, right * across, bottom * down)


def lay_out(
    picture: Image.Image,
    regions: Sequence[Box],
    views: Sequence[Shown],
    caption: Sequence[tuple[str, bool]],
    heat: Sequence[tuple[Box, float]] = (),
    chains: Sequence[tuple[str, Sequence[Box], Sequence[Image.Image]]] = (),
    numbered: bool = True,
) -> Image.Image:
    """A caption above the picture with numbered regions, and the views beside it, or below a wide one.

    If parts were looked at one after the other, the picture is drawn once for each such chain. `numbered`
    says whether views have the numbers of regions; those of chains never have.
    """
    beside = bool(chains) or picture.width <= 2 * picture.height
    if chains:
        left = chain_sheet(picture, chains)
    else:
        left = mark_regions(picture, regions, PICTURE_WIDTH if beside else INNER, PICTURE_HEIGHT, heat)
    head = _written(caption)
    top = MARGIN + head.height + GAP
    # Views are aligned with the picture, which has a margin for the numbers around it.
    above = _badge(str(len(regions)), TEXT).height
    if beside:
        place = (2 * MARGIN + left.width, top + above)
        space = INNER - left.width - MARGIN
        right = contact_sheet(
            views, space, max(left.height - above, SHEET_HEIGHT), numbered=numbered and not chains
        )
    else:
        place = (MARGIN, top + left.height + GAP)
        right = contact_sheet(views, INNER, SHEET_HEIGHT, numbered=numbered)
    height = max(top + left.height, place[1] + right.height) + MARGIN
    page = Image.new("RGB", (WIDTH, height), PAPER)
    page.paste(head, (MARGIN, MARGIN))
    page.paste(left, (MARGIN, top))
    page.paste(right, place)
    return page


def mark_regions(
    picture: Image.Image,
    regions: Sequence[Box],
    width: int,
    height: int,
    heat: Sequence[tuple[Box, float]] = (),
    letters: int = TEXT,
    arrows: bool = False,
    names: Sequence[str] | None = None,
) -> Image.Image:
    """The picture with boxes, and their numbers beside them.

    Args:
        picture: the original.
        regions: boxes in its pixels; empty ones are left out.
        width: at most, including the space for numbers around the picture.
        height: likewise.
        heat: boxes with a weight, which tint the picture.
        letters: size of the numbers.
        arrows: from each region to the next.
        names: what stands beside each region; by default its number.
    """
    names = [str(i + 1) for i in range(len(regions))] if names is None else names
    numbers = [_badge(name, letters, COLOURS[i % len(COLOURS)]) for i, name in enumerate(names)]
    border = Size(max([n.height for n in numbers], default=0), max([n.width for n in numbers], default=0))
    scale = min((width - 2 * border.width) / picture.width, (height - 2 * border.height) / picture.height)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    shown = picture.resize(size, Image.Resampling.NEAREST if scale > 4 else Image.Resampling.BICUBIC)
    if heat:
        shown = _tinted(shown, [(Box(*(n * scale for n in map(float, box))), w) for box, w in heat])
    page = Image.new("RGB", (size[0] + 2 * border.width, size[1] + 2 * border.height), PAPER)
    page.paste(shown, (border.width, border.height))
    # Boxes on the page, with the numbers of the regions.
    boxes: dict[int, Edges] = {}
    for i, region in enumerate(regions):
        inside = region.clipped(Size(picture.height, picture.width))
        if inside.left < inside.right and inside.top < inside.bottom:
            left, top, right, bottom = (float(n) * scale for n in inside)
            boxes[i] = (
                left + border.width,
                top + border.height,
                right + border.width,
                bottom + border.height,
            )
    pen = ImageDraw.Draw(page)
    frame = (border.width, border.height, border.width + size[0], border.height + size[1])
    framed: list[Edges] = []
    for i, box in sorted(boxes.items(), key=lambda item: -_area(item[1])):
        _frame(pen, box, framed, frame, COLOURS[i % len(COLOURS)])
        framed.append(box)
    if arrows:
        for (_, start), (i, end) in pairwise(boxes.items()):
            _arrow(pen, _centre(start), _centre(end), COLOURS[i % len(COLOURS)])
    spots = _places(list(boxes.values()), [numbers[i] for i in boxes], page)
    for (i, box), spot in zip(boxes.items(), spots, strict=True):
        nearest = _clamped(_centre(spot), box)
        if math.dist(nearest, _clamped(nearest, spot)) > 6:
            pen.line((*_centre(spot), *nearest), fill=COLOURS[i % len(COLOURS)], width=2)
    for i, spot in zip(boxes, spots, strict=True):
        page.paste(numbers[i], (round(spot[0]), round(spot[1])))
    return page


def _frame(
    pen: ImageDraw.ImageDraw, box: Edges, larger: Sequence[Edges], picture: Edges, colour: Colour
) -> None:
    """A box's frame, inside of it and of the larger ones that share its edges.

    Where a frame would hide something small, it is drawn outside: all of a small box's frame, and the edges
    along the picture's border.
    """
    left, top, right, bottom = box
    if min(right - left, bottom - top) < SMALL_REGION:
        around = (math.floor(left) - 2, math.floor(top) - 2, math.ceil(right) + 1, math.ceil(bottom) + 1)
        pen.rectangle(around, outline=colour, width=2)
        return
    if any(all(abs(a - b) < 1 for a, b in zip(box, other, strict=True)) for other in larger):
        return
    most = (min(right - left, bottom - top) - SMALL_REGION) / 6
    insets = []
    for edge in range(4):
        along = 1 - edge % 2  # the axis that the edge runs along
        shared = sum(
            abs(other[edge] - box[edge]) < 3
            and other[along] < box[along + 2]
            and other[along + 2] > box[along]
            for other in larger
        )
        at_border = abs(box[edge] - picture[edge]) < 1
        insets.append(min(3 * shared, 9, most) - 3 * at_border)
    pen.rectangle(
        (left + insets[0], top + insets[1], right - 1 - insets[2], bottom - 1 - insets[3]),
        outline=colour,
        width=3,
    )


def _places(boxes: Sequence[Edges], numbers: Sequence[Image.Image], page: Image.Image) -> list[Edges]:
    """A place for the number of each box: beside it, off other numbers, hiding as little as possible."""
    others, placed = np.array(boxes).reshape(-1, 4), np.empty((0, 4))
    for own, number in zip(boxes, numbers, strict=True):
        best, least = None, math.inf
        size, room = (number.width, number.height), (page.width - number.width, page.height - number.height)
        for bother, corners in _candidates(own, *size):
            if bother[0] >= least:
                break
            corners = np.clip(corners, 0, room)
            spots = np.concatenate([corners, corners + size], axis=1)  # (k, 4)
            costs = bother + _disturbs(spots, own, others, placed)
            first = int(costs.argmin())
            if costs[first] < least:
                best, least = spots[first], costs[first]
        assert best is not None
        placed = np.concatenate([placed, [best]])
    return [(left, top, right, bottom) for left, top, right, bottom in placed.tolist()]


def _candidates(box: Edges, width: int, height: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Costs (k,) and upper left corners (k, 2) of possible places for a number, the cheapest first.

    They lie around the box, in its corners, then further and further away.
    """
    left, top, right, bottom = box
    across = [left + n * (width + 2) for n in range(6) if left + (n + 1) * (width + 2) <= right] or [left]
    down = [top + n * (height + 2) for n in range(6) if top + (n + 1) * (height + 2) <= bottom] or [top]
    for ring in range(RINGS):
        away = 2 + ring * (height + 4)
        spots = [(x, top - away - height) for x in across]
        spots += [(left - away - width, y) for y in down] + [(right + away, y) for y in down]
        spots += [(x, bottom + away) for x in across] + [(left - away - width, top - away - height)]
        if ring == 0:
            spots += [(x, y) for y in (top, bottom - height) for x in (left, right - width)]
        yield 0.6 * ring + 0.001 * np.arange(len(spots)), np.array(spots)


def _disturbs(spots: np.ndarray, own: Edges, boxes: np.ndarray, placed: np.ndarray) -> np.ndarray:
    """The cost of places for a number (k, 4): 0 if one hides nothing, more the larger the part that it hides.

    `boxes` and `placed` (n, 4): all boxes, and the numbers that have their place.
    """
    area = _area(tuple(spots[0]))  # all places have the number's size
    costs = 4 * _common(placed, spots).sum(1) / area
    costs += 3 * _common(np.array([own]), spots)[:, 0] / _area(own)
    boxes = boxes[(boxes != own).any(1)]
    common = _common(boxes, spots)  # (k, n)
    areas = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clip(min=1)
    around = (boxes[:, :2] <= (own[0] + 1, own[1] + 1)).all(1)
    around &= (boxes[:, 2:] >= (own[2] - 1, own[3] - 1)).all(1)
    # Inside another box that is not around its own, it would look like that box's number.
    astray = common[:, ~around].max(axis=1, initial=0.0) / area
    return np.asarray(costs + (common / areas).sum(1) + 0.4 * astray)


def _area(box: Edges) -> float:
    return max((box[2] - box[0]) * (box[3] - box[1]), 1.0)


def _common(boxes: np.ndarray, spots: np.ndarray) -> np.ndarray:
    """The area that each box (n, 4) shares with each spot (k, 4), in pixels: (k, n)."""
    across = np.minimum(boxes[:, 2], spots[:, 2:3]) - np.maximum(boxes[:, 0], spots[:, 0:1])
    down = np.minimum(boxes[:, 3], spots[:, 3:4]) - np.maximum(boxes[:, 1], spots[:, 1:2])
    return np.asarray(across.clip(min=0) * down.clip(min=0))


def _centre(box: Edges) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def _clamped(point: tuple[float, float], box: Edges) -> tuple[float, float]:
    """The point of a box that is nearest to a given point."""
    return min(max(point[0], box[0]), box[2]), min(max(point[1], box[1]), box[3])


def chain_sheet(
    picture: Image.Image, chains: Sequence[tuple[str, Sequence[Box], Sequence[Image.Image]]]
) -> Image.Image:
    """A row per chain: the picture with numbered boxes and arrows from each to the next, then the views.

    A long chain's views are wrapped into several lines.
    """
    longest = max(len(boxes) for _, boxes, _ in chains)
    columns = min(longest, CHAIN_COLUMNS)
    side, line = CHAIN_VIEWS // columns - GAP, SMALL + 10
    marked = [
        mark_regions(picture, boxes, CHAIN_SIDE, CHAIN_SIDE, letters=SMALL, arrows=True)
        for _, boxes, _ in chains
    ]
    above = _badge("1", SMALL).height
    row = max(max(m.height for m in marked) + line, above + -(-longest // columns) * (side + line)) + GAP
    sheet = Image.new("RGB", (CHAIN_SIDE + GAP + CHAIN_VIEWS, row * len(chains)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for r, (name, boxes, seen) in enumerate(chains):
        sheet.paste(marked[r], (0, r * row))
        _write(pen, ((CHAIN_SIDE - _font(SMALL).getlength(name)) / 2, r * row + marked[r].height + 2), name)
        for i, (box, view) in enumerate(zip(boxes, seen, strict=True)):
            x = CHAIN_SIDE + GAP + i % columns * (side + GAP)
            y = r * row + above + i // columns * (side + line)
            shown = Shown("", view, _inside(box, picture, view))
            _paste_view(sheet, (x, y), shown, side, i)
    return sheet


def _inside(box: Box, picture: Image.Image, view: Image.Image) -> Box | None:
    """The part of a box's view that shows the picture, in the view's pixels; None: all of it."""
    if not box.width or not box.height or whole(Size(picture.height, picture.width)).contains(box):
        return None
    across, down = view.width / float(box.width), view.height / float(box.height)
    left, top = float(box.left), float(box.top)
    return Box(-left * across, -top * down, (picture.width - left) * across, (picture.height - top) * down)


def _arrow(
    pen: ImageDraw.ImageDraw, start: tuple[float, float], end: tuple[float, float], colour: Colour
) -> None:
    """A thin line with a head; nothing where both ends are the same."""
    (x, y), length = end, math.dist(start, end)
    if length < 1:
        return
    dx, dy = (x - start[0]) / length, (y - start[1]) / length
    pen.line((*start, *end), fill=colour, width=3)
    back = (x - 10 * dx, y - 10 * dy)
    pen.polygon(
        [end, (back[0] - 5 * dy, back[1] + 5 * dx), (back[0] + 5 * dy, back[1] - 5 * dx)], fill=colour
    )


def _tinted(picture: Image.Image, heat: Sequence[tuple[Box, float]]) -> Image.Image:
    """Weights as a warm tint; dropped parts, and those that no box covers, turn grey and dark."""
    seen, tint = Image.new("L", picture.size), Image.new("L", picture.size)
    for box, weight in heat:
        left, top, right, bottom = box.rounded()
        if weight > 0 and left < right and top < bottom:
            inside = (left, top, right - 1, bottom - 1)
            ImageDraw.Draw(seen).rectangle(inside, fill=255)
            ImageDraw.Draw(tint).rectangle(inside, fill=round(150 * weight))
    dark = picture.convert("L").point(lambda level: level // 2).convert("RGB")
    warm = Image.composite(Image.new("RGB", picture.size, HEAT), picture, tint)
    return Image.composite(warm, dark, seen)


def contact_sheet(
    views: Sequence[Shown], width: int, height: int, numbered: bool = True, sized: bool = True
) -> Image.Image:
    """All views side by side in rows, none of them stretched, numbered like the regions, padding hatched.

    They are as large as fits into width and height; if there are too many, the sheet grows in height. `sized`
    says whether it names their sizes.
    """
    line = SMALL + 14
    sizes = {view.picture.size for view in views}
    below = []
    if sized and len(views) > 1 and len(sizes) == 1:
        below.append("each {} x {} pixels".format(*next(iter(sizes))))
    if any(_padded(view) for view in views):
        below.append("hatched: padding")
    for columns in range(1, len(views) + 1):
        side = min((width - (columns - 1) * GAP) // columns, VIEW_SIDE)
        rows = [views[i : i + columns] for i in range(0, len(views), columns)]
        heights = [max(_fitted(view.picture, side)[1] for view in row) + line for row in rows]
        following = (width - columns * GAP) // (columns + 1)
        if sum(heights) <= height or following < LEAST_VIEW_SIDE:
            break
    sheet = Image.new("RGB", (width, sum(heights) + line * bool(below)), PAPER)
    y = 0
    for r, (row, high) in enumerate(zip(rows, heights, strict=True)):
        for c, view in enumerate(row):
            number = r * columns + c if numbered else None
            named = sized and (len(sizes) > 1 or len(views) == 1)
            _paste_view(sheet, (c * (side + GAP), y), view, side, number, named)
        y += high
    if below:
        _write(ImageDraw.Draw(sheet), (0, y + 4), "; ".join(below))
    return sheet


def _paste_view(
    sheet: Image.Image, at: tuple[int, int], view: Shown, side: int, index: int | None, sized: bool = False
) -> None:
    """A view in its frame; below it its number and as much of its description as fits."""
    (x, y), size = at, _fitted(view.picture, side)
    colour = FAINT if index is None else COLOURS[index % len(COLOURS)]
    nearest = min(size[0] / view.picture.width, size[1] / view.picture.height) > 4
    shown = view.picture.resize(size, Image.Resampling.NEAREST if nearest else Image.Resampling.BICUBIC)
    if view.inside is not None:
        shown = _hatched(shown, view.inside, view.picture.size)
    sheet.paste(shown, at)
    pen = ImageDraw.Draw(sheet)
    pen.rectangle((x, y, x + size[0] - 1, y + size[1] - 1), outline=colour, width=2)
    start = x
    if index is not None:
        number = _badge(str(index + 1), SMALL, colour)
        sheet.paste(number, (x, y + size[1] + 2))
        start += number.width + 6
    whole_size = f"{view.role}  {view.picture.width} x {view.picture.height}"
    for text in (whole_size, view.role) if sized else (view.role,):
        if start + _font(SMALL).getlength(text) <= x + side + GAP - 2:
            _write(pen, (start, y + size[1] + 3), text)
            break


def _fitted(picture: Image.Image, side: int) -> tuple[int, int]:
    """Width and height of a picture whose longer side becomes `side`."""
    scale = side / max(picture.size)
    return max(1, round(picture.width * scale)), max(1, round(picture.height * scale))


def _padded(view: Shown) -> bool:
    return view.inside is not None and not view.inside.contains(Box(0, 0, *view.picture.size))


def _hatched(picture: Image.Image, inside: Box, size: tuple[int, int]) -> Image.Image:
    """The picture with everything outside a box hatched; the box is in pixels of its former size."""
    across, down = picture.width / size[0], picture.height / size[1]
    left, top = round(float(inside.left) * across), round(float(inside.top) * down)
    right, bottom = round(float(inside.right) * across), round(float(inside.bottom) * down)
    mask = Image.new("L", picture.size, 255)
    if left < right and top < bottom:
        ImageDraw.Draw(mask).rectangle((left, top, right - 1, bottom - 1), fill=0)
    lines = Image.new("RGB", picture.size, PADDING)
    pen = ImageDraw.Draw(lines)
    for start in range(0, picture.width + picture.height, HATCH_STEP):
        pen.line((start, 0, start - picture.height, picture.height), fill=HATCH, width=2)
    return Image.composite(lines, picture, mask)


def cut_view(canvas: Image.Image, view: View) -> Image.Image:
    """One view cut out of its canvas, interleaved ones included."""
    part = canvas.crop(view.box.rounded())
    if view.steps == (1, 1):
        return part
    down, across = view.steps
    # The affine map reads pixel (across x, down y), sampled at its centre.
    matrix = (across, 0, 0.5 - 0.5 * across, 0, down, 0.5 - 0.5 * down)
    return part.transform((view.size.width, view.size.height), Image.Transform.AFFINE, matrix)


def _written(caption: Sequence[tuple[str, bool]]) -> Image.Image:
    """Paragraphs as wide as the page; emphasised ones are larger and darker."""
    lines = []
    for text, bold in caption:
        text = " ".join(_printable(text).split())
        font = _font_for(text, ANSWER if bold else TEXT)
        lines += [(line, font, INK if bold else FAINT) for line in _wrapped(text, font)]
    heights = [round(font.size) + 10 for _, font, _ in lines]
    head = Image.new("RGB", (INNER, sum(heights)), PAPER)
    pen, y = ImageDraw.Draw(head), 0
    for (line, font, colour), height in zip(lines, heights, strict=True):
        pen.text((0, y + height / 2), line, colour, font=font, anchor="lm")
        y += height
    return head


def _wrapped(text: str, font: ImageFont.FreeTypeFont) -> list[str]:
    """Lines that are no wider than the page, at most `CAPTION_LINES`; long words are split."""
    lines: list[str] = []
    while text and len(lines) < CAPTION_LINES:
        fits = min(len(text), INNER)  # letters are wider than a pixel
        while font.getlength(text[:fits]) > INNER:
            fits = max(1, min(fits - 1, int(fits * INNER / font.getlength(text[:fits])) + 1))
        if fits < len(text):
            space = text.rfind(" ", 0, fits + 1)
            fits = space if space > fits // 2 else fits
        lines.append(text[:fits])
        text = text[fits:].lstrip()
    if text:
        lines[-1] = lines[-1][:-4] + " ..."
    return lines


def _printable(text: str) -> str:
    """The text without characters that no font can draw."""
    return "".join(" " if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)


def _badge(text: str, size: int, colour: Colour = INK) -> Image.Image:
    """A number on a coloured ground."""
    badge = Image.new("RGB", (math.ceil(_font(size).getlength(text)) + 10, size + 6), colour)
    ImageDraw.Draw(badge).text((5, badge.height / 2), text, PAPER, font=_font(size), anchor="lm")
    return badge


def _write(pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str) -> None:
    pen.text(at, text, FAINT, font=_font(SMALL))


def _font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """An installed font that has the text's letters; else Pillow's own."""
    letters = {letter for letter in text if not letter.isspace()}
    best = _font(size)
    least = _lacking(best, letters)
    for name in FONTS:
        if not least:
            break
        try:
            font = ImageFont.truetype(name, size)
        except OSError:  # not installed
            continue
        lacking = _lacking(font, letters)
        if lacking < least:
            best, least = font, lacking
    return best


def _lacking(font: ImageFont.FreeTypeFont, letters: Iterable[str]) -> int:
    """How many of the letters a font draws as it draws a missing character."""
    none = bytes(font.getmask("\U0010ffff"))
    return sum(bytes(font.getmask(letter)) == none for letter in letters)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # always, if a size is given
    return font
