"""Records that hold their pictures: WebDataset's tar shards, Parquet files, and data sets of `datasets`.

A tar shard is read in place: its index knows where each member begins. Parquet cannot be read row by row, so
`datasets` converts it once, to a file in its cache from which any row is read. A data set on the hub comes
through the same cache: all of it, or the first rows of its stream.
"""

from __future__ import annotations

import json
import tarfile
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from foveate.errors import FoveateError, first_line, require

TAR, PARQUET = (".tar",), (".parquet",)
PICTURES = ("image", "images")
DRAWN = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic")  # members with pictures
SAVED = "dataset_info.json"  # `save_to_disk` writes it
CHANGED = "has changed since it was checked: start again"


class Rows(Protocol):
    """Records by their number."""

    def __len__(self) -> int: ...

    def record(self, index: int) -> Any:
        """A record; its pictures may be bytes."""

    def place(self, index: int) -> tuple[Path, str]:
        """Its file, and its place there, as messages name it."""


def is_shards(path: Path) -> bool:
    """Whether a path names what `open_rows` reads; it need not exist."""
    return bool(_kinds(path)) or _is_saved(path)


def is_tar(path: Path) -> bool:
    """Whether a path names tar shards."""
    return _kinds(path) == {*TAR}


def parquet_files(path: Path) -> list[str]:
    """The Parquet files that a path names; empty if it names anything else."""
    return [str(file) for file in _files(path)] if _kinds(path) == {*PARQUET} else []


def open_rows(path: Path) -> Rows:
    """The records of a shard, of all that a name with `*` matches, or of a folder's shards.

    Raises:
        FoveateError: no shard, shards of several kinds, a broken one, a missing package.
    """
    if _is_saved(path):
        return TableRows.saved(path)
    files, kinds = _files(path), _kinds(path)
    if not files or not all(file.is_file() for file in files):
        raise FoveateError(f"no data file at {path}")
    if kinds == {*TAR}:
        return TarRows(files)
    if kinds == {*PARQUET}:
        return TableRows.parquet(files)
    raise FoveateError(f"{path}: shards must be of one kind, .tar or .parquet")


def _files(path: Path) -> list[Path]:
    """The files that a path names, in order; of a folder, its shards."""
    if "*" in path.name:
        return sorted(path.parent.glob(path.name))
    try:
        folder = path.is_dir()
    except (OSError, ValueError):  # a name that is too long, say
        return []
    return sorted(f for f in path.iterdir() if f.suffix.lower() in TAR + PARQUET) if folder else [path]


def _kinds(path: Path) -> set[str]:
    """The endings of the shards that a path names."""
    return {file.suffix.lower() for file in _files(path)} & {*TAR, *PARQUET}


