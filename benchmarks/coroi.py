"""CoRoI's chain: all scales and pictures in step, against one window at a time.

    python -m benchmarks.coroi [--rounds 3] [--threads 2] [--layers 24] [--width 1024] [--pictures 1]
        [--pixels 3000 4000]

Random weights in the shape of CLIP ViT-L/14-336, a question of 16 tokens, lambda 2, 3, 4 and n = 4, from a
picture's bytes to the features of its 12 windows, none of which comes twice (`distinct`): the most that a
chain can cost. The other form goes about it as the text reads: scale after scale and step after step, each
with a pass of the tower for one window, the picture resized as a whole for every scale, the scorer run from
its beginning at every step, windows averaged one by one. Both have the same weights, run alternately and
choose the same windows.

Prints a Markdown table: calls of the tower, seconds on the clock and of processor time (which other work on
the machine does not lengthen), and how much of both is spent outside of the tower.
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
from transformers import CLIPVisionConfig

from benchmarks.arguments import Whole, arguments
from foveate.methods.base import Query, TowerGeometry, Widths
from foveate.methods.coroi import Chosen, Coroi, CoroiConnector, LowView
from foveate.picture.geometry import Size, ViewPlan
from foveate.picture.source import Source
from foveate.towers.vit import VisionTower

SIDE = 336
Clocks = tuple[float, float]  # seconds on the clock, seconds of processor time


def clocks() -> Clocks:
    return time.perf_counter(), time.process_time()


class Timed:
    """A tower that notes its calls, views and time."""

    def __init__(self, tower: VisionTower) -> None:
        self.tower = tower
        self.clear()

    def clear(self) -> None:
        self.calls, self.views, self.spent = 0, 0, (0.0, 0.0)

    def __call__(self, views: Tensor) -> Tensor:
        before = clocks()
        features = self.tower(views)
        after = clocks()
        self.calls, self.views = self.calls + 1, self.views + len(views)
        self.spent = (self.spent[0] + after[0] - before[0], self.spent[1] + after[1] - before[1])
        return features


class OneByOne:
    """The chain as the text reads."""

    def __init__(self, connector: CoroiConnector, tower: Timed) -> None:
        self.connector, self.tower = connector, tower

    def __call__(
        self, low: Tensor, pictures: list[Tensor], query: Query
    ) -> tuple[list[tuple[int, int]], Tensor]:
        """Windows, picture after picture, scale after scale, step after step, and their features."""
        windows, features = [], []
        scorer = self.connector.scorer
        for p, picture in enumerate(pictures):
            words = self.connector.question(query.embeds[p : p + 1])
            for scale, side in zip(self.connector.options.scales, self.connector.sides, strict=True):
                whole = F.interpolate(
                    picture.permute(2, 0, 1)[None].float(),
                    (scale * SIDE,) * 2,
                    mode="bilinear",
                    antialias=True,
                )
                seen, taken = words[:, :0], list[tuple[int, int]]()
                for _ in range(self.connector.options.rois):
                    guides = torch.cat([words, seen], 1)
                    view: LowView = scorer.read(low[p : p + 1])
                    scores = scorer(
                        view, scorer.guides(guides), torch.ones(guides.shape[:2], dtype=torch.bool)
                    )
                    row, column = self.best(scores.view(24, 24), side, taken)
                    taken.append((row, column))
                    top, left = 14 * scale * row, 14 * scale * column
                    crop = whole[:, :, top : top + SIDE, left : left + SIDE] / 255
                    seen = self.tower((crop - 0.5) / 0.5)
                    windows.append((row, column))
                    features.append(seen[0])
        return windows, torch.stack(features)

    def best(self, scores: Tensor, side: int, taken: list[tuple[int, int]]) -> tuple[int, int]:
        places = [(r, c) for r in range(25 - side) for c in range(25 - side) if (r, c) not in taken]
        averages = [scores[r : r + side, c : c + side].double().mean() for r, c in places]
        return places[int(torch.stack(averages).argmax())]


def spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} - {max(seconds):.2f})"


@torch.inference_mode()
def main() -> None:
    given = arguments(
        __doc__,
        rounds=3,
        layers=Whole(24, least=2, help="of the tower, of which the last does not run"),
        width=Whole(1024, step=64, help="channels of the tower; the LLM has four times as many"),
        pictures=Whole(1),
        pixels=Whole((3000, 4000), help="height and width of each picture"),
    )
    torch.manual_seed(0)
    width, text = given.width, 4 * given.width
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": given.layers}
    config = CLIPVisionConfig(**shape, num_attention_heads=width // 64, image_size=SIDE, patch_size=14)
    tower = Timed(VisionTower(config, -2).eval())
    method = Coroi(TowerGeometry.of(config))
    connector = method.build_connector(Widths(width, text, 2)).eval()
    size = Size(*given.pixels)
    pictures = [torch.randint(0, 256, (*size, 3), dtype=torch.uint8) for _ in range(given.pictures)]
    plans: list[ViewPlan] = [method.plan(*size)] * given.pictures
    query = Query(torch.randn(given.pictures, 16, text), torch.ones(given.pictures, 16))
    norms = torch.full((given.pictures, 2, 3), 0.5)
    low = tower(torch.randn(given.pictures, 3, SIDE, SIDE))
    slow = OneByOne(connector, tower)

    def in_step() -> tuple[list[tuple[int, int]], Tensor]:
        chosen: Chosen = connector.chain(low, plans, query, Source(pictures, norms, tower))
        return [(w.row, w.column) for w in chosen.windows], chosen.features

    sides: dict[str, Callable[[], tuple[list[tuple[int, int]], Tensor]]] = {
        "Foveate": in_step,
        "one window at a time": lambda: slow(low, pictures, query),
    }
    console = Console(width=220, highlight=False, markup=False)
    records: dict[str, list[tuple[Clocks, Clocks]]] = {name: [] for name in sides}
    passes: dict[str, tuple[int, int]] = {}
    results = {}
    for turn in range(1 + given.rounds):
        for name, run in sides.items():
            tower.clear()
            before = clocks()
            results[name] = run()
            after = clocks()
            if turn:
                records[name].append(((after[0] - before[0], after[1] - before[1]), tower.spent))
            passes[name] = (tower.calls, tower.views)
    (windows, features), (others, expected) = results.values()
    same = windows == others
    gap = float((features - expected).abs().max())
    if not same or gap > 1e-3:  # of features of about 1; torch and Foveate resize with other rounding
        raise SystemExit(f"the two forms differ: same windows {same}, features by {gap:.1e}")
    console.print(
        f"{platform.machine()}, {given.threads} threads, float32, torch {torch.__version__}, tower of "
        f"{given.layers} layers, of which {given.layers - 1} run, {width} wide, "
        f"{given.pictures} picture(s) of {size.width} x {size.height}, {given.rounds} rounds after "
        f"one warm-up; same windows: {same}, largest difference of features {gap:.1e}\n"
    )
    console.print(
        "| form | calls | views | s (range) | outside s | share | CPU s (range) | outside CPU s | share |"
    )
    console.print("|---|---:|---:|---|---:|---:|---|---:|---:|")
    for name, record in records.items():
        cells = [str(number) for number in passes[name]]
        for kind in (0, 1):
            every = [total[kind] for total, _ in record]
            outside = [total[kind] - inside[kind] for total, inside in record]
            share = statistics.median(o / e for o, e in zip(outside, every, strict=True))
            cells += [spread(every), f"{statistics.median(outside):.2f}", f"{share:.1%}"]
        console.print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
