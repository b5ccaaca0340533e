"""Plain values to dataclasses: every wrong key and value is named."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from foveate import FoveateError
from foveate.methods.anyres import AnyRes
from foveate.methods.base import TowerGeometry
from foveate.options import build_options


@dataclass(frozen=True)
class Inner:
    depth: int = 1


@dataclass(frozen=True)
class Outer:
    name: str
    rate: float = 0.1
    mode: Literal["a", "b"] = "a"
    on: bool = False
    limit: int | None = None
    sizes: tuple[int, ...] = (1,)
    inner: Inner = field(default_factory=Inner)
    table: dict[str, int] = field(default_factory=dict)


def test_values_are_taken() -> None:
    given: dict[str, Any] = {
        "name": "x",
        "rate": "1e-3",
        "mode": "b",
        "on": True,
        "limit": 3,
        "sizes": [1, 2],
        "inner": {"depth": 2},
        "table": {"k": 1},
    }
    assert build_options(Outer, given, "it") == Outer("x", 1e-3, "b", True, 3, (1, 2), Inner(2), {"k": 1})
    assert build_options(Outer, {"name": "x", "rate": 1, "limit": None}, "it") == Outer("x", 1.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "it: 'name' is missing"),
        ({"name": "x", "moed": "a"}, "it: unknown key 'moed'; did you mean 'mode'"),
        ({"name": "x", "zzz": 1}, "it: unknown key 'zzz'; known: name, rate"),
        ({"name": 3}, "it: name: expected (a )?text, got 3"),
        ({"name": "x", "mode": "c"}, "it: mode: 'c' is not one of a, b"),
        ({"name": "x", "on": 1}, "it: on: expected true or false, got 1"),
        ({"name": "x", "limit": True}, "it: limit: expected (a )?whole number, got True"),
        ({"name": "x", "limit": 1.5}, "it: limit: expected (a )?whole number, got 1.5"),
        ({"name": "x", "rate": "fast"}, "it: rate: expected (a )?number, got 'fast'"),
        ({"name": "x", "sizes": 3}, "it: sizes: expected a list, got 3"),
        ({"name": "x", "sizes": [1, "b"]}, r"it: sizes\[1\]: expected (a )?whole number, got 'b'"),
        ({"name": "x", "inner": {"dept": 1}}, "it: inner: unknown key 'dept'; did you mean 'depth'"),
        ({"name": "x", "table": {"k": "v"}}, r"it: table\.k: expected (a )?whole number"),
        ([1], "it: expected keys and values"),
    ],
    ids=str,
)
def test_mistakes_are_named(given: Any, message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        build_options(Outer, given, "it")


def test_options_of_a_method() -> None:
    tower = TowerGeometry(336, 14)
    assert AnyRes(tower, {"grids": [[1, 2]]}).options.grids == ((1, 2),)
    for grids in ([[1]], [[0, 2]], [[1, 2, 3]]):
        with pytest.raises(FoveateError, match="grids"):
            AnyRes(tower, {"grids": grids})
    # a budget leaves out the grids that do not fit, and says what is the least if none does
    wide = AnyRes(tower, {"max_visual_tokens": 1800}).plan(400, 800)
    assert wide.tokens <= 1800 < AnyRes(tower).plan(672, 672).tokens
    with pytest.raises(FoveateError, match=r"needs at least [0-9]+ visual tokens for this picture"):
        AnyRes(tower, {"max_visual_tokens": 600}).plan(400, 800)
