"""Mixtures: the data that a paper trains on, file by file, and what of them is on disk.

A mixture is a YAML file; everything in it is one of the dataclasses below, and unknown keys are errors. Its
paths start from one folder of data, by default `data`, as those of the recipes do.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

from foveate.data.formats import PICTURES, to_messages
from foveate.data.streaming import keyed, lines, listed
from foveate.errors import FoveateError
from foveate.options import build_options
from foveate.shipped import find
from foveate.written import read_yaml

SHOWN = 3  # examples of each kind of problem
WITHOUT = "none"  # the folder of records without a picture
OF_PARTS = ("image", "url", "path")
ELSEWHERE = ("data:", "http:", "https:")  # no paths
ROUNDED = re.compile(r"(\d+(?:\.(\d+))?)([KM])")
UNITS = {"K": 1_000, "M": 1_000_000}


@dataclass(frozen=True)
class Source:
    """Where data come from."""

    home: str  # a data set on the Hugging Face hub, or an address
    licence: str  # as its card or its authors say; it is theirs to change
    pictures: str | None = None  # where its pictures come from, if they are elsewhere


@dataclass(frozen=True)
class DataPart:
    """One file of a mixture."""

    path: str  # below the folder of data: .json or .jsonl
    images: str = ""  # the folder below it that picture paths start from
    records: int | None = None  # in the file that its authors published; null: they gave no such file
    folders: dict[str, int] = field(default_factory=dict)  # records by the folder of their first picture
    kind: Literal["conversations", "regions"] = "conversations"

    def __post_init__(self) -> None:
        for name in (self.path, self.images):
            problem = leaves(name)
            if problem is not None:
                raise FoveateError(f"{name!r} {problem}: paths start from the folder of data")
        if not self.path.endswith((".json", ".jsonl")):
            raise FoveateError(f"path must end in .json or .jsonl, not {self.path!r}")
        for what, count in {"records": self.records, **self.folders}.items():
            if count is not None and count < 0:
                raise FoveateError(f"{what} must not be negative, but is {count}")


@dataclass(frozen=True)
class Row:
    """A row of the paper's table of data."""

    name: str
    sources: list[str]  # keys of the mixture's `sources`
    files: list[DataPart]
    paper: str | None = None  # the paper's count, as it is written there: 558K, 1.2M; null: it gives none
    note: str = ""

    def __post_init__(self) -> None:
        if not self.files:
            raise FoveateError(f"{self.name}: 'files' is empty: name at least one")
        if self.paper is not None:
            rounded(self.paper)


@dataclass(frozen=True)
class MixtureStage:
    """The data of one stage."""

    rows: list[Row]
    paper: str | None = None  # the paper's count of all of them

    def __post_init__(self) -> None:
        if not self.rows:
            raise FoveateError("'rows' is empty: name at least one")
        if self.paper is not None:
            rounded(self.paper)


@dataclass(frozen=True)
class Mixture:
    """What a mixture file says."""

    title: str
    paper: str  # where the paper says so
    sources: dict[str, Source]
    stages: dict[str, MixtureStage]  # named as those of the recipe, in order

    def __post_init__(self) -> None:
        if not self.stages:
            raise FoveateError("'stages' is empty: a mixture needs at least one stage")
        for name, stage in self.stages.items():
            for row in stage.rows:
                unknown = [source for source in row.sources if source not in self.sources]
                if unknown:
                    raise FoveateError(
                        f"stages.{name}: {row.name} names the source {unknown[0]!r}, which 'sources' lacks"
                    )


def load_mixture(mixture: str | Path) -> Mixture:
    """Reads a YAML file, or by name one of Foveate's mixtures.

    Raises `FoveateError` for unreadable files, unknown keys, missing ones and wrong values.
    """
    path = find("mixture", mixture)
    return build_options(Mixture, read_yaml(path, "title, paper, sources, stages"), where=str(path))


