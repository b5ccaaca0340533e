"""Every registered method, and the toy method beside them, as tiny models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from foveate import Foveate
from foveate.methods import METHODS, method_names
from foveate.tiny import tiny_model
from foveate.written import read_pairs
from tests.support import awake

# Options under which a method's tiny model is tested, beside its own for a tower of 56 pixels.
TINY_OPTIONS: dict[str, dict[str, Any]] = {"llava_hr": {"blocks": [1]}}
LOOKS = {"coroi": 4}  # how often a method's connector calls the tower again, at most
READ_LAST = ("llava_hr",)  # methods that read the tower's last layer, whatever hidden state is named


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The invariants run over every known method and the toy, or over the one that `--method` names."""
    if metafunc.module.__name__.endswith("test_invariants"):
        alone = metafunc.config.getoption("--method")
        metafunc.parametrize("method", [*method_names(), "toy"] if alone is None else [alone])


@pytest.fixture(scope="package", autouse=True)
def options_given(pytestconfig: pytest.Config) -> Iterator[None]:
    """`--method-option`, for the method that `--method` names."""
    with pytest.MonkeyPatch.context() as patch:
        if given := read_pairs(pytestconfig.getoption("--method-option")):
            patch.setitem(TINY_OPTIONS, str(pytestconfig.getoption("--method")), given)
        yield


@pytest.fixture(scope="package", autouse=True)
def toy() -> Iterator[None]:
    """Registers the toy method as any other is: by one line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "toy", "tests.methods.toy:Toy")
        yield


@pytest.fixture(scope="package")
def tiny(toy: None) -> Callable[[str], Foveate]:
    """Method -> its tiny model, made once. Tests that change a model make their own with `fresh`."""
    made: dict[str, Foveate] = {}

    def of(method: str) -> Foveate:
        if method not in made:
            made[method] = fresh(method)
        return made[method]

    return of


def fresh(method: str, **options: Any) -> Foveate:
    """A tiny model none of whose parts starts as nothing: that would hide what the part does."""
    made = tiny_model(method, {**TINY_OPTIONS.get(method, {}), **options})
    awake(made.model)
    return made
