"""Prices: what is counted on a short LLM is what the whole one costs."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from foveate.model.config import FoveateConfig
from foveate.model.cost import Pricer
from foveate.tiny import tiny_vision

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "vocab_size": 266,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
# LLM -> its own settings, and whether all of its layers are equal
LLMS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama": ("llama", {}, True),
    "qwen2": ("qwen2", {}, True),
    "mistral": ("mistral", {"sliding_window": None}, True),
    "sliding": ("mistral", {"sliding_window": 8}, True),
    "mixture": ("qwen3_moe", {**EXPERTS, "mlp_only_layers": []}, True),
    "dense and mixed": ("qwen3_moe", {**EXPERTS, "mlp_only_layers": [0, 3]}, False),
    "attention of two kinds": ("gemma3_text", {"sliding_window": 8}, False),
    "gpt2": ("gpt2", {"n_embd": 48, "n_layer": 6, "n_head": 4, "n_inner": 96, "vocab_size": 266}, True),
}


@pytest.mark.parametrize("name", LLMS)
def test_equal_layers_are_counted_once(name: str) -> None:
    kind, settings, equal = LLMS[name]
    text = CONFIG_MAPPING[kind](**(settings if kind == "gpt2" else {**SIZES, **settings}))
    config = FoveateConfig(vision_config=tiny_vision(), text_config=text, method="llava")
    short, whole = Pricer(config), Pricer(config)
    whole._languages = [whole.model.language_model]
    assert len(short._languages) == (2 if equal else 1)
    for tokens, kept in ((40, 0), (7, 30), (1, 5)):
        assert short.language(tokens, kept) == whole.language(tokens, kept)
    assert all(count > 0 for count in short.language(40))
