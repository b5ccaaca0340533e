"""One cell of an experiment: one method, trained from one seed on one level, and measured."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import set_seed

from foveate.composing import compose
from foveate.cost import Pricer
from foveate.errors import FoveateError
from foveate.geometry import Box, Size, ViewPlan
from foveate.lab.controls import ConvNetOnly, GivenRegion
from foveate.lab.data import Examples, Features, examples
from foveate.lab.experiment import StageSpec
from foveate.lab.levels import FINE, level_named
from foveate.lab.optimise import optimiser, warm_cosine
from foveate.lab.packing import PADDING, Packed, Sample, all_right, encode, pack
from foveate.lab.parts import Parts
from foveate.lab.questions import Question, chance, in_scene_guess
from foveate.lab.scales import Scale, scale_named
from foveate.methods import method_class
from foveate.methods.base import Method
from foveate.modeling import EncodedPictures
from foveate.source import Look, Source

SAVE_EVERY = 100  # steps between checkpoints of a cell
OWN_TOWER_LR = 0.25  # of the connector's: towers that a method builds itself are trained with it
WARM_UP_LR = 2.0  # of the connector's, while it trains alone


@dataclass(frozen=True)
class Cell:
    """What identifies a result.

    Attributes:
        method: a registered name.
        seed: of the connector's weights and of the order of the data.
        level, scale: names.
        steps: of training; None: those of the scale.
        options: the method's options beyond its `options_for` the level's ratio.
        stages: of training, instead of the lab's.
        label: how a report calls it; by default by the method's title and its options.
    """

    method: str
    seed: int
    level: str
    scale: str
    steps: int
    options: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[StageSpec, ...] = ()
    label: str | None = None

    @property
    def key(self) -> str:
        """Name of the cell's folder."""
        name = f"{self.method}-{self.level}-{self.steps}-seed{self.seed}"
        stages = [asdict(stage) for stage in self.stages]
        if not self.options and not stages:
            return name
        described = json.dumps([self.options, stages] if stages else self.options, sort_keys=True)
        return f"{name}-{blake2b(described.encode(), digest_size=3).hexdigest()}"

    @property
    def command(self) -> str:
        """The command that makes this cell again, where it has no stages of its own."""
        words = ["foveate", "lab", "run", "--methods", self.method, "--seeds", str(self.seed)]
        words += ["--level", self.level, "--scale", self.scale, "--steps", str(self.steps)]
        for key, value in self.options.items():
            words += ["--option", f"{self.method}.{key}={json.dumps(value)}"]
        return shlex.join(words)


@dataclass(frozen=True)
class Bench:
    """What all cells of a level and scale share.

    Attributes:
        folder: where data, features and results lie.
        scale: the sizes.
        parts: tower, LLM and tokenizer that every method starts from.
        train, test: the pictures and questions.
    """

    folder: Path
    scale: Scale
    parts: Parts
    train: Examples
    test: Examples

    def cells(self, scale: str) -> Path:
        """The folder of results; other parts have another one."""
        parts = self.parts
        return self.folder / "cells" / "-".join([scale, parts.tower_key, parts.reader_key, parts.convnet_key])

    @cached_property
    def samples(self) -> dict[tuple[str, str], Sample]:
        """Every different question with its answer, as token ids."""
        asked = [*self.train.asked, *self.test.asked, *(said for row in self.train.captions for said in row)]
        return {(q.text, q.answer): encode(q, self.parts.tokenizer) for q in asked}

    @cached_property
    def guesses(self) -> dict[str, dict[str, float]]:
        """Per kind of question, the lines that accuracy is to be seen against."""
        return {"chance": chance(self.test.asked), "in-scene guess": in_scene_guess(self.test.asked)}


def make_bench(level: str, scale: str, folder: Path, parts: Parts) -> Bench:
    """Raises `FoveateError` for unknown names, and where the disk is full."""
    sizes, hard = scale_named(scale), level_named(level)
    train = examples(folder, hard, sizes.view, sizes.magnify, "train", sizes.scenes)
    test = examples(folder, hard, sizes.view, sizes.magnify, "test", sizes.test_scenes)
    return Bench(folder, sizes, parts, train, test)


