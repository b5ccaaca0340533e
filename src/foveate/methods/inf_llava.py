"""INF-LLaVA: one large picture cut twice, into tiles and into interleaved views; each enhances the other.

Paper: Ma et al., INF-LLaVA: Dual-perspective Perception for High-Resolution Multimodal Large Language Model,
arXiv 2407.16198. Authors' code: WeihuangLin/INF-LLaVA at ea3e986 (Apache-2.0).

    local and global views of a picture     geometry.tiled, geometry.interleaved   eqs 9-13, 14-17 (DCM)
    F_loc, F_glo out of views' features     inf_llava_index.Axis                   eqs 5-6
    parts of both maps, C_loc and C_glo     inf_llava_index.AxisPlan.groups        eqs 18-19, 22-23
    A = softmax(q k / scale), V = A v       CrossAttention                         eqs 20-21, 24-25
    V_dual                                  Fusion                                 eqs 26-27
    F_pool                                  pooling                                eq. 7
    -> MLP -> LLM, as many as one view has  InfConnector                           eq. 8, section 5.5.1

Paper and authors' code differ. Each difference is an option; defaults are what the released checkpoints need:

    option (default, other)         default: authors' code                   other: paper
    parts crossed, own              F_glo's queries look into tiles,         F_glo's into interleaved parts,
                                    F_loc's into interleaved parts           F_loc's into tiles
    heads 8, 1                      scale sqrt(d / 8)                        scale sqrt(d)
    attention residual, plain       biases, output layer, + query, norm      A v alone
    shared true, false              one attention for both directions        not said
    embed bottleneck, linear        d -> d/16 -> d/2 with GELU               one matrix d -> d/2
    fused authors, paper            [local ; global] + both maps, norm       [global ; local]
    pool bilinear, average          bilinear to one view's grid              average
    low_mix mean, sum               half the sum with the low view           the sum
    low_view centre, none           mixed in before the MLP                  not in eq. 8
    tiles [3, 3], picture           a square of 3 x 3 views                  as many views as fit (eqs 9-10)

Where we differ from the authors: a reduction by bilinear interpolation reads one row in n of the large map,
or two if n is even. Views, queries and everything else that no such row depends on are never computed; all
views go through the tower in one call, and all parts through one attention for each direction. The results
are those of `inf_llava_plain`, which computes everything. At inference the authors' loader enlarges a picture
of 336 pixels to 1008; we show the model what it was trained on. For even n their low-resolution view would be
sampled between pixels without antialiasing; ours is the picture resized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import accumulate, product
from math import isqrt
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import FoveateError
from foveate.layers import exact, mlp_projector
from foveate.methods.base import (
    Connector,
    Method,
    MethodOptions,
    Query,
    Rerun,
    TowerGeometry,
    VisualTokens,
    Widths,
    grid_boxes,
)
from foveate.methods.inf_llava_index import (
    CUTS,
    Axis,
    AxisPlan,
    Cut,
    Direction,
    Groups,
    covered,
    gathered,
    index,
    neighbours,
    parts_of,
)
from foveate.methods.layouts import Layout, connector_options, known_projector
from foveate.picture.account import Account, Spread, placed
from foveate.picture.geometry import (
    Box,
    Canvas,
    Size,
    View,
    ViewPlan,
    cropped,
    interleaved,
    padded,
    squashed,
    tiled,
    whole,
)

MOST_PIXELS = 2**26  # of all views of one kind together: 200 MB as bytes
MOST_VIEWS = 5  # along a side with `tiles: picture`, as far as table 3 goes


@dataclass(frozen=True)
class InfLlavaOptions(MethodOptions):
    retired: ClassVar[Mapping[str, Any]] = {"limit": 5}
    # Views
    tiles: tuple[int, ...] | Literal["picture"] = (3, 3)  # rows and columns; picture: as many as fit into it
    fit: Literal["pad", "crop", "squash"] = "pad"  # how a picture is fitted to the area of all tiles
    crops: Literal["both", "local", "global"] = "both"  # table 6: one kind of views is used for both
    low_view: Literal["centre", "resized", "none"] = "centre"  # centre: the middle interleaved view
    low_mix: Literal["mean", "sum"] = "mean"  # of enhanced and low-resolution features
    # Enhancement
    enhance: Literal["both", "global", "local", "none"] = "both"  # table 4; none: the maps are only added
    parts: Literal["crossed", "own"] = "crossed"  # the parts that a map's queries attend to
    attention: Literal["residual", "plain"] = "residual"
    heads: int = 8
    shared: bool = True  # one attention for both directions
    # Fusion and pooling
    fusion: Literal["concat", "conv", "multiply", "weighted", "max", "add"] = "concat"  # table 5
    embed: Literal["bottleneck", "linear"] = "bottleneck"  # before concat
    fused: Literal["authors", "paper"] = "authors"  # the layers after the fusion, and the order of concat
    pool: Literal["bilinear", "average"] = "bilinear"
    projector_depth: int = 2  # linear layers of the projector

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tiles != "picture" and (len(self.tiles) != 2 or min(self.tiles) < 1):
            raise FoveateError(
                f"tiles must be rows and columns, each at least 1, or 'picture', not {list(self.tiles)}"
            )
        if self.heads < 1:
            raise FoveateError(f"heads must be at least 1, not {self.heads}")


def pooling(rows: int, pooled: int, mode: str) -> np.ndarray:
    """Weights (pooled, rows) of torch's bilinear (corners not aligned) or adaptive average reduction."""
    weights = np.zeros((pooled, rows))
    for i in range(pooled):
        if mode == "average":
            start, end = i * rows // pooled, -(-(i + 1) * rows // pooled)
            weights[i, start:end] = 1 / (end - start)
        else:
            centre = Fraction((2 * i + 1) * rows, 2 * pooled) - Fraction(1, 2)
            low = int(centre)
            weights[i, low] += float(1 - (centre - low))
            weights[i, min(low + 1, rows - 1)] += float(centre - low)
    return weights


