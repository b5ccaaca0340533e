"""LLaVA-NeXT AnyRes: the whole picture squashed to one view, and a grid of tiles cut from a larger canvas.

Paper: Liu et al., LLaVA-NeXT: Improved reasoning, OCR, and world knowledge, blog of 2024-01-30
(no arXiv number); the AnyRes technique is described there under "Dynamic High Resolution".
Authors' code: haotian-liu/LLaVA (Apache-2.0), `spatial_unpad` with newline tokens.

    grid choice, letterbox, tiles           plan
    order in the LLM                        token_sources: global view, then the grid, a newline per row
    patch tokens -> MLP -> that order       AnyResConnector.forward, one gather for the whole batch

Where versions differ: the authors cut the padding of the feature grid with `int(h * scale)`, Hugging Face's
port rounds to 7 digits first (`geometry.unpadded`); they differ where that product falls just below a whole
number. We follow the port, whose processor counts the same way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foveate.errors import FoveateError
from foveate.layers import Activation, mlp_projector
from foveate.methods.base import (
    Connector,
    Method,
    MethodOptions,
    Query,
    VisualTokens,
    Widths,
    flat,
    square_grid,
)
from foveate.methods.layouts import (
    HF_PROJECTOR,
    Export,
    Layout,
    connector_options,
    hf_activation,
    hf_export,
    known_projector,
)
from foveate.picture.geometry import (
    NO_TILES,
    Box,
    Size,
    View,
    ViewPlan,
    best_fit,
    letterboxed,
    squashed,
    tiled,
    unpadded,
    whole,
)
from foveate.remembered import Remembered

NEWLINE = -1


@dataclass(frozen=True)
class AnyResOptions(MethodOptions):
    # Grids to choose from, as rows and columns of tiles: the five of LLaVA-1.6. Empty: the global view alone.
    grids: tuple[tuple[int, int], ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    projector_depth: int = 2  # linear layers of the projector
    activation: Activation = "gelu"  # between them

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(len(grid) != 2 or min(grid) < 1 for grid in self.grids):
            raise FoveateError("grids must be pairs of rows and columns, each at least 1")


def token_sources(plan: ViewPlan, grid: Size) -> np.ndarray:
    """The feature for each LLM token: view * N + patch, or NEWLINE. Shape (plan.tokens,), int64.

    `grid` is the tower's patch grid per view. The tiles' grids join to one large one in raster order, the
    letterbox padding is cut off, and a newline ends each row.
    """
    per_view = grid.height * grid.width
    if plan.tiles == NO_TILES:
        return np.arange(per_view)
    patches = np.arange(per_view, (1 + plan.tiles.height * plan.tiles.width) * per_view)
    tiles = patches.reshape(plan.tiles.height, plan.tiles.width, grid.height, grid.width)
    joined = tiles.transpose(0, 2, 1, 3)  # (tile rows, tile cols, h, w) -> (tile rows, h, tile cols, w)
    joined = joined.reshape(plan.tiles.height * grid.height, plan.tiles.width * grid.width)
    rows, columns = unpadded(Size(*joined.shape), plan.picture)
    lines = np.pad(joined[rows, columns], ((0, 0), (0, 1)), constant_values=NEWLINE)
    return np.concatenate([np.arange(per_view), lines.reshape(-1)])


class AnyResConnector(Connector):
    def __init__(self, widths: Widths, depth: int, grid: Size, activation: Activation = "gelu") -> None:
        super().__init__()
        self.grid = grid
        self.projector = mlp_projector(widths.vision, widths.text, depth, activation)
        self.newline = nn.Parameter(torch.randn(widths.text) * widths.text**-0.5)
        self._sources = Remembered(token_sources, most=4096)

    def forward(self, features: Tensor, plans: Sequence[ViewPlan], query: Query | None) -> VisualTokens:
        tokens = flat(self.projector(features))  # (V, N, C) -> (V N, D)
        rows = torch.cat([tokens, self.newline[None].to(tokens)])  # newline last: index -1
        per_view = features.shape[1]
        first_view = [0, *accumulate(len(plan.views) for plan in plans)]
        sources = [self._sources(plan, self.grid) for plan in plans]
        offset = [
            np.where(s == NEWLINE, len(tokens), s + v * per_view)
            for s, v in zip(sources, first_view, strict=False)
        ]
        return VisualTokens(rows[torch.from_numpy(np.concatenate(offset)).to(rows.device)])


class AnyRes(Method):
    title = "AnyRes"
    idea = "the whole picture and 2 to 4 tiles of a larger canvas, every token kept"
    paper = "LLaVA-NeXT, 2024"
    Options = AnyResOptions
    options: AnyResOptions

    @classmethod
    def options_for(cls, ratio: int) -> dict[str, Any]:
        return {"grids": [[ratio, ratio]]}

    @lru_cache(maxsize=4096)  # noqa: B019  a handful of instances per process
    def plan(self, height: int, width: int) -> ViewPlan:
        picture, side = Size(height, width), self.tower.side
        plans = {grid: self._plan(picture, Size(*grid)) for grid in self.options.grids or (NO_TILES,)}
        fitting = {grid: plan for grid, plan in plans.items() if self._within_budget(plan.tokens)}
        if not fitting:
            raise self._refuse_budget(min(plan.tokens for plan in plans.values()))
        if NO_TILES in fitting:
            return fitting[NO_TILES]
        canvases = {Size(r * side.height, c * side.width): (r, c) for r, c in fitting}
        return fitting[canvases[best_fit(picture, canvases)]]

    def _plan(self, picture: Size, tiles: Size) -> ViewPlan:
        side, grid = self.tower.side, self.tower.grid
        view = View(0, whole(side), "global")
        if tiles == NO_TILES:
            return ViewPlan(picture, (squashed(picture, side),), (view,), self.tower.tokens)
        canvas = Size(tiles.height * side.height, tiles.width * side.width)
        rows, columns = unpadded(Size(tiles.height * grid.height, tiles.width * grid.width), picture)
        lines, columns_kept = rows.stop - rows.start, columns.stop - columns.start
        return ViewPlan(
            picture=picture,
            canvases=(squashed(picture, side), letterboxed(picture, canvas)),
            views=(view, *tiled(1, tiles, side)),
            tokens=self.tower.tokens + lines * (columns_kept + 1),
            tiles=tiles,
        )

    def token_boxes(self, plan: ViewPlan) -> list[Box | None]:
        side, per_view = self.tower.side, self.tower.tokens
        places = [
            plan.to_picture(i, box) for i in range(len(plan.views)) for box in square_grid(side, per_view)
        ]
        return [None if s == NEWLINE else places[s] for s in token_sources(plan, self.tower.grid)]

    def export(self) -> Export:
        options, side = self.options, self.tower.image_size
        if not options.grids:
            raise FoveateError("grids: transformers' class needs at least one")
        if options.max_visual_tokens is not None:
            raise FoveateError(
                "max_visual_tokens: transformers' class has no such bound; take out grids instead"
            )
        pinpoints = {
            "image_grid_pinpoints": [[rows * side, columns * side] for rows, columns in options.grids]
        }
        return hf_export(
            "llava_next",
            "LlavaNextImageProcessorPil",
            options.projector_depth,
            options.activation,
            preprocessor=pinpoints,
            config=pinpoints,
            keys={"connector.newline": "image_newline"},
        )

    def build_connector(self, widths: Widths) -> AnyResConnector:
        options = self.options
        return AnyResConnector(widths, options.projector_depth, self.tower.grid, options.activation)


def _hf_options(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    side = config["vision_config"]["image_size"]
    pinpoints = preprocessor.get("image_grid_pinpoints") or config["image_grid_pinpoints"]
    grids = [[height // side, width // side] for height, width in pinpoints]
    return {"grids": grids, **hf_activation(config)}


def _original_options(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """The authors' pinpoints are widths and heights, multiples of the tower's side."""
    pinpoints, merge = config.get("image_grid_pinpoints"), config.get("mm_patch_merge_type")
    if merge != "spatial_unpad":
        raise FoveateError(
            f"config.json: mm_patch_merge_type {merge!r} is not supported, only 'spatial_unpad'"
        )
    if not (
        isinstance(pinpoints, list)
        and all(isinstance(pair, list) and len(pair) == 2 and all(map(_side, pair)) for pair in pinpoints)
    ):
        raise FoveateError(
            "config.json: image_grid_pinpoints should be a list of widths and heights in pixels"
        )
    given = preprocessor.get("crop_size") or preprocessor.get("size")
    if isinstance(given, Mapping):
        given = given.get("height", given.get("shortest_edge"))
    side = given if _side(given) else math.gcd(*(n for pair in pinpoints for n in pair))
    return {
        "grids": [[height // side, width // side] for width, height in pinpoints],
        "projector_depth": connector_options(config)["projector_depth"],
    }


def _side(value: Any) -> bool:
    return isinstance(value, int) and value > 0


AnyRes.layouts = (
    Layout(
        name="llava-hf/llava-v1.6-*",
        family="hf",
        recognises=lambda config: config.get("model_type") == "llava_next",
        options=_hf_options,
        keys={
            **HF_PROJECTOR,
            r"^(?:model\.)?image_newline$": "connector.newline",
        },
    ),
    Layout(
        name="liuhaotian/llava-v1.6-*",
        family="original",
        recognises=lambda config: known_projector(config) and config.get("image_aspect_ratio") == "anyres",
        options=_original_options,
        keys={
            r"^model\.mm_projector\.(\d)\.": r"connector.projector.\1.",
            r"^model\.mm_projector\.(weight|bias)$": r"connector.projector.0.\1",
            r"^model\.image_newline$": "connector.newline",
        },
    ),
)
