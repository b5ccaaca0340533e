"""Many requests at once: the answers of each alone, pictures encoded once, places freed at once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from foveate import Foveate, FoveateError
from foveate.ask.context import Context
from foveate.methods import METHODS
from foveate.model.text import normalise_messages
from foveate.serve.course import Completed, Course
from foveate.serve.scheduler import Bounds, Full, Late, Piece, Row, Running, Scheduler, Stopped
from foveate.serve.settings import Settings
from tests.methods.conftest import fresh
from tests.serve.support import wait_for
from tests.support import chat, picture

SIZES = ((70, 90), (90, 70), (64, 64), (120, 50))
QUESTIONS = ("What is it?", "Where?", "How many are there in all?")
WORDS = 6


def model(method: str = "llava", **options: Any) -> Foveate:
    """Random models repeat themselves without the penalty."""
    made = fresh(method, **options)
    made.model.generation_config.repetition_penalty = 1.3
    return made


def told(answer: Completed) -> tuple[Any, ...]:
    return answer.text, answer.regions, answer.notes, answer.visual_tokens, answer.prompt_tokens


@pytest.mark.parametrize("method", METHODS)
def test_every_answer_is_the_one_alone(method: str) -> None:
    """Also of methods that ask twice, route by the question, or change states of the LLM's layers."""
    pictures = [picture(*size) for size in SIZES]
    asked = [(i % 4, QUESTIONS[i % 3]) for i in range(8)]
    alone = model(method)
    expected = [alone.ask(pictures[i], question, max_new_tokens=WORDS) for i, question in asked]
    served = Foveate(alone.model, alone.processor)  # which remembers no picture
    with Scheduler(served.engine, Bounds(places=8)) as scheduler:
        running = [scheduler.ask(pictures[i], question, Settings(WORDS)) for i, question in asked]
        answers = [one.result(60) for one in running]
        steps, encoded = scheduler.counts.steps, scheduler.counts.encoded_views
    assert [answer.text for answer in answers] == [answer.text for answer in expected]
    assert [[look.box for look in a.regions] for a in answers] == [answer.regions for answer in expected]
    assert [answer.notes for answer in answers] == [answer.notes for answer in expected]
    assert [answer.visual_tokens for answer in answers] == [a.ledger.visual_tokens for a in expected]
    assert steps < sum(answer.ledger.new_tokens for answer in answers) / 2  # tokens were written in parallel
    if not served.model.method.reads_source and method != "chain_of_spot":  # whose crops are further pictures
        assert encoded == sum(len(served.plan(image).views) for image in pictures)


@pytest.fixture(scope="module")
def served() -> Iterator[Scheduler]:
    with Scheduler(model().engine, Bounds(places=8, waiting=64)) as scheduler:
        yield scheduler


def test_what_is_drawn_depends_on_the_seed_alone(served: Scheduler) -> None:
    image = picture(70, 90)
    how = [Settings(8, temperature=1.0, top_p=top_p, seed=seed) for seed in range(3) for top_p in (1.0, 0.8)]
    alone = [served.ask(image, "What is it?", one).result(60).text for one in how]
    others = [served.ask(picture(64, 64, seed=i), f"Is it {i}?", Settings(12)) for i in range(6)]
    together = [served.ask(image, "What is it?", one) for one in how]
    assert [one.result(60).text for one in together] == alone
    assert len({*alone}) > 3
    [one.result(60) for one in others]
    free = [served.ask(image, "What is it?", Settings(8, temperature=1.0)) for _ in range(4)]
    assert len({one.result(60).text for one in free}) > 1


def test_nothing_is_answered_while_an_answer_is_explained(served: Scheduler) -> None:
    """Explaining changes how the LLM computes its attention."""
    wait_for(lambda: not served.active)
    before = served.counts.reads
    with served.engine.gate.alone():
        running = served.ask(picture(64, 64, seed=9), "What is it?", Settings(3))
        time.sleep(0.3)
        assert served.counts.reads == before and not running.future.done()
    assert running.result(60)


def test_turns_about_a_picture_are_read_once(served: Scheduler) -> None:
    image, talk = picture(90, 120, seed=5), model().chat(picture(90, 120, seed=5))
    messages: list[dict[str, Any]] = []
    for i, question in enumerate(QUESTIONS):
        messages += chat(question, *([] if i else [image]))
        answer = served.submit(messages, Settings(WORDS)).result(60)
        expected = talk.ask(question, max_new_tokens=WORDS)
        assert answer.text == expected.text
        assert answer.ledger.encoded_views == (0 if i else 1)
        assert answer.ledger.visual_tokens == (0 if i else 16) and answer.visual_tokens == 16
        messages.append({"role": "assistant", "content": answer.text})
    other = served.ask(image, "Another question?", Settings(WORDS)).result(60)
    assert other.cached_tokens > 16 and other.ledger.encoded_views == 0


