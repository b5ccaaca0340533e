"""The duel's page: its results are those of the committed reports."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from foveate.lab.cell import Cell, cells_of
from foveate.lab.comparing import Difference
from foveate.lab.controls import controls
from foveate.lab.experiment import read_experiment
from foveate.lab.parts import load_parts

ROOT = Path(__file__).parents[2]
DUEL = runpy.run_path(str(ROOT / "tools" / "duel.py"))


def test_the_results_are_those_of_the_reports() -> None:
    reports = ROOT / "docs" / "reports"
    made = DUEL["page"](DUEL["committed"](reports), DUEL["committed"](reports / "sizes"), reports / "pace")
    page = (ROOT / "docs" / "duel.md").read_text(encoding="utf-8")
    assert page[page.index(DUEL["BEGIN"]) : page.index(DUEL["END"])] == made, "run tools/duel.py"


def test_rows_that_are_not_measured_at_other_sizes_are_named() -> None:
    reports = DUEL["committed"](ROOT / "docs" / "reports")
    sizes = DUEL["committed"](ROOT / "docs" / "reports" / "sizes")
    page = DUEL["page"](reports, sizes | {"duel": sizes["duel"][:1]}, ROOT / "docs" / "reports" / "pace")
    named = [f"{one['label'] or one['title']}, seed {one['cell']['seed']}" for one in reports["duel"][1:]]
    assert f"Not measured yet: {'; '.join(named)}.\n" in page


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


def test_the_long_rows_are_the_duels_with_more_steps() -> None:
    duel, longer = read_experiment("duel"), read_experiment("duel_long")
    assert all(variant in duel.variants for variant in longer.variants)
    for name in ("level", "scale", "batch"):
        assert getattr(duel, name) == getattr(longer, name)
    assert {*longer.seeds} <= {*duel.seeds}
    assert longer.training == 3 * duel.training


def result(row: str, seed: int, marks: str, converged: bool = True) -> dict[str, Any]:
    return {"cell": {"seed": seed, "options": {}}, "label": row, "marks": marks, "converged": converged}


def test_rows_that_cannot_be_compared_yet_are_open() -> None:
    claim = DUEL["Claim"]("a paper", "more", "a", "b")
    some = [result("a", 0, "LD LD"), result("b", 1, "ld ld")]
    assert DUEL["seen"](claim, some) == DUEL["seen"](claim, some[:1]) == ["", "0", "open"]
    three = [result(row, seed, "LD LD" if row == "a" else "lD ld") for row in "ab" for seed in range(3)]
    assert DUEL["seen"](claim, three)[1:] == ["3", "confirmed"]
    three[0]["converged"] = False
    assert DUEL["seen"](claim, three)[1:] == ["3", "confirmed*"]
    digits = claim._replace(kinds=("digit",))
    assert DUEL["seen"](digits, three)[0].startswith("+50.0")


def test_trained_cells_are_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells in a lab's folder replace those of the reports; all others stay."""
    committed = ROOT / "docs" / "reports"
    old = json.loads((committed / "duel.json").read_text(encoding="utf-8"))
    measured = json.loads((committed / "sizes" / "duel.json").read_text(encoding="utf-8"))
    (tmp_path / "docs" / "reports" / "sizes").mkdir(parents=True)
    report, sizes = (tmp_path / "docs" / "reports" / place for place in ("duel.json", "sizes/duel.json"))
    report.write_text(json.dumps(old[2:]), encoding="utf-8")
    sizes.write_text(json.dumps(measured[1:]), encoding="utf-8")
    home = cells_of(tmp_path, "tiny", load_parts("tiny", tmp_path))
    experiment = read_experiment("duel")
    with controls():
        cells = [Cell.of(experiment, v, seed) for v in experiment.variants for seed in experiment.seeds]
    changed = []
    for one in old[:3]:
        cell = next(cell for cell in cells if json.loads(json.dumps(cell.record)) == one["cell"])
        changed.append({**one, "command": "again"})
        (home / cell.key).mkdir(parents=True)
        (home / cell.key / "result.json").write_text(json.dumps(changed[-1]), encoding="utf-8")
    (tmp_path / "reports" / "duel").mkdir(parents=True)
    (tmp_path / "reports" / "duel" / "sizes.json").write_text(json.dumps(measured[:1]), encoding="utf-8")
    monkeypatch.setitem(DUEL["collect"].__globals__, "DOCS", tmp_path / "docs")
    DUEL["collect"](tmp_path)
    assert json.loads(report.read_text(encoding="utf-8")) == [*changed, *old[3:]]
    assert json.loads(sizes.read_text(encoding="utf-8")) == measured
    assert sorted(path.name for path in report.parent.glob("*.json")) == ["duel.json"]
    other = [{**measured[0], "pictures": 7}]
    (tmp_path / "reports" / "duel" / "sizes.json").write_text(json.dumps(other), encoding="utf-8")
    with pytest.raises(ValueError, match="another number of pictures"):
        DUEL["collect"](tmp_path)
