"""The page of benchmarks: every command names tasks of its table, and every task has a command."""

from __future__ import annotations

import re
import shlex

from tests.docs.blocks import ROOT, blocks_of, commands

PAGE = "docs/benchmarks.md"
PAPERS = {"SliME": 3, "LLaVA-HR": 2, "INF-LLaVA": 2, "CoRoI": 4, "Chain-of-Spot": 3}  # commands


def rows() -> list[list[str]]:
    """The cells of the table."""
    lines = (ROOT / PAGE).read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][
        1:
    ]


def asked() -> list[set[str]]:
    """The tasks of each command."""
    found = []
    for block in blocks_of(PAGE):
        for command, _ in commands(block):
            words = shlex.split(command)
            found.append(set(words[words.index("--tasks") + 1].split(",")))
    return found


def test_commands_and_table_name_the_same_tasks() -> None:
    table = {
        name for row in rows() if not row[0].startswith("---") for name in re.findall(r"`(.+?)`", row[1])
    }
    assert len(table) == 24
    assert set().union(*asked()) == table


def test_every_paper_has_its_commands() -> None:
    assert len(asked()) == sum(PAPERS.values()) + 2
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    assert all(re.search(rf"^{paper}, Table", text, re.MULTILINE) for paper in PAPERS)


def test_every_row_has_six_cells() -> None:
    assert {len(row) for row in rows()} == {6}