def _is_saved(path: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    try:
        return (path / SAVED).is_file()
    except (OSError, ValueError):
        return False


class Member(NamedTuple):
    """A file in a tar shard: its name after the sample's, its first byte and its length."""

    ending: str
    start: int
    size: int


@dataclass(frozen=True)
class OnHub:
    """A data set on the Hugging Face hub, or in a folder that `datasets.load_dataset` reads.

    Attributes:
        name: its id, or the folder.
        split: which part of it.
        subset: its configuration, where it has several.
        revision: branch, tag or commit; by default main.
        first: read only this number of rows. They are streamed, so that no more of a data set on the hub is
            downloaded than their files hold.
    """

    name: str
    split: str
    subset: str | None = None
    revision: str | None = None
    first: int | None = None

    def open(self) -> TableRows:
        """Its rows. Raises `FoveateError` if it cannot be read."""
        datasets = _datasets(Path(self.name))
        from huggingface_hub.errors import HfHubHTTPError

        try:
            table = self._stored() if self._streams() else self._whole()
        except (OSError, ValueError, LookupError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
            raise FoveateError(f"{self.name} cannot be read as a dataset: {first_line(error)}") from error
        return TableRows(table, [(Path(self.name), len(table))])

    def _streams(self) -> bool:
        return self.first is not None and not Path(self.name).is_dir()

    def _whole(self) -> Any:
        import datasets

        table = datasets.load_dataset(self.name, self.subset, split=self.split, revision=self.revision)
        return table if self.first is None else table.select(range(min(self.first, len(table))))

    def _stored(self) -> Any:
        """The first rows, from the cache of `datasets` if this commit's have been read before."""
        import datasets
        from huggingface_hub import HfApi

        stream = _stream(self.name, self.subset, self.split, self.revision)
        commit = HfApi().dataset_info(self.name, revision=self.revision).sha
        asked = {"name": self.name, "subset": self.subset, "split": self.split, "revision": commit}
        return datasets.Dataset.from_generator(
            _first_rows, features=stream.features, gen_kwargs={**asked, "first": self.first}
        )


def _stream(name: str, subset: str | None, split: str, revision: str | None) -> Any:
    """The rows one after another, pictures as their bytes."""
    import datasets

    return datasets.load_dataset(name, subset, split=split, revision=revision, streaming=True).decode(False)


def _first_rows(
    name: str, subset: str | None, split: str, revision: str | None, first: int
) -> Iterator[dict[str, Any]]:
    yield from _stream(name, subset, split, revision).take(first)


class TarRows:
    """WebDataset's shards: members with the same name up to the first dot are one sample.

    Its `json` is the record, its pictures are the record's, in the tar's order. If the record names pictures,
    too, it names as many.

    Args:
        files: the shards, in order.

    Raises:
        FoveateError: a broken tar, a sample without `json`.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.samples: list[tuple[Path, str, list[Member]]] = []
        for file in files:
            self.samples += _indexed(file)

    def __len__(self) -> int:
        return len(self.samples)

    def place(self, index: int) -> tuple[Path, str]:
        file, name, _ = self.samples[index]
        return file, f"sample {name}"

    def record(self, index: int) -> Any:
        file, name, members = self.samples[index]
        where = f"{file} sample {name}"
        with _readable(file), file.open("rb") as tar:
            found = {member: _content(tar, member) for member in members}
        texts = [data for member, data in found.items() if member.ending == "json"]
        if len(texts) != 1:
            raise FoveateError(f"{where}: it has {len(texts)} members .json: one must hold its conversation")
        try:
            record = json.loads(texts[0])
        except (ValueError, RecursionError):
            raise FoveateError(f"{where}: its .json is not valid JSON") from None
        pictures = [data for m, data in found.items() if m.ending.rpartition(".")[2] in DRAWN]
        return _holding(record, pictures, where) if isinstance(record, Mapping) else record


def _indexed(file: Path) -> list[tuple[Path, str, list[Member]]]:
    samples: dict[str, list[Member]] = {}
    with _readable(file), tarfile.open(file, "r:") as tar:
        for member in tar:
            if not member.isfile():
                continue
            folder, slash, base = member.name.rpartition("/")
            name, _, ending = base.partition(".")
            if name:  # others are a system's own
                place = Member(ending.lower(), member.offset_data, member.size)
                samples.setdefault(folder + slash + name, []).append(place)
    return [(file, name, members) for name, members in samples.items()]


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turns what a missing or broken shard raises into a `FoveateError`."""
    try:
        yield
    except (tarfile.TarError, EOFError) as error:
        raise FoveateError(f"{file} is not a tar file that is whole and not compressed") from error
    except OSError as error:
        raise FoveateError(f"{file} cannot be read: {error.strerror}") from error


def _content(tar: Any, member: Member) -> bytes:
    tar.seek(member.start)
    data = tar.read(member.size)
    if len(data) != member.size:
        raise FoveateError(f"{tar.name} {CHANGED}")
    return data


def _holding(record: Mapping[str, Any], pictures: list[bytes], where: str) -> dict[str, Any]:
    """A record with the pictures beside it in place of their names."""
    named = next((record[key] for key in PICTURES if record.get(key) is not None), None)
    count = len(named) if isinstance(named, list) else 1
    if pictures and named is not None and count != len(pictures):
        raise FoveateError(f"{where}: its .json names {count} pictures, the shard has {len(pictures)}")
    if not pictures:
        return dict(record)
    rest = {key: value for key, value in record.items() if key not in PICTURES}
    return {**rest, "images": pictures}


class TableRows:
    """The rows of a data set of `datasets`, whose columns are a record's fields.

    Args:
        table: the data set.
        files: the file that each row is from: the file, and the number of its rows.
    """

    def __init__(self, table: Any, files: Sequence[tuple[Path, int]]) -> None:
        self.table = table.with_format("arrow")
        self.files = [file for file, _ in files]
        self.ends = list(accumulate(rows for _, rows in files))

    @classmethod
    def saved(cls, folder: Path) -> TableRows:
        """From a folder that `save_to_disk` wrote."""
        datasets = _datasets(folder)
        try:
            table = datasets.load_from_disk(str(folder))
        except (OSError, ValueError, KeyError) as error:
            raise FoveateError(f"{folder} cannot be read as a dataset: {first_line(error)}") from error
        return cls(table, [(folder, len(table))])

    @classmethod
    def parquet(cls, files: Sequence[Path]) -> TableRows:
        """From Parquet files."""
        datasets = _datasets(files[0])
        import pyarrow as pa
        from pyarrow import parquet

        counts = []
        for file in files:
            try:
                counts.append((file, parquet.read_metadata(file).num_rows))
            except (OSError, pa.ArrowException) as error:
                raise FoveateError(f"{file} is not a Parquet file: {first_line(error)}") from error
        try:
            table = datasets.load_dataset("parquet", data_files=[str(f) for f in files], split="train")
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise FoveateError(f"{files[0]} cannot be read as a dataset: {first_line(error)}") from error
        return cls(table, counts)

    def __len__(self) -> int:
        return len(self.table)

    def place(self, index: int) -> tuple[Path, str]:
        number = bisect_right(self.ends, index)
        first = self.ends[number - 1] if number else 0
        return self.files[number], f"row {index - first}"

    def record(self, index: int) -> Any:
        (row,) = self.table[index : index + 1].to_pylist()
        return {key: _plain(value) for key, value in row.items() if value is not None}


def _datasets(data: Path) -> Any:
    for package in ("datasets", "pyarrow"):
        require(package, "annotate", str(data))
    import datasets

    return datasets


def _plain(value: Any) -> Any:
    """A column's value as JSON would have it: pictures as bytes or paths, without the nulls of structs."""
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"bytes", "path"}:
        return value["bytes"] if value["bytes"] is not None else value["path"]
    return {key: _plain(inner) for key, inner in value.items() if inner is not None}
