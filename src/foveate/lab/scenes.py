"""A seed -> a picture with known objects: shapes on a crop of a photograph, with small glyphs on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from foveate.errors import FoveateError
from foveate.lab.levels import Level
from foveate.lab.materials import SPLITS, Materials, Split, materials
from foveate.lab.objects import COLOURS, PLAIN, SIGN, Pen, Thing
from foveate.picture.geometry import Box, Size

CELLS = (
    "top-left", "top", "top-right", "left", "centre", "right", "bottom-left", "bottom", "bottom-right",
)  # fmt: skip

CONTRAST = 0.45  # of the photograph, so that objects stand out
NOISE = 6.0  # standard deviation of the pixel noise, of 255
GAP = 3  # pixels between objects
CELL_MARGIN = 1 / 24  # of the side: no object's centre is nearer to a border between cells
PLACING_TRIES = 80
LEAST_BACKGROUND = 90  # least side of the part of a photograph behind the objects


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


def make_scene(
    level: Level,
    view: int,
    magnify: float,
    split: Split,
    seed: int,
    index: int,
    photographs: Sequence[np.ndarray] = (),
) -> Scene:
    """Scene number `index`; the same arguments give the same scene.

    Args:
        level: what it holds.
        view: side of the tower's view, pixels; the picture is `level.ratio` times as large.
        magnify: factor on the level's sizes of objects and glyphs.
        split: the split whose photographs, digits and words are used.
        seed: of the whole set.
        index: within the set.
        photographs: (H, W, 3) bytes each, instead of the split's.

    Raises `FoveateError` for photographs that are too small.
    """
    rng, stock = np.random.default_rng([seed, SPLITS.index(split), index]), materials(split)
    if photographs:
        if min(min(photograph.shape[:2]) for photograph in photographs) < LEAST_BACKGROUND:
            raise FoveateError(f"a background needs {LEAST_BACKGROUND} x {LEAST_BACKGROUND} pixels or more")
        stock = replace(stock, photographs=tuple(photographs))
    drawer = _Drawer(rng, stock, level, view * level.ratio, magnify)
    return drawer.scene()


class _Drawer:
    """One scene while it is being drawn. Every choice comes from `rng`, in a fixed order."""

    def __init__(
        self, rng: np.random.Generator, stock: Materials, level: Level, side: int, magnify: float
    ) -> None:
        self.rng, self.stock, self.level, self.side, self.magnify = rng, stock, level, side, magnify
        self.grain = rng.uniform(0, NOISE) if level.wild else NOISE
        self.pen = Pen(self._background(), rng, stock)
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
        pixels = np.asarray(self.pen.picture, dtype=np.float32)
        pixels = pixels + self.grain * rng.standard_normal(pixels.shape, dtype=np.float32)
        return Scene(np.clip(pixels + 0.5, 0, 255).astype(np.uint8), tuple(things))

    def _background(self) -> Image.Image:
        rng = self.rng
        photograph = self.stock.photographs[rng.integers(len(self.stock.photographs))]
        height, width = photograph.shape[:2]
        side = int(rng.integers(LEAST_BACKGROUND, min(height, width) + 1))
        top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
        crop = photograph[top : top + side, left : left + side]
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        contrast, middle = CONTRAST, 128.0
        if self.level.wild:
            crop = np.rot90(crop, int(rng.integers(4)))[..., rng.permutation(3)]
            contrast, middle = rng.uniform(CONTRAST, 1), rng.uniform(64, 192)
        values = np.arange(256, dtype=np.float32)  # of a byte
        pale = np.clip(middle + contrast * (values - 128), 0, 255).astype(np.uint8)
        return Image.fromarray(pale[crop]).resize((self.side, self.side), Image.Resampling.BILINEAR)

    def _between(self, bounds: tuple[int, int]) -> int:
        return round(int(self.rng.integers(bounds[0], bounds[1] + 1)) * self.magnify)

    def _thing(self, shape: str, colour: str) -> Thing | None:
        if shape == SIGN:
            lettering = self.pen.random_lettering(self._between(self.level.glyph))
            box = place(self.rng, *lettering.size, Size(self.side, self.side), self.taken)
            return None if box is None else self.pen.sign(colour, lettering, int(box.left), int(box.top))
        side = self._between(self.level.side)
        kinds = ["letter", "digit"] if self.rng.random() < 0.5 else ["digit", "letter"]
        carried = [(kind, self._between(self.level.glyph)) for kind in kinds[: 1 + self.level.both]]
        box = place(self.rng, side, side, Size(self.side, self.side), self.taken)
        return None if box is None else self.pen.plain(shape, colour, box, carried)


def place(rng: np.random.Generator, width: int, height: int, picture: Size, taken: list[Box]) -> Box | None:
    """A free place anywhere on the picture, independent of tiles or patches, added to `taken`.

    None if there is none. No centre is near a border between the picture's ninths.
    """
    if width > picture.width - 2 or height > picture.height - 2:
        return None
    for _ in range(PLACING_TRIES):
        left = int(rng.integers(1, picture.width - width))
        top = int(rng.integers(1, picture.height - height))
        across, down = (left + width / 2) / picture.width, (top + height / 2) / picture.height
        if any(abs(part - n / 3) < CELL_MARGIN for part in (across, down) for n in (1, 2)):
            continue
        box = Box(left, top, left + width, top + height)
        if not any(_near(box, other) for other in taken):
            taken.append(box)
            return box
    return None


def _near(a: Box, b: Box) -> bool:
    return (
        a.left < b.right + GAP
        and b.left < a.right + GAP
        and a.top < b.bottom + GAP
        and b.top < a.bottom + GAP
    )
