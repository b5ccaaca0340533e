"""INF-LLaVA: what the tests of all methods do not ask."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor

import foveate
from foveate import Foveate, FoveateError, FoveateForConditionalGeneration
from foveate.composing import compose
from foveate.data.dataset import encode
from foveate.data.toy import write_toy_data
from foveate.methods import inf_llava
from foveate.methods import inf_llava_plain as full
from foveate.methods.base import TowerGeometry, Widths
from foveate.methods.inf_llava import InfConnector, InfLlava, pooling
from foveate.methods.inf_llava_index import CUTS, Axis, gathered
from foveate.model.cost import reference_config, shared_pricer
from foveate.picture.geometry import Size, View
from foveate.shipped import find
from foveate.tiny import tiny_model, tiny_text, tiny_tokenizer, tiny_vision
from foveate.train.models import typed
from foveate.train.recipe import load_recipe
from foveate.train.run import train
from tests.methods.inf_llava_release import released_names, write_release
from tests.methods.test_invariants import CLOSE, prepare
from tests.support import chat, gap, greedy, picture
from tests.train.support import losses, stage, write_recipe

PAPER = TowerGeometry(336, 14)
ALL = [(n, n) for n in (1, 2, 3, 4, 5)] + [(2, 3), (3, 2), (1, 4), (5, 2)]  # rows and columns of views


def made(**options: Any) -> Foveate:
    return tiny_model("inf_llava", options)


def connector_for(side: int, tiles: tuple[int, int], width: int = 16, **options: Any) -> InfConnector:
    """A connector for views of `side` x `side` tokens."""
    torch.manual_seed(0)
    method = InfLlava(TowerGeometry(14 * side, 14), {"tiles": list(tiles), **options})
    module = method.build_connector(Widths(width, 24)).eval()
    for parameter in module.parameters():  # norms and biases away from one and zero
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return module


def all_views(side: int, tiles: Size, width: int = 16, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Random features of all tiles, all interleaved views, and a low-resolution view."""
    generator = torch.Generator().manual_seed(1)
    count = tiles.height * tiles.width
    local, strided = (torch.randn(batch, count, side, side, width, generator=generator) for _ in range(2))
    low = torch.randn(batch, side, side, width, generator=generator)
    if tiles.height % 2 and tiles.width % 2:
        low = strided[:, count // 2]  # the same pixels, so the same features
    if count == 1:
        strided, low = local, local[:, 0]
    return local, strided, low


def needed(connector: InfConnector, tiles: Size, views: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Of all views those that the connector asks for, (B, V, N, C)."""
    local, strided, low = views
    scheme = connector.scheme(tiles)
    known = [*scheme.every("local"), *scheme.every("global"), View(1, scheme.views[0].box, "low resolution")]
    features = torch.cat([local, strided, low[:, None]], 1).flatten(2, 3)
    boxes = [(view.canvas, view.box, view.steps) for view in known[:-1]]
    places = [
        boxes.index((view.canvas, view.box, view.steps)) if view.canvas == 0 else len(boxes)
        for view in scheme.views
    ]
    return features[:, places]


def both_forms(connector: InfConnector, side: int, tiles: Size, pooled: int) -> tuple[Tensor, Tensor]:
    """Tokens of our form and of the full one, (B, pooled^2, D)."""
    views = all_views(side, tiles)
    ours = needed(connector, tiles, views)
    method_plans = [_Plan(tiles, ours.shape[1])] * len(ours)
    tokens = connector(ours.flatten(0, 1), method_plans, None).tokens  # type: ignore[arg-type]
    return tokens.view(len(ours), pooled**2, -1), full.tokens(connector, *views, tiles, pooled)


class _Plan:
    """What the connector reads of a plan."""

    def __init__(self, tiles: Size, views: int) -> None:
        self.tiles, self.views = tiles, [None] * views


# Dual-perspective cropping.


@pytest.mark.parametrize("tiles", ALL)
def test_both_croppings_are_the_papers(tiles: tuple[int, int]) -> None:
    """Equations 13 and 17, pixel by pixel, at the picture's own size."""
    rows, columns = tiles
    m = made(tiles=list(tiles), pool="average", fit="squash")
    image = picture(56 * rows, 56 * columns)
    plan = m.plan(image)
    pixels = m.processor.image_processor.views(image, plan)
    whole = m.processor.image_processor._normalise(image)
    for kind in CUTS:
        for i, view in enumerate(m.model.method.scheme(plan.tiles).every(kind)):
            row, column = divmod(i, columns)
            u, v = np.meshgrid(np.arange(56), np.arange(56))
            x, y = (
                (column * 56 + u, row * 56 + v) if kind == "local" else (column + u * columns, row + v * rows)
            )
            place = [(w.canvas, w.box, w.steps) for w in plan.views].index((0, view.box, view.steps))
            assert np.array_equal(pixels[place], whole[:, y, x]), (kind, i)
    even = rows % 2 == 0 or columns % 2 == 0
    assert len(plan.views) == (1 if rows * columns == 1 else 2 * rows * columns + even)


@pytest.mark.parametrize("tiles", ALL)
def test_recombination_puts_every_token_back(tiles: tuple[int, int]) -> None:
    """Equations 5 and 6: maps whose tokens are their own places, cut and put together again."""
    side, size = 3, Size(*tiles)
    connector = connector_for(side, tiles, pool="average")
    places = torch.stack(
        torch.meshgrid(torch.arange(side * tiles[0]), torch.arange(side * tiles[1]), indexing="ij"), -1
    )[None].float()
    parts = {kind: torch.stack(full.cut(places, size, kind), 1) for kind in CUTS}
    scheme = connector.scheme(size)
    low = places[:, :side, :side]
    stacks = connector.stacks(needed(connector, size, (parts["local"], parts["global"], low)), scheme)
    for kind, stack in stacks.items():
        rows, columns = (
            scheme.rows.at(kind, range(side * tiles[0])),
            scheme.columns.at(kind, range(side * tiles[1])),
        )
        assert torch.equal(gathered(stack, rows, columns), places)
        assert torch.equal(full.joined(parts[kind].unbind(1), size, kind), places)


def test_an_axis_splits_and_joins() -> None:
    for views, tokens in ((3, 24), (5, 4), (1, 7), (4, 1)):
        axis = Axis(views, tokens)
        for kind in CUTS:
            pairs = [axis.split(kind, row) for row in range(views * tokens)]
            assert [axis.join(kind, *pair) for pair in pairs] == list(range(views * tokens))
            assert sorted(pairs) == [(v, t) for v in range(views) for t in range(tokens)]
    assert Axis(3, 24).split("local", 25) == (1, 1)
    assert Axis(3, 24).split("global", 25) == (1, 8)


# Only what reaches the output.


@torch.no_grad()
@pytest.mark.parametrize("tiles", ALL)
@pytest.mark.parametrize("side", [3, 4, 6])
def test_what_is_left_out_changes_nothing(tiles: tuple[int, int], side: int) -> None:
    """For every n, grids that n divides or not, and any pooled grid: the full form, within 1e-5."""
    for pool in ("bilinear", "average"):
        for budget in (None, side * side, 5, 4, 1):
            connector = connector_for(side, tiles, pool=pool, max_visual_tokens=budget)
            pooled = side if budget is None else int(budget**0.5)
            ours, expected = both_forms(connector, side, Size(*tiles), pooled)
            assert gap(ours, expected) < 1e-5, (pool, budget)


@pytest.mark.parametrize("fusion", ["concat", "conv"])
@torch.no_grad()
@pytest.mark.parametrize("tiles", [(2, 2), (3, 3), (4, 4), (2, 3), (5, 5)])
def test_exactly_the_dead_views_are_left_out(tiles: tuple[int, int], fusion: str) -> None:
    """Noise in a view that is not asked for changes no bit of the full form; in any other it does."""
    side, size = 4, Size(*tiles)
    connector = connector_for(side, tiles, low_view="none", fusion=fusion)
    views = all_views(side, size, batch=1)
    scheme = connector.scheme(size)
    expected = full.tokens(connector, *views, size, side)
    for which, kind in enumerate(CUTS):
        for i, view in enumerate(scheme.every(kind)):
            changed = [tensor.clone() for tensor in views]
            changed[which][:, i] += torch.randn_like(changed[which][:, i])
            same = torch.equal(full.tokens(connector, *changed, size, side), expected)
            assert same == (view not in scheme.views), (kind, i)
    dead = 2 * tiles[0] * tiles[1] - len(scheme.views)
    # The centres of 5 x 5 leave one tile in 5 out where it has 4 tokens; a convolution reads beside them.
    known = {(2, 2): (0, 0), (3, 3): (8, 0), (4, 4): (12, 0), (2, 3): (4, 0), (5, 5): (24 + 9, 16)}
    assert dead == known[tiles][fusion == "conv"]


VARIANTS: dict[str, dict[str, Any]] = {
    "DEM w/ global (table 4)": {"enhance": "global"},
    "DEM w/ local (table 4)": {"enhance": "local"},
    "Conv 3x3 (table 5)": {"fusion": "conv"},
    "Multiplication (table 5)": {"fusion": "multiply"},
    "Weighted Addition (table 5)": {"fusion": "weighted"},
    "Maxpool (table 5)": {"fusion": "max"},
    "Addition (table 5)": {"fusion": "add"},
    "w/ DCM local (table 6)": {"crops": "local"},
    "w/ DCM local, without DEM": {"crops": "local", "enhance": "none"},
    "w/ DCM global (table 6)": {"crops": "global"},
    "w/ DCM global, without DEM": {"crops": "global", "enhance": "none"},
    "w/ DCM (table 6)": {"enhance": "none"},
    "parts of the paper": {"parts": "own"},
    "attention of the paper": {"attention": "plain", "heads": 1},
    "own attention each": {"shared": False},
    "embedding of the paper": {"embed": "linear"},
    "fusion of the paper": {"fused": "paper"},
    "conv of the paper": {"fusion": "conv", "fused": "paper"},
    "sum with the low view": {"low_mix": "sum"},
    "high resolution alone (table 3)": {"low_view": "none"},
}


@pytest.mark.parametrize("name", ["default", "average", *VARIANTS])
@pytest.mark.parametrize("tiles", [(3, 3), (4, 4), (2, 3)])
def test_gradients_are_those_of_the_full_form(tiles: tuple[int, int], name: str) -> None:
    options = {"pool": "average"} if name == "average" else VARIANTS.get(name, {})
    connector = connector_for(6, tiles, **options)
    torch.manual_seed(2)
    weights = torch.randn(2, 36, 24)
    found = []
    for tokens in both_forms(connector, 6, Size(*tiles), 6):
        grads = torch.autograd.grad((tokens * weights).sum(), list(connector.parameters()))
        found.append(grads)
    scale = max(float(grad.abs().max()) for grad in found[1])
    for ours, expected in zip(*found, strict=True):
        assert gap(ours, expected) < 1e-5 * scale


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_what_they_say(name: str) -> None:
    plain = [both_forms(connector_for(6, (3, 3)), 6, Size(3, 3), 6)[0]]
    for tiles in ((3, 3), (4, 4), (2, 3)):
        for pool in ("bilinear", "average"):
            connector = connector_for(6, tiles, pool=pool, **VARIANTS[name])
            ours, expected = both_forms(connector, 6, Size(*tiles), 6)
            assert gap(ours, expected) < 1e-5, (tiles, pool)
            plain.append(ours)
    assert gap(plain[0], plain[1]) > 1e-3  # and differs from the default


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_have_no_parameter_too_many(name: str) -> None:
    """Everything that is built learns, and both crop kinds are views only where they are used."""
    m = made(**VARIANTS[name])
    batch = prepare(m.processor, [chat("What?", picture(100, 160))])
    tokens = torch.cat(m.model.get_image_features(batch["pixel_values"], batch["image_sizes"]).pooler_output)
    (tokens * torch.randn_like(tokens)).sum().backward()
    grads = {name: p.grad for name, p in m.model.connector.named_parameters()}
    assert [name for name, grad in grads.items() if grad is None or not grad.abs().sum() > 0] == []
    roles = {view.role for view in m.plan(picture(100, 160)).views}
    wanted = {"local": {"tile", "interleaved"}, "global": {"interleaved"}}  # the middle one is the low view
    assert roles == wanted.get(VARIANTS[name].get("crops", "both"), {"tile", "interleaved"})


@torch.no_grad()
def test_one_attention_for_each_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    """All parts of all pictures in one call; and nothing of it stays on the module."""
    calls = []
    original = F.scaled_dot_product_attention

    def counted(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        calls.append(tuple(query.shape))
        return original(query, key, value)

    connector = connector_for(6, (3, 3))
    before = set(vars(connector.attention["both"]))
    monkeypatch.setattr(inf_llava.F, "scaled_dot_product_attention", counted)
    both_forms(connector, 6, Size(3, 3), 6)
    assert calls == [
        (2, 8, 36, 2),
        (18, 8, 4, 2),
    ]  # one live part of nine; nine tiles with 2 x 2 live queries
    assert set(vars(connector.attention["both"])) == before


# Pooling.


@pytest.mark.parametrize(
    ("rows", "pooled"), [(72, 24), (48, 24), (96, 24), (120, 24), (12, 5), (7, 7), (9, 1)]
)
def test_pooling_is_torchs(rows: int, pooled: int) -> None:
    x = torch.randn(1, 2, rows, rows + 6, dtype=torch.float64)
    columns = pooled + 1
    for mode in ("bilinear", "average"):
        expected = full.pooled(x.permute(0, 2, 3, 1), pooled, mode)[0, :, :, 0]
        across = pooling(rows + 6, pooled, mode)
        got = torch.from_numpy(pooling(rows, pooled, mode)) @ x[0, 0] @ torch.from_numpy(across).T
        assert gap(got, expected) < 1e-12
        assert np.allclose(pooling(rows, min(columns, rows), mode).sum(1), 1)


def test_bilinear_pooling_picks_and_average_pooling_does_not() -> None:
    picked = pooling(72, 24, "bilinear")
    assert np.array_equal(picked, np.eye(72)[1::3])  # the middle of each three
    assert np.array_equal(pooling(48, 24, "bilinear"), pooling(48, 24, "average"))  # the same for n = 2
    four = pooling(96, 24, "bilinear")
    assert sorted(np.flatnonzero(four[0])) == [1, 2]
    assert (np.count_nonzero(pooling(72, 24, "average"), axis=1) == 3).all()
    views = {n: len(InfLlava(PAPER, {"tiles": [n, n]}).plan(900, 900).views) for n in (1, 2, 3, 4, 5)}
    assert views == {1: 1, 2: 4 + 4 + 1, 3: 9 + 1, 4: 16 + 4 + 1, 5: 25 + 1}
    averaged = InfLlava(PAPER, {"pool": "average"})
    assert len(averaged.plan(900, 900).views) == 18  # the low-resolution view is one of them


@pytest.mark.parametrize(
    ("budget", "side"), [(None, 24), (2304, 24), (576, 24), (575, 23), (144, 12), (100, 10), (3, 1)]
)
def test_a_bound_sets_the_pooled_grid(budget: int | None, side: int) -> None:
    method = InfLlava(PAPER, {"max_visual_tokens": budget})
    assert method.plan(700, 900).tokens == side**2
    large = InfLlava(PAPER, {"tiles": [5, 5], "max_visual_tokens": budget})
    assert large.plan(4000, 3000).tokens == side**2


@torch.no_grad()
def test_a_bound_in_a_model() -> None:
    m = made(max_visual_tokens=9)
    image = picture(90, 150)
    batch = prepare(m.processor, [chat("What?", image)])
    assert int((batch["input_ids"] == m.processor.image_token_id).sum()) == 9
    assert m.ask(image, "What?", max_new_tokens=2).ledger.visual_tokens == 9


# Which pixels.


@torch.no_grad()
@pytest.mark.parametrize("n", [3, 5])
def test_the_low_view_is_the_large_picture_reduced(n: int) -> None:
    """Bicubic without antialiasing, as the authors' code: for odd n one of the interleaved views."""
    m = made(tiles=[n, n])
    image = picture(200, 300)
    plan = m.plan(image)
    scheme = m.model.method.scheme(plan.tiles)
    images = m.processor.image_processor
    large = torch.from_numpy(images._normalise(images.paint(image, plan.canvases[0])))[None]
    low = F.interpolate(large, (56, 56), mode="bicubic", align_corners=False)[0]
    assert torch.equal(torch.from_numpy(images.views(image, plan))[scheme.low_number], low)
    assert len(plan.canvases) == 1


def test_an_even_n_has_a_low_view_of_its_own() -> None:
    for options in ({"tiles": [2, 2]}, {"tiles": [4, 3]}, {"low_view": "resized"}):
        m, alone = made(**options), tiny_model("llava", {"fit": "pad"})
        image = picture(130, 80)
        plan = m.plan(image)
        assert plan.views[-1].role == "low resolution"
        pixels = m.processor.image_processor.views(image, plan)[-1]
        if options.get("tiles") != [4, 3]:  # which gives the picture another shape
            assert np.array_equal(pixels, alone.processor.image_processor.views(image, alone.plan(image))[0])
        assert plan.regions[-1] == (0, 0, 80, 130)


def test_training_and_asking_see_the_same_pixels() -> None:
    """And these are the picture's own: nothing is made small first and blown up again."""
    m = made()
    image = picture(168, 168)  # as large as 3 x 3 views
    answered = [*chat("What?", image), {"role": "assistant", "content": [{"type": "text", "text": "It."}]}]
    trained = encode(m.processor, answered)["pixel_values"]
    seen: list[Tensor] = []
    hook = m.model.vision_tower.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    m.ask(image, "What?", max_new_tokens=2)
    hook.remove()
    assert torch.equal(seen[0], trained)
    tiles = trained[:9].view(3, 3, 3, 56, 56).permute(2, 0, 3, 1, 4).reshape(3, 168, 168)
    assert torch.equal(tiles, torch.from_numpy(m.processor.image_processor._normalise(image)))
    assert m.plan(image).effective == (168, 168)


@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 5])
def test_a_square_picture_at_its_own_pixels(ratio: int) -> None:
    for tower in (TowerGeometry(48, 8), PAPER):
        method = InfLlava(tower, InfLlava.options_for(ratio))
        side = ratio * tower.image_size
        plan = method.plan(side, side)
        assert plan.effective == (side, side)
        assert plan.canvases[0].size == (side, side)
        assert plan.tokens == tower.tokens


def test_as_many_views_as_the_picture_carries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equations 9 and 10; a picture smaller than a view gets one, a very large one no more than a bound."""
    method = InfLlava(PAPER, {"tiles": "picture"})
    for (height, width), tiles in {
        (336, 336): (1, 1),
        (671, 1008): (1, 3),
        (1, 1): (1, 1),
        (20, 5000): (1, 5),
        (3000, 4000): (3, 5),
        (1680, 1680): (5, 5),
        (1681, 1681): (5, 5),
        (3024, 4032): (3, 5),
    }.items():
        plan = method.plan(height, width)
        assert plan.tiles == tiles
        assert plan.tokens == 576
    monkeypatch.setattr("foveate.methods.inf_llava.MOST_VIEWS", 2)
    two = InfLlava(PAPER, {"tiles": "picture"})
    assert two.plan(3000, 4000).tiles == (1, 2)
    assert two.plan(4001, 4001).tiles == (2, 2)


@pytest.mark.parametrize("fit", ["pad", "crop", "squash"])
@pytest.mark.parametrize("tiles", [(3, 3), (2, 3), "picture"])
def test_sizes_that_are_no_multiples(fit: str, tiles: Any) -> None:
    """The canvas is a multiple always; padding loses no pixel, cropping as many on either side."""
    method = InfLlava(PAPER, {"fit": fit, "tiles": tiles})
    for height, width in ((1, 1), (700, 701), (337, 1009), (1, 4000), (4000, 1), (997, 1009)):
        plan = method.plan(height, width)
        assert plan.canvases[0].size == (336 * plan.tiles.height, 336 * plan.tiles.width)
        assert all(view.size == (336, 336) for view in plan.views)
        shown = plan.to_picture(0, (0, 0, 336 * plan.tiles.width, 336 * plan.tiles.height))  # tile 0's corner
        if fit == "crop":
            assert 0 <= shown.left + shown.right - width + Fraction(width, 300) <= 2 * Fraction(width, 300)
            assert min(shown.width / width, shown.height / height) <= 1
        else:
            assert shown.left <= 0 <= width <= shown.right
            assert shown.top <= 0 <= height <= shown.bottom
        if fit == "squash":
            assert shown == (0, 0, width, height)
    square = InfLlava(PAPER, {"fit": fit})
    if fit != "squash":  # nothing is stretched, up to a pixel
        content, source = square.plan(700, 500).canvases[0].content, square.plan(700, 500).canvases[0].source
        across, down = content.width / source.width, content.height / source.height
        assert abs(across / down - 1) < 1 / 300


@torch.no_grad()
def test_pictures_of_different_shapes_in_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.methods.inf_llava.MOST_VIEWS", 3)
    m = made(tiles="picture")
    images = [
        picture(60, 170),
        picture(170, 60),
        picture(40, 40),
        picture(170, 171),
        picture(60, 175, seed=1),
    ]
    batch = prepare(m.processor, [chat("What?", image) for image in images])
    sizes = [m.plan(image).tiles for image in images]
    assert sizes == [(1, 3), (3, 1), (1, 1), (2, 3), (1, 3)]
    together = m.model.get_image_features(batch["pixel_values"], batch["image_sizes"]).pooler_output
    for image, tokens in zip(images, together, strict=True):
        one = prepare(m.processor, [chat("What?", image)])
        alone = m.model.get_image_features(one["pixel_values"], one["image_sizes"]).pooler_output[0]
        assert gap(tokens, alone) < 1e-5


@torch.no_grad()
def test_any_picture_and_any_tower() -> None:
    """Pictures that cannot carry n views are enlarged; patches may leave an edge of the view over."""
    m = made(tiles=[5, 5])
    for image in (picture(1, 1), picture(1, 700), picture(700, 1), picture(30, 20)):
        answer = m.ask(image.convert("L") if image.width == 20 else image, "What?", max_new_tokens=2)
        assert answer.ledger.visual_tokens == 16
        assert answer.plan.effective.height <= image.height
    rough = compose(
        tiny_vision(image_size=50), tiny_text(), "inf_llava", {"tiles": [2, 3]}, tokenizer=tiny_tokenizer()
    )
    assert rough.ask(picture(90, 140), "What?", max_new_tokens=2).ledger.visual_tokens == 9


def options_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        InfLlava(PAPER, options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tiles": [0, 3]}, r"tiles must be rows and columns, each at least 1, or 'picture', not \[0, 3\]"),
        ({"tiles": [3]}, "tiles must be rows and columns"),
        ({"tiles": "all"}, "tiles: expected list of whole number or picture, got 'all'"),
        (
            {"tiles": [40, 40]},
            "40 x 40 views of 336 pixels are more than 67108864 pixels: make tiles smaller",
        ),
        ({"heads": 0}, "heads must be at least 1"),
        ({"pool": "max"}, "'max' is not one of bilinear, average"),
        ({"fusion": "sum"}, "'sum' is not one of concat, conv, multiply, weighted, max, add"),
        ({"max_visual_tokens": 0}, "max_visual_tokens must be at least 1"),
        ({"poll": "average"}, "did you mean 'pool'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    options_error(options, message)


def test_a_tower_too_large_for_as_many_views_as_fit_is_named() -> None:
    with pytest.raises(FoveateError, match=r"5 x 5 views of 2000 pixels .* make tiles smaller"):
        InfLlava(TowerGeometry(2000, 20), {"tiles": "picture"})


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(FoveateError, match="heads 5 must divide the vision tower's width 32"):
        made(heads=5)
    assert made(heads=5, enhance="none").model.connector.attention.keys() == set()
    with pytest.raises(FoveateError, match="fusion concat needs an even width of the vision tower, not 15"):
        connector_for(2, (2, 2), width=15, heads=3)


# Prompts.


@pytest.mark.parametrize("template", ["llama3_v1", "llama3", "plain"])
def test_one_beginning(template: str) -> None:
    """In training and in asking, though the tokenizer would add a second <|begin_of_text|>."""
    m = tiny_model("inf_llava", template=template)
    tokenizer = m.processor.tokenizer
    adds = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = adds
    image = picture(40, 40)
    answered = [*chat("What?", image), {"role": "assistant", "content": [{"type": "text", "text": "It."}]}]
    trained = encode(m.processor, answered)
    assert trained["input_ids"].tolist().count(tokenizer.bos_token_id) == 1
    learnt = tokenizer.decode(trained["labels"][trained["labels"] >= 0])
    assert learnt == ("It.\n" if template == "plain" else "It.<|eot_id|>")
    seen: list[Any] = []
    generate = m.model.generate
    m.model.generate = lambda **given: seen.append(given["input_ids"]) or generate(**given)  # type: ignore[assignment, func-returns-value]
    m.ask(image, "What?", max_new_tokens=2)
    assert seen[0][0].tolist().count(tokenizer.bos_token_id) == 1


# What the drawing and the price show.


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"pool": "average"}, {"parts": "own"}, {"shared": False}])
@pytest.mark.parametrize("tiles", [Size(3, 3), Size(2, 3)])
def test_attention_is_all_there(options: dict[str, Any], tiles: Size) -> None:
    """Every live query has 1 to give away in each direction; where it goes is what softmax says."""
    connector = connector_for(4, tiles, **options)
    scheme = connector.scheme(tiles)
    views = needed(connector, tiles, all_views(4, tiles, batch=1))
    attended = connector.attended(views, scheme)
    assert attended.shape == (4 * tiles.height, 4 * tiles.width)
    assert attended.sum() == pytest.approx(2 * len(scheme.rows.live) * len(scheme.columns.live), rel=1e-4)
    for direction, (rows, columns) in scheme.groups.items():
        x, source = connector._looking(direction, connector.stacks(views, scheme), scheme)
        module = connector.attention_of(direction)
        value, real = torch.eye(source.shape[1]), torch.ones(x.shape[:2], dtype=torch.bool)
        split = module._split(module.query(x)), module._split(module.key(source))
        expected = F.scaled_dot_product_attention(*split, value.expand(*split[0].shape[:2], -1, -1))
        assert gap(module.received(x, source, real), expected.mean(1).sum(1)) < 1e-5
        assert len(rows.part) == len(scheme.rows.live)
        assert len(columns.slot) == len(scheme.columns.live)


def test_the_drawing_shows_both_croppings_and_the_attention(tmp_path: Path) -> None:
    m = made()
    image = picture(112, 168)
    answer = m.ask(image, "What?", max_new_tokens=2)
    assert [view.role for view in answer.plan.views] == ["tile"] * 9 + ["interleaved"]
    drawing = np.asarray(answer.show(tmp_path / "seen.png")).astype(int)
    assert (tmp_path / "seen.png").is_file()
    account = m.engine.account(image)
    assert account.notes == [
        "warm: where the enhancement looked most",
        "8 of the 18 views cannot reach the answer and are not read",
    ]
    assert len(account.heat()) == 12 * 12
    for n, most in ((3, 4), (3, 1), (5, 4)):
        bound = made(tiles=[n, n], max_visual_tokens=most)
        notes = bound.engine.account(image).notes
        read = len(bound.plan(image).views)
        assert (
            notes[-1]
            == f"{2 * n * n - read} of the {2 * n * n} views cannot reach the answer and are not read"
        )
    assert max(weight for _, weight in account.heat()) == 1
    assert min(weight for _, weight in account.heat()) > 0  # nothing was dropped
    boxes = [box for box, _ in account.heat()]
    assert sum(float(box.width * box.height) for box in boxes) == pytest.approx(112 * 168)
    plain = made(enhance="none")
    plain.model.load_state_dict(m.model.state_dict(), strict=False)
    unseen = np.asarray(plain.ask(image, "What?", max_new_tokens=2).show()).astype(int)
    assert plain.engine.account(image).heat() == []
    assert np.abs(drawing[24:400, 24:640] - unseen[24:400, 24:640]).mean() > 1


def test_the_price_leaves_dead_views_out() -> None:
    size = Size(3000, 4000)
    pricer = shared_pricer(reference_config("inf_llava"))
    plan = pricer.plan(*size)
    assert (len(plan.views), plan.tokens, plan.effective) == (10, 576, Size(756, 1008))
    averaged = shared_pricer(reference_config("inf_llava", {"pool": "average"}))
    assert len(averaged.plan(*size).views) == 18
    baseline = shared_pricer(reference_config("llava")).vision(size).encode
    assert 9.5 * baseline < pricer.vision(size).encode < 0.56 * averaged.vision(size).encode


# Training.


def test_both_stages_from_a_fresh_start(tmp_path: Path) -> None:
    """The recipe's stages on toy data: each changes its part alone, and the loss falls."""
    data = write_toy_data(tmp_path / "toy", 24)
    recipe = typed(load_recipe("inf_llava"))
    assert list(recipe.stages) == ["pretrain", "finetune"]
    stages = {
        name: stage(given.trains, data, steps=4, options=given.options, template=given.template)
        for name, given in recipe.stages.items()
    }
    stages["finetune"]["steps"] = 14
    train(write_recipe(tmp_path, stages, method="inf_llava", options=recipe.model.options))
    before = tiny_model("inf_llava", recipe.model.options, seed=42, template="chatml").model.state_dict()
    for name, parts in (("pretrain", {"connector"}), ("finetune", {"connector", "language_model"})):
        run = tmp_path / "run"
        folder = run / "stages" / name / "model" if name == "pretrain" else run / "model"
        after = foveate.load(folder, device="cpu", dtype="float32").model
        changed = {key for key, t in after.state_dict().items() if not torch.equal(t, before[key])}
        assert {key.partition(".")[0] for key in changed} == parts
        assert {key for key in before if key.startswith("connector.")} <= changed
        assert after.method.options.fit == ("crop" if name == "pretrain" else "pad")
        before = {key: t.clone() for key, t in after.state_dict().items()}
    course = losses(tmp_path / "run", "finetune")
    assert course[-1] < course[0] - 0.5


def test_detail_reaches_the_llm_with_small_views() -> None:
    """48 pixels and 36 tokens a view: four pictures that differ in nothing but what only tiles show."""
    torch.manual_seed(0)
    vision = tiny_vision(image_size=48, patch_size=8, initializer_factor=1.0)  # features of about 1
    m = compose(vision, tiny_text(), "inf_llava", InfLlava.options_for(3), tokenizer=tiny_tokenizer())
    assert m.plan(Image.new("RGB", (144, 144))).tokens == 36
    conversations = []
    for i, answer in enumerate("abcd"):
        pixels = np.zeros((144, 144, 3), np.uint8)
        pixels[10 + 32 * i : 42 + 32 * i, 10:120] = 255
        pixels[1::3, 1::3] = 0  # the low-resolution view is black
        reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        conversations.append([*chat("Which?", Image.fromarray(pixels)), reply])
    batch = prepare(m.processor, conversations)
    low = batch["pixel_values"].view(4, 10, 3, 48, 48)[:, -1]
    assert torch.equal(low, low[:1].expand_as(low))
    labels = torch.full_like(batch["input_ids"], -100)
    for row, answer in enumerate("abcd"):
        (letter,) = m.processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
        labels[row, (batch["input_ids"][row] == letter).nonzero()[-1]] = letter
    trained = [*m.model.connector.parameters(), *m.model.language_model.parameters()]
    m.model.train().vision_tower.requires_grad_(False)
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    course = []
    for _ in range(40):
        loss = m.model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        course.append(loss.item())
    assert sum(course[-5:]) / 5 < 0.8  # guessing: 1.39


def test_the_recipe_has_the_papers_values_and_both_mixtures() -> None:
    recipe = typed(load_recipe("inf_llava"))
    pretrain, finetune = recipe.stages.values()
    assert [(s.lr, s.batch, s.epochs) for s in (pretrain, finetune)] == [(1e-3, 256, 1), (2e-5, 128, 1)]
    assert (pretrain.trains, finetune.trains) == (["connector"], ["connector", "language_model"])
    assert (pretrain.schedule, pretrain.template, finetune.template) == ("cosine", "plain", None)
    assert "595K" in pretrain.data[0].path
    assert "665k" in finetune.data[0].path
    text = find("recipe", "inf_llava").read_text()
    lines = re.findall(
        r"^#     (.*)$", text.partition("What differs")[0].partition("INF-LLaVA*")[2], re.MULTILINE
    )
    command = " ".join(line.rstrip("\\").strip() for line in lines)
    changes = re.findall(r"(stages\.\w+\.data)='(\[.*?\])'", command)
    assert [key for key, _ in changes] == ["stages.pretrain.data", "stages.finetune.data"]
    star = load_recipe("inf_llava", [f"{key}={value}" for key, value in changes])
    first, second = ([source.path for source in s.data] for s in star.stages.values())
    assert [re.search(r"558k|Caption-LAION|Caption-VFLAN", path) is not None for path in first] == [True] * 3
    assert len(second) == 4
    for name, path in zip(("665k", "Instruct-LAION", "Instruct-VFLAN", "sharegpt4v"), second, strict=True):
        assert name in path
    assert not any(source.prompts for source in star.stages["pretrain"].data)


# Released checkpoints.


def release(folder: Path, kind: str = "one") -> tuple[Foveate, Path]:
    model = folder / "model"
    return write_release(model, folder / "tower", kind), model


@pytest.mark.parametrize("kind", ["bin", "safetensors", "one"])
def test_released_checkpoints_load(kind: str, tmp_path: Path) -> None:
    m, model = release(tmp_path, kind)
    loaded = foveate.load(model, device="cpu", dtype="float32")
    assert loaded.model.config.method == "inf_llava"
    assert loaded.model.method.options == InfLlava(PAPER).options
    ours, theirs = m.model.state_dict(), loaded.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, ours[key]) for key, value in theirs.items())
    assert "system" in loaded.processor.chat_template  # the authors' Llama-3 template
    batch = prepare(loaded.processor, [chat("What?", picture(60, 100))])
    with torch.no_grad():
        assert gap(m.model(**batch).logits, loaded.model(**batch).logits) < CLOSE
    loaded.save(tmp_path / "ours")
    converted = foveate.load(tmp_path / "ours", device="cpu", dtype="float32")
    assert greedy(converted.model, batch) == greedy(m.model, batch)


