"""The original pictures of a batch, for connectors that look again: any box of them, as the tower sees it.

A view of a box shows what would be cut out if the whole picture were resized for it, with a triangle filter
("bilinear": averaging when it shrinks, interpolating when it enlarges) and without rounding. Only the box is
computed: row weights x pixels x column weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from foveate.errors import FoveateError
from foveate.layers import exact
from foveate.picture.geometry import Box, Canvas, Size

BAND = 32  # rows of a view that are computed together,
MOST = 2**20  # unless they read more numbers than this


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

    def repeated(self, owners: Sequence[int]) -> Source:
        """A source in which picture q is this one's picture `owners[q]`, with its memory."""
        return Source(
            [self.pictures[p] for p in owners],
            self.norms[list(owners)],
            self.encode,
            [self.memory[p] for p in owners],
        )

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


def views_of(pictures: Tensor, norms: Tensor, look: Look, side: Size) -> Tensor:
    """The same part of pictures of one size (n, H, W, 3), (n, 3, h, w); `norms` (2, 3)."""
    if look.canvas.source != (0, 0, pictures.shape[2], pictures.shape[1]):  # padding is of three channels
        return torch.stack([view_of(pixels, norms, look, side) for pixels in pictures])
    together = pictures.permute(1, 2, 0, 3).flatten(2)  # (H, W, 3 n)
    mean, std = norms.float()[:, :, None, None]
    return (pixels_of(together, norms, look, side).unflatten(0, (-1, 3)) / 255 - mean) / std


def pixels_of(pixels: Tensor, norms: Tensor, look: Look, side: Size) -> Tensor:
    """As `view_of`, but float from 0 to 255."""
    with exact(pixels):
        return _resampled(pixels, norms[0], look, side)


def _resampled(pixels: Tensor, mean: Tensor, look: Look, side: Size) -> Tensor:
    rows, columns = (_axis(pixels.shape[axis], look, side, axis) for axis in (0, 1))
    seen, sums = pixels[rows.read, columns.read], {}  # (y, x, 3)
    order: list[tuple[Axis, int]] = [(rows, 0), (columns, 1)]
    if rows.out * seen.shape[1] * 3 > MOST and seen.shape[0] * columns.out < rows.out * seen.shape[1]:
        order.reverse()  # of a very wide picture, enlarged rows would not fit into memory
    for axis, number in order:
        resized, sums[number] = _banded(axis, seen.transpose(0, number))
        seen = resized.transpose(0, number)
    seen = seen.permute(2, 0, 1)  # (h, w, 3) -> (3, h, w)
    if look.canvas.source == (0, 0, pixels.shape[1], pixels.shape[0]):
        return seen
    fill = torch.zeros(3)
    if look.canvas.fill == "mean":
        fill = (255 * mean.float()).floor()
    padding = 1 - sums[0].to(seen)[:, None] * sums[1].to(seen)  # (h, w)
    return seen + fill.to(seen)[:, None, None] * padding


