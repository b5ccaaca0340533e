"""Models in transformers' own layout: its classes compute the same bits from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    AutoProcessor,
    Dinov2Config,
    SiglipVisionConfig,
)

import foveate
from foveate import Foveate, FoveateError, compose
from foveate.methods import METHODS
from foveate.model.export import to_transformers, write_transformers
from foveate.tiny import tiny_model, tiny_text, tiny_tokenizer, tiny_vision
from tests.command import foveate as command
from tests.support import awake, chat, gap, greedy, picture

SIZES = ((60, 100), (200, 90), (56, 56), (1, 300))


def siglip() -> Foveate:
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
    )
    return compose(vision, tiny_text(), "llava", tokenizer=tiny_tokenizer())


MODELS: dict[str, Any] = {
    "llava, pad": lambda: tiny_model("llava"),
    "llava, crop": lambda: tiny_model("llava", {"fit": "crop"}),
    "llava, squash": lambda: tiny_model("llava", {"fit": "squash", "activation": "relu"}),
    "llava, last layer": lambda: compose(
        tiny_vision(), tiny_text(), "llava", tokenizer=tiny_tokenizer(), vision_feature_layer=-1
    ),
    "llava, siglip": siglip,
    "anyres, dinov2": lambda: compose(
        Dinov2Config(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14
        ),
        tiny_text(),
        "anyres",
        tokenizer=tiny_tokenizer(),
    ),
    "llava, tied": lambda: compose(
        tiny_vision(),
        tiny_text(tie_word_embeddings=True),
        "llava",
        tokenizer=tiny_tokenizer(),
        template="chatml",
    ),
    "anyres": lambda: tiny_model("anyres"),
    "anyres, other grids": lambda: tiny_model("anyres", {"grids": [[1, 1], [3, 2]]}, template="llama3"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_the_same_bits(name: str, tmp_path: Path) -> None:
    ours: Foveate = MODELS[name]()
    awake(ours.model)
    write_transformers(ours.model, ours.processor, tmp_path)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    their_processor = AutoProcessor.from_pretrained(tmp_path)
    assert not type(theirs).__name__.startswith("Foveate")
    again = foveate.load(tmp_path, device="cpu", dtype="float32")
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    for size in SIZES:
        messages = chat("What is it?", picture(*size))
        a, b, c = (
            dict(processor.apply_chat_template(messages, **options))
            for processor in (their_processor, ours.processor, again.processor)
        )
        assert a["input_ids"].tolist() == b["input_ids"].tolist() == c["input_ids"].tolist()
        assert gap(a["pixel_values"].flatten(0, -4), b["pixel_values"]) == 0.0
        expected = ours.model(**b).logits
        assert gap(theirs(**a).logits, expected) == 0.0
        assert gap(again.model(**c).logits, expected) == 0.0
        assert greedy(theirs, a) == greedy(ours.model, b)


def test_the_command(tmp_path: Path) -> None:
    tiny_model("anyres").save(tmp_path / "ours")
    result = command("convert", tmp_path / "ours", tmp_path / "theirs", "--to", "hf", "--dtype", "bfloat16")
    assert result.code == 0, result.stderr
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "theirs").config.model_type == "llava_next"
    names = {path.name for path in (tmp_path / "theirs").iterdir()}
    assert {
        "config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "chat_template.jinja",
    } <= names
    result = command("convert", tmp_path / "ours", tmp_path / "other", "--to", "gguf")
    assert result.code == 2 and not (tmp_path / "other").exists()


@pytest.mark.parametrize("method", sorted({*METHODS} - {"llava", "anyres"}))
def test_methods_without_a_class(method: str, tmp_path: Path) -> None:
    tiny_model(method).save(tmp_path / "ours")
    result = command("convert", tmp_path / "ours", tmp_path / "theirs", "--to", "hf")
    assert result.code == 2 and not (tmp_path / "theirs").exists()
    assert "cannot be written for transformers: transformers has no class of its own for" in " ".join(
        result.stderr.split()
    )


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("llava", {"projector_depth": 1}, "projector_depth 1"),
        ("anyres", {"grids": []}, "grids: transformers' class needs at least one"),
        ("anyres", {"max_visual_tokens": 60}, "max_visual_tokens: transformers' class has no such bound"),
    ],
)
def test_options_without_a_place(method: str, options: dict[str, Any], words: str) -> None:
    made = tiny_model(method, options)
    with pytest.raises(FoveateError, match=words):
        to_transformers(made.model, made.processor)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("gpt2", "GPT2LMHeadModel cannot be written for transformers as a llava model"),
        ("phi", r"LlavaForConditionalGeneration has no place for lm_head\.bias"),
    ],
)
def test_llms_without_a_place(kind: str, words: str) -> None:
    text = CONFIG_MAPPING[kind](
        vocab_size=266, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    made = compose(tiny_vision(), text, "llava", tokenizer=tiny_tokenizer())
    with pytest.raises(FoveateError, match=words):
        to_transformers(made.model, made.processor)


def test_an_llm_whose_logits_are_more_than_a_linear_layers() -> None:
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = CONFIG_MAPPING["gemma2"](
        vocab_size=266, num_key_value_heads=2, head_dim=12, final_logit_softcapping=1.0, **sizes
    )
    made = compose(tiny_vision(), text, "llava", tokenizer=tiny_tokenizer())
    with pytest.raises(FoveateError, match="Gemma2ForCausalLM: its logits come out otherwise"):
        to_transformers(made.model, made.processor)
