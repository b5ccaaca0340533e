"""CoRoI: what the tests of all methods and its golden vectors do not ask."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from foveate import Foveate, FoveateError
from foveate.methods.base import Query, TowerGeometry, Widths
from foveate.methods.coroi import (
    Coroi,
    CoroiConnector,
    CoroiOptions,
    CrossAttention,
    Group,
    InjectedWindows,
    RoiInjector,
    Round,
    Scorer,
    decoder_layers,
    integral,
    pooled,
)
from foveate.picture.geometry import Box, Size, squashed
from foveate.picture.source import Look, Source
from foveate.tiny import tiny_model
from tests.methods.conftest import fresh
from tests.methods.test_invariants import CLOSE, chats, prepare, training_batch
from tests.support import (
    chat,
    checkpoint_activations,
    gap,
    greedy,
    picture,
    rows,
    source_of,
    tower_calls,
)

PAPER = TowerGeometry(336, 14)
TINY = TowerGeometry(56, 14)
OF_PICTURES = ("pixel_values", "image_sizes", "query_ids", "query_mask", "source_pixels", "source_norms")


def made(**options: Any) -> Foveate:
    """A tiny model whose windows change what it says."""
    return fresh("coroi", **options)


def encoded(model: Any, batch: dict[str, Tensor]) -> Any:
    return model.get_image_features(**{name: batch[name] for name in OF_PICTURES if name in batch})


# Selection.


def test_equal_windows_stay_equal_in_the_integral_image() -> None:
    """In single precision the sums of a constant map differ, and a later window would win."""
    for value in (0.1, -3.3, 1e-4, 77.7):
        values = pooled(integral(torch.full((1, 24, 24), value)), 6).flatten()
        assert int(values.argmax()) == 0
        assert torch.allclose(values.float(), torch.tensor(value))
    maps = torch.randn(3, 24, 24)
    for side in (12, 8, 6, 1, 24):
        expected = nn.functional.avg_pool2d(maps[:, None], side, 1)[:, 0]
        assert gap(pooled(integral(maps), side), expected) < 1e-5


def full_chain(
    connector: CoroiConnector, low: Tensor, words: Tensor, source: Source, picture_: int, scale: int
) -> list[tuple[tuple[int, int], Tensor]]:
    """One picture, one scale, one window at a time, by plain means: places and features (N, C)."""
    method_side, grid = connector.sides[scale], connector.tower.grid.height
    scorer, seen, windows = connector.scorer, list[Tensor](), list[tuple[int, int]]()
    canvas = squashed(Size(*source.pictures[picture_].shape[:2]), connector.tower.side)
    for _ in range(connector.options.rois):
        guides = torch.cat([connector.question(words[None]), *seen[-1:]], 1)
        there = torch.ones(guides.shape[:2], dtype=torch.bool)
        scores = scorer(scorer.read(low[None]), scorer.guides(guides), there)
        averages = {
            (r, c): scores.view(grid, grid)[r : r + method_side, c : c + method_side].mean()
            for r in range(grid - method_side + 1)
            for c in range(grid - method_side + 1)
            if not (connector.options.distinct and (r, c) in windows)
        }
        row, column = max(averages, key=lambda place: float(averages[place]))
        windows.append((row, column))
        box = Box(14 * column, 14 * row, 14 * (column + method_side), 14 * (row + method_side))
        seen.append(source.encode(source.view(picture_, Look(canvas, box), connector.tower.side)[None]))
    return [(place, features[0]) for place, features in zip(windows, seen, strict=True)]


@torch.no_grad()
@pytest.mark.parametrize("distinct", [True, False])
def test_all_scales_and_pictures_in_step_equal_one_at_a_time(distinct: bool) -> None:
    m = made(distinct=distinct)
    m.model.double()  # sums of other batches are rounded in other ways
    connector = m.model.connector
    for parameter in connector.scorer.parameters():  # so that windows move
        parameter.add_(0.5 * torch.randn_like(parameter))
    images = [picture(90, 120, seed=1), picture(200, 70, seed=2), picture(90, 120, seed=3)]
    low = torch.randn(3, 16, 32).double()
    texts, mask = torch.randn(3, 7, 48).double(), torch.ones(3, 7)
    mask[1, :4] = 0
    source = source_of(*images)
    source.encode = m.model.encode_views
    plans = [m.model.method.plan(image.height, image.width) for image in images]
    with tower_calls(m.model) as seen:
        chosen = connector.chain(low, plans, Query(texts, mask), source)
    assert len(seen) <= 4
    for p in range(3):
        for s in range(3):
            expected = full_chain(connector, low[p], texts[p][mask[p] > 0], source, p, s)
            found = [(w.row, w.column) for w in chosen.windows if (w.question, w.scale) == (p, s)]
            assert found == [place for place, _ in expected]
            features = torch.stack([seen for _, seen in expected])
            mine = [(w.question, w.scale) == (p, s) for w in chosen.windows]
            assert gap(chosen.features[torch.tensor(mine)], features) < 1e-5
    assert len({(w.row, w.column) for w in chosen.windows}) > 4


@torch.no_grad()
@pytest.mark.parametrize("pixels", ["original", "upsampled"])
def test_what_windows_are_cut_from(pixels: str) -> None:
    m = made(pixels=pixels, rois=2)
    image, plan = picture(60, 200), m.model.method.plan(60, 200)
    source = source_of(image)
    shown: list[Tensor] = []
    source.encode = lambda views: (shown.append(views), m.model.encode_views(views))[1]
    chosen = m.model.connector.chain(torch.randn(1, 16, 32), [plan], None, source)
    canvas = squashed(Size(60, 200), TINY.side)
    assert plan.canvases == (canvas,)
    window = next(w for w in chosen.windows if (w.scale, w.step) == (0, 0))
    left, top = 14 * window.column, 14 * window.row
    look = Look(canvas, Box(left, top, left + 28, top + 28), upsampled=pixels == "upsampled")
    assert torch.equal(shown[0][0], source.view(0, look, TINY.side))
    other = source.view(0, look._replace(upsampled=not look.upsampled), TINY.side)
    assert gap(shown[0][0], other) > 0.1


class Points(nn.Module):
    """A scorer that wants the window at the first token; notes what it is guided by."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = list[Tensor]()

    def read(self, low: Tensor) -> Tensor:
        return low

    def guides(self, guides: Tensor) -> list[Tensor]:
        return [guides, guides]

    def forward(self, low: Tensor, guides: list[Tensor], mask: Tensor, owners: Tensor) -> Tensor:
        self.seen.append(guides[0])
        return (torch.arange(16) == 0).float().expand(len(guides[0]), -1)


