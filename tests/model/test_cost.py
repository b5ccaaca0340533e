"""Prices: what is counted on a short LLM is what the whole one costs."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, MistralConfig

from foveate.composing import compose
from foveate.methods import METHODS
from foveate.methods.base import TowerGeometry, Widths
from foveate.methods.coroi import Coroi
from foveate.model.config import FoveateConfig
from foveate.model.cost import FlopCounter, Pricer
from foveate.picture.geometry import Size
from foveate.tiny import tiny_tokenizer, tiny_vision
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


@pytest.mark.parametrize("method", METHODS)
def test_operations_that_are_not_run_again_count_as_often_as_they_come(method: str) -> None:
    """torch's own counter runs every operation."""
    pricer, size = Pricer(fresh(method).model.config), Size(60, 80)
    views = pricer.plan(*size).views
    blank = torch.zeros(len(views), 3, *views[0].size, device="meta", dtype=pricer.dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as whole:
        pricer.model.encode_views(blank)
    assert pricer.vision(size).encode == whole.get_total_flops() > 0


def test_results_of_operations_that_are_not_run_again_are_like_the_first() -> None:
    whole = torch.ones(2, 3, dtype=torch.int64, device="meta")
    here = torch.ones(2, 3)
    with FlopCounter() as counter:
        for _ in range(2):
            for factor, kind in ((1, torch.int64), (1.0, torch.float32), (True, torch.int64)):
                assert (whole * factor).dtype == kind
            assert (whole.float().T @ whole.float()).shape == (3, 3)
            assert [part.shape for part in whole.float().sort(dim=1)] == [(2, 3), (2, 3)]
            assert whole.mul_(2) is whole
            assert whole[0].data_ptr() == whole.data_ptr()
            assert (here * 2).sum() == 12
            here = here + 0
    assert counter.total == 2 * 2 * 3 * 3 * 2


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


def test_a_text_of_any_length_costs_what_a_run_of_it_counts() -> None:
    for method in ("llava", "coroi"):
        pricer = Pricer(fresh(method).model.config)
        for tokens, kept in ((1, 0), (1, 40), (70, 0), (33, 90), (90, 5)):
            assert pricer.language(tokens, kept) == pricer._measure_language(tokens, kept)
        assert pricer._growth is not None


def test_an_llm_that_forgets_tokens_is_run_for_every_length() -> None:
    text = MistralConfig(
        vocab_size=266,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
    )
    model = compose(tiny_vision(), text, "llava", tokenizer=tiny_tokenizer(), template="vicuna_v1")
    assert Pricer(model.model.config)._growth is None
