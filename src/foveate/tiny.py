"""Tiny random parts: a vision tower, an LLM and a byte tokenizer, for trying commands and for tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast, set_seed

from foveate.composing import compose
from foveate.methods import DEFAULT, method_class
from foveate.methods.base import IMAGE_TOKEN
from foveate.options import merged

if TYPE_CHECKING:
    from foveate.ask.foveate import Foveate

CHAT_TOKENS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, plus the special tokens of all chat templates: 266 in all."""
    special = ["<unk>", "<s>", "</s>", "<pad>", IMAGE_TOKEN, *CHAT_TOKENS]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=[IMAGE_TOKEN, *CHAT_TOKENS],
    )


def tiny_vision(**changes: Any) -> CLIPVisionConfig:
    """A CLIP tower of 3 layers: views of 56 x 56 pixels, 16 tokens each."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    return CLIPVisionConfig(
        **{**sizes, "image_size": 56, "patch_size": 14, "initializer_factor": 4.0, **changes}
    )


def tiny_text(**changes: Any) -> LlamaConfig:
    """A Llama of 4 layers."""
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    more = {"num_key_value_heads": 2, "vocab_size": 266, "initializer_range": 0.2}
    return LlamaConfig(**{**sizes, **ids, **more, **changes})


def tiny_model(
    method: str = DEFAULT,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    template: str = "vicuna_v1",
) -> Foveate:
    """A random model of any method, the same for the same seed. Its answers mean nothing."""
    kind = method_class(method)
    options = merged(kind.Options, kind.tiny, options)
    set_seed(seed)
    return compose(tiny_vision(), tiny_text(), method, options, tokenizer=tiny_tokenizer(), template=template)
