"""The server of a model: OpenAI's chat completions over the scheduler."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field

from fastapi import FastAPI, Request
from prometheus_client import Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.responses import Response

from foveate.ask.foveate import Foveate
from foveate.errors import FoveateError
from foveate.serve.course import Completed, Messages
from foveate.serve.http import (
    DONE,
    Door,
    Events,
    Metrics,
    Pictures,
    Refused,
    answer,
    busy,
    event,
    new_app,
    note,
    on_leave,
    read_json,
    unless_gone,
)
from foveate.serve.protocol import Answers, ChatRequest, parsed
from foveate.serve.scheduler import Bounds, Full, Late, Piece, Running, Scheduler, Stopped
from foveate.serve.settings import Settings, Token

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
WHAT = {
    "answers": "Requests answered.",
    "failures": "Requests that failed.",
    "cancelled": "Requests whose client left.",
    "prompt_tokens": "Tokens of prompts that were read.",
    "cached_tokens": "Tokens of prompts that had been read before.",
    "visual_tokens": "Visual tokens that were read.",
    "new_tokens": "Tokens written.",
    "encoded_views": "Views encoded.",
    "reads": "Batches of prompts read.",
    "steps": "Tokens written in parallel: rounds of it.",
    "alone": "Rows that started again, alone, as rounding could have changed their answer.",
}


@dataclass(frozen=True)
class Serving:
    """How a model is served.

    Attributes:
        name: of the model in requests and answers.
        door: who is let in.
        pictures: how pictures are read.
        bounds: on what requests take.
        exact: as for `Scheduler`.
        new_tokens: of an answer whose request names no bound.
    """

    name: str
    door: Door = field(default_factory=Door)
    pictures: Pictures = field(default_factory=Pictures)
    bounds: Bounds = field(default_factory=Bounds)
    exact: bool | None = None
    new_tokens: int = 256


class Server:
    """A model that answers over HTTP.

    Args:
        foveate: the model.
        serving: how.

    Attributes:
        app: for `foveate.serve.http.Listener`, or any server of ASGI.
        scheduler: what answers; also without HTTP.
    """

    def __init__(self, foveate: Foveate, serving: Serving) -> None:
        self.foveate, self.serving = foveate, serving
        self.scheduler = Scheduler(foveate.engine, serving.bounds, serving.exact)
        self.metrics, self.started = Metrics(), int(time.time())
        self.metrics.registry.register(Figures(self.scheduler))
        self._first = Histogram(
            "first_token_seconds",
            "Seconds from a request's arrival to its first token.",
            buckets=SECONDS,
            registry=self.metrics.registry,
            namespace="foveate",
        )
        self.app = new_app(serving.door, self.metrics, self._ready, self._lifespan)
        self.app.get("/v1/models")(self.models)
        self.app.get("/v1/models/{name:path}")(self.model)
        self.app.post("/v1/chat/completions")(self.chat)

    def _ready(self) -> bool:
        return self.scheduler.alive and not self.scheduler.full

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self.scheduler.close)

    def _described(self) -> dict[str, object]:
        return {
            "id": self.serving.name,
            "object": "model",
            "created": self.started,
            "owned_by": "foveate",
        }

    async def models(self) -> Response:
        return answer({"object": "list", "data": [self._described()]})

    async def model(self, name: str) -> Response:
        self._check_name(name)
        return answer(self._described())

    def _check_name(self, name: str) -> None:
        if name != self.serving.name:
            raise Refused(
                404,
                f"the model {name[:100]!r} is not served here, {self.serving.name!r} is",
                code="model_not_found",
                param="model",
            )

    async def chat(self, request: Request) -> Response:
        """A chat completion."""
        asked = parsed(ChatRequest, await read_json(request))
        self._check_name(asked.model)
        settings = asked.settings(min(self.serving.new_tokens, self.serving.bounds.new_tokens))
        answers = Answers(
            f"chatcmpl-{secrets.token_hex(12)}",
            self.serving.name,
            int(time.time()),
            self.foveate.processor.tokenizer,
        )
        transparency = self.foveate.processor.image_processor.transparency
        pictures = await self.serving.pictures.read(request, asked.pictures, transparency)
        messages = asked.conversation(pictures)
        heard, live = _Heard(), bool(asked.stream)
        running = self._submit(request, messages, settings, heard.piece if live else None)
        running.future.add_done_callback(heard.end)
        first = await unless_gone(request, heard.next)  # what is refused has a status of its own
        if isinstance(first, Refused):
            raise first
        if isinstance(first, Completed) and not live:
            self._note(request, running, first)
            return answer(answers.whole(first, settings.logprobs is not None))
        usage = asked.stream_options is not None and asked.stream_options.include_usage

        async def source() -> AsyncGenerator[bytes, None]:
            tokens: list[Token] | None = None if settings.logprobs is None else []
            yield event(answers.piece("", tokens, usage, role=True))
            found: Piece | Completed | Refused = first
            while isinstance(found, Piece):
                tokens = None if settings.logprobs is None else found.tokens
                yield event(answers.piece(found.text, tokens, usage))
                found = await heard.next()
            if isinstance(found, Refused):
                yield event(found.body)
                return
            self._note(request, running, found)
            yield event(answers.last(found, usage))
            if usage:
                yield event(answers.used(found))
            yield DONE

        return Events(source())

    def _submit(
        self,
        request: Request,
        messages: Messages,
        settings: Settings,
        listen: Callable[[Piece], None] | None,
    ) -> Running:
        """Hands the request to the scheduler; its place is free as soon as the client has left."""
        try:
            running = self.scheduler.submit(messages, settings, listen)
        except FoveateError as error:
            raise _refused(error) from None
        on_leave(request, running.cancel)
        return running

    def _note(self, request: Request, running: Running, done: Completed) -> None:
        """Adds to the request's line in the log, and to the metrics, what it took."""
        first = 0.0 if running.first is None else running.first - running.start
        self._first.observe(first)
        note(
            request,
            f"prompt={done.prompt_tokens} cached={done.cached_tokens} image={done.visual_tokens} "
            f"new={done.ledger.new_tokens} first={first:.3f}s {done.finish}",
        )


