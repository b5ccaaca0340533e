"""Whole checkpoints of the authors' classes against ours: what all families' checkers share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate import FoveateForConditionalGeneration
from tests.parity.golden import Case

PLACEHOLDER = -200  # one per picture in the authors' `input_ids`


def load(case: Case, **kwargs: Any) -> FoveateForConditionalGeneration:
    """The case's checkpoint, with the tower that lies beside it."""
    return FoveateForConditionalGeneration.from_pretrained(
        case.folder / "checkpoint", vision_tower=tower_folder(case), **kwargs
    ).eval()


def tower_folder(case: Case) -> Path:
    """`clip` or `clip_vit`: what `mm_vision_tower` of the checkpoint's config.json stands for."""
    found = [case.folder / name for name in ("clip", "clip_vit") if (case.folder / name).is_dir()]
    assert len(found) == 1, f"{case.folder} has {len(found)} tower folders"
    return found[0]


def expanded(model: FoveateForConditionalGeneration, ids: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Authors' ids (1, T) with one placeholder per picture -> ours, one image token per visual token."""
    counts = iter(plan.tokens for plan in model.plans(sizes))
    image = model.config.image_token_id
    return torch.tensor(
        [[n for i in ids[0].tolist() for n in ([image] * next(counts) if i == PLACEHOLDER else [i])]]
    )


def prompt(
    model: FoveateForConditionalGeneration, ids: Tensor, pixels: Tensor, sizes: Sequence[tuple[int, int]]
) -> dict:
    """Inputs of our model: authors' ids (1, T), views (V, 3, h, w), original (height, width) per picture."""
    input_ids = expanded(model, ids, sizes)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": pixels,
        "image_sizes": torch.tensor(sizes),
    }
