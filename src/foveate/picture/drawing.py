"""Draws what a model saw: the picture with the regions that were looked at, and the views as it got them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from itertools import pairwise

from PIL import Image, ImageDraw, ImageFont, ImageOps

from foveate.picture.geometry import Box, View, ViewPlan

PAPER, INK, FAINT = (255, 255, 255), (28, 28, 34), (120, 122, 130)
COLOURS = ((214, 69, 65), (31, 119, 180), (44, 140, 74), (232, 140, 28), (128, 88, 170), (0, 150, 150))
HEAT = (255, 120, 0)
MARGIN, GAP, LINE = 24, 10, 22
PICTURE_SIDE, VIEWS_WIDTH, PAGE_WIDTH = 620, 560, 1100
CHAIN_SIDE, CHAIN_VIEWS, BESIDE_CHAINS = 330, 620, 220  # of a chain's picture, of its views, of others
CHAIN_COLUMNS = 8  # views of a chain beside each other
CAPTION_LINES = 6  # of each paragraph


def draw(
    picture: Image.Image,
    regions: Sequence[Box],
    plan: ViewPlan,
    canvases: Sequence[Image.Image],
    caption: Sequence[tuple[str, bool]],
    heat: Sequence[tuple[Box, float]] = (),
    own_views: Sequence[tuple[str, Image.Image]] = (),
    chains: Sequence[tuple[str, Sequence[Box], Sequence[Image.Image]]] = (),
) -> Image.Image:
    """The picture with numbered regions, all views beside it (below it if it is wide), and a caption.

    Where parts were looked at one after the other, the picture stands once for each such chain.

    Args:
        picture: the original.
        regions: boxes in its pixels.
        plan: the views.
        canvases: the picture as it lies on each of the plan's canvases, 8-bit RGB.
        caption: paragraphs, each with whether it stands out.
        heat: boxes in the original's pixels with a weight from 0 to 1: the warmer, the more it mattered;
            those of weight 0 were dropped.
        own_views: views that the tower made itself, with their roles; they stand behind the plan's.
        chains: name, boxes in the original's pixels, and their views; instead of the regions.
    """
    left = chain_sheet(picture, chains) if chains else mark_regions(picture, regions, PICTURE_SIDE, heat)
    views = [(view.role, cut_view(canvases[view.canvas], view)) for view in plan.views]
    roles, pictures = zip(*views, *own_views, strict=True)
    return lay_out(left, contact_sheet(pictures, roles, BESIDE_CHAINS if chains else VIEWS_WIDTH), caption)


def lay_out(left: Image.Image, right: Image.Image, caption: Sequence[tuple[str, bool]]) -> Image.Image:
    """A page of two drawings beside each other (below each other if the left one is wide) and a caption."""
    lines = [
        (line, INK if bold else FAINT)
        for text, bold in caption
        for line in textwrap.wrap(text, 130, max_lines=CAPTION_LINES, placeholder=" ...")
    ]
    wide = left.width > 2 * left.height
    place = (MARGIN, 2 * MARGIN + left.height) if wide else (2 * MARGIN + left.width, MARGIN)
    width = max(PAGE_WIDTH, place[0] + right.width + MARGIN)
    top = max(MARGIN + left.height, place[1] + right.height) + MARGIN
    page = Image.new("RGB", (width, top + LINE * len(lines) + MARGIN), PAPER)
    page.paste(left, (MARGIN, MARGIN))
    page.paste(right, place)
    pen = ImageDraw.Draw(page)
    for i, (text, colour) in enumerate(lines):
        pen.text((MARGIN, top + i * LINE), text, colour, font=_font(16))
    return page


def mark_regions(
    picture: Image.Image, regions: Sequence[Box], side: int, heat: Sequence[tuple[Box, float]] = ()
) -> Image.Image:
    """The picture, `side` pixels long, with numbered boxes, tinted by heat where there is any."""
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    marked = picture.resize(size, Image.Resampling.NEAREST if scale > 4 else Image.Resampling.BICUBIC)
    if heat:
        marked = _tinted(marked, [(Box(*(n * scale for n in map(float, box))), w) for box, w in heat])
    draw = ImageDraw.Draw(marked)
    for i, box in enumerate(regions):
        colour = COLOURS[i % len(COLOURS)]
        left, top, right, bottom = (float(n) * scale for n in box)
        inset = min(2.0 * (i % 4), max(right - left - 4, 0) / 2, max(bottom - top - 4, 0) / 2)
        edges = (
            left + inset,
            top + inset,
            max(right - 1 - inset, left + inset),
            max(bottom - 1 - inset, top + inset),
        )
        draw.rectangle(edges, outline=colour, width=3)
        _label(draw, (left + 4 + 22 * _same_corner(regions, i, 16 / scale), top + 4), str(i + 1), colour)
    return marked


def chain_sheet(
    picture: Image.Image, chains: Sequence[tuple[str, Sequence[Box], Sequence[Image.Image]]]
) -> Image.Image:
    """A row per chain: the picture with numbered boxes and arrows from each to the next, then the views.

    A long chain's views stand in lines below each other.
    """
    scale = CHAIN_SIDE / max(picture.size)
    width, height = (max(1, round(n * scale)) for n in picture.size)
    longest = max(len(boxes) for _, boxes, _ in chains)
    columns = min(longest, CHAIN_COLUMNS)
    views = CHAIN_VIEWS // columns - GAP
    row = max(height + LINE, -(-longest // columns) * (views + GAP)) + GAP
    sheet = Image.new("RGB", (width + GAP + CHAIN_VIEWS, row * len(chains)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for r, (name, boxes, seen) in enumerate(chains):
        marked = mark_regions(picture, boxes, CHAIN_SIDE)
        centres = [
            (float(box.left + box.right) / 2 * scale, float(box.top + box.bottom) / 2 * scale)
            for box in boxes
        ]
        for i, (start, end) in enumerate(pairwise(centres)):
            _arrow(ImageDraw.Draw(marked), start, end, COLOURS[(i + 1) % len(COLOURS)])
        sheet.paste(marked, (0, r * row))
        draw.text((0, r * row + height + 2), name, FAINT, font=_font(14))
        for i, view in enumerate(seen):
            x = width + GAP + i % columns * (views + GAP)
            y = r * row + i // columns * (views + GAP)
            sheet.paste(view.resize((views, views), Image.Resampling.BICUBIC), (x, y))
            draw.rectangle((x, y, x + views - 1, y + views - 1), outline=COLOURS[i % len(COLOURS)], width=3)
            _label(draw, (x + 6, y + 5), str(i + 1), COLOURS[i % len(COLOURS)])
    return sheet


def _arrow(
    draw: ImageDraw.ImageDraw,
    start: tuple[float, float],
    end: tuple[float, float],
    colour: tuple[int, int, int],
) -> None:
    """A line with a head; nothing where both ends are the same."""
    (x, y), length = end, math.dist(start, end)
    if length < 1:
        return
    dx, dy = (x - start[0]) / length, (y - start[1]) / length
    draw.line((*start, *end), fill=colour, width=3)
    back = (x - 12 * dx, y - 12 * dy)
    draw.polygon(
        [end, (back[0] - 6 * dy, back[1] + 6 * dx), (back[0] + 6 * dy, back[1] - 6 * dx)], fill=colour
    )


def _tinted(picture: Image.Image, heat: Sequence[tuple[Box, float]]) -> Image.Image:
    """Weights as a warm tint; what was dropped, and what no box covers, turns grey and dark."""
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


def contact_sheet(views: Sequence[Image.Image], roles: Sequence[str], width: int) -> Image.Image:
    """All views side by side in rows, none of them stretched, numbered like the regions."""
    columns = next(n for n in range(1, len(views) + 1) if n * n >= len(views) or n == 6)
    side = (width - (columns - 1) * GAP) // columns
    rows = -(-len(views) // columns)
    sheet = Image.new("RGB", (width, rows * (side + LINE + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (view, role) in enumerate(zip(views, roles, strict=True)):
        x, y = (i % columns) * (side + GAP), (i // columns) * (side + LINE + GAP)
        resample = Image.Resampling.NEAREST if max(view.size) < side else Image.Resampling.BICUBIC
        shown = ImageOps.contain(view, (side, side), resample)
        sheet.paste(shown, (x, y))
        draw.rectangle(
            (x, y, x + shown.width - 1, y + shown.height - 1), outline=COLOURS[i % len(COLOURS)], width=2
        )
        text = f"{i + 1}  {role}  {view.width} x {view.height}"
        draw.text((x, y + shown.height + 2), text, FAINT, font=_font(14 if side > 150 else 10))
    return sheet


def cut_view(canvas: Image.Image, view: View) -> Image.Image:
    """One view out of its canvas, interleaved ones included."""
    part = canvas.crop(view.box.rounded())
    if view.steps == (1, 1):
        return part
    down, across = view.steps
    # The affine map reads pixel (across x, down y), sampled at its centre.
    matrix = (across, 0, 0.5 - 0.5 * across, 0, down, 0.5 - 0.5 * down)
    return part.transform((view.size.width, view.size.height), Image.Transform.AFFINE, matrix)


def _same_corner(regions: Sequence[Box], index: int, near: float) -> int:
    """How many earlier regions start nearly at the same corner: their numbers would cover each other."""
    x, y = map(float, regions[index][:2])
    return sum(abs(float(box.left) - x) < near and abs(float(box.top) - y) < near for box in regions[:index])


def _label(
    draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, colour: tuple[int, int, int]
) -> None:
    box = draw.textbbox(at, text, font=_font(16))
    draw.rectangle((box[0] - 4, box[1] - 3, box[2] + 4, box[3] + 3), fill=colour)
    draw.text(at, text, PAPER, font=_font(16))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
