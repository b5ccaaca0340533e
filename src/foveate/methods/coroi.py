"""CoRoI: the low-resolution view and the question choose a window, which is read at high resolution and helps
to choose the next one, at several scales at once; all windows change hidden states inside the LLM.

Paper: Chen et al., Visual Instruction Tuning with Chain of Region-of-Interest, arXiv 2505.06840.
Authors' code: none is public; this is written from the paper.

    f_theta_v: how much each token matters         Scorer                section 3.1, figure 4 (a)
    sliding window, average pooling, arg-max       integral, pooled      section 3.1, "Selection"
    the last window joins the question             CoroiConnector.chain  section 3.1, "Movement"
    clips of the high-resolution pictures          foveate.picture.source        sections 3, 4.1
    f_theta': low-resolution tokens read a clip    CrossAttention        section 3.2
    the residual is added after layer k           RoiInjector           section 3.2
    layers k_j = floor(j L / 8) - 1, j = 2 to 7    decoder_layers        appendix
    576 tokens, or 2880                            Coroi.plan            section 4.1, "Model Variants"
    two stages                                     train/recipes/coroi   section 3.3

The paper leaves much open. docs/methods/coroi.md gives our choices and reasons. The most important ones:

    gradient straight_through    an arg-max has no gradient and the tower is frozen, so taken literally
                                 the scorer never learns; a gate of value 1 on the residual lets it learn
    pixels original              the text enlarges the 336-pixel picture, which adds no detail; here a window
                                 is cut from the original, resized to the scale
    distinct true                a chain chooses no window twice; the text does not say
    values start at zero         a fresh model is its LLM, to the bit
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import accumulate
from typing import Any, ClassVar, Literal, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor, nn

from foveate.errors import FoveateError
from foveate.layers import mlp_projector
from foveate.methods.base import (
    Connector,
    Injector,
    Method,
    MethodOptions,
    Query,
    Rerun,
    TowerGeometry,
    VisualTokens,
    Widths,
    square_grid,
)
from foveate.picture.account import Account, Chain, Spread
from foveate.picture.geometry import (
    NO_TILES,
    Box,
    Size,
    View,
    ViewPlan,
    squashed,
    tiled,
    whole,
)
from foveate.picture.source import Look, Source, view_of


@dataclass(frozen=True)
class CoroiOptions(MethodOptions):
    retired: ClassVar[Mapping[str, Any]] = {
        "fit": "squash",
        "text": "question",
        "chain_reads": "vision",
        "scorers": "shared",
        "scorer_norm": "before",
        "scorer_positions": False,
        "layer_weights": "own",
        "injection_reads": "vision",
        "assignment": "every",
        "queries": "window",
        "zero_init": True,
    }
    variant: Literal["v1", "v2"] = "v1"  # v2: also the picture at twice the size, four more views
    # Chain
    scales: tuple[int, ...] = (2, 3, 4)  # lambda: magnifications of the pictures that windows are cut from
    chain: bool = True  # false: its parts exist but do not run (first stage)
    rois: int = 4  # n: windows per scale, chosen one after the other
    pixels: Literal["original", "upsampled"] = "original"  # the pixels that a window is cut from
    history: Literal["last", "all", "none"] = (
        "last"  # earlier windows that join the question; none: no movement
    )
    distinct: bool = True  # whether a chain may not choose a window twice
    # Scorer
    scorer_heads: int | None = None  # of both attentions; null: one head per 64 channels
    guide_norm: bool = False  # whether words and windows pass a norm before the scorer reads them
    gradient: Literal["straight_through", "centred", "weighted", "gumbel", "none"] = "straight_through"
    temperature: float = 0.5  # of the softmax over a scale's windows
    # Injection
    layers: Literal["six", "three", "one"] | tuple[int, ...] = "six"  # decoder layers, 0-based
    projections: Literal["linear_norm", "norm_linear"] = "linear_norm"  # of query, key and value
    heads: int = 1  # of the attention to a window
    overlap: Literal["add", "sequence"] = "add"  # windows that share a token: at once, or in turn

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scales or min(self.scales) < 2 or len(set(self.scales)) < len(self.scales):
            raise FoveateError(
                f"scales must be different whole numbers from 2 up, as in [2, 3, 4], not {list(self.scales)}"
            )
        if self.rois < 1:
            raise FoveateError(f"rois must be at least 1, not {self.rois}")
        if self.gradient == "centred" and self.rois < 2:
            raise FoveateError("gradient centred compares a scale's windows: rois must be at least 2, not 1")
        if self.temperature <= 0:
            raise FoveateError(f"temperature must be above 0, not {self.temperature}")
        if self.heads < 1 or (self.scorer_heads is not None and self.scorer_heads < 1):
            raise FoveateError(f"heads {self.heads} and scorer_heads {self.scorer_heads} must be at least 1")
        if not isinstance(self.layers, str) and len(set(self.layers)) < max(1, len(self.layers)):
            raise FoveateError(
                f"layers must be six, three, one or different numbers, not {list(self.layers)}"
            )


def decoder_layers(choice: str | Sequence[int], depth: int) -> list[int]:
    """Layers of an LLM of `depth` layers whose output is changed, 0-based, in increasing order.

    The quarters of the LLM end at layers jL/8 - 1 for even j; those for odd j lie halfway between. Raises
    `FoveateError` for layers that the LLM does not have, and for its last one: no other token reads what it
    changes in the picture's tokens.
    """
    if depth < 2:
        raise FoveateError(f"CoRoI needs an LLM of at least 2 layers, not {depth}")
    if not isinstance(choice, str):
        if not all(0 <= layer < depth - 1 for layer in choice):
            raise FoveateError(
                f"layers {list(choice)} do not fit an LLM of {depth} layers: choose from 0 to {depth - 2}"
            )
        return sorted(choice)
    eighths = {"six": (2, 3, 4, 5, 6, 7), "three": (2, 4, 6), "one": (4,)}[choice]
    return sorted({max(j * depth // 8 - 1, 0) for j in eighths})  # fewer for a small LLM


# Choosing a window.


class Attention(nn.Module):
    """Multi-head attention; rows with nothing to read get zeros."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def queries(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, heads, N, C / heads)"""
        return split(self.query(x), self.heads)

    def keys_values(self, source: Tensor) -> list[Tensor]:
        """(..., M, C) -> two of (..., M, C)"""
        return [self.key(source), self.value(source)]

    def forward(self, queries: Tensor, keys_values: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """(B, heads, N, C / heads), keys and values (B, M, C), mask (B, M) of valid guides -> (B, N, C)"""
        key, value = (split(x, self.heads) for x in keys_values)
        if mask is None:
            return self.out(joined(F.scaled_dot_product_attention(queries, key, value)))
        some = mask.any(1)[:, None, None]  # (B, 1, 1)
        allowed = (mask[:, None] | ~some)[:, None]  # (B, 1, 1, M)
        read = F.scaled_dot_product_attention(queries, key, value, attn_mask=allowed)
        return self.out(joined(read)) * some


class LowView(NamedTuple):
    """The low-resolution view as the scorer reads it, before any question; the same at every step."""

    tokens: Tensor  # (P, N, C) after the self attention
    queries: Tensor  # (P, heads, N, C / heads) of the cross attention


class Scorer(nn.Module):
    """f_theta_v: self attention of low-resolution tokens, cross attention to their guides, feed-forward."""

    def __init__(self, width: int, options: CoroiOptions) -> None:
        super().__init__()
        heads = options.scorer_heads or max(1, width // 64)
        if width % heads:
            raise FoveateError(f"scorer_heads {heads} must divide the vision tower's width {width}")
        self.self_norm, self.cross_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attention, self.cross_attention = Attention(width, heads), Attention(width, heads)
        # A number added to all scores changes no choice: a last bias would get no gradient.
        last = nn.Linear(4 * width, 1, bias=options.gradient == "weighted")
        first = nn.Linear(width, 4 * width)
        self.feed_forward = nn.Sequential(nn.LayerNorm(width), first, nn.GELU(), last)
        self.guide_norm = nn.LayerNorm(width) if options.guide_norm else nn.Identity()

    def read(self, low: Tensor) -> LowView:
        """(P, N, C)"""
        read = self.self_norm(low)
        attention = self.self_attention
        x = low + attention(attention.queries(read), attention.keys_values(read))
        return LowView(x, self.cross_attention.queries(self.cross_norm(x)))

    def guides(self, guides: Tensor) -> list[Tensor]:
        """What the cross attention reads of words or windows, (..., M, C): two of the same size."""
        return self.cross_attention.keys_values(self.guide_norm(guides))

    def forward(
        self, low: LowView, guides: Sequence[Tensor], mask: Tensor, owners: Tensor | None = None
    ) -> Tensor:
        """`guides` (B, M, C), their mask (B, M) -> scores (B, N). `owners` (B,): row of `low` of each."""
        tokens, queries = low if owners is None else (x[owners] for x in low)
        return self.feed_forward(tokens + self.cross_attention(queries, guides, mask))[..., 0]


def integral(scores: Tensor) -> Tensor:
    """(..., h, w) -> (..., h + 1, w + 1) sums of everything above and to the left, in double precision.

    This precision keeps equal windows equal, so that the first of them is chosen. (MPS has single precision
    only: there a later one may win.)
    """
    exact = torch.float32 if scores.device.type == "mps" else torch.float64
    return F.pad(scores.to(exact).cumsum(-2).cumsum(-1), (1, 0, 1, 0))


def pooled(sums: Tensor, side: int) -> Tensor:
    """Averages over all windows of side x side, stride 1, from an integral image (B, h + 1, w + 1)."""
    below, above = sums[:, side:], sums[:, :-side]
    total = (below[:, :, side:] - below[:, :, :-side]) - (above[:, :, side:] - above[:, :, :-side])
    return total / side**2


def best(values: Tensor) -> Tensor:
    """Averages of windows (P, rows, columns) -> index of the best, (P,), the first on a tie."""
    return values.flatten(1).argmax(1)


def gate(values: Tensor, chosen: Tensor, options: CoroiOptions) -> Tensor:
    """The factor of the chosen windows' update: (B, R) values of windows, (B,) choices -> (B,).

    1, with the gradient of the window's probability; with `weighted`, its score between 0 and 1.
    """
    if options.gradient == "weighted":
        return values.gather(1, chosen[:, None])[:, 0].sigmoid()
    probability = (values / options.temperature).softmax(1).gather(1, chosen[:, None])[:, 0]
    learns = 0.0 if options.gradient == "none" else 1.0  # zero, not None: other ranks wait for gradients
    return 1 + learns * (probability - probability.detach())


# Injecting it into the LLM.


@dataclass
class Group:
    """Windows of one size that are injected at once; a question has each of its own once."""

    rows: Tensor  # (R,) windows of the round
    places: Tensor  # (R, Q) low-resolution tokens that read each, as indices into Round.tokens
    gates: Tensor  # (R,) factor of each window's update


@dataclass
class Round:
    """Windows that read the same hidden states; their order does not matter."""

    tokens: Tensor  # (U,) indices into all visual tokens of the batch
    windows: Tensor  # (W,) rows of InjectedWindows.features, each once, whoever reads it
    groups: list[Group]


@dataclass
class InjectedWindows:
    """What the injectors get: features (R, N, C) of the distinct windows, and the rounds that read them."""

    features: Tensor
    rounds: list[Round]


class Projection(nn.Module):
    """A linear layer and a LayerNorm. `zero`: the output starts at zero."""

    def __init__(self, wide_in: int, wide_out: int, norm_first: bool, zero: bool) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.linear = nn.Linear(wide_in, wide_out)
        self.norm = nn.LayerNorm(wide_in if norm_first else wide_out)
        if zero:
            last = self.linear if norm_first else self.norm
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x)) if self.norm_first else self.norm(self.linear(x))


