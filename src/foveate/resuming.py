"""Work in batches that several processes share and that goes on after a kill.

Each process appends to a file of its own, one line a batch: {"batch": its number, "records": its results}. A
line is whole or, if a kill has torn it, cut off before the work goes on.
"""

from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch

from foveate.errors import FoveateError, require


class Processes(Protocol):
    """The interface of `accelerate.PartialState`; a single process does not need accelerate."""

    process_index: int
    num_processes: int

    def wait_for_everyone(self) -> None: ...


class Alone:
    """One process."""

    process_index, num_processes = 0, 1

    def wait_for_everyone(self) -> None:
        """There are no other processes."""


def processes() -> Processes:
    """The processes of this run: those launched by torchrun or accelerate, on one machine or several."""
    if "WORLD_SIZE" not in os.environ:
        return Alone()
    require("accelerate", "annotate", "work shared by several processes")
    from accelerate import PartialState

    on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    return PartialState(cpu=on_cpu, timeout=timedelta(days=30))  # the slowest may take long


def cut_torn_line(part: Path) -> None:
    """Shortens a file of lines, if it exists, by a last one that a kill has torn."""
    if part.exists():
        os.truncate(part, _lines(part, part.read_bytes())[1])


def _lines(part: Path, content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The lines of a part and where they end; a torn last line does not count."""
    found, end = [], 0
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        try:
            value = json.loads(line) if line.endswith(b"\n") else None
        except (json.JSONDecodeError, UnicodeDecodeError):
            value = None
        if not isinstance(value, dict) or not {"batch", "records"} <= value.keys():
            if end + len(line) < len(content):
                raise FoveateError(
                    f"{part} line {number} is broken: delete the folder {part.parent} and start anew"
                )
            break
        found.append(value)
        end += len(line)
    return found, end


def batches_done(parts: Path) -> dict[int, list[dict[str, Any]]]:
    """Batch -> its records, from the files of all processes."""
    done = {}
    for part in sorted(parts.glob("*.jsonl")):
        done.update({line["batch"]: line["records"] for line in _lines(part, part.read_bytes())[0]})
    return done