def rounded(text: str) -> tuple[float, float]:
    """The least and the greatest number that a paper may write as `text`: 558K, 1.2M."""
    match = ROUNDED.fullmatch(text)
    if match is None:
        raise FoveateError(f"paper: {text!r} is no count: write it as in 558K or 1.2M")
    unit = UNITS[match[3]]
    half = 0.5 * 10 ** -len(match[2] or "") * unit
    return float(match[1]) * unit - half, float(match[1]) * unit + half


def counted(count: int, what: str) -> str:
    """A number of things in words."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def leaves(path: str) -> str | None:
    """Why a path of the data may leave their folder; None if it does not.

    Only its text is looked at: a folder of data may hold links to other disks.
    """
    if "\0" in path:
        return "holds a NUL character"
    if path[:5].lower() == "file:":
        return "is an address on this machine"
    if PurePosixPath(path).is_absolute() or PureWindowsPath(path).drive or path.startswith("\\"):
        return "is an absolute path"
    if ".." in PurePosixPath(path.replace("\\", "/")).parts:
        return "leads out of its folder"
    return None


@dataclass
class FileReport:
    """What a file of a mixture is like on disk.

    Attributes:
        there: whether it exists.
        broken: the sentence about what ended the reading; None if all of it was read.
        records: those that were read.
        folders: records by the folder of their first picture, for the folders that the mixture counts.
        wrong: records that cannot be learnt, and sentences about the first.
        outside: picture paths that leave the folder, and the first.
        missing: pictures that are not there, and the first.
        twice: ids that more than one record has, and the first.
    """

    there: bool = True
    broken: str | None = None
    records: int = 0
    folders: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    wrong_first: list[str] = field(default_factory=list)
    outside: int = 0
    outside_first: list[str] = field(default_factory=list)
    missing: int = 0
    missing_first: list[str] = field(default_factory=list)
    twice: int = 0
    twice_first: list[str] = field(default_factory=list)

    def problems(self, part: DataPart) -> list[str]:
        """One sentence for each thing that is missing or differs."""
        if not self.there:
            return ["the file is missing"]
        found = [] if self.broken is None else [self.broken]
        if self.broken is None and part.records is not None and part.records != self.records:
            found.append(f"{counted(self.records, 'record')}, and {part.records:,} in the published file")
        for folder, count in part.folders.items():
            if self.broken is None and self.folders[folder] != count:
                where = "without a picture" if folder == WITHOUT else f"with pictures in {folder}"
                number = counted(self.folders[folder], "record")
                found.append(f"{number} {where}, and {count:,} in the published file")
        for count, what, first in (
            (self.missing, "missing pictures", self.missing_first),
            (self.outside, "picture paths that leave the folder of data, refused", self.outside_first),
            (self.wrong, "records that cannot be learnt", self.wrong_first),
        ):
            if count:
                more = ", ..." if count > len(first) else ""
                found.append(f"{what} ({count:,}): {', '.join(first)}{more}")
        return found


def check_part(part: DataPart, data: Path, pictures: bool = True) -> FileReport:
    """Reads a file of a mixture record by record, and looks for the pictures that it names.

    Args:
        part: the file.
        data: the folder of data.
        pictures: False does not look for pictures, of which there may be a million.
    """
    report, path = FileReport(), data / part.path
    if not path.is_file():
        report.there = False
        return report
    images = data / part.images
    seen: set[str] = set()
    known: dict[str, bool] = {}
    try:
        for place, record in _records(path, part.kind):
            report.records += 1
            if part.kind == "conversations":
                _look_at(record, f"{path} {place}", part, images, pictures, report, seen, known)
    except FoveateError as error:
        report.broken = str(error)
    return report


def _records(path: Path, kind: str) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".jsonl":
        for _, _, place, record in lines(path):
            yield place, record
        return
    for item in keyed(path) if kind == "regions" else listed(path):
        yield item.place, item.value


def _look_at(
    record: Any,
    where: str,
    part: DataPart,
    images: Path,
    pictures: bool,
    report: FileReport,
    seen: set[str],
    known: dict[str, bool],
) -> None:
    """Adds what one record shows to the report; `known` says which pictures exist."""
    named = _named(record)
    folder = _folder(named, part.folders)
    if folder is not None:
        report.folders[folder] += 1
    name = record.get("id") if isinstance(record, dict) else None
    if isinstance(name, (str, int)):
        if str(name) in seen:
            report.twice += 1
            _note(report.twice_first, repr(name))
        seen.add(str(name))
    for picture in named:
        problem = leaves(picture)
        if problem is not None:
            report.outside += 1
            _note(report.outside_first, f"{picture!r:.80} ({where})")
        elif pictures and picture not in known:
            known[picture] = _exists(images / picture)
            if not known[picture]:
                report.missing += 1
                _note(report.missing_first, f"{images / picture!s:.200} ({where})")
    try:
        to_messages(record, images)
    except FoveateError as error:
        report.wrong += 1
        _note(report.wrong_first, f"{where}: {error}")


def _note(first: list[str], text: str) -> None:
    if len(first) < SHOWN:
        first.append(text)


def _exists(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, say
        return False


def _named(record: Any) -> list[str]:
    """The picture paths of a record, in its own field or in the parts of its turns."""
    if not isinstance(record, dict):
        return []
    found = [path for field in PICTURES for path in _texts(record.get(field))]
    turns = record.get("messages")
    for turn in turns if isinstance(turns, list) else ():
        content = turn.get("content") if isinstance(turn, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and part.get("type") == "image":
                found += [path for field in OF_PARTS for path in _texts(part.get(field))]
    return [path for path in found if not path.startswith(ELSEWHERE)]


def _texts(given: Any) -> list[str]:
    given = given if isinstance(given, list) else [given]
    return [text for text in given if isinstance(text, str)]


def _folder(pictures: Sequence[str], folders: dict[str, int]) -> str | None:
    """The folder of a record's first picture, among those that are counted."""
    if not pictures:
        return WITHOUT
    return next((name for name in folders if pictures[0].startswith(name + "/")), None)


