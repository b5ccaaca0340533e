"""A trained cell as a separate model, which `foveate.load` reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from foveate.ask.foveate import Foveate, load
from foveate.errors import FoveateError
from foveate.lab.cell import Cell, make_bench
from foveate.lab.controls import CONTROLS
from foveate.lab.conversing import make_student
from foveate.lab.parts import load_parts


def export(
    cell: Cell,
    folder: Path,
    out: Path,
    options: Mapping[str, Any] | None = None,
    command: str | None = None,
) -> None:
    """Writes the model of a cell that `run` has trained, in float16.

    Args:
        cell: the trained cell.
        folder: where the lab keeps everything.
        out: folder to write.
        options: changes to the method's options, for pictures unlike the lab's.
        command: the command that trains the cell, for the error if it is missing; by default `cell.command`.

    Raises:
        FoveateError: the cell is not trained, is a control, or the options are wrong.
    """
    if cell.method in CONTROLS:
        raise FoveateError(f"{cell.method} is a control: only the lab knows it")
    bench = make_bench(cell.level, cell.scale, folder, load_parts(cell.scale, folder))
    weights = bench.cells(cell.scale) / cell.key / "weights.pt"
    if not weights.is_file():
        raise FoveateError(f"{weights} is missing: run `{command or cell.command}` first")
    student = make_student(cell, bench)
    student.model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True), strict=False)
    Foveate(student.model.half(), student.processor).save(out)
    if options:
        load(out, dtype="float16", device="cpu", options=options).save(out)