@torch.no_grad()
@pytest.mark.parametrize(("history", "maps"), [("last", 2), ("none", 1)])
def test_which_features_of_a_window_are_read(history: str, maps: int) -> None:
    """A chain of two windows at each of two scales; without movement, a map of scores is used again."""
    m = made(scales=[3, 4], rois=2, distinct=False, history=history)
    connector = m.model.connector
    scorer = connector.scorers[0] = Points()
    source = source_of(picture(60, 80))
    source.encode = m.model.encode_views
    query = Query(torch.randn(1, 3, 48), torch.ones(1, 3))
    chosen = connector.chain(torch.randn(1, 16, 32), [m.model.method.plan(60, 80)], query, source)
    assert [window.column for window in chosen.windows] == [0, 0, 0, 0]
    assert len(scorer.seen) == maps
    seen = chosen.features[0]
    if maps > 1:
        assert gap(scorer.seen[1][0, 3:], seen) < CLOSE  # after three words
    looks = [Look(squashed(Size(60, 80), TINY.side), Box(n, 0, n + 14, 14)) for n in range(4)]
    assert gap(connector._injection(chosen, looks, [0], [16]).features[0], seen) < CLOSE


def plain_scores(scorer: Scorer, options: dict[str, Any], low: Tensor, guides: Tensor) -> Tensor:
    """Of one picture, (N, C) and (M, C) -> (N,), by one head."""

    def attended(attention: nn.Module, x: Tensor, source: Tensor) -> Tensor:
        weights = (attention.query(x) @ attention.key(source).T / x.shape[1] ** 0.5).softmax(1)
        return attention.out(weights @ attention.value(source))

    if options.get("guide_norm"):
        norm = scorer.guide_norm
        guides = nn.functional.layer_norm(guides, norm.normalized_shape, norm.weight, norm.bias)
    read = scorer.self_norm(low)
    x = low + attended(scorer.self_attention, read, read)
    x = x + attended(scorer.cross_attention, scorer.cross_norm(x), guides)
    norm, first, _, last = scorer.feed_forward
    return last(nn.functional.gelu(first(norm(x))))[:, 0]


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"guide_norm": True}])
def test_a_scorer_by_plain_means(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    scorer = Scorer(32, CoroiOptions(scorer_heads=1, **options))
    for parameter in scorer.parameters():  # norms that do something
        parameter.add_(0.3 * torch.randn_like(parameter))
    low, guides = torch.randn(16, 32), 3 * torch.randn(5, 32) + 1
    got = scorer(scorer.read(low[None]), scorer.guides(guides[None]), torch.ones(1, 5, dtype=torch.bool))[0]
    assert gap(got, plain_scores(scorer, options, low, guides)) < 1e-5


@pytest.mark.parametrize("gradient", ["gumbel", "straight_through"])
def test_noise_while_it_learns_and_not_when_it_is_asked(gradient: str) -> None:
    """With Gumbel noise, windows are chosen as often as the softmax says."""
    connector = made(gradient=gradient, temperature=0.5).model.connector.train()
    values = torch.tensor([0.0, 0.5, 0.2, -0.3]).view(1, 2, 2).expand(4000, 2, 2)
    torch.manual_seed(0)
    often = connector.select(values, None)[0].bincount(minlength=4) / 4000
    noisy = (values[0].flatten() / 0.5).softmax(0)
    expected = noisy if gradient == "gumbel" else torch.tensor([0.0, 1.0, 0.0, 0.0])
    assert gap(often, expected) < 0.03
    assert set(connector.eval().select(values, None)[0].tolist()) == {1}


@torch.no_grad()
def test_the_tower_is_called_once_a_step_and_not_for_what_it_saw() -> None:
    for scales in ([2], [2, 3], [2, 3, 4]):
        for count in (1, 3):
            m = made(scales=scales, rois=3)
            batch = prepare(m.processor, [chat("What?", picture(60 + 9 * i, 80)) for i in range(count)])
            with tower_calls(m.model) as seen:
                m.model(**batch)
            assert len(seen) == 1 + 3
            assert seen[0] == count
    m = made(history="none", scales=[2], distinct=False)  # the same window in every step
    batch = prepare(m.processor, [chat("What?", picture(60, 80))])
    with tower_calls(m.model) as seen:
        windows = encoded(m.model, batch).accounts[0].regions
    assert seen == [1, 1]
    assert len(windows) == 4
    assert len(set(windows)) == 1


@torch.no_grad()
def test_distinct_chains_never_come_back() -> None:
    m = made(rois=9, scales=[2])
    batch = prepare(m.processor, [chat("What?", picture(60, 80))])
    assert len(set(encoded(m.model, batch).accounts[0].regions)) == 9  # all there are in a grid of 4 x 4
    with pytest.raises(FoveateError, match="rois 10 with distinct: scale 2 has 9 windows"):
        made(rois=10, scales=[2])


@torch.no_grad()
def test_the_question_decides_and_its_padding_does_not() -> None:
    m = made()
    image = picture(300, 400)
    with torch.no_grad():
        m.model.connector.scorer.cross_attention.out.weight.mul_(20)
    asked = ("Why?", "What is written on the large sign in the middle?")
    together = [
        a.regions for a in encoded(m.model, prepare(m.processor, [chat(q, image) for q in asked])).accounts
    ]
    alone = [encoded(m.model, prepare(m.processor, [chat(q, image)])).accounts[0].regions for q in asked]
    assert together == alone
    assert together[0] != together[1]


@torch.no_grad()
def test_a_text_of_no_tokens_and_no_text_at_all() -> None:
    m = made()
    batch = prepare(m.processor, [chat("What?", picture(60, 80)), chat("Where?", picture(61, 80))])
    batch["query_mask"][0] = 0
    results = [encoded(m.model, batch)]
    results.append(
        encoded(
            m.model,
            {**batch, "query_ids": batch["query_ids"][:, :0], "query_mask": batch["query_mask"][:, :0]},
        )
    )
    results.append(encoded(m.model, {k: v for k, v in batch.items() if not k.startswith("query")}))
    for result in results:
        assert result.accounts[0].regions == results[0].accounts[0].regions
        assert all(torch.isfinite(part).all() for part in (result.injection.features, *result.pooler_output))
        assert torch.isfinite(result.injection.rounds[0].groups[0].gates).all()


def test_every_rank_has_gradients_for_the_question() -> None:
    """Also one whose pictures all come without a text."""
    m = made()
    batch = prepare(m.processor, [chat("What?", picture(60, 80))])
    batch |= {name: batch[name][:, :0] for name in ("query_ids", "query_mask")}
    m.model(**batch).logits.sum().backward()
    assert [name for name, p in m.model.connector.named_parameters() if p.grad is None] == []


def test_a_stage_without_a_chain_has_all_parts_of_the_next() -> None:
    without, with_chain = (made(chain=chain).model.state_dict() for chain in (False, True))
    assert without.keys() == with_chain.keys()
    alone = made(rois=1)
    batch = prepare(alone.processor, [chat("What?", picture(60, 80))])
    alone.model(**batch).logits.sum().backward()
    assert [name for name, p in alone.model.connector.named_parameters() if p.grad is None] == []


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (3, 500), (20, 10), (57, 2000)])
def test_small_and_narrow_pictures(size: tuple[int, int]) -> None:
    m = made()
    batch = prepare(m.processor, [chat("What?", picture(*size))])
    result = encoded(m.model, batch)
    assert torch.isfinite(m.model(**batch).logits).all()
    for box in result.accounts[0].regions:
        assert 0 <= box.left <= box.right <= size[1]
        assert 0 <= box.top <= box.bottom <= size[0]


