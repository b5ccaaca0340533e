"""Context kept between turns: the same replies as when everything is read again, at less cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, TextIteratorStreamer

from foveate import Foveate, FoveateError
from foveate.ask.context import Context
from foveate.methods import METHODS
from foveate.model.cost import Pricer
from tests.methods.conftest import fresh
from tests.support import chat, gap, picture

WORDS = {"max_new_tokens": 9, "repetition_penalty": 1.3}  # random models repeat themselves otherwise


@pytest.fixture(scope="module", autouse=True)
def toy() -> Iterator[None]:
    """The method with two turns, known to this file alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "toy", "tests.methods.toy:Toy")
        yield


@pytest.fixture(scope="module")
def both(toy: None) -> Callable[[str], tuple[Foveate, Foveate]]:
    """Method -> its tiny model, asked with and without what earlier turns left."""
    made: dict[str, Foveate] = {}

    def of(method: str) -> tuple[Foveate, Foveate]:
        model = made.setdefault(method, fresh(method))
        plain = Foveate(model.model, model.processor, keep_context=False)
        return Foveate(model.model, model.processor), plain

    return of


@contextmanager
def logits_of(foveate: Foveate) -> Iterator[list[Tensor]]:
    """The last logits of every pass through the model."""
    seen: list[Tensor] = []
    hook = foveate.model.register_forward_hook(lambda m, a, out: seen.append(out.logits[:, -1].float()))
    yield seen
    hook.remove()


@pytest.mark.parametrize("method", [*METHODS, "toy"])
def test_kept_and_read_anew_say_the_same(method: str, both: Any) -> None:
    """A conversation of three questions: text and logits are equal, and less is read."""
    kept, anew = both(method)
    image = picture(70, 90)
    talks = [foveate.chat(image) for foveate in (kept, anew)]
    with logits_of(kept) as logits:  # one model in both
        for i, question in enumerate(("What is it?", "And why is that so?", "Sure?")):
            logits.clear()
            with_cache = talks[0].ask(question, **WORDS)
            middle = len(logits)
            without = talks[1].ask(question, **WORDS)
            assert with_cache.text == without.text
            assert with_cache.regions == without.regions
            assert len(logits) == 2 * middle
            assert max(gap(a, b) for a, b in zip(logits[:middle], logits[middle:], strict=True)) < 1e-4
            if i:
                read = with_cache.ledger.prompt_tokens + with_cache.ledger.kept_tokens
                assert read == without.ledger.prompt_tokens
                assert with_cache.ledger.kept_tokens > 0 == without.ledger.kept_tokens
                assert with_cache.ledger.tflop < without.ledger.tflop


def test_a_chat_answers_at_the_length_of_ask() -> None:
    """Without a bound given, neither falls back to the 20 tokens of transformers' own."""
    model = fresh("llava")
    model.model.generation_config.eos_token_id = None
    asked = model.ask(picture(70, 90), "What is it?")
    chatted = model.chat(picture(70, 90)).ask("What is it?")
    assert chatted.ledger.new_tokens == asked.ledger.new_tokens == 256
    assert chatted.text == asked.text


def test_two_turns_of_one_question(both: Any) -> None:
    """The picture is encoded once and read once."""
    kept, anew = both("toy")
    image = picture(60, 90)
    one, other = (foveate.ask(image, "What is it?", **WORDS) for foveate in (kept, anew))
    assert (one.text, one.regions) == (other.text, other.regions)
    assert one.ledger.encoded_views == other.ledger.encoded_views == one.ledger.views
    assert other.ledger.views > one.ledger.views
    assert one.ledger.kept_tokens > one.plan.tokens / 2  # every other one was dropped
    assert len(one.crops) == 1


@pytest.mark.parametrize("method", ["llava", "toy"])
def test_questions_side_by_side(method: str, both: Any) -> None:
    """A batch of pictures of many sizes and questions of many lengths: each answer is that of its own."""
    kept, anew = both(method)
    sizes = [(60, 100), (33, 33), (200, 90), (60, 100)]
    questions = ["What?", "Where is the smallest of all of them?", "Why?", "How many are there?"]
    pairs = [(picture(*size, seed=i), q) for i, (size, q) in enumerate(zip(sizes, questions, strict=True))]
    alone = [kept.ask(image, question, **WORDS) for image, question in pairs]
    for foveate in (kept, anew):
        together = foveate.ask_all(pairs, **WORDS)
        assert [a.text for a in together] == [a.text for a in alone]
        assert [a.regions for a in together] == [a.regions for a in alone]
        assert [a.ledger.new_tokens for a in together] == [a.ledger.new_tokens for a in alone]
    assert [a.ledger.kept_tokens for a in kept.ask_all(pairs, **WORDS)] == [
        a.ledger.kept_tokens for a in alone
    ]


def test_a_remembered_picture_keeps_nothing_of_others(both: Any) -> None:
    kept, _ = both("llava")
    images = [picture(60, 100), picture(33, 33, seed=1)]
    kept.ask_all([(image, "What?") for image in images], **WORDS)
    for features in map(kept.engine.features, images):
        assert features.untyped_storage().nbytes() == features.nbytes


