"""Drawings: what is legible, what hides nothing, and where padding is said to be."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from foveate.picture.drawing import (
    ANSWER,
    COLOURS,
    INK,
    MARGIN,
    PAPER,
    SMALL,
    TEXT,
    WIDTH,
    Shown,
    chain_sheet,
    contact_sheet,
    draw,
    lay_out,
    mark_regions,
    shown_views,
)
from foveate.picture.geometry import Box, Size, ViewPlan, interleaved, letterboxed, padded_square, tiled

GREEN, PURPLE = (9, 200, 9), (250, 0, 250)
ON_A_PAGE = 800 / WIDTH  # what a web page makes of a drawing


def is_colour(drawing: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    """(H, W) bool"""
    return (np.asarray(drawing) == colour).all(-1)


def plan_of(size: Size, tiles: Size, side: int = 40) -> ViewPlan:
    """One padded view, tiles of a letterboxed canvas, and interleaved views of it."""
    canvas = letterboxed(size, Size(tiles.height * side, tiles.width * side))
    views = tiled(0, Size(1, 1), Size(side, side), "global")
    views += tiled(1, tiles, Size(side, side)) + interleaved(1, tiles, Size(side, side))
    return ViewPlan(size, (padded_square(size, side), canvas), views, 1, tiles)


def painted(plan: ViewPlan, colour: tuple[int, int, int] | str) -> list[Image.Image]:
    """The plan's canvases, all of one colour, padding included."""
    return [Image.new("RGB", (c.size.width, c.size.height), colour) for c in plan.canvases]


def test_letters_are_legible_on_a_page() -> None:
    assert min(ANSWER, TEXT, SMALL) * ON_A_PAGE >= 12


def test_question_answer_and_cost_stand_above_the_picture() -> None:
    picture = Image.new("RGB", (90, 60), GREEN)
    caption = [("Q  What is it?", False), ("A  A bus.", True), ("5 views", False)]
    drawing = lay_out(picture, [], [Shown("whole", picture)], caption)
    assert drawing.width == WIDTH
    shown, text = is_colour(drawing, GREEN).any(1), is_colour(drawing, INK).any(1)
    assert text.any() and shown.any()
    assert np.flatnonzero(text).max() < np.flatnonzero(shown).min()


@pytest.mark.parametrize(
    "text",
    ["word " * 900, "w" * 4000, "你好世界" * 200, "مرحبا Привет é 🙂", "\ud800 \x00 \x1b[1m\n", "", " "],
)
def test_any_text_is_drawn_within_the_margins(text: str) -> None:
    picture = Image.new("RGB", (90, 60), GREEN)
    drawing = lay_out(picture, [], [Shown("whole", picture)], [(text, False), (text, True)])
    paper = is_colour(drawing, PAPER)
    assert paper[:, :MARGIN].all() and paper[:, -MARGIN:].all() and paper[:MARGIN].all()
    assert drawing.height < 1400  # long text is cut


@pytest.mark.parametrize("place", [(0, 0), (145, 95), (75, 50), (0, 50), (75, 95), (145, 0)])
@pytest.mark.parametrize("side", [1, 5])
def test_small_regions_are_hidden_by_nothing(place: tuple[int, int], side: int) -> None:
    """Neither by a frame nor by a number, their own or another's."""
    picture = Image.new("RGB", (150, 100), GREEN)
    region = Box(place[0], place[1], place[0] + side, place[1] + side)
    picture.paste(PURPLE, region.rounded())
    regions = [Box(0, 0, 150, 100), region, Box(25, 25, 125, 75)]
    marked = mark_regions(picture, regions, 800, 800)
    assert is_colour(marked, COLOURS[1]).sum() > 200  # it has a number
    alone = mark_regions(picture, [Box(0, 0, 150, 100)] * 3, 800, 800)
    assert marked.size == alone.size
    assert is_colour(marked, PURPLE).sum() >= is_colour(alone, PURPLE).sum() > 15 * side**2


def test_numbers_stand_beside_each_other() -> None:
    """Also where regions are the same, or next to each other at the picture's border."""
    picture = Image.new("RGB", (600, 400), GREEN)
    regions = [Box(0, 0, 12, 12), Box(0, 0, 12, 12), Box(14, 0, 26, 12), Box(0, 14, 12, 26)]
    marked = mark_regions(picture, regions, 600, 600)
    alone = mark_regions(picture, [Box(300, 200, 312, 212)], 600, 600)
    one = is_colour(alone, COLOURS[0]).sum()
    for colour in COLOURS[:4]:
        assert is_colour(marked, colour).sum() > 0.7 * one


