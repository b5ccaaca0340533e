"""Which rows of INF-LLaVA's two large maps reach the answer, and their places in the views' features.

A reduction by bilinear interpolation reads one row in n of the large map, or two. Anything that no such row
depends on is never computed. All plans here are along one axis, as both croppings treat both axes alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Cut: TypeAlias = Literal["local", "global"]  # contiguous, or every n-th
CUTS: tuple[Cut, Cut] = ("local", "global")


@dataclass(frozen=True)
class Axis:
    """One axis of the large map: `views` views of `tokens` tokens each."""

    views: int
    tokens: int

    def split(self, cut: Cut, row: int) -> tuple[int, int]:
        """A row of the large map -> its view or part, and its row within that."""
        if cut == "local":
            return divmod(row, self.tokens)
        place, view = divmod(row, self.views)
        return view, place

    def join(self, cut: Cut, view: int, place: int) -> int:
        """The inverse of `split`."""
        return view * self.tokens + place if cut == "local" else place * self.views + view


@dataclass(frozen=True)
class Direction:
    """One of the two enhancements: queries of one map attend to keys of the other, part by part."""

    name: Cut  # of the map that is enhanced
    queries: Cut
    keys: Cut
    parts: Cut


@dataclass(frozen=True)
class Groups:
    """The queries of one direction along one axis, grouped by the part that they attend to.

    Groups are padded to the longest; `real` is False for padding.
    """

    queries: np.ndarray  # (parts, m) rows of the queries' stack
    keys: np.ndarray  # (parts, tokens) rows of the keys' stack
    real: np.ndarray  # (parts, m) bool
    part: np.ndarray  # (live,) where each live row's query is
    slot: np.ndarray  # (live,)


class AxisPlan:
    """What must be computed along one axis of the large map, and where it is stored.

    The views' features are never rearranged into large maps. They stay in stacks, one below the other in the
    order of `views`; `at` gives a large map's rows as rows of a stack.

    Args:
        axis: of the large map.
        pooling: (pooled, rows) weights of the reduction.
        directions: which map is enhanced by which.
        neighbours: whether the fusion reads the rows beside each.
        added: cuts whose maps are also read without enhancement.

    Attributes:
        fused: rows of the large map that the pooled one depends on.
        weights: (pooled, fused) of the pooling.
        live: rows that the fused ones depend on: themselves, with `neighbours` also those beside them.
        near: (fused, 3) with `neighbours`: above, at and below each row, as places in
            `live`; -1 beyond the border. Else None.
        views: per cut, the views along this axis that the live rows depend on.
    """

    def __init__(
        self,
        axis: Axis,
        pooling: np.ndarray,
        directions: Sequence[Direction],
        neighbours: bool = False,
        added: Sequence[Cut] = (),
    ) -> None:
        self.axis = axis
        rows = axis.views * axis.tokens
        self.fused: list[int] = np.flatnonzero(pooling.any(0)).tolist()
        self.weights = pooling[:, self.fused]
        self.live, self.near = self.fused, None
        if neighbours:
            around = np.array(self.fused)[:, None] + [-1, 0, 1]
            there = (around >= 0) & (around < rows)
            self.live = np.unique(around[there]).tolist()
            self.near = np.where(there, np.searchsorted(self.live, around), -1)
        used: dict[Cut, set[int]] = {"local": set(), "global": set()}
        for direction in directions:
            used[direction.queries] |= self._views(direction.queries, self.live)
            used[direction.keys] |= self._views(direction.keys, self._looked_at(direction))
        for cut in added:
            used[cut] = self._views(cut, self.live)
        self.views: dict[Cut, list[int]] = {cut: sorted(numbers) for cut, numbers in used.items()}

    def _views(self, cut: Cut, rows: Iterable[int]) -> set[int]:
        return {self.axis.split(cut, row)[0] for row in rows}

    def _looked_at(self, direction: Direction) -> list[int]:
        """All rows of the parts that live queries attend to, part by part."""
        parts = sorted(self._views(direction.parts, self.live))
        return [
            self.axis.join(direction.parts, part, place)
            for part in parts
            for place in range(self.axis.tokens)
        ]

    def at(self, cut: Cut, rows: Iterable[int]) -> list[int]:
        """Rows of the large map -> rows in the stack of a cut's views."""
        order = {view: i for i, view in enumerate(self.views[cut])}
        split = (self.axis.split(cut, row) for row in rows)
        return [order[view] * self.axis.tokens + place for view, place in split]

    def groups(self, direction: Direction) -> Groups:
        parts = sorted(self._views(direction.parts, self.live))
        members: dict[int, list[int]] = {part: [] for part in parts}
        for row in self.live:
            members[self.axis.split(direction.parts, row)[0]].append(row)
        longest = max(map(len, members.values()))
        lengths = np.array([len(rows) for rows in members.values()])
        filled = [rows + rows[:1] * (longest - len(rows)) for rows in members.values()]
        slots = {row: (i, j) for i, part in enumerate(parts) for j, row in enumerate(members[part])}
        looked_at = np.array(self.at(direction.keys, self._looked_at(direction)))
        return Groups(
            queries=np.array([self.at(direction.queries, rows) for rows in filled]),
            keys=looked_at.reshape(len(parts), -1),
            real=np.arange(longest) < lengths[:, None],
            part=np.array([slots[row][0] for row in self.live]),
            slot=np.array([slots[row][1] for row in self.live]),
        )


# Indexing features.


def index(numbers: np.ndarray, like: Tensor) -> Tensor:
    """Indices on the features' device."""
    return torch.tensor(numbers, device=like.device)  # a copy: their memory may not be writable


def gathered(stack: Tensor, rows: Sequence[int] | np.ndarray, columns: Sequence[int] | np.ndarray) -> Tensor:
    """(P, R, K, C) -> (P, len(rows), len(columns), C)"""
    return stack[:, index(np.array(rows), stack)[:, None], index(np.array(columns), stack)[None]]


def neighbours(x: Tensor, rows: np.ndarray, columns: np.ndarray) -> Tensor:
    """(P, h, w, C) -> (P, 3 rows, 3 columns, C): each row and column between its neighbours, zero beyond."""
    edged = F.pad(x, (0, 0, 0, 1, 0, 1))  # index -1 is a row, or column, of zeros
    return gathered(edged, rows.flatten() % edged.shape[1], columns.flatten() % edged.shape[2])


def parts_of(stack: Tensor, rows: np.ndarray, columns: np.ndarray) -> Tensor:
    """(P, R, K, C), rows (A, m), columns (B, n) -> (P A B, m n, C)"""
    taken = stack[:, index(rows, stack)[:, None, :, None], index(columns, stack)[None, :, None, :]]
    return taken.flatten(3, 4).flatten(0, 2)  # (P, A, B, m, n, C)


def covered(plan: AxisPlan, cut: Cut) -> np.ndarray:
    """(rows of the large map, rows of a stack): the fraction of a token's attention that each row gets."""
    axis = plan.axis
    shares = np.zeros((axis.views * axis.tokens, len(plan.views[cut]) * axis.tokens))
    for i, view in enumerate(plan.views[cut]):
        for place in range(axis.tokens):
            if cut == "local":
                shares[axis.join(cut, view, place), i * axis.tokens + place] = 1
            else:
                start = place * axis.views
                shares[start : start + axis.views, i * axis.tokens + place] = 1 / axis.views
    return shares
