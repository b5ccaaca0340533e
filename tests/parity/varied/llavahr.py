"""LLaVA-HR, from what its authors' classes compute and from the paper's equations."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests.parity.varied.making import (
    CLIP_MEAN,
    CLIP_STD,
    Made,
    Maker,
    Random,
    bytes_of,
    linear,
    norm,
    normalised,
    padded,
    photo,
    prefixed,
    resized,
)


def aligned(slow: Tensor, side: int) -> Tensor:
    """(B, C, h, h) on a grid of side x side."""
    own = slow.shape[-1]
    if own < side:
        return F.interpolate(slow, (side, side), mode="bilinear", align_corners=True)
    return F.avg_pool2d(slow, own // side)


def tokens_of(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def map_of(x: Tensor) -> Tensor:
    side = round(x.shape[1] ** 0.5)
    return x.transpose(1, 2).reshape(len(x), -1, side, side)


def adapter_state(random: Random, fast: int, slow: int) -> dict[str, Tensor]:
    state = random.linear("gate.0", fast // 2, 2 * fast) | random.linear("gate.2", 1, fast // 2)
    for name, wide_out, wide_in in (
        ("slow_conv", slow, slow),
        ("slow_proj", fast, slow),
        ("fast_proj", fast, fast),
    ):
        for key, tensor in random.linear(name, wide_out, wide_in).items():
            state[key] = tensor[..., None, None] if key.endswith("weight") else tensor
    weight, bias = random(fast, 1, 7, 7, scale=0.1), random(fast, scale=0.1)
    return state | {"fast_conv.weight": weight, "fast_conv.bias": bias}


def convolved(x: Tensor, state: Mapping[str, Tensor], name: str, **more: int) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **more)


def adapted(fast: Tensor, slow: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """(B, N, C) and (B, C', h, h)"""
    width, side = fast.shape[-1], round(fast.shape[1] ** 0.5)
    depthwise = convolved(map_of(fast), state, "fast_conv", padding=3, groups=width)
    mid = map_of(fast) + convolved(F.gelu(depthwise), state, "fast_proj")
    high = aligned(convolved(F.gelu(convolved(slow, state, "slow_conv")), state, "slow_proj"), side)
    read = torch.cat([mid.mean((2, 3)), high.mean((2, 3))], -1)
    gate = torch.tanh(linear(F.gelu(linear(read, state, "gate.0")), state, "gate.2"))
    fused = mid + gate[..., None, None] * high
    return {
        "fast_mid": tokens_of(mid),
        "slow_aligned": tokens_of(high),
        "gate_tanh": gate,
        "fused": tokens_of(fused),
    }


# Sides of fast and slow grids.
GRIDS = (((3, 3), (4, 2), (2, 6), (6, 3)), ((5, 5),))


def mr_adapter(seed: int) -> Made:
    fast, slow, batch = ((20, 6, 1), (8, 24, 3))[seed]
    random, tensors = Random(seed), {}
    state = adapter_state(random, fast, slow)
    for i, (low, high) in enumerate(GRIDS[seed]):
        given = {"fast": random(batch, low * low, fast), "slow": random(batch, slow, high, high)}
        out = adapted(given["fast"], given["slow"], state)
        if seed:
            out = {"fused": out["fused"]}
        tensors |= {f"in.{key}_{i}": t for key, t in given.items()}
        tensors |= {f"out.{key}_{i}": t for key, t in out.items()}
    config = {"fast_dim": fast, "slow_dim": slow, "batch": batch}
    return Made({"config": config}, tensors | prefixed("state", state))


def mr_adapter_paper(seed: int) -> Made:
    fast, slow, side = ((12, 18, 3), (16, 8, 5))[seed]
    random = Random(seed)
    state = {
        "f_l.dw": random(fast, 1, 7, 7, scale=0.1),
        "f_l.dw_b": random(fast),
        "f_l.pw": random(fast, fast, scale=0.2),
        "f_l.pw_b": random(fast),
        "f_h.fc1": random(slow, slow, scale=0.2),
        "f_h.fc1_b": random(slow),
        "f_h.fc2": random(fast, slow, scale=0.2),
        "f_h.fc2_b": random(fast),
        "W1": random(fast // 2, 2 * fast, scale=0.2),
        "W2": random(fast, fast // 2, scale=0.2),
    }
    low, high = random(2, side * side, fast), random(2, side * side, slow)
    depthwise = F.conv2d(map_of(low), state["f_l.dw"], state["f_l.dw_b"], padding=3, groups=fast)
    f_l = F.gelu(tokens_of(depthwise)) @ state["f_l.pw"].T + state["f_l.pw_b"]
    f_h = F.gelu(high @ state["f_h.fc1"].T + state["f_h.fc1_b"]) @ state["f_h.fc2"].T + state["f_h.fc2_b"]
    read = torch.cat([f_l.mean(1), f_h.mean(1)], -1)
    gate = torch.tanh(F.gelu(read @ state["W1"].T) @ state["W2"].T)
    out = {"f_l": f_l, "f_h": f_h, "gate": gate, "fused": low + f_l + gate[:, None] * f_h}
    tensors = {"in.fast": low, "in.slow": high} | prefixed("paper_out", out) | prefixed("state", state)
    return Made({"config": {"fast_dim": fast, "slow_dim": slow, "batch": 2, "side": side}}, tensors)


def fusion_state(random: Random, fast: int, slow: int) -> dict[str, Tensor]:
    return random.linear("fast_proj", fast, fast) | random.linear("slow_proj", fast, slow)


def fused(fast: Tensor, slow: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    high = tokens_of(aligned(slow, round(fast.shape[1] ** 0.5)))
    return linear(fast, state, "fast_proj") + linear(high, state, "slow_proj")


def final_fusion(seed: int) -> Made:
    fast, slow = ((10, 7), (6, 14))[seed]
    random, tensors, sides = Random(seed), {}, []
    state = fusion_state(random, fast, slow)
    for i, (low, high) in enumerate(GRIDS[seed]):
        given = {"fast": random(2, low * low, fast), "slow": random(2, slow, high, high)}
        tensors |= {f"in.{key}_{i}": t for key, t in given.items()}
        tensors[f"out.fused_{i}"] = fused(given["fast"], given["slow"], state)
        sides.append({"i": i, "fast_side": low, "slow_side": high})
    config = {"fast_dim": fast, "slow_dim": slow, "cases": sides}
    return Made({"config": config}, tensors | prefixed("state", state))


def preprocess(seed: int) -> Made:
    side, sizes = ((96, ((50, 30), (20, 70))), (45, ((64, 64),)))[seed]
    tensors = {}
    for i, (width, height) in enumerate(sizes):
        image = photo(i, width, height)
        tensors[f"in.image_{i}"] = bytes_of(image)
        tensors[f"out.pad_{i}"] = normalised(resized(padded(image), side, side))
        if not seed:
            short = min(image.size)
            large = resized(image, side * width // short, side * height // short)
            left, top = (large.width - side) // 2, (large.height - side) // 2
            tensors[f"out.crop_{i}"] = normalised(large.crop((left, top, left + side, top + side)))
    return Made({"config": {"input_image_size": side}, "tolerance": "1e-6 given the same Pillow"}, tensors)


def convnext_state(random: Random, dims: list[int], depths: list[int]) -> dict[str, Tensor]:
    state = {"stem.0.weight": random(dims[0], 3, 4, 4, scale=0.2), "stem.0.bias": random(dims[0])}
    state |= random.norm("stem.1", dims[0]) | random.norm("head.norm", dims[-1])
    for s, (width, depth) in enumerate(zip(dims, depths, strict=True)):
        if s:
            state |= random.norm(f"stages.{s}.downsample.0", dims[s - 1])
            weight = random(width, dims[s - 1], 2, 2, scale=0.3)
            state |= {
                f"stages.{s}.downsample.1.weight": weight,
                f"stages.{s}.downsample.1.bias": random(width),
            }
        for b in range(depth):
            at = f"stages.{s}.blocks.{b}"
            weight = random(width, 1, 7, 7, scale=0.1)
            state |= {f"{at}.conv_dw.weight": weight, f"{at}.conv_dw.bias": random(width, scale=0.1)}
            state |= random.norm(f"{at}.norm", width) | {f"{at}.weight": random(width, scale=0.5)}
            state |= random.linear(f"{at}.mlp.fc1", 4 * width, width)
            state |= random.linear(f"{at}.mlp.fc2", width, 4 * width)
    return state


def convnext(x: Tensor, state: Mapping[str, Tensor], depths: list[int], eps: float) -> list[Tensor]:
    """Of each stage, the output (B, C, h, w)."""

    def over_channels(x: Tensor, name: str) -> Tensor:
        return norm(x.permute(0, 2, 3, 1), state, name, eps).permute(0, 3, 1, 2)

    x, stages = over_channels(convolved(x, state, "stem.0", stride=4), "stem.1"), []
    for s, depth in enumerate(depths):
        if s:
            down = f"stages.{s}.downsample"
            x = convolved(over_channels(x, f"{down}.0"), state, f"{down}.1", stride=2)
        for b in range(depth):
            at = f"stages.{s}.blocks.{b}"
            h = convolved(x, state, f"{at}.conv_dw", padding=3, groups=x.shape[1]).permute(0, 2, 3, 1)
            h = F.gelu(linear(norm(h, state, f"{at}.norm", eps), state, f"{at}.mlp.fc1"))
            x = x + (state[f"{at}.weight"] * linear(h, state, f"{at}.mlp.fc2")).permute(0, 3, 1, 2)
        stages.append(x)
    return stages


def encoder(seed: int) -> Made:
    dims, depths, eps = (([6, 10, 12, 20], [1, 2, 1, 1], 1e-5), ([4, 8, 8, 12], [2, 1, 1, 2], 1e-6))[seed]
    width, layers, heads, patch, own = ((24, 8, 3, 14, 42), (16, 4, 2, 16, 64))[seed]
    side, low, batch, text = ((192, 84, 1, 28), (96, 64, 2, 10))[seed]  # grids of 6 and 6, 3 and 4
    random = Random(seed)
    clip = {"hidden": width, "layers": layers, "heads": heads, "intermediate": 40, "patch": patch}
    clip |= {"pretrained_image_size": own, "act": ("gelu", "quick_gelu")[seed], "ln_eps": 1e-5}
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=own,
        patch_size=patch,
        hidden_act=clip["act"],
    )
    vit = CLIPVisionModel(config).eval()
    for parameter in vit.parameters():
        parameter.copy_(random(*parameter.shape, scale=0.2))
    own_state = {key: t for key, t in vit.state_dict().items() if not key.endswith("position_ids")}
    slow_state, fusion = convnext_state(random, dims, depths), fusion_state(random, width, dims[-1])
    adapters = [] if seed else [adapter_state(random, width, dims[-1]) for _ in range(3)]
    projector = random.linear("mm_projector.0", text, width) | random.linear("mm_projector.2", text, text)
    pixels = random.integers(0, 256, batch, 3, side, side).to(torch.uint8)
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (CLIP_MEAN, CLIP_STD))
    x = (pixels.float() / 255 - mean) / std
    out: dict[str, Tensor] = {}
    for s, stage in enumerate(convnext(x, slow_state, depths, eps)):
        out[f"slow_stage{s}"] = stage
    slow = out["slow_stage3"]
    small = F.interpolate(x, (low, low), mode="bilinear", align_corners=True)
    table = own_state["embeddings.position_embedding.weight"][1:]
    grid, before = low // patch, own // patch
    if grid != before:
        table = map_of(table[None])
        table = tokens_of(F.interpolate(table, (grid, grid), mode="bicubic", antialias=True))[0]
    patches = F.conv2d(small, own_state["embeddings.patch_embedding.weight"], stride=patch)
    h = tokens_of(patches) + table
    out |= {"fast_image": small, "fast_embed": h}
    h = norm(h, own_state, "pre_layrnorm")
    out["fast_pre_ln"] = h
    for number, layer in enumerate(vit.encoder.layers, 1):
        h = layer(h, None)
        if number % (layers // 4) == 0:
            group = number // (layers // 4) - 1
            out[f"fast_group{group}"] = h
            if group < len(adapters):
                h = adapted(h, slow, adapters[group])["fused"]
                out[f"fused{group}"] = h
    out["features"] = fused(h, slow, fusion)
    hidden = F.gelu(linear(out["features"], projector, "mm_projector.0"))
    out["llm_tokens"] = linear(hidden, projector, "mm_projector.2")
    state = prefixed("fast_vision_tower.vision_tower.vision_model", own_state) | projector
    state |= prefixed("slow_vision_tower.vision_tower", slow_state) | prefixed("align_stages.0", fusion)
    for number, adapter in enumerate(adapters):
        state |= prefixed(f"align_stages_latent.{number}", adapter)
    about = {
        "config": {
            "clip": clip,
            "convnext": {"dims": dims, "depths": depths, "norm_eps": eps},
            "input_image_size": side,
            "fast_size": low,
            "freeze_vision": bool(seed),
            "llm_hidden": text,
        },
        "tolerance": "5e-5 absolute in fp32",
    }
    return Made(about, {"in.image_uint8": pixels} | prefixed("out", out) | prefixed("state", state))


MAKERS: dict[str, Maker] = {
    "mr_adapter": mr_adapter,
    "mr_adapter_paper": mr_adapter_paper,
    "final_fusion": final_fusion,
    "preprocess": preprocess,
    "encoder": encoder,
}
