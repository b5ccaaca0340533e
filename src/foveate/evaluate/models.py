"""What is evaluated: a model of Foveate, any VLM with or without zoom, or a server of OpenAI's protocol."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from PIL import Image

from foveate.ask.foveate import Foveate
from foveate.errors import FoveateError, first_line, require
from foveate.layers import weights_of
from foveate.picture.geometry import Box, Size, ViewPlan
from foveate.picture.reading import Transparency
from foveate.zoom.vlm import VLM, message
from foveate.zoom.zoom import Zoom

Pair = tuple[Image.Image, str]


@dataclass(frozen=True)
class Given:
    """An answer, and what it was made of.

    Attributes:
        text: the answer.
        regions: parts of the picture that were looked at, in original pixels.
        tokens: visual tokens that the LLM read; None if unknown.
        shown: of the picture, as the model sees it at most; None if unknown.
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
                shown_size(answer.plan),
                self.model.processor.apply_chat_template(message(*pair), add_generation_prompt=True),
                answer.notes,
            )
            for answer, pair in zip(answers, pairs, strict=True)
        ]


def shown_size(plan: ViewPlan) -> Size:
    """The pixels at which a plan shows the picture, at most its own."""
    sizes = [
        Size(
            int(min(canvas.content.height, canvas.source.height)),
            int(min(canvas.content.width, canvas.source.width)),
        )
        for canvas in plan.canvases
    ]
    return max(sizes, key=lambda size: size.height * size.width)


@dataclass
class AnyVLM:
    """Any VLM that transformers loads, in one turn or with a closer look."""

    vlm: VLM
    zoom: Zoom | None = None

    @property
    def transparency(self) -> Transparency:
        return self.vlm.transparency

    def describe(self) -> dict[str, Any]:
        model = self.vlm.model
        zoom = None
        if self.zoom is not None:
            zoom = {"region": repr(self.zoom.region), "budget": asdict(self.zoom.budget)}
        return {
            "kind": model.config.model_type,
            "weights": weights_of(model),
            "zoom": zoom,
            **_settings(model, self.vlm.processor),
        }

    def answer(self, pairs: Sequence[Pair], max_new_tokens: int) -> list[Given]:
        if self.zoom is not None:
            return [self._zoomed(*pair, max_new_tokens) for pair in pairs]
        for _, question in pairs:
            self.vlm.check_question(question)
        said = self.vlm.answer([message(*pair) for pair in pairs], max_new_tokens=max_new_tokens)
        return [Given(one.text, [], *self._read(*pair)) for one, pair in zip(said, pairs, strict=True)]

    def _zoomed(self, picture: Image.Image, question: str, max_new_tokens: int) -> Given:
        assert self.zoom is not None
        answer = self.zoom.ask(picture, question, max_new_tokens=max_new_tokens)
        _, shown, prompt = self._read(picture, question)
        return Given(answer.text, answer.regions, None, shown, prompt, answer.account.notes)

    def _read(self, picture: Image.Image, question: str) -> tuple[int, Size | None, str]:
        """Visual tokens, the size at which the picture is shown, if known, and the prompt."""
        asked = message(picture, question)
        inputs, size = self.vlm.inputs([asked]), Size(picture.height, picture.width)
        tokens = int((inputs["input_ids"] == self.vlm.image_token_id).sum())
        shown = self.vlm.shown(inputs, size)
        prompt = self.vlm.processor.apply_chat_template(asked, add_generation_prompt=True)
        return tokens, None if shown is size else shown, str(prompt)


@dataclass
class Remote:
    """A model behind a server of OpenAI's protocol.

    Args:
        url: up to and with `/v1`.
        name: of the model there.
        key: for servers that ask for one.
    """

    url: str
    name: str
    key: str = "none"
    transparency: Transparency = "white"

    def __post_init__(self) -> None:
        require("openai", "openai", "questions to a server")
        import openai

        self.client = openai.OpenAI(base_url=self.url, api_key=self.key)

    def describe(self) -> dict[str, Any]:
        return {"kind": "server", "url": self.url, "name": self.name}

    def answer(self, pairs: Sequence[Pair], max_new_tokens: int) -> list[Given]:
        with ThreadPoolExecutor(len(pairs)) as pool:
            return list(pool.map(lambda pair: self._ask(pair, max_new_tokens), pairs))

    def _ask(self, pair: Pair, max_new_tokens: int) -> Given:
        import openai

        picture, question = pair

        content = [
            {"type": "image_url", "image_url": {"url": _data_url(picture)}},
            {"type": "text", "text": question},
        ]
        messages: Any = [{"role": "user", "content": content}]
        try:
            reply = self.client.chat.completions.create(
                model=self.name, messages=messages, max_tokens=max_new_tokens, temperature=0.0
            )
        except openai.OpenAIError as error:
            raise FoveateError(f"{self.url} gave no answer: {first_line(error)}") from error
        if not reply.choices or reply.choices[0].message.content is None:
            raise FoveateError(f"{self.url} gave an answer without text")
        return Given(reply.choices[0].message.content.strip())


def _data_url(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def _settings(model: Any, processor: Any) -> Mapping[str, Any]:
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "template": hashlib.sha256((processor.chat_template or "").encode()).hexdigest()[:16],
    }
