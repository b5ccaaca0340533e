"""The lab's reports in the docs show what was measured."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from foveate.lab.cell import Cell
from foveate.lab.curve import POINTS
from foveate.lab.experiment import read_experiment
from foveate.lab.report import markdown

ROOT = Path(__file__).parents[2]
REPORTS = sorted((ROOT / "docs" / "reports").glob("*.json"))


@pytest.mark.parametrize("report", REPORTS, ids=lambda path: path.stem)
def test_tables_are_those_of_the_report(report: Path) -> None:
    results = json.loads(report.read_text(encoding="utf-8"))
    pages = [page.read_text(encoding="utf-8").splitlines() for page in (ROOT / "docs").rglob("*.md")]
    rows = [line for line in markdown(results).splitlines() if line.startswith("|")]
    assert len(rows) > 6
    assert any(set(rows) <= set(page) for page in pages), f"no page has all rows of {report.name}"


@pytest.mark.parametrize("report", REPORTS, ids=lambda path: path.stem)
def test_a_report_has_every_row_and_seed_of_its_experiment(report: Path) -> None:
    experiment = read_experiment(report.stem)
    expected = [
        asdict(Cell.of(experiment, variant, seed))
        for variant in experiment.variants
        for seed in experiment.seeds
    ]
    results = json.loads(report.read_text(encoding="utf-8"))
    later = {"converge": None, "points": POINTS}  # fields that earlier reports lack
    cells = [{**later, **result["cell"], "label": result["label"]} for result in results]
    assert cells == json.loads(json.dumps(expected))
