"""A run: every question answered once, scored, and written with what made the answers.

    OUT/samples.jsonl    one sample a line: question, prompt, answer, regions, pixels, tokens, scores
    OUT/report.json      scores with intervals, and everything that they depend on
    OUT/report.html      the same to read, with pictures (`foveate.evaluate.page`)
    OUT/parts/           while it runs, a file of finished batches for each process

After a kill, the same command goes on where it was. Batches have the same samples whatever runs them.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from foveate.errors import FoveateError
from foveate.evaluate.metrics import Metric, Prediction, plain
from foveate.evaluate.models import Answering, Given
from foveate.evaluate.page import Run, page
from foveate.evaluate.samples import Questions, Sample
from foveate.evaluate.statistics import interval
from foveate.files import alone, explained, read_json, write
from foveate.picture.geometry import Box
from foveate.picture.limits import LIMITS, Limits
from foveate.picture.reading import Transparency, read_picture
from foveate.resuming import Processes, batches_done, cut_torn_line, processes

VERSIONS = ("foveate", "torch", "transformers", "tokenizers", "pillow", "numpy")
ANEW = "delete the folder, or choose another one"
ONE_ANSWER = 0.5  # from this share on, a single answer to all questions is reported as such
LEAST = 5  # samples, for that


@dataclass(frozen=True)
class Plan:
    """What decides the answers. A resumed run must have the same; how many are asked at once does not count.

    Attributes:
        data: name of the data.
        digest: of its records.
        limit: the most samples that are asked; None: all.
        seed: which ones; None: the first ones.
        model: as `Answering.describe` says.
        max_new_tokens: bound on an answer.
        transparency: what transparent pictures show.
    """

    data: str
    digest: str
    limit: int | None
    seed: int | None
    model: Mapping[str, Any]
    max_new_tokens: int
    transparency: Transparency

    def refuse_if_other(self, before: Any, out: Path) -> None:
        """Raises `FoveateError` if a run was made with other settings."""
        now = json.loads(json.dumps(asdict(self)))
        for name, value in now.items():
            if not isinstance(before, dict) or before.get(name) != value:
                then = before.get(name) if isinstance(before, dict) else None
                found, wanted = _short(then), _short(value)
                raise FoveateError(
                    f"{out} is from a run with {name} {found}, not {wanted}: choose another folder"
                )


def evaluate(
    answering: Answering,
    questions: Questions,
    metrics: Sequence[Metric],
    out: Path,
    *,
    limit: int | None = None,
    seed: int | None = None,
    batch: int = 1,
    max_new_tokens: int = 64,
    strict: bool = False,
    limits: Limits = LIMITS,
    transparency: Transparency | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Asks all questions, writes the report, and returns it.

    Args:
        answering: what is evaluated.
        questions: the samples, already limited.
        metrics: of their answers.
        out: folder of the report.
        limit, seed: with which the samples were read.
        batch: questions at once.
        max_new_tokens: bound on an answer.
        strict: whether a picture that the model sees shrunk is an error.
        limits: on the pictures that are read.
        transparency: what transparent pictures show; by default what the model's own choice is.
        console: of the progress bar; None: there is none.

    Raises:
        FoveateError: a picture that cannot be read, a folder of another run, `strict` and a shrunk picture.
    """
    if batch < 1 or max_new_tokens < 1:
        raise FoveateError(f"batch and max_new_tokens must be at least 1, not {batch}, {max_new_tokens}")
    plan = Plan(
        data=questions.path.name,
        digest=questions.digest,
        limit=limit,
        seed=seed,
        model=answering.describe(),
        max_new_tokens=max_new_tokens,
        transparency=transparency or answering.transparency,
    )
    workers, parts = processes(), out / "parts"
    first = workers.process_index == 0
    if (out / "report.json").is_file():
        report = read_json(out / "report.json", ANEW)
        plan.refuse_if_other(report.get("plan"), out)
        workers.wait_for_everyone()  # all have seen it before it is written again
        if first:  # other metrics of the same answers
            samples = [json.loads(line) for line in (out / "samples.jsonl").read_bytes().splitlines()]
            report = _reported(plan, questions, samples, metrics, out)
        workers.wait_for_everyone()
        return report
    with alone(parts, out) if first else nullcontext():
        if first:
            note = parts / "plan.json"
            if note.is_file():
                plan.refuse_if_other(read_json(note, ANEW), out)
            else:
                write(note, json.dumps(asdict(plan), indent=1))
        workers.wait_for_everyone()
        done = _done(parts)
        workers.wait_for_everyone()  # all have read before anyone writes
        left = [n for n in range(len(questions.samples)) if n not in done]
        _ask(
            answering,
            questions,
            left,
            parts,
            workers,
            batch,
            plan,
            strict,
            limits,
            console if first else None,
        )
        workers.wait_for_everyone()
        if not first:
            workers.wait_for_everyone()
            return read_json(out / "report.json", ANEW)
        done = _done(parts)
        if missing := len(questions.samples) - len(done):
            raise FoveateError(f"{missing} answers are missing in {parts}: run the same command again")
        records = [done[n] for n in range(len(questions.samples))]
        report = _reported(plan, questions, records, metrics, out)
    shutil.rmtree(parts, ignore_errors=True)
    workers.wait_for_everyone()
    return report


