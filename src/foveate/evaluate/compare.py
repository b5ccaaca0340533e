"""Two runs on the same samples: the paired difference, with its interval, and what changed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from foveate.data.shards import OnHub
from foveate.errors import FoveateError
from foveate.evaluate.page import Run, page
from foveate.evaluate.samples import read_questions
from foveate.evaluate.statistics import interval
from foveate.files import read_json, write

ANEW = "run `foveate eval` again"


def read_run(folder: Path) -> Run:
    """A finished run. Raises `FoveateError` if the folder holds none."""
    if not (folder / "report.json").is_file():
        raise FoveateError(f"{folder} holds no finished run of foveate eval: there is no report.json")
    report = read_json(folder / "report.json", ANEW)
    try:
        lines = (folder / "samples.jsonl").read_bytes().splitlines()
        records = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise FoveateError(f"{folder / 'samples.jsonl'} is missing or broken: {ANEW}") from error
    return Run(str(folder), report, records)


def compare(one: Path, other: Path, out: Path | None = None) -> dict[str, Any]:
    """Compares a run with one before it; writes a page if `out` names one.

    Returns:
        Per metric of both: `mean` of the differences (`other` - `one`) and its `interval`, the number of
        samples that got `better` and `worse`; and `changed`, the ids of samples with another answer.

    Raises:
        FoveateError: a folder without a run, runs on different samples, or without a common metric.
    """
    runs = [read_run(one), read_run(other)]
    before, after = (run.records for run in runs)
    if runs[0].report["plan"]["digest"] != runs[1].report["plan"]["digest"]:
        raise FoveateError(f"{one} and {other} are runs on different data")
    if [r["id"] for r in before] != [r["id"] for r in after]:
        raise FoveateError(f"{one} and {other} asked other samples: give both the same limit and seed")
    names = [name for name in runs[0].report["scores"] if name in runs[1].report["scores"]]
    if not names:
        raise FoveateError(f"{one} and {other} have no metric in common: score both with the same --metric")
    differences = {name: _difference(name, before, after) for name in names}
    if out is not None:
        write(out, page(_data(runs[0].report), [_only(run, names) for run in runs], differences))
    changed = [a["id"] for a, b in zip(before, after, strict=True) if a["prediction"] != b["prediction"]]
    return {"samples": len(before), "scores": differences, "changed": changed}


def _difference(
    name: str, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    values = [b["scores"][name] - a["scores"][name] for a, b in zip(before, after, strict=True)]
    return {
        "mean": fmean(values),
        "interval": list(interval(values, [record["group"] for record in before])),
        "better": sum(value > 0 for value in values),
        "worse": sum(value < 0 for value in values),
    }


def _only(run: Run, names: Sequence[str]) -> Run:
    return Run(
        run.name,
        {**run.report, "scores": {name: run.report["scores"][name] for name in names}},
        [{**r, "scores": {name: r["scores"][name] for name in names}} for r in run.records],
    )


def _data(report: Mapping[str, Any]) -> Any:
    """The data of a run, for its pictures; None if they are no longer there."""
    try:
        data = report["data"]
        if data["hub"] is not None:
            return read_questions(OnHub(**data["hub"]))
        return read_questions(data["path"], data["images"])
    except FoveateError:
        return None
