"""Conversations: the turns in which a method answers a question, for several pictures in parallel."""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from foveate import upstream
from foveate.ask.answer import Answer, Ledger
from foveate.ask.context import Context
from foveate.ask.engine import Engine, Said
from foveate.errors import FoveateError, check_text
from foveate.explaining.explanation import Explanation, SeenView, Told, explain
from foveate.explaining.faithfulness import PROBE, Probe
from foveate.explaining.own import Own
from foveate.explaining.relevance import Reading
from foveate.explaining.story import Story
from foveate.methods.base import IMAGE_TOKEN, Reply, Turn
from foveate.picture.account import Account
from foveate.picture.drawing import shown_views
from foveate.picture.geometry import Box, Size, whole

# Arguments of `generate` about the answer's end and words, which would spoil an intermediate box.
OF_ANSWERS = (
    *("streamer", "min_new_tokens", "min_length", "stop_strings", "stopping_criteria", "length_penalty"),
    *("exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "eos_token_id"),
    *("prefix_allowed_tokens_fn", "logits_processor", "bad_words_ids", "sequence_bias", "suppress_tokens"),
    *("begin_suppress_tokens", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "repetition_penalty"),
)


class Chat:
    """A conversation about one picture. Every question sees what was said before."""

    def __init__(self, engine: Engine, picture: Image.Image) -> None:
        self.engine = engine
        self.picture = picture
        self.messages: list[dict[str, Any]] = []
        self.accounts: list[Account] = []
        self.areas: list[Box] = []  # per picture of the messages the part of the picture that it shows
        self.last: Answer | None = None
        self._context = Context()

    def ask(self, question: str, *, max_new_tokens: int = 256, **generation: Any) -> Answer:
        """As `Foveate.ask`."""
        generation["max_new_tokens"] = max_new_tokens
        return converse([self], [question], self._context, generation)[0]

    def explain(self, *, words: int = 32, reading: Reading = "chefer", probe: Probe = PROBE) -> Explanation:
        """Explains the last answer. Nobody else can ask the model meanwhile.

        Args:
            words: how many of the answer's tokens are explained, its first ones.
            reading: of attention and gradient, as in `foveate.explaining.relevance`.
            probe: how faithfulness is measured.

        Raises:
            FoveateError: nothing was asked yet; an LLM whose relevance cannot be propagated.
        """
        if self.last is None:
            raise FoveateError("there is no answer to explain: ask a question first")
        engine, answer = self.engine, self.last
        account = engine.account(self.picture).joined(answer.account)
        told = Told(engine.model.method.title, answer.question, answer.text, account, self.views())
        story = Story(self.picture, self.messages[:-1], self.areas, answer.tokens)
        with engine.gate.alone():
            own = Own(engine.model, engine.processor)
            return explain(own, story, told, words=words, reading=reading, probe=probe)

    def views(self) -> list[SeenView]:
        """All views that the model was shown so far, with what they show in original pixels."""
        account = self.engine.account(self.picture)
        images = self.engine.processor.image_processor
        shown = [part["image"] for m in self.messages for part in m["content"] if part["type"] == "image"]
        views = []
        for number, (picture, area) in enumerate(zip(shown, self.areas, strict=True)):
            plan = self.engine.plan(picture)
            painted = [images.paint(picture, canvas) for canvas in plan.canvases]
            across, down = area.width / plan.picture.width, area.height / plan.picture.height
            for view, box in zip(
                shown_views(plan, painted, "crop" if number else None), plan.regions, strict=True
            ):
                place = Box(
                    area.left + box.left * across,
                    area.top + box.top * down,
                    area.left + box.right * across,
                    area.top + box.bottom * down,
                )
                views.append(SeenView.of(view.role, place, view.picture))
        everything = whole(Size(self.picture.height, self.picture.width))
        views += [SeenView.of(role, everything, images.shown(pixels)) for role, pixels in account.views]
        return views

    def turns(self, question: str) -> Generator[Turn, str, Reply]:
        """The turns that answer a question; further questions take one each."""
        if not self.messages:
            return self.engine.model.method.converse(self.picture, question)
        return _one_turn(question)

    def check(self, question: str) -> None:
        """Raises `FoveateError` for what is not a question."""
        check_text(question, "the question")
        token = self.engine.processor.image_token
        if token in question:
            raise FoveateError(f"the question contains {token}, which stands for a picture: leave it out")

    def answer(self, question: str, asked: Asked, end: Reply) -> Answer:
        """Stores what was said, and returns where the model looked."""
        method, notes = self.engine.model.method, list(end.notes)
        if self.messages and method.uses_query and method.query_text == "question":
            notes.append(
                "the parts looked at were chosen for the message that showed the picture, "
                "not for this question"
            )
        self.messages, self.accounts, self.areas = asked.messages, asked.accounts, asked.areas
        account = asked.accounts[0]
        self.last = Answer(
            text=end.text,
            ledger=asked.ledger,
            question=question,
            account=replace(
                account,
                regions=account.regions if end.regions is None else end.regions,
                notes=account.notes + notes,
            ),
            picture=self.picture,
            plan=self.engine.plan(self.picture),
            crops=asked.crops,
            tokens=asked.tokens,
            _engine=self.engine,
        )
        return self.last


class Asked:
    """A question in progress: what was said and shown, and its costs so far."""

    def __init__(self, chat: Chat) -> None:
        self.messages, self.accounts = list(chat.messages), list(chat.accounts)
        self.areas = list(chat.areas)
        self.ledger = Ledger()
        self.crops: list[Image.Image] = []
        self.tokens: list[int] = []

    def show(self, turn: Turn) -> None:
        self.areas += turn.areas or [whole(Size(p.height, p.width)) for p in turn.pictures]
        self.messages.append({"role": "user", "content": content(turn)})

    def hear(self, said: Said, text: str) -> None:
        self.messages.append({"role": "assistant", "content": [{"type": "text", "text": text}]})
        pictures = sum(part["type"] == "image" for m in self.messages for part in m["content"])
        self.accounts = [*self.accounts[: pictures - len(said.accounts)], *said.accounts]
        self.ledger.add(said.ledger)
        self.tokens = said.tokens


def _one_turn(question: str) -> Generator[Turn, str, Reply]:
    text = yield Turn(question)
    return Reply(text)


def converse(
    chats: Sequence[Chat], questions: Sequence[str], context: Context, generation: Mapping[str, Any]
) -> list[Answer]:
    """Answers a question in each chat, turn by turn, in parallel.

    Args:
        chats: of one engine, one for each question.
        questions: one for each chat.
        context: that of the chats' last turn.
        generation: arguments of transformers' `generate`.

    Raises:
        FoveateError: an invalid question, or answers of no token.
    """
    if generation.get("max_new_tokens", 1) < 1:
        raise FoveateError(f"max_new_tokens must be at least 1, it is {generation['max_new_tokens']}")
    for chat, question in zip(chats, questions, strict=True):
        chat.check(question)
    engine = chats[0].engine
    settings = upstream.settings_of(engine.model.generation_config, generation)
    if settings.get("num_return_sequences") not in (None, 1):
        raise FoveateError("num_return_sequences: a question has one answer here; ask it several times")
    asked = [Asked(chat) for chat in chats]
    turns = [chat.turns(question) for chat, question in zip(chats, questions, strict=True)]
    ends: dict[int, Reply] = {}
    live = {row: next(turn) for row, turn in enumerate(turns)}
    first = True
    while live:
        for row, turn in live.items():
            asked[row].show(turn)
            asked[row].crops += [] if first else turn.pictures
        said = engine.say(
            [asked[row].messages for row in live], context, **_bounded(generation, list(live.values()))
        )
        before = list(live)
        for row, one in zip(before, said, strict=True):
            # A picture's placeholder in a reply stands for no picture.
            asked[row].hear(one, one.text.replace(engine.processor.image_token, ""))
            try:
                live[row] = turns[row].send(one.text)
            except StopIteration as stop:
                ends[row] = stop.value
                del live[row]
        if live:
            context.select([before.index(row) for row in live])
        first = False
    return [
        chat.answer(question, asked[row], ends[row])
        for row, (chat, question) in enumerate(zip(chats, questions, strict=True))
    ]


def content(turn: Turn) -> list[dict[str, Any]]:
    """A turn as the parts of a user's message."""
    text = turn.text if IMAGE_TOKEN in turn.text else IMAGE_TOKEN * len(turn.pictures) + turn.text
    before, *pieces = text.split(IMAGE_TOKEN)
    parts: list[dict[str, Any]] = [{"type": "text", "text": before}] if before else []
    for picture, piece in zip(turn.pictures, pieces, strict=True):
        parts.append({"type": "image", "image": picture})
        piece = piece.removeprefix("\n")  # chat templates add the line break after a picture themselves
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


def _bounded(generation: Mapping[str, Any], turns: Sequence[Turn]) -> dict[str, Any]:
    """The arguments of `generate` for turns that run in parallel.

    Requirements on the answer's length and form do not apply to intermediate steps.
    """
    arguments = dict(generation)
    bounds = [turn.max_new_tokens for turn in turns if turn.max_new_tokens is not None]
    if len(bounds) == len(turns):
        arguments["max_new_tokens"] = max(bounds)
        arguments.pop("max_length", None)
    if all(turn.inner for turn in turns):
        arguments = {name: value for name, value in arguments.items() if name not in OF_ANSWERS}
        if "generation_config" in arguments:
            config = copy.deepcopy(arguments["generation_config"])
            config.update(**dict.fromkeys(OF_ANSWERS))
            arguments["generation_config"] = config
    return arguments
