"""What lmms-eval asks, asked as `Foveate.ask` does. The class that it loads is in `lmms_model`.

A picture followed by a text is what `ask` takes: it is asked with all turns that the method has. Any other
conversation (several pictures, examples, a text before its picture) is read as it stands, in one turn.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from foveate.ask.answer import Answer, Ledger
from foveate.ask.context import Context
from foveate.ask.engine import Said
from foveate.ask.foveate import Foveate
from foveate.errors import FoveateError
from foveate.methods.base import IMAGE_TOKEN
from foveate.model.text import normalise_messages, pictures_of
from foveate.written import read_pair

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

log = logging.getLogger(__name__)

MODEL = "foveate.clients.lmms_model.FoveateLmms"
MISSING = (
    "lmms-eval is not installed, or not whole: pip install -e '.[lmms-eval]' in a clone of Foveate, then "
    "pip install --no-deps lmms-eval"
)
LENGTHS = ("max_new_tokens", "max_gen_toks")  # two names of one bound
ENDS = ("until", "stop_sequences")
SAMPLING = ("temperature", "top_p", "top_k")  # count only if tokens are drawn
PASSED = (
    *("num_beams", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "min_new_tokens"),
    *("early_stopping", "use_cache"),
)
OF_PICTURES = "image_aspect_ratio"  # of LLaVA's own program: here the method decides it

Messages = list[dict[str, Any]]


def manifest() -> ModelManifest:
    """What the entry point tells lmms-eval about the model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="foveate", chat_class_path=MODEL)


@dataclass(frozen=True)
class Settings:
    """How a task wants its answers.

    Attributes:
        arguments: of `Foveate.ask_all`.
        ends: texts before which an answer is cut off.
        seed: for drawing tokens; None leaves torch's generator as it is.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    ends: tuple[str, ...] = ()
    seed: int | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any], where: str, max_new_tokens: int) -> Settings:
        """Reads a task's `generation_kwargs`.

        Args:
            given: as the task's file has them; null counts as not given.
            where: the task's name, for errors.
            max_new_tokens: for tasks without a bound.

        Raises:
            FoveateError: one that is unknown here, or has a value of another kind.
        """
        where = f"generation_kwargs of task {where}"
        left = {name: value for name, value in given.items() if value is not None}
        lengths = [
            _number(left.pop(name), f"{where}: {name}", whole=True) for name in LENGTHS if name in left
        ]
        if lengths and min(lengths) < 1:
            raise FoveateError(f"{where}: max_new_tokens must be at least 1, it is {min(lengths)}")
        ends = tuple(
            end for name in ENDS if name in left for end in _ends(left.pop(name), f"{where}: {name}")
        )
        seed = _number(left.pop("seed"), f"{where}: seed", whole=True) if "seed" in left else None
        draws = left.pop("do_sample", None)
        if draws is not None and not isinstance(draws, bool):
            raise FoveateError(f"{where}: do_sample must be true or false, not {draws!r}")
        drawing = {
            n: _number(left.pop(n), f"{where}: {n}", whole=n == "top_k") for n in SAMPLING if n in left
        }
        heat = drawing.get("temperature")
        # As everywhere in lmms-eval, temperature 0 is greedy; a higher one draws unless do_sample is false.
        draws = heat != 0 and (heat is not None if draws is None else draws)
        arguments: dict[str, Any] = {"do_sample": draws, **(drawing if draws else {})}
        if draws and not 0 < drawing.get("top_p", 1) <= 1:
            raise FoveateError(f"{where}: top_p must be above 0 and at most 1, not {drawing['top_p']}")
        arguments |= {name: left.pop(name) for name in PASSED if name in left}
        if (ratio := left.pop(OF_PICTURES, None)) is not None:
            log.warning("%s: %s=%s is not used: the method decides it", where, OF_PICTURES, ratio)
        if left:
            raise FoveateError(
                f"{where}: {', '.join(sorted(left))} cannot be honoured: remove it from the task"
            )
        return cls({**arguments, "max_new_tokens": min(lengths, default=max_new_tokens)}, ends, seed)

    def cut(self, text: str) -> str:
        """An answer up to the first text that ends it."""
        for end in self.ends:
            text = text.partition(end)[0]
        return text.strip()


def _number(value: Any, where: str, whole: bool = False) -> Any:
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise FoveateError(f"{where} must be a {'whole ' if whole else ''}number, not {value!r}")
    return value


def _ends(value: Any, where: str) -> list[str]:
    ends = [value] if isinstance(value, str) else value
    if not isinstance(ends, (list, tuple)) or not all(isinstance(end, str) and end for end in ends):
        raise FoveateError(f"{where} must be texts that end an answer, not {value!r}")
    return list(ends)


@dataclass(frozen=True)
class Request:
    """One question.

    Attributes:
        messages: makes its conversation, as lmms-eval or transformers writes it, with the pictures.
        settings: how it is answered.
        where: its task and number, for errors.
    """

    messages: Callable[[], Sequence[Mapping[str, Any]]]
    settings: Settings
    where: str

    def read(self) -> Messages:
        """The messages, with pictures where `<image>` in a text says so. Raises `FoveateError`."""
        try:
            messages = normalise_messages(self.messages())
            marks = sum(part["text"].count(IMAGE_TOKEN) for part in _texts(messages))
            if not marks:
                return messages
            pictures = pictures_of(messages)
            if marks != len(pictures):
                raise FoveateError(
                    f"its texts hold {IMAGE_TOKEN} {marks} times, and it has {len(pictures)} pictures"
                )
        except FoveateError as error:
            raise FoveateError(f"{self.where}: {error}") from None
        waiting = iter(pictures)
        return [
            {
                **message,
                "content": [part for text in _texts([message]) for part in _placed(text["text"], waiting)],
            }
            for message in messages
        ]


def _texts(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [part for message in messages for part in message["content"] if part["type"] == "text"]


def _placed(text: str, pictures: Iterator[Any]) -> list[dict[str, Any]]:
    """A text's parts, the next picture at each `<image>`."""
    before, *pieces = text.split(IMAGE_TOKEN)
    parts: list[dict[str, Any]] = [{"type": "text", "text": before}] if before else []
    for piece in pieces:
        parts.append({"type": "image", "image": next(pictures)})
        piece = piece.removeprefix("\n")  # chat templates add the line break after a picture themselves
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


