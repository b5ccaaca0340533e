"""The iterates of examples/bilinear.py follow the paper's theorems, and where descent goes wrong."""

from __future__ import annotations

import runpy
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
E: dict[str, Any] = runpy.run_path(str(ROOT / "examples/bilinear.py"))
Problem, at_once, in_turns = E["Problem"], E["at_once"], E["in_turns"]


@pytest.mark.parametrize("c", [-0.4, 0.05, 0.3, 0.8])
def test_descent_follows_theorem_3(c: float) -> None:
    problem = Problem(c)
    pairs = list(at_once(problem, *problem.start(0.3, -0.6), 0.1, 40))
    for (u, v), (after, _) in pairwise(pairs):
        z = problem.coordinates(u)
        assert np.allclose(problem.basis @ z, u)
        assert np.allclose(problem.basis @ z[::-1], v)
        assert np.isclose(u @ u, v @ v)
        assert np.allclose(E["theorem_3"](problem, z, u, 0.1), problem.coordinates(after))


@pytest.mark.parametrize("c", [-0.4, 0.05, 0.3, 0.8])
def test_descent_follows_lemma_1(c: float) -> None:
    problem, eta = Problem(c), 0.1
    pairs = list(at_once(problem, *problem.start(0.3, -0.6), eta, 40))
    for (u, _), (after, _) in pairwise(pairs):
        tau, nu = problem.parts(u)
        assert np.isclose(u @ u, (1 + c) * tau**2 + (1 - c) * nu**2)
        expected = (1 + eta * (1 + c - u @ u)) * tau, (1 + eta * (1 - c - u @ u)) * nu
        assert np.allclose(problem.parts(after), expected)


@pytest.mark.parametrize("c", [-0.4, 0.05, 0.3, 0.8])
def test_turns_follow_theorem_5(c: float) -> None:
    problem = Problem(c)
    pairs = list(in_turns(problem, problem.start(0.01, 0.6)[0], 200))
    for (u, v), (after, _) in pairwise(pairs):
        z = problem.coordinates(u)
        assert np.allclose(E["theorem_5"](problem, z, u, v), problem.coordinates(after))
    assert np.isclose(problem.loss(*pairs[-1]), problem.least_loss)
    largest = np.linalg.eigh(problem.m)[1][:, -1]
    z = problem.coordinates(pairs[-1][0])
    assert np.isclose(abs(largest @ z), np.linalg.norm(z))


def test_the_least_loss_is_that_of_the_best_rank_1() -> None:
    for c in (-0.5, 0.2, 0.7):
        s = np.linalg.svd(Problem(c).target)[1]
        assert np.isclose(Problem(c).least_loss, 0.5 * (s[1:] ** 2).sum())


def test_descent_ends_in_the_wrong_eigenvector_where_turns_do_not() -> None:
    c, eta, parts = E["CASES"]["a step onto the saddle"]
    problem = Problem(c)
    u, v = problem.start(*parts)
    descent, turns = list(at_once(problem, u, v, eta, 60)), list(in_turns(problem, u, 60))
    assert np.allclose(np.abs(problem.parts(descent[-1][0])), (0, 1), atol=1e-6)
    assert np.isclose(
        problem.loss(*descent[-1]), 0.5 * (1 + c) ** 2
    )  # the larger eigenvalue is what it misses
    tau, nu = problem.parts(turns[-1][0])
    assert abs(nu / tau) < 1e-12
    assert np.isclose(problem.loss(*turns[-1]), problem.least_loss)


def test_near_the_saddle_descent_lingers() -> None:
    c, eta, parts = E["CASES"]["a start near the saddle"]
    problem = Problem(c)
    u, v = problem.start(*parts)
    over = {
        "at once": problem.loss(*list(at_once(problem, u, v, eta, 60))[-1]) - problem.least_loss,
        "in turns": problem.loss(*list(in_turns(problem, u, 60))[-1]) - problem.least_loss,
    }
    assert over["at once"] > 0.09
    assert over["in turns"] < 1e-3
    much_later = list(at_once(problem, u, v, eta, 4000))[-1]
    assert np.isclose(problem.loss(*much_later), problem.least_loss)  # a saddle, no minimum


def test_from_the_saddle_s_own_line_turns_escape_by_rounding_alone() -> None:
    problem = Problem(0.3)
    u, v = problem.start(0.0, 0.5)
    for pairs in (list(at_once(problem, u, v, 0.1, 10)), list(in_turns(problem, u, 10))):
        tau, nu = problem.parts(pairs[-1][0])
        assert abs(tau / nu) < 1e-9


def test_the_script_draws(tmp_path: Path) -> None:
    E["main"](str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").stat().st_size > 10_000
