"""A function whose results are kept, as an attribute of an object that can be copied and pickled."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Remembered(Generic[P, R]):
    """Keeps a function's last results, as `functools.lru_cache` does.

    A copy, made by `copy` or `pickle`, starts without results. If the function is a method, the copied object
    calls its own.

    Args:
        function: its arguments must be hashable.
        most: how many results are kept.
    """

    def __init__(self, function: Callable[P, R], most: int) -> None:
        self._made = function, most
        self._kept = lru_cache(maxsize=most)(function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._kept(*args, **kwargs)  # type: ignore[arg-type]  # unhashable ones raise TypeError

    def __reduce__(self) -> tuple[Any, ...]:
        return Remembered, self._made
