"""What converters make of a record, and how they read its fields."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foveate.errors import FoveateError

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NO_OPTION = "its answer is none of its options"
OTHER_ANSWER = "its reasoning leads to another answer"
CONCLUSION = re.compile(r"\banswer(?: is|:)\s*:?\s*(?:option\s*)?\(?([A-Z])\b(?!')")


@dataclass(frozen=True)
class Draft:
    """A sample before the filters.

    Attributes:
        where: its file and place there, for messages.
        name: its id within its source.
        picture: a path below the source's folder; bytes if the record holds it.
        query: what the user says, without the picture's mark.
        answer: what the assistant says: the reasoning, if the source has it, and the answer.
        problem: why it cannot be learnt, for those that a converter recognises.
    """

    where: str
    name: str
    picture: str | bytes
    query: str
    answer: str
    problem: str | None = None


class Fields:
    """The fields of a record. Every method raises `FoveateError` that begins with the record's place."""

    def __init__(self, record: Any, where: str) -> None:
        if not isinstance(record, Mapping):
            raise FoveateError(f"{where} must be a JSON object, not {type(record).__name__}")
        self.record, self.where = record, where

    def has(self, key: str) -> bool:
        return self.record.get(key) is not None

    def text(self, key: str, otherwise: str | None = None) -> str:
        """A text; a number is written as one. Without it, `otherwise`, or an error."""
        value = self.record.get(key)
        if value is None and otherwise is not None:
            return otherwise
        return self._text(value, key)

    def texts(self, key: str) -> list[str]:
        """A list of texts; a single text is one of one."""
        value = self.record.get(key)
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            value = [value]
        if not isinstance(value, (list, tuple)):
            raise FoveateError(f"{self.where}: {key!r} must be a list of texts, not {_kind(value)}")
        return [self._text(one, key) for one in value]

    def whole(self, key: str) -> int:
        value = self.record.get(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise FoveateError(f"{self.where}: {key!r} must be a whole number, not {_kind(value)}")
        return value

    def inner(self, key: str) -> Fields:
        return Fields(self.record.get(key), f"{self.where}: {key!r}")

    def _text(self, value: Any, key: str) -> str:
        if isinstance(value, str):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        raise FoveateError(f"{self.where}: {key!r} must be a text or a number, not {_kind(value)}")


def _kind(value: Any) -> str:
    return "missing" if value is None else type(value).__name__


def with_options(question: str, options: Sequence[str]) -> str:
    """A question and its options, a letter before each: one per line."""
    listed = [f"{letter}. {bare_option(option)}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question.strip(), *listed])


def bare_option(option: str) -> str:
    """An option without a letter of its own, which some sources write."""
    return re.sub(r"^\s*\(?[A-Z]\s*[).:]\s*", "", option).strip() or option.strip()


def chosen(label: str, options: Sequence[str]) -> int | None:
    """The number of the option that a label names by its letter or by its text; None if it names none."""
    label = label.strip()
    same = [i for i, option in enumerate(options) if bare_option(option) == bare_option(label)]
    if len(same) == 1 and len(label) > 1:
        return same[0]
    match = re.match(r"\(?([A-Za-z])(?:[).:\s]|$)", label)
    number = LETTERS.index(match[1].upper()) if match else -1
    return number if 0 <= number < len(options) else None


def reasoned(reasoning: str, answer: str) -> str:
    """The reasoning path, and then the answer on a line of its own; the answer alone without one."""
    reasoning = reasoning.strip()
    return f"{reasoning}\nAnswer: {answer}" if reasoning else answer


def contradicts(reasoning: str, letter: str) -> bool:
    """Whether a reasoning path says that another option is the answer."""
    concluded = CONCLUSION.findall(reasoning)
    return bool(concluded) and concluded[-1] != letter
