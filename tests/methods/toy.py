"""A method that uses every seam: it drops tokens by the question, injects, chooses regions and asks twice."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from PIL import Image
from torch import Tensor, nn

from foveate.layers import mlp_projector
from foveate.methods.base import (
    Connector,
    Injector,
    Method,
    MethodOptions,
    Query,
    Reply,
    Turn,
    VisualTokens,
    Widths,
    flat,
)
from foveate.picture.account import Account
from foveate.picture.geometry import Box, Size, View, ViewPlan, letterboxed, squashed, tiled, whole


@dataclass(frozen=True)
class ToyOptions(MethodOptions):
    drop: bool = True  # whether every other token goes
    layers: tuple[int, ...] = (1, 2)  # decoder layers that are injected


@dataclass
class ToyInjection:
    """Per visual token of the batch what is added to its hidden state, and whether it is still there."""

    added: Tensor  # (n, D)
    kept: Tensor | None  # (n,)


class ToyInjector(Injector):
    """h <- h + W x at visual tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, width)

    def forward(self, hidden: Tensor, injection: ToyInjection, visual: Tensor) -> Tensor:
        added = injection.added
        if injection.kept is not None and int(visual.sum()) != len(added):  # the dropped ones have left
            added = added[injection.kept]
        update = torch.zeros_like(hidden).masked_scatter(visual[..., None], self.project(added).to(hidden))
        return hidden + update


class ToyConnector(Connector):
    def __init__(self, widths: Widths, options: ToyOptions) -> None:
        super().__init__()
        self.drop = options.drop
        self.projector = mlp_projector(widths.vision, widths.text)
        self.question = nn.Linear(widths.text, widths.text)
        self.injected = nn.ModuleDict({str(layer): ToyInjector(widths.text) for layer in options.layers})

    def injectors(self) -> Mapping[int, Injector]:
        return {int(layer): module for layer, module in self.injected.items()}

    def forward(self, features: Tensor, plans: Sequence[ViewPlan], query: Query | None) -> VisualTokens:
        tokens = flat(self.projector(features))  # (V, N, C) -> (n, D)
        counts = [plan.tokens for plan in plans]
        owner = torch.repeat_interleave(torch.tensor(counts)).to(tokens.device)  # (n,) its picture
        place = torch.cat([torch.arange(count) for count in counts]).to(tokens.device)  # (n,) within it
        if query is None:
            lengths = torch.zeros(len(plans), dtype=torch.long)
            said = tokens.new_zeros(len(plans), tokens.shape[1])
        else:
            mask = query.mask[..., None].to(query.embeds)
            lengths = query.mask.sum(1)
            said = (query.embeds * mask).sum(1) / mask.sum(1)
        added = tokens * self.question(said.to(tokens))[owner]
        kept = (place + lengths.to(place)[owner]) % 2 == 0 if self.drop else None
        regions = [[plan.regions[int(n) % len(plan.regions)]] for plan, n in zip(plans, lengths, strict=True)]
        return VisualTokens(
            tokens, kept, ToyInjection(added, kept), accounts=[Account(regions=own) for own in regions]
        )


class Toy(Method):
    title = "Toy"
    idea = "every seam at once"
    paper = "none"
    Options = ToyOptions
    options: ToyOptions
    uses_query = True

    @lru_cache(maxsize=4096)  # noqa: B019  a handful of instances per process
    def plan(self, height: int, width: int) -> ViewPlan:
        picture, side = Size(height, width), self.tower.side
        tiles = Size(1, 2) if width > height else Size(1, 1)
        canvas = Size(side.height, side.width * tiles.width)
        views = (View(0, whole(side), "global"), *tiled(1, tiles, side))
        if not self._within_budget(len(views) * self.tower.tokens):
            raise self._refuse_budget(len(views) * self.tower.tokens)
        canvases = (squashed(picture, side), letterboxed(picture, canvas))
        return ViewPlan(picture, canvases, views, len(views) * self.tower.tokens, tiles)

    def build_connector(self, widths: Widths) -> ToyConnector:
        return ToyConnector(widths, self.options)

    def converse(self, picture: Image.Image, question: str) -> Generator[Turn, str, Reply]:
        where = yield Turn(f"Where to look for: {question}", [picture])
        left = len(where) % picture.width
        box = Box(left, 0, picture.width, picture.height)
        text = yield Turn(question, [picture.crop(box.rounded())])
        return Reply(text, [box])
