"""The duel's page: its results are those of the committed reports."""

from __future__ import annotations

import json
import runpy
from dataclasses import asdict
from pathlib import Path

import pytest

from foveate.lab.cell import Cell
from foveate.lab.comparing import Difference
from foveate.lab.controls import controls
from foveate.lab.experiment import read_experiment
from foveate.lab.parts import load_parts

ROOT = Path(__file__).parents[2]
DUEL = runpy.run_path(str(ROOT / "tools" / "duel.py"))


def test_the_results_are_those_of_the_reports() -> None:
    reports = ROOT / "docs" / "reports"
    made = DUEL["page"](DUEL["committed"](reports), DUEL["committed"](reports / "sizes"))
    page = (ROOT / "docs" / "duel.md").read_text(encoding="utf-8")
    assert page[page.index(DUEL["BEGIN"]) : page.index(DUEL["END"])] == made, "run tools/duel.py"


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (Difference(0.2, 0.1, 0.3, (0.2, 0.1)), "open"),
        (Difference(0.2, 0.1, 0.3, (0.2, 0.1, 0.3)), "confirmed"),
        (Difference(0.2, 0.1, 0.3, (0.2, -0.1, 0.5)), "not seen"),
        (Difference(0.2, -0.1, 0.3, (0.2, 0.1, 0.3)), "not seen"),
        (Difference(-0.2, -0.3, -0.1, (-0.2, -0.1, -0.3)), "opposite"),
        (Difference(-0.2, -0.3, -0.1, (-0.2, 0.1, -0.5)), "not seen"),
    ],
)
def test_verdicts(found: Difference, verdict: str) -> None:
    assert DUEL["verdict"](found) == verdict


@pytest.mark.parametrize(
    ("claims", "experiments"), [("CLAIMS", ("duel", "duel_dense")), ("TABLES", ("duel_tables",))]
)
def test_claims_are_about_rows(claims: str, experiments: tuple[str, ...]) -> None:
    for name in experiments:
        variants = read_experiment(name).variants
        titles = {"pooled": "pooled tiles", "resampler": "resampler", "convnet": "ConvNet only"}
        rows = {variant.label or titles.get(variant.method, variant.method) for variant in variants}
        for claim in DUEL[claims]:
            assert {claim.first, claim.second} <= rows, claim


def test_rows_of_the_tables_that_the_duel_trains_are_its_own() -> None:
    """So that they are found again: a cell's name is made of what it trains."""
    duel = {variant.label: variant for variant in read_experiment("duel").variants}
    tables = {variant.label: variant for variant in read_experiment("duel_tables").variants}
    both = {*duel} & {*tables}
    assert both == {"INF-LLaVA", "LLaVA-HR", "CoRoI", "Chain-of-Spot"}
    assert all(duel[label] == tables[label] for label in both)
    first, second = read_experiment("duel"), read_experiment("duel_tables")
    for name in ("level", "scale", "seeds", "steps", "batch", "converge", "points"):
        assert getattr(first, name) == getattr(second, name)


def test_trained_cells_are_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The committed cells, put into a lab's folder, come back as they are."""
    old = json.loads((ROOT / "docs" / "reports" / "duel.json").read_text(encoding="utf-8"))
    parts = load_parts("tiny", tmp_path)
    keys = "-".join(["tiny", parts.tower_key, parts.reader_key, parts.convnet_key])
    experiment = read_experiment("duel")
    with controls():
        for variant in experiment.variants:
            cell = Cell.of(experiment, variant, 0)
            mine = [one for one in old if one["cell"] == json.loads(json.dumps(asdict(cell)))]
            if mine:
                place = tmp_path / "cells" / keys / cell.key
                place.mkdir(parents=True)
                (place / "result.json").write_text(json.dumps(mine[0]), encoding="utf-8")
    (tmp_path / "docs" / "reports").mkdir(parents=True)
    collect = DUEL["collect"]
    monkeypatch.setitem(collect.__globals__, "DOCS", tmp_path / "docs")
    collect(tmp_path)
    new = json.loads((tmp_path / "docs" / "reports" / "duel.json").read_text(encoding="utf-8"))
    assert new == [result for result in old if result["cell"]["seed"] == 0]
