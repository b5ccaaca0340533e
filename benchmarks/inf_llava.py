"""INF-LLaVA: only what reaches the output, against its full form.

    python -m benchmarks.inf_llava [--rounds 3] [--threads 2] [--layers 24] [--width 1024]

Two comparisons at n = 3, with random weights in the shape of CLIP ViT-L/14-336:

    one picture, from its pixels of 1008 x 1008 to 576 tokens for an LLM 4096 wide. The full form encodes 9
    tiles, 9 interleaved views and the low-resolution view one by one, through all layers of the tower, and
    enhances part by part (`foveate.methods.inf_llava_plain`), as the authors' code goes about it;
    the enhancement and pooling alone, at 1024 channels.

Both sides have the same weights and run alternately. Prints a Markdown table of medians with their range, in
seconds on the clock and in seconds of processor time, which other work on the machine does not lengthen.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from benchmarks.arguments import Whole, arguments
from foveate.methods import inf_llava_plain as full
from foveate.methods.base import TowerGeometry, Widths
from foveate.methods.inf_llava import InfConnector, InfLlava
from foveate.model.processing import cut
from foveate.picture.geometry import Size
from foveate.towers.vit import VisionTower

SIDE, GRID, TILES = 336, 24, Size(3, 3)
Record = list[tuple[float, float]]


class FullForm:
    """19 passes of a tower with all its layers, one after the other, and every part by itself."""

    def __init__(self, tower: CLIPVisionModel, connector: InfConnector) -> None:
        self.tower, self.connector = tower, connector

    def encode(self, view: Tensor) -> Tensor:
        """(1, 3, h, w) -> (1, h, w, C)"""
        hidden = self.tower(view, output_hidden_states=True).hidden_states[-2]
        return hidden[:, 1:].unflatten(1, (GRID, GRID))

    def __call__(self, picture: Tensor) -> Tensor:
        """(1, 3, 1008, 1008) -> (576, D)"""
        cells = picture.permute(0, 2, 3, 1)
        local, strided = (
            torch.stack([self.encode(part.permute(0, 3, 1, 2)) for part in full.cut(cells, TILES, kind)], 1)
            for kind in ("local", "global")
        )
        low = self.encode(F.interpolate(picture, (SIDE, SIDE), mode="bicubic", align_corners=False))
        return full.tokens(self.connector, local, strided, low, TILES, GRID)[0]


def compare(sides: dict[str, Callable[[], Tensor]], rounds: int) -> tuple[dict[str, Record], float]:
    """Clock and processor seconds of both sides, called in turn, and their largest difference."""
    one, other = (call() for call in sides.values())  # the warm-up as well
    gap = float((one - other).abs().max())
    records: dict[str, Record] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            clock, processor = time.perf_counter(), time.process_time()
            call()
            records[name].append((time.perf_counter() - clock, time.process_time() - processor))
    return records, gap


def row(name: str, records: dict[str, Record], gap: float) -> str:
    cells, medians = [], []
    for kind in (0, 1):
        for record in records.values():
            seconds = [both[kind] for both in record]
            medians.append(statistics.median(seconds))
            cells.append(f"{medians[-1]:.2f} ({min(seconds):.2f} - {max(seconds):.2f})")
        cells.append(f"{medians[-2] / medians[-1]:.3f}")
    return f"| {name} | {' | '.join(cells)} | {gap:.1e} |"


@torch.inference_mode()
def main() -> None:
    given = arguments(
        __doc__,
        rounds=3,
        layers=Whole(24, least=2, help="of the tower"),
        width=Whole(1024, step=64, help="channels of the tower; the LLM has four times as many"),
    )
    width = given.width
    torch.manual_seed(0)
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": given.layers}
    config = CLIPVisionConfig(**shape, num_attention_heads=width // 64, image_size=SIDE, patch_size=14)
    method = InfLlava(TowerGeometry.of(config))
    connector = method.build_connector(Widths(width, 4 * width)).eval()
    theirs, ours = CLIPVisionModel(config).eval(), VisionTower(config, -2).eval()
    weights = theirs.state_dict()
    ours.model.load_state_dict({key: weights[key] for key in ours.model.state_dict()})
    picture, plan = torch.randn(1, 3, 3 * SIDE, 3 * SIDE), method.plan(3 * SIDE, 3 * SIDE)
    reference, scheme = FullForm(theirs, connector), method.scheme(TILES)

    def encoded() -> Tensor:
        pixels = picture[0].numpy()
        views = torch.stack([torch.from_numpy(cut(pixels, view).copy()) for view in plan.views])
        return connector(ours(views), [plan], None).tokens

    local, strided = (torch.randn(1, 9, GRID, GRID, width) for _ in range(2))
    every = [*scheme.every("local"), *scheme.every("global")]
    needed = torch.cat([local, strided], 1)[:, [every.index(view) for view in scheme.views]].flatten(2, 3)

    def enhanced() -> Tensor:
        return connector.pooled(connector.dual(needed, scheme), scheme)

    def enhanced_in_full() -> Tensor:
        return full.pooled(full.dual(connector, local, strided, TILES), GRID, "bilinear")

    console = Console(width=220, highlight=False, markup=False)
    console.print(
        f"{platform.machine()}, {given.threads} threads, float32, torch {torch.__version__}, tower of "
        f"{given.layers} layers, {width} wide, {given.rounds} rounds, {len(plan.views)} passes of "
        f"{given.layers - 1} layers against 19 of {given.layers}\n"
    )
    console.print(
        "| what | Foveate s (range) | full form s (range) | ratio "
        "| Foveate CPU s (range) | full form CPU s (range) | ratio | largest difference |"
    )
    console.print("|---|---|---|---|---|---|---|---|")
    alone = {"Foveate": enhanced, "full form": enhanced_in_full}
    console.print(row("enhancement alone", *compare(alone, given.rounds)))
    whole = {"Foveate": encoded, "full form": lambda: reference(picture)}
    console.print(row("one picture", *compare(whole, given.rounds)))


if __name__ == "__main__":
    main()