class _Heard:
    """What the scheduler's thread says of an answer, in the loop that made this."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Piece | Completed | Refused] = asyncio.Queue()

    def piece(self, piece: Piece) -> None:
        self._loop.call_soon_threadsafe(self._queue.put_nowait, piece)

    def end(self, future: Future[Completed]) -> None:
        if future.cancelled():
            return
        error = future.exception()
        found = future.result() if error is None else _refused(error)
        self._loop.call_soon_threadsafe(self._queue.put_nowait, found)

    async def next(self) -> Piece | Completed | Refused:
        return await self._queue.get()


class Figures(Collector):
    """What Prometheus reads of a scheduler."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler

    def collect(self) -> Iterable[Metric]:
        for name, value in asdict(self.scheduler.counts).items():
            yield CounterMetricFamily(f"foveate_{name}", WHAT[name], value=value)
        gauges = {
            "waiting": ("Requests that wait for a place.", self.scheduler.waiting),
            "active": ("Requests that have a place.", self.scheduler.active),
            "features_bytes": ("Vision features in memory.", self.scheduler.engine.memory.bytes),
            "prefixes_bytes": ("Keys and values kept of conversations.", self.scheduler.prefixes.bytes),
        }
        for name, (what, value) in gauges.items():
            yield GaugeMetricFamily(f"foveate_{name}", what, value=value)


def _refused(error: BaseException) -> Refused:
    """What a client is told of a request that failed."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, Full):
        return busy(str(error), error.retry_after)
    if isinstance(error, Stopped):
        return busy(str(error))
    if isinstance(error, Late):
        return Refused(504, str(error), code="timeout")
    if isinstance(error, FoveateError):
        return Refused(400, str(error))
    return Refused(500, "the server failed: its log says how")
