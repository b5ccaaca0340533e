"""Learning curves: how accuracy on held-out pictures rises as a cell trains, and whether it still does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from foveate.errors import FoveateError

POINTS = 8  # of a curve, if an experiment does not say


class Point(NamedTuple):
    """Accuracy after some steps.

    Attributes:
        step: of the cell.
        seconds: of processor time in training so far.
        fine, coarse: accuracy, 0 to 1.
        questions: how many fine and how many coarse questions were asked.
        turned: whether the learning rate was already falling.
    """

    step: int
    seconds: float
    fine: float
    coarse: float
    questions: tuple[int, int]
    turned: bool = False


@dataclass(frozen=True)
class Converge:
    """Training until accuracy stops rising, at most for the experiment's steps.

    The learning rate rises, stays, and falls to zero in a straight line over the last part. It begins to fall
    at the first point of the curve at which the cell `has_converged`, or so that it ends at the bound.

    Attributes:
        least: steps before which nothing has converged: some methods learn nothing at first.
        decay: part of all steps in which the rate falls.
    """

    least: int
    decay: float = 0.2

    def __post_init__(self) -> None:
        if self.least < 1:
            raise FoveateError(f"least must be at least 1, not {self.least}")
        if not 0 < self.decay < 1:
            raise FoveateError(f"decay must be between 0 and 1, not {self.decay}")


def noise(accuracy: float, questions: int) -> float:
    """One standard error of the difference of two measurements of an accuracy with so many questions each."""
    return math.sqrt(2 * accuracy * (1 - accuracy) / questions) if questions else 0.0


def has_converged(curve: Sequence[Point], step: int | None = None) -> bool:
    """Whether a curve shows no gain beyond noise in its last quarter.

    Gain: the mean accuracy over the points in the last quarter of the steps, less that over the points of the
    quarter before. Neither the gain of fine nor that of coarse questions may be above their `noise`. Points
    with a falling learning rate say nothing of this, as they rise with the fall; the steps are those before.

    Args:
        curve: in order of steps.
        step: the last one that counts; by default the last point's.

    Returns:
        False also for a curve without a point in one of the two quarters.
    """
    points = [point for point in curve if not point.turned]
    last = step or max((point.step for point in points), default=0)
    late = [point for point in points if 0.75 * last < point.step <= last]
    before = [point for point in points if 0.5 * last < point.step <= 0.75 * last]
    if not late or not before:
        return False
    for number, kind in enumerate(("fine", "coarse")):
        now, then = ([getattr(point, kind) for point in some] for some in (late, before))
        gain = sum(now) / len(now) - sum(then) / len(then)
        if gain > noise(sum(now) / len(now), late[-1].questions[number]):
            return False
    return True
