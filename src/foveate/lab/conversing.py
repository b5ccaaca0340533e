"""Methods that ask more than once before they answer: every question is its own conversation."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import set_seed

from foveate.ask.foveate import Foveate
from foveate.data.dataset import IGNORED, Collator, cut_out, encode
from foveate.errors import FoveateError
from foveate.lab.cell import Bench, Cell
from foveate.lab.data import Examples
from foveate.lab.levels import level_named
from foveate.lab.questions import Question
from foveate.lab.student import Graded, Stage, Student
from foveate.lab.words import talking_tokenizer
from foveate.methods import method_class
from foveate.methods.base import Method
from foveate.picture.geometry import Box, Size, whole

REGION = "region"  # a further kind of question, which is not measured
LONGEST_ANSWER = 8  # tokens; words have five letters


class ConversingStudent(Student):
    """Trains on the method's lessons, and is measured in its own conversations.

    The region that is taught is the box of the object that a question is about; for questions about the whole
    picture, all of it. The region of the picture alone, without a question, is its largest such object. A
    student that is told the region gets it as the model's own reply: it is measured on its lessons.
    """

    template = "bare"

    def __init__(self, cell: Cell, bench: Bench) -> None:
        tokenizer, reader = talking_tokenizer(), copy.deepcopy(bench.parts.reader)
        set_seed(cell.seed)
        reader.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        parts = replace(bench.parts, tokenizer=tokenizer, reader=reader)
        super().__init__(cell, replace(bench, parts=parts))
        self.collate = Collator(tokenizer.pad_token_id)

    def ready(self) -> str | None:
        """Caches nothing: crops differ from question to question."""
        return None

    def pointing(self, data: Examples, captions: bool) -> Examples:
        kind, ratio = type(self.method), level_named(self.cell.level).ratio
        method = kind(self.method.tower, kind.options_for(ratio))
        nothing, said = Image.new("RGB", (1, 1)), []
        for questions, captioned in zip(data.questions, data.captions, strict=True):
            about = [(q.text, q.answer, q.region) for q in questions if q.region is not None]
            asked = _dialogue(nothing, [(text, answer) for text, answer, _ in about])
            regions: dict[int | None, Box] = {k: region for k, (*_, region) in enumerate(about)}
            lessons = method.lessons(asked, lambda: data.size, regions) if about else []
            first = [Question(REGION, _text(lesson[0]), _text(lesson[1]), None, ()) for lesson in lessons]
            said.append([*(captioned if captions else []), *first])
        return replace(data, captions=said)

    def loss(self, data: Examples, indices: Sequence[int], captions: bool = False) -> Tensor:
        lessons = []
        for i in indices:
            picture = Image.fromarray(data.pictures[i])
            lessons += self._lessons(picture, data.questions[i])
            lessons += [_dialogue(picture, [(q.text, q.answer)]) for q in data.captions[i] if captions]
        read = self.processor.image_processor.read
        batch = self.collate([encode(self.processor, cut_out(lesson, read)) for lesson in lessons])
        return self.model(**batch, use_cache=False).loss

    def _lessons(self, picture: Image.Image, questions: Sequence[Any]) -> list[list[dict[str, Any]]]:
        size = Size(picture.height, picture.width)
        objects = [question.region for question in questions if question.region is not None]
        regions: dict[int | None, Box] = {
            k: whole(size) if question.region is None else question.region
            for k, question in enumerate(questions)
        }
        regions[None] = max(objects, key=lambda box: box.width * box.height, default=whole(size))
        asked = [(question.text, question.answer) for question in questions]
        return self.method.lessons(_dialogue(picture, asked), lambda: size, regions)

    def grade(self, data: Examples, indices: Sequence[int]) -> list[Graded]:
        """Answers all questions about these pictures, in parallel."""
        if self.cell.told:
            return self._grade_told(data, indices)
        asked = [(Image.fromarray(data.pictures[i]), q) for i in indices for q in data.questions[i]]
        reader = Foveate(self.model, self.processor)
        answers = reader.ask_all(
            [(picture, question.text) for picture, question in asked], max_new_tokens=LONGEST_ANSWER
        )
        return [
            Graded(
                question,
                answer.text == question.answer,
                answer.ledger.visual_tokens,
                [] if answer.notes else answer.regions,  # the whole picture for lack of a box is not a choice
            )
            for (_, question), answer in zip(asked, answers, strict=True)
        ]

    def _grade_told(self, data: Examples, indices: Sequence[int]) -> list[Graded]:
        """Whether greedy decoding would give exactly the answers, after the lessons' own first turns."""
        graded, read = [], self.processor.image_processor.read
        for i in indices:
            lessons = self._lessons(Image.fromarray(data.pictures[i]), data.questions[i])
            batch = self.collate([encode(self.processor, cut_out(lesson, read)) for lesson in lessons])
            output = self.model(**batch, use_cache=False)
            labels = batch["labels"][:, 1:]  # (B, T - 1)
            wrong = (output.logits[:, :-1].argmax(-1) != labels) & _second_runs(labels != IGNORED)
            tokens = (batch["input_ids"] == self.model.config.image_token_id).sum(1)
            graded += [
                Graded(question, not missed, int(count), None)
                for question, missed, count in zip(
                    data.questions[i], wrong.any(1).tolist(), tokens, strict=True
                )
            ]
        return graded


def _second_runs(learnt: Tensor) -> Tensor:
    """(B, T) bool -> the same with only the second run of True in each row: the answer's, after the box."""
    starts = learnt & ~F.pad(learnt, (1, 0))[:, :-1]
    return learnt & (starts.cumsum(1) == 2)


def _text(message: Mapping[str, Any]) -> str:
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def _dialogue(picture: Image.Image, asked: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Questions and answers about one picture as messages."""
    messages: list[dict[str, Any]] = []
    for question, answer in asked:
        shown = [] if messages else [{"type": "image", "image": picture}]
        messages += [
            {"role": "user", "content": [*shown, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
    return messages


def make_student(cell: Cell, bench: Bench) -> Student:
    """The student for the cell's method. Raises `FoveateError` if it is told what it cannot use."""
    student = _student(cell, bench)
    if cell.told and not (student.method.reads_source or _converses(cell.method)):
        raise FoveateError(f"told: {student.method.title} does not look again at the original picture")
    return student


def under(student: Student, stage: Stage, fresh: bool = False) -> Student:
    """A student with this one's weights and the stage's options, method or data; itself if it has none.

    A `fresh` one of another method has its own weights, made from this seed.

    Raises `FoveateError` for a method that asks twice if the cell's own does not, as it needs more words; and
    for regions if it does not ask for them.
    """
    if not stage.options and stage.method is None and not stage.regions:
        return student
    bench = student.bench
    if stage.regions:
        bench = replace(bench, train=student.pointing(bench.train, stage.captions))
    cell = replace(student.cell, options={**student.cell.options, **stage.options})
    if stage.method is not None:
        cell = replace(student.cell, method=stage.method, options=stage.options, told=False)
        if _converses(cell.method) and not _converses(student.cell.method):
            raise FoveateError(f"stages: {student.method.title} cannot start from {stage.method}")
    other = _student(cell, bench)
    if not fresh or stage.method is None:
        other.take(student)
    return other


def _student(cell: Cell, bench: Bench) -> Student:
    return (ConversingStudent if _converses(cell.method) else Student)(cell, bench)


def _converses(method: str) -> bool:
    return method_class(method).converse is not Method.converse
