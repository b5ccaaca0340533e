"""A new model from any Hugging Face vision tower and any causal LM."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from foveate.errors import FoveateError, one_sentence, report_keys
from foveate.methods import DEFAULT, method_class
from foveate.model import checkpoints
from foveate.model.adapters import merge, with_base
from foveate.model.config import FoveateConfig
from foveate.model.folders import Hub, hub_id, local_folder
from foveate.model.modeling import FoveateForConditionalGeneration
from foveate.model.processing import FoveateProcessor, image_processor_for
from foveate.model.text import chat_template, load_tokenizer, prepare_tokenizer, separator_token
from foveate.options import build_options, merged
from foveate.picture.reading import Transparency
from foveate.versions import names_versions

if TYPE_CHECKING:
    from foveate.ask.foveate import Foveate

Part: TypeAlias = str | Path | PreTrainedConfig | PreTrainedModel


@names_versions
def compose(
    vision: Part,
    text: Part,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    connector: str | Path | None = None,
    tokenizer: Any = None,
    template: str = "vicuna_v1",
    vision_feature_layer: int = -2,
    dtype: torch.dtype = torch.float32,
    preprocessor: Mapping[str, Any] | None = None,
    transparency: Transparency = "white",
    vision_revision: str | None = None,
    text_revision: str | None = None,
    **hub: Any,
) -> Foveate:
    """Builds a model with pretrained (or, from a configuration, random) parts and a fresh connector.

    Args:
        vision: folder, hub id, configuration or model of a vision tower; of CLIP-like pairs the vision part.
        text: folder, hub id, configuration or model of a causal LM.
        method: the name of a method; by default llava, or that of `connector`.
        options: the method's options.
        connector: folder of one stage of the authors' own training, with `mm_projector.bin` or similar: its
            weights replace new ones, and its options apply, changed by `options`.
        tokenizer: needed if `text` is not a folder or id.
        template: one of `foveate.model.text.TEMPLATES`.
        vision_feature_layer: hidden state of the tower that is used, -1 the last.
        dtype: of all weights.
        preprocessor: mean and std of the tower, if `vision` is not a folder or id.
        transparency: what transparent pictures show: `white`, or `bare` as for `foveate.load`.
        vision_revision: branch, tag or commit of `vision` on the hub.
        text_revision: the same of `text`.
        **hub: `token`, `cache_dir`, `local_files_only` and `force_download`, as for `foveate.load`, for all.

    Raises:
        FoveateError: parts that are missing or do not fit.
    """
    place = Hub.of(hub, "compose")
    if place != place.parts():
        raise FoveateError("compose takes two models: give vision_revision or text_revision")
    stage = None if connector is None else checkpoints.stage_files(connector, place)
    if stage is not None:
        if method not in (None, stage.released.method):
            raise FoveateError(f"method is {method}, but {connector} was made for {stage.released.method}")
        method = stage.released.method
    method = method or DEFAULT
    kind = method_class(method)  # checked before any weights are read
    options = merged(kind.Options, {} if stage is None else stage.options, options)
    build_options(kind.Options, options, where=f"options of method {kind.title}")
    vision_config, tower, found = _vision(vision, dtype, replace(place, revision=vision_revision))
    text_config, language_model = _text(text, dtype, replace(place, revision=text_revision))
    vision_config.name_or_path = text_config.name_or_path = ""  # a saved model must not hold local paths
    if tokenizer is None:
        if not isinstance(text, (str, Path)):
            raise FoveateError("compose needs a tokenizer if text is not a folder or a hub id")
        folder, _ = with_base(text, replace(place, revision=text_revision))
        tokenizer, image_token_id = load_tokenizer(folder)
    else:
        image_token_id = prepare_tokenizer(tokenizer)
    text_config.vocab_size = max(text_config.vocab_size, image_token_id + 1)
    config = FoveateConfig(
        vision_config=vision_config,
        text_config=text_config,
        method=method,
        options=options,
        vision_feature_layer=vision_feature_layer,
        image_token_id=image_token_id,
        separator_token_id=separator_token(tokenizer) if stage is None else stage.separator,
    )
    for part, given in {"vision_tower": vision, "language_model": text}.items():
        if isinstance(given, (str, Path)):
            config.note_sources(**{part: hub_id(given)})
    config.dtype = dtype
    model = FoveateForConditionalGeneration(config).to(dtype)
    if model.device.type != "meta":
        own = model.method.tower_weights
        weights = None if own is None else checkpoints.read_tensors(local_folder(own, place))
        model.method.fill_tower(model.vision_tower, tower, weights)
    if stage is not None:
        checkpoints.fill_connector(model, stage)
    if language_model is not None:
        language_model.resize_token_embeddings(text_config.vocab_size)
        model.language_model.load_state_dict(language_model.state_dict())
        model.generation_config = copy.deepcopy(language_model.generation_config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    processor = FoveateProcessor(
        image_processor_for(config, preprocessor or found), tokenizer, chat_template=chat_template(template)
    )
    processor.check_end(template)
    processor.image_processor.transparency = transparency
    for token in (tokenizer.eos_token_id, processor.answer_end()):
        model.stop_at(token)
    from foveate.ask.foveate import Foveate

    return Foveate(model.eval(), processor)


def _vision(
    part: Part, dtype: torch.dtype, hub: Hub
) -> tuple[Any, PreTrainedModel | None, Mapping[str, Any]]:
    if isinstance(part, PreTrainedModel):
        return copy.deepcopy(part.config), part, {}
    if isinstance(part, PreTrainedConfig):
        return copy.deepcopy(part), None, {}
    folder = local_folder(part, hub)
    config = checkpoints.vision_config_of(folder)
    with one_sentence(f"{folder}: its config.json is of no tower that can be built"):
        kind = type(AutoModel.from_config(config, trust_remote_code=False))
    return config, _pretrained(kind, folder, config, dtype), checkpoints.read_preprocessor(folder)


def _text(part: Part, dtype: torch.dtype, hub: Hub) -> tuple[Any, PreTrainedModel | None]:
    if isinstance(part, PreTrainedModel):
        return copy.deepcopy(part.config), part
    if isinstance(part, PreTrainedConfig):
        return copy.deepcopy(part), None
    folder, adapter = with_base(part, hub)
    model = _pretrained(AutoModelForCausalLM, folder, checkpoints.config_of(folder), dtype)
    if adapter is not None:
        model = merge(model, adapter, checkpoints.read_files)
    return copy.deepcopy(model.config), model


def _pretrained(kind: Any, folder: Path, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A part with its weights. Raises `FoveateError` if they are missing or broken."""
    checkpoints.weight_files(folder)
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # reported below, by name
    with one_sentence(f"the weights in {folder} cannot be read"):
        model, info = kind.from_pretrained(
            folder, config=config, dtype=dtype, trust_remote_code=False, **options
        )
    # a pooling head is never read, and many towers are released without one
    missing = [key for key in info["missing_keys"] if "pooler" not in key]
    mismatched = [key for key, *_ in info["mismatched_keys"]]
    report_keys(folder, missing, mismatched=mismatched)
    return model