def test_windows_of_a_grid_that_the_scale_does_not_divide() -> None:
    method = Coroi(PAPER, {"scales": [2, 3, 5, 7]})
    assert method.build_connector(Widths(64, 64, 8)).sides == [12, 8, 4, 3]
    with pytest.raises(FoveateError, match="25 is more than the tower's 24 rows of tokens"):
        Coroi(PAPER, {"scales": [25]})


# Injection.


def test_layers() -> None:
    assert decoder_layers("six", 32) == [7, 11, 15, 19, 23, 27]
    assert decoder_layers("six", 60) == [14, 21, 29, 36, 44, 51]
    assert decoder_layers("three", 32) == [7, 15, 23]
    assert decoder_layers("one", 32) == [15]
    assert decoder_layers("six", 4) == [0, 1, 2]
    assert decoder_layers("six", 2) == decoder_layers("one", 3) == [0]
    assert decoder_layers([2, 1], 4) == [1, 2]
    with pytest.raises(FoveateError, match="an LLM of at least 2 layers, not 1"):
        decoder_layers("six", 1)
    with pytest.raises(FoveateError, match=r"layers \[3\] do not fit an LLM of 4 layers: choose from 0 to 2"):
        made(layers=[3])  # after the last layer, no token reads those of the picture
    assert list(made(layers=[0, 2]).model.connector.injectors()) == [0, 2]


