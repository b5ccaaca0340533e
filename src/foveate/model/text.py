"""Text: tokenizers with an image token, chat templates, and messages."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import takewhile
from pathlib import Path
from typing import Any

from foveate.errors import FoveateError, installed, missing_extra, one_sentence
from foveate.methods.base import IMAGE_TOKEN

TEMPLATES = ("plain", "bare", "vicuna_v1", "llama3", "llama3_v1", "mistral", "chatml")

SOURCES = ("image", "url", "path", "base64")  # keys under which a message's part gives its picture
BREAK = "\ufdd0"  # no character, says Unicode: where a text is cut, so that it holds no special token
PARTS = '{"type": "text", "text"} or {"type": "image"} with ' + ", ".join(SOURCES[:-1]) + " or base64"


def chat_template(name: str) -> str:
    """The Jinja source of one of `TEMPLATES`. Assistant tokens are marked, so that training can find them."""
    if name not in TEMPLATES:
        raise FoveateError(f"unknown chat template {name!r}: choose one of {', '.join(TEMPLATES)}")
    return (
        resources.files("foveate.model")
        .joinpath("templates")
        .joinpath(f"{name}.jinja")
        .read_text(encoding="utf-8")
    )


def normalise_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies messages with every content as a list of parts, as `checked_part` returns them.

    Raises `FoveateError` for invalid ones.
    """
    if not messages:
        raise FoveateError("the conversation is empty: give at least one message")
    normal = []
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise FoveateError(f"a message needs a role and a content, got {message!r}")
        content = message["content"]
        given = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(given, (list, tuple)):
            raise FoveateError(f"a message's content must be a text or a list of parts, not {given!r}")
        normal.append({**message, "content": [checked_part(part) for part in given]})
    return normal


def checked_part(part: Any) -> dict[str, Any]:
    """A copy of a message's part; a picture, however it is named, as `image`.

    Raises `FoveateError` for other parts, and for those of which something would be dropped.
    """
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in ("text", "image") or (kind == "text" and not isinstance(part.get("text"), str)):
        raise FoveateError(f"a part of a message must be {PARTS}, not {_shown(part)}")
    named = [key for key in SOURCES if part.get(key) is not None]
    if part.get("text") is not None and (named or kind == "image"):
        raise FoveateError("a part of a message has a text and a picture: make a part of each")
    if kind == "text":
        return dict(part)
    if len(named) > 1:
        raise FoveateError(f"a picture of a message is given twice, as {' and '.join(named)}: give one")
    made = {key: value for key, value in part.items() if key not in SOURCES}
    if named:
        picture = part[named[0]]
        if named[0] == "base64":
            if isinstance(picture, bytes):
                picture = picture.decode("ascii", "replace")
            if not isinstance(picture, str):
                raise FoveateError(f"base64 of a picture must be a text, not {type(picture).__name__}")
            picture = picture if picture.startswith("data:") else f"data:;base64,{picture}"
        made["image"] = picture
    return made


def _shown(part: Any) -> str:
    if isinstance(part, Mapping) and "type" in part:
        return f"of type {part['type']!r}" + (" without a text" if part["type"] == "text" else "")
    return f"{part!r:.60}"


def special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Finds a tokenizer's special tokens, and all others that it takes out of a text before it splits it."""
    marks = {token.content for token in tokenizer.added_tokens_decoder.values()} | {IMAGE_TOKEN}
    cut = sorted((mark for mark in marks if len(mark.strip()) > 1), key=len, reverse=True)
    firsts = "".join(sorted({re.escape(mark[0]) for mark in cut}))  # most characters begin none of them
    return re.compile(f"(?=[{firsts}])(?:{'|'.join(map(re.escape, cut))})")


def as_typed(text: str, special: re.Pattern[str]) -> str:
    """A text with every special token cut by `BREAK`, so that the LLM reads it as the text that it is.

    `FoveateProcessor.prompt` takes the cuts out again.

    Args:
        text: what somebody typed.
        special: as of `special_tokens`.
    """
    text = text.replace(BREAK, "")
    while special.search(text):  # again where two overlap
        text = special.sub(lambda found: found[0][0] + BREAK + found[0][1:], text)
    return text


def tokens_of(text: str, tokenizer: Any, special: bool = False) -> list[int]:
    """The tokens of a text, piece by piece where `BREAK` cuts it.

    Args:
        text: may have been through `as_typed`.
        tokenizer: of the LLM.
        special: whether tokens that begin every text are added.
    """
    first, *rest = text.split(BREAK)
    ids: list[int] = list(tokenizer(first, add_special_tokens=special)["input_ids"])
    for piece in rest:
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    return ids


def decoded(text: str) -> bytes:
    """The bytes of a picture in base64. Raises `FoveateError`."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        raise FoveateError(f"{text[:20]!r} is not a picture in base64") from None


def kind_of(value: Any) -> str:
    """What a value of JSON is, in words for messages."""
    names = {str: "a text", dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def pictures_of(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The pictures of a conversation, as its messages give them. Raises `FoveateError` if one is missing."""
    parts = [part for m in messages for part in m["content"] if part["type"] == "image"]
    if not all("image" in part for part in parts):
        raise FoveateError(f"a message has a picture's place without the picture: give {PARTS}")
    return [part["image"] for part in parts]


