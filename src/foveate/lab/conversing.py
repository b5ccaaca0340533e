"""Methods that ask more than once before they answer: every question is its own conversation."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import set_seed

from foveate.ask.foveate import Foveate
from foveate.data.dataset import Collator, cut_out, encode
from foveate.errors import FoveateError
from foveate.lab.cell import Bench, Cell
from foveate.lab.data import Examples
from foveate.lab.levels import level_named
from foveate.lab.packing import Sample, pack, portions
from foveate.lab.questions import Question
from foveate.lab.reading import Answers, read, seen
from foveate.lab.student import SHORT, Graded, Stage, Student
from foveate.lab.words import talking_tokenizer
from foveate.methods import method_class
from foveate.methods.base import IMAGE_TOKEN, Method
from foveate.picture.geometry import Box, Size, whole

REGION = "region"  # a further kind of question, which is not measured
LONGEST_ANSWER = 8  # tokens; words have five letters


class ConversingStudent(Student):
    """Trains on the method's lessons, and is measured in its own conversations.

    The region that is taught is the box of the object that a question is about, rounded outwards to the
    cell's `grid`; for questions about the whole picture, all of it. The region of the picture alone, without
    a question, is its largest such object. A student that is told the region gets it as the model's own
    reply: it is measured on its lessons.
    """

    template = "bare"
    curve_pictures = 100  # conversations take longer

    @property
    def told_when_measured(self) -> bool:  # type: ignore[override]
        return self.cell.told

    def __init__(self, cell: Cell, bench: Bench) -> None:
        tokenizer, reader = talking_tokenizer(), copy.deepcopy(bench.parts.reader)
        set_seed(cell.seed)
        reader.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        parts = replace(bench.parts, tokenizer=tokenizer, reader=reader)
        super().__init__(cell, replace(bench, parts=parts))
        self.collate = Collator(tokenizer.pad_token_id)
        self.drills: dict[tuple[str, bool], dict[int, list[Drill]]] = {}

    def pointing(self, data: Examples, captions: bool) -> Examples:
        kind, ratio = type(self.method), level_named(self.cell.level).ratio
        method = kind(self.method.tower, kind.options_for(ratio))
        nothing, said = Image.new("RGB", (1, 1)), []
        for questions, captioned in zip(data.questions, data.captions, strict=True):
            about = [(q.text, q.answer, q.region) for q in questions if q.region is not None]
            asked = _dialogue(nothing, [(text, answer) for text, answer, _ in about])
            regions: dict[int | None, Box] = {
                k: self._taught(region, data.size) for k, (*_, region) in enumerate(about)
            }
            lessons = method.lessons(asked, lambda: data.size, regions) if about else []
            first = [Question(REGION, _text(lesson[0]), _text(lesson[1]), None, ()) for lesson in lessons]
            said.append([*(captioned if captions else []), *first])
        return replace(data, captions=said)

    def loss(self, data: Examples, indices: Sequence[int], captions: bool = False) -> Tensor:
        read_one = self.processor.image_processor.read
        if self.builds_tower or self.method.uses_query:  # nothing that a picture's lessons could share
            lessons = [lesson for i in indices for lesson in self._of_picture(data, i, captions)]
            batch = self.collate([encode(self.processor, cut_out(lesson, read_one)) for lesson in lessons])
            return self.model(**{k: v.to(self.bench.device) for k, v in batch.items()}, use_cache=False).loss
        return self.told(data, indices, captions).loss

    def _of_picture(self, data: Examples, i: int, captions: bool) -> list[list[dict[str, Any]]]:
        """The lessons about a picture, and what is said of it."""
        picture = Image.fromarray(data.pictures[i])
        said = [_dialogue(picture, [(q.text, q.answer)]) for q in data.captions[i] if captions]
        return [*self._lessons(picture, data.questions[i]), *said]

    def told(self, data: Examples, indices: Sequence[int], captions: bool = False) -> Answers:
        """The LLM's answers within these pictures' lessons, all of which read the same view first."""
        drills = self._drilled(data, indices, captions)
        runs = [portions([len(d.sample.ids) for d in row], max(SHORT, self.plan.tokens)) for row in drills]
        samples = [
            [row[k].sample for k in run] for row, some in zip(drills, runs, strict=True) for run in some
        ]
        owners = [p for p, some in enumerate(runs) for _ in some]
        shown = [part for row in drills for drill in row for part in drill.shown]
        packed = pack(samples, 0, self.model.config.image_token_id, self.bench.parts.tokenizer.pad_token_id)
        first = self.model.connect(self._seen(data, indices), torch.tensor([data.size] * len(indices)))
        if first.kept is not None or first.injection is not None:
            raise FoveateError(f"{self.method.title}: the lab trains it in turns only if all tokens are read")
        visual = seen(first.pooler_output, None, torch.tensor(owners, device=self.bench.device))
        later = None
        if shown:
            features = torch.cat([part.features for part in shown]).to(self.bench.device).float()
            connected = self.model.connect(features, torch.tensor([part.size for part in shown]))
            later = torch.cat(connected.pooler_output)
        return read(self.model.language_model, visual, packed, later, self.model.config.image_token_id)

    def _drilled(self, data: Examples, indices: Sequence[int], captions: bool) -> list[list[Drill]]:
        """The lessons about each picture as the LLM reads them, made once."""
        memory = self.drills.setdefault((data.key, captions), {})
        new = [i for i in dict.fromkeys(indices) if i not in memory]
        made = {i: [self._cut(lesson) for lesson in self._of_picture(data, i, captions)] for i in new}
        views: dict[tuple[int, bytes], np.ndarray] = {}  # many questions are about the same part
        sizes: dict[tuple[int, bytes], Size] = {}
        for i, lessons in made.items():
            for _, pictures in lessons:
                for picture in pictures:
                    key = (i, picture.tobytes())
                    if key not in views:
                        sizes[key] = Size(picture.height, picture.width)
                        plan = self.method.plan(*sizes[key])
                        views[key] = self.processor.image_processor.views(picture, plan)
        shown: dict[tuple[int, bytes], Shown] = {}
        if views:
            together = torch.from_numpy(np.concatenate(list(views.values())))
            features = self._encode_frozen(together).to(torch.bfloat16)
            parts = features.split([len(some) for some in views.values()])
            for (key, size), part in zip(sizes.items(), parts, strict=True):
                shown[key] = Shown(size, self.method.plan(*size).tokens, part.clone())
        for i, lessons in made.items():
            memory[i] = []
            for messages, pictures in lessons:
                mine = [shown[i, picture.tobytes()] for picture in pictures]
                tokens = [part.tokens for part in mine]
                memory[i].append(Drill(_sample(self.bench.parts.tokenizer, messages, tokens), mine))
        return [memory[i] for i in indices]

    def _cut(self, lesson: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Image.Image]]:
        """A lesson's messages, and the pictures in it but for the first.

        Raises `FoveateError` if it does not begin with the picture.
        """
        messages = cut_out(lesson, self.processor.image_processor.read)
        if messages[0]["content"][0]["type"] != "image" or messages[0]["role"] != "user":
            raise FoveateError(f"{self.method.title}: the lab needs lessons that begin with the picture")
        pictures = [part["image"] for m in messages for part in m["content"] if part["type"] == "image"]
        return messages, pictures[1:]

    def _taught(self, region: Box, size: Size) -> Box:
        """A region as the LLM is to say it."""
        grid = self.cell.grid
        if grid is None:
            return region
        across, down = size.width / grid, size.height / grid
        return Box(
            math.floor(region.left / across) * across,
            math.floor(region.top / down) * down,
            math.ceil(region.right / across) * across,
            math.ceil(region.bottom / down) * down,
        )

    def _lessons(self, picture: Image.Image, questions: Sequence[Any]) -> list[list[dict[str, Any]]]:
        size = Size(picture.height, picture.width)
        regions: dict[int | None, Box] = {
            k: self._taught(question.region or whole(size), size) for k, question in enumerate(questions)
        }
        objects = [regions[k] for k, question in enumerate(questions) if question.region is not None]
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
        drills = self._drilled(data, indices, False)
        answers, end = self.told(data, indices), self.model.config.text_config.eos_token_id
        hits = iter([hit for row in answers.right(end) for hit in row])
        return [
            Graded(question, next(hits), self.plan.tokens + sum(part.tokens for part in drill.shown), None)
            for i, row in zip(indices, drills, strict=True)
            for question, drill in zip(data.questions[i], row, strict=True)
        ]


class Shown(NamedTuple):
    """A part of a picture within a lesson: its size, visual tokens and features (V, N, C)."""

    size: Size
    tokens: int
    features: Tensor


class Drill(NamedTuple):
    """A lesson as the LLM reads it after the picture, and the parts of the picture within it."""

    sample: Sample
    shown: list[Shown]


def _sample(tokenizer: Any, messages: Sequence[Mapping[str, Any]], tokens: Sequence[int]) -> Sample:
    """A conversation in the template `bare`, without the picture that it begins with.

    `tokens`: visual tokens of each picture within it.
    """
    text, learnt = "", []
    for message in messages:
        said = "".join(
            IMAGE_TOKEN if part["type"] == "image" else part["text"] for part in message["content"]
        )
        if message["role"] == "assistant":
            said = said.strip() + tokenizer.eos_token
            learnt.append((len(text), len(text) + len(said)))
        text += said
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    counts, ids, answers = iter([0, *tokens]), [], []
    for token, (start, end) in zip(read["input_ids"], read["offset_mapping"], strict=True):
        count = next(counts) if text[start:end] == IMAGE_TOKEN else 1
        ids += [token] * count
        answers += [any(start < last and first < end for first, last in learnt)] * count
    spans = [
        (start, end)
        for start, end in zip(
            [i for i, now in enumerate(answers) if now and not (i and answers[i - 1])],
            [i + 1 for i, now in enumerate(answers) if now and not (i + 1 < len(ids) and answers[i + 1])],
            strict=True,
        )
    ]
    *earlier, (last, _) = spans
    return Sample(ids, last, tuple(earlier))


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
    if cell.grid is not None and not _converses(cell.method):
        raise FoveateError(f"grid: {student.method.title} does not say where to look")
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
        cell = replace(student.cell, method=stage.method, options=stage.options, told=False, grid=None)
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
