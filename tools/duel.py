"""Writes the results on docs/duel.md, of the committed reports.

    python tools/duel.py          as they are
    python tools/duel.py LAB      after collecting what `foveate lab run` has trained in the folder LAB

docs/images/reports.py draws the figures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from foveate.lab import sizes
from foveate.lab.cell import Cell
from foveate.lab.comparing import Difference, difference
from foveate.lab.controls import controls
from foveate.lab.experiment import read_experiment
from foveate.lab.parts import load_parts
from foveate.lab.report import by_method, markdown, table

DOCS = Path(__file__).parents[1] / "docs"
REPORTS = {"duel": "words", "duel_dense": "dense", "duel_tables": "words"}  # and their levels
BEGIN, END = "## Results\n", "## What to conclude\n"
SEEDS = 3  # below, another seed may say the opposite
CLAIMED = """\
What each paper claims beside what is seen here: points of fine questions that the first row answers more
than the second, on the same pictures, with an interval of 95 % over the pictures. *Open*: fewer than three
seeds are trained; how another seed would turn out is not in the interval. Else *confirmed*: the interval lies
above zero, and so does every seed; *opposite*: below; *not seen*: neither.

"""
Results = Sequence[Mapping[str, Any]]


class Claim(NamedTuple):
    """What a paper says, and the two rows that show whether it is so here."""

    where: str
    says: str
    first: str
    second: str


CLAIMS = (
    Claim(
        "LLaVA-NeXT", "TextVQA 64.9 with tiles, LLaVA-1.5 58.2; other data, too", "AnyRes at 192", "LLaVA-1.5"
    ),
    Claim(
        "SliME, table 4",
        "TextVQA 62.5 with tiles alone, 59.4 with the whole picture alone",
        "SliME, tiles alone at 36",
        "LLaVA-1.5",
    ),
    Claim(
        "SliME, table 4",
        "TextVQA 63.6; 61.5 with all tiles in full",
        "SliME with its router, at most 192",
        "AnyRes at 192",
    ),
    Claim("LLaVA-HR, 5.3.1", "TextVQA 8.3 more with 1,024 pixels than with 384", "LLaVA-HR", "LLaVA-1.5"),
    Claim("LLaVA-HR, table 2", "MME 109 less with the ConvNet alone", "LLaVA-HR", "ConvNet only"),
    Claim("LLaVA-HR, table 2", "pooling a large ViT's map reads less", "LLaVA-HR", "pooled tiles"),
    Claim("LLaVA-HR, table 2", "a resampler on it reads less", "LLaVA-HR", "resampler"),
    Claim("INF-LLaVA, table 3", "SEED 70.5 with 336 + 1,008 pixels, 66.0 with 336", "INF-LLaVA", "LLaVA-1.5"),
    Claim(
        "INF-LLaVA, table 3",
        "MM-Vet 34.5 with the low-resolution view, 32.5 without",
        "INF-LLaVA",
        "INF-LLaVA, no low-resolution view",
    ),
    Claim("CoRoI, table 3", "TextVQA 63.3 with it, LLaVA-1.5 58.2", "CoRoI", "LLaVA-1.5"),
    Claim(
        "CoRoI, table 2", "TextVQA 69.7, LLaVA-NeXT 64.9; other LLM, too", "CoRoI v2 at 180", "AnyRes at 192"
    ),
    Claim("Chain-of-Spot, table 1", "TextVQA 60.9 with it, LLaVA-1.5 58.2", "Chain-of-Spot", "LLaVA-1.5"),
    Claim("the lab", "tiles carry what one view cannot show", "pooled tiles", "LLaVA-1.5"),
    Claim("the lab", "a resampler keeps more of the tiles than a mean", "resampler", "pooled tiles"),
    Claim("the lab", "interleaved views add to tiles", "INF-LLaVA, no low-resolution view", "pooled tiles"),
    Claim("the lab", "choosing the region is what is hard", "Chain-of-Spot, region told", "Chain-of-Spot"),
)
TABLES = (
    Claim(
        "INF-LLaVA, table 6",
        "SEED 70.6 with the enhancement, 68.9 without",
        "INF-LLaVA",
        "both croppings added, no enhancement",
    ),
    Claim(
        "INF-LLaVA, table 6",
        "SEED 70.6 with both croppings, 66.6 with tiles alone",
        "INF-LLaVA",
        "tiles alone",
    ),
    Claim(
        "INF-LLaVA, table 4",
        "SEED 70.5; 69.5 with local enhancement alone",
        "INF-LLaVA",
        "local enhancement alone",
    ),
    Claim(
        "INF-LLaVA, table 5", "SEED 70.6 with joined halves, 70.0 with a sum", "INF-LLaVA", "fusion by sum"
    ),
    Claim(
        "LLaVA-HR, table 3", "MME 61 less with the ViT led into the ConvNeXt", "LLaVA-HR", "ViT into ConvNeXt"
    ),
    Claim("LLaVA-HR, table 3", "tanh is the best gate", "LLaVA-HR", "no gate"),
    Claim(
        "SliME, table 3",
        "TextVQA 60.6 with the mixture, 58.9 with the MLP",
        "SliME, all tokens",
        "global expert MLP",
    ),
    Claim(
        "SliME, table 3",
        "TextVQA 63.6 with 144 queries a tile, 63.1 with 64",
        "SliME, all tokens",
        "4 queries a tile",
    ),
    Claim(
        "SliME, table 4", "TextVQA 63.6 trained by parts, 59.7 at once", "alternating", "SliME, all tokens"
    ),
    Claim("CoRoI, table 3", "TextVQA 63.3 with movement, 62.5 without", "CoRoI", "no movement"),
    Claim(
        "CoRoI, table 3", "TextVQA 63.3 with 4 windows a scale, 62.4 with one", "CoRoI", "1 window a scale"
    ),
    Claim(
        "Chain-of-Spot, table 3",
        "GQA 64.8 with the question's region, 64.0 with the centre",
        "Chain-of-Spot",
        "centre crop",
    ),
)


def verdict(found: Difference) -> str:
    """Of three seeds: confirmed if the interval lies above zero, and no seed says otherwise."""
    if len(found.seeds) < SEEDS:
        return "open"
    if found.low > 0 and min(found.seeds) > 0:
        return "confirmed"
    return "opposite" if found.high < 0 and max(found.seeds) < 0 else "not seen"


def seen(claim: Claim, results: Results) -> list[str]:
    """Points of fine questions, seeds and verdict."""
    rows = by_method(results)
    if claim.first not in rows or claim.second not in rows:
        return ["", "0", "open"]
    found = difference(rows[claim.first], rows[claim.second])
    mean, low, high = (100 * value for value in found[:3])
    return [f"{mean:+.1f} ({low:+.1f} to {high:+.1f})", str(len(found.seeds)), verdict(found)]


def tables(results: Results) -> list[list[str]]:
    """The tables of a report: summary, kinds of questions, and differences to the first row."""
    found: list[list[str]] = [[]]
    for line in markdown(results).splitlines():
        if line.startswith("|"):
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [lines for lines in found if lines]


def page(reports: Mapping[str, Results], measured: Mapping[str, Results]) -> str:
    """The section of results.

    Args:
        reports: by experiment, its results.
        measured: by experiment, what `foveate lab sizes` has measured.
    """
    parts = [BEGIN, _trained(reports), _claims(reports)]
    for name in ("duel", "duel_dense"):
        if reports[name]:
            parts += [_level(name, reports[name], measured.get(name, ()))]
    if reports["duel_tables"]:
        summary, kinds, *_ = tables(reports["duel_tables"])
        parts += [
            "### The papers' tables\n",
            "The main contrasts of the papers' ablations, level `words`, trained as above.\n",
            "\n".join(
                table(
                    ["What the paper says", "Here", "Fine, points", "Seeds", "Seen"],
                    [
                        [
                            f"{c.where}: {c.says}",
                            f"{c.first} against {c.second}",
                            *seen(c, reports["duel_tables"]),
                        ]
                        for c in TABLES
                    ],
                )
            )
            + "\n",
            "\n".join(summary) + "\n",
            "\n".join(kinds) + "\n",
        ]
    return "\n".join(parts) + "\n"


def _trained(reports: Mapping[str, Results]) -> str:
    counts, whole = [], True
    for name, results in reports.items():
        experiment = read_experiment(name)
        cells = len(experiment.variants) * len(experiment.seeds)
        whole = whole and len(results) == cells
        counts.append(f"`{name}`: {len(results)} of {cells} cells are trained.")
    if whole:
        return "All cells are trained, from three seeds each.\n"
    return (
        "The cells are being trained, cheap rows first; rows that are missing have not been trained yet.\n"
        + " ".join(counts)
        + "\n"
    )


def _claims(reports: Mapping[str, Results]) -> str:
    rows = []
    for claim in CLAIMS:
        found = [seen(claim, reports[name]) for name in ("duel", "duel_dense")]
        rows.append(
            [f"{claim.where}: {claim.says}", f"{claim.first} against {claim.second}", *found[0], *found[1]]
        )
    head = ["What is claimed", "Here", "words: points", "seeds", "seen", "dense: points", "seeds", "seen"]
    return CLAIMED + "\n".join(table(head, rows, words=2)) + "\n"


def _level(name: str, results: Results, measured: Results) -> str:
    level = REPORTS[name]
    summary, kinds, *against = tables(results)
    parts = [
        f"### Level {level}\n",
        "![Fine accuracy against visual tokens, GFLOP and seconds of training, "
        f"level {level}](images/lab/{name}.png)\n",
        "\n".join(summary) + "\n",
        "Per kind of question:\n",
        "\n".join(kinds) + "\n",
    ]
    if against:
        parts += ["Points more than LLaVA-1.5 on the same pictures:\n", "\n".join(against[0]) + "\n"]
    if measured:
        lines = [line for line in sizes.markdown(measured).splitlines() if line.startswith("|")]
        parts += [
            f"Per size of glyph, fine questions about {measured[0]['pictures']} other pictures of each size "
            f"(`foveate lab sizes {name}`);\nrows have learnt from 10 and 11 pixels:\n",
            "\n".join(lines) + "\n",
            f"![Fine accuracy against the size of glyphs, level {level}](images/lab/{name}_sizes.png)\n",
        ]
    parts += [
        "![Accuracy on held-out pictures over steps and over seconds of training, "
        f"level {level}](images/lab/{name}_curves.png)\n",
        f"`docs/reports/{name}.json` has every cell with its own command, and a mark for every question.\n",
    ]
    return "\n".join(parts)


def committed(folder: Path) -> dict[str, Results]:
    """The reports in a folder; one that is missing has no results."""
    files = {name: folder / f"{name}.json" for name in REPORTS}
    return {
        name: json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        for name, file in files.items()
    }


def collect(lab: Path) -> None:
    """Writes the reports of all cells that are trained, and of their sizes."""
    known: set[str] = set()
    with controls():
        for name in REPORTS:
            experiment = read_experiment(name)
            parts = load_parts(experiment.scale, lab)
            keys = "-".join([experiment.scale, parts.tower_key, parts.reader_key, parts.convnet_key])
            cells = [Cell.of(experiment, v, seed) for v in experiment.variants for seed in experiment.seeds]
            files = {cell.key: lab / "cells" / keys / cell.key / "result.json" for cell in cells}
            done = [cell for cell in cells if files[cell.key].is_file()]
            if any(cell.key not in known for cell in done):  # more than rows of another report
                found = [
                    {**json.loads(files[cell.key].read_text(encoding="utf-8")), "label": cell.label}
                    for cell in done
                ]
                text = json.dumps(found, indent=2) + "\n"
                (DOCS / "reports" / f"{name}.json").write_text(text, encoding="utf-8")
            known |= {cell.key for cell in done}
            measured = lab / "reports" / name / "sizes.json"
            if measured.is_file():
                kept = DOCS / "reports" / "sizes" / f"{name}.json"
                kept.parent.mkdir(exist_ok=True)
                kept.write_text(measured.read_text(encoding="utf-8"), encoding="utf-8")


def main() -> None:
    if len(sys.argv) > 1:
        collect(Path(sys.argv[1]))
    made = page(committed(DOCS / "reports"), committed(DOCS / "reports" / "sizes"))
    path = DOCS / "duel.md"
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: text.index(BEGIN)] + made + text[text.index(END) :], encoding="utf-8")


if __name__ == "__main__":
    main()
