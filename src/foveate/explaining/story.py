"""What is explained: a conversation with pictures that a model has answered, whatever the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from foveate.model.text import pictures_of
from foveate.picture.account import Spread
from foveate.picture.geometry import Box


@dataclass(frozen=True)
class Story:
    """A conversation up to an answer.

    Attributes:
        picture: what it is about.
        messages: the last one waits for the answer; they show PIL images.
        areas: per picture of the messages the part of `picture` that it shows, in original pixels; may reach
            beyond it.
        answer: ids of the answer's tokens, including the one that ends it.
    """

    picture: Image.Image
    messages: Sequence[Mapping[str, Any]]
    areas: Sequence[Box]
    answer: Sequence[int]

    def masked(self, mask: np.ndarray, colour: Sequence[int]) -> Story:
        """The same with a part of the picture painted over, wherever it is shown.

        Args:
            mask: (H, W) bool, of the original picture.
            colour: red, green, blue.
        """
        covered = iter(
            [
                _masked(shown, area, mask, colour)
                for shown, area in zip(pictures_of(self.messages), self.areas, strict=True)
            ]
        )
        return replace(self, messages=list(_showing(self.messages, covered)))


def _showing(
    messages: Sequence[Mapping[str, Any]], pictures: Iterator[Image.Image]
) -> Iterator[dict[str, Any]]:
    """The messages with other pictures."""
    for message in messages:
        parts = [
            {**part, "image": next(pictures)} if part["type"] == "image" else part
            for part in message["content"]
        ]
        yield {**message, "content": parts}


def _masked(shown: Image.Image, area: Box, mask: np.ndarray, colour: Sequence[int]) -> Image.Image:
    """A picture of an area of the original, with what the mask covers there painted over."""
    rows, columns = (
        np.floor(float(start) + (np.arange(length) + 0.5) * float(extent) / length).astype(np.int64)
        for start, extent, length in (
            (area.top, area.height, shown.height),
            (area.left, area.width, shown.width),
        )
    )
    down, across = ((n >= 0) & (n < side) for n, side in zip((rows, columns), mask.shape, strict=True))
    here = mask[rows.clip(0, mask.shape[0] - 1)][:, columns.clip(0, mask.shape[1] - 1)]
    here &= down[:, None]
    here &= across
    hidden = shown.copy()
    hidden.paste(tuple(int(n) for n in colour), mask=Image.fromarray(here))
    return hidden


class Prepared(NamedTuple):
    """A conversation as a model reads it.

    Attributes:
        inputs: for the model's forward pass, one row; it ends where the answer begins.
        kept: (n,) whether the LLM sees each visual token of all pictures; None: it sees all.
        spread: relevance (K, n) of these tokens -> what it is of each picture, in that picture's pixels.
    """

    inputs: Mapping[str, Any]
    kept: Tensor | None
    spread: Callable[[Tensor], list[Spread]]


class Subject(Protocol):
    """A model that can be explained."""

    @property
    def model(self) -> PreTrainedModel:
        """On its device."""

    @property
    def processor(self) -> ProcessorMixin:
        """With a tokenizer."""

    @property
    def image_token_id(self) -> int:
        """What stands for one visual token in `input_ids`."""

    def prepared(self, messages: Sequence[Mapping[str, Any]]) -> Prepared:
        """What the model reads before it answers. Raises `FoveateError` if it cannot read that."""


def continued(inputs: Mapping[str, Any], answer: Sequence[int]) -> dict[str, Any]:
    """The inputs with the beginning of an answer behind them."""
    ids = inputs["input_ids"]
    more = torch.tensor([list(answer)], dtype=ids.dtype, device=ids.device)
    longer = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape == ids.shape:  # per token; text has type 0
            fill = {"input_ids": more, "attention_mask": torch.ones_like(more)}.get(name)
            added = torch.zeros_like(more) if fill is None else fill
            longer[name] = torch.cat([value, added.to(value.dtype)], 1)
    return longer


class Forced(NamedTuple):
    """How a model takes an answer that is put into its mouth.

    Attributes:
        log_probabilities: (K,) of the answer's tokens.
        best: the most likely token at each place.
    """

    log_probabilities: Tensor
    best: list[int]

    @property
    def probability(self) -> float:
        """The geometric mean over the answer's tokens."""
        return float(self.log_probabilities.mean().exp())


@torch.no_grad()
def forced(subject: Subject, prepared: Prepared, answer: Sequence[int]) -> Forced:
    """One pass over a conversation and its answer."""
    inputs = continued(prepared.inputs, answer[:-1])
    logits = subject.model(**inputs, use_cache=False, logits_to_keep=len(answer)).logits[0].float()  # (K, V)
    ids = torch.tensor(list(answer), device=logits.device)
    chosen = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    return Forced(chosen.cpu(), logits.argmax(-1).tolist())
