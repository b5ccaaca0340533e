"""How other people's checkpoints name configurations and weights.

A method's file says what its released checkpoints look like (`Layout`). Two families share most of their
names: `hf`, as transformers saves its own LLaVA classes, and `original`, as the training code of
haotian-liu/LLaVA and its many forks does (a flat LLM config with `mm_*` keys, the tower kept apart).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from foveate.errors import FoveateError
from foveate.layers import Activation

Json: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """The layout of a method's released checkpoints.

    Attributes:
        name: whose checkpoints these are, for messages.
        family: which common names apply besides `keys`.
        recognises: whether a config.json, read as plain JSON, is of this layout.
        options: (config.json, preprocessor_config.json) -> the method's options.
        keys: regular expression on a checkpoint's key -> Foveate's key; tried before the family's own.
        drops: keys that have no counterpart because they are never read.
        optional: regular expressions on Foveate's keys that exist only with some options.
        separator: the key of config.json with the LLM token that separates groups of visual tokens.
        connector_files: files written by a stage in which only the connector trains.
        told_by: regular expression that must match a key of the weights, if config.json alone does not
            identify the layout; such layouts are tried before the others.
        only_named: these checkpoints look like another method's: they are read as this method's only if it is
            named.
        reads: further `mm_*` keys of config.json that `options` reads.
        template: chat template that these checkpoints were trained with; None: their folder's own, and for
            `original` ones that of their LLM.
    """

    name: str
    family: Literal["hf", "original"]
    recognises: Callable[[Json], bool]
    options: Callable[[Json, Json], Json]
    keys: Mapping[str, str]
    drops: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    separator: str | None = None
    connector_files: tuple[str, ...] = ()
    told_by: str | None = None
    only_named: bool = False
    reads: tuple[str, ...] = ()
    template: str | None = None


@dataclass(frozen=True)
class Export:
    """A method's model as one of transformers' own classes.

    Attributes:
        model_type: of the class.
        pictures: name of the image processor's class.
        config: keys of config.json, besides those of tower and LLM.
        preprocessor: arguments of the image processor, besides the tower's side, mean and deviation.
        keys: our parameter's name or its beginning -> theirs, besides those of tower and LLM.
    """

    model_type: str
    pictures: str
    config: Json
    preprocessor: Json
    keys: Mapping[str, str]


FAMILY_KEYS: dict[str, dict[str, str]] = {
    "hf": {
        r"^(?:model\.)?vision_tower\.(?:vision_model\.)?": "vision_tower.model.",
        r"^language_model\.": "language_model.",
        r"^model\.language_model\.": "language_model.model.",
        r"^lm_head\.": "language_model.lm_head.",
    },
    "original": {
        r"^model\.vision_tower\.vision_tower\.(?:vision_model\.)?": "vision_tower.model.",
        r"^model\.": "language_model.model.",
        r"^lm_head\.": "language_model.lm_head.",
    },
}
HF_PROJECTOR = {  # the two linear layers of transformers' LLaVA classes
    r"^(?:model\.)?multi_modal_projector\.linear_1\.": "connector.projector.0.",
    r"^(?:model\.)?multi_modal_projector\.linear_2\.": "connector.projector.2.",
}
# `projector_hidden_act` of transformers' LLaVA classes -> ours; three of them are the same function.
HF_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
PROJECTORS = {"linear": 1, "mlp2x_gelu": 2}  # `mm_projector_type` of original checkpoints -> linear layers
BUFFERS = (r"\.rotary_emb\.inv_freq$", r"\.position_ids$")  # recomputed, never read


def known_projector(config: Mapping[str, Any]) -> bool:
    """Whether an original checkpoint's projector is linear, or linear layers with GELU between."""
    return config.get("mm_projector_type", "linear") in PROJECTORS


def hf_export(
    model_type: str,
    pictures: str,
    depth: int,
    activation: Activation,
    preprocessor: Json,
    config: Json | None = None,
    keys: Mapping[str, str] | None = None,
) -> Export:
    """The export of a method that has the projector of transformers' LLaVA classes.

    Raises `FoveateError` for a projector of another depth.
    """
    if depth != 2:
        raise FoveateError(f"projector_depth {depth}: the projector of transformers' class has 2 layers")
    name = next(theirs for theirs, ours in HF_ACTIVATIONS.items() if ours == activation)
    projector = {
        "connector.projector.0.": "multi_modal_projector.linear_1.",
        "connector.projector.2.": "multi_modal_projector.linear_2.",
    }
    return Export(
        model_type=model_type,
        pictures=pictures,
        config={"projector_hidden_act": name, **(config or {})},
        preprocessor=preprocessor,
        keys={**projector, **(keys or {})},
    )


def hf_activation(config: Mapping[str, Any]) -> Json:
    """The option of the projector's activation, of checkpoints of transformers' LLaVA classes."""
    name = config.get("projector_hidden_act", "gelu")
    if name not in HF_ACTIVATIONS:
        known = ", ".join(HF_ACTIVATIONS)
        raise FoveateError(f"config.json: projector_hidden_act {name!r} is not one of {known}")
    return {"activation": HF_ACTIVATIONS[name]}


def connector_options(config: Mapping[str, Any]) -> Json:
    """Options common to such methods: how a picture becomes a square, and the projector's depth."""
    return {
        "fit": "pad" if config.get("image_aspect_ratio") == "pad" else "crop",
        "projector_depth": PROJECTORS[config.get("mm_projector_type", "linear")],
    }


def convert_key(layout: Layout, key: str) -> str | None:
    """Foveate's name of a released checkpoint's key; None for keys that are never read."""
    if any(re.search(pattern, key) for pattern in (*BUFFERS, *layout.drops)):
        return None
    for pattern, replacement in {**layout.keys, **FAMILY_KEYS[layout.family]}.items():
        if re.search(pattern, key):
            return re.sub(pattern, replacement, key, count=1)
    return key