def _done(parts: Path) -> dict[int, dict[str, Any]]:
    """Number of a sample -> its record."""
    return {r["number"]: r for records in batches_done(parts).values() for r in records}


def _ask(
    answering: Answering,
    questions: Questions,
    left: Sequence[int],
    parts: Path,
    workers: Processes,
    batch: int,
    plan: Plan,
    strict: bool,
    limits: Limits,
    console: Console | None,
) -> None:
    """Answers this process's share of the samples, batch after batch, each written as it is finished."""
    mine = left[workers.process_index :: workers.num_processes]
    part = parts / f"{workers.process_index:05d}.jsonl"
    cut_torn_line(part)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = Console(quiet=True) if console is None else console
    with explained(part), Progress(*columns, console=shown) as bar, part.open("ab") as file:
        task = bar.add_task("asking", total=len(mine))
        for begin in range(0, len(mine), batch):
            numbers = mine[begin : begin + batch]
            samples = [questions.samples[n] for n in numbers]
            records = asked(answering, questions, numbers, plan.max_new_tokens, limits, plan.transparency)
            if strict and (shrunk := next((r for r in records if r["downscaled"]), None)):
                size, seen = shrunk["size"], shrunk["shown"]
                raise FoveateError(
                    f"{samples[records.index(shrunk)].where}: the model sees this picture of {size[0]} x "
                    f"{size[1]} pixels at {seen[0]} x {seen[1]} (strict)"
                )
            line = {"batch": numbers[0], "records": records}
            file.write((json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass"))
            file.flush()
            os.fsync(file.fileno())
            bar.advance(task, len(numbers))


def asked(
    answering: Answering,
    questions: Questions,
    numbers: Sequence[int],
    max_new_tokens: int,
    limits: Limits = LIMITS,
    transparency: Transparency = "white",
) -> list[dict[str, Any]]:
    """What is written of samples, by their numbers, that are answered at once; without scores."""
    samples = [questions.samples[n] for n in numbers]
    pictures = [_read(questions, sample, limits, transparency) for sample in samples]
    pairs = [(picture, sample.question) for picture, sample in zip(pictures, samples, strict=True)]
    try:
        answers = answering.answer(pairs, max_new_tokens)
    except FoveateError as error:
        raise FoveateError(f"{samples[0].where}: {error}") from error
    return [
        _record(n, sample, picture, given)
        for n, sample, picture, given in zip(numbers, samples, pictures, answers, strict=True)
    ]


def _read(questions: Questions, sample: Sample, limits: Limits, transparency: Transparency) -> Image.Image:
    try:
        return read_picture(questions.picture(sample), limits, transparency)
    except FoveateError as error:
        raise FoveateError(f"{sample.where}: {error}") from None


def _record(number: int, sample: Sample, picture: Image.Image, given: Given) -> dict[str, Any]:
    size = [picture.width, picture.height]
    shown = None if given.shown is None else [given.shown.width, given.shown.height]
    return {
        "number": number,
        "id": sample.id,
        "group": sample.group,
        "question": sample.question,
        "answers": list(sample.answers),
        "prompt": given.prompt,
        "prediction": given.text,
        "regions": [list(box.rounded()) for box in given.regions],
        "notes": given.notes,
        "size": size,
        "shown": shown,
        "downscaled": None if shown is None else shown[0] < size[0] or shown[1] < size[1],
        "visual_tokens": given.tokens,
    }


def _reported(
    plan: Plan,
    questions: Questions,
    records: Sequence[dict[str, Any]],
    metrics: Sequence[Metric],
    out: Path,
) -> dict[str, Any]:
    """Scores the answers, and writes samples, report and page."""
    found = score(questions.samples, records, metrics)
    tokens = [r["visual_tokens"] for r in records if r["visual_tokens"] is not None]
    report = {
        "plan": asdict(plan),
        "data": {
            "path": str(questions.path.absolute()),
            "images": str(questions.images.absolute()),
            "hub": questions.hub and asdict(questions.hub),
        },
        "samples": len(records),
        **found,
        "downscaled": sum(bool(r["downscaled"]) for r in records),
        "visual_tokens": fmean(tokens) if tokens else None,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}},
    }
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
    write(out / "samples.jsonl", lines)
    write(out / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write(out / "report.html", page(questions, [Run(str(out), report, records)]))
    return report


def score(
    samples: Sequence[Sample], records: Sequence[dict[str, Any]], metrics: Sequence[Metric]
) -> dict[str, Any]:
    """`scores` by metric, and the `most_frequent` answer; each record gets its own scores."""
    predictions = [Prediction(r["prediction"], [Box(*box) for box in r["regions"]]) for r in records]
    scores: dict[str, Any] = {}
    for metric in metrics:
        values = [metric.score(*pair) for pair in zip(samples, predictions, strict=True)]
        for record, value in zip(records, values, strict=True):
            record.setdefault("scores", {})[metric.name] = value
        scores[metric.name] = _summary(metric, samples, predictions, values)
    return {"scores": scores, "most_frequent": most_frequent(samples, records, metrics, scores)}


def _summary(
    metric: Metric,
    samples: Sequence[Sample],
    predictions: Sequence[Prediction],
    values: Sequence[float],
) -> dict[str, Any]:
    """The mean of a metric with its interval, by category, and its further figures."""
    groups = [sample.group for sample in samples]
    summary: dict[str, Any] = {"title": metric.title, "mean": fmean(values)}
    summary["interval"] = list(interval(values, groups))
    kinds: dict[str, list[float]] = {}
    for value, sample in zip(values, samples, strict=True):
        if sample.category is not None:
            kinds.setdefault(sample.category, []).append(value)
    if kinds:
        summary["categories"] = {
            kind: {"samples": len(own), "mean": fmean(own)} for kind, own in kinds.items()
        }
    if metric.more is not None:
        summary |= metric.more(samples, predictions)
    return summary


def most_frequent(
    samples: Sequence[Sample],
    records: Sequence[Mapping[str, Any]],
    metrics: Sequence[Metric],
    scores: Mapping[str, Any],
) -> dict[str, Any]:
    """The answer that the model gives most often, its share, and what always giving one answer would score.

    `always` is the best score of a constant answer: the model's most frequent one or that of the data.
    `one_answer` says that the model mostly gives one answer, and scores no more than that by it.
    """
    said = Counter(plain(record["prediction"]) for record in records)
    top, count = said.most_common(1)[0]
    text = next(r["prediction"] for r in records if plain(r["prediction"]) == top)
    known = Counter(answer for sample in samples for answer in sample.answers)
    constants = [text, *(answer for answer, _ in known.most_common(1))]
    always = {
        metric.name: max(
            fmean(metric.score(sample, Prediction(constant)) for sample in samples) for constant in constants
        )
        for metric in metrics
    }
    share = count / len(records)
    return {
        "prediction": text,
        "share": share,
        "always": always,
        "one_answer": share >= ONE_ANSWER
        and len(records) >= LEAST
        and len(known) > 1
        and all(scores[name]["mean"] <= value for name, value in always.items()),
    }


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
