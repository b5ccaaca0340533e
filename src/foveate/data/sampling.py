"""The order in which an epoch sees its samples: the same for the same seed and epoch on every device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from torch.utils.data import Sampler


def repeated(count: int, repeat: float, rng: np.random.Generator) -> np.ndarray:
    """Indices below `count`, each `repeat` times; a fraction is a random part of them."""
    whole, part = divmod(repeat, 1)
    extra = rng.permutation(count)[: round(part * count)]
    return np.concatenate([np.tile(np.arange(count), int(whole)), np.sort(extra)]).astype(np.int64)


class EpochSampler(Sampler[int]):
    """A new random order for every epoch.

    With `group_by` "modality", as in LLaVA, the samples of one optimizer step either all have pictures or
    none do, and are sorted by decreasing length, to reduce padding; only an epoch's last step may be mixed.

    Args:
        lengths: (S,) tokens of each sample.
        pictures: (S,) number of pictures of each sample.
        batch: samples per optimizer step, on all devices.
        group_by: "modality" or "none".
        seed: for the orders.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        pictures: np.ndarray,
        batch: int,
        group_by: Literal["modality", "none"],
        seed: int,
    ) -> None:
        self.lengths, self.pictures, self.batch = lengths, pictures, batch
        self.group_by, self.seed, self.epoch = group_by, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self)) if self.group_by == "none" else self._grouped(rng)
        return iter(order.tolist())

    def _grouped(self, rng: np.random.Generator) -> np.ndarray:
        full: list[np.ndarray] = []
        rest: list[np.ndarray] = []
        for kind in (self.pictures > 0, self.pictures == 0):
            shuffled = rng.permutation(np.flatnonzero(kind))
            cut = len(shuffled) - len(shuffled) % self.batch
            full += [self._by_length(step) for step in shuffled[:cut].reshape(-1, self.batch)]
            rest.append(shuffled[cut:])
        shuffled_steps = [full[i] for i in rng.permutation(len(full))]
        return np.concatenate([*shuffled_steps, self._by_length(np.concatenate(rest))])

    def _by_length(self, indices: np.ndarray) -> np.ndarray:
        return indices[np.argsort(-self.lengths[indices], kind="stable")]
