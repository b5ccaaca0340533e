"""The fenced blocks of a Markdown page."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = tuple(
    sorted(
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"))
    )
)
FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,}|~{3,})(?P<info>.*)$")
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>.+?) -->")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: the page's path from the repository's root.
        line: of the opening fence, from 1.
        language: first word behind the fence; empty without one.
        title: of `title="..."` behind the language; a titled block is a file.
        text: the block, dedented.
        not_run: the reason in a `<!-- not run: reason -->` right above the fence; None without one.
    """

    page: str
    line: int
    language: str
    title: str | None
    text: str
    not_run: str | None

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str) -> list[Block]:
    """All fenced blocks of a page, in order."""
    return list(parse((ROOT / page).read_text(encoding="utf-8"), page))


def parse(markdown: str, page: str) -> Iterator[Block]:
    lines = markdown.splitlines()
    at = 0
    while at < len(lines):
        opening = FENCE.match(lines[at])
        if not opening:
            at += 1
            continue
        closing = next(i for i in range(at + 1, len(lines)) if lines[i].strip() == opening["ticks"])
        info = opening["info"].strip()
        title = re.search(r'title="([^"]+)"', info)
        above = next((line for line in reversed(lines[:at]) if line.strip()), "")
        reason = NOT_RUN.fullmatch(above.strip())
        yield Block(
            page,
            at + 1,
            info.split()[0] if info else "",
            title[1] if title else None,
            textwrap.dedent("\n".join(lines[at + 1 : closing])) + "\n",
            reason["reason"] if reason else None,
        )
        at = closing + 1


def commands(block: Block) -> Iterator[tuple[str, str]]:
    """(command, expected output) of a bash or console block; continued lines are joined, comments dropped.

    In console blocks commands start with `$ ` and what they print follows.
    """
    joined = block.text.replace("\\\n", " ")
    if block.language == "bash":
        for line in joined.splitlines():
            if line.strip() and not line.startswith("#"):
                yield line.strip(), ""
        return
    for part in re.split(r"^\$ ", joined, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield command, output
