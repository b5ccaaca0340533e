"""Region labels for your own data: the part of a picture that each answer rests on, to train Chain-of-Spot.

This is section 3.2 of arXiv 2403.12966, with the VLM itself in place of a detector and a second model. Every
question about one picture gets a region by relevance propagation (`foveate.zoom.relevance`), written to

    FILE.jsonl         one question a line: box in original pixels (left, top, right, bottom)
    FILE.json          the authors' format: {"000007_coco_1_q0": {"params": [top, left, size]}}, squares;
                       not written for regions of pictures without a question
    FILE.report.json   how large the boxes are, and how often the answer changes when the region is masked

While it runs, FILE.jsonl.parts holds one file per process, and a lock that keeps other runs away. A line of a
file is one batch, written and synced at once: after a kill, the same command reads the finished lines, cuts
off a torn last one, and does the rest. The batches are always the same, so the result is the same to the
byte.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image, ImageStat
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from foveate.data.questions import Annotatable, Question, open_annotatable, questions
from foveate.devices import choose_device
from foveate.errors import FoveateError
from foveate.files import alone, explained, read_json, write
from foveate.layers import weights_of
from foveate.picture.geometry import Box, Size
from foveate.picture.limits import LIMITS, Limits
from foveate.picture.reading import read_picture
from foveate.resuming import Alone, Processes, batches_done, cut_torn_line, processes
from foveate.versions import names_versions
from foveate.zoom.asking import message
from foveate.zoom.detectors import Detector, load_detector
from foveate.zoom.relevance import Highlighter, RegionRule
from foveate.zoom.vlm import VLM

ANSWER_TOKENS = 16  # bound on the answers that are compared
WHOLE = 0.95  # a box that covers at least this fraction counts as the whole picture
NAMED = 20  # number of questions without a region that the report names


@dataclass(frozen=True)
class Settings:
    """The settings that decide the result. A resumed run must have the same.

    Attributes:
        data: name of the data.
        fingerprint: of the data's text; pictures are identified by name.
        images: name of the folder that picture paths start from; None: the data file's own.
        model: name of the model.
        weights: fingerprint of its weights, by `weights_of`.
        dtype: of its weights.
        rule: how relevance becomes a region.
        batch: questions at once.
        check: number of questions, evenly spread, to also answer with their region masked.
        detector: name of what finds regions; None: the image tokens are the regions.
        about: whether the regions are those of the questions, or of the pictures without any question.
    """

    data: str
    fingerprint: str
    images: str | None
    model: str
    weights: str
    dtype: str
    rule: RegionRule
    batch: int = 8
    check: int = 200
    detector: str | None = None
    about: Literal["questions", "pictures"] = "questions"

    def __post_init__(self) -> None:
        if self.about not in ("questions", "pictures"):
            raise FoveateError(f"about must be questions or pictures, not {self.about!r}")
        if self.batch < 1 or self.check < 0:
            raise FoveateError(
                f"batch must be at least 1 and check at least 0, not {self.batch}, {self.check}"
            )

    def refuse_if_other(self, before: Any, where: Path) -> None:
        """Raises `FoveateError` if a run was made with other settings."""
        now = json.loads(json.dumps(asdict(self)))
        if not isinstance(before, dict):
            raise FoveateError(
                f"{where} is broken: choose another file, or delete it and the files beside it"
            )
        for name, value in now.items():
            if before.get(name) != value:
                raise FoveateError(
                    f"{where} is from a run with {name} {before.get(name)}, not {value}: choose another file"
                )


class Annotator:
    """Annotates batches of questions.

    Args:
        vlm: the model that is asked.
        source: the data.
        rule: how relevance becomes a region.
        detect: picture -> boxes of its regions; None: the image tokens are the regions.
        limits: on the pictures that are read.
    """

    def __init__(
        self,
        vlm: VLM,
        source: Annotatable,
        rule: RegionRule,
        detect: Detector | None = None,
        limits: Limits = LIMITS,
    ) -> None:
        self.vlm, self.source, self.limits = vlm, source, limits
        self.highlight = Highlighter(vlm, rule, detect)

    def check(self) -> None:
        """Raises `FoveateError` if no question can be annotated, whatever the data."""
        self.highlight([Image.new("RGB", (64, 64))], ["What is this?"])

    def pictures(self, batch: Sequence[Question]) -> list[Image.Image | str]:
        """Each question's picture, or why it cannot be read."""
        read: list[Image.Image | str] = []
        for question in batch:
            try:
                self.vlm.check_question(question.text)
                given = self.source.picture(question.record)
                read.append(read_picture(given, self.limits, self.vlm.transparency))
            except FoveateError as error:
                read.append(str(error))
        return read

    def annotate(
        self, batch: Sequence[Question], pictures: Sequence[Image.Image | str], checked: Sequence[bool]
    ) -> list[dict[str, Any]]:
        """One record per question: its box or the problem, and, if checked, the comparison of its answers."""
        try:
            return self._annotate(batch, pictures, checked)
        except FoveateError as error:
            if len(batch) == 1:
                return [_record(batch[0], str(error))]
        alone = [slice(i, i + 1) for i in range(len(batch))]
        return [self.annotate(batch[one], pictures[one], checked[one])[0] for one in alone]

    def _annotate(
        self, batch: Sequence[Question], pictures: Sequence[Image.Image | str], checked: Sequence[bool]
    ) -> list[dict[str, Any]]:
        seen = [(q, p, c) for q, p, c in zip(batch, pictures, checked, strict=True) if not isinstance(p, str)]
        found = self.highlight([p for _, p, _ in seen], [q.text for q, _, _ in seen]) if seen else []
        boxes = {q.key: highlight.box for (q, _, _), highlight in zip(seen, found, strict=True)}
        compared = [(q, p) for q, p, check in seen if check]
        answers = self._answers(compared, [boxes[q.key] for q, _ in compared])
        records = []
        for question, picture in zip(batch, pictures, strict=True):
            if isinstance(picture, str):
                records.append(_record(question, picture))
                continue
            where = {"width": picture.width, "height": picture.height, "box": list(boxes[question.key])}
            records.append(_record(question) | where | answers.get(question.key, {}))
        return records

    def _answers(
        self, asked: Sequence[tuple[Question, Image.Image]], boxes: Sequence[Box]
    ) -> dict[str, dict[str, str]]:
        """By key, the answers to the picture, without the region, and without an equal area elsewhere."""
        if not asked:
            return {}
        regions = [(p, box) for (_, p), box in zip(asked, boxes, strict=True)]
        shown = {
            "answer": [picture for _, picture in asked],
            "answer_masked": [masked(p, box) for p, box in regions],
            "answer_masked_elsewhere": [
                masked(p, elsewhere(box, Size(p.height, p.width))) for p, box in regions
            ],
        }
        found: dict[str, dict[str, str]] = {question.key: {} for question, _ in asked}
        for name, pictures in shown.items():
            conversations = [message(p, q.text) for p, (q, _) in zip(pictures, asked, strict=True)]
            said = self.vlm.answer(conversations, max_new_tokens=ANSWER_TOKENS)
            for (question, _), one in zip(asked, said, strict=True):
                found[question.key][name] = one.text
        return found


