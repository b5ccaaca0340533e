"""Files of conversations -> messages, checked while they are read.

Two kinds of record, in a JSON list (`.json`), one a line (`.jsonl`) or in shards (`foveate.data.shards`):

    LLaVA     {"id", "image": path or paths, "conversations": [{"from": "human" | "gpt", "value": text}]}
    messages  {"messages": [{"role", "content": text or parts}], "images": paths}
              parts are {"type": "text", "text"} and {"type": "image", "image": path}

Either kind may give its pictures as `image` or `images`, and a first turn as `system`. A picture is a path,
a `file://` or a `data:` URL, or in the record of a shard its bytes; a part may name it `url`, `path` or
`base64`, too. A turn with `"loss": false` or `"weight": 0` is shown and not learnt. Fields that would be
dropped although they are part of the sample (videos, tools, misspelt names of the fields above) are errors;
any other field is ignored.

In a user's text, `<image>` stands for the next path in `image` or `images`; so does a part {"type": "image"}
without a path. As in LLaVA's own training, a single picture moves to the front of its message, and a first
turn by the assistant is dropped.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np

from foveate.data.shards import OnHub, Rows, is_shards, open_rows
from foveate.data.streaming import lines, listed
from foveate.errors import FoveateError
from foveate.methods.base import IMAGE_TOKEN
from foveate.model.text import checked_part, decoded, kind_of

ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
NEWLINE = b"\n"
TURNS = ("conversations", "messages")
PICTURES = ("image", "images")
# What cannot be learnt, and what a chat template would write but nothing here renders.
UNREAD = ("video", "videos", "audio", "audios", "tools", "functions")
UNREAD_IN_TURNS = ("video", "videos", "audio", "audios", "image", "images", "tool_calls", "function_call")
# Other people's names for the fields that are read, beside misspelt ones.
ALIASES = {
    "conversations": ("conversation", "dialog", "dialogue", "chat", "turns"),
    "image": ("picture", "pictures", "img", "imgs", "photo", "image_path", "image_paths", "image_file"),
    "system": ("system_prompt", "system_message"),
}
LEARNT = ("loss", "weight")  # of a turn
UNLEARNT = ("train", "learn", "mask", "loss_mask", "loss_weight", "train_on_turn", "weights")
LONGEST_PATH = 4096  # characters; longer ones are pictures in base64
SHOWN = 80  # characters of an id in messages
HOW_TO_CONVERT = {
    ".csv": "from_csv",
    ".arrow": "from_file",
}


@dataclass(frozen=True)
class JsonRows:
    """The records of a JSON or JSONL file, which stay on disk.

    Attributes:
        path: the file.
        spans: (R, 2) int64, the first byte of each record and the one after its last.
    """

    path: Path
    spans: np.ndarray

    def __len__(self) -> int:
        return len(self.spans)

    def place(self, index: int) -> tuple[Path, str]:
        if self.path.suffix != ".jsonl":
            return self.path, f"sample {index}"
        with self.path.open("rb") as file:
            return self.path, f"line {file.read(int(self.spans[index, 0])).count(NEWLINE) + 1}"

    def record(self, index: int) -> Any:
        start, end = (int(n) for n in self.spans[index])
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                record = json.loads(file.read(end - start))
        except (OSError, ValueError, RecursionError):
            record = None
        if not isinstance(record, Mapping):
            raise FoveateError(f"{self.path} has changed since it was checked: start again")
        return record


@dataclass(frozen=True)
class Conversations:
    """Checked data.

    Attributes:
        path: the file, or the folder or pattern of several.
        images: folder that picture paths start from.
        prompts: False leaves out the user's text in messages with a picture.
        rows: its records.
        pictures: (R,) int64, number of pictures of each record.
        digest: of the records, with the sizes of pictures in them; of JSON, of the file.
    """

    path: Path
    images: Path
    prompts: bool
    rows: Rows
    pictures: np.ndarray
    digest: str

    def __len__(self) -> int:
        return len(self.rows)

    def messages(self, index: int) -> list[dict[str, Any]]:
        """The conversation of a record, as `FoveateProcessor.apply_chat_template` accepts it."""
        messages = to_messages(self.rows.record(index), self.images)
        return messages if self.prompts else [_without_prompt(message) for message in messages]

    def id(self, index: int) -> str:
        """A record's `id`; its place in the data if it has none."""
        return str(self.rows.record(index).get("id", index))

    def where(self, index: int) -> str:
        """A record's name in messages: its file, its place there, its id."""
        return record_name(*self.rows.place(index), self.rows.record(index))


