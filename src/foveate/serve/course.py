"""One request's way through its turns: what is shown to the model next, and what its answer is made of."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from foveate.ask.answer import Ledger
from foveate.ask.conversation import content
from foveate.ask.engine import Engine
from foveate.errors import FoveateError, check_text
from foveate.methods.base import Method, Reply, Turn
from foveate.model.text import as_typed, normalise_messages
from foveate.picture.geometry import Box
from foveate.serve.prefixes import Seen
from foveate.serve.settings import Token

Messages = list[dict[str, Any]]
AS_IT_STANDS = (
    "the conversation was read as it stands, in one turn: {method} looks for a region only where one message "
    "shows one picture and asks about it"
)


@dataclass(frozen=True)
class Look:
    """A part of a picture, in its own pixels.

    Attributes:
        picture: the number of the picture in the request, from 0.
        box: the part.
    """

    picture: int
    box: Box


@dataclass(frozen=True)
class Completed:
    """An answer.

    Attributes:
        text: without white space at both ends.
        finish: `stop` if it ended by itself or at one of the texts that end it, `length` at a bound.
        tokens: that it was made of, with their probabilities if these were wanted.
        regions: parts of the pictures that were looked at.
        views: parts of the pictures that the views show.
        notes: sentences about how the method came to it.
        ledger: the costs.
        prompt_tokens: that the LLM had before the answer; those of intermediate turns are among them.
        cached_tokens: of these, that it had read for earlier requests.
        visual_tokens: of these, of pictures.
        inner_tokens: written in intermediate turns.
    """

    text: str
    finish: str
    tokens: list[Token]
    regions: list[Look]
    views: list[Look]
    notes: list[str]
    ledger: Ledger
    prompt_tokens: int
    cached_tokens: int
    visual_tokens: int
    inner_tokens: int


@dataclass
class Course:
    """A request in progress.

    Args:
        engine: answers.
        messages: of the conversation, with PIL images as pictures; the last one is the user's.
        special: the special tokens, which are text where somebody typed them.

    Attributes:
        messages: what the model is shown in this turn.
        turn: the turn; None if the conversation is read as it stands.
        number: of the turn, from 0.
        ledger: the costs of the turns before.

    Raises:
        FoveateError: messages that make no sense.
    """

    engine: Engine
    messages: Sequence[Mapping[str, Any]]
    special: re.Pattern[str]
    turn: Turn | None = None
    number: int = 0
    ledger: Ledger = field(default_factory=Ledger)
    cached_tokens: int = 0
    inner_tokens: int = 0
    _turns: Generator[Turn, str, Reply] | None = None

    def __post_init__(self) -> None:
        given = [_typed(message, self.special) for message in normalise_messages(self.messages)]
        if given[-1]["role"] != "user":
            raise FoveateError("the last message must be the user's")
        self.pictures: list[Image.Image] = [
            part["image"] for m in given for part in m["content"] if part["type"] == "image"
        ]
        self.messages = given
        asked = question_of(given)
        if asked is not None:
            picture, question = asked
            check_text(question, "the question")
            self.messages = given[:-1]
            self._turns = self.engine.model.method.converse(picture, question)
            self._show(next(self._turns))

    @property
    def last(self) -> bool:
        """Whether the reply to this turn is shown to whoever asked."""
        return self.turn is None or not self.turn.inner

    def _show(self, turn: Turn) -> None:
        self.turn = turn
        self.messages = [*self.messages, {"role": "user", "content": content(turn)}]

    def hear(self, text: str, ledger: Ledger, seen: Sequence[Seen]) -> Reply | None:
        """Takes the model's reply; returns the end, or None if another turn follows.

        Args:
            text: the reply.
            ledger: what it cost.
            seen: the pictures of the conversation so far.
        """
        self.ledger.add(ledger)
        if not self.number:
            self.cached_tokens = ledger.kept_tokens
        if self._turns is None:
            return Reply(text)
        try:
            turn = self._turns.send(text)
        except StopIteration as end:
            reply: Reply = end.value
            return reply
        said = {"type": "text", "text": as_typed(text, self.special)}
        self.messages = [*self.messages, {"role": "assistant", "content": [said]}]
        self.inner_tokens += ledger.new_tokens
        self.number += 1
        self._show(turn)
        return None

    def complete(
        self, end: Reply, finish: str, tokens: list[Token], seen: Sequence[Seen], prompt_tokens: int
    ) -> Completed:
        """The answer.

        Args:
            end: of the turns.
            finish: why the last reply ended.
            tokens: of the last reply.
            seen: the pictures of the conversation.
            prompt_tokens: of the last turn.
        """
        method = self.engine.model.method
        regions, views, notes = [], [], []
        for i, (picture, one) in enumerate(zip(self.pictures, seen, strict=False)):
            shown = self.engine.plan(picture).regions
            chosen = end.regions if i == 0 and end.regions is not None else one.account.regions
            regions += [Look(i, box) for box in (shown if chosen is None else chosen)]
            views += [Look(i, box) for box in shown]
            notes += one.account.notes
        notes += end.notes
        if self._turns is None and self.pictures and type(method).converse is not Method.converse:
            notes.append(AS_IT_STANDS.format(method=method.title))
        return Completed(
            text=end.text,
            finish=finish,
            tokens=tokens,
            regions=regions,
            views=views,
            notes=notes,
            ledger=self.ledger,
            prompt_tokens=prompt_tokens,
            cached_tokens=self.cached_tokens,
            visual_tokens=sum(one.tokens for one in seen),
            inner_tokens=self.inner_tokens,
        )


def question_of(messages: Sequence[Mapping[str, Any]]) -> tuple[Image.Image, str] | None:
    """The picture and the text of a conversation that asks once about one picture; None for others.

    System messages may stand before both.
    """
    *before, last = messages
    if any(message["role"] != "system" for message in before):
        return None
    if [part["type"] for part in last["content"]] != ["image", "text"]:
        return None
    picture, text = last["content"]
    return picture["image"], text["text"]


def _typed(message: Mapping[str, Any], special: re.Pattern[str]) -> dict[str, Any]:
    """A message in which special tokens are text; texts that follow one another are one.

    Its picture, if it shows one, comes before its text, as models of this kind have learnt it.
    """
    parts: list[dict[str, Any]] = []
    for part in message["content"]:
        if part["type"] == "text" and parts and parts[-1]["type"] == "text":
            parts[-1] = {"type": "text", "text": parts[-1]["text"] + part["text"]}
        elif part["type"] != "text" or part["text"]:
            parts.append(part)
    if not any(part["type"] == "image" or part["text"].strip() for part in parts):
        raise FoveateError("a message is empty: give it a text or a picture")
    if [part["type"] for part in parts] == ["text", "image"]:
        parts.reverse()
    typed = [p if p["type"] != "text" else {**p, "text": as_typed(p["text"], special)} for p in parts]
    return {"role": message["role"], "content": typed}
