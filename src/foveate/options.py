"""Plain mappings -> frozen dataclasses, with every wrong key and value named."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar, TypeVar

from foveate.errors import FoveateError

T = TypeVar("T")


NULLS = ("", "~", "null", "Null", "NULL")
BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
WHOLE = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
LONGEST_SHOWN = 200  # characters of a wrong value in messages
MOST_DIGITS = 100  # of a number; more are none that any option can use
NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


class Plain(str):
    """A value written without quotes: the type of its option decides what it means.

    A text option takes it as typed, be it `yes`, `1e3` or `null`. Numbers, true and false, and null are those
    of YAML 1.2; null means None for every option that may be None, even one that may also be a text.
    """

    def as_kind(self, kind: Any) -> Any:
        """The value converted to a type; the plain text if that is the type or the value does not fit it."""
        text, origin, args = str(self), typing.get_origin(kind), typing.get_args(kind)
        word = text.strip()
        if kind is Any:
            found = (self.as_kind(inner) for inner in (type(None), bool, int, float))
            return next((value for value in found if not isinstance(value, str)), text)
        if kind is type(None) and word in NULLS:
            return None
        if kind is bool:
            return BOOLEANS.get(word, text)
        if len(word) > MOST_DIGITS:
            return text
        if kind is int and WHOLE.fullmatch(word):
            return int(word, 0) if word[:2] in ("0o", "0x") else int(word)
        if kind is float and (NUMBER.fullmatch(word) or WHOLE.fullmatch(word)):
            return float(word) if NUMBER.fullmatch(word) else float(int(word, 0))
        if origin in (typing.Union, types.UnionType):
            found = (self.as_kind(inner) for inner in sorted(args, key=lambda arg: arg is not type(None)))
            return next((value for value in found if not isinstance(value, str)), text)
        if origin is typing.Literal:
            return next((arg for arg in args if str(arg) == word and type(arg) is not bool), text)
        return text


class Retiring:
    """Options with removed ones: models saved with the last value of those load as before."""

    retired: ClassVar[Mapping[str, Any]] = {}  # removed option -> its only valid value


def merged(cls: type, options: Mapping[str, Any], changes: Mapping[str, Any] | None) -> dict[str, Any]:
    """Options with changes applied; a mapping within an option is changed key by key, too.

    Changes written in a file or on the command line are converted to the types of the fields of the dataclass
    `cls`; `build_options` checks them.
    """
    found = dict(options)
    for key, value in _typed(dict(changes or {}), cls).items():
        before = found.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            value = {**before, **value}
        found[key] = value
    return found


def _typed(value: Any, kind: Any) -> Any:
    """A value with every `Plain` in it converted to the type."""
    if isinstance(value, Plain):
        return value.as_kind(kind)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(value, Mapping):
        if origin in (typing.Union, types.UnionType):
            kind = next((arg for arg in args if _holds_keys(arg)), Any)
            origin, args = typing.get_origin(kind), typing.get_args(kind)
        known = _types_of(typing.cast(type, kind)) if dataclasses.is_dataclass(kind) else {}
        other = args[1] if origin is dict else Any
        return {str(key): _typed(inner, known.get(key, other)) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        if origin in (typing.Union, types.UnionType):
            lists = [arg for arg in args if typing.get_origin(arg) in (list, tuple)]
            args = typing.get_args(lists[0]) if lists else ()
        elif origin not in (list, tuple):
            args = ()
        items = [_typed(inner, args[0] if args else Any) for inner in value]
        return tuple(items) if isinstance(value, tuple) else items
    return value


@lru_cache(maxsize=256)
def _types_of(cls: type) -> Mapping[str, Any]:
    """The types of a dataclass's fields; Python compiles each annotation anew whenever it is asked."""
    return types.MappingProxyType(typing.get_type_hints(cls))


def _holds_keys(kind: Any) -> bool:
    return typing.get_origin(kind) is dict or dataclasses.is_dataclass(kind)


def build_options(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Builds the dataclass `cls` from a mapping.

    Nested dataclasses, lists, unions with None, literals, numbers, strings and booleans are supported.
    Raises `FoveateError` that names the key for unknown keys, missing ones and values of a wrong type.
    """
    built = checked(cls, values, where)
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        required = f.init and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in built:
            raise FoveateError(f"{where}: {f.name!r} is missing")
    try:
        return cls(**built)
    except FoveateError as error:
        raise FoveateError(f"{where}: {error}") from None


def checked(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Values for some of the fields of the dataclass `cls`, each checked on its own.

    Raises `FoveateError` that names the key for unknown keys and values of a wrong type.
    """
    if not isinstance(values, Mapping):
        raise FoveateError(f"{where}: expected keys and values, got {_shown(values)}")
    fields = [f.name for f in dataclasses.fields(cls) if f.init]
    retired = cls.retired if issubclass(cls, Retiring) else {}
    for key, value in values.items():
        if key in retired and _typed(value, type(retired[key])) != retired[key]:
            raise FoveateError(f"{where}: {key} is always {retired[key]!r}, not {_shown(value)}")
        if key not in fields and key not in retired:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}"
            raise FoveateError(f"{where}: unknown key {key!r}; {hint}")
    types_of = _types_of(cls)
    return {
        str(key): _convert(value, types_of[key], f"{where}: {key}")
        for key, value in values.items()
        if key not in retired
    }


def _convert(value: Any, kind: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if isinstance(value, Plain):
        value = value.as_kind(kind)
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
            else FoveateError(f"{where}: expected {type_name(kind)}, got {_shown(value)}")
        )
    if origin is typing.Literal:
        if value not in args:
            raise FoveateError(f"{where}: {_shown(value)} is not one of {', '.join(map(str, args))}")
        return value
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise FoveateError(f"{where}: expected a list, got {_shown(value)}")
        inner = args[0] if args else Any
        return origin(_convert(item, inner, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise FoveateError(f"{where}: expected keys and values, got {_shown(value)}")
        return {str(k): _convert(v, args[1], f"{where}.{k}") for k, v in value.items()}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else build_options(kind, value, where)
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = Plain(value).as_kind(float) if isinstance(value, str) else float(value)
        except OverflowError:
            number = math.inf
        if isinstance(number, float) and math.isfinite(number):
            return number
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    quotes = "; put quotes around a text that starts with a bracket" if kind is str else ""
    hint = quotes if isinstance(value, (list, Mapping)) else ""
    raise FoveateError(f"{where}: expected {type_name(kind)}, got {_shown(value)}{hint}")


def _shown(value: Any) -> str:
    if value == "":
        return "nothing"
    try:
        shown = repr(value)
    except ValueError:  # a whole number of thousands of digits
        return "a number of thousands of digits"
    return shown if len(shown) <= LONGEST_SHOWN else f"{shown[:LONGEST_SHOWN]}..."


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
