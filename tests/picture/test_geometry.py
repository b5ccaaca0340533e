"""Whole-number geometry: what must hold for any size."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.picture.geometry import (
    Box,
    Canvas,
    Size,
    View,
    ViewPlan,
    best_fit,
    centre_cropped,
    letterboxed,
    padded_square,
    squashed,
    tiled,
    unpadded,
    whole,
)

sides = st.integers(1, 6000)
sizes = st.builds(Size, sides, sides)
FITS = {
    "pad": lambda picture: padded_square(picture, 336),
    "crop": lambda picture: centre_cropped(picture, 336),
    "squash": lambda picture: squashed(picture, Size(336, 336)),
    "letterbox": lambda picture: letterboxed(picture, Size(672, 1008)),
}


def plan_of(picture: Size, canvas: Canvas, box: Box | None = None, stride: int = 1) -> ViewPlan:
    view = View(0, box or whole(canvas.size), "global", stride)
    return ViewPlan(picture, (canvas,), (view,), 1)


@pytest.mark.parametrize("fit", FITS)
@given(sizes, st.integers(0, 300), st.integers(0, 300), st.integers(1, 4))
def test_boxes_go_there_and_back(fit: str, picture: Size, left: int, top: int, stride: int) -> None:
    canvas = FITS[fit](picture)
    plan = plan_of(picture, canvas, Box(left, top, left + 36, top + 30), stride)
    box = Box(1, 2, Fraction(7, 3), 11)
    assert plan.to_view(0, plan.to_picture(0, box)) == box
    assert plan.to_picture(0, plan.to_view(0, box)) == box
    assert plan.views[0].size == Size(-(-30 // stride), -(-36 // stride))


@pytest.mark.parametrize("fit", ["pad", "squash", "letterbox"])
@given(sizes)
def test_the_whole_picture_lies_on_the_canvas(fit: str, picture: Size) -> None:
    plan = plan_of(picture, FITS[fit](picture))
    assert plan.regions == (whole(picture),)
    seen = plan.to_view(0, whole(picture))
    side = plan.canvases[0].size
    assert seen.left >= 0 <= seen.top
    assert seen.right <= side.width
    assert seen.bottom <= side.height
    assert plan.effective.height <= picture.height
    assert plan.effective.width <= picture.width


@given(sizes)
def test_a_crop_keeps_the_middle_and_the_short_edge(picture: Size) -> None:
    canvas = centre_cropped(picture, 336)
    assert min(canvas.content.width, canvas.content.height) == 336
    region = plan_of(picture, canvas).regions[0]
    long = max(region.width / picture.width, region.height / picture.height)
    assert long == 1  # nothing is lost of the short edge
    for low, high, side in (
        (region.left, region.right, picture.width),
        (region.top, region.bottom, picture.height),
    ):
        pixel = Fraction(min(picture), 336)
        assert abs(low - (side - high)) <= 2 * pixel  # as much on either side, up to rounding


@given(sizes)
def test_padding_makes_a_square_around_the_middle(picture: Size) -> None:
    source = padded_square(picture, 336).source
    assert source.width == source.height == max(picture)
    assert -source.left - (source.right - picture.width) in (-1, 0)
    assert -source.top - (source.bottom - picture.height) in (-1, 0)


@given(sizes, st.integers(1, 6), st.integers(1, 6))
def test_a_letterbox_touches_two_borders(picture: Size, rows: int, columns: int) -> None:
    canvas = letterboxed(picture, Size(336 * rows, 336 * columns))
    content = canvas.content
    assert content.width == canvas.size.width or content.height == canvas.size.height
    assert 1 <= content.width <= canvas.size.width
    assert 1 <= content.height <= canvas.size.height
    assert 0 <= content.left - (canvas.size.width - content.right) + 1 <= 1
    assert 0 <= content.top - (canvas.size.height - content.bottom) + 1 <= 1


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 50), st.integers(1, 50))
def test_tiles_cover_a_canvas_once(rows: int, columns: int, height: int, width: int) -> None:
    views = tiled(0, Size(rows, columns), Size(height, width))
    cells = {(view.box.top // height, view.box.left // width) for view in views}
    assert cells == {(r, c) for r in range(rows) for c in range(columns)}
    assert len(views) == rows * columns
    assert all(view.size == Size(height, width) for view in views)
    assert [(v.box.top, v.box.left) for v in views] == sorted((v.box.top, v.box.left) for v in views)


@given(sizes)
def test_best_fit_keeps_most_pixels(picture: Size) -> None:
    canvases = [Size(336, 672), Size(672, 336), Size(672, 672), Size(1008, 336), Size(336, 1008)]
    best = best_fit(picture, canvases)

    def kept(canvas: Size) -> int:
        scale = min(canvas.width / picture.width, canvas.height / picture.height)
        return min(int(picture.width * scale) * int(picture.height * scale), picture.height * picture.width)

    assert kept(best) == max(map(kept, canvases))
    rivals = [c for c in canvases if kept(c) == kept(best)]
    assert best.height * best.width == min(c.height * c.width for c in rivals)
    assert best_fit(picture, [best, best]) == best


@given(sizes, st.integers(1, 100), st.integers(1, 100))
def test_cutting_padding_off_keeps_the_middle(picture: Size, height: int, width: int) -> None:
    rows, columns = unpadded(Size(height, width), picture)
    assert rows.start == height - rows.stop
    assert columns.start == width - columns.stop
    assert rows == slice(0, height) or columns == slice(0, width)


def test_boxes() -> None:
    box = Box(-3, Fraction(1, 2), 7.6, 20)
    assert box.clipped(Size(10, 5)) == Box(0, Fraction(1, 2), 5, 10)
    assert box.rounded() == (-3, 0, 8, 20)
    assert (box.width, box.height) == (10.6, Fraction(39, 2))
    assert Box(9, 9, 12, 12).clipped(Size(5, 5)) == Box(5, 5, 5, 5)


def test_boxes_contain_and_overlap() -> None:
    box = Box(Fraction(100, 3), 20, 90, 70)
    assert box.contains(Box(40, 30, 90, 70)) and box.contains(box)
    assert not box.contains(Box(10, 30, 60, 40)) and not box.contains(Box(40, 30, 91, 70))
    assert Box(0, 0, 10, 10).overlap(Box(5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert box.overlap(box) == 1
    assert Box(0, 0, 10, 10).overlap(Box(10, 0, 20, 10)) == 0 == Box(0, 0, 1, 1).overlap(Box(5, 5, 6, 6))


def test_boxes_are_shown_to_a_hundredth_and_stay_exact() -> None:
    box = Box(Fraction(25, 2), 0, 340, Fraction(298, 3))
    assert str([box]) == "[Box(12.5, 0, 340, 99.33)]"
    assert box.bottom == Fraction(298, 3)
    assert repr(Box(-0.001, 1e6, float("inf"), 100)) == "Box(0, 1000000, inf, 100)"
    assert repr(Box("a", None, 1, 2)) == "Box('a', None, 1, 2)"  # type: ignore[arg-type]
