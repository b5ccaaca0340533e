"""Answers many requests at once: a picture is encoded once, prompts are read and tokens written in batches.

    submit -> waiting -> opened (its tokens are known) -> ready (its pictures are encoded)
           -> read (a batch of prompts at a time) -> writing (a token a round) -> next turn, or completed

One thread does all of it, in rounds. Requests join and leave between two rounds; one that is cancelled has
left by the next.

Every answer is the one that its request would get alone. A batch computes the same logits as one row alone up
to rounding. Where rounding could change a token, because two are nearly equally likely, the row starts again
and is read and written alone.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from foveate.ask.context import Passage, Written, compacted, visible_tokens
from foveate.ask.engine import Engine, Said, Shown, note, share
from foveate.errors import FoveateError
from foveate.model.modeling import EncodedPictures
from foveate.model.positions import check_lengths
from foveate.model.text import special_tokens
from foveate.picture.account import Account
from foveate.serve.course import Completed, Course, Messages
from foveate.serve.decoding import Own, Part, Read, Slot, Slots, read
from foveate.serve.prefixes import Known, Prefixes, Seen
from foveate.serve.settings import Chooser, Rules, Settings, Token, highest
from foveate.serve.writing import Writing

log = logging.getLogger("foveate.serve")

LONGEST_TOKEN = 16  # characters, on average over a text
UNBOUNDED = 2**17  # tokens, for an LLM that has any number of positions
READ_AT_ONCE = 2048  # tokens of prompts that are read between two rounds of writing
ALIKE = 2  # prompts are read together if none is this many times as long as another
SHORT = 32  # or if they are shorter than this
# How far rounding may move a logit, as a fraction of the largest: many times the format's own precision.
# benchmarks/serving.py counts the answers that differ from those alone: none.
ROUNDING = {torch.float32: 2.0**-14, torch.float16: 2.0**-7, torch.bfloat16: 2.0**-4}


class Full(FoveateError):
    """No further request can wait now.

    Attributes:
        retry_after: seconds after which there may be room.
    """

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Late(FoveateError):
    """A request took longer than it may."""


class Stopped(FoveateError):
    """The scheduler was closed before the request was answered."""


@dataclass(frozen=True)
class Bounds:
    """What all requests may take together, and each alone.

    Attributes:
        places: requests that are read and written at once.
        waiting: requests that wait for a place.
        kv_bytes: keys and values of all places.
        prefix_bytes: keys and values kept of conversations, for those that begin in the same way.
        new_tokens: of one answer.
        prompt_tokens: of one request; None: as many as the LLM has positions for.
        seconds: from a request's arrival to its answer.

    Raises:
        FoveateError: a bound that makes no sense.
    """

    places: int = 32
    waiting: int = 256
    kv_bytes: int = 2**32
    prefix_bytes: int = 2**30
    new_tokens: int = 4096
    prompt_tokens: int | None = None
    seconds: float = 600.0

    def __post_init__(self) -> None:
        for name in ("places", "waiting", "kv_bytes", "new_tokens", "seconds"):
            if not getattr(self, name) > 0:
                raise FoveateError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.prefix_bytes < 0:
            raise FoveateError(f"prefix_bytes must be at least 0, not {self.prefix_bytes}")
        if self.prompt_tokens is not None and self.prompt_tokens < 1:
            raise FoveateError(f"prompt_tokens must be at least 1, not {self.prompt_tokens}")


@dataclass(frozen=True)
class Piece:
    """A piece of an answer while it is written: text, and the tokens that have come since the last one."""

    text: str
    tokens: list[Token]


@dataclass
class Counts:
    """What a scheduler has done so far."""

    answers: int = 0
    failures: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    visual_tokens: int = 0
    new_tokens: int = 0
    encoded_views: int = 0
    reads: int = 0
    steps: int = 0
    alone: int = 0


class Running:
    """A request that was submitted.

    Attributes:
        future: its answer, or why there is none.
        start: when it came, by the monotonic clock.
        first: when its first token was written; None before.
    """

    first: float | None

    def __init__(
        self, messages: Messages, settings: Settings, end: float, listen: Callable[[Piece], None] | None
    ) -> None:
        self.messages, self.settings, self.listen = messages, settings, listen
        self.start, self.end, self.first = time.monotonic(), end, None
        self.future: Future[Completed] = Future()
        self.settled = False

    def cancel(self) -> None:
        """Frees the request's place before the next token, as cancelling its future does."""
        self.future.cancel()

    @property
    def gone(self) -> bool:
        return self.future.cancelled()

    def result(self, timeout: float | None = None) -> Completed:
        """The answer, once it is complete. Raises what is wrong with the request."""
        return self.future.result(timeout)


