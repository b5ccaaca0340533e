"""The lab's objects on real photographs of any size: how well a model reads them as they get smaller.

One object is drawn on each photograph, at the photograph's own resolution, and the model is asked what is
written on it. The objects have the digits, words and fonts of the lab's test split.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from foveate.errors import FoveateError
from foveate.files import explained, write
from foveate.lab.materials import FONTS, materials
from foveate.lab.objects import COLOURS, PLAIN, Pen, Thing, lettering
from foveate.lab.scenes import place
from foveate.picture.geometry import Size
from foveate.picture.reading import read_picture

if TYPE_CHECKING:
    from foveate.ask.foveate import Foveate

KINDS = ("letter", "digit", "word")
PARTS = (1 / 4, 1 / 9, 1 / 16, 1 / 25, 1 / 36, 1 / 64, 1 / 100)  # fractions of the picture's area
GLYPHS = (0.3, 0.5)  # smallest and largest font size, as a fraction of the side of a plain object
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Trial:
    """One question about one photograph with one object.

    Attributes:
        photograph: file name.
        size: width and height of the photograph, pixels.
        part: fraction of the photograph's area that the object's box covers.
        box: the object's box, pixels.
        kind: `letter`, `digit` or `word`.
        question, answer: what was asked, and the right answer.
        reply: what the model said.
        seconds: wall time of the answer.
    """

    photograph: str
    size: tuple[int, int]
    part: float
    box: tuple[int, int, int, int]
    kind: str
    question: str
    answer: str
    reply: str
    seconds: float

    @property
    def right(self) -> bool:
        return self.reply == self.answer


def draw_on(photograph: Image.Image, kind: str, part: float, rng: np.random.Generator) -> Thing:
    """Draws one object with a letter, a digit or a word anywhere on an RGB photograph.

    Its box covers `part` of the photograph's area, or less if it would be wider or higher than that.
    """
    stock = materials("test")
    pen = Pen(photograph, rng, stock)
    colour = list(COLOURS)[rng.integers(len(COLOURS))]
    picture = Size(photograph.height, photograph.width)
    area = part * picture.width * picture.height
    if kind == "word":
        word, font = stock.word(rng), str(rng.choice(FONTS))
        width, height = lettering(word, font, 100, (1.0, 1.0)).size
        times = min(math.sqrt(area / (width * height)), 0.95 * picture.width / width)
        written = lettering(word, font, max(4, int(100 * times)), (1.0, 1.0))
        box = place(rng, *written.size, picture, [])
        if box is not None:
            return pen.sign(colour, written, int(box.left), int(box.top))
    else:
        side = min(round(math.sqrt(area)), int(0.95 * min(picture)))
        box = place(rng, side, side, picture, [])
        if box is not None:
            size = round(rng.uniform(*GLYPHS) * side)
            return pen.plain(PLAIN[rng.integers(len(PLAIN))], colour, box, [(kind, max(4, size))])
    raise FoveateError(f"a picture of {picture.width} x {picture.height} pixels has no room for an object")


def trials(
    model: Foveate,
    files: Sequence[Path],
    kinds: Sequence[str] = KINDS,
    parts: Sequence[float] = PARTS,
    repeats: int = 1,
    seed: int = 0,
) -> Iterator[Trial]:
    """Asks about every file, part and kind, `repeats` times with different objects."""
    for number, file in enumerate(files):
        photograph = read_picture(file)
        for p, part in enumerate(parts):
            for kind in kinds:
                for repeat in range(repeats):
                    rng = np.random.default_rng([seed, number, p, KINDS.index(kind), repeat])
                    picture = photograph.copy()
                    thing = draw_on(picture, kind, part, rng)
                    name = thing.shape if rng.random() < 0.5 else f"{thing.colour} shape"
                    question = f"what {kind} is on the {name} ?"
                    answer = model.ask(picture, question, max_new_tokens=16)
                    yield Trial(
                        photograph=file.name,
                        size=picture.size,
                        part=float(thing.box.width * thing.box.height) / (picture.width * picture.height),
                        box=thing.box.rounded(),
                        kind=kind,
                        question=question,
                        answer=str(getattr(thing, kind)),
                        reply=answer.text,
                        seconds=answer.ledger.total_seconds,
                    )


def photographs_in(place: Path) -> list[Path]:
    """The picture files of a folder, by name, or the one file.

    Raises:
        FoveateError: there is none.
    """
    if place.is_file():
        return [place]
    files = sorted(f for f in place.glob("*") if f.suffix.lower() in SUFFIXES)
    if not files:
        raise FoveateError(f"{place}: no picture files here ({', '.join(SUFFIXES)})")
    return files


def measure_photographs(
    model: Foveate,
    name: str,
    files: Sequence[Path],
    out: Path,
    repeats: int = 1,
    seed: int = 0,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Asks everything, writes `photographs.md`, `.json` and `.png` to the folder `out`; returns the first.

    `report` gets the number of answered questions, and the total.
    """
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
    total = len(files) * len(PARTS) * len(KINDS) * repeats
    found = []
    for trial in trials(model, files, repeats=repeats, seed=seed):
        found.append(trial)
        report(len(found), total)
    values = [asdict(trial) | {"right": trial.right} for trial in found]
    write(out / "photographs.json", json.dumps(values, indent=1) + "\n")
    table = by_part(found)
    with explained(out / "photographs.png"):
        _plot(table, out / "photographs.png")
    path = out / "photographs.md"
    write(path, _markdown(table, found, name))
    return path


def by_part(found: Sequence[Trial]) -> dict[int, dict[str, list[bool]]]:
    """The nearest of `PARTS` as its inverse -> kind -> whether each answer was right."""
    table: dict[int, dict[str, list[bool]]] = {}
    for trial in found:
        nearest = min(PARTS, key=lambda part: abs(math.log(part / trial.part)))
        row = table.setdefault(round(1 / nearest), {kind: [] for kind in KINDS})
        row[trial.kind].append(trial.right)
    return dict(sorted(table.items()))


def _markdown(table: dict[int, dict[str, list[bool]]], found: Sequence[Trial], name: str) -> str:
    pixels = [trial.size[0] * trial.size[1] / 1e6 for trial in found]
    head = ["object's part of the picture", *KINDS, "all"]
    rows = []
    for part, row in table.items():
        every = [hit for hits in row.values() for hit in hits]
        rows.append([f"1/{part}", *(_share(hits) for hits in row.values()), _share(every)])
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(
        [
            "# The lab's objects on photographs",
            "",
            f"Model: {name}. {len({t.photograph for t in found})} photographs of {min(pixels):.1f} to "
            f"{max(pixels):.1f} megapixels, one object each time, {len(found)} questions; exact answers in "
            f"percent, and counts. Median time of an answer: "
            f"{np.median([t.seconds for t in found]):.2f} s.",
            "",
            *(f"| {' | '.join(line)} |" for line in lines),
            "",
            "![accuracy against the object's size](photographs.png)",
            "",
        ]
    )


def _share(hits: Sequence[bool]) -> str:
    return f"{100 * sum(hits) / len(hits):.0f} ({sum(hits)}/{len(hits)})" if hits else ""


def _plot(table: dict[int, dict[str, list[bool]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(table))
    for kind in KINDS:
        shares: list[Any] = [100 * np.mean(row[kind]) if row[kind] else np.nan for row in table.values()]
        axes.plot(places, shares, "o-", label=kind)
    axes.set_xticks(places, [f"1/{part}" for part in table])
    axes.set(xlabel="object's part of the picture", ylabel="right answers, %", ylim=(0, 102))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
