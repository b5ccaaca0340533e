"""A file of questions becomes a file of answers: line after line, in order, as far as it got.

    QUESTIONS.jsonl      read line by line, as `foveate.evaluate.samples` reads its records
    OUT.jsonl            an answer a line, in the same order; what cannot be asked has an `error` instead
    OUT.jsonl.run/       what decides the answers, and a lock that keeps other runs away

An answer is written and synced before the next one is looked at, so the file is always the beginning of the
whole. After a kill, the same command cuts off a torn last line and goes on behind it. Neither file is ever in
memory: a window of questions is, and the pictures of those that are being asked.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from foveate.errors import FoveateError
from foveate.evaluate.models import Answering
from foveate.evaluate.samples import picture_of, samples_of
from foveate.files import alone, explained, read_json, write
from foveate.picture.limits import LIMITS, Limits
from foveate.picture.reading import Transparency, read_picture
from foveate.zoom.asking import Unavailable

BLOCK = 2**20
LONGEST = 2**27  # bytes of a line
ANEW = "choose another file, or delete it and the folder beside it"


class Line(NamedTuple):
    """A line of the questions: its number, from 1, and where it stands in the file."""

    number: int
    start: int
    length: int


@dataclass(frozen=True)
class Job:
    """What decides the answers. A resumed run must have the same; how many are asked at once does not count.

    Attributes:
        questions: name of the file.
        digest: of its bytes.
        model: as `Answering.describe` says.
        max_new_tokens: bound on an answer.
        transparency: what transparent pictures show.
    """

    questions: str
    digest: str
    model: Mapping[str, Any]
    max_new_tokens: int
    transparency: Transparency

    def refuse_if_other(self, before: Any, out: Path) -> None:
        """Raises `FoveateError` if a run was made with other settings."""
        for name, value in json.loads(json.dumps(asdict(self))).items():
            if not isinstance(before, dict) or before.get(name) != value:
                then = before.get(name) if isinstance(before, dict) else None
                raise FoveateError(
                    f"{out} is from a run with {name} {then!r:.100}, not {value!r:.100}: choose another file"
                )


class Work(Protocol):
    """Whoever answers lines, in any order it likes, and gives the answers in theirs."""

    def __call__(self, lines: Iterator[Line]) -> Iterator[list[str]]:
        """For each line its answers, as JSON; closing the iterator ends the work."""


class Asking:
    """Answers lines of a file of questions.

    Args:
        answering: is asked.
        questions: the file.
        images: folder that picture paths start from and must stay in.
        max_new_tokens: bound on an answer.
        limits: on the pictures that are read.
        transparency: what transparent pictures show.
    """

    def __init__(
        self,
        answering: Answering,
        questions: Path,
        images: Path,
        max_new_tokens: int,
        limits: Limits = LIMITS,
        transparency: Transparency | None = None,
    ) -> None:
        self.answering, self.questions, self.images = answering, questions, images
        self.max_new_tokens, self.limits = max_new_tokens, limits
        self.transparency = transparency or answering.transparency

    def __call__(self, lines: Sequence[Line]) -> list[list[str]]:
        """For each line its answers, all asked at once.

        Raises:
            Unavailable: whoever is asked does not answer now.
        """
        found: list[list[dict[str, Any]]] = []
        asked: list[tuple[dict[str, Any], Any]] = []
        for line in lines:
            found.append([])
            for value, pair in self._of(line):
                found[-1].append(value)
                if pair is not None:
                    asked.append((value, pair))
        self._answer(asked)
        return [[json.dumps(value, ensure_ascii=False) for value in values] for values in found]

    def _of(self, line: Line) -> list[tuple[dict[str, Any], Any]]:
        """What is written of a line, and the picture and question to be answered; None if they cannot be."""
        name, where = {"line": line.number}, f"line {line.number}"
        try:
            record = self._record(line)
            made: list[tuple[dict[str, Any], Any]] = []
            for sample in samples_of(record, line.number - 1, where, self.images):
                known = {**name, "id": sample.id, "question": sample.question}
                try:
                    picture = read_picture(picture_of(record, self.images), self.limits, self.transparency)
                    made.append((known, (picture, sample.question)))
                except FoveateError as error:
                    made.append(({**known, "error": str(error)}, None))
            for value, _ in made if len(made) > 1 else ():
                value["parts"] = len(made)  # so that one sees whether all are there
            return made
        except FoveateError as error:
            return [({**name, "error": str(error)}, None)]

    def _record(self, line: Line) -> Any:
        if line.length > LONGEST:
            raise FoveateError(f"has more than {LONGEST} bytes: give its picture as a file")
        with self.questions.open("rb") as file:
            file.seek(line.start)
            content = file.read(line.length)
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise FoveateError(f"is not JSON: {str(error).partition(':')[0]}") from None

    def _answer(self, asked: Sequence[tuple[dict[str, Any], Any]]) -> None:
        """Adds to what is written of each question its answer, or why there is none."""
        if not asked:
            return
        try:
            answers = self.answering.answer([pair for _, pair in asked], self.max_new_tokens)
        except Unavailable:
            raise
        except FoveateError as error:
            if len(asked) == 1:
                asked[0][0]["error"] = str(error)
                return
            for one in asked:  # one of them cannot be asked
                self._answer([one])
            return
        for (value, _), given in zip(asked, answers, strict=True):
            regions = [list(box.rounded()) for box in given.regions]
            value |= {"answer": given.text, "regions": regions, "notes": given.notes}


def in_threads(asking: Asking, batch: int, at_once: int) -> Work:
    """Work in this process.

    Args:
        asking: answers lines.
        batch: lines that it is given at once.
        at_once: threads that ask; a server takes several, a model here one.
    """

    def work(lines: Iterator[Line]) -> Iterator[list[str]]:
        waiting: deque[Future[list[list[str]]]] = deque()
        pool = ThreadPoolExecutor(at_once)
        try:
            for group in _grouped(lines, batch):
                waiting.append(pool.submit(asking, group))
                if len(waiting) > at_once:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    return work


def _grouped(lines: Iterable[Line], size: int) -> Iterator[list[Line]]:
    group: list[Line] = []
    for line in lines:
        group.append(line)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def lines_of(questions: Path) -> Iterator[Line]:
    """The lines of a file that are not empty. Reads it in blocks."""
    number, start, at, blank = 1, 0, 0, True
    with questions.open("rb") as file:
        while block := file.read(BLOCK):
            *ends, rest = block.split(b"\n")
            for part in ends:
                at += len(part) + 1
                if not (blank and not part.strip()):
                    yield Line(number, start, at - 1 - start)
                number, start, blank = number + 1, at, True
            at += len(rest)
            blank = blank and not rest.strip()
    if not blank:
        yield Line(number, start, at - start)


def digest_of(questions: Path) -> tuple[str, int]:
    """The digest of a file's bytes, and how many lines it has that are not empty."""
    digest = hashlib.sha256()
    with questions.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest(), sum(1 for _ in lines_of(questions))


