"""Checks stages against model, chat template, devices and data, before anything is written."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset

from foveate.data.dataset import Samples, UnreadablePicture, errors_of_workers
from foveate.data.formats import Conversations, read_conversations
from foveate.data.regions import Regions
from foveate.data.sampling import repeated
from foveate.data.shards import OnHub
from foveate.errors import FoveateError
from foveate.evaluate.metrics import Metric, chosen
from foveate.evaluate.samples import Questions, read_questions
from foveate.model.modeling import FoveateForConditionalGeneration
from foveate.model.positions import positions_of
from foveate.model.processing import FoveateProcessor
from foveate.model.text import TEMPLATES
from foveate.picture.limits import Limits
from foveate.train.adapter import check_adapter
from foveate.train.models import skeleton, stage_options
from foveate.train.parts import add_adapters, select
from foveate.train.recipe import DataName, EvalData, Recipe, Stage

NAMED = 3  # samples without their pictures that are named; all are counted
SAMPLES = "samples"  # in the fingerprints of data, beside the files
FEW = 2000  # samples that one process measures itself: starting workers would take longer
MARKED = re.compile(r"{%-?\s*generation\b")  # marks the assistant's text in a chat template


@dataclass(frozen=True)
class Prepared:
    """A stage that can be trained.

    Attributes:
        name: of the stage.
        stage: its settings.
        options: all options of the method in this stage.
        processor: with these options and the stage's chat template.
        skeleton: the model on the meta device, with what trains in this stage marked.
        samples: the samples, without those that are too long.
        lengths: (S,) tokens of each sample.
        left_out: number of samples that are too long.
        useless: number of samples that the method cannot make a lesson of.
        missing: number of samples whose pictures are missing or cannot be read.
        data: fingerprints of the files, by their paths, and of the samples that are used.
        accumulation: micro-batches per optimizer step on each device.
        questions: that the model is asked while it trains, and the metrics of its answers; None: none.
    """

    name: str
    stage: Stage
    options: dict[str, Any]
    processor: FoveateProcessor
    skeleton: FoveateForConditionalGeneration
    samples: Samples
    lengths: np.ndarray
    left_out: int
    useless: int
    missing: int
    data: dict[str, str]
    accumulation: int
    questions: tuple[Questions, list[Metric]] | None


def prepare(recipe: Recipe, name: str) -> Prepared:
    """Checks one stage. Reads no weights, and pictures only for their sizes.

    Raises `FoveateError` for patterns that match nothing, a batch that cannot be divided, a template that
    does not mark the assistant's text, data that is wrong or missing, and pictures that are missing.
    """
    stage, where = recipe.stages[name], f"stages.{name}"
    if stage.bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise FoveateError(f"{where}: this GPU cannot compute in bfloat16; set bf16 to false")
    if recipe.model.dtype == "bfloat16" and not stage.bf16:
        raise FoveateError(
            f"{where}: model.dtype bfloat16 keeps frozen weights in bfloat16, with which float32 cannot be "
            "computed: set bf16 to true, or model.dtype to float32"
        )
    model, processor = skeleton(recipe.model, stage_options(recipe.model, stage.options), stage.template)
    processor.image_processor.limits = Limits(max_pixels=recipe.model.max_pixels)
    if stage.lora is not None:
        add_adapters(model, stage, where)
    select(model, stage, where)
    if not MARKED.search(str(processor.chat_template)):
        raise FoveateError(
            f"{where}: {recipe.model.load} has no chat template that marks the assistant's text; "
            f"set template to one of {', '.join(TEMPLATES)}"
        )
    try:
        processor.check_learnt_end(stage.template or recipe.model.template)
    except FoveateError as error:
        raise FoveateError(f"{where}: {error}") from None
    if stage.lora is not None and stage.lora.save is not None:
        check_adapter(recipe, name, model, processor)
    devices = PartialState().num_processes
    if stage.batch % (stage.micro_batch * devices):
        raise FoveateError(
            f"{where}: batch {stage.batch} is not a multiple of micro_batch {stage.micro_batch} times "
            f"{devices} devices; change one of them"
        )
    _check_regions(stage, where, model)
    found = _samples(stage, where, recipe.seed, processor)
    if not len(found.samples):
        raise FoveateError(
            f"{where}: all {found.left_out} samples are longer than max_length {stage.max_length}; raise it"
            if found.left_out
            else f"{where}: no sample has its pictures; check images"
            if found.missing
            else f"{where}: no sample has a known region; check the files of regions"
        )
    _check_positions(found, where, model)
    return Prepared(
        name=name,
        stage=stage,
        options=model.method.describe_options(),
        processor=processor,
        skeleton=model,
        samples=found.samples,
        lengths=found.lengths,
        left_out=found.left_out,
        useless=found.useless,
        missing=found.missing,
        data=_fingerprints(stage, found),
        accumulation=stage.batch // (stage.micro_batch * devices),
        questions=None if stage.eval_data is None else _questions(stage.eval_data, where),
    )


def _questions(data: EvalData, where: str) -> tuple[Questions, list[Metric]]:
    try:
        questions = read_questions(_named(data, data.limit), data.images, data.limit)
        return questions, chosen(data.metrics, questions.samples)
    except FoveateError as error:
        raise FoveateError(f"{where}.eval_data: {error}") from None


def _named(data: DataName, limit: int | None) -> str | OnHub:
    """What a recipe names: a path, or a data set on the hub."""
    if data.split is None:
        return data.path
    return OnHub(data.path, data.split, data.subset, data.revision, limit)


def _check_positions(found: _Found, where: str, model: FoveateForConditionalGeneration) -> None:
    """Raises `FoveateError` if a sample is longer than the LLM's positions, with what makes it fit."""
    positions, longest = positions_of(model.config), int(found.lengths.max())
    if positions is not None and longest > positions:
        count = int((found.lengths > positions).sum())
        raise FoveateError(
            f"{where}: {count} of {len(found.lengths)} samples are longer than the LLM's {positions} "
            f"positions, the longest has {longest} tokens: max_length={positions} leaves them out, the "
            f"option max_visual_tokens shortens them, and model.max_positions={longest} lets them through, "
            "for an LLM that reads beyond its positions"
        )


