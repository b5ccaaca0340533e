"""Baselines that methods are compared with; registered only inside `with controls():`.

pooled       tiles, averaged down to the tokens of one view, without any enhancement
resampler    the whole picture's tokens as queries that attend to all tokens of the tiles
convnet      a prepared ConvNeXt in place of the tower, on the whole picture at its own resolution
oracle       the region that the question is about as a second view: how much there is to gain
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

from foveate.errors import FoveateError
from foveate.layers import mlp_projector
from foveate.methods import METHODS
from foveate.methods.base import Connector, Method, MethodOptions, Query, VisualTokens, Widths, flat
from foveate.picture.geometry import Box, Canvas, Size, View, ViewPlan, squashed, tiled, whole

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
    """Registers the controls beside the methods within the context."""
    added = {name: place for name, place in CONTROLS.items() if name not in METHODS}
    METHODS.update(added)
    try:
        yield
    finally:
        for name in added:
            METHODS.pop(name)


class GivenRegion(Method):
    """A method that is given the region: its views depend on the question's region."""

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
    with_global: bool = True  # average with the view of the whole picture, which encodes the place of a token
    rows: int | None = None  # of the pooled map, which has as many columns; null: those of a view

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows is not None and self.rows < 1:
            raise FoveateError(f"rows must be at least 1, not {self.rows}")


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
        side = (self.options.rows or h, self.options.rows or w)
        whole_map = large.reshape(len(plans), t * h, t * w, -1).permute(0, 3, 1, 2)  # (P, C, t h, t w)
        pooled = F.adaptive_avg_pool2d(whole_map, side).flatten(2).transpose(1, 2)
        tokens = self.tile_projector(pooled)  # (P, N, D)
        if self.options.with_global:
            own = self.global_projector(views[:, 0])
            if side != (h, w):
                own = own.transpose(1, 2).unflatten(2, (h, w))  # (P, D, h, w)
                own = F.interpolate(own, side, mode="bilinear").flatten(2).transpose(1, 2)
            tokens = (tokens + own) / 2
        return VisualTokens(flat(tokens))


class PooledTiles(Tiled):
    title = "pooled tiles"
    idea = "tiles averaged down to the tokens of one view"
    Options = PooledOptions
    options: PooledOptions

    @property
    def tokens(self) -> int:
        return self.options.rows**2 if self.options.rows else super().tokens

    def build_connector(self, widths: Widths) -> PooledConnector:
        return PooledConnector(widths, self.tower.grid, self.options)


@dataclass(frozen=True)
class ResamplerOptions(TileOptions):
    heads: int = 4  # must divide the LLM's width


