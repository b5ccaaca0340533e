"""What Foveate's servers share: who is let in, with how much, how it is counted, and how they refuse.

    request -> Gate: host, key, size, time of arrival -> route -> JSON or events -> one line in the log

A server makes its app with `new_app` and adds its routes to it. A route reads its body with `read_json` (or
`request.body()`), pictures with `Pictures`, and answers with a value, or with `Events` as it comes. It says
no by raising `Refused` or `FoveateError`, and frees what it took with `on_leave`. No error body holds a path
or a traceback.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import secrets
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Lock
from typing import Any, TypeVar

import anyio
import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from PIL import Image
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from pydantic_core import from_json, to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from foveate.errors import FoveateError
from foveate.picture.fetching import decode, named, scheme
from foveate.picture.limits import LIMITS, Limits
from foveate.picture.reading import Transparency, count_pixels, fetched, read_picture

log = logging.getLogger("foveate.serve")

T = TypeVar("T")

LOCAL = frozenset(("localhost", "127.0.0.1", "[::1]"))
UNGUARDED = ("/health", "/ready")  # answered without a key, to whatever watches the process
MOST_MARKS = 2**18  # commas and brackets in a body: its values may take 100 times the memory of its text
IDLE = 75  # seconds after which a connection without requests is closed; clients close theirs before
GONE = 499  # in logs and metrics: the client left before its answer
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refused(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: a sentence for whoever wrote the request.
        code: a word for programs.
        param: the field of the request that is meant.
        retry_after: seconds after which it may be tried again.
        close: whether the connection ends, as the rest of the request is not read.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if close:
            self.headers["Connection"] = "close"

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return answer(self.body, self.status, self.headers)


class Gone(Exception):
    """The client closed the connection before its answer was complete."""


def answer(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A value as a JSON answer; numbers that are not finite become null."""
    content = to_json(value, inf_nan_mode="null")
    return Response(content, status, media_type="application/json", headers=headers)


@dataclass(frozen=True)
class Door:
    """Who is let in, and with how much.

    Attributes:
        key: what a request must show as `Authorization: Bearer KEY`; None lets in everybody.
        hosts: names in a request's Host header that are answered, so that no web page can reach a server on
            this machine under a name of its own; None: any.
        max_body: bytes of one request.
        max_bodies: bytes of all requests that are being answered.
        seconds: within which a request must have arrived.
        stall: seconds after which a client that takes nothing of its answer is cut off.

    Raises:
        FoveateError: a bound that is not above 0, a key that no header can hold.
    """

    key: str | None = field(default=None, repr=False)
    hosts: frozenset[str] | None = None
    max_body: int = 2**26
    max_bodies: int = 2**29
    seconds: float = 60.0
    stall: float = 60.0

    def __post_init__(self) -> None:
        for name in ("max_body", "max_bodies", "seconds", "stall"):
            if not getattr(self, name) > 0:
                raise FoveateError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.key is not None and not (self.key and self.key.isascii() and self.key.isprintable()):
            raise FoveateError("the API key must be of printable ASCII characters, and not empty")

    @classmethod
    def at(cls, host: str, key: str | None, *, unlocked: bool = False, **bounds: Any) -> Door:
        """The door of a server that listens at `host`.

        Raises:
            FoveateError: other machines can reach the host, and neither a key is set nor `unlocked`, which
                says that none is wanted.
        """
        if is_local(host):
            return cls(key, LOCAL | {host.lower()} if key is None else None, **bounds)
        if key is None and not unlocked:
            raise FoveateError(f"other machines can reach {host}: set an API key, or say that none is wanted")
        return cls(key, **bounds)

    def check(self, scope: Scope) -> None:
        """Raises `Refused` for what a request's head says already."""
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if self.hosts is not None and _host(headers.get(b"host", "")) not in self.hosts:
            raise Refused(403, "this server answers under the name localhost only", close=True)
        if self.key is not None and scope["path"] not in UNGUARDED:
            way, _, shown = headers.get(b"authorization", "").partition(" ")
            if way.lower() != "bearer" or not same(shown.strip(), self.key):
                raise Refused(
                    401,
                    "the API key is missing or wrong: send it as Authorization: Bearer KEY",
                    code="invalid_api_key",
                    close=True,
                )
        length = headers.get(b"content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > self.max_body:
            raise self.too_large()

    def too_large(self) -> Refused:
        return Refused(413, f"the request is larger than {self.max_body} bytes", close=True)


def is_local(host: str) -> bool:
    """Whether only this machine can reach a server that listens at `host`."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _host(header: str) -> str:
    """The name in a Host header, without the port."""
    name = header.lower().strip()
    return name[: name.find("]") + 1] if name.startswith("[") else name.partition(":")[0]


def same(shown: str, key: str) -> bool:
    """Whether two keys are equal, in a time that does not depend on where they differ."""
    one, other = (hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest() for text in (shown, key))
    return hmac.compare_digest(one, other)


class Room:
    """A bound on what all requests hold together: bytes, pixels, places. Safe for threads.

    Args:
        most: that fits in.
        what: what is counted, for messages.
    """

    def __init__(self, most: int, what: str) -> None:
        self.most, self.what, self.taken, self._lock = most, what, 0, Lock()

    def take(self, amount: int) -> None:
        """Raises `Refused` with status 503 if it does not fit in now, with 413 if it never will."""
        if amount > self.most:
            raise Refused(413, f"the request needs {amount} {self.what}, at most {self.most} are allowed")
        with self._lock:
            if self.taken + amount > self.most:
                raise busy(f"the server holds as many {self.what} as it may")
            self.taken += amount

    def give_back(self, amount: int) -> None:
        with self._lock:
            self.taken -= amount


def busy(why: str, retry_after: int = 1) -> Refused:
    return Refused(503, f"{why}: try again later", code="overloaded", retry_after=retry_after)


class Metrics:
    """What Prometheus reads: of HTTP here, and whatever a server registers with `registry`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kind: dict[str, Any] = {"registry": self.registry, "namespace": "foveate"}
        self.requests = Counter("http_requests", "Requests answered.", ["path", "status"], **kind)
        self.seconds = Histogram(
            "http_request_seconds",
            "Seconds from a request's head to the end of its answer.",
            ["path"],
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
            **kind,
        )
        self.running = Gauge("http_requests_running", "Requests that are being answered.", **kind)

    def page(self) -> Response:
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)


