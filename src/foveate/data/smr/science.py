"""Converters of scientific figures, school subjects and textbooks."""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator
from pathlib import Path

from foveate.data.smr.drafts import (
    LETTER,
    LETTERS,
    NO_OPTION,
    OTHER_ANSWER,
    Draft,
    Fields,
    chosen,
    contradicts,
    reasoned,
    with_options,
)
from foveate.data.smr.files import by_number, of_file, of_lines, of_list, of_object, of_table, required
from foveate.errors import FoveateError
from foveate.shipped import lines_of

INSTRUCTIONS = tuple(lines_of("data", "smr", "instructions.txt"))
NO_LETTERS = "the picture lacks the letters that its question names"


def arxivqa(folder: Path, _: random.Random) -> Iterator[Draft]:
    """Arxiv-QA: `arxivqa.jsonl`, pictures below `images`. The rationale is the answer, as in the paper.

    A record has id, image, question, options (most begin with their letter), label and rationale. Format: the
    data set MMInstruction/ArxivQA on the Hugging Face hub.
    """
    for fields in of_lines(required(folder, ("arxivqa.jsonl",))):
        options, rationale = fields.texts("options"), fields.text("rationale", "")
        answer, problem = chosen(fields.text("label", ""), options), None
        if options and answer is None:
            problem = NO_OPTION
        elif answer is not None and contradicts(rationale, LETTERS[answer]):
            problem = OTHER_ANSWER
        query = with_options(fields.text("question"), options)
        yield Draft(fields.where, fields.text("id"), fields.text("image"), query, rationale, problem)


def scienceqa(folder: Path, _: random.Random) -> Iterator[Draft]:
    """ScienceQA, its training split: question and lecture ask, the solution and the letter answer.

    Either `problems.json`, an object of records by their ids, with pictures at `train/ID/image.png` (format:
    lupantech/ScienceQA on GitHub), or Parquet files `train-*.parquet` (derek-thomas/ScienceQA on the Hugging
    Face hub). A record has question, choices, answer (a number from 0), hint, image, lecture, solution and,
    in JSON, split. Records without a picture are no part of SMR.
    """
    path = required(folder, ("problems.json", "data/train-*.parquet", "train-*.parquet"))
    if path.suffix == ".json":
        for name, fields in of_object(path):
            if fields.text("split") == "train" and fields.has("image"):
                yield _of_scienceqa(fields, name, f"train/{name}/{fields.text('image')}")
        return
    for number, fields in of_table(path):
        picture = fields.record.get("image")
        if isinstance(picture, bytes):
            yield _of_scienceqa(fields, f"row{number}", picture)


def _of_scienceqa(fields: Fields, name: str, picture: str | bytes) -> Draft:
    options, answer = fields.texts("choices"), fields.whole("answer")
    known = 0 <= answer < len(options)
    letter = LETTERS[answer] if known else ""
    solution = fields.text("solution", "")
    parts = [f"Context: {fields.text('hint', '')}", f"Instructions: {fields.text('lecture', '')}"]
    parts = [part for part in parts if part.partition(": ")[2].strip()]
    query = "\n".join([*parts, with_options(fields.text("question"), options)])
    if not solution.strip():
        query += f"\n{LETTER}"
    problem = None if known else NO_OPTION
    if known and contradicts(solution, letter):
        problem = OTHER_ANSWER
    return Draft(fields.where, name, picture, query, reasoned(solution, letter), problem)


def ai2d(folder: Path, _: random.Random) -> Iterator[Draft]:
    """AI2D: a file of questions for each picture, `questions/NAME.png.json`; pictures below `images`.

    A question has answerTexts, correctAnswer (a number from 0), questionId and abcLabel: whether it names
    letters, which are drawn in the pictures below `abc_images` alone. Pictures of `ai2d_test_ids.csv`, one
    name a line, are those of the test set. Format: AI2 Diagrams, allenai.org/data/diagrams.
    """
    tests = _test_pictures(folder / "ai2d_test_ids.csv")
    for path in by_number(required(folder, ("questions",)).glob("*.json")):
        fields = of_file(path)
        picture = fields.text("imageName")
        if Path(picture).stem in tests:
            continue
        asked = fields.inner("questions")
        for question in asked.record:
            one = asked.inner(question)
            options, answer = one.texts("answerTexts"), one.whole("correctAnswer")
            known = 0 <= answer < len(options)
            lettered = bool(one.record.get("abcLabel"))
            drawn = folder / "abc_images" / picture if "/" not in picture and "\0" not in picture else None
            problem = None if known else NO_OPTION
            if lettered and (drawn is None or not drawn.is_file()):
                problem = NO_LETTERS
            yield Draft(
                f"{path} question {one.text('questionId')}",
                one.text("questionId"),
                f"{'abc_images' if lettered and problem is None else 'images'}/{picture}",
                f"{with_options(question, options)}\n{LETTER}",
                LETTERS[answer] if known else "",
                problem,
            )


def _test_pictures(path: Path) -> set[str]:
    if not path.is_file():
        return set()
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return {Path(row[0].strip()).stem for row in csv.reader(file) if row and row[0].strip()}
    except UnicodeDecodeError as error:
        raise FoveateError(f"{path} is not UTF-8 at byte {error.start}: save the file as UTF-8") from None


def textbookqa(folder: Path, rng: random.Random) -> Iterator[Draft]:
    """TextBookQA, its training split: questions with a diagram, and descriptions of instructional diagrams.

    `train/tqa_v1_train.json` is a list of lessons. A lesson's questions.diagramQuestions have answerChoices,
    beingAsked, correctAnswer and imagePath, and texts are in processedText; its instructionalDiagrams have
    imagePath and the description, asked for by one of the instructions of Table 5. Paths start from the
    file's folder. Format: the README of tqa_train_val_test.zip, allenai.org/data/tqa.
    """
    names = ("train/tqa_v1_train.json", "tqa_train_val_test/train/tqa_v1_train.json", "tqa_v1_train.json")
    path = required(folder, names)
    below = path.parent.relative_to(folder).as_posix()
    prefix = "" if below == "." else f"{below}/"
    for lesson in of_list(path):
        asked = lesson.inner("questions")
        if asked.has("diagramQuestions"):
            questions = asked.inner("diagramQuestions")
            for name in questions.record:
                yield _of_textbook(questions.inner(name), name, prefix)
        if lesson.has("instructionalDiagrams"):
            diagrams = lesson.inner("instructionalDiagrams")
            for name in diagrams.record:
                one = diagrams.inner(name)
                text = one.text("processedText", "") or one.text("rawText", "")
                picture = prefix + one.text("imagePath")
                yield Draft(one.where, name, picture, rng.choice(INSTRUCTIONS), text)


def _of_textbook(fields: Fields, name: str, prefix: str) -> Draft:
    choices = fields.inner("answerChoices")
    letters = sorted(choices.record)
    options = [choices.inner(letter).text("processedText") for letter in letters]
    right = fields.inner("correctAnswer").text("processedText").strip().lower()
    problem = None if right in letters else NO_OPTION
    answer = "" if problem else LETTERS[letters.index(right)]
    question = fields.inner("beingAsked").text("processedText")
    query = f"{with_options(question, options)}\n{LETTER}"
    return Draft(fields.where, name, prefix + fields.text("imagePath"), query, answer, problem)
