"""Building: sources -> drafts -> filters -> one file of conversations, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from foveate.data.mixture import leaves
from foveate.data.smr.charts import DRAWN, chartqa, dvqa
from foveate.data.smr.drafts import Draft
from foveate.data.smr.filters import BLANK, LEAK, Evaluation, Look, look_at, pictures_of, text_problem
from foveate.data.smr.maths import geometry3k, geoqa3, mathvision, tabmwp
from foveate.data.smr.science import ai2d, arxivqa, scienceqa, textbookqa
from foveate.data.smr.statistics import MARK, Lengths, draw, lengths_of, require_drawing
from foveate.errors import FoveateError
from foveate.files import UNFINISHED, changed_folder, explained, new_file

Convert = Callable[[Path, random.Random], Iterator[Draft]]
CONVERTERS: dict[str, Convert] = {
    "arxivqa": arxivqa,
    "scienceqa": scienceqa,
    "mathvision": mathvision,
    "ai2d": ai2d,
    "textbookqa": textbookqa,
    "GeoQA3": geoqa3,
    "Geometry3K": geometry3k,
    "tabmwp": tabmwp,
    "DVQA": dvqa,
    "ChartQA": chartqa,
}  # by the folder of each source, as the authors name them
AT_ONCE = 256  # samples whose pictures are decoded side by side
SHOWN = 3  # examples of what is left out
AGAIN = "it came before, word for word"
EXTRACTED = "pictures"  # below the folder: those that Parquet files hold
UNMATCHED = f"{UNFINISHED}{UNFINISHED}"  # no picture is stale: another file may name it
DRAWINGS = {".png": "png", ".svg": "svg", ".pdf": "pdf"}


@dataclass(frozen=True)
class Request:
    """What is to be built.

    Attributes:
        folder: of the sources; picture paths start from it.
        sources: names of `CONVERTERS`.
        out: the file of conversations, `.json`.
        against: folders with the pictures of evaluation sets, or Parquet files that hold them.
        compare: files of conversations whose lengths are drawn beside, by name.
        figure: the drawing of lengths, `.png`, `.svg` or `.pdf`.
        dvqa: questions of DVQA that are drawn.
        seed: of what is drawn at random.
        workers: threads that decode pictures.
    """

    folder: Path
    sources: tuple[str, ...]
    out: Path
    against: tuple[Path, ...] = ()
    compare: dict[str, Path] = field(default_factory=dict)
    figure: Path | None = None
    dvqa: int = DRAWN
    seed: int = 0
    workers: int = 4

    def __post_init__(self) -> None:
        for name in self.sources:
            if name not in CONVERTERS:
                raise FoveateError(f"there is no source {name!r}: choose from {', '.join(CONVERTERS)}")
            if not (self.folder / name).is_dir():
                raise FoveateError(
                    f"there is no folder {self.folder / name}: unpack the data set there, or choose others "
                    "with --only"
                )
        if not self.sources:
            raise FoveateError(f"no source is chosen: choose from {', '.join(CONVERTERS)}")
        if self.out.suffix != ".json":
            raise FoveateError(f"{self.out} must end in .json")
        if self.figure is not None and self.figure.suffix not in DRAWINGS:
            raise FoveateError(f"{self.figure} must end in {', '.join(DRAWINGS)}")
        for name in ("dvqa", "workers"):
            if getattr(self, name) < 1:
                raise FoveateError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass
class SourceReport:
    """What became of a source: samples read, kept, and left out by reason, with the places of the first."""

    read: int = 0
    kept: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[str]] = field(default_factory=dict)
    lengths: Lengths = field(default_factory=Lengths)

    def leave_out(self, reason: str, where: str) -> None:
        self.left_out[reason] += 1
        places = self.first.setdefault(reason, [])
        if len(places) < SHOWN:
            places.append(where)

    def values(self) -> dict[str, Any]:
        return {
            "read": self.read,
            "kept": self.kept,
            "left_out": {
                reason: {"samples": count, "first": self.first[reason]}
                for reason, count in self.left_out.most_common()
            },
            "lengths": self.lengths.summary(),
        }


def build(request: Request, progress: Callable[[str, int], None] | None = None) -> dict[str, SourceReport]:
    """Writes the samples of all sources that pass the filters, and beside them `NAME.report.json`.

    Args:
        request: what is wanted.
        progress: is told the source and the number of its samples so far.

    Raises:
        FoveateError: a source that is missing or not in its published format, a path that leaves the folder,
            an id with two contents, nothing left; the message names the record. Nothing is written then.
    """
    for path in filter(None, (request.out, request.figure)):  # before hours of work
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
    if request.figure is not None:
        require_drawing()
    reports = {name: SourceReport() for name in request.sources}
    compared = {name: lengths_of(path) for name, path in request.compare.items()}
    for name, lengths in compared.items():
        if not len(lengths):
            raise FoveateError(f"{request.compare[name]} holds no samples to compare with")
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(request.workers))
        evaluation = _evaluation(request.against, pool)
        part = stack.enter_context(new_file(request.out))  # gets its name last
        report_file = stack.enter_context(new_file(request.out.with_suffix(".report.json")))
        pictures = stack.enter_context(_Extracted(request.folder))
        # halves of a character, in ids, are written as JSON escapes them
        with explained(request.out), part.open("w", encoding="utf-8", errors="backslashreplace") as file:
            writer = _Writer(file)
            for name in request.sources:
                _source(name, request, reports[name], evaluation, pool, pictures, writer, progress)
            writer.close()
        if not writer.count:
            raise FoveateError(f"no sample of {', '.join(request.sources)} is left: {_reasons(reports)}")
        settings = {"seed": request.seed, "dvqa": request.dvqa, "evaluation_pictures": len(evaluation)}
        values = {"settings": settings, "sources": {name: r.values() for name, r in reports.items()}}
        with explained(request.out):
            report_file.write_text(json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")
        if request.figure is not None:
            drawing = stack.enter_context(new_file(request.figure))
            draw(_drawn(compared, reports), drawing, DRAWINGS[request.figure.suffix])
    return reports


def _drawn(compared: dict[str, Lengths], reports: dict[str, SourceReport]) -> dict[str, Lengths]:
    own = Lengths()
    for report in reports.values():
        own.queries += report.lengths.queries
        own.answers += report.lengths.answers
    return {**compared, "SMR": own}


def _reasons(reports: dict[str, SourceReport]) -> str:
    total: Counter[str] = Counter()
    for report in reports.values():
        total += report.left_out
    return "; ".join(f"of {count:,}, {reason}" for reason, count in total.most_common()) or "they hold none"


def _evaluation(sets: Sequence[Path], pool: Executor) -> Evaluation:
    """The pictures of evaluation sets. Raises `FoveateError` for one that cannot be read."""
    looks = []
    for path in sets:
        pictures = pictures_of(path)
        while batch := list(islice(pictures, AT_ONCE)):
            for (where, _), look in zip(batch, pool.map(look_at, [p for _, p in batch]), strict=True):
                if isinstance(look, Look):
                    looks.append(look)
                elif look != BLANK:
                    raise FoveateError(f"{where} of an evaluation set cannot be compared with: {look}")
    return Evaluation(looks)


class _Writer:
    """A JSON list, record by record."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.count = file, 0

    def write(self, record: dict[str, Any]) -> None:
        self.file.write("[\n" if not self.count else ",\n")
        self.file.write(json.dumps(record, ensure_ascii=False))
        self.count += 1

    def close(self) -> None:
        self.file.write("\n]\n" if self.count else "[]\n")


