"""Conversations -> model inputs with labels, padded to batches."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from foveate.data.formats import Conversations
from foveate.data.regions import Regions
from foveate.errors import FoveateError
from foveate.methods.base import Cut
from foveate.model.processing import FoveateProcessor
from foveate.model.queries import padded_queries
from foveate.model.text import normalise_messages, pictures_of
from foveate.picture.boxes import checked_box
from foveate.picture.geometry import Box, Size
from foveate.picture.limits import LIMITS, Limits
from foveate.picture.reading import read_size

IGNORED = -100  # label of tokens without loss
SEEN = ("pixel_values", "image_sizes", "source_pixels", "source_norms")  # keys of an item's pictures


class UnreadablePicture(FoveateError):
    """A picture of a sample is missing, or its size cannot be read."""


class Samples(Dataset[dict[str, Tensor]]):
    """Records of one or more data files as model inputs.

    An item holds `input_ids`, `attention_mask` and `labels` (T,), and, if it has pictures, `pixel_values`
    (V, 3, h, w) and `image_sizes` (P, 2), `query_ids` and `query_mask` (P, Tq) for methods that read the
    question, `source_pixels` (n,) and `source_norms` (P, 2, 3) for those that look at the original pictures.
    Only the assistant's tokens have labels. If the method makes several lessons of a record, each epoch sees
    one of them, drawn at random.

    Args:
        sources: the files.
        records: (S, 2) int64, source and record of each item.
        processor: with the stage's options and chat template.
        regions: per source the regions of its questions, for methods that learn them.
        seed: for drawing lessons.
    """

    def __init__(
        self,
        sources: Sequence[Conversations],
        records: np.ndarray,
        processor: FoveateProcessor,
        regions: Sequence[Regions | None] | None = None,
        seed: int = 0,
    ) -> None:
        self.sources, self.records, self.processor = list(sources), records, processor
        self.regions = list(regions) if regions is not None else [None] * len(self.sources)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        with self._named(index) as (lessons, _):
            if not lessons:
                raise FoveateError("nothing can be learnt from it: no region is known")
            drawn = random.Random(f"{self.seed} {self.epoch} {index}").randrange(len(lessons))
            return encode(self.processor, cut_out(lessons[drawn], self.processor.image_processor.read))

    def measure(self, index: int) -> tuple[int, list[str]]:
        """An item's number of tokens, visual ones included, and the problems of its regions. Needs only its
        text and its pictures' sizes.

        Counts its longest lesson; 0 if the method can make no lesson of it.
        Raises `UnreadablePicture` if a picture is missing or its size cannot be read.
        """
        with self._named(index) as (lessons, problems):
            return max(map(self._tokens, lessons), default=0), problems

    def _tokens(self, messages: Sequence[dict[str, Any]]) -> int:
        limits = self.processor.image_processor.limits
        sizes = [p.size if isinstance(p, Cut) else size_of(p, limits) for p in pictures_of(messages)]
        plans = [self.processor.image_processor.plan(*size) for size in sizes]
        return len(self.processor.prompt(messages, plans, learn=True).ids)

    def pictures(self) -> np.ndarray:
        """(S,) number of pictures of each item."""
        counts = np.zeros(len(self.records), dtype=np.int64)
        for i, source in enumerate(self.sources):
            mine = self.records[:, 0] == i
            counts[mine] = source.pictures[self.records[mine, 1]]
        return counts

    @contextmanager
    def _named(self, index: int) -> Iterator[tuple[list[list[dict[str, Any]]], list[str]]]:
        """An item's lessons and the problems of its regions; errors name the record."""
        number, record = (int(n) for n in self.records[index])
        source, regions = self.sources[number], self.regions[number]
        try:
            messages = source.messages(record)
            _refuse_half_characters(messages)
            known = regions.of(record, source.id(record)) if regions is not None else {}
            images = self.processor.image_processor
            method, size = images.planner(), _size_of_first(messages, images.limits)
            problems = [f"record {record}, {what}" for what in _problems(messages, size, known)]
            yield method.lessons(messages, size, known), problems
        except UnreadablePicture as error:
            raise UnreadablePicture(f"{source.where(record)}: {error}") from None
        except FoveateError as error:
            raise FoveateError(f"{source.where(record)}: {error}") from None


