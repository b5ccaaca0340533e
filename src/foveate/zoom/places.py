"""The place in the picture of each image token of a VLM, for any processor.

The processor gets three pictures of the real one's size: black, white, and one whose red and green encode a
pixel's place. Pixels that are the same for black and white are padding; elsewhere the colours of each view
give the part of the picture that it shows, whatever was cropped, padded, tiled or normalised.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foveate.errors import FoveateError
from foveate.model.processing import FoveateProcessor
from foveate.picture.geometry import Box, Size
from foveate.zoom.asking import message
from foveate.zoom.vlm import VLM

Places = list[Box | None]  # original pixels; None for tokens that show no part of the picture


def token_places(vlm: VLM, picture: Size) -> Places:
    """The place of each image token of one picture of this size, in the order of the LLM's sequence.

    Raises:
        FoveateError: a model whose image tokens cannot be placed.
    """
    processor = vlm.processor
    if isinstance(processor, FoveateProcessor):
        images = processor.image_processor
        places = images.planner().token_boxes(images.plan(*picture))
        return [box and box.inside(picture) for box in places]
    inputs = _inputs(vlm, np.zeros((*picture, 3), dtype=np.uint8))
    tokens = int((inputs["input_ids"] == vlm.image_token_id).sum())
    if "image_grid_thw" in inputs:
        rows, columns = inputs["image_grid_thw"][0, 1:].tolist()
        merge = processor.image_processor.merge_size
        places = _grid(
            Size(rows // merge, columns // merge), lambda x: x * picture.width, lambda y: y * picture.height
        )
    else:
        places = _of_views(vlm, picture, _views(inputs), tokens) if tokens else []
    if not places or len(places) != tokens:
        raise FoveateError(
            f"{type(vlm.model).__name__} has {tokens} image tokens, but {len(places)} can be placed in the "
            "picture: choose another region proposer"
        )
    return [box and box.inside(picture) for box in places]


class Resolution(NamedTuple):
    """How finely a picture is seen.

    Attributes:
        size: (height, width) of the picture at the finest scale at which its whole `part` is seen, pixels.
        part: (height, width) of what is seen of it, in original pixels; the picture's own size if all is.
    """

    size: Size
    part: Size


def resolution(picture: Size, black: Tensor, views: Callable[[np.ndarray], Tensor]) -> Resolution | None:
    """How finely views show a picture of this size, measured in them; None if they show nothing of it.

    Args:
        picture: its size.
        black: the views of a black picture of this size, `pixel_values` with 3 channels before height, width.
        views: pixels (h, w, 3) of such a picture -> its views, likewise.
    """
    where, inside = _looks(picture, black.flatten(0, -4).float(), lambda array: views(array).flatten(0, -4))
    looks = []
    for place, seen in zip(where, inside, strict=True):
        if seen.any():
            x = _span(place[0] * picture.width, seen, picture.width)
            y = _span((place[1] * picture.height).T, seen.T, picture.height)
            looks.append((x, y))
    if not looks:
        return None
    seen_of = [_union([look[axis] for look in looks]) for axis in (1, 0)]
    part = Size(*(_near(round(n), whole) for n, whole in zip(seen_of, picture, strict=True)))
    looks.sort(key=lambda look: -look[0].scale * look[1].scale)
    for x, y in looks:
        finer = [look for look in looks if look[0].scale > 0.97 * x.scale and look[1].scale > 0.97 * y.scale]
        if _cover(finer) >= 0.97 * seen_of[0] * seen_of[1]:
            alike = [look for look in finer if look[0].scale * look[1].scale < 1.06 * x.scale * y.scale]
            sides = (
                _side(picture.height, y.scale, [look[1] for look in alike]),
                _side(picture.width, x.scale, [look[0] for look in alike]),
            )
            return Resolution(Size(*sides), part)
    return None


class _Span(NamedTuple):
    """One side of a view: what it shows of the picture's side, in original pixels, and how many it has."""

    start: float
    end: float
    pixels: int

    @property
    def scale(self) -> float:
        return self.pixels / max(self.end - self.start, 1e-6)


def _span(place: Tensor, seen: Tensor, length: int) -> _Span:
    columns = seen.any(0).nonzero()[:, 0]
    first, last, n = int(columns[0]), int(columns[-1]) + 1, place.shape[1]
    at = _axis(place, seen, length)
    start, end = (min(max(at(edge / n), 0.0), float(length)) for edge in (first, last))
    return _Span(start, end, last - first)


def _union(spans: list[_Span]) -> float:
    """The length that spans cover together."""
    covered, upto = 0.0, 0.0
    for start, end, _ in sorted(spans):
        covered += max(end - max(start, upto), 0.0)
        upto = max(upto, end)
    return covered


def _near(length: int, whole: int) -> int:
    """A measured length; the whole if it differs by no more than it is measured to."""
    return whole if length >= whole - max(0.02 * whole, 1) else length


def _cover(looks: list[tuple[_Span, _Span]]) -> float:
    """The area that views cover together, in original pixels."""
    edges = sorted({edge for x, _ in looks for edge in (x.start, x.end)})
    return sum(
        (right - left) * _union([y for x, y in looks if x.start < (left + right) / 2 < x.end])
        for left, right in pairwise(edges)
    )


