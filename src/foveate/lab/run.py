"""An experiment: variants of methods times seeds on one level, and its report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from foveate.errors import FoveateError
from foveate.lab.cell import Cell, check_methods, make_bench
from foveate.lab.controls import controls
from foveate.lab.experiment import Experiment
from foveate.lab.materials import check_packages
from foveate.lab.parts import load_parts
from foveate.lab.report import write_report
from foveate.lab.training import train_cell
from foveate.versions import names_versions

Report = Callable[[Cell, int, int, float], None]  # cell, step, steps, loss


@names_versions
def run(
    experiment: Experiment,
    folder: Path,
    report: Report | None = None,
    name: str | None = None,
    commands: Callable[[Cell], str] = lambda cell: cell.command,
) -> Path:
    """Trains what is missing of all variants and seeds, seed by seed, and writes the report after each cell.

    Args:
        experiment: what to train.
        folder: where everything is kept; an interrupted run resumes.
        report: called after every step.
        name: of the report's folder; by default scale, level, steps and batch.
        commands: the command that makes a cell again.

    Returns:
        The Markdown file of the report.

    Raises:
        FoveateError: unknown names, wrong options, parts that are not prepared, no space on the disk, or
            missing packages.
    """
    check_packages()  # now, not only for the report's plot
    level, scale = experiment.level, experiment.scale
    with controls():
        check_methods([variant.method for variant in experiment.variants])
        cells = [
            [Cell.of(experiment, variant, seed) for seed in experiment.seeds]
            for variant in experiment.variants
        ]
        keys = [cell.key for row in cells for cell in row]
        if len({*keys}) < len(keys):
            raise FoveateError("two variants, or two seeds, are the same")
        bench = make_bench(level, scale, folder, load_parts(scale, folder))
        batch = f"-batch{experiment.batch}" if experiment.batch else ""
        place = folder / "reports" / (name or f"{scale}-{level}-{experiment.training}{batch}")
        found: dict[str, dict[str, Any]] = {}
        for cell in (row[i] for i in range(len(experiment.seeds)) for row in cells):
            found[cell.key] = train_cell(cell, bench, _telling(report, cell), commands(cell))
            done = [one for row in cells for one in row if one.key in found]
            path = write_report([{**found[one.key], "label": one.label} for one in done], place)
    return path


def _telling(report: Report | None, cell: Cell) -> Callable[[int, int, float], None] | None:
    return None if report is None else lambda step, steps, loss: report(cell, step, steps, loss)
