"""The optimiser and its schedule, the same for everything that the lab trains."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

WARM_STEPS = 0.05  # fraction of all steps
WEIGHT_DECAY = 0.02


def optimiser(groups: Iterable[tuple[nn.Module, float]]) -> torch.optim.AdamW:
    """AdamW over modules, each with its learning rate; biases, norms and single vectors are not decayed."""
    parts = []
    for module, lr in groups:
        parameters = list(module.parameters())
        parts.append(
            {"params": [p for p in parameters if p.ndim > 1], "lr": lr, "weight_decay": WEIGHT_DECAY}
        )
        parts.append({"params": [p for p in parameters if p.ndim <= 1], "lr": lr, "weight_decay": 0.0})
    return torch.optim.AdamW([part for part in parts if part["params"]], betas=(0.9, 0.98), fused=True)


def warm_cosine(optimise: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """A linear rise, then half a cosine down to zero."""
    warm = max(1, round(WARM_STEPS * steps))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return torch.optim.lr_scheduler.LambdaLR(optimise, factor)
