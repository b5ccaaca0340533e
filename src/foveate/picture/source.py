"""The original pictures of a batch, for connectors that look again: any box of them, as the tower sees it.

A view of a box shows what would be cut out if the whole picture were resized for it, with a triangle filter
("bilinear": averaging when it shrinks, interpolating when it enlarges) and without rounding. Only the box is
computed: row weights x pixels x column weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from foveate.errors import FoveateError
from foveate.layers import exact
from foveate.picture.geometry import Box, Canvas, Size

BAND = 32  # rows of a view that are computed together


class Look(NamedTuple):
    """A part of a picture to look at: `box`, in whole pixels of a canvas that the picture covers."""

    canvas: Canvas
    box: Box
    upsampled: bool = False  # whether the canvas is made first and the box enlarged from it


class Source:
    """The original pictures of a batch, and an encoder for parts of them.

    Args:
        pictures: (H, W, 3) bytes each.
        norms: (P, 2, 3) mean and standard deviation per channel, of pixels in 0..1.
        encode: views (V, 3, h, w), normalised -> (V, N, C).
        memory: per picture the features (N, C) of parts looked at before, the latest last; filled, never
            emptied. Identical pictures may share one. Each entry has storage of its own, so that dropping it
            frees memory.

    Attributes:
        looked: per picture, all parts that were requested.
        encoded: per picture, how many of them were not in memory.

    Raises:
        FoveateError: numbers that do not agree.
    """

    def __init__(
        self,
        pictures: Sequence[Tensor],
        norms: Tensor,
        encode: Callable[[Tensor], Tensor],
        memory: Sequence[dict[Look, Tensor]] | None = None,
    ) -> None:
        self.pictures, self.norms, self.encode = list(pictures), norms, encode
        self._lasts = memory is not None  # the memory outlives this batch and must not keep its tensor
        self.memory = [{} for _ in self.pictures] if memory is None else list(memory)
        self.looked: list[set[Look]] = [set() for _ in self.pictures]
        self.encoded = [0] * len(self.pictures)
        if not len(self.pictures) == len(self.norms) == len(self.memory):
            raise FoveateError(
                f"{len(self.pictures)} original pictures with {len(self.norms)} norms and {len(self.memory)} "
                "memories: give one of each per picture"
            )

    @classmethod
    def unpacked(
        cls, pixels: Tensor, sizes: Tensor, norms: Tensor, encode: Callable[[Tensor], Tensor]
    ) -> Source:
        """From `source_pixels` (n,) bytes, picture after picture, and `image_sizes` (P, 2)."""
        shapes = [(height, width, 3) for height, width in sizes.tolist()]
        counts = [math.prod(shape) for shape in shapes]
        if sum(counts) != len(pixels):
            raise FoveateError(f"image_sizes call for {sum(counts)} source_pixels, not {len(pixels)}")
        parts = pixels.split(counts)
        return cls([part.view(shape) for part, shape in zip(parts, shapes, strict=True)], norms, encode)

    def look(self, wanted: Sequence[tuple[int, Look]], side: Size) -> Tensor:
        """Features (L, N, C) of parts of the pictures, each shown to the tower at `side`.

        `wanted` has the number of each part's picture. The tower is called at most once, for the parts that
        are not in memory yet.
        """
        new: dict[tuple[int, Look], int] = {}  # pictures that share a memory count as one
        for picture, look in wanted:
            self.looked[picture].add(look)
            if look not in self.memory[picture]:
                new.setdefault((id(self.memory[picture]), look), picture)
        if new:
            views = torch.stack([self.view(picture, look, side) for (_, look), picture in new.items()])
            for ((_, look), picture), features in zip(new.items(), self.encode(views), strict=True):
                self.memory[picture][look] = features.clone() if self._lasts else features
                self.encoded[picture] += 1
        for picture, look in wanted:  # moves them to the end
            self.memory[picture][look] = self.memory[picture].pop(look)
        return torch.stack([self.memory[picture][look] for picture, look in wanted])

    def view(self, picture: int, look: Look, side: Size) -> Tensor:
        """One part as the tower gets it, (3, h, w), normalised."""
        return view_of(self.pictures[picture], self.norms[picture], look, side)

    def pixels(self, picture: int, look: Look, side: Size) -> Tensor:
        """One part of a picture (3, h, w), float, from 0 to 255."""
        return pixels_of(self.pictures[picture], self.norms[picture], look, side)


def view_of(pixels: Tensor, norms: Tensor, look: Look, side: Size) -> Tensor:
    """A part of a picture (H, W, 3) as the tower gets it, (3, h, w); `norms` (2, 3), of this picture."""
    mean, std = norms.float()[:, :, None, None]
    return (pixels_of(pixels, norms, look, side) / 255 - mean) / std


def pixels_of(pixels: Tensor, norms: Tensor, look: Look, side: Size) -> Tensor:
    """As `view_of`, but float from 0 to 255."""
    with exact(pixels):
        return _resampled(pixels, norms[0], look, side)


def _resampled(pixels: Tensor, mean: Tensor, look: Look, side: Size) -> Tensor:
    rows, row_weights = _axis(pixels.shape[0], look, side, 0)
    columns, column_weights = _axis(pixels.shape[1], look, side, 1)
    narrow = _banded(row_weights, pixels[rows, columns])  # (y, x, 3) -> (h, x, 3)
    seen = _banded(column_weights, narrow.transpose(0, 1)).permute(2, 1, 0)  # (w, h, 3) -> (3, h, w)
    if look.canvas.source == (0, 0, pixels.shape[1], pixels.shape[0]):
        return seen
    fill = torch.zeros(3)
    if look.canvas.fill == "mean":
        fill = (255 * mean.float()).floor()
    down, across = (torch.from_numpy(n.sum(1)).to(seen) for n in (row_weights, column_weights))
    padding = 1 - down[:, None] * across  # (h, w)
    return seen + fill.to(seen)[:, None, None] * padding


def _banded(weights: np.ndarray, pixels: Tensor) -> Tensor:
    """Weights (m, n) x pixels (n, ...) -> (m, ...), float, in bands of rows that read only what they need."""
    parts = []
    for start in range(0, len(weights), BAND):
        band = weights[start : start + BAND]
        used = np.flatnonzero(band.any(0))
        first, last = (used[0], used[-1] + 1) if len(used) else (0, 0)
        part = pixels[first:last].float().flatten(1)
        parts.append(torch.from_numpy(band[:, first:last].copy()).to(part) @ part)
    return torch.cat(parts).unflatten(1, pixels.shape[1:])


def _axis(pixels: int, look: Look, side: Size, axis: int) -> tuple[slice, np.ndarray]:
    """The rows (axis 0) or columns (1) of a picture that a view reads, and weights (view, picture)."""
    source, box, canvas = look.canvas.source, look.box, look.canvas.size[axis]
    left, right = (int(n) for n in ((source.top, source.bottom), (source.left, source.right))[axis])
    first, last = (float(n) for n in ((box.top, box.bottom), (box.left, box.right))[axis])
    step = (right - left) / canvas  # pixels of the picture per pixel of the canvas
    if not look.upsampled:
        return _filter(pixels, (left, right), left + first * step, (last - first) * step, side[axis])
    part, enlarge = _filter(canvas, (0, canvas), first, last - first, side[axis])
    place, shrink = _filter(pixels, (left, right), left, right - left, canvas)
    return place, enlarge @ shrink[part]


def _filter(
    pixels: int, extent: tuple[int, int], start: float, length: float, out: int
) -> tuple[slice, np.ndarray]:
    """Triangle filter: resizes `length` pixels of an axis, from `start` on, to `out`.

    The axis has length `extent`, but only 0..pixels exist: weights of padding are left out.
    Returns the pixels that are read and their weights (out, n), float32.
    """
    scale = length / out
    reach = max(scale, 1.0)
    centres = start + (np.arange(out) + 0.5) * scale
    first = max(math.floor(centres[0] - reach), extent[0])
    last = min(math.ceil(centres[-1] + reach), extent[1])
    weights = (1 - np.abs(np.arange(first, last) + 0.5 - centres[:, None]) / reach).clip(min=0)
    weights /= weights.sum(1, keepdims=True)
    here = slice(min(max(first, 0), pixels), max(min(last, pixels), 0))
    return here, weights[:, here.start - first : here.stop - first].astype(np.float32)