@dataclass(eq=False)
class Row:
    """One turn of a request, from its prompt to its reply."""

    running: Running
    course: Course
    said: Said
    passage: Passage
    shown: list[Shown]
    settings: Settings
    chooser: Chooser
    writing: Writing
    alone: bool = False  # read from its first token on, and written, without any other row
    known: Known = field(default_factory=Known)
    seen: list[Seen] = field(default_factory=list)
    visible: list[bool] = field(default_factory=list)
    read: int = 0  # tokens of its prompt that are visible
    part: Part | None = None
    place: Slot | Own | None = None
    tokens: list[Token] = field(default_factory=list)
    told: int = 0  # tokens that have left in pieces

    @property
    def parts(self) -> Part:
        """What it reads, once it is ready."""
        assert self.part is not None
        return self.part

    @property
    def apart(self) -> bool:
        """Whether it is read without other rows: also if the states of its pictures' tokens are changed."""
        encoded = self.parts.encoded
        return self.alone or (encoded is not None and encoded.injection is not None)

    @property
    def beginning(self) -> tuple[Any, ...] | None:
        """All that the states up to the last picture depend on; None without pictures."""
        if not self.shown:
            return None
        end = self.passage.places[-1][1]
        return tuple(self.passage.pictures), tuple(self.passage.ids[:end])


