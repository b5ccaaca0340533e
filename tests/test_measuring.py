"""The table of largest errors: it shows, of each case, what is nearest to its tolerance or beyond."""

from __future__ import annotations

import math

import pytest

from tests.measuring import Measured, Measures, summarise


@pytest.mark.parametrize(
    ("error", "tolerance", "used"),
    [
        (0.0, 0.0, 0.0),
        (0.0, 1e-5, 0.0),
        (2.5e-6, 1e-5, 0.25),
        (2e-5, 1e-5, 2.0),
        (1e-30, 0.0, math.inf),
        (math.inf, 0.0, math.inf),
        (math.inf, 1e-5, math.inf),
        (math.nan, 1e-5, math.inf),
        (math.nan, 0.0, math.inf),
    ],
)
def test_part_of_the_tolerance(error: float, tolerance: float, used: float) -> None:
    assert Measured("case", "what", error, tolerance).used == pytest.approx(used)


EXACT, CLOSE, CLOSER = ("kept", 0.0, 0.0), ("logits", 8e-6, 1e-5), ("tokens", 9e-6, 1e-4)
WRONG, NONE = ("features", 3e-4, 1e-5), ("shape", math.nan, 1e-5)


@pytest.mark.parametrize(
    ("comparisons", "worst"),
    [
        ((EXACT, CLOSE), CLOSE),
        ((CLOSE, EXACT), CLOSE),
        ((EXACT, CLOSER, CLOSE, EXACT), CLOSE),
        ((EXACT, CLOSE, WRONG), WRONG),
        ((EXACT, ("count", math.inf, 0.0), CLOSE), ("count", math.inf, 0.0)),
        ((EXACT, NONE), NONE),
        ((CLOSE, NONE, EXACT), NONE),
        ((EXACT, EXACT), EXACT),
    ],
)
def test_an_exact_comparison_hides_nothing(
    comparisons: tuple[tuple[str, float, float], ...], worst: tuple[str, float, float]
) -> None:
    measures = Measures()
    for what, error, tolerance in comparisons:
        measures.add(Measured("case", what, error, tolerance))
    ((found, count),) = measures.worst()
    assert (found.what, count) == (worst[0], len(comparisons))
    _, head, row = summarise(measures, {})
    assert head.split() == ["case", "largest", "error", "tolerance", "in"]
    assert row.split()[:2] == ["case", f"{worst[1]:.2e}"]
    assert row.endswith(f"{worst[0]}, of {len(comparisons)}")


def test_cases_apart_and_what_was_not_compared() -> None:
    measures = Measures()
    for case, comparison in (("a", EXACT), ("b", CLOSE), ("a", CLOSER)):
        measures.add(Measured(case, *comparison))
    measures.unread["b"] = ["out.x", "out.y"]
    lines = list(summarise(measures, {"c": "no method", "d": "no method"}))
    assert [line.split()[:2] for line in lines[2:4]] == [["a", "9.00e-06"], ["b", "8.00e-06"]]
    assert lines[4:] == [
        "not compared, no checker reads it: out.x, out.y of b",
        "not compared, no method: c, d",
    ]
