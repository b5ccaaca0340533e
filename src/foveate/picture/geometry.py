"""How pictures, canvases, views and boxes are placed in each other. Whole numbers only, no torch.

A part of the picture (`Canvas.source`) is resized onto a canvas (`Canvas.content`), and every view is cut
from one canvas. All three steps are affine, so any box can be carried between a view and the original
picture exactly; `ViewPlan.to_picture` and `ViewPlan.to_view` do it in fractions.

Sizes are (height, width) and boxes (left, top, right, bottom), in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from numbers import Real
from typing import Literal, NamedTuple, TypeAlias

Number: TypeAlias = int | float | Fraction
Fill: TypeAlias = Literal["black", "mean"]


class Size(NamedTuple):
    """Height and width in pixels, or in tokens or tiles where a name says so."""

    height: int
    width: int


class Box(NamedTuple):
    """Left, top, right, bottom; right and bottom are exclusive. May reach beyond a padded picture."""

    left: Number
    top: Number
    right: Number
    bottom: Number

    def __repr__(self) -> str:
        """Rounded to a hundredth of a pixel; the numbers themselves are exact."""
        return f"Box({', '.join(_shown(number) for number in self)})"

    @property
    def width(self) -> Number:
        return self.right - self.left

    @property
    def height(self) -> Number:
        return self.bottom - self.top

    def clipped(self, size: Size) -> Box:
        """The part inside a picture of `size`; empty boxes collapse onto its border."""
        return Box(
            min(max(self.left, 0), size.width),
            min(max(self.top, 0), size.height),
            min(max(self.right, 0), size.width),
            min(max(self.bottom, 0), size.height),
        )

    def inside(self, size: Size) -> Box | None:
        """The part inside a picture of `size`; None if there is none."""
        part = self.clipped(size)
        return part if part.width > 0 and part.height > 0 else None

    def contains(self, other: Box) -> bool:
        """Whether all of `other` lies in it."""
        return (
            self.left <= other.left
            and self.top <= other.top
            and self.right >= other.right
            and self.bottom >= other.bottom
        )

    def overlap(self, other: Box) -> float:
        """Intersection over union (IoU), 0 to 1."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        if width <= 0 or height <= 0:
            return 0.0
        both = width * height
        return float(both / (self.width * self.height + other.width * other.height - both))

    def rounded(self) -> tuple[int, int, int, int]:
        """Nearest whole pixels, for drawing and for JSON."""
        return round(self.left), round(self.top), round(self.right), round(self.bottom)


def _shown(number: Number) -> str:
    if not isinstance(number, Real):  # for the message about a wrong type
        return repr(number)
    return f"{round(float(number), 2) + 0:.2f}".rstrip("0").rstrip(".")


NO_TILES = Size(0, 0)


@dataclass(frozen=True)
class Canvas:
    """The picture as a method resizes and pads it, before views are cut.

    `source` is read from the original picture (outside it is `fill`) and resized onto `content`, a box on
    the canvas; the rest of the canvas is `fill`, and parts of `content` outside it are cut off.
    """

    size: Size
    source: Box  # whole pixels of the original picture
    content: Box  # whole pixels of the canvas
    fill: Fill = "black"

    def place(self, box: Box) -> Box:
        """A box of the original picture in pixels of the canvas."""
        x, y = _axes(self)
        return Box(
            (box.left - x.source) / x.scale + x.content,
            (box.top - y.source) / y.scale + y.content,
            (box.right - x.source) / x.scale + x.content,
            (box.bottom - y.source) / y.scale + y.content,
        )


@dataclass(frozen=True)
class View:
    """One picture for the vision tower: `box` of canvas number `canvas`, every `stride`-th pixel of it.

    A stride of type `Size` has separate steps for rows and columns.
    """

    canvas: int
    box: Box
    role: str
    stride: int | Size = 1

    @property
    def steps(self) -> Size:
        """Pixels of the canvas from one row of the view to the next, and from one column to the next."""
        return self.stride if isinstance(self.stride, Size) else Size(self.stride, self.stride)

    @property
    def size(self) -> Size:
        return Size(
            len(range(int(self.box.top), int(self.box.bottom), self.steps.height)),
            len(range(int(self.box.left), int(self.box.right), self.steps.width)),
        )