@dataclass(frozen=True)
class RowReport:
    """What a row of a mixture is like on disk."""

    stage: str
    row: Row
    files: dict[str, FileReport]  # by path

    @property
    def records(self) -> int:
        return sum(report.records for report in self.files.values())

    @property
    def whole(self) -> bool:
        """Whether every file is there and was read to its end."""
        return all(report.there and report.broken is None for report in self.files.values())

    @property
    def differs(self) -> bool:
        """Whether the count is not the paper's."""
        if self.row.paper is None or not self.whole:
            return False
        least, most = rounded(self.row.paper)
        return not least <= self.records <= most

    def problems(self) -> list[tuple[str, str]]:
        """The path and one sentence for each thing that is missing or differs."""
        files = self.row.files
        found = [(part.path, text) for part in files for text in self.files[part.path].problems(part)]
        unpublished = any(part.records is None for part in files)
        if self.differs and unpublished:
            found.append(
                (self.row.name, f"{counted(self.records, 'record')}, and {self.row.paper} in the paper")
            )
        return found


def check_mixture(
    mixture: Mixture, data: Path, stages: Sequence[str] = (), pictures: bool = True
) -> list[RowReport]:
    """Compares a mixture, or some of its stages, with what lies in a folder of data. Reads each file once.

    Raises `FoveateError` for a folder or a stage that does not exist.
    """
    if not data.is_dir():
        raise FoveateError(f"there is no folder {data}: give the one that holds the data as --data")
    unknown = [name for name in stages if name not in mixture.stages]
    if unknown:
        raise FoveateError(
            f"the mixture has no stage {unknown[0]!r}: choose from {', '.join(mixture.stages)}"
        )
    done: dict[str, FileReport] = {}
    found = []
    for name in stages or mixture.stages:
        for row in mixture.stages[name].rows:
            files = {}
            for part in row.files:
                key = f"{part.path} {part.images}"
                done[key] = done[key] if key in done else check_part(part, data, pictures)
                files[part.path] = done[key]
            found.append(RowReport(name, row, files))
    return found
