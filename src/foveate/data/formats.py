"""Files of conversations -> messages, checked while they are read.

Two kinds of record, in a JSON list (`.json`) or one a line (`.jsonl`):

    LLaVA     {"id", "image": path or paths, "conversations": [{"from": "human" | "gpt", "value": text}]}
    messages  {"messages": [{"role", "content": text or parts}], "images": paths}
              parts are {"type": "text", "text"} and {"type": "image", "image": path}

In a user's text, `<image>` stands for the next path in `image` or `images`; so does a part {"type": "image"}
without a path. As in LLaVA's own training, a single picture moves to the front of its message, and a first
turn by the assistant is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from foveate.errors import FoveateError
from foveate.methods.base import IMAGE_TOKEN

ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
BLANKS = " \t\r\n"


@dataclass(frozen=True)
class Conversations:
    """A checked data file. Its records stay on disk.

    Attributes:
        path: the file.
        images: folder that picture paths start from.
        prompts: False leaves out the user's text in messages with a picture.
        spans: (R, 2) int64, the first byte of each record and the one after its last.
        pictures: (R,) int64, number of pictures of each record.
    """

    path: Path
    images: Path
    prompts: bool
    spans: np.ndarray
    pictures: np.ndarray

    def __len__(self) -> int:
        return len(self.spans)

    def messages(self, index: int) -> list[dict[str, Any]]:
        """The conversation of a record, as `FoveateProcessor.apply_chat_template` accepts it."""
        messages = to_messages(self._record(index), self.images)
        return messages if self.prompts else [_without_prompt(message) for message in messages]

    def id(self, index: int) -> str:
        """A record's `id`; its place in the file if it has none."""
        return str(self._record(index).get("id", index))

    def where(self, index: int) -> str:
        """A record's name in messages: its file, its place there, its id."""
        place = f"sample {index}"
        if self.path.suffix == ".jsonl":
            with self.path.open("rb") as file:
                number = file.read(int(self.spans[index, 0])).count(b"\n") + 1
            place = f"line {number}"
        return _name(self.path, place, self._record(index))

    def _record(self, index: int) -> Any:
        start, end = (int(n) for n in self.spans[index])
        with self.path.open("rb") as file:
            file.seek(start)
            return json.loads(file.read(end - start))


def read_conversations(
    path: str | Path, images: str | Path | None = None, prompts: bool = True
) -> Conversations:
    """Reads and checks a file of conversations; does not check that its pictures exist.

    Args:
        path: `.jsonl` with one record a line, or `.json` with a list of records.
        images: folder that picture paths start from; by default the file's own.
        prompts: False leaves out the user's text in messages with a picture.

    Raises:
        FoveateError: no such file, broken JSON, roles out of turn, a wrong number of `<image>`, no records;
            the message names the record.
    """
    path = Path(path)
    if not path.is_file():
        raise FoveateError(f"no data file at {path}")
    if path.suffix not in (".json", ".jsonl"):
        raise FoveateError(f"{path} must end in .json (a list of records) or .jsonl (one record a line)")
    folder = Path(images) if images is not None else path.parent
    if not folder.is_dir():
        raise FoveateError(f"{path}: there is no folder {folder} for its pictures")
    spans, pictures = [], []
    for start, end, place, record in _lines(path) if path.suffix == ".jsonl" else _items(path):
        try:
            messages = to_messages(record, folder)
        except FoveateError as error:
            raise FoveateError(f"{_name(path, place, record)}: {error}") from None
        spans.append((start, end))
        pictures.append(sum(part["type"] == "image" for m in messages for part in m["content"]))
    if not spans:
        raise FoveateError(f"{path} holds no samples")
    return Conversations(
        path, folder, prompts, np.array(spans, dtype=np.int64), np.array(pictures, dtype=np.int64)
    )


def to_messages(record: Any, images: Path) -> list[dict[str, Any]]:
    """A record of either kind as messages whose contents are lists of parts; picture paths start at `images`.

    Raises `FoveateError` that says what is wrong with the record, without naming the record.
    """
    if not isinstance(record, Mapping):
        raise FoveateError("a record must be a JSON object")
    if "conversations" in record:
        turns = [(_role(turn, "from"), turn.get("value")) for turn in _objects(record, "conversations")]
        paths = record.get("image")
    elif "messages" in record:
        turns = [(_role(turn, "role"), turn.get("content")) for turn in _objects(record, "messages")]
        paths = record.get("images")
    else:
        raise FoveateError("it has neither 'conversations' (LLaVA) nor 'messages'")
    given = [paths] if isinstance(paths, str) else paths or []
    if not isinstance(given, list) or not all(isinstance(path, str) for path in given):
        raise FoveateError("its pictures must be given as a path or a list of paths")
    contents = [(role, _parts(role, content)) for role, content in turns]
    places = [part for _, parts in contents for part in parts if part["type"] == "image"]
    open_places = [part for part in places if part["image"] is None]
    if len(open_places) != len(given):
        raise FoveateError(
            f"{len(open_places)} {IMAGE_TOKEN} in its texts for {len(given)} pictures: make the numbers equal"
        )
    for part, path in zip(open_places, given, strict=True):
        part["image"] = path
    for part in places:
        part["image"] = str(images / part["image"])
    if contents[0][0] == "assistant":
        contents = contents[1:]
    _check_turns(contents)
    return [{"role": role, "content": parts} for role, parts in contents]