def _check_regions(stage: Stage, where: str, model: FoveateForConditionalGeneration) -> None:
    """Raises `FoveateError` unless regions are given exactly if the method learns them."""
    title = model.method.title
    for i, source in enumerate(stage.data):
        if model.method.learns_regions and source.regions is None:
            raise FoveateError(f"{where}.data.{i}: {title} learns where to look: give the file as regions")
        if source.regions is not None and not model.method.learns_regions:
            raise FoveateError(f"{where}.data.{i}: {title} as set here learns no regions: leave them out")
        if source.regions is not None and not source.prompts:
            raise FoveateError(
                f"{where}.data.{i}: regions belong to questions, which prompts: false leaves out"
            )


class _Found(NamedTuple):
    """A stage's samples, their lengths, and the numbers left out, as `Prepared` describes them."""

    samples: Samples
    lengths: np.ndarray
    left_out: int
    useless: int
    missing: int


def _samples(stage: Stage, where: str, seed: int, processor: FoveateProcessor) -> _Found:
    """Reads and measures the stage's data."""
    files: list[Conversations] = []
    counts: list[int] = []
    for source in stage.data:
        files.append(read_conversations(_named(source, source.limit), source.images, source.prompts))
        counts.append(min(len(files[-1]), source.limit or len(files[-1])))
    every = np.concatenate(
        [np.stack([np.full(count, i), np.arange(count)], axis=1) for i, count in enumerate(counts)]
    )
    regions = [None if source.regions is None else Regions(source.regions) for source in stage.data]
    measured = _measure(Samples(files, every, processor, regions), stage.workers)
    lengths = measured.lengths
    if measured.unreadable and stage.missing_pictures == "refuse":
        more = ["..."] if len(measured.unreadable) > NAMED else []
        some = "; ".join(measured.unreadable[:NAMED] + more)
        raise FoveateError(
            f"{where}: {len(measured.unreadable)} of {len(every)} samples have pictures that are missing or "
            f"broken: {some} (missing_pictures=leave_out "
            "trains without these samples)"
        )
    for i, (file, known) in enumerate(zip(files, regions, strict=True)):
        if known is not None:
            known.leave_out([*measured.problems[i], *known.beyond(len(file))])
    rng = np.random.default_rng(seed)
    starts = np.cumsum([0, *counts])
    chosen = np.concatenate(
        [
            start + repeated(count, source.repeat, rng)
            for start, count, source in zip(starts, counts, stage.data, strict=False)
        ]
    )
    readable = chosen[lengths[chosen] >= 0]
    useful = readable[lengths[readable] > 0]
    kept = useful[lengths[useful] <= stage.max_length]
    return _Found(
        samples=Samples(files, every[kept], processor, regions, seed),
        lengths=lengths[kept],
        left_out=len(useful) - len(kept),
        useless=len(readable) - len(useful),
        missing=len(chosen) - len(readable),
    )


