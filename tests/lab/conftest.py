"""A lab so small that all of it runs in seconds: its answers mean nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from foveate.lab.cell import Bench, make_bench
from foveate.lab.parts import Parts, load_parts, prepare
from foveate.lab.scales import SCALES, Schedule

REAL = SCALES["nano"]
NANO = replace(
    SCALES["tiny"],
    vision_width=16,
    vision_layers=2,
    vision_heads=2,
    text_width=32,
    text_layers=3,
    text_heads=2,
    tower=Schedule(steps=3, batch=4, lr=1e-3),
    convnet=Schedule(steps=3, batch=4, lr=1e-3),
    reader=Schedule(steps=3, batch=4, lr=1e-3),
    tower_scenes=8,
    tower_test_scenes=40,
    cell=Schedule(steps=6, batch=4, lr=2e-3),
    scenes=16,
    test_scenes=8,
)


@pytest.fixture(scope="package", autouse=True)
def nano() -> Iterator[None]:
    SCALES["nano"] = NANO
    yield
    SCALES["nano"] = REAL


@pytest.fixture(scope="package")
def prepared(nano: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the nano scale's parts."""
    folder = tmp_path_factory.mktemp("lab")
    prepare("nano", NANO, folder)
    return folder


@pytest.fixture(scope="package")
def parts(prepared: Path) -> Parts:
    return load_parts("nano", prepared)


@pytest.fixture(scope="package")
def shared_bench(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A bench whose features are kept for other tests."""
    return make_bench("words", "nano", tmp_path_factory.mktemp("bench"), parts)


@pytest.fixture
def bench(shared_bench: Bench, tmp_path: Path) -> Bench:
    """The same pictures, and a folder that is empty."""
    return replace(shared_bench, folder=tmp_path)
