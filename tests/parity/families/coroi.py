"""CoRoI. No code of its authors is public: all cases are derived from the paper's equations."""

from __future__ import annotations

from collections.abc import Mapping
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
    Regions,
    RoiInjector,
    Scorer,
    Window,
    decoder_layers,
    gate,
    integral,
    pooled,
)
from foveate.source import Source
from tests.parity.golden import Comparison, Family

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


def connector(side: int, width: int, text: int, **options: Any) -> tuple[Coroi, CoroiConnector]:
    """For a tower of `side` x `side` tokens."""
    method = Coroi(TowerGeometry(14 * side, 14), {"scorer_heads": 4, "distinct": False, **options})
    return method, method.build_connector(Widths(width, text, 8)).eval()


def load_scorer(scorer: Scorer, state: Mapping[str, Tensor]) -> Scorer:
    named = {}
    for key, tensor in state.items():
        theirs = next(name for name in SCORER if key.startswith(name))
        named[SCORER[theirs] + key.removeprefix(theirs)] = tensor.float()
    scorer.load_state_dict(named)
    return scorer.eval()


def windows(compare: Comparison) -> None:
    """50 maps: first row and column of the best window, its average, and what it covers."""
    maps = compare.case.tensors["maps"]
    method, module = connector(24, 16, 16)
    plan, sums = method.plan(336, 336), integral(maps)
    for s, side in enumerate(module.sides):
        values = pooled(sums, side)
        chosen, _ = module.select(values, None)
        for about, number, value in zip(compare.case.json["table"], chosen.tolist(), values, strict=True):
            expected = about["windows"][str(module.options.scales[s])]
            row, column = divmod(number, 24 - side + 1)
            found = module._look(Window(0, s, 0, row, column), plan)
            name = f"map {about['map']} at {side} tokens"
            assert (row, column) == (expected["row"], expected["col"]), name
            assert [int(n) for n in found.box] == expected["lr_box_xyxy"], name
            if "lr_token_positions" in expected:
                assert module._cells(row, column, side).tolist() == expected["lr_token_positions"], name
            assert abs(float(value.max()) - expected["mean"]) < CLOSE, name
        expected = [
            about["windows"][str(module.options.scales[s])]["row"] for about in compare.case.json["table"]
        ]
        compare.equal(f"{side} tokens", [n // (24 - side + 1) for n in chosen.tolist()], expected)


def layers(compare: Comparison) -> None:
    names = {"all6": "six", "base3": "three", "middle": "one"}
    for depth, expected in compare.case.json["table"].items():
        for theirs, ours in names.items():
            compare.equal(f"{depth} layers, {ours}", decoder_layers(ours, int(depth)), expected[theirs])


def positions(compare: Comparison) -> None:
    """A window's tokens in the LLM's sequence, in which the visual tokens begin at image_start."""
    for variant in ("v1", "v2"):
        method, module = connector(24, 16, 16, variant=variant)
        for about in compare.case.json["table"]:
            side, start = about["window"][0], about["image_start"]
            visual = torch.zeros(1, start + method.plan(336, 336).tokens, dtype=torch.bool)
            visual[:, start:] = True
            s = module.options.scales.index(about["lam"])
            chosen = Chosen(
                [Window(0, s, 0, about["row"], about["col"])], torch.zeros(1, 576, 16), torch.ones(1)
            )
            tokens = module._round(chosen, [0], [0], [0]).tokens
            places = visual.flatten().nonzero()[:, 0][tokens]
            name = f"{variant}, map {about['map']}, {side} tokens"
            compare.equal(name, places.tolist(), about["sequence_positions"])
            assert places.max() < about["v2_layout"]["base"][1]


def crops(compare: Comparison) -> None:
    case = compare.case
    side, picture = case.json["config"]["side"], case.tensors["lr_uint8"].permute(1, 2, 0)
    method = Coroi(TowerGeometry(side, side // case.json["config"]["grid"]))
    module = method.build_connector(Widths(16, 16, 8))
    source = Source([picture], torch.zeros(1, 2, 3), lambda views: views)
    for about in case.json["table"]:
        s = module.options.scales.index(about["lam"])
        values = pooled(integral(case.tensors[f"score_lam{about['lam']}"][None]), module.sides[s])
        row, column = divmod(
            int(module.select(values, None)[0]), module.tower.grid.width - module.sides[s] + 1
        )
        compare.equal(f"window at {about['lam']}", (row, column), (about["row"], about["col"]))
        look = module._look(Window(0, s, 0, row, column), method.plan(side, side))
        for upsampled in (False, True):  # the same, as the picture has the low-resolution size
            seen = source.pixels(0, look._replace(upsampled=upsampled), method.tower.side)
            name = f"crop at {about['lam']}{', upsampled' if upsampled else ''}"
            compare.close(name, seen, case.tensors[f"out.crop_lam{about['lam']}"], PIXELS)


def inject(compare: Comparison) -> None:
    case = compare.case
    config, rois = case.json["config"], case.json["rois"]
    cells = config["grid"] ** 2
    features = torch.stack([case.tensors[f"roi.{r['sample']}.{r['roi']}.features"] for r in rois])
    hidden = case.tensors["hidden"]
    visual = torch.zeros(hidden.shape[:2], dtype=torch.bool)
    for sample, start in enumerate(config["image_starts"]):
        visual[sample, start : start + cells] = True
    variants = {
        "linear_norm": {},
        "norm_linear": {"projections": "norm_linear"},
        "linear_norm_heads": {"heads": config["heads_variant"]},
        "linear_norm_sequential": {"overlap": "sequence"},
        "single_roi": {},
    }
    for name, options in variants.items():
        _, module = connector(config["grid"], config["roi_dim"], config["D"], scales=[2, 4], **options)
        every = [
            Window(r["sample"], module.options.scales.index(r["lam"]), r["roi"], r["row"], r["col"])
            for r in rois
        ]
        chosen = Chosen(every, features, torch.ones(len(rois)))
        order = [[i for i, r in enumerate(rois) if r["roi"] == n] for n in range(3)]
        if name == "single_roi":
            order = order[:1]
        elif name != "linear_norm_sequential":
            order = [list(range(len(rois)))]
        rounds = [module._round(chosen, list(range(len(rois))), part, [0, cells]) for part in order]
        attention = CrossAttention(config["roi_dim"], config["D"], module.options)
        state = case.part("state.norm_linear" if name == "norm_linear" else "state.linear_norm")
        ours = {"q": "query", "k": "key", "v": "value"}
        attention.load_state_dict({f"{ours[key[0]]}{key[1:]}": tensor for key, tensor in state.items()})
        got = RoiInjector(attention, 0)(hidden, Regions(features, [rounds]), visual)
        compare.close(name, got, case.tensors[f"out.{name}"], CLOSE)


def scorer(compare: Comparison) -> None:
    case = compare.case
    config = case.json["config"]
    # weighted has the last bias
    options = CoroiOptions(scorer_heads=config["heads"], gradient="weighted")
    module = Scorer(config["d"], config["grid"] ** 2, options)
    load_scorer(module, case.part("state"))
    view = module.read(case.tensors["V_low"][None])
    words, region = case.tensors["U"][None], case.tensors["roi"][None]
    for name, guides in (("step0", words), ("step1", torch.cat([words, region], 1))):
        scores = module(view, guides, torch.ones(guides.shape[:2], dtype=torch.bool))
        compare.close(name, scores.view(config["grid"], -1), case.tensors[f"out.{name}"], CLOSE)


def straight_through(compare: Comparison) -> None:
    case = compare.case
    config, tensors = case.json["config"], case.tensors
    score = tensors["score"].clone().requires_grad_()
    with torch.enable_grad():
        values = pooled(integral(score[None]), score.shape[0] // config["lam"]).flatten(1)
        factor = gate(values, torch.tensor([config["selected"]]), CoroiOptions(temperature=config["tau"]))
        (tensors["update"] * factor.float() * tensors["upstream"]).sum().backward()
    assert float(factor.detach()) == 1.0
    compare.close("pooled", values[0].detach().view_as(tensors["out.pooled"]), tensors["out.pooled"], CLOSE)
    probability = (values[0].detach() / config["tau"]).softmax(0).view_as(tensors["out.prob"])
    compare.close("probabilities", probability, tensors["out.prob"], CLOSE)
    assert score.grad is not None
    compare.close("gradient of the scores", score.grad, tensors["out.grad_score"], CLOSE)


def chain(compare: Comparison) -> None:
    """The whole chain on a picture given by a formula, read by a small encoder."""
    case = compare.case
    config = case.json["config"]
    weight, bias = (case.tensors[f"state.encoder.embed.{name}"] for name in ("weight", "bias"))

    def encode(views: Tensor) -> Tensor:
        """Means of the quadrants of every patch, through a linear layer: (V, 3, h, w) -> (V, N, C)."""
        quadrants = torch.nn.functional.avg_pool2d(views, config["patch"] // 2)  # (V, 3, 2 h, 2 w)
        patches = quadrants.unflatten(2, (-1, 2)).unflatten(4, (-1, 2))  # (V, 3, h, 2, w, 2)
        return torch.tanh(patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2) @ weight.T + bias)

    y, x = torch.meshgrid(torch.arange(config["side"]), torch.arange(config["side"]), indexing="ij")
    terms = torch.stack([x * x, y * y, x * y, x, y, torch.ones_like(x)], -1)
    picture = (terms @ torch.tensor(case.json["image"]["coef"]).T % 256).to(torch.uint8)  # (H, W, 3)
    norms = torch.tensor([[0.5] * 3, [1.0] * 3])[None]
    words = case.tensors["U"][None]
    for history in ("last", "all"):
        method, module = connector(
            config["grid"], config["d"], config["d"], history=history, rois=config["n"], gradient="weighted"
        )
        load_scorer(module.scorers[0], case.part("state.scorer"))  # type: ignore[arg-type]
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
        got = module.chain(low, [method.plan(*picture.shape[:2])], Query(words, torch.ones(1, 5)), source)
        averages = torch.stack(best).view(config["n"], -1)
        for about in (about for about in case.json["chains"] if about["history"] == history):
            s = module.options.scales.index(about["lam"])
            mine = [i for i, window in enumerate(got.windows) if window.scale == s]
            name = f"{history} at {about['lam']}"
            found = [(got.windows[i].row, got.windows[i].column) for i in mine]
            compare.equal(name, found, [(step["row"], step["col"]) for step in about["chain"]])
            expected = torch.tensor([step["mean"] for step in about["chain"]])
            compare.close(f"{name}, averages", averages[:, s], expected, CLOSE)
            mean = got.features[mine[-1]].mean()
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
