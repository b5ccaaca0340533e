"""Windows for a method that is told where to look: they show the region that a question is about.

What a method is worth that is told is what there is to win by choosing better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from foveate.errors import FoveateError
from foveate.methods.base import TowerGeometry
from foveate.picture.geometry import Box, ViewPlan


@runtime_checkable
class Chooses(Protocol):
    """A connector that chooses windows of tokens on the grid of its first view.

    `choose`: what each window of one size is worth (P, rows, columns), -inf where it may not be chosen -> the
    number of the one that is chosen, (P,).
    """

    choose: Callable[[Tensor], Tensor]


@contextmanager
def told_windows(
    connector: object, tower: TowerGeometry, plans: Sequence[ViewPlan], regions: Sequence[Box | None]
) -> Iterator[None]:
    """Inside, the connector's windows show these regions, pixels of the pictures; None: it is told nothing.

    Raises `FoveateError` where it does not choose among windows, and `ValueError` for another number of
    regions than plans.
    """
    if not isinstance(connector, Chooses):
        raise FoveateError("told: this method does not choose among windows of the picture")
    boxes = [
        None if region is None else [float(n) / tower.patch_size for n in plan.to_view(0, region)]
        for plan, region in zip(plans, regions, strict=True)
    ]
    choose = connector.choose

    def told(values: Tensor) -> Tensor:
        rows, columns = values.shape[1:]
        side = tower.grid.height - rows + 1
        aims = np.full(values.shape, np.nan)
        for p, box in enumerate(boxes):
            if box is not None:
                left, top, right, bottom = box
                aims[p] = _shown(rows, side, top, bottom)[:, None] + _shown(columns, side, left, right)
        # In single precision whatever the model's: of equal windows, 1e-3 decides.
        wanted = torch.from_numpy(aims).to(values.device, torch.float32)
        return choose(values.where(wanted.isnan() | values.isneginf(), wanted))

    connector.choose = told
    try:
        yield
    finally:
        connector.choose = choose


def _shown(windows: int, side: int, first: float, last: float) -> np.ndarray:
    """What a window of an axis is worth for a region from first to last, in tokens, (windows,).

    How much of the region it shows, less a little for the distance of its middle: added up for height and
    width, no window shows more of the region than the best one, which is the nearest of those that show as
    much.
    """
    starts = np.arange(windows)
    both = np.minimum(starts + side, last) - np.maximum(starts, first)
    return both.clip(min=0) - 1e-3 * np.abs(starts + side / 2 - (first + last) / 2)
