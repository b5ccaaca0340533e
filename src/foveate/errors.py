"""The one exception that is meant for users: a sentence that says what is wrong and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

PACKAGES = {
    "sklearn": "scikit-learn",
    "google.protobuf": "protobuf",
    "prometheus_client": "prometheus-client",
}  # module -> package, where they differ


class FoveateError(ValueError):
    """Wrong input by the user. The command line prints its message and exits with code 2."""


def require(module: str, extra: str, what: str) -> None:
    """Raises the `FoveateError` of `missing_extra` where an optional package is not installed.

    Args:
        module: the module that is imported next.
        extra: the extra of Foveate that installs it.
        what: the sentence's subject: what needs the module.
    """
    if not installed(module):
        raise missing_extra(module, extra, what)


def missing_extra(module: str, extra: str, what: str) -> FoveateError:
    """The error where an optional package is missing: it names the extra, and how to get it."""
    package = PACKAGES.get(module, module)
    return FoveateError(
        f"{what} needs the package {package}: install Foveate's extra {extra}, in a clone with "
        f"pip install -e '.[{extra}]'"
    )


def installed(module: str) -> bool:
    """Whether a module is installed, without importing it."""
    try:
        return find_spec(module) is not None
    except ImportError:  # its parent package is missing
        return False


def check_text(text: object, what: str) -> None:
    """Raises `FoveateError` unless `text` is a text that is not empty and that can be written as UTF-8."""
    if not isinstance(text, str):
        raise FoveateError(f"{what} must be a text, not {type(text).__name__}")
    if not text.strip():
        raise FoveateError(f"{what} is empty: give a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FoveateError(
            f"{what} is not text at character {error.start}: half of a pair of surrogates"
        ) from None


@contextmanager
def one_sentence(what: str) -> Iterator[None]:
    """Turns whatever another package raises for files that make no sense into a `FoveateError`.

    Missing packages and lack of memory stay as they are; so do errors that a version of transformers which
    was not tested may cause.

    Args:
        what: the sentence's beginning, with the file's or folder's name.
    """
    from foveate.versions import MOVED, untested

    try:
        yield
    except (FoveateError, ImportError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError" or (isinstance(error, MOVED) and untested()):
            raise
        raise FoveateError(f"{what}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of what an error says; its type if it says nothing."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return str(error).strip().partition("\n")[0] or type(error).__name__


def report_keys(
    folder: Path | str, missing: Iterable[str], unexpected: Iterable[str] = (), mismatched: Iterable[str] = ()
) -> None:
    """Raises `FoveateError` that names a checkpoint's missing, unexpected and wrongly shaped keys."""
    problems = []
    kinds = {"lacks": missing, "has unexpected": unexpected, "has the wrong shape for": mismatched}
    for what, keys in kinds.items():
        names = sorted(keys)
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            problems.append(f"{what} {', '.join(names[:4])}{more}")
    if problems:
        raise FoveateError(f"the checkpoint in {folder} {'; it '.join(problems)}")