class Stage(NamedTuple):
    """Steps on questions, with captions or without, in which some modules train.

    `lr` is that of new modules; a tower that a method builds and the LLM have their own. `options` change the
    method's.
    """

    steps: int
    trains: tuple[str, ...]
    captions: bool
    lr: float
    options: Mapping[str, Any]


class Row(NamedTuple):
    """Questions about one picture that share their visual tokens, and the region that they are all about."""

    picture: int
    region: Box | None
    asked: list[Question]


class Pass(NamedTuple):
    """Loss; logits (B, T, vocabulary); what was packed; per row where a method chose to look, if it did."""

    loss: Tensor
    logits: Tensor
    packed: Packed
    regions: list[list[Box]] | None


class Student:
    """A method's model and what feeds it."""

    def __init__(self, cell: Cell, bench: Bench) -> None:
        self.cell, self.bench = cell, bench
        kind = method_class(cell.method)
        options = kind.options_for(level_named(cell.level).ratio)
        if bench.parts.convnet is not None:
            options |= kind.options_with(bench.parts.convnet)
        options |= cell.options
        # A tower that a method builds is trained with it; of the ConvNet alone, it is prepared and frozen.
        self.builds_tower = kind.build_tower is not Method.build_tower and kind is not ConvNetOnly
        set_seed(cell.seed)
        made = compose(
            bench.parts.tower,
            bench.parts.reader,
            cell.method,
            options,
            tokenizer=bench.parts.tokenizer,
            template="plain",
            vision_feature_layer=-1,
        )
        self.model, self.processor = made.model, made.processor
        self.method = self.model.method
        self.model.requires_grad_(True)
        self.model.vision_tower.requires_grad_(self.builds_tower)
        self.features = {data.key: self._features(data) for data in (bench.train, bench.test)}
        self.memories: dict[str, dict[int, dict[Look, Tensor]]] = {data: {} for data in self.features}
        size = bench.train.size
        self.plan = self.method.plan(*size)

    def _features(self, data: Examples) -> Features:
        parts = self.bench.parts
        tower = parts.convnet_key if isinstance(self.method, ConvNetOnly) else parts.tower_key
        return Features(self.bench.folder, data, tower, self._encode_frozen, self._views)

    def _views(self, picture: np.ndarray, plan: ViewPlan) -> np.ndarray:
        return self.processor.image_processor.views(Image.fromarray(picture), plan)

    @torch.no_grad()
    def _encode_frozen(self, views: np.ndarray) -> Tensor:
        return self.model.encode_views(torch.from_numpy(views))

    def ready(self) -> str | None:
        """Caches the views' features where they are frozen; a sentence where there is no room for them."""
        if self.builds_tower:
            return None
        for features in self.features.values():
            features.ready(self.plan)
        return next((f.fallback for f in self.features.values() if f.fallback), None)

    def rows(self, data: Examples, indices: Sequence[int], captions: bool = False) -> list[Row]:
        """Questions about these pictures; those that share their visual tokens share a row."""
        rows: list[Row] = []
        for i in indices:
            asked = [*data.questions[i], *(data.captions[i] if captions else [])]
            if self.method.uses_query:
                rows += [Row(i, None, [question]) for question in asked]
            elif isinstance(self.method, GivenRegion):
                regions = dict.fromkeys(question.region for question in asked)
                rows += [Row(i, region, [q for q in asked if q.region == region]) for region in regions]
            else:
                rows.append(Row(i, None, asked))
        return rows

    def forward(self, data: Examples, rows: Sequence[Row]) -> Pass:
        """All questions of these rows at once."""
        samples = [[self.bench.samples[q.text, q.answer] for q in row.asked] for row in rows]
        encoded = self._connect(data, rows, samples)
        placeholder, padding = self.model.config.image_token_id, self.bench.parts.tokenizer.pad_token_id
        packed = pack(samples, self.plan.tokens, placeholder, padding)
        inputs = packed.inputs()
        if encoded.kept is not None:
            mask = packed.blocks != PADDING
            mask[:, : self.plan.tokens] = torch.stack(encoded.kept)
            places = mask.long().cumsum(1) - 1  # as if the dropped tokens were not there
            inputs |= {"attention_mask": mask, "position_ids": places.clamp(min=0)}
        output = self.model(
            **inputs, labels=packed.labels, mm_encoder_outputs={"image": encoded}, use_cache=False
        )
        return Pass(output.loss, output.logits, packed, encoded.regions)

    def _connect(
        self, data: Examples, rows: Sequence[Row], samples: Sequence[Sequence[Sample]]
    ) -> EncodedPictures:
        """Visual tokens of every row's picture."""
        sizes = torch.tensor([data.size] * len(rows))
        if isinstance(self.method, GivenRegion):
            return self.model.connect(self._seen_in_regions(data, rows, self.method), sizes)
        features = self._seen(data, [row.picture for row in rows])
        if not self.method.uses_query:
            return self.model.connect(features, sizes)
        asked = [torch.tensor(row[0].ids[: row[0].answer]) for row in samples]  # one question a row
        ids = nn.utils.rnn.pad_sequence(asked, batch_first=True)
        lengths = torch.tensor([[len(text)] for text in asked])
        mask = (torch.arange(ids.shape[1]) < lengths).long()
        source = self._source(data, rows) if self.method.reads_source else None
        return self.model.connect(features, sizes, ids, mask, source)

    def _source(self, data: Examples, rows: Sequence[Row]) -> Source:
        """The pictures themselves; what a frozen tower has seen of them once is kept."""
        memory = self.memories[data.key]
        return Source(
            [torch.from_numpy(np.array(data.pictures[row.picture])) for row in rows],
            torch.from_numpy(np.stack([self.processor.image_processor.norms] * len(rows))),
            torch.no_grad()(self.model.encode_views),
            [memory.setdefault(row.picture, {}) for row in rows],
        )

    def _seen_in_regions(self, data: Examples, rows: Sequence[Row], method: GivenRegion) -> Tensor:
        """Features (B V, N, C): cached ones where there is no region, of the region's own views elsewhere."""
        told = [n for n, row in enumerate(rows) if row.region is not None]
        untold = [n for n, row in enumerate(rows) if row.region is None]
        width = self.model.config.vision_config.hidden_size
        features = torch.empty(len(rows), len(self.plan.views), method.tower.tokens, width)
        if untold:
            features[untold] = self._seen(data, [rows[n].picture for n in untold]).view_as(features[untold])
        if told:
            plans = [method.plan_for(*data.size, rows[n].region) for n in told]
            pixels = [
                self._views(data.pictures[rows[n].picture], plan) for n, plan in zip(told, plans, strict=True)
            ]
            features[told] = self._encode_frozen(np.concatenate(pixels)).view_as(features[told])
        return features.flatten(0, 1)

    def _seen(self, data: Examples, indices: Sequence[int]) -> Tensor:
        """Features of the plan's views, (B V, N, C)."""
        if not self.builds_tower:
            return self.features[data.key].gather(self.plan, indices)
        pixels = np.concatenate([self._views(data.pictures[i], self.plan) for i in indices])
        return self.model.encode_views(torch.from_numpy(pixels))

    def stages(self) -> list[Stage]:
        """The cell's own; or first the connector alone, with captions, then the LLM with it."""
        scale, steps = self.bench.scale, self.cell.steps
        own = ("vision_tower",) if self.builds_tower else ()
        specs = self.cell.stages or (
            StageSpec(scale.warm_up, ("connector", *own), captions=True),
            StageSpec(1 - scale.warm_up, ("connector", *own, "language_model")),
        )
        ends = [round(sum(spec.part for spec in specs[: i + 1]) * steps) for i in range(len(specs))]
        stages = [
            Stage(
                end - begin,
                spec.trains,
                spec.captions,
                scale.cell.lr * (1.0 if "language_model" in spec.trains else WARM_UP_LR),
                spec.options,
            )
            for spec, begin, end in zip(specs, [0, *ends], ends, strict=False)
        ]
        return [stage for stage in stages if stage.steps]

    def optimiser(self, stage: Stage) -> torch.optim.AdamW:
        """Makes the stage's modules train, and no others."""
        self.model.requires_grad_(False)
        rates = {
            "vision_tower": OWN_TOWER_LR * stage.lr,
            "language_model": self.bench.scale.cell_llm_lr,
        }
        groups: list[tuple[nn.Module, float]] = []
        for name in stage.trains:
            try:
                module = self.model.get_submodule(name)
            except AttributeError as error:
                raise FoveateError(f"stages: {self.method.title} has no module {name!r}") from error
            groups.append((module.requires_grad_(True), rates.get(name.partition(".")[0], stage.lr)))
        return optimiser(groups)

    def under(self, stage: Stage) -> Student:
        """A student with this one's weights and the stage's options; itself where there are none."""
        if not stage.options:
            return self
        cell = replace(self.cell, options={**self.cell.options, **stage.options})
        other = Student(cell, self.bench)
        other.take(self)
        return other

    def take(self, other: Student) -> None:
        """The weights of another student that were trained, where both have them."""
        self.model.load_state_dict(other.trained(), strict=False)
        self.ready()

    def trained(self) -> dict[str, Tensor]:
        """The weights that training changes."""
        frozen = "" if self.builds_tower else "vision_tower."
        state = self.model.state_dict()
        return {key: tensor for key, tensor in state.items() if not frozen or not key.startswith(frozen)}


