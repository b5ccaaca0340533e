"""CoRoI. No code of its authors is public: all cases are derived from the paper's equations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from foveate.methods.base import Query, TowerGeometry, Widths
from foveate.methods.coroi import (
    Chosen,
    Coroi,
    CoroiConnector,
    CoroiOptions,
    CrossAttention,
    InjectedWindows,
    RoiInjector,
    Scorer,
    Window,
    decoder_layers,
    gate,
    integral,
    pooled,
)
from foveate.picture.geometry import Size
from foveate.picture.source import Look, Source
from tests.parity.golden import Comparison, Family, normed

CLOSE, PIXELS = 1e-5, 1e-3  # of activations of about 1, and of pixels up to 255

SCORER = {  # names of the golden scorer -> ours
    "norm1.": "self_norm.",
    "norm2.": "cross_norm.",
    "norm3.": "feed_forward.0.",
    "fc1.": "feed_forward.1.",
    "fc2.": "feed_forward.3.",
    **{
        f"{kind}_attn.{theirs}.": f"{kind}_attention.{ours}."
        for kind in ("self", "cross")
        for theirs, ours in zip("qkvo", ("query", "key", "value", "out"), strict=True)
    },
}


def connector(
    tower: TowerGeometry, scales: Iterable[int], width: int = 16, text: int = 16, **options: Any
) -> tuple[Coroi, CoroiConnector]:
    given = {"scales": sorted(set(scales)), "distinct": False, **options}
    method = Coroi(tower, given)
    return method, method.build_connector(Widths(width, text, 8)).eval()


def of_grid(grid: int) -> TowerGeometry:
    """Of a case in which pixels play no part."""
    return TowerGeometry(grid, 1)


def load_scorer(scorer: Scorer, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Scorer:
    named = {}
    for key, tensor in state.items():
        theirs = next(name for name in SCORER if key.startswith(name))
        named[SCORER[theirs] + key.removeprefix(theirs)] = tensor.float()
    scorer.load_state_dict(named)
    return normed(scorer, config).eval()


def gradient(state: Mapping[str, Tensor], key: str) -> str:
    """An option under which a scorer has the last bias where the case has one."""
    return "weighted" if key in state else "straight_through"


def situated(
    compare: Comparison,
    name: str,
    module: CoroiConnector,
    look: Look,
    window: Window,
    about: Mapping[str, Any],
) -> None:
    """Which window it is, and where it lies in the low-resolution picture and in the enlarged one."""
    side, scale = module.sides[window.scale], module.options.scales[window.scale]
    box = [int(n) for n in look.box]
    own: dict[str, Any] = {"window": [side, side], "row": window.row, "col": window.column}
    own |= {"lr_box_xyxy": box, "hr_box_xyxy": [scale * n for n in box]}
    tokens = module._cells(window.row, window.column, side).tolist()
    own |= {"lr_token_positions": tokens, "first_last_token": [tokens[0], tokens[-1]]}
    expected = {key: about[key] for key in own if key in about}
    compare.equal(name, {key: own[key] for key in expected}, expected)


def windows(compare: Comparison) -> None:
    """Of each map: first row and column of the best window, its average, and what it covers."""
    case = compare.case
    maps, table = case.tensors["maps"], case.json["table"]
    tower = TowerGeometry(case.config["side"], case.config["side"] // maps.shape[-1])
    method, module = connector(tower, (int(lam) for row in table for lam in row["windows"]))
    plan, sums = method.plan(*tower.side), integral(maps)
    for s, (scale, side) in enumerate(zip(module.options.scales, module.sides, strict=True)):
        values = pooled(sums, side)
        chosen, _ = module.select(values, None)
        for about in table:
            if (expected := about["windows"].get(str(scale))) is None:
                continue
            name, number = f"map {about['map']} at {side} tokens", about["map"]
            window = Window(0, s, 0, *divmod(int(chosen[number]), values.shape[-1]))
            situated(compare, name, module, module._look(window, plan), window, expected)
            average = torch.tensor(expected["mean"], dtype=values.dtype)
            compare.close(f"{name}, average", values[number].max(), average, CLOSE)


def layers(compare: Comparison) -> None:
    names = {"all6": "six", "base3": "three", "middle": "one"}
    for depth, expected in compare.case.json["table"].items():
        for theirs, layers in expected.items():
            # In an LLM of few layers, several marks are the same layer, which is changed once.
            ours = decoder_layers(names[theirs], int(depth))
            compare.equal(f"{depth} layers, {names[theirs]}", ours, sorted(set(layers)))


def grid_of(about: Mapping[str, Any]) -> int:
    """How many tokens a row of the picture has: the distance of a window's second row from its first."""
    places, (height, width) = about["sequence_positions"], about["window"]
    if height > 1:
        return places[width] - places[0]
    first, last = about["v2_layout"]["base"]
    return isqrt(last - first)


