"""Draws a sign, a digit and a letter of the lab's kind on a photograph.

    python examples/signs.py

Reads dandelions.jpg beside this file and writes a square of it, 9 megapixels, as signs.jpg there. On a square
the embedded model's nine tiles have no padding, and each thing lies in one of them.
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
    picture = Image.open(HERE / "dandelions.jpg").convert("RGB").crop((800, 0, 3788, 2988))
    pen = Pen(picture, np.random.default_rng(4), materials("test"))
    pen.sign("yellow", lettering("OPEN", "DejaVuSans-Bold", 170, (1.0, 1.0)), 60, 2350)
    pen.plain("circle", "red", Box(2200, 2200, 2780, 2780), [("digit", 260)])
    pen.plain("square", "blue", Box(2300, 300, 2800, 800), [("letter", 240)])
    picture.save(HERE / "signs.jpg", quality=85)


if __name__ == "__main__":
    main()