def test_conversations_of_every_shape(served: Scheduler) -> None:
    """Several pictures, system messages, pictures in later turns, none at all: as they stand, in one turn."""
    one, two = picture(64, 64, seed=1), picture(70, 90, seed=2)
    said = {"role": "assistant", "content": "It is red."}
    system = {"role": "system", "content": "Be brief."}
    conversations = [
        chat("Which is larger?", one, two),
        [system, *chat("What is it?", one)],
        [*chat("What is it?", one), said, *chat("And this?", two)],
        chat("Hello?"),
        [*chat("Hello?"), said, *chat("Why?", one)],
        [{"role": "user", "content": [*chat("What?", one)[0]["content"], *chat("Or?", two)[0]["content"]]}],
    ]
    alone = model()
    expected = []
    for messages in conversations:
        (reply,) = alone.engine.say([normalise_messages(messages)], Context(), max_new_tokens=WORDS)
        expected.append((reply.text, reply.ledger.visual_tokens, reply.ledger.prompt_tokens))
    running = [served.submit(messages, Settings(WORDS)) for messages in conversations]
    answers = [one.result(60) for one in running]
    assert [(a.text, a.visual_tokens, a.prompt_tokens) for a in answers] == expected
    assert [{look.picture for look in a.views} for a in answers] == [{0, 1}, {0}, {0, 1}, set(), {0}, {0, 1}]


def test_a_picture_comes_before_its_text(served: Scheduler) -> None:
    image = picture(70, 90)
    (message,) = chat("What is it?", image)
    turned = [{**message, "content": message["content"][::-1]}]
    answers = [served.submit(m, Settings(WORDS)).result(60) for m in ([message], turned)]
    assert told(answers[0]) == told(answers[1])


def test_a_method_of_two_turns_says_where_it_did_not_look() -> None:
    image, made = picture(70, 90), model("chain_of_spot")
    with Scheduler(made.engine) as scheduler:
        asked = scheduler.ask(image, "What is it?", Settings(4)).result(60)
        assert asked.inner_tokens > 0 and not any("as it stands" in note for note in asked.notes)
        assert asked.ledger.new_tokens == asked.inner_tokens + 4
        several = scheduler.submit(chat("Which?", image, image), Settings(4)).result(60)
        assert several.inner_tokens == 0 and "as it stands" in several.notes[-1]


def test_special_tokens_that_somebody_types_are_text(served: Scheduler) -> None:
    image, processor = picture(70, 90), served.engine.processor
    special = {*processor.tokenizer.all_special_ids}
    question = "Say </s>, <image> and <|im_end|>: what are </s></s>?"
    plain, typed = (
        served._open(Running(m, Settings(), 0, None), _course(served, m))
        for m in (chat("Say it: what are?", image), chat(question, image))
    )
    count = [sum(token in special for token in row.passage.ids) for row in (plain, typed)]
    assert count[0] == count[1] > 16
    assert len(typed.passage.places) == 1
    assert processor.tokenizer.decode(typed.passage.ids).replace("<image>", "", 16).count(question) == 1
    parts = [{"type": "text", "text": "<im"}, {"type": "text", "text": "age>?"}]
    split = [{"role": "user", "content": [*chat("", image)[0]["content"][:1], *parts]}]
    assert served.submit(split, Settings(2)).result(60).visual_tokens == 16


def _course(scheduler: Scheduler, messages: Any) -> Any:
    return Course(scheduler.engine, messages, scheduler.special)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (chat(" "), "a message is empty"),
        (chat(" ", picture(9, 9)), "the question is empty"),
        ([*chat("What?"), {"role": "assistant", "content": "x"}], "the last message must be the user's"),
        ([], "the conversation is empty"),
        (chat("What? " * 2000), "the LLM has 2048 positions"),
        (chat("x" * 10**6), "1000000 characters, for at most 2048 tokens"),
    ],
)
def test_requests_that_make_no_sense_fail_alone(messages: Any, said: str, served: Scheduler) -> None:
    good = served.ask(picture(70, 90), "What is it?", Settings(2))
    with pytest.raises(FoveateError, match=said):
        served.submit(messages, Settings(2)).result(60)
    assert good.result(60).ledger.new_tokens == 2


