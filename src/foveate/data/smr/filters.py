"""What is left out: broken pictures, empty or jumbled texts, pictures of evaluation sets."""

from __future__ import annotations

import hashlib
import io
import unicodedata
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from foveate.data.shards import is_shards, open_rows
from foveate.errors import FoveateError
from foveate.picture.limits import LIMITS, Limits
from foveate.picture.reading import read_picture

MISSING = "its picture is missing"
BROKEN = "its picture is broken"
BLANK = "its picture shows nothing"
EMPTY = "its question or its answer is empty"
JUMBLED = "its text is jumbled"
LEAK = "its picture is in an evaluation set"
SIDE = 16  # pixels of a thumbnail
SMALLEST = 16  # pixels: a picture with a shorter side shows nothing
NEAR = 10  # levels of 255 that no pixel of two thumbnails may differ by
SHAPE = 0.02  # by which the ratios of their sides may differ
JUMBLE = 0.02  # of a text's characters that may be no characters
KINDS = ("Cc", "Co", "Cn", "Cs")  # control, private, unassigned, halves of a pair
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


@dataclass(frozen=True)
class Look:
    """What a picture looks like.

    Attributes:
        digest: of its pixels and size.
        ratio: width by height.
        thumbnail: (16 * 16,) uint8, its brightness.
    """

    digest: str
    ratio: float
    thumbnail: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.thumbnail.mean())


def look_at(picture: Path | bytes, limits: Limits = LIMITS) -> Look | str:
    """Decodes a picture; or says why it is left out."""
    try:
        if isinstance(picture, Path) and not picture.is_file():
            return MISSING
        image = read_picture(picture if isinstance(picture, Path) else io.BytesIO(picture), limits)
    except (FoveateError, OSError, ValueError):  # a name that cannot be one, say
        return BROKEN
    grey = image.convert("L")
    least, most = grey.getextrema()
    if least == most or min(image.size) < SMALLEST:
        return BLANK
    digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
    small = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.uint8).reshape(-1)
    return Look(digest, image.width / image.height, small)


class Evaluation:
    """The pictures of evaluation sets.

    A picture is one of them if its pixels are the same; or, as after saving it anew or in another size, if
    its shape is and no pixel of its thumbnail differs by more than 10 of 255 levels.

    Args:
        looks: of the pictures.
    """

    def __init__(self, looks: Sequence[Look]) -> None:
        ordered = sorted(looks, key=lambda look: look.mean)
        self.digests = {look.digest for look in ordered}
        self.means = [look.mean for look in ordered]
        self.ratios = np.array([look.ratio for look in ordered])
        self.thumbnails = np.array([look.thumbnail for look in ordered], np.int16).reshape(-1, SIDE * SIDE)

    def __len__(self) -> int:
        return len(self.means)

    def has(self, look: Look) -> bool:
        if look.digest in self.digests:
            return True
        first = bisect_left(self.means, look.mean - NEAR)
        last = bisect_left(self.means, look.mean + NEAR)
        alike = np.abs(self.ratios[first:last] / look.ratio - 1) <= SHAPE
        candidates = self.thumbnails[first:last][alike]
        return bool((np.abs(candidates - look.thumbnail).max(axis=1, initial=0) <= NEAR).any())


def pictures_of(path: Path) -> Iterator[tuple[str, Path | bytes]]:
    """The pictures of an evaluation set with their names: below a folder, or in the rows of Parquet files.

    Raises `FoveateError` if there are none.
    """
    count = 0
    if is_shards(path):
        rows = open_rows(path)
        for index in range(len(rows)):
            file, place = rows.place(index)
            for picture in _held(rows.record(index)):
                count += 1
                yield f"{file} {place}", picture
    elif path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.suffix.lower() in PICTURES:
                count += 1
                yield str(file), file
    else:
        raise FoveateError(f"there is no folder {path} with the pictures of an evaluation set")
    if not count:
        raise FoveateError(f"{path} holds no pictures: name what has those of an evaluation set")


def _held(value: Any) -> Iterator[bytes]:
    """The pictures that a row holds."""
    if isinstance(value, bytes):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _held(inner)


def text_problem(query: str, answer: str) -> str | None:
    """Why a sample's texts cannot be learnt; None if they can."""
    if not query.strip() or not answer.strip():
        return EMPTY
    for text in (query, answer):
        kinds = [unicodedata.category(character) for character in text]
        odd = sum(kind in KINDS for kind in kinds) - sum(map(text.count, "\n\t\r")) + text.count("\ufffd")
        if odd > JUMBLE * len(text) or "Cs" in kinds:  # tokenizers fail on halves of a character
            return JUMBLED
    return None
