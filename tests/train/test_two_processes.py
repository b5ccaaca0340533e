"""Two processes, one often with text only, train like one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from foveate.data.formats import read_conversations
from foveate.data.sampling import EpochSampler
from foveate.data.toy import write_toy_data
from foveate.train.run import train
from tests import forked
from tests.train.support import losses, stage, weights, write_recipe

STEPS = 6


@pytest.mark.parametrize(
    ("method", "trains"),
    [
        ("coroi", ["connector", "language_model"]),
        pytest.param("anyres", ["connector", "language_model"], marks=pytest.mark.slow),
        pytest.param("llava", ["vision_tower", "connector"], marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_as_one(method: str, trains: list[str], tmp_path: Path) -> None:
    data = write_toy_data(tmp_path / "toy", 12)
    settings = {"batch": 2, "micro_batch": 1, "group_by": "none", "steps": STEPS, "epochs": 1, "lr": 1e-4}
    recipe = write_recipe(tmp_path, {"all": stage(trains, data, **settings)}, method=method)
    pictures = read_conversations(data).pictures
    order = np.array(list(EpochSampler(np.zeros(12), pictures, 2, "none", seed=42)))
    seen = (pictures[order] > 0).reshape(STEPS, 2)  # (step, process)
    assert (seen[:, 0] != seen[:, 1]).any(), "no step has a picture on one process and only text on the other"
    said = on_two(recipe)
    assert "micro-batch 1, accumulation 1, devices 2" in said
    assert said.count("stage all") == 1
    alone = tmp_path / "alone"
    train(recipe, [f"output={alone}"])
    assert losses(tmp_path / "run", "all") == pytest.approx(losses(alone, "all"), abs=1e-4)
    assert furthest(tmp_path / "run", alone) < 1e-5


def on_two(recipe: Path) -> str:
    """Trains on two processes. What both print."""
    done = forked.on_devices(2, "train", recipe, folder=recipe.parent)
    assert done.code == 0, done.stdout[-2000:]
    return done.stdout


@pytest.mark.slow
def test_torchrun_itself(tmp_path: Path) -> None:
    """The others start the two processes as torchrun does, without three imports of everything."""
    data = write_toy_data(tmp_path / "toy", 4)
    settings = {"batch": 2, "micro_batch": 1, "steps": 2}
    recipe = write_recipe(tmp_path, {"all": stage(["connector"], data, **settings)})
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "-m", "foveate", "train", str(recipe)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "micro-batch 1, accumulation 1, devices 2" in done.stdout
    assert done.stdout.count("stage all") == 1


def furthest(one: Path, other: Path) -> float:
    """The largest difference between the weights of two runs."""
    a, b = weights(one / "model"), weights(other / "model")
    return max(float((a[key] - b[key]).abs().max()) for key in a)


@pytest.mark.parametrize(
    ("method", "trains"),
    [
        ("llava", ["connector", "language_model"]),
        pytest.param("llava", ["connector"], marks=pytest.mark.slow),
        pytest.param("coroi", ["vision_tower", "connector", "language_model"], marks=pytest.mark.slow),
    ],
)
def test_a_step_of_texts_moves_what_it_moves_on_one(method: str, trains: list[str], tmp_path: Path) -> None:
    """Steps with pictures, with text alone, and with pictures again: momentum and decay are the same."""
    data = write_toy_data(tmp_path / "toy", 12)
    settings = {"batch": 2, "micro_batch": 1, "lr": 1e-3, "weight_decay": 0.1, "schedule": "constant"}
    recipe = write_recipe(tmp_path, {"all": stage(trains, data, **settings)}, method=method)
    pictures = read_conversations(data).pictures
    lengths = np.zeros(12)  # they sort within steps alone
    order = np.array(list(EpochSampler(lengths, pictures, 2, "modality", seed=42))).reshape(STEPS, 2)
    texts = (pictures[order] == 0).all(1)
    assert texts.sum() == 1 and 0 < texts.argmax() < STEPS - 1, "no step of texts lies between others"
    on_two(recipe)
    alone = tmp_path / "alone"
    train(recipe, [f"output={alone}"])
    assert losses(tmp_path / "run", "all") == pytest.approx(losses(alone, "all"), abs=1e-4)
    assert furthest(tmp_path / "run", alone) < 1e-5
