"""The engine: safe for threads, its memory bounded in bytes, each picture encoded once."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foveate import Foveate
from foveate.ask.answer import Answer, Ledger
from foveate.ask.context import Context
from foveate.ask.engine import Engine, Memory
from foveate.methods import METHODS
from foveate.picture.geometry import Box, Canvas, Size, whole
from foveate.picture.source import Look, Source
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


def test_answers_show_their_chains_and_know_what_they_cost(tmp_path: Path) -> None:
    m = fresh("coroi")
    image = picture(120, 160)
    first = m.ask(image, "What is it?", max_new_tokens=3)
    again = m.ask(image, "What is it?", max_new_tokens=3)
    assert [chain.name for chain in first.chains] == ["2x", "3x", "4x"]
    assert [box for chain in first.chains for box in chain.boxes] == first.regions
    seen = len({*first.regions})
    assert (first.ledger.views, first.ledger.encoded_views) == (1 + seen, 1 + seen)
    assert (again.ledger.views, again.ledger.encoded_views) == (1 + seen, 0)
    assert again.text == first.text
    vision = m.engine.pricer.vision(Size(120, 160))
    saved = (vision.encode + seen * vision.look) / 1e12  # scorer, projector and injection work every time
    assert first.ledger.tflop - again.ledger.tflop == pytest.approx(saved)
    prefill, decode, _ = m.engine.pricer.language(again.ledger.prompt_tokens)
    every_time = vision.connect + vision.inject + prefill + decode * (again.ledger.new_tokens - 1)
    assert again.ledger.tflop == pytest.approx(every_time / 1e12)
    pixels = first.chains[0].pixels()
    assert pixels.shape == (4, 3, 56, 56)
    drawing = first.show(tmp_path / "seen.png")
    assert drawing.height > 3 * drawing.width / 6  # a row for each scale
    other = m.ask(image, "Where is the smallest of all the things?", max_new_tokens=3)
    assert other.ledger.encoded_views < other.ledger.views


def test_an_answer_keeps_its_own_picture_and_nothing_of_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []
    plain = Engine._source

    def noted(self: Engine, shown: Any) -> Source:
        source = plain(self, shown)
        alive.extend(weakref.ref(kept) for kept in (source, source.pictures[1], source.pictures[0]))
        return source

    monkeypatch.setattr(Engine, "_source", noted)
    m = fresh("coroi")
    image = picture(60, 80)
    answer = m.ask_all([(image, "What?"), (picture(61, 90), "Where?")], max_new_tokens=2)[0]
    gc.collect()
    assert [kept() is None for kept in alive] == [True, True, False]
    box = answer.chains[0].boxes[0]
    part = np.asarray(image.crop(box.rounded()).resize((56, 56))) / 255
    shown = np.asarray(m.processor.image_processor.shown(answer.chains[0].pixels()[0])) / 255
    assert np.abs(part - shown).mean() < 0.1


def test_the_windows_of_the_latest_questions_are_remembered() -> None:
    m, image = fresh("coroi"), picture(300, 400)
    m.model.connector.scorer.cross_attention.out.weight.data.mul_(20)
    first, other = "Why?", "What is written on the large sign in the middle?"
    chosen = len({*m.ask(image, first, max_new_tokens=1).regions})
    m.ask(image, other, max_new_tokens=1)
    memory = m.engine.memory
    looks = [look for parts in memory.looks.values() for look in parts.values()]
    memory.most = chosen * looks[0].nbytes + sum(features.nbytes for features in memory.features.values())
    assert m.ask(image, first, max_new_tokens=1).ledger.encoded_views == 0
    assert m.ask(image, first, max_new_tokens=1).ledger.encoded_views == 0
    assert m.ask(image, other, max_new_tokens=1).ledger.encoded_views > 0


def test_a_further_question_says_whose_windows_it_shows() -> None:
    image = picture(60, 80)
    for options, told in (({}, 1), ({"chain": False}, 0)):
        chat = fresh("coroi", **options).chat(image)
        answers = [chat.ask(question, max_new_tokens=2) for question in ("What?", "Where?")]
        assert [len(answer.notes) for answer in answers] == [0, told]
        if told:
            assert "were chosen for the message that showed the picture" in answers[1].notes[0]
            assert answers[1].regions == answers[0].regions
