"""The one exception that is meant for users: a sentence that says what is wrong and what to do."""

from importlib.util import find_spec

PACKAGES = {"sklearn": "scikit-learn", "google.protobuf": "protobuf"}  # module -> package, where they differ


class FoveateError(ValueError):
    """Wrong input by the user. The command line prints its message and exits with code 2."""


def require(module: str, extra: str, what: str) -> None:
    """Raises the `FoveateError` of `missing_extra` where an optional package is not installed.

    Args:
        module: that is imported next.
        extra: of Foveate, which brings it.
        what: is done with it, as the sentence's subject.
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
    """Whether a module is there, without importing it."""
    try:
        return find_spec(module) is not None
    except ImportError:  # of the package that it is a part of
        return False
