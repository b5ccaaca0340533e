"""Text: tokenizers with an image token, chat templates, and messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from foveate.errors import FoveateError, installed, missing_extra
from foveate.methods.base import IMAGE_TOKEN

TEMPLATES = ("plain", "bare", "vicuna_v1", "llama3", "llama3_v1", "mistral", "chatml")


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
    """Copies messages with every content as a list of parts. Raises `FoveateError` for what is no message."""
    if not messages:
        raise FoveateError("the conversation is empty: give at least one message")
    normal = []
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise FoveateError(f"a message needs a role and a content, got {message!r}")
        content = message["content"]
        parts = (
            [{"type": "text", "text": content}]
            if isinstance(content, str)
            else [dict(part) for part in content]
        )
        normal.append({**message, "content": parts})
    return normal


def picture_queries(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Per picture of a conversation, the user's text of the message that shows it. Never an answer."""
    queries = []
    for message in messages:
        text = " ".join(part["text"].strip() for part in message["content"] if part["type"] == "text")
        queries += [text for part in message["content"] if part["type"] == "image"]
    return queries


def load_tokenizer(folder: str | Path) -> tuple[Any, int]:
    """A folder's tokenizer with the image token added, ready for padding, and the image token's id."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        lacking = [package for package in ("sentencepiece", "google.protobuf") if not installed(package)]
        if lacking and any(Path(folder).glob("*.model")):
            raise missing_extra(lacking[0], "original", f"the tokenizer in {folder}") from error
        if isinstance(error, ImportError):
            raise
        raise FoveateError(
            f"{folder} has no tokenizer that transformers can read: {str(error).splitlines()[0]}"
        ) from error
    return tokenizer, prepare_tokenizer(tokenizer)


def separator_token(tokenizer: Any) -> int | None:
    """Id of the comma, which some methods write between groups of visual tokens; None where there is none."""
    ids = tokenizer(",", add_special_tokens=False)["input_ids"]
    return ids[-1] if ids else None


def prepare_tokenizer(tokenizer: Any) -> int:
    """Adds the image token where it is missing and a padding token; returns the image token's id."""
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