class _Extracted:
    """Pictures that records hold, by their digests; their folder appears when all has gone well."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.stack = folder, ExitStack()
        self.part: Path | None = None

    def __enter__(self) -> _Extracted:
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self.stack.__exit__(*error)

    def add(self, picture: bytes) -> str:
        """Keeps a picture; returns its path below the folder."""
        if self.part is None:
            self.part = self.stack.enter_context(changed_folder(self.folder / EXTRACTED, UNMATCHED))
        ending = "jpg" if picture.startswith(b"\xff\xd8") else "png"
        name = f"{hashlib.sha256(picture).hexdigest()[:24]}.{ending}"
        (self.part / name).write_bytes(picture)
        return f"{EXTRACTED}/{name}"


def _source(
    name: str,
    request: Request,
    report: SourceReport,
    evaluation: Evaluation,
    pool: Executor,
    pictures: _Extracted,
    writer: _Writer,
    progress: Callable[[str, int], None] | None,
) -> None:
    """Writes what is left of one source."""
    convert = partial(dvqa, drawn=request.dvqa) if name == "DVQA" else CONVERTERS[name]
    folder = request.folder / name
    drafts = _once(convert(folder, random.Random(f"{request.seed} {name}")), report)
    looked: dict[str, str | None] = {}
    while batch := list(islice(drafts, AT_ONCE)):
        fresh = {_key(draft): _place(draft, folder) for draft in batch if draft.problem is None}
        fresh = {key: place for key, place in fresh.items() if key not in looked}
        for key, look in zip(fresh, pool.map(look_at, fresh.values()), strict=True):
            looked[key] = (LEAK if evaluation.has(look) else None) if isinstance(look, Look) else look
        for draft in batch:
            query, answer = _tidy(draft.query), _tidy(draft.answer)
            problem = draft.problem or text_problem(query, answer) or looked[_key(draft)]
            if problem is not None:
                report.leave_out(problem, draft.where)
                continue
            picture = draft.picture
            path = pictures.add(picture) if isinstance(picture, bytes) else f"{name}/{picture}"
            turns = [{"from": "human", "value": f"{MARK}\n{query}"}, {"from": "gpt", "value": answer}]
            writer.write({"id": f"{name}-{draft.name}", "image": path, "conversations": turns})
            report.kept += 1
            report.lengths.add(query, answer)
        if progress is not None:
            progress(name, report.read)


def _once(drafts: Iterator[Draft], report: SourceReport) -> Iterator[Draft]:
    """Drafts with paths that stay in the folder and with ids of their own.

    Raises `FoveateError` for other paths, and for an id that came before with another content.
    """
    seen: dict[str, bytes] = {}
    for draft in drafts:
        report.read += 1
        if isinstance(draft.picture, str):
            problem = leaves(draft.picture)
            if problem is not None:
                raise FoveateError(f"{draft.where}: the picture's path {draft.picture!r:.120} {problem}")
        content = hashlib.sha256(repr((draft.picture, draft.query, draft.answer)).encode()).digest()
        if draft.name in seen:
            if seen[draft.name] != content:
                raise FoveateError(
                    f"{draft.where}: the id {draft.name!r:.80} came before with another content: keep one"
                )
            report.leave_out(AGAIN, draft.where)
            continue
        seen[draft.name] = content
        yield draft


def _key(draft: Draft) -> str:
    picture = draft.picture
    return hashlib.sha256(picture).hexdigest() if isinstance(picture, bytes) else picture


def _place(draft: Draft, folder: Path) -> Path | bytes:
    return draft.picture if isinstance(draft.picture, bytes) else folder / draft.picture


def _tidy(text: str) -> str:
    """A text without the mark that would stand for a second picture."""
    return text.replace(MARK, "").strip()
