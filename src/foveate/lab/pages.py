"""Pages full of letters and digits: the tower learns to read on them before it sees scenes.

A patch embedding is one linear map, so attention must combine a glyph that lies across patches, which it does
not learn by itself in the available time. Pages teach it: at first every glyph lies in the middle of a patch,
then further and further away, until it lies anywhere.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from foveate.lab.materials import DIGITS, FONTS, LETTERS, Materials, letter_mask
from foveate.lab.objects import COLOURS, DARK_INK, SHADE
from foveate.lab.scenes import NOISE

GLYPH_SIZES = (10, 11)  # font pixels at `magnify` 1, as in the levels
NEAR = 0.6  # fraction of a glyph's size: patches whose centre is this close to the glyph's get its label


class Page(NamedTuple):
    """Picture (side, side, 3) bytes; characters; their boxes (n, 4), pixels; their colours."""

    picture: np.ndarray
    characters: list[str]
    boxes: np.ndarray
    colours: list[str]


def make_page(
    rng: np.random.Generator, stock: Materials, side: int, patch: int, magnify: float, astray: int
) -> Page:
    """A page of coloured squares with a glyph each, up to `astray` pixels away from the middle of a patch."""
    low, high = (round(size * magnify) for size in GLYPH_SIZES)
    spacing = patch * math.ceil(1.25 * high / patch)
    shift = patch // 2 - spacing // 2 + patch * rng.integers(spacing // patch, size=2)
    shift = (shift + rng.integers(-astray, astray + 1, size=2)) % spacing - spacing
    picture = Image.new("RGB", (side, side))
    characters, boxes, colours = [], [], []
    for top in range(int(shift[1]), side, spacing):
        for left in range(int(shift[0]), side, spacing):
            colour = list(COLOURS)[rng.integers(len(COLOURS))]
            shade = tuple(int(np.clip(c + rng.integers(-SHADE, SHADE + 1), 0, 255)) for c in COLOURS[colour])
            picture.paste(shade, (left, top, left + spacing, top + spacing))
            if rng.random() < 0.5:
                character = LETTERS[rng.integers(len(LETTERS))]
                size = int(rng.integers(low, high + 1))
                mask = letter_mask(character, FONTS[rng.integers(len(FONTS))], size)
            else:
                number, size = int(rng.integers(10)), int(rng.integers(low - 1, high))
                character, drawings = DIGITS[number], stock.digits[number]
                mask = Image.fromarray(drawings[rng.integers(len(drawings))])
                mask = mask.resize((size, size), Image.Resampling.BICUBIC)
            off = rng.integers(-1, 2, size=2) if astray > 1 else (0, 0)
            x = left + (spacing - mask.width) // 2 + int(off[0])
            y = top + (spacing - mask.height) // 2 + int(off[1])
            picture.paste((16, 16, 16) if colour in DARK_INK else (250, 250, 250), (x, y), mask)
            characters.append(character.lower())
            boxes.append((x, y, x + mask.width, y + mask.height))
            colours.append(colour)
    pixels = np.asarray(picture, dtype=np.float32)
    pixels = pixels + NOISE * rng.standard_normal(pixels.shape, dtype=np.float32)
    picture_bytes = np.clip(pixels + 0.5, 0, 255).astype(np.uint8)
    return Page(picture_bytes, characters, np.array(boxes), colours)


def page_labels(page: Page, grid: int, glyphs: str) -> np.ndarray:
    """Colour and glyph of every patch, (2, grid * grid) classes; 0: no glyph is near enough to read."""
    side = len(page.picture)
    middles = (np.arange(grid) + 0.5) * side / grid
    x, y = np.tile(middles, grid), np.repeat(middles, grid)
    left, top, right, bottom = page.boxes.T
    apart = np.maximum(abs(x[:, None] - (left + right) / 2), abs(y[:, None] - (top + bottom) / 2))
    nearest = apart.argmin(1)
    whole = (left >= -1) & (top >= -1) & (right <= side + 1) & (bottom <= side + 1)
    size = np.maximum(right - left, bottom - top)
    legible = whole[nearest] & (apart.min(1) <= NEAR * size[nearest])
    classes = np.array([1 + glyphs.index(character) for character in page.characters])
    colours = np.array([1 + list(COLOURS).index(colour) for colour in page.colours])
    return np.stack([colours[nearest], np.where(legible, classes[nearest], 0)])