@torch.no_grad()
@pytest.mark.parametrize("projections", ["linear_norm", "norm_linear"])
def test_a_fresh_model_is_its_llm(projections: str) -> None:
    fresh = tiny_model("coroi", {"projections": projections})
    without = tiny_model("coroi", {"projections": projections, "chain": False})
    without.model.load_state_dict(fresh.model.state_dict())
    batch = prepare(fresh.processor, chats())
    plain = {k: v for k, v in batch.items() if not k.startswith("source")}
    assert encoded(fresh.model, batch).injection is not None
    assert torch.equal(fresh.model(**batch).logits, without.model(**plain).logits)
    assert greedy(fresh.model, batch) == greedy(without.model, plain)


@torch.no_grad()
def test_what_a_window_changes() -> None:
    """Behind the injected layer nothing but the tokens inside of a chosen window."""
    m = made(scales=[2], rois=1, layers=[1])
    image = picture(112, 112)
    conversation = [chat("What is it?", image, image), chat("What is it?", image)]
    batch = prepare(m.processor, conversation)
    states = []
    for weight in (1.0, 0.0):
        injector = m.model.connector.attentions[0]
        injector.value.norm.weight.data.mul_(weight)
        injector.value.norm.bias.data.mul_(weight)
        states.append(m.model(**batch, output_hidden_states=True).hidden_states[2])  # after layer 1
    changed = (states[0] - states[1]).abs().sum(-1) > 0  # (B, T)
    regions = [account.regions for account in encoded(m.model, batch).accounts]
    visual = batch["input_ids"] == m.processor.image_token_id
    expected = torch.zeros_like(visual)
    cells = []
    for boxes in regions:
        grid = torch.zeros(4, 4, dtype=torch.bool)
        left, top, right, bottom = (round(n / 28) for n in boxes[0])
        grid[top:bottom, left:right] = True
        assert int(grid.sum()) == 4
        cells.append(grid.flatten())
    expected[visual] = torch.cat(cells)
    assert torch.equal(changed, expected)