def batches(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of indices: every picture once an epoch, in an order that the seed decides."""
    epoch = 0
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(count)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size].tolist()
        epoch += 1


Report = Callable[[int, int, float], None]  # step, steps, loss


def train_cell(
    cell: Cell, bench: Bench, report: Report | None = None, command: str | None = None
) -> dict[str, Any]:
    """Trains and measures a cell, or reads its result if it is there. An interrupted cell goes on.

    `command` makes the cell again; by default `cell.command`.

    Returns what `result.json` in the cell's folder holds.
    """
    place = bench.cells(cell.scale) / cell.key
    result_file = place / "result.json"
    if result_file.is_file():
        return json.loads(result_file.read_text(encoding="utf-8"))
    place.mkdir(parents=True, exist_ok=True)
    student = Student(cell, bench)
    start = time.process_time()
    fallback = student.ready()
    caching = time.process_time() - start
    training, losses = _train(student, place / "checkpoint.pt", report)
    start = time.process_time()
    accuracy, found = measure(student, bench.test)
    measuring = time.process_time() - start
    price = Pricer(student.model.config, torch.float32).price(Size(*bench.test.size), text_tokens=8)
    asked = bench.test.asked
    result = {
        "cell": asdict(cell) | {"options": dict(cell.options)},
        "command": command or cell.command,
        "title": student.method.title,
        "accuracy": accuracy,
        "found": found,
        "questions": {kind: sum(q.kind == kind for q in asked) for kind in accuracy if kind not in GROUPS},
        "lines": {name: line | grouped(line, asked) for name, line in bench.guesses.items()},
        "cost": price.to_dict(),
        "tflop": (price.encode_flops + price.prefill_flops) / 1e12,
        "parameters": sum(p.numel() for p in student.model.parameters()),
        "connector_parameters": sum(p.numel() for p in student.model.connector.parameters()),
        "seconds": {"caching": caching, "training": training, "measuring": measuring},
        "losses": losses,
        "features": fallback,
    }
    part = result_file.with_suffix(".part")
    text = json.dumps(result, indent=2) + "\n"
    part.write_text(text, encoding="utf-8")
    torch.save(student.trained(), place / "weights.pt")
    os.replace(part, result_file)
    (place / "checkpoint.pt").unlink(missing_ok=True)
    return json.loads(text)


def _train(student: Student, checkpoint: Path, report: Report | None) -> tuple[float, list[float]]:
    """Trains through all stages. Returns CPU seconds and the mean loss of every `SAVE_EVERY` steps."""
    cell, bench = student.cell, student.bench
    saved = torch.load(checkpoint, weights_only=True) if checkpoint.is_file() else None
    first = saved["step"] if saved else 0
    spent, losses = (saved["seconds"], saved["losses"]) if saved else (0.0, [])
    if saved:
        student.model.load_state_dict(saved["weights"], strict=False)
    order = batches(len(bench.train.pictures), bench.scale.cell.batch, cell.seed)
    for _ in range(first):
        next(order)
    clock, recent, end = time.process_time(), list[float](), 0
    for stage in student.stages():
        begin, end = end, end + stage.steps
        if first >= end:
            continue
        learner = student.under(stage)
        learner.model.train()
        optimise = learner.optimiser(stage)
        rates = warm_cosine(optimise, stage.steps)
        if saved and first > begin:
            optimise.load_state_dict(saved["optimiser"])
            rates.load_state_dict(saved["rates"])
        for step in range(max(first, begin) + 1, end + 1):
            rows = learner.rows(bench.train, next(order), captions=stage.captions)
            loss = learner.forward(bench.train, rows).loss
            optimise.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([p for g in optimise.param_groups for p in g["params"]], 1.0)
            optimise.step()
            rates.step()
            recent.append(loss.item())
            if report:
                report(step, cell.steps, recent[-1])
            if step % SAVE_EVERY == 0:
                losses.append(sum(recent) / len(recent))
                recent.clear()
                _save(checkpoint, learner, optimise, rates, step, losses, spent + time.process_time() - clock)
        if learner is not student:
            student.take(learner)
    return spent + time.process_time() - clock, losses


def _save(
    path: Path,
    student: Student,
    optimise: torch.optim.Optimizer,
    rates: torch.optim.lr_scheduler.LambdaLR,
    step: int,
    losses: list[float],
    seconds: float,
) -> None:
    part = path.with_suffix(".part")
    state = {
        "weights": student.trained(),
        "optimiser": optimise.state_dict(),
        "rates": rates.state_dict(),
        "step": step,
        "losses": losses,
        "seconds": seconds,
    }
    torch.save(state, part)
    os.replace(part, path)


GROUPS = ("fine", "coarse")


@torch.inference_mode()
def measure(student: Student, data: Examples, batch: int = 50) -> tuple[dict[str, float], float | None]:
    """Exact match of greedy answers, per kind of question, and over all fine and all coarse ones.

    And how often, of questions that are about a region, one of the regions that the method chose contains
    it; None where it chooses none.
    """
    student.model.eval()
    hits: dict[str, list[bool]] = {}
    found: list[bool] = []
    for start in range(0, len(data.pictures), batch):
        indices = range(start, min(start + batch, len(data.pictures)))
        rows = student.rows(data, indices)
        seen = student.forward(data, rows)
        right = [hit for row in all_right(seen.logits, seen.packed) for hit in row]
        asked = [question for row in rows for question in row.asked]
        for question, hit in zip(asked, right, strict=True):
            hits.setdefault(question.kind, []).append(hit)
        for row, regions in zip(rows, seen.regions or [], strict=False):
            targets = [question.region for question in row.asked if question.region is not None]
            found += [any(region.contains(target) for region in regions) for target in targets]
    by_kind = {kind: float(np.mean(right)) for kind, right in hits.items()}
    return by_kind | grouped(by_kind, data.asked), float(np.mean(found)) if found else None


def grouped(by_kind: Mapping[str, float], asked: Sequence[Question]) -> dict[str, float]:
    """Accuracy over all fine questions, and over all coarse ones but `where`, which is told apart."""
    counts = {kind: sum(question.kind == kind for question in asked) for kind in by_kind}
    groups = {
        "fine": [k for k in by_kind if k in FINE],
        "coarse": [k for k in by_kind if k in ("attr", "count")],
    }
    return {
        name: sum(by_kind[k] * counts[k] for k in kinds) / sum(counts[k] for k in kinds)
        for name, kinds in groups.items()
        if kinds
    }


def check_methods(names: Sequence[str]) -> None:
    """Raises `FoveateError` for names that are neither methods nor controls."""
    if not names:
        raise FoveateError("name at least one method, for example --methods llava")
    for name in names:
        method_class(name)
