"""How long a training step of each row takes, timed in turn: what rows cost, wherever they have trained."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from foveate.devices import check_bfloat16, device_name
from foveate.errors import FoveateError
from foveate.files import explained, read_json, write
from foveate.lab.cell import Cell, bench_of
from foveate.lab.controls import controls
from foveate.lab.conversing import make_student, under
from foveate.lab.data import CPU, Tell, silent
from foveate.lab.experiment import Experiment
from foveate.lab.levels import level_named
from foveate.lab.parts import load_parts
from foveate.lab.report import Result, table
from foveate.lab.run import report_folder
from foveate.lab.scales import scale_named
from foveate.lab.training import batches, learn
from foveate.methods import method_class

ROUNDS = 7  # of all rows in turn
STEPS = 3  # of a row's stage in each round, after one that is not timed
EPOCH = 4  # batches of pictures: few, so that what is kept of each is made before the first round


def measure_pace(
    experiment: Experiment,
    folder: Path,
    rounds: int = ROUNDS,
    name: str | None = None,
    tell: Tell = silent,
    device: torch.device = CPU,
    bf16: bool = False,
) -> Path:
    """Times steps of every row in all of its stages, row after row and round after round.

    Seconds are of this process's processor on a CPU, else those that pass. What is made once a picture is
    left out: the frozen tower's features, the lessons of methods that converse.

    Args:
        experiment: its rows, with its first seed.
        folder: where the lab keeps everything.
        rounds: of all rows.
        name: of the report's folder, as `run` names it.
        tell: is told how far it is.
        device: where the steps run.
        bf16: whether linear layers multiply in bfloat16.

    Returns:
        The Markdown file, with `pace.json` beside it.

    Raises:
        FoveateError: unknown names, wrong options, or a device without bfloat16 if that is wanted.
    """
    if rounds < 1:
        raise FoveateError(f"rounds must be at least 1, not {rounds}")
    if bf16:
        check_bfloat16(device)
    level, scale = level_named(experiment.level), scale_named(experiment.scale)
    batch = experiment.batch or scale.cell.batch
    few = replace(scale, scenes=EPOCH * batch, test_scenes=1)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    with controls():
        cells = [Cell.of(experiment, variant, experiment.seeds[0]) for variant in experiment.variants]
        parts = load_parts(experiment.scale, folder)
        bench = replace(bench_of(level, few, folder, parts, tell, device), bf16=bf16)
        students = [make_student(cell, bench) for cell in cells]
        ways = [[(stage, under(student, stage)) for stage in student.stages()] for student in students]
        order = batches(few.scenes, batch, 0)
        for student in students:
            student.ready()
        times: list[list[list[float]]] = [[[] for _ in stages] for stages in ways]  # of a step, each round
        for number in range(rounds + 1):
            for row, stages in enumerate(ways):
                for place, (stage, learner) in enumerate(stages):
                    learner.model.train()
                    optimise = learner.optimiser(stage)
                    for _ in range(1 if number else EPOCH):
                        learn(learner, optimise, stage, next(order)).item()
                    if number == 0:
                        continue
                    start = clock()
                    for _ in range(STEPS):
                        learn(learner, optimise, stage, next(order)).item()
                    times[row][place].append((clock() - start) / STEPS)
            tell("timing steps", number, rounds)
        done = [
            {
                "cell": cell.record,
                "label": cell.label,
                "title": method_class(cell.method).title,
                "device": device_name(device),
                "bf16": bf16,
                "threads": torch.get_num_threads(),
                "stages": [
                    {"steps": stage.steps, "seconds": seconds}
                    for (stage, _), seconds in zip(stages, some, strict=True)
                ],
            }
            for cell, stages, some in zip(cells, ways, times, strict=True)
        ]
    home = report_folder(experiment, folder, name)
    with explained(home):
        home.mkdir(parents=True, exist_ok=True)
    write(home / "pace.json", json.dumps(done, indent=1) + "\n")
    write(home / "pace.md", markdown(done))
    return home / "pace.md"


def seconds_at(pace: Result, step: int) -> float:
    """What training up to a step takes, by the medians of its stages."""
    seconds = 0.0
    for stage in pace["stages"]:
        taken = min(step, stage["steps"])
        seconds += taken * statistics.median(stage["seconds"])
        step -= taken
    return seconds


def timed(results: Sequence[Result], paces: Sequence[Result]) -> list[dict[str, Any]]:
    """Results with the seconds that their steps take when timed, instead of those where they trained.

    Raises `FoveateError` for a row without a pace.
    """
    known = {_row(pace): pace for pace in paces}
    made = []
    for result in results:
        if (pace := known.get(_row(result))) is None:
            raise FoveateError(
                f"{result['label'] or result['title']} has no pace: `foveate lab pace` measures"
            )
        curve = [{**p, "seconds": seconds_at(pace, p["step"])} for p in result["curve"]]
        training = seconds_at(pace, result["steps"])
        seconds = {**result["seconds"], "training": training}
        made.append({**result, "curve": curve, "seconds": seconds, "device": pace["device"]})
    return made


def with_pace(results: Sequence[Result], file: Path) -> Sequence[Result]:
    """`timed` by the paces in a file, if there is one."""
    if not file.is_file():
        return results
    return timed(results, read_json(file, f"delete {file}, and seconds are where rows have trained"))


def _row(of: Result) -> str:
    """What a pace and a result have in common: earlier ones of either are of float32."""
    cell = {**of["cell"], "seed": None, "label": None, "bf16": of.get("bf16", False)}
    return json.dumps(cell, sort_keys=True)


def markdown(paces: Sequence[Result]) -> str:
    """The report as text: milliseconds of a step in every stage, median and range over the rounds."""
    first = paces[0]
    most = max(len(pace["stages"]) for pace in paces)
    rows = []
    for pace in paces:
        stages = [
            f"{1e3 * statistics.median(s):.0f} ({1e3 * min(s):.0f} to {1e3 * max(s):.0f})"
            for s in (stage["seconds"] for stage in pace["stages"])
        ]
        whole = seconds_at(pace, sum(stage["steps"] for stage in pace["stages"]))
        rows.append([pace["label"] or pace["title"], *stages, *[""] * (most - len(stages)), f"{whole:.0f}"])
    head = ["", *(f"stage {n + 1}, ms" for n in range(most)), "all steps, s"]
    return "\n".join(
        [
            f"# Lab: level {first['cell']['level']}, what a step takes",
            "",
            f"Device: {first['device']}{', bfloat16' if first['bf16'] else ''}; "
            f"threads: {first['threads']}. Rows in turn, median and range of "
            f"{len(first['stages'][0]['seconds'])} rounds of {STEPS} steps.",
            "",
            *table(head, rows),
            "",
        ]
    )
