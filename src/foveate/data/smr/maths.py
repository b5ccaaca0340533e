"""Converters of competition problems, geometry and tables."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

from foveate.data.smr.drafts import (
    LETTER,
    LETTERS,
    NO_OPTION,
    OTHER_ANSWER,
    SHORT,
    Draft,
    Fields,
    bare_option,
    chosen,
    contradicts,
    reasoned,
    with_options,
)
from foveate.data.smr.files import by_number, of_file, of_lines, of_object, of_table, required

MARK = re.compile(r"<image\d*>")  # where a part of the picture belongs in a text of MATH-Vision


def mathvision(folder: Path, _: random.Random) -> Iterator[Draft]:
    """MATH-Vision without its testmini, as the paper trains on it; the rest is the benchmark's test set.

    `test.jsonl` and `testmini.jsonl` with pictures below `images` (format: mathllm/MATH-V on GitHub), or
    Parquet files `test-*.parquet` and `testmini-*.parquet` with pictures in `decoded_image`
    (MathLLMs/MathVision on the Hugging Face hub). A record has id, question with `<image1>`, `<image2>` and
    so on where parts of its one picture belong, options (empty, or letters where the picture shows them),
    image, answer and solution.
    """
    mini = required(folder, ("testmini.jsonl", "data/testmini.jsonl", "data/testmini-*.parquet"))
    left_out = {fields.text("id") for fields in _problems(mini)}
    path = required(folder, ("test.jsonl", "data/test.jsonl", "data/test-*.parquet"))
    for fields in _problems(path):
        name = fields.text("id")
        if name in left_out:
            continue
        question, options = fields.text("question"), fields.texts("options")
        shown = not options or [bare_option(option) for option in options] != list(LETTERS[: len(options)])
        query = MARK.sub("", with_options(question, options if shown else []))
        answer, solution = fields.text("answer"), fields.text("solution", "")
        if not solution.strip():
            query += f"\n{LETTER if options else SHORT}"
        problem = None
        if options:
            number = chosen(answer, options)
            answer = LETTERS[number] if number is not None else ""
            problem = NO_OPTION if number is None else None
        picture = fields.record.get("decoded_image")
        picture = picture if isinstance(picture, bytes) else fields.text("image")
        yield Draft(fields.where, name, picture, query, reasoned(solution, answer), problem)


def _problems(path: Path) -> Iterator[Fields]:
    if path.suffix == ".jsonl":
        yield from of_lines(path)
        return
    for _, fields in of_table(path):
        yield fields


def geoqa3(folder: Path, _: random.Random) -> Iterator[Draft]:
    """GeoQA3: a file for each problem, `json/N.json`, and its picture, `image/N.png`. Texts are Chinese.

    A record has id, subject (the problem), choices, label (the number of the right one, from 0) and answer
    (the solution in words). Format: data.zip of chen-judge/GeoQA on GitHub.
    """
    for path in by_number(required(folder, ("json",)).glob("*.json")):
        fields = of_file(path)
        options, label = fields.texts("choices"), fields.whole("label")
        known, solution = 0 <= label < len(options), fields.text("answer", "")
        letter = LETTERS[label] if known else ""
        query = with_options(fields.text("subject"), options)
        if not solution.strip():
            query += f"\n{LETTER}"
        problem = None if known else NO_OPTION
        if known and contradicts(solution, letter):
            problem = OTHER_ANSWER
        answer = reasoned(solution, letter)
        yield Draft(
            fields.where, fields.text("id", path.stem), f"image/{path.stem}.png", query, answer, problem
        )


def geometry3k(folder: Path, _: random.Random) -> Iterator[Draft]:
    """Geometry3K: a folder for each problem, `N/data.json` and `N/img_diagram.png`, itself or in `train`.

    A record has problem_text, choices and answer, a letter. Format: train.zip of lupantech/InterGPS on
    GitHub.
    """
    train = folder / "train" if (folder / "train").is_dir() else folder
    below = "train/" if train != folder else ""
    found = [path for path in by_number(train.iterdir()) if (path / "data.json").is_file()]
    if not found:
        required(train, ("0/data.json",))
    for path in found:
        fields = of_file(path / "data.json")
        options = fields.texts("choices")
        answer = chosen(fields.text("answer"), options)
        yield Draft(
            fields.where,
            path.name,
            f"{below}{path.name}/img_diagram.png",
            f"{with_options(fields.text('problem_text'), options)}\n{LETTER}",
            "" if answer is None else LETTERS[answer],
            NO_OPTION if answer is None else None,
        )


def tabmwp(folder: Path, _: random.Random) -> Iterator[Draft]:
    """TabMWP, its training split: the table is in the picture, the solution is the reasoning.

    `problems_train.json` is an object of records by their ids, with pictures at `tables/ID.png`. A record has
    question, choices (null or a list), answer (a text; of choices, the right one itself), unit and solution.
    Format: data/tabmwp of lupantech/PromptPG on GitHub.
    """
    for name, fields in of_object(required(folder, ("problems_train.json",))):
        question, unit = fields.text("question"), fields.text("unit", "")
        if unit.strip():
            question = f"{question.strip()} (unit: {unit.strip()})"
        answer, solution, problem = fields.text("answer"), fields.text("solution", ""), None
        query = question.strip()
        if fields.has("choices"):
            options = fields.texts("choices")
            number = chosen(answer, options)
            query = with_options(question, options)
            problem = NO_OPTION if number is None else None
            answer = LETTERS[number] if number is not None else ""
        if not solution.strip():
            query += f"\n{LETTER if fields.has('choices') else SHORT}"
        yield Draft(fields.where, name, f"tables/{name}.png", query, reasoned(solution, answer), problem)
