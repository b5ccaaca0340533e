"""Where a model is: a folder of this machine, or a snapshot in the Hugging Face hub's cache; and its JSON."""

from __future__ import annotations

import json
import os
import re
from collections.abc import MutableMapping
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from foveate.errors import FoveateError
from foveate.methods.layouts import Json
from foveate.model.foreign import check_generation

CONFIGURATIONS = ("*.json", "*.model", "*.jinja", "*.txt")  # all but weights
PATTERNS = (*CONFIGURATIONS, "*.safetensors", "*.bin")
# Files that transformers reads by itself, and must be objects.
JSONS: tuple[str, ...] = (
    "config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
)
JSONS += ("generation_config.json", "chat_template.json", "special_tokens_map.json", "added_tokens.json")
GENERATION = "generation_config.json"
MAIN = "main"  # the hub's name of what a model has without a revision
LONGEST = 200  # characters of a name in a message
ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Hub:
    """How a model is looked for: the arguments of these names that every `from_pretrained` takes.

    Attributes:
        revision: branch, tag or commit on the hub; by default `main`.
        subfolder: the folder inside the model's that holds it.
        token: for private models; by default the one that `hf auth login` has stored.
        cache_dir: the hub's cache; by default the one of `HF_HOME`.
        local_files_only: whether only the cache is looked at.
        force_download: whether files that the cache has are fetched again.
    """

    revision: str | None = None
    subfolder: str = ""
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    force_download: bool = False

    def __post_init__(self) -> None:
        inside = PurePosixPath(self.subfolder or "")
        if inside.is_absolute() or ".." in inside.parts or "\0" in self.subfolder:
            raise FoveateError(f"subfolder {shown(self.subfolder)} is not a folder inside the model's")

    @classmethod
    def taken(cls, arguments: MutableMapping[str, Any]) -> Hub:
        """Takes its arguments out of those of a call; None stands for the default."""
        given = {f.name: arguments.pop(f.name, None) for f in fields(cls)}
        return cls(**{name: value for name, value in given.items() if value is not None})

    @classmethod
    def of(cls, arguments: MutableMapping[str, Any], where: str) -> Hub:
        """The same for calls that take no other arguments. Raises `TypeError` for others."""
        rest = dict(arguments)
        hub = cls.taken(rest)
        if rest:
            raise TypeError(f"{where}() got an unexpected keyword argument {next(iter(rest))!r}")
        return hub

    def parts(self) -> Hub:
        """For models that a model names by ids of their own: they have other revisions and folders."""
        return replace(self, revision=None, subfolder="")

    def arguments(self) -> dict[str, Any]:
        """As arguments of a `from_pretrained`."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


HERE = Hub()


def shown(name: object) -> str:
    """A name as messages can show it: printable, and not longer than a sentence."""
    text = str(name).encode("utf-8", "backslashreplace").decode("utf-8")
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}...{text[-LONGEST // 2 :]}"


def found(name: str | Path, hub: Hub = HERE, patterns: tuple[str, ...] = PATTERNS) -> Path:
    """The folder of a path or an id on the Hugging Face hub, whatever it holds.

    From the hub come the files whose names fit the `patterns`.

    Raises `FoveateError` if there is none, or not this revision or subfolder of it.
    """
    if not isinstance(name, (str, os.PathLike)) or not str(name):
        raise FoveateError(f"a model is given as a folder or as an id on the hub, not as {shown(repr(name))}")
    folder = Path(name)
    if not _exists(folder):
        folder = _download(str(name), hub, patterns)
    elif hub.revision not in (None, MAIN):
        raise FoveateError(
            f"{shown(name)} is a folder of this machine, which has no revision {shown(hub.revision)}: "
            "leave out the revision, or give an id on the hub"
        )
    if not folder.is_dir():
        raise FoveateError(f"{shown(name)} is a file: give the model's folder")
    if hub.subfolder:
        folder = folder / hub.subfolder
        if not _exists(folder) or not folder.is_dir():
            at = "" if hub.revision in (None, MAIN) else f" at revision {shown(hub.revision)}"
            raise FoveateError(f"{shown(name)} has no subfolder {shown(hub.subfolder)}{at}")
    return folder


def local_folder(name: str | Path, hub: Hub = HERE, wanted: tuple[str, ...] = ("config.json",)) -> Path:
    """The folder of a model given as a path or as an id on the Hugging Face hub.

    Raises `FoveateError` if there is neither, or if the folder has none of the `wanted` files.
    """
    return checked(found(name, hub), wanted)


def checked(folder: Path, wanted: tuple[str, ...] = ("config.json",)) -> Path:
    """A folder with one of the `wanted` files, and no broken JSON. Raises `FoveateError` for others."""
    if not any((folder / file).is_file() for file in wanted):
        if (folder / ADAPTER).is_file():
            raise FoveateError(f"{shown(folder)} holds a LoRA adapter alone: give the whole model here")
        raise FoveateError(f"{shown(folder)} has no {wanted[0]}: it is not a model folder")
    for file in JSONS:
        values = read_json(folder / file)
        if file == GENERATION:
            check_generation(values, shown(folder / file))
    return folder


def hub_id(name: str | Path) -> str | None:
    """The hub's id of a model that was found by this name, also by its place in the hub's cache.

    None for other folders of this machine: their names are nobody else's business.
    """
    if not _exists(Path(name)):
        return str(name)
    cached = [part for part, inner in pairwise(Path(name).parts) if inner == "snapshots"]
    found = [re.fullmatch(r"models--([\w.-]+?)--([\w.-]+)", part) for part in cached]
    return next((f"{match[1]}/{match[2]}" for match in found if match), None)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, not allowed, or no name of a file at all
        return False


def _download(name: str, hub: Hub, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise FoveateError(f"no model folder at {shown(name)}")
    inside = f"{hub.subfolder.strip('/')}/" if hub.subfolder else ""
    try:
        return Path(
            snapshot_download(
                name,
                revision=hub.revision,
                token=hub.token,
                cache_dir=hub.cache_dir,
                local_files_only=hub.local_files_only,
                force_download=hub.force_download,
                allow_patterns=[inside + pattern for pattern in patterns],
            )
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        it = "it" if hub.revision is None else f"its revision {shown(hub.revision)}"
        asked = (
            "the hub's cache does not have" if hub.local_files_only else "the Hugging Face hub did not give"
        )
        hint = ": ask for access on its page, and give a token" if isinstance(error, GatedRepoError) else ""
        raise FoveateError(
            f"no model folder at {shown(name)}, and {asked} {it} ({type(error).__name__}){hint}"
        ) from error


def read_json(path: Path) -> Json:
    """A JSON file as a dictionary; {} if the file does not exist. Raises `FoveateError` if broken."""
    try:
        if not path.is_file():
            return {}
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        bom = "save it as UTF-8 without a byte-order mark" if "BOM" in str(error) else str(error)
        raise FoveateError(f"{shown(path)} is not valid JSON: {bom}") from error
    except UnicodeDecodeError as error:
        raise FoveateError(f"{shown(path)} is not valid JSON: save it as UTF-8") from error
    except RecursionError as error:
        raise FoveateError(f"{shown(path)} is not valid JSON: too many brackets within brackets") from error
    except (OSError, ValueError) as error:  # ValueError: a number of thousands of digits
        raise FoveateError(f"{shown(path)} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise FoveateError(f"{shown(path)} should hold a JSON object")
    return value