class CrossAttention(nn.Module):
    """f_theta': low-resolution tokens of a window, in the LLM's states, read the window's features."""

    def __init__(self, widths: Widths, options: CoroiOptions) -> None:
        super().__init__()
        read, width = widths.vision, widths.text
        if width % options.heads:
            raise FoveateError(f"heads {options.heads} must divide the LLM's width {width}")
        self.heads = options.heads
        norm_first = options.projections == "norm_linear"
        self.query = Projection(width, width, norm_first, zero=False)
        self.key = Projection(read, width, norm_first, zero=False)
        self.value = Projection(read, width, norm_first, zero=True)

    def forward(self, hidden: Tensor, round_: Round, features: Tensor) -> Tensor:
        """Updates (U, D) of the hidden states (U, D) of the round's tokens."""
        queries = self.query(hidden)
        read = features[round_.windows.to(features.device)]  # (W, N, C)
        keys, values = self.key(read), self.value(read)
        update = torch.zeros_like(hidden)
        for group in round_.groups:
            rows, places = group.rows.to(features.device), group.places.to(hidden.device)
            query, key, value = (
                split(x, self.heads) for x in (queries[places], keys[rows], values[rows])
            )  # (R, heads, Q or N, D / heads)
            found = joined(F.scaled_dot_product_attention(query, key, value))  # (R, Q, D)
            found = found * group.gates.to(found)[:, None, None]
            update = update.index_add(0, places.flatten(), found.flatten(0, 1).to(update))
        return update