def size_of(picture: str | bytes, limits: Limits = LIMITS) -> Size:
    """The size of a sample's picture, a path or bytes. Raises `UnreadablePicture`."""
    try:
        return read_size(picture, limits)
    except FoveateError as error:
        raise UnreadablePicture(str(error)) from None


def _size_of_first(messages: Sequence[dict[str, Any]], limits: Limits) -> Callable[[], Size]:
    """The size of a conversation's first picture."""
    pictures = pictures_of(messages)
    return cache(lambda: size_of(pictures[0], limits))


def _refuse_half_characters(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises `FoveateError` if a text has half of a character, with which tokenizers fail."""
    for message in messages:
        for part in message["content"]:
            try:
                part.get("text", "").encode()
            except UnicodeEncodeError as error:
                half = part["text"][error.start]
                raise FoveateError(
                    f"a text of the {message['role']} has half of a character, {half!a} at place "
                    f"{error.start}: write the whole one"
                ) from None


def _problems(
    messages: Sequence[Mapping[str, Any]], size: Callable[[], Size], known: Mapping[int | None, Box]
) -> list[str]:
    """The problems of the regions of a conversation's questions."""
    answered, found = sum(message["role"] == "assistant" for message in messages), []
    if known and (shown := len(pictures_of(messages))) != 1:
        return [f"it shows {shown} pictures"] * len(known)
    for number, box in known.items():
        where = "the picture alone" if number is None else f"question {number}"
        problem = checked_box([float(n) for n in box], size()).problem
        if number is not None and number >= answered:
            found.append(f"{where}: the record has {answered} answered questions, counted from 0")
        elif problem is not None:
            found.append(f"{where}: {problem}")
    return found


def cut_out(
    messages: Sequence[dict[str, Any]], read_one: Callable[[Any], Image.Image]
) -> list[dict[str, Any]]:
    """Messages with their `Cut`s cut out; each picture is read once, by `read_one`."""
    read: dict[int, Any] = {}

    def resolved(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "image":
            return part
        cut = part["image"]
        picture = cut.picture if isinstance(cut, Cut) else cut
        key = id(picture)  # a lesson's cuts hold the same object as the message
        if key not in read:
            read[key] = read_one(picture)
        return {**part, "image": cut.make(read[key]) if isinstance(cut, Cut) else read[key]}

    return [{**m, "content": [resolved(part) for part in m["content"]]} for m in messages]


def encode(processor: FoveateProcessor, messages: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """One conversation as model inputs with labels, as `Samples` describes them."""
    messages = normalise_messages(messages)
    images = processor.image_processor
    pictures = [images.read(picture) for picture in pictures_of(messages)]
    prompt = processor.prompt(messages, [images.plan(p.height, p.width) for p in pictures], learn=True)
    ids, answers = torch.tensor(prompt.ids), torch.tensor(prompt.answers)
    encoded = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.masked_fill(~answers, IGNORED),
    }
    if pictures:
        encoded |= images(pictures, return_tensors="pt")
        if images.planner().uses_query:
            fill = processor.tokenizer.pad_token_id
            encoded["query_ids"], encoded["query_mask"] = padded_queries(prompt.queries, fill)
    return encoded


@dataclass(frozen=True)
class Collator:
    """Items of `Samples` -> a batch. Texts are padded on the right, questions on the left, as in asking."""

    pad_token_id: int

    def __call__(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        fills = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORED}
        longest = max(len(item["input_ids"]) for item in items)
        batch = {
            name: torch.stack([pad(item[name], (0, longest - len(item[name])), value=fill) for item in items])
            for name, fill in fills.items()
        }
        shown = [item for item in items if "pixel_values" in item]
        for name in SEEN:
            if shown and name in shown[0]:
                batch[name] = torch.cat([item[name] for item in shown])  # (sum of V, 3, h, w), (sum of P, 2)
        if shown and "query_ids" in shown[0]:
            rows = [
                query[read.bool()].tolist()
                for item in shown
                for query, read in zip(item["query_ids"], item["query_mask"], strict=True)
            ]
            batch["query_ids"], batch["query_mask"] = padded_queries(
                rows, self.pad_token_id
            )  # (sum of P, Tq)
        return batch


@contextmanager
def errors_of_workers() -> Iterator[None]:
    """Reduces a DataLoader worker's error, which contains its traceback as text, to its message."""
    try:
        yield
    except FoveateError as error:
        kind = f"{type(error).__module__}.{type(error).__qualname__}: "
        raise FoveateError(str(error).rpartition(kind)[2].strip()) from None
