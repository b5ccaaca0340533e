"""SliME, from what its authors' code computes and from the paper's equations."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from tests.parity.varied.making import (
    Made,
    Maker,
    Random,
    attended,
    bytes_of,
    linear,
    norm,
    normalised,
    photo,
    prefixed,
    resized,
)


def fitting(width: int, height: int, tile: int, grids: list[tuple[int, int]]) -> tuple[int, int]:
    """Columns and rows: the most of the picture, then the least waste, then the first."""
    best, choice = (-1, 0), grids[0]
    for columns, rows in grids:
        scale = min(tile * columns / width, tile * rows / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        if (used, used - tile * tile * columns * rows) > best:
            best, choice = (used, used - tile * tile * columns * rows), (columns, rows)
    return choice


def official_grid(width: int, height: int, tile: int) -> tuple[int, int]:
    aimed = min(max(math.ceil(width * height / tile**2), 2), 6)
    counts = [n for n in (aimed - 1, aimed, aimed + 1) if n > 1]
    grids = [(i, count // i) for count in counts for i in range(1, count + 1) if count % i == 0]
    return fitting(width, height, tile, grids)


def placed(width: int, height: int, tile: int, grid: tuple[int, int]) -> dict[str, list[int]]:
    """On its canvas: one side exact, the other rounded up, in the middle."""
    canvas = (tile * grid[0], tile * grid[1])
    across, down = canvas[0] / width, canvas[1] / height
    if across < down:
        size = (canvas[0], min(math.ceil(height * across), canvas[1]))
    else:
        size = (min(math.ceil(width * down), canvas[0]), canvas[1])
    left, top = (canvas[0] - size[0]) // 2, (canvas[1] - size[1]) // 2
    box = [left, top, left + size[0], top + size[1]]
    about = {"grid_cols_rows": [*grid], "canvas_wh": [*canvas], "resized": [*size], "paste_xy": [left, top]}
    return {**about, "content_box": box}


def grid_table(seed: int) -> Made:
    tile = (224, 336)[seed]
    sizes = np.random.default_rng(seed).integers(1, 2500, (20, 2)).tolist()
    every = [(m, n) for m in range(1, 7) for n in range(1, 7)]
    rows = []
    for width, height in [[1, 900], [900, 1], [tile, tile], *sizes]:
        row = {"wh": [width, height]}
        row["official"] = placed(width, height, tile, official_grid(width, height, tile))
        if not seed:
            row["paper"] = placed(width, height, tile, fitting(width, height, tile, every))
        rows.append(row)
    return Made({"base_tile": tile, "rows": rows}, {})


def preprocess(seed: int) -> Made:
    tile, tensors, images = (42, 30)[seed], {}, []
    for i, (width, height) in enumerate((((100, 61), (42, 42)), ((31, 90), (7, 8), (200, 20)))[seed]):
        image = photo(i, width, height)
        grid = official_grid(width, height, tile)
        about = placed(width, height, tile, grid)
        page = Image.new("RGB", tuple(about["canvas_wh"]))
        page.paste(resized(image, *about["resized"]), tuple(about["paste_xy"]))
        tiles = [
            page.crop((c * tile, r * tile, (c + 1) * tile, (r + 1) * tile))
            for r in range(grid[1])
            for c in range(grid[0])
        ]
        views = [normalised(view) for view in (resized(image, tile, tile), *tiles)]
        tensors |= {f"in.image_{i}": bytes_of(image), f"out.views_{i}": torch.stack(views)}
        images.append({"i": i, "wh": [width, height]})
    return Made({"config": {"tile": tile}, "images": images}, tensors)


def table(width: int, grid: int) -> Tensor:
    """(N, C) in half precision: for column and row each, sines and cosines."""
    rates = 1 / 10000 ** (np.arange(width // 4) / (width / 4))
    places = [(row, column) for row in range(grid) for column in range(grid)]
    rows = [
        np.concatenate([np.sin(c * rates), np.cos(c * rates), np.sin(r * rates), np.cos(r * rates)])
        for r, c in places
    ]
    return torch.from_numpy(np.stack(rows)).half()


def enlarged(positions: Tensor, grid: int) -> Tensor:
    """A table of another grid, resized to this one."""
    side = math.isqrt(len(positions))
    if side == grid:
        return positions
    whole = positions.float().view(1, side, side, -1).permute(0, 3, 1, 2)
    whole = F.interpolate(whole, (grid, grid), mode="bicubic", align_corners=False)
    return whole.permute(0, 2, 3, 1).flatten(0, 2).half()


def former_state(random: Random, width: int, grid: int) -> dict[str, Tensor]:
    projections = random.linear("attn.in_proj", 3 * width, width)
    state = {key.replace("in_proj.", "in_proj_"): tensor for key, tensor in projections.items()}
    state |= random.linear("attn.out_proj", width, width)
    state |= {"query": random(grid**2, width), "pos_embed": table(width, grid)}
    for name in ("ln_q", "ln_kv", "ln_post"):
        state |= random.norm(name, width)
    return state


def formed(x: Tensor, state: Mapping[str, Tensor], heads: int) -> Tensor:
    """(V, N, C) -> (V, Q, C)"""
    value = norm(x, state, "ln_kv", 1e-6)
    key = value + enlarged(state["pos_embed"], math.isqrt(x.shape[1])).float()
    query = (norm(state["query"], state, "ln_q", 1e-6) + state["pos_embed"].float()).expand(len(x), -1, -1)
    weights, biases = state["attn.in_proj_weight"].chunk(3), state["attn.in_proj_bias"].chunk(3)
    parts = [given @ w.T + b for given, w, b in zip((query, key, value), weights, biases, strict=True)]
    return norm(linear(attended(*parts, heads)[0], state, "attn.out_proj"), state, "ln_post", 1e-6)


def adapter_state(random: Random, width: int, text: int, grid: int) -> dict[str, Tensor]:
    state = prefixed("attn", former_state(random, width, grid))
    state |= random.linear("projection.0", text, width) | random.linear("projection.2", text, text)
    state |= {name: random(width, 2, scale=0.3).bfloat16() for name in ("w_gate", "w_noise")}
    return state | {"mean": torch.zeros(1).bfloat16(), "std": torch.ones(1).bfloat16()}


def below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{prefix}."): t for key, t in state.items() if key.startswith(f"{prefix}.")}


def mlp(x: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    return linear(F.gelu(linear(x, state, "projection.0")), state, "projection.2")


def mixed(x: Tensor, state: Mapping[str, Tensor], heads: int, noise: Tensor | None = None) -> list[Tensor]:
    """The gates, and the mixture."""
    logits = x @ state["w_gate"].float()
    if noise is not None:
        logits = logits + noise * (F.softplus(logits) + 0.01)
    gates = logits.softmax(-1)
    gates = gates / (gates.sum(-1, keepdim=True) + 1e-6)
    read = mlp(formed(x, below(state, "attn"), heads), state)
    return [gates, gates[..., :1] * mlp(x, state) + gates[..., 1:] * read]


def global_adapter(seed: int) -> Made:
    width, text, grid, heads, batch = ((24, 10, 3, 2, 3), (32, 20, 5, 8, 1))[seed]
    random = Random(seed)
    state = adapter_state(random, width, text, grid)
    x, noise, short = random(batch, grid**2, width), random(batch * grid**2, 2), random(2, 3, width)
    shaped = noise.view(batch, -1, 2)
    former = formed(x, below(state, "attn"), heads)
    gates, y = mixed(x, state, heads)
    out = {"query_former": former, "expert_mlp": mlp(x, state), "expert_query": mlp(former, state)}
    out |= {"gates": gates, "y": y, "y_single": y[0]}
    paper = {"gates_eval": (x @ state["w_gate"].float()).softmax(-1)}
    tensors = {"in.x": x}
    if not seed:
        tensors |= {"in.noise": noise, "in.short": short}
        training = mixed(x, state, heads, shaped)
        out |= {"train_gates_official_noise": training[0], "train_y_official_noise": training[1]}
        out |= {"only_expert0": out["expert_mlp"], "only_expert1": out["expert_query"]}
        out["short_projection_only"] = mlp(short, state)
        scale = F.softplus(x @ state["w_noise"].float())
        paper["gates_train"] = (x @ state["w_gate"].float() + shaped * scale).softmax(-1)
    tensors |= prefixed("out", out) | prefixed("paper_out", paper) | prefixed("state", state)
    config = {"mm_hidden_size": width, "hidden_size": text, "query_grid": grid, "heads": heads}
    return Made({"config": config}, tensors)


def local_compressor(seed: int) -> Made:
    width, grid, source, heads, tiles = ((20, 2, 5, 5, 3), (32, 4, 4, 2, 1))[seed]
    random = Random(seed)
    state, x = former_state(random, width, grid), random(tiles, source**2, width)
    out = {"y": formed(x, state, heads), "y_single": formed(x, state, heads)[0]}
    out["key_pos_embed"] = enlarged(state["pos_embed"], source)
    if not seed:
        out["same_grid"] = formed(x[:1, : grid**2], state, heads)
    config = {"embed_dim": width, "query_grid": grid, "source_grid": source, "heads": heads}
    tensors = {"in.x": x} | prefixed("out", out) | prefixed("state", state)
    return Made({"config": {**config, "num_queries": grid**2}}, tensors)


def pos_embed(seed: int) -> Made:
    width, small, large = ((64, 8, 16), (128, 5, 9))[seed]
    rows = torch.tensor([0, 3, large**2 - 1, large + 2])
    out = {f"table_{small}x{small}_{width}": table(width, small)}
    out[f"keys_{large}x{large}_rows"] = enlarged(table(width, small), large)[rows]
    if not seed:
        out[f"table_{large}x{large}_rows"] = table(width, large)[rows]
    return Made({"config": {"D": width, "grids": [small, large]}}, {"in.rows": rows} | prefixed("out", out))


def kept(scores: Tensor, gamma: float, temperature: float) -> Tensor:
    """The most probable tokens up to the one whose probability passes gamma; rounding drops none at 1."""
    ranked, order = (scores / temperature).softmax(0).sort(descending=True)
    count = int((ranked.cumsum(0) <= gamma).sum()) + 1 if gamma < 1 else len(scores)
    return order[:count].sort().values


def similarities(tokens: Tensor, words: Tensor) -> Tensor:
    """(n, T)"""
    return F.cosine_similarity(tokens[:, None], words[None], dim=-1)


def router(seed: int) -> Made:
    count, width, words, padding, temperature = ((33, 16, 9, 2, 1.0), (70, 24, 5, 0, 0.5))[seed]
    gammas = ((0.5, 0.8, 1.0), (0.65, 0.99))[seed]
    random = Random(seed)
    tokens, text, noise = random(count, width), random(words, width), random(count)
    mask = torch.arange(words) < words - padding
    summed = similarities(tokens, text[mask]).sum(1)
    dots, means = (tokens @ text[mask].T).mean(1), similarities(tokens, text[mask]).mean(1)
    out = {"similarity_sum": summed, "similarity_mean_nomask": similarities(tokens, text).mean(1)}
    out["probs"] = (summed / temperature).softmax(0)
    paper, counts = {"scores_cos_mean": means, "scores_dot_mean": dots}, {}
    for gamma in gammas:
        label = f"{round(100 * gamma):03}"
        out[f"kept_{label}"] = kept(summed, gamma, temperature)
        counts[label] = len(out[f"kept_{label}"])
        out[f"kept_train_{label}"] = kept(summed + 0.1 * noise, gamma, temperature)
        paper[f"kept_cos_mean_{label}"] = kept(means, gamma, temperature)
        paper[f"kept_dot_mean_{label}"] = kept(dots, gamma, temperature)
    label = f"{round(100 * gammas[0]):03}"
    out[f"selected_{label}"] = tokens[out[f"kept_{label}"]]
    tensors = {"in.local": tokens, "in.text": text, "in.noise_std1": noise}
    if padding:
        tensors["in.mask"] = mask
    config = {"D": width, "temperature": temperature, "gammas": list(gammas)}
    about = {"config": config, "kept_counts": counts, "tolerance": "scores 1e-5; kept indices exact"}
    return Made(about, tensors | prefixed("out", out) | prefixed("paper_out", paper))


def connector(seed: int) -> Made:
    width, text, side, queries, heads, comma = ((24, 12, 6, 9, 2, 4), (16, 20, 4, 4, 4, 11))[seed]
    mark, temperature, gammas = ((-200, 1.0, (0.6, 0.9, 1.0)), (-7, 0.5, (0.75,)))[seed]
    sizes = (((500, 900), (2000, 300), (700, 700)), ((640, 480),))[seed]
    random = Random(seed)
    state = prefixed("mm_projector", adapter_state(random, width, text, side))
    state |= prefixed("sampler.post_qformer", former_state(random, width, math.isqrt(queries)))
    state["embed_tokens.weight"] = random(30, text)
    words, projector = state["embed_tokens.weight"], below(state, "mm_projector")
    longest = 10
    ids, mask = torch.zeros(len(sizes), longest, dtype=torch.long), torch.zeros(len(sizes), longest).bool()
    tensors, out, counts, grids = {}, {}, {}, []
    for i, (width_, height_) in enumerate(sizes):
        grid = official_grid(width_, height_, 336)
        grids.append([*grid])
        features = random(1 + grid[0] * grid[1], side * side, width)
        tensors[f"in.features_{i}"] = features
        ids[i, : longest - i] = random.integers(1, 30, longest - i)
        ids[i, 2 + i] = mark
        mask[i, : longest - i] = True
        compressed = formed(features[1:], below(state, "sampler.post_qformer"), heads)
        root = math.isqrt(queries)
        local = mlp(compressed, projector).view(grid[1], grid[0], root, root, text)
        local = local.permute(0, 2, 1, 3, 4).reshape(-1, text)
        whole = mixed(features[:1], projector, heads)[1][0]
        asked = words[ids[i][mask[i] & (ids[i] != mark)]]
        scores = similarities(local, asked).sum(1)
        for gamma in gammas:
            label = f"{round(100 * gamma):03}"
            chosen = local[kept(scores, gamma, temperature)]
            out[f"visual_tokens_{label}_{i}"] = torch.cat([whole, words[comma][None], chosen])
            counts[f"{label}_{i}"] = len(out[f"visual_tokens_{label}_{i}"])
        if seed:
            label, text_ids = f"{round(100 * gammas[0]):03}", ids[i].clamp(min=0)
            before, after = words[text_ids[: 2 + i]], words[text_ids[3 + i :]]
            given = torch.cat([before, out[f"visual_tokens_{label}_{i}"], after])
            out[f"inputs_embeds_{label}"] = F.pad(given, (0, 0, 0, 3))[None]
            out[f"attention_mask_{label}"] = (torch.arange(len(given) + 3) < len(given))[None]
        else:
            out |= {f"global_only_{i}": whole, f"local_only_all_{i}": local}
            out[f"local_compressed_{i}"] = compressed
    tensors |= {"in.input_ids": ids, "in.attention_mask": mask, "in.image_sizes_wh": torch.tensor(sizes)}
    config = {"view_side": side, "num_local_queries": queries, "heads": heads, "grids_cols_rows": grids}
    config |= {"separator_token_id": comma, "image_token_index": mark, "temperature": temperature}
    config |= {"mm_hidden_size": width, "hidden_size": text}
    about = {"config": config, "token_counts": counts, "tolerance": "2e-5 absolute in fp32; counts exact"}
    return Made(about, tensors | prefixed("out", out) | prefixed("state", state))


MAKERS: dict[str, Maker] = {
    "grid_table": grid_table,
    "preprocess": preprocess,
    "global_adapter": global_adapter,
    "local_compressor": local_compressor,
    "pos_embed": pos_embed,
    "router": router,
    "connector": connector,
}
