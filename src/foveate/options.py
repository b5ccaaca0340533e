"""Plain mappings -> frozen dataclasses, with every wrong key and value named."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from foveate.errors import FoveateError

T = TypeVar("T")


def parse_pairs(pairs: Sequence[str] | None) -> dict[str, Any]:
    """`key=value` texts, as `--option` takes them; values are YAML.

    Raises:
        FoveateError: no equals sign, or a value that is not YAML.
    """
    import yaml

    options = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals:
            raise FoveateError(f"--option {pair}: expected key=value")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise FoveateError(f"--option {pair}: the value is not valid YAML") from error
    return options


def merged(options: Mapping[str, Any], changes: Mapping[str, Any] | None) -> dict[str, Any]:
    """Options with changes; keys and values within an option are changed one by one, too."""
    found = dict(options)
    for key, value in (changes or {}).items():
        before = found.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            value = {**before, **value}
        found[key] = value
    return found


def build_options(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Builds the dataclass `cls` from a mapping.

    Nested dataclasses, lists, unions with None, literals, numbers, strings and booleans are understood.
    Raises `FoveateError` that names the key for unknown keys, missing ones and values of a wrong type.
    """
    if not isinstance(values, Mapping):
        raise FoveateError(f"{where}: expected keys and values, got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}"
            raise FoveateError(f"{where}: unknown key {key!r}; {hint}")
    types_of = typing.get_type_hints(cls)
    built = {key: _convert(value, types_of[key], f"{where}: {key}") for key, value in values.items()}
    for name, f in fields.items():
        if (
            f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
            and name not in built
        ):
            raise FoveateError(f"{where}: {name!r} is missing")
    try:
        return cls(**built)
    except FoveateError as error:
        raise FoveateError(f"{where}: {error}") from None


def _convert(value: Any, kind: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        problems = []
        for arg in args:
            if arg is not type(None):
                try:
                    return _convert(value, arg, where)
                except FoveateError as error:
                    problems.append(error)
        raise (
            problems[0]
            if len(problems) == 1
            else FoveateError(f"{where}: expected {type_name(kind)}, got {value!r}")
        )
    if origin is typing.Literal:
        if value not in args:
            raise FoveateError(f"{where}: {value!r} is not one of {', '.join(map(str, args))}")
        return value
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise FoveateError(f"{where}: expected a list, got {value!r}")
        inner = args[0] if args else Any
        return origin(_convert(item, inner, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise FoveateError(f"{where}: expected keys and values, got {value!r}")
        return {str(k): _convert(v, args[1], f"{where}.{k}") for k, v in value.items()}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else build_options(kind, value, where)
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML reads 1e-3 as a string
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise FoveateError(f"{where}: expected {type_name(kind)}, got {value!r}")


def type_name(kind: Any) -> str:
    """A type in words, for messages and for the comments of recipes: `list[str]` -> "list of text"."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if arg is type(None) else type_name(arg) for arg in args)
    if origin is typing.Literal:
        return " or ".join(map(str, args))
    if origin in (list, tuple):
        return f"list of {type_name(args[0])}" if args else "list"
    if origin is dict:
        return f"keys with {type_name(args[1])}"
    if dataclasses.is_dataclass(kind):
        return "keys and values"
    names = {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "any value"}
    return names.get(kind) or str(kind)
