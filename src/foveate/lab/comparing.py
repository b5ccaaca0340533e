"""Two rows of an experiment on the same pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from foveate.errors import FoveateError
from foveate.evaluate.statistics import interval
from foveate.lab.levels import FINE, KINDS

MARKS = dict(zip(KINDS, "ldwracpn", strict=True))  # kinds of questions as letters


class Difference(NamedTuple):
    """How much more of its questions one row answers than another.

    Attributes:
        mean: over the seeds that both have, a fraction.
        low, high: its interval of 95 %, by bootstrap over the pictures, whose questions stay together. How
            another seed would turn out is not in it: that is what `seeds` show.
        seeds: the difference of each seed.
    """

    mean: float
    low: float
    high: float
    seeds: tuple[float, ...]


def marks(kinds: Sequence[str], hits: Iterable[bool], counts: Sequence[int]) -> str:
    """A letter for each question, a capital if it was answered right; a space ends a picture.

    Args:
        kinds, hits: of every question, picture by picture.
        counts: questions of each picture.
    """
    letters = [MARKS[kind].upper() if hit else MARKS[kind] for kind, hit in zip(kinds, hits, strict=True)]
    ends = np.cumsum(counts).tolist()
    return " ".join("".join(letters[begin:end]) for begin, end in zip([0, *ends], ends, strict=False))


def difference(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], kinds: Sequence[str] = FINE
) -> Difference:
    """What cells of the first row answer more than those of the second.

    Args:
        first, second: results of `train_cell`, of one level and scale.
        kinds: of the questions that count.

    Raises:
        FoveateError: no common seed, or no question of these kinds.
    """
    ours, theirs = (
        {cell["cell"]["seed"]: cell["marks"].split(" ") for cell in row} for row in (first, second)
    )
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        raise FoveateError("the two rows have no seed in common")
    letters = "".join(MARKS[kind] for kind in kinds)
    asked = np.array([_count(picture.lower(), letters) for picture in ours[seeds[0]]])
    if not asked.any():
        raise FoveateError(f"no question is of a kind of {', '.join(kinds)}")
    more = np.array(  # (seeds, pictures)
        [
            [
                _count(one, letters.upper()) - _count(other, letters.upper())
                for one, other in zip(ours[seed], theirs[seed], strict=True)
            ]
            for seed in seeds
        ]
    )
    each = more.sum(1) / asked.sum()
    scores = np.repeat(more.mean(0) / np.maximum(asked, 1), asked)
    pictures = np.repeat(np.arange(len(asked)), asked)
    low, high = interval(scores.tolist(), [str(picture) for picture in pictures])
    return Difference(float(each.mean()), low, high, tuple(each.tolist()))


def _count(marked: str, letters: str) -> int:
    return sum(map(marked.count, letters))
