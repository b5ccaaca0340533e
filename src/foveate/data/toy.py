"""Toy data: coloured squares and questions about them, to try a training run from end to end.

python -m foveate.data.toy FOLDER
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from foveate.files import explained, write

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 210, 40),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
}


def write_toy_data(folder: str | Path, n: int = 240, seed: int = 0) -> Path:
    """Writes `n` conversations to `folder`/toy.json (LLaVA's format) and their pictures to `folder`/pictures.

    Each picture, 48 to 120 pixels a side, shows one coloured square on grey. Every sixth conversation has no
    picture. The same seed gives the same files. Returns the path of toy.json.
    """
    folder = Path(folder)
    with explained(folder):
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    records = []
    for i in range(n):
        colour = rng.choice(list(COLOURS))
        if i % 6 == 5:
            records.append(_record(i, f"Spell {colour}.", "-".join(colour)))
            continue
        width, height = rng.randint(48, 120), rng.randint(48, 120)
        side = rng.randint(24, min(width, height) - 8)
        left, top = rng.randint(0, width - side), rng.randint(0, height - side)
        picture = Image.new("RGB", (width, height), (128, 128, 128))
        box = (left, top, left + side - 1, top + side - 1)
        ImageDraw.Draw(picture).rectangle(box, fill=COLOURS[colour])
        with explained(folder):
            picture.save(folder / "pictures" / f"{i:05}.png")
        question = "<image>\nWhat colour is the square?"
        records.append({"image": f"pictures/{i:05}.png", **_record(i, question, colour)})
    path = folder / "toy.json"
    write(path, json.dumps(records, indent=1))
    return path


def _record(i: int, question: str, answer: str) -> dict[str, object]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": f"{i:05}", "conversations": turns}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m foveate.data.toy FOLDER")
    write_toy_data(sys.argv[1])
