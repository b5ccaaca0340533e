"""The lab's questions as a file that `foveate eval` reads, beside their pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from foveate.files import new_folder, write
from foveate.lab.levels import Level
from foveate.lab.materials import SPLITS, Split
from foveate.lab.questions import ask_about
from foveate.lab.scales import Scale
from foveate.lab.scenes import make_scene

FILE = "questions.jsonl"


def write_questions(
    out: Path,
    level: Level,
    scale: Scale,
    count: int,
    split: Split = "test",
    seed: int = 0,
    photographs: Sequence[np.ndarray] = (),
) -> Path:
    """Draws scenes until there are `count` questions, and writes them to a new folder; returns its file.

    Each has its answer, the box to look at, its kind as `category` and its scene as `group`.

    Raises:
        FoveateError: the folder exists and is not empty; `photographs`, (H, W, 3) bytes each, on which the
            scenes are drawn instead of the split's, are too small.
    """
    rows: list[dict[str, object]] = []
    with new_folder(out) as folder:
        scene_number = 0
        while len(rows) < count:
            scene = make_scene(level, scale.view, scale.magnify, split, seed, scene_number, photographs)
            name = f"{scene_number:05d}.png"
            Image.fromarray(scene.picture).save(folder / name)
            rng = np.random.default_rng([seed, SPLITS.index(split), scene_number, 1])
            for question in ask_about(scene, level.questions, rng):
                box = None if question.region is None else list(question.region.rounded())
                rows.append(
                    {
                        "id": len(rows),
                        "image": name,
                        "question": question.text,
                        "answer": question.answer,
                        "box": box,
                        "category": question.kind,
                        "group": name,
                    }
                )
            scene_number += 1
        write(folder / FILE, "".join(json.dumps(row) + "\n" for row in rows[:count]))
    return out / FILE
