"""A seed -> a picture with known objects: shapes on a crop of a photograph, with small glyphs on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from foveate.geometry import Box
from foveate.lab.levels import Level
from foveate.lab.materials import DIGITS, FONTS, LETTERS, SPLITS, Materials, Split, letter_mask, materials

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
ROWS = ("top", "middle", "bottom")
CELLS = (
    "top-left", "top", "top-right", "left", "centre", "right", "bottom-left", "bottom", "bottom-right",
)  # fmt: skip

GLYPH_HEIGHT = {"triangle": 0.64}  # where glyphs stand, as a part of the height; others: in the middle
CONTRAST = 0.45  # of the photograph, so that objects stand out
NOISE = 6.0  # standard deviation of the pixel noise, of 255
GAP = 3  # pixels between objects
CELL_MARGIN = 1 / 24  # of the side: no object's centre is nearer to a border between cells
PLACING_TRIES = 80
OVERSAMPLING = 4


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
        letter, digit, word: what it carries, lower case; None where it carries none.
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
class Scene:
    """A picture (H, W, 3) bytes and the objects on it."""

    picture: np.ndarray
    things: tuple[Thing, ...]

    def cell(self, thing: Thing) -> str:
        """The name of the ninth of the picture in which the object's centre lies."""
        side = len(self.picture)
        column = int((thing.box.left + thing.box.right) / 2 * 3 // side)
        row = int((thing.box.top + thing.box.bottom) / 2 * 3 // side)
        return CELLS[3 * row + column]


def make_scene(level: Level, view: int, magnify: float, split: Split, seed: int, index: int) -> Scene:
    """Scene number `index`; the same arguments give the same scene.

    Args:
        level: what is on it.
        view: side of the tower's view, pixels; the picture is `level.ratio` times as large.
        magnify: factor on the level's sizes of objects and glyphs.
        split: whose photographs, digits and words are used.
        seed: of the whole set.
        index: within the set.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    drawer = _Drawer(rng, materials(split), level, view * level.ratio, magnify)
    return drawer.scene()


class _Drawer:
    """One scene while it is being drawn. Every choice comes from `rng`, in a fixed order."""

    def __init__(
        self, rng: np.random.Generator, stock: Materials, level: Level, side: int, magnify: float
    ) -> None:
        self.rng, self.stock, self.level, self.side, self.magnify = rng, stock, level, side, magnify
        self.picture = self._background()
        self.taken: list[Box] = []

    def scene(self) -> Scene:
        rng, level = self.rng, self.level
        wanted = int(rng.integers(level.objects[0], level.objects[1] + 1))
        pairs: set[tuple[str, str]] = set()
        things = []
        while len(pairs) < wanted:
            shape = SIGN if rng.random() < level.signs else str(rng.choice(PLAIN))
            colour = str(rng.choice(list(COLOURS)))
            if (shape, colour) in pairs:
                continue
            pairs.add((shape, colour))
            thing = self._thing(shape, colour)
            if thing is not None:  # a full picture takes fewer objects
                things.append(thing)
        pixels = np.asarray(self.picture, dtype=np.float32)
        pixels = pixels + NOISE * rng.standard_normal(pixels.shape, dtype=np.float32)
        return Scene(np.clip(pixels + 0.5, 0, 255).astype(np.uint8), tuple(things))

    def _background(self) -> Image.Image:
        rng = self.rng
        photograph = self.stock.photographs[rng.integers(len(self.stock.photographs))]
        height, width = photograph.shape[:2]
        side = int(rng.integers(90, min(height, width) + 1))
        top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
        crop = photograph[top : top + side, left : left + side]
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        pale = (128 + CONTRAST * (crop.astype(np.float32) - 128)).astype(np.uint8)
        return Image.fromarray(pale).resize((self.side, self.side), Image.Resampling.BILINEAR)

    def _between(self, bounds: tuple[int, int]) -> int:
        return round(int(self.rng.integers(bounds[0], bounds[1] + 1)) * self.magnify)

    def _thing(self, shape: str, colour: str) -> Thing | None:
        ink = (16, 16, 16) if colour in DARK_INK else (250, 250, 250)
        word = str(self.rng.choice(self.stock.words)) if shape == SIGN else None
        if word is not None:
            masks = self._word_masks(word)
            width = (
                sum(mask.width for mask in masks)
                + (len(masks) - 1) * self._spacing
                + 2 * self._between((4, 6))
            )
            height = max(mask.height for mask in masks) + 2 * self._between((4, 6))
        else:
            width = height = self._between(self.level.side)
        box = self._place(width, height)
        if box is None:
            return None
        self._fill(shape, COLOURS[colour], box)
        if word is not None:
            glyphs = self._write_word(word, masks, box, ink)
            return Thing(shape, colour, box, None, None, word.lower(), glyphs)
        letter, digit, glyphs = self._write_glyphs(box, GLYPH_HEIGHT.get(shape, 0.5), ink)
        return Thing(shape, colour, box, letter, digit, None, glyphs)

    @property
    def _spacing(self) -> int:
        return max(1, round(self.magnify))

    def _place(self, width: int, height: int) -> Box | None:
        """A free place anywhere on the picture, with no regard to tiles or patches."""
        margin = self.side * CELL_MARGIN
        for _ in range(PLACING_TRIES):
            left = int(self.rng.integers(1, self.side - width))
            top = int(self.rng.integers(1, self.side - height))
            centres = (left + width / 2, top + height / 2)
            if any(abs(c - n * self.side / 3) < margin for c in centres for n in (1, 2)):
                continue
            box = Box(left, top, left + width, top + height)
            if not any(_near(box, other) for other in self.taken):
                self.taken.append(box)
                return box
        return None

    def _fill(self, shape: str, colour: tuple[int, int, int], box: Box) -> None:
        width, height = int(box.width), int(box.height)
        large = (width * OVERSAMPLING, height * OVERSAMPLING)
        mask = Image.new("L", large)
        _OUTLINES[shape](ImageDraw.Draw(mask), large[0] - 1, large[1] - 1)
        shade = tuple(int(np.clip(c + self.rng.integers(-12, 13), 0, 255)) for c in colour)
        self.picture.paste(shade, box.rounded(), mask.resize((width, height), Image.Resampling.BOX))

    def _word_masks(self, word: str) -> list[Image.Image]:
        name, size = str(self.rng.choice(FONTS)), self._between(self.level.glyph)
        return [letter_mask(letter, name, size) for letter in word]

    def _write_word(
        self, word: str, masks: list[Image.Image], box: Box, ink: tuple[int, int, int]
    ) -> tuple[Glyph, ...]:
        width = sum(mask.width for mask in masks) + (len(masks) - 1) * self._spacing
        left = int(box.left) + (int(box.width) - width) // 2
        bottom = int(box.bottom) - (int(box.height) - max(mask.height for mask in masks)) // 2
        glyphs = []
        for letter, mask in zip(word, masks, strict=True):
            glyphs.append(self._stamp(letter, mask, left, bottom - mask.height, ink))
            left += mask.width + self._spacing
        return tuple(glyphs)

    def _write_glyphs(
        self, box: Box, height: float, ink: tuple[int, int, int]
    ) -> tuple[str | None, str | None, tuple[Glyph, ...]]:
        """A letter, a digit or both, near the middle of the object, where every shape is filled."""
        kinds = ["letter", "digit"] if self.rng.random() < 0.5 else ["digit", "letter"]
        found: dict[str, str] = {}
        glyphs = []
        x, y = (box.left + box.right) / 2, box.top + height * float(box.height)
        offsets = [-0.21, 0.21] if self.level.both else [0.0]
        for kind, offset in zip(kinds, offsets, strict=False):
            character, mask = self._letter() if kind == "letter" else self._digit()
            jitter = self.rng.uniform(-0.06, 0.06, 2) * float(box.width)
            left = round(float(x) + offset * float(box.width) + jitter[0] - mask.width / 2)
            top = round(float(y) + jitter[1] - mask.height / 2)
            glyphs.append(self._stamp(character, mask, left, top, ink))
            found[kind] = character.lower()
        return found.get("letter"), found.get("digit"), tuple(glyphs)

    def _letter(self) -> tuple[str, Image.Image]:
        letter = LETTERS[self.rng.integers(len(LETTERS))]
        return letter, letter_mask(letter, str(self.rng.choice(FONTS)), self._between(self.level.glyph))

    def _digit(self) -> tuple[str, Image.Image]:
        number = int(self.rng.integers(10))
        drawings = self.stock.digits[number]
        side = self._between(self.level.glyph) - 1
        mask = Image.fromarray(drawings[self.rng.integers(len(drawings))])
        return DIGITS[number], mask.resize((side, side), Image.Resampling.BICUBIC)

    def _stamp(self, character: str, mask: Image.Image, left: int, top: int, ink: Any) -> Glyph:
        self.picture.paste(ink, (left, top), mask)
        return Glyph(character.lower(), Box(left, top, left + mask.width, top + mask.height))


def _near(a: Box, b: Box) -> bool:
    return (
        a.left < b.right + GAP
        and b.left < a.right + GAP
        and a.top < b.bottom + GAP
        and b.top < a.bottom + GAP
    )


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