def _objects(record: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    turns = record[key]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise FoveateError(f"{key!r} must be a list of turns")
    return turns


def _role(turn: Mapping[str, Any], key: str) -> str:
    role = turn.get(key)
    if not isinstance(role, str) or role not in ROLES:
        raise FoveateError(f"{key!r} of a turn is {role!r}: choose one of {', '.join(ROLES)}")
    return ROLES[role]


def _parts(role: str, content: Any) -> list[dict[str, Any]]:
    """A turn's content as parts; pictures not assigned yet have the path None."""
    pieces = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(pieces, list) or not all(isinstance(piece, Mapping) for piece in pieces):
        raise FoveateError("a turn's content must be a text or a list of parts")
    parts: list[dict[str, Any]] = []
    for piece in pieces:
        if piece.get("type") == "image" and isinstance(piece.get("image"), (str, type(None))):
            parts.append({"type": "image", "image": piece.get("image")})
        elif piece.get("type") == "text" and isinstance(piece.get("text"), str):
            parts += _split(piece["text"])
        else:
            raise FoveateError('a part must be {"type": "text", "text"} or {"type": "image", "image"}')
    if role != "user" and any(part["type"] == "image" for part in parts):
        raise FoveateError(
            f"there is a picture or {IMAGE_TOKEN} in a turn of the {role}: only the user shows pictures"
        )
    return parts


def _split(text: str) -> list[dict[str, Any]]:
    """A text split at its image tokens. With only one, the picture comes first and the rest is one text."""
    pieces = text.split(IMAGE_TOKEN)
    picture = {"type": "image", "image": None}
    if len(pieces) == 1:
        return [{"type": "text", "text": text}]
    if len(pieces) == 2:
        rest = "".join(pieces).strip()
        return [picture] + ([{"type": "text", "text": rest}] if rest else [])
    parts: list[dict[str, Any]] = []
    for i, piece in enumerate(pieces):
        parts += [dict(picture)] if i else []
        piece = piece.removeprefix("\n") if i else piece  # chat templates add this line break
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


def _check_turns(contents: list[tuple[str, list[dict[str, Any]]]]) -> None:
    turns = contents[1:] if contents and contents[0][0] == "system" else contents
    for i, (role, _) in enumerate(turns):
        expected = "assistant" if i % 2 else "user"
        if role != expected:
            raise FoveateError(
                f"turn {i + 1} is by the {role}, not the {expected}: user and assistant must alternate"
            )
    if not any(part["text"].strip() for role, parts in turns if role == "assistant" for part in parts):
        raise FoveateError("it has no answer by the assistant, so there is nothing to learn")


def _without_prompt(message: dict[str, Any]) -> dict[str, Any]:
    shown = [part for part in message["content"] if part["type"] == "image"]
    return {**message, "content": shown} if shown else message


def _name(path: Path, place: str, record: Any) -> str:
    has_id = isinstance(record, Mapping) and "id" in record
    return f"{path} {place}" + (f" (id {record['id']})" if has_id else "")


def _lines(path: Path) -> Iterator[tuple[int, int, str, Any]]:
    """Records of a JSONL file: first byte, the one after the last, place for messages, record."""
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield start, start + len(line), f"line {number}", _parse(line, f"{path} line {number}")
            start += len(line)


def _items(path: Path) -> Iterator[tuple[int, int, str, Any]]:
    """Records of a JSON list, parsed one at a time: all together they would take several times the memory."""
    text = path.read_bytes().decode("latin-1")  # a character a byte: positions are byte offsets
    decoder = json.JSONDecoder()
    position = _skip(text, 3 if text.startswith("\xef\xbb\xbf") else 0)
    if text[position : position + 1] != "[":
        raise FoveateError(
            f"{path} should hold a JSON list of records; one record a line goes in a .jsonl file"
        )
    index, separator = 0, "["
    while True:
        position = _skip(text, position + 1)
        if separator == "[" and text[position : position + 1] == "]":
            return
        try:
            record, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise FoveateError(f"{path} line {error.lineno} is not valid JSON: {error.msg}") from None
        except RecursionError:
            raise FoveateError(f"{path} sample {index} is nested too deeply to be a record") from None
        source = text[position:end]
        if not source.isascii():
            record = _parse(source.encode("latin-1"), f"{path} sample {index}")
        yield position, end, f"sample {index}", record
        index, position = index + 1, _skip(text, end)
        separator = text[position : position + 1]
        if separator == "]":
            if _skip(text, position + 1) < len(text):
                raise FoveateError(f"{path} is not valid JSON: there is more after the list's end")
            return
        if separator != ",":
            line = text.count("\n", 0, position) + 1
            raise FoveateError(f"{path} line {line} is not valid JSON: expected a comma or the list's end")


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in BLANKS:
        position += 1
    return position


def _parse(source: bytes, where: str) -> Any:
    try:
        return json.loads(source)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FoveateError(f"{where} is not valid JSON: {error}") from None
    except RecursionError:
        raise FoveateError(f"{where} is nested too deeply to be a record") from None
