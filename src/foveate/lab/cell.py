"""One cell of an experiment: one method, one seed, one level; and what all cells of a level share."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from foveate.errors import FoveateError
from foveate.lab.controls import controls
from foveate.lab.curve import POINTS, Converge
from foveate.lab.data import CPU, Examples, Tell, examples, silent
from foveate.lab.experiment import Experiment, StageSpec, Variant
from foveate.lab.levels import Level, level_named
from foveate.lab.materials import Split
from foveate.lab.packing import Sample, encode
from foveate.lab.parts import Parts
from foveate.lab.questions import chance, in_scene_guess
from foveate.lab.scales import Scale, scale_named
from foveate.methods import method_class
from foveate.options import checked, merged

LATER = ("method", "regions")  # added to stages later: names ignore them when unset


@dataclass(frozen=True)
class Cell:
    """What identifies a result.

    Attributes:
        method: a registered name.
        seed: of the connector's weights and of the order of the data.
        level, scale: names.
        steps: of training.
        options: the method's options, on top of its `options_for` the level's ratio.
        stages: of training, instead of the lab's.
        label: its name in reports; by default the method's title and options.
        told: whether the method is given the region that a question is about; an upper bound.
        batch: pictures a step; None: the scale's.
        converge: stops training early.
        points: how often it is measured on the way; names ignore them, as they change no weight unless it
            trains until it converges.
        grid: places a side to which taught boxes are rounded outwards; None: exact.
    """

    method: str
    seed: int
    level: str
    scale: str
    steps: int
    options: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[StageSpec, ...] = ()
    label: str | None = None
    told: bool = False
    batch: int | None = None
    converge: Converge | None = None
    points: int = POINTS
    grid: int | None = None

    @classmethod
    def of(cls, experiment: Experiment, variant: Variant, seed: int) -> Cell:
        """The cell of a row of an experiment. Raises `FoveateError` for a wrong method or option."""
        e, v = experiment, variant
        options = _typed(v.method, v.options)
        stages = tuple(replace(s, options=_typed(s.method or v.method, s.options)) for s in v.stages)
        return cls(
            v.method,
            seed,
            e.level,
            e.scale,
            e.training,
            options,
            stages,
            v.label,
            v.told,
            e.batch,
            e.converge,
            e.points,
            v.grid,
        )

    @property
    def record(self) -> dict[str, Any]:
        """As results name it: without what came later and is not set."""
        made = asdict(self) | {"options": dict(self.options)}
        return {key: value for key, value in made.items() if key != "grid" or value is not None}

    @property
    def key(self) -> str:
        """Name of the cell's folder."""
        name = f"{self.method}-{self.level}-{self.steps}-seed{self.seed}"
        if self.batch:
            name += f"-batch{self.batch}"
        stages = [{k: v for k, v in asdict(stage).items() if v or k not in LATER} for stage in self.stages]
        if self.grid:
            name += f"-grid{self.grid}"
        if self.told:
            name += "-told"
        until = [] if self.converge is None else [{**asdict(self.converge), "points": self.points}]
        if not self.options and not stages and not until:
            return name
        several = [self.options, stages, *until]
        described = json.dumps(several if stages or until else self.options, sort_keys=True)
        return f"{name}-{blake2b(described.encode(), digest_size=3).hexdigest()}"

    @property
    def command(self) -> str:
        """The command that makes this cell again, if it is not `told`, without grid and stages of its own."""
        words = ["foveate", "lab", "run", "--methods", self.method, "--seeds", str(self.seed)]
        words += ["--level", self.level, "--scale", self.scale, "--steps", str(self.steps)]
        if self.batch:
            words += ["--batch", str(self.batch)]
        return shlex.join([*words, *self.option_words])

    @property
    def option_words(self) -> list[str]:
        """Its options on the command line."""
        pairs = [f"{self.method}.{key}={json.dumps(value)}" for key, value in self.options.items()]
        return [word for pair in pairs for word in ("--option", pair)]


def _typed(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a method or control, converted to their types."""
    with controls():
        kind = method_class(method)
    options = merged(kind.Options, {}, given)
    checked(kind.Options, options, where=f"options of method {kind.title}")
    return options


@dataclass(frozen=True)
class Bench:
    """The parts that all cells of a level and scale share.

    Attributes:
        folder: where data, features and results are kept.
        scale: the sizes.
        parts: tower, LLM and tokenizer that every method starts from.
        train, test: the pictures and questions.
        tell: is told how far drawing and encoding are.
        device: where methods train. Pictures and features stay in main memory.
        bf16: whether linear layers of what trains multiply in bfloat16; what is measured does not.
    """

    folder: Path
    scale: Scale
    parts: Parts
    train: Examples
    test: Examples
    tell: Tell = silent
    device: torch.device = CPU
    bf16: bool = False

    def cells(self, scale: str) -> Path:
        """The folder of results."""
        return cells_of(self.folder, scale, self.parts)

    @cached_property
    def samples(self) -> dict[tuple[str, str], Sample]:
        """Every different question with its answer, as token ids."""
        asked = [*self.train.asked, *self.test.asked, *(said for row in self.train.captions for said in row)]
        return {(q.text, q.answer): encode(q, self.parts.tokenizer) for q in asked}

    @cached_property
    def guesses(self) -> dict[str, dict[str, float]]:
        """Per kind of question, the baselines to compare accuracy with."""
        return {"chance": chance(self.test.asked), "in-scene guess": in_scene_guess(self.test.asked)}


def cells_of(folder: Path, scale: str, parts: Parts) -> Path:
    """The folder of results; it depends on the parts."""
    return folder / "cells" / "-".join([scale, parts.tower_key, parts.reader_key, parts.convnet_key])


def make_bench(
    level: str, scale: str, folder: Path, parts: Parts, tell: Tell = silent, device: torch.device = CPU
) -> Bench:
    """Raises `FoveateError` for unknown names, or if the disk is full."""
    return bench_of(level_named(level), scale_named(scale), folder, parts, tell, device)


def bench_of(
    level: Level, sizes: Scale, folder: Path, parts: Parts, tell: Tell = silent, device: torch.device = CPU
) -> Bench:
    """Draws what is missing. Raises `FoveateError` if the disk is full."""
    train, test = (
        examples(folder, level, sizes.view, sizes.magnify, split, count, tell=tell)
        for split, count in sets(sizes)
    )
    return Bench(folder, sizes, parts, train, test, tell, device)


def sets(sizes: Scale) -> list[tuple[Split, int]]:
    """The sets of pictures of a scale, and how many each has."""
    return [("train", sizes.scenes), ("test", sizes.test_scenes)]


def check_methods(names: Sequence[str]) -> None:
    """Raises `FoveateError` for names that are neither methods nor controls."""
    if not names:
        raise FoveateError("name at least one method, for example --methods llava")
    for name in names:
        method_class(name)
