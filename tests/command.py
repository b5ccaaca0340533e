"""Runs the command line in this process: a new one would spend four seconds on imports."""

from __future__ import annotations

import io
import os
import pty
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from threading import Thread
from unittest.mock import patch

import typer.main

from foveate.cli import main

# Reading all signatures of the command line takes longer than most commands.
_command = cache(typer.main.get_command)


@dataclass(frozen=True)
class Result:
    """What a command printed, and its exit code."""

    code: int
    stdout: str
    stderr: str


def foveate(*arguments: object, stdin: str = "") -> Result:
    """`foveate` with these arguments, on a terminal of 80 columns, as its entry point runs it."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["foveate", *map(str, arguments)]
    with (
        patch.object(sys, "argv", argv),
        patch.object(sys, "stdin", io.StringIO(stdin)),
        patch.dict("os.environ", {"COLUMNS": "80"}),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        code = _exit_code()
    return Result(code, out.getvalue(), err.getvalue())


def on_a_terminal(*arguments: object, stdin: str = "") -> tuple[int, str]:
    """The same with standard output on a pseudo-terminal: exit code, and what the terminal got."""
    master, slave = pty.openpty()
    got: list[bytes] = []

    def read() -> None:
        while True:
            try:
                data = os.read(master, 1 << 16)
            except OSError:  # closed at the other end
                return
            if not data:
                return
            got.append(data)

    reader = Thread(target=read)
    reader.start()
    argv = ["foveate", *map(str, arguments)]
    with (
        open(slave, "w", encoding="utf-8") as terminal,
        patch.object(sys, "argv", argv),
        patch.object(sys, "stdin", io.StringIO(stdin)),
        patch.dict("os.environ", {"COLUMNS": "80", "TERM": "dumb"}),
        redirect_stdout(terminal),
        redirect_stderr(io.StringIO()),
    ):
        assert sys.stdout.isatty()
        code = _exit_code()
    reader.join()
    os.close(master)
    return code, b"".join(got).decode().replace("\r\n", "\n")


def _exit_code() -> int:
    try:
        with patch.object(typer.main, "get_command", _command):
            main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0