def test_conversations_that_end_at_different_turns(both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, _ = both("toy")
    method = type(kept.model.method)
    whole = method.converse

    def brief(self: Any, image: Any, question: str) -> Any:
        if question == "Short?":
            from foveate.methods.base import Reply, Turn

            text = yield Turn(question, [image])
            return Reply(text, notes=["one turn"])
        return (yield from whole(self, image, question))

    monkeypatch.setattr(method, "converse", brief)
    pairs = [(picture(50, 60), "Short?"), (picture(60, 50), "What is it?"), (picture(40, 80), "Short?")]
    alone = [kept.ask(image, question, **WORDS) for image, question in pairs]
    together = kept.ask_all(pairs, **WORDS)
    assert [a.text for a in together] == [a.text for a in alone]
    assert [a.notes for a in together] == [["one turn"], [], ["one turn"]]


@torch.no_grad()
def test_a_reply_that_reads_otherwise_than_it_was_written(both: Any) -> None:
    """What was generated differs from its text tokenised anew: only the part in common is reused."""
    kept, anew = both("llava")
    messages = chat("What is it?", picture(40, 60))
    context = Context()
    kept.engine.say([messages], context, **WORDS)
    held = context.held.shape[1]
    said = {"role": "assistant", "content": [{"type": "text", "text": "A cat, said somebody else."}]}
    messages += [said, *chat("Is it?")]
    (reply,) = kept.engine.say([messages], context, **WORDS)
    (other,) = anew.engine.say([messages], Context(), **WORDS)
    assert reply.text == other.text
    assert 0 < reply.ledger.kept_tokens < held


@torch.no_grad()
def test_another_picture_is_not_taken_for_the_one_before(both: Any) -> None:
    kept, anew = both("llava")
    context = Context()
    kept.engine.say([chat("What is it?", picture(40, 60))], context, **WORDS)
    messages = chat("What is it?", picture(40, 60, seed=1))
    (said,) = kept.engine.say([messages], context, **WORDS)
    (other,) = anew.engine.say([messages], Context(), **WORDS)
    assert said.text == other.text
    prompt, _ = kept.engine.passage(messages, said)
    assert said.ledger.kept_tokens == prompt.places[0][0]  # the tokens before the picture
    assert said.ledger.visual_tokens == 16


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"use_cache": False}])
def test_generation_that_leaves_no_cache(options: dict[str, Any], both: Any) -> None:
    kept, anew = both("llava")
    more = {**WORDS, **options}
    talks = [foveate.chat(picture(40, 60)) for foveate in (kept, anew)]
    for arguments in (WORDS, more, WORDS):
        answers = [talk.ask("And now?", **arguments) for talk in talks]
        assert answers[0].text == answers[1].text
        assert (arguments is more) <= (answers[0].ledger.kept_tokens == 0)


@pytest.mark.parametrize("method", ["llava", "chain_of_spot"])
def test_several_answers_to_one_question_are_refused(method: str, both: Any) -> None:
    """Only the first one was ever returned."""
    made, _ = both(method)
    several = {"num_return_sequences": 3, "do_sample": True}
    for given in (several, {"generation_config": GenerationConfig(**several)}):
        with pytest.raises(FoveateError, match="num_return_sequences: a question has one answer"):
            made.ask(picture(40, 60), "What is it?", **WORDS, **given)


def test_interrupted_generation_leaves_nothing_half_read(both: Any) -> None:
    kept, anew = both("llava")
    image = picture(40, 60)
    talk, other = kept.chat(image), anew.chat(image)
    assert talk.ask("What is it?", **WORDS).text == other.ask("What is it?", **WORDS).text

    class Stop:
        def put(self, value: Tensor) -> None:
            raise KeyboardInterrupt

        def end(self) -> None:
            raise AssertionError

    with pytest.raises(KeyboardInterrupt):
        talk.ask("Why?", streamer=Stop(), **WORDS)
    assert talk.ask("Why not?", **WORDS).text == other.ask("Why not?", **WORDS).text


def test_streaming(both: Any) -> None:
    kept, _ = both("toy")
    image = picture(60, 90)

    def streamed(answerer: Any, question: str) -> tuple[str, str]:
        streamer = TextIteratorStreamer(kept.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        answer = answerer(question, streamer=streamer, **WORDS)
        return "".join(streamer).strip(), answer.text

    talk = kept.chat(image)
    talk.ask("What is it?", **WORDS)
    for _ in range(2):
        got, said = streamed(talk.ask, "And?")
        assert got == said
    with pytest.raises(FoveateError, match="one answer can be streamed"):
        kept.ask_all([(image, "A?"), (image, "B?")], streamer=object())
    with pytest.raises(FoveateError, match="no question"):
        kept.ask_all([])


def test_price_of_reading_on(both: Any) -> None:
    """Tokens in the cache cost what attending to them costs, and no more."""
    kept, _ = both("llava")
    pricer = Pricer(kept.model.config)
    whole, decode, kv = pricer.language(300)
    rest, later, same = pricer.language(100, 200)
    assert (decode, kv) == (later, same)
    assert pricer.language(100)[0] < rest < whole - pricer.language(200)[0] + 1
