"""What Foveate relies on of transformers, torch and peft that is private or little documented.

Such things move between their minor versions. Each stands here once, with a comment that says what is relied
on, and `tests/core/test_upstream.py` has one test for each that fails by its name. What cannot stand here,
because transformers finds it by its name in our classes, is tested there too:

    forward(mm_encoder_outputs=...), EncodedPictures.pooler_output    `model.modeling`
    replace_image_token, get_text_with_replacements                   `model.processing`
    _get_train_sampler, get_decay_parameter_names                     `train.trainer`
    transformers.models.auto.*                                        `model.registration`
    gradient_checkpointing, _gradient_checkpointing_func              a tower that checkpoints by itself
    torch's formulas for FLOPs, and its dispatch mode                 `model.cost.FlopCounter`
    the fingerprint of a data set                                     `data.questions`
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.chat_template_utils import render_jinja_template

# The LLM's key and value cache was called `past_key_values` up to transformers 5.23 and is `cache` since: the
# field of outputs, the argument of `forward` and `generate`, and the key that accelerate must not move.
CACHE_NAMES = ("cache", "past_key_values")


def _cache_name() -> str:
    for field in fields(CausalLMOutputWithPast):
        if field.name in CACHE_NAMES:
            return field.name
    raise ImportError(f"transformers' outputs have no field named {' or '.join(CACHE_NAMES)}")


CACHE = _cache_name()


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call, by whichever of its names; None where there is none."""
    given = (arguments.get(name) for name in CACHE_NAMES)
    return next((cache for cache in given if cache is not None), None)


# `generate` takes either a configuration or arguments; both together are to be removed.
def generation_arguments(given: Mapping[str, Any], **ours: Any) -> dict[str, Any]:
    """Arguments for `generate`: greedy decoding unless they say else; `ours` stand above `given`."""
    config = given.get("generation_config")
    if config is None:
        return {"do_sample": False, **given, **ours}
    config = copy.deepcopy(config)
    rest = {name: value for name, value in {**given, **ours}.items() if name != "generation_config"}
    return {**config.update(**rest), "generation_config": config}


# Where the blocks that a template marks as `generation` lie in its text; else only as a mask of tokens.
def marked_answers(
    template: str, messages: Sequence[Mapping[str, Any]], **names: Any
) -> list[tuple[int, int]]:
    """Start and end, in characters, of the answers in what a chat template writes.

    Args:
        template: Jinja source.
        messages: one conversation.
        **names: what else the template reads.
    """
    _, ((*spans,),) = render_jinja_template(
        [messages], chat_template=template, return_assistant_tokens_mask=True, **names
    )
    return spans


# The tensors of a cache: `layers`, each with `keys` and `values` (B, heads, T, head width).
def cache_bytes(cache: Any) -> int:
    """Memory that a cache's keys and values take."""
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))


# `is_sliding` and `is_linear` say per layer whether it forgets tokens; the first axis of `keys` is the batch.
def holds_all(cache: Any, rows: int) -> bool:
    """Whether a cache holds every token that was read, one row of the batch for each of `rows`."""
    return (
        isinstance(cache, DynamicCache)
        and not any(cache.is_sliding)
        and not any(cache.is_linear)
        and all(len(layer.keys) == rows for layer in cache.layers)
    )


# `batch_select_indices` changes a cache in place.
def keep_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Leaves only these rows of the batch in a cache."""
    cache.batch_select_indices(rows)


# No interface names a decoder's layers: LLMs of transformers hold them as a direct child.
def decoder_layers(decoder: nn.Module) -> nn.ModuleList | None:
    """The layers that a decoder runs one after another; None where they are not found."""
    children = dict(decoder.named_children())
    found = (children.get(name) for name in ("layers", "h", "blocks"))
    return next((layers for layers in found if isinstance(layers, nn.ModuleList)), None)


# The config knows the attention in use as `_attn_implementation`; only the setter is public.
@contextmanager
def eager_attention(decoder: PreTrainedModel) -> Iterator[None]:
    """Lets a decoder compute its attention maps, which other implementations never hold."""
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)


# A layer's `self_attn` returns its output and, with eager attention, its map.
@contextmanager
def attention_maps(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the attention map (B, H, T, T) of each call of a decoder layer."""
    seen: list[Tensor] = []
    attend = layer.get_submodule("self_attn")
    hook = attend.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    try:
        yield seen
    finally:
        hook.remove()


# A tensor counts the in-place changes of its values in `_version`; inference tensors do not.
def changes(tensor: Tensor) -> int:
    """A number that rises whenever a tensor is changed in place; 0 for inference tensors."""
    return 0 if tensor.is_inference() else tensor._version
