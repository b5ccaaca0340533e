"""Foveate: the published ways of letting a LLaVA-style multimodal LLM see fine detail, side by side.

Importing this package is cheap: torch and transformers load when a public name is first used. The classes
register with transformers' Auto classes as soon as those are imported, before or after this package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from foveate.model.registration import register
from foveate.versions import names_versions

if TYPE_CHECKING:
    from foveate.ask.answer import Answer
    from foveate.ask.foveate import Foveate, load
    from foveate.composing import compose
    from foveate.errors import FoveateError
    from foveate.methods import register_method
    from foveate.model.config import FoveateConfig
    from foveate.model.modeling import FoveateForConditionalGeneration, FoveateModel
    from foveate.model.processing import FoveateImageProcessor, FoveateProcessor
    from foveate.picture.limits import Limits
    from foveate.zoom.zoom import Zoom

__version__ = "0.1.0"

_PUBLIC = {
    "Answer": "foveate.ask.answer",
    "Foveate": "foveate.ask.foveate",
    "load": "foveate.ask.foveate",
    "compose": "foveate.composing",
    "FoveateConfig": "foveate.model.config",
    "FoveateError": "foveate.errors",
    "FoveateForConditionalGeneration": "foveate.model.modeling",
    "FoveateModel": "foveate.model.modeling",
    "FoveateImageProcessor": "foveate.model.processing",
    "FoveateProcessor": "foveate.model.processing",
    "Limits": "foveate.picture.limits",
    "Zoom": "foveate.zoom.zoom",
    "register_method": "foveate.methods",
}

__all__ = [
    "Answer",
    "Foveate",
    "FoveateConfig",
    "FoveateError",
    "FoveateForConditionalGeneration",
    "FoveateImageProcessor",
    "FoveateModel",
    "FoveateProcessor",
    "Limits",
    "Zoom",
    "compose",
    "load",
    "register_method",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(names_versions(import_module)(_PUBLIC[name]), name)
    raise AttributeError(f"module 'foveate' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


register()
