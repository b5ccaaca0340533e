"""Where each method says that its visual tokens look, against what its connector really reads for them."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate import Foveate, FoveateError
from foveate.explaining.own import rerun
from foveate.methods import METHODS
from foveate.methods.base import Query, Rerun, VisualTokens
from foveate.picture.account import Account, placed
from foveate.picture.geometry import Box, Size, ViewPlan
from foveate.tiny import tiny_model
from tests.support import awake, picture, source_of

SIZES = [(33, 41), (150, 71)]
CASES: list[tuple[str, dict[str, Any]]] = [
    *((method, {}) for method in METHODS),
    ("coroi", {"variant": "v2"}),
    ("slime", {"experts": "mlp"}),
    ("slime", {"experts": "query_former", "use_global_only": True}),
    ("slime", {"use_local_only": True}),
    ("inf_llava", {"low_view": "none", "attention": "plain"}),
    ("inf_llava", {"tiles": [2, 3], "crops": "local"}),
    ("inf_llava", {"enhance": "none", "pool": "average"}),
    ("inf_llava", {"enhance": "global", "parts": "own", "low_view": "resized"}),
    ("chain_of_spot", {"crop": "padded", "box_format": "unit_xyxy"}),
]


def made(method: str, **options: Any) -> Foveate:
    model = tiny_model(method, options)
    awake(model.model)
    return model


def connected(model: Foveate, features: Tensor, run: Rerun, height: int, width: int) -> VisualTokens:
    """What the connector makes of a picture's features, without a question."""
    connector = model.model.connector
    query = Query(torch.zeros(1, 0, 48), torch.zeros(1, 0))
    if not model.model.method.reads_source:
        return connector(features, [run.plan], query)
    source = source_of(picture(height, width))
    source.encode = model.model.encode_views
    return connector(features, [run.plan], query, source)


def patches(plan: ViewPlan, tokens: int) -> list[Box]:
    """The part of the picture at each feature of each view, in fractions; may lie in the padding."""
    side = round(tokens**0.5)
    return [
        plan.to_picture(
            number,
            [
                Fraction(n, side)
                for n in (
                    column * view.size.width,
                    row * view.size.height,
                    (column + 1) * view.size.width,
                    (row + 1) * view.size.height,
                )
            ],
        )
        for number, view in enumerate(plan.views)
        for row in range(side)
        for column in range(side)
    ]


def area(box: Box, other: Box) -> float:
    across = min(box.right, other.right) - max(box.left, other.left)
    down = min(box.bottom, other.bottom) - max(box.top, other.top)
    return float(max(across, 0) * max(down, 0))


@pytest.mark.parametrize(("method", "options"), CASES)
def test_relevance_goes_where_the_connector_reads(method: str, options: dict[str, Any]) -> None:
    """By the gradient: the parts that get a token's relevance are the patches that it reads."""
    model = made(method, **options)
    for height, width in SIZES:
        run = rerun(model.model, model.processor, picture(height, width))
        features = run.features().clone().requires_grad_()
        visual = connected(model, features, run, height, width)
        n = len(visual.tokens)
        assert n == run.plan.tokens
        spread = model.model.method.spread(run, torch.eye(n), Account())
        assert len(spread.tokens) == n and spread.shares.shape == (n, len(spread.parts))
        size, boxes = Size(height, width), patches(run.plan, features.shape[1])
        weights = torch.randn(visual.tokens.shape[1])
        for token in range(0, n, max(1, n // 5)):
            (gradient,) = torch.autograd.grad(
                visual.tokens[token] @ weights, features, retain_graph=True, allow_unused=True
            )
            read = [] if gradient is None else gradient.abs().sum(-1).flatten().nonzero()[:, 0].tolist()
            seen = [boxes[number].clipped(size) for number in read]
            given = [spread.parts[part] for part in spread.shares[token].nonzero()[:, 0].tolist()]
            for part in given:
                assert any(area(part, box) > 0 for box in seen), "relevance for what is not read"
            for number, box in zip(read, seen, strict=True):
                # An interleaved view's patches reach a few of the canvas's pixels into the next cell.
                if box.width > boxes[number].width / 10 and box.height > boxes[number].height / 10:
                    assert any(area(part, box) > 0 for part in given), "no relevance for what is read"


@pytest.mark.parametrize("method", ["llava", "anyres", "llava_hr", "coroi", "chain_of_spot"])
def test_a_token_of_one_patch_has_exactly_its_box(method: str) -> None:
    """In fractions of a pixel, for odd sizes: the one patch whose feature reaches the token."""
    model = made(method)
    for height, width in SIZES:
        run = rerun(model.model, model.processor, picture(height, width))
        features = run.features().clone().requires_grad_()
        visual = connected(model, features, run, height, width)
        boxes = patches(run.plan, features.shape[1])
        told = model.model.method.token_boxes(run.plan)
        assert len(told) == len(visual.tokens)
        for token, box in enumerate(told):
            (gradient,) = torch.autograd.grad(
                visual.tokens[token].square().sum(), features, retain_graph=True, allow_unused=True
            )
            read = [] if gradient is None else gradient.abs().sum(-1).flatten().nonzero()[:, 0].tolist()
            assert [boxes[number] for number in read] == ([] if box is None else [box])


@pytest.mark.parametrize(("method", "options"), CASES)
def test_no_relevance_is_lost_or_made(method: str, options: dict[str, Any]) -> None:
    """On a picture that needs no padding all of it arrives, except that of separators."""
    model = made(method, **options)
    tiled = method == "slime" or options.get("tiles") == [2, 3]
    size = Size(112, 168) if tiled else Size(168, 168)
    run = rerun(model.model, model.processor, picture(*size))
    relevance = torch.rand(3, run.plan.tokens)
    boxes, parts, shares = model.model.method.spread(run, relevance, Account())
    shown = torch.tensor([box is not None for box in boxes])
    assert torch.allclose(shares.sum(1), relevance[:, shown].sum(1), rtol=1e-4)
    assert bool((shares >= 0).all())
    assert all(box == box.clipped(size) for box in parts)


def test_tokens_that_the_question_decides_have_the_places_that_it_leaves() -> None:
    """SliME under a budget: with a question it keeps other tokens than without."""
    model = made("slime", max_visual_tokens=24)
    run = rerun(model.model, model.processor, picture(112, 112))
    query = Query(model.model.get_input_embeddings()(torch.tensor([[70, 80, 90]])), torch.ones(1, 3))
    visual = model.model.connector(run.features(), [run.plan], query)
    assert visual.accounts is not None and visual.accounts[0].sources is not None
    asked = model.model.method.spread(run, torch.eye(run.plan.tokens), visual.accounts[0])
    unasked = model.model.method.spread(run, torch.eye(run.plan.tokens), Account())
    assert len(asked.tokens) == len(unasked.tokens) == run.plan.tokens == 24
    assert asked.tokens != unasked.tokens
    # Its weights name the same local tokens, in order of places.
    kept = [box for box, weight in visual.accounts[0].heat() if weight > 0]
    assert len(kept) == 7 and asked.tokens[-7:] == kept
    with pytest.raises(FoveateError, match="the question decides which there are"):
        model.model.method.token_boxes(run.plan)


def test_placed_leaves_out_what_shows_nothing() -> None:
    spread = placed([Box(0, 0, 1, 1), None, Box(1, 0, 2, 1)], torch.tensor([[1.0, 2.0, 4.0]]))
    assert spread.parts == [Box(0, 0, 1, 1), Box(1, 0, 2, 1)]
    assert spread.shares.tolist() == [[1.0, 4.0]]
