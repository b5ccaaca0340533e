"""A model in transformers' own layout, which other tools read: vLLM, converters to GGUF, MLX.

Which class that is, and with which settings, a method says itself (`Method.export`). Layers of the vision
tower after the one that is read are not part of our models. The class has them and never uses what they give:
they are written as copies of the last one.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from foveate.errors import FoveateError, one_sentence
from foveate.layers import name_of
from foveate.methods.layouts import Export
from foveate.model.modeling import FoveateForConditionalGeneration
from foveate.model.processing import FoveateProcessor
from foveate.model.quantising import refuse_quantised
from foveate.towers.vit import VisionTower

LAYER = re.compile(r"^(.*\.layers?\.)(\d+)(\..*)$")


def to_transformers(
    model: FoveateForConditionalGeneration, processor: FoveateProcessor
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model and processor as transformers' own classes.

    Raises:
        FoveateError: a method without such a class, options that it does not have, a tower or an LLM with
            parts for which it has no place.
    """
    refuse_quantised(model, "writing for transformers")
    try:
        export = model.method.export()
    except FoveateError as error:
        raise FoveateError(f"{model.method.title} cannot be written for transformers: {error}") from error
    kind = transformers.CONFIG_MAPPING[export.model_type]
    config, llm = _config(kind, export, model), type(model.language_model).__name__
    with one_sentence(f"{llm} cannot be written for transformers as a {export.model_type} model"):
        with torch.device("meta"):
            skeleton = transformers.AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
        state = _state(model, export, skeleton.state_dict(), type(skeleton).__name__)
        made = type(skeleton).from_pretrained(
            None, config=config, state_dict=state, dtype=model.dtype, trust_remote_code=False
        )
        made.generation_config = copy.deepcopy(model.generation_config)
        _check_head(model, made)
    return made.eval(), _processor(export, made, processor)


def write_transformers(
    model: FoveateForConditionalGeneration, processor: FoveateProcessor, folder: Path
) -> None:
    """Writes what `to_transformers` gives to a folder."""
    made, theirs = to_transformers(model, processor)
    made.save_pretrained(folder)
    theirs.save_pretrained(folder)
    theirs.image_processor.save_pretrained(folder)  # in a file of its own, too: converters look for that one


def _config(kind: Any, export: Export, model: FoveateForConditionalGeneration) -> PreTrainedConfig:
    config, tower = model.config, model.vision_tower
    if not isinstance(tower, VisionTower):
        raise FoveateError(f"{type(tower).__name__} has no place in transformers' {kind.__name__}")
    extra = _tokens(tower) - tower.patches
    if extra not in (0, 1):
        raise FoveateError(
            f"transformers' {kind.__name__} has no place for a tower with {extra} extra tokens"
        )
    vision = copy.deepcopy(tower.model.config)
    vision.num_hidden_layers = config.vision_config.num_hidden_layers
    return kind(
        vision_config=vision,
        text_config=copy.deepcopy(config.text_config),
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy="default" if extra else "full",
        image_token_index=config.image_token_id,
        image_seq_length=tower.patches,
        tie_word_embeddings=config.tie_word_embeddings,
        **export.config,
    )


@torch.no_grad()
def _tokens(tower: VisionTower) -> int:
    """Tokens of a view, with those that stand for no patch."""
    shadow = copy.deepcopy(tower.model).to("meta")
    side = tower.model.config.image_size
    blank = torch.zeros(1, 3, side, side, device="meta", dtype=tower.model.dtype)
    return int(shadow(blank).last_hidden_state.shape[1])


def _state(
    model: FoveateForConditionalGeneration, export: Export, wanted: Mapping[str, Tensor], kind: str
) -> dict[str, Tensor]:
    """Our parameters under the names of transformers' class `kind`."""
    llm, own = model.language_model, model.state_dict()
    decoder, head = llm.base_model_prefix, name_of(llm, llm.get_output_embeddings())
    names = {
        "vision_tower.model.": "model.vision_tower.",
        f"language_model.{decoder}.": "model.language_model.",
        f"language_model.{head}.": "lm_head.",
        **{ours: f"model.{theirs}" for ours, theirs in export.keys.items()},
    }
    state, left = {}, []
    for key, tensor in own.items():
        begin = next((begin for begin in names if key.startswith(begin)), None)
        if begin is None:
            left.append(key)
        else:
            state[names[begin] + key[len(begin) :]] = tensor
    state |= _unread(
        {key for key in wanted if key.startswith("model.vision_tower.")} - state.keys(), state, wanted
    )
    if extra := sorted([*left, *(state.keys() - wanted.keys())]):
        raise FoveateError(f"transformers' {kind} has no place for {', '.join(extra[:4])}")
    if lacking := sorted(wanted.keys() - state.keys()):
        raise FoveateError(f"transformers' {kind} needs {', '.join(lacking[:4])}, which the model lacks")
    return state


def _unread(
    missing: set[str], state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Parameters of the tower after the layer that is read: copies of that one, and norms that do nothing."""
    there = [int(found[2]) for key in state if (found := LAYER.match(key)) and "vision_tower" in key]
    unread: dict[str, Tensor] = {}
    for key in sorted(missing):
        like = wanted[key]
        found = LAYER.match(key)
        if found is not None and int(found[2]) > max(there):
            unread[key] = state[f"{found[1]}{max(there)}{found[3]}"].clone()
        elif "norm" in key:
            make = torch.ones if key.endswith("weight") else torch.zeros
            unread[key] = make(like.shape, dtype=like.dtype, device=next(iter(state.values())).device)
    return unread


@torch.no_grad()
def _check_head(model: FoveateForConditionalGeneration, made: PreTrainedModel) -> None:
    """Raises `FoveateError` for an LLM that does more to its logits than a linear layer."""
    token = model.config.image_token_id
    ids = torch.tensor([[n for n in range(9) if n != token]], device=model.device)
    training = model.training
    ours, theirs = model.eval()(input_ids=ids).logits, made.eval()(input_ids=ids).logits
    model.train(training)
    if not torch.equal(ours, theirs):
        name = type(model.language_model).__name__
        raise FoveateError(f"{name}: its logits come out otherwise in transformers' {type(made).__name__}")


def _processor(export: Export, made: PreTrainedModel, processor: FoveateProcessor) -> ProcessorMixin:
    images, side = processor.image_processor, processor.image_processor.image_size
    pictures = getattr(transformers, export.pictures)(
        **{
            "size": {"shortest_edge": side},
            "crop_size": {"height": side, "width": side},
            "image_mean": list(images.image_mean),
            "image_std": list(images.image_std),
            **export.preprocessor,
        }
    )
    kind = transformers.PROCESSOR_MAPPING[type(made.config)]
    strategy = made.config.vision_feature_select_strategy
    return kind(
        pictures,
        copy.deepcopy(processor.tokenizer),
        patch_size=images.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(strategy == "default"),
        chat_template=processor.chat_template,
    )
