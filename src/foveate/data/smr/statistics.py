"""Lengths of questions and answers, as Figure 4 of arXiv 2406.08487 compares them, and their drawing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from foveate.data.streaming import lines, listed
from foveate.errors import FoveateError, require
from foveate.files import explained

WORD = re.compile(r"[\u3400-\u9fff]|[^\s\u3400-\u9fff]+")  # each Chinese character is one
MARK = "<image>"
SHARE = 0.99  # of the first data set whose lengths are drawn
BINS = 40
ROLES = {"human": 0, "user": 0, "gpt": 1, "assistant": 1}


@dataclass
class Lengths:
    """Words of the questions and of the answers of a data set's samples, each with all its turns."""

    queries: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)

    def add(self, query: str, answer: str) -> None:
        self.queries.append(words(query))
        self.answers.append(words(answer))

    def __len__(self) -> int:
        return len(self.queries)

    def summary(self) -> dict[str, float]:
        """Means and medians, for the report."""
        found: dict[str, float] = {"samples": len(self)}
        for name, values in (("query", self.queries), ("answer", self.answers)):
            found[f"{name}_words_mean"] = round(float(np.mean(values)), 2) if values else 0.0
            found[f"{name}_words_median"] = float(np.median(values)) if values else 0.0
        return found


def words(text: str) -> int:
    """The number of words of a text, the picture's mark aside."""
    return len(WORD.findall(text.replace(MARK, " ")))


def lengths_of(path: Path) -> Lengths:
    """Of a file in LLaVA's format, read record by record; several turns of a record count as one.

    Raises `FoveateError` with the place of a record that is none.
    """
    if not path.is_file():
        raise FoveateError(f"no data file at {path}")
    found = Lengths()
    if path.suffix == ".jsonl":
        records = ((place, record) for _, _, place, record in lines(path))
    else:
        records = ((item.place, item.value) for item in listed(path))
    for place, record in records:
        turns = record.get("conversations") if isinstance(record, dict) else None
        if not isinstance(turns, list):
            raise FoveateError(f"{path} {place}: it has no 'conversations'")
        said = [0, 0]
        for turn in turns:
            if isinstance(turn, dict) and turn.get("from") in ROLES and isinstance(turn.get("value"), str):
                said[ROLES[turn["from"]]] += words(turn["value"])
        found.queries.append(said[0])
        found.answers.append(said[1])
    return found


def draw(sets: dict[str, Lengths], out: Path, format: str) -> None:
    """Draws the shares of samples by the lengths of queries and answers.

    The axes end where 99 % of the first set's samples lie, as in the paper; longer ones are in the last bin.

    Args:
        sets: by name; at least one, none empty.
        out: the file.
        format: of the file: png, svg, pdf.
    """
    require("matplotlib", "lab", "the figure of lengths")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes: Sequence[Any] = figure.subplots(1, 2)
    first = next(iter(sets.values()))
    for axis, name in zip(axes, ("queries", "answers"), strict=True):
        reference = getattr(first, name)
        end = max(1.0, float(np.quantile(reference, SHARE)))
        edges = np.linspace(0, end, BINS + 1)
        middles = (edges[1:] + edges[:-1]) / 2
        for label, lengths in sets.items():
            values = np.minimum(getattr(lengths, name), end)
            shares = np.histogram(values, edges)[0] / len(values)
            axis.plot(middles, 100 * shares, label=f"{label} (mean {np.mean(getattr(lengths, name)):.1f})")
        axis.set_xlabel(f"words of {name}, all turns of a sample together")
        axis.set_ylabel("samples in %")
        axis.set_xlim(0, end)
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    with explained(out):
        figure.savefig(out, format=format, dpi=150)
