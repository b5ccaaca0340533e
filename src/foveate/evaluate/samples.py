"""A user's own questions with their answers, from files, shards and data sets.

    {"id", "image", "question", "answer" or "answers", "options", "box", "group", "category"}

`image` is a path from the folder of pictures on, or a `data:` URL; a list of one is taken. Answers may be
numbers. `options` are a list, lettered from A, or letters with their texts. `box` is left, top, right, bottom
in pixels of the original picture. `group` and `category` are for metrics of pairs and for scores by kind. All
but picture and question may be missing. Records of conversations (`foveate.data.formats`) give one sample for
each question and its answer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from foveate.data.formats import TURNS, located, open_records, to_messages
from foveate.data.shards import OnHub, Rows
from foveate.errors import FoveateError
from foveate.picture.geometry import Box

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FIELDS = ("id", "image", "images", "question", "answer", "answers", "options", "box", "group", "category")
ASK_OPTION = "Answer with the option's letter from the given choices directly."  # LLaVA-1.5's


@dataclass(frozen=True)
class Sample:
    """One question about one picture.

    Attributes:
        where: its place in the data, for messages.
        id: unique in the data.
        row: number of its record.
        question: with its options, as the model is asked.
        answers: of people, none if there is nothing to compare with.
        options: letter -> text.
        box: that the answer rests on, in original pixels.
        group: whose questions make a pair.
        category: for scores by kind.
    """

    where: str
    id: str
    row: int
    question: str
    answers: tuple[str, ...] = ()
    options: Mapping[str, str] | None = None
    box: Box | None = None
    group: str | None = None
    category: str | None = None


@dataclass(frozen=True)
class Questions:
    """Checked data.

    Attributes:
        path: of the data; of a data set on the hub, its id.
        images: folder of its pictures.
        samples: those that are asked, in order.
        digest: of all records.
        hub: where on the hub it is, if it is there.
    """

    path: Path
    images: Path
    samples: list[Sample]
    digest: str
    rows: Rows = field(repr=False)
    hub: OnHub | None = None

    def picture(self, sample: Sample) -> str | bytes:
        """A sample's picture, as `read_picture` takes it."""
        return picture_of(self.rows.record(sample.row), self.images)


def read_questions(
    path: str | Path | OnHub,
    images: str | Path | None = None,
    limit: int | None = None,
    seed: int | None = None,
) -> Questions:
    """Reads and checks samples; the pictures that they name must exist.

    Args:
        path: `.jsonl`, `.json`, or shards as `foveate.data.shards` reads them, on the hub, too.
        images: folder that picture paths start from and must stay in; by default the data's own.
        limit: the most samples to take.
        seed: which ones are taken and in which order; by default the first ones.

    Raises:
        FoveateError: broken data, a missing or foreign picture, an id that comes twice; the message names the
            record.
    """
    if limit is not None and limit < 1:
        raise FoveateError(f"limit must be at least 1, not {limit}")
    found: list[Sample] = []
    places: dict[str, str] = {}

    def note(record: Any, index: int, where: str, folder: Path) -> None:
        for sample in samples_of(record, index, where, folder):
            if sample.id in places:
                raise FoveateError(f"id {sample.id!r} is also that of {places[sample.id]}: give each its own")
            places[sample.id] = where
            found.append(sample)

    hub = path if isinstance(path, OnHub) else None
    data = Path(path) if not isinstance(path, OnHub) else path
    records = open_records(data, None if images is None else Path(images), note)
    if seed is not None:
        random.Random(seed).shuffle(found)
    return Questions(records.path, records.images, found[:limit], records.digest, records.rows, hub)