class Gate:
    """The ASGI middleware around all routes: checks, bounds, counts and logs every request.

    Args:
        app: what is behind it.
        door: who is let in.
        metrics: counts what was answered.
    """

    def __init__(self, app: ASGIApp, door: Door, metrics: Metrics) -> None:
        self.app, self.door, self.metrics = app, door, metrics
        self.bodies = Room(door.max_bodies, "bytes of requests")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        passage = _Passage(self.door, self.bodies, receive, send)
        scope["foveate.leave"] = passage.leaving
        start = time.perf_counter()
        self.metrics.running.inc()
        try:
            await self._pass(scope, passage)
        except (Gone, ClientDisconnect):
            passage.status = GONE
        except asyncio.CancelledError:  # the server stops
            passage.status = GONE
            raise
        finally:
            passage.leave()
            self.metrics.running.dec()
            self._note(scope, passage, time.perf_counter() - start)

    async def _pass(self, scope: Scope, passage: _Passage) -> None:
        try:
            self.door.check(scope)
            await self.app(scope, passage.receive, passage.send)
        except Refused as refused:
            await passage.refuse(refused)
        except (Gone, ClientDisconnect):
            raise
        except Exception:  # a fault of the server's own
            log.exception("%s failed", passage.name)
            await passage.refuse(Refused(500, "the server failed: its log says how", close=True))

    def _note(self, scope: Scope, passage: _Passage, seconds: float) -> None:
        route = scope.get("route")
        path = "other" if route is None else route.path
        self.metrics.requests.labels(path, str(passage.status)).inc()
        self.metrics.seconds.labels(path).observe(seconds)
        note = f" {scope['foveate.note']}" if "foveate.note" in scope else ""
        log.info(
            "%s %s %s %d %.3fs in=%d out=%d%s",
            *(passage.name, scope["method"], path, passage.status, seconds),
            *(passage.read, passage.sent, note),
        )


def note(request: Request, text: str) -> None:
    """Adds a few words to the request's line in the log; never what was asked or answered."""
    request.scope["foveate.note"] = text


def on_leave(request: Request, do: Callable[[], object]) -> None:
    """Does something once the request has been answered or its client has left, whatever happened."""
    request.scope["foveate.leave"].append(do)


