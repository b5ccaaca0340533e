"""JSON, record by record: a file of any size takes the memory of its longest record.

A file is read in blocks as latin-1, a character a byte, so that places in the text are places in the file. A
record is parsed as soon as all of it has been read; one with other characters than ASCII is parsed again, as
UTF-8.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from foveate.errors import FoveateError

BLOCK = 2**20  # bytes that are read at once
LONGEST = 2**28  # bytes of a record
NEAR = 16  # characters before the end of what has been read, in which a literal may be cut
BLANKS = " \t\r\n"
ENDS = (*BLANKS, ",", "]", "}", ":")  # what follows a value
HUGE = "has a number of thousands of digits: write it as a text"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Item(NamedTuple):
    """A record of a JSON list or of a JSON object.

    Attributes:
        start: its first byte in the file.
        end: the byte after its last.
        number: its place among them, from 0.
        key: in an object, the record's key.
        value: what it says.
    """

    start: int
    end: int
    number: int
    key: str | None
    value: Any

    @property
    def place(self) -> str:
        """Its place in the file, as messages name it."""
        return f"sample {self.number}" if self.key is None else f"record {self.key!r:.80}"


def listed(path: Path) -> Iterator[Item]:
    """The records of a JSON list. Raises `FoveateError` with the place of what is wrong."""
    with _opened(path) as file:
        window = _Window(file, path)
        if window.peek() != "[":
            raise FoveateError(
                f"{path} should hold a JSON list of records; one record a line goes in a .jsonl file"
            )
        yield from _entries(window)


def keyed(path: Path) -> Iterator[Item]:
    """The records of a JSON object with their keys. Raises `FoveateError` as `listed` does."""
    with _opened(path) as file:
        window = _Window(file, path)
        if window.peek() != "{":
            raise FoveateError(f"{path} should hold a JSON object with a record behind each key")
        yield from _entries(window)


def lines(path: Path) -> Iterator[tuple[int, int, str, Any]]:
    """Records of a JSONL file: first byte, the one after the last, place for messages, record."""
    start = 0
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            content = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
            if content.strip():
                if start == 0 and content.lstrip().startswith(b"["):
                    raise FoveateError(
                        f"{path} line {number} begins a JSON list: give the file the ending .json"
                    )
                record = parse(content, f"{path} line {number}")
                yield start + len(line) - len(content), start + len(line), f"line {number}", record
            start += len(line)


def parse(source: bytes, where: str) -> Any:
    """One record. Raises `FoveateError` that begins with `where`."""
    try:
        return json.loads(source.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise FoveateError(f"{where} is not UTF-8 at byte {error.start}: save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        place = f"{error.msg} at character {error.pos + 1}"
        raise FoveateError(f"{where} is not valid JSON: {place}; a record takes one line") from None
    except ValueError:
        raise FoveateError(f"{where} {HUGE}") from None
    except RecursionError:
        raise FoveateError(f"{where} is nested too deeply to be a record") from None


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise FoveateError(f"{path} cannot be read: {error.strerror}") from error
    with file:
        yield file


class _Window:
    """The part of a file that is being parsed. It grows to the right, and is cut off at the left."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self.file, self.path = file, path
        self.text, self.at = "", 0  # what is read, and the place in it
        self.start, self.line = 0, 1  # of the text, in the file
        self.ended = False
        self.decoder = json.JSONDecoder()
        self.grow()
        if self.text.startswith(BYTE_ORDER_MARK.decode("latin-1")):
            self.at = len(BYTE_ORDER_MARK)

    def grow(self) -> None:
        """Reads on, as much again as there is, and drops what has been parsed."""
        if self.at:
            self.line += self.text.count("\n", 0, self.at)
            self.start, self.text, self.at = self.start + self.at, self.text[self.at :], 0
        block = self.file.read(max(BLOCK, len(self.text)))
        self.ended = not block
        self.text += block.decode("latin-1")

    def peek(self) -> str:
        """The next character that is not blank; empty at the file's end."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in BLANKS:
                    return self.text[self.at]
                self.at += 1
            if self.ended:
                return ""
            self.grow()

    def value(self, place: str) -> tuple[int, int, Any]:
        """First byte, the one after the last, and what lies between them as JSON."""
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - NEAR
                if self.ended or not cut:
                    line = self.line + self.text.count("\n", 0, error.pos)
                    raise FoveateError(f"{self.path} line {line} is not valid JSON: {error.msg}") from None
            except ValueError:
                raise FoveateError(f"{self.path} {place} {HUGE}") from None
            except RecursionError:
                raise FoveateError(f"{self.path} {place} is nested too deeply to be a record") from None
            else:
                cut = len(self.text) - end < NEAR and self.text[end : end + 1] not in ENDS
                if self.ended or not cut:  # a number may go on
                    break
            if len(self.text) - self.at > LONGEST:
                raise FoveateError(f"{self.path} {place} is longer than {LONGEST} bytes: write it smaller")
            self.grow()
        source = self.text[self.at : end]
        if not source.isascii():
            value = parse(source.encode("latin-1"), f"{self.path} {place}")
        first, self.at = self.start + self.at, end
        return first, self.start + end, value

    def wrong(self, expected: str) -> FoveateError:
        line = self.line + self.text.count("\n", 0, self.at)
        return FoveateError(f"{self.path} line {line} is not valid JSON: expected {expected}")


def _entries(window: _Window) -> Iterator[Item]:
    """The records of the list or object that a window stands before."""
    keys = window.peek() == "{"
    kind, close = ("object", "}") if keys else ("list", "]")
    index, separator = 0, window.peek()
    while True:
        window.at += 1
        first = window.peek()
        if first == close and index == 0 and separator != ",":
            break
        key = None
        if keys:
            if first != '"':
                raise window.wrong("a key in double quotes")
            _, _, key = window.value(f"key {index}")
            if window.peek() != ":":
                raise window.wrong("a colon behind the key")
            window.at += 1
            window.peek()
        item = Item(0, 0, index, key, None)
        start, end, value = window.value(item.place)
        yield Item(start, end, index, key, value)
        index, separator = index + 1, window.peek()
        if separator == close:
            break
        if separator != ",":
            raise window.wrong(f"a comma or the {kind}'s end")
    window.at += 1
    if window.peek():
        raise FoveateError(f"{window.path} is not valid JSON: there is more after the {kind}'s end")