class ResamplerConnector(Connector):
    """One cross-attention over the tokens of all views, and one feed-forward layer.

    The queries are the tokens of the whole picture. Queries and keys encode their places by sines and
    cosines, so that a query finds the tokens below it at once; queries without a start take far longer to
    learn.
    """

    def __init__(self, widths: Widths, grid: Size, options: ResamplerOptions) -> None:
        super().__init__()
        if widths.text % (4 * options.heads):
            raise FoveateError(f"an LLM of width {widths.text} cannot be split into {options.heads} heads")
        self.views, self.heads = 1 + options.tiles**2, options.heads
        rows, columns = options.tiles * grid.height, options.tiles * grid.width
        tiles = sincos_places(rows, columns, widths.text, options.heads)
        cut = tiles.unflatten(0, (options.tiles, grid.height)).unflatten(2, (options.tiles, grid.width))
        own = sincos_places(*grid, widths.text, options.heads).flatten(0, 1)  # (N, D)
        of_tiles = cut.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)  # (t t, N, D)
        self.register_buffer("places", torch.cat([own[None], of_tiles]))  # (V, N, D)
        self.project = mlp_projector(widths.vision, widths.text)
        self.norm = nn.LayerNorm(widths.text)
        self.ask = nn.Linear(widths.text, widths.text)
        self.keys_values = nn.Linear(widths.text, 2 * widths.text)
        with torch.no_grad():  # queries and keys start as their inputs, places included
            self.ask.weight.copy_(torch.eye(widths.text))
            self.keys_values.weight[: widths.text].copy_(torch.eye(widths.text))
        self.mix = nn.Linear(widths.text, widths.text)
        self.feed = nn.Sequential(nn.LayerNorm(widths.text), *mlp_projector(widths.text, widths.text))

    def forward(self, features: Tensor, plans: Sequence[ViewPlan], query: Query | None) -> VisualTokens:
        views = self.project(features).unflatten(0, (len(plans), self.views))  # (P, V, N, D)
        placed = self.norm(views) + self.places
        asked = self._split(self.ask(placed[:, 0]))  # (P, heads, N, D / heads)
        key, value = self._split(self.keys_values(placed.flatten(1, 2))).chunk(2, dim=-1)
        read = F.scaled_dot_product_attention(asked, key, value)  # (P, heads, N, D / heads)
        tokens = views[:, 0] + self.mix(read.transpose(1, 2).flatten(2))  # (P, N, D)
        return VisualTokens(flat(tokens + self.feed(tokens)))

    def _split(self, tokens: Tensor) -> Tensor:
        """(P, T, D) -> (P, heads, T, D / heads)"""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def sincos_places(rows: int, columns: int, width: int, heads: int) -> Tensor:
    """(rows, columns, width): sines and cosines of the place of a token's centre in the picture.

    Every head gets long and short waves, along rows and columns.
    """
    waves = torch.pi * 2.0 ** (torch.arange(width // 4) * (5 / (width // 4)))  # half a wave to 16
    waves = waves.unflatten(0, (-1, heads)).T.flatten()
    down = ((torch.arange(rows) + 0.5) / rows)[:, None] * waves
    across = ((torch.arange(columns) + 0.5) / columns)[:, None] * waves
    of_rows = torch.stack([down.sin(), down.cos()], -1)[:, None].expand(rows, columns, -1, -1)
    of_columns = torch.stack([across.sin(), across.cos()], -1)[None].expand(rows, columns, -1, -1)
    return torch.cat([of_rows, of_columns], -1).flatten(2)


class Resampler(Tiled):
    title = "resampler"
    idea = "the tokens of the whole picture attend to the tokens of all tiles"
    Options = ResamplerOptions
    options: ResamplerOptions

    def build_connector(self, widths: Widths) -> ResamplerConnector:
        return ResamplerConnector(widths, self.tower.grid, self.options)


class ProjectorConnector(Connector):
    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.projector = mlp_projector(widths.vision, widths.text)

    def forward(self, features: Tensor, plans: Sequence[ViewPlan], query: Query | None) -> VisualTokens:
        return VisualTokens(flat(self.projector(features)))  # (V, N, C) -> (V N, D)


class OracleCrop(GivenRegion):
    title = "oracle crop"
    idea = "the whole picture, and the region that the question is about at full resolution"
    paper = "control"

    @lru_cache(maxsize=4096)  # noqa: B019  a handful of instances per process
    def plan_for(self, height: int, width: int, region: Box | None) -> ViewPlan:
        picture, side = Size(height, width), self.tower.side
        canvases = (squashed(picture, side), Canvas(side, self._around(region, picture), whole(side)))
        views = (View(0, whole(side), "global"), View(1, whole(side), "region"))
        return ViewPlan(picture, canvases, views, 2 * self.tower.tokens)

    def _around(self, region: Box | None, picture: Size) -> Box:
        """A square around the region, at least as large as a view, moved into the picture."""
        if region is None:
            return whole(picture)
        side = min(max(self.tower.image_size, int(region.width), int(region.height)), *picture)
        left = int(region.left + region.right - side) // 2
        top = int(region.top + region.bottom - side) // 2
        left, top = min(max(left, 0), picture.width - side), min(max(top, 0), picture.height - side)
        return Box(left, top, left + side, top + side)

    def build_connector(self, widths: Widths) -> ProjectorConnector:
        return ProjectorConnector(widths)


@dataclass(frozen=True)
class ConvNetOptions(TileOptions):
    weights: str | None = None  # folder of a ConvNeXt

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is None:
            raise FoveateError("the ConvNet alone needs a prepared one: run `foveate lab prepare`")


class ConvTower(nn.Module):
    """Views (V, 3, h, w) -> features (V, N, C): a ConvNeXt's last map, averaged down to a grid of tokens."""

    def __init__(self, config: PreTrainedConfig, grid: Size) -> None:
        super().__init__()
        self.model, self.grid = AutoModel.from_config(config, trust_remote_code=False), grid

    def forward(self, pixel_values: Tensor) -> Tensor:
        features = self.model(pixel_values).last_hidden_state  # (V, C, h, w)
        return F.adaptive_avg_pool2d(features, (self.grid.height, self.grid.width)).flatten(2).transpose(1, 2)


class PlacedConnector(ProjectorConnector):
    """Adds places, which convolutional features do not encode."""

    def __init__(self, widths: Widths, tokens: int) -> None:
        super().__init__(widths)
        self.places = nn.Parameter(torch.zeros(tokens, widths.vision))

    def forward(self, features: Tensor, plans: Sequence[ViewPlan], query: Query | None) -> VisualTokens:
        return super().forward(features + self.places, plans, query)


class ConvNetOnly(Tiled):
    title = "ConvNet only"
    idea = "a ConvNeXt in place of the tower, on the whole picture at its own resolution"
    Options = ConvNetOptions
    options: ConvNetOptions

    @classmethod
    def options_with(cls, convnet: Path) -> dict[str, Any]:
        return {"weights": str(convnet)}

    @lru_cache(maxsize=4096)  # noqa: B019  a handful of instances per process
    def plan(self, height: int, width: int) -> ViewPlan:
        picture = Size(height, width)
        canvas = Size(*(self.options.tiles * side for side in self.tower.side))
        return ViewPlan(
            picture, (squashed(picture, canvas),), (View(0, whole(canvas), "global"),), self.tower.tokens
        )

    def build_tower(self, vision_config: PreTrainedConfig, layer: int) -> ConvTower:
        return ConvTower(
            AutoConfig.from_pretrained(self.options.weights, trust_remote_code=False), self.tower.grid
        )

    def fill_tower(
        self,
        tower: nn.Module,
        pretrained: PreTrainedModel | None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """The ConvNeXt's own weights."""
        given = AutoModel.from_pretrained(self.options.weights, dtype=torch.float32, trust_remote_code=False)
        tower.get_submodule("model").load_state_dict(given.state_dict())

    def build_connector(self, widths: Widths) -> PlacedConnector:
        return PlacedConnector(widths, self.tower.tokens)