def _banded(axis: Axis, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """An axis's weights x the pixels that it reads (n, ...) -> (m, ...), float; and each row's sum (m,).

    In bands of rows, and of columns where those are many, each of which reads only the pixels it needs.
    """
    least, first = max(pixels[:1].numel(), 1), axis.read.start
    made = torch.empty(axis.out, *pixels.shape[1:], device=pixels.device)
    sums = []
    rows = max(1, min(BAND, 2 * MOST // (axis.taps * least) - 2))
    across = max(1, 2 * MOST // (axis.taps * max(pixels[:1, :1].numel(), 1)))  # columns at once
    together = max(1, math.isqrt(MOST // axis.taps))  # whose weights are made at once
    for begin in range(0, axis.out, together):
        end = min(begin + together, axis.out)
        there = axis.reads(begin, end)
        weights = torch.from_numpy(axis.weights(begin, end).astype(np.float32))
        for start in range(begin, end, rows):
            stop = min(start + rows, end)
            here = axis.reads(start, stop)
            read = pixels[here.start - first : here.stop - first]
            used = weights[start - begin : stop - begin, here.start - there.start : here.stop - there.start]
            for left in range(0, read.shape[1], across):
                part = read[:, left : left + across].float()  # (n, columns, ...)
                made[start:stop, left : left + across] = torch.tensordot(used.to(part), part, dims=1)
        sums.append(weights.sum(1))
    return made, torch.cat(sums)


@dataclass(frozen=True)
class Triangle:
    """A triangle filter: resizes `length` pixels of an axis, from `start` on, to `out`.

    The axis has length `extent`, but only 0..pixels exist: weights of padding are left out. The matrix of
    weights, with few entries that are not zero, would be large: it exists in bands of rows only.
    """

    pixels: int
    extent: tuple[int, int]
    start: float
    length: float
    out: int

    @property
    def reach(self) -> float:
        return max(self.length / self.out, 1.0)

    @property
    def taps(self) -> int:
        """One pixel is made of so many at most."""
        return 2 * math.ceil(self.reach) + 1

    @property
    def read(self) -> slice:
        """All pixels that are read."""
        return self.reads(0, self.out)

    def reads(self, start: int, stop: int) -> slice:
        """The pixels that some rows of the view read."""
        return self._existing(*self._span(start, stop))

    def _span(self, start: int, stop: int) -> tuple[int, int]:
        """The first pixel that some rows read, padding included, and the one after the last."""
        step, (low, high) = self.length / self.out, self.extent
        first, last = self.start + (start + 0.5) * step, self.start + (stop - 0.5) * step
        return max(math.floor(first - self.reach), low), min(math.ceil(last + self.reach), high)

    def _existing(self, first: int, last: int) -> slice:
        return slice(min(max(first, 0), self.pixels), min(max(last, 0), self.pixels))

    def weights(self, start: int, stop: int) -> np.ndarray:
        """Weights (stop - start, n) of the pixels that some rows of the view read."""
        first, last = self._span(start, stop)
        centres = self.start + (np.arange(start, stop) + 0.5) * (self.length / self.out)
        weights = (1 - np.abs(np.arange(first, last) + 0.5 - centres[:, None]) / self.reach).clip(min=0)
        weights /= weights.sum(1, keepdims=True)
        here = self._existing(first, last)
        return weights[:, here.start - first : here.stop - first]


@dataclass(frozen=True)
class Twice:
    """A view enlarged from a canvas that is itself made of the picture."""

    enlarge: Triangle
    shrink: Triangle

    @property
    def out(self) -> int:
        return self.enlarge.out

    @property
    def taps(self) -> int:
        step = self.shrink.length / self.shrink.out
        return self.shrink.taps + math.ceil(self.enlarge.taps * step)

    @property
    def read(self) -> slice:
        return self.reads(0, self.out)

    def reads(self, start: int, stop: int) -> slice:
        between = self.enlarge.reads(start, stop)
        return self.shrink.reads(between.start, between.stop)

    def weights(self, start: int, stop: int) -> np.ndarray:
        between = self.enlarge.reads(start, stop)
        return self.enlarge.weights(start, stop) @ self.shrink.weights(between.start, between.stop)


Axis: TypeAlias = Triangle | Twice


def _axis(pixels: int, look: Look, side: Size, axis: int) -> Axis:
    """How the rows (axis 0) or columns (1) of a view are made of the picture's."""
    source, box, canvas = look.canvas.source, look.box, look.canvas.size[axis]
    left, right = (int(n) for n in ((source.top, source.bottom), (source.left, source.right))[axis])
    first, last = (float(n) for n in ((box.top, box.bottom), (box.left, box.right))[axis])
    step = (right - left) / canvas  # pixels of the picture per pixel of the canvas
    if not look.upsampled:
        return Triangle(pixels, (left, right), left + first * step, (last - first) * step, side[axis])
    return Twice(
        Triangle(canvas, (0, canvas), first, last - first, side[axis]),
        Triangle(pixels, (left, right), left, right - left, canvas),
    )
