"""What a method may do besides making visual tokens, tried with one that does all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import TextIteratorStreamer, pipeline, set_seed

from foveate import Foveate, FoveateError
from foveate.model.modeling import EncodedPictures
from foveate.tiny import tiny_text, tiny_tokenizer, tiny_vision
from foveate.upstream import CACHE
from tests.methods.conftest import fresh
from tests.methods.test_invariants import CLOSE, chats, prepare, training_batch
from tests.support import chat, gap, greedy, picture, rows

VISION = ("pixel_values", "image_sizes", "query_ids", "query_mask")


@pytest.fixture
def made(tiny: Callable[[str], Foveate]) -> Foveate:
    return tiny("toy")


def answer_to(model: Any, batch: dict[str, Tensor], **kwargs: Any) -> list[list[int]]:
    return greedy(model, batch, suppress_tokens=[model.config.image_token_id], **kwargs)


@contextmanager
def calls(module: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """Keyword arguments of every call of a module."""
    seen: list[dict[str, Any]] = []
    hook = module.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    yield seen
    hook.remove()


# Tokens that are dropped.


@torch.no_grad()
def test_masked_tokens_are_as_good_as_gone(made: Foveate) -> None:
    """Logits of the masked form at all that is left = logits without the dropped tokens in the sequence."""
    model = made.model
    for one in chats()[:5]:
        batch = prepare(made.processor, [one])
        encoded = model.get_image_features(**{name: batch[name] for name in VISION})
        kept = torch.cat(encoded.kept)
        left = torch.ones_like(batch["input_ids"], dtype=torch.bool)
        left[batch["input_ids"] == model.config.image_token_id] = kept
        assert 0 < int(kept.sum()) < len(kept)
        tokens = [t[keep] for t, keep in zip(encoded.pooler_output, encoded.kept, strict=True)]
        short = {
            "input_ids": batch["input_ids"][left][None],
            "attention_mask": batch["attention_mask"][left][None],
            "mm_encoder_outputs": {"image": EncodedPictures(tokens, injection=encoded.injection)},
        }
        assert gap(model(**batch).logits[left], model(**short).logits[0]) < CLOSE


@torch.no_grad()
def test_dropped_tokens_leave_before_the_prefill(made: Foveate) -> None:
    model = made.model
    batch = prepare(made.processor, chats())
    encoded = model.get_image_features(**{name: batch[name] for name in VISION})
    dropped = iter([int((~keep).sum()) for keep in encoded.kept])
    lengths = batch["attention_mask"].sum(1).tolist()
    for row, pictures_shown in enumerate((1, 1, 1, 1, 2, 0)):
        lengths[row] -= sum(next(dropped) for _ in range(pictures_shown))
    with calls(model.language_model) as seen:
        out = model.generate(
            **batch, do_sample=False, max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True
        )
    assert seen[0]["inputs_embeds"].shape[1] == max(lengths) < batch["input_ids"].shape[1]
    assert seen[0]["attention_mask"].sum(1).tolist() == lengths
    assert out[CACHE].get_seq_length() == max(lengths) + 3
    assert torch.equal(out.sequences[:, :-4], batch["input_ids"])  # callers cut the prompt off by its length


@torch.no_grad()
def test_short_form_writes_what_the_masked_form_writes(made: Foveate) -> None:
    """Greedy text against a loop of whole passes in which dropped tokens are only masked."""
    model = made.model
    batch = prepare(made.processor, chats())
    expected = dict(batch)
    for _ in range(8):
        scores = model(**expected).logits[:, -1]
        scores[:, model.config.image_token_id] = -torch.inf
        scores[:, made.processor.tokenizer.eos_token_id] = -torch.inf
        best = scores.argmax(-1, keepdim=True)
        expected["input_ids"] = torch.cat([expected["input_ids"], best], 1)
        expected["attention_mask"] = torch.cat([expected["attention_mask"], torch.ones_like(best)], 1)
    assert answer_to(model, batch) == expected["input_ids"][:, -8:].tolist()


@torch.no_grad()
def test_which_tokens_stay_depends_on_the_question(made: Foveate) -> None:
    image = picture(40, 80)
    one, other = (prepare(made.processor, [chat(question, image)]) for question in ("Why?", "What?"))
    kept = [made.model.get_image_features(**{name: b[name] for name in VISION}).kept[0] for b in (one, other)]
    assert torch.equal(kept[0], ~kept[1])
    lengths = {int((b["input_ids"] == made.processor.image_token_id).sum()) for b in (one, other)}
    assert lengths == {48}  # but never how many placeholders there are


def test_many_answers_with_dropped_tokens(made: Foveate) -> None:
    model, batch = made.model, prepare(made.processor, chats())
    single = answer_to(model, batch)
    quiet = {"suppress_tokens": [model.config.image_token_id], "max_new_tokens": 8, "min_new_tokens": 8}
    same = model.generate(**batch, **quiet, do_sample=True, top_k=1, num_return_sequences=3)
    prompt = batch["input_ids"].repeat_interleave(3, 0)
    assert torch.equal(same[:, : prompt.shape[1]], prompt)
    assert same[:, prompt.shape[1] :].tolist() == [tokens for tokens in single for _ in range(3)]
    set_seed(0)
    sampled = model.generate(**batch, **quiet, do_sample=True, num_return_sequences=3)
    assert len({tuple(row) for row in sampled[:3].tolist()}) > 1
    for i, one in enumerate(chats()):
        alone = prepare(made.processor, [one])
        for cache in (True, False):
            beams = model.generate(**alone, **quiet, num_beams=3, use_cache=cache)
            together = model.generate(**batch, **quiet, num_beams=3)[i]
            assert together[-8:].tolist() == beams[0, -8:].tolist()


@torch.no_grad()
def test_encoded_pictures_can_be_used_again(made: Foveate) -> None:
    model, batch = made.model, prepare(made.processor, chats())
    encoded = model.get_image_features(**{name: batch[name] for name in VISION})
    counts = [len(tokens) for tokens in encoded.pooler_output]
    rest = {name: value for name, value in batch.items() if name not in VISION}
    given = {**rest, "mm_encoder_outputs": {"image": encoded}}
    assert answer_to(model, given, num_beams=2) == answer_to(model, batch, num_beams=2)
    assert answer_to(model, given) == answer_to(model, given) == answer_to(model, batch)
    assert [len(tokens) for tokens in encoded.pooler_output] == counts
    assert gap(model(**given).logits, model(**batch).logits) == 0.0


@torch.no_grad()
def test_streaming_and_pipeline(made: Foveate) -> None:
    model, processor = made.model, made.processor
    conversations = [chats()[i] for i in (0, 2, 3)]
    quiet = {"do_sample": False, "max_new_tokens": 6, "suppress_tokens": [processor.image_token_id]}
    expected = []
    for one in conversations:
        batch = prepare(processor, [one])
        streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        out = model.generate(**batch, **quiet, streamer=streamer)
        new = out[0, batch["input_ids"].shape[1] :]
        expected.append(processor.tokenizer.decode(new, skip_special_tokens=True))
        assert "".join(streamer) == expected[-1]
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    for size in (1, 2):
        answers = pipe(conversations, return_full_text=False, generate_kwargs=quiet, batch_size=size)
        assert [answer[0]["generated_text"] for answer in answers] == expected


# The question.


def test_questions_reach_the_connector_and_answers_never(made: Foveate) -> None:
    processor = made.processor
    first, second = picture(40, 40), picture(30, 60)
    conversation = [
        {"role": "system", "content": "Be brief."},
        *chat("What is it?", first),
        {"role": "assistant", "content": "A secret."},
        *chat("And these two?", first, second),
        {"role": "assistant", "content": "Another secret."},
        {"role": "user", "content": "Without a picture?"},
    ]
    inputs = prepare(processor, [conversation, chat("Alone?", second)])
    asked = [
        processor.tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(inputs["query_ids"], inputs["query_mask"], strict=True)
    ]
    assert asked == ["What is it?", "And these two?", "And these two?", "Alone?"]
    seen: list[Any] = []
    hook = made.model.connector.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    with torch.no_grad():
        made.model(**inputs)
    hook.remove()
    table = made.model.get_input_embeddings().weight
    assert torch.equal(seen[0].embeds, table[inputs["query_ids"]])
    assert torch.equal(seen[0].mask, inputs["query_mask"])


@torch.no_grad()
def test_an_answer_changes_nothing_in_the_visual_tokens(made: Foveate) -> None:
    image = picture(50, 60)
    outputs = []
    for answer in ("Yes.", "No, by no means, I should say."):
        batch = prepare(made.processor, [[*chat("Is it?", image), {"role": "assistant", "content": answer}]])
        outputs.append(made.model.get_image_features(**{name: batch[name] for name in VISION}))
    assert torch.equal(outputs[0].pooler_output[0], outputs[1].pooler_output[0])
    assert torch.equal(outputs[0].kept[0], outputs[1].kept[0])


def test_questions_and_pictures_must_agree_in_number(made: Foveate) -> None:
    batch = prepare(made.processor, chats())
    batch["query_ids"], batch["query_mask"] = batch["query_ids"][:-1], batch["query_mask"][:-1]
    with pytest.raises(FoveateError, match="5 questions for 6 pictures"):
        made.model(**batch)
    with pytest.raises(FoveateError, match="2 queries for 1 pictures"):
        made.processor(images=picture(9, 9), text="<image>", queries=["a", "b"])
    with pytest.raises(FoveateError, match="1 queries for 0 pictures"):
        made.processor(text="Hello.", queries=["a"])


@torch.no_grad()
@pytest.mark.parametrize("method", ["toy", "coroi", "slime"])
def test_a_picture_without_its_question_is_refused(method: str) -> None:
    """The model would answer, and be blind to it."""
    made = fresh(method, **({"gamma": 0.5, "router_text": "question"} if method == "slime" else {}))
    image, processor = picture(60, 50), made.processor
    prompt = processor.apply_chat_template(chat("Why?", image)[:1], add_generation_prompt=True)
    with pytest.raises(
        FoveateError, match=r"reads the question to each picture: pass queries=\[...\], or call"
    ):
        processor(images=image, text="<image> Why?", return_tensors="pt")  # not of the chat template
    blind = {
        name: value
        for name, value in processor(images=image, text=prompt, return_tensors="pt").items()
        if name not in ("query_ids", "query_mask", "mm_token_type_ids")
    }
    for run in (made.model, made.model.model, made.model.generate):
        with pytest.raises(FoveateError, match="reads the question to each picture: give query_ids"):
            run(**blind)
    given = dict(processor(images=image, text=prompt, queries=["Why?"], return_tensors="pt"))
    expected = prepare(processor, [chat("Why?", image)])
    assert all(torch.equal(given[name], expected[name]) for name in expected)
    empty = processor(images=image, text=prompt, queries=[""], return_tensors="pt")
    assert empty["query_ids"].shape == (1, 0)
    if method != "toy":  # whose connector divides by the number of tokens
        assert torch.isfinite(made.model(**empty).logits).all()
    assert "query_ids" not in processor(text="Hello.", return_tensors="pt")


# Injection.


@torch.no_grad()
def test_injection_matters_in_the_prefill_and_nowhere_else() -> None:
    made = fresh("toy")
    model, batch = made.model, prepare(made.processor, chats())
    before = model(**batch).logits
    with calls(model.connector.injected["1"]) as first, calls(model.connector.injected["2"]) as second:
        answer_to(model, batch)
    assert len(first) == len(second) == 1  # one prefill and seven steps
    for injector in model.connector.injected.values():
        nn.init.zeros_(injector.project.weight)
        nn.init.zeros_(injector.project.bias)
    mask = batch["attention_mask"]
    gaps = [gap(x, y) for x, y in zip(rows(before, mask), rows(model(**batch).logits, mask), strict=True)]
    assert min(gaps[:5]) > 0.1 > CLOSE > gaps[5]  # the last one has no picture


def test_checkpointing_changes_no_gradient() -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        made = fresh("toy")
        model = made.model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
        with calls(model.language_model.get_decoder().layers[1].mlp) as seen:
            model(**training_batch(made.processor)).loss.backward()
        assert len(seen) == 1 + checkpointing  # once more on the way back
        return {name: p.grad for name, p in model.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_lora_around_a_method_with_injectors() -> None:
    made = fresh("toy")
    batch = prepare(made.processor, chats())
    with torch.no_grad():
        expected, written = made.model(**batch).logits, answer_to(made.model, batch)
    config = LoraConfig(
        r=4,
        target_modules=r"language_model\..*\.(q_proj|v_proj)",
        modules_to_save=["connector"],
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(made.model, config)
    with torch.no_grad():
        assert gap(wrapped(**batch).logits, expected) < CLOSE  # LoRA starts as nothing
        assert answer_to(wrapped, batch) == written
    wrapped.train()
    wrapped(**training_batch(made.processor)).loss.backward()
    learns = {name for name, p in wrapped.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("injected.1" in name and "modules_to_save" in name for name in learns)
    assert any("lora_B" in name for name in learns)
    assert not any("vision_tower" in name for name in learns)


# Other ways in and out.


@torch.no_grad()
def test_embeddings_instead_of_ids(made: Foveate) -> None:
    model, batch = made.model, prepare(made.processor, chats())
    given = {name: value for name, value in batch.items() if name != "input_ids"}
    given["inputs_embeds"] = model.get_input_embeddings()(batch["input_ids"])
    assert torch.equal(model(**given).logits, model(**batch).logits)
    with pytest.raises(FoveateError, match="generate needs input_ids"):
        model.generate(**given, max_new_tokens=2)


@torch.no_grad()
def test_embeddings_instead_of_ids_in_generate(tiny: Callable[[str], Foveate]) -> None:
    made = tiny("llava")
    model, batch = made.model, prepare(made.processor, chats())
    given = {name: value for name, value in batch.items() if name != "input_ids"}
    given["inputs_embeds"] = model.get_input_embeddings()(batch["input_ids"])
    new = model.generate(**given, do_sample=False, max_new_tokens=8, min_new_tokens=8)
    assert new.tolist() == greedy(model, batch)


def test_placeholders_and_tokens_must_agree_in_number(made: Foveate) -> None:
    batch = prepare(made.processor, chats()[:1])
    place = (batch["input_ids"] == made.processor.image_token_id).nonzero()[0]
    fewer = batch["input_ids"].index_put(tuple(place), torch.tensor(5))
    with pytest.raises(FoveateError, match="47 image placeholders for 48 visual tokens"):
        made.model(**{**batch, "input_ids": fewer})
    with pytest.raises(FoveateError, match="call for 2 views, pixel_values hold 3"):
        made.model(**{**batch, "image_sizes": torch.tensor([[60, 50]])})


def test_two_turns(made: Foveate) -> None:
    """The method asks where to look first; its second turn follows the first in one context."""
    image = picture(60, 90)
    with calls(made.model) as seen:
        answer = made.ask(image, "What is it?", max_new_tokens=5)
    prefills = [call for call in seen if call.get("mm_encoder_outputs")]
    assert len(prefills) == 2
    region = answer.regions[0]
    assert (region.top, region.right, region.bottom) == (0, 90, 60)
    assert answer.ledger.new_tokens <= 10
    assert answer.text == made.ask(image, "What is it?", max_new_tokens=5).text


# What a method's file promises to the rest.


def test_registry_line_is_all_there_is(made: Foveate) -> None:
    assert type(made.model.method).__name__ == "Toy"
    assert made.processor.image_processor.planner().uses_query
    assert made.model.config.method == made.processor.image_processor.method == "toy"
    assert tiny_tokenizer().vocab_size <= tiny_text().vocab_size
    assert made.model.method.tower.image_size == tiny_vision().image_size
