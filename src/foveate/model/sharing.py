"""What a saved folder says to transformers' Auto classes, for interpreters that did not import Foveate.

The folder's JSON files name our classes under `auto_map`, and a file of a few lines takes them from the
installed package. Foveate itself reads neither: no code of a folder runs.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

CODE = Path(__file__).with_name("foveate_classes.py")
# Auto class -> Foveate's public class that it loads from a folder.
MODELS = {
    "AutoConfig": "FoveateConfig",
    "AutoModel": "FoveateModel",
    "AutoModelForImageTextToText": "FoveateForConditionalGeneration",
    "AutoModelForMultimodalLM": "FoveateForConditionalGeneration",
}
IMAGE_PROCESSORS = {"AutoImageProcessor": "FoveateImageProcessor"}
PROCESSORS = {"AutoProcessor": "FoveateProcessor"}


def auto_map(classes: dict[str, str]) -> dict[str, str]:
    """The value of `auto_map` for some of the classes above."""
    return {auto: f"{CODE.stem}.{ours}" for auto, ours in classes.items()}


def write_code(folder: str | Path) -> None:
    """Writes the file that `auto_map` names into a folder, which is made if it is missing."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(CODE, Path(folder) / CODE.name)


class Installed:
    """A class that comes from the installed package, also where a folder's `auto_map` has led to it."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Does nothing: transformers would copy the package's source into every folder that is saved."""
