"""Learning curves: how accuracy on held-out pictures rises as a cell trains, and whether it still does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from foveate.errors import FoveateError

POINTS = 8  # of a curve, if an experiment does not say


class Point(NamedTuple):
    """Accuracy after some steps. Pairs are of fine and coarse questions.

    Attributes:
        step: of the cell.
        stage: its number, from 0.
        since: steps of the stage.
        seconds: of processor time in training so far.
        accuracy: 0 to 1.
        questions: how many were asked; the same at every point.
        changed: part of them whose answer was right at the point before and is wrong now, or the reverse.
        turned: whether the learning rate was already falling.
    """

    step: int
    stage: int
    since: int
    seconds: float
    accuracy: tuple[float, float]
    questions: tuple[int, int]
    changed: tuple[float, float]
    turned: bool = False


def point_of(values: Mapping[str, Any]) -> Point:
    """A point of a curve in a result's JSON."""
    given: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    return Point(**given)


@dataclass(frozen=True)
class Converge:
    """Training until accuracy stops rising, at most for the experiment's steps.

    The learning rate rises, stays, and falls to zero in a straight line over the last part. It begins to fall
    at the first point of the curve at which the cell `stays_converged`, or so that it ends at the bound.

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


def noise(changed: float, questions: int) -> float:
    """One standard error of the difference of two accuracies on the same questions.

    `changed`: part of them whose answer is right in one of the two measurements only.
    """
    return math.sqrt(changed / questions) if questions else 0.0


class Gain(NamedTuple):
    """What the last quarter of a cell's steps has gained in accuracy, and its `noise`."""

    gained: float
    noise: float


def last_gains(curve: Sequence[Point]) -> tuple[Gain, Gain] | None:
    """Of fine and of coarse questions; None for a curve without a point in one of the last two quarters.

    Only the last stage counts, up to where the learning rate begins to fall, with which accuracy rises. Gain:
    the mean accuracy over the points in the last quarter of these steps, less that over the points of the
    quarter before.
    """
    points = [point for point in curve if point.stage == curve[-1].stage and not point.turned]
    last = max((point.since for point in points), default=0)
    late = [point for point in points if 0.75 * last < point.since]
    before = [point for point in points if 0.5 * last < point.since <= 0.75 * last]
    if not late or not before:
        return None

    def gain(kind: int) -> Gain:
        now, then = (sum(p.accuracy[kind] for p in some) / len(some) for some in (late, before))
        return Gain(now - then, noise(max(p.changed[kind] for p in late), late[-1].questions[kind]))

    return gain(0), gain(1)


def has_converged(curve: Sequence[Point]) -> bool:
    """Whether a curve shows no gain beyond noise in its last quarter, of fine questions or coarse ones.

    Returns:
        False also for a curve whose gains are unknown.
    """
    gains = last_gains(curve)
    return gains is not None and all(gained <= noise for gained, noise in gains)


def has_begun(curve: Sequence[Point]) -> bool:
    """Whether fine accuracy, as a mean over the last quarter, has left that of the curve's first point.

    By more than twice its noise. CoRoI reads nothing for 2,500 steps of level `dense`, and then takes off: a
    curve that has not begun is as flat as one that has converged.
    """
    first, last = curve[0], curve[-1]
    late = [point for point in curve if 0.75 * last.step < point.step]
    gained = sum(point.accuracy[0] for point in late) / len(late) - first.accuracy[0]
    return gained > 2 * noise(max(point.changed[0] for point in late), last.questions[0])


def stays_converged(curve: Sequence[Point]) -> bool:
    """Whether a cell may stop: its curve `has_begun`, and `has_converged` at its last two points.

    At two, because one may dip while the learning rate stays.
    """
    return has_converged(curve) and has_converged(curve[:-1]) and has_begun(curve)
