"""CoRoI, from the paper's sections 3.1 and 3.2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.parity.varied.making import Made, Maker, Random, attended, linear, norm, prefixed


def best_window(scores: Tensor, side: int) -> tuple[int, int, float]:
    """Row, column and average of the first window of the largest average."""
    rows, columns = (n - side + 1 for n in scores.shape)
    places = [(r, c) for r in range(rows) for c in range(columns)]
    means = [float(scores[r : r + side, c : c + side].double().mean()) for r, c in places]
    best = max(range(len(places)), key=lambda i: (means[i], -i))
    return *places[best], means[best]


def cells(row: int, column: int, side: int, grid: int) -> list[int]:
    return [r * grid + c for r in range(row, row + side) for c in range(column, column + side)]


def windows(seed: int) -> Made:
    grid, patch, scales = ((10, 4, (2, 5)), (9, 14, (3, 4, 2)))[seed]
    maps, table = Random(seed)(3 + seed, grid, grid), []
    maps[0] = 0.25  # of equal windows, the first
    for number, scores in enumerate(maps):
        found = {}
        for scale in scales:
            side = grid // scale
            row, column, mean = best_window(scores, side)
            box = [column * patch, row * patch, (column + side) * patch, (row + side) * patch]
            found[str(scale)] = {"row": row, "col": column, "mean": mean, "lr_box_xyxy": box}
            if number % 2:
                found[str(scale)]["lr_token_positions"] = cells(row, column, side, grid)
        table.append({"map": number, "windows": found})
    return Made({"config": {"grid": grid, "side": grid * patch}, "table": table}, {"maps": maps})


def layers(seed: int) -> Made:
    table: dict[str, dict[str, list[int]]] = {}
    for depth in ((12, 28, 36), (6, 22, 64))[seed]:
        marks = [j * depth // 8 - 1 for j in range(2, 8)]
        table[str(depth)] = {"all6": marks, "base3": marks[::2], "middle": [marks[2]]}
    if seed:
        del table["22"]["middle"]
    return Made({"table": table}, {})


def positions(seed: int) -> Made:
    grid, table = (9, 16)[seed], []
    for number, scale in enumerate(((3, 2), (4, 8, 5))[seed]):
        side, start = grid // scale, 7 + 5 * number
        row, column = number + 1, grid - side - number
        places = [start + cell for cell in cells(row, column, side, grid)]
        row_ = {"map": number, "lam": scale, "image_start": start, "window": [side, side]}
        table.append({**row_, "row": row, "col": column, "sequence_positions": places})
        if not number:
            ends = [start, start + grid**2, start + 5 * grid**2]
            table[-1]["v2_layout"] = {"base": ends[:2], "high": ends[1:]}
    return Made({"table": table}, {})


def crops(seed: int) -> Made:
    grid, patch, scales = ((20, 2, (2, 5)), (12, 3, (3, 4, 6)))[seed]
    random, side, table = Random(seed), grid * patch, []
    picture = random.integers(0, 256, 3, side, side).to(torch.uint8)
    tensors = {"lr_uint8": picture}
    for scale in scales:
        scores, window = random(grid, grid), grid // scale
        row, column, _ = best_window(scores, window)
        large = F.interpolate(picture[None].double(), scale_factor=scale, mode="bilinear")[0].float()
        left, top, length = column * patch * scale, row * patch * scale, window * patch * scale
        box = [column * patch, row * patch, (column + window) * patch, (row + window) * patch]
        table.append({"lam": scale, "row": row, "col": column, "lr_box_xyxy": box})
        tensors[f"score_lam{scale}"] = scores
        tensors[f"out.crop_lam{scale}"] = large[:, top : top + length, left : left + length].contiguous()
    return Made({"config": {"side": side, "grid": grid}, "table": table}, tensors)


def projected(x: Tensor, state: Mapping[str, Tensor], name: str, norm_first: bool, eps: float) -> Tensor:
    if norm_first:
        return linear(norm(x, state, f"{name}.norm", eps), state, f"{name}.linear")
    return norm(linear(x, state, f"{name}.linear"), state, f"{name}.norm", eps)


def inject(seed: int) -> Made:
    grid, width, read, tokens, heads, eps = ((6, 20, 10, 7, 5, 1e-5), (8, 12, 9, 4, 2, 1e-6))[seed]
    starts, scales = (([2, 0, 11], (2, 3)), ([4], (2, 4, 8)))[seed]
    random, rois = Random(seed), []
    tensors = {"hidden": random(len(starts), grid**2 + 15, width)}
    for sample, start in enumerate(starts):
        for number in range(len(scales) + 1):
            scale = scales[number % len(scales)]
            side = grid // scale
            row, column = (int(n) for n in random.integers(0, grid - side + 1, 2))
            places = [start + cell for cell in cells(row, column, side, grid)]
            about = {"sample": sample, "roi": number, "lam": scale, "row": row, "col": column}
            rois.append({**about, "window": [side, side], "positions": places})
            tensors[f"roi.{sample}.{number}.features"] = random(tokens, read)
    states = {}
    for name, wide in (("linear_norm", width), ("norm_linear", read)):
        states[name] = {}
        for part, wide_in in (("q", width), ("k", read), ("v", read)):
            states[name] |= random.linear(f"{part}.linear", width, wide_in)
            normed = width if name == "linear_norm" or part == "q" else wide
            states[name] |= random.norm(f"{part}.norm", normed)
        tensors |= prefixed(f"state.{name}", states[name])

    def injected(name: str, heads: int = 1, sequence: bool = False, only: int | None = None) -> Tensor:
        given, first = states[name], name == "norm_linear"
        result = tensors["hidden"].clone()
        for roi in rois:
            if only is not None and roi["roi"] != only:
                continue
            sample, places = roi["sample"], roi["positions"]
            asks = (result if sequence else tensors["hidden"])[sample, places]
            seen = tensors[f"roi.{sample}.{roi['roi']}.features"]
            query, key, value = (
                projected(x, given, part, first, eps) for x, part in ((asks, "q"), (seen, "k"), (seen, "v"))
            )
            result[sample, places] += attended(query, key, value, heads)[0]
        return result

    tensors["out.linear_norm"] = injected("linear_norm")
    tensors["out.linear_norm_heads"] = injected("linear_norm", heads)
    tensors["out.linear_norm_sequential"] = injected("linear_norm", sequence=True)
    tensors["out.single_roi"] = injected("linear_norm", only=0)
    if not seed:
        tensors["out.norm_linear"] = injected("norm_linear")
    else:
        tensors = {key: t for key, t in tensors.items() if not key.startswith("state.norm_linear")}
    config = {"grid": grid, "heads_variant": heads, "image_starts": starts, "ln_eps": eps}
    return Made({"config": config, "rois": rois}, tensors)


def scorer_state(random: Random, width: int) -> dict[str, Tensor]:
    state = random.linear("fc1", 4 * width, width) | random.linear("fc2", 1, 4 * width)
    for number in (1, 2, 3):
        state |= random.norm(f"norm{number}", width)
    for kind in ("self_attn", "cross_attn"):
        for part in "qkvo":
            state |= random.linear(f"{kind}.{part}", width, width)
    return state


def scored(low: Tensor, guides: Tensor, state: Mapping[str, Tensor], heads: int, eps: float) -> Tensor:
    """(N, C), (M, C) -> (N,)"""

    def read(kind: str, x: Tensor, source: Tensor) -> Tensor:
        query = linear(x, state, f"{kind}.q")
        key, value = (linear(source, state, f"{kind}.{part}") for part in "kv")
        return linear(attended(query, key, value, heads)[0], state, f"{kind}.o")

    x = norm(low, state, "norm1", eps)
    low = low + read("self_attn", x, x)
    low = low + read("cross_attn", norm(low, state, "norm2", eps), guides)
    hidden = F.gelu(linear(norm(low, state, "norm3", eps), state, "fc1"))
    return linear(hidden, state, "fc2")[:, 0]


def scorer(seed: int) -> Made:
    width, heads, grid, words, eps = ((12, 3, 5, 7, 1e-5), (8, 2, 4, 1, 1e-6))[seed]
    random = Random(seed)
    state = scorer_state(random, width)
    tensors = {"U": random(words, width), "V_low": random(grid**2, width), "roi": random(9, width)}
    both = torch.cat([tensors["U"], tensors["roi"]])
    for name, guides in (("step0", tensors["U"]), ("step1", both)):
        scores = scored(tensors["V_low"], guides, state, heads, eps)
        tensors[f"out.{name}"] = scores.view(grid, grid)
    if seed:
        del tensors["out.step1"], tensors["roi"]
    config = {"d": width, "heads": heads, "grid": grid, "ln_eps": eps}
    return Made({"config": config}, tensors | prefixed("state", state))


def straight_through(seed: int) -> Made:
    grid, scale, tau, selected = ((8, 4, 0.3, 20), (7, 3, 1.5, 3))[seed]
    random, side = Random(seed), grid // scale
    score, update, upstream = random(grid, grid), random(5, 6), random(5, 6)
    with torch.enable_grad():
        given = score.clone().requires_grad_()
        averages = F.avg_pool2d(given[None, None], side, stride=1)[0, 0]
        probability = (averages.flatten() / tau).softmax(0)
        gate = 1 + probability[selected] - probability[selected].detach()
        (slope,) = torch.autograd.grad((update * gate * upstream).sum(), given)
    tensors = {"score": score, "update": update, "upstream": upstream}
    tensors |= {"out.pooled": averages.detach(), "out.grad_score": slope}
    if seed:
        tensors["out.prob"] = probability.detach().view(averages.shape)
    return Made({"config": {"lam": scale, "tau": tau, "selected": selected}}, tensors)


def chain(seed: int) -> Made:
    grid, patch, scales, steps = ((6, 14, (2, 3), 3), (8, 6, (4, 2), 5))[seed]
    width, heads, words, histories = ((12, 3, 8, ("last", "all")), (8, 4, 3, ("all",)))[seed]
    random, side = Random(seed + 5), grid * patch
    coefficients = random.integers(0, 7, 3, 6).tolist()
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    planes = [
        (a * x * x + b * y * y + g * x * y + d * x + e * y + f) % 256 for a, b, g, d, e, f in coefficients
    ]
    picture = torch.stack(planes).double()  # (3, H, W)
    embed, state = random.linear("embed", width, 12), scorer_state(random, width)
    question, half = random(words, width), patch // 2

    def encoded(pixels: Tensor) -> Tensor:
        tokens = []
        for r in range(0, side, patch):
            for c in range(0, side, patch):
                quadrants = [
                    pixels[:, r + i : r + i + half, c + j : c + j + half].mean((1, 2))
                    for i in (0, half)
                    for j in (0, half)
                ]
                tokens.append(torch.stack(quadrants, 1).flatten())  # channel by channel
        return torch.tanh(linear((torch.stack(tokens) / 255 - 0.5).float(), embed, "embed"))

    low, chains = encoded(picture), []
    for history in histories:
        for scale in scales:
            window, seen, about = grid // scale, [], []
            large = F.interpolate(picture[None], scale_factor=scale, mode="bilinear")[0]
            for _ in range(steps):
                guides = torch.cat([question, *(seen[-1:] if history == "last" else seen)])
                scores = scored(low, guides, state, heads, 1e-5).view(grid, grid)
                row, column, mean = best_window(scores, window)
                top, left = row * patch * scale, column * patch * scale
                seen.append(encoded(large[:, top : top + side, left : left + side]))
                about.append({"row": row, "col": column, "mean": mean})
            one: dict[str, Any] = {"history": history, "lam": scale, "chain": about}
            chains.append({**one, "last_roi_mean": float(seen[-1].mean())})
    tensors = {"U": question, "out.V_low": low} | prefixed("state.encoder", embed)
    config = {"side": side, "grid": grid, "n": steps, "d": width, "heads": heads, "patch": patch}
    about = {"config": config, "image": {"coef": coefficients}, "chains": chains}
    return Made(about, tensors | prefixed("state.scorer", state))


MAKERS: dict[str, Maker] = {
    "windows": windows,
    "layers": layers,
    "positions": positions,
    "crops": crops,
    "inject": inject,
    "scorer": scorer,
    "straight_through": straight_through,
    "chain": chain,
}
