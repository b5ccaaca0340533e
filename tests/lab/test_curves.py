"""Learning curves, and training until they stop to rise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from foveate.errors import FoveateError
from foveate.lab import training
from foveate.lab.cell import Bench, Cell
from foveate.lab.curve import Converge, Point, has_begun, has_converged, noise, stays_converged
from foveate.lab.experiment import Experiment, Variant
from foveate.lab.optimise import Trapezoid
from foveate.lab.training import train_cell


def curve(fine: Sequence[float], coarse: float = 0.8, changed: float = 0.1) -> list[Point]:
    """Points every 100 steps of one stage."""
    return [
        Point(100 * i, 0, 100 * i, 1.0 * i, (value, coarse), (1000, 1000), (changed, changed))
        for i, value in enumerate(fine, 1)
    ]


RISES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65]
STAYS = [0.1, 0.3, 0.5, 0.6, 0.6, 0.6, 0.605, 0.6]


def test_a_curve_has_converged_if_its_last_quarter_gains_no_more_than_noise() -> None:
    assert noise(0.1, 1000) == pytest.approx(0.01)
    assert has_converged(curve(STAYS)) and not has_converged(curve(RISES))
    little = [*STAYS[:6], 0.609, 0.609]
    assert has_converged(curve(little)) and not has_converged(curve(little, changed=0.05))
    assert not has_converged(curve([*STAYS[:6], 0.612, 0.612]))
    falls = [*STAYS[:6], 0.3, 0.3]
    assert has_converged(curve(falls))


def test_a_dip_is_not_the_end() -> None:
    dips = [*RISES[:7], 0.3]
    assert has_converged(curve(dips)) and not stays_converged(curve(dips))
    assert stays_converged(curve([*STAYS, 0.6]))


def test_a_cell_whose_fine_accuracy_has_not_left_its_beginning_does_not_stop() -> None:
    """A row that takes off late looks, before it does, like one that has learnt all it will."""
    flat = [0.132, 0.130, 0.129, 0.127, 0.125, 0.120, 0.121, 0.119, 0.118]
    assert has_converged(curve(flat)) and not has_begun(curve(flat)) and not stays_converged(curve(flat))
    one, three = (curve([0.5, *[0.5 + noises * noise(0.1, 1000)] * 9]) for noises in (1, 3))
    assert all(has_converged(some) and has_converged(some[:-1]) for some in (one, three))
    assert stays_converged(three) and not stays_converged(one)
    later = [p._replace(stage=1, step=1000 + p.step) for p in three[1:]]
    assert stays_converged([three[0], *later])


def test_coarse_questions_count_too() -> None:
    both = [point._replace(accuracy=(0.6, 0.1 * i)) for i, point in enumerate(curve(STAYS))]
    assert not has_converged(both)


def test_only_the_last_stage_counts_before_its_rate_falls() -> None:
    earlier = [point._replace(stage=0) for point in curve([0.0] * 8)]
    later = [point._replace(stage=1, step=800 + point.step) for point in curve(STAYS)]
    assert has_converged([*earlier, *later]) and has_converged(later)
    falling = [p._replace(stage=1, turned=True, since=900) for p in curve([0.9])]
    assert has_converged([*later, *falling])
    rising = [point._replace(stage=1) for point in curve(RISES)]
    assert not has_converged([*earlier, *rising, *falling])


def test_a_curve_that_is_too_short_says_nothing() -> None:
    assert not has_converged([]) and not has_converged(curve([0.5]))


def test_the_rate_rises_stays_and_falls() -> None:
    shape = Trapezoid(100)
    assert [shape(step) for step in (0, 4, 5, 60, 99)] == [0.2, 1.0, 1.0, 1.0, 1.0]
    shape.turned(60, 80)
    assert [shape(step) for step in (59, 60, 70, 80, 81)] == [1.0, 1.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    ("steps", "least", "decay", "said"),
    [
        (8, 9, 0.2, "least must be at most 8"),
        (8, 0, 0.2, "at least 1, not 0"),
        (8, 4, 1.0, "between 0 and 1"),
    ],
)
def test_wrong_bounds_are_one_sentence(steps: int, least: int, decay: float, said: str) -> None:
    with pytest.raises(FoveateError, match=said):
        Experiment((Variant("llava"),), scale="nano", steps=steps, converge=Converge(least, decay))


def cell(steps: int, least: int) -> Cell:
    return Cell("llava", 0, "words", "nano", steps, converge=Converge(least, 0.5), points=steps)


def test_a_cell_that_learns_nothing_more_stops_and_one_that_does_goes_on_to_its_bound(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    for stops in (True, False):
        monkeypatch.setattr(training, "stays_converged", lambda curve, stops=stops: stops)
        monkeypatch.setattr(training, "has_converged", lambda curve, stops=stops: stops)
        result = train_cell(cell(16, 6), replace(bench, folder=tmp_path / str(stops)))
        assert result["converged"] == stops
        assert [point["step"] for point in result["curve"]] == list(range(1, result["steps"] + 1))
        turned = [point["step"] for point in result["curve"] if point["turned"]]
        steps.append((result["steps"], turned[0]))
    assert steps == [(12, 7), (16, 9)]


def test_an_interrupted_cell_turns_where_an_uninterrupted_one_does(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY", 1)
    monkeypatch.setattr(training, "stays_converged", lambda curve: True)
    wanted = cell(16, 6)
    whole = train_cell(wanted, replace(bench, folder=tmp_path / "whole"))
    other = replace(bench, folder=tmp_path / "cut")

    def stop(step: int, *_: object) -> None:
        if step == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_cell(wanted, other, stop)
    again = train_cell(wanted, other)
    assert again["steps"] == whole["steps"] == 12
    same = [{k: v for k, v in point.items() if k != "seconds"} for point in again["curve"]]
    assert same == [{k: v for k, v in point.items() if k != "seconds"} for point in whole["curve"]]
    weights = [
        torch.load(replace(bench, folder=tmp_path / name).cells("nano") / wanted.key / "weights.pt")
        for name in ("whole", "cut")
    ]
    key = "connector.projector.0.weight"
    assert torch.allclose(weights[0][key], weights[1][key], atol=1e-6)


def test_measuring_changes_nothing_in_training(bench: Bench, tmp_path: Path) -> None:
    often, seldom = (
        train_cell(
            Cell("slime", 0, "words", "nano", 4, points=points),
            replace(bench, folder=tmp_path / str(points)),
        )
        for points in (4, 1)
    )
    assert len(often["curve"]) == 4 and len(seldom["curve"]) == 1
    assert often["losses"] == seldom["losses"] and often["accuracy"] == seldom["accuracy"]
