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


class Trapezoid:
    """A learning rate's factor: a linear rise, then 1, then a straight fall to zero, once `turned`."""

    def __init__(self, steps: int) -> None:
        self.warm = max(1, round(WARM_STEPS * steps))
        self.top, self.end = steps, steps  # last step at 1, and of all

    def turned(self, top: int, end: int) -> None:
        """From here on it falls, to zero at `end`."""
        self.top, self.end = top, end

    def __call__(self, step: int) -> float:
        if step < self.warm:
            return (step + 1) / self.warm
        return 1.0 if step < self.top else max(0.0, (self.end - step) / max(1, self.end - self.top))
