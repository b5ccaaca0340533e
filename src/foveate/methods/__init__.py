"""The registry of methods. A new method is one file in this folder and one line here.

A file that no line names is no method.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

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
DEFAULT = "llava"  # where nothing says which


def method_class(name: str) -> type[Method]:
    """The class behind a registered name. Raises `FoveateError` for unknown names."""
    if name not in METHODS:
        raise FoveateError(f"unknown method {name!r}: choose one of {', '.join(METHODS)}")
    module, attribute = METHODS[name].split(":")
    return getattr(import_module(module), attribute)
