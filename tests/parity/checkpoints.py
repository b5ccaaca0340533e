"""Whole checkpoints of the authors' classes against ours: what all families' checkers share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate import FoveateForConditionalGeneration
from tests.parity.golden import Case

PLACEHOLDER = -200  # one per picture in the authors' `input_ids`, where a case does not name another


def load(case: Case, **kwargs: Any) -> FoveateForConditionalGeneration:
    """The case's checkpoint, with the tower that lies beside it."""
    return FoveateForConditionalGeneration.from_pretrained(
        model_folder(case), vision_tower=tower_folder(case), **kwargs
    ).eval()


def model_folder(case: Case) -> Path:
    """The whole model, by the name that the case gives its folder."""
    about = case.json.get("checkpoint")
    return case.folder / (about["folder"] if isinstance(about, Mapping) else "checkpoint")


def tower_folder(case: Case) -> Path:
    """What `mm_vision_tower` of the checkpoint's config.json stands for: it names no tower itself."""
    found = [path for path, config in _folders(case).items() if "mm_vision_tower" not in config]
    assert len(found) == 1, f"{case.folder} has {len(found)} tower folders"
    return found[0]


def stage_folder(case: Case) -> Path | None:
    """The files of a stage in which only the connector trained; None if the case has no such stage."""
    about = case.json.get("stage_files")
    if isinstance(about, Mapping) and "folder" in about:
        return case.folder / about["folder"]
    whole = model_folder(case)
    found = [path for path, config in _folders(case).items() if "mm_vision_tower" in config and path != whole]
    assert len(found) < 2, f"{case.folder} has {len(found)} folders of stages"
    return found[0] if found else None


def _folders(case: Case) -> dict[Path, dict[str, Any]]:
    """The folders beside expected.json, each with its config.json."""
    configs = sorted(case.folder.glob("*/config.json"))
    return {path.parent: json.loads(path.read_text(encoding="utf-8")) for path in configs}


def placeholder(case: Case) -> int:
    """The id that stands for a picture in the case's `input_ids`."""
    about = {**case.config, **case.json.get("input", {}), **case.json}
    return about.get("image_token_index", PLACEHOLDER)


def expanded(
    case: Case, model: FoveateForConditionalGeneration, ids: Tensor, sizes: Sequence[tuple[int, int]]
) -> Tensor:
    """Authors' ids (1, T) with one placeholder per picture -> ours, one image token per visual token."""
    counts = iter(plan.tokens for plan in model.plans(sizes))
    image, mark = model.config.image_token_id, placeholder(case)
    parts = ([image] * next(counts) if token == mark else [token] for token in ids[0].tolist())
    return torch.tensor([[token for part in parts for token in part]])


def prompt(
    case: Case,
    model: FoveateForConditionalGeneration,
    ids: Tensor,
    pixels: Tensor,
    sizes: Sequence[tuple[int, int]],
) -> dict[str, Tensor]:
    """Inputs of our model: authors' ids (1, T), views (V, 3, h, w), original (height, width) per picture."""
    input_ids = expanded(case, model, ids, sizes)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": pixels,
        "image_sizes": torch.tensor(sizes),
    }


def words(logits: Tensor, expected: Tensor) -> Tensor:
    """Ours, without the image token that our vocabulary has more."""
    return logits[..., : expected.shape[-1]]


def embedded(model: FoveateForConditionalGeneration, inputs: Mapping[str, Tensor], visual: Tensor) -> Tensor:
    """What the LLM reads of one sample, (T, D): its words, and the visual tokens in their places."""
    ids = inputs["input_ids"][0]
    shown = ids == model.config.image_token_id
    read = model.get_input_embeddings()(ids)
    return read.masked_scatter(shown[:, None], visual.to(read))
