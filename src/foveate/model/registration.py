"""Registers Foveate's classes with transformers' Auto classes, and so with its pipelines.

Each pair is registered as soon as both of its modules are imported, in either order: `import foveate` stays
cheap, and no module of transformers is used before it is complete.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

import wrapt

if TYPE_CHECKING:
    from foveate.model.config import FoveateConfig

AUTO = "transformers.models.auto"  # the classes are public, their modules are not


class Introduction:
    """One Auto class, and the Foveate class to register with it.

    Args:
        auto: module of `AUTO`; importing it imports ours.
        ours: module of `foveate.model`.
        introduce: registers; called once with both.
    """

    def __init__(self, auto: str, ours: str, introduce: Callable[[ModuleType, ModuleType], None]) -> None:
        self.auto, self.ours = f"{AUTO}.{auto}", f"foveate.model.{ours}"
        self.introduce = introduce
        self.complete: dict[str, ModuleType] = {}
        wrapt.register_post_import_hook(self._arrived, self.ours)
        wrapt.register_post_import_hook(self._arrived, self.auto)

    def _arrived(self, module: ModuleType) -> None:
        self.complete[module.__name__] = module
        if self.ours not in sys.modules:
            import_module(self.ours)  # registers in turn
        elif len(self.complete) == 2:
            self.introduce(self.complete[self.auto], self.complete[self.ours])


def _config(auto: ModuleType, ours: ModuleType) -> None:
    auto.AutoConfig.register("foveate", ours.FoveateConfig)


def _model(auto: ModuleType, ours: ModuleType) -> None:
    auto.AutoModel.register(_config_class(), ours.FoveateModel)
    for kind in (auto.AutoModelForImageTextToText, auto.AutoModelForMultimodalLM):
        kind.register(_config_class(), ours.FoveateForConditionalGeneration)


def _image_processor(auto: ModuleType, ours: ModuleType) -> None:
    auto.AutoImageProcessor.register(
        _config_class(), image_processor_classes={"pil": ours.FoveateImageProcessor}
    )


def _processor(auto: ModuleType, ours: ModuleType) -> None:
    auto.AutoProcessor.register(_config_class(), ours.FoveateProcessor)


def _config_class() -> type[FoveateConfig]:
    from foveate.model.config import FoveateConfig

    return FoveateConfig


def register() -> None:
    """Called once, by the package."""
    Introduction("configuration_auto", "config", _config)
    Introduction("modeling_auto", "modeling", _model)
    Introduction("image_processing_auto", "processing", _image_processor)
    Introduction("processing_auto", "processing", _processor)
