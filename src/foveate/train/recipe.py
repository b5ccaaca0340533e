"""Recipes: a model, and stages that each say what trains, how, and on which data.

A recipe is a YAML file; everything in it is one of the dataclasses below, and unknown keys are errors.
Reading one imports neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from foveate.errors import FoveateError
from foveate.options import NULLS, Plain, build_options
from foveate.picture.limits import LIMITS, Limits
from foveate.shipped import find
from foveate.written import read_pair, read_yaml

MOST = 1_000_000  # epochs, and repeats of a file
# Settings that do not affect the result: a resumed run may change them.
WITHOUT_EFFECT = ("save_steps", "log_steps", "workers", "max_pixels", "mixture")


@dataclass(frozen=True)
class ModelSpec:
    """The model that the first stage starts from: `load`, or `vision` and `text`, or `tiny`."""

    load: str | None = None  # model folder or hub id, Foveate's own or a released one
    revision: str | None = None  # with `load`: branch, tag or commit on the hub
    subfolder: str | None = None  # with `load`: the folder inside the model's that holds it
    vision_tower: str | None = None  # with `load`: tower of an original checkpoint that keeps it apart
    vision: str | None = None  # vision tower, folder or hub id
    text: str | None = None  # causal LM, folder or hub id; its tokenizer is used
    vision_revision: str | None = None  # branch, tag or commit of `vision` on the hub
    text_revision: str | None = None  # the same of `text`
    tiny: bool = False  # tiny parts with random weights
    method: str | None = None  # needed unless `load` gives it
    options: dict[str, Any] = field(default_factory=dict)  # of the method
    template: str | None = None  # chat template; with `load`, by default the folder's own
    vision_feature_layer: int = -2  # hidden state of the tower that is used, -1 the last; not with `load`
    dtype: Literal["float32", "bfloat16"] = "float32"  # of frozen weights in memory, and as saved
    max_positions: int | None = None  # longest text, for an LLM that reads beyond its own positions
    max_pixels: int = LIMITS.max_pixels  # of a picture that is read
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"

    def __post_init__(self) -> None:
        sources = (self.load is not None, self.vision is not None or self.text is not None, self.tiny)
        if sum(sources) != 1:
            raise FoveateError("give one of load, vision with text, or tiny: true")
        if (self.vision is None) != (self.text is None):
            raise FoveateError("vision and text belong together: give both")
        if self.load is None and self.method is None:
            raise FoveateError("'method' is missing: name the method that connects vision and text")
        Limits(max_pixels=self.max_pixels)  # checks it
        if self.max_positions is not None and self.max_positions < 1:
            raise FoveateError(f"max_positions must be at least 1, not {self.max_positions}")
        if self.load is None and self.vision_tower is not None:
            raise FoveateError("vision_tower belongs to load: give the tower as vision")
        if self.load is None and (self.revision is not None or self.subfolder):
            raise FoveateError("revision and subfolder belong to load: give vision_revision or text_revision")
        if self.vision is None and (self.vision_revision is not None or self.text_revision is not None):
            raise FoveateError("vision_revision and text_revision belong to vision and text")


@dataclass(frozen=True)
class DataName:
    """A file or shards; with `split`, a data set on the hub."""

    path: str
    split: str | None = None  # makes `path` the hub id of a data set, of which this part is read
    subset: str | None = None  # with `split`: the data set's configuration
    revision: str | None = None  # with `split`: branch, tag or commit on the hub

    def __post_init__(self) -> None:
        if self.split is None and (self.subset is not None or self.revision is not None):
            raise FoveateError("subset and revision belong to split: name the part of the data set")


@dataclass(frozen=True)
class DataFile(DataName):
    """Conversations: LLaVA JSON or messages, as a JSON list, as JSONL, in shards, or on the hub."""

    images: str | None = None  # folder that picture paths start from; by default the file's own
    limit: int | None = None  # use only this number of samples, from the first; with `split`, read only these
    prompts: bool = True  # false: leave out the user's text beside a picture, as in LLaVA's pretraining
    repeat: float = 1.0  # how often an epoch sees each sample; 0.5: a random half
    regions: str | None = None  # file with the regions of its questions, for methods that learn them

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit is not None and self.limit < 1:
            raise FoveateError(f"limit must be at least 1, not {self.limit}")
        if not 0 < self.repeat <= MOST:
            raise FoveateError(f"repeat must be more than 0 and at most {MOST}, not {self.repeat}")


@dataclass(frozen=True)
class EvalData(DataName):
    """Questions with answers, as `foveate eval` reads them, that a stage's model is asked while it trains."""

    images: str | None = None  # folder that picture paths start from; by default the file's own
    limit: int | None = 200  # ask only this number of questions, from the first; null: all
    metrics: list[str] = field(default_factory=list)  # by default those that fit the answers
    steps: int | None = None  # steps between scores; null: at the end of the stage alone
    batch: int = 8  # questions at once
    max_new_tokens: int = 32  # bound on an answer
    shown: int = 3  # answers that are shown with each score

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("limit", "steps", "batch", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise FoveateError(f"{name} must be at least 1, not {value}")
        if self.shown < 0:
            raise FoveateError(f"shown must not be negative, but is {self.shown}")


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on linear layers, by default merged into the weights when the stage ends."""

    on: list[str]  # modules whose linear layers get adapters
    rank: int = 128
    alpha: float = 256.0
    dropout: float = 0.05
    save: Literal["adapter"] | None = None  # only what trained, for peft; null: merged into a whole model

    def __post_init__(self) -> None:
        if not self.on:
            raise FoveateError("'on' names no module: list those whose linear layers get adapters")
        if self.rank < 1:
            raise FoveateError(f"rank must be at least 1, not {self.rank}")
        if self.alpha <= 0:
            raise FoveateError(f"alpha must be more than 0, not {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise FoveateError(f"dropout must be at least 0 and below 1, not {self.dropout}")


@dataclass(frozen=True)
class Stage:
    """One training run; the next stage starts from its result.

    Modules are named as in the model: `connector`, `vision_tower`, `language_model`, `language_model.lm_head`
    and so on. A name stands for everything below it, and `*` for anything.
    """

    trains: list[str]  # modules that train; all others are frozen
    data: list[DataFile]
    lr: float  # peak learning rate
    freezes: list[str] = field(default_factory=list)  # modules within `trains` that stay frozen
    lrs: dict[str, float] = field(default_factory=dict)  # modules with their own learning rate
    lora: Lora | None = None
    eval_data: EvalData | None = None  # questions that the model is asked while it trains
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # after the warm-up
    warmup_ratio: float = 0.03  # fraction of the steps in which the learning rate rises to its peak
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # gradients are clipped to this norm; 0: no clipping
    epochs: float = 1.0  # passes over the data
    steps: int | None = None  # optimizer steps, instead of epochs
    batch: int = 128  # samples per optimizer step, over all devices
    micro_batch: int = 8  # samples at a time on one device
    max_length: int = 2048  # text and visual tokens of a sample; longer samples are left out
    missing_pictures: Literal["refuse", "leave_out"] = "refuse"  # what happens to samples without theirs
    group_by: Literal["modality", "none"] = "modality"  # batches alike in pictures or none, and in length
    bf16: bool = True  # compute in bfloat16 (autocast)
    checkpoint_activations: bool = False  # less memory, a third more compute
    template: str | None = None  # chat template of this stage, instead of the model's
    options: dict[str, Any] = field(default_factory=dict)  # the method's options, changed in this stage
    save_steps: int = 500  # steps between checkpoints
    log_steps: int = 10
    workers: int = 4  # processes that read pictures, per device

    def __post_init__(self) -> None:
        if not self.trains and self.lora is None:
            raise FoveateError("'trains' is empty: name at least one module, for example connector")
        if not self.data:
            raise FoveateError("'data' is empty: name at least one file")
        for name in ("lr", "epochs", "batch", "micro_batch", "max_length", "save_steps", "log_steps"):
            if getattr(self, name) <= 0:
                raise FoveateError(f"{name} must be more than 0, not {getattr(self, name)}")
        if self.epochs > MOST:
            raise FoveateError(f"epochs must be at most {MOST}, not {self.epochs}")
        for name in ("weight_decay", "max_grad_norm", "workers"):
            if getattr(self, name) < 0:
                raise FoveateError(f"{name} must not be negative, but is {getattr(self, name)}")
        if self.steps is not None and self.steps < 1:
            raise FoveateError(f"steps must be at least 1, not {self.steps}")
        if not 0 <= self.warmup_ratio < 1:
            raise FoveateError(f"warmup_ratio must be at least 0 and below 1, not {self.warmup_ratio}")
        for name, rate in self.lrs.items():
            if rate <= 0:
                raise FoveateError(
                    f"lrs: {name} must be more than 0, not {rate}; freezes leaves a module out"
                )
        if self.batch % self.micro_batch:
            raise FoveateError(f"batch {self.batch} is not a multiple of micro_batch {self.micro_batch}")


@dataclass(frozen=True)
class Recipe:
    """What a recipe file says."""

    output: str  # folder of the run; the trained model is its subfolder `model`
    model: ModelSpec
    stages: dict[str, Stage]  # by name, in order
    seed: int = 42
    mixture: str | None = None  # the data of the paper, for `foveate data check`: a YAML file, or its name

    def __post_init__(self) -> None:
        if not self.output:
            raise FoveateError("output is empty: name the folder of the run")
        if not self.output.isprintable():
            raise FoveateError(f"output {self.output!a:.200} is not the name of a folder")
        if not 0 <= self.seed < 2**32:
            raise FoveateError(f"seed must be at least 0 and below 2^32, not {self.seed}")
        if not self.stages:
            raise FoveateError("'stages' is empty: a recipe needs at least one stage")
        for name, stage in self.stages.items():
            if stage.lora is not None and stage.lora.save is not None:
                if name != list(self.stages)[-1]:
                    raise FoveateError(f"stages.{name}.lora.save: only the last stage may save an adapter")
                if len(self.stages) == 1 and self.model.load is None:
                    raise FoveateError(
                        f"stages.{name}.lora.save: an adapter belongs to a model that is saved: write it "
                        "with foveate compose, and name its folder in model.load"
                    )
                if self.model.subfolder:
                    raise FoveateError(
                        f"stages.{name}.lora.save: peft finds no base in a subfolder: give model.load the "
                        "folder itself"
                    )
            if not name.replace("-", "").replace("_", "").isalnum():
                raise FoveateError(f"stage {name!r}: use only letters, digits, - and _ in a stage's name")


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a YAML file, or by name one of Foveate's recipes, and applies changes such as `output=runs/mine`.

    Raises `FoveateError` for unreadable files, unknown keys, missing ones and wrong values.
    """
    path = find("recipe", recipe)
    values = read_yaml(path, "output, model, stages")
    for override in overrides:
        _override(values, override)
    built = build_options(Recipe, values, where=str(path))
    if built.mixture is not None:
        find("mixture", built.mixture)
    return built


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """A recipe with all its defaults, as plain values for YAML or JSON."""
    return dataclasses.asdict(recipe)


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The first setting that affects the result and differs between two recipes of `to_dict`; else None."""
    old_values, new_values = dict(_leaves(old)), dict(_leaves(new))
    for key in [*old_values, *new_values]:
        if key.rpartition(".")[2] in WITHOUT_EFFECT or key == "output" or "eval_data" in key.split("."):
            continue
        if old_values.get(key) != new_values.get(key):  # a key that is new and null changes nothing
            return f"{key} was {old_values.get(key)} and is now {new_values.get(key)}"
    return None


def _leaves(value: Any, key: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        pairs = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, (list, tuple)) and value:
        pairs = [(str(i), v) for i, v in enumerate(value)]
    else:
        return [(key, value)]
    return [leaf for k, v in pairs for leaf in _leaves(v, f"{key}.{k}" if key else k)]


def _override(values: dict[str, Any], override: str) -> None:
    """Sets one value in place. The dataclasses check new keys."""
    dotted, value = read_pair(override, override)
    *path, last = dotted.split(".")
    place: Any = values
    for i, key in enumerate(path):
        place = _step(place, key, ".".join(path[:i]), override, may_add=path[:i] != ["stages"])
    if isinstance(place, list):
        _step(place, last, ".".join(path), override, may_add=False)
        place[int(last)] = value
    else:
        place[last] = value


def _step(place: Any, key: str, parent: str, override: str, may_add: bool) -> Any:
    if isinstance(place, list):
        if not key.isdecimal() or int(key) >= len(place):
            raise FoveateError(f"{override}: {parent} has {len(place)} entries, 0 to {len(place) - 1}")
        inner = place[int(key)]
    elif key in place:
        empty = isinstance(place[key], Plain) and place[key] in NULLS
        inner = place[key] = {} if empty else place[key]
    elif may_add:
        inner = place[key] = {}
    else:
        near = difflib.get_close_matches(key, map(str, place), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(map(str, place))}"
        raise FoveateError(f"{override}: unknown key {key!r} in {parent}; {hint}")
    if not isinstance(inner, (dict, list)):
        raise FoveateError(f"{override}: {parent + '.' if parent else ''}{key} has no keys of its own")
    return inner
