"""SliME's connector against a form that takes tile after tile and broadcasts the cosine.

    python -m benchmarks.slime_connector [--rounds 7] [--threads 2] [--width 1024] [--words 200]

Features in, LLM tokens out, at the paper's sizes: a global view and 7 tiles of 576 tokens, 1024 -> 4096
channels, 144 queries a tile, 200 text tokens, gamma 0.95. The other form is written as the authors' code
goes about it: one picture, tile after tile, `nn.MultiheadAttention` with its attention maps, and a cosine
similarity of all local tokens with all text tokens that holds a tensor of tokens x words x channels. Both
have the same weights and give the same tokens. They run alternately; prints a Markdown table of medians
with their range, and of the peak of the process's resident memory beyond what model and inputs take. The
memory needs Linux with glibc.
"""

from __future__ import annotations

import ctypes
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from benchmarks.arguments import Whole, arguments
from foveate.methods.base import Query, TowerGeometry, Widths
from foveate.methods.slime import QueryFormer, Slime, SlimeConnector

GAMMA = 0.95


def attention_of(former: QueryFormer) -> nn.MultiheadAttention:
    """The same weights in torch's own module."""
    width = former.project_out.in_features
    attention = nn.MultiheadAttention(width, former.heads, batch_first=True)
    attention.in_proj_weight, attention.in_proj_bias = former.project_in.weight, former.project_in.bias
    attention.out_proj.weight, attention.out_proj.bias = former.project_out.weight, former.project_out.bias
    return attention.eval()


class PerTile:
    """The plain form: returns the kept visual tokens of one picture, without the separator."""

    def __init__(self, connector: SlimeConnector, plan_places: Tensor) -> None:
        self.connector, self.places = connector, plan_places
        self.former, self.compressor = connector.adapter.former, connector.compressor
        self.attend = {former: attention_of(former) for former in (self.former, self.compressor)}

    def read(self, former: QueryFormer, features: Tensor) -> Tensor:
        """(N, C) -> (Q, C)"""
        query = former.query_norm(former.queries) + former.positions
        value = former.feature_norm(features)
        key = value + former.source_positions()
        read, _ = self.attend[former](query[None], key[None], value[None])
        return former.output_norm(read)[0]

    def __call__(self, features: Tensor, query: Query) -> Tensor:
        adapter = self.connector.adapter
        first, second = adapter.gates(features[:1])[0].split(1, -1)
        shown = first * adapter.mlp(features[0]) + second * adapter.mlp(self.read(self.former, features[0]))
        local = torch.cat([adapter.mlp(self.read(self.compressor, tile)) for tile in features[1:]])[
            self.places
        ]
        scores = F.cosine_similarity(local[:, None], query.embeds[0][None], dim=-1).sum(1)
        ranked, order = scores.softmax(0).sort(descending=True)
        within = int((ranked.cumsum(0) <= GAMMA).sum())
        return torch.cat([shown, local[order[: within + 1].sort().values]])


def resident(field: str) -> float:
    """MB of this process: VmRSS now, VmHWM the peak since it was last forgotten."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def measure(call: Callable[[], Tensor], before: float) -> tuple[float, float]:
    """Seconds of one call, and the MB by which its peak lies above `before`."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the call before has freed
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forgets the peak
    start = time.perf_counter()
    call()
    return time.perf_counter() - start, resident("VmHWM") - before


@torch.inference_mode()
def main() -> None:
    given = arguments(
        __doc__,
        rounds=7,
        width=Whole(1024, step=128, help="channels of the tower; the LLM has four times as many"),
        words=Whole(200, help="text tokens of the question"),
    )
    width, text, words = given.width, 4 * given.width, given.words
    torch.manual_seed(0)
    method = Slime(TowerGeometry(336, 14), {"gamma": GAMMA})
    plan = method.plan(336, 7 * 336)
    connector = method.build_connector(Widths(width, text)).eval()
    features = torch.randn(len(plan.views), 576, width)
    query = Query(torch.randn(1, words, text), torch.ones(1, words, dtype=torch.long))
    plain = PerTile(connector, torch.from_numpy(connector.token_sources(plan)[577:] - 576))

    def ours() -> Tensor:
        visual = connector(features, [plan], query)
        assert visual.kept is not None and visual.separators is not None
        return visual.tokens[visual.kept & ~visual.separators]

    def theirs() -> Tensor:
        return plain(features, query)

    before = resident("VmRSS")
    sides = {"Foveate": ours, "per tile, broadcast cosine": theirs}
    one, other = (call() for call in sides.values())  # the warm-up as well
    assert one.shape == other.shape
    gap = float((one - other).abs().max())
    records: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(given.rounds):
        for name, call in sides.items():
            records[name].append(measure(call, before))
    console = Console(width=200, highlight=False, markup=False)
    console.print(
        f"{platform.machine()}, {given.threads} threads, float32, torch {torch.__version__}, "
        f"{width} to {text} channels, {words} text tokens, {given.rounds} rounds, "
        f"{len(plan.views) - 1} tiles, {len(one)} tokens kept; largest difference {gap:.1e}\n"
    )
    console.print("| form | seconds (range) | peak MB (range) |")
    console.print("|---|---|---|")
    for name, record in records.items():
        seconds, megabytes = (list(values) for values in zip(*record, strict=True))
        console.print(
            f"| {name} | {statistics.median(seconds):.3f} ({min(seconds):.3f} - {max(seconds):.3f}) | "
            f"{statistics.median(megabytes):.0f} ({min(megabytes):.0f} - {max(megabytes):.0f}) |"
        )
    ratios = [
        statistics.median(b[i] for b in records["per tile, broadcast cosine"])
        / statistics.median(a[i] for a in records["Foveate"])
        for i in range(2)
    ]
    console.print(f"\n{ratios[0]:.1f} times as fast, {1 / ratios[1]:.2f} of the memory")


if __name__ == "__main__":
    main()
