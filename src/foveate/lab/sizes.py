"""Trained rows on held-out pictures whose glyphs are smaller or larger than those that they learnt from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from foveate.errors import FoveateError
from foveate.files import LOCK, explained, read_json, write
from foveate.lab.cell import Bench, Cell, bench_of, cells_of
from foveate.lab.controls import controls
from foveate.lab.conversing import make_student
from foveate.lab.data import CPU, Tell, silent
from foveate.lab.experiment import Experiment
from foveate.lab.levels import FINE, Level, level_named
from foveate.lab.parts import load_parts
from foveate.lab.report import LINES, Result, by_method, marker, spread, table
from foveate.lab.run import report_folder
from foveate.lab.scales import scale_named
from foveate.lab.training import grouped, measure
from foveate.methods import method_class

GLYPHS = (6, 8, 10, 12, 14, 18, 24)  # font pixels of a scale with `magnify` 1
PICTURES = 200  # of each size


def level_at(level: Level, glyph: int) -> Level:
    """The level with glyphs of one size.

    Objects are at least twice as large, as no glyph is larger than half of its object, and three times if two
    glyphs stand side by side. So a picture has room for fewer of them.
    """
    low, high = (max(side, (3 if level.both else 2) * glyph) for side in level.side)
    return replace(level, glyph=(glyph, glyph), side=(low, high))


def measure_sizes(
    experiment: Experiment,
    folder: Path,
    glyphs: Sequence[int] = GLYPHS,
    pictures: int = PICTURES,
    name: str | None = None,
    commands: Callable[[Cell], str] = lambda cell: cell.command,
    tell: Tell = silent,
    device: torch.device = CPU,
) -> tuple[Path, int]:
    """Measures every trained cell of an experiment at every size, and writes `sizes.json`, `.md` and `.png`.

    What is measured is kept with the cell, and not measured again.

    Args:
        experiment: what `run` has trained.
        folder: where the lab keeps everything.
        glyphs: font sizes, pixels; a capital's height is about 0.73 of it.
        pictures: held-out pictures of each size.
        name: of the report's folder, as `run` names it.
        commands: the command that makes a cell again.
        tell: is told how far drawing and encoding are.
        device: where the rows are measured.

    Returns:
        The Markdown file, and how many cells are not trained.

    Raises:
        FoveateError: no cell is trained, a cell is named twice, a size or number of pictures is below 1, a
            size leaves no room for objects, or the disk has no space.
    """
    if not glyphs or min(*glyphs, pictures) < 1:
        raise FoveateError("name at least one size of glyphs and one picture, each 1 or more")
    level = level_named(experiment.level)
    few = replace(scale_named(experiment.scale), scenes=1, test_scenes=pictures)
    with controls():
        cells = [Cell.of(experiment, v, seed) for v in experiment.variants for seed in experiment.seeds]
        if len({cell.key for cell in cells}) < len(cells):
            raise FoveateError("two variants, or two seeds, are the same")
        parts = load_parts(experiment.scale, folder)
        home = cells_of(folder, experiment.scale, parts)
        trained = [cell for cell in cells if (home / cell.key / "weights.pt").is_file()]
        if not trained:
            raise FoveateError(
                f"none of these {len(cells)} cells is trained in {folder}: `foveate lab run` does"
            )
        drawn = {g: bench_of(level_at(level, g), few, folder, parts, tell, device) for g in sorted({*glyphs})}
        for glyph, bench in drawn.items():
            if not any(question.kind in FINE for question in bench.test.asked):
                raise FoveateError(f"glyphs of {glyph} pixels leave no room for objects: name smaller ones")
        benches = {glyph: replace(bench, train=bench.test) for glyph, bench in drawn.items()}  # no training
        done = [_measured(cell, home / cell.key, benches, commands(cell)) for cell in trained]
    place = report_folder(experiment, folder, name)
    with explained(place):
        place.mkdir(parents=True, exist_ok=True)
    write(place / "sizes.json", json.dumps(done, indent=1) + "\n")
    with explained(place / "sizes.png"):
        plot_sizes(done, place / "sizes.png")
    write(place / "sizes.md", markdown(done))
    return place / "sizes.md", len(cells) - len(trained)


def _measured(cell: Cell, place: Path, benches: Mapping[int, Bench], command: str) -> dict[str, Any]:
    """Fine accuracy of a trained cell at every size, and what guesses get."""
    kept = place / "sizes.json"
    with FileLock(place / LOCK):  # another run may be measuring it: it is waited for
        known = read_json(kept, f"delete {kept}, and it is measured anew") if kept.is_file() else {}
        for bench in benches.values():
            if bench.test.key not in known:
                student = make_student(cell, bench)
                student.ready()
                weights = torch.load(place / "weights.pt", map_location="cpu", weights_only=True)
                student.model.load_state_dict(weights, strict=False)
                lines = {
                    name: grouped(line, bench.test.asked)["fine"] for name, line in bench.guesses.items()
                }
                known[bench.test.key] = {"fine": measure(student, bench.test).accuracy["fine"], **lines}
                write(kept, json.dumps(known, indent=1) + "\n")
    return {
        "cell": cell.record,
        "label": cell.label,
        "title": method_class(cell.method).title,
        "command": command,
        "pictures": len(next(iter(benches.values())).test.pictures),
        "sizes": {str(glyph): known[bench.test.key] for glyph, bench in benches.items()},
    }


def markdown(results: Sequence[Result]) -> str:
    """The report as text; accuracies in percent, the mean over seeds and their range."""
    first = results[0]
    level = level_named(first["cell"]["level"])
    glyphs = list(first["sizes"])
    larger = scale_named(first["cell"]["scale"]).magnify
    rows = [
        [
            name,
            str(len(cells)),
            *(spread([cell["sizes"][glyph]["fine"] for cell in cells]) for glyph in glyphs),
        ]
        for name, cells in by_method(results).items()
    ]
    rows += [
        [f"*{line}*", "", *(f"{100 * first['sizes'][glyph][line]:.1f}" for glyph in glyphs)] for line in LINES
    ]
    low, high = (round(glyph * larger) for glyph in level.glyph)
    return "\n".join(
        [
            f"# Lab: level {first['cell']['level']} at other sizes of glyphs",
            "",
            f"Fine questions about {first['pictures']} held-out pictures of each size, percent right. Rows "
            f"have learnt from glyphs of {low} to {high} pixels, the font's size: a capital's height is "
            "about 0.73 of it. Objects grow with their glyphs, so there are fewer in pictures of large ones.",
            "",
            *table(["", "seeds", *(f"{round(int(glyph) * larger)} pixels" for glyph in glyphs)], rows),
            "",
            "![accuracy against size of glyphs](sizes.png)",
            "",
        ]
    )


def plot_sizes(results: Sequence[Result], path: Path) -> None:
    """Fine accuracy of every row against the size of glyphs, mean over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    glyphs = list(results[0]["sizes"])
    for row, (name, cells) in enumerate(by_method(results).items()):
        accuracy = [
            100 * sum(cell["sizes"][glyph]["fine"] for cell in cells) / len(cells) for glyph in glyphs
        ]
        axes.plot(
            range(len(glyphs)),
            accuracy,
            f"{marker(row)}-",
            label=name,
            linewidth=1.2,
        )
    for name, dashes in zip(LINES, (":", "--"), strict=True):
        guessed = [100 * results[0]["sizes"][glyph][name] for glyph in glyphs]
        axes.plot(range(len(glyphs)), guessed, color="grey", linestyle=dashes, linewidth=1, label=name)
    low, high = level_named(results[0]["cell"]["level"]).glyph
    larger = scale_named(results[0]["cell"]["scale"]).magnify
    for n, glyph in enumerate(glyphs):
        if low <= int(glyph) <= high:
            axes.axvline(n, color="grey", linewidth=8, alpha=0.15, zorder=0)
    axes.set(
        xlabel="font size of the glyphs, pixels; "
        f"trained with {round(low * larger)} to {round(high * larger)}",
        ylabel="fine questions, % right",
        ylim=(0, 100),
    )
    axes.set_xticks(range(len(glyphs)), [f"{round(int(glyph) * larger)}" for glyph in glyphs])
    figure.legend(frameon=False, loc="outside right upper")
    figure.savefig(path, dpi=120)
