"""How far the lab is: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import Progress

SECONDS = 30.0  # between two lines about the same work


class Telling(Protocol):
    def __call__(self, what: str, done: int, total: int | None, note: str = "") -> None:
        """Work by its name, how much of it is done, and a note such as its loss."""


@contextmanager
def telling(console: Console) -> Iterator[Telling]:
    """Bars, if the console is a terminal; else a line at the start and the end of each work, and in between
    one every `SECONDS`."""
    if console.is_terminal:
        with Progress(console=console) as progress:
            yield _bars(progress)
    else:
        yield _lines(console)


def _bars(progress: Progress) -> Telling:
    tasks: dict[str, Any] = {}

    def tell(what: str, done: int, total: int | None, note: str = "") -> None:
        if what not in tasks:
            tasks[what] = progress.add_task(what, total=total)
        description = f"{what}, {note}" if note else what
        progress.update(tasks[what], completed=done, total=total, description=description)

    return tell


def _lines(console: Console) -> Telling:
    last: dict[str, float] = {}

    def tell(what: str, done: int, total: int | None, note: str = "") -> None:
        now = time.monotonic()
        if what in last and done != total and now - last[what] < SECONDS:
            return
        last[what] = now
        how_far = str(done) if total is None else f"{done} of {total}"
        console.print(": ".join([what, ", ".join([how_far, *([note] if note else [])])]), soft_wrap=True)

    return tell
