"""SliME: the whole picture through a soft mixture of two adapters, and tiles compressed to a few
tokens each, of which a router keeps those that matter to the question.

Paper: Zhang et al., Beyond LLaVA-HD: Diving into High-Resolution Large Multimodal Models, arXiv 2406.08487.
Authors' code: yfzhang114/SliME at 5c89ec9 (Apache-2.0).

    grid choice, global view, tiles         Slime.plan           section 2.1, "Scaling Input Resolution"
    G(x)_0 f_m(x) + G(x)_1 f_q(x)           Mixture              section 2.1, "Soft Mixture of Experts"
    N_q queries read a tile                 QueryFormer          section 2.2, "Local Feature Compression"
    scores, cumulative threshold gamma      Router               section 2.2, "Text-Guided Router"
    global | separator | local, in raster   SlimeConnector       figure 2 (d)
    three stages, four runs                 train/recipes/slime  section 2.2, "Alternating Training Scheme"

Paper and authors' code differ. Defaults are what the released checkpoints need; the first column names the
option if there is one:

    option (default, other)                     here: authors' code                paper
    grids authors, paper                        2 to 7 tiles near the own area     1 x 1 to 6 x 6
    global view                                 stretched to the square            padded
    gate authors, paper                         noise scale softplus(x W_g)+0.01,  softplus(x W_noise),
                                                gates / (sum + 1e-6)               plain softmax
    gate                                        a gate per token                   not said
    query former of the global view             f_q ends in f_m's MLP              an adapter of its own
    similarity cosine_sum, dot_mean,            cosine, summed over text           dot product, averaged
               cosine_mean
    router_text prompt, question, sequence      all text but the answer            the question
    gamma 0.95                                  of all fine-tuning scripts         0.5, 0.75, 0.9
    separator                                   the comma's embedding              none

Where we differ from the authors: in training their router also reads the answer (as `router_text: sequence`
does); without any text nothing is dropped; similarities are one product with the summed text, not a tensor of
tokens x words x channels; training batches are not padded to 10 views; the unused W_noise of released
checkpoints is left out unless `gate: paper` needs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import accumulate
from math import isqrt
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import FoveateError
from foveate.layers import exact, mlp_projector, projected
from foveate.methods.base import (
    Connector,
    Method,
    MethodOptions,
    Query,
    QueryText,
    Rerun,
    TowerGeometry,
    VisualTokens,
    Widths,
    flat,
    square_grid,
)
from foveate.methods.layouts import Layout
from foveate.picture.account import Account, Spread, placed
from foveate.picture.geometry import (
    NO_TILES,
    Box,
    Canvas,
    Size,
    View,
    ViewPlan,
    best_fit,
    letterboxed,
    squashed,
    tiled,
    whole,
)
from foveate.remembered import Remembered

SEPARATOR = -1  # in `token_sources`
ROUTER_NOISE = 0.1  # standard deviation of the noise on the router's scores in training


@dataclass(frozen=True)
class SlimeOptions(MethodOptions):
    retired: ClassVar[Mapping[str, Any]] = {
        "global_view": "squash",
        "enlarge": True,
        "gate_per": "token",
        "expert_mlp": "shared",
        "separator": True,
        "router_noise": 0.1,
    }
    # Views
    grids: Literal["authors", "paper"] = "authors"  # which grids of tiles may be chosen
    grid_limit: int = 6  # authors: most tiles aimed at, one more may result; paper: rows and columns
    use_global_only: bool = False  # no tiles
    use_local_only: bool = False  # tiles only, without separator
    # Connector
    experts: Literal["mixture", "mlp", "query_former"] = "mixture"  # adapters of the global view
    gate: Literal["authors", "paper"] = "authors"  # the gate's noise in training, and its normalisation
    queries: int | None = None  # N_q per tile, a square number; null: a quarter of the tower's tokens
    heads: int | None = None  # of attention; null: one per 128 channels
    # Router
    gamma: float = 0.95  # local tokens are kept until their summed probability passes this; 1: all
    similarity: Literal["cosine_sum", "cosine_mean", "dot_mean"] = "cosine_sum"
    temperature: float = 1.0  # of the softmax over local tokens
    router_text: QueryText = "prompt"  # what the router reads

    def __post_init__(self) -> None:
        super().__post_init__()
        least = 2 if self.grids == "authors" else 1
        if self.grid_limit < least:
            raise FoveateError(
                f"grid_limit must be at least {least} with grids {self.grids}, not {self.grid_limit}"
            )
        if self.use_global_only and self.use_local_only:
            raise FoveateError(
                "use_global_only and use_local_only exclude each other: set one of them to false"
            )
        if self.queries is not None and (self.queries < 1 or isqrt(self.queries) ** 2 != self.queries):
            raise FoveateError(f"queries must be a square number such as 64, 144 or 196, not {self.queries}")
        if self.heads is not None and self.heads < 1:
            raise FoveateError(f"heads must be at least 1, not {self.heads}")
        if not 0 < self.gamma <= 1:
            raise FoveateError(f"gamma must be above 0 and at most 1, not {self.gamma}")
        if self.temperature <= 0:
            raise FoveateError(f"temperature must be above 0, not {self.temperature}")


# Views.


def candidate_grids(picture: Size, side: Size, options: SlimeOptions) -> Iterator[Size]:
    """Rows and columns of tiles that may be chosen; on a tie, `best_fit` takes the first."""
    limit = options.grid_limit
    if options.grids == "paper":
        yield from (Size(rows, columns) for columns in range(1, limit + 1) for rows in range(1, limit + 1))
        return
    views = -(-picture.height * picture.width // (side.height * side.width))  # that its area is worth
    near = min(max(views, 2), limit)
    for count in range(max(near - 1, 2), near + 2):
        yield from (
            Size(count // columns, columns) for columns in range(1, count + 1) if count % columns == 0
        )


def raster(tiles: Size, side: int) -> np.ndarray:
    """Queries of all tiles, side x side each, in raster order of the grid: (n,), tile * side^2 + query."""
    numbers = np.arange(tiles.height * tiles.width * side * side)
    in_tiles = numbers.reshape(tiles.height, tiles.width, side, side)
    return in_tiles.transpose(0, 2, 1, 3).reshape(-1)  # (tile rows, rows, tile columns, columns)


def token_sources(plan: ViewPlan, per_view: int, side: int) -> np.ndarray:
    """As `SlimeConnector.token_sources`."""
    parts = [raster(plan.tiles, side) + per_view]
    if plan.views[0].role == "global":
        comma = [SEPARATOR] if plan.tiles != NO_TILES else []
        parts = [np.arange(per_view), np.array(comma, dtype=np.int64), *parts]
    return np.concatenate(parts)


# Connector.


def sincos_positions(width: int, grid: Size) -> Tensor:
    """Fixed 2-D positions (h w, C): half the channels encode the column, half the row, each sine then cosine.

    Rounded to half precision, as in released checkpoints.
    """
    frequencies = 10000.0 ** -(np.arange(width // 4) / (width // 4))
    rows, columns = np.meshgrid(np.arange(grid.height), np.arange(grid.width), indexing="ij")
    angles = [place.reshape(-1, 1) * frequencies for place in (columns, rows)]  # (h w, C / 4) each
    table = np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1)
    return torch.from_numpy(table).half().float()


class QueryFormer(nn.Module):
    """Learnable queries read a view through one cross attention: LN(attention(q + p, LN(x) + p', LN(x))).

    No residual, no feed-forward part. `grid` arranges the queries, `source` the tokens they read.
    """

    positions: Tensor

    def __init__(self, width: int, grid: Size, source: Size, heads: int) -> None:
        super().__init__()
        self.grid, self.source, self.heads = grid, source, heads
        self.queries = nn.Parameter(torch.empty(grid.height * grid.width, width))
        self.register_buffer("positions", torch.empty_like(self.queries, requires_grad=False))
        self.query_norm, self.feature_norm, self.output_norm = (nn.LayerNorm(width, 1e-6) for _ in range(3))
        self.project_in = nn.Linear(width, 3 * width)  # query, key and value
        self.project_out = nn.Linear(width, width)
        self.positions.copy_(sincos_positions(width, grid))
        nn.init.trunc_normal_(self.queries, std=0.02)
        nn.init.xavier_uniform_(self.project_in.weight)
        nn.init.zeros_(self.project_in.bias)
        nn.init.zeros_(self.project_out.bias)

    def source_positions(self) -> Tensor:
        """The queries' positions resized to the tokens they read, (N, C)."""
        if self.grid == self.source:
            return self.positions
        table = self.positions.float().T.reshape(1, -1, *self.grid)  # (1, C, h, w)
        table = F.interpolate(table, self.source, mode="bicubic")
        return table.flatten(2)[0].T.half().to(self.positions)  # rounded like the table itself

    def forward(self, features: Tensor) -> Tensor:
        """(V, N, C) -> (V, Q, C)"""
        query = self.query_norm(self.queries[None]) + self.positions  # (1, Q, C), shared by all views
        value = self.feature_norm(features)
        key = value + self.source_positions()
        parts = projected(self.project_in, query, key, value)
        query, key, value = map(self._split, parts)  # (1 or V, heads, Q or N, C / heads)
        read = F.scaled_dot_product_attention(query.expand(len(features), -1, -1, -1), key, value)
        return self.output_norm(self.project_out(read.transpose(1, 2).flatten(2)))

    def attention(self, features: Tensor) -> Tensor:
        """How much each query reads of each token, a mean over heads: (V, N, C) -> (V, Q, N)."""
        query = self.query_norm(self.queries[None]) + self.positions
        key = self.feature_norm(features) + self.source_positions()
        query, key, _ = map(self._split, projected(self.project_in, query, key, key))
        return (query @ key.mT * query.shape[-1] ** -0.5).float().softmax(-1).mean(1)

    def _split(self, tokens: Tensor) -> Tensor:
        """(V, N, C) -> (V, heads, N, C / heads)"""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Mixture(nn.Module):
    """The adapter of the global view: an MLP and a query former with as many queries as tokens, mixed."""

    def __init__(self, widths: Widths, grid: Size, heads: int, options: SlimeOptions) -> None:
        super().__init__()
        self.options = options
        self.mlp = mlp_projector(widths.vision, widths.text)
        self.former = QueryFormer(widths.vision, grid, grid, heads)
        self.gate = nn.Parameter(torch.zeros(widths.vision, 2))
        if options.gate == "paper":
            self.noise = nn.Parameter(torch.zeros(widths.vision, 2))

    def forward(self, features: Tensor) -> Tensor:
        """(P, N, C) -> (P, N, D)"""
        if self.options.experts == "mlp":
            return self.mlp(features)
        read = self.mlp(self.former(features))
        if self.options.experts == "query_former":
            return read
        first, second = self.gates(features).to(read).split(1, dim=-1)  # (P, N, 1) each
        return first * self.mlp(features) + second * read

    def gates(self, features: Tensor, noise: Tensor | None = None) -> Tensor:
        """G(x), (P, N, C) -> (P, N, 2). `noise`: samples of Normal(0, 1); drawn here in training."""
        logits = features @ self.gate.to(features)
        if self.training and noise is None:
            noise = torch.randn_like(logits)
        if noise is not None and self.options.gate == "paper":
            logits = logits + noise * F.softplus(features @ self.noise.to(features))
        elif noise is not None:
            logits = logits + noise * (F.softplus(logits) + 0.01)
        gates = logits.softmax(-1)
        return gates if self.options.gate == "paper" else gates / (gates.sum(-1, keepdim=True) + 1e-6)


class Router(nn.Module):
    """Selects the local tokens that matter to the text. It has no parameters and passes no gradient."""

    def __init__(self, options: SlimeOptions) -> None:
        super().__init__()
        self.options = options

    def scores(self, tokens: Tensor, owner: Tensor, query: Query) -> Tensor:
        """(n, D) local tokens, `owner` (n,) the picture of each -> (n,) similarity to its text.

        The sum over text tokens of t . v is (sum of t) . v: one product for all pictures.
        """
        with exact(tokens):
            tokens, words = tokens.float(), query.embeds.float()
            mask = query.mask.to(words)[..., None]  # (P, T, 1)
            if self.options.similarity != "dot_mean":
                words = F.normalize(words, dim=-1, eps=1e-8)
            text = (words * mask).sum(1)  # (P, D)
            if self.options.similarity != "cosine_sum":
                text = text / mask.sum(1).clamp(min=1)
            scores = (tokens @ text.T).gather(1, owner[:, None])[:, 0]  # (n, P) -> (n,)
            if self.options.similarity != "dot_mean":
                scores = scores / torch.linalg.vector_norm(tokens, dim=-1).clamp(min=1e-8)
            return scores

    def probabilities(self, scores: Tensor, noise: Tensor | None = None) -> Tensor:
        """(P, L) scores, -inf for padding -> (P, L). `noise` as for `Mixture.gates`."""
        if self.training and noise is None:
            noise = torch.randn_like(scores)
        if noise is not None:
            scores = scores + ROUTER_NOISE * noise
        return (scores / self.options.temperature).softmax(1)

    def forward(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """(P, L) -> mask of kept tokens, and each token's rank, 0 for the most probable.

        The most probable are kept until their sum passes gamma, including the one that passes it.
        """
        ranked, order = probabilities.sort(dim=1, descending=True, stable=True)
        rank = order.argsort(1)
        if self.options.gamma == 1:  # the sum of all may round to less
            return torch.ones_like(probabilities, dtype=torch.bool), rank
        within = (ranked.cumsum(1) <= self.options.gamma).sum(1, keepdim=True)
        return rank <= within, rank


class SlimeConnector(Connector):
    shares_pictures = True

    def __init__(self, widths: Widths, grid: Size, side: int, options: SlimeOptions) -> None:
        super().__init__()
        heads = options.heads or max(1, widths.vision // 128)
        if widths.vision % heads or widths.vision % 4:
            raise FoveateError(f"heads {heads} and 4 must divide the vision tower's width {widths.vision}")
        self.per_view, self.per_tile, self.side = grid.height * grid.width, side * side, side
        self.gamma = options.gamma
        self.adapter = Mixture(widths, grid, heads, options)
        self.compressor = QueryFormer(widths.vision, Size(side, side), grid, heads)
        self.router = Router(options)
        self._sources = Remembered(self.token_sources, most=4096)

    def token_sources(self, plan: ViewPlan) -> np.ndarray:
        """The token at each place of a picture before any is cut, (full,) int64.

        A global token's index, SEPARATOR, or N + the index of a local token in order of tiles.
        """
        return token_sources(plan, self.per_view, self.side)

    def forward(self, features: Tensor, plans: Sequence[ViewPlan], query: Query | None) -> VisualTokens:
        roles = np.array([view.role for plan in plans for view in plan.views])
        shown, cut = (torch.from_numpy(np.flatnonzero(roles == role)) for role in ("global", "tile"))
        shown, cut = shown.to(features.device), cut.to(features.device)
        parts = [self.adapter(features[shown])] if len(shown) else []  # (P, N, D)
        if len(cut):
            parts.append(self.adapter.mlp(self.compressor(features[cut])))  # (tiles, N, C) -> (tiles, Q, D)
        tokens = [flat(part) for part in parts]
        table = torch.cat([*tokens, torch.zeros_like(tokens[0][:1])])  # the last row is the separator's place
        owners = range(len(plans)) if query is None else query.owners_of(len(plans))
        sources = [self._sources(plan) for plan in plans]
        places = Places.of(plans, sources, self.per_view, self.per_tile, owners)
        kept: Tensor | None = None
        accounts: list[Account] | None = None
        if query is not None and len(cut) and (self.gamma < 1 or places.crowded):
            rows, kept, weights, stands = self._route(tokens[-1], places, query)
            accounts = [
                Account(heat=partial(self.heat, plans[p], row), sources=torch.from_numpy(sources[p])[left])
                for p, row, left in zip(owners, weights, stands, strict=True)
            ]
        else:
            rows = torch.from_numpy(places.rows[places.evenly()]).to(table.device)
        return VisualTokens(table[rows], kept, separators=rows == len(table) - 1, accounts=accounts)

    def heat(self, plan: ViewPlan, weights: Tensor) -> list[tuple[Box, float]]:
        """The local tokens' parts of the picture, in order, with their weights (L,)."""
        first = int(plan.views[0].role == "global")
        boxes = [box for tile in _grids(plan, self.per_tile)[first:] for box in tile]
        order = raster(plan.tiles, self.side).tolist()
        parts = [boxes[number].clipped(plan.picture) for number in order]
        return list(zip(parts, weights.tolist(), strict=True))

    @torch.no_grad()
    def rolled_back(self, features: Tensor, plan: ViewPlan, relevance: Tensor) -> Tensor:
        """Relevance of all visual tokens, by source (K, N + L) -> of the views' patches, (K, V N).

        A local token's is shared out as its query attends to its tile's patches. Of a global one's, the part
        of the MLP's gate stays with its patch, and that of the query former's is shared out likewise.
        """
        first = int(plan.views[0].role == "global")
        parts = []
        if first:
            given, view = relevance[:, : self.per_view], features[:1]
            kind = self.adapter.options.experts
            gates = {"mlp": (1.0, 0.0), "query_former": (0.0, 1.0)}.get(kind)
            own, read = self.adapter.gates(view)[0].float().cpu().unbind(-1) if gates is None else gates
            spread = own / (own + read) * given
            if kind != "mlp":
                spread = spread + (read / (own + read) * given) @ self._reads(self.adapter.former, view)[0]
            parts.append(spread)
        if len(features) > first:
            local = relevance[:, self.per_view :].unflatten(1, (-1, self.per_tile))  # (K, tiles, Q)
            reads = self._reads(self.compressor, features[first:])  # (tiles, Q, N)
            parts.append(torch.einsum("ktq,tqn->ktn", local, reads).flatten(1))
        return torch.cat(parts, 1)

    def _reads(self, former: QueryFormer, features: Tensor) -> Tensor:
        return former.attention(features).cpu()

    @torch.no_grad()
    def _route(
        self, local: Tensor, places: Places, query: Query
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """Per remaining place its row and whether it is kept; per question its local tokens' weights.

        The last result says per question which of its places remain.
        """
        owner, padded, spots, slots, question, rows, read = (
            torch.from_numpy(getattr(places, name)).to(local.device)
            for name in ("owner", "padded", "spots", "slots", "question", "rows", "read")
        )
        scores = self.router.scores(local[read], owner, query)
        scores = F.pad(scores, (0, 1), value=-torch.inf)[padded]  # (Q, L)
        probabilities = self.router.probabilities(scores)
        kept, rank = self.router(probabilities)
        asked = query.mask.sum(1) > 0  # (Q,)
        kept = kept | ~asked[:, None]  # without text, nothing is dropped
        fits = rank < slots[:, None]
        weights = (probabilities / probabilities.amax(1, keepdim=True)).masked_fill(~(kept & fits), 0)
        counts = torch.bincount(owner, minlength=len(padded)).tolist()
        fixed = spots < 0
        stays = fixed | kept.flatten()[spots]  # (full,)
        stands = torch.ones_like(stays)
        if places.crowded:
            even = torch.from_numpy(places.evenly()).to(local.device)
            stands = torch.where(asked[question], fixed | fits.flatten()[spots], even)
            rows, stays = rows[stands], stays[stands]
        remain = stands.split(torch.bincount(question, minlength=len(padded)).tolist())
        return (
            rows,
            stays,
            [row[:n] for row, n in zip(weights, counts, strict=True)],
            [one.cpu() for one in remain],
        )


@dataclass(frozen=True)
class Places:
    """The places of a batch's visual tokens before any is cut, `full` in all, and their origins.

    They are those of Q questions, of which several may be about one of the P pictures.

    Attributes:
        rows: (full,) row in [all global tokens, all local tokens, separator].
        question: (full,) index of the question.
        spots: (full,) question * L + place among its local tokens, L the most of any; -1: not local.
        read: (n,) every question's local tokens, in order of tiles, as indices into all local tokens.
        owner: (n,) question of each of them.
        padded: (Q, L) which of them lies at each place of a question; n for padding.
        slots: (Q,) places for local tokens that the plan has.
    """

    rows: np.ndarray
    question: np.ndarray
    spots: np.ndarray
    read: np.ndarray
    owner: np.ndarray
    padded: np.ndarray
    slots: np.ndarray

    @classmethod
    def of(
        cls,
        plans: Sequence[ViewPlan],
        sources: Sequence[np.ndarray],
        per_view: int,
        per_tile: int,
        owners: Sequence[int],
    ) -> Places:
        """`sources`: `SlimeConnector.token_sources` of each picture; `owners`: the questions' pictures."""
        globals_before = [0, *accumulate(plan.views[0].role == "global" for plan in plans)]
        locals_in = [plan.tiles.height * plan.tiles.width * per_tile for plan in plans]
        locals_before = [0, *accumulate(locals_in)]
        all_globals, longest = globals_before[-1] * per_view, max(locals_in)
        separator = all_globals + locals_before[-1]
        asked = [locals_in[p] for p in owners]  # local tokens of each question
        before = [0, *accumulate(asked)]
        padded = np.full((len(owners), longest), before[-1])
        rows, spots, read = [], [], [np.arange(0)]
        for q, p in enumerate(owners):
            source = sources[p]
            local = source >= per_view
            numbers = source[local] - per_view
            padded[q, : len(numbers)] = numbers + before[q]
            row = source + globals_before[p] * per_view
            row[local] = all_globals + numbers + locals_before[p]
            row[source == SEPARATOR] = separator
            rows.append(row)
            spots.append(np.where(local, local.cumsum() - 1 + q * longest, -1))
            read.append(np.arange(locals_before[p], locals_before[p + 1]))
        lengths = [len(sources[p]) for p in owners]
        slots = [plans[p].tokens - k + m for p, k, m in zip(owners, lengths, asked, strict=True)]
        return cls(
            rows=np.concatenate(rows),
            question=np.repeat(np.arange(len(owners)), lengths),
            spots=np.concatenate(spots),
            read=np.concatenate(read),
            owner=np.repeat(np.arange(len(owners)), asked),
            padded=padded,
            slots=np.array(slots),
        )

    @cached_property
    def crowded(self) -> bool:
        """Whether a question has more local tokens than places for them."""
        return bool((self.slots < np.bincount(self.owner, minlength=len(self.slots))).any())

    def evenly(self) -> np.ndarray:
        """(full,) bool: places that are kept if there is no text, evenly spread."""
        stands = np.ones(len(self.rows), dtype=bool)
        for q, slots in enumerate(self.slots):
            mine = np.flatnonzero((self.question == q) & (self.spots >= 0))
            stands[mine] = False
            stands[mine[np.arange(slots) * len(mine) // max(slots, 1)]] = True
        return stands


class Slime(Method):
    title = "SliME"
    idea = "the whole picture in full, 2 to 7 tiles compressed, tokens that matter to the question kept"
    paper = "arXiv 2406.08487"
    Options = SlimeOptions
    options: SlimeOptions

    def __init__(self, tower: TowerGeometry, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(tower, options)
        given = self.options.queries
        self.side = max(1, tower.grid.height // 2) if given is None else isqrt(given)  # of a tile's queries
        if self.side > tower.grid.height:
            raise FoveateError(
                f"options of method {self.title}: queries {given} are more than the tower's {tower.tokens} "
                "tokens per view"
            )

    @classmethod
    def options_for(cls, ratio: int) -> dict[str, Any]:
        return {"grids": "paper", "grid_limit": ratio}

    @property
    def uses_query(self) -> bool:  # type: ignore[override]
        """Whether a router drops tokens: otherwise no question is needed."""
        return self.options.gamma < 1 or self.options.max_visual_tokens is not None

    @property
    def query_text(self) -> QueryText:
        return self.options.router_text

    @property
    def only_here(self) -> str | None:
        why = "as its router reads the question (gamma: 1 without max_visual_tokens turns it off)"
        return why if self.uses_query else None

    @lru_cache(maxsize=4096)  # noqa: B019  a handful of instances per process
    def plan(self, height: int, width: int) -> ViewPlan:
        picture, side, options = Size(height, width), self.tower.side, self.options
        tiles = self._tiles(picture)
        canvases: list[Canvas] = []
        views: list[View] = []
        if not options.use_local_only:
            canvases.append(squashed(picture, side))
            views.append(View(0, whole(side), "global"))
        if tiles != NO_TILES:
            canvas = Size(tiles.height * side.height, tiles.width * side.width)
            views += tiled(len(canvases), tiles, side)
            canvases.append(letterboxed(picture, canvas))
        local = tiles.height * tiles.width * self.side**2
        fixed = 0 if options.use_local_only else self.tower.tokens + (local > 0)
        budget = options.max_visual_tokens
        if not self._within_budget(fixed + min(local, 1)):
            raise self._refuse_budget(fixed + min(local, 1))
        tokens = fixed + local if budget is None else min(fixed + local, budget)  # the router cuts
        return ViewPlan(picture, tuple(canvases), tuple(views), tokens, tiles)

    def _tiles(self, picture: Size) -> Size:
        side, options = self.tower.side, self.options
        if options.use_global_only:
            return NO_TILES
        grids = candidate_grids(picture, side, options)
        canvases = {Size(g.height * side.height, g.width * side.width): g for g in grids}
        return canvases[best_fit(picture, canvases)]

    def token_boxes(self, plan: ViewPlan) -> list[Box | None]:
        """The patches of the global view, and the cells of each tile's queries.

        Raises `FoveateError` if `max_visual_tokens` lets the question decide which tokens there are.
        """
        sources = token_sources(plan, self.tower.tokens, self.side)
        if len(sources) != plan.tokens:
            raise FoveateError(
                f"{self.title} cannot say beforehand where its visual tokens look: with max_visual_tokens "
                f"{self.options.max_visual_tokens} the question decides which there are; leave it out"
            )
        return self._boxes_of(plan, sources)

    def _boxes_of(self, plan: ViewPlan, sources: np.ndarray) -> list[Box | None]:
        first = int(plan.views[0].role == "global")
        boxes = [box for grid in _grids(plan, self.tower.tokens)[:first] for box in grid]
        boxes += [box for grid in _grids(plan, self.side**2)[first:] for box in grid]
        skipped = 0 if first else self.tower.tokens
        return [None if source == SEPARATOR else boxes[source - skipped] for source in sources.tolist()]

    def spread(self, run: Rerun, relevance: Tensor, account: Account) -> Spread:
        """Relevance goes back along the query formers' attention, as `SlimeConnector.rolled_back` does it.

        Parts are the patches of all views. A token's own box is its query's cell of the tile, by which the
        query is named; what it read may lie elsewhere in the tile.
        """
        connector, plan = run.connector, run.plan
        assert isinstance(connector, SlimeConnector)
        sources = token_sources(plan, self.tower.tokens, self.side)
        if account.sources is not None:
            sources = account.sources.numpy()
        elif len(sources) != plan.tokens:  # no text, of which a part would have been kept
            places = Places.of([plan], [sources], self.tower.tokens, self.side**2, [0])
            sources = sources[places.evenly()]
        shown = torch.from_numpy(sources != SEPARATOR)
        local = plan.tiles.height * plan.tiles.width * self.side**2
        by_source = relevance.new_zeros(len(relevance), self.tower.tokens + local)
        by_source[:, torch.from_numpy(sources)[shown]] = relevance[:, shown]
        patches = connector.rolled_back(run.features(), plan, by_source)
        boxes = [box.inside(plan.picture) for grid in _grids(plan, self.tower.tokens) for box in grid]
        tokens = [box and box.inside(plan.picture) for box in self._boxes_of(plan, sources)]
        return placed(boxes, patches)._replace(tokens=tokens)

    @torch.no_grad()
    def account(self, run: Rerun) -> Account:
        """The mean gates of the global view's two adapters."""
        connector = run.connector
        assert isinstance(connector, SlimeConnector)
        if self.options.experts != "mixture" or run.plan.views[0].role != "global":
            return Account()
        own, read = connector.adapter.gates(run.features()[:1]).float().mean((0, 1)).tolist()
        return Account(gates={"MLP": own, "query former": read})

    def build_connector(self, widths: Widths) -> SlimeConnector:
        return SlimeConnector(widths, self.tower.grid, self.side, self.options)


def _grids(plan: ViewPlan, cells: int) -> list[list[Box]]:
    """Every view cut into as many square cells, in original pixels; they may lie in the padding."""
    return [
        [plan.to_picture(number, box) for box in square_grid(view.size, cells)]
        for number, view in enumerate(plan.views)
    ]


def _released_options(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("mm_resampler_type") != "cosine":
        raise FoveateError(
            f"config.json: mm_resampler_type must be 'cosine', not {config.get('mm_resampler_type')!r}"
        )
    return {
        "queries": config.get("mm_resampler_dim"),
        "gamma": config.get("mm_resampler_topp", 1.0),
        "temperature": config.get("mm_resampler_temp", 1.0),
        "experts": {-1: "mixture", 0: "mlp", 1: "query_former"}[config.get("mm_learnable_gated", -1)],
        "use_global_only": bool(config.get("use_global_only")),
        "use_local_only": bool(config.get("use_local_only")),
    }


QUERY_FORMER = {  # authors' names within a query former -> ours
    r"query": "queries",
    r"pos_embed": "positions",
    r"ln_q\.": "query_norm.",
    r"ln_kv\.": "feature_norm.",
    r"ln_post\.": "output_norm.",
    r"attn\.in_proj_": "project_in.",
    r"attn\.out_proj\.": "project_out.",
}

Slime.layouts = (
    Layout(
        name="yifanzhang114/SliME-*",
        family="original",
        recognises=lambda config: config.get("mm_projector_type") == "gated",
        options=_released_options,
        keys={
            r"^model\.mm_projector\.projection\.": "connector.adapter.mlp.",
            r"^model\.mm_projector\.w_gate$": "connector.adapter.gate",
            r"^model\.mm_projector\.w_noise$": "connector.adapter.noise",
            **{
                rf"^model\.{theirs}\.{old}": f"connector.{ours}.{new}"
                for theirs, ours in (
                    ("mm_projector.attn", "adapter.former"),
                    ("sampler.post_qformer", "compressor"),
                )
                for old, new in QUERY_FORMER.items()
            },
        },
        drops=(r"^model\.mm_projector\.(mean|std)$",),  # for a load-balancing loss that is never used
        optional=(r"^connector\.adapter\.noise$",),
        separator="seperator",
        reads=("mm_resampler_dim", "mm_resampler_topp", "mm_resampler_temp", "mm_learnable_gated"),
        connector_files=("mm_projector.bin", "sampler.bin"),
    ),
)