def read_conversations(
    path: str | Path | OnHub, images: str | Path | None = None, prompts: bool = True
) -> Conversations:
    """Reads and checks conversations; does not check that their pictures exist.

    Args:
        path: `.jsonl` with one record a line, or `.json` with a list of records; or shards, as
            `foveate.data.shards` reads them: `.tar`, `.parquet`, a name with `*`, a folder of them, or a data
            set on the hub.
        images: folder that picture paths start from; by default the file's own.
        prompts: False leaves out the user's text in messages with a picture.

    Raises:
        FoveateError: no such file, broken JSON, roles out of turn, a wrong number of `<image>`, no records;
            the message names the record.
    """
    pictures: list[int] = []

    def note(record: Any, index: int, where: str, folder: Path) -> None:
        messages = to_messages(record, folder)
        pictures.append(sum(part["type"] == "image" for m in messages for part in m["content"]))

    data = path if isinstance(path, OnHub) else Path(path)
    found = open_records(data, None if images is None else Path(images), note)
    counts = np.array(pictures, dtype=np.int64)
    return Conversations(found.path, found.images, prompts, found.rows, counts, found.digest)


@dataclass(frozen=True)
class Records:
    """Data of any kind that is read, with each record checked.

    Attributes:
        path: the file, or the folder or pattern of several.
        images: folder that picture paths start from.
        rows: its records.
        digest: of the records, with the sizes of pictures in them; of JSON, of the file.
    """

    path: Path
    images: Path
    rows: Rows
    digest: str


def open_records(
    data: Path | OnHub, images: Path | None, check: Callable[[Any, int, str, Path], None]
) -> Records:
    """Reads data once, and calls `check` with each record, its number, its name and the pictures' folder.

    Raises:
        FoveateError: no such file, broken JSON, no records, what `check` raises with the record's name.
    """
    shards = isinstance(data, OnHub) or is_shards(data)
    path = Path(data.name) if isinstance(data, OnHub) else data if shards else _data_file(data)
    folder = images if images is not None else path if _is(path, Path.is_dir) else path.parent
    if not _is(folder, Path.is_dir) and not (isinstance(data, OnHub) and images is None):
        raise FoveateError(f"{path}: there is no folder {folder} for its pictures")
    rows = data.open() if isinstance(data, OnHub) else open_rows(path) if shards else None
    digest = hashlib.sha256()
    spans: list[tuple[int, int]] = []
    for start, end, (file, place), record in _each(path) if rows is None else _each_row(rows):
        where = record_name(file, place, record)
        try:
            check(record, len(spans), where, folder)
        except FoveateError as error:
            raise FoveateError(f"{where}: {error}") from None
        spans.append((start, end))
        if rows is not None:
            digest.update(repr(_with_sizes(record)).encode("utf-8", "surrogatepass"))
    if not spans:
        raise FoveateError(f"{path} holds no samples")
    if rows is None:
        rows = JsonRows(path, np.array(spans, dtype=np.int64))
        with path.open("rb") as content:
            while block := content.read(2**20):
                digest.update(block)
    return Records(path, folder, rows, digest.hexdigest())


