"""Draws a sign, a digit and a letter of the lab's kind on a photograph of 16 megapixels.

    python examples/signs.py

Reads dandelions.jpg beside this file and writes signs.jpg there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from foveate.lab.materials import materials
from foveate.lab.objects import Pen, lettering
from foveate.picture.geometry import Box

HERE = Path(__file__).parent


def main() -> None:
    picture = Image.open(HERE / "dandelions.jpg").convert("RGB")
    pen = Pen(picture, np.random.default_rng(4), materials("test"))
    pen.sign("yellow", lettering("NORTH", "DejaVuSans-Bold", 260, (1.0, 1.0)), 3780, 2250)
    pen.plain("circle", "red", Box(2650, 2250, 3230, 2830), [("digit", 260)])
    pen.plain("square", "blue", Box(4400, 300, 4900, 800), [("letter", 240)])
    picture.save(HERE / "signs.jpg", quality=85)


if __name__ == "__main__":
    main()