def test_a_tile_among_others_has_its_number_in_itself() -> None:
    """Beside it there are only other tiles, whose number it would seem to be."""
    picture = Image.new("RGB", (600, 600), GREEN)
    tiles = [Box(200 * c, 200 * r, 200 * c + 200, 200 * r + 200) for r in range(3) for c in range(3)]
    marked = mark_regions(picture, tiles, 700, 700)
    for n, inside in ((1, False), (4, True), (5, False)):  # colours that one tile alone has
        rows, columns = np.nonzero(is_colour(marked, COLOURS[n]))
        assert (max(np.ptp(rows), np.ptp(columns)) < marked.width / 3) == inside


def test_empty_regions_are_left_out() -> None:
    picture = Image.new("RGB", (60, 40), GREEN)
    marked = mark_regions(picture, [Box(0, 0, 0, 40), Box(70, 0, 90, 20)], 600, 600)
    assert not is_colour(marked, COLOURS[0]).any() and not is_colour(marked, COLOURS[1]).any()


@pytest.mark.parametrize("size", [Size(60, 120), Size(120, 60), Size(30, 300), Size(100, 100)])
def test_padding_is_hatched_and_nothing_else(size: Size) -> None:
    """Black parts of a picture stay black; what the plan calls padding does not."""
    plan = plan_of(size, Size(2, 2))
    views = shown_views(plan, painted(plan, "black"))
    roles = [view.role for view in views]
    assert roles == ["global", *["tile"] * 4, *["interleaved"] * 4]
    for i, view in enumerate(views):
        sheet = contact_sheet([view], 400, 400)
        black = is_colour(sheet, (0, 0, 0)).sum() / 400**2
        box = plan.to_view(i, (0, 0, size.width, size.height)).clipped(view_size := plan.views[i].size)
        expected = float(box.width * box.height) / (view_size.width * view_size.height)
        assert black == pytest.approx(expected, abs=0.04)


def test_views_of_the_tower_itself_are_hatched_like_the_one_that_they_show() -> None:
    size = Size(60, 120)
    plan = ViewPlan(size, (padded_square(size, 40),), tiled(0, Size(1, 1), Size(40, 40), "high"), 1)
    drawings = [
        draw(Image.new("RGB", (120, 60), GREEN), [], plan, painted(plan, "black"), [], own_views=own)
        for own in ([], [("low", Image.new("RGB", (20, 20), "black"))])
    ]
    alone, both = (is_colour(drawing, (0, 0, 0)) for drawing in drawings)
    rows = [np.flatnonzero(black.any(1)) for black in (alone, both)]
    halves = [black[:, black.any(0)] for black in (alone, both)]
    assert all(len(r) and half.any() for r, half in zip(rows, halves, strict=True))
    assert both.any(0).sum() > 1.2 * both.any(1).sum()  # two bands beside each other, twice as wide as high


@pytest.mark.parametrize("size", [Size(1, 1), Size(20, 3000), Size(3000, 20), Size(9, 12)])
@pytest.mark.parametrize("tiles", [Size(1, 1), Size(6, 6)])
def test_any_shape_is_drawn(size: Size, tiles: Size) -> None:
    plan = plan_of(size, tiles)
    picture = Image.new("RGB", (size.width, size.height), GREEN)
    drawing = draw(picture, plan.regions, plan, painted(plan, "black"), [("Q", False)])
    assert drawing.width == WIDTH
    assert 200 < drawing.height < 4000
    paper = is_colour(drawing, PAPER)
    assert paper[:, :MARGIN].all() and paper[:, -MARGIN:].all()


@pytest.mark.parametrize("count", [1, 4, 8, 57, 529])
def test_chains_of_any_length_are_drawn(count: int) -> None:
    """Every view is seen whole, beside the picture and above the next chain's."""
    image, view = Image.new("RGB", (80, 60)), Image.new("RGB", (56, 56), (9, 200, 9))
    boxes = [Box(n % 40, n % 30, n % 40 + 20, n % 30 + 20) for n in range(count)]
    one, two = (np.asarray(chain_sheet(image, [("2x", boxes, [view] * count)] * chains)) for chains in (1, 2))
    assert two.shape == (2 * one.shape[0], *one.shape[1:])
    green = (one == (9, 200, 9)).all(-1)
    assert not green[:, :330].any()
    assert not green[-10:].any()
    corners = green[:-1, :-1] & ~green[1:, :-1] & ~green[:-1, 1:]  # of views, at their right end below
    assert int(corners[:, 340:].sum()) >= count
