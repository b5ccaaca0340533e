"""Writes the results on docs/duel.md, of the committed reports.

    python tools/duel.py          as they are
    python tools/duel.py LAB      with what `foveate lab` has trained and measured in the folder LAB

Cells that LAB lacks stay as they are. docs/images/reports.py draws the figures.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from foveate.lab import sizes
from foveate.lab.cell import Cell, cells_of
from foveate.lab.comparing import Difference, difference
from foveate.lab.controls import controls
from foveate.lab.curve import last_gains, point_of
from foveate.lab.experiment import read_experiment
from foveate.lab.levels import FINE
from foveate.lab.pace import with_pace
from foveate.lab.parts import load_parts
from foveate.lab.report import by_method, markdown, signed, spread, table

DOCS = Path(__file__).parents[1] / "docs"
LEVELS = {"duel": "words", "duel_dense": "dense"}
REPORTS = (*LEVELS, "duel_tables", "duel_long")
BEGIN, END = "## Results\n", "## What to conclude\n"
SEEDS = 3  # below, another seed may say the opposite
CLAIMED = """\
What each paper claims beside what is seen here. Points: how many more of a hundred fine questions the first
row answers than the second, about the same pictures, with an interval of 95 % that covers the choice of
pictures, not that of seeds. *Open*: fewer than three seeds are trained. *Confirmed*: the interval lies above
zero, and so does every seed; *opposite*: below; *not seen*: neither. This is about the sign, not the size.
A star: one of the rows was still learning at its last step.

