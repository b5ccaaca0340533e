"""The objects of the lab: coloured shapes with a letter or a digit, and signs with a word."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from foveate.lab.materials import DIGITS, FONTS, LETTERS, Materials, letter_mask
from foveate.picture.geometry import Box

COLOURS = {
    "red": (206, 44, 44),
    "green": (40, 150, 62),
    "blue": (48, 84, 206),
    "yellow": (236, 212, 56),
    "purple": (140, 60, 176),
    "white": (240, 240, 240),
}
DARK_INK = ("yellow", "white")
PLAIN = ("circle", "square", "triangle", "diamond", "cross")
SIGN = "sign"  # a wide rectangle that carries a word
SHAPES = (*PLAIN, SIGN)

GLYPH_HEIGHT = {"triangle": 0.64}  # height of the glyphs' middle, as a fraction; others: the middle
GLYPH_PART = 0.5  # bound on a glyph's height, as a fraction of its object's
SIDE_BY_SIDE = 0.21  # fraction of the object's width: distance of each of two glyphs from the middle
JITTER = 0.06  # fraction of the object's width: a glyph's random shift
SHADE = 12  # of 255: largest difference of a colour from its namesake
OVERSAMPLING, LARGE = 4, 512  # outlines up to LARGE pixels are drawn larger and reduced


@dataclass(frozen=True)
class Glyph:
    """One letter or digit: its character and box, in pixels of the picture."""

    character: str
    box: Box


@dataclass(frozen=True)
class Thing:
    """One object.

    Attributes:
        shape: one of `SHAPES`.
        colour: one of `COLOURS`.
        box: the object's box, pixels of the picture.
        letter, digit, word: what it carries, lower case; None if it has none.
        glyphs: every letter and digit on it.
    """

    shape: str
    colour: str
    box: Box
    letter: str | None
    digit: str | None
    word: str | None
    glyphs: tuple[Glyph, ...]


@dataclass(frozen=True)
class Lettering:
    """A word in one font, and the sign around it: (width, height) in pixels."""

    word: str
    masks: tuple[Image.Image, ...]
    spacing: int
    size: tuple[int, int]

    @property
    def written(self) -> tuple[int, int]:
        """Width and height of the word alone."""
        across = sum(mask.width for mask in self.masks) + (len(self.masks) - 1) * self.spacing
        return across, max(mask.height for mask in self.masks)


def lettering(word: str, font: str, size: int, margins: tuple[float, float]) -> Lettering:
    """`word` at `size` font pixels; `margins`, summed over both sides, are fractions of that size."""
    masks, spacing = tuple(letter_mask(letter, font, size) for letter in word), max(1, round(size / 10))
    bare = Lettering(word, masks, spacing, (0, 0))
    width, height = (n + round(margin * size) for n, margin in zip(bare.written, margins, strict=True))
    return Lettering(word, masks, spacing, (width, height))


class Pen:
    """Draws objects onto a picture. Every choice comes from `rng`, in a fixed order."""

    def __init__(self, picture: Image.Image, rng: np.random.Generator, stock: Materials) -> None:
        self.picture, self.rng, self.stock = picture, rng, stock

    def random_lettering(self, size: int) -> Lettering:
        """Any of the words in any font."""
        word, font = self.stock.word(self.rng), str(self.rng.choice(FONTS))
        return lettering(word, font, size, tuple(self.rng.uniform(0.8, 1.2, 2)))

    def sign(self, colour: str, what: Lettering, left: int, top: int) -> Thing:
        box = Box(left, top, left + what.size[0], top + what.size[1])
        self._fill(SIGN, colour, box)
        width, height = what.written
        x, bottom = left + (what.size[0] - width) // 2, top + what.size[1] - (what.size[1] - height) // 2
        glyphs = []
        for letter, mask in zip(what.word, what.masks, strict=True):
            glyphs.append(self._stamp(letter, mask, x, bottom - mask.height, colour))
            x += mask.width + what.spacing
        return Thing(SIGN, colour, box, None, None, what.word.lower(), tuple(glyphs))

    def plain(self, shape: str, colour: str, box: Box, carried: Sequence[tuple[str, int]]) -> Thing:
        """A shape with one or two glyphs near its middle, which is filled in every shape.

        `carried` are kinds, `letter` or `digit`, with their size in font pixels.
        """
        self._fill(shape, colour, box)
        x, y = (box.left + box.right) / 2, box.top + GLYPH_HEIGHT.get(shape, 0.5) * float(box.height)
        offsets = (-SIDE_BY_SIDE, SIDE_BY_SIDE) if len(carried) == 2 else (0.0,)
        found: dict[str, str] = {}
        glyphs = []
        for (kind, size), offset in zip(carried, offsets, strict=True):
            size = min(size, int(box.height * GLYPH_PART))
            character, mask = self._letter(size) if kind == "letter" else self._digit(size)
            jitter = self.rng.uniform(-JITTER, JITTER, 2) * float(box.width)
            left = round(float(x) + offset * float(box.width) + jitter[0] - mask.width / 2)
            top = round(float(y) + jitter[1] - mask.height / 2)
            glyphs.append(self._stamp(character, mask, left, top, colour))
            found[kind] = character.lower()
        return Thing(shape, colour, box, found.get("letter"), found.get("digit"), None, tuple(glyphs))

    def _fill(self, shape: str, colour: str, box: Box) -> None:
        width, height = int(box.width), int(box.height)
        times = OVERSAMPLING if max(width, height) <= LARGE else 1
        mask = Image.new("L", (width * times, height * times))
        _OUTLINES[shape](ImageDraw.Draw(mask), mask.width - 1, mask.height - 1)
        shade = tuple(int(np.clip(c + self.rng.integers(-SHADE, SHADE + 1), 0, 255)) for c in COLOURS[colour])
        self.picture.paste(shade, box.rounded(), mask.resize((width, height), Image.Resampling.BOX))

    def _letter(self, size: int) -> tuple[str, Image.Image]:
        letter = LETTERS[self.rng.integers(len(LETTERS))]
        return letter, letter_mask(letter, str(self.rng.choice(FONTS)), size)

    def _digit(self, size: int) -> tuple[str, Image.Image]:
        number = int(self.rng.integers(10))
        drawings = self.stock.digits[number]
        mask = Image.fromarray(drawings[self.rng.integers(len(drawings))])
        return DIGITS[number], mask.resize((size - 1, size - 1), Image.Resampling.BICUBIC)

    def _stamp(self, character: str, mask: Image.Image, left: int, top: int, colour: str) -> Glyph:
        ink = (16, 16, 16) if colour in DARK_INK else (250, 250, 250)
        self.picture.paste(ink, (left, top), mask)
        return Glyph(character.lower(), Box(left, top, left + mask.width, top + mask.height))


def _circle(draw: ImageDraw.ImageDraw, w: int, h: int) -> None:
    draw.ellipse((0, 0, w, h), fill=255)


def _rectangle(draw: ImageDraw.ImageDraw, w: int, h: int) -> None:
    draw.rectangle((0, 0, w, h), fill=255)


def _triangle(draw: ImageDraw.ImageDraw, w: int, h: int) -> None:
    draw.polygon([(w / 2, 0), (w, h), (0, h)], fill=255)


def _diamond(draw: ImageDraw.ImageDraw, w: int, h: int) -> None:
    draw.polygon([(w / 2, 0), (w, h / 2), (w / 2, h), (0, h / 2)], fill=255)


def _cross(draw: ImageDraw.ImageDraw, w: int, h: int) -> None:
    arm = math.floor(w * 0.24)
    draw.rectangle((arm, 0, w - arm, h), fill=255)
    draw.rectangle((0, arm, w, h - arm), fill=255)


_OUTLINES: dict[str, Callable[[ImageDraw.ImageDraw, int, int], None]] = {
    "circle": _circle,
    "square": _rectangle,
    "triangle": _triangle,
    "diamond": _diamond,
    "cross": _cross,
    SIGN: _rectangle,
}
