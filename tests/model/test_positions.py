"""A text that is longer than the LLM has positions for never passes without a word."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

import foveate
from foveate import Foveate, FoveateError, Zoom, compose
from foveate.ask.context import Context
from foveate.ask.conversation import content
from foveate.methods import METHODS
from foveate.model.positions import positions_of
from foveate.tiny import tiny_text, tiny_tokenizer, tiny_vision
from tests.methods.conftest import fresh
from tests.methods.test_invariants import prepare
from tests.support import chat, picture
from tests.vlms import VLMS

TEXT = {"type": "text", "text": "It is."}


def short(positions: int, method: str = "llava", **options: Any) -> Foveate:
    """A model whose LLM has that many positions."""
    text = tiny_text()
    text.max_position_embeddings = positions
    torch.manual_seed(0)
    return compose(tiny_vision(), text, method, options, tokenizer=tiny_tokenizer())


def prompt_tokens(model: Foveate, question: str) -> int:
    return model.ask(picture(60, 80), question, max_new_tokens=1).ledger.prompt_tokens


@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_without_a_position_left_is_refused_before_the_llm_reads(method: str) -> None:
    model = fresh(method)
    runs: list[int] = []
    model.model.language_model.register_forward_pre_hook(lambda *_: runs.append(1))
    model.model.config.max_positions = 20
    with pytest.raises(FoveateError, match=r"the text has (\d+) tokens.* the LLM has 20 positions") as error:
        model.ask(picture(60, 80), "What is it?", max_new_tokens=3)
    assert not runs
    (found,) = re.findall(r"max_positions=(\d+)", str(error.value))
    model.model.config.max_positions = int(found)
    for turn in model.model.method.converse(picture(60, 80), "What is it?"):  # a first turn alone
        said = model.engine.say([[{"role": "user", "content": content(turn)}]], Context(), max_new_tokens=5)
        assert said[0].ledger.new_tokens == 1
        break


def test_the_bound_is_exact_and_answers_end_at_it() -> None:
    text = prompt_tokens(short(2048), "What is it?")
    with pytest.raises(FoveateError, match=f"the text has {text} tokens, 16 of them visual, and the LLM has"):
        short(text).ask(picture(60, 80), "What is it?", min_new_tokens=9, max_new_tokens=9)
    for room in (1, 3):
        model = short(text + room)
        for how in ({}, {"num_beams": 3}, {"do_sample": True}):
            answer = model.ask(picture(60, 80), "What is it?", min_new_tokens=9, max_new_tokens=9, **how)
            assert answer.ledger.new_tokens == room


def test_what_makes_it_fit_does() -> None:
    model = fresh("anyres")
    model.model.config.max_positions = 240
    with pytest.raises(FoveateError, match="max_visual_tokens, so that its pictures take") as error:
        model.ask(picture(200, 200), "What is it?", max_new_tokens=3)
    (most,) = re.findall(r"take (\d+) at most", str(error.value))
    smaller = fresh("anyres", max_visual_tokens=int(most))
    smaller.model.config.max_positions = 240
    assert smaller.ask(picture(200, 200), "What is it?", max_new_tokens=3).text is not None
    with pytest.raises(FoveateError, match="positions: shorten the text; max_positions="):
        model.ask(picture(200, 200), "Where? " * 90, max_new_tokens=3)


def test_tokens_that_a_router_drops_do_not_count() -> None:
    model = fresh("slime", gamma=0.25)
    seen = model.ask(picture(200, 200), "What?", max_new_tokens=1)
    assert seen.ledger.visual_tokens < model.plan(picture(200, 200)).tokens
    model.model.config.max_positions = seen.ledger.prompt_tokens + 1
    assert model.ask(picture(200, 200), "What?", max_new_tokens=1).text == seen.text


def test_an_option_lets_it_through() -> None:
    question = "What is it? " * 30
    expected = short(2048).ask(picture(60, 80), question, max_new_tokens=5)
    bounded = short(100)
    with pytest.raises(FoveateError, match="the LLM has 100 positions"):
        bounded.ask(picture(60, 80), question, max_new_tokens=5)
    bounded.model.config.max_positions = 2048
    assert bounded.ask(picture(60, 80), question, max_new_tokens=5).text == expected.text


def test_the_option_is_given_at_loading_and_saved(tmp_path: Path) -> None:
    short(100).save(tmp_path / "model")
    assert foveate.load(tmp_path / "model").model.positions == 100
    longer = foveate.load(tmp_path / "model", max_positions=300)
    longer.save(tmp_path / "longer")
    assert foveate.load(tmp_path / "longer").model.positions == 300
    with pytest.raises(FoveateError, match="max_positions must be at least 1"):
        foveate.load(tmp_path / "model", max_positions=0)


def test_rows_of_a_batch_end_each_at_its_own_last_position() -> None:
    questions = ["What?", "What is the name of the thing that lies to the left?"]
    shown = picture(60, 80)
    how = {"min_new_tokens": 12, "max_new_tokens": 12}
    longest = prompt_tokens(short(2048), questions[1])
    model = short(longest + 4)
    together = model.ask_all([(shown, question) for question in questions], **how)
    assert [answer.ledger.new_tokens for answer in together] == [12, 12]  # the shorter row waits for none
    assert together[0].text == short(2048).ask(shown, questions[0], **how).text
    assert together[1].text == model.ask(shown, questions[1], **how).text


def test_training_and_other_passes_are_bounded_too() -> None:
    model = short(2048)
    talk = [*chat("What is it?", picture(60, 80)), {"role": "assistant", "content": [TEXT]}]
    batch = prepare(model.processor, [talk, talk[:1]])
    labels = batch["input_ids"].clone()
    labels[:, :-5] = -100
    longest = int(batch["attention_mask"].sum(1).max())
    model.model.config.max_positions = longest
    model.model.train()
    loss = model.model(**batch, labels=labels).loss
    wide = {
        **batch,
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (40, 0), value=3),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (40, 0)),
    }
    padded = model.model(**wide, labels=torch.nn.functional.pad(labels, (40, 0), value=-100)).loss
    torch.testing.assert_close(loss, padded)  # padding takes no position
    model.model.config.max_positions = longest - 1
    with pytest.raises(FoveateError, match=f"the text has {longest} tokens, 16 of them visual"):
        model.model(**batch, labels=labels)
    positions = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]) % 30
    model.model(**batch, position_ids=positions)  # several texts in one row count by their own positions


def test_a_conversation_that_grows_too_long_can_still_be_asked_something_shorter() -> None:
    model = short(300)
    talk = model.chat(picture(60, 80))
    talk.ask("What?", max_new_tokens=3)
    said = list(talk.messages)
    with pytest.raises(FoveateError, match="the LLM has 300 positions"):
        talk.ask("Where is it? " * 20, max_new_tokens=3)
    assert talk.messages == said
    again = short(300).chat(picture(60, 80))
    again.ask("What?", max_new_tokens=3)
    assert talk.ask("Where?", max_new_tokens=3).text == again.ask("Where?", max_new_tokens=3).text


def test_zoom_bounds_any_vlm() -> None:
    vlm = VLMS["qwen3_vl"]()
    model, processor = vlm.model, vlm.processor
    model.config.text_config.max_position_embeddings = 30
    with pytest.raises(FoveateError, match="the LLM has 30 positions: take a smaller picture or"):
        Zoom(model, processor).ask(picture(60, 80), "What is it?", no_zoom=True)
    with pytest.raises(FoveateError, match="the LLM has 30 positions"):
        Zoom(model, processor, region="relevance").ask(picture(60, 80), "What is it?")
    through = Zoom(model, processor, max_positions=4096).ask(picture(60, 80), "What?", max_new_tokens=2)
    assert through.first is not None
    with pytest.raises(FoveateError, match=r"give it to foveate\.load"):
        Zoom(fresh("llava").model, fresh("llava").processor, max_positions=10)


ROPE = {"rope_theta": 10000.0}
KNOWN: list[tuple[str, dict[str, Any], int | None]] = [
    ("llama", {"max_position_embeddings": 4096}, 4096),
    (
        "llama",  # as long Vicunas
        {"max_position_embeddings": 4096, "rope_parameters": {**ROPE, "rope_type": "linear", "factor": 4.0}},
        16384,
    ),
    (
        "qwen2",
        {
            "max_position_embeddings": 32768,
            "rope_parameters": {
                **ROPE,
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
            },
        },
        131072,
    ),
    (
        "llama",  # as Llama 3.1, which names the stretched number itself
        {
            "max_position_embeddings": 131072,
            "rope_parameters": {
                **ROPE,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        131072,
    ),
    ("gpt2", {"n_positions": 512}, 512),
    ("opt", {"max_position_embeddings": 300}, 300),
    ("mpt", {"max_seq_len": 256}, 256),
    ("mamba", {}, None),
    ("gemma3", {"text_config": {"max_position_embeddings": 1000}}, 1000),
    ("qwen3_vl", {"text_config": {"max_position_embeddings": 1000}}, 1000),
    ("foveate", {"text_config": {"max_position_embeddings": 700}}, 700),
    ("foveate", {"text_config": {"max_position_embeddings": 700}, "max_positions": 900}, 900),
]


def test_learned_positions_are_never_left() -> None:
    """A row that has ended goes on with the batch; its positions must still be there."""
    text = CONFIG_MAPPING["gpt2"](
        vocab_size=266, bos_token_id=1, eos_token_id=2, pad_token_id=3, n_embd=48, n_layer=2, n_head=4,
        n_positions=240,
    )  # fmt: skip
    model = compose(tiny_vision(), text, "llava", tokenizer=tiny_tokenizer())
    questions = ["What?", "What is the name of the thing that is there?"]
    how = {"min_new_tokens": 40, "max_new_tokens": 40}
    together = model.ask_all([(picture(60, 80), question) for question in questions], **how)
    assert [a.ledger.prompt_tokens + 40 <= 240 for a in together] == [True, False]


@pytest.mark.parametrize(("kind", "given", "positions"), KNOWN)
def test_positions_of_any_config(kind: str, given: dict[str, Any], positions: int | None) -> None:
    assert positions_of(CONFIG_MAPPING[kind](**given)) == positions
