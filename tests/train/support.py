"""Small recipes for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from foveate.data.toy import write_toy_data

FAST = {
    "batch": 8,
    "micro_batch": 4,
    "lr": 1e-2,
    "bf16": False,
    "workers": 0,
    "log_steps": 1,
    "save_steps": 3,
}


def stage(trains: list[str], data: Path, **more: Any) -> dict[str, Any]:
    return {**FAST, "trains": trains, "data": [{"path": str(data)}], **more}


def write_recipe(folder: Path, stages: dict[str, Any], **model: Any) -> Path:
    """A recipe of a tiny model in `folder`, whose run goes to `folder`/run."""
    recipe = {
        "output": str(folder / "run"),
        "model": {"tiny": True, "method": "llava", "template": "chatml", **model},
        "stages": stages,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def two_stages(folder: Path, n: int = 36, **model: Any) -> Path:
    """A recipe that first trains the connector, then all."""
    data = write_toy_data(folder / "toy", n)
    stages = {
        "pretrain": stage(["connector"], data, steps=4, template="plain"),
        "finetune": stage(["connector", "language_model", "vision_tower"], data, epochs=3),
    }
    return write_recipe(folder, stages, **model)


def losses(run: Path, name: str) -> list[float]:
    """Every logged loss of a stage."""
    state = json.loads((run / "stages" / name / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def weights(model: Path) -> dict[str, Tensor]:
    return load_file(model / "model.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
