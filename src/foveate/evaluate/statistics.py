"""How sure a mean is: bootstrap intervals, of one run and of the difference of two on the same samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DRAWS = 10_000
LEVEL = 0.95
CHUNK = 2**22  # numbers drawn at once


def interval(scores: Sequence[float], groups: Sequence[str | None] | None = None) -> tuple[float, float]:
    """The bootstrap interval (percentiles, 95 %) of a mean.

    Args:
        scores: of samples, independent but for their groups.
        groups: samples of one group, such as questions about one picture, are drawn together.
    """
    sums, counts = _by_group(scores, groups)
    random = np.random.default_rng(0)
    means: list[np.ndarray] = []
    step = max(1, CHUNK // len(sums))
    for begin in range(0, DRAWS, step):
        drawn = random.integers(len(sums), size=(min(step, DRAWS - begin), len(sums)))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _by_group(scores: Sequence[float], groups: Sequence[str | None] | None) -> tuple[np.ndarray, np.ndarray]:
    values = np.asarray(scores, dtype=np.float64)
    if groups is None or all(group is None for group in groups):
        return values, np.ones(len(values))
    names = {group: n for n, group in enumerate(dict.fromkeys(groups))}
    places = np.array([names[group] for group in groups])
    return np.bincount(places, weights=values), np.bincount(places).astype(np.float64)
