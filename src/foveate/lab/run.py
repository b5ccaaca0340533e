"""An experiment: variants of methods times seeds on one level, and its report."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from foveate.devices import check_bfloat16
from foveate.errors import FoveateError
from foveate.files import explained
from foveate.lab.cell import Bench, Cell, bench_of, check_methods, make_bench, sets
from foveate.lab.controls import controls
from foveate.lab.conversing import make_student, under
from foveate.lab.data import CPU, SPARE, Tell, examples_key, silent
from foveate.lab.experiment import Experiment
from foveate.lab.levels import level_named
from foveate.lab.materials import check_packages
from foveate.lab.parallel import train_at_once
from foveate.lab.parts import Parts, load_parts
from foveate.lab.report import write_report
from foveate.lab.scales import scale_named
from foveate.lab.training import train_cell
from foveate.versions import names_versions

Report = Callable[[Cell, int, int, float], None]  # cell, step, steps, loss
MADE_AGAIN = ("data", "features")  # folders whose contents a run makes again


@dataclass(frozen=True)
class Ran:
    """What a run has done: its report, if a cell is done; and how many cells are missing."""

    report: Path | None
    missing: int


@names_versions
def run(
    experiment: Experiment,
    folder: Path,
    report: Report | None = None,
    name: str | None = None,
    commands: Callable[[Cell], str] = lambda cell: cell.command,
    tell: Tell = silent,
    takes: Callable[[int], None] = lambda size: None,
    budget: float | None = None,
    device: torch.device = CPU,
    jobs: int = 1,
    bf16: bool = False,
) -> Ran:
    """Trains what is missing of all variants and seeds, seed by seed, and writes the report after each cell.

    Every row is built, with all of its stages, before anything is drawn.

    Args:
        experiment: what to train.
        folder: where everything is kept; an interrupted run resumes.
        report: called after every step.
        name: of the report's folder; by default scale, level, steps and batch.
        commands: the command that makes a cell again.
        tell: is told how far drawing and encoding are.
        takes: is told the bytes of pictures and features that the disk will hold in addition.
        budget: seconds of processor time after which it stops, within a cell, to go on when run again; with
            several jobs, of each of their processes.
        device: where the methods train.
        jobs: cells that train at once, each in a process of its own.
        bf16: whether linear layers multiply in bfloat16 while they train.

    Raises:
        FoveateError: unknown names, wrong options, a device without bfloat16 if that is wanted, parts that
            are not prepared, no space on the disk, or missing packages.
    """
    start = time.process_time()
    check_packages()  # now, not only for the report's plot
    if bf16:
        check_bfloat16(device)
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
        parts = load_parts(scale, folder)
        size = needed([row[0] for row in cells], folder, parts)
        if size:
            takes(size)
        bench = replace(make_bench(level, scale, folder, parts, tell, device), bf16=bf16)
        place = report_folder(experiment, folder, name)
        found: dict[str, dict[str, Any]] = {}
        path: Path | None = None
        order = [(row[i], commands(row[i])) for i in range(len(experiment.seeds)) for row in cells]
        if jobs == 1:
            left = None if budget is None else budget - (time.process_time() - start)
            trained = _one_by_one(order, bench, report, left)
        else:
            trained = train_at_once(order, jobs, bench, report, tell, budget)
        for cell, result in trained:
            if result is None:
                continue
            found[cell.key] = result
            done = [one for row in cells for one in row if one.key in found]
            path = write_report([{**found[one.key], "label": one.label} for one in done], place)
    return Ran(path, len(keys) - len(found))


def report_folder(experiment: Experiment, folder: Path, name: str | None = None) -> Path:
    """Where the report of an experiment is written; `name`: instead of its scale, level, steps and batch."""
    batch = f"-batch{experiment.batch}" if experiment.batch else ""
    made = f"{experiment.scale}-{experiment.level}-{experiment.training}{batch}"
    return folder / "reports" / (name or made)


def needed(cells: Sequence[Cell], folder: Path, parts: Parts) -> int:
    """Bytes of pictures and features that cells of one level lack on the disk, and whether they can be built.

    Builds every cell that has no result, in all of its stages, with one picture.

    Raises `FoveateError` for whatever is wrong with them.
    """
    level, sizes = level_named(cells[0].level), scale_named(cells[0].scale)
    wanted: dict[tuple[str, str], int] = {}
    for split, count in sets(sizes):
        key = examples_key(level, sizes.view, sizes.magnify, split, count)
        if not (folder / "data" / key / "texts.json").is_file():
            wanted["data", key] = count * 3 * (sizes.view * level.ratio) ** 2
    with tempfile.TemporaryDirectory() as elsewhere:
        few = bench_of(level, replace(sizes, scenes=1, test_scenes=1), Path(elsewhere), parts)
        for cell in cells:
            if (Bench.cells(replace(few, folder=folder), cell.scale) / cell.key / "result.json").is_file():
                continue
            student = make_student(replace(cell, batch=None), few)
            for stage in student.stages():
                under(student, stage).optimiser(stage)
            if student.builds_tower:
                continue
            for split, count in sets(sizes):
                key = examples_key(level, sizes.view, sizes.magnify, split, count)
                place = folder / "features" / f"{key}-{student.tower_key}"
                shown = student.features[few.train.key]
                for file, one in shown.sizes(student.plan, student.method.looks(student.plan)).items():
                    if not (place / f"{file}.npy").is_file():
                        wanted[place.name, file] = one * count
    return sum(wanted.values())


def clean(folder: Path) -> int:
    """Deletes pictures and features, which a run makes again, and returns the bytes that are free now."""
    freed = 0
    for place in (folder / name for name in MADE_AGAIN):
        if place.is_dir():
            with explained(place):
                freed += sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
                shutil.rmtree(place)
    return freed


def room(folder: Path) -> int:
    """Bytes that a run may fill on the disk of a folder, which need not exist yet."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    return max(0, shutil.disk_usage(there).free - SPARE)


def _one_by_one(
    cells: Sequence[tuple[Cell, str]], bench: Bench, report: Report | None, budget: float | None
) -> Iterator[tuple[Cell, dict[str, Any] | None]]:
    """Cells in order, and None for those for which the budget is too small."""
    start = time.process_time()
    for cell, command in cells:
        left = None if budget is None else budget - (time.process_time() - start)
        yield cell, train_cell(cell, bench, _telling(report, cell), command, left)


def _telling(report: Report | None, cell: Cell) -> Callable[[int, int, float], None] | None:
    return None if report is None else lambda step, steps, loss: report(cell, step, steps, loss)