class RoiInjector(Injector):
    """Adds the windows' updates to low-resolution tokens after one decoder layer.

    The layer may be on another device than the connector: the states are moved to the windows' device, and
    the update is moved back.
    """

    def __init__(self, attention: CrossAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden: Tensor, injection: InjectedWindows, visual: Tensor) -> Tensor:
        places = visual.flatten().nonzero()[:, 0].to(hidden.device)  # of all visual tokens in (B T)
        states, features = hidden.flatten(0, 1), injection.features
        for round_ in injection.rounds:
            here = places[round_.tokens.to(places.device)]
            update = self.attention(states[here].to(features.device), round_, features)
            states = states.index_add(0, here, update.to(states.device))
        return states.view_as(hidden)


def split(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) -> (B, heads, N, C / heads)"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """(B, heads, N, C / heads) -> (B, N, C)"""
    return x.transpose(1, 2).flatten(2)


# The connector.


class Window(NamedTuple):
    """A chosen window: `row` and `column` of its first token in the low-resolution grid."""

    question: int
    scale: int  # its index in the options' scales
    step: int
    row: int
    column: int


@dataclass
class Chosen:
    """All windows of a batch, including repeated ones, with features and gates in the same order."""

    windows: list[Window]  # question after question, scale after scale, step after step
    features: Tensor  # (W, N, C)
    gates: Tensor  # (W,)


@lru_cache(maxsize=4096)
def cells(grid: Size, row: int, column: int, side: int) -> np.ndarray:
    """Indices of a window's tokens in a grid, row by row."""
    tokens = np.arange(grid.height * grid.width).reshape(grid)
    return tokens[row : row + side, column : column + side].flatten()