def opened(questions: str | Path, images: str | Path | None) -> tuple[Path, Path]:
    """The file of questions and the folder of its pictures. Raises `FoveateError` if one is not there."""
    path = Path(questions)
    if path.suffix != ".jsonl" or not path.is_file():
        raise FoveateError(f"{path}: give a file of questions, .jsonl, one a line")
    folder = path.parent if images is None else Path(images)
    if not folder.is_dir():
        raise FoveateError(f"there is no folder {folder} for the pictures")
    return path, folder


def run(
    job: Job, total: int, questions: Path, out: Path, work: Work, console: Console | None = None
) -> Counts:
    """Answers what is left of a file of questions.

    Args:
        job: what decides the answers.
        total: lines of the questions.
        questions: the file.
        out: `.jsonl` file of the answers.
        work: answers lines.
        console: of the progress bar; None: there is none.

    Raises:
        FoveateError: `out` is from another run or cannot be written.
        Unavailable: whoever is asked does not answer now; what was answered is written.
    """
    if out.suffix != ".jsonl":
        raise FoveateError(f"{out} must end in .jsonl")
    if not out.absolute().parent.is_dir():
        raise FoveateError(f"{out}: there is no folder {out.absolute().parent}")
    folder = out.with_name(f"{out.name}.run")
    note = folder / "job.json"
    if out.exists() and not note.is_file():
        raise FoveateError(f"{out} exists already and is of no run: choose another file")
    with alone(folder, out):
        if note.is_file():
            job.refuse_if_other(read_json(note, ANEW), out)
        else:
            write(note, json.dumps(asdict(job), indent=1))
        counts = Counts(total)
        done = counts.of(out)
        left = (line for line in lines_of(questions) if line.number > done)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        shown = Console(quiet=True) if console is None else console
        with (
            explained(out),
            Progress(*columns, console=shown) as bar,
            out.open("ab") as file,
            closing(_iterated(work, left)) as answers,
        ):
            task = bar.add_task("asking", total=total, completed=counts.lines)
            for written in answers:
                content = "".join(f"{one}\n" for one in written).encode("utf-8", "surrogatepass")
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                counts.add(written)
                bar.update(task, completed=counts.lines)
    return counts


def _iterated(work: Work, lines: Iterator[Line]) -> Generator[list[str], None, None]:
    """The answers as a generator, which can be closed."""
    yield from work(lines)


class Counts:
    """How far a run has got: lines that were answered, answers, and errors, of `total` lines."""

    def __init__(self, total: int) -> None:
        self.total, self.lines, self.answers, self.errors = total, 0, 0, 0

    def add(self, written: Sequence[str]) -> None:
        """The answers of one line."""
        failed = sum("error" in json.loads(one) for one in written)
        self.lines, self.errors = self.lines + 1, self.errors + failed
        self.answers += len(written) - failed

    def of(self, out: Path) -> int:
        """Counts what is in a file of answers, and cuts off a last line whose answers are not all there.

        Returns the number of the last line of the questions that is answered; 0 for none.
        """
        if not out.exists():
            return 0
        last, end, at = 0, 0, 0
        group: list[str] = []  # the answers of a line so far
        with out.open("rb") as file:
            for content in file:
                value = _answer_in(content)
                if value is None:
                    if file.read(1):
                        raise FoveateError(f"{out} is broken at byte {at}: {ANEW}")
                    break
                at += len(content)
                group.append(content.decode("utf-8", "surrogatepass"))
                if len(group) == value.get("parts", 1):
                    self.add(group)
                    last, end, group = value["line"], at, []
        os.truncate(out, end)
        return last


def _answer_in(content: bytes) -> dict[str, Any] | None:
    """An answer's values; None for what is not a whole line of answers."""
    try:
        value = json.loads(content) if content.endswith(b"\n") else None
    except ValueError:
        return None
    whole = isinstance(value, dict) and isinstance(value.get("line"), int)
    return value if whole else None