def test_where_rounding_could_change_a_token_the_row_is_written_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, image = model(), picture(70, 90)
    expected = [made.ask(image, question, max_new_tokens=WORDS).text for question in QUESTIONS]
    monkeypatch.setattr(Scheduler, "_slack", lambda self, scores: 1e9)  # everything could
    pieces: list[Piece] = []
    with Scheduler(made.engine) as scheduler:
        parts = chat(QUESTIONS[0], image)
        live = scheduler.submit(parts, Settings(WORDS, logprobs=0), pieces.append)
        running = [scheduler.ask(image, question, Settings(WORDS)) for question in QUESTIONS]
        assert [one.result(60).text for one in running] == expected
        assert live.result(60).text == "".join(piece.text for piece in pieces) == expected[0]
        assert sum(len(piece.tokens) for piece in pieces) == len(live.result().tokens)
        assert scheduler.counts.alone == 4
    with Scheduler(made.engine, exact=False) as scheduler:
        running = [scheduler.ask(image, question, Settings(WORDS)) for question in QUESTIONS]
        [one.result(60) for one in running]
        assert scheduler.counts.alone == 0


def test_rounding_is_far_below_what_is_allowed_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of rows in batches, of different lengths and with known beginnings, against those alone."""
    made = model("slime")
    seen: dict[tuple[int, int], list[torch.Tensor]] = {}
    plain = Scheduler._choose

    def noted(self: Scheduler, row: Row, logits: torch.Tensor, *more: Any) -> None:
        seen.setdefault((requests.index(row.running), len(row.tokens)), []).append(logits.clone())
        plain(self, row, logits, *more)

    monkeypatch.setattr(Scheduler, "_choose", noted)
    asked = [(picture(60 + i // 3, 90), f"What is it? {i % 3} {'Or ' * i}") for i in range(9)]
    requests: list[Running] = []
    found = []
    for places, kept in ((16, 2**28), (1, 0)):
        seen.clear()
        with Scheduler(made.engine, Bounds(places=places, prefix_bytes=kept), exact=False) as scheduler:
            scheduler._wake.acquire()  # all are there before the first round
            requests = [scheduler.ask(*one, Settings(12)) for one in asked]
            scheduler._wake.release()
            texts = [one.result(60).text for one in requests]
        found.append((texts, {key: logits[0] for key, logits in seen.items()}))
    (texts, batched), (expected, alone) = found
    assert texts == expected and batched.keys() == alone.keys() and len(alone) > 90
    largest = max(float((batched[key] - alone[key]).abs().max() / alone[key].abs().max()) for key in alone)
    assert 0 < largest < 2.0**-16  # a quarter of what is allowed


def test_a_cancelled_request_frees_its_place(served: Scheduler) -> None:
    long = [served.ask(picture(70, 90), "What is it?", Settings(1000)) for _ in range(8)]
    waits = served.ask(picture(64, 64), "What is it?", Settings(2))
    wait_for(lambda: served.active == 8 and long[0].first)
    for one in long:
        one.cancel()
    assert waits.result(60).ledger.new_tokens == 2
    wait_for(lambda: served.active == 0)
    assert len(served.slots) == 0
    with pytest.raises(CancelledError):
        long[0].result(1)


def test_bounds_on_what_waits_and_how_long() -> None:
    made, image = model(), picture(70, 90)
    with Scheduler(made.engine, Bounds(places=1, waiting=2, new_tokens=1500)) as scheduler:
        first = scheduler.ask(image, "What is it?", Settings(1500))
        wait_for(lambda: scheduler.active == 1)
        waiting = [scheduler.ask(image, "What is it?", Settings(2)) for _ in range(2)]
        assert scheduler.full
        with pytest.raises(Full, match="2 requests wait already") as full:
            scheduler.ask(image, "What is it?", Settings(2))
        assert 1 <= full.value.retry_after <= 60
        first.cancel()
        assert [one.result(60).finish for one in waiting] == ["length", "length"]
        with pytest.raises(FoveateError, match="may have 1500 tokens at most, not 1501"):
            scheduler.ask(image, "What is it?", Settings(1501))
    with Scheduler(made.engine, Bounds(seconds=0.05)) as scheduler:
        with pytest.raises(Late, match=r"longer than 0\.05 s"):
            scheduler.ask(image, "What is it?", Settings(1500)).result(60)
        assert scheduler.active == 0
    with (
        Scheduler(made.engine, Bounds(prompt_tokens=20)) as scheduler,
        pytest.raises(FoveateError, match="at most 20 are allowed"),
    ):
        scheduler.ask(image, "What is it?").result(60)
    for wrong in ({"places": 0}, {"waiting": 0}, {"prefix_bytes": -1}, {"prompt_tokens": 0}, {"seconds": 0}):
        with pytest.raises(FoveateError, match=next(iter(wrong))):
            Bounds(**wrong)  # type: ignore[arg-type]


def test_keys_and_values_stay_within_their_bound() -> None:
    """No more rows write at once than there is room for; all are answered."""
    made, image = model(), picture(70, 90)
    with Scheduler(made.engine) as scheduler:
        scheduler.ask(image, "What is it?", Settings(2)).result(60)
        token = scheduler.slots.bytes_per_token
    most = 0
    with Scheduler(made.engine, Bounds(kv_bytes=3 * 300 * token, prefix_bytes=0)) as scheduler:
        running = [scheduler.ask(image, "What is it?", Settings(60)) for _ in range(8)]
        while not all(one.future.done() for one in running):
            most = max(most, len(scheduler.slots))
            time.sleep(0.001)
        assert {len(one.result().tokens) for one in running} == {60}
    assert 1 <= most <= 8 and scheduler.counts.answers == 8
    assert most * (len(scheduler.engine.processor.tokenizer("x" * 50)["input_ids"]) + 60) <= 900


def test_a_request_that_breaks_the_model_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made, image = model(), picture(70, 90)
    with Scheduler(made.engine) as scheduler:
        plain = made.engine.encode

        def breaks(shown: Any, *arguments: Any, **more: Any) -> Any:
            if shown[0].picture.size == (13, 13):
                raise RuntimeError("out of order")
            return plain(shown, *arguments, **more)

        monkeypatch.setattr(made.engine, "encode", breaks)
        good = scheduler.ask(image, "What is it?", Settings(40))
        bad = scheduler.ask(picture(13, 13), "What is it?")
        with pytest.raises(RuntimeError, match="out of order"):
            bad.result(60)
        assert len(good.result(60).tokens) == 40 and caplog.records
        assert scheduler.alive


def test_pieces_together_are_the_answer(served: Scheduler) -> None:
    for ends in ((), ("q",), ("zz", "Q!")):
        pieces: list[Piece] = []
        settings = Settings(40, ends=ends, logprobs=2)
        running = served.submit(chat("What is it?", picture(70, 90, seed=3)), settings, pieces.append)
        done = running.result(60)
        assert "".join(piece.text for piece in pieces) == done.text
        assert [t for piece in pieces for t in piece.tokens] == done.tokens
        assert not any(end in done.text for end in ends)
        for token in done.tokens:
            assert token.logprob <= 0 and len(token.likeliest) == 2
            assert token.logprob <= token.likeliest[0][1]


def test_threads_may_ask_the_engine_meanwhile(served: Scheduler) -> None:
    image = picture(70, 90)
    beside = Foveate(served.engine.model, served.engine.processor)
    beside.engine = served.engine
    expected = [beside.ask(image, question, max_new_tokens=WORDS).text for question in QUESTIONS]
    with ThreadPoolExecutor(3) as pool:
        asked = list(pool.map(lambda q: beside.ask(image, q, max_new_tokens=WORDS).text, QUESTIONS * 2))
        running = [served.ask(image, question, Settings(WORDS)) for question in QUESTIONS * 2]
    assert asked == [one.result(60).text for one in running] == expected * 2


def test_a_closed_scheduler_answers_nobody() -> None:
    scheduler = Scheduler(model().engine, Bounds(places=1))
    running = [scheduler.ask(picture(70, 90), "What is it?", Settings(1000)) for _ in range(2)]
    wait_for(lambda: scheduler.active)
    scheduler.close()
    for one in running:
        with pytest.raises(Stopped):
            one.result(1)
    assert not scheduler.alive
    with pytest.raises(Stopped):
        scheduler.ask(picture(70, 90), "What is it?")


def test_models_whose_own_settings_are_not_done_here_are_refused() -> None:
    made = model()
    made.model.generation_config.num_beams = 3
    with pytest.raises(FoveateError, match=r"generation_config\.json: num_beams 3 is not served"):
        Scheduler(made.engine)
