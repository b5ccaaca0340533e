"""Windows for a method that is given the region: they show the region that a question is about.

Its accuracy is an upper bound on what better choices can gain.
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

    `choose`: scores of the windows of one size (P, rows, columns), -inf for those not allowed -> index of the
    chosen one, (P,).
    """

    choose: Callable[[Tensor], Tensor]


@contextmanager
def told_windows(
    connector: object, tower: TowerGeometry, plans: Sequence[ViewPlan], regions: Sequence[Box | None]
) -> Iterator[None]:
    """Within it, the connector's windows show these regions, in pixels of the pictures; None: its own choice.

    Raises `FoveateError` if it does not choose among windows, and `ValueError` if there are not as many
    regions as plans.
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
        # In single precision, whatever the model's: 1e-3 decides between equal windows.
        wanted = torch.from_numpy(aims).to(values.device, torch.float32)
        return choose(values.where(wanted.isnan() | values.isneginf(), wanted))

    connector.choose = told
    try:
        yield
    finally:
        connector.choose = choose


def _shown(windows: int, side: int, first: float, last: float) -> np.ndarray:
    """The score of each window along an axis for a region from first to last, in tokens, (windows,).

    A score is the part of the region that the window shows, less a little for the distance of its centre.
    Summed over height and width, the best window shows the most of the region and is the nearest of those
    that do.
    """
    starts = np.arange(windows)
    both = np.minimum(starts + side, last) - np.maximum(starts, first)
    return both.clip(min=0) - 1e-3 * np.abs(starts + side / 2 - (first + last) / 2)
