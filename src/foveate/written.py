"""Values as people write them: YAML files, and `key=value` on the command line.

A value without quotes stays as typed (`Plain`) until the type of its option is known; then `foveate.options`
converts it to a number, true or false, null or a text. On the command line, `[...]` is a list, `{...}` is
keys with values, quotes around a text are removed, and anything else is taken as typed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from foveate.errors import FoveateError
from foveate.options import Plain

PLAIN = "tag:foveate,plain"
# What reading YAML raises; ValueError and the like come from explicit types such as `!!int x`.
BROKEN = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError)
MOST_VALUES = 100_000  # of a file
MERGE = "<<"  # YAML's way to share keys between mappings


class _Loader(yaml.SafeLoader):
    """Reads values without quotes as `Plain`; a repeated key is an error."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode and implicit[0] and value != MERGE:
            return PLAIN
        return super().resolve(kind, value, implicit)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) != len(node.value):
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = next(key for i, key in enumerate(keys) if key in keys[:i])
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is given twice", node.start_mark)
        return mapping


_Loader.add_constructor(PLAIN, lambda loader, node: Plain(node.value))


def read_yaml(path: Path, keys: str) -> dict[str, Any]:
    """The values of a file that should hold such `keys`. Raises `FoveateError`."""
    try:
        values = _load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise FoveateError(f"{path} cannot be read: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise FoveateError(f"{path}{line}: {error.problem or error.context}") from error
    except UnicodeDecodeError as error:
        raise FoveateError(f"{path} is not UTF-8 at byte {error.start}: save it as UTF-8") from error
    except BROKEN as error:
        raise FoveateError(f"{path} is not a YAML file: {_problem(error)}") from error
    if not isinstance(values, dict):
        raise FoveateError(f"{path} should hold keys and values: {keys}")
    return values


def _load(text: str) -> Any:
    """The values of a text in YAML. Raises one of `BROKEN`, also for values that would never end."""
    values = yaml.load(text, _Loader)
    left = MOST_VALUES  # references let a short text name very many, or itself

    def count(value: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"it holds more than {MOST_VALUES} values")
        if isinstance(value, dict):
            for inner in value.values():
                count(inner)
        elif isinstance(value, list):
            for inner in value:
                count(inner)

    count(values)
    return values


def _problem(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return (str(error).splitlines() or [type(error).__name__])[0]


def read_pairs(pairs: Sequence[str] | None) -> dict[str, Any]:
    """`key=value` texts, as `--option` takes them.

    Raises:
        FoveateError: no equals sign, or a value in brackets that is not YAML.
    """
    return dict(read_pair(pair, f"--option {pair}") for pair in pairs or ())


def read_pair(pair: str, where: str) -> tuple[str, Any]:
    """The key and the value of one `key=value`; error messages begin with `where`."""
    key, equals, text = pair.partition("=")
    if not equals:
        raise FoveateError(f"{where}: expected key=value")
    return key, _read_value(text, where)


def _read_value(text: str, where: str) -> Any:
    first = text.lstrip()[:1]
    if first and first in "[{":
        try:
            return _load(text)
        except BROKEN as error:
            problem = "the value is not valid YAML; put quotes around a text that starts with a bracket"
            raise FoveateError(f"{where[:200]}: {problem}") from error
    if first and first in "'\"":
        try:
            value = _load(text)
        except BROKEN:  # '"a" or "b"' is not a text in quotes
            return Plain(text)
        return value if isinstance(value, str) else Plain(text)
    return Plain(text)