def look_at(
    plan: ViewPlan, row: int, column: int, side: int, tower: TowerGeometry, options: CoroiOptions
) -> Look:
    """A window's box on the low-resolution canvas: `row`, `column` and `side` in tokens."""
    patch = tower.patch_size
    box = Box(column * patch, row * patch, (column + side) * patch, (row + side) * patch)
    return Look(plan.canvases[0], box, options.pixels == "upsampled")


class CoroiConnector(Connector):
    shares_pictures = True

    def __init__(self, widths: Widths, tower: TowerGeometry, options: CoroiOptions) -> None:
        super().__init__()
        self.tower, self.options = tower, options
        self.sides = [tower.grid.height // scale for scale in options.scales]  # of windows, in tokens
        self.projector = mlp_projector(widths.vision, widths.text)
        self.width = widths.text
        self.question = nn.Linear(widths.text, widths.vision)
        nn.init.zeros_(self.question.bias)  # a random bias would drown small embeddings
        # A list of one: saved models name its weights so.
        self.scorers = nn.ModuleList([Scorer(widths.vision, options)])
        self.choose: Callable[[Tensor], Tensor] = best
        self.layers = decoder_layers(options.layers, widths.layers)
        self.attentions = nn.ModuleList(CrossAttention(widths, options) for _ in self.layers)

    def injectors(self) -> Mapping[int, Injector]:
        # Without a chain there is nothing to inject, but an LLM that does not allow injection is refused now,
        # not only in the next stage.
        found: dict[int, Injector] = {}
        for layer, attention in zip(self.layers, self.attentions, strict=True):
            assert isinstance(attention, CrossAttention)
            found[layer] = RoiInjector(attention)
        return found

    @property
    def scorer(self) -> Scorer:
        return cast(Scorer, self.scorers[0])

    def forward(
        self,
        features: Tensor,
        plans: Sequence[ViewPlan],
        query: Query | None,
        source: Source | None = None,
    ) -> VisualTokens:
        views = features.unflatten(0, (len(plans), -1))  # (P, V, N, C)
        tokens = self._tokens(self.projector(views))
        if not self.options.chain:
            return VisualTokens(tokens)
        assert source is not None
        owners = range(len(plans)) if query is None else query.owners_of(len(plans))
        chosen = self.chain(views[:, 0], plans, query, source)
        looks = [self._look(window, plans[owners[window.question]]) for window in chosen.windows]
        regions: list[list[Box]] = [[] for _ in owners]
        region = cache(lambda plan, box: plan.to_picture(0, box).clipped(plan.picture))
        for window, look in zip(chosen.windows, looks, strict=True):
            regions[window.question].append(region(plans[owners[window.question]], look.box))
        if query is not None and query.owners is not None:
            tokens = torch.cat([tokens.split([plan.tokens for plan in plans])[p] for p in owners])
        return VisualTokens(
            tokens,
            injection=self._injection(chosen, looks, owners, [plans[p].tokens for p in owners]),
            accounts=[
                Account(
                    regions=regions[q], chains=self._chains(owners[q], regions[q], looks[q * each :], source)
                )
                for q, each in enumerate([self.options.rois * len(self.sides)] * len(owners))
            ],
        )

    def _tokens(self, projected: Tensor) -> Tensor:
        """(P, V, N, D) -> (P n, D): the low-resolution view; in v2 also the four others as one grid."""
        low, high = projected[:, 0], projected[:, 1:]
        if high.shape[1]:
            tiles = high.unflatten(2, tuple(self.tower.grid)).unflatten(1, (2, 2))  # (P, 2, 2, h, w, D)
            low = torch.cat([low, tiles.transpose(2, 3).flatten(1, 4)], 1)
        return low.flatten(0, 1)

    # Selection and movement.

    def chain(self, low: Tensor, plans: Sequence[ViewPlan], query: Query | None, source: Source) -> Chosen:
        """Section 3.1, all questions and scales together: one run of the tower per step, for new windows."""
        options, scales = self.options, len(self.sides)
        owners = range(len(plans)) if query is None else query.owners_of(len(plans))
        rows = torch.tensor(owners, device=low.device)  # (Q,)
        words, mask = self._words(low, query)  # two (Q, 1, T, C), (Q, 1, T)
        view = self.scorer.read(low)
        numbers: list[list[list[int]]] = []  # (n, Q, m) indices of windows
        gates: list[Tensor] = []  # (Q, m) each
        features: list[Tensor] = []  # (Q, m, N, C) each
        past: list[list[Tensor]] = []  # windows that join the question, two (Q, m, N, C) each
        taken: list[Tensor | None] = [None] * scales
        spread = self._spread() if low.is_meta else []
        sums = None
        for step in range(options.rois):
            if sums is None or past:
                guides, there, of = words, mask, rows
                if past:
                    read = past[-1:] if options.history == "last" else past
                    guides = [
                        torch.cat([said.expand(-1, scales, -1, -1), *seen], 2)  # (Q, m, M, C)
                        for said, *seen in zip(words, *read, strict=True)
                    ]
                    there = F.pad(
                        mask.expand(-1, scales, -1), (0, guides[0].shape[2] - mask.shape[2]), value=True
                    )
                    of = rows.repeat_interleave(scales)
                guides = [part.flatten(0, 1) for part in guides]
                scores = self.scorer(view, guides, there.flatten(0, 1), of)  # (Q or Q m, N)
                sums = integral(scores.view(len(owners), -1, *self.tower.grid))  # (Q, 1 or m, h + 1, w + 1)
            means = [pooled(sums[:, s % sums.shape[1]], self.sides[s]) for s in range(scales)]
            picked = [self.select(mean, taken[s]) for s, mean in enumerate(means)]
            chosen = torch.stack([number for number, _ in picked], 1)  # (Q, m)
            gates.append(torch.stack([value for _, value in picked], 1))
            numbers.append([spread[step]] * len(owners) if low.is_meta else chosen.tolist())
            if options.distinct:
                taken = [self._taken(s, chosen[:, s], taken[s]) for s in range(scales)]
            looks = [
                (owners[w.question], self._look(w, plans[owners[w.question]]))
                for w in self._windows(step, numbers[-1])
            ]
            distinct = {look: i for i, look in enumerate(dict.fromkeys(looks))}
            which = torch.tensor([distinct[look] for look in looks], device=low.device)
            which = which.unflatten(0, (len(owners), scales))  # (Q, m)
            looked = source.look(list(distinct), self.tower.side).to(low)
            features.append(looked[which])
            if options.history != "none" and step + 1 < options.rois:
                past.append([part[which] for part in self.scorer.guides(looked)])
        windows = [w for step, chosen in enumerate(numbers) for w in self._windows(step, chosen)]
        factors = torch.stack(gates, 2)  # (Q, m, n)
        if options.gradient == "centred" and factors.requires_grad:
            factors.register_hook(lambda grad: grad - grad.mean((0, 2), keepdim=True))
        return Chosen(sorted(windows), torch.stack(features, 2).flatten(0, 2), factors.flatten())

    def _words(self, low: Tensor, query: Query | None) -> tuple[list[Tensor], Tensor]:
        """U as the scorer reads it, two (Q, 1, T, C), and its mask (Q, 1, T)."""
        if query is None or not query.mask.shape[1]:  # nothing to read, but other ranks wait for gradients
            count = len(low) if query is None else len(query.mask)
            nothing = self.question(low.new_zeros(count, 1, 1, self.width))
            return self.scorer.guides(nothing), low.new_zeros(count, 1, 1, dtype=torch.bool)
        words = self.question(query.embeds.to(low))[:, None]
        return self.scorer.guides(words), query.mask.bool()[:, None]

    def select(self, values: Tensor, taken: Tensor | None) -> tuple[Tensor, Tensor]:
        """Averages of one scale's windows (P, rows, columns) -> index of the best and its gate, (P,) each.

        `taken` (P, rows columns): windows that may not be chosen.
        """
        if self.training and self.options.gradient == "gumbel":
            uniform = torch.rand_like(values).clamp(min=1e-20)
            values = values - self.options.temperature * (-uniform.log()).clamp(min=1e-20).log()
        if taken is not None:
            values = values.masked_fill(taken.view_as(values), -torch.inf)
        chosen = self.choose(values)
        return chosen, gate(values.flatten(1), chosen, self.options)

    def _count(self, scale: int) -> int:
        """The number of windows of a scale."""
        grid, side = self.tower.grid, self.sides[scale]
        return (grid.height - side + 1) * (grid.width - side + 1)

    def _spread(self) -> list[list[int]]:
        """Windows for pricing, when scores have no values: their indices, (n, m).

        Each step takes the window that covers the most tokens not yet covered, largest scale first, up to all
        windows of a scale: the more tokens read a window, the more it costs.
        """
        bare = np.ones(self.tower.grid, dtype=int)
        columns: list[list[int]] = [[] for _ in self.sides]
        for s in sorted(range(len(self.sides)), key=lambda s: -self.sides[s]):
            side, chosen = self.sides[s], columns[s]
            for _ in range(min(self.options.rois, self._count(s))):
                covers = sliding_window_view(bare, (side, side)).sum((2, 3))
                covers.flat[chosen] = -1
                chosen.append(int(covers.argmax()))
                row, column = divmod(chosen[-1], covers.shape[1])
                bare[row : row + side, column : column + side] = 0
        return [[chosen[step % len(chosen)] for chosen in columns] for step in range(self.options.rois)]

    def _taken(self, scale: int, chosen: Tensor, before: Tensor | None) -> Tensor:
        """(P, windows) which windows of a scale were chosen."""
        now = F.one_hot(chosen, self._count(scale)).bool()
        return now if before is None else now | before

    def _windows(self, step: int, numbers: list[list[int]]) -> list[Window]:
        """The windows of one step, question after question, scale after scale."""
        columns = [self.tower.grid.width - side + 1 for side in self.sides]
        return [
            Window(q, s, step, *divmod(number, columns[s]))
            for q, row in enumerate(numbers)
            for s, number in enumerate(row)
        ]

    def _look(self, window: Window, plan: ViewPlan) -> Look:
        return look_at(plan, window.row, window.column, self.sides[window.scale], self.tower, self.options)

    # For the LLM.

    def _injection(
        self, chosen: Chosen, looks: list[Look], owners: Sequence[int], counts: list[int]
    ) -> InjectedWindows:
        """`counts`: visual tokens per question; low-resolution ones come first."""
        first: dict[tuple[int, Look], int] = {}  # first occurrence of each window of a picture
        seen = [(owners[window.question], look) for window, look in zip(chosen.windows, looks, strict=True)]
        for i, key in enumerate(seen):
            first.setdefault(key, i)
        row_of = {key: row for row, key in enumerate(first)}
        rows = [row_of[key] for key in seen]
        features = chosen.features[torch.tensor(list(first.values()), device=chosen.features.device)]
        starts = [0, *accumulate(counts)]
        apart = 1 if self.options.overlap == "add" else self.options.rois * len(self.sides)
        parts = [[i for i in range(len(rows)) if i % apart == place] for place in range(apart)]
        return InjectedWindows(features, [self._round(chosen, rows, part, starts) for part in parts])

    def _round(self, chosen: Chosen, rows: list[int], numbers: list[int], starts: list[int]) -> Round:
        """The windows with these indices; `rows` into all windows' features, `starts` of questions' tokens.

        Identical windows of a question are merged, and their gates added.
        """
        gates, device = chosen.gates, chosen.features.device
        cells: dict[int, dict[tuple[int, int], np.ndarray]] = {}  # window size -> question, row -> tokens
        owners: dict[tuple[int, int], list[int]] = {}  # question, row -> windows
        for i in numbers:
            window = chosen.windows[i]
            side, key = self.sides[window.scale], (window.question, rows[i])
            tokens = starts[window.question] + self._cells(window.row, window.column, side)
            cells.setdefault(len(tokens), {})[key] = tokens
            owners.setdefault(key, []).append(i)
        numbered = {row: n for n, row in enumerate(dict.fromkeys(rows[i] for i in numbers))}
        used = np.unique(np.concatenate([np.concatenate(list(group.values())) for group in cells.values()]))
        groups = []
        for group in cells.values():
            members = [(slot, i) for slot, key in enumerate(group) for i in owners[key]]
            slots, mine = (torch.tensor(column, device=gates.device) for column in zip(*members, strict=True))
            places = np.searchsorted(used, np.stack(list(group.values())))
            groups.append(
                Group(
                    rows=torch.tensor([numbered[row] for _, row in group], device=device),
                    places=torch.from_numpy(places).to(device),
                    gates=gates.new_zeros(len(group)).index_add(0, slots, gates[mine]),
                )
            )
        windows = torch.tensor(list(numbered), device=device)
        return Round(torch.from_numpy(used).to(device), windows, groups)

    def _cells(self, row: int, column: int, side: int) -> np.ndarray:
        """Indices of the low-resolution tokens that read a window."""
        return cells(self.tower.grid, row, column, side)

    def _chains(self, picture: int, regions: list[Box], looks: list[Look], source: Source) -> list[Chain]:
        """One chain per scale, for the drawing. They hold this picture and nothing else of the batch.

        The first of `looks` are those of the question.
        """
        steps = self.options.rois
        pixels, norms, side = source.pictures[picture], source.norms[picture], self.tower.side
        chains = []
        for s, scale in enumerate(self.options.scales):
            mine = looks[s * steps : (s + 1) * steps]
            views = partial(_views, pixels, norms, mine, side)
            chains.append(Chain(f"{scale}x", regions[s * steps : (s + 1) * steps], views))
        return chains


def _views(pixels: Tensor, norms: Tensor, looks: Sequence[Look], side: Size) -> Tensor:
    """Parts of one picture as the tower got them, (n, 3, h, w)."""
    return torch.stack([view_of(pixels, norms, look, side) for look in looks])


class Coroi(Method):
    title = "CoRoI"
    idea = (
        "a chain of windows, each chosen by the question and the one before, injected into the LLM's layers"
    )
    paper = "arXiv 2505.06840"
    Options = CoroiOptions
    options: CoroiOptions

    def __init__(self, tower: TowerGeometry, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(tower, options)
        side = tower.grid.height
        for scale in self.options.scales:
            if scale > side:
                raise FoveateError(f"scales: {scale} is more than the tower's {side} rows of tokens")
            windows = (side - side // scale + 1) ** 2
            if self.options.distinct and self.options.rois > windows:
                raise FoveateError(
                    f"rois {self.options.rois} with distinct: scale {scale} has {windows} windows"
                )

    @classmethod
    def options_for(cls, ratio: int) -> dict[str, Any]:
        """The paper's scales up to the picture's resolution, and the scale of that resolution."""
        largest = max(ratio, 2)
        return {"scales": [*(scale for scale in (2, 3, 4) if scale < largest), largest]}

    @property
    def uses_query(self) -> bool:  # type: ignore[override]
        return self.options.chain

    @property
    def reads_source(self) -> bool:
        return self.options.chain

    @property
    def only_here(self) -> str | None:
        why = "as the question chooses windows that are injected into the LLM (chain: false turns it off)"
        return why if self.options.chain else None

    @lru_cache(maxsize=4096)  # noqa: B019  a handful of instances per process
    def plan(self, height: int, width: int) -> ViewPlan:
        picture, side, two = Size(height, width), self.tower.side, self.options.variant == "v2"
        canvases = [squashed(picture, side)]
        views = [View(0, whole(side), "global")]
        if two:
            canvases.append(squashed(picture, Size(2 * side.height, 2 * side.width)))
            views += tiled(1, Size(2, 2), side)
        tokens = len(views) * self.tower.tokens
        if not self._within_budget(tokens):
            raise self._refuse_budget(tokens)
        return ViewPlan(picture, tuple(canvases), tuple(views), tokens, Size(2, 2) if two else NO_TILES)

    def looks(self, plan: ViewPlan) -> list[Look]:
        """The windows of all scales; equal ones once."""
        grid, found = self.tower.grid.height, []
        for side in (grid // scale for scale in self.options.scales):
            places = range(grid - side + 1)
            found += [look_at(plan, r, c, side, self.tower, self.options) for r in places for c in places]
        return list(dict.fromkeys(found)) if self.options.chain else []

    def token_boxes(self, plan: ViewPlan) -> list[Box | None]:
        """The low-resolution view's grid, in v2 followed by that of the picture at twice the size."""
        grids = zip(plan.canvases, (self.tower.tokens, 4 * self.tower.tokens), strict=False)
        boxes: list[Box | None] = []
        for canvas, tokens in grids:
            over = ViewPlan(plan.picture, (canvas,), (View(0, whole(canvas.size), "canvas"),), tokens)
            boxes += [over.to_picture(0, box) for box in square_grid(canvas.size, tokens)]
        return boxes

    def spread(self, run: Rerun, relevance: Tensor, account: Account) -> Spread:
        """All of a token's relevance stays in its box of `token_boxes`.

        Windows are injected into the states of the low-resolution tokens that they cover, so what the LLM
        reads of a window counts for these. Which cell of a window it was is not followed: every token of a
        window attends to all of them, inside the LLM.
        """
        return super().spread(run, relevance, account)

    def build_connector(self, widths: Widths) -> CoroiConnector:
        return CoroiConnector(widths, self.tower, self.options)