def _each(path: Path) -> Iterator[tuple[int, int, tuple[Path, str], Any]]:
    """Records of a JSON file: first byte, the one after the last, file and place for messages, record."""
    if path.suffix == ".jsonl":
        for start, end, place, record in lines(path):
            yield start, end, (path, place), record
        return
    for item in listed(path):
        yield item.start, item.end, (path, item.place), item.value


def _each_row(rows: Rows) -> Iterator[tuple[int, int, tuple[Path, str], Any]]:
    for index in range(len(rows)):
        yield index, index + 1, rows.place(index), rows.record(index)


def _with_sizes(value: Any) -> Any:
    """A record with the length of each picture in place of its bytes."""
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, Mapping):
        return {key: _with_sizes(inner) for key, inner in value.items()}
    return [_with_sizes(inner) for inner in value] if isinstance(value, list) else value


def _data_file(given: str | Path) -> Path:
    """The path of a data file. Raises `FoveateError` if it cannot be one."""
    path = Path(given)
    if _is(path, Path.is_dir):
        raise FoveateError(f"{path} is a folder: name the .json or .jsonl file in it")
    if not _is(path, Path.is_file):
        raise FoveateError(f"no data file at {path}")
    if path.suffix not in (".json", ".jsonl"):
        read = HOW_TO_CONVERT.get(path.suffix.lower())
        hint = ""
        if read is not None:
            made = path.with_suffix(".jsonl").name
            hint = f"; convert it with datasets.Dataset.{read}({path.name!r}).to_json({made!r})"
        raise FoveateError(
            f"{path} must end in .json (a list of records) or .jsonl (one record a line){hint}"
        )
    try:
        with path.open("rb") as file:
            first = file.read(4)
    except OSError as error:
        raise FoveateError(f"{path} cannot be read: {error.strerror}") from None
    if first[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in first:
        raise FoveateError(f"{path} is not UTF-8 but looks like UTF-16: save it as UTF-8")
    return path


def _is(path: Path, kind: Callable[[Path], bool]) -> bool:
    try:
        return kind(path)
    except (OSError, ValueError):  # a name that is too long, say
        return False


def to_messages(record: Any, images: Path) -> list[dict[str, Any]]:
    """A record of either kind as messages whose contents are lists of parts; picture paths start at `images`.

    A picture is a path, or bytes if the record holds it. Turns that are not learnt have "loss": False.
    Raises `FoveateError` that says what is wrong with the record, without naming the record.
    """
    if not isinstance(record, Mapping):
        raise FoveateError("a record must be a JSON object")
    kind, given = _turns_key(record), _given_pictures(record)
    _refuse_unread(record, UNREAD, "it")
    role, text = ("from", "value") if kind == "conversations" else ("role", "content")
    turns = [(_role(turn, role), turn.get(text), _learnt(turn, role)) for turn in _objects(record, kind)]
    if record.get("system"):
        if not isinstance(record["system"], str):
            raise FoveateError(f"'system' must be a text, not {kind_of(record['system'])}")
        if turns[0][0] == "system":
            raise FoveateError("it has 'system' and a first turn by the system: keep one of them")
        turns.insert(0, ("system", record["system"], True))
    contents = [(role, _parts(role, content), learnt) for role, content, learnt in turns]
    places = [part for _, parts, _ in contents for part in parts if part["type"] == "image"]
    shown = bool(given) or any(part["image"] is not None for part in places)
    _refuse_near_misses(record, shown, contents[0][0] == "system")
    open_places = [part for part in places if part["image"] is None]
    if len(open_places) != len(given):
        raise FoveateError(
            f"{len(open_places)} {IMAGE_TOKEN} in its texts for {len(given)} pictures: make the numbers equal"
        )
    for part, path in zip(open_places, given, strict=True):
        part["image"] = path
    for part in places:
        part["image"] = located(part["image"], images)
    if contents[0][0] == "assistant":
        contents = contents[1:]
    _check_turns(contents)
    return [
        {"role": role, "content": parts, **({} if learnt else {"loss": False})}
        for role, parts, learnt in contents
    ]


def _turns_key(record: Mapping[str, Any]) -> str:
    """Which field has a record's turns."""
    found = [key for key in TURNS if record.get(key) is not None]
    if len(found) == 1:
        return found[0]
    if found:
        raise FoveateError("it has 'conversations' and 'messages': keep one of them")
    null = [key for key in TURNS if key in record]
    if null:
        raise FoveateError(f"{null[0]!r} must be a list of turns, not null")
    near = _near(record, TURNS)
    hint = f"; did you mean {near[1]!r} by {near[0]!r}?" if near else ""
    raise FoveateError(f"it has neither 'conversations' (LLaVA) nor 'messages'{hint}")


def _given_pictures(record: Mapping[str, Any]) -> list[str | bytes]:
    """The pictures of a record's own field, for the `<image>` of its texts."""
    found = [key for key in PICTURES if record.get(key) is not None]
    if len(found) > 1 and record["image"] != record["images"]:
        raise FoveateError("it has 'image' and 'images': keep one of them")
    if not found:
        return []
    given = record[found[0]]
    given = [given] if isinstance(given, (str, bytes)) else given
    if not isinstance(given, list) or not all(isinstance(path, (str, bytes)) for path in given):
        raise FoveateError(f"{found[0]!r}: its pictures must be given as a path or a list of paths")
    if not all(path.strip() for path in given):
        raise FoveateError(f"{found[0]!r} is an empty text: give a path, or leave the field out")
    return given


def _refuse_unread(place: Mapping[str, Any], names: Iterable[str], whose: str) -> None:
    """Raises `FoveateError` if a record or turn has a field whose content would be dropped."""
    for name in names:
        if place.get(name):
            what = (
                "pictures go beside the turns or in parts" if name in PICTURES else "only text and pictures"
            )
            how = f"{what}: move it there" if name in PICTURES else f"{what} are learnt: leave the record out"
            raise FoveateError(f"{whose} has {name!r}, which is not read; {how}")


def _refuse_near_misses(record: Mapping[str, Any], pictures: bool, system: bool) -> None:
    """Raises `FoveateError` if a field that would be ignored looks like one that the record lacks."""
    near = _near(record, (() if pictures else PICTURES) + (() if system else ("system",)))
    if near:
        raise FoveateError(f"it has {near[0]!r}, which is not read; did you mean {near[1]!r}?")


def _near(record: Mapping[str, Any], wanted: Iterable[str]) -> tuple[str, str] | None:
    """A field of a record with a name like a wanted one, and that; empty fields do not count."""
    known = {name: name for name in wanted}
    known |= {alias: name for name in known for alias in ALIASES.get(name, ())}
    for key, value in record.items():
        if key in (*TURNS, *PICTURES, "system") or value in (None, "", [], {}):
            continue
        found = difflib.get_close_matches(key.strip().lower(), known, n=1, cutoff=0.85)
        if found:
            return key, known[found[0]]
    return None


def _objects(record: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    turns = record[key]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise FoveateError(f"{key!r} must be a list of turns")
    return turns


def _role(turn: Mapping[str, Any], key: str) -> str:
    role = turn.get(key)
    if not isinstance(role, str) or role not in ROLES:
        raise FoveateError(f"{key!r} of a turn is {role!r:.80}: choose one of {', '.join(ROLES)}")
    return ROLES[role]


def _learnt(turn: Mapping[str, Any], key: str) -> bool:
    """Whether a turn is learnt, as its `loss` or `weight` says; by default the assistant's are."""
    _refuse_unread(turn, UNREAD_IN_TURNS, "a turn")
    assistant, said = _role(turn, key) == "assistant", set()
    for name in UNLEARNT:
        if turn.get(name) is not None:
            raise FoveateError(f'a turn has {name!r}, which is not read: write "loss": true or false')
    for name in LEARNT:
        value = turn.get(name)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            wanted = "true or false" if name == "loss" else "0 or 1"
            raise FoveateError(f"{name!r} of a turn is {value!r:.80}: give {wanted}")
        if value and not assistant:
            raise FoveateError(f"{name!r} of a turn is {value!r}, but only the assistant's turns are learnt")
        said.add(bool(value))
    if len(said) > 1:
        raise FoveateError("'loss' and 'weight' of a turn disagree: keep one of them")
    return not assistant or said != {False}


def _parts(role: str, content: Any) -> list[dict[str, Any]]:
    """A turn's content as parts; pictures not assigned yet have the path None."""
    pieces = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(pieces, list) or not all(isinstance(piece, Mapping) for piece in pieces):
        raise FoveateError("a turn's content must be a text or a list of parts")
    parts: list[dict[str, Any]] = []
    for piece in pieces:
        part = checked_part(piece)
        if part["type"] == "text":
            parts += _split(part["text"])
        elif isinstance(part.get("image"), (str, bytes, type(None))) and part.get("image") != "":
            parts.append({"type": "image", "image": part.get("image")})
        else:
            raise FoveateError("a part must give its picture as a path")
    if role != "user" and any(part["type"] == "image" for part in parts):
        raise FoveateError(
            f"there is a picture or {IMAGE_TOKEN} in a turn of the {role}: only the user shows pictures"
        )
    return parts


def located(picture: str | bytes, images: Path) -> str | bytes:
    """A picture's path, from the folder of pictures on, or its bytes. Raises `FoveateError` for others."""
    if isinstance(picture, bytes):
        return picture
    scheme = picture[:8].partition(":")[0].lower()
    if scheme == "data":
        head, comma, body = picture.partition(",")
        if not comma or not head.endswith(";base64"):
            raise FoveateError(f"{picture[:60]!r} is not a picture: a data: URL needs ;base64, and its data")
        return decoded(body)
    if scheme in ("http", "https"):
        raise FoveateError(f"{picture[:200]} is not fetched: download it and give its path")
    if len(picture) > LONGEST_PATH:
        raise FoveateError(
            f"a picture's path has {len(picture)} characters; a picture in base64 starts with "
            "data:image/png;base64,"
        )
    if scheme == "file":
        parts = urlsplit(picture)
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise FoveateError(f"{picture[:200]}: write file:/// before an absolute path")
        return url2pathname(parts.path)
    return str(images / picture)


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


def _check_turns(contents: list[tuple[str, list[dict[str, Any]], bool]]) -> None:
    turns = contents[1:] if contents and contents[0][0] == "system" else contents
    for i, (role, _, _) in enumerate(turns):
        expected = "assistant" if i % 2 else "user"
        if role != expected:
            raise FoveateError(
                f"turn {i + 1} is by the {role}, not the {expected}: user and assistant must alternate"
            )
    answers = [
        learnt
        for role, parts, learnt in turns
        if role == "assistant" and any(part["text"].strip() for part in parts)
    ]
    if not answers:
        raise FoveateError("it has no answer by the assistant, so there is nothing to learn")
    if not any(answers):
        raise FoveateError("no answer of it is learnt, as 'loss' or 'weight' say: leave the record out")


def _without_prompt(message: dict[str, Any]) -> dict[str, Any]:
    shown = [part for part in message["content"] if part["type"] == "image"]
    return {**message, "content": shown} if shown else message


def record_name(path: Path, place: str, record: Any) -> str:
    has_id = isinstance(record, Mapping) and isinstance(record.get("id"), (str, int, float))
    if not has_id:
        return f"{path} {place}"
    name = str(record["id"]).encode("utf-8", "backslashreplace").decode()
    return f"{path} {place} (id {name if len(name) <= SHOWN else name[:SHOWN] + '...'})"
