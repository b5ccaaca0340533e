"""Golden vectors: what a case is, which cases a folder holds, and to which family each belongs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from tests.support import gap

Measure = Callable[[str, float, float], None]


@dataclass(frozen=True)
class Case:
    """One golden case: a JSON file with tensors beside it, or expected.json in a checkpoint's folder."""

    family: str
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

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors beside the JSON, under their full names."""
        return load_file(self.path.with_suffix(".safetensors"))

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below a prefix such as `in`, `state` or `out`, without it."""
        return {key[len(prefix) + 1 :]: t for key, t in self.tensors.items() if key.startswith(f"{prefix}.")}

    def tolerance(self, what: str = "", default: float = 1e-5) -> float:
        """The first number of the stated tolerance, `what` being its key where there are several."""
        stated = self.json.get("tolerance", default)
        stated = stated.get(what, default) if isinstance(stated, Mapping) else stated
        number = re.search(r"\d+(?:\.\d+)?(?:e-?\d+)?", str(stated))
        return float(number.group()) if number else 0.0


@dataclass(frozen=True)
class Comparison:
    """What a checker is given: the case, and a way to compare that is noted and asserted."""

    case: Case
    measure: Measure

    def close(self, what: str, actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
        self.measure(
            what, gap(actual, expected), self.case.tolerance(what) if tolerance is None else tolerance
        )

    def equal(self, what: str, actual: Any, expected: Any) -> None:
        assert actual == expected, f"{self.case.id}: {what} is {actual}, expected {expected}"
        self.measure(what, 0.0, 0.0)


Checker = Callable[[Comparison], None]


@dataclass(frozen=True)
class Family:
    """The checkers of one method's golden cases.

    Attributes:
        method: its name in `foveate.methods.METHODS`.
        checkers: beginning of a case's name, without the family's -> checker; the longest that fits is taken.
            `checkpoint` is for the folders below checkpoints/.
        methods: for checkers that need another method than the family's: beginning -> method.
    """

    method: str
    checkers: Mapping[str, Checker] = field(default_factory=dict)
    methods: Mapping[str, str] = field(default_factory=dict)

    def checker(self, rest: str) -> str | None:
        """The key of the checker for a case's name without the family's."""
        return max((key for key in self.checkers if rest.startswith(key)), key=len, default=None)


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


def cases(folder: Path) -> Iterator[Case]:
    """The cases of known families in a folder, whatever they are called after their family's name."""
    for path in sorted(folder.glob("*.json")):
        prefix = path.name.split("_")[0]
        if prefix in FAMILIES:
            yield Case(prefix, path.stem, path)
    for path in sorted(folder.glob("checkpoints/*/expected.json")):
        about = json.loads(path.read_text(encoding="utf-8"))
        names = [path.parent.name, *(str(about.get(key)) for key in ("method", "source", "official_repo"))]
        plain = [re.sub(r"[^a-z]", "", name.lower()) for name in names]
        found = [prefix for prefix, (_, called) in FAMILIES.items() if any(called in name for name in plain)]
        assert len(found) == 1, f"{path.parent}: of which method is this checkpoint? {found or names}"
        yield Case(found[0], path.parent.name, path)