class _Passage:
    """One request on its way through the gate."""

    def __init__(self, door: Door, bodies: Room, receive: Receive, send: Send) -> None:
        self.door, self.bodies = door, bodies
        self._receive, self._send = receive, send
        self.name = f"req-{secrets.token_hex(8)}"
        self.read = self.sent = 0
        self.status, self.started, self.arrived = 0, False, False
        self.end = time.monotonic() + door.seconds
        self.leaving: list[Callable[[], object]] = []

    async def receive(self) -> Message:
        if self.arrived:  # what comes now is the news that the client left
            return await self._receive()
        try:
            with anyio.fail_after(max(self.end - time.monotonic(), 0)):
                message = await self._receive()
        except TimeoutError:
            raise Refused(
                408, f"the request did not arrive within {self.door.seconds:g} s", close=True
            ) from None
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            if self.read + size > self.door.max_body:
                raise self.door.too_large()
            self.bodies.take(size)
            self.read += size
            self.arrived = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.started = message["status"], True
            given = [*message.get("headers", ())]
            if not any(name.lower() == b"x-request-id" for name, _ in given):  # passed on from another server
                given.append((b"x-request-id", self.name.encode()))
            message = {**message, "headers": given}
        elif message["type"] == "http.response.body":
            self.sent += len(message.get("body", b""))
        try:
            with anyio.fail_after(self.door.stall):
                await self._send(message)
        except TimeoutError:
            raise Gone from None

    async def refuse(self, refused: Refused) -> None:
        """Sends the refusal if nothing has been sent; else the connection ends in the middle."""
        if self.started:
            raise Gone
        response = refused.response()
        await self.send(
            {"type": "http.response.start", "status": refused.status, "headers": response.raw_headers}
        )
        await self.send({"type": "http.response.body", "body": response.body})

    def leave(self) -> None:
        self.bodies.give_back(self.read)
        for do in self.leaving:
            do()


