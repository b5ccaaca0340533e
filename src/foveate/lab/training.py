"""Trains and measures a cell."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from foveate.devices import device_name
from foveate.errors import FoveateError
from foveate.files import alone, new_file, read_json, write
from foveate.lab.cell import Bench, Cell
from foveate.lab.comparing import marks
from foveate.lab.conversing import make_student, under
from foveate.lab.curve import Point, has_converged, point_of, stays_converged
from foveate.lab.data import Examples
from foveate.lab.levels import FINE
from foveate.lab.optimise import Trapezoid, warm_cosine
from foveate.lab.questions import Question
from foveate.lab.student import Stage, Student
from foveate.model.cost import shared_pricer
from foveate.picture.geometry import Size

SAVE_EVERY = 100  # steps between checkpoints of a cell
GROUPS = ("fine", "coarse")


def batches(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of indices: every picture once an epoch, in an order given by the seed."""
    epoch = 0
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(count)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size].tolist()
        epoch += 1


Report = Callable[[int, int, float], None]  # step, steps, loss


def train_cell(
    cell: Cell,
    bench: Bench,
    report: Report | None = None,
    command: str | None = None,
    budget: float | None = None,
) -> dict[str, Any] | None:
    """Trains and measures a cell, or reads its result if it exists. An interrupted cell resumes.

    Args:
        cell, bench: what, and with what.
        report: called after every step.
        command: makes the cell again; by default `cell.command`.
        budget: seconds of processor time after which it stops at the next step.

    Returns:
        The contents of `result.json` in the cell's folder; None if it has stopped before its end.
    """
    place = bench.cells(cell.scale) / cell.key
    result_file = place / "result.json"
    if not result_file.is_file():
        if budget is not None and budget <= 0:
            return None
        with alone(place):
            if not result_file.is_file():
                deadline = None if budget is None else time.process_time() + budget
                try:
                    return _train_cell(cell, bench, place, report, command or cell.command, deadline)
                except OutOfTime:
                    return None
    return read_json(result_file, f"delete the folder {place}, and its row is trained anew")


class OutOfTime(Exception):
    """A cell has used up its budget; what it has learnt is kept."""


def _train_cell(
    cell: Cell, bench: Bench, place: Path, report: Report | None, command: str, deadline: float | None
) -> dict[str, Any]:
    """Trains and measures a cell, whose folder nobody else writes, and stores its result."""
    student = make_student(cell, bench)
    start = time.process_time()
    fallback = student.ready()
    caching = time.process_time() - start
    if deadline is not None and time.process_time() > deadline:
        raise OutOfTime
    trained = _sibling(student, place, report, command, deadline)
    if trained is None:
        trained = _train(student, place / "checkpoint.pt", report, deadline)
    start = time.process_time()
    measured = measure(student, bench.test)
    measuring = time.process_time() - start
    price = shared_pricer(student.model.config, torch.float32).price(Size(*bench.test.size), text_tokens=8)
    asked = bench.test.asked
    result = {
        "cell": cell.record,
        "command": command,
        "title": student.method.title,
        "accuracy": measured.accuracy,
        "marks": marks(measured.kinds, measured.hits, [len(row) for row in bench.test.questions]),
        "tokens": measured.tokens,
        "looked": measured.looked,
        "questions": {k: sum(q.kind == k for q in asked) for k in measured.accuracy if k not in GROUPS},
        "lines": {name: line | grouped(line, asked) for name, line in bench.guesses.items()},
        "cost": price.to_dict(),
        "tflop": (price.encode_flops + price.prefill_flops) / 1e12,
        "parameters": sum(p.numel() for p in student.model.parameters()),
        "connector_parameters": sum(p.numel() for p in student.model.connector.parameters()),
        "seconds": {"caching": caching, "training": trained.seconds, "measuring": measuring},
        "losses": trained.losses,
        "curve": [point._asdict() for point in trained.curve],
        "steps": trained.steps,
        "converged": has_converged(trained.curve),
        "features": fallback,
        "device": device_name(bench.device),
        "bf16": bench.bf16,
    }
    text = json.dumps(result, indent=2) + "\n"
    with new_file(place / "weights.pt") as part:
        torch.save(student.trained(), part)
    write(place / "result.json", text)
    (place / "checkpoint.pt").unlink(missing_ok=True)
    return json.loads(text)


class Trained(NamedTuple):
    """CPU seconds, the mean loss of every `SAVE_EVERY` steps, the learning curve, and the steps."""

    seconds: float
    losses: list[float]
    curve: list[Point]
    steps: int


