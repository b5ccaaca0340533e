"""The place in the picture of each image token of a VLM, for any processor.

The processor gets three pictures of the real one's size: black, white, and one whose red and green encode a
pixel's place. Pixels that are the same for black and white are padding; elsewhere the colours of each view
give the part of the picture that it shows, whatever was cropped, padded, tiled or normalised.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foveate.errors import FoveateError
from foveate.model.processing import FoveateProcessor
from foveate.picture.geometry import Box, Size
from foveate.zoom.vlm import VLM, message

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
        return [box and _inside(box, picture) for box in places]
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
    return [box and _inside(box, picture) for box in places]


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
    ramp = np.zeros((height, width, 3), dtype=np.uint8)
    ramp[..., 0] = np.round(255 * (np.arange(width) + 0.5) / width)
    ramp[..., 1] = np.round(255 * (np.arange(height) + 0.5) / height)[:, None]
    white = _views(_inputs(vlm, np.full_like(ramp, 255))) - black
    inside = white.abs().amin(1) > 0.5 * white.abs().max()  # (V, h, w)
    where = (_views(_inputs(vlm, ramp)) - black) / white.where(white != 0, torch.ones(()))
    return [
        _grid(
            grid,
            _axis(place[0] * width, seen, width),
            _axis((place[1] * height).T, seen.T, height),
        )
        for place, seen in zip(where, inside, strict=True)
    ]


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


def _inside(box: Box, picture: Size) -> Box | None:
    part = box.clipped(picture)
    return part if part.width > 0 and part.height > 0 else None


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
