"""Prices: what is counted on a short LLM is what the whole one costs."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from foveate.methods.base import TowerGeometry, Widths
from foveate.methods.coroi import Coroi
from foveate.model.config import FoveateConfig
from foveate.model.cost import Pricer
from foveate.picture.geometry import Size
from foveate.tiny import tiny_vision
from tests.methods.conftest import fresh

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


def test_pricing_takes_windows_that_share_no_token_and_no_more_than_there_are() -> None:
    for scales, covered in (([2, 3, 4], 576), ([3, 4], 4 * 64 + 4 * 36), ([4], 4 * 36)):
        connector = Coroi(TowerGeometry(336, 14), {"scales": scales}).build_connector(Widths(64, 64, 8))
        cells = set[int]()
        for step, numbers in enumerate(connector._spread()):
            for w in connector._windows(step, [numbers]):
                cells |= set(connector._cells(w.row, w.column, connector.sides[w.scale]).tolist())
        assert len(cells) == covered
    m = fresh("coroi", scales=[2], rois=20, distinct=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vision = Pricer(m.model.config).vision(Size(60, 80))
    assert vision.looks == 9
    assert (
        vision.inject == Pricer(fresh("coroi", scales=[2], rois=9).model.config).vision(Size(60, 80)).inject
    )


def test_a_price_counts_every_look_and_the_injection() -> None:
    m = fresh("coroi")
    price, vision = Pricer(m.model.config).price(Size(60, 80)), Pricer(m.model.config).vision(Size(60, 80))
    fewer = Pricer(fresh("coroi", scales=[2], rois=1).model.config).price(Size(60, 80))
    none = Pricer(fresh("coroi", chain=False).model.config).price(Size(60, 80))
    assert vision.looks == 8  # scales 3 and 4 have the same windows of one token here
    assert (price.views, fewer.views, none.views) == (9, 2, 1)
    assert price.encode_flops > fewer.encode_flops > none.encode_flops
    assert price.prefill_flops - none.prefill_flops == vision.inject > 0
