"""Runs commands in a folder whose disk is full, then with room: `python -m tests.full_disk FOLDER`.

FOLDER is a disk of its own, whose size this process may change. The last line that it prints is a JSON object
of what happened; `tests/test_files.py` makes the disk and reads it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import foveate
from foveate import FoveateError
from foveate.ask.foveate import EMBEDDED
from foveate.data.toy import write_toy_data
from foveate.lab.data import examples
from foveate.lab.levels import level_named
from foveate.tiny import tiny_model
from tests.command import foveate as foveate_command
from tests.train.support import same, two_stages, weights


def room(kilobytes: int) -> None:
    """Leaves about this much free space on the disk."""
    used = sum(file.stat().st_blocks for file in Path().rglob("*")) // 2
    options = f"remount,size={used + kilobytes}k"
    subprocess.run(["mount", "-o", options, str(Path.cwd())], check=True)


def command(*arguments: str) -> tuple[int, str, list[str]]:
    """Exit code, the errors, and what lies in the folder."""
    done = foveate_command(*arguments)
    return done.code, " ".join(done.stderr.split()), sorted(path.name for path in Path().iterdir())


def twice(name: str, kilobytes: int, arguments: Sequence[str]) -> dict[str, Any]:
    """A command without room, and again with room; the disk is empty afterwards."""
    room(kilobytes)
    first = command(*arguments)
    room(50_000)
    return {name: first, f"{name} again": command(*arguments)}


def clear() -> None:
    subprocess.run(["find", ".", "-mindepth", "1", "-delete"], check=True)


def saved() -> list[Any]:
    """A model is written over another, without room."""
    room(50_000)
    first = tiny_model("llava")
    first.save("save")
    room(100)
    try:
        tiny_model("llava", seed=1).save("save")
        said = ""
    except FoveateError as error:
        said = str(error)
    found = foveate.load("save", dtype="float32", device="cpu").model.state_dict()
    return [said, same(found, dict(first.model.state_dict())), sorted(path.name for path in Path().iterdir())]


def drawn() -> str:
    """The lab's pictures, 2.8 MB, without room."""
    room(800)
    try:
        examples(Path("lab"), level_named("easy"), 48, 1.0, "train", 400, 0)
    except FoveateError as error:
        return str(error)
    return ""


def everything(elsewhere: Path) -> dict[str, Any]:
    data = write_toy_data(elsewhere / "toy", 6)
    found: dict[str, Any] = {}
    for name, kilobytes, arguments in (
        ("compose", 300, ["compose", "compose", "--tiny"]),
        ("convert", 300, ["convert", str(EMBEDDED), "convert"]),
        ("annotate", 4, ["annotate", str(data), "--out", "annotate.jsonl", "--check", "0"]),
    ):
        found |= twice(name, kilobytes, arguments)
        clear()
    recipe = two_stages(elsewhere, n=12)
    command("train", str(recipe))
    found |= twice("train", 1500, ["train", str(recipe), "output=train"])
    found["same weights as without interruption"] = same(
        weights(elsewhere / "run" / "model"), weights(Path("train") / "model")
    )
    clear()
    found["save"] = saved()
    clear()
    found["lab"] = drawn()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.chdir(sys.argv[1])
    with tempfile.TemporaryDirectory(dir="/var/tmp") as other:
        print(json.dumps(everything(Path(other))))  # noqa: T201