def question_of(messages: Sequence[Mapping[str, Any]]) -> tuple[Any, str] | None:
    """The picture and the text of a conversation that `ask` can put; None for others."""
    if len(messages) != 1 or messages[0]["role"] != "user":
        return None
    kinds = [part["type"] for part in messages[0]["content"]]
    if kinds != ["image", "text"]:
        return None
    (picture,), (text,) = pictures_of(messages), (part["text"] for part in _texts(messages))
    return (picture, text) if text.strip() else None


@dataclass(frozen=True)
class Replied:
    """An answer and its cost."""

    text: str
    ledger: Ledger


def batches(requests: Sequence[Request], size: int) -> Iterator[list[int]]:
    """The numbers of requests that are answered together: those with the same settings, in order."""
    groups: dict[str, list[int]] = {}
    for i, request in enumerate(requests):
        groups.setdefault(repr(request.settings), []).append(i)
    for group in groups.values():
        yield from (group[first : first + size] for first in range(0, len(group), size))


def answer(foveate: Foveate, requests: Sequence[Request]) -> list[Replied]:
    """Answers requests with the same settings, at once.

    Raises:
        FoveateError: a picture that cannot be read, or a conversation that the model's template does not know
            or that is too long; it names the request if there is one.
    """
    settings = requests[0].settings
    if settings.seed is not None:
        torch.manual_seed(settings.seed)
    conversations = [request.read() for request in requests]
    questions = {i: found for i, m in enumerate(conversations) if (found := question_of(m)) is not None}
    others = {i: messages for i, messages in enumerate(conversations) if i not in questions}
    replies: dict[int, Answer | Said] = {}
    try:
        if questions:
            asked = foveate.ask_all(list(questions.values()), **settings.arguments)
            replies |= zip(questions, asked, strict=True)
        if others:
            read = [_with_pictures(foveate, messages) for messages in others.values()]
            said = foveate.engine.say(read, Context(), **settings.arguments)
            replies |= zip(others, said, strict=True)
    except FoveateError as error:
        which = requests[0].where if len(requests) == 1 else f"{requests[0].where} to {requests[-1].where}"
        raise FoveateError(f"{which}: {error}") from error
    return [Replied(settings.cut(reply.text), reply.ledger) for _, reply in sorted(replies.items())]


def _with_pictures(foveate: Foveate, messages: Messages) -> Messages:
    """Messages with their pictures read."""
    read = foveate.processor.image_processor.fetch_images
    return [
        {
            **message,
            "content": [
                {**part, "image": read(part["image"])} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]


def read_options(text: str | None) -> dict[str, Any]:
    """The method's options of `--model_args`: `options={key: value}`. Raises `FoveateError`."""
    if text is None:
        return {}
    _, options = read_pair(f"options={text}", "model_args options")
    if not isinstance(options, dict):
        raise FoveateError(
            "model_args options must be a mapping in braces, as in options={max_visual_tokens: 1000}"
        )
    return options
