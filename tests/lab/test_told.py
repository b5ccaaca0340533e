"""Windows of a method that is told where to look."""

from __future__ import annotations

import pytest
import torch

from foveate.errors import FoveateError
from foveate.lab.told import told_windows
from foveate.methods.base import Query
from foveate.picture.geometry import Box
from tests.methods.conftest import fresh
from tests.support import gap, picture, source_of

CLOSE = 1e-5


@torch.no_grad()
def test_who_is_told_a_region_looks_there() -> None:
    m = fresh("coroi", scales=[2, 4], rois=1)
    connector = m.model.connector
    images = [picture(112, 112, seed=s) for s in range(2)]
    plans = [m.model.method.plan(112, 112)] * 2
    low, query = torch.randn(2, 16, 32), Query(torch.randn(2, 3, 48), torch.ones(2, 3))
    told = Box(44, 40, 66, 66)  # in the middle of the 4 x 4 tokens, more of it in the second row and column
    source = source_of(*images)
    source.encode = m.model.encode_views
    free = connector.chain(low, plans, query, source).windows
    with told_windows(connector, m.model.method.tower, plans, [None, told]):
        aimed = connector.chain(low, plans, query, source).windows
    assert aimed[:2] == free[:2]  # the first picture's question says nothing
    half, quarter = ((w.row, w.column) for w in aimed[2:])
    assert half == (1, 1)  # of windows that show all of it, the one with the nearest middle
    assert quarter == (1, 1)
    for row, column in ((0, 0), (3, 3), (0, 3)):
        there = Box(28 * column + 3, 28 * row + 3, 28 * column + 20, 28 * row + 20)
        with told_windows(connector, m.model.method.tower, plans, [None, there]):
            assert connector.chain(low, plans, query, source).windows[3][3:] == (row, column)
    assert connector.chain(low, plans, query, source).windows == free  # and afterwards as before


@pytest.mark.parametrize("gradient", ["weighted", "gumbel"])
def test_who_is_told_a_region_looks_there_whatever_the_scores_are_used_for(gradient: str) -> None:
    m = fresh("coroi", gradient=gradient, temperature=5.0, scales=[4], rois=1)
    connector = m.model.connector.train()
    source = source_of(picture(112, 112))
    source.encode, plans = m.model.encode_views, [m.model.method.plan(112, 112)]
    query = Query(torch.randn(1, 3, 48), torch.ones(1, 3))
    for _ in range(8):
        low = torch.randn(1, 16, 32)
        with told_windows(connector, m.model.method.tower, plans, [Box(3, 31, 20, 48)]):
            chosen = connector.chain(low, plans, query, source)
        assert chosen.windows[0][3:] == (1, 0)
        if gradient == "weighted":
            view = connector.scorer.read(low)
            words, mask = connector._words(low, query)
            score = connector.scorer(view, [part[:, 0] for part in words], mask[:, 0])[0, 4]
            assert gap(chosen.gates[0], score.sigmoid()) < CLOSE


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_windows_that_show_all_the_nearest_middle_wins_in_any_precision(dtype: torch.dtype) -> None:
    m = fresh("coroi", scales=[2], rois=1)
    m.model.to(dtype)
    source = source_of(picture(112, 112))
    source.encode = lambda views: m.model.encode_views(views.to(dtype))
    low, plan = torch.randn(1, 16, 32, dtype=dtype), m.model.method.plan(112, 112)
    query = Query(torch.randn(1, 3, 48, dtype=dtype), torch.ones(1, 3))
    with told_windows(m.model.connector, m.model.method.tower, [plan], [Box(43, 43, 53, 53)]):
        assert m.model.connector.chain(low, [plan], query, source).windows[0][3:] == (1, 1)


@torch.no_grad()
def test_a_window_that_was_taken_is_not_taken_again_for_who_is_told() -> None:
    m = fresh("coroi", scales=[2], rois=9)
    source = source_of(picture(112, 112))
    source.encode, plans = m.model.encode_views, [m.model.method.plan(112, 112)]
    with told_windows(m.model.connector, m.model.method.tower, plans, [Box(3, 3, 20, 20)]):
        windows = m.model.connector.chain(torch.randn(1, 16, 32), plans, None, source).windows
    assert windows[0][3:] == (0, 0)
    assert len({window[3:] for window in windows}) == 9


def test_regions_and_pictures_must_agree_and_there_must_be_something_to_choose() -> None:
    m = fresh("coroi")
    plan, tower = m.model.method.plan(60, 80), m.model.method.tower
    with pytest.raises(ValueError, match="argument 2 is longer"):
        told_windows(m.model.connector, tower, [plan], [None, None]).__enter__()
    with pytest.raises(FoveateError, match="told: this method does not choose among windows"):
        told_windows(fresh("llava").model.connector, tower, [plan], [None]).__enter__()
