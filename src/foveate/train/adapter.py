"""What a stage with LoRA has trained as an adapter in peft's format, instead of a whole model.

adapter_config.json names the base; adapter_model.safetensors holds the low-rank matrices and, whole, every
other module that trained. `foveate.load`, peft's `PeftModel` and the Auto classes put it on the base.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import nn

from foveate.errors import FoveateError
from foveate.files import write
from foveate.model import checkpoints
from foveate.model.adapters import FILES, PREFIX
from foveate.model.card import CARD, adapter_card
from foveate.model.folders import ADAPTER, found, hub_id, read_json
from foveate.model.modeling import FoveateForConditionalGeneration
from foveate.model.processing import FoveateProcessor
from foveate.options import build_options
from foveate.train.models import hub_of, stage_options
from foveate.train.parts import plain, tied_names
from foveate.train.recipe import Recipe, Stage

NAME = ".default"  # peft's name of the only adapter, which the keys of its files leave out


def check_adapter(
    recipe: Recipe, name: str, model: FoveateForConditionalGeneration, processor: FoveateProcessor
) -> None:
    """Raises `FoveateError` unless a stage's result is its base with an adapter, and nothing else.

    An adapter holds weights: options, chat template and longest text are those of its base.

    Args:
        recipe: the recipe.
        name: of the stage.
        model: on the meta device, with what trains marked.
        processor: of the stage.
    """
    stage, where = recipe.stages[name], f"stages.{name}.lora.save"
    before = _before(recipe, name)
    if before is None:
        _check_first(recipe, model, processor, where)
    else:
        old = recipe.stages[before]
        if stage_options(recipe.model, old.options) != stage_options(recipe.model, stage.options) or (
            old.template != stage.template
        ):
            raise FoveateError(
                f"{where}: an adapter has the options and the template of its base: give stage {before} "
                f"those of stage {name}"
            )
    shared = {part for pair in tied_names(model).items() for part in pair}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and plain(key) in shared:
            raise FoveateError(
                f"{where}: {plain(key)} shares its weights with another module, which an adapter cannot "
                "hold: leave it out of trains, or save the stage merged"
            )


def _check_first(
    recipe: Recipe, model: FoveateForConditionalGeneration, processor: FoveateProcessor, where: str
) -> None:
    """The same of a stage that starts from a model folder."""
    spec = recipe.model
    assert spec.load is not None  # the recipe has checked it
    folder = found(spec.load, hub_of(spec))
    if (folder / ADAPTER).is_file() or read_json(folder / "config.json").get("model_type") != "foveate":
        raise FoveateError(
            f"{where}: the base of an adapter is a whole model in Foveate's own layout: write {spec.load} "
            "anew with foveate convert, and load that"
        )
    base = checkpoints.own_config(folder)
    known = type(model.method).Options
    changed = {
        "method": base.method != model.config.method
        or build_options(known, base.options, where="options") != model.method.options,
        "chat template": FoveateProcessor.from_pretrained(folder).chat_template != processor.chat_template,
        "max_positions": spec.max_positions not in (None, base.max_positions),
    }
    for what, differs in changed.items():
        if differs:
            raise FoveateError(
                f"{where}: an adapter has the {what} of its base, and the recipe changes it: write "
                f"{spec.load} anew with foveate convert and that change, and load the result"
            )


def _before(recipe: Recipe, name: str) -> str | None:
    names = list(recipe.stages)
    place = names.index(name)
    return names[place - 1] if place else None


def base_of(recipe: Recipe, name: str) -> tuple[str, str | None]:
    """The model that a stage's adapter belongs to, and its revision."""
    before, spec = _before(recipe, name), recipe.model
    if before is not None:
        return str((Path(recipe.output) / "stages" / before / "model").absolute()), None
    assert spec.load is not None
    if hub_id(spec.load) == spec.load:
        return spec.load, spec.revision
    return str(Path(spec.load).absolute()), None


def write_adapter(
    model: FoveateForConditionalGeneration, stage: Stage, base: tuple[str, str | None], folder: Path
) -> None:
    """Writes what trained to a new folder, with its card."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer
    from safetensors.torch import save_file

    assert stage.lora is not None
    lora, parts = stage.lora, list(whole_parts(model))
    tensors = {}
    for key, tensor in model.state_dict().items():
        name = plain(key)
        if ".lora_" in name:
            tensors[PREFIX + name.replace(NAME, "")] = tensor
        elif any(name.startswith(f"{part}.") for part in parts):
            tensors[PREFIX + name] = tensor
    folder.mkdir(parents=True)
    save_file(
        {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()},
        folder / FILES[0],
        {"format": "pt"},
    )
    LoraConfig(
        base_model_name_or_path=base[0],
        revision=base[1],
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=[name for name, module in model.named_modules() if isinstance(module, LoraLayer)],
        modules_to_save=parts or None,
        auto_mapping={"base_model_class": type(model).__name__, "parent_library": "foveate"},
        inference_mode=True,
    ).save_pretrained(str(folder))
    write(folder / CARD, adapter_card(model, base[0], lora.rank, lora.alpha, lora.on, parts))


def whole_parts(module: nn.Module, name: str = "") -> Iterator[str]:
    """Names of the largest modules that train themselves; of one that trains in part, its parts that do."""
    own = [(key, p) for key, p in module.named_parameters() if ".lora_" not in f".{key}"]
    training = [key for key, p in own if p.requires_grad]
    if not training:
        return
    if name and (len(training) == len(own) or any("." not in key for key in training)):
        yield name
        return
    for child, inner in module.named_children():
        yield from whole_parts(inner, f"{name}.{child}" if name else child)