def overlaps(rows: int, pooled: int) -> np.ndarray:
    """The fraction of each pooled row that lies on each row of the large map, (pooled, rows)."""
    edges = np.arange(rows + 1) * pooled / rows
    least, most = np.arange(pooled)[:, None], np.arange(1, pooled + 1)[:, None]
    return np.asarray((np.minimum(edges[1:], most) - np.maximum(edges[:-1], least)).clip(min=0))


def directions(options: InfLlavaOptions) -> tuple[Direction, ...]:
    found = []
    other: Mapping[Cut, Cut] = {"local": "global", "global": "local"}
    for name in CUTS:
        if options.enhance in ("both", name):
            maps = (name, other[name]) if options.crops == "both" else (options.crops, options.crops)
            found.append(Direction(name, *maps, other[name] if options.parts == "crossed" else name))
    return tuple(found)


def axis_plan(axis: Axis, pooled: int, options: InfLlavaOptions) -> AxisPlan:
    """What must be computed along one axis for a pooled grid with this number of rows, or columns."""
    added = [cut for cut in CUTS if options.crops in ("both", cut)] if options.enhance == "none" else []
    return AxisPlan(
        axis,
        pooling(axis.views * axis.tokens, pooled, options.pool),
        directions(options),
        neighbours=options.fusion == "conv" and options.enhance == "both",
        added=added,
    )


