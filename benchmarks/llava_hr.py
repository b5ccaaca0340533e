"""LLaVA-HR's encoder with SDPA against the same with materialised attention maps: time and peak memory.

    python -m benchmarks.llava_hr [--rounds 5] [--threads 2] [--side 1024] [--layers 24]

CLIP ViT-L/14 and ConvNeXt-L with random weights, one picture, float32, both sides alternately in one process.
Prints Markdown: medians with their range for the whole encoder, and for the ViT where the two sides differ.
`--layers` makes the ViT shorter, and the ConvNeXt in proportion; the peak at inference depends on widths.
Peak memory is the process's resident memory above what it held before, as Linux counts it.
"""

from __future__ import annotations

import ctypes
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.arguments import Whole, arguments
from foveate.methods.base import TowerGeometry
from foveate.methods.llava_hr import DualTower, LlavaHR
from foveate.model.cost import reference_config

SIDES = ("sdpa", "eager")


def resident(key: str) -> float:
    """VmRSS or VmHWM of this process, MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024 / 1e6


def measured(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds, and peak memory above the start, MB. What the call returns is held until the end."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before, start = resident("VmRSS"), time.perf_counter()
    held = call()
    seconds = time.perf_counter() - start
    peak = resident("VmHWM") - before
    del held
    return seconds, peak


def encoder(side: int, layers: int) -> DualTower:
    vision = reference_config("llava_hr").vision_config
    depths = [max(depth * layers // vision.num_hidden_layers, 1) for depth in (3, 3, 27, 3)]
    low, vision.num_hidden_layers = side // 32 * vision.patch_size, layers
    options = {"resolutions": [[low, side]], "convnext": {"depths": depths}}
    method = LlavaHR(TowerGeometry.of(vision), options)
    return method.build_tower(vision, -1).eval().requires_grad_(False)


def spread(values: list[float], digits: int) -> str:
    middle, least, most = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({least:.{digits}f} - {most:.{digits}f})"


def main() -> None:
    given = arguments(
        __doc__,
        rounds=5,
        side=Whole(1024, step=64, help="of the picture, pixels"),
        layers=Whole(24, least=4, help="of the ViT"),
    )
    torch.manual_seed(0)
    tower, console = encoder(given.side, given.layers), Console(soft_wrap=True, highlight=False)
    pixels = torch.randn(1, 3, given.side, given.side)
    pair = tower.pair_of(pixels)
    config = tower.model.config
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    maps = heads * pair.grid**4 * 4 / 1e6
    console.print(
        f"{platform.machine()}, {given.threads} threads, torch {torch.__version__}, "
        f"{pair.low} and {pair.high} pixels, {given.rounds} rounds; the attention maps of one layer are "
        f"{maps:.0f} MB\n"
    )
    with torch.inference_mode():
        high, low = tower.read_high(pixels), tower.shrunk(pixels, pair.low)

    def kept() -> torch.Tensor:
        """The ViT as training runs it: what the way back needs is kept."""
        return tower.read_low(low.clone().requires_grad_(True), high.clone())

    def seen() -> torch.Tensor:
        with torch.inference_mode():
            return tower.read_low(low, high)

    def whole() -> torch.Tensor:
        with torch.inference_mode():
            return tower(pixels)

    console.print("| what | SDPA s (range) | maps s (range) | SDPA MB (range) | maps MB (range) | MB less |")
    console.print("|---|---|---|---|---|---|")
    calls = {
        "whole encoder, inference": (whole, given.rounds),
        "its ViT, inference": (seen, given.rounds),
        f"its ViT, kept for training ({layers} layers)": (kept, max(given.rounds // 2, 1)),
    }
    for what, (call, rounds) in calls.items():
        results: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
        for number in range(rounds + 1):
            for side in SIDES:
                tower.model.set_attn_implementation(side)
                result = measured(call)
                if number:  # the first round warms up
                    results[side].append(result)
        seconds = {side: [s for s, _ in found] for side, found in results.items()}
        peaks = {side: [m for _, m in found] for side, found in results.items()}
        less = statistics.median(peaks["eager"]) - statistics.median(peaks["sdpa"])
        cells = [spread(seconds[side], 2) for side in SIDES] + [spread(peaks[side], 0) for side in SIDES]
        console.print(f"| {what} | {' | '.join(cells)} | {less:.0f} |")


if __name__ == "__main__":
    main()