class Scheduler:
    """Answers requests on a thread of its own, until it is closed.

    Args:
        engine: a model and what it remembers of pictures. Other threads may use it meanwhile.
        bounds: on what requests take.
        exact: whether a row starts again alone where rounding could change its answer; by default where the
            number format is float32, whose rounding is so small that this is rare.

    Raises:
        FoveateError: a model whose generation_config.json asks for what is not done here.
    """

    def __init__(self, engine: Engine, bounds: Bounds | None = None, exact: bool | None = None) -> None:
        self.engine, self.bounds = engine, bounds or Bounds()
        self.rules = Rules(engine.model)
        self.exact = engine.model.dtype == torch.float32 if exact is None else exact
        self.rounding = ROUNDING[engine.model.dtype]
        self.special, self.positions = special_tokens(engine.processor.tokenizer), engine.model.positions
        self.prefixes, self.slots = (
            Prefixes(self.bounds.prefix_bytes),
            Slots(engine.model, self.bounds.kv_bytes),
        )
        self.counts = Counts()
        self._waiting: deque[Running] = deque()
        self._opened: deque[Row] = deque()
        self._ready: list[Row] = []
        self._writing: list[Row] = []
        self._seconds = 1.0  # that an answer took lately, from its place to its end
        self._closed = False
        self._wake = Condition()
        self._thread = Thread(target=self._run, name="foveate-scheduler", daemon=True)
        self._thread.start()

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Requests that have a place."""
        return len(self._opened) + len(self._ready) + len(self._writing)

    @property
    def full(self) -> bool:
        return self.waiting >= self.bounds.waiting

    def submit(
        self,
        messages: Messages,
        settings: Settings | None = None,
        listen: Callable[[Piece], None] | None = None,
    ) -> Running:
        """Hands in a request.

        Args:
            messages: of a conversation whose last message is the user's; its pictures as `read_picture` gives
                them.
            settings: how it is answered; by default greedily.
            listen: called on the scheduler's thread with each piece of the answer. It must return at once.

        Raises:
            FoveateError: more tokens than an answer may have.
            Full: too many requests wait.
            Stopped: the scheduler is closed.
        """
        settings = (settings or Settings(min(256, self.bounds.new_tokens))).seeded()
        if settings.max_new_tokens > self.bounds.new_tokens:
            raise FoveateError(
                f"an answer may have {self.bounds.new_tokens} tokens at most, not {settings.max_new_tokens}"
            )
        self._check_text(messages)
        running = Running(messages, settings, time.monotonic() + self.bounds.seconds, listen)
        with self._wake:
            if self._closed:
                raise Stopped("the server is stopping")
            if self.full:
                rounds = math.ceil(len(self._waiting) / self.bounds.places)
                raise Full(
                    f"{len(self._waiting)} requests wait already: try again later",
                    min(max(1, math.ceil(rounds * self._seconds)), 60),
                )
            self._waiting.append(running)
            self._wake.notify()
        return running

    def _check_text(self, messages: Messages) -> None:
        """Raises `FoveateError` for a text that cannot fit, as it would be long work to find its tokens."""
        most = self.bounds.prompt_tokens or self.positions or UNBOUNDED
        texts = [message["content"] for message in messages]
        parts = [
            part["text"] for text in texts if not isinstance(text, str) for part in text if "text" in part
        ]
        characters = sum(map(len, parts)) + sum(len(text) for text in texts if isinstance(text, str))
        if characters > LONGEST_TOKEN * most:
            raise FoveateError(f"the request has {characters} characters, for at most {most} tokens")

    def ask(self, picture: Image.Image, question: str, settings: Settings | None = None) -> Running:
        """Hands in a question about a picture, an upright RGB image."""
        parts = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        return self.submit([{"role": "user", "content": parts}], settings)

    def close(self) -> None:
        """Ends the thread. Requests in progress fail with `Stopped`."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    # The thread.

    def _run(self) -> None:
        with torch.inference_mode():
            while True:
                with self._wake:
                    while not (self._closed or self._waiting or self.active):
                        self._wake.wait()
                    if self._closed:
                        break
                try:
                    with self.engine.gate.shared():  # nobody explains an answer meanwhile
                        self._round()
                except Exception as error:  # a fault of the server's own must not end it
                    log.exception("a round of the scheduler failed")
                    self._fail_all(error)
        self._fail_all(Stopped("the server is stopping"))

    def _fail_all(self, error: Exception) -> None:
        for row in [*self._opened, *self._ready, *self._writing]:
            self._drop(row, error)
        with self._wake:
            waiting, self._waiting = list(self._waiting), deque()
        for running in waiting if isinstance(error, Stopped) else []:
            self._settle(running, error)
        if not isinstance(error, Stopped):
            with self._wake:
                self._waiting.extendleft(reversed(waiting))
        self._opened, self._ready, self._writing = deque(), [], []
        self.slots, self.prefixes = (
            Slots(self.engine.model, self.bounds.kv_bytes),
            Prefixes(self.bounds.prefix_bytes),
        )

    def _round(self) -> None:
        self._sweep()
        self._admit()
        self._read()
        self._step()

    def _sweep(self) -> None:
        """Lets requests go that were cancelled or are too late."""
        now = time.monotonic()
        with self._wake:
            gone = [one for one in self._waiting if one.gone or now > one.end]
            if gone:
                self._waiting = deque(one for one in self._waiting if one not in gone)
        late = Late(f"the answer took longer than {self.bounds.seconds:g} s")
        for running in gone:
            self._settle(running, late)
        for row in [*self._opened, *self._ready, *self._writing]:
            if row.running.gone or now > row.running.end:
                self._drop(row, late)

    def _drop(self, row: Row, error: Exception) -> None:
        self._release(row)
        self._settle(row.running, error)

    def _release(self, row: Row) -> None:
        """Takes a row from wherever it is."""
        for rows in (self._opened, self._ready, self._writing):
            if row in rows:
                rows.remove(row)
        if isinstance(row.place, Slot):
            self.slots.leave(row.place)
        row.place = None

    def _settle(self, running: Running, found: Completed | Exception) -> None:
        """Tells whoever waits for a request."""
        if running.settled:
            return
        running.settled = True
        if not running.future.set_running_or_notify_cancel():
            self.counts.cancelled += 1
            return
        self._seconds += (time.monotonic() - running.start - self._seconds) / 16
        if isinstance(found, Completed):
            self.counts.answers += 1
            running.future.set_result(found)
        else:
            self.counts.failures += 1
            running.future.set_exception(found)

    def _admit(self) -> None:
        """Gives free places to requests, and makes their prompts ready to be read."""
        later: list[Row] = []
        pending = {row.beginning for row in self._ready if row.known.seen != row.seen}
        while True:
            row = self._opened.popleft() if self._opened else self._open_next(len(later))
            if row is None:
                break
            with self._failing(row):
                if not row.alone:
                    row.known = self.prefixes.find(row.passage)
                if not row.alone and len(row.known.seen) < len(row.shown) and row.beginning in pending:
                    later.append(row)  # what is being read for another row will do for this one, too
                    continue
                if not self._fits(row):
                    self._opened.appendleft(row)
                    break
                self._encode(row)
                self._ready.append(row)
                pending.add(row.beginning)
        self._opened.extendleft(reversed(later))

    def _open_next(self, held: int) -> Row | None:
        """The next request that waits, as a row; None if there is none, or no place for it."""
        while self.active + held < self.bounds.places:
            with self._wake:
                if not self._waiting:
                    return None
                running = self._waiting.popleft()
            try:
                return self._open(running, Course(self.engine, running.messages, self.special))
            except FoveateError as error:
                self._settle(running, error)
            except Exception as error:
                log.exception("a request could not be read")
                self._settle(running, error)
        return None

    def _open(self, running: Running, course: Course) -> Row:
        """The row of a request's next turn."""
        said = Said()
        start = time.perf_counter()
        with self.engine.lock:
            passage, shown = self.engine.passage(course.messages, said)
        said.ledger.seconds["prepare"] += time.perf_counter() - start
        settings = running.settings
        if course.turn is not None and course.turn.inner:
            settings = settings.inner(course.turn.max_new_tokens)
        live = running.listen is not None and course.last
        writing = Writing(self.engine.processor.tokenizer, settings.ends, live)
        chooser = Chooser(settings, course.number)
        return Row(running, course, said, passage, shown, settings, chooser, writing)

    def _fits(self, row: Row) -> bool:
        """Whether there is room for the keys and values of a further row. One alone always has it."""
        rows = [row, *self._ready, *self._writing]
        width = max(len(one.passage.ids) + one.settings.max_new_tokens for one in rows)
        return len(rows) == 1 or len(rows) * width * self.slots.bytes_per_token <= self.bounds.kv_bytes

    def _encode(self, row: Row) -> None:
        """Makes a row ready: the visual tokens of its pictures, and which tokens the LLM reads now."""
        most, known = self.bounds.prompt_tokens, row.known
        if most is not None and len(row.passage.ids) > most:
            raise FoveateError(f"the request has {len(row.passage.ids)} tokens, at most {most} are allowed")
        new, encoded = row.shown[len(known.seen) :], None
        if new:
            with self.engine.lock:
                encoded = self.engine.encode(new, [row.said.ledger], apart=True)
            note(new, encoded)
        (after,) = visible_tokens([row.passage], [known.tokens], encoded)
        row.visible = known.visible + after
        row.read = sum(row.visible)
        row.seen = known.seen + _seen(row, new, encoded)
        ids = [one for one, keep in zip(row.passage.ids[known.tokens :], after, strict=True) if keep]
        if self.positions is not None and row.read >= self.positions:
            visual = torch.tensor([row.passage.ids]) == self.engine.model.config.image_token_id
            visual &= torch.tensor([row.visible])
            check_lengths(torch.tensor([row.read]), self.positions, visual, answer=1)
        row.part = Part(ids, known, None if encoded is None else compacted(encoded))

    def _read(self) -> None:
        """Reads prompts, those of about the same length together, up to a bound on the tokens of a round."""
        left = READ_AT_ONCE
        while self._ready and left > 0:
            group = self._group()
            left -= len(group) * max(len(row.parts.ids) for row in group)
            self._ready = [row for row in self._ready if row not in group]
            start = time.perf_counter()
            with self._failing(*group):
                logits, read_now = read(self.engine.model, [row.parts for row in group])
                self.counts.reads += 1
                share([row.said.ledger for row in group], "generate", time.perf_counter() - start)
                fresh = len(group) == 1 and not group[0].parts.before
                for row, scores, best, held in zip(group, logits, highest(logits), read_now, strict=True):
                    self._place(row, held)
                    self._writing.append(row)
                    with self._failing(row):
                        self._choose(row, scores, best, fresh)

    def _group(self) -> list[Row]:
        """The rows that are read with the one that is ready first."""
        first, *others = self._ready
        if first.apart:
            return [first]
        size, group = len(first.parts.ids), [first]
        for row in others:
            longest = max(len(row.parts.ids), *(len(one.parts.ids) for one in group))
            alike = longest <= max(SHORT, ALIKE * size) and size <= max(SHORT, ALIKE * len(row.parts.ids))
            if alike and not row.apart and longest * (len(group) + 1) <= READ_AT_ONCE:
                group.append(row)
        return group

    def _place(self, row: Row, held: Own | Read) -> None:
        """Gives a row that has been read a place to write, and keeps what was read of its pictures."""
        if isinstance(held, Own) and (row.alone or not held.shared):
            row.place = held
        else:
            row.place = self.slots.join(held.read() if isinstance(held, Own) else held)
        if len(row.seen) > len(row.known.seen):
            self._keep(row, row.seen[-1].end)
        row.known = row.parts.known = Known()  # nothing of which is needed any more
        row.parts.encoded = None

    def _keep(self, row: Row, tokens: int) -> None:
        """Keeps what a row has read, up to a number of tokens, for those that begin in the same way."""
        if isinstance(row.place, Own) and not row.place.shared:
            return
        assert row.place is not None
        written = [token.id for token in row.tokens[:-1]]  # the last one has not been read
        ids = (row.passage.ids + written)[:tokens]
        visible = (row.visible + [True] * len(written))[:tokens]
        self.prefixes.keep(ids, visible, row.seen, row.place.states())

    def _step(self) -> None:
        """One token of every row that writes."""
        rows = {row.place: row for row in self._writing if isinstance(row.place, Slot)}
        own = [row for row in self._writing if isinstance(row.place, Own)]
        if rows:
            placed = [rows[slot] for slot in self.slots.taken]
            start = time.perf_counter()
            with self._failing(*placed):
                logits = self.slots.step([row.tokens[-1].id for row in placed])
                self.counts.steps += 1
                share([row.said.ledger for row in placed], "generate", time.perf_counter() - start)
                for row, scores, best in zip(placed, logits, highest(logits), strict=True):
                    with self._failing(row):
                        self._choose(row, scores, best)
        for row in own:
            start = time.perf_counter()
            with self._failing(row):
                assert isinstance(row.place, Own)
                scores = row.place.step(self.engine.model, row.tokens[-1].id)
                self.counts.steps += 1
                share([row.said.ledger], "generate", time.perf_counter() - start)
                self._choose(row, scores)

    def _choose(
        self, row: Row, logits: Tensor, likeliest: tuple[int, float] | None = None, fresh: bool = False
    ) -> None:
        """The next token of a row, and what follows from it.

        Args:
            row: it writes.
            logits: (V,) of the next token.
            likeliest: as of `highest`, if known.
            fresh: whether the logits were computed as for the row alone.
        """
        ids = [token.id for token in row.tokens]
        if self.rules.processors:
            logits, likeliest = self.rules.scores(logits, row.passage.ids + ids), None
        choice = row.chooser.choose(logits, likeliest)
        if self.exact and not (fresh or row.alone) and choice.margin < self._slack(logits):
            self._start_again(row)
            return
        if not row.tokens and row.running.first is None:
            row.running.first = time.monotonic()
        row.tokens.append(choice.token)
        ids.append(choice.token.id)
        ended = choice.token.id in self.rules.ends
        full = len(ids) >= row.settings.max_new_tokens or (
            self.positions is not None and row.read + len(ids) >= self.positions
        )
        text, stopped = row.writing.read(ids, ended or full)
        if not (ended or stopped or full):
            self._tell(row, text, row.tokens, last=False)
            return
        kept = _answer(row.tokens, row.writing, ids) if row.course.last else row.tokens
        self._tell(row, text, kept, last=True)
        self._finish(row, "stop" if ended or stopped else "length", kept)

    def _slack(self, scores: Tensor) -> float:
        """How far rounding may have moved a score."""
        return self.rounding * max(1.0, float(scores.abs().nan_to_num(posinf=0.0).max()))

    def _start_again(self, row: Row) -> None:
        """Lets a row start again, alone."""
        self.counts.alone += 1
        self._release(row)
        again = self._open(row.running, row.course)
        again.alone, again.writing, again.told = True, row.writing, row.told
        self._opened.appendleft(again)

    def _tell(self, row: Row, text: str, tokens: Sequence[Token], last: bool) -> None:
        if row.running.listen is None or not row.course.last:
            return
        new = list(tokens[row.told :])
        if text or (last and new):
            row.told = max(row.told, len(tokens))
            row.running.listen(Piece(text, new))

    def _finish(self, row: Row, finish: str, tokens: list[Token]) -> None:
        """The end of a row's turn: its costs, and the next turn or the answer."""
        ids, ledger = [token.id for token in row.tokens], row.said.ledger
        self.engine.settle(row.said, Written(ids, len(row.parts.ids), row.parts.before))
        self._keep(row, len(row.passage.ids) + len(ids))
        self._count(row)
        self._release(row)
        text = row.writing.text(ids)[0] if row.settings.ends else row.said.text
        with self._failing(row):
            end = row.course.hear(text, ledger, row.seen)
            if end is None:
                self._opened.appendleft(self._open(row.running, row.course))
                return
            done = row.course.complete(end, finish, tokens, row.seen, row.read)
            self._settle(row.running, done)

    def _count(self, row: Row) -> None:
        counts, ledger = self.counts, row.said.ledger
        counts.prompt_tokens += ledger.prompt_tokens
        counts.cached_tokens += ledger.kept_tokens
        counts.visual_tokens += ledger.visual_tokens
        counts.new_tokens += ledger.new_tokens
        counts.encoded_views += ledger.encoded_views

    @contextmanager
    def _failing(self, *rows: Row) -> Iterator[None]:
        """Whatever goes wrong with rows is the end of these, and of no other."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, FoveateError):
                log.exception("%d requests failed", len(rows))
            for row in rows:
                self._drop(row, error)


def _seen(row: Row, new: Sequence[Shown], encoded: EncodedPictures | None) -> list[Seen]:
    """The pictures that a row reads now."""
    if encoded is None:
        return []
    found = []
    first = len(row.shown) - len(new)
    for i, picture in enumerate(new):
        start, end = row.passage.places[first + i]
        account = Account() if encoded.accounts is None else encoded.accounts[i]
        kept = end - start if encoded.kept is None else int(encoded.kept[i].sum())
        # Regions and notes alone: the rest holds pictures and features.
        brief = Account(regions=account.regions, notes=list(account.notes))
        found.append(Seen(picture.key, start, end, brief, kept))
    return found


def _answer(tokens: list[Token], writing: Writing, ids: Sequence[int]) -> list[Token]:
    """The tokens of an answer, without those at its end that add nothing to its text."""
    text, count = writing.text(ids)[0], len(ids)
    while count and writing.text(ids[: count - 1])[0] == text:
        count -= 1
    return tokens[:count]