def without_pictures(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages with pictures marked, but without the pictures themselves."""
    return [
        {
            **m,
            "content": [{"type": "image"} if part["type"] == "image" else part for part in m["content"]],
        }
        for m in messages
    ]


@dataclass(frozen=True)
class _Marks:
    """What a chat template writes around the messages of a conversation.

    Attributes:
        question: before a question.
        answer: between a question and its answer; never blank.
        closes: between an answer and the next question.
        end: behind the last answer.
        system: behind a system message, if the template puts that one into the first question; else None.
    """

    question: str
    answer: str
    closes: str
    end: str
    system: str | None


def _marks(render: Callable[..., str]) -> _Marks | None:
    """Found with a conversation of known words; None if the template writes nothing before an answer."""
    words = ("the first question", "the first answer", "the second question", "the second answer")
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": word} for role, word in zip(roles, words, strict=True)]
    known = render(messages)
    if not all(known.count(word) == 1 for word in words):
        return None
    before, opens, closes, _, end = re.split("|".join(words), known)
    prompt = render(messages[:1], add_generation_prompt=True)
    if known.startswith(prompt):  # what follows it belongs to the answer
        opens = prompt[len(before) + len(words[0]) :]
    if not opens.strip():
        return None
    both = takewhile(lambda pair: pair[0] == pair[1], zip(before[::-1], closes[::-1], strict=False))
    question = "".join(one for one, _ in both)[::-1]
    return _Marks(question, opens, closes, end, _behind_system(question, messages, render))


def _behind_system(
    question: str, messages: Sequence[Mapping[str, Any]], render: Callable[..., str]
) -> str | None:
    system = {"role": "system", "content": "the system message"}
    try:
        known = render([system, *messages])
    except FoveateError:  # a template without such messages
        return None
    before, found, rest = known.partition(system["content"])
    return rest[: rest.find(messages[0]["content"])] if found and question in before else None


def questions_in(text: str, render: Callable[..., str]) -> list[str] | None:
    """The question to each picture in a text that a chat template wrote, as `picture_queries` gives it.

    Args:
        text: as the template wrote it, with `<image>` in the messages of the user.
        render: messages, and `add_generation_prompt`, to the template's text.

    Returns:
        Per picture the text beside it in the user's message; None if the messages cannot be told apart, or if
        a system message may be part of the first one.
    """
    marks = _marks(render)
    if marks is None or not marks.question.strip():
        return None
    queries = []
    for found in re.finditer(re.escape(IMAGE_TOKEN), text):
        start = text.rfind(marks.question, 0, found.start())
        end = text.find(marks.answer, found.end())
        if start < 0 or end < 0:
            return None
        message = text[start + len(marks.question) : end]
        first = text.find(marks.question) == start
        if first and marks.system is not None and marks.system in message:
            return None
        queries.append(" ".join(part.strip() for part in message.split(IMAGE_TOKEN) if part.strip()))
    return queries


def answers_in(text: str, render: Callable[..., str]) -> list[tuple[int, int]]:
    """The answers in a text that a chat template wrote, end marks included.

    The template's text around an answer is found with a conversation of known words. A text that ends in a
    question, or in the middle of an answer, is to be continued: none of its answers is learnt. The same holds
    if the template writes nothing between question and answer.

    Args:
        text: as the template wrote it.
        render: messages, and `add_generation_prompt`, to the template's text.

    Returns:
        Start and end of each answer, in characters; empty if there is none.
    """
    marks = _marks(render)
    if marks is None:
        return []
    opens, closes, end = marks.answer, marks.closes.rstrip(), marks.end.rstrip()
    spans: list[tuple[int, int]] = []
    start = text.find(opens)
    while start >= 0:
        start += len(opens)
        stop = text.find(closes, start) if closes else -1
        if stop < 0:
            last = text[start:].rstrip()
            unended = not last.endswith(end) or not last.removesuffix(end).strip()
            return [] if unended else [*spans, (start, start + len(last))]
        stop += len(end) if closes.startswith(end) else 0
        spans.append((start, stop))
        start = text.find(opens, stop)
    return []


def picture_queries(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Per picture of a conversation, the user's text in the message that shows it. Never an answer."""
    queries = []
    for message in messages:
        text = " ".join(part["text"].strip() for part in message["content"] if part["type"] == "text")
        queries += [text for part in message["content"] if part["type"] == "image"]
    return queries


def load_tokenizer(folder: str | Path) -> tuple[Any, int]:
    """A folder's tokenizer with the image token added, ready for padding, and the image token's id."""
    from transformers import AutoTokenizer

    try:
        with one_sentence(f"{folder} has no tokenizer that transformers can read"):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            prepare_tokenizer(tokenizer)
    except (FoveateError, ImportError) as error:
        lacking = [package for package in ("sentencepiece", "google.protobuf") if not installed(package)]
        if lacking and any(Path(folder).glob("*.model")):
            raise missing_extra(lacking[0], "original", f"the tokenizer in {folder}") from error
        raise
    return tokenizer, prepare_tokenizer(tokenizer)


def separator_token(tokenizer: Any) -> int | None:
    """Id of the comma, which some methods put between groups of visual tokens; None if there is none."""
    ids = tokenizer(",", add_special_tokens=False)["input_ids"]
    return ids[-1] if ids else None


def prepare_tokenizer(tokenizer: Any) -> int:
    """Adds an image token and a padding token if missing; returns the image token's id."""
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
