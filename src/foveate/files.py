"""Writing: whole or not at all, one writer to a folder, and one sentence where the disk says no.

What is being written has another name, which ends in `.unfinished`. It gets its own when it is complete, so
that a full disk or an interruption leaves what was there before.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from foveate.errors import FoveateError

UNFINISHED = ".unfinished"
LOCK = ".lock"
REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota on this disk is used up",
    errno.EFBIG: "the file is larger than this disk or account allows",
    errno.EROFS: "the disk can only be read",
    errno.EACCES: "there is no permission",
    errno.EPERM: "there is no permission",
    errno.ENAMETOOLONG: "its name is too long",
    errno.ENOTDIR: "a part of its path is a file",
    errno.EIO: "the disk reports an error",
}
# How libraries that write by themselves say that they could not.
WRITERS = (
    *("No space left on device", "Quota exceeded"),  # safetensors
    *("PytorchStreamWriter failed", "iostream error"),  # torch
)


@contextmanager
def explained(place: Path | str) -> Iterator[None]:
    """Turns the errors of a disk, raised while something is written, into a `FoveateError` about `place`."""
    try:
        yield
    except FoveateError:
        raise
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise FoveateError(f"{place} cannot be written: {reason}") from error


def _reason(error: BaseException) -> str | None:
    """Why a disk refused, from an error or what caused it; None if it was no disk."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in REASONS:
            return REASONS[seen.errno]
        if any(text in str(seen) for text in WRITERS):
            return REASONS[errno.ENOSPC]
        if isinstance(seen, ValueError) and "null" in str(seen) and "embedded" in str(seen):
            return "its name holds a NUL character"
        seen = seen.__cause__ or seen.__context__
    return None


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to fill, which becomes `path` when all has gone well, instead of one that was there.

    Raises `FoveateError` if it cannot be written.
    """
    part = path.with_name(path.name + UNFINISHED)
    with explained(path):
        try:
            yield part
            os.replace(part, path)
        except BaseException:
            with suppress(OSError, ValueError):
                part.unlink()
            raise


def write(path: Path, content: str | bytes) -> None:
    """Writes a file as `new_file` does; its content is on the disk before it has its name."""
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    with new_file(path) as part, part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path, otherwise: str) -> Any:
    """The content of a file that this library wrote.

    Raises `FoveateError` if it is torn or cannot be read; `otherwise` says what to do then.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise FoveateError(f"{path} is broken: {otherwise}") from None
    except OSError as error:
        raise FoveateError(f"{path} cannot be read ({error.strerror}): {otherwise}") from error


@contextmanager
def alone(folder: Path, what: Path | None = None) -> Iterator[None]:
    """Exclusive use of a folder, which is made if it is missing; ends with the process that holds it.

    Raises `FoveateError` where another process is writing there; it names `what`, by default the folder.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise FoveateError(
                f"another run is writing {what or folder}: wait for its end, or choose another place"
            ) from None
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when all has gone well.

    Raises:
        FoveateError: `out` exists and is not an empty folder, cannot be written, or another process is making
            it.
    """
    refuse_existing(out)
    part = out.with_name(out.name + UNFINISHED)
    with alone(part, out):
        refuse_existing(out)  # another process may have made it meanwhile
        _empty(part)
        try:
            with explained(out):
                yield part
                (part / LOCK).unlink(missing_ok=True)
                os.replace(part, out)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


@contextmanager
def changed_folder(out: Path, stale: str) -> Iterator[Path]:
    """A folder to fill, whose files then replace those of the same name in `out`.

    Others stay, except those that match the pattern `stale`.
    """
    part = out.with_name(out.name + UNFINISHED)
    with alone(part, out):
        _empty(part)
        try:
            with explained(out):
                yield part
                out.mkdir(parents=True, exist_ok=True)
                new = {file.name for file in part.iterdir()} - {LOCK}
                for name in sorted(new):
                    os.replace(part / name, out / name)
                for old in out.glob(stale):
                    if old.name not in new:
                        old.unlink()
        finally:
            shutil.rmtree(part, ignore_errors=True)


def refuse_existing(out: Path) -> None:
    """Raises `FoveateError` unless a new folder can be made at `out`."""
    with explained(out):
        if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
            raise FoveateError(f"{out} exists already: choose a new folder")
        parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise FoveateError(f"{out} cannot be made: {parent} is not a folder that can be written to")


def _empty(folder: Path) -> None:
    """Removes what an interrupted process left."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