ROUNDS: dict[str, list[set[int]]] = {  # with the windows that they read
    "add": [{0, 1, 2, 3}],
    "sequence": [{0}, {1}, {2}, {3}],
}


@torch.no_grad()
@pytest.mark.parametrize(("overlap", "rounds"), ROUNDS.items())
def test_which_windows_a_layer_reads_and_which_tokens_read_them(overlap: str, rounds: list[set[int]]) -> None:
    m = made(overlap=overlap, scales=[2, 4], rois=2, layers=[0, 2])
    injection = encoded(m.model, prepare(m.processor, [chat("What?", picture(60, 80))])).injection
    found = [{int(r.windows[n]) for g in r.groups for n in g.rows} for r in injection.rounds]
    assert found == rounds
    assert {g.places.shape[1] for r in injection.rounds for g in r.groups} == {4, 1}
    hidden, visual = torch.randn(1, 20, 48), torch.arange(20)[None] >= 4
    for k, injector in enumerate(m.model.connector.injectors().values()):
        expected = hidden
        for round_ in injection.rounds:
            alone = InjectedWindows(injection.features, [round_])
            expected = RoiInjector(m.model.connector.attentions[k])(expected, alone, visual)
        assert torch.equal(injector(hidden, injection, visual), expected)


def test_every_layer_has_its_own_attention() -> None:
    connector = made().model.connector
    assert len(connector.injectors()) == 3
    assert len({id(injector.attention) for injector in connector.injectors().values()}) == 3
    assert len(connector.attentions) == 3


@pytest.mark.parametrize("llm", ["cpu", "meta"])
def test_a_layer_may_be_on_another_device_than_the_connector(llm: str) -> None:
    """With tensors that have no values, and know on which of two devices they are."""
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()), torch.no_grad():
        with torch.device("cpu" if llm == "meta" else "meta"):
            attention = CrossAttention(Widths(8, 12), CoroiOptions())
            number = torch.zeros(1, 4, dtype=torch.long)
            group = Group(rows=number[0, :1], places=number, gates=torch.ones(1))
            regions = InjectedWindows(
                torch.zeros(1, 16, 8), [Round(torch.arange(4), torch.arange(1), [group])]
            )
        hidden, visual = torch.zeros(1, 20, 12, device=llm), torch.ones(1, 20, dtype=torch.bool)
        changed = RoiInjector(attention)(hidden, regions, visual)
        with torch.device(llm):  # as accelerate does, which moves weights and tensors and not what holds them
            update = CrossAttention(Widths(8, 12), CoroiOptions())(
                torch.zeros(4, 12), regions.rounds[0], torch.zeros(1, 16, 8)
            )
    assert (changed.device, changed.shape) == (torch.device(llm), (1, 20, 12))
    assert (update.device, update.shape) == (torch.device(llm), (4, 12))


@torch.no_grad()
def test_prefill_only() -> None:
    m = made()
    batch = prepare(m.processor, chats())
    called: list[int] = []
    for attention in m.model.connector.attentions:
        attention.register_forward_hook(lambda *_: called.append(1))
    greedy(m.model, batch)
    assert len(called) == 3  # one prefill, in each of the three layers


