"""An experiment as a file: the cells to train, the level and the seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveate.errors import FoveateError
from foveate.lab.curve import POINTS, Converge
from foveate.lab.levels import level_named
from foveate.lab.scales import scale_named
from foveate.options import build_options
from foveate.shipped import find
from foveate.written import read_yaml

FINEST_GRID = 1000  # places a side: boxes are said in thousandths


@dataclass(frozen=True)
class StageSpec:
    """A part of a cell's training, with its own options and modules to train.

    Attributes:
        part: fraction of the cell's steps.
        trains: dotted names of modules that train: `connector`, `connector.adapter`, `language_model`.
        captions: whether captions are also learnt.
        regions: whether the boxes of the objects in questions are also learnt: what the row's method, without
            options, teaches in the first turn of its conversations.
        options: the method's options, changed in this stage.
        method: replaces the row's own in this stage, with these options; its trained weights are passed on as
            far as both have them. So a method starts from a trained LLaVA.
    """

    part: float
    trains: tuple[str, ...]
    captions: bool = False
    regions: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    method: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.part <= 1:
            raise FoveateError(f"part must be above 0 and at most 1, not {self.part}")
        if not self.trains:
            raise FoveateError("trains is empty: name at least one module, for example connector")


@dataclass(frozen=True)
class Variant:
    """One row of the report.

    Attributes:
        method: a method or a control.
        label: name of the row; by default the method's title and its options.
        options: on top of the method's own for the level.
        stages: instead of the lab's: the connector with captions, then connector and LLM.
        told: whether it is given the region that a question is about: an upper bound, for methods that look
            again at the original picture, or ask where to look.
        grid: taught boxes are rounded outwards to so many places a side, for methods that ask where to look;
            None: they are exact. Digits that one view is too coarse for are noise to learn from.
    """

    method: str
    label: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    stages: tuple[StageSpec, ...] = ()
    told: bool = False
    grid: int | None = None

    def __post_init__(self) -> None:
        if self.grid is not None and not 2 <= self.grid <= FINEST_GRID:
            raise FoveateError(f"grid must be from 2 to {FINEST_GRID}, not {self.grid}")
        if self.stages and abs(sum(stage.part for stage in self.stages) - 1) > 1e-6:
            raise FoveateError("the parts of stages must add up to 1")


@dataclass(frozen=True)
class Experiment:
    """Variants times seeds.

    Attributes:
        variants: the rows.
        level, scale: names.
        seeds: for connectors and the order of the data.
        steps: of training; None: the scale's.
        batch: pictures a step, with all their questions; None: the scale's.
        converge: stops a cell that has stopped learning: `steps` is then the bound.
        points: how often a cell is measured on the way.
    """

    variants: tuple[Variant, ...]
    level: str = "easy"
    scale: str = "tiny"
    seeds: tuple[int, ...] = (0,)
    steps: int | None = None
    batch: int | None = None
    converge: Converge | None = None
    points: int = POINTS

    def __post_init__(self) -> None:
        scenes = scale_named(self.scale).scenes
        level_named(self.level)
        if self.steps is not None and self.steps < 1:
            raise FoveateError(f"steps must be at least 1, not {self.steps}")
        if self.batch is not None and not 1 <= self.batch <= scenes:
            raise FoveateError(f"batch must be from 1 to {scenes}, the scale's pictures, not {self.batch}")
        if self.points < 1:
            raise FoveateError(f"points must be at least 1, not {self.points}")
        bound = self.steps or scale_named(self.scale).cell.steps
        if self.converge is not None and self.converge.least > bound:
            raise FoveateError(
                f"converge: least must be at most {bound}, the steps, not {self.converge.least}"
            )
        if not self.seeds:
            raise FoveateError("name at least one seed, for example --seeds 0")
        if not all(0 <= seed < 2**32 for seed in self.seeds):
            wrong = next(seed for seed in self.seeds if not 0 <= seed < 2**32)
            raise FoveateError(f"seeds must be at least 0 and below 2^32, not {wrong}")
        if not self.variants:
            raise FoveateError("name at least one method, for example --methods llava")

    @property
    def training(self) -> int:
        """Steps of every cell."""
        return self.steps or scale_named(self.scale).cell.steps


def read_experiment(experiment: str | Path) -> Experiment:
    """Reads a YAML file, or by name one of Foveate's experiments.

    Raises `FoveateError` for unreadable files, unknown keys and wrong values.
    """
    path = find("experiment", experiment)
    return build_options(Experiment, read_yaml(path, "variants, level, seeds"), where=str(path))


def only(experiment: Experiment, rows: Sequence[str]) -> tuple[Variant, ...]:
    """The variants of these labels or method names. Raises `FoveateError`."""
    known = {variant.label or variant.method: variant for variant in experiment.variants}
    if unknown := set(rows) - set(known):
        raise FoveateError(f"unknown rows {', '.join(sorted(unknown))}: there are {', '.join(known)}")
    return tuple(variant for row, variant in known.items() if row in rows)
