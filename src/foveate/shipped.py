"""Recipes, experiments and mixtures that come with Foveate, found by their names."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Literal

from foveate.errors import FoveateError

Kind = Literal["recipe", "experiment", "mixture"]
PLACES: dict[Kind, tuple[str, str]] = {
    "recipe": ("train", "recipes"),
    "experiment": ("lab", "experiments"),
    "mixture": ("data", "mixtures"),
}


def shipped(kind: Kind) -> list[str]:
    """The names of all that come with Foveate, in alphabetical order."""
    return sorted(path.stem for path in _folder(kind).glob("*.yaml"))


def find(kind: Kind, given: str | Path) -> Path:
    """The file of one of a kind, given as a path or by its name; a file at the path wins.

    Raises `FoveateError` that lists the names if there is neither.
    """
    try:
        if Path(given).is_file():
            return Path(given)
    except OSError as error:
        raise FoveateError(f"{str(given)[:200]} cannot be read: {error.strerror}") from error
    if str(given) in shipped(kind):
        return _folder(kind) / f"{given}.yaml"
    raise FoveateError(
        f"no {kind} at {given}: give a YAML file, or the name of one in {_folder(kind)}: "
        f"{', '.join(shipped(kind))}"
    )


def _folder(kind: Kind) -> Path:
    package, folder = PLACES[kind]
    return Path(str(resources.files("foveate") / package / folder))


def lines_of(*parts: str) -> list[str]:
    """The lines of a text file of the package that are neither empty nor comments."""
    text = resources.files("foveate").joinpath(*parts).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