@dataclass(frozen=True)
class ViewPlan:
    """All that a method decides from a picture's size: canvases, views, and the number of LLM tokens.

    Attributes:
        picture: size of the original picture.
        canvases: what the views are cut from.
        views: in the order in which the vision tower gets them.
        tokens: number of placeholders of this picture in the LLM's sequence.
        tiles: rows and columns of the tile grid; (0, 0) if there is none.
    """

    picture: Size
    canvases: tuple[Canvas, ...]
    views: tuple[View, ...]
    tokens: int
    tiles: Size = NO_TILES

    def to_picture(self, view: int, box: Iterable[Number]) -> Box:
        """Carries a box from pixels of view number `view` to pixels of the original picture, exactly."""
        v = self.views[view]
        canvas = self.canvases[v.canvas]
        x, y = _axes(canvas)
        left, top, right, bottom = (Fraction(n) for n in box)
        return Box(
            x.source + (v.box.left + left * v.steps.width - x.content) * x.scale,
            y.source + (v.box.top + top * v.steps.height - y.content) * y.scale,
            x.source + (v.box.left + right * v.steps.width - x.content) * x.scale,
            y.source + (v.box.top + bottom * v.steps.height - y.content) * y.scale,
        )

    def to_view(self, view: int, box: Iterable[Number]) -> Box:
        """The inverse of `to_picture`."""
        v = self.views[view]
        place = self.canvases[v.canvas].place(Box(*(Fraction(n) for n in box)))
        return Box(
            (place.left - v.box.left) / v.steps.width,
            (place.top - v.box.top) / v.steps.height,
            (place.right - v.box.left) / v.steps.width,
            (place.bottom - v.box.top) / v.steps.height,
        )

    @cached_property
    def regions(self) -> tuple[Box, ...]:
        """Per view, the part of the original picture that it shows."""
        whole = (Box(0, 0, v.size.width, v.size.height) for v in self.views)
        return tuple(self.to_picture(i, box).clipped(self.picture) for i, box in enumerate(whole))

    @property
    def effective(self) -> Size:
        """The finest resolution at which the whole picture is seen: never more than its own pixels."""
        height, width = 0, 0
        for canvas in self.canvases:
            x, y = _axes(canvas)
            height = max(height, min(self.picture.height, int(self.picture.height / y.scale)))
            width = max(width, min(self.picture.width, int(self.picture.width / x.scale)))
        return Size(height, width)


class _Axis(NamedTuple):
    source: Fraction
    content: Fraction
    scale: Fraction  # original pixels per canvas pixel


def _axes(canvas: Canvas) -> tuple[_Axis, _Axis]:
    source, content = canvas.source, canvas.content
    return (
        _Axis(
            Fraction(source.left), Fraction(content.left), Fraction(source.width) / Fraction(content.width)
        ),
        _Axis(
            Fraction(source.top), Fraction(content.top), Fraction(source.height) / Fraction(content.height)
        ),
    )


def whole(size: Size) -> Box:
    """The box that covers a picture or canvas of `size`."""
    return Box(0, 0, size.width, size.height)


def squashed(picture: Size, canvas: Size) -> Canvas:
    """The picture stretched over the whole canvas, its aspect ratio lost."""
    return Canvas(canvas, whole(picture), whole(canvas))


def padded_square(picture: Size, side: int, fill: Fill = "mean") -> Canvas:
    """The picture padded to a square at its own resolution, then resized (LLaVA-1.5)."""
    return padded(picture, Size(side, side), fill)


