"""INF-LLaVA, from what its authors' classes compute and from the paper's equations."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests.parity.varied.making import Made, Maker, Random, attended, linear, norm, prefixed


def mosaic(views: Tensor, n: int, interleaved: bool) -> Tensor:
    """(n n, B, h, w, d) -> (B, n h, n w, d): beside each other, or every n-th row and column."""
    _, batch, height, width, depth = views.shape
    whole = torch.zeros(batch, n * height, n * width, depth)
    for number, view in enumerate(views):
        row, column = divmod(number, n)
        if interleaved:
            whole[:, row::n, column::n] = view
        else:
            whole[:, row * height : (row + 1) * height, column * width : (column + 1) * width] = view
    return whole


def pieces(whole: Tensor, n: int, interleaved: bool) -> Tensor:
    """The inverse of `mosaic`."""
    height, width = whole.shape[1] // n, whole.shape[2] // n
    places = [(row, column) for row in range(n) for column in range(n)]
    if interleaved:
        return torch.stack([whole[:, row::n, column::n] for row, column in places])
    return torch.stack(
        [
            whole[:, r * height : (r + 1) * height, c * width : (c + 1) * width]
            for r, c in places
        ]
    )  # fmt: skip


def dcm(seed: int) -> Made:
    n, height, width, depth = ((2, 3, 5, 6), (3, 4, 2, 7))[seed]
    random = Random(seed)
    picture = random(2, 3, n * height, n * width)
    views = random(n * n, 2, height, width, depth)
    tensors = {"one.input": picture}
    for kind, interleaved in (("loc", False), ("glo", True)):
        for i, view in enumerate(pieces(picture.permute(0, 2, 3, 1), n, interleaved)):
            tensors[f"out.one.{kind}{i}"] = view.permute(0, 3, 1, 2)
    for i, view in enumerate(views):
        tensors[f"two.input{i}"] = view
    tensors["out.two.combine_local"] = mosaic(views, n, False)
    tensors["out.two.combine_global"] = mosaic(views, n, True)
    about = {"cases": [{"case": "one", "n": n}, {"case": "two", "n": n}]}
    if not seed:
        pixels = torch.zeros(1, 1, 11, 9)
        ragged = [list(pixels[0, 0, r::4, c::4].shape) for r in range(4) for c in range(4)]
        left = {"shape": [1, 1, 11, 9], "n": 4, "extract_pixels_N_view_shapes": ragged}
        about["not_divisible"] = {"cases": [left]}
    return Made(about, tensors)


def attention_state(random: Random, width: int, name: str = "linears") -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for number in range(4):
        state |= random.linear(f"{name}.{number}", width, width)
    return state


def looked(
    x: Tensor, source: Tensor, state: Mapping[str, Tensor], heads: int, eps: float, at: str = ""
) -> tuple[Tensor, Tensor]:
    query = linear(x, state, f"{at}linears.0")
    key, value = (linear(source, state, f"{at}linears.{number}") for number in (1, 2))
    read, maps = attended(query, key, value, heads)
    return norm(linear(read, state, f"{at}linears.3") + x, state, f"{at}ln", eps), maps


def mha(seed: int) -> Made:
    width, heads, eps = ((12, 4, 1e-6), (10, 2, 1e-5))[seed]
    random = Random(seed)
    state = attention_state(random, width) | random.norm("ln", width)
    x, source = random(3, 5, width), random(3, 8, width)
    y, maps = looked(x, source, state, heads, eps)
    tensors = {"q": x, "kv": source, "out.y": y} | prefixed("state", state)
    if seed:
        tensors["out.attn"] = maps
    return Made({"config": {"heads": heads, "d_model": width, "ln_eps": eps}}, tensors)


def dem_state(random: Random, width: int) -> dict[str, Tensor]:
    state = attention_state(random, width, "attention.linears") | random.norm("attention.ln", width)
    for name in ("ffn_crop", "ffn_stride"):
        state |= random.linear(f"{name}.0", width // 16, width)
        state |= random.linear(f"{name}.2", width // 2, width // 16)
    return state | random.norm("ln_fuse", width)


def enhanced(
    local: Tensor, whole: Tensor, state: Mapping[str, Tensor], n: int, heads: int
) -> dict[str, Tensor]:
    """(B, n h, n w, d) twice -> both enhanced maps, and the fused one."""

    def looking(x: Tensor, source: Tensor, interleaved: bool) -> Tensor:
        parts, seen = pieces(x, n, interleaved), pieces(source, n, interleaved)
        read, _ = looked(parts.flatten(2, 3), seen.flatten(2, 3), state, heads, 1e-5, "attention.")
        return mosaic(read.view(parts.shape), n, interleaved)

    def half(x: Tensor, name: str) -> Tensor:
        return linear(F.gelu(linear(x, state, f"{name}.0")), state, f"{name}.2")

    e_global, e_local = looking(whole, local, False), looking(local, whole, True)
    joined = torch.cat([half(e_local, "ffn_crop"), half(e_global, "ffn_stride")], -1)
    fused = norm(joined + e_global + e_local, state, "ln_fuse")
    return {"enhanced_local": e_local, "enhanced_global": e_global, "pre_pool": fused}


def pooled(whole: Tensor, side: int) -> Tensor:
    """(B, n h, n w, d) -> (B, N, d)"""
    small = F.interpolate(whole.permute(0, 3, 1, 2), (side, side), mode="bilinear", align_corners=False)
    return small.flatten(2).transpose(1, 2)


def dem(seed: int) -> Made:
    n, side, width, heads = ((2, 6, 32, 4), (4, 5, 16, 8))[seed]
    random = Random(seed)
    state = dem_state(random, width)
    views = random(2 * n * n, 1, side * side, width).half()
    whole = views.float().view(2, n * n, 1, side, side, width)
    out = enhanced(mosaic(whole[0], n, False), mosaic(whole[1], n, True), state, n, heads)
    out["tokens"] = pooled(out["pre_pool"], side)
    about: dict = {"config": {"n": n, "channel": width, "heads": heads, "hw": side * side}}
    if seed:  # of four rows, a reduction by four reads those in the middle
        live = [n * n + row * n + column for row in (1, 2) for column in (1, 2)]
        about["dead_views"] = {"indices": [i for i in range(n * n, 2 * n * n) if i not in live]}
        out = {"tokens": out["tokens"]}
    tensors = {f"view{i:02}": view for i, view in enumerate(views)}
    return Made(about, tensors | prefixed("out", out) | prefixed("state", state))


def dem_small(seed: int) -> Made:
    n, side, width, heads, batch = ((4, 3, 16, 2, 1), (3, 5, 48, 3, 2))[seed]
    random = Random(seed)
    state = dem_state(random, width)
    views = random(2, n * n, batch, side, side, width)
    out = enhanced(mosaic(views[0], n, False), mosaic(views[1], n, True), state, n, heads)
    tensors = dict(zip(("local", "global"), views.flatten(3, 4), strict=True))
    tensors["out.tokens"] = pooled(out["pre_pool"], side)
    config = {"n": n, "channel": width, "heads": heads, "h": side, "w": side, "batch": batch}
    return Made({"config": config}, tensors | prefixed("state", state))


def dem_paper(seed: int) -> Made:
    n, height, width, depth, batch, separate = ((3, 2, 4, 6, 1, True), (2, 5, 3, 10, 2, False))[seed]
    random, state = Random(seed), {}
    names = ("glo", "loc")
    for name in names:
        state[f"fuse.{name}"] = random(depth, depth // 2)
        for part in "qkv":
            state[f"{name}.{part}" if separate else part] = random(depth, depth, scale=depth**-0.5)
    maps = {name: random(batch, n * height, n * width, depth) for name in names}

    def looking(name: str, other: str, interleaved: bool) -> Tensor:
        query, key, value = (state[f"{name}.{part}" if separate else part] for part in "qkv")
        x, source = (pieces(maps[which], n, interleaved) for which in (name, other))
        read, _ = attended(
            x.flatten(2, 3) @ query, source.flatten(2, 3) @ key, source.flatten(2, 3) @ value, 1
        )
        return mosaic(read.view(x.shape), n, interleaved)

    out = {"V_glo": looking("glo", "loc", True), "V_loc": looking("loc", "glo", False)}
    out["V_dual"] = torch.cat([out[f"V_{name}"] @ state[f"fuse.{name}"] for name in names], -1)
    out["pooled"] = F.avg_pool2d(out["V_dual"].permute(0, 3, 1, 2), n).permute(0, 2, 3, 1)
    config = {"n": n, "h": height, "w": width, "d": depth, "batch": batch, "separate_weights": separate}
    tensors = {f"F_{name}": tensor for name, tensor in maps.items()}
    return Made({"config": config}, tensors | prefixed("out", out) | prefixed("state", state))


def pipeline(seed: int) -> Made:
    n, image, patch, width, heads, layers, text = ((3, 56, 14, 16, 2, 3, 20), (2, 40, 8, 32, 4, 2, 12))[seed]
    random = Random(seed)
    clip = {
        "hidden_size": width,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": image,
        "patch_size": patch,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }
    tower = CLIPVisionModel(CLIPVisionConfig(**clip)).eval()
    for parameter in tower.parameters():
        parameter.copy_(random(*parameter.shape, scale=0.2))
    state = prefixed("vision_tower", tower.state_dict()) | prefixed("spatial_embed", dem_state(random, width))
    state |= random.linear("mm_projector.0", text, width) | random.linear("mm_projector.2", text, text)
    own = {key.removeprefix("spatial_embed."): t for key, t in state.items()}
    coefficients, sizes, tensors = random.integers(0, 7, 3, 6).tolist(), {}, {}
    mean, std = [0.5, 0.4, 0.45], [0.25, 0.3, 0.2]
    for name, length in (("large", n * image), ("small", image)):
        y, x = torch.meshgrid(torch.arange(length), torch.arange(length), indexing="ij")
        planes = [
            (a * x * x + b * y * y + g * x * y + d * x + e * y + f) % 256 for a, b, g, d, e, f in coefficients
        ]
        values = torch.stack(planes).double() / 255
        pixels = ((values - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]).float()[
            None
        ]
        large = F.interpolate(pixels, (n * image, n * image), mode="bicubic", align_corners=False)
        low = F.interpolate(large, (image, image), mode="bicubic", align_corners=False)
        rows = large.permute(0, 2, 3, 1)
        views = torch.cat([pieces(rows, n, False), pieces(rows, n, True)]).flatten(0, 1).permute(0, 3, 1, 2)
        features = tower(torch.cat([views, low]), output_hidden_states=True).hidden_states[-2][:, 1:]
        side = image // patch
        maps = features[:-1].view(2, n * n, 1, side, side, width)
        fused = enhanced(mosaic(maps[0], n, False), mosaic(maps[1], n, True), own, n, 8)["pre_pool"]
        dem_tokens = pooled(fused, side)
        mixed = (dem_tokens + features[-1:]) / 2
        tokens = linear(F.gelu(linear(mixed, state, "mm_projector.0")), state, "mm_projector.2")
        tensors |= {f"out.{name}.dem": dem_tokens, f"out.{name}.mixed": mixed, f"out.{name}.tokens": tokens}
        sizes[name] = {"side": length, "uint8_sum": int(torch.stack(planes).sum())}
        if not seed:
            tensors[f"{name}.input_corner"] = pixels[..., :5, :7]
    picture = {"coef": coefficients, "mean": mean, "std": std, "sizes": sizes}
    config = {"n": n, "select_layer": -2, "clip": clip, "llm_hidden": text}
    return Made({"config": config, "image": picture}, tensors | prefixed("state", state))


MAKERS: dict[str, Maker] = {
    "dcm": dcm,
    "mha": mha,
    "dem": dem,
    "dem_small": dem_small,
    "dem_paper": dem_paper,
    "pipeline": pipeline,
}