def test_wrong_keys_are_named(tmp_path: Path) -> None:
    _, model = release(tmp_path)
    weights = load_file(model / "model.safetensors")
    lost = "model.spatial_embed.ln_fuse.weight"
    for change, message in (
        ({lost: None}, r"lacks connector\.fusion\.norm\.weight"),
        ({"model.spatial_embed.extra.weight": torch.zeros(2)}, "has unexpected model.spatial_embed.extra"),
        ({lost: torch.zeros(9)}, r"the wrong shape for connector\.fusion\.norm\.weight"),
    ):
        changed = {key: t for key, t in {**weights, **change}.items() if t is not None}
        save_file(changed, model / "model.safetensors")
        with pytest.raises(FoveateError, match=message):
            FoveateForConditionalGeneration.from_pretrained(model)


def test_a_connector_of_the_first_stage(tmp_path: Path) -> None:
    """mm_projector.bin with projector and enhancement; one with the projector alone is LLaVA's."""
    m, model = release(tmp_path)
    folder = tmp_path / "stage"
    folder.mkdir()
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "image_aspect_ratio": "square"}))
    weights = {
        released_names(key): t for key, t in m.model.state_dict().items() if key.startswith("connector.")
    }
    torch.save(weights, folder / "mm_projector.bin")

    def composed(**more: Any) -> Foveate:
        return compose(tiny_vision(), tiny_text(), connector=folder, tokenizer=tiny_tokenizer(), **more)

    got = composed()
    assert got.model.config.method == "inf_llava"
    assert got.model.method.options.fit == "crop"
    ours, theirs = m.model.connector.state_dict(), got.model.connector.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    for part in ("ln_fuse", "spatial_embed.attention", "mm_projector"):  # some keys, or a part as a whole
        lost = {key: t for key, t in weights.items() if part not in key}
        torch.save(lost, folder / "mm_projector.bin")
        with pytest.raises(FoveateError, match=r"lacks connector\.(fusion\.norm|attention|projector)"):
            composed()
    torch.save({k: t for k, t in weights.items() if "mm_projector" in k}, folder / "mm_projector.bin")
    got = composed()
    assert got.model.config.method == "llava"
    assert torch.equal(got.model.connector.projector[0].weight, ours["projector.0.weight"])
