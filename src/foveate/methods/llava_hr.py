"""LLaVA-HR: a ViT sees the whole picture small, a ConvNeXt reads it large, mixed between the ViT's blocks.

Paper: Luo et al., Feast Your Eyes: Mixture-of-Resolution Adaptation for Multimodal Large Language Models,
arXiv 2403.03003. Authors' code: luogen1996/LLaVA-HR (Apache-2.0).

    one square picture, two resolutions     LlavaHR.plan, DualTower.shrunk      section 4.2
    F_vh = F_Ih(I_h)                        DualTower.read_high                 equation 2
    F_Il(I_l, F_A(F_vh))                    DualTower.read_low                  equation 2
    F' = F + f_l(F) + g f_h(F_vh)           MRAdapter.forward                   equation 3
    g = tanh(W2 gelu(W1 f_v))               MRAdapter.parts                     equation 4
    ... + F_vh                              FinalFusion.forward                 equation 2
    -> MLP -> LLM                           LlavaHRConnector                    section 3

Where paper and code differ, we follow the code: the released checkpoints need it. The first column names the
options that change it, if any, with the code's choice first:

    gate_per: picture | channel             g is one number per picture and has biases, not a vector without
    gate_reads: sum | mapped                the gate reads F + f_l(F), not f_l(F) alone
    groups: 4, blocks                       adapters between four groups of blocks, not after each block
    low_map, high_map: conv, mlp            7 x 7 depthwise or 1 x 1 convolution, GELU, 1 x 1 convolution
    fit: pad | crop                         the first stage crops to the centre
    adapters: true | false                  the first stage has none
                                            a linear layer on both sides of the last sum, not on F_vh alone
                                            I_l is made from the normalised I_h, without antialiasing
                                            the ViT's last layer is read, not the last but one
                                            the class token is not in the ViT's attention
                                            a fresh adapter changes nothing; the paper does not say

No norm follows the ViT's last layer. Results are the code's; the computation differs: attention maps are
never stored, positions are resampled once, unused layers are not built, and activations are checkpointed only
in training and on request.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.errors import FoveateError
from foveate.layers import dtype_of, mlp_projector
from foveate.methods.base import (
    Connector,
    Method,
    MethodOptions,
    Query,
    Rerun,
    TowerGeometry,
    VisualTokens,
    Widths,
    flat,
)
from foveate.methods.layouts import Layout, connector_options, known_projector
from foveate.picture.account import Account, Spread
from foveate.picture.geometry import Box, Size, View, ViewPlan, centre_cropped, padded_square, whole
from foveate.towers.convnext import TIMM_KEYS, ConvNext, ConvNextShape, convnext_weights
from foveate.towers.vit import CLIP_LIKE, as_map, as_tokens, build_vit

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class LlavaHROptions(MethodOptions):
    retired: ClassVar[Mapping[str, Any]] = {
        "low_view": "bilinear",
        "vit_layer": "last",
        "class_token": False,
        "fusion": "both",
        "zero_init": True,
    }
    # Sides of the ViT's and the ConvNeXt's view, pixels; the finest pair within max_visual_tokens is used.
    resolutions: tuple[tuple[int, int], ...] | None = None  # null: `default_sides`
    magnify: int | None = None  # instead of resolutions: the tower's own side, and that times this number
    fit: Literal["pad", "crop"] = "pad"  # how a picture becomes a square
    convnext: ConvNextShape = field(default_factory=ConvNextShape)
    groups: int = 4  # equal groups of ViT blocks; an adapter after each but the last
    blocks: tuple[int, ...] | None = None  # instead of groups: ViT blocks, from 1, that an adapter follows
    adapters: bool = True  # false: they exist but do not run (first stage)
    paths: Literal["both", "low", "high"] = "both"
    direction: Literal["high_to_low", "low_to_high"] = "high_to_low"
    low_map: Literal["conv", "mlp"] = "conv"  # f_l
    high_map: Literal["mlp", "conv"] = "mlp"  # f_h
    gate: Literal["tanh", "sigmoid", "none"] = "tanh"
    gate_per: Literal["picture", "channel"] = "picture"
    gate_reads: Literal["sum", "mapped"] = "sum"  # F + f_l(F), or f_l(F)
    projector_depth: int = 2  # linear layers of the projector

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resolutions is not None:
            if any(len(pair) != 2 or min(pair) < 1 for pair in self.resolutions) or not self.resolutions:
                raise FoveateError(
                    "resolutions must be pairs of a low and a high side in pixels, at least one"
                )
            if len({high for _, high in self.resolutions}) < len(self.resolutions):
                raise FoveateError("resolutions must all have different high sides")
        if self.magnify is not None and self.magnify < 1:
            raise FoveateError(f"magnify must be at least 1, not {self.magnify}")
        if self.blocks is not None and self.direction == "low_to_high":
            raise FoveateError("blocks are the ViT's: leave them out with direction low_to_high")


def default_sides(patch: int) -> tuple[tuple[int, int], ...]:
    """Low and high sides for a ViT with this patch size: grids of 16, 24 and 32, like ConvNeXt-L's."""
    return tuple((high // 32 * patch, high) for high in (512, 768, 1024))


class Pair(NamedTuple):
    """Sides of the two views in pixels, and side of the ViT's grid in tokens."""

    low: int
    high: int
    grid: int


def make_pair(low: int, high: int, patch: int, stride: int) -> Pair:
    """Checks that one grid divides the other. Raises `FoveateError` that suggests pairs that fit."""
    fits = f"; {fitting(low, high, patch, stride)} would fit"
    if low % patch:
        raise FoveateError(f"resolutions: {low} pixels cannot be divided by the ViT's patch of {patch}{fits}")
    if high % stride:
        raise FoveateError(
            f"resolutions: {high} pixels cannot be divided by the ConvNeXt's stride of {stride}{fits}"
        )
    fast, slow = low // patch, high // stride
    if max(fast, slow) % min(fast, slow):
        raise FoveateError(
            f"resolutions: {low} and {high} pixels give grids of {fast} and {slow}: "
            f"neither divides the other{fits}"
        )
    return Pair(low, high, fast)


def fitting(low: int, high: int, patch: int, stride: int) -> str:
    """Fitting pairs near one that does not fit: with the grid of its high side, and of its low side."""
    grids = dict.fromkeys(max(round(n), 1) for n in (high / stride, low / patch))
    return " or ".join(f"[{grid * patch}, {grid * stride}]" for grid in grids)


def aligned(features: Tensor, side: int) -> Tensor:
    """(V, C, h, h) -> (V, C, side, side): enlarged bilinearly, or averaged down."""
    own = features.shape[-1]
    if own == side:
        return features
    if own < side:
        return F.interpolate(features, (side, side), mode="bilinear", align_corners=True)
    return F.avg_pool2d(features, own // side)


def mapping(kind: str, wide_in: int, wide_out: int) -> nn.Sequential:
    """f_l or f_h: a 7 x 7 depthwise (`conv`) or 1 x 1 (`mlp`) convolution, GELU, a 1 x 1 one of zeros."""
    if kind == "conv":
        first = nn.Conv2d(wide_in, wide_in, 7, padding=3, groups=wide_in)
    else:
        first = nn.Conv2d(wide_in, wide_in, 1)
    last = nn.Conv2d(wide_in, wide_out, 1)
    nn.init.xavier_uniform_(first.weight)
    for layer in (first, last):
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
    nn.init.zeros_(last.weight)
    return nn.Sequential(first, nn.GELU(), last)


class Score(nn.Linear):
    """A linear layer with one output.

    The last bit of a matrix-vector product depends on the weight's place in memory, which changes with saving
    and loading; a sum of products has no such dependence.
    """

    def __init__(self, wide_in: int) -> None:
        super().__init__(wide_in, 1)

    def forward(self, features: Tensor) -> Tensor:
        """(V, C) -> (V, 1)"""
        return (features * self.weight).sum(-1, keepdim=True) + self.bias


class Mixed(NamedTuple):
    """The terms of equation 3: the result is kept + gate * incoming."""

    kept: Tensor  # (V, C, h, h)
    gate: Tensor  # (V, 1 or C, 1, 1)
    incoming: Tensor  # (V, C, h, h)


class MRAdapter(nn.Module):
    """Brings features of one pathway (`incoming` channels) into the other (`width` channels)."""

    def __init__(self, width: int, incoming: int, options: LlavaHROptions) -> None:
        super().__init__()
        self.reads, self.kind = options.gate_reads, options.gate
        self.f_l = mapping(options.low_map, width, width)
        self.f_h = mapping(options.high_map, incoming, width)
        if self.kind != "none":
            vector = options.gate_per == "channel"
            self.gate = nn.Sequential(
                nn.Linear(2 * width, width // 2, bias=not vector),  # W1
                nn.GELU(),
                nn.Linear(width // 2, width, bias=False) if vector else Score(width // 2),  # W2
            )

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """(V, C, h, h) changed by (V, C', h', h')."""
        kept, gate, incoming = self.parts(low, high)
        return kept + gate * incoming

    def parts(self, low: Tensor, high: Tensor) -> Mixed:
        """The terms of `forward`, separately."""
        mapped = self.f_l(low)
        kept = low + mapped
        incoming = aligned(self.f_h(high), low.shape[-1])  # mapped on its own grid first
        if self.kind == "none":
            return Mixed(kept, kept.new_ones(len(kept), 1, 1, 1), incoming)
        read = kept if self.reads == "sum" else mapped
        pooled = torch.cat([read.mean((2, 3)), incoming.mean((2, 3))], 1)  # (V, 2 C)
        score = self.gate(pooled)[..., None, None]  # (V, 1 or C, 1, 1)
        return Mixed(kept, score.tanh() if self.kind == "tanh" else score.sigmoid(), incoming)


class FinalFusion(nn.Module):
    """The last sum of equation 2; the pathways differ in width, so F_vh needs at least a linear layer."""

    def __init__(self, low: int, high: int, options: LlavaHROptions) -> None:
        super().__init__()
        self.low: nn.Module = nn.Linear(low, low) if options.paths == "both" else nn.Identity()
        self.high = nn.Linear(high, low)

    def forward(self, tokens: Tensor | None, high: Tensor, grid: int) -> Tensor:
        """(V, N, C) and (V, C', h, h) -> (V, N, C)"""
        kept, incoming = self.parts(tokens, high, grid)
        return incoming if kept is None else kept + incoming

    def parts(self, tokens: Tensor | None, high: Tensor, grid: int) -> tuple[Tensor | None, Tensor]:
        """The terms of `forward`, separately."""
        incoming = self.high(as_tokens(aligned(high, grid)))
        return None if tokens is None else self.low(tokens), incoming


class DualTower(nn.Module):
    """Both pathways: views (V, 3, R, R) -> features (V, N, C) on the ViT's grid.

    Args:
        config: the ViT's configuration.
        options: the method's.
        pairs: resolutions that may occur.
    """

    def __init__(self, config: PreTrainedConfig, options: LlavaHROptions, pairs: Sequence[Pair]) -> None:
        super().__init__()
        self.options = options
        self.pairs = {pair.high: pair for pair in pairs}
        self.adapters = nn.ModuleList()
        self.places: tuple[int, ...] = ()  # blocks or stages, from 1, that an adapter follows
        width, widths = config.hidden_size, options.convnext.widths
        if options.paths != "high":
            self.model = build_vit(config)  # the same name as in other towers
            self.norm = CLIP_LIKE[config.model_type]
        if options.paths != "low":
            self.convnext = ConvNext(options.convnext)
            self.fusion = FinalFusion(width, widths[-1], options)
        if options.paths == "both" and options.direction == "high_to_low":
            self.places = adapter_places(options, config.num_hidden_layers)
            self.adapters.extend(MRAdapter(width, widths[-1], options) for _ in self.places)
        elif options.paths == "both":
            self.places = tuple(range(1, len(widths)))
            self.adapters.extend(MRAdapter(wide, width, options) for wide in widths[:-1])

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(V, 3, R, R) -> (V, N, C)"""
        pixels = pixel_values.to(dtype=dtype_of(self))
        pair = self.pair_of(pixels)
        high: Tensor | None = None
        tokens: Tensor | None = None
        if self.options.direction == "high_to_low":
            if self.options.paths != "low":
                high = self.read_high(pixels)
            if self.options.paths != "high":
                tokens = self.read_low(self.shrunk(pixels, pair.low), high)
        else:
            if self.options.paths != "high":
                tokens = self.read_low(self.shrunk(pixels, pair.low))
            if self.options.paths != "low":
                high = self.read_high(pixels, tokens)
        if high is None:
            assert tokens is not None
            return tokens
        return self.fusion(tokens, high, pair.grid)

    def pair_of(self, pixels: Tensor) -> Pair:
        """The resolutions of these views. Raises `FoveateError` for views of another size."""
        if pixels.shape[-2] != pixels.shape[-1] or pixels.shape[-1] not in self.pairs:
            raise FoveateError(
                f"views of {pixels.shape[-2]} x {pixels.shape[-1]} pixels: the high sides in resolutions are "
                f"{', '.join(map(str, self.pairs))}"
            )
        return self.pairs[pixels.shape[-1]]

    def shrunk(self, pixels: Tensor, side: int) -> Tensor:
        """The low-resolution views, (V, 3, R, R) -> (V, 3, side, side)."""
        if pixels.shape[-1] == side:
            return pixels
        exact = pixels.float()
        low = F.interpolate(exact, (side, side), mode="bilinear", align_corners=True)
        return low.to(pixels.dtype)

    def read_high(self, pixels: Tensor, tokens: Tensor | None = None) -> Tensor:
        """(V, 3, R, R) -> (V, C', h, h), the last stage; adapters between stages if tokens are given."""
        features = self.convnext.embeddings(pixels.contiguous(memory_format=torch.channels_last))
        low = None if tokens is None else as_map(tokens)
        for number in range(1, len(self.convnext.stages) + 1):
            features = self.convnext.run_stage(number, features)
            if low is not None and (adapter := self._adapter_behind(number)):
                features = adapter(features, low)
        return features

    def read_low(self, pixels: Tensor, high: Tensor | None = None) -> Tensor:
        """(V, 3, r, r) -> (V, N, C); adapters between blocks if high-resolution features are given."""
        hidden = self.model.embeddings(pixels)
        if self.norm is not None:
            hidden = self.model.get_submodule(self.norm)(hidden)
        for number, layer in enumerate(self.model.encoder.layers, 1):
            hidden = layer(hidden, None)
            if high is not None and (adapter := self._adapter_behind(number)):
                hidden = as_tokens(adapter(as_map(hidden), high))
        return hidden

    def _adapter_behind(self, number: int) -> nn.Module | None:
        """The adapter after block or stage `number`, if there is one and it runs."""
        if not self.options.adapters or number not in self.places:
            return None
        return self.adapters[self.places.index(number)]


def adapter_places(options: LlavaHROptions, depth: int) -> tuple[int, ...]:
    """Blocks, from 1, that an adapter follows, in a ViT of `depth` blocks. Raises `FoveateError`."""
    if options.blocks is not None:
        blocks, known = list(options.blocks), range(1, depth + 1)
        if blocks != sorted({*blocks}) or not {*blocks} <= {*known}:
            raise FoveateError(f"blocks must be increasing numbers from 1 to {depth}, not {blocks}")
        return options.blocks
    if options.groups < 1 or depth % options.groups:
        raise FoveateError(
            f"a ViT of {depth} blocks cannot be cut into {options.groups} equal groups: set groups or blocks"
        )
    size = depth // options.groups
    return tuple(range(size, depth, size))


class LlavaHRConnector(Connector):
    def __init__(self, widths: Widths, depth: int) -> None:
        super().__init__()
        self.projector = mlp_projector(widths.vision, widths.text, depth)

    def forward(self, features: Tensor, plans: Sequence[ViewPlan], query: Query | None) -> VisualTokens:
        return VisualTokens(flat(self.projector(features)))  # (V, N, C) -> (V N, D)


class LlavaHR(Method):
    title = "LLaVA-HR"
    idea = "one view read twice: small by a ViT, large by a ConvNeXt, mixed in the ViT"
    paper = "arXiv 2403.03003"
    Options = LlavaHROptions
    tiny: ClassVar[Mapping[str, Any]] = {
        "resolutions": [[56, 128]],
        "convnext": {"depths": [1, 1, 2, 1], "widths": [8, 16, 24, 32], "layer_scale": 0.5},
        "groups": 3,
    }
    options: LlavaHROptions

    @classmethod
    def options_for(cls, ratio: int) -> dict[str, Any]:
        """A small ConvNeXt of stride 8: its grid is `ratio` times that of a ViT with patches of 8."""
        convnext = {"patch": 2, "depths": [1, 2, 2], "widths": [24, 48, 96], "layer_scale": 0.1}
        return {"magnify": ratio, "groups": 2, "convnext": convnext}

    @classmethod
    def options_with(cls, convnet: Path) -> dict[str, Any]:
        config = json.loads((convnet / "config.json").read_text(encoding="utf-8"))
        shape = {"patch": config["patch_size"], "depths": config["depths"], "widths": config["hidden_sizes"]}
        return {"convnext": {**shape, "weights": str(convnet)}}

    def __init__(self, tower: TowerGeometry, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(tower, options)
        sides = self.options.resolutions or default_sides(tower.patch_size)
        if self.options.magnify is not None:
            sides = ((tower.image_size, tower.image_size * self.options.magnify),)
        if self.options.paths == "low":
            sides = tuple((low, low) for low, _ in sides)
        stride = tower.patch_size if self.options.paths == "low" else self.options.convnext.stride
        pairs = [make_pair(low, high, tower.patch_size, stride) for low, high in sides]
        self.pairs = sorted(pairs, key=lambda pair: (pair.grid, pair.high))
        if self.options.paths == "both" and self.options.direction == "low_to_high":
            self._check_stages()

    def _check_stages(self) -> None:
        """Adapters between the ConvNeXt's stages enlarge the ViT's grid, or average it down."""
        shape = self.options.convnext
        for pair in self.pairs:
            for stage in range(len(shape.depths) - 1):
                grid = pair.high // (shape.patch << stage)
                if grid < pair.grid and pair.grid % grid:
                    raise FoveateError(
                        f"resolutions with direction low_to_high: {pair.low} and {pair.high} pixels give a "
                        f"ViT's grid of {pair.grid}, not divisible by stage {stage + 1}'s of {grid}; "
                        f"{fitting(pair.low, pair.high, self.tower.patch_size, shape.stride)} would fit"
                    )

    @lru_cache(maxsize=4096)  # noqa: B019  a handful of instances per process
    def plan(self, height: int, width: int) -> ViewPlan:
        picture = Size(height, width)
        fitting = [pair for pair in self.pairs if self._within_budget(pair.grid**2)]
        if not fitting:
            raise self._refuse_budget(self.pairs[0].grid ** 2)
        side = fitting[-1].high
        canvas = padded_square(picture, side) if self.options.fit == "pad" else centre_cropped(picture, side)
        view = View(0, whole(Size(side, side)), "high resolution")
        return ViewPlan(picture, (canvas,), (view,), fitting[-1].grid ** 2)

    def build_tower(self, vision_config: PreTrainedConfig, layer: int) -> DualTower:
        return DualTower(vision_config, self.options, self.pairs)

    def build_connector(self, widths: Widths) -> LlavaHRConnector:
        return LlavaHRConnector(widths, self.options.projector_depth)

    @property
    def tower_weights(self) -> str | None:
        return None if self.options.paths == "low" else self.options.convnext.weights

    def fill_tower(
        self, tower: nn.Module, vit: PreTrainedModel | None, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """The ViT's weights, and the ConvNeXt's from `convnext.weights`."""
        if self.options.paths != "high":
            super().fill_tower(tower, vit)
        shape = self.options.convnext
        if self.options.paths == "low":
            return
        if weights is None:
            if vit is not None:
                LOGGER.warning("the ViT is pretrained and the ConvNeXt is not: set weights in convnext")
        else:
            convnext = tower.get_submodule("convnext")
            convnext.load_state_dict(convnext_weights(shape, weights, convnext.state_dict()))

    @torch.no_grad()
    def account(self, run: Rerun) -> Account:
        """The low-resolution view, the gates, and how much of the high resolution was added to each token."""
        if self.options.paths != "both":
            return Account()
        tower, plan = run.tower, run.plan
        assert isinstance(tower, DualTower)
        pixels = run.views()
        pair = tower.pair_of(pixels)
        gates: list[float] = []
        added = torch.zeros(pair.grid**2, device=pixels.device)  # relative to the tokens, over all adapters

        def mixed(adapter: MRAdapter, given: tuple[Tensor, Tensor]) -> None:
            kept, gate, incoming = adapter.parts(*given)
            gates.append(gate.mean().item())
            if self.options.direction == "high_to_low":
                added.add_(_share(as_tokens(gate * incoming), as_tokens(kept)))

        def fused(fusion: FinalFusion, given: tuple[Tensor, Tensor, int]) -> None:
            kept, incoming = fusion.parts(*given)
            if kept is not None:
                added.add_(_share(incoming, kept))

        hooks = [adapter.register_forward_pre_hook(mixed) for adapter in tower.adapters]
        hooks.append(tower.fusion.register_forward_pre_hook(fused))
        try:
            tower(pixels)
        finally:
            for hook in hooks:
                hook.remove()
        notes = []
        what = "blocks" if self.options.direction == "high_to_low" else "stages"
        if gates:
            values = [f"{place}: {gate:.3f}" for place, gate in zip(tower.places, gates, strict=True)]
            notes.append(f"gates after {what} {', '.join(values)}")
        cells = [cell.clipped(plan.picture) for cell in _cells(plan, pair)]
        changes = zip(cells, added.tolist(), strict=True)
        seen = [(cell, change) for cell, change in changes if cell.width * cell.height]
        least, most = min(change for _, change in seen), max(change for _, change in seen)
        notes.append(f"warm: changed most by high resolution, by {least:.2f} to {most:.2f} of a token's norm")
        heat = [(cell, max((change - least) / (most - least or 1), 0.01)) for cell, change in seen]
        return Account(
            views=[("low resolution", tower.shrunk(pixels, pair.low)[0])],
            heat=lambda: heat,
            notes=notes,
            gates={f"{what[:-1]} {place}": gate for place, gate in zip(tower.places, gates, strict=True)},
        )

    def spread(self, run: Rerun, relevance: Tensor, account: Account) -> Spread:
        """All of a token's relevance stays in its cell of the grid that both pathways share.

        The ViT's patch and the ConvNeXt's features that are mixed into it lie in this cell; the ConvNeXt's
        receptive field beyond it is not followed.
        """
        return super().spread(run, relevance, account)


def _cells(plan: ViewPlan, pair: Pair) -> list[Box]:
    """The part of the picture at each token, in original pixels; outside the picture for padding."""
    side = Fraction(pair.high, pair.grid)
    places = [(row * side, column * side) for row in range(pair.grid) for column in range(pair.grid)]
    return [plan.to_picture(0, (left, top, left + side, top + side)) for top, left in places]


def _share(added: Tensor, kept: Tensor) -> Tensor:
    """The norm of what is added to each token, relative to the token's: (1, N, C), (1, N, C) -> (N,)"""
    return (added.float().norm(dim=-1) / kept.float().norm(dim=-1).clamp(min=1e-12))[0]


XXLARGE = {"depths": [3, 4, 30, 3], "widths": [384, 768, 1536, 3072], "norm_eps": 1e-5}
CONVNEXTS: dict[str, dict[str, Any]] = {"convnext_large": {}, "convnext_xxlarge": XXLARGE}


def _original_options(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    name, high = config["vision_tower_slow"], config.get("input_image_size")
    if not isinstance(name, str) or not isinstance(high, int):
        raise FoveateError(
            "config.json: vision_tower_slow must be a name and input_image_size a number of pixels, "
            f"not {name!r} and {high!r}"
        )
    shape = next((shape for start, shape in CONVNEXTS.items() if name.startswith(start)), None)
    if shape is None:
        raise FoveateError(f"config.json: vision_tower_slow {name!r} is not one of {', '.join(CONVNEXTS)}")
    return {
        "resolutions": [[max(high * 14 // 32, 336), high]],
        **connector_options(config),
        "convnext": shape,
        "adapters": not config.get("freeze_vision", True),
    }


_TOWER = r"^model\.vision_tower\."

_RELEASED = Layout(
    name="favor123/llava-hr-*",
    family="original",
    recognises=lambda config: bool(config.get("vision_tower_slow")) and known_projector(config),
    options=_original_options,
    keys={
        rf"{_TOWER}fast_vision_tower\.vision_tower\.vision_model\.": "vision_tower.model.",
        **{
            rf"{_TOWER}slow_vision_tower\.vision_tower\.{timm}": f"vision_tower.convnext.{ours}"
            for timm, ours in TIMM_KEYS.items()
        },
        rf"{_TOWER}align_stages_latent\.(\d+)\.fast_conv\.": r"vision_tower.adapters.\1.f_l.0.",
        rf"{_TOWER}align_stages_latent\.(\d+)\.fast_proj\.": r"vision_tower.adapters.\1.f_l.2.",
        rf"{_TOWER}align_stages_latent\.(\d+)\.slow_conv\.": r"vision_tower.adapters.\1.f_h.0.",
        rf"{_TOWER}align_stages_latent\.(\d+)\.slow_proj\.": r"vision_tower.adapters.\1.f_h.2.",
        rf"{_TOWER}align_stages_latent\.(\d+)\.gate\.": r"vision_tower.adapters.\1.gate.",
        rf"{_TOWER}align_stages\.0\.fast_proj\.": "vision_tower.fusion.low.",
        rf"{_TOWER}align_stages\.0\.slow_proj\.": "vision_tower.fusion.high.",
        r"^model\.mm_projector\.(\d)\.": r"connector.projector.\1.",
        r"^model\.mm_projector\.(weight|bias)$": r"connector.projector.0.\1",
    },
    drops=(
        rf"{_TOWER}slow_vision_tower\.vision_tower\.head\.",
        rf"{_TOWER}fast_vision_tower\..*post_layernorm\.",
    ),
    optional=(r"^vision_tower\.model\.embeddings\.class_embedding$",),
    connector_files=("mm_projector.bin",),
)
# If the towers were frozen, the authors' code makes no adapters. A first stage contains no LLM either, and
# gets fresh adapters for the second.
_FROZEN = replace(
    _RELEASED,
    name="favor123/llava-hr-* with frozen towers",
    recognises=lambda config: _RELEASED.recognises(config) and bool(config.get("freeze_vision", True)),
    options=lambda config, preprocessor: {**_original_options(config, preprocessor), "blocks": []},
    told_by=r"^model\.layers\.",
)
LlavaHR.layouts = (_FROZEN, _RELEASED)
