"""Parts that two or more methods use."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


def mlp_projector(vision: int, text: int, depth: int = 2) -> nn.Sequential:
    """LLaVA's projector: `depth` linear layers with exact GELU between, vision width C -> LLM width D.

    LLaVA-1.5 section 3.2; depth 2 is its `mlp2x_gelu`, depth 1 the linear projection of the first LLaVA.
    """
    layers: list[nn.Module] = []
    for i, (wide_in, wide_out) in enumerate(pairwise([vision] + [text] * depth)):
        layers += [nn.GELU()] if i else []
        layers += [nn.Linear(wide_in, wide_out)]
    return nn.Sequential(*layers)


def exact(x: Tensor) -> torch.autocast:
    """A context without autocast, for full precision on the device of `x`."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


def dtype_of(module: nn.Module) -> torch.dtype:
    """The number format of a module's first floating parameter: quantised weights are whole numbers."""
    return next(p.dtype for p in module.parameters() if p.is_floating_point())
