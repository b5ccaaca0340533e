"""Private or little documented parts of transformers, torch, peft and bitsandbytes that Foveate relies on.

Such parts change between minor versions. Each is here once, with a comment that says what is relied on, and
`tests/core/test_upstream.py` has one test for each that fails by its name. Some cannot be here, because
transformers looks them up by name in our classes; they are tested there too:

    forward(mm_encoder_outputs=...), EncodedPictures.pooler_output    `model.modeling`
    replace_image_token, get_text_with_replacements                   `model.processing`
    _get_train_sampler, get_decay_parameter_names                     `train.trainer`
    transformers.models.auto.*                                        `model.registration`
    gradient_checkpointing, _gradient_checkpointing_func              a tower that checkpoints by itself
    torch's formulas for FLOPs, and its dispatch mode                 `model.cost.FlopCounter`
    the fingerprint of a data set                                     `data.questions`
    the parts of LlamaDecoderLayer                                    `lab.reading`
    Pillow's Image._new, the same pixels in a plain image             `picture.reading`
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from types import FunctionType
from typing import Any

import torch
from jinja2 import Environment, Template, TemplateError, meta
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import render_jinja_template

# The LLM's key and value cache is called `past_key_values` up to transformers 5.23 and `cache` after it: the
# field of outputs, the argument of `forward` and `generate`, and the key that accelerate must not move.
CACHE_NAMES = ("cache", "past_key_values")


def _cache_name() -> str:
    for field in fields(CausalLMOutputWithPast):
        if field.name in CACHE_NAMES:
            return field.name
    raise ImportError(f"transformers' outputs have no field named {' or '.join(CACHE_NAMES)}")


CACHE = _cache_name()


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call, under either name; None if there is none."""
    given = (arguments.get(name) for name in CACHE_NAMES)
    return next((cache for cache in given if cache is not None), None)


# `generate` takes either a configuration or arguments; support for both together will be removed.
def generation_arguments(given: Mapping[str, Any], **ours: Any) -> dict[str, Any]:
    """Arguments for `generate`: greedy decoding by default; `ours` override `given`."""
    config = given.get("generation_config")
    if config is None:
        return {"do_sample": False, **given, **ours}
    config = copy.deepcopy(config)
    rest = {name: value for name, value in {**given, **ours}.items() if name != "generation_config"}
    return {**config.update(**rest), "generation_config": config}


# The environment of chat templates, with transformers' own filters, is made where a template is compiled.
def template_environment() -> Environment:
    """The environment in which transformers renders chat templates; not to be changed."""
    return chat_template_utils._compile_jinja_template("").environment


def template_variables(template: str) -> set[str]:
    """The variables that a chat template reads; none if it is broken."""
    try:
        return meta.find_undeclared_variables(template_environment().parse(template))
    except (TemplateError, RecursionError):
        return set()


# `render_jinja_template` gets its template from `_compile_jinja_template`; spans of the `generation` blocks
# come from it alone, as public functions give a mask of tokens only.
def rendered(
    compiled: Callable[[str], Template], conversations: Sequence[Any], template: str, **names: Any
) -> tuple[list[str], list[list[tuple[int, int]]]]:
    """Texts of conversations as transformers renders them, with a template that `compiled` makes.

    Args:
        compiled: Jinja source -> template of `template_environment` or one that does the same.
        conversations: lists of messages.
        template: Jinja source.
        **names: further variables of the template; `return_assistant_tokens_mask` asks for the second result.

    Returns:
        The texts; and start and end, in characters, of the answers in each.
    """
    known = {**vars(chat_template_utils), "_compile_jinja_template": compiled}
    render = FunctionType(render_jinja_template.__code__, known, argdefs=render_jinja_template.__defaults__)
    return render(conversations, chat_template=template, **names)


def settings_of(default: GenerationConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """What `generate` goes by: the given configuration or the model's, and arguments above it."""
    return (given.get("generation_config") or default).to_dict() | dict(given)


# The tensors of a cache: `layers`, each with `keys` and `values` (B, heads, T, head width).
def cache_bytes(cache: Any) -> int:
    """Memory that a cache's keys and values take."""
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))


# `is_sliding` and `is_linear` say per layer whether it forgets tokens; the first axis of `keys` is the batch.
def holds_all(cache: Any, rows: int) -> bool:
    """Whether a cache holds every token that was read, in a batch of `rows` rows."""
    return (
        isinstance(cache, DynamicCache)
        and not any(cache.is_sliding)
        and not any(cache.is_linear)
        and all(len(layer.keys) == rows for layer in cache.layers)
    )