def _record(question: Question, problem: str | None = None) -> dict[str, Any]:
    """The record of a question; with a problem, it has no box."""
    record: dict[str, Any] = {"key": question.key, "index": question.record, "id": question.id}
    record |= {"number": question.number, "question": question.text}
    return record if problem is None else {**record, "box": None, "problem": problem}


def square(box: Box, picture: Size) -> tuple[int, int, int]:
    """The authors' [top, left, size]: the smallest square around a box's centre that holds it.

    It is moved into the picture; if it is larger, it starts at 0 and extends beyond the right or bottom.
    """
    size = max(int(box.width), int(box.height))
    top = math.floor((box.top + box.bottom - size) / 2)
    left = math.floor((box.left + box.right - size) / 2)
    return (
        max(min(top, picture.height - size), 0),
        max(min(left, picture.width - size), 0),
        size,
    )


def masked(picture: Image.Image, box: Box) -> Image.Image:
    """The picture with a box filled with the picture's mean colour."""
    copy = picture.copy()
    copy.paste(tuple(round(n) for n in ImageStat.Stat(picture).mean), box.rounded())
    return copy


def elsewhere(box: Box, picture: Size) -> Box:
    """A box of the same size in the corner of the picture that is farthest from it."""
    left = 0 if box.left + box.right > picture.width else picture.width - box.width
    top = 0 if box.top + box.bottom > picture.height else picture.height - box.height
    return Box(left, top, left + box.width, top + box.height)


ANEW = "delete it and the files beside it, or choose another file"