def samples_of(record: Any, index: int, where: str, images: Path) -> Iterator[Sample]:
    """The samples of a record. Raises `FoveateError` for what is wrong with it, without its place.

    Args:
        record: as a line of a file has it.
        index: its number in the data.
        where: its place in the data, for messages.
        images: folder that picture paths start from and must stay in.
    """
    if not isinstance(record, Mapping):
        raise FoveateError("is not an object")
    picture = picture_of(record, images)
    if isinstance(picture, str):
        _check_inside(picture, images)
    name = str(record.get("id", index))
    rest = (_box(record.get("box")), _text(record, "group"), _text(record, "category"))
    if "question" in record:
        answers, options = _answers(record), _options(record.get("options"))
        question = str(record["question"]).strip()
        if not question:
            raise FoveateError("has an empty question")
        if options:
            question = "\n".join([question, *(f"{k}. {v}" for k, v in options.items()), ASK_OPTION])
        yield Sample(where, name, index, question, answers, options, *rest)
        return
    if not any(key in record for key in TURNS):
        raise FoveateError("has neither a question nor a conversation")
    messages = to_messages(record, images)
    pairs = [(one, after) for one, after in pairwise(messages) if one["role"] == "user"]
    if not pairs:
        raise FoveateError("has neither a question nor a conversation with an answer")
    for number, (asked, told) in enumerate(pairs):
        its = name if len(pairs) == 1 else f"{name}/{number}"
        yield Sample(where, its, index, _said(asked), (_said(told),), None, *rest)


def _said(message: Mapping[str, Any]) -> str:
    return " ".join(part["text"].strip() for part in message["content"] if part["type"] == "text")


def picture_of(record: Mapping[str, Any], images: Path) -> str | bytes:
    """A record's picture, as `read_picture` takes it. Raises `FoveateError` if it has none, or several."""
    given = record.get("image", record.get("images"))
    if isinstance(given, Sequence) and not isinstance(given, (str, bytes)):
        if len(given) != 1:
            raise FoveateError(f"has {len(given)} pictures: a question is about one")
        (given,) = given
    if isinstance(given, Mapping):  # as datasets keep them
        given = given.get("bytes") or given.get("path")
    if not isinstance(given, (str, bytes)) or not given:
        raise FoveateError("has no picture: its image should be a path")
    return located(given, images)


def _check_inside(picture: str, images: Path) -> None:
    path = Path(picture)
    try:
        inside = path.resolve().is_relative_to(images.resolve())
        there = path.is_file()
    except (OSError, ValueError):
        inside, there = True, False
    if not inside:
        raise FoveateError(f"has a picture outside of the folder {images}: name a folder that holds it")
    if not there:
        raise FoveateError(f"has no picture at {path}")


def _answers(record: Mapping[str, Any]) -> tuple[str, ...]:
    given = record.get("answers", record.get("answer"))
    if given is None:
        return ()
    several = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    return tuple(_written(one.get("answer") if isinstance(one, Mapping) else one) for one in several)


def _written(value: Any) -> str:
    """An answer as text: 7 and 7.0 are both "7"."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if not isinstance(value, (str, int, float)):
        raise FoveateError(f"has the answer {value!r:.60}: it should be a text or a number")
    return str(value)


def _options(given: Any) -> dict[str, str] | None:
    if not given:
        return None
    if isinstance(given, Mapping):
        options = {str(k): _written(v) for k, v in given.items() if v is not None}
    elif isinstance(given, Sequence) and not isinstance(given, str) and len(given) <= len(LETTERS):
        options = dict(zip(LETTERS, map(_written, given), strict=False))
    else:
        raise FoveateError("has options that are neither a list nor letters with texts")
    if unknown := [letter for letter in options if letter not in LETTERS or len(letter) != 1]:
        raise FoveateError(f"has an option {unknown[0]!r}: their names are the letters from A on")
    return options


def _box(given: Any) -> Box | None:
    if given is None:
        return None
    numbers = isinstance(given, Sequence) and all(
        isinstance(n, (int, float)) and not isinstance(n, bool) for n in given
    )
    if not numbers or len(given) != 4 or not (given[0] < given[2] and given[1] < given[3]):
        raise FoveateError(f"has the box {given!r:.60}: it should be left, top, right, bottom in pixels")
    return Box(*given)


def _text(record: Mapping[str, Any], key: str) -> str | None:
    return None if record.get(key) is None else str(record[key])
