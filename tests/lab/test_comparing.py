"""Rows are compared on the same pictures and seeds."""

from __future__ import annotations

from typing import Any

import pytest

from foveate.errors import FoveateError
from foveate.lab.comparing import difference, marks


def cell(seed: int, marked: str) -> dict[str, Any]:
    return {"cell": {"seed": seed}, "marks": marked}


def test_a_letter_a_question() -> None:
    kinds = ["letter", "attr", "where", "digit", "absent"]
    assert marks(kinds, [True, False, True, False, True], [2, 0, 3]) == "La  PdN"


def test_the_difference_is_of_seeds_that_both_have() -> None:
    first = [cell(0, "LdA ldA"), cell(1, "LDA LDA"), cell(2, "LDA LDA")]
    second = [cell(1, "ldA lDa"), cell(0, "ldA ldA")]
    found = difference(first, second)
    assert found.seeds == (0.25, 0.75)  # one of four fine questions; three of four
    assert found.mean == 0.5
    assert found.low <= 0.5 <= found.high
    assert difference(first, second, ["attr"]).seeds == (0.0, 0.5)
    assert difference(second, first).mean == -0.5


def test_the_interval_is_over_pictures() -> None:
    """What each picture gains alike is certain; what one of two gains is not."""
    alike = difference([cell(0, "Ld Ld Ld")], [cell(0, "ld ld ld")])
    assert (alike.low, alike.mean, alike.high) == (0.5, 0.5, 0.5)
    some = difference([cell(0, "LD ld " * 50 + "l")], [cell(0, "ld ld " * 50 + "l")])
    assert some.low == pytest.approx(0.4, abs=0.03) and some.high == pytest.approx(0.6, abs=0.03)


def test_nothing_to_compare() -> None:
    with pytest.raises(FoveateError, match="no seed in common"):
        difference([cell(0, "L")], [cell(1, "L")])
    with pytest.raises(FoveateError, match="no question is of a kind of letter"):
        difference([cell(0, "A")], [cell(0, "a")], ["letter"])
