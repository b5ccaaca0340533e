"""Runs the command line in a copy of this process: a new interpreter would spend eight seconds on imports.

A copy can be killed, holds locks of its own and is one of several devices, like any process.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from foveate.cli import main
from tests.command import Result


class Forked:
    """A running copy of this process.

    Args:
        work: what it does; its exit code is 0, that of a `SystemExit`, or 1 after any other error.
        output: where its standard output and errors go; nowhere by default.
        errors: where its errors go instead.
        environment: variables that it has beside those of this process.
    """

    def __init__(
        self,
        work: Callable[[], object],
        output: Path | None = None,
        environment: Mapping[str, str] | None = None,
        errors: Path | None = None,
    ) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                os.environ.update(environment or {})
                AcceleratorState._reset_state(reset_partial_state=True)  # who this process trained with
                torch.set_num_threads(1)  # threads of this process are not in its copies
                _write_to(output or Path(os.devnull), errors)
                code = _exit_code(work)
            finally:
                os._exit(code)

    def poll(self) -> int | None:
        """The exit code; None while it runs; minus a signal that ended it."""
        return self._waited(os.WNOHANG)

    def wait(self) -> int:
        """Waits for its end, and returns the exit code."""
        code = self._waited(0)
        assert code is not None
        return code

    def kill(self) -> None:
        """`kill -9`"""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def _waited(self, how: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, how)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def foveate(
    *arguments: object,
    output: Path | None = None,
    environment: Mapping[str, str] | None = None,
    errors: Path | None = None,
) -> Forked:
    """`foveate` with these arguments, started."""
    sys_argv = ["foveate", *map(str, arguments)]

    def work() -> None:
        sys.argv = sys_argv
        main()

    return Forked(work, output, environment, errors)


def on_devices(number: int, *arguments: object, folder: Path) -> Result:
    """`foveate` on several devices, started as torchrun does; all that they print, kept in a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    outputs = [folder / f"device-{rank}.txt" for rank in range(number)]
    processes = [
        foveate(*arguments, output=output, environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, output in enumerate(outputs)
    ]
    code = max(abs(process.wait()) for process in processes)
    said = "".join(output.read_text() for output in outputs)
    return Result(code, said, said)


def _write_to(output: Path, errors: Path | None) -> None:
    """What this process and its own children print goes there."""
    for number, path in ((1, output), (2, errors)):
        opened = 1 if path is None else os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.stdin = open(os.devnull)  # noqa: SIM115
    logging.raiseExceptions = False  # handlers of this process write to its own streams


def _exit_code(work: Callable[[], object]) -> int:
    try:
        work()
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:  # noqa: BLE001 - as Python itself ends a process
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0
