"""Scenes to look at: the picture, and the tower's base view of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from foveate.lab.levels import Level
from foveate.lab.questions import ask_about
from foveate.lab.scales import Scale
from foveate.lab.scenes import Scene, make_scene

SIDE = 432  # size of a shown scene, in pixels
LINE = 13  # height of a line of text, in pixels


def scenes(
    level: Level, scale: Scale, seed: int = 0, count: int = 6, photographs: Sequence[np.ndarray] = ()
) -> list[Scene]:
    """Test scenes; with given photographs (H, W, 3) instead of the lab's."""
    return [make_scene(level, scale.view, scale.magnify, "test", seed, i, photographs) for i in range(count)]


def gallery(level: Level, scale: Scale, shown: Sequence[Scene]) -> Image.Image:
    """A column per scene: picture with boxes, base view, questions and answers."""
    columns = []
    for i, scene in enumerate(shown):
        asked = ask_about(scene, level.questions, np.random.default_rng(i))
        column = Image.new("RGB", (SIDE, 2 * SIDE + LINE * (sum(level.questions.values()) + 1)), "white")
        picture = Image.fromarray(scene.picture)
        low = picture.resize((scale.view, scale.view), Image.Resampling.BICUBIC)
        zoom = SIDE / picture.width
        column.paste(picture.resize((SIDE, SIDE), Image.Resampling.NEAREST), (0, 0))
        column.paste(low.resize((SIDE, SIDE), Image.Resampling.NEAREST), (0, SIDE))
        draw = ImageDraw.Draw(column)
        for thing in scene.things:
            draw.rectangle([float(n) * zoom for n in thing.box], outline="black")
            for glyph in thing.glyphs:
                draw.rectangle([float(n) * zoom for n in glyph.box], outline="grey")
        for line, question in enumerate(asked):
            draw.text((4, 2 * SIDE + LINE * line), f"{question.text}  {question.answer}", fill="black")
        columns.append(column)
    whole = Image.new("RGB", (len(columns) * (SIDE + 4), columns[0].height), "white")
    for i, column in enumerate(columns):
        whole.paste(column, (i * (SIDE + 4), 0))
    return whole
