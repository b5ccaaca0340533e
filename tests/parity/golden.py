"""Golden vectors: what a case is, which cases a folder holds, and to which family each belongs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file
from torch import Tensor, nn

from tests.support import gap

Module = TypeVar("Module", bound=nn.Module)
Measure = Callable[..., None]  # see `tests.conftest.measure`
NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?", re.IGNORECASE)  # not that of fp32


class Tensors(Mapping[str, Tensor]):
    """Tensors of a file below a prefix, without it. `read` notes, under its full name, what was asked for."""

    def __init__(self, all_: Mapping[str, Tensor], read: set[str], prefix: str = "") -> None:
        self.all, self.read, self.prefix = all_, read, prefix

    def __getitem__(self, key: str) -> Tensor:
        tensor = self.all[self.prefix + key]
        self.read.add(self.prefix + key)
        return tensor

    def __contains__(self, key: object) -> bool:
        return f"{self.prefix}{key}" in self.all

    def __iter__(self) -> Iterator[str]:
        return (key[len(self.prefix) :] for key in self.all if key.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def part(self, prefix: str) -> Tensors:
        return Tensors(self.all, self.read, f"{self.prefix}{prefix}.")

    def unread(self) -> list[str]:
        return sorted(self.all.keys() - self.read)


@dataclass(frozen=True)
class Case:
    """One golden case: a JSON file with tensors beside it, or expected.json in a checkpoint's folder."""

    family: str  # empty: that of no known method
    name: str
    path: Path  # of the JSON

    @property
    def id(self) -> str:
        """What `-k` selects by; carries the family's name."""
        return f"{self.family}-checkpoint-{self.name}" if self.is_checkpoint else self.name

    @property
    def is_checkpoint(self) -> bool:
        return self.path.name == "expected.json"

    @property
    def folder(self) -> Path:
        return self.path.parent

    @cached_property
    def json(self) -> dict[str, Any]:
        return json.loads(self.path.read_text(encoding="utf-8"))

    @property
    def config(self) -> dict[str, Any]:
        """The sizes of the case's module; {} where its JSON states none."""
        return self.json.get("config", {})

    @cached_property
    def tensors(self) -> Tensors:
        """All tensors beside the JSON, under their full names; none where there is no such file."""
        beside = self.path.with_suffix(".safetensors")
        if not beside.is_file() and "file" in self.json:  # the JSON may have been renamed alone
            beside = self.folder / self.json["file"]
        return Tensors(load_file(beside) if beside.is_file() else {}, set())

    def part(self, prefix: str) -> Tensors:
        """The tensors below a prefix such as `in`, `state` or `out`, without it."""
        return self.tensors.part(prefix)

    def tolerance(self, what: str = "", default: float = 1e-5) -> float:
        """The first number of the stated tolerance, `what` being its key where there are several."""
        stated = self.json.get("tolerance", default)
        stated = stated.get(what, default) if isinstance(stated, Mapping) else stated
        number = NUMBER.search(str(stated))
        return float(number.group()) if number else 0.0


