"""How many views at a time a vision tower should take on a CPU.

    python -m benchmarks.tower [--views 10] [--layers 6] [--width 1024] [--rounds 3] [--threads 2]

`VisionTower` is called once for all views of a batch. At inference on a CPU it passes them on a few at a
time, by the bytes of its widest activation (`foveate.towers.vit.WIDEST`). This runs one batch with other
limits, in turn, with random weights in the shape of CLIP ViT-L/14-336. Prints a Markdown table of medians
with their range: seconds on the clock, and of processor time those spent by the system.
"""

from __future__ import annotations

import os
import platform
import statistics
import time

import torch
from rich.console import Console
from transformers import CLIPVisionConfig

from benchmarks.arguments import Whole, arguments
from foveate.towers import vit as encoders

SIDE = 336


@torch.inference_mode()
def main() -> None:
    given = arguments(
        __doc__,
        rounds=3,
        views=Whole(10),
        layers=Whole(6, help="of the tower"),
        width=Whole(1024, step=64, help="channels of the tower"),
    )
    torch.manual_seed(0)
    width = given.width
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": given.layers}
    config = CLIPVisionConfig(**shape, num_attention_heads=width // 64, image_size=SIDE, patch_size=14)
    tower = encoders.VisionTower(config, -1).eval()
    views = torch.randn(given.views, 3, SIDE, SIDE)
    view = 4 * width * tower.patches * views.element_size()
    limits = {"as is": encoders.WIDEST}
    limits |= {f"{count}": count * view for count in (given.views, 5, 3, 2, 1)}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in limits}
    for round_ in range(1 + given.rounds):
        for name, limit in limits.items():
            encoders.WIDEST = limit
            start, before = time.perf_counter(), os.times().system
            tower(views)
            if round_:  # the first is the warm-up
                seconds[name].append((time.perf_counter() - start, os.times().system - before))

    console = Console(width=160, highlight=False, markup=False)
    console.print(
        f"{platform.machine()}, {given.threads} threads, float32, torch {torch.__version__}, "
        f"{given.views} views, {given.layers} layers, {width} wide, {given.rounds} rounds\n"
    )
    console.print("| views at a time | s (range) | system s (range) |\n|---|---|---|")
    for name, record in seconds.items():
        clock, system = (
            f"{statistics.median(kind):.2f} ({min(kind):.2f} - {max(kind):.2f})"
            for kind in zip(*record, strict=True)
        )
        console.print(f"| {name} | {clock} | {system} |")


if __name__ == "__main__":
    main()
