"""Parts that two or more methods use."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

Activation: TypeAlias = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]


class QuickGELU(nn.Module):
    """The approximation of GELU with which CLIP was trained."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def activation_layer(name: Activation) -> nn.Module:
    """The layer of an activation."""
    if name == "gelu_tanh":
        return nn.GELU(approximate="tanh")
    return {"gelu": nn.GELU, "quick_gelu": QuickGELU, "relu": nn.ReLU, "silu": nn.SiLU}[name]()


def mlp_projector(vision: int, text: int, depth: int = 2, activation: Activation = "gelu") -> nn.Sequential:
    """LLaVA's projector: `depth` linear layers with exact GELU between, vision width C -> LLM width D.

    LLaVA-1.5 section 3.2; depth 2 is its `mlp2x_gelu`, depth 1 the linear projection of the first LLaVA.
    """
    layers: list[nn.Module] = []
    for i, (wide_in, wide_out) in enumerate(pairwise([vision] + [text] * depth)):
        layers += [activation_layer(activation)] if i else []
        layers += [nn.Linear(wide_in, wide_out)]
    return nn.Sequential(*layers)


def exact(x: Tensor) -> torch.autocast:
    """A context without autocast, for full precision on the device of `x`."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)
