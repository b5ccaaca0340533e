"""The records of a source's files, with their places."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from foveate.data.shards import open_rows
from foveate.data.smr.drafts import Fields
from foveate.data.streaming import keyed, lines, listed
from foveate.errors import FoveateError


def first_of(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first of some files or folders, or names with `*`, that exists below a folder."""
    for name in names:
        if "*" in name:
            if any(folder.glob(name)):
                return folder / name
        elif (folder / name).exists():
            return folder / name
    return None


def required(folder: Path, names: tuple[str, ...]) -> Path:
    found = first_of(folder, names)
    if found is None:
        raise FoveateError(f"{folder} has no {' or '.join(names)}: unpack the data set as it was published")
    return found


def of_list(path: Path) -> Iterator[Fields]:
    for item in listed(path):
        yield Fields(item.value, f"{path} {item.place}")


def of_lines(path: Path) -> Iterator[Fields]:
    for _, _, place, record in lines(path):
        yield Fields(record, f"{path} {place}")


def of_object(path: Path) -> Iterator[tuple[str, Fields]]:
    """Records with their keys."""
    for item in keyed(path):
        yield str(item.key), Fields(item.value, f"{path} {item.place}")


def of_file(path: Path) -> Fields:
    """The one record of a file."""
    try:
        record = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise FoveateError(f"{path} is not UTF-8 at byte {error.start}: save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise FoveateError(f"{path} line {error.lineno} is not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError):
        raise FoveateError(f"{path} is not a record that can be read") from None
    except OSError as error:
        raise FoveateError(f"{path} cannot be read: {error.strerror}") from error
    return Fields(record, str(path))


def of_table(path: Path) -> Iterator[tuple[int, Fields]]:
    """Rows of Parquet files with their numbers; pictures are bytes."""
    rows = open_rows(path)
    for index in range(len(rows)):
        file, place = rows.place(index)
        yield index, Fields(rows.record(index), f"{file} {place}")


def by_number(paths: Iterator[Path]) -> list[Path]:
    """Paths in the order of the numbers that they are named by; others come last."""
    return sorted(paths, key=lambda path: (not path.stem.isdecimal(), path.stem.zfill(12)))