def _sibling(
    student: Student, place: Path, report: Report | None, command: str, deadline: float | None
) -> Trained | None:
    """Takes the weights of the same row without being told, if they are trained alike; else None."""
    if not student.told_when_measured:
        return None
    own = replace(student.cell, told=False)
    budget = None if deadline is None else deadline - time.process_time()
    result = train_cell(own, student.bench, report, command, budget)
    if result is None:
        raise OutOfTime
    weights = torch.load(place.parent / own.key / "weights.pt", map_location="cpu", weights_only=True)
    student.model.load_state_dict(weights, strict=False)
    curve = [point_of(values) for values in result["curve"]]
    return Trained(result["seconds"]["training"], result["losses"], curve, result["steps"])


def _train(
    student: Student, checkpoint: Path, report: Report | None, deadline: float | None = None
) -> Trained:
    """Trains through all stages, the last one until it converges if the cell says so."""
    cell, bench = student.cell, student.bench
    start, shared = shared_start(cell, bench)
    kept = next((path for path in (checkpoint, start) if path.is_file()), None)
    saved = _saved(kept) if kept else None
    first = saved["step"] if saved else 0
    spent, losses = (saved["seconds"], saved["losses"]) if saved else (0.0, [])
    curve = [point_of(values) for values in saved.get("curve", [])] if saved else []
    hits: list[bool] | None = saved.get("hits") if saved else None
    if saved:
        student.model.load_state_dict(saved["weights"], strict=False)
    order = batches(len(bench.train.pictures), cell.batch or bench.scale.cell.batch, cell.seed)
    for _ in range(first):
        next(order)
    measuring = 0.0
    clock, recent, end = time.process_time(), list[float](saved["recent"] if saved else ()), 0

    def seconds() -> float:
        return spent + time.process_time() - clock - measuring

    stages = student.stages()
    for number, stage in enumerate(stages):
        begin, end = end, end + stage.steps
        if first >= end:
            continue
        learner = under(student, stage, fresh=first == begin == 0)
        learner.model.train()
        optimise = learner.optimiser(stage)
        until = cell.converge if number + 1 == len(stages) else None
        shape = Trapezoid(stage.steps)
        rates = LambdaLR(optimise, shape) if until else warm_cosine(optimise, stage.steps)
        if saved and first > begin:
            optimise.load_state_dict(saved["optimiser"])
            rates.load_state_dict(saved["rates"])
            end = begin + shape.end
        step = max(first, begin)
        while step < end:
            step += 1
            loss = learn(learner, optimise, stage, next(order))
            rates.step()
            recent.append(loss.item())
            if report:
                report(step, end if number + 1 == len(stages) else cell.steps, recent[-1])
            turned, stops = shape.top < stage.steps, False
            due = step * cell.points // cell.steps > (step - 1) * cell.points // cell.steps
            if due or (step == end and number + 1 == len(stages)):
                before = time.process_time()
                found = _measured(learner)
                where = (step, number, step - begin, before - clock + spent - measuring)
                curve.append(_compared(found, hits, where, turned))
                hits = found.hits
                measuring += time.process_time() - before
                stops = until is not None and step >= until.least and stays_converged(curve)
            if until and not turned and (stops or step == int(cell.steps * (1 - until.decay))):
                end = min(round(step / (1 - until.decay)), cell.steps)
                shape.turned(step - begin, end - begin)
            late = deadline is not None and time.process_time() > deadline
            if step % SAVE_EVERY == 0:
                losses.append(sum(recent) / len(recent))
                recent.clear()
            if step % SAVE_EVERY == 0 or late:
                _save(checkpoint, learner, optimise, rates, step, losses, recent, seconds(), curve, hits)
            if late:
                raise OutOfTime
        if learner is not student:
            student.take(learner)
        if end == shared:
            _save(start, learner, optimise, rates, end, losses, recent, seconds(), curve, hits)
    return Trained(seconds(), losses, curve, end)


def learn(learner: Student, optimise: torch.optim.Optimizer, stage: Stage, indices: Sequence[int]) -> Tensor:
    """One step on these training pictures; returns their loss."""
    loss = learner.loss(learner.bench.train, indices, stage.captions or stage.regions)
    optimise.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([p for g in optimise.param_groups for p in g["params"]], 1.0)
    optimise.step()
    return loss


@torch.inference_mode()
def _measured(student: Student) -> Measured:
    """On some of the held-out pictures, for a point of the learning curve."""
    whole = student.bench.test
    count = min(student.curve_pictures, len(whole.pictures))
    found = measure(
        student, replace(whole, pictures=whole.pictures[:count], questions=whole.questions[:count])
    )
    student.model.train()
    return found


