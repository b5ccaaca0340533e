"""The model of a recipe: without weights, and as each stage starts from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from foveate.composing import compose
from foveate.devices import DTYPES
from foveate.errors import FoveateError
from foveate.methods import method_class
from foveate.model import checkpoints
from foveate.model.adapters import with_base
from foveate.model.folders import HERE, Hub, local_folder
from foveate.model.modeling import FoveateForConditionalGeneration
from foveate.model.processing import FoveateProcessor
from foveate.model.text import load_tokenizer
from foveate.options import build_options, merged
from foveate.tiny import tiny_model
from foveate.train.recipe import ModelSpec, Recipe

DEFAULT_TEMPLATE = "vicuna_v1"


def stage_options(spec: ModelSpec, changes: Mapping[str, Any]) -> dict[str, Any]:
    """All options of the recipe's method, with a stage's changes.

    Raises `FoveateError` for an unknown method or option.
    """
    method, options = _method(spec)
    known = method_class(method).Options
    base = asdict(build_options(known, merged(known, options, spec.options), where="model.options"))
    return merged(known, base, changes)


def typed(recipe: Recipe) -> Recipe:
    """The recipe with the values of its method's options converted to their types."""
    stages = recipe.stages.values()
    if not recipe.model.options and not any(stage.options for stage in stages):
        return recipe
    known = method_class(_method(recipe.model)[0]).Options
    return replace(
        recipe,
        model=replace(recipe.model, options=merged(known, {}, recipe.model.options)),
        stages={
            name: replace(stage, options=merged(known, {}, stage.options))
            for name, stage in recipe.stages.items()
        },
    )


def _method(spec: ModelSpec) -> tuple[str, Mapping[str, Any]]:
    """The method's name, and the options that a recipe's model has of its own."""
    if spec.load is None:
        assert spec.method is not None
        return spec.method, method_class(spec.method).tiny if spec.tiny else {}
    config = checkpoints.read_config(spec.load, spec.vision_tower, spec.method, hub_of(spec))
    return config.method, config.options


def hub_of(spec: ModelSpec) -> Hub:
    """How the model that a recipe loads is looked for."""
    return Hub(spec.revision, spec.subfolder or "")


def skeleton(
    spec: ModelSpec, options: Mapping[str, Any], template: str | None
) -> tuple[FoveateForConditionalGeneration, FoveateProcessor]:
    """The model on the meta device, without weights, and its processor."""
    template = template or spec.template
    with torch.device("meta"):
        if spec.load is not None:
            config = checkpoints.read_config(spec.load, spec.vision_tower, spec.method, hub_of(spec))
            config.options = dict(options)
            processor = FoveateProcessor.from_pretrained(
                spec.load,
                vision_tower=spec.vision_tower,
                method=spec.method,
                template=template,
                options=options,
                **hub_of(spec).arguments(),
            )
            return _with_settings(FoveateForConditionalGeneration(config), spec), processor
        if spec.tiny:
            made = _tiny(spec, options, 0, template)
        else:
            assert spec.vision is not None and spec.text is not None and spec.method is not None
            vision = local_folder(spec.vision, Hub(spec.vision_revision))
            text, _ = with_base(spec.text, Hub(spec.text_revision))
            made = compose(
                checkpoints.vision_config_of(vision),
                checkpoints.config_of(text),
                spec.method,
                options,
                tokenizer=load_tokenizer(text)[0],
                template=template or DEFAULT_TEMPLATE,
                vision_feature_layer=spec.vision_feature_layer,
                preprocessor=checkpoints.read_preprocessor(vision),
            )
    return _with_settings(made.model, spec), made.processor


def find_weights(spec: ModelSpec) -> None:
    """Raises `FoveateError` if the files of a recipe's weights are missing or incomplete; reads no tensor."""
    for name, hub in (
        (spec.load, hub_of(spec)),
        (spec.vision_tower, Hub()),
        (spec.vision, Hub(spec.vision_revision)),
        (spec.text, Hub(spec.text_revision)),
    ):
        if name is not None:
            checkpoints.weight_files(with_base(name, hub)[0])


def first_model(recipe: Recipe, options: Mapping[str, Any]) -> FoveateForConditionalGeneration:
    """The model that the first stage starts from."""
    spec = recipe.model
    if spec.load is not None:
        model = load_model(spec.load, spec, options, vision_tower=spec.vision_tower, hub=hub_of(spec))
    elif spec.tiny:
        model = _tiny(spec, options, recipe.seed, None).model.to(DTYPES[spec.dtype])
    else:
        assert spec.vision is not None and spec.text is not None and spec.method is not None
        set_seed(recipe.seed)  # for the fresh connector
        model = compose(
            spec.vision,
            spec.text,
            spec.method,
            options,
            vision_feature_layer=spec.vision_feature_layer,
            dtype=DTYPES[spec.dtype],
            vision_revision=spec.vision_revision,
            text_revision=spec.text_revision,
        ).model
    return _with_settings(model, spec)


def load_model(
    folder: str | Path,
    spec: ModelSpec,
    options: Mapping[str, Any],
    vision_tower: str | None = None,
    hub: Hub = HERE,
) -> FoveateForConditionalGeneration:
    """A model folder with a stage's options. Raises `FoveateError` if they need other parameters."""
    model = FoveateForConditionalGeneration.from_pretrained(
        folder,
        vision_tower=vision_tower,
        method=spec.method,
        options=dict(options),
        dtype=DTYPES[spec.dtype],
        **hub.arguments(),
    )
    return _with_settings(model, spec)


def _tiny(spec: ModelSpec, options: Mapping[str, Any], seed: int, template: str | None) -> Any:
    assert spec.method is not None
    return tiny_model(spec.method, options, seed, template or spec.template or DEFAULT_TEMPLATE)


def _with_settings(
    model: FoveateForConditionalGeneration, spec: ModelSpec
) -> FoveateForConditionalGeneration:
    if spec.max_positions is not None:
        model.config.max_positions = spec.max_positions
    try:
        model.set_attn_implementation(spec.attention)
    except (ImportError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise FoveateError(f"model.attention {spec.attention} cannot be used here: {reason}") from error
    return model