def _side(length: int, scale: float, spans: list[_Span]) -> int:
    """A side of the picture at a scale: whole pixels of tiles that lie side by side, else rounded."""
    chosen: list[_Span] = []
    for span in sorted(spans):
        if not chosen or span.start > chosen[-1].start + 0.5 * (chosen[-1].end - chosen[-1].start):
            chosen.append(span)
    together = sum(span.pixels for span in chosen)
    return together if abs(together - length * scale) <= max(0.02 * together, 1) else round(length * scale)


def _of_views(vlm: VLM, picture: Size, black: Tensor, tokens: int) -> Places:
    """Places from views (V, 3, h, w): in the order of the model's features, else as a grid per view."""
    packs = [part for part in vlm.model.modules() if hasattr(part, "pack_image_features")]
    if packs:
        return _packed(vlm, picture, black, packs[-1].pack_image_features)
    height, width = black.shape[-2:]
    rows = math.isqrt(tokens // len(black) * height // width)
    columns = rows * width // height
    if rows * columns * len(black) != tokens or rows * width != columns * height:
        return []  # queries, separators or another order: their number does not give the grid
    return [box for grid in _view_grids(vlm, picture, black, Size(rows, columns)) for box in grid]


def _packed(vlm: VLM, picture: Size, black: Tensor, pack: Callable[..., Any]) -> Places:
    """Places packed by the model in place of its features; none if its packing is unknown here."""
    config, asked = vlm.model.config, inspect.signature(pack).parameters
    if not {"image_features", "image_sizes", "image_newline"} <= asked.keys():
        return []
    options = ("vision_feature_select_strategy", "vision_aspect_ratio")
    more = {name: value for name, value in config.to_dict().items() if name in options and name in asked}
    side = config.vision_config.image_size // config.vision_config.patch_size
    features = torch.tensor(  # (V, N, 5): left, top, right, bottom, and 1 if there is a place
        [
            [[float(n) for n in box] + [1.0] if box else [0.0] * 5 for box in grid]
            for grid in _view_grids(vlm, picture, black, Size(side, side))
        ]
    )
    try:
        packed = pack([features], torch.tensor([picture]), image_newline=torch.zeros(5), **more)
    except (RuntimeError, ValueError):  # its features are not such grids
        return []
    return [Box(*row[:4]) if row[4] > 0.5 else None for row in packed[0][0].tolist()]


def _view_grids(vlm: VLM, picture: Size, black: Tensor, grid: Size) -> list[Places]:
    """Per view the places of a grid of tokens."""
    height, width = picture
    where, inside = _looks(picture, black, lambda pixels: _views(_inputs(vlm, pixels)))
    return [
        _grid(
            grid,
            _axis(place[0] * width, seen, width),
            _axis((place[1] * height).T, seen.T, height),
        )
        for place, seen in zip(where, inside, strict=True)
    ]


def _looks(picture: Size, black: Tensor, views: Callable[[np.ndarray], Tensor]) -> tuple[Tensor, Tensor]:
    """What the views of a picture show: (V, 3, h, w) x and y as fractions in its first channels, and where.

    Args:
        picture: its size.
        black: the views (V, 3, h, w) of a black picture of this size.
        views: pixels (h, w, 3) of such a picture -> views (V, 3, h, w).

    Returns:
        The fractions, and (V, h, w) bool, False for padding.
    """
    height, width = picture
    pixels = np.full((height, width, 3), 255, dtype=np.uint8)
    white = views(pixels) - black
    inside = white.abs().amin(1) > 0.5 * white.abs().max()
    pixels[..., 0] = np.round(255 * (np.arange(width) + 0.5) / width)
    pixels[..., 1] = np.round(255 * (np.arange(height) + 0.5) / height)[:, None]
    return (views(pixels) - black) / white.where(white != 0, torch.ones(())), inside


def _axis(place: Tensor, seen: Tensor, length: int) -> Callable[[float], float]:
    """Fraction of a view's side -> original pixel, fitted to its pixels (lines, N) where `seen`."""
    n = place.shape[1]
    columns = seen.any(0).nonzero()[:, 0]
    if not len(columns):  # only padding
        return lambda part: 0.0
    means = (place * seen).sum(0)[columns] / seen.sum(0)[columns]
    fit = (means > 1) & (means < length - 1)  # at its border a resized picture does not change linearly
    if fit.sum() < 2:
        first, last = int(columns[0]), int(columns[-1]) + 1
        return lambda part: (part * n - first) / (last - first) * length
    slope, start = np.polyfit((columns[fit] + 0.5).numpy(), means[fit].numpy(), 1)
    return lambda part: float(start + slope * part * n)


def _grid(size: Size, x: Callable[[float], float], y: Callable[[float], float]) -> Places:
    return [
        Box(x(c / size.width), y(r / size.height), x((c + 1) / size.width), y((r + 1) / size.height))
        for r in range(size.height)
        for c in range(size.width)
    ]


def _inputs(vlm: VLM, pixels: np.ndarray) -> dict[str, Tensor]:
    return vlm.inputs([message(Image.fromarray(pixels), "?")])


def _views(inputs: dict[str, Tensor]) -> Tensor:
    """`pixel_values` of one picture as (V, 3, h, w)."""
    if "pixel_values" not in inputs:
        raise FoveateError("the processor gives no pixel_values: choose another region proposer")
    pixels = inputs["pixel_values"].float().cpu()
    if pixels.ndim < 4 or pixels.shape[-3] != 3:
        raise FoveateError(
            f"pixel_values of shape {tuple(pixels.shape)} are not views: choose another region proposer"
        )
    return pixels.flatten(0, -4)