def padded(picture: Size, canvas: Size, fill: Fill = "mean") -> Canvas:
    """The picture padded at its own resolution to the canvas's aspect ratio, up to a pixel, then resized."""
    height = max(picture.height, -(-picture.width * canvas.height // canvas.width))
    width = max(picture.width, -(-picture.height * canvas.width // canvas.height))
    left, top = (width - picture.width) // 2, (height - picture.height) // 2
    return Canvas(canvas, Box(-left, -top, width - left, height - top), whole(canvas), fill)


def centre_cropped(picture: Size, side: int) -> Canvas:
    """The short edge resized to `side`, and cropped to the middle (CLIP's own preprocessing)."""
    return cropped(picture, Size(side, side))


def cropped(picture: Size, canvas: Size) -> Canvas:
    """The picture resized so that it just covers the canvas, and cropped to the middle."""
    if picture.height * canvas.width <= picture.width * canvas.height:
        height, width = canvas.height, int(canvas.height * picture.width / picture.height)
    else:
        height, width = int(canvas.width * picture.height / picture.width), canvas.width
    top, left = (height - canvas.height) // 2, (width - canvas.width) // 2
    return Canvas(canvas, whole(picture), Box(-left, -top, width - left, height - top))


def letterboxed(picture: Size, canvas: Size, fill: Fill = "black") -> Canvas:
    """The picture scaled to fit inside the canvas and centred on it (LLaVA-NeXT).

    The side that does not touch the border is rounded up in floating point, as in the released models.
    """
    scale_w, scale_h = canvas.width / picture.width, canvas.height / picture.height
    if scale_w < scale_h:
        height, width = min(math.ceil(picture.height * scale_w), canvas.height), canvas.width
    else:
        height, width = canvas.height, min(math.ceil(picture.width * scale_h), canvas.width)
    left, top = (canvas.width - width) // 2, (canvas.height - height) // 2
    return Canvas(canvas, whole(picture), Box(left, top, left + width, top + height), fill)


def tiled(canvas: int, tiles: Size, side: Size, role: str = "tile") -> tuple[View, ...]:
    """A grid of equal contiguous tiles over canvas number `canvas`, row by row."""
    return tuple(
        View(canvas, Box(c * side.width, r * side.height, (c + 1) * side.width, (r + 1) * side.height), role)
        for r in range(tiles.height)
        for c in range(tiles.width)
    )


def interleaved(canvas: int, tiles: Size, side: Size, role: str = "interleaved") -> tuple[View, ...]:
    """Views of all of canvas number `canvas`, each of every tiles.height-th row and tiles.width-th column.

    They come row by row; view (r, c) starts at pixel (r, c). What is left over after `side` is dropped.
    """
    right, bottom = tiles.width * side.width, tiles.height * side.height
    return tuple(
        View(canvas, Box(c, r, right, bottom), role, tiles)
        for r in range(tiles.height)
        for c in range(tiles.width)
    )


def best_fit(picture: Size, canvases: Iterable[Size]) -> Size:
    """The canvas that keeps most of the picture's pixels and, on a tie, wastes least (LLaVA-NeXT).

    On a full tie the first one is taken.
    """

    def score(canvas: Size) -> tuple[int, int]:
        scale = min(canvas.width / picture.width, canvas.height / picture.height)
        used = int(picture.width * scale) * int(picture.height * scale)
        used = min(used, picture.width * picture.height)
        return used, -(canvas.height * canvas.width - used)

    return max(canvases, key=score)


def unpadded(grid: Size, picture: Size) -> tuple[slice, slice]:
    """Rows and columns of a feature grid that remain after the letterbox padding is cut off (LLaVA-NeXT)."""
    if picture.width / picture.height > grid.width / grid.height:
        height = int(round(picture.height * (grid.width / picture.width), 7))
        pad = (grid.height - height) // 2
        return slice(pad, grid.height - pad), slice(0, grid.width)
    width = int(round(picture.width * (grid.height / picture.height), 7))
    pad = (grid.width - width) // 2
    return slice(0, grid.height), slice(pad, grid.width - pad)
