"""What is evaluated: a model of Foveate, any VLM with or without zoom, or a server of OpenAI's protocol."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from foveate.ask.foveate import Foveate
from foveate.layers import weights_of
from foveate.picture.geometry import Box, Size
from foveate.picture.reading import Transparency
from foveate.remembered import Remembered
from foveate.zoom.asking import message
from foveate.zoom.places import resolution
from foveate.zoom.server import Server
from foveate.zoom.vlm import VLM
from foveate.zoom.wire import Served
from foveate.zoom.zoom import Zoom

Pair = tuple[Image.Image, str]


@dataclass(frozen=True)
class Given:
    """An answer, and what it was made of.

    Attributes:
        text: the answer.
        regions: parts of the picture that were looked at, in original pixels.
        tokens: visual tokens that the LLM read; None if unknown.
        shown: the resolution at which the model sees the whole picture, never more than its own pixels; None
            if unknown, or if it sees a part.
        prompt: the text that the LLM read first, a placeholder for each picture; None if unknown.
        notes: sentences about how the model came to it.
    """

    text: str
    regions: list[Box] = field(default_factory=list)
    tokens: int | None = None
    shown: Size | None = None
    prompt: str | None = None
    notes: list[str] = field(default_factory=list)


class Answering(Protocol):
    """What can be evaluated. `transparency`: what transparent pictures show to it by default."""

    @property
    def transparency(self) -> Transparency: ...

    def describe(self) -> dict[str, Any]:
        """What made the answers: a hash of the weights, settings, template."""

    def answer(self, pairs: Sequence[Pair], max_new_tokens: int) -> list[Given]:
        """The answers to questions about one picture each, all at once."""


@dataclass
class Own:
    """A model of Foveate, in as many turns as its method takes."""

    model: Foveate

    @property
    def transparency(self) -> Transparency:
        kind: Transparency = self.model.processor.image_processor.transparency
        return kind

    def describe(self) -> dict[str, Any]:
        network = self.model.model
        return {
            "kind": "foveate",
            "weights": weights_of(network),
            "method": network.config.method,
            "options": asdict(network.method.options),
            "image_size": network.method.tower.image_size,
            **_settings(network, self.model.processor),
        }

    def answer(self, pairs: Sequence[Pair], max_new_tokens: int) -> list[Given]:
        answers = self.model.ask_all(pairs, max_new_tokens=max_new_tokens)
        return [
            Given(
                answer.text,
                answer.account.regions or [],
                answer.ledger.visual_tokens,
                answer.plan.effective,
                self.model.processor.apply_chat_template(message(*pair), add_generation_prompt=True),
                answer.notes,
            )
            for answer, pair in zip(answers, pairs, strict=True)
        ]


class AnyVLM:
    """Any VLM that transformers loads, in one turn or with a closer look.

    Args:
        vlm: the model.
        zoom: asks it, with a closer look; None: it answers in one.
    """

    def __init__(self, vlm: VLM, zoom: Zoom | None = None) -> None:
        self.vlm, self.zoom = vlm, zoom
        self.seen = Remembered(self._seen, most=4096)

    @property
    def transparency(self) -> Transparency:
        return self.vlm.transparency

    def describe(self) -> dict[str, Any]:
        model = self.vlm.model
        return {
            "kind": model.config.model_type,
            "weights": weights_of(model),
            "zoom": self.zoom and _of_zoom(self.zoom),
            **_settings(model, self.vlm.processor),
        }

    def answer(self, pairs: Sequence[Pair], max_new_tokens: int) -> list[Given]:
        if self.zoom is not None:
            return [self._zoomed(*pair, max_new_tokens) for pair in pairs]
        for _, question in pairs:
            self.vlm.check_question(question)
        said = self.vlm.answer([message(*pair) for pair in pairs], max_new_tokens=max_new_tokens)
        return [
            Given(one.text, [], *self.seen(Size(pair[0].height, pair[0].width)), self._prompt(*pair))
            for one, pair in zip(said, pairs, strict=True)
        ]

    def _zoomed(self, picture: Image.Image, question: str, max_new_tokens: int) -> Given:
        assert self.zoom is not None
        answer = self.zoom.ask(picture, question, max_new_tokens=max_new_tokens)
        _, shown = self.seen(Size(picture.height, picture.width))
        notes = answer.account.notes
        return Given(answer.text, answer.regions, None, shown, self._prompt(picture, question), notes)

    def _seen(self, picture: Size) -> tuple[int, Size | None]:
        """Of a picture of this size its visual tokens, and the size at which all of it is seen, if known.

        Measured in what the processor makes of blank ones.
        """

        def read(pixels: np.ndarray) -> Any:
            return self.vlm.inputs([message(Image.fromarray(pixels), "?")])

        inputs = read(np.zeros((*picture, 3), dtype=np.uint8))
        tokens = int((inputs["input_ids"] == self.vlm.image_token_id).sum())
        if "image_grid_thw" in inputs:
            return tokens, _at_most(self.vlm.shown(inputs, picture), picture)
        views = inputs["pixel_values"] if "pixel_values" in inputs else torch.empty(0)
        if views.ndim < 4 or views.shape[-3] != 3:
            return tokens, None
        found = resolution(picture, views.cpu(), lambda pixels: read(pixels)["pixel_values"].float().cpu())
        if found is None or found.part != picture:
            return tokens, None
        return tokens, _at_most(found.size, picture)

    def _prompt(self, picture: Image.Image, question: str) -> str:
        asked = message(picture, question)
        return str(self.vlm.processor.apply_chat_template(asked, add_generation_prompt=True))


class Remote:
    """A model behind a server of OpenAI's protocol, in one turn or with a closer look.

    Args:
        server: asks it.
        zoom: asks it, with a closer look; None: it answers in one.
    """

    def __init__(self, server: Server, zoom: Zoom | None = None) -> None:
        self.server, self.zoom = server, zoom

    @property
    def transparency(self) -> Transparency:
        return self.server.transparency

    def describe(self) -> dict[str, Any]:
        known = {"kind": "server", "url": self.server.url, "name": self.server.name}
        return known if self.zoom is None else {**known, "zoom": _of_zoom(self.zoom, self.server.served)}

    def answer(self, pairs: Sequence[Pair], max_new_tokens: int) -> list[Given]:
        if self.zoom is None:
            asked = [message(*pair) for pair in pairs]
            said = self.server.answer(asked, max_new_tokens=max_new_tokens, probabilities=False)
            return [Given(one.text) for one in said]
        with ThreadPoolExecutor(len(pairs)) as pool:
            asking = [pool.submit(self._zoomed, *pair, max_new_tokens) for pair in pairs]
            return [one.result() for one in asking]

    def _zoomed(self, picture: Image.Image, question: str, max_new_tokens: int) -> Given:
        assert self.zoom is not None
        answer = self.zoom.ask(picture, question, max_new_tokens=max_new_tokens)
        return Given(answer.text, answer.regions, notes=answer.account.notes)


def _of_zoom(zoom: Zoom, served: Served | None = None) -> dict[str, Any]:
    """What decides a closer look."""
    known = {"region": repr(zoom.region), "budget": asdict(zoom.budget)}
    return known if served is None else {**known, "served": asdict(served)}


def _at_most(size: Size, most: Size) -> Size:
    return Size(min(size.height, most.height), min(size.width, most.width))


def _settings(model: Any, processor: Any) -> Mapping[str, Any]:
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "template": hashlib.sha256((processor.chat_template or "").encode()).hexdigest()[:16],
    }