class Scheme:
    """What must be computed for a picture of `tiles` views, and the order of the views."""

    def __init__(self, tiles: Size, tower: TowerGeometry, pooled: int, options: InfLlavaOptions) -> None:
        self.tiles, self.tower, self.options = tiles, tower, options
        self.rows = axis_plan(Axis(tiles.height, tower.grid.height), pooled, options)
        self.columns = axis_plan(Axis(tiles.width, tower.grid.width), pooled, options)

    @cached_property
    def canvas(self) -> Size:
        return Size(self.tiles.height * self.tower.image_size, self.tiles.width * self.tower.image_size)

    @cached_property
    def views(self) -> list[View]:
        """Every view once, in the tower's order; a shared view comes at its first use."""
        order = {_pixels(view): view for cut in CUTS for view in self._stack(cut)}
        if self.low is not None:
            order.setdefault(_pixels(self.low), self.low)
        return list(order.values())

    @cached_property
    def low(self) -> View | None:
        """The low-resolution view: the middle interleaved one, or canvas number 1."""
        if self.options.low_view == "none":
            return None
        if self.options.low_view == "centre" and self.tiles.height % 2 and self.tiles.width % 2:
            return self.every("global")[self.tiles.height * self.tiles.width // 2]
        return View(1, whole(self.tower.side), "low resolution")

    def every(self, cut: Cut) -> tuple[View, ...]:
        """All views of one kind, needed or not."""
        make = tiled if cut == "local" else interleaved
        return make(0, self.tiles, self.tower.side)

    def _stack(self, cut: Cut) -> list[View]:
        everything = self.every(cut)
        pairs = product(self.rows.views[cut], self.columns.views[cut])
        return [everything[row * self.tiles.width + column] for row, column in pairs]

    @cached_property
    def numbers(self) -> dict[Cut, np.ndarray]:
        """Per cut, the views of its stack as indices into `views`."""
        numbers = {_pixels(view): i for i, view in enumerate(self.views)}
        return {cut: np.array([numbers[_pixels(view)] for view in self._stack(cut)], int) for cut in CUTS}

    @cached_property
    def low_number(self) -> int | None:
        """Index of the low-resolution view in `views`."""
        return None if self.low is None else [_pixels(v) for v in self.views].index(_pixels(self.low))

    @cached_property
    def groups(self) -> dict[Direction, tuple[Groups, Groups]]:
        found = directions(self.options)
        return {one: (self.rows.groups(one), self.columns.groups(one)) for one in found}


def _pixels(view: View) -> tuple[int, Box, Size]:
    """The identity of a view."""
    return view.canvas, view.box, view.steps


def shrunk(canvas: Canvas, tiles: Size) -> Canvas:
    """The whole canvas as one view."""
    content = canvas.content
    left, right = (round(n / tiles.width) for n in (content.left, content.right))
    top, bottom = (round(n / tiles.height) for n in (content.top, content.bottom))
    size = Size(canvas.size.height // tiles.height, canvas.size.width // tiles.width)
    return Canvas(size, canvas.source, Box(left, top, right, bottom), canvas.fill)


# Enhancement and fusion.


class CrossAttention(nn.Module):
    """Tokens of one map attend to those of the other: LN(o(softmax(q k) v) + x), or softmax(q k) v alone."""

    def __init__(self, width: int, options: InfLlavaOptions) -> None:
        super().__init__()
        self.heads, self.residual = options.heads, options.attention == "residual"
        self.query, self.key, self.value = (nn.Linear(width, width, bias=self.residual) for _ in range(3))
        if self.residual:
            self.out = nn.Linear(width, width)
            self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """x (B, M, C), source (B, N, C) -> (B, M, C)"""
        query, key, value = self._split(self.query(x)), self._split(self.key(source)), self.value(source)
        read = F.scaled_dot_product_attention(query, key, self._split(value))
        read = read.transpose(1, 2).flatten(2)  # (B, heads, M, C / heads) -> (B, M, C)
        return self.norm(self.out(read) + x) if self.residual else read

    def received(self, x: Tensor, source: Tensor, real: Tensor) -> Tensor:
        """How much attention each token of `source` gets from queries of these weights.

        `real` (..., B, M) -> (..., B, N).
        """
        query, key = self._split(self.query(x)), self._split(self.key(source))
        attention = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)  # (B, heads, M, N)
        return torch.einsum("bmn,...bm->...bn", attention.mean(1), real.to(attention))

    def _split(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, heads, N, C / heads)"""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Fusion(nn.Module):
    """Two enhanced maps -> one (table 5)."""

    def __init__(self, width: int, options: InfLlavaOptions) -> None:
        super().__init__()
        self.kind, self.authors = options.fusion, options.fused == "authors"
        if self.kind == "concat":
            self.embed = nn.ModuleDict({cut: embedding(width, options.embed) for cut in CUTS})
        elif self.kind == "conv":
            self.conv = nn.Conv2d(2 * width, width, 3, stride=3)  # over 3 x 3 neighbours, laid out apart
        elif self.kind == "weighted":
            self.weights = nn.Parameter(torch.full((2,), 0.5))
        if self.authors:
            self.norm = nn.LayerNorm(width)

    def forward(self, maps: Mapping[Cut, Tensor]) -> Tensor:
        """Twice (P, h, w, C) -> (P, h, w, C); conv takes (P, 3 h, 3 w, C), see `neighbours`."""
        fused = self._fuse(maps["local"], maps["global"])
        if not self.authors:
            return fused
        itself = [x[:, 1::3, 1::3] if self.kind == "conv" else x for x in maps.values()]
        return self.norm(fused + itself[0] + itself[1])

    def _fuse(self, local: Tensor, whole: Tensor) -> Tensor:
        if self.kind in ("concat", "conv"):
            both = [local, whole]
            if self.kind == "concat":
                both = [self.embed[cut](x) for cut, x in zip(CUTS, both, strict=True)]
            joined = torch.cat(both if self.authors else both[::-1], -1)
            if self.kind == "concat":
                return joined
            return self.conv(joined.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # (P, 2 C, h, w) -> (P, h, w, C)
        if self.kind == "weighted":
            return self.weights[0] * local + self.weights[1] * whole
        simple: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "multiply": torch.mul,
            "max": torch.maximum,
            "add": torch.add,
        }
        return simple[self.kind](local, whole)


def embedding(width: int, kind: str) -> nn.Module:
    """Halves the channels before two maps are concatenated."""
    if kind == "linear":
        return nn.Linear(width, width // 2, bias=False)
    narrow = max(1, width // 16)
    return nn.Sequential(nn.Linear(width, narrow), nn.GELU(), nn.Linear(narrow, width // 2))


class InfConnector(Connector):
    def __init__(
        self, widths: Widths, scheme: Callable[[Size], Scheme], low: Size, options: InfLlavaOptions
    ) -> None:
        super().__init__()
        width = widths.vision
        self.options, self.scheme, self.grid = options, scheme, low
        found = directions(options)
        if found and width % options.heads:
            raise FoveateError(f"heads {options.heads} must divide the vision tower's width {width}")
        if len(found) == 2 and options.fusion == "concat" and width % 2:
            raise FoveateError(f"fusion concat needs an even width of the vision tower, not {width}")
        names = ["both"] if options.shared else [direction.name for direction in found]
        self.attention = nn.ModuleDict({name: CrossAttention(width, options) for name in names if found})
        if len(found) == 2:
            self.fusion = Fusion(width, options)
        self.projector = mlp_projector(widths.vision, widths.text, options.projector_depth)

    def forward(self, features: Tensor, plans: Sequence[ViewPlan], query: Query | None) -> VisualTokens:
        first_view = [0, *accumulate(len(plan.views) for plan in plans)]
        tokens: dict[int, Tensor] = {}
        for tiles in dict.fromkeys(plan.tiles for plan in plans):  # pictures with equal tiles together
            mine = [p for p, plan in enumerate(plans) if plan.tiles == tiles]
            scheme = self.scheme(tiles)
            rows = [first_view[p] + view for p in mine for view in range(len(scheme.views))]
            views = features[index(np.array(rows), features)]  # (P V, N, C)
            views = views.unflatten(0, (len(mine), -1))
            mixed = self.mixed(self.pooled(self.dual(views, scheme), scheme), views, scheme)
            projected = self.projector(mixed.flatten(1, 2))  # (P, h w, D)
            tokens |= dict(zip(mine, projected, strict=True))
        return VisualTokens(torch.cat([tokens[p] for p in range(len(plans))]))

    def dual(self, views: Tensor, scheme: Scheme) -> Tensor:
        """(P, V, N, C) -> the rows and columns of V_dual that pooling reads, (P, h, w, C)."""
        stacks = self.stacks(views, scheme)
        if not scheme.groups:
            rows, columns = scheme.rows, scheme.columns
            return torch.stack(
                [
                    gathered(stack, rows.at(cut, rows.live), columns.at(cut, columns.live))
                    for cut, stack in stacks.items()
                ]
            ).sum(0)
        maps = {direction.name: self.enhanced(direction, stacks, scheme) for direction in scheme.groups}
        if len(maps) == 1:
            return next(iter(maps.values()))
        if scheme.rows.near is not None and scheme.columns.near is not None:
            maps = {name: neighbours(x, scheme.rows.near, scheme.columns.near) for name, x in maps.items()}
        return self.fusion(maps)

    def stacks(self, views: Tensor, scheme: Scheme) -> dict[Cut, Tensor]:
        """(P, V, N, C) -> per cut its views' features as one map (P, views h, views w, C), see `AxisPlan`."""
        grid, stacks = self.grid, {}
        for cut, numbers in scheme.numbers.items():
            if len(numbers):
                rows = len(scheme.rows.views[cut])
                taken = views[:, index(numbers, views)]  # (P, R K, N, C)
                cells = taken.unflatten(2, tuple(grid)).unflatten(1, (rows, -1))  # (P, R, K, h, w, C)
                stacks[cut] = cells.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (P, R h, K w, C)
        return stacks

    def enhanced(self, direction: Direction, stacks: Mapping[Cut, Tensor], scheme: Scheme) -> Tensor:
        """Live rows and columns of a map after enhancement, (P, h, w, C)."""
        rows, columns = scheme.groups[direction]
        x, source = self._looking(direction, stacks, scheme)
        read = self.attention_of(direction)(x, source)  # (P A B, m n, C)
        parts = (len(rows.queries), len(columns.queries))
        sides = (rows.queries.shape[1], columns.queries.shape[1])
        cells = read.unflatten(1, sides).unflatten(0, (-1, *parts))  # (P, A, B, m, n, C)
        part_r, slot_r = (index(n, read)[:, None] for n in (rows.part, rows.slot))
        part_c, slot_c = (index(n, read)[None] for n in (columns.part, columns.slot))
        return cells[:, part_r, part_c, slot_r, slot_c]

    def _looking(
        self, direction: Direction, stacks: Mapping[Cut, Tensor], scheme: Scheme
    ) -> tuple[Tensor, Tensor]:
        """Queries (P A B, m n, C) and what they attend to (P A B, N, C), for A x B parts."""
        rows, columns = scheme.groups[direction]
        return (
            parts_of(stacks[direction.queries], rows.queries, columns.queries),
            parts_of(stacks[direction.keys], rows.keys, columns.keys),
        )

    def attention_of(self, direction: Direction) -> CrossAttention:
        module = self.attention["both" if self.options.shared else direction.name]
        assert isinstance(module, CrossAttention)
        return module

    def pooled(self, dual: Tensor, scheme: Scheme) -> Tensor:
        """Live rows and columns (P, h, w, C) -> (P, pooled, pooled, C)"""
        return reduced(dual, scheme.rows.weights, scheme.columns.weights)

    def mixed(self, dual: Tensor, views: Tensor, scheme: Scheme) -> Tensor:
        """The pooled map (P, pooled, pooled, C) mixed with the low-resolution view, which is pooled alike."""
        if scheme.low_number is None:
            return dual
        low = views[:, scheme.low_number].unflatten(1, tuple(self.grid))  # (P, h, w, C)
        if low.shape != dual.shape:
            rows, columns = (
                pooling(n, m, self.options.pool) for n, m in zip(self.grid, dual.shape[1:3], strict=True)
            )
            low = reduced(low, rows, columns)
        return (dual + low) / 2 if self.options.low_mix == "mean" else dual + low

    @torch.no_grad()
    def account(self, features: Callable[[], Tensor], plan: ViewPlan) -> Account:
        """Where the enhancement looked, and how many views cannot reach the answer."""
        scheme = self.scheme(plan.tiles)
        cuts = CUTS if self.options.crops == "both" else (self.options.crops,)
        every = [_pixels(view) for cut in cuts for view in scheme.every(cut)]
        dead = len({*every} - {_pixels(view) for view in scheme.views})
        notes = [f"{dead} of the {len(every)} views cannot reach the answer and are not read"] if dead else []
        if not scheme.groups:
            return Account(notes=notes)
        attended = self.attended(features()[None], scheme)
        weights = (attended / attended.max()).clip(min=0.01)  # 0 would mean dropped
        page = ViewPlan(plan.picture, plan.canvases, (View(0, whole(scheme.canvas), "page"),), plan.tokens)
        left, top, right, bottom = map(float, page.to_picture(0, whole(scheme.canvas)))
        across, down = (right - left) / weights.shape[1], (bottom - top) / weights.shape[0]
        cells = [
            (Box(left + c * across, top + r * down, left + (c + 1) * across, top + (r + 1) * down), weight)
            for (r, c), weight in np.ndenumerate(weights)
        ]
        heat = [(box.clipped(plan.picture), float(weight)) for box, weight in cells]
        return Account(heat=lambda: heat, notes=["warm: where the enhancement looked most", *notes])

    @torch.no_grad()
    def attended(self, views: Tensor, scheme: Scheme) -> np.ndarray:
        """How much attention each cell of a picture's large map gets, (1, V, N, C) -> (rows, columns).

        A token of an interleaved view covers n x n cells, which share its attention.
        """
        stacks = self.stacks(views, scheme)
        tiles, grid = scheme.tiles, self.grid
        cells = np.zeros((grid.height, tiles.height, grid.width, tiles.width))
        for direction, (rows, columns) in scheme.groups.items():
            x, source = self._looking(direction, stacks, scheme)
            real = index(rows.real[:, None, :, None] & columns.real[None, :, None, :], x)  # (A, B, m, n)
            got = self.attention_of(direction).received(x, source, real.flatten(2).flatten(0, 1))
            cells += self._on_large_map(got, direction, scheme).reshape(cells.shape)
        return cells.reshape(tiles.height * grid.height, tiles.width * grid.width)

    def _on_large_map(self, got: Tensor, direction: Direction, scheme: Scheme) -> np.ndarray:
        """What attended tokens got (A B, N) -> what cells of the large map got, (rows, columns)."""
        rows, columns = scheme.groups[direction]
        heights, widths = (
            covered(axis, direction.keys) for axis in (scheme.rows, scheme.columns)
        )  # (rows of the large map, rows of the stack)
        stack = np.zeros((heights.shape[1], widths.shape[1]))
        places = rows.keys[:, None, :, None], columns.keys[None, :, None, :]
        stack[places] = got.double().cpu().numpy().reshape(len(rows.keys), len(columns.keys), *self.grid)
        return heights @ stack @ widths.T

    @torch.no_grad()
    def rolled_back(self, views: Tensor, scheme: Scheme, relevance: np.ndarray) -> np.ndarray:
        """Relevance of the pooled map (K, pooled, pooled) -> of the large map's cells, (K, rows, columns).

        Along the connector's own weights. Where the connector adds things up, each counts the same: the
        enhanced and the low-resolution features, the two enhanced maps, and within one a token's own features
        and what it attended to. Not followed: the low-resolution view within a pooled cell, over which its
        share is spread evenly, and the neighbours that the fusion `conv` reads.
        """
        rows, columns = scheme.rows, scheme.columns
        shape = (scheme.tiles.height * self.grid.height, scheme.tiles.width * self.grid.width)
        cells = np.zeros((len(relevance), *shape))
        if scheme.low_number is not None:
            relevance = relevance / 2
            down, across = (overlaps(n, m) for n, m in zip(shape, relevance.shape[1:], strict=True))
            cells += down.T @ relevance @ across
        fused = rows.weights.T @ relevance @ columns.weights  # (K, fused rows, fused columns)
        own = 0.5 if scheme.groups and self.options.attention == "residual" else float(not scheme.groups)
        stacks = self.stacks(views, scheme)
        maps = [direction.queries for direction in scheme.groups] or list(stacks)
        for cut in maps:
            down, across = (
                covered(axis, cut)[:, axis.at(cut, axis.fused)] for axis in (rows, columns)
            )  # (rows of the large map, fused rows)
            cells += own / len(maps) * (down @ fused @ across.T)
        for direction, groups in scheme.groups.items():
            x, source = self._looking(direction, stacks, scheme)
            places = [np.searchsorted(axis.live, axis.fused) for axis in (rows, columns)]
            r, c = (
                (axis.part[at], axis.slot[at]) for axis, at in zip(groups, places, strict=True)
            )  # (fused,) each
            parts, slots = zip(*(axis.queries.shape for axis in groups), strict=True)
            asking = np.zeros((len(fused), *parts, *slots))  # (K, A, B, m, n)
            asking[:, r[0][:, None], c[0], r[1][:, None], c[1]] = fused
            weights = torch.from_numpy(asking).flatten(3).flatten(1, 2)  # (K, A B, m n)
            got = self.attention_of(direction).received(x, source, weights.to(x.device, torch.float32))
            share = (1 - own) / len(scheme.groups)
            cells += share * np.stack([self._on_large_map(one, direction, scheme) for one in got])
        return cells


def reduced(x: Tensor, rows: np.ndarray, columns: np.ndarray) -> Tensor:
    """(P, h, w, C), weights (g, h) and (g, w) -> (P, g, g, C); at least in float32, as weights are thirds."""
    kind = x.dtype
    with exact(x):
        for axis, weights in ((1, rows), (2, columns)):
            if not np.array_equal(weights, np.eye(*weights.shape)):
                x = x.to(torch.promote_types(kind, torch.float32))
                given = torch.from_numpy(weights).to(x)
                x = torch.tensordot(given, x, ([1], [axis])).movedim(0, axis)
    return x.to(kind)


class InfLlava(Method):
    title = "INF-LLaVA"
    idea = "tiles and interleaved views of a large square enhance each other, pooled to one view's tokens"
    paper = "arXiv 2407.16198"
    Options = InfLlavaOptions
    options: InfLlavaOptions

    def __init__(self, tower: TowerGeometry, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(tower, options)
        budget, tiles = self.options.max_visual_tokens, self.options.tiles
        rows, columns = (MOST_VIEWS, MOST_VIEWS) if tiles == "picture" else tiles
        if rows * columns * tower.image_size**2 > MOST_PIXELS:
            raise FoveateError(
                f"{rows} x {columns} views of {tower.image_size} pixels are more than {MOST_PIXELS} pixels: "
                "make tiles smaller"
            )
        side = tower.grid.height
        self.pooled = side if budget is None else min(side, isqrt(budget))  # side of the pooled grid
        self._schemes: dict[Size, Scheme] = {}

    @classmethod
    def options_for(cls, ratio: int) -> dict[str, Any]:
        return {"tiles": [ratio, ratio]}

    def scheme(self, tiles: Size) -> Scheme:
        """What must be computed for a picture with these rows and columns of views."""
        if tiles not in self._schemes:
            self._schemes[tiles] = Scheme(tiles, self.tower, self.pooled, self.options)
        return self._schemes[tiles]

    @lru_cache(maxsize=4096)  # noqa: B019  a handful of instances per process
    def plan(self, height: int, width: int) -> ViewPlan:
        picture = Size(height, width)
        scheme = self.scheme(self._tiles(picture))
        fit = {"pad": padded, "crop": cropped, "squash": squashed}[self.options.fit]
        canvas = fit(picture, scheme.canvas)
        canvases = (canvas, shrunk(canvas, scheme.tiles))
        used = 1 + max(view.canvas for view in scheme.views)
        return ViewPlan(picture, canvases[:used], tuple(scheme.views), self.pooled**2, scheme.tiles)

    def _tiles(self, picture: Size) -> Size:
        """Eqs 9-10: as many views as fit side by side into the picture, at most `MOST_VIEWS`."""
        if self.options.tiles != "picture":
            return Size(*self.options.tiles)
        longest = max(picture)
        if longest > MOST_VIEWS * self.tower.image_size:
            return Size(*(max(1, n * MOST_VIEWS // longest) for n in picture))
        return Size(*(max(1, n // self.tower.image_size) for n in picture))

    def token_boxes(self, plan: ViewPlan) -> list[Box | None]:
        """The pooled grid, which covers all of the canvas."""
        return [*self._on_canvas(plan, Size(self.pooled, self.pooled))]

    def _on_canvas(self, plan: ViewPlan, cells: Size) -> list[Box]:
        """The canvas cut into rows and columns of cells, in original pixels."""
        canvas = plan.canvases[0].size
        over = ViewPlan(plan.picture, plan.canvases[:1], (View(0, whole(canvas), "canvas"),), plan.tokens)
        return [over.to_picture(0, box) for box in grid_boxes(canvas, cells)]

    def build_connector(self, widths: Widths) -> InfConnector:
        return InfConnector(widths, self.scheme, self.tower.grid, self.options)

    def spread(self, run: Rerun, relevance: Tensor, account: Account) -> Spread:
        """Relevance goes back through pooling and enhancement, as `InfConnector.rolled_back` does it.

        Parts are the cells of the large map, one a patch of a tile. A token attends to a whole tile, or to a
        part of all interleaved views, so that its relevance reaches cells beyond its own box.
        """
        connector, plan = run.connector, run.plan
        assert isinstance(connector, InfConnector)
        scheme = self.scheme(plan.tiles)
        pooled = relevance.double().numpy().reshape(-1, self.pooled, self.pooled)
        cells = connector.rolled_back(run.features()[None], scheme, pooled)  # (K, rows, columns)
        boxes = [box.inside(plan.picture) for box in self._on_canvas(plan, Size(*cells.shape[1:]))]
        tokens = [box and box.inside(plan.picture) for box in self.token_boxes(plan)]
        return placed(boxes, torch.from_numpy(cells).flatten(1).to(relevance))._replace(tokens=tokens)

    def account(self, run: Rerun) -> Account:
        assert isinstance(run.connector, InfConnector)
        return run.connector.account(run.features, run.plan)


_DEM = r"^model\.spatial_embed\."

InfLlava.layouts = (
    Layout(
        name="WeihuangLin/INF*-LLaVA-sft",
        family="original",
        recognises=known_projector,
        options=lambda config, preprocessor: connector_options(config),
        keys={
            **{
                rf"{_DEM}attention\.linears\.{i}\.": f"connector.attention.both.{ours}."
                for i, ours in enumerate(("query", "key", "value", "out"))
            },
            rf"{_DEM}attention\.ln\.": "connector.attention.both.norm.",
            rf"{_DEM}ffn_crop\.": "connector.fusion.embed.local.",
            rf"{_DEM}ffn_stride\.": "connector.fusion.embed.global.",
            rf"{_DEM}ln_fuse\.": "connector.fusion.norm.",
            r"^model\.mm_projector\.(\d)\.": r"connector.projector.\1.",
            r"^model\.mm_projector\.(weight|bias)$": r"connector.projector.0.\1",
        },
        told_by=_DEM,
        template="llama3_v1",
        connector_files=("mm_projector.bin",),
    ),
)
