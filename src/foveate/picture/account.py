"""Where a method looked in a picture: reported once by the method, read by drawings, JSON and pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveate.picture.geometry import Box


@dataclass(frozen=True)
class _Made:
    """What a function has made: in its place, where it cannot go itself."""

    value: Any

    def __call__(self) -> Any:
        return self.value


@dataclass
class Chain:
    """Parts of a picture that were looked at one after the other.

    Attributes:
        name: distinguishes it from the picture's other chains.
        boxes: in original pixels.
        pixels: makes their views (n, 3, h, w), normalised, as the tower got them.
    """

    name: str
    boxes: list[Box]
    pixels: Callable[[], Tensor]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "pixels": _Made(self.pixels())}


@dataclass
class Account:
    """Where a method looked in one picture; boxes are in original pixels.

    Attributes:
        regions: parts that it chose to look at; None if it chose none and saw all of its views.
        heat: computes parts of the picture with weights from 0 (dropped) to 1: how much each mattered.
        chains: parts that were looked at one after the other.
        views: views that the tower made itself: role and pixels (3, h, w), normalised.
        notes: sentences about what it did.
        gates: name -> its value, a mean over the picture; 0 is closed.
        sources: (n,) numbers by which the method knows the visual tokens at their n places, where the
            question decides which they are; None where the plan does.
    """

    regions: list[Box] | None = None
    heat: Callable[[], list[tuple[Box, float]]] = list
    chains: list[Chain] = field(default_factory=list)
    views: list[tuple[str, Tensor]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    gates: Mapping[str, float] = field(default_factory=dict)
    sources: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """With what its functions make: a function inside another cannot be pickled."""
        return {**vars(self), "heat": _Made(self.heat())}

    def joined(self, more: Account) -> Account:
        """This account and `more` in one.

        Regions, heat and sources of `more` are used only if this one has none.
        """
        return Account(
            regions=more.regions if self.regions is None else self.regions,
            heat=lambda: self.heat() or more.heat(),
            chains=self.chains + more.chains,
            views=self.views + more.views,
            notes=self.notes + more.notes,
            gates={**self.gates, **more.gates},
            sources=more.sources if self.sources is None else self.sources,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; boxes (left, top, right, bottom) in whole pixels."""
        return {
            "regions": None if self.regions is None else [list(box.rounded()) for box in self.regions],
            "heat": [{"box": list(box.rounded()), "weight": weight} for box, weight in self.heat()],
            "chains": [
                {"name": chain.name, "boxes": [list(box.rounded()) for box in chain.boxes]}
                for chain in self.chains
            ],
            "gates": dict(self.gates),
            "notes": list(self.notes),
        }


class Spread(NamedTuple):
    """Relevance of a picture's visual tokens, carried to the picture; boxes are in its pixels.

    Attributes:
        tokens: per visual token its part of the picture; None for tokens that show nothing of it.
        parts: boxes that share the relevance; several tokens may share one.
        shares: (K, M) the relevance of each part, for K relevances of the tokens.
    """

    tokens: list[Box | None]
    parts: list[Box]
    shares: Tensor


def placed(tokens: Sequence[Box | None], relevance: Tensor) -> Spread:
    """The relevance (K, n) of tokens that each show one part of the picture, or none."""
    there = [number for number, box in enumerate(tokens) if box is not None]
    return Spread(
        list(tokens),
        [box for box in tokens if box is not None],
        relevance[:, torch.tensor(there, dtype=torch.long)],
    )
