"""The engine: safe for threads, its memory bounded in bytes, each picture encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from foveate import Foveate
from foveate.ask.answer import Answer, Ledger
from foveate.ask.context import Context
from foveate.ask.engine import Memory
from foveate.methods import METHODS
from foveate.picture.geometry import Box, Canvas, Size, whole
from foveate.picture.source import Look
from tests.methods.conftest import fresh
from tests.support import chat, picture

WORDS = {"max_new_tokens": 6, "repetition_penalty": 1.3}  # random models repeat themselves otherwise
SIZES = ((70, 90), (90, 70), (64, 64), (120, 50))
QUESTIONS = ("What is it?", "Where?", "How many are there in all?")


def told(answer: Answer) -> tuple[Any, ...]:
    """All that an answer says, but for times and for what was encoded before."""
    cost = replace(answer.ledger, seconds={}, encoded_views=0, tflop=0.0)
    return answer.text, answer.regions, answer.notes, answer.heat, [c.boxes for c in answer.chains], cost


def asks(number: int) -> list[tuple[int, str]]:
    return [(i % len(SIZES), QUESTIONS[i % len(QUESTIONS)]) for i in range(number)]


@pytest.mark.parametrize("number", [8, pytest.param(36, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_eight_threads_answer_as_one(method: str, number: int) -> None:
    pictures = [picture(*size) for size in SIZES]
    wanted = asks(number)
    alone = fresh(method)
    expected = [told(alone.ask(pictures[i], question, **WORDS)) for i, question in wanted]
    shared = fresh(method)
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(shared.ask, pictures[i], question, **WORDS) for i, question in wanted]
        answers = [one.result() for one in running]
    assert [told(answer) for answer in answers] == expected
    encoded = sum(answer.ledger.encoded_views for answer in answers)
    if not alone.model.method.reads_source and len(shared.model.method.turn_sizes(Size(64, 64))) == 1:
        assert encoded == sum(len(shared.plan(image).views) for image in pictures)  # each picture once


def test_threads_hold_conversations_of_their_own() -> None:
    model = fresh("slime")
    images = [picture(*size) for size in SIZES]

    def talk(image: Any) -> list[str]:
        conversation = model.chat(image)
        return [conversation.ask(question, **WORDS).text for question in QUESTIONS]

    alone = [talk(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(talk, images)) == alone


def features(number: int) -> torch.Tensor:
    return torch.zeros(number)  # 4 bytes each


def looks(numbers: Sequence[int]) -> dict[Look, torch.Tensor]:
    canvas = Canvas(Size(8, 8), whole(Size(8, 8)), whole(Size(8, 8)))
    return {Look(canvas, Box(i, 0, i + 1, 1)): features(n) for i, n in enumerate(numbers)}


def test_memory_is_bounded_in_bytes_and_forgets_what_is_oldest() -> None:
    memory = Memory(100)
    memory.keep({"a": features(10)})
    memory.keep({"b": features(10)})
    memory.forget()
    assert list(memory.features) == ["a", "b"]
    memory.keep({"a": memory.features["a"]})  # used again
    memory.keep({"c": features(10)})
    memory.forget()
    assert list(memory.features) == ["a", "c"]
    assert memory.bytes == 80
    memory.looks["a"] = looks([2, 2, 2])
    memory.forget()
    assert len(memory.looks["a"]) == 2  # the earliest of its parts goes before the picture
    assert memory.bytes == 96
    memory.keep({"d": features(20)})
    memory.forget()
    assert list(memory.features) == ["d"]
    assert memory.looks == {}


def test_what_is_larger_than_the_memory_is_answered_and_not_kept() -> None:
    for method in ("anyres", "coroi"):
        made = fresh(method)
        small = Foveate(made.model, made.processor, memory=0)
        answer = small.ask(picture(70, 90), "What is it?", **WORDS)
        assert answer.text == made.ask(picture(70, 90), "What is it?", **WORDS).text
        assert small.engine.memory.bytes == 0
        assert not small.engine.memory.looks


def test_memory_stays_within_its_bound_over_many_pictures() -> None:
    made = fresh("coroi")
    made.ask(picture(70, 90), "What is it?", **WORDS)
    one = made.engine.memory.bytes
    bounded = Foveate(made.model, made.processor, memory=3 * one)
    for seed in range(6):
        bounded.ask(picture(70, 90, seed=seed), "What is it?", **WORDS)
        assert bounded.engine.memory.bytes <= 3 * one
    last = bounded.ask(picture(70, 90, seed=5), "What is it?", **WORDS)
    assert last.ledger.encoded_views == 0


def test_a_turn_says_what_it_cost_alone() -> None:
    made = fresh("llava")
    context, messages = Context(), chat("What is it?", picture(70, 90))
    (first,) = made.engine.say([messages], context, **WORDS)
    messages += [{"role": "assistant", "content": [{"type": "text", "text": first.text}]}, *chat("Sure?")]
    (second,) = made.engine.say([messages], context, **WORDS)
    assert [len(said.accounts) for said in (first, second)] == [1, 0]
    assert second.ledger.views == second.ledger.visual_tokens == 0
    whole_cost = Ledger()
    for said in (first, second):
        whole_cost.add(said.ledger)
    assert whole_cost.prompt_tokens == first.ledger.prompt_tokens + second.ledger.prompt_tokens
    assert whole_cost.kv_megabytes == second.ledger.kv_megabytes > first.ledger.kv_megabytes
    assert whole_cost.total_seconds == pytest.approx(first.ledger.total_seconds + second.ledger.total_seconds)
