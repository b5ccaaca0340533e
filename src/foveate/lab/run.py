"""An experiment: methods times seeds on one level, and its report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from foveate.errors import FoveateError
from foveate.lab.cell import Cell, check_methods, make_bench, train_cell
from foveate.lab.controls import controls
from foveate.lab.levels import level_named
from foveate.lab.parts import load_parts
from foveate.lab.report import write_report
from foveate.lab.scales import scale_named

Report = Callable[[Cell, int, int, float], None]  # cell, step, steps, loss


def run(
    methods: Sequence[str],
    seeds: Sequence[int],
    level: str,
    scale: str,
    folder: Path,
    steps: int | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    report: Report | None = None,
) -> Path:
    """Trains what is not there yet of all methods and seeds, seed by seed, and writes the report.

    Args:
        methods: names of methods and controls.
        seeds: of connectors and of the order of the data.
        level, scale: names in `LEVELS` and `SCALES`.
        folder: where everything is kept; an interrupted run goes on where it was.
        steps: of training; by default the scale's.
        options: per method, options beyond the lab's own.
        report: called after every step.

    Returns:
        The Markdown file of the report.

    Raises:
        FoveateError: unknown names, wrong options, parts that are not prepared, no space on the disk.
    """
    options = options or {}
    sizes = scale_named(scale)
    level_named(level)
    if steps is not None and steps < 1:
        raise FoveateError(f"steps must be at least 1, not {steps}")
    if not seeds:
        raise FoveateError("name at least one seed, for example --seeds 0")
    with controls():
        check_methods([*methods, *options])
        bench = make_bench(level, scale, folder, load_parts(scale, folder))
        results = []
        for seed in seeds:
            for method in methods:
                cell = Cell(
                    method, seed, level, scale, steps or sizes.cell.steps, dict(options.get(method, {}))
                )
                tell = None if report is None else _telling(report, cell)
                results.append(train_cell(cell, bench, tell))
    results.sort(key=lambda result: methods.index(result["cell"]["method"]))
    return write_report(results, folder / "reports" / f"{scale}-{level}-{steps or sizes.cell.steps}")


def _telling(report: Report, cell: Cell) -> Callable[[int, int, float], None]:
    return lambda step, steps, loss: report(cell, step, steps, loss)
