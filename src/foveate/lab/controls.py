"""What methods are compared with, and what nobody would publish: known only inside `with controls():`.

pooled       tiles, averaged down to the tokens of one view, no enhancement of any kind
resampler    learned queries that attend to all tokens of the tiles
convnet      a convolutional tower in place of the prepared one, on the whole picture at its own pixels
oracle       the region that the question is about as a second view: how much there is to win
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.errors import FoveateError
from foveate.geometry import Box, Canvas, Size, View, ViewPlan, squashed, tiled, whole
from foveate.layers import mlp_projector
from foveate.methods import METHODS
from foveate.methods.base import Connector, Method, MethodOptions, Query, VisualTokens, Widths, flat

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

CONTROLS: dict[str, str] = {
    "pooled": "foveate.lab.controls:PooledTiles",
    "resampler": "foveate.lab.controls:Resampler",
    "oracle": "foveate.lab.controls:OracleCrop",
    "convnet": "foveate.lab.controls:ConvNetOnly",
}


@contextmanager
def controls() -> Iterator[None]:
    """Registers the controls beside the methods for as long as it is entered."""
    added = {name: place for name, place in CONTROLS.items() if name not in METHODS}
    METHODS.update(added)
    try:
        yield
    finally:
        for name in added:
            METHODS.pop(name)


class GivenRegion(Method):
    """A method that is told where to look: its views depend on the question's region."""

    @abstractmethod
    def plan_for(self, height: int, width: int, region: Box | None) -> ViewPlan:
        """As `plan`, for a question about `region` (pixels of the picture), or about the whole picture."""

    def plan(self, height: int, width: int) -> ViewPlan:
        return self.plan_for(height, width, None)


@dataclass(frozen=True)
class TileOptions(MethodOptions):
    tiles: int = 3  # rows, and columns, of tiles

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tiles < 1:
            raise FoveateError(f"tiles must be at least 1, not {self.tiles}")


class Tiled(Method):
    """The whole picture squashed to one view, and squashed to a square of tiles."""

    paper = "control"
    Options = TileOptions
    options: TileOptions

    @classmethod
    def options_for(cls, ratio: int) -> dict[str, Any]:
        return {"tiles": ratio}

    @property
    def tokens(self) -> int:
        """Visual tokens of a picture."""
        return self.tower.tokens

    @lru_cache(maxsize=4096)  # noqa: B019  a handful of instances per process
    def plan(self, height: int, width: int) -> ViewPlan:
        picture, side, tiles = Size(height, width), self.tower.side, self.options.tiles
        canvas, grid = Size(tiles * side.height, tiles * side.width), Size(tiles, tiles)
        return ViewPlan(
            picture=picture,
            canvases=(squashed(picture, side), squashed(picture, canvas)),
            views=(View(0, whole(side), "global"), *tiled(1, grid, side)),
            tokens=self.tokens,
            tiles=grid,
        )


@dataclass(frozen=True)
class PooledOptions(TileOptions):
    with_global: bool = True  # average with the view of the whole picture, which tells the place of a token


class PooledConnector(Connector):
    def __init__(self, widths: Widths, grid: Size, options: PooledOptions) -> None:
        super().__init__()
        self.grid, self.options = grid, options
        self.tile_projector = mlp_projector(widths.vision, widths.text)
        if options.with_global:
            self.global_projector = mlp_projector(widths.vision, widths.text)

    def forward(self, features: Tensor, plans: Sequence[ViewPlan], query: Query | None) -> VisualTokens:
        t, (h, w) = self.options.tiles, self.grid
        views = features.unflatten(0, (len(plans), 1 + t * t))  # (P, 1 + t t, N, C)
        tiles = views[:, 1:].unflatten(1, (t, t)).unflatten(3, (h, w))  # (P, t, t, h, w, C)
        large = tiles.permute(0, 1, 3, 2, 4, 5)  # (P, t, h, t, w, C): the feature map of all tiles
        map_of_tiles = large.reshape(len(plans), h, t, w, t, -1)  # every token's t x t neighbours together
        tokens = self.tile_projector(map_of_tiles.mean((2, 4)).flatten(1, 2))  # (P, N, D)
        if self.options.with_global:
            tokens = (tokens + self.global_projector(views[:, 0])) / 2
        return VisualTokens(flat(tokens))


class PooledTiles(Tiled):
    title = "pooled tiles"
    idea = "tiles averaged down to the tokens of one view"
    Options = PooledOptions
    options: PooledOptions

    def build_connector(self, widths: Widths) -> PooledConnector:
        return PooledConnector(widths, self.tower.grid, self.options)


@dataclass(frozen=True)
class ResamplerOptions(TileOptions):
    queries: int = 36  # visual tokens
    heads: int = 4  # must divide the LLM's width


