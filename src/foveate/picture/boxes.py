"""Boxes in a model's text: one grammar for reading, and the formats for writing.

A text holds a box if it holds exactly one list of numbers, with exactly four of them, all finite. Prose,
brackets, tags and a lone number elsewhere do no harm; nor do two or three numbers outside a list in brackets.
Anything else is not a box, and `ReadBox.problem` says why. Corners are put in order, and boxes are clipped to
the picture. No torch.

A `BoxFormat` says what the four numbers mean, a `Frame` what they are measured in:

    unit_xyxy   [0.055, 0.249, 0.863, 0.779]     left, top, right, bottom as fractions of the frame
    unit_xxyy   [0.055, 0.863, 0.249, 0.779]     left, right, top, bottom as fractions of the frame
    qwen_vl     <box>(55,249),(863,779)</box>    thousandths of the picture (Qwen-VL)
    qwen2_vl    <|box_start|>(55,249),(863,779)<|box_end|>   the same (Qwen2-VL)
    qwen2_5_vl  {"bbox_2d": [18, 84, 290, 262]}  pixels of the picture as the model is shown it (Qwen2.5-VL)
    qwen3_vl    {"bbox_2d": [55, 249, 863, 779]} thousandths of the picture (Qwen3-VL)
    internvl    <box>[[55, 249, 863, 779]]</box> thousandths of the picture (InternVL)
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from foveate.errors import FoveateError
from foveate.picture.geometry import Box, Size, padded_square, whole

Scale = Literal["unit", "thousand", "pixels"]


@dataclass(frozen=True)
class BoxFormat:
    """How a box is written: the order of its numbers, their scale, and the text around them."""

    order: Literal["xyxy", "xxyy"]
    scale: Scale
    template: str  # one {} for each number


BOX_FORMATS: dict[str, BoxFormat] = {
    "unit_xyxy": BoxFormat("xyxy", "unit", "[{}, {}, {}, {}]"),
    "unit_xxyy": BoxFormat("xxyy", "unit", "[{}, {}, {}, {}]"),
    "qwen_vl": BoxFormat("xyxy", "thousand", "<box>({},{}),({},{})</box>"),
    "qwen2_vl": BoxFormat("xyxy", "thousand", "<|box_start|>({},{}),({},{})<|box_end|>"),
    "qwen2_5_vl": BoxFormat("xyxy", "pixels", '{{"bbox_2d": [{}, {}, {}, {}]}}'),
    "qwen3_vl": BoxFormat("xyxy", "thousand", '{{"bbox_2d": [{}, {}, {}, {}]}}'),
    "internvl": BoxFormat("xyxy", "thousand", "<box>[[{}, {}, {}, {}]]</box>"),
}
UNITS: dict[Scale, str] = {"unit": "fractions", "thousand": "thousandths", "pixels": "pixels"}
UNIT_DECIMALS = 3
FAR_OUT = 10  # a number beyond this is not a fraction; up to it, the box is clipped to the picture


@dataclass(frozen=True)
class Frame:
    """What the numbers of a box are measured in.

    Attributes:
        picture: size of the original picture.
        area: the part of it that coordinates span, in its own pixels; reaches beyond its border if padded.
        pixels: size at which the model is shown the area, for formats in pixels.
    """

    picture: Size
    area: Box
    pixels: Size

    @classmethod
    def whole(cls, picture: Size, shown: Size | None = None) -> Frame:
        """The picture itself; `shown` is its size after the model's own resizing, if known."""
        return cls(picture, whole(picture), shown or picture)

    @classmethod
    def padded(cls, picture: Size) -> Frame:
        """The picture padded to a square, as LLaVA-1.5 sees it."""
        side = max(picture)
        return cls(picture, padded_square(picture, side).source, Size(side, side))

    def extent(self, scale: Scale) -> Size:
        """Height and width of the frame in the units of a scale."""
        return {"unit": Size(1, 1), "thousand": Size(1000, 1000), "pixels": self.pixels}[scale]


class ReadBox(NamedTuple):
    """A box in original pixels, inside the picture and not empty; or why there is none."""

    box: Box | None
    problem: str | None = None


_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e[-+]?[0-9]+)?|nan|inf(?:inity)?)(?!\w)",
    re.IGNORECASE,
)
_BETWEEN = re.compile(r"[\s,;()\[\]]*")  # what may stand between two numbers of one list
_BRACKETED = re.compile(rf"[\[(]\s*{_NUMBER.pattern}(?:[\s,;]+{_NUMBER.pattern})+\s*[\])]", re.IGNORECASE)


def box_format(name: str) -> BoxFormat:
    """The format of this name. Raises `FoveateError` for unknown ones."""
    if name not in BOX_FORMATS:
        raise FoveateError(f"unknown box format {name!r}: choose one of {', '.join(BOX_FORMATS)}")
    return BOX_FORMATS[name]


