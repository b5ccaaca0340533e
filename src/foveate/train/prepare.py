"""Checks stages against model, chat template, devices and data, before anything is written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset

from foveate.data.dataset import Samples, errors_of_workers
from foveate.data.formats import Conversations, read_conversations
from foveate.data.regions import Regions
from foveate.data.sampling import repeated
from foveate.errors import FoveateError
from foveate.model.modeling import FoveateForConditionalGeneration
from foveate.model.processing import FoveateProcessor
from foveate.model.text import TEMPLATES
from foveate.train.models import skeleton, stage_options
from foveate.train.parts import add_adapters, select
from foveate.train.recipe import Recipe, Stage

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
        accumulation: micro-batches per optimizer step on each device.
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
    accumulation: int


def prepare(recipe: Recipe, name: str) -> Prepared:
    """Checks one stage. Reads no weights, and pictures only for their sizes.

    Raises `FoveateError` for patterns that match nothing, a batch that cannot be divided, a template that
    does not mark the assistant's text, data that is wrong or missing, and pictures that are missing.
    """
    stage, where = recipe.stages[name], f"stages.{name}"
    if stage.bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise FoveateError(f"{where}: this GPU cannot compute in bfloat16; set bf16 to false")
    model, processor = skeleton(recipe.model, stage_options(recipe.model, stage.options), stage.template)
    if stage.lora is not None:
        add_adapters(model, stage, where)
    select(model, stage, where)
    if not MARKED.search(str(processor.chat_template)):
        raise FoveateError(
            f"{where}: {recipe.model.load} has no chat template that marks the assistant's text; "
            f"set template to one of {', '.join(TEMPLATES)}"
        )
    devices = PartialState().num_processes
    if stage.batch % (stage.micro_batch * devices):
        raise FoveateError(
            f"{where}: batch {stage.batch} is not a multiple of micro_batch {stage.micro_batch} times "
            f"{devices} devices; change one of them"
        )
    _check_regions(stage, where, model)
    samples, lengths, left_out, useless = _samples(stage, recipe.seed, processor)
    if not len(samples):
        raise FoveateError(
            f"{where}: all {left_out} samples are longer than max_length {stage.max_length}; raise it"
            if left_out
            else f"{where}: no sample has a known region; check the files of regions"
        )
    return Prepared(
        name=name,
        stage=stage,
        options=model.method.describe_options(),
        processor=processor,
        skeleton=model,
        samples=samples,
        lengths=lengths,
        left_out=left_out,
        useless=useless,
        accumulation=stage.batch // (stage.micro_batch * devices),
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


def _samples(stage: Stage, seed: int, processor: FoveateProcessor) -> tuple[Samples, np.ndarray, int, int]:
    """The stage's samples, their lengths, and the numbers left out as too long and as useless."""
    files: list[Conversations] = []
    counts: list[int] = []
    for source in stage.data:
        files.append(read_conversations(source.path, source.images, source.prompts))
        counts.append(min(len(files[-1]), source.limit or len(files[-1])))
    every = np.concatenate(
        [np.stack([np.full(count, i), np.arange(count)], axis=1) for i, count in enumerate(counts)]
    )
    regions = [None if source.regions is None else Regions(source.regions) for source in stage.data]
    lengths, problems = _measure(Samples(files, every, processor, regions), stage.workers)
    for i, (file, known) in enumerate(zip(files, regions, strict=True)):
        if known is not None:
            known.leave_out([*problems[i], *known.beyond(len(file))])
    rng = np.random.default_rng(seed)
    starts = np.cumsum([0, *counts])
    chosen = np.concatenate(
        [
            start + repeated(count, source.repeat, rng)
            for start, count, source in zip(starts, counts, stage.data, strict=False)
        ]
    )
    useful = chosen[lengths[chosen] > 0]
    kept = useful[lengths[useful] <= stage.max_length]
    samples = Samples(files, every[kept], processor, regions, seed)
    return samples, lengths[kept], len(useful) - len(kept), len(chosen) - len(useful)


class _Measures(Dataset[tuple[int, int, list[str]]]):
    """Index, length and problems of every `step`-th sample from `first` on: one process's share."""

    def __init__(self, samples: Samples, first: int, step: int) -> None:
        self.samples, self.mine = samples, range(first, len(samples), step)

    def __len__(self) -> int:
        return len(self.mine)

    def __getitem__(self, index: int) -> tuple[int, int, list[str]]:
        return self.mine[index], *self.samples.measure(self.mine[index])


def _measure(samples: Samples, workers: int) -> tuple[np.ndarray, list[list[str]]]:
    """Tokens of every sample, (S,); per source the problems of its regions. The processes share the work."""
    processes = PartialState()
    mine = _Measures(samples, processes.process_index, processes.num_processes)
    loader = DataLoader(mine, batch_size=64, collate_fn=list, num_workers=workers if len(mine) > FEW else 0)
    with errors_of_workers():
        measured = [one for batch in loader for one in batch]
    lengths = np.zeros(len(samples), dtype=np.int64)
    problems: list[list[str]] = [[] for _ in samples.sources]
    for index, length, wrong in sorted(gather_object(measured)):
        lengths[index] = length
        problems[samples.records[index, 0]] += wrong
    return lengths, problems
