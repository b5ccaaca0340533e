"""Keys of other people's configurations: what Foveate does not read must say what Foveate does.

A key is read by a layout or by `convert_config`, or it is in one of the tables here: then its value must ask
for what happens anyway, and any other is refused by name. Keys of training are ignored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from foveate.errors import FoveateError
from foveate.methods.layouts import Layout

# Key of config.json -> values that ask for what happens anyway. A key that is missing or null does so, too.
SAME: dict[str, dict[str, tuple[Any, ...]]] = {
    "hf": {
        "multimodal_projector_bias": (True,),
        "use_image_newline_parameter": (True,),
    },
    "original": {
        "mm_vision_select_feature": ("patch",),
        "mm_use_im_start_end": (False,),
        "use_mm_proj": (True,),
        "s2": (False,),
        "image_crop_resolution": (),
        "image_split_resolution": (),
    },
}
# Keys of LLaVA's own configurations that a layout or `convert_config` reads.
READ = {"mm_vision_tower", "mm_projector_type", "mm_vision_select_layer", "mm_patch_merge_type"}
# Keys that change nothing once a model is trained: rates, what was frozen, a token that no prompt contains, a
# width that the weights have.
WITHOUT_EFFECT = {
    *("mm_projector_lr", "mm_vision_tower_lr", "mm_tunable_parts", "mm_use_im_patch_token", "mm_hidden_size"),
    "mm_resampler_type",  # by which layouts are told apart
}
SIZES = {"num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads"}
SIZES |= {"num_key_value_heads", "head_dim", "image_size", "patch_size", "projection_dim", "num_channels"}
TOKENS = ("eos_token_id", "bos_token_id", "pad_token_id")  # of generation_config.json
COUNTS = ("num_beams", "max_length", "max_new_tokens", "num_return_sequences", "top_k")
MOST_LAYERS, MOST = 2**10, 2**21
WITHOUT_CLASS_TOKEN = ("siglip_vision_model", "siglip2_vision_model")
BICUBIC = 3  # Pillow's number
# Key of a picture preprocessor -> values that ask for what happens anyway.
PICTURES: dict[str, tuple[Any, ...]] = {
    "do_resize": (True,),
    "do_rescale": (True,),
    "do_convert_rgb": (True,),
    "resample": (BICUBIC,),
    "crop_pct": (),
}
# Steps of a preprocessor that are read, here or by a layout.
STEPS = {"do_resize", "do_rescale", "do_convert_rgb", "do_normalize", "do_center_crop", "do_pad"}


def check_config(layout: Layout, config: Mapping[str, Any], where: str) -> None:
    """Raises `FoveateError` for a key of config.json that asks for what Foveate does not do."""
    _check(config, SAME[layout.family], where)
    if layout.family == "hf":
        _check(config, {"vision_feature_select_strategy": (_every_patch(config),)}, where)
    if layout.family == "original":
        known = {*READ, *WITHOUT_EFFECT, *SAME["original"], *layout.reads}
        for key, value in config.items():
            if key.startswith("mm_") and key not in known and value not in (None, False):
                raise FoveateError(f"{where}: {key} {value!r} is not supported by {layout.name} here")
        layer = config.get("mm_vision_select_layer", -2)
        if not isinstance(layer, int):
            raise FoveateError(f"{where}: mm_vision_select_layer should be one layer, not {layer!r}")
    else:
        layer = config.get("vision_feature_layer", -2)
        if not isinstance(layer, int):
            raise FoveateError(f"{where}: several vision_feature_layer are not supported: {layer!r}")


def _every_patch(config: Mapping[str, Any]) -> str:
    """The value of transformers' classes with which the LLM reads a token for each patch and no other."""
    tower = config.get("vision_config")
    kind = tower.get("model_type", "clip_vision_model") if isinstance(tower, Mapping) else None
    return "full" if kind in WITHOUT_CLASS_TOKEN else "default"