def _fingerprints(stage: Stage, found: _Found) -> dict[str, str]:
    """Of the text of the stage's files, and of which samples are used and how long they are.

    Lengths change with the sizes of pictures; their pixels are not read.
    """
    prints = {}
    for source, file in zip(stage.data, found.samples.sources, strict=True):
        part = (source.path, source.subset, source.split)
        prints[" ".join(name for name in part if name is not None)] = file.digest
        if source.regions is not None:
            prints[source.regions] = hashlib.sha256(Path(source.regions).read_bytes()).hexdigest()
    used = np.concatenate([found.samples.records, found.lengths[:, None]], axis=1)
    return {**prints, SAMPLES: hashlib.sha256(used.astype("<i8").tobytes()).hexdigest()}


def changed_data(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """What differs between two runs' `Prepared.data`; None if nothing does."""
    names = [name for name in {**before, **now} if name != SAMPLES]
    found = next((name for name in names if before.get(name) != now.get(name)), None)
    if found is None and before.get(SAMPLES) != now.get(SAMPLES):
        return "the pictures that are found, or their sizes"
    return found


class _Measures(Dataset[tuple[int, int, list[str], str]]):
    """Index, length, problems of regions, and of pictures, of every `step`-th sample from `first` on."""

    def __init__(self, samples: Samples, first: int, step: int) -> None:
        self.samples, self.mine = samples, range(first, len(samples), step)

    def __len__(self) -> int:
        return len(self.mine)

    def __getitem__(self, index: int) -> tuple[int, int, list[str], str]:
        try:
            return self.mine[index], *self.samples.measure(self.mine[index]), ""
        except UnreadablePicture as error:
            return self.mine[index], -1, [], str(error)


class _Measured(NamedTuple):
    """Tokens of every sample, (S,), -1 without its pictures; per source the problems of its regions; the
    problems of pictures."""

    lengths: np.ndarray
    problems: list[list[str]]
    unreadable: list[str]


def _measure(samples: Samples, workers: int) -> _Measured:
    """Measures all samples. The processes share the work."""
    processes = PartialState()
    mine = _Measures(samples, processes.process_index, processes.num_processes)
    loader = DataLoader(mine, batch_size=64, collate_fn=list, num_workers=workers if len(mine) > FEW else 0)
    with errors_of_workers():
        measured = [one for batch in loader for one in batch]
    lengths = np.zeros(len(samples), dtype=np.int64)
    problems: list[list[str]] = [[] for _ in samples.sources]
    unreadable: list[str] = []
    for index, length, wrong, picture in sorted(gather_object(measured)):
        lengths[index] = length
        problems[samples.records[index, 0]] += wrong
        unreadable += [picture] if picture else []
    return _Measured(lengths, problems, unreadable)
