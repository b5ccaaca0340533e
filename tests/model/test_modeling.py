"""The model around methods that look again and inject: decoders, prefills, ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from foveate import FoveateConfig, FoveateError, FoveateForConditionalGeneration, compose
from foveate.model.modeling import _hands_on_keywords
from foveate.tiny import tiny_tokenizer, tiny_vision
from tests.methods.conftest import fresh
from tests.methods.test_invariants import chats, prepare
from tests.support import awake, chat, gap, greedy, picture, tower_calls


def test_original_pictures_that_are_missing_are_asked_for() -> None:
    m = fresh("coroi")
    batch = prepare(m.processor, [chat("What?", picture(60, 80))])
    del batch["source_pixels"]
    with pytest.raises(FoveateError, match="CoRoI looks at the original pictures: give source_pixels"):
        m.model(**batch)


def test_a_prefill_in_pieces_is_refused() -> None:
    """transformers would drop the injection without a word."""
    m = fresh("coroi")
    with pytest.raises(FoveateError, match="prefill_chunk_size: CoRoI changes hidden states"):
        m.ask(picture(60, 80), "What?", max_new_tokens=2, prefill_chunk_size=8)
    m.model.generation_config.prefill_chunk_size = 8
    with pytest.raises(FoveateError, match="must run in one piece"):
        m.ask(picture(60, 80), "What?", max_new_tokens=2)
    fresh("coroi", chain=False).ask(picture(60, 80), "What?", max_new_tokens=2, prefill_chunk_size=8)


LLM: dict[str, Any] = {"vocab_size": 266, "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
FAMILIES = {
    "mistral": {**SMALL, "num_key_value_heads": 2},
    "qwen3": {**SMALL, "num_key_value_heads": 2, "head_dim": 12},
    "gemma2": {**SMALL, "num_key_value_heads": 2, "head_dim": 12},
    "phi": SMALL,
    "gpt_neox": SMALL,
    "gpt2": {"n_embd": 48, "n_layer": 4, "n_head": 4},
    "opt": {**SMALL, "ffn_dim": 96, "word_embed_proj_dim": 48, "max_position_embeddings": 512},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILIES)
def test_any_decoder(kind: str) -> None:
    text = CONFIG_MAPPING[kind](**LLM, **FAMILIES[kind])
    m = compose(tiny_vision(), text, "coroi", tokenizer=tiny_tokenizer())
    awake(m.model)
    batch = prepare(m.processor, chats())
    with_windows = m.model(**batch).logits
    greedy(m.model, batch)
    for attention in m.model.connector.attentions:
        attention.value.norm.weight.zero_()
        attention.value.norm.bias.zero_()
    assert gap(with_windows, m.model(**batch).logits) > 1e-4


def test_a_decoder_whose_layers_are_not_found_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    text = CONFIG_MAPPING["gpt2"](**LLM, n_embd=48, n_layer=4, n_head=4)
    monkeypatch.setattr("transformers.GPT2LMHeadModel.get_decoder", lambda self: self.lm_head)
    assert compose(tiny_vision(), text, "llava", tokenizer=tiny_tokenizer()).model is not None
    with pytest.raises(FoveateError, match="GPT2LMHeadModel: its decoder's layers cannot be found"):
        compose(tiny_vision(), text, "coroi", tokenizer=tiny_tokenizer())


@pytest.mark.parametrize("chain", [True, False])
@pytest.mark.parametrize("kind", ["falcon", "bloom"])
def test_a_decoder_that_cannot_be_told_of_windows_is_refused_at_once(kind: str, chain: bool) -> None:
    """Not after the stage that leaves the chain alone."""
    text = CONFIG_MAPPING[kind](**LLM, hidden_size=48, num_hidden_layers=2, num_attention_heads=4)
    assert compose(tiny_vision(), text, "llava", tokenizer=tiny_tokenizer()).model is not None
    with pytest.raises(FoveateError, match="ForCausalLM gives its layers no keyword arguments"):
        compose(tiny_vision(), text, "coroi", {"chain": chain}, tokenizer=tiny_tokenizer())


def test_looking_at_a_decoder_leaves_it_as_it_was() -> None:
    text = CONFIG_MAPPING["gpt2"](**LLM, n_embd=48, n_layer=4, n_head=4)
    config = FoveateConfig(vision_config=tiny_vision(), text_config=text, method="coroi")
    states = []
    for method in ("llava", "coroi"):
        config.method = method
        torch.manual_seed(0)
        model = FoveateForConditionalGeneration(config)
        states.append((model.training, all(m.training for m in model.modules())))
    assert states[0] == states[1] == (True, True)
    language = model.language_model
    random = torch.get_rng_state()
    assert _hands_on_keywords(language, language.transformer.h)
    assert torch.equal(torch.get_rng_state(), random)  # its dropout drew none
    assert not language.transformer.h[0]._forward_pre_hooks


def test_a_rank_that_sees_only_text_keeps_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the others train gets a gradient, of zero, from a blank picture."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    m = fresh("coroi")
    model = m.model.train()
    batch = prepare(m.processor, [chat("Why?")])
    model.vision_tower.requires_grad_(False)
    with tower_calls(model) as seen:
        model(**batch, labels=batch["input_ids"]).loss.backward()
    assert len(seen) > 1
    assert all(p.grad is not None and not p.grad.any() for p in model.connector.parameters())