# `batch_select_indices` changes a cache in place.
def keep_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Keeps only these rows of the batch in a cache."""
    cache.batch_select_indices(rows)


# Only `DynamicLayer` itself keeps the keys and values of every token, in their order, and nothing else.
def states_of(cache: Any) -> list[tuple[Tensor, Tensor]] | None:
    """Per layer of a cache its keys and values (B, heads, T, width); None if it holds anything else."""
    kinds = (DynamicLayer, RoomLayer)
    if not isinstance(cache, DynamicCache) or not all(type(layer) in kinds for layer in cache.layers):
        return None
    return [(layer.keys, layer.values) for layer in cache.layers]


# A layer's `update` takes the states of the new tokens and returns those of all. Attention masks are made for
# the number of tokens that `get_seq_length` says were there before; what the mask leaves out is never read.
class SlotLayer(DynamicLayer):
    """A layer whose rows are of different lengths, each from its slot's start; one token a row is added.

    Args:
        keys: (slots, heads, room, width), written in place.
        values: the same.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.device, self.dtype = keys.device, keys.dtype
        self.columns = torch.empty(0, dtype=torch.long, device=keys.device)  # (B,) of the rows' new tokens
        self.rows = self.columns
        self.used = 1  # columns that any row has, with its new token

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            held[self.rows, :, self.columns] = new[:, :, 0]
        rows = len(key_states)
        return self.keys[:rows, :, : self.used], self.values[:rows, :, : self.used]

    def get_seq_length(self) -> int:
        return self.used - 1


class RoomLayer(DynamicLayer):
    """A layer with room for the tokens that are read next, which are written in place.

    Args:
        keys: (B, heads, T, width), those of tokens before and room for the new ones at the end.
        values: the same.
        new: how many new ones.
    """

    def __init__(self, keys: Tensor, values: Tensor, new: int) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.device, self.dtype, self.new = keys.device, keys.dtype, new

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.keys[:, :, -self.new :], self.values[:, :, -self.new :] = key_states, value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.keys.shape[2] - self.new


def cache_of(layers: Sequence[DynamicLayer]) -> DynamicCache:
    """A cache of these layers."""
    cache = DynamicCache()
    cache.layers = list(layers)
    return cache


# No interface gives a decoder's layers: LLMs of transformers hold them as a direct child.
def decoder_layers(decoder: nn.Module) -> nn.ModuleList | None:
    """The layers that a decoder runs one after another; None if they are not found."""
    children = dict(decoder.named_children())
    found = (children.get(name) for name in ("layers", "h", "blocks"))
    return next((layers for layers in found if isinstance(layers, nn.ModuleList)), None)


# The config knows the attention in use as `_attn_implementation`; only the setter is public.
def attention_of(config: PreTrainedConfig) -> str | None:
    """The name of the attention that a model computes; None if it has not been chosen yet."""
    return config._attn_implementation


@contextmanager
def eager_attention(decoder: PreTrainedModel) -> Iterator[None]:
    """Lets a decoder compute its attention maps, which other implementations never store."""
    before = attention_of(decoder.config)
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


# bitsandbytes' Linear4bit packs its weights anew on processors with AVX512-BF16, when it is first run without
# gradients: it has none from then on, and widths that 32 does not divide are refused. It packs nothing while
# `support_avx512bf16_for_cpu` is False.
def keep_packing(model: nn.Module) -> None:
    """Keeps the layout in which 4-bit layers were loaded, on every processor."""
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


# A processor checks every part that its `__init__` names by `check_argument_for_proper_class`;
# `get_attributes` names them in their order, which is the one that `from_args_and_dict` takes.
def pictures_alone(
    kind: type[ProcessorMixin], images: Any, tokenizer: Any, values: Mapping[str, Any]
) -> ProcessorMixin:
    """A processor that reads pictures and text; its parts for videos and sound are None.

    Args:
        kind: the processor's class.
        images: its image processor.
        tokenizer: its tokenizer.
        values: the content of its `processor_config.json`.
    """

    class Pictures(kind):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            known = super().check_argument_for_proper_class
            return None if argument is None else known(argument_name, argument)

    Pictures.__name__ = kind.__name__
    parts = {"image_processor": images, "tokenizer": tokenizer}
    return Pictures.from_args_and_dict([parts.get(name) for name in kind.get_attributes()], dict(values))


# The classes of processors by the type of their model.
def processors_by_type() -> Mapping[str, str]:
    """Type of a model -> the name of its processor's class, importable here or not."""
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    return PROCESSOR_MAPPING_NAMES
