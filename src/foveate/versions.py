"""A further sentence for errors with versions of transformers that Foveate was not tested with."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

MOVED = (TypeError, AttributeError, ImportError)  # errors that a moved name causes

P = ParamSpec("P")
R = TypeVar("R")


def names_versions(function: Callable[P, R]) -> Callable[P, R]:
    """Adds `untested()` to errors that a moved name may have caused."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except MOVED as error:
            add_version_note(error)
            raise

    return call


def add_version_note(error: BaseException) -> None:
    """Adds `untested()` to an error as a note, once."""
    note = untested()
    if note is not None and note not in getattr(error, "__notes__", ()):
        error.add_note(note)  # type: ignore[attr-defined]  # Python 3.11, which untested versions also need


def untested() -> str | None:
    """Which transformers is installed and which were tested; None if it was tested."""
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement
    from packaging.version import Version

    try:
        wanted = [Requirement(line) for line in requires("foveate") or ()]
        installed, own = version("transformers"), version("foveate")
    except PackageNotFoundError:  # run from a folder that was never installed
        return None
    tested = next(requirement.specifier for requirement in wanted if requirement.name == "transformers")
    if tested.contains(installed, prereleases=True):
        return None
    lowest = next(clause.version for clause in tested if clause.operator == ">=")
    newer = Version(installed) > Version(lowest)
    return (
        f"transformers {installed} is {'newer' if newer else 'older'} than those that Foveate {own} was "
        f"tested with ({tested}): pip install 'transformers{tested}'"
    )
