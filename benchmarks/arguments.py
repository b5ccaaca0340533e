"""What the benchmarks take on their command lines: whole numbers, checked early, and files."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch


class Whole(NamedTuple):
    """A whole number, or several, that a benchmark is given.

    Attributes:
        default: what is measured without it; of several numbers a tuple.
        least: the smallest that makes sense.
        step: what has to divide it.
        help: what it counts.
    """

    default: int | tuple[int, ...]
    least: int = 1
    step: int = 1
    help: str | None = None

    def __call__(self, text: str) -> int:
        """The number that a text says; argparse makes a sentence of the error."""
        if not text.isdecimal() or int(text) < self.least or int(text) % self.step:
            multiple = f" and a multiple of {self.step}" if self.step > 1 else ""
            raise argparse.ArgumentTypeError(
                f"{text!r} should be a whole number of at least {self.least}{multiple}"
            )
        return int(text)


def arguments(
    doc: str | None, rounds: int, places: Mapping[str, str] | None = None, **others: Whole
) -> argparse.Namespace:
    """Reads the command line of a benchmark, and sets torch's threads.

    Args:
        doc: the benchmark's docstring, whose first line says what it is.
        rounds: how often everything is timed, after one warm-up; `--rounds` by default.
        places: files and folders by name, with what they are for; None by default.
        **others: by name, with `_` where the command line has `-`.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    known = {
        "rounds": Whole(rounds, help="after one warm-up"),
        "threads": Whole(torch.get_num_threads(), help="of torch"),
        **others,
    }
    for name, whole in known.items():
        several = {"nargs": len(whole.default)} if isinstance(whole.default, tuple) else {}
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=whole, default=whole.default, help=whole.help, **several)
    for name, use in (places or {}).items():
        parser.add_argument(f"--{name}", type=Path, help=use)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    return given