def _compared(
    found: Measured, hits: list[bool] | None, where: tuple[int, int, int, float], turned: bool
) -> Point:
    """`hits`: of the point before; without one, what two independent measurements would differ in."""
    pairs = []
    for kinds in (FINE, ("attr", "count")):
        mine = [i for i, kind in enumerate(found.kinds) if kind in kinds]
        right = sum(found.hits[i] for i in mine) / max(len(mine), 1)
        changed = 2 * right * (1 - right)
        if hits is not None:
            changed = sum(found.hits[i] != hits[i] for i in mine) / max(len(mine), 1)
        pairs.append((right, len(mine), changed))
    fine, coarse = pairs
    return Point(*where, (fine[0], coarse[0]), (fine[1], coarse[1]), (fine[2], coarse[2]), turned)


def shared_start(cell: Cell, bench: Bench) -> tuple[Path, int]:
    """The folder of the method that a cell starts from, shared by rows with the same start, and its steps."""
    stages = tuple(itertools.takewhile(lambda stage: stage.method is not None, cell.stages))
    shared = replace(cell, options={}, told=False, stages=stages)
    steps = round(sum(stage.part for stage in stages) * cell.steps)
    return bench.cells(cell.scale) / f"{shared.key}-start.pt", steps


def _save(
    path: Path,
    student: Student,
    optimise: torch.optim.Optimizer,
    rates: LambdaLR,
    step: int,
    losses: list[float],
    recent: list[float],
    seconds: float,
    curve: list[Point],
    hits: list[bool] | None,
) -> None:
    state = {
        "weights": student.trained(),
        "optimiser": optimise.state_dict(),
        "rates": rates.state_dict(),
        "step": step,
        "losses": losses,
        "recent": recent,
        "seconds": seconds,
        "curve": [point._asdict() for point in curve],
        "hits": hits,
    }
    with new_file(path) as part:
        torch.save(state, part)


def _saved(path: Path) -> dict[str, Any]:
    """A checkpoint of `_save`."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError, OSError, KeyError) as error:
        raise FoveateError(f"{path} is broken: delete it, and that training starts anew") from error


class Measured(NamedTuple):
    """The measurements of a trained cell.

    Attributes:
        accuracy: exact match of greedy answers, per kind of question, and over all fine and all coarse ones.
        tokens: mean number of visual tokens that the LLM read for a question.
        looked: over the questions about an object, how often one of the regions that the method chose
            contains it ("found"), and the mean overlap with the best of them; None if it chooses none.
        kinds, hits: of every question in order, its kind and whether it was answered exactly.
    """

    accuracy: dict[str, float]
    tokens: float
    looked: dict[str, float] | None
    kinds: list[str]
    hits: list[bool]


@torch.inference_mode()
def measure(student: Student, data: Examples, batch: int = 50) -> Measured:
    """Asks everything about these pictures."""
    student.model.eval()
    kinds: list[str] = []
    rights: list[bool] = []
    found: list[bool] = []
    overlaps: list[float] = []
    read: list[int] = []
    for start in range(0, len(data.pictures), batch):
        indices = range(start, min(start + batch, len(data.pictures)))
        for question, right, tokens, regions in student.grade(data, indices):
            read.append(tokens)
            kinds.append(question.kind)
            rights.append(right)
            if regions is not None and question.region is not None:
                found.append(any(region.contains(question.region) for region in regions))
                overlaps.append(max((region.overlap(question.region) for region in regions), default=0.0))
    by_kind = {
        kind: float(np.mean([right for k, right in zip(kinds, rights, strict=True) if k == kind]))
        for kind in dict.fromkeys(kinds)
    }
    looked = {"found": float(np.mean(found)), "overlap": float(np.mean(overlaps))} if found else None
    groups = grouped(by_kind, data.asked)
    return Measured(by_kind | groups, float(np.mean(read)), looked, kinds, rights)


def grouped(by_kind: Mapping[str, float], asked: Sequence[Question]) -> dict[str, float]:
    """Accuracy over all fine questions, and over all coarse ones except `where`."""
    counts = {kind: sum(question.kind == kind for question in asked) for kind in by_kind}
    groups = {
        "fine": [k for k in by_kind if k in FINE],
        "coarse": [k for k in by_kind if k in ("attr", "count")],
    }
    return {
        name: sum(by_kind[k] * counts[k] for k in kinds) / sum(counts[k] for k in kinds)
        for name, kinds in groups.items()
        if kinds
    }