def check_preprocessor(values: Mapping[str, Any], where: str, side: int | None = None) -> None:
    """Raises `FoveateError` for a key of a picture preprocessor that asks for what Foveate does not do.

    Args:
        values: of preprocessor_config.json, or arguments of a call.
        where: for messages.
        side: of the tower's input, pixels; None: not known.
    """
    _check(values, PICTURES, where)
    for key, value in values.items():
        if key.startswith("do_") and key not in STEPS and value:
            raise FoveateError(f"{where}: {key} is a step that is not supported")
    factor = values.get("rescale_factor")
    if factor is not None and not (_number(factor) and abs(factor * 255 - 1) < 1e-6):
        raise FoveateError(f"{where}: rescale_factor {factor!r} is not supported, only 1/255")
    for key in ("image_mean", "image_std"):
        value = values.get(key)
        if value is not None and not (
            isinstance(value, (list, tuple)) and len(value) == 3 and all(map(_number, value))
        ):
            raise FoveateError(f"{where}: {key} should be three numbers, not {value!r}")
    if 0 in (values.get("image_std") or ()):
        raise FoveateError(f"{where}: image_std is 0, by which nothing can be divided")
    if side is not None:
        cropped = values.get("do_center_crop") is not False
        for key in ("size", "crop_size") if cropped else ("size",):
            sides = _sides(values.get(key))
            if sides is None or any(one != side for one in sides):
                raise FoveateError(
                    f"{where}: {key} {values[key]!r} is not supported with a vision tower of {side} pixels"
                )


def check_unquantised(config: Mapping[str, Any], where: str) -> None:
    """Raises `FoveateError` for the configuration of quantised weights, which are of another form."""
    for place in (config, config.get("text_config"), config.get("vision_config")):
        found = place.get("quantization_config") if isinstance(place, Mapping) else None
        if found:
            kind = found.get("quant_method", "") if isinstance(found, Mapping) else found
            bits = isinstance(found, Mapping) and [n for n in (4, 8) if found.get(f"load_in_{n}bit")]
            what = f"{kind}, {bits[0]} bits" if bits else str(kind)
            raise FoveateError(
                f"{where}: the weights are quantised ({what}), which is not supported here: give the "
                "checkpoint that they were made from"
            )


def check_parts(config: Mapping[str, Any], where: str) -> None:
    """Raises `FoveateError` for quantised weights, and for sizes that no machine could build."""
    check_unquantised(config, where)
    for place in (config, config.get("text_config"), config.get("vision_config")):
        for key, value in place.items() if isinstance(place, Mapping) else ():
            layers = key.endswith("layers")
            if key in SIZES and _number(value) and not 0 < value <= (MOST_LAYERS if layers else MOST):
                raise FoveateError(f"{where}: {key} {value:.3g} is not a size that a model can have")


def check_generation(values: Mapping[str, Any], where: str) -> None:
    """Raises `FoveateError` for settings of generation_config.json that are not of their type."""
    for key, value in values.items():
        if value is None:
            continue
        whole = isinstance(value, int) and not isinstance(value, bool)
        tokens = isinstance(value, list) and all(type(one) is int for one in value)
        if (key in TOKENS and not (whole or tokens)) or (key in COUNTS and not (whole and value >= 0)):
            raise FoveateError(f"{where}: {key} should be a whole number, not {value!r}")


def norms_of(values: Mapping[str, Any], mean: Any, std: Any) -> tuple[Any, Any]:
    """Mean and standard deviation of a preprocessor; by default those given."""
    if values.get("do_normalize") is False:
        return [0.0] * 3, [1.0] * 3
    return values.get("image_mean") or mean, values.get("image_std") or std


def _check(values: Mapping[str, Any], same: Mapping[str, Collection[Any]], where: str) -> None:
    for key, accepted in same.items():
        value = values.get(key)
        if value is not None and value not in accepted:
            must = f" must be {' or '.join(repr(one) for one in accepted)}:" if accepted else ""
            raise FoveateError(f"{where}: {key}{must} {value!r} is not supported")


def _sides(size: Any) -> list[Any] | None:
    """The sides that a size names; None if it names others than of a square."""
    if size is None:
        return []
    if isinstance(size, int):
        return [size]
    if isinstance(size, Mapping) and set(size) in ({"shortest_edge"}, {"height", "width"}):
        return list(size.values())
    return None


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
