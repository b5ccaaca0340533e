"""The registry of methods: Foveate's own, those of installed packages, and those registered in this process.

A new method in Foveate is one file in this folder and one line here; a file that no line names is not a
method. A package brings a method by an entry point in the group `foveate.methods`, which is imported when the
method is first used; `register_method` registers one without a package. Code in a model folder is never run.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import warnings
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from foveate.errors import FoveateError

if TYPE_CHECKING:
    from foveate.methods.base import Method

METHODS: dict[str, str] = {
    "llava": "foveate.methods.llava:Llava",
    "anyres": "foveate.methods.anyres:AnyRes",
    "slime": "foveate.methods.slime:Slime",
    "llava_hr": "foveate.methods.llava_hr:LlavaHR",
    "inf_llava": "foveate.methods.inf_llava:InfLlava",
    "coroi": "foveate.methods.coroi:Coroi",
    "chain_of_spot": "foveate.methods.chain_of_spot:ChainOfSpot",
}
DEFAULT = "llava"  # if no method is named
GROUP = "foveate.methods"  # entry point group in which packages declare methods
EVERY = "all"  # names all methods at once

_registered: dict[str, type[Method]] = {}  # filled by `register_method`


def register_method(name: str, method: type[Method]) -> None:
    """Registers a method under a name, in this process; every command and class then accepts the name.

    A class of the same module and name as a registered one replaces it: a notebook cell may run twice.

    Args:
        name: letters, digits, - and _.
        method: a subclass of `foveate.methods.base.Method`.

    Raises:
        FoveateError: a name that is taken, or an object that is not a method.
    """
    place = f"{getattr(method, '__module__', '?')}:{getattr(method, '__qualname__', repr(method))}"
    _check_name(name, place)
    _check_method(method, name, place)
    others = [METHODS[name]] if name in METHODS else []
    others += [_place(_registered[name])] if name in _registered else []
    others += [f"{e.value} of {_owner(e)}" for e in _claims().get(name, ()) if not _is_of(e, method)]
    if taken := [other for other in others if other != place]:
        raise FoveateError(
            f"the method {place} cannot be registered as {name!r}: {taken[0]} has that name; choose another"
        )
    _registered[name] = method


def method_names() -> list[str]:
    """The names of all known methods, Foveate's own first. Imports none of them."""
    claimed = [name for name, entries in _claims().items() if len(entries) == 1 and _is_name(name)]
    return list(dict.fromkeys([*METHODS, *_registered, *claimed]))


def method_class(name: str) -> type[Method]:
    """The class with a name.

    Raises `FoveateError` for unknown names, names that two packages claim, and entry points that cannot be
    imported or are not methods.
    """
    if name not in METHODS and name not in _registered and name not in _claims():
        _installed.cache_clear()  # it may have been installed since
    return _class_of(name, _claims())


def usable_methods() -> tuple[dict[str, type[Method]], list[str]]:
    """All known methods, and a sentence on each method of a package that cannot be used."""
    claims = _claims()
    found: dict[str, type[Method]] = {}
    problems = []
    for name in dict.fromkeys([*METHODS, *_registered, *claims]):
        try:
            found[name] = _class_of(name, claims)
        except FoveateError as error:
            problems.append(str(error))
    return found, problems


def _class_of(name: str, claims: dict[str, list[EntryPoint]]) -> type[Method]:
    entries = claims.get(name, [])
    if name in METHODS:
        for entry in entries:
            warnings.warn(
                f"the method {name!r} is {METHODS[name]}; {entry.value} of {_owner(entry)}, which claims "
                "that name, too, is not used",
                stacklevel=3,
            )
        module, attribute = METHODS[name].split(":")
        return getattr(import_module(module), attribute)
    if name in _registered:
        return _registered[name]
    if not entries:
        raise FoveateError(
            f"unknown method {name!r}: choose one of {', '.join(method_names())}, or install the package "
            "that brings it"
        )
    if len(entries) > 1:
        both = " and ".join(f"{entry.value} of {_owner(entry)}" for entry in entries)
        raise FoveateError(f"the method {name!r} is claimed by {both}: uninstall all but one")
    return _load(entries[0])


def _load(entry: EntryPoint) -> type[Method]:
    place = f"{entry.value} of {_owner(entry)}"
    _check_name(entry.name, place)
    try:
        found = entry.load()
    except Exception as error:  # a package may raise anything while it is imported
        reason = (str(error).splitlines() or [""])[0]
        raise FoveateError(
            f"the method {entry.name!r}, {place}, cannot be imported ({type(error).__name__}: {reason}): "
            "repair that package, or uninstall it"
        ) from error
    _check_method(found, entry.name, place)
    return found


def _claims() -> dict[str, list[EntryPoint]]:
    """Name -> the entry points of installed packages that claim it, without duplicates."""
    return _installed(tuple(sys.path))


@lru_cache(maxsize=8)
def _installed(path: tuple[str, ...]) -> dict[str, list[EntryPoint]]:
    """Reads the metadata of every package, which takes about ten milliseconds."""
    found: dict[str, dict[str, EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        found.setdefault(entry.name, {}).setdefault(entry.value, entry)
    return {name: list(entries.values()) for name, entries in found.items()}


def _owner(entry: EntryPoint) -> str:
    metadata: Any = {} if entry.dist is None else entry.dist.metadata
    name = metadata["Name"] if "Name" in metadata else entry.value.partition(":")[0].partition(".")[0]
    return f"the package {name}"


def _is_of(entry: EntryPoint, method: type[Method]) -> bool:
    """Whether an entry point is this class, even if its package imports it from another module."""
    module, _, attribute = entry.value.partition(":")
    root, own = module.strip().partition(".")[0], method.__module__.partition(".")[0]
    return (root, attribute.strip()) == (own, method.__qualname__)


def _place(method: type[Method]) -> str:
    return f"{method.__module__}:{method.__qualname__}"


def _is_name(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9_-]+", name) is not None and name != EVERY


def _check_name(name: str, place: str) -> None:
    if not _is_name(name):
        raise FoveateError(
            f"the method {place} cannot be called {name!r}: use letters, digits, - and _, and not {EVERY!r}"
        )


def _check_method(found: Any, name: str, place: str) -> None:
    """Raises `FoveateError` unless this is a class that every part of Foveate can work with."""
    from foveate.methods.base import Method, MethodOptions

    where = f"the method {name!r}, {place},"
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise FoveateError(f"{where} is not a subclass of foveate.methods.base.Method: make it one")
    if inspect.isabstract(found):
        missing = " and ".join(sorted(found.__abstractmethods__))
        raise FoveateError(f"{where} does not define {missing}")
    for attribute in ("title", "idea", "paper"):
        if not isinstance(inspect.getattr_static(found, attribute, None), str):
            raise FoveateError(f"{where} has no {attribute}: give it one, a text")
    if not (issubclass(found.Options, MethodOptions) and dataclasses.is_dataclass(found.Options)):
        raise FoveateError(f"{where} has Options that are not a dataclass derived from MethodOptions")
