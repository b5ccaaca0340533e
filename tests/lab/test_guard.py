"""The lab tells what it was built to tell: methods that see the picture's own pixels read, others do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from foveate.lab.cell import Cell, make_bench
from foveate.lab.controls import controls
from foveate.lab.parts import load_parts
from foveate.lab.scales import SCALES
from foveate.lab.training import train_cell

STEPS = 450


@pytest.fixture
def short() -> Iterator[str]:
    """The tiny scale with a quarter of its pictures."""
    SCALES["short"] = replace(SCALES["tiny"], scenes=2000, test_scenes=250)
    yield "short"
    del SCALES["short"]


@pytest.mark.slow
def test_pooled_tiles_read_what_the_base_view_cannot(short: str, tmp_path: Path) -> None:
    bench = make_bench("easy", short, tmp_path, load_parts("tiny", tmp_path))
    with controls():
        low, high = (
            train_cell(Cell(method, 0, "easy", short, STEPS), bench)["accuracy"]
            for method in ("llava", "pooled")
        )
    assert high["fine"] > low["fine"] + 0.20
    assert low["attr"] > 0.8 and high["attr"] > 0.8
