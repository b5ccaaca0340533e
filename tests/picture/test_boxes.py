"""Boxes in text: what counts as one, what the four numbers mean, and that nothing else gets through."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foveate.errors import FoveateError
from foveate.picture.boxes import (
    BOX_FORMATS,
    Frame,
    ReadBox,
    box_format,
    checked_box,
    fitted,
    read_box,
    write_box,
)
from foveate.picture.geometry import Box, Size

UNIT = BOX_FORMATS["unit_xyxy"]
PICTURE = Size(40, 60)  # height, width; padded to 60 x 60 with 10 rows above


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[0.055, 0.249, 0.863, 0.779]", (0.055, 0.249, 0.863, 0.779)),
        ("0.055,0.249,0.863,0.779", (0.055, 0.249, 0.863, 0.779)),
        ("(0.055, 0.249), (0.863, 0.779).", (0.055, 0.249, 0.863, 0.779)),
        ("Region 1 is\n [[0.055 0.249\n 0.863 0.779]] with 2 people", (0.055, 0.249, 0.863, 0.779)),
        ("[5.5e-2, 2.49E-1, .863, +0.779]", (0.055, 0.249, 0.863, 0.779)),
        ("[0.863, 0.779, 0.055, 0.249]", (0.055, 0.249, 0.863, 0.779)),  # ordered
        ("Region 1 [0.1, 0.2, 0.3, 0.4]", (0.1, 0.2, 0.3, 0.4)),
        ("1) (0.1, 0.2),(0.3, 0.4) 2 people", (0.1, 0.2, 0.3, 0.4)),
        ("2.\n[[0.1, 0.2, 0.3, 0.4]] (0.9)", (0.1, 0.2, 0.3, 0.4)),
        ('{"bbox_2d": [0.1, 0.2, 0.3, 0.4], "label": "12, 13 Main St"}', (0.1, 0.2, 0.3, 0.4)),
        ("[0.1, 0.2, 0.3, 0.4", (0.1, 0.2, 0.3, 0.4)),  # cut off after the last number
        ("[-0.2, 0.25, 0.5, 7]", (0, 0.25, 0.5, 1)),  # cut off
    ],
)
def test_what_is_a_box(text: str, part: tuple[float, ...]) -> None:
    reading = read_box(text, UNIT, Frame.whole(Size(1000, 1000)))
    assert reading.problem is None
    assert reading.box == pytest.approx([1000 * n for n in part])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no list"),
        ("The whole image.", "no list"),
        ("0.5", "no list"),
        ("x0.1y, 0.2z, 3a, 4b", "no list"),
        ("[0.1, 0.2, 0.3]", "3 numbers"),
        ("[0.1, 0.2, 0.3, 0.4, 0.5]", "5 numbers"),
        ("[0.1, 0.2], [0.3, 0.4, 0.5]", "5 numbers"),
        ("0.9 [0.1, 0.2, 0.3]", "3 numbers"),
        ("[0.1, 0.2, 0.3, 0.4], 0.5, 0.6, 0.7, 0.8", "2 lists"),
        ("[0.1, 0.2, 0.3, 0.4] " * 500, "2000 numbers"),
        ("[0.1, 0.2, 0.3, 0.4] or else [0.5, 0.6, 0.7, 0.8]", "2 lists"),
        ("0.1-0.2, 0.3-0.4", "2 numbers"),  # a dash belongs to no list: 0.2 and 0.3 go together
        ("[nan, 0.1, 0.5, 0.6]", "finite"),
        ("[0.1, 0.1, -Infinity, 0.6]", "finite"),
        ("[0.1, 0.1, 1e999, 0.6]", "finite"),
        ("[0.1, 0.1, " + "9" * 5000 + ", 0.6]", "finite"),
        ("[0.5, 0.5, 0.5, 0.5]", "no area"),
        ("[0.5, 0.1, 0.5, 0.9]", "no area"),
        ("[12, 30, 80, 95]", "outside"),
        ("[-0.5, 0.2, -0.1, 0.4]", "outside"),
    ],
)
def test_what_is_none_and_why(text: str, problem: str) -> None:
    reading = read_box(text, UNIT, Frame.whole(Size(1000, 1000)))
    assert reading.box is None
    assert reading.problem is not None
    assert problem in reading.problem


@pytest.mark.parametrize(
    ("side", "box", "xyxy", "xxyy"),
    [
        (1527, (0, 0, 1527, 1527), "[0.0, 0.0, 1.0, 1.0]", "[0.0, 1.0, 0.0, 1.0]"),
        (1738, (690, 677, 1339, 1689), "[0.397, 0.39, 0.77, 0.972]", "[0.397, 0.77, 0.39, 0.972]"),
        (862, (554, 725, 861, 749), "[0.643, 0.841, 0.999, 0.869]", "[0.643, 0.999, 0.841, 0.869]"),
    ],
)
def test_three_decimals(side: int, box: tuple[int, ...], xyxy: str, xxyy: str) -> None:
    frame = Frame.padded(Size(side, side))
    for name, text in (("unit_xyxy", xyxy), ("unit_xxyy", xxyy)):
        assert write_box(Box(*box), BOX_FORMATS[name], frame) == text
        read = read_box(text, BOX_FORMATS[name], frame).box
        assert read == pytest.approx(box, abs=side * 0.0005)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("unit_xyxy", "[0.25, 0.5, 0.75, 0.875]"),
        ("unit_xxyy", "[0.25, 0.75, 0.5, 0.875]"),
        ("qwen_vl", "<box>(250,500),(750,875)</box>"),
        ("qwen2_vl", "<|box_start|>(250,500),(750,875)<|box_end|>"),
        ("qwen2_5_vl", '{"bbox_2d": [25, 40, 75, 70]}'),
        ("qwen3_vl", '{"bbox_2d": [250, 500, 750, 875]}'),
        ("internvl", "<box>[[250, 500, 750, 875]]</box>"),
    ],
)
def test_each_convention_is_written_and_read(name: str, text: str) -> None:
    frame = Frame.whole(Size(400, 800), shown=Size(80, 100))
    box = Box(200, 200, 600, 350)
    assert write_box(box, box_format(name), frame) == text
    assert read_box(f"It is here: {text}.", box_format(name), frame).box == pytest.approx(tuple(box))


def test_unknown_format() -> None:
    with pytest.raises(FoveateError, match="unit_xyxy"):
        box_format("corners")


def test_padding_is_no_place_to_look() -> None:
    assert Frame.padded(PICTURE).area == Box(0, -10, 60, 50)
    assert (
        read_box("[0, 0, 1, 0.1]", UNIT, Frame.padded(PICTURE)).problem == "the box lies outside the picture"
    )
    assert read_box("[0, 0, 1, 0.5]", UNIT, Frame.padded(PICTURE)).box == Box(0, 0, 60, 20)


sides = st.integers(1, 3000)
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@PATIENT
@given(st.data(), sides, sides, st.sampled_from(sorted(BOX_FORMATS)))
def test_writing_and_reading_agree(data: st.DataObject, height: int, width: int, name: str) -> None:
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    right, bottom = data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height))
    frame = Frame.padded(Size(height, width))
    box, form = Box(left, top, right, bottom), BOX_FORMATS[name]
    reading = read_box(write_box(box, form, frame), form, frame)
    step = max(height, width) * 0.0005 + 1e-6
    if reading.box is None:
        assert min(box.width, box.height) <= 2 * step  # too thin for three decimals
    else:
        assert reading.box == pytest.approx(tuple(box), abs=step)


@PATIENT
@given(
    sides, sides, st.lists(st.floats(-10, 5000), min_size=4, max_size=4), st.floats(0, 3), st.integers(1, 60)
)
def test_a_fitted_box_can_always_be_cropped(
    height: int, width: int, values: list[float], extend: float, minimum: int
) -> None:
    picture = Size(height, width)
    box = checked_box(values, picture).box
    if box is not None:
        crop = fitted(box, picture, extend=extend, minimum=minimum)
        assert all(isinstance(n, int) for n in crop)
        assert crop.clipped(picture) == crop
        assert crop.width >= min(minimum, width) and crop.height >= min(minimum, height)


def test_extension_and_minimum() -> None:
    picture = Size(100, 100)
    assert fitted(Box(40, 40, 60, 60), picture, extend=0.5) == Box(35, 35, 65, 65)
    assert fitted(Box(0, 40, 20, 60), picture, extend=0.5) == Box(0, 35, 25, 65)
    assert fitted(Box(98.2, 50, 98.4, 50.5), picture, minimum=8) == Box(92, 46, 100, 54)
    assert fitted(Box(0, 0, 1, 1), Size(1, 1), extend=0.1, minimum=8) == Box(0, 0, 1, 1)
    with pytest.raises(FoveateError, match="extend"):
        fitted(Box(0, 0, 1, 1), picture, extend=-0.1)


def test_boxes_that_come_as_numbers() -> None:
    assert checked_box([30, 5, 10, 50], Size(40, 60)).box == Box(10, 5, 30, 40)
    assert checked_box([1, 2, 3], Size(40, 60)).problem == "the list has 3 numbers, not 4"
    assert checked_box([math.nan, 0, 1, 1], Size(40, 60)).problem is not None


@pytest.mark.parametrize("name", ["qwen_vl", "qwen2_5_vl", "qwen3_vl", "internvl"])
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[0.12, 0.30, 0.45, 0.62]", "0.12 looks like a fraction, where (pixels|thousandths) are expected"),
        ("[100, 200, 300, 0.7]", "0.7 looks like a fraction"),
        ("[0, 0, 1, 0.5]", "0.5 looks like a fraction"),
        ("[-0.5, 2, 30, 40]", "-0.5 looks like a fraction"),
    ],
)
def test_fractions_are_not_pixels(name: str, text: str, problem: str) -> None:
    found = read_box(text, BOX_FORMATS[name], Frame.whole(Size(480, 640)))
    assert found.box is None and re.match(problem, found.problem or "")


def test_pixels_beside_fractions_are_named() -> None:
    frame = Frame.whole(Size(480, 640))
    found = read_box("[0.1, 0.2, 0.5, 450]", BOX_FORMATS["unit_xyxy"], frame)
    assert found == ReadBox(None, "450 stands beside fractions, and is not one")


@pytest.mark.parametrize(
    "text", ["[nan1, 2, 3, 4]", "[infe3, 1, 2, 3]", "[inf e3, 1, 2, 3]", "[1, 2, 3, nane-1]", "[1e, 2, 3, 4]"]
)
def test_words_that_begin_like_numbers_are_none(text: str) -> None:
    assert read_box(text, BOX_FORMATS["qwen_vl"], Frame.whole(Size(480, 640))).box is None


def test_numbers_of_any_length_are_read() -> None:
    for text in (f"[{'9' * 5000}, 1, 2, 3]", f"[1, 2, 3, 1e{'9' * 5000}]", f"[{'0.' + '1' * 9000}, 1, 2, 3]"):
        assert read_box(text, BOX_FORMATS["qwen_vl"], Frame.whole(Size(480, 640))).box is None