class Paths(NamedTuple):
    """The files of a run."""

    out: Path
    authors: Path
    report: Path
    parts: Path

    @classmethod
    def of(cls, out: str | Path) -> Paths:
        """Raises `FoveateError` where the file cannot be written."""
        path = Path(out)
        if path.suffix != ".jsonl":
            raise FoveateError(f"{path} must end in .jsonl; the authors' format goes beside it, in .json")
        if not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
            raise FoveateError(f"{path}: {path.absolute().parent} is not a folder that can be written to")
        return cls(
            path,
            path.with_suffix(".json"),
            path.with_suffix(".report.json"),
            path.with_name(f"{path.name}.parts"),
        )


def run(
    settings: Settings,
    annotator: Annotator,
    out: str | Path,
    workers: Processes | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Annotates all questions, resuming an earlier run, and returns the report.

    Every process calls this with the same arguments, on a file system that all of them share.

    Args:
        settings: what decides the result.
        annotator: the model and the data.
        out: `.jsonl` file; the others are beside it.
        workers: the processes of this run.
        console: for the progress bar of the first process; nothing is shown without one.

    Raises:
        FoveateError: a file from a run with other settings, a broken part.
    """
    workers, paths = workers or Alone(), Paths.of(out)
    first = workers.process_index == 0
    report = finished(settings, paths)
    if report is not None:
        return report
    asked, left_out = questions(annotator.source, settings.about)
    batches = [asked[i : i + settings.batch] for i in range(0, len(asked), settings.batch)]
    check = min(settings.check, len(asked))
    compared = {i * len(asked) // check for i in range(check)}
    annotator.check()
    with _begun(settings, paths) if first else nullcontext():
        workers.wait_for_everyone()
        done = batches_done(paths.parts)
        workers.wait_for_everyone()  # all have read before anyone writes
        left = [n for n in range(len(batches)) if n not in done]
        mine = left[workers.process_index :: workers.num_processes]
        quiet = Console(quiet=True) if console is None or not first else console
        part = paths.parts / f"{workers.process_index:05d}.jsonl"
        cut_torn_line(part)
        with explained(part), _bar(quiet) as bar, ThreadPoolExecutor(1) as ahead, part.open("ab") as file:
            task = bar.add_task("annotating", total=len(mine) * workers.num_processes)
            loading = ahead.submit(annotator.pictures, batches[mine[0]]) if mine else None
            for place, n in enumerate(mine):
                assert loading is not None
                pictures = loading.result()
                if place + 1 < len(mine):
                    loading = ahead.submit(annotator.pictures, batches[mine[place + 1]])
                at = n * settings.batch
                checked = [at + i in compared for i in range(len(batches[n]))]
                records = annotator.annotate(batches[n], pictures, checked)
                line = json.dumps({"batch": n, "records": records}, ensure_ascii=False) + "\n"
                file.write(line.encode("utf-8", "surrogatepass"))
                file.flush()
                os.fsync(file.fileno())
                bar.advance(task, workers.num_processes)
        workers.wait_for_everyone()
        if first:
            _finish(settings, paths, len(batches), left_out)
        workers.wait_for_everyone()
    return json.loads(paths.report.read_bytes())


@contextmanager
def _begun(settings: Settings, paths: Paths) -> Iterator[None]:
    """A run with exclusive use of these files. Raises `FoveateError` if they belong to another."""
    note = paths.parts / "run.json"
    if not note.is_file():
        for path in (paths.authors, paths.report):
            if path.exists():
                raise FoveateError(f"{path} exists already and would be overwritten: choose another file")
    with alone(paths.parts, paths.out):
        if note.is_file():
            settings.refuse_if_other(read_json(note, ANEW), paths.parts)
        else:
            write(note, json.dumps(asdict(settings), indent=1))
        yield


def finished(settings: Settings, paths: Paths) -> dict[str, Any] | None:
    """The report of a complete run; None if there is still work to do."""
    if not paths.out.exists():
        return None
    if not paths.report.is_file():
        raise FoveateError(f"{paths.out} exists already and has no report beside it: choose another file")
    report = read_json(paths.report, ANEW)
    settings.refuse_if_other(report.get("settings"), paths.out)
    shutil.rmtree(paths.parts, ignore_errors=True)
    return report


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("batches"))
    return Progress(*columns, TimeRemainingColumn(), console=console)


def _finish(settings: Settings, paths: Paths, batches: int, left_out: int) -> None:
    done = batches_done(paths.parts)
    missing = [n for n in range(batches) if n not in done]
    if missing:
        raise FoveateError(f"{len(missing)} batches are missing in {paths.parts}: run the same command again")
    records = [record for n in range(batches) for record in done[n]]
    authors = {
        record["key"]: {"params": square(Box(*record["box"]), Size(record["height"], record["width"]))}
        for record in records
        if record["box"] is not None
    }
    report = {"settings": asdict(settings), **quality(records), "records_without_one_picture": left_out}
    if settings.about == "questions":
        write(paths.authors, json.dumps(authors, ensure_ascii=False))
    write(paths.report, json.dumps(report, indent=1, ensure_ascii=False))
    write(paths.out, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    shutil.rmtree(paths.parts, ignore_errors=True)


def quality(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Numbers that show whether the regions are worth training on.

    `box_share` is the fraction of the picture that boxes cover, at the 10th, 50th and 90th percentile, and
    the mean. `compared` counts the checked questions whose region leaves room for another place of its size:
    `changed_masked` is the fraction of them whose answer changes when the region is masked, and
    `changed_masked_elsewhere` when that place is masked. Regions that matter change more answers.
    """
    boxed = [record for record in records if record["box"] is not None]
    shares = [
        (r["box"][2] - r["box"][0]) * (r["box"][3] - r["box"][1]) / (r["width"] * r["height"]) for r in boxed
    ]
    checked = [record for record in boxed if "answer" in record]
    compared = [record for record in checked if _leaves_room(record)]
    problems = [f"{r['key']}: {r['problem']}" for r in records if r["box"] is None]

    def changed(name: str) -> float | None:
        return statistics.fmean(r[name] != r["answer"] for r in compared) if compared else None

    return {
        "questions": len(records),
        "regions": len(boxed),
        "problems": len(problems),
        "first_problems": problems[:NAMED],
        "box_share": _percentiles(shares),
        "whole_picture": statistics.fmean(share >= WHOLE for share in shares) if shares else None,
        "checked": len(checked),
        "compared": len(compared),
        "changed_masked": changed("answer_masked"),
        "changed_masked_elsewhere": changed("answer_masked_elsewhere"),
    }


def _leaves_room(record: dict[str, Any]) -> bool:
    """Whether the place masked instead of the region does not overlap it."""
    box = Box(*record["box"])
    return box.overlap(elsewhere(box, Size(record["height"], record["width"]))) == 0


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    found = {f"p{p}": ordered[min(len(ordered) * p // 100, len(ordered) - 1)] for p in (10, 50, 90)}
    return {**found, "mean": statistics.fmean(values)}


@names_versions
def annotate_data(
    data: str | Path,
    out: str | Path,
    *,
    model: str | Path | None = None,
    revision: str | None = None,
    subfolder: str = "",
    images: str | Path | None = None,
    split: str = "train",
    rule: RegionRule | None = None,
    batch: int = 8,
    check: int = 200,
    detector: str | None = None,
    about: Literal["questions", "pictures"] = "questions",
    device: str | None = None,
    dtype: str | None = None,
    console: Console | None = None,
    limits: Limits = LIMITS,
) -> dict[str, Any] | None:
    """`foveate annotate`: data and model by name. Every process of a run calls this.

    Args:
        data: `.json` or `.jsonl` of conversations, or a dataset of the `datasets` library.
        out: `.jsonl` file for the boxes.
        model: as for `VLM.load`.
        revision: as for `VLM.load`.
        subfolder: as for `VLM.load`.
        images: folder that picture paths start from; by default the file's own.
        split: of a dataset.
        rule: how relevance becomes a region.
        batch: questions at once.
        check: number of questions, evenly spread, to also answer with their region masked.
        detector: a name for `foveate.zoom.detectors.load_detector`.
        about: questions, or pictures: one region for each, without any question.
        device: by default the best available; of several GPUs, each process takes its own.
        dtype: by default one that suits the device.
        console: for the progress bar.
        limits: on the pictures that are read.

    Returns:
        The report, in the first process; None in the others.

    Raises:
        FoveateError: anything wrong with data, model or file, before anything is written.
    """
    paths = Paths.of(out)
    source = open_annotatable(data, images, split)
    workers = processes()
    if device is None and "LOCAL_RANK" in os.environ and choose_device() == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    detect = None if detector is None else load_detector(detector, device or choose_device())
    vlm = VLM.load(model, device, dtype, revision=revision, subfolder=subfolder)
    settings = Settings(
        data=str(data),
        fingerprint=source.fingerprint,
        images=None if images is None else str(images),
        model=str(model or "embedded"),
        weights=weights_of(vlm.model),
        dtype=str(vlm.model.dtype).removeprefix("torch."),
        rule=rule or RegionRule(),
        batch=batch,
        check=check,
        detector=detector,
        about=about,
    )
    report = run(settings, Annotator(vlm, source, settings.rule, detect, limits), paths.out, workers, console)
    return report if workers.process_index == 0 else None
