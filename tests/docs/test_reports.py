"""The lab's reports in the docs show what was measured."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from PIL import Image

from foveate.lab import sizes
from foveate.lab.cell import Cell
from foveate.lab.curve import POINTS
from foveate.lab.experiment import read_experiment
from foveate.lab.pace import with_pace
from foveate.lab.report import markdown

ROOT = Path(__file__).parents[2]
REPORTS = sorted((ROOT / "docs" / "reports").glob("*.json"))
SIZES = sorted((ROOT / "docs" / "reports" / "sizes").glob("*.json"))


@pytest.mark.parametrize("report", REPORTS, ids=lambda path: path.stem)
def test_tables_are_those_of_the_report(report: Path) -> None:
    results = with_pace(json.loads(report.read_text(encoding="utf-8")), report.parent / "pace" / report.name)
    pages = [page.read_text(encoding="utf-8").splitlines() for page in (ROOT / "docs").rglob("*.md")]
    rows = [line for line in markdown(results).splitlines() if line.startswith("|")]
    assert len(rows) > 6
    assert any(set(rows) <= set(page) for page in pages), f"no page has all rows of {report.name}"


@pytest.mark.parametrize("report", SIZES, ids=lambda path: path.stem)
def test_other_sizes_are_of_the_cells_in_the_report(report: Path) -> None:
    results = json.loads(report.read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "duel.md").read_text(encoding="utf-8").splitlines()
    assert {line for line in sizes.markdown(results).splitlines() if line.startswith("|")} <= {*page}
    whole = json.loads((report.parents[1] / report.name).read_text(encoding="utf-8"))
    known = [result["cell"] for result in whole]
    assert all(result["cell"] in known for result in results)
    assert (ROOT / "docs" / "images" / "lab" / f"{report.stem}_sizes.png").is_file()


@pytest.mark.parametrize("report", REPORTS, ids=lambda path: path.stem)
def test_a_report_has_every_row_and_seed_of_its_experiment(report: Path) -> None:
    experiment = read_experiment(report.stem)
    expected = [
        Cell.of(experiment, variant, seed).record
        for variant in experiment.variants
        for seed in experiment.seeds
    ]
    results = json.loads(report.read_text(encoding="utf-8"))
    later = {"converge": None, "points": POINTS}  # fields that earlier reports lack
    cells = [{**later, **result["cell"], "label": result["label"]} for result in results]
    assert cells == json.loads(json.dumps(expected))


def test_rows_without_a_common_seed_are_not_compared() -> None:
    whole = json.loads((ROOT / "docs" / "reports" / "duel.json").read_text(encoding="utf-8"))
    results = [cell for cell in whole if cell["cell"]["seed"] == 0][:2]
    assert "Points more than" in markdown(results)
    results[1]["cell"]["seed"] = 1
    assert "Points more than" not in markdown(results)


@pytest.mark.slow
def test_figures_are_drawn_of_the_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = ROOT / "docs" / "images" / "reports.py"
    monkeypatch.setattr("sys.argv", [str(script), str(tmp_path)])
    runpy.run_path(str(script), run_name="__main__")
    for drawn in tmp_path.iterdir():
        with Image.open(drawn) as new, Image.open(ROOT / "docs" / "images" / "lab" / drawn.name) as old:
            assert new.size == old.size, drawn.name


@pytest.mark.parametrize("report", REPORTS, ids=lambda path: path.stem)
def test_a_report_has_its_figure(report: Path) -> None:
    longer = runpy.run_path(str(ROOT / "docs" / "images" / "reports.py"))["LONGER"]
    drawn = ROOT / "docs" / "images" / "lab"
    assert (report.stem in longer) != (drawn / f"{report.stem}.png").is_file()
    curved = all("curve" in result for result in json.loads(report.read_text(encoding="utf-8")))
    assert (curved and report.stem not in longer) == (drawn / f"{report.stem}_curves.png").is_file()
