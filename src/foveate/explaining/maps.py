"""Relevance of parts of a picture as a map over it, and as the part that it is highest in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from foveate.picture.geometry import Box, Size

CELLS = 64  # along a map's longer side, at most


class Raster:
    """A picture cut into rows and columns of whole pixels.

    Args:
        picture: its size.
        cells: rows or columns along its longer side, at most; a cell has a pixel at least.
    """

    def __init__(self, picture: Size, cells: int = CELLS) -> None:
        longest = max(picture)
        counts = [max(1, min(length, round(cells * length / longest))) for length in picture]
        self.picture = picture
        self.rows, self.columns = (
            np.linspace(0, length, count + 1).round().astype(int)
            for length, count in zip(picture, counts, strict=True)
        )

    @property
    def areas(self) -> np.ndarray:
        """Pixels of each cell, (rows, columns)."""
        return np.diff(self.rows)[:, None] * np.diff(self.columns)

    def density(self, parts: Sequence[Box], shares: Tensor) -> np.ndarray:
        """Relevance (K, M) of parts of the picture, evenly over each -> its density, (K, rows, columns).

        Where parts overlap, as the whole picture and its tiles do, their densities add up.
        """
        if not parts:
            return np.zeros((len(shares), len(self.rows) - 1, len(self.columns) - 1))
        edges = np.array([[float(n) for n in box] for box in parts])  # (M, 4)
        down = _lengths(self.rows, edges[:, 1], edges[:, 3])  # (M, rows)
        across = _lengths(self.columns, edges[:, 0], edges[:, 2])
        areas = (edges[:, 2] - edges[:, 0]) * (edges[:, 3] - edges[:, 1])
        per_pixel = shares.double().numpy() / areas.clip(min=1e-12)  # (K, M)
        total = np.stack([(down * one[:, None]).T @ across for one in per_pixel])
        return np.asarray(total / self.areas)

    def box(self, row: int, column: int, columns: int = 1) -> Box:
        """Some cells of one row, in original pixels."""
        left, right = self.columns[column], self.columns[column + columns]
        return Box(int(left), int(self.rows[row]), int(right), int(self.rows[row + 1]))

    def boxes(self, chosen: np.ndarray) -> list[Box]:
        """The cells that are chosen (rows, columns), each row's neighbours as one box."""
        found = []
        for row, cells in enumerate(chosen):
            steps = np.diff(np.concatenate([[0], cells.astype(int), [0]]))
            for start, end in zip(np.flatnonzero(steps == 1), np.flatnonzero(steps == -1), strict=True):
                found.append(self.box(row, int(start), int(end - start)))
        return found

    def highest(self, density: np.ndarray, share: float) -> np.ndarray:
        """The cells (rows, columns) of the highest density that make up a share of the picture's area.

        Cells without relevance are not among them.
        """
        order = np.argsort(-density, axis=None, kind="stable")
        before = np.concatenate([[0], np.cumsum(self.areas.flat[order])[:-1]])
        chosen = order[(before < share * self.picture.height * self.picture.width)]
        cells = np.zeros(density.shape, dtype=bool)
        cells.flat[chosen] = True
        return cells & (density > 0)


def _lengths(edges: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """How many pixels of each cell of one axis each interval covers, (M, cells)."""
    covered = np.minimum(edges[1:], high[:, None]) - np.maximum(edges[:-1], low[:, None])
    return np.asarray(covered.clip(min=0))


def pixels_of(boxes: Sequence[Box], picture: Size) -> np.ndarray:
    """The pixels (H, W) bool that lie in some of the boxes."""
    mask = np.zeros(tuple(picture), dtype=bool)
    for box in boxes:
        left, top, right, bottom = box.clipped(picture).rounded()
        mask[top:bottom, left:right] = True
    return mask
