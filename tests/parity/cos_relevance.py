"""Checkers of Chain-of-Spot's region labels: relevance propagation (eqs 4-6), and regions made of scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from foveate.explaining.relevance import READINGS, interpret, propagate, scaled
from foveate.picture.boxes import BOX_FORMATS, Frame, write_box
from foveate.picture.geometry import Box, Size
from foveate.zoom.relevance import RegionRule, roi
from tests.parity.golden import NUMBER, Comparison


def relevance(compare: Comparison) -> None:
    """Attention of the golden network, its gradients, Psi and Sigma after every layer, in all readings."""
    case, config = compare.case, compare.case.json["config"]
    with torch.enable_grad():
        logits, maps = _network(case.part("state"), case.tensors["x"], config)
        target = logits[config["logit_position"], config["target_class"]]
        gradients = torch.autograd.grad(target, maps)
    results = {"logits": logits, "attn": torch.stack(maps), "grad": torch.stack(gradients)}
    for reading in READINGS:
        sigma, psis, sigmas = torch.eye(len(logits)), [], []
        for attention, gradient in zip(maps, gradients, strict=True):
            psis.append(interpret(attention, gradient, reading))
            sigma = propagate(sigma, psis[-1])
            sigmas.append(sigma)
        results |= {f"{reading}.psi": torch.stack(psis), f"{reading}.sigma": torch.stack(sigmas)}
    compare.those(case.part("out"), results)


def _network(
    state: Mapping[str, Tensor], x: Tensor, config: Mapping[str, Any]
) -> tuple[Tensor, list[Tensor]]:
    """The network that the golden file describes: logits (T, classes) and its attention maps (H, T, T)."""
    heads, maps = config["heads"], []
    state = {key: tensor.clone().requires_grad_() for key, tensor in state.items()}

    def project(h: Tensor, name: str) -> Tensor:
        return linear(h, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(h: Tensor, name: str) -> Tensor:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return layer_norm(h, h.shape[-1:], weight, bias, config["ln_eps"])

    for i in range(config["layers"]):
        at = f"layers.{i}"
        h = norm(x, f"{at}.ln1")
        q, k, v = (project(h, f"{at}.{n}").unflatten(1, (heads, -1)).transpose(0, 1) for n in "qkv")
        scores = q @ k.mT / math.sqrt(q.shape[-1])  # (H, T, T)
        if config["mask"] == "causal":
            scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -math.inf)
        maps.append(scores.softmax(-1))
        x = x + project((maps[-1] @ v).transpose(0, 1).flatten(1), f"{at}.o")
        x = x + project(gelu(project(norm(x, f"{at}.ln2"), f"{at}.fc1")), f"{at}.fc2")
    return project(norm(x, "ln_f"), "head"), maps


def regions(compare: Comparison) -> None:
    """Scores of regions -> which are kept -> the region -> its text in the padded square."""
    rule = compare.case.json["rule"]
    grows = NUMBER.search(rule["extension"])  # "each side grows by 0.1*extent/2"
    ours = RegionRule(threshold=rule["epsilon"], extension=float(grows.group()) if grows else 0.0)
    for i, row in enumerate(compare.case.json["table"]):
        picture = Size(row["height"], row["width"])
        boxes = [Box(*box) for box in row["regions_x0y0x1y1"]]
        scores = torch.tensor(row["scores"])
        kept = (scaled(scores) >= ours.threshold).nonzero()[:, 0].tolist()
        box = roi(boxes, scores, picture, ours)
        frame = Frame.padded(picture)
        placed = [int(n - o) for n, o in zip(box, (*frame.area[:2], *frame.area[:2]), strict=True)]
        compare.equal(f"kept {i}", kept, row["keep"])
        compare.equal(f"region {i}", list(box), row["extended_clipped"])
        compare.equal(f"in the padded square {i}", placed, row["in_padded_square"])
        compare.equal(f"text {i}", write_box(box, BOX_FORMATS["unit_xyxy"], frame), row["string"])
