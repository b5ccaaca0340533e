"""Questions about one picture each, from files of conversations and from Hugging Face datasets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image

from foveate.data.formats import read_conversations, to_messages
from foveate.data.shards import is_tar, parquet_files
from foveate.errors import FoveateError, require

WHOLE_PICTURE = "Describe the picture."  # asked if a region must not depend on a question


@dataclass(frozen=True)
class Question:
    """One question about one picture of the data.

    Attributes:
        record: its place in the data, from 0.
        id: of the record; empty where it has none.
        number: index of the question in the record, from 0; None: `WHOLE_PICTURE` instead.
        text: as the user asks it.
    """

    record: int
    id: str
    number: int | None
    text: str

    @property
    def key(self) -> str:
        """Its key in the authors' files."""
        record = f"{self.record:06d}_{self.id.replace('/', '_')}"
        return record if self.number is None else f"{record}_q{self.number}"


class Annotatable(Protocol):
    """Data that can be annotated. `fingerprint` changes with the data."""

    fingerprint: str

    def __len__(self) -> int:
        """Number of records."""

    def messages(self, index: int) -> tuple[str, list[dict[str, Any]]]:
        """A record's id, and its conversation as lists of parts."""

    def picture(self, index: int) -> Any:
        """The only picture of a record, as `read_picture` accepts it."""


class FileSource:
    """Conversations in a JSON or JSONL file, or in tar shards."""

    def __init__(self, path: Path, images: Path | None) -> None:
        self.conversations = read_conversations(path, images)
        self.fingerprint = self.conversations.digest

    def __len__(self) -> int:
        return len(self.conversations)

    def messages(self, index: int) -> tuple[str, list[dict[str, Any]]]:
        return self.conversations.id(index), self.conversations.messages(index)

    def picture(self, index: int) -> Any:
        messages = self.conversations.messages(index)
        return next(part["image"] for m in messages for part in m["content"] if part["type"] == "image")


class DatasetSource:
    """A dataset of the `datasets` library: on the hub, a folder that `save_to_disk` wrote, or Parquet files.

    Its rows have a picture in `image` or `images`, and `conversations` (LLaVA), `messages`, or `question`.
    """

    def __init__(self, name: str, split: str, images: Path | None) -> None:
        for package in ("datasets", "pyarrow"):
            require(package, "annotate", "a Hugging Face dataset")
        import datasets
        import pyarrow as pa

        try:
            parquet = parquet_files(Path(name))
            if parquet:
                found = datasets.load_dataset("parquet", data_files=parquet, split="train")
            elif Path(name).is_dir():
                found = datasets.load_from_disk(name)
            else:
                found = datasets.load_dataset(name, split=split)
        except (
            OSError,
            ValueError,
            IndexError,
            datasets.exceptions.DatasetsError,
        ) as error:  # IndexError: a dataset without rows
            raise FoveateError(f"{name} cannot be read as a dataset: {str(error).splitlines()[0]}") from error
        if isinstance(found, datasets.DatasetDict):
            if split not in found:
                raise FoveateError(f"{name} has no split {split!r}: choose one of {', '.join(found)}")
            found = found[split]
        columns = found.column_names
        self.pictures = next((column for column in ("image", "images") if column in columns), None)
        asked = next((c for c in ("conversations", "messages", "question") if c in columns), None)
        if self.pictures is None or asked is None:
            raise FoveateError(
                f"{name} has the columns {', '.join(columns)}: it needs image or images, and conversations, "
                "messages or question"
            )
        self.asked, self.images = asked, images or Path()
        self.rows, self.texts = found, found.remove_columns(self.pictures)
        self.cells = found.select_columns([self.pictures]).with_format("arrow")
        kind = found.features.arrow_schema.field(self.pictures).type
        self.several = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        self.fingerprint = str(found._fingerprint)  # datasets has no public fingerprint

    def __len__(self) -> int:
        return len(self.rows)

    def messages(self, index: int) -> tuple[str, list[dict[str, Any]]]:
        row = self.texts[index]
        name = str(row.get("id", index))
        if self.asked == "question":
            if not isinstance(row["question"], str):
                raise FoveateError("its question is not a text")
            shown = [{"type": "image", "image": ""}] * self._shown(index)
            return name, [{"role": "user", "content": [*shown, {"type": "text", "text": row["question"]}]}]
        turns = [_plain(turn) for turn in row[self.asked]] if isinstance(row[self.asked], list) else None
        names = ["picture"] * self._shown(index)  # records need a path for each
        return name, to_messages({self.asked: turns, "image": names, "images": names}, Path())

    def _shown(self, index: int) -> int:
        """The number of a row's pictures, without reading them."""
        cell = self.cells[index][self.pictures][0]
        if not cell.is_valid:
            return 0
        return len(cell) if self.several else 1

    def picture(self, index: int) -> Any:
        try:
            value = self.rows[index][self.pictures]
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise FoveateError(f"its picture cannot be read: {error}") from error
        if self.several:
            (value,) = value
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        return self.images / value if isinstance(value, str) else value


def _plain(turn: Any) -> Any:
    """A turn without the empty keys of its parts: columns give every part the keys of all parts."""
    if not isinstance(turn, dict) or not isinstance(turn.get("content"), list):
        return turn
    parts = [
        {"type": "image"} if isinstance(part, dict) and part.get("type") == "image" else part
        for part in turn["content"]
    ]
    return {**turn, "content": parts}


def open_annotatable(data: str | Path, images: str | Path | None = None, split: str = "train") -> Annotatable:
    """Conversations in a `.json` or `.jsonl` file or in tar shards; anything else as a dataset of `datasets`.

    Raises:
        FoveateError: no such data, broken records, missing columns.
    """
    folder = None if images is None else Path(images)
    if folder is not None and not folder.is_dir():
        raise FoveateError(f"there is no folder {folder} for the pictures")
    if Path(data).suffix in (".json", ".jsonl") or is_tar(Path(data)):
        return FileSource(Path(data), folder)
    return DatasetSource(str(data), split, folder)


def questions(
    source: Annotatable, about: Literal["questions", "pictures"] = "questions"
) -> tuple[list[Question], int]:
    """The questions of all records with one picture, and the number of records with none or several.

    With `about` "pictures": one for each record instead, always `WHOLE_PICTURE`.
    """
    found, left_out = [], 0
    for index in range(len(source)):
        try:
            name, messages = source.messages(index)
        except FoveateError as error:
            raise FoveateError(f"record {index}: {error}") from None
        if sum(part["type"] == "image" for m in messages for part in m["content"]) != 1:
            left_out += 1
            continue
        if about == "pictures":
            found.append(Question(index, name, None, WHOLE_PICTURE))
            continue
        asked = [m for m in messages if m["role"] == "user"]
        for number, turn in enumerate(asked):
            text = " ".join(part["text"].strip() for part in turn["content"] if part["type"] == "text")
            text = text.encode("utf-8", "replace").decode()  # tokenizers fail on halves of a character
            found.append(Question(index, name, number, text))
    if not found:
        raise FoveateError("no record of the data has a question about exactly one picture")
    return found, left_out
