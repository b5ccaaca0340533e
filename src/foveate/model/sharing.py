"""What a saved folder says to transformers' Auto classes where Foveate is not imported; saving and pushing.

The folder's JSON files name our classes under `auto_map`, and a file of a few lines takes them from the
installed package. Foveate itself reads neither: no code of a folder runs.
"""

from __future__ import annotations

import shutil
from dataclasses import fields
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from foveate.errors import FoveateError
from foveate.model.card import CARD
from foveate.model.folders import ADAPTER, PATTERNS, checked, hub_id, read_json, shown
from foveate.model.pushing import Push, push

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
# Files that make up a model, for a folder that may hold others. A .bin may be the state of a training.
PUSHED = (*(pattern for pattern in PATTERNS if pattern != "*.bin"), CARD, CODE.name, "LICENSE*")
KINDS = {"ImageProcessor": "image processor", "Processor": "processor", "Config": "configuration"}


def auto_map(classes: dict[str, str]) -> dict[str, str]:
    """The value of `auto_map` for some of the classes above."""
    return {auto: f"{CODE.stem}.{ours}" for auto, ours in classes.items()}


def write_code(folder: Path) -> None:
    """Writes the file that `auto_map` names into a folder."""
    shutil.copyfile(CODE, folder / CODE.name)


class Shared:
    """A class that transformers can save, push and find again, and that comes from the installed package."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Does nothing: transformers would copy the package's source into every folder that is saved."""

    def save_pretrained(
        self, save_directory: str | Path, *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> Any:
        """As in transformers, with the file that `auto_map` names, and of a model its card.

        With `push_to_hub`, `repo_id` names the repository, by default as the folder, and the other arguments
        of `push_to_hub` say how.
        """
        folder = Path(save_directory)
        hub = {f.name: kwargs.pop(f.name) for f in fields(Push) if push_to_hub and f.name in kwargs}
        repository = kwargs.pop("repo_id", folder.absolute().name) if push_to_hub else ""
        before = _stamps(folder)
        written = super().save_pretrained(folder, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_main_process", True):
            self._complete(folder)
        if push_to_hub:
            files = [name for name, stamp in _stamps(folder).items() if before.get(name) != stamp]
            push(folder, files, repository, Push(**hub), what=self._kind())
        return written

    def push_to_hub(
        self, repo_id: str, *, max_shard_size: int | str = "50GB", tags: list[str] | None = None, **how: Any
    ) -> str:
        """Saves it, and uploads the files in one commit; the address of the commit.

        Args:
            repo_id: `owner/name`; a repository that is missing is made.
            max_shard_size: of a model's files of weights.
            tags: for the card of a model.
            **how: the attributes of `foveate.model.pushing.Push`, as in transformers: `commit_message`,
                `commit_description`, `private`, `token`, `revision`, `create_pr`.

        Raises:
            FoveateError: the hub refuses.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            return push(Path(folder), files_of(folder), repo_id, Push(**how), tags or (), self._kind())

    def _complete(self, folder: Path) -> None:
        """Writes what transformers does not."""
        write_code(folder)

    def _kind(self) -> str:
        """What a commit is of."""
        return next((kind for end, kind in KINDS.items() if type(self).__name__.endswith(end)), "model")


def push_folder(folder: Path, repository: str, how: Push) -> str:
    """Uploads a saved model or a LoRA adapter; the address of the commit.

    Files that are no part of a model stay where they are.

    Raises:
        FoveateError: the folder is not a whole model of Foveate's own layout, or the hub refuses.
    """
    from foveate.model import checkpoints

    if (folder / ADAPTER).is_file():
        base = read_json(folder / ADAPTER).get("base_model_name_or_path")
        if not isinstance(base, str) or hub_id(base) != base:
            raise FoveateError(
                f"{shown(folder / ADAPTER)}: base_model_name_or_path {shown(base)} is no id on the hub: push "
                "the base, and write its id there"
            )
        return push(folder, _pushed(folder), repository, how, what="adapter")
    folder = checked(folder)
    if read_json(folder / "config.json").get("model_type") != "foveate":
        raise FoveateError(f"{shown(folder)} is not in Foveate's own layout: write it with foveate convert")
    checkpoints.own_config(folder)
    checkpoints.weight_files(folder)
    for file in ("config.json", "processor_config.json"):
        named = isinstance(read_json(folder / file).get("auto_map"), dict)
        if not (named and (folder / CODE.name).is_file()):
            raise FoveateError(
                f"{shown(folder / file)} has no auto_map, by which transformers finds the model's class: "
                "write the folder anew with foveate convert"
            )
    return push(folder, _pushed(folder), repository, how)


def _pushed(folder: Path) -> list[str]:
    return [name for name in files_of(folder) if any(fnmatchcase(name, pattern) for pattern in PUSHED)]


def files_of(folder: str | Path) -> list[str]:
    """Names of a folder's files."""
    return sorted(_stamps(Path(folder)))


def _stamps(folder: Path) -> dict[str, int]:
    """When each file of a folder was last written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*") if path.is_file()}