"""
Results = Sequence[Mapping[str, Any]]


class Claim(NamedTuple):
    """What a paper says, the two rows that show whether it is so here, and the questions that count."""

    where: str
    says: str
    first: str
    second: str
    kinds: tuple[str, ...] = FINE


CLAIMS = (
    Claim(
        "CoRoI, table 2",
        "TextVQA 64.9 of LLaVA-NeXT, which reads tiles, 58.2 of LLaVA-1.5; other data, too",
        "AnyRes at 192",
        "LLaVA-1.5",
    ),
    Claim(
        "SliME, table 4",
        "TextVQA 62.5 with tiles alone, 59.4 with the whole picture alone; parts of one model",
        "SliME, tiles alone at 36",
        "LLaVA-1.5",
    ),
    Claim(
        "SliME, tables 3 and 4",
        "TextVQA 63.8 with gamma 75 %, trained by parts, 61.5 with all tiles in full",
        "SliME with its router, at most 192",
        "AnyRes at 192",
    ),
    Claim("LLaVA-HR, 5.3.1", "MME 23.6 more than LLaVA-1.5", "LLaVA-HR", "LLaVA-1.5"),
    Claim("LLaVA-HR, table 2", "MME 108.9 less with the ConvNet alone", "LLaVA-HR", "ConvNet only"),
    Claim("LLaVA-HR, table 2", "a large ViT's map reads less when pooled", "LLaVA-HR", "pooled tiles"),
    Claim("LLaVA-HR, table 2", "and less behind a resampler", "LLaVA-HR", "resampler"),
    Claim(
        "INF-LLaVA, table 3", "SEED 70.5 with 336 and 1,008 pixels, 66.0 with 336", "INF-LLaVA", "LLaVA-1.5"
    ),
    Claim(
        "INF-LLaVA, table 3",
        "MM-Vet 34.5 with the low-resolution view, 32.5 without, at 1,008 pixels; less with it at others",
        "INF-LLaVA",
        "INF-LLaVA, no low-resolution view",
    ),
    Claim(
        "CoRoI, table 3",
        "TextVQA 63.3 with it, 58.2 of LLaVA-1.5; the LLM may differ",
        "CoRoI",
        "LLaVA-1.5",
    ),
    Claim(
        "CoRoI, table 2",
        "TextVQA 69.7, 64.9 of LLaVA-NeXT; other LLM",
        "CoRoI v2 at 180",
        "AnyRes at 192",
    ),
    Claim(
        "Chain-of-Spot, table 3",
        "GQA 64.8 with it, 63.9 trained on without it",
        "Chain-of-Spot",
        "LLaVA-1.5",
    ),
    Claim("the lab", "tiles carry what one view cannot show", "pooled tiles", "LLaVA-1.5"),
    Claim("the lab", "a resampler keeps more of the tiles than a mean", "resampler", "pooled tiles"),
    Claim(
        "the lab",
        "INF-LLaVA's enhancement keeps more of the tiles than a mean",
        "INF-LLaVA, no low-resolution view",
        "pooled tiles",
    ),
    Claim(
        "the lab",
        "choosing the region is what is hard; letters, digits and words alone",
        "Chain-of-Spot, region told",
        "Chain-of-Spot",
        ("letter", "digit", "word"),
    ),
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
        "LLaVA-HR, table 3",
        "MME 61.3 less with the ViT led into the ConvNeXt",
        "LLaVA-HR",
        "ViT into ConvNeXt",
    ),
    Claim("LLaVA-HR, table 3", "tanh is the best gate", "LLaVA-HR", "sigmoid gate"),
    Claim(
        "SliME, table 3",
        "TextVQA 60.6 with the mixture, 58.9 with the MLP; the whole picture alone",
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
        "CoRoI, table 3",
        "TextVQA 63.3 with 4 windows a scale, 62.4 with one",
        "CoRoI",
        "1 window a scale",
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
    """Points, seeds and verdict; a star if a cell of the two rows still learnt at its last step."""
    rows = by_method(results)
    first, second = (rows.get(name, []) for name in (claim.first, claim.second))
    common = {cell["cell"]["seed"] for cell in first} & {cell["cell"]["seed"] for cell in second}
    if not common:
        return ["", "0", "open"]
    found = difference(first, second, claim.kinds)
    learns = any(not cell["converged"] for cell in (*first, *second))
    star = "*" if learns else ""
    return [signed(found), str(len(found.seeds)), f"{verdict(found)}{star}"]


def tables(results: Results) -> list[list[str]]:
    """The tables of a report: summary, kinds of questions, and differences to the first row."""
    found: list[list[str]] = [[]]
    for line in markdown(results).splitlines():
        if line.startswith("|"):
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [lines for lines in found if lines]


def page(reports: Mapping[str, Results], measured: Mapping[str, Results], paces: Path) -> str:
    """The section of results.

    Args:
        reports: by experiment, its results.
        measured: by experiment, what `foveate lab sizes` has measured.
        paces: folder with what `foveate lab pace` has measured, a file an experiment.
    """
    parts = [BEGIN, _trained(reports), _claims(reports)]
    reports = {name: with_pace(results, paces / f"{name}.json") for name, results in reports.items()}
    for name in LEVELS:
        if reports[name]:
            parts += [_level(name, reports[name], measured.get(name, ()))]
    if reports["duel_tables"]:
        summary, kinds, *against = tables(reports["duel_tables"])
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
            "Per kind of question:\n",
            "\n".join(kinds) + "\n",
            *_against(reports["duel_tables"], against),
        ]
    if reports["duel_long"]:
        parts += _longer(reports["duel"], reports["duel_long"])
    return "\n".join(parts) + "\n"


def _trained(reports: Mapping[str, Results]) -> str:
    """How many cells are trained, where, and how far they were from having learnt all."""
    counts, seeds, whole = [], [], True
    for name, results in reports.items():
        experiment = read_experiment(name)
        cells = len(experiment.variants) * len(experiment.seeds)
        whole = whole and len(results) == cells
        counts.append(f"`{name}`: {len(results)} of {cells} cells are trained.")
        seeds.append(f"{len(experiment.seeds)} of `{name}`")
    said = f"All cells are trained. Seeds of each row: {', '.join(seeds)}."
    if not whole:
        said = "Some cells have not been trained yet. " + " ".join(counts)
    return f"{said}\n{_where(reports)}\n{' '.join(filter(None, map(_still, reports, reports.values())))}\n"


def _where(reports: Mapping[str, Results]) -> str:
    cells = {_name(one["cell"]): one for results in reports.values() for one in results}
    on = Counter(one.get("device", "cpu") for one in cells.values())
    places = [f"{count} on {'one CPU core' if name == 'cpu' else name}" for name, count in on.most_common()]
    return f"Of {len(cells)} different cells, {' and '.join(places)}."


def _still(name: str, results: Results) -> str:
    """What the last quarter of training has gained in the cells that have not converged."""
    gains = [last_gains([point_of(p) for p in one["curve"]]) for one in results if not one["converged"]]
    fine = [100 * gain[0].gained for gain in gains if gain is not None]
    if not fine:
        return ""
    gained = f"{statistics.median(fine):.1f} points of fine questions, at most {max(fine):.1f}"
    return (
        f"`{name}`: {len(gains)} of {len(results)} cells still learnt: the last quarter of their steps "
        f"before the fall of the rate gained {gained}."
    )


def _claims(reports: Mapping[str, Results]) -> str:
    rows = []
    for claim in CLAIMS:
        found = [seen(claim, reports[name]) for name in LEVELS]
        rows.append(
            [f"{claim.where}: {claim.says}", f"{claim.first} against {claim.second}", *found[0], *found[1]]
        )
    head = ["What is claimed", "Here", "words: points", "seeds", "seen", "dense: points", "seeds", "seen"]
    return CLAIMED + "\n".join(table(head, rows, words=2)) + "\n"


def _level(name: str, results: Results, measured: Results) -> str:
    level = LEVELS[name]
    summary, kinds, *against = tables(results)
    parts = [
        f"### Level {level}\n",
        "![Fine accuracy against visual tokens, GFLOP and seconds of training, "
        f"level {level}](images/lab/{name}.png)\n",
        "\n".join(summary) + "\n",
        "Per kind of question:\n",
        "\n".join(kinds) + "\n",
    ]
    parts += _against(results, against)
    if measured:
        lines = [line for line in sizes.markdown(measured).splitlines() if line.startswith("|")]
        parts += [
            f"Per size of glyph, fine questions about {measured[0]['pictures']} other pictures of each size "
            f"(`foveate lab sizes {name}`):\nrows have learnt from 10 and 11 pixels. Objects grow with their "
            "glyphs, so there are fewer in a picture, and a guess\namong them is right more often: compare "
            "rows, not columns.\n",
            "\n".join(lines) + "\n",
            *_unmeasured(results, measured),
            f"![Fine accuracy against the size of glyphs, level {level}](images/lab/{name}_sizes.png)\n",
        ]
    parts += [
        "![Accuracy on held-out pictures over steps and over seconds of training, "
        f"level {level}](images/lab/{name}_curves.png)\n",
        f"`docs/reports/{name}.json` has every cell with its own command, and a mark for every question.\n",
    ]
    return "\n".join(parts)


def _longer(duel: Results, longer: Results) -> list[str]:
    """Rows with more steps: what they gained, and the claims about them with few steps and with many."""
    summary, kinds, *against = tables(longer)
    seeds = {one["cell"]["seed"] for one in longer}
    duel = [one for one in duel if one["cell"]["seed"] in seeds]
    before, after = by_method(duel), by_method(longer)
    few, many = (f"{results[0]['cell']['steps']:,}" for results in (duel, longer))
    gains = [
        [
            name,
            *(spread([cell["accuracy"]["fine"] for cell in rows[name]]) for rows in (before, after)),
            signed(difference(cells, before[name])),
        ]
        for name, cells in after.items()
    ]
    claims = [
        [
            f"{claim.where}: {claim.says}",
            f"{claim.first} against {claim.second}",
            *(seen(claim, results)[0] for results in (duel, longer)),
        ]
        for claim in CLAIMS
        if {claim.first, claim.second} <= {*after}
    ]
    heads = [f"{steps} steps: points" for steps in (few, many)]
    return [
        "### Three times the steps\n",
        f"Rows of level `words` with 36 tokens and close places, trained for at most {many} steps instead of "
        f"{few}.\nNone stops before {longer[0]['cell']['converge']['least']:,}; nothing else differs. All of "
        f"seed {', '.join(map(str, sorted(seeds)))}. Seconds are of cells that trained beside another.\n",
        "\n".join(table(["", f"{few} steps: fine", f"{many} steps: fine", "points more"], gains)) + "\n",
        "\n".join(table(["What is claimed", "Here", *heads], claims, words=2)) + "\n",
        "\n".join(summary) + "\n",
        "Per kind of question:\n",
        "\n".join(kinds) + "\n",
        *_against(longer, against),
        f"![Fine accuracy against visual tokens, GFLOP and seconds of training, at most {many} steps]"
        "(images/lab/duel_long.png)\n",
        f"![Accuracy on held-out pictures over steps and over seconds of training, at most {many} steps]"
        "(images/lab/duel_long_curves.png)\n",
    ]


def _against(results: Results, found: Sequence[Sequence[str]]) -> list[str]:
    """The table of differences, if there is one."""
    if not found:
        return []
    first = results[0]["label"] or results[0]["title"]
    return [f"Points more than {first} on the same pictures:\n", "\n".join(found[0]) + "\n"]


def _unmeasured(results: Results, measured: Results) -> list[str]:
    there = [result["cell"] for result in measured]
    missing = [
        f"{result['label'] or result['title']}, seed {result['cell']['seed']}"
        for result in results
        if result["cell"] not in there
    ]
    return [f"Not measured yet: {'; '.join(missing)}.\n"] if missing else []


def committed(folder: Path) -> dict[str, Results]:
    """The reports in a folder; one that is missing has no results."""
    files = {name: folder / f"{name}.json" for name in REPORTS}
    return {
        name: json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        for name, file in files.items()
    }


def collect(lab: Path) -> None:
    """Adds all cells that are trained, and their sizes, to the reports; a cell that is there is replaced.

    A row that two experiments share is found in either's report.
    """
    known: dict[str, Mapping[str, Any]] = {}
    for results in committed(DOCS / "reports").values():
        known |= {_name(one["cell"]): one for one in results}
    added: set[str] = set()
    with controls():
        for name in REPORTS:
            experiment = read_experiment(name)
            home = cells_of(lab, experiment.scale, load_parts(experiment.scale, lab))
            cells = [Cell.of(experiment, v, seed) for v in experiment.variants for seed in experiment.seeds]
            order = [json.loads(json.dumps(cell.record)) for cell in cells]
            for cell, record in zip(cells, order, strict=True):
                file = home / cell.key / "result.json"
                if file.is_file():
                    known[_name(record)] = json.loads(file.read_text(encoding="utf-8"))
            found = [{**known[_name(one)], "label": one["label"]} for one in order if _name(one) in known]
            names = {_name(one["cell"]) for one in found}
            if not names <= added:  # more than the reports before it
                _merge(DOCS / "reports" / f"{name}.json", found, order, 2)
            added |= names
            measured, pace = (lab / "reports" / name / f"{what}.json" for what in ("sizes", "pace"))
            if measured.is_file():
                kept = DOCS / "reports" / "sizes" / f"{name}.json"
                _merge(kept, json.loads(measured.read_text(encoding="utf-8")), order, 1)
            if pace.is_file():
                shutil.copy(pace, DOCS / "reports" / "pace" / f"{name}.json")


def _merge(path: Path, found: Results, order: Sequence[Mapping[str, Any]], indent: int) -> None:
    """Adds results to a report, in the order of its cells. Raises `ValueError` for unlike sizes."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    new = {_name(one["cell"]): one for one in (*old, *found)}
    if len({(tuple(one["sizes"]), one["pictures"]) for one in new.values() if "sizes" in one}) > 1:
        raise ValueError(f"{path} has other sizes of glyphs, or another number of pictures")
    wanted = [_name(cell) for cell in order]
    path.parent.mkdir(exist_ok=True)
    merged = [new[cell] for cell in wanted if cell in new]
    path.write_text(json.dumps(merged, indent=indent) + "\n", encoding="utf-8")


def _name(cell: Mapping[str, Any]) -> str:
    """The same for a cell of two experiments that label it otherwise."""
    return json.dumps({**cell, "label": None}, sort_keys=True)


def main() -> None:
    if len(sys.argv) > 1:
        collect(Path(sys.argv[1]))
    made = page(committed(DOCS / "reports"), committed(DOCS / "reports" / "sizes"), DOCS / "reports" / "pace")
    path = DOCS / "duel.md"
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: text.index(BEGIN)] + made + text[text.index(END) :], encoding="utf-8")


if __name__ == "__main__":
    main()
