"""Lengths of questions and answers, as Figure 4 of arXiv 2406.08487 compares them, and their drawing."""

from __future__ import annotations

import math
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


def require_drawing() -> None:
    """Raises `FoveateError` where matplotlib is not installed."""
    require("matplotlib", "lab", "the figure of lengths")


def draw(sets: dict[str, Lengths], out: Path, format: str) -> None:
    """Draws the shares of samples by the lengths of queries and answers.

    The axes end where 99 % of the first set's samples lie, as in the paper; the legend counts longer ones.

    Args:
        sets: by name; at least one, none empty.
        out: the file.
        format: of the file: png, svg, pdf.
    """
    require_drawing()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    axes: Sequence[Any] = figure.subplots(1, 2)
    first = next(iter(sets.values()))
    for axis, name in zip(axes, ("queries", "answers"), strict=True):
        end = max(1, math.ceil(np.quantile(getattr(first, name), SHARE)))
        width = math.ceil(end / BINS)  # whole words: bins of other widths would hold one number or two
        edges = np.arange(0, end + width + 1, width) - 0.5
        for label, lengths in sets.items():
            values = np.array(getattr(lengths, name))
            shares = 100 * np.histogram(values, edges)[0] / len(values)
            longer = 100 * np.mean(values > edges[-1])
            text = f"{label}: mean {values.mean():.1f}, {longer:.0f} % beyond"
            axis.stairs(shares, edges, label=text, linewidth=1.4)
        axis.set_xlabel(f"words of {name}, all turns of a sample together")
        axis.set_ylabel("samples in %")
        axis.set_xlim(0, end)
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1))  # above the curves
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    with explained(out):
        figure.savefig(out, format=format, dpi=150)
