"""LoRA adapters in folders of their own, as peft saves them: loaded into their base model and merged."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from foveate.errors import FoveateError, report_keys, require
from foveate.methods.layouts import Json, Layout, convert_key
from foveate.model.folders import ADAPTER, HERE, Hub, checked, found, local_folder, read_json, shown
from foveate.model.quantising import is_quantised

FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."  # of peft's keys
WHOLE = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json")
LORA = re.compile(r"^(.*)\.(lora_\w+?(?:\.weight)?)$")


@dataclass(frozen=True)
class Adapter:
    """A folder with adapter_config.json, and its contents."""

    folder: Path
    config: Json


def with_base(
    name: str | Path, hub: Hub = HERE, wanted: tuple[str, ...] = ("config.json",)
) -> tuple[Path, Adapter | None]:
    """A model's folder; for a LoRA adapter that of the model it was trained on, and the adapter.

    Raises `FoveateError` as `local_folder`, for a base that is not there, and for what is not LoRA.
    """
    folder = found(name, hub)
    path = folder / ADAPTER
    if not path.is_file():
        return checked(folder, wanted), None
    if any((folder / file).is_file() for file in WHOLE):
        raise FoveateError(f"{shown(folder)} holds a whole model and a LoRA adapter: move one of them out")
    if (folder / "non_lora_trainables.bin").is_file():
        raise FoveateError(
            f"{shown(folder)} is a LoRA adapter of LLaVA's own training code (non_lora_trainables.bin): "
            "merge it with the authors' scripts/merge_lora_weights.py, and give the result"
        )
    config = read_json(path)
    base, kind = config.get("base_model_name_or_path"), config.get("peft_type")
    if kind != "LORA":
        raise FoveateError(f"{shown(path)}: peft_type {kind!r} is not supported, only 'LORA'")
    if not isinstance(base, str) or not base:
        raise FoveateError(f"{shown(path)}: base_model_name_or_path should name the model it was trained on")
    place = hub.parts() if Path(base).exists() else replace(hub.parts(), revision=config.get("revision"))
    try:
        return local_folder(base, place, wanted), Adapter(folder, config)
    except FoveateError as error:
        raise FoveateError(f"{shown(path)}: its base_model_name_or_path cannot be loaded: {error}") from error


def merge(
    model: Any,
    adapter: Adapter,
    read: Callable[[Path, list[str]], Mapping[str, Any]],
    layout: Layout | None = None,
    unused: Collection[str] = (),
) -> Any:
    """Merges an adapter into a model's weights.

    Args:
        model: the base.
        adapter: one of `with_base`.
        read: a folder and names of files -> tensors.
        layout: the layout of the checkpoint that the adapter's keys follow; None if they are the model's own.
        unused: weights that the model leaves out because nothing reads them.

    Returns:
        The model; a quantised one with the adapter in its layers.

    Raises:
        FoveateError: peft is missing, or the adapter does not fit.
    """
    require("peft", "train", f"the LoRA adapter in {shown(adapter.folder)}")
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    names = [name for name in FILES if (adapter.folder / name).is_file()][:1]
    if not names:
        raise FoveateError(f"{shown(adapter.folder)} holds no weights: no {' or '.join(FILES)}")
    lora, whole = _parts(read(adapter.folder, names), layout)
    lora = {part: tensor for part, tensor in lora.items() if f"{part[0]}.weight" not in unused}
    whole = {key: tensor for key, tensor in whole.items() if key not in unused}
    modules = sorted({module for module, _ in lora})
    own = model.state_dict()
    shapes = {key: tensor.shape for key, tensor in own.items()}
    report_keys(
        adapter.folder,
        (),
        [*(module for module in modules if f"{module}.weight" not in own), *(whole.keys() - own.keys())],
        [key for key, tensor in whole.items() if key in own and shapes[key] != tensor.shape],
    )
    try:
        known = {f.name for f in fields(LoraConfig) if f.init}
        config = LoraConfig(**{key: value for key, value in adapter.config.items() if key in known})
        config.base_model_name_or_path = model.name_or_path  # which peft would otherwise mention
        config.target_modules, config.modules_to_save = set(modules), None
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        config.alpha_pattern = {_renamed(key, layout): alpha for key, alpha in config.alpha_pattern.items()}
        ranks = {module: len(tensor) for (module, part), tensor in lora.items() if "_A" in part}
        config.rank_pattern = {module: rank for module, rank in ranks.items() if rank != config.r}
        made = get_peft_model(model, config)
        state = {f"{PREFIX}{module}.{part}": tensor for (module, part), tensor in lora.items()}
        unexpected = set_peft_model_state_dict(made, state).unexpected_keys
        report_keys(adapter.folder, (), [key.removeprefix(PREFIX) for key in unexpected])
        # Quantised weights would be rounded once more: their adapter stays beside them.
        merged = made.get_base_model() if is_quantised(model) else made.merge_and_unload()
    except FoveateError:
        raise
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FoveateError(f"the LoRA adapter in {shown(adapter.folder)} does not fit: {reason}") from error
    with torch.no_grad():
        merged.load_state_dict(whole, strict=False)
    return merged


def _parts(
    tensors: Mapping[str, Any], layout: Layout | None
) -> tuple[dict[tuple[str, str], Any], dict[str, Any]]:
    """Low-rank matrices by module and part, and weights that are replaced as a whole."""
    lora, whole = {}, {}
    for key, tensor in tensors.items():
        key = key.removeprefix(PREFIX).replace(".modules_to_save.", ".").replace(".base_layer.", ".")
        match = LORA.match(key)
        if match is None:
            whole[_renamed(key, layout)] = tensor
        else:
            lora[_renamed(match[1], layout), match[2]] = tensor
    return lora, whole


def _renamed(key: str, layout: Layout | None) -> str:
    """Foveate's name of a module or weight."""
    if layout is None:
        return key
    suffix = "" if key.endswith((".weight", ".bias")) else ".weight"
    new = convert_key(layout, key + suffix)
    return key if new is None else new.removesuffix(suffix)
