"""INF-LLaVA in full: every view, every part by itself, maps at full size, softmax written out.

The plain form of the paper's equations, to compare `foveate.methods.inf_llava` with: the method must
agree with it, and `benchmarks/inf_llava.py` times it. No model runs it.

    cropping, recombination     cut, joined        eqs 5-6, 9-17
    one enhancement of a part   attend             eqs 20-21, 24-25
    V_dual                      dual               eqs 18-27
    F_pool                      pooled             eq. 7
    low resolution, MLP         tokens             eq. 8, section 5.5.1
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.methods.inf_llava import CrossAttention, InfConnector
from foveate.picture.geometry import Size


def cut(x: Tensor, tiles: Size, kind: str) -> list[Tensor]:
    """(B, H, W, C) -> its parts, row by row: contiguous ones, or every n-th row and column."""
    height, width = x.shape[1] // tiles.height, x.shape[2] // tiles.width
    pairs = [(r, c) for r in range(tiles.height) for c in range(tiles.width)]
    if kind == "local":
        return [x[:, r * height : (r + 1) * height, c * width : (c + 1) * width] for r, c in pairs]
    return [x[:, r :: tiles.height, c :: tiles.width] for r, c in pairs]


def joined(parts: Sequence[Tensor], tiles: Size, kind: str) -> Tensor:
    """The inverse of `cut`."""
    grid = torch.stack(tuple(parts), 1).unflatten(1, tuple(tiles))  # (B, R, K, h, w, C)
    order = (0, 1, 3, 2, 4, 5) if kind == "local" else (0, 3, 1, 4, 2, 5)
    return grid.permute(order).flatten(3, 4).flatten(1, 2)


def attend(module: CrossAttention, x: Tensor, source: Tensor) -> Tensor:
    """Twice (B, h, w, C) -> (B, h, w, C), with the attention map in memory."""
    b, h, w, c = x.shape
    heads = module.heads

    def split(y: Tensor) -> Tensor:
        return y.reshape(b, h * w, heads, c // heads).transpose(1, 2)

    query, key, value = split(module.query(x)), split(module.key(source)), split(module.value(source))
    attention = (query @ key.transpose(2, 3) / (c // heads) ** 0.5).softmax(-1)
    read = (attention @ value).transpose(1, 2).reshape(b, h, w, c)
    return module.norm(module.out(read) + x) if module.residual else read


def dual(connector: InfConnector, local: Tensor, strided: Tensor, tiles: Size) -> Tensor:
    """All views of both kinds (B, n n, h, w, C) each -> the map before pooling, (B, n h, n w, C)."""
    options = connector.options
    maps = {
        "local": joined(local.unbind(1), tiles, "local"),
        "global": joined(strided.unbind(1), tiles, "global"),
    }
    if options.crops != "both":
        maps = dict.fromkeys(maps, maps[options.crops])
    if options.enhance == "none":
        return maps["local"] + maps["global"] if options.crops == "both" else maps["local"]
    enhanced = {}
    for name, other in (("local", "global"), ("global", "local")):
        if options.enhance not in ("both", name):
            continue
        module: Any = connector.attention["both" if options.shared else name]
        kind = other if options.parts == "crossed" else name
        pairs = zip(cut(maps[name], tiles, kind), cut(maps[other], tiles, kind), strict=True)
        enhanced[name] = joined([attend(module, x, source) for x, source in pairs], tiles, kind)
    if options.enhance != "both":
        return enhanced[options.enhance]
    fusion: Any = connector.fusion
    if options.fusion == "conv":
        order = ("local", "global") if options.fused == "authors" else ("global", "local")
        planes = torch.cat([enhanced[kind] for kind in order], -1).permute(0, 3, 1, 2)
        fused = F.conv2d(planes, fusion.conv.weight, fusion.conv.bias, padding=1).permute(0, 2, 3, 1)
        both = enhanced["global"] + enhanced["local"]
        return fusion.norm(fused + both) if options.fused == "authors" else fused
    if (options.fusion, options.fused) != ("concat", "authors"):
        return connector.fusion(enhanced)
    embedded = [fusion.embed[kind](enhanced[kind]) for kind in ("local", "global")]
    return fusion.norm(torch.cat(embedded, -1) + enhanced["global"] + enhanced["local"])


def pooled(x: Tensor, side: int, pool: str) -> Tensor:
    """(B, H, W, C) -> (B, side, side, C)"""
    planes = x.permute(0, 3, 1, 2)
    if pool == "bilinear":
        planes = F.interpolate(planes, (side, side), mode="bilinear", align_corners=False)
    else:
        planes = F.adaptive_avg_pool2d(planes, (side, side))
    return planes.permute(0, 2, 3, 1)


def tokens(
    connector: InfConnector, local: Tensor, strided: Tensor, low: Tensor, tiles: Size, side: int
) -> Tensor:
    """Features (B, n n, h, w, C) of both kinds, (B, h, w, C) of the low-resolution view -> (B, side^2, D)."""
    options = connector.options
    features = pooled(dual(connector, local, strided, tiles), side, options.pool)
    if options.low_view != "none":
        features = features + pooled(low, side, options.pool)
        features = features / 2 if options.low_mix == "mean" else features
    return connector.projector(features.flatten(1, 2))
