"""The duel's page: each verdict is what the committed report says of its two rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from foveate.lab.comparing import Difference, difference
from foveate.lab.report import by_method

ROOT = Path(__file__).parents[2]
SEEDS = 3  # below, another seed may say the opposite
HEAD = ["What", "Report", "Rows", "Fine, points", "Seeds", "Seen"]


def claims() -> list[dict[str, str]]:
    lines = (ROOT / "docs" / "duel.md").read_text(encoding="utf-8").splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    begin = next((n for n, row in enumerate(table) if row == HEAD), None)
    assert begin is not None, "the page has no table of claims"
    return [dict(zip(HEAD, row, strict=True)) for row in table[begin + 2 :] if len(row) == len(HEAD)]


def rows(report: str) -> dict[str, list[Any]]:
    return by_method(json.loads((ROOT / "docs" / "reports" / f"{report}.json").read_text(encoding="utf-8")))


def verdict(found: Difference) -> str:
    """Of three seeds: confirmed if the interval lies above zero, and no seed says otherwise."""
    if len(found.seeds) < SEEDS:
        return "open"
    if found.low > 0 and min(found.seeds) > 0:
        return "confirmed"
    return "opposite" if found.high < 0 and max(found.seeds) < 0 else "not seen"


@pytest.mark.parametrize("claim", claims(), ids=lambda claim: f"{claim['Report']}: {claim['What']}")
def test_a_verdict_is_that_of_the_report(claim: dict[str, str]) -> None:
    first, second = claim["Rows"].split(" against ")
    found_rows = rows(claim["Report"].strip("`"))
    found = difference(found_rows[first], found_rows[second])
    mean, low, high = (100 * value for value in found[:3])
    assert claim["Fine, points"] == f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
    assert claim["Seeds"] == str(len(found.seeds))
    assert claim["Seen"] == verdict(found)
