"""Which parts of a model train in a stage, and their learning rates."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from foveate.errors import FoveateError
from foveate.train.recipe import Lora, Stage

ADAPTER = ".base_layer"  # peft puts the adapted layer here; recipes name modules without it


@dataclass(frozen=True)
class Part:
    """A row of the table of what trains: a child of the model."""

    name: str
    parameters: int
    trainable: int
    lrs: tuple[float, ...]  # its learning rates


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches a parameter or module, or a module above it."""
    return name == pattern or fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def select(model: nn.Module, stage: Stage, where: str) -> None:
    """Sets `requires_grad` of every parameter as the stage says; adapters train if there are any.

    Raises `FoveateError` if a pattern matches nothing or nothing trains.
    """
    names = {plain(name): parameter for name, parameter in model.named_parameters() if "lora_" not in name}
    tied = {plain(name): plain(other) for name, other in tied_names(model).items()}
    for key, patterns in (("trains", stage.trains), ("freezes", stage.freezes), ("lrs", stage.lrs)):
        for pattern in patterns:
            if not any(matches(name, pattern) for name in names):
                _refuse_tied(tied, pattern, f"{where}: {key}")
                raise _unmatched(model, pattern, f"{where}: {key}")
    for name, parameter in names.items():
        wanted = any(matches(name, pattern) for pattern in stage.trains)
        parameter.requires_grad = wanted and not any(matches(name, pattern) for pattern in stage.freezes)
    if stage.lora is None and not any(parameter.requires_grad for parameter in names.values()):
        raise FoveateError(f"{where}: 'freezes' leaves nothing of 'trains' to train; shorten one of them")
    for pattern in stage.lrs:
        if not any(p.requires_grad for name, p in model.named_parameters() if matches(plain(name), pattern)):
            raise FoveateError(
                f"{where}: lrs gives {pattern} a learning rate, but it does not train; add it to trains"
            )


def learning_rate(name: str, stage: Stage) -> float:
    """The learning rate of a parameter: the longest pattern of `lrs` that matches, else the stage's."""
    own = [pattern for pattern in stage.lrs if matches(plain(name), pattern)]
    return stage.lrs[max(own, key=len)] if own else stage.lr


def parts(model: nn.Module, stage: Stage) -> list[Part]:
    """The model's children, and what trains in each."""
    rows = []
    for child, module in model.named_children():
        trainable = [(f"{child}.{name}", p) for name, p in module.named_parameters() if p.requires_grad]
        rates = sorted({learning_rate(name, stage) for name, _ in trainable})
        total = sum(p.numel() for p in module.parameters())
        rows.append(Part(child, total, sum(p.numel() for _, p in trainable), tuple(rates)))
    return rows


def tied_names(model: nn.Module) -> dict[str, str]:
    """Second names of parameters -> the first, for example of an LLM's tied head."""
    first: dict[int, str] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            found[name] = first[id(parameter)]
    return found


def _refuse_tied(tied: Mapping[str, str], pattern: str, where: str) -> None:
    """Raises `FoveateError` if a pattern names only parameters that have another name."""
    for name, other in tied.items():
        if matches(name, pattern):
            raise FoveateError(
                f"{where}: {pattern!r} shares its weights with {other.rpartition('.')[0]}: "
                "name that, for both"
            )


def linear_layers(model: nn.Module, lora: Lora, where: str) -> list[str]:
    """Names of the linear layers that get adapters. Raises `FoveateError` if a pattern matches none.

    Left out are those whose weight another module reads, too: an LLM's head that is tied to its embedding,
    which a merge would change, and what torch's attention reads without calling it.
    """
    every = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    tied = tied_names(model)
    shared = {name.rpartition(".")[0] for pair in tied.items() for name in pair}
    inner = {
        f"{name}.out_proj"
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    }
    layers = [name for name in every if name not in shared | inner]
    for pattern in lora.on:
        if not any(matches(name, pattern) for name in layers):
            for name in every:
                if matches(name, pattern):
                    why = "shares its weights with the embedding" if name in shared else "is read, not called"
                    raise FoveateError(
                        f"{where}: lora.on: {name} {why}, so that an adapter on it cannot be "
                        "merged: leave it out"
                    )
            raise _unmatched(model, pattern, f"{where}: lora.on")
    return [name for name in layers if any(matches(name, pattern) for pattern in lora.on)]


def add_adapters(model: nn.Module, stage: Stage, where: str) -> None:
    """Puts LoRA adapters on a model, in place. Raises `FoveateError` if such a layer also trains itself."""
    from peft import LoraConfig, inject_adapter_in_model

    assert stage.lora is not None
    layers = linear_layers(model, stage.lora, where)
    for name in layers:
        for pattern in stage.trains:
            if matches(f"{name}.weight", pattern) and not any(
                matches(f"{name}.weight", f) for f in stage.freezes
            ):
                raise FoveateError(f"{where}: {name} is in trains and in lora.on; leave it in one of them")
    lora = stage.lora
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=layers, bias="none"
    )
    inject_adapter_in_model(config, model)


def train_exactly(model: nn.Module) -> None:
    """Makes what trains float32, in place: steps of fine-tuning are smaller than what bfloat16 can hold.

    So are frozen norms and biases, which are small, and which not every device computes with inputs of
    another format. Frozen weights stay as they are; autocast computes with both.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and (parameter.requires_grad or parameter.dim() < 2):
            parameter.data = parameter.data.float()


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Gives every parameter the number format in which a model is saved, in place."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def merge_adapters(model: nn.Module) -> None:
    """Merges every adapter into its layer's weight, rounding once, and removes it, in place."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            weight = module.get_base_layer().weight
            before = weight.dtype
            weight.data = weight.data.float()
            module.merge()
            weight.data = weight.data.to(before)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())


def plain(name: str) -> str:
    """The name that a parameter has without adapters."""
    return name.replace(ADAPTER, "")


def _unmatched(model: nn.Module, pattern: str, where: str) -> FoveateError:
    near = _near(pattern, (name for name, _ in model.named_modules() if name))
    return FoveateError(f"{where}: {pattern!r} matches no module; did you mean {' or '.join(near)}?")


def _near(pattern: str, names: Iterable[str]) -> Sequence[str]:
    names = list(names)
    same_depth = [name for name in names if name.count(".") == pattern.count(".")]
    near = difflib.get_close_matches(pattern, same_depth, n=2) or difflib.get_close_matches(
        pattern, names, n=2
    )
    return near or [name for name in names if "." not in name]
