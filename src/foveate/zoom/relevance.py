"""The region that the image tokens form which an answer rests on.

    relevance of image tokens                         foveate.explaining.relevance
    threshold epsilon, highlighted area               `roi`

Chain-of-Spot (arXiv 2403.12966, section 3.2) states neither threshold nor extension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from foveate.errors import FoveateError
from foveate.explaining.relevance import READINGS, Reading, relevance, scaled
from foveate.picture.geometry import Box, Size
from foveate.remembered import Remembered
from foveate.zoom.asking import message
from foveate.zoom.places import token_places
from foveate.zoom.vlm import VLM

SIZES = 64  # number of picture sizes whose image token places are cached


@dataclass(frozen=True)
class RegionRule:
    """How relevance becomes a region.

    Attributes:
        reading: of eq. 5.
        threshold: epsilon; scores, scaled to 0..1, are kept if they are at least this.
        extension: fraction by which the region's width and height grow, about its centre.
    """

    reading: Reading = "chefer"
    threshold: float = 0.5
    extension: float = 0.1

    def __post_init__(self) -> None:
        if self.reading not in READINGS:
            raise FoveateError(f"reading must be one of {', '.join(READINGS)}, not {self.reading!r}")
        if not 0 <= self.threshold <= 1:
            raise FoveateError(f"threshold must be from 0 to 1, not {self.threshold}")
        if self.extension < 0:
            raise FoveateError(f"extension must not be negative, it is {self.extension}")


def roi(boxes: Sequence[Box], scores: Tensor, picture: Size, rule: RegionRule) -> Box:
    """The region that scored boxes form: whole original pixels, inside the picture.

    Args:
        boxes: (N,) regions of a detector or places of image tokens, original pixels.
        scores: (N,) their relevance.
        picture: its size.
        rule: threshold and extension.
    """
    kept = [box for box, score in zip(boxes, scaled(scores).tolist(), strict=True) if score >= rule.threshold]
    left, top = min(float(b.left) for b in kept), min(float(b.top) for b in kept)
    right, bottom = max(float(b.right) for b in kept), max(float(b.bottom) for b in kept)
    across, down = rule.extension * (right - left) / 2, rule.extension * (bottom - top) / 2
    grown = (left - across, top - down, right + across, bottom + down)
    outward = (math.floor(n) if i < 2 else math.ceil(n) for i, n in enumerate(grown))
    return Box(*outward).clipped(picture)


def region_scores(regions: Sequence[Box], places: Sequence[Box], scores: Tensor) -> Tensor:
    """Relevance of a detector's regions (R,): the mean of the image tokens' (N,), weighted by overlap."""
    corners = torch.tensor([[float(n) for n in box] for box in regions])[:, None]  # (R, 1, 4)
    cells = torch.tensor([[float(n) for n in box] for box in places])[None]  # (1, N, 4)
    low, high = (
        torch.maximum(corners[..., :2], cells[..., :2]),
        torch.minimum(corners[..., 2:], cells[..., 2:]),
    )
    overlap = (high - low).clamp(min=0).prod(-1)  # (R, N)
    return (overlap @ scores.to(overlap)) / overlap.sum(1).clamp(min=1e-6)


@dataclass(frozen=True)
class Highlight:
    """The part of a picture that an answer rests on.

    Attributes:
        box: the region, whole original pixels.
        heat: per image token (or per region of a detector) its place and its relevance, 0 to 1.
    """

    box: Box
    heat: list[tuple[Box, float]]


class Highlighter:
    """Finds the regions of pictures that the answers to questions rest on.

    Args:
        vlm: the model that is asked.
        rule: how relevance becomes a region.
        detect: picture -> boxes of its regions, in its pixels; by default the image tokens' own places are
            the regions.
    """

    def __init__(
        self,
        vlm: VLM,
        rule: RegionRule = RegionRule(),
        detect: Callable[[Image.Image], Sequence[Box]] | None = None,
    ) -> None:
        self.vlm, self.rule, self.detect = vlm, rule, detect
        self._places = Remembered(partial(token_places, vlm), most=SIZES)

    def __call__(self, pictures: Sequence[Image.Image], questions: Sequence[str]) -> list[Highlight]:
        """One upright picture and one question each, in one batch.

        Raises:
            FoveateError: a model whose image tokens cannot be placed, or whose decoder is not supported.
        """
        inputs = self.vlm.inputs([message(*pair) for pair in zip(pictures, questions, strict=True)])
        rows = relevance(self.vlm.model, inputs, self.rule.reading).float().cpu()  # (B, T)
        visual = (inputs["input_ids"] == self.vlm.image_token_id).cpu()
        return [
            self._highlight(picture, row[where])
            for picture, row, where in zip(pictures, rows, visual, strict=True)
        ]

    def _highlight(self, picture: Image.Image, scores: Tensor) -> Highlight:
        size = Size(picture.height, picture.width)
        places = self._places(size)
        if len(places) != len(scores):
            raise FoveateError(
                f"{type(self.vlm.model).__name__} shows a picture of {size.width} x {size.height} pixels by "
                f"{len(scores)} tokens in this prompt and by {len(places)} in another: ask one at a time"
            )
        boxes = [box for box in places if box is not None]
        scores = scores[torch.tensor([box is not None for box in places])]
        if not bool(scores.isfinite().all()):
            raise FoveateError("the relevance of image tokens is not finite: use dtype float32")
        if self.detect is not None:
            regions = [box.clipped(size) for box in self.detect(picture)]
            regions = [box for box in regions if box.width > 0 and box.height > 0]
            if regions:  # else the detector found nothing: use the tokens' own places
                boxes, scores = regions, region_scores(regions, boxes, scores)
        heat = list(zip(boxes, scaled(scores).tolist(), strict=True))
        return Highlight(roi(boxes, scores, size, self.rule), heat)
