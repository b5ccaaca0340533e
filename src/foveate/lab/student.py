"""A method's model in the lab, and its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import set_seed

from foveate.composing import compose
from foveate.errors import FoveateError
from foveate.lab.cell import Bench, Cell
from foveate.lab.controls import ConvNetOnly, GivenRegion
from foveate.lab.data import Examples, Features
from foveate.lab.experiment import StageSpec
from foveate.lab.kernels import multiply_in_bfloat16
from foveate.lab.levels import level_named
from foveate.lab.optimise import optimiser
from foveate.lab.packing import Sample, pack, portions
from foveate.lab.questions import Question
from foveate.lab.reading import Answers, Change, Seen, read, seen
from foveate.lab.told import told_windows
from foveate.methods import method_class
from foveate.methods.base import Method
from foveate.model.modeling import EncodedPictures
from foveate.picture.geometry import Box, Size, ViewPlan
from foveate.picture.source import Look, Source

OWN_TOWER_LR = 0.25  # of the connector's, factor for towers that a method builds itself
SHORT = 64  # tokens of text that share a row, if there are fewer visual ones
WARM_UP_LR = 2.0  # of the connector's, factor while the LLM is frozen


class Stage(NamedTuple):
    """Training steps of some modules on questions, with or without captions and regions.

    `lr` applies to new modules, and to parts of a tower that are named separately; a whole tower and the LLM
    have their own. `options` change the method's; `method` replaces it.
    """

    steps: int
    trains: tuple[str, ...]
    captions: bool
    regions: bool
    lr: float
    options: Mapping[str, Any]
    method: str | None


class Row(NamedTuple):
    """Questions about one picture that share their visual tokens, and the region of all of them."""

    picture: int
    region: Box | None
    asked: list[Question]


class Pass(NamedTuple):
    """What the LLM answers; per row the visual tokens that it reads and where the method looked, if it
    chooses."""

    answers: Answers
    tokens: list[int]
    regions: list[list[Box] | None] | None

    @property
    def loss(self) -> Tensor:
        return self.answers.loss


class Graded(NamedTuple):
    """A question, whether it was answered exactly, the visual tokens that the LLM read, and where the method
    looked, if it chooses."""

    question: Question
    right: bool
    tokens: int
    regions: list[Box] | None


class KeptSource(Source):
    """Takes parts of pictures from where they are kept.

    `kept`: parts, with the number of their picture -> features (L, N, C); None: they are encoded.
    """

    def __init__(
        self,
        pictures: Sequence[Tensor],
        norms: Tensor,
        encode: Callable[[Tensor], Tensor],
        memory: Sequence[dict[Look, Tensor]],
        kept: Callable[[Sequence[tuple[int, Look]]], Tensor | None],
    ) -> None:
        super().__init__(pictures, norms, encode, memory)
        self.kept = kept

    def look(self, wanted: Sequence[tuple[int, Look]], side: Size) -> Tensor:
        found = self.kept(wanted)
        return super().look(wanted, side) if found is None else found


class Student:
    """A method's model and its inputs."""

    template = "plain"
    curve_pictures = 400  # for each point of a learning curve
    told_when_measured = False  # whether being told the region changes nothing in training

    def __init__(self, cell: Cell, bench: Bench) -> None:
        self.cell, self.bench = cell, bench
        kind = method_class(cell.method)
        options = kind.options_for(level_named(cell.level).ratio)
        if bench.parts.convnet is not None:
            options |= kind.options_with(bench.parts.convnet)
        options |= cell.options
        # A tower that a method builds is trained with it; the ConvNet control's is prepared and frozen.
        self.builds_tower = kind.build_tower is not Method.build_tower and kind is not ConvNetOnly
        set_seed(cell.seed)
        made = compose(
            bench.parts.tower,
            bench.parts.reader,
            cell.method,
            options,
            tokenizer=bench.parts.tokenizer,
            template=self.template,
            vision_feature_layer=-1,
        )
        self.model, self.processor = made.model.to(bench.device), made.processor
        if bench.bf16:
            own = (self.model.vision_tower,) if self.builds_tower else ()
            for part in (self.model.connector, self.model.language_model, *own):
                multiply_in_bfloat16(part)
        self.method = self.model.method
        self.model.requires_grad_(True)
        self.model.vision_tower.requires_grad_(self.builds_tower)
        self.features = {data.key: self._features(data) for data in (bench.train, bench.test)}
        self.memories: dict[str, dict[int, dict[Look, Tensor]]] = {data: {} for data in self.features}
        size = bench.train.size
        self.plan = self.method.plan(*size)

    @property
    def tower_key(self) -> str:
        """Names the weights of a frozen tower."""
        parts = self.bench.parts
        return parts.convnet_key if isinstance(self.method, ConvNetOnly) else parts.tower_key

    def _features(self, data: Examples) -> Features:
        return Features(
            self.bench.folder,
            data,
            self.tower_key,
            self._encode_frozen,
            self._views,
            self.processor.image_processor.norms,
            tell=self.bench.tell,
            device=self.bench.device,
        )

    def _views(self, picture: np.ndarray, plan: ViewPlan) -> np.ndarray:
        return self.processor.image_processor.views(Image.fromarray(picture), plan)

    @torch.no_grad()
    def _encode_frozen(self, views: Tensor) -> Tensor:
        return self.model.encode_views(views.to(self.bench.device))

    def ready(self) -> str | None:
        """Caches the views' features if they are frozen; returns a sentence if there is no room for them."""
        if self.builds_tower:
            return None
        for features in self.features.values():
            features.ready(self.plan, self.method.looks(self.plan))
        return next((f.fallback for f in self.features.values() if f.fallback), None)

    def pointing(self, data: Examples, captions: bool) -> Examples:
        """The same with questions for regions as captions, in addition or instead.

        Raises `FoveateError` if the method does not ask where to look.
        """
        raise FoveateError(f"stages: {self.method.title} does not ask where to look: regions must be false")

    def loss(self, data: Examples, indices: Sequence[int], captions: bool = False) -> Tensor:
        """The outputs for all questions about these pictures."""
        return self.forward(data, self.rows(data, indices, captions)).loss

    def grade(self, data: Examples, indices: Sequence[int]) -> list[Graded]:
        """Answers all questions about these pictures."""
        rows = self.rows(data, indices)
        found = self.forward(data, rows)
        graded = []
        for n, (row, hits) in enumerate(zip(rows, found.answers.right(), strict=True)):
            regions = None if found.regions is None else found.regions[n]
            graded += [
                Graded(q, hit, found.tokens[n], regions) for q, hit in zip(row.asked, hits, strict=True)
            ]
        return graded

    def rows(self, data: Examples, indices: Sequence[int], captions: bool = False) -> list[Row]:
        """Questions about these pictures; some of those that share their visual tokens share a row."""
        rows: list[Row] = []
        for i in indices:
            asked = [*data.questions[i], *(data.captions[i] if captions else [])]
            if self.method.uses_query:
                rows += [Row(i, question.region, [question]) for question in asked]
            elif isinstance(self.method, GivenRegion):
                regions = dict.fromkeys(question.region for question in asked)
                rows += [Row(i, region, [q for q in asked if q.region == region]) for region in regions]
            else:
                lengths = [len(self.bench.samples[q.text, q.answer].ids) for q in asked]
                runs = portions(lengths, max(SHORT, self.plan.tokens))
                rows += [Row(i, None, [asked[k] for k in run]) for run in runs]
        return rows

    def forward(self, data: Examples, rows: Sequence[Row]) -> Pass:
        """The outputs for all questions of these rows at once."""
        samples = [[self.bench.samples[q.text, q.answer] for q in row.asked] for row in rows]
        pictures = list(dict.fromkeys(row.picture for row in rows))
        owners = [pictures.index(row.picture) for row in rows]
        encoded = self._connect(data, rows, samples, pictures, owners)
        packed = pack(samples, 0, self.model.config.image_token_id, self.bench.parts.tokenizer.pad_token_id)
        of = torch.tensor(owners, device=self.bench.device)
        visual = seen(encoded.pooler_output, encoded.kept, of, closed=encoded.injection is None)
        answers = read(self.model.language_model, visual, packed, changes=self._changes(encoded, visual))
        accounts = encoded.accounts
        if accounts is not None and len(accounts) < len(rows):  # of pictures
            accounts = [accounts[p] for p in owners]
        regions = None if accounts is None else [account.regions for account in accounts]
        return Pass(answers, visual.tokens.tolist(), regions)

    def _changes(self, encoded: EncodedPictures, visual: Seen) -> dict[int, Change]:
        """What the method injects behind the LLM's layers."""
        if encoded.injection is None:
            return {}
        there = torch.ones(len(visual.owners), self.plan.tokens, dtype=torch.bool, device=self.bench.device)
        return {
            layer: partial(injector, injection=encoded.injection, visual=there)
            for layer, injector in self.model.connector.injectors().items()
        }

    def _connect(
        self,
        data: Examples,
        rows: Sequence[Row],
        samples: Sequence[Sequence[Sample]],
        pictures: Sequence[int],
        owners: Sequence[int],
    ) -> EncodedPictures:
        """Visual tokens of every row, which is about the picture `pictures[owners[row]]`."""
        if isinstance(self.method, GivenRegion):
            sizes = torch.tensor([data.size] * len(rows))
            return self.model.connect(self._seen_in_regions(data, rows, self.method), sizes)
        sizes = torch.tensor([data.size] * len(pictures))
        features = self._seen(data, pictures)
        if not self.method.uses_query:
            return self.model.connect(features, sizes)
        asked = [torch.tensor(row[0].ids[: row[0].answer]) for row in samples]  # one question a row
        ids = nn.utils.rnn.pad_sequence(asked, batch_first=True).to(self.bench.device)
        lengths = torch.tensor([[len(text)] for text in asked])
        mask = (torch.arange(ids.shape[1]) < lengths).long().to(self.bench.device)
        if not self.method.reads_source:
            return self.model.connect(features, sizes, ids, mask, owners=owners)
        source = self._source(data, pictures)
        if not self.cell.told:
            return self.model.connect(features, sizes, ids, mask, source, owners)
        plans, regions = [self.plan] * len(rows), [row.region for row in rows]
        with told_windows(self.model.connector, self.method.tower, plans, regions):
            return self.model.connect(features, sizes, ids, mask, source, owners)

    def _source(self, data: Examples, pictures: Sequence[int]) -> Source:
        """The pictures themselves; a frozen tower's features are cached."""
        memory = self.memories[data.key]
        return KeptSource(
            [torch.from_numpy(np.array(data.pictures[i])) for i in pictures],
            torch.from_numpy(np.stack([self.processor.image_processor.norms] * len(pictures))),
            self._encode_frozen,
            [memory.setdefault(i, {}) for i in pictures],
            lambda wanted: self.features[data.key].gather_looks(
                self.plan, [(pictures[p], look) for p, look in wanted]
            ),
        )

    def _seen_in_regions(self, data: Examples, rows: Sequence[Row], method: GivenRegion) -> Tensor:
        """Features (B V, N, C): cached ones without a region, else of the region's own views."""
        told = [n for n, row in enumerate(rows) if row.region is not None]
        untold = [n for n, row in enumerate(rows) if row.region is None]
        width = self.model.config.vision_config.hidden_size
        shape = (len(rows), len(self.plan.views), method.tower.tokens, width)
        features = torch.empty(shape, device=self.bench.device)
        if untold:
            features[untold] = self._seen(data, [rows[n].picture for n in untold]).view_as(features[untold])
        if told:
            plans = [method.plan_for(*data.size, rows[n].region) for n in told]
            pixels = [
                self._views(data.pictures[rows[n].picture], plan) for n, plan in zip(told, plans, strict=True)
            ]
            encoded = self._encode_frozen(torch.from_numpy(np.concatenate(pixels)))
            features[told] = encoded.view_as(features[told])
        return features.flatten(0, 1)

    def _seen(self, data: Examples, indices: Sequence[int]) -> Tensor:
        """Features of the plan's views, (B V, N, C)."""
        if not self.builds_tower:
            return self.features[data.key].gather(self.plan, indices).to(self.bench.device)
        pixels = np.concatenate([self._views(data.pictures[i], self.plan) for i in indices])
        return self.model.encode_views(torch.from_numpy(pixels).to(self.bench.device))

    def stages(self) -> list[Stage]:
        """The cell's own stages; or first the connector alone, with captions, then also the LLM."""
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
                spec.regions,
                scale.cell.lr * (1.0 if "language_model" in spec.trains else WARM_UP_LR),
                spec.options,
                spec.method,
            )
            for spec, begin, end in zip(specs, [0, *ends], ends, strict=False)
        ]
        return [stage for stage in stages if stage.steps]

    def optimiser(self, stage: Stage) -> torch.optim.AdamW:
        """Makes the stage's modules train, and no others."""
        self.model.requires_grad_(False)
        groups: list[tuple[nn.Module, float]] = []
        for name in stage.trains:
            try:
                module = self.model.get_submodule(name)
            except AttributeError as error:
                raise FoveateError(f"stages: {self.method.title} has no module {name!r}") from error
            if name.partition(".")[0] == "language_model":
                lr = self.bench.scale.cell_llm_lr
            else:
                lr = stage.lr * (OWN_TOWER_LR if name == "vision_tower" else 1.0)
            groups.append((module.requires_grad_(True), lr))
        return optimiser(groups)

    def take(self, other: Student) -> None:
        """Loads the trained weights of another student that both have."""
        self.model.load_state_dict(other.trained(), strict=False)
        self.ready()

    def trained(self) -> dict[str, Tensor]:
        """The weights that training changes."""
        frozen = "" if self.builds_tower else "vision_tower."
        state = self.model.state_dict()
        return {key: tensor for key, tensor in state.items() if not frozen or not key.startswith(frozen)}