VARIANTS: list[dict[str, Any]] = [
    {"variant": "v2"},
    {"pixels": "upsampled"},
    {"history": "all"},
    {"history": "none", "distinct": False},
    {"scorer_heads": 2},
    {"gradient": "weighted", "temperature": 2.0},
    {"gradient": "gumbel", "guide_norm": True},
    {"layers": "three", "projections": "norm_linear"},
    {"heads": 4},
    {"overlap": "sequence"},
    {"overlap": "sequence", "layers": "one", "rois": 2},
]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: " ".join(map(str, options.values())))
def test_every_option_trains_and_batch_equals_single(options: dict[str, Any]) -> None:
    m = made(**options)
    with torch.no_grad():
        batch = prepare(m.processor, chats()[:3])
        together = rows(m.model(**batch).logits, batch["attention_mask"])
        alone = prepare(m.processor, chats()[1:2])
        assert gap(m.model(**alone).logits[0], together[1]) < CLOSE
    m.model.train()
    m.model(**training_batch(m.processor)).loss.backward()
    unused = [
        name
        for name, p in m.model.connector.named_parameters()
        if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert unused == []


@torch.no_grad()
def test_windows_that_are_the_same_are_read_once_and_count_as_often_as_chosen() -> None:
    """Against every window by itself, one after the other; a sequence in which all read the first state."""
    m = made(history="none", scales=[2, 3], distinct=False)
    batch = prepare(m.processor, [chat("What?", picture(60, 80)), chat("Where?", picture(61, 90))])
    result = encoded(m.model, batch)
    injection = result.injection
    assert len(injection.features) == 4  # two pictures, two scales
    (round_,) = injection.rounds
    assert sorted(float(g) for group in round_.groups for g in group.gates) == [4.0] * 4
    hidden = torch.randn(2, 40, 48)
    visual = torch.zeros(2, 40, dtype=torch.bool)
    visual[:, 3:19] = True
    injector = next(iter(m.model.connector.injectors().values()))
    got = injector(hidden, injection, visual)
    attention = m.model.connector.attentions[0]
    expected = hidden.clone()
    for p, boxes in enumerate(account.regions for account in result.accounts):
        width, height = ((90, 61), (80, 60))[1 - p]
        for box in boxes:
            left, top, right, bottom = (
                round(Fraction(n) * 4 / side)
                for n, side in zip(box, (width, height, width, height), strict=True)
            )
            cells = [3 + 4 * r + c for r in range(top, bottom) for c in range(left, right)]
            row = next(
                int(round_.windows[group.rows[i]])
                for group in round_.groups
                for i in range(len(group.rows))
                if sorted(round_.tokens[group.places[i]].tolist()) == [16 * p + c - 3 for c in cells]
            )
            read = injection.features[row][None]
            query, key, value = (
                attention.query(hidden[p, cells]),
                attention.key(read[0]),
                attention.value(read[0]),
            )
            weights = (query @ key.T / 48**0.5).softmax(-1)
            expected[p, cells] += weights @ value
    assert gap(got, expected) < 1e-5


# Learning.


@pytest.mark.parametrize("gradient", ["centred", "straight_through", "weighted", "gumbel", "none"])
def test_the_scorer_learns_unless_the_text_is_taken_literally(gradient: str) -> None:
    m = made(gradient=gradient)
    m.model.train()
    m.model(**training_batch(m.processor)).loss.backward()
    moved = sum(
        float(p.grad.abs().sum()) for p in m.model.connector.scorer.parameters() if p.grad is not None
    )
    assert all(p.grad is not None for p in m.model.connector.scorer.parameters())
    assert (moved > 1e-4) == (gradient != "none")
    embeds = m.model.get_input_embeddings().weight.grad
    assert embeds is not None


def test_a_centred_gradient_compares_a_scale_s_windows_over_the_batch() -> None:
    """What helps all alike teaches nothing; what helps more than the mean does, as straight through."""

    def learnt(gradient: str, worth: Tensor) -> Tensor:
        m = made(gradient=gradient, scales=[2, 4], rois=3)
        source = source_of(picture(112, 112, seed=1), picture(112, 112, seed=2))
        source.encode = m.model.encode_views
        torch.manual_seed(0)
        low, query = torch.randn(2, 16, 32), Query(torch.randn(2, 3, 48), torch.ones(2, 3))
        plans = [m.model.method.plan(112, 112)] * 2
        gates = m.model.connector.chain(low, plans, query, source).gates
        (gates * worth.flatten()).sum().backward()
        return torch.cat([p.grad.flatten() for p in m.model.connector.scorer.parameters()])

    same = torch.tensor([1.0, -2.0])[None, :, None].expand(2, 2, 3)  # (P, m, n), of each scale
    assert float(learnt("centred", same).abs().max()) < 1e-7
    assert float(learnt("straight_through", same).abs().max()) > 1e-4
    torch.manual_seed(1)
    other = torch.randn(2, 2, 3)
    centred = learnt("straight_through", other - other.mean((0, 2), keepdim=True))
    assert gap(learnt("centred", other), centred) < 1e-6
    assert gap(learnt("straight_through", other), centred) > 1e-4


@torch.no_grad()
def test_the_gate_changes_no_value() -> None:
    learns, literal = made(), made(gradient="none")
    batch = prepare(learns.processor, chats())
    assert torch.equal(learns.model(**batch).logits, literal.model(**batch).logits)
    weighted = made(gradient="weighted")
    assert gap(weighted.model(**batch).logits, literal.model(**batch).logits) > CLOSE


def test_from_nothing_the_values_learn_first_and_the_scorer_next() -> None:
    m = tiny_model("coroi")
    model = m.model.train()
    batch = training_batch(m.processor)
    optimiser = torch.optim.SGD(model.connector.parameters(), lr=0.1)

    def moved() -> float:
        return sum(
            float(p.grad.abs().sum()) for p in model.connector.scorer.parameters() if p.grad is not None
        )

    model(**batch).loss.backward()
    assert moved() == 0
    assert model.connector.attentions[0].value.norm.weight.grad.abs().sum() > 0
    optimiser.step()
    optimiser.zero_grad()
    model(**batch).loss.backward()
    assert moved() > 0


def test_checkpointing_and_lora() -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        m = made()
        model = m.model.train()
        if checkpointing:
            checkpoint_activations(model)
        model(**training_batch(m.processor)).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    assert max(gap(plain[name], checkpointed[name]) for name in plain) < 1e-5
    m = made()
    batch = prepare(m.processor, chats()[:3])
    with torch.no_grad():
        expected = m.model(**batch).logits
    config = LoraConfig(
        r=2,
        target_modules=r"language_model\..*\.(q_proj|v_proj)",
        modules_to_save=["connector"],
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(m.model, config)
    with torch.no_grad():
        assert gap(wrapped(**batch).logits, expected) < CLOSE
    wrapped.train()
    wrapped(**training_batch(m.processor)).loss.backward()
    learns = {name for name, p in wrapped.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("modules_to_save" in name and "scorer" in name for name in learns)
    assert any("modules_to_save" in name and "attentions" in name for name in learns)


# Options and places.


def test_options_for_the_lab() -> None:
    assert [Coroi.options_for(ratio)["scales"] for ratio in (1, 2, 3, 4, 6)] == [
        [2],
        [2],
        [2, 3],
        [2, 3, 4],
        [2, 3, 4, 6],
    ]


def test_v2_tokens_lie_in_rows() -> None:
    """The four views' tokens as one grid: each stands for the part of the picture that `token_boxes` says."""
    m = made(variant="v2", chain=False)
    plan = m.model.method.plan(112, 112)
    boxes = m.model.method.token_boxes(plan)
    assert (plan.tokens, len(boxes)) == (80, 80)
    features = torch.zeros(5, 16, 32)
    centres = []
    for view, size in enumerate(view.size for view in plan.views):
        for token in range(16):
            row, column = divmod(token, 4)
            side = size.height // 4
            box = plan.to_picture(view, Box(column * side, row * side, (column + 1) * side, (row + 1) * side))
            features[view, token, :2] = torch.tensor([float(box.left), float(box.top)])
            centres.append(box)
    connector = m.model.connector
    connector.projector = nn.Identity()
    tokens = connector(features, [plan], None).tokens
    assert [(float(x), float(y)) for x, y in tokens[:, :2]] == [(float(b.left), float(b.top)) for b in boxes]
    assert {tuple(map(float, b)) for b in boxes} == {tuple(map(float, b)) for b in centres}


def test_wrong_options_are_named() -> None:
    for options, words in (
        ({"scales": [1]}, "scales must be different whole numbers from 2 up"),
        ({"scales": [2, 2]}, "scales must be different whole numbers from 2 up"),
        ({"rois": 0}, "rois must be at least 1, not 0"),
        ({"gradient": "centred", "rois": 1}, "rois must be at least 2, not 1"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"heads": 0}, "must be at least 1"),
        ({"heads": 5}, "heads 5 must divide the LLM's width 48"),
        ({"scorer_heads": 5}, "scorer_heads 5 must divide the vision tower's width 32"),
        ({"layers": [1, 1]}, "layers must be six, three, one or different numbers"),
        ({"max_visual_tokens": 15}, "at least 16 visual tokens"),
    ):
        with pytest.raises(FoveateError, match=words):
            made(**options).model.method.plan(60, 80)
