"""Quantised loading: the LLM's linear layers in 8 or 4 bits, by bitsandbytes through transformers.

Vision tower, connector and the LLM's head stay as they are: they are small, and the pictures' details depend
on them.
"""

from __future__ import annotations

import copy
import logging
from typing import Any, Literal, get_args

import torch
from torch import nn

from foveate.errors import FoveateError, require

Quantize = Literal["8bit", "4bit"]


def quantisation(quantize: str, dtype: Any) -> Any:
    """The configuration of transformers that quantises a model while it is loaded.

    Args:
        quantize: `8bit` or `4bit`.
        dtype: in which 4-bit layers compute; by default, and for "auto", float32.

    Raises:
        FoveateError: another value, or bitsandbytes is missing.
    """
    if quantize not in get_args(Quantize):
        raise FoveateError(f"quantize should be {' or '.join(get_args(Quantize))}, not {quantize!r}")
    for module in ("bitsandbytes", "accelerate"):
        require(module, "quantize", f"quantize {quantize}")
    from transformers import BitsAndBytesConfig

    # One line per layer and token otherwise, about what LLM.int8() always does.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.float32 if dtype in (None, "auto") else dtype
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def only_the_llm(config: Any, model: Any) -> Any:
    """A configuration of bitsandbytes that leaves out all but the LLM's layers.

    Args:
        config: for `from_pretrained`; one that says itself what it leaves out, and those of other libraries,
            are returned as they are.
        model: the model, on the meta device.
    """
    from transformers import BitsAndBytesConfig

    if not isinstance(config, BitsAndBytesConfig) or config.llm_int8_skip_modules is not None:
        return config
    head = model.get_output_embeddings()
    names = [name for name, _ in model.named_children() if name != "language_model"]
    names += [name for name, module in model.named_modules() if module is head]
    config = copy.deepcopy(config)
    config.llm_int8_skip_modules = names
    return config


def is_quantised(model: nn.Module) -> bool:
    """Whether a model's weights are quantised: it can be asked, but not saved."""
    return vars(model.config).get("quantization_config") is not None


def refuse_quantised(model: nn.Module, what: str) -> None:
    """Raises `FoveateError` for a quantised model; `what` begins the sentence."""
    if is_quantised(model):
        raise FoveateError(
            f"{what} a quantised model is not supported, as it has lost the weights that it was made from: "
            "take the model that it was loaded from"
        )