def read_box(text: str, form: BoxFormat, frame: Frame) -> ReadBox:
    """The box that a text holds."""
    lists = _lists(text)
    if not lists:
        return ReadBox(None, "the text holds no list of numbers")
    if len(lists) > 1:
        return ReadBox(None, f"the text holds {len(lists)} lists of numbers, not one")
    if len(lists[0]) != 4:
        return ReadBox(None, f"the list has {len(lists[0])} numbers, not 4")
    a, b, c, d = lists[0]
    values = (a, b, c, d) if form.order == "xyxy" else (a, c, b, d)
    if not all(map(math.isfinite, values)):
        return ReadBox(None, "a number of the list is not finite")
    problem = _off_scale(values, form.scale)
    if problem is not None:
        return ReadBox(None, problem)
    area, extent = frame.area, frame.extent(form.scale)
    x, y = area.width / extent.width, area.height / extent.height
    placed = [area.left + values[0] * x, area.top + values[1] * y]
    placed += [area.left + values[2] * x, area.top + values[3] * y]
    return checked_box(placed, frame.picture)


def _off_scale(values: Sequence[float], scale: Scale) -> str | None:
    """Why four finite numbers are of another scale, or of two; None where they may be of this one."""
    fractions = [value for value in values if 0 < abs(value) < 1]
    far = max(values, key=abs)
    if scale == "unit" and fractions and abs(far) > FAR_OUT:
        return f"{far:g} stands beside fractions, and is not one"
    if scale != "unit" and fractions:
        return f"{fractions[0]:g} looks like a fraction, where {UNITS[scale]} are expected"
    return None


def _lists(text: str) -> list[list[float]]:
    """Lists of numbers: those in brackets, and other runs that are long enough to be a list."""
    bracketed = _runs(text, _BRACKETED)
    bare = _runs(_BRACKETED.sub("|", text), _NUMBER)
    return bracketed + [numbers for numbers in bare if len(numbers) >= (4 if bracketed else 2)]


def _runs(text: str, piece: re.Pattern[str]) -> list[list[float]]:
    """The numbers of pieces of a text; pieces with only separators between them form one run."""
    runs: list[list[float]] = []
    end = None
    for match in piece.finditer(text):
        if end is None or not _BETWEEN.fullmatch(text, end, match.start()):
            runs.append([])
        runs[-1] += [float(number.group()) for number in _NUMBER.finditer(match.group())]
        end = match.end()
    return runs


def checked_box(values: Sequence[float], picture: Size) -> ReadBox:
    """Checks and clips a box: left, top, right, bottom in original pixels."""
    if len(values) != 4:
        return ReadBox(None, f"the list has {len(values)} numbers, not 4")
    if not all(map(math.isfinite, values)):
        return ReadBox(None, "a number of the list is not finite")
    left, right = sorted((values[0], values[2]))
    top, bottom = sorted((values[1], values[3]))
    if left == right or top == bottom:
        return ReadBox(None, "the box has no area")
    box = Box(left, top, right, bottom).clipped(picture)
    if box.width <= 0 or box.height <= 0:
        return ReadBox(None, "the box lies outside the picture")
    return ReadBox(box)


def write_box(box: Box, form: BoxFormat, frame: Frame) -> str:
    """A box in original pixels as text; fractions have three decimals, other scales whole numbers."""
    area, extent = frame.area, frame.extent(form.scale)
    left, right = (float((n - area.left) * extent.width / area.width) for n in (box.left, box.right))
    top, bottom = (float((n - area.top) * extent.height / area.height) for n in (box.top, box.bottom))
    values = (left, top, right, bottom) if form.order == "xyxy" else (left, right, top, bottom)
    digits = UNIT_DECIMALS if form.scale == "unit" else None
    return form.template.format(*(round(n, digits) for n in values))


def fitted(box: Box, picture: Size, *, extend: float = 0.0, minimum: int = 1) -> Box:
    """The box in whole pixels, ready to be cropped.

    Args:
        box: original pixels, not empty, inside the picture.
        picture: its size.
        extend: fraction by which width and height grow first, about the centre.
        minimum: least length of a side in pixels, unless the picture is smaller.

    Raises:
        FoveateError: a negative extension, or a minimum below 1.
    """
    if extend < 0 or minimum < 1:
        raise FoveateError(f"a box needs extend >= 0 and minimum >= 1, not {extend} and {minimum}")
    left, right = _fitted(float(box.left), float(box.right), picture.width, extend, minimum)
    top, bottom = _fitted(float(box.top), float(box.bottom), picture.height, extend, minimum)
    return Box(left, top, right, bottom)


def _fitted(low: float, high: float, length: int, extend: float, minimum: int) -> tuple[int, int]:
    margin = (high - low) * extend / 2
    first, last = round(max(low - margin, 0)), round(min(high + margin, length))
    side = min(max(last - first, minimum), length)
    if last - first < side:  # about the same centre, moved inside
        first = min(max(math.floor((low + high - side) / 2), 0), length - side)
        last = first + side
    return first, last