def new_app(
    door: Door,
    metrics: Metrics,
    ready: Callable[[], bool],
    lifespan: Callable[[FastAPI], Any] | None = None,
) -> FastAPI:
    """An app behind a `Gate`, with /health, /ready and /metrics.

    Args:
        door: who is let in.
        metrics: what /metrics shows.
        ready: whether requests would be answered now.
        lifespan: as of FastAPI: what is opened before the first request and closed after the last.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False, lifespan=lifespan)
    app.add_middleware(Gate, door=door, metrics=metrics)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(FoveateError, _wrong)
    app.add_exception_handler(HTTPException, _unknown)

    @app.get("/health")
    async def health() -> Response:
        return answer({"status": "ok"})

    @app.get("/ready")
    async def is_ready() -> Response:
        if ready():
            return answer({"status": "ready"})
        raise busy("no request would be answered now")

    @app.get("/metrics")
    async def prometheus() -> Response:
        return metrics.page()

    return app


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error.response()


async def _wrong(request: Request, error: Exception) -> Response:
    return Refused(400, str(error)).response()


async def _unknown(request: Request, error: Exception) -> Response:
    """No such path, or not with this method."""
    assert isinstance(error, HTTPException)
    said = {404: "there is nothing at this path", 405: "this path does not take this method"}
    return Refused(error.status_code, said.get(error.status_code, "the request is not understood")).response()


async def read_json(request: Request) -> dict[str, Any]:
    """The object that a request's body holds.

    Raises:
        Refused: another content type, invalid JSON, NaN, values nested too deep or too many, no object.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # others a web page may send without asking
        raise Refused(415, "send the request as Content-Type: application/json")
    body = await request.body()
    if has_many_values(body):
        raise Refused(413, "the request holds too many values")
    try:
        value = await anyio.to_thread.run_sync(lambda: from_json(body, allow_inf_nan=False))
    except ValueError as error:
        raise Refused(400, f"the request is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise Refused(400, "the request must be a JSON object", code="invalid_json")
    return value


def has_many_values(body: bytes) -> bool:
    """Whether a body may hold more values than are read."""
    text = np.frombuffer(body, np.uint8)  # a third of the time of bytes.count
    return sum(int(np.count_nonzero(text == mark)) for mark in b",[{") > MOST_MARKS


async def unless_gone(request: Request, work: Callable[[], Awaitable[T]]) -> T:
    """The result of `work`, which is cancelled if the client leaves. The body must have been read.

    Raises:
        Gone: the client left.
    """

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work()), asyncio.ensure_future(left())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise Gone
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Events(Response):
    """Server-sent events, each sent as it comes. The source is closed when the client leaves.

    Args:
        source: makes what is sent; an error of it ends the connection, unless it made an event of it.
    """

    media_type = "text/event-stream"

    def __init__(self, source: AsyncGenerator[bytes, None], headers: dict[str, str] | None = None) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", **(headers or {})})
        del self.headers["content-length"]
        self.source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def run() -> None:
            async with aclosing(self.source):
                await send(
                    {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
                )
                async for event in self.source:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        await unless_gone(Request(scope, receive), run)


def event(value: Any) -> bytes:
    """A value as one server-sent event."""
    return b"data: " + to_json(value, inf_nan_mode="null") + b"\n\n"


DONE = b"data: [DONE]\n\n"  # the last event of an answer


class Pictures:
    """Reads the pictures of requests: from data URLs, and by URL only where that is allowed.

    Args:
        limits: on each picture; `private` allows addresses that are not public.
        urls: whether http and https URLs are fetched.
        most: pictures of one request.
        room: bounds the pixels of all requests that are being answered.
        at_once: threads that read.
    """

    def __init__(
        self,
        limits: Limits = LIMITS,
        *,
        urls: bool = False,
        most: int = 16,
        room: int = 2**28,
        at_once: int = 4,
    ) -> None:
        if most < 0 or room < limits.max_pixels:
            raise FoveateError(
                f"room for {room} pixels in all must not be less than max_pixels {limits.max_pixels} of one"
            )
        self.limits, self.urls, self.most = limits, urls, most
        self.room = Room(room, "pixels")
        self._threads = anyio.CapacityLimiter(at_once)

    async def read(
        self, request: Request, urls: Sequence[tuple[str, str]], transparency: Transparency = "white"
    ) -> list[Image.Image]:
        """The pictures behind URLs, upright and RGB. They take room until the request has been answered.

        Args:
            request: that shows them.
            urls: each with the field of the request that names it.
            transparency: as of `read_picture`.

        Raises:
            Refused: too many, a URL of another kind, what is not a picture, too many pixels.
        """
        if len(urls) > self.most:
            raise Refused(
                400,
                f"the request has {len(urls)} pictures, at most {self.most} are allowed",
                param=urls[self.most][1],
            )
        for url, param in urls:
            self._check(url, param)
        found = []
        for url, param in urls:
            with _naming(param):
                pixels, once = await self._in_thread(self._size, url)
                self.room.take(pixels)
                on_leave(request, partial(self.room.give_back, pixels))
                found.append(await self._in_thread(read_picture, once, self.limits, transparency))
        return found

    def _check(self, url: str, param: str) -> None:
        kind = scheme(url)
        if kind in ("http", "https"):
            if self.urls:
                return
            raise Refused(
                400,
                "this server reads no pictures by URL: send data:image/png;base64,... or start it with "
                "--allow-urls",
                param=param,
            )
        if kind != "data":
            raise Refused(400, "a picture must be a URL that starts with data:image/", param=param)

    def _size(self, url: str) -> tuple[int, Any]:
        """A picture's pixels, of its head alone, and its bytes."""
        if scheme(url) == "data":
            once: Any = decode(url, self.limits)
        else:
            try:
                once = fetched(url, self.limits)
            except FoveateError as error:  # which may name an address inside of this network
                log.info("%s", error)
                raise Refused(
                    400, f"no picture could be fetched from {named(url)}: send it as a data URL"
                ) from None
        return count_pixels(once, self.limits), once

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await anyio.to_thread.run_sync(lambda: function(*arguments), limiter=self._threads)


@contextmanager
def _naming(param: str) -> Iterator[None]:
    """Gives what is wrong with a picture the name of its field."""
    try:
        yield
    except FoveateError as error:
        raise Refused(400, str(error), code="invalid_image", param=param) from None
    except Refused as refused:
        refused.param = param
        raise


@dataclass(frozen=True)
class Place:
    """Where a server listens.

    Attributes:
        host: by default this machine alone can reach it.
        port: 0 takes any free one.
        seconds: that answers in progress are given when the server is stopped.

    Raises:
        FoveateError: a port that is none.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    seconds: int = 30

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise FoveateError(f"port must be from 0 to {2**16 - 1}, not {self.port}")
        if self.seconds < 1:
            raise FoveateError(f"seconds to stop must be at least 1, not {self.seconds}")


class Listener(uvicorn.Server):
    """A server of one app. It stops on SIGTERM and SIGINT, after the answers in progress.

    Args:
        app: what answers.
        place: where it listens. The socket is bound at once.

    Attributes:
        place: with the port that was taken.

    Raises:
        FoveateError: the address cannot be used.
    """

    def __init__(self, app: FastAPI, place: Place) -> None:
        self.socket = _bound(place)
        self.place = replace(place, port=self.socket.getsockname()[1])
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                http="h11",
                loop="asyncio",
                ws="none",
                lifespan="on",
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=IDLE,
                timeout_graceful_shutdown=place.seconds,
            )
        )

    @property
    def url(self) -> str:
        """Its address, with /v1."""
        host = self.place.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.place.port}/v1"

    @property
    def stopping(self) -> bool:
        return self.should_exit

    def listen(self) -> None:
        """Answers until it is stopped."""
        self.run(sockets=[self.socket])

    def stop(self) -> None:
        """From any thread."""
        self.should_exit = True


def _bound(place: Place) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(
            place.host, place.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # Over sockets that are not named TCP, asyncio leaves small parts waiting, 40 ms each.
        made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        raise FoveateError(f"{place.host}:{place.port} cannot be listened at: {error.strerror}") from error
    return made
