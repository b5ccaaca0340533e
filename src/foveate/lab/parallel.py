"""Several cells at once, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import queue
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from foveate.errors import FoveateError
from foveate.lab.cell import Bench, Cell, make_bench
from foveate.lab.controls import controls
from foveate.lab.data import Tell
from foveate.lab.parts import load_parts
from foveate.lab.training import OutOfTime, shared_start, train_cell

PAUSE = 1.0  # seconds without news, or without work, after which a process looks around

Result = dict[str, Any]
Report = Callable[[Cell, int, int, float], None]  # cell, step, steps, loss


@dataclass(frozen=True)
class Line:
    """Where a process works, and how it is heard and stopped.

    Attributes:
        folder, device, bf16: of the bench.
        threads: of torch.
        budget: seconds of its processor time; None: no bound.
        todo: gives it chains of cells; None: there are no more.
        news: takes `step`, `tell`, `done` or `failed`, and what belongs to it.
        stop: an event that ends it.
    """

    folder: Path
    device: torch.device
    bf16: bool
    threads: int
    budget: float | None
    todo: Any
    news: Any
    stop: Any


class Elsewhere(Exception):
    """What another process printed of its error."""


def train_at_once(
    cells: Sequence[tuple[Cell, str]],
    jobs: int,
    bench: Bench,
    report: Report | None,
    tell: Tell,
    budget: float | None,
) -> Iterator[tuple[Cell, Result | None]]:
    """Cells as they are trained, in any order; None for those for which the budget was too small.

    Args:
        cells: each with the command that makes it again.
        jobs: processes, at most.
        bench: its pictures are drawn; every process opens them itself.
        report, tell: are told in this process what the others do.
        budget: seconds of processor time of each process.

    Raises whatever a process raised, or `FoveateError` if one ended without a word; the others stop at their
    next step, as they do when this process ends.
    """
    context = multiprocessing.get_context("spawn")  # a fork cannot use a GPU that its parent has used
    todo, news, stop = context.Queue(), context.Queue(), context.Event()
    line = Line(bench.folder, bench.device, bench.bf16, torch.get_num_threads(), budget, todo, news, stop)
    wanted = chains(cells, bench)
    processes = [context.Process(target=_work, args=(line,)) for _ in range(min(jobs, len(wanted)))]
    todo.cancel_join_thread()  # what nobody takes any more is not waited for
    for chain in [*wanted, *[None] * len(processes)]:
        todo.put(chain)
    try:
        for process in processes:
            process.start()
        left = len(cells)
        while left:
            _check(processes)
            try:
                kind, *said = news.get(timeout=PAUSE)
            except queue.Empty:
                continue
            if kind == "step":
                if report is not None:
                    report(*said)
            elif kind == "tell":
                tell(*said)
            elif kind == "done":
                left -= 1
                yield said[0], said[1]
            else:
                raise said[0] from Elsewhere(said[1])
    finally:
        stop.set()
        while any(process.is_alive() for process in processes if process.pid is not None):
            with suppress(queue.Empty):
                news.get(timeout=PAUSE / 10)  # a process ends when all of its news are taken


def _check(processes: Sequence[Any]) -> None:
    """Raises `FoveateError` if one has ended, but not of its own accord: for lack of memory, say."""
    codes = [process.exitcode for process in processes if process.exitcode]
    if codes:
        raise FoveateError(
            f"a process that trained a cell has ended with exit code {codes[0]}, perhaps for lack of memory: "
            "fewer jobs need less; run again, it goes on"
        )


def chains(cells: Sequence[tuple[Cell, str]], bench: Bench) -> list[list[tuple[Cell, str]]]:
    """Cells that one process trains in turn, as the later ones take weights of the first."""
    made: dict[str, list[tuple[Cell, str]]] = {}
    for cell, command in cells:
        start, steps = shared_start(cell, bench)
        shared = start.name if steps else replace(cell, told=False).key
        made.setdefault(shared, []).append((cell, command))
    return list(made.values())


def _work(line: Line) -> None:
    """Trains chains until there are no more."""
    torch.set_num_threads(line.threads)
    logging.disable_progress_bar()  # of several processes, they would overwrite each other
    try:
        with controls():
            while not _stopped(line):
                try:
                    chain = line.todo.get(timeout=PAUSE)
                except queue.Empty:
                    continue
                if chain is None:
                    return
                for cell, command in chain:
                    line.news.put(("done", cell, _train(cell, command, line)))
    except KeyboardInterrupt:  # the process that asked for it says so
        return
    except Exception as error:  # noqa: BLE001  raised there
        line.news.put(("failed", error, traceback.format_exc()))


def _stopped(line: Line) -> bool:
    """Whether the process that asked for it wants no more, or has ended."""
    parent = multiprocessing.parent_process()
    return line.stop.is_set() or (parent is not None and not parent.is_alive())


def _train(cell: Cell, command: str, line: Line) -> Result | None:
    def report(step: int, steps: int, loss: float) -> None:
        if _stopped(line):
            raise OutOfTime
        line.news.put(("step", cell, step, steps, loss))

    def tell(what: str, done: int, total: int) -> None:
        line.news.put(("tell", what, done, total))

    parts = load_parts(cell.scale, line.folder)
    bench = make_bench(cell.level, cell.scale, line.folder, parts, tell, line.device)
    bench = replace(bench, bf16=line.bf16)
    left = None if line.budget is None else line.budget - time.process_time()
    return train_cell(cell, bench, report, command, left)
