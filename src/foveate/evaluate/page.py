"""A run, or two side by side, as one HTML file: scores, and samples with picture, regions and answers."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment
from PIL import Image

from foveate.errors import FoveateError
from foveate.evaluate.samples import Questions, Sample
from foveate.picture.reading import read_picture

SAMPLES = 100  # on a page
SIDE = 480  # pixels of a picture's longer side


@dataclass(frozen=True)
class Run:
    """A finished run: its name, report and samples."""

    name: str
    report: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]


def page(
    questions: Questions | None, runs: Sequence[Run], differences: Mapping[str, Any] | None = None
) -> str:
    """The HTML of one or two runs on the same samples.

    Args:
        questions: the data, for its pictures; None leaves them out.
        runs: each with the same samples in the same order.
        differences: per metric what `foveate.evaluate.compare` found.

    Samples on which two runs differ come first, else those with the lowest scores.
    """
    by_id = {} if questions is None else {sample.id: sample for sample in questions.samples}
    rows = []
    for number in _order(runs)[:SAMPLES]:
        records = [run.records[number] for run in runs]
        sample = by_id.get(records[0]["id"])
        rows.append(
            {
                "record": records[0],
                "runs": records,
                "box": None if sample is None or sample.box is None else sample.box.rounded(),
                "picture": None if questions is None or sample is None else _picture(questions, sample),
            }
        )
    template = resources.files("foveate.evaluate").joinpath("page.html.jinja").read_text(encoding="utf-8")
    made = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
    total = len(runs[0].records)
    return made.render(runs=runs, rows=rows, total=total, differences=differences)


def _order(runs: Sequence[Run]) -> list[int]:
    def key(number: int) -> tuple[bool, float, int]:
        records = [run.records[number] for run in runs]
        same = len({record["prediction"] for record in records}) == 1
        return (len(runs) > 1 and same, min(sum(r["scores"].values()) for r in records), number)

    return sorted(range(len(runs[0].records)), key=key)


def _picture(questions: Questions, sample: Sample) -> str | None:
    """A small copy as a `data:` URL; None if it is no longer there."""
    try:
        picture = read_picture(questions.picture(sample))
    except FoveateError:
        return None
    picture.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    content = io.BytesIO()
    picture.convert("RGB").save(content, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