def positions(compare: Comparison) -> None:
    """A window's tokens in the LLM's sequence, in which the visual tokens begin at image_start."""
    table = compare.case.json["table"]
    for variant, about in product(("v1", "v2"), table):
        tower = of_grid(grid_of(about))
        method, module = connector(tower, [about["lam"]], variant=variant)
        (side,) = module.sides
        start, count = about["image_start"], method.plan(*tower.side).tokens
        visual = torch.zeros(1, start + count, dtype=torch.bool)
        visual[:, start:] = True
        window = Window(0, 0, 0, about["row"], about["col"])
        chosen = Chosen([window], torch.zeros(1, tower.tokens, 16), torch.ones(1))
        tokens = module._round(chosen, [0], [0], [0]).tokens
        places = visual.flatten().nonzero()[:, 0][tokens]
        name = f"{variant}, map {about['map']}, {side} tokens"
        compare.equal(name, places.tolist(), about["sequence_positions"])
        compare.equal(f"{name}, window", [side, side], about["window"])
        if "v2_layout" in about and variant == "v2":
            ends = (about["v2_layout"]["base"], about["v2_layout"]["high"])
            own = ([start, start + tower.tokens], [start + tower.tokens, start + count])
            compare.equal(f"{name}, layout", ends, own)


def crops(compare: Comparison) -> None:
    case = compare.case
    table, picture = case.json["table"], case.tensors["lr_uint8"].permute(1, 2, 0)
    tower = TowerGeometry(picture.shape[0], picture.shape[0] // case.config["grid"])
    method, module = connector(tower, (about["lam"] for about in table))
    source = Source([picture], torch.zeros(1, 2, 3), lambda views: views)
    for about in table:
        s = module.options.scales.index(about["lam"])
        values = pooled(integral(case.tensors[f"score_lam{about['lam']}"][None]), module.sides[s])
        window = Window(0, s, 0, *divmod(int(module.select(values, None)[0]), values.shape[-1]))
        look = module._look(window, method.plan(*picture.shape[:2]))
        situated(compare, f"window at {about['lam']}", module, look, window, about)
        expected = case.tensors[f"out.crop_lam{about['lam']}"]
        for upsampled in (False, True):  # the same, as the picture has the low-resolution size
            # Where a scale does not divide the grid, the clip is smaller than the tower's side.
            seen = source.pixels(0, look._replace(upsampled=upsampled), Size(*expected.shape[-2:]))
            name = f"crop at {about['lam']}{', upsampled' if upsampled else ''}"
            compare.close(name, seen, expected, PIXELS)


def inject(compare: Comparison) -> None:
    """Each variant's name says what it has: the projections' order, several heads, one window a time."""
    case, config, rois = compare.case, compare.case.config, compare.case.json["rois"]
    tower, starts = of_grid(config["grid"]), config["image_starts"]
    features = torch.stack([case.tensors[f"roi.{r['sample']}.{r['roi']}.features"] for r in rois])
    hidden = case.tensors["hidden"]
    visual = torch.zeros(hidden.shape[:2], dtype=torch.bool)
    for sample, start in enumerate(starts):
        visual[sample, start : start + tower.tokens] = True
    firsts = [sample * tower.tokens for sample in range(len(starts))]
    places = visual.flatten().nonzero()[:, 0]
    turn = [sum(r["sample"] == earlier["sample"] for earlier in rois[:i]) for i, r in enumerate(rois)]
    for name, expected in case.part("out").items():
        projections = "norm_linear" if name.startswith("norm_linear") else "linear_norm"
        options = {
            "projections": projections,
            "heads": config["heads_variant"] if name.endswith("heads") else 1,
            "overlap": "sequence" if name.endswith("sequential") else "add",
        }
        widths = (features.shape[-1], hidden.shape[-1])
        _, module = connector(tower, (r["lam"] for r in rois), *widths, **options)
        scales = module.options.scales
        every = [Window(r["sample"], scales.index(r["lam"]), r["roi"], r["row"], r["col"]) for r in rois]
        chosen = Chosen(every, features, torch.ones(len(rois)))
        order = [list(range(len(rois)))]
        if name == "single_roi":
            order = [[i for i, r in enumerate(rois) if r["roi"] == 0]]
        elif options["overlap"] == "sequence":  # those of a sample one after the other, in the list's order
            order = [[i for i, place in enumerate(turn) if place == n] for n in range(max(turn) + 1)]
        rows = list(range(len(rois)))
        for i, r in enumerate(rois):
            tokens = module._round(chosen, rows, [i], firsts).tokens
            own = places[tokens] - r["sample"] * hidden.shape[1]
            compare.equal(f"{name}, tokens of window {i}", own.tolist(), r["positions"])
        rounds = [module._round(chosen, rows, part, firsts) for part in order]
        attention = CrossAttention(Widths(*widths), module.options)
        ours = {"q": "query", "k": "key", "v": "value"}
        state = case.part(f"state.{projections}")
        attention.load_state_dict({f"{ours[key[0]]}{key[1:]}": tensor for key, tensor in state.items()})
        got = RoiInjector(normed(attention, config))(hidden, InjectedWindows(features, rounds), visual)
        compare.close(name, got, expected, CLOSE)


def scorer(compare: Comparison) -> None:
    case, config = compare.case, compare.case.config
    low, state = case.tensors["V_low"], case.part("state")
    options = CoroiOptions(scorer_heads=config["heads"], gradient=gradient(state, "fc2.bias"))
    module = load_scorer(Scorer(low.shape[-1], options), state, config)
    view = module.read(low[None])
    words = case.tensors["U"][None]
    for name, expected in case.part("out").items():
        seen = [words] if name == "step0" else [words, case.tensors["roi"][None]]
        guides = torch.cat(seen, 1)
        scores = module(view, module.guides(guides), torch.ones(guides.shape[:2], dtype=torch.bool))
        compare.close(name, scores.view(expected.shape), expected, CLOSE)


def straight_through(compare: Comparison) -> None:
    case = compare.case
    config, tensors, expected = case.config, case.tensors, case.part("out")
    score = tensors["score"].clone().requires_grad_()
    with torch.enable_grad():
        values = pooled(integral(score[None]), score.shape[0] // config["lam"])
        averages = values.flatten(1)
        factor = gate(averages, torch.tensor([config["selected"]]), CoroiOptions(temperature=config["tau"]))
        (tensors["update"] * factor.float() * tensors["upstream"]).sum().backward()
    compare.equal("gate", float(factor.detach()), 1.0)
    assert score.grad is not None
    slope, probability = score.grad, (averages.detach() / config["tau"]).softmax(1)
    results = {
        "pooled": values[0].detach(),
        "prob": probability.view(values.shape[1:]),
        "grad_score": slope,
    }
    compare.those(expected, results, CLOSE)


def chain(compare: Comparison) -> None:
    """The whole chain on a picture given by a formula, read by a small encoder."""
    case, config, chains = compare.case, compare.case.config, compare.case.json["chains"]
    weight, bias = (case.tensors[f"state.encoder.embed.{name}"] for name in ("weight", "bias"))
    tower = TowerGeometry(config["side"], config["patch"])

    def encode(views: Tensor) -> Tensor:
        """Means of the quadrants of every patch, through a linear layer: (V, 3, h, w) -> (V, N, C)."""
        quadrants = torch.nn.functional.avg_pool2d(views, config["patch"] // 2)  # (V, 3, 2 h, 2 w)
        patches = quadrants.unflatten(2, (-1, 2)).unflatten(4, (-1, 2))  # (V, 3, h, 2, w, 2)
        return torch.tanh(patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2) @ weight.T + bias)

    y, x = torch.meshgrid(torch.arange(config["side"]), torch.arange(config["side"]), indexing="ij")
    terms = torch.stack([x * x, y * y, x * y, x, y, torch.ones_like(x)], -1)
    picture = (terms @ torch.tensor(case.json["image"]["coef"]).T % 256).to(torch.uint8)  # (H, W, 3)
    norms = torch.tensor([[0.5] * 3, [1.0] * 3])[None]  # the formula's pixel: v / 255 - 0.5
    words, state = case.tensors["U"][None], case.part("state.scorer")
    for history in dict.fromkeys(about["history"] for about in chains):
        mine = [about for about in chains if about["history"] == history]
        method, module = connector(
            tower,
            (about["lam"] for about in mine),
            len(bias),
            words.shape[-1],
            history=history,
            rois=max(len(about["chain"]) for about in mine),
            scorer_heads=config["heads"],
            gradient=gradient(state, "fc2.bias"),
        )
        load_scorer(module.scorer, state, config)
        torch.nn.init.eye_(module.question.weight)
        torch.nn.init.zeros_(module.question.bias)
        low = encode((picture.permute(2, 0, 1)[None] / 255 - 0.5).float())
        compare.close("low-resolution features", low[0], case.tensors["out.V_low"], CLOSE)
        best: list[Tensor] = []
        plain = module.select

        def noted(values: Tensor, *more: Any, best: list[Tensor] = best, plain: Any = plain) -> Any:
            best.append(values.max())
            return plain(values, *more)

        module.select = noted  # type: ignore[method-assign]
        source = Source([picture], norms, encode)
        query = Query(words, torch.ones(words.shape[:2]))
        got = module.chain(low, [method.plan(*picture.shape[:2])], query, source)
        averages = torch.stack(best).view(-1, len(module.sides))  # a step's scales after each other
        for about in mine:
            s, steps = module.options.scales.index(about["lam"]), about["chain"]
            numbers = [i for i, window in enumerate(got.windows) if window.scale == s][: len(steps)]
            name = f"{history} at {about['lam']}"
            plan = method.plan(*picture.shape[:2])
            for n, (i, step) in enumerate(zip(numbers, steps, strict=True)):
                look = module._look(got.windows[i], plan)
                situated(compare, f"{name}, step {n}", module, look, got.windows[i], step)
            expected = torch.tensor([step["mean"] for step in steps])
            compare.close(f"{name}, averages", averages[: len(steps), s], expected, CLOSE)
            if "last_roi_mean" in about:
                mean = got.features[numbers[-1]].mean()
                compare.close(f"{name}, last", mean, torch.tensor(about["last_roi_mean"]), CLOSE)


FAMILY = Family(
    "coroi",
    {
        "windows": windows,
        "layers": layers,
        "positions": positions,
        "crops": crops,
        "inject": inject,
        "scorer": scorer,
        "straight_through": straight_through,
        "chain": chain,
    },
)
