"""Files of regions of interest: the part of the picture that each question of a data file is about.

Two kinds of file; records count from 0 in the data file, questions from 0 in their record:

    .json   {"000012_coco_7_q0": {"params": [top, left, side]}}: record 12, whose id is coco/7, question 0,
            and a square in pixels of the original picture
    .jsonl  one {"index": 12, "id": "coco/7", "number": 0, "box": [left, top, right, bottom]} a line, in the
            same pixels; a "number" of null stands for the picture without any question

Both are written by `foveate.annotate`. Malformed entries are left out, counted and named; so are, once the
data are read, regions of records and questions that do not exist, and regions outside their picture.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from foveate.errors import FoveateError
from foveate.picture.geometry import Box

KEY = re.compile(r"(\d+)_(.*)_q(\d+)", re.DOTALL)
WANTED = {"index", "id", "number", "box"}
NAMED = 5  # malformed entries that are named; all are counted
LARGEST = 2**62  # above any record's or question's number
ALL = -1  # question number of a region for the whole picture

# Reads an entry: record, id, question and box. Raises `ValueError` with the problem.
Entry: TypeAlias = Callable[[], tuple[int, str, int, Box]]


class Regions:
    """The regions of a file, found by record and question.

    Attributes:
        path: the file.
        malformed: how many entries are left out.
        named: the first of them, each with its problem.
        useless: how many regions nothing can be learnt from, counted by `leave_out`.
    """

    def __init__(self, path: str | Path) -> None:
        """Reads and checks a file. Raises `FoveateError` if it is missing, of another kind or empty."""
        self.path = Path(path)
        try:
            found = self.path.is_file()
        except OSError:  # a name that is too long, say
            found = False
        if not found:
            raise FoveateError(f"no file of regions at {self.path}")
        if self.path.suffix not in (".json", ".jsonl"):
            raise FoveateError(f"{self.path} must end in .json (keys with params) or .jsonl (one box a line)")
        self.malformed, self.useless, self.named = 0, 0, list[str]()
        read = _squares if self.path.suffix == ".json" else _boxes
        places, ids, boxes = [], [], []
        for where, entry in read(self.path):
            try:
                record, name, question, box = entry()
            except ValueError as error:
                self.malformed += 1
                self.named += [f"{where}: {error}"] if len(self.named) < NAMED else []
                continue
            places.append((record, question))
            ids.append(_mark(name))
            boxes.append(box)
        if not places:
            why = f"; {self.named[0]}" if self.named else ""
            raise FoveateError(f"{self.path} holds no regions{why}")
        keys = np.array(places, dtype=np.int64)
        order = np.lexsort((keys[:, 1], keys[:, 0]))
        again = (np.diff(keys[order], axis=0, prepend=-2) == 0).all(1)  # the first one counts
        for record, question in keys[order][again].tolist():
            self.malformed += 1
            what = "the picture alone" if question == ALL else f"question {question}"
            self.named += [f"record {record}: a second region of {what}"] if len(self.named) < NAMED else []
        order = order[~again]
        self._places = keys[order]  # (n, 2) record and question
        self._ids = np.array(ids, dtype=np.uint64)[order]
        self._boxes = np.array(boxes, dtype=np.float64)[order]  # (n, 4)

    def __len__(self) -> int:
        return len(self._places)

    def of(self, record: int, name: str) -> dict[int | None, Box]:
        """Question -> its region as annotated, of one record; None: the region without a question.

        Args:
            record: its place in the data file.
            name: its id there.

        Raises:
            FoveateError: the file has this record under another id.
        """
        first, last = np.searchsorted(self._places[:, 0], [record, record + 1])
        if (self._ids[first:last] != _mark(name)).any():
            raise FoveateError(
                f"{self.path} has record {record} under another id: it belongs to another data file"
            )
        return {
            None if question == ALL else int(question): Box(*map(float, box))
            for (_, question), box in zip(self._places[first:last], self._boxes[first:last], strict=True)
        }

    def beyond(self, records: int) -> list[str]:
        """The problems of regions whose record is not in a data file with this number of records."""
        first = np.searchsorted(self._places[:, 0], records)
        return [f"there is no record {record}" for record, _ in self._places[first:].tolist()]

    def leave_out(self, problems: Sequence[str]) -> None:
        """Counts regions that nothing can be learnt from, and names the first by their problems."""
        self.useless += len(problems)
        self.named += problems[: NAMED - len(self.named)]

    def report(self) -> str:
        """The number of regions and what was left out, in one or more lines."""
        lines = [f"{len(self) - self.useless} regions in {self.path}"]
        if out := self.malformed + self.useless:
            lines.append(f"{out} malformed entries left out: {'; '.join(self.named)}")
        return "\n".join(lines)


def _mark(name: str) -> int:
    """64 bits of an id; keys of squares replace its / by _."""
    return int.from_bytes(
        blake2b(name.replace("/", "_").encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big"
    )


class _Pairs(list[tuple[str, Any]]):
    """A JSON object whose keys may repeat."""


def _squares(path: Path) -> Iterator[tuple[str, Entry]]:
    try:
        entries = json.loads(path.read_bytes(), object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise FoveateError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(entries, _Pairs):
        raise FoveateError(f'{path} should hold a JSON object of keys such as "000012_coco_7_q0"')
    for key, value in entries:
        yield repr(key[:80]), partial(_square, key, dict(value) if isinstance(value, _Pairs) else value)


def _boxes(path: Path) -> Iterator[tuple[str, Entry]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"line {number}", partial(_box, line)


def _square(key: str, value: Any) -> tuple[int, str, int, Box]:
    found = KEY.fullmatch(key)
    if found is None:
        raise ValueError("the key is not of the form 000012_coco_7_q0")
    if not isinstance(value, dict) or "params" not in value:
        raise ValueError("it has no params")
    top, left, side = _numbers(value["params"], "params", ("top", "left", "side"))
    if side <= 0:
        raise ValueError(f"a side of {side:g} leaves no area")
    return _number(int(found[1])), found[2], _number(int(found[3])), Box(left, top, left + side, top + side)


def _box(line: bytes) -> tuple[int, str, int, Box]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("it is not valid JSON") from None
    if not isinstance(entry, dict) or not entry.keys() >= WANTED:
        raise ValueError("it must be a JSON object with index, id, number and box")
    if entry["box"] is None:
        raise ValueError(f"it has no box: {entry.get('problem')}")
    record = _number(entry["index"])
    question = ALL if entry["number"] is None else _number(entry["number"])
    left, top, right, bottom = _numbers(entry["box"], "box", Box._fields)
    if left >= right or top >= bottom:
        raise ValueError("the box has no area")
    return record, str(entry["id"]), question, Box(left, top, right, bottom)


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < LARGEST:
        raise ValueError("index and number must be whole numbers from 0")
    return value


def _numbers(values: Any, name: str, wanted: Sequence[str]) -> list[float]:
    expected = f"{name} must be [{', '.join(wanted)}], finite numbers, not {str(values)[:60]}"
    if not isinstance(values, list) or len(values) != len(wanted):
        raise ValueError(expected)
    if not all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in values):
        raise ValueError(expected)
    try:
        numbers = [float(n) for n in values]
    except OverflowError:
        raise ValueError(expected) from None
    if not all(map(math.isfinite, numbers)):
        raise ValueError(expected)
    return numbers