class ResamplerConnector(Connector):
    """Queries of their own, one cross-attention over the tokens of all views, one feed-forward layer."""

    def __init__(self, widths: Widths, options: ResamplerOptions) -> None:
        super().__init__()
        self.views = 1 + options.tiles**2
        self.queries = nn.Parameter(torch.randn(options.queries, widths.text) * 0.02)
        self.view_place = nn.Parameter(torch.randn(self.views, 1, widths.text) * 0.02)
        self.project = nn.Linear(widths.vision, widths.text)
        self.norm = nn.LayerNorm(widths.text)
        self.heads = options.heads
        self.keys_values = nn.Linear(widths.text, 2 * widths.text)
        self.mix = nn.Linear(widths.text, widths.text)
        self.feed = nn.Sequential(nn.LayerNorm(widths.text), *mlp_projector(widths.text, widths.text))

    def forward(self, features: Tensor, plans: Sequence[ViewPlan], query: Query | None) -> VisualTokens:
        views = self.project(features).unflatten(0, (len(plans), self.views))  # (P, V, N, D)
        keys = self.norm(views + self.view_place).flatten(1, 2)  # (P, V N, D)
        key, value = self._split(self.keys_values(keys)).chunk(2, dim=-1)  # (P, heads, V N, D / heads)
        query_heads = self._split(self.queries[None]).expand(len(plans), -1, -1, -1)
        read = F.scaled_dot_product_attention(query_heads, key, value)  # (P, heads, Q, D / heads)
        tokens = self.queries + self.mix(read.transpose(1, 2).flatten(2))  # (P, Q, D)
        return VisualTokens(flat(tokens + self.feed(tokens)))

    def _split(self, tokens: Tensor) -> Tensor:
        """(P, T, D) -> (P, heads, T, D / heads)"""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Resampler(Tiled):
    title = "resampler"
    idea = "learned queries attend to the tokens of all tiles"
    Options = ResamplerOptions
    options: ResamplerOptions

    @property
    def tokens(self) -> int:
        return self.options.queries

    def build_connector(self, widths: Widths) -> ResamplerConnector:
        return ResamplerConnector(widths, self.options)


class ProjectorConnector(Connector):
    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.projector = mlp_projector(widths.vision, widths.text)

    def forward(self, features: Tensor, plans: Sequence[ViewPlan], query: Query | None) -> VisualTokens:
        return VisualTokens(flat(self.projector(features)))  # (V, N, C) -> (V N, D)


class OracleCrop(GivenRegion):
    title = "oracle crop"
    idea = "the whole picture, and the region that the question is about at its own pixels"
    paper = "control"

    @lru_cache(maxsize=4096)  # noqa: B019  a handful of instances per process
    def plan_for(self, height: int, width: int, region: Box | None) -> ViewPlan:
        picture, side = Size(height, width), self.tower.side
        canvases = (squashed(picture, side), Canvas(side, self._around(region, picture), whole(side)))
        views = (View(0, whole(side), "global"), View(1, whole(side), "region"))
        return ViewPlan(picture, canvases, views, 2 * self.tower.tokens)

    def _around(self, region: Box | None, picture: Size) -> Box:
        """A square around the region, no smaller than a view, moved into the picture."""
        if region is None:
            return whole(picture)
        side = min(max(self.tower.image_size, int(region.width), int(region.height)), *picture)
        left = int(region.left + region.right - side) // 2
        top = int(region.top + region.bottom - side) // 2
        left, top = min(max(left, 0), picture.width - side), min(max(top, 0), picture.height - side)
        return Box(left, top, left + side, top + side)

    def build_connector(self, widths: Widths) -> ProjectorConnector:
        return ProjectorConnector(widths)


class ConvTower(nn.Module):
    """Views (V, 3, h, w) -> features (V, N, C): halved until a token's pixels are few, then cut into tokens.

    Args:
        width: channels C of the features.
        stride: pixels of the view per token, along each axis.
    """

    HALVINGS = 3

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for i in range(self.HALVINGS):
            wider = max(8, width >> (self.HALVINGS - 1 - i))
            layers += [nn.Conv2d(channels, wider, 3, stride=2, padding=1), nn.GroupNorm(4, wider), nn.GELU()]
            layers += [nn.Conv2d(wider, wider, 3, padding=1), nn.GroupNorm(4, wider), nn.GELU()]
            channels = wider
        self.layers = nn.Sequential(
            *layers, nn.Conv2d(channels, width, stride >> self.HALVINGS, stride >> self.HALVINGS)
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.layers(pixel_values).flatten(2).transpose(1, 2)


class ConvNetOnly(Tiled):
    title = "ConvNet only"
    idea = "a convolutional tower on the whole picture at its own pixels"

    @lru_cache(maxsize=4096)  # noqa: B019  a handful of instances per process
    def plan(self, height: int, width: int) -> ViewPlan:
        picture = Size(height, width)
        canvas = Size(*(self.options.tiles * side for side in self.tower.side))
        return ViewPlan(
            picture, (squashed(picture, canvas),), (View(0, whole(canvas), "global"),), self.tower.tokens
        )

    def build_tower(self, vision_config: PreTrainedConfig, layer: int) -> ConvTower:
        stride = self.options.tiles * self.tower.patch_size
        if stride % 2**ConvTower.HALVINGS:
            raise FoveateError(f"a token of {stride} pixels cannot be halved {ConvTower.HALVINGS} times")
        return ConvTower(vision_config.hidden_size, stride)

    def fill_tower(self, tower: nn.Module, pretrained: PreTrainedModel | None) -> None:
        """Nothing: its tower has no part in common with the prepared one."""

    def build_connector(self, widths: Widths) -> ProjectorConnector:
        return ProjectorConnector(widths)