@dataclass(frozen=True)
class Comparison:
    """What a checker is given: the case, and a way to compare that is noted and asserted."""

    case: Case
    measure: Measure

    def close(self, what: str, actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
        allowed = self.case.tolerance(what) if tolerance is None else tolerance
        if actual.shape != expected.shape:
            shapes = f"is of shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
            self.measure(what, math.inf, allowed, shapes)
        else:
            self.measure(what, gap(actual, expected), allowed)

    def equal(self, what: str, actual: Any, expected: Any) -> None:
        error = 0.0 if actual == expected else math.inf
        self.measure(what, error, 0.0, f"is {actual}, expected {expected}")

    def those(
        self,
        expected: Mapping[str, Tensor],
        results: Mapping[str, Tensor | Callable[[], Tensor]],
        tolerance: float | None = None,
        of: str = "",
    ) -> None:
        """Compares those results, by the case's own names, for which the case gives expectations.

        What cannot be made of every case is given as a function.
        """
        for name, result in results.items():
            if name in expected:
                made = result if isinstance(result, Tensor) else result()
                self.close(f"{of} {name}".lstrip(), made, expected[name], tolerance)


Checker = Callable[[Comparison], None]


@dataclass(frozen=True)
class Family:
    """The checkers of one method's golden cases.

    Attributes:
        method: its name in `foveate.methods.METHODS`.
        checkers: kind of case -> checker. `checkpoint` is for folders with expected.json.
        methods: for checkers that need another method than the family's: kind -> method.
    """

    method: str
    checkers: Mapping[str, Checker] = field(default_factory=dict)
    methods: Mapping[str, str] = field(default_factory=dict)

    def kind(self, name: str) -> str | None:
        """The key of the checker for a case's name without the family's: the longest one that is in it."""
        words = set(name.split("_"))
        fit = (key for key in self.checkers if name.startswith(key) or {*key.split("_")} <= words)
        return max(fit, key=len, default=None)


def normed(module: Module, config: Mapping[str, Any]) -> Module:
    """The module with the epsilon that a case states for its layer norms, if it states one."""
    for part in module.modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = config.get("ln_eps", config.get("layer_norm_eps", part.eps))
    return module


# Beginning of a case's name, and file in families/ -> the method, and how its authors call it.
FAMILIES: dict[str, tuple[str, str]] = {
    "slime": ("slime", "slime"),
    "llavahr": ("llava_hr", "llavahr"),
    "inf": ("inf_llava", "infllava"),
    "coroi": ("coroi", "coroi"),
    "cos": ("chain_of_spot", "chainofspot"),
}


def family(prefix: str) -> Family:
    """The family's checkers; none where its file is not written yet."""
    name = f"tests.parity.families.{prefix}"
    return import_module(name).FAMILY if find_spec(name) else Family(FAMILIES[prefix][0])


def kind(case: Case) -> str | None:
    """Which of its family's checkers a case is for: its file's name says it, or the name that it states."""
    if case.is_checkpoint:
        return "checkpoint"
    names = (name.removeprefix(f"{case.family}_") for name in (case.name, str(case.json.get("name"))))
    return next((found for name in names if (found := family(case.family).kind(name))), None)


def cases(folder: Path) -> Iterator[Case]:
    """The cases of a folder and of the checkpoints below it, whatever they are called after their family."""
    for path in sorted(folder.glob("*.json")):
        if path.name != "expected.json":
            yield Case(_prefix(path), path.stem, path)
    for path in sorted(folder.rglob("expected.json")):
        about = json.loads(path.read_text(encoding="utf-8"))
        told = [str(about.get(key)) for key in ("method", "source", "official_repo")]
        found = _called(*told) or _called(path.parent.name)
        assert len(found) == 1, f"{path.parent}: of which method is this checkpoint? {found or told}"
        yield Case(found[0], path.parent.name, path)


def _prefix(path: Path) -> str:
    """The family that a file's name begins with, or the name that it states."""
    prefix = path.name.split("_")[0]
    if prefix not in FAMILIES:
        about = json.loads(path.read_text(encoding="utf-8"))
        prefix = str(about.get("name")).split("_")[0] if isinstance(about, dict) else ""
    return prefix if prefix in FAMILIES else ""


def _called(*names: str) -> list[str]:
    """The families whose authors' name is in one of these."""
    plain = [re.sub(r"[^a-z]", "", name.lower()) for name in names]
    return [prefix for prefix, (_, called) in FAMILIES.items() if any(called in name for name in plain)]


def check(case: Case, measure: Measure) -> list[str]:
    """Compares all of a case; returns the names of tensors that its checker did not read.

    Raises `AssertionError` where no checker takes the case, or nothing of it was compared.
    """
    found, noted = kind(case), 0
    assert found is not None, f"no checker in tests/parity/families/{case.family}.py takes {case.id}"

    def noting(*given: Any) -> None:
        nonlocal noted
        noted += 1
        measure(*given)

    family(case.family).checkers[found](Comparison(case, noting))
    assert noted, f"nothing of {case.id} was compared: it has none of what its checker compares"
    return case.tensors.unread()
