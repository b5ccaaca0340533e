"""A second look in front of any server of OpenAI's protocol.

    client -> Gate -> a chat that is zoomed: where, first answer, answer with the crop -> upstream
                   -> everything else, as it is -------------------------------------> upstream

A request says `zoom`: `off`, `auto` (only where the picture is larger than the model sees) or `always`. What
is not zoomed is passed on byte for byte, and so is the answer, as it comes. The looks themselves are those of
`foveate.zoom.looking`; here they are only sent, bounded and cancelled. An answer of upstream that is an error
reaches the client as it is, `Retry-After` included.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import anyio
import httpx2
from fastapi import FastAPI, Request
from PIL import Image
from prometheus_client import Counter
from pydantic_core import from_json, to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from foveate.errors import FoveateError
from foveate.picture.fetching import scheme
from foveate.picture.geometry import Size
from foveate.picture.limits import Limits
from foveate.picture.reading import read_size
from foveate.serve.http import (
    DONE,
    Door,
    Events,
    Gone,
    Metrics,
    Pictures,
    Refused,
    answer,
    event,
    has_many_values,
    new_app,
    note,
    unless_gone,
)
from foveate.zoom.asking import Ask, Said, Steps
from foveate.zoom.looking import Answered, Budget, ByTool, Looked, Talk, look
from foveate.zoom.measuring import SIDES, seen_pixels
from foveate.zoom.wire import REFUSALS, Dialect, Served, data_url, mean_probability, request, said, used

log = logging.getLogger("foveate.serve")

T = TypeVar("T")
Zooms = Literal["off", "auto", "always"]
ZOOMS: tuple[Zooms, ...] = ("off", "auto", "always")
# Headers of one connection alone; and those that are written anew.
HOPS = frozenset(
    (
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer"),
        *("transfer-encoding", "upgrade", "host", "content-length", "expect"),
    )
)
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]
LIMITS_OF_TOKENS = ("max_completion_tokens", "max_tokens")
# Fields of a client's request that are about its answer, not about where to look.
OF_ANSWERS = frozenset(
    (
        *LIMITS_OF_TOKENS,
        *("stream", "stream_options", "stop", "n", "logprobs", "top_logprobs", "response_format", "seed"),
        *("presence_penalty", "frequency_penalty", "temperature", "top_p", "logit_bias", "prediction"),
    )
)
UNKNOWN = 1344 * 1344  # pixels that a model is taken to see if upstream does not tell its tokens
MOST_EVENT = 2**24  # bytes of one event of a stream
REQUESTS = 512  # connections to upstream
SMALL = 2**20  # bytes of a body
# Characters of a data URL in which a picture's size stands: as a rule, and behind what cameras write first.
HEAD, LONG_HEAD = 2**12, 2**17
MODELS = 100  # for how many it is remembered what they see


class _Route(NamedTuple):
    """What the log and the metrics call a request."""

    path: str


CHATS, REST = _Route("/v1/chat/completions"), _Route("/v1/...")


@dataclass(frozen=True)
class Upstream:
    """The server behind a proxy.

    Attributes:
        url: up to and with `/v1`.
        key: shown to it instead of the client's; None: the client's own is passed on.
        model: whose requests are zoomed; None: those of every model.
        served: how the model writes boxes and calls tools.
        sees: pixels that it sees of a picture; None: measured when it is first needed.
        seconds: bound on each of its answers.
        stall: seconds within which the next byte of an answer must come.
        max_bytes: of an answer that is read here.

    Raises:
        FoveateError: not an http address, a bound that is not above 0.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    model: str | None = None
    served: Served = field(default_factory=Served)
    sees: int | None = None
    seconds: float = 600.0
    stall: float = 120.0
    max_bytes: int = 2**26

    def __post_init__(self) -> None:
        try:
            url = httpx2.URL(self.url)
        except (httpx2.InvalidURL, TypeError):
            url = httpx2.URL("")
        if url.scheme not in ("http", "https") or not url.host:
            raise FoveateError(f"{self.url!r:.200} is not the address of a server: http://host:port/v1")
        for name in ("seconds", "stall", "max_bytes", "sees"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise FoveateError(f"{name} must be above 0, not {value}")


@dataclass(frozen=True)
class Rules:
    """When and how a proxy zooms.

    Attributes:
        zoom: for requests that do not say.
        region: who says where to look.
        budget: bounds on its cost.
        tokens: whether the budget's tokens are also asked of upstream, as the bound of each answer.
    """

    zoom: Zooms = "auto"
    region: Answered | ByTool = Answered()  # noqa: RUF009  it is frozen
    budget: Budget = Budget()  # noqa: RUF009  it is frozen
    tokens: bool = False

    def __post_init__(self) -> None:
        if self.zoom not in ZOOMS:
            raise FoveateError(f"zoom must be {', '.join(ZOOMS[:-1])} or {ZOOMS[-1]}, not {self.zoom!r}")


class Passed(Exception):
    """An answer of upstream that is an error, for the client as it is."""

    def __init__(self, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> None:
        super().__init__(status)
        self.status, self.headers, self.body = status, headers, body

    def response(self) -> Response:
        made = Response(self.body, self.status)
        made.raw_headers = [*self.headers, (b"content-length", str(len(self.body)).encode())]
        return made


class _Refusal(FoveateError):
    """Upstream refuses what was asked, and might not refuse something else."""

    def __init__(self, passed: Passed) -> None:
        super().__init__(f"upstream refused it: {_message(passed.body)}")
        self.passed = passed


def _message(body: bytes) -> str:
    """What an error of OpenAI's shape says; else how its body begins."""
    try:
        return str(from_json(body)["error"]["message"])[:500]
    except (ValueError, LookupError, TypeError):
        return body[:500].decode("utf-8", "replace")


class Proxy:
    """Passes requests on to another server, and gives the model there a second look where it helps.

    Args:
        upstream: the other server.
        rules: when and how to zoom.
        door: who is let in.
        pictures: reads those that are zoomed.

    Attributes:
        app: for a `Listener`.
        metrics: of HTTP, and how often it zoomed.
    """

    def __init__(
        self, upstream: Upstream, rules: Rules, door: Door, pictures: Pictures | None = None
    ) -> None:
        self.upstream, self.rules, self.door = upstream, rules, door
        self.pictures = pictures or Pictures()
        self.metrics = Metrics()
        self.zoomed = Counter(
            "zoom_requests",
            "Requests with a picture, by whether it was looked at closer.",
            ["zoom"],
            registry=self.metrics.registry,
            namespace="foveate",
        )
        self.dialect = Dialect()
        self.seen: dict[str, int] = {}  # by model
        self.measuring = asyncio.Lock()
        # The library's transport alone: its client would add headers, and twice the time.
        self.transport: httpx2.AsyncHTTPTransport | None = None
        bounds = httpx2.Timeout(upstream.stall, connect=min(10.0, upstream.stall))
        self.extensions = {"timeout": bounds.as_dict()}
        self.app = new_app(door, self.metrics, lambda: self.transport is not None, self._open)
        self.app.add_route(CHATS.path, self.chat, methods=["POST"])
        self.app.add_route("/v1/{path:path}", self.rest, methods=METHODS)

    @asynccontextmanager
    async def _open(self, app: FastAPI) -> AsyncIterator[None]:
        limits = httpx2.Limits(max_connections=REQUESTS, max_keepalive_connections=REQUESTS)
        async with httpx2.AsyncHTTPTransport(limits=limits, trust_env=False) as self.transport:
            yield
        self.transport = None

    async def rest(self, request: Request) -> Response:
        """Everything but chats: passed on as it is."""
        request.scope["route"] = REST
        return await self._pass(request, await request.body())

    async def chat(self, request: Request) -> Response:
        """A chat: zoomed, or passed on as it is."""
        request.scope["route"] = CHATS
        content = await request.body()
        plain = self.rules.zoom == "off" and b"zoom" not in content
        if plain or has_many_values(content):
            return await self._pass(request, content)
        try:
            # A thread costs more than a small body does.
            body = from_json(content) if len(content) < SMALL else await _in_thread(from_json, content)
        except ValueError:  # upstream says what is wrong with it
            return await self._pass(request, content)
        if not isinstance(body, dict):
            return await self._pass(request, content)
        zoom = body.get("zoom", self.rules.zoom)
        if zoom not in ZOOMS:
            raise Refused(400, "zoom must be off, auto or always", param="zoom")
        if "zoom" in body:
            del body["zoom"]
            content = to_json(body)
        if zoom == "off":
            return await self._pass(request, content)
        found = _asked(body, self.upstream.model)
        if isinstance(found, str):
            if zoom == "always":
                raise Refused(400, f"zoom cannot be always: {found}", param="zoom")
            return await self._pass(request, content)
        if zoom == "auto" and not await unless_gone(request, lambda: self._is_large(request, body, found)):
            self.zoomed.labels("no").inc()
            return await self._pass(request, content)
        return await self._zoom(request, body, found)

    # Passing on.

    async def _pass(self, request: Request, content: bytes) -> Response:
        path = request.url.path.removeprefix("/v1")
        query = f"?{request.url.query}" if request.url.query else ""
        sending = partial(self._sent, request.method, f"{path}{query}", self._headers(request), content)
        return _Relay(sending, self.upstream.seconds)

    def _headers(self, request: Request) -> list[tuple[bytes, bytes]]:
        """A client's headers as upstream gets them."""
        kept = [(name, value) for name, value in request.headers.raw if name.decode("latin-1") not in HOPS]
        if self.door.key is not None or self.upstream.key is not None:  # the client's key is ours
            kept = [(name, value) for name, value in kept if name != b"authorization"]
        if self.upstream.key is not None:
            kept.append((b"authorization", f"Bearer {self.upstream.key}".encode("latin-1", "replace")))
        return kept

    async def _sent(
        self, method: str, path: str, headers: list[tuple[bytes, bytes]], content: bytes
    ) -> httpx2.Response:
        """Upstream's answer, of which the head has come."""
        assert self.transport is not None
        url = f"{self.upstream.url.rstrip('/')}{path}"
        sent = httpx2.Request(method, url, headers=headers, content=content, extensions=self.extensions)
        try:
            with anyio.fail_after(self.upstream.seconds):
                return await self.transport.handle_async_request(sent)
        except (httpx2.TimeoutException, TimeoutError):
            raise Refused(504, "upstream did not answer in time", code="upstream_timeout") from None
        except httpx2.HTTPError as error:
            log.warning("upstream: %s", type(error).__name__)
            raise Refused(502, "upstream cannot be reached", code="upstream_unreachable") from None

    # Looking closer.

    async def _is_large(self, request: Request, body: dict[str, Any], found: _Asked) -> bool:
        """Whether the picture is larger than the model sees. A picture that cannot be read is upstream's."""
        if scheme(found.url) != "data" and not self.pictures.urls:
            return False
        try:
            limits = self.pictures.limits
            # A thread costs more than a short head does.
            size = _size_in_head(found.url, limits, HEAD) or await _in_thread(_size, found.url, limits)
        except FoveateError:
            return False
        return size.height * size.width > await self._sees(request, str(body.get("model", "")))

    async def _sees(self, request: Request, model: str) -> int:
        """The pixels that a model sees of a picture, measured once if they are not given."""
        if self.upstream.sees is not None:
            return self.upstream.sees
        async with self.measuring:
            if model in self.seen:
                return self.seen[model]
            found = await self._measured(request, model)
            if found is None:
                return UNKNOWN
            if len(self.seen) >= MODELS:
                self.seen.clear()
            self.seen[model] = found
            log.info("the model is taken to see %d pixels of a picture", found)
            return found

    async def _measured(self, request: Request, model: str) -> int | None:
        """The pixels that a model sees; None if upstream does not tell, or not now."""
        counts = {}
        for side in (0, *SIDES):
            shown = {"type": "image_url", "image_url": {"url": _blank(side)}}
            parts = [*([shown] if side else []), {"type": "text", "text": "?"}]
            asked = {"messages": [{"role": "user", "content": parts}], "max_tokens": 1, "temperature": 0}
            try:
                value, _ = await self._post(request, {"model": model, **asked})
            except (Passed, Refused, FoveateError):
                break
            tokens = used(value, "prompt_tokens")
            if tokens is None:
                return None
            counts[side] = tokens
        if len(counts) < 2:
            return None
        plain = counts.pop(0)
        found = seen_pixels({side: tokens - plain for side, tokens in counts.items()})
        return max(counts) ** 2 if found is None else found

    async def _zoom(self, request: Request, body: dict[str, Any], found: _Asked) -> Response:
        """The answer of a closer look."""
        streams = body.get("stream") is True

        async def work() -> Response:
            shown, transparency = [(found.url, found.param)], self.upstream.served.transparency
            (picture,) = await self.pictures.read(request, shown, transparency)
            talk = Talk(found.messages, picture, found.question, found.place)
            steps = look(self.upstream.served, talk, self.rules.region, self.rules.budget)
            course = _Course(self, request, body, steps)
            last = await course.run(streams)
            if last is not None:
                return Events(course.streamed(*last))
            value = await course.result()
            return Events(_whole(value)) if streams else answer(value)

        try:
            made = await unless_gone(request, work)
        except Passed as passed:
            return passed.response()
        except _Refusal as refusal:
            return refusal.passed.response()
        self.zoomed.labels("yes").inc()
        note(request, "zoomed")
        return made

    async def _post(self, request: Request, body: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """Upstream's answer to a chat. Raises `_Refusal` or `Passed` if it is an error."""
        response = await self._opened(request, body)
        content = await self._read(response)
        if response.status_code != 200:
            raise _error(response, content)
        try:
            value = from_json(content)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise Refused(502, "upstream gave an answer that is not JSON", code="upstream_broken")
        return value, content

    async def _opened(self, request: Request, body: dict[str, Any]) -> httpx2.Response:
        """Upstream's answer to a chat, of which the head has come."""
        own = (b"content-type", b"accept-encoding", b"content-encoding")
        headers = [(name, value) for name, value in self._headers(request) if name not in own]
        headers += [(b"content-type", b"application/json"), (b"accept-encoding", b"identity")]
        return await self._sent("POST", "/chat/completions", headers, await _in_thread(to_json, body))

    async def _read(self, response: httpx2.Response) -> bytes:
        """All of an answer, within the bounds on time and bytes."""
        content = bytearray()
        try:
            with anyio.fail_after(self.upstream.seconds):
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > self.upstream.max_bytes:
                        raise Refused(502, "upstream's answer is too long", code="upstream_broken")
        except (httpx2.TimeoutException, TimeoutError):
            raise Refused(504, "upstream did not answer in time", code="upstream_timeout") from None
        except httpx2.HTTPError:
            raise Refused(502, "upstream's answer broke off", code="upstream_broken") from None
        finally:
            await _closed(response)
        return bytes(content)


def _size_in_head(url: str, limits: Limits, most: int) -> Size | None:
    """A picture's size, if the first characters of its data URL tell it; `most` is divisible by 4."""
    start = url.find(",") + 1
    if url[:start].lower().endswith(";base64,") and len(url) > start + most:
        with suppress(FoveateError):
            return read_size(url[: start + most], limits)
    return None


def _size(url: str, limits: Limits) -> Size:
    return _size_in_head(url, limits, LONG_HEAD) or read_size(url, limits)


def _error(response: httpx2.Response, content: bytes) -> Exception:
    passed = Passed(response.status_code, _kept(response, encoded=False), content)
    return _Refusal(passed) if response.status_code in (*REFUSALS, 413) else passed


def _kept(response: httpx2.Response, encoded: bool = True) -> list[tuple[bytes, bytes]]:
    """Upstream's headers for the client; of a body that is passed on as it came, or `encoded` no more."""
    left_out = HOPS if encoded else HOPS | {"content-encoding"}
    return [
        (name.lower(), value)
        for name, value in response.headers.raw
        if name.decode("latin-1").lower() not in left_out
    ]


async def _closed(response: httpx2.Response) -> None:
    """Closes upstream's answer, also while this task is being cancelled."""
    with anyio.CancelScope(shield=True):
        await response.aclose()


class _Relay(Response):
    """Upstream's answer, each byte as it comes. Upstream's is closed when the client leaves.

    Args:
        sending: asks upstream; its result is the answer, of which the head has come.
        seconds: bound on all of it.
    """

    def __init__(self, sending: Callable[[], Awaitable[httpx2.Response]], seconds: float) -> None:
        super().__init__()
        self.sending, self.seconds = sending, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def run() -> None:
            end = time.monotonic() + self.seconds
            response = await self.sending()
            try:
                await self._pass_on(response, send, end)
            except (httpx2.HTTPError, TimeoutError) as error:
                log.warning("upstream's answer broke off: %s", type(error).__name__)
                raise Gone from None
            finally:
                await _closed(response)

        await unless_gone(Request(scope, receive), run)

    async def _pass_on(self, response: httpx2.Response, send: Send, end: float) -> None:
        headers = _kept(response)
        length = response.headers.get("content-length")
        if length is not None:
            headers.append((b"content-length", length.encode()))
        await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        with anyio.fail_after(max(end - time.monotonic(), 0)):
            async for chunk in response.aiter_raw():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


@dataclass(frozen=True)
class _Asked:
    """A chat that can be zoomed: its one picture, and the question."""

    messages: list[dict[str, Any]]
    url: str
    param: str
    question: str
    place: tuple[int, int]


def _asked(body: Mapping[str, Any], model: str | None) -> _Asked | str:
    """What a request asks about its picture; or why it cannot be zoomed."""
    if model is not None and body.get("model") != model:
        return f"only {model} is zoomed here"
    if body.get("n") not in (None, 1):
        return "one answer can be zoomed, not several"
    for name in ("tools", "functions", "audio"):
        if body.get(name):
            return f"a request with {name} cannot be zoomed"
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        return "the request has no messages"
    if not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
        return "a message is not an object with a role"
    found = []
    for where, message in enumerate(messages):
        content = message.get("content")
        for which, part in enumerate(content if isinstance(content, list) else ()):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "image_url":
                given = part.get("image_url")
                url = given.get("url") if isinstance(given, dict) else given
                if isinstance(url, str):
                    found.append((url, (where, which)))
            elif kind != "text":
                return "only texts and pictures can be zoomed"
    if len(found) != 1:
        return f"the conversation has {len(found)} pictures, and one can be zoomed"
    if messages[-1]["role"] != "user":
        return "the last message is not the user's"
    question = _text(messages[-1].get("content"))
    if not question:
        return "the last message has no text"
    url, place = found[0]
    param = f"messages[{place[0]}].content[{place[1]}].image_url"
    return _Asked(messages, url, param, question, place)


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content.strip()
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    return " ".join(text.strip() for text in texts if isinstance(text, str)).strip()


class _Course:
    """One closer look on its way: the steps, what was sent for them, and what came back."""

    def __init__(self, proxy: Proxy, request: Request, body: dict[str, Any], steps: Steps[Looked]) -> None:
        self.proxy, self.request, self.body, self.steps = proxy, request, body, steps
        self.values: list[tuple[Said, dict[str, Any]]] = []  # what was said, in upstream's answers
        self.looked: Looked | None = None

    async def run(self, streams: bool) -> tuple[Ask, httpx2.Response] | None:
        """Asks until the look has ended; or, if the answer is to be streamed, until that has begun."""
        ask = await self._step(lambda: next(self.steps))
        while ask is not None:
            try:
                if streams and ask.last:
                    return ask, await self._stream(ask)
                told = await self._answer(ask)
            except _Refusal as refusal:
                if not self.values and not ask.where:
                    raise  # the question itself
                ask = await self._step(lambda error=refusal: self.steps.throw(error))
                continue
            ask = await self._step(lambda one=told: self.steps.send(one))
        return None

    async def _step(self, step: Any) -> Ask | None:
        """The next request; None at the end. In a thread, because pictures are cropped in it."""

        def run() -> Ask | None:
            try:
                asked: Ask = step()
                return asked
            except StopIteration as end:
                self.looked = end.value
                return None

        return await _in_thread(run)

    async def _answer(self, ask: Ask) -> Said:
        while True:
            dialect = self.proxy.dialect
            try:
                value, _ = await self.proxy._post(self.request, await self._body(ask, dialect))
            except _Refusal as refusal:
                self._learn(refusal, ask, dialect)
                continue
            try:
                told = said(value)
            except FoveateError as error:
                raise Refused(502, f"upstream {error}", code="upstream_broken") from None
            self.values.append((told, value))
            return told

    async def _stream(self, ask: Ask) -> httpx2.Response:
        while True:
            dialect = self.proxy.dialect
            body = await self._body(ask, dialect)
            body |= {name: self.body[name] for name in ("stream", "stream_options") if name in self.body}
            response = await self.proxy._opened(self.request, body)
            if response.status_code == 200:
                return response
            error = _error(response, await self.proxy._read(response))
            if not isinstance(error, _Refusal):
                raise error
            self._learn(error, ask, dialect)

    def _learn(self, refusal: _Refusal, ask: Ask, dialect: Dialect) -> None:
        """Asks for less from now on. Raises the refusal if nothing can be left out."""
        other = dialect.after(str(refusal), ask)
        if other is None:
            raise refusal
        self.proxy.dialect = other

    async def _body(self, ask: Ask, dialect: Dialect) -> dict[str, Any]:
        """The request for an ask: with the client's settings for its answers, greedy for where to look."""
        left_out = OF_ANSWERS if ask.where else ("stream", "stream_options")
        body = {name: value for name, value in self.body.items() if name not in left_out}
        limit = next((name for name in LIMITS_OF_TOKENS if name in self.body), "max_tokens")
        if ask.where:
            body |= {limit: ask.most, "temperature": 0}
        elif ask.most is not None:
            given = body.get(limit)
            if isinstance(given, int):
                body[limit] = min(given, ask.most)
            elif self.proxy.rules.tokens:
                body[limit] = ask.most
        return {**body, **await _in_thread(request, ask, dialect)}

    async def result(self) -> dict[str, Any]:
        """The answer from the closest look, as upstream gave it, with what led to it."""
        assert self.looked is not None
        told = self.looked.zoomed or self.looked.first
        value = next((v for one, v in self.values if one is told), self.values[-1][1])
        choice = value["choices"][0]
        choice["message"]["content"] = told.text
        choice["message"].pop("tool_calls", None)
        if not self.body.get("logprobs"):
            choice.pop("logprobs", None)
        value["usage"] = self._usage(value.get("usage"))
        return {**value, "foveate": self._account()}

    def _account(self) -> dict[str, Any]:
        assert self.looked is not None
        known = self.looked.to_dict()
        regions = [{"picture": 0, "box": box} for box in known["regions"]]  # as those of a model served here
        return {name: known[name] for name in ("first", "zoomed", "problems")} | {"regions": regions}

    def _usage(self, given: Any, streamed: bool = False) -> dict[str, Any]:
        """The tokens of all requests together; `given` are those of the answer's own."""
        values = [value.get("usage") for _, value in self.values]
        values += [given] if streamed else []
        total = dict(given) if isinstance(given, dict) else {}
        for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
            total[name] = sum(used({"usage": usage}, name) or 0 for usage in values)
        return total

    async def streamed(self, ask: Ask, response: httpx2.Response) -> AsyncGenerator[bytes, None]:
        """The events of the last answer as they come, then one with what led to it."""
        told = _Told()
        end = time.monotonic() + self.proxy.upstream.seconds
        try:
            async with aclosing(_events(response, end)) as values:
                async for value in values:
                    told.hear(value)
                    if value.get("usage"):
                        value["usage"] = self._usage(value["usage"], streamed=True)
                    if not self.body.get("logprobs"):
                        for choice in value.get("choices") or ():
                            if isinstance(choice, dict):
                                choice.pop("logprobs", None)
                    yield event(value)
        except (httpx2.HTTPError, TimeoutError, ValueError) as error:
            log.warning("upstream's answer broke off: %s", type(error).__name__)
            raise Gone from None  # as upstream's connection, so the client's
        finally:
            await _closed(response)
        await self._step(lambda: self.steps.send(told.said))
        yield event({**told.head, "choices": [], "foveate": self._account()})
        yield DONE


class _Told:
    """What a stream has said so far."""

    def __init__(self) -> None:
        self.head: dict[str, Any] = {}
        self.pieces: list[str] = []
        self.tokens: list[Any] = []

    def hear(self, value: dict[str, Any]) -> None:
        self.head = {name: value[name] for name in ("id", "object", "created", "model") if name in value}
        for choice in value.get("choices") or ():
            if not isinstance(choice, dict):
                continue
            delta, logprobs = choice.get("delta"), choice.get("logprobs")
            if isinstance(delta, dict) and isinstance(delta.get("content"), str):
                self.pieces.append(delta["content"])
            if isinstance(logprobs, dict) and isinstance(logprobs.get("content"), list):
                self.tokens += logprobs["content"]

    @property
    def said(self) -> Said:
        return Said("".join(self.pieces).strip(), mean_probability(self.tokens))


async def _events(response: httpx2.Response, end: float) -> AsyncGenerator[dict[str, Any], None]:
    """The values of a stream's events, up to its end. Raises `ValueError` for what is none."""
    waiting = b""
    async for chunk in response.aiter_bytes():
        if time.monotonic() > end:
            raise TimeoutError
        *lines, waiting = (waiting + chunk).split(b"\n")
        if len(waiting) > MOST_EVENT:
            raise ValueError("an event without end")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            value = from_json(data)
            if not isinstance(value, dict):
                raise ValueError("an event that is not an object")
            yield value
    raise ValueError("a stream that ends without [DONE]")


async def _whole(value: dict[str, Any]) -> AsyncGenerator[bytes, None]:
    """An answer that is there already, as events: of a model that called tools until it knew."""
    head: dict[str, Any] = {"object": "chat.completion.chunk"}
    head |= {name: value[name] for name in ("id", "created", "model") if name in value}
    choice = value["choices"][0]
    delta = {"role": "assistant", "content": choice["message"]["content"]}
    yield event({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
    end: dict[str, Any] = {"index": 0, "delta": {}, "finish_reason": choice.get("finish_reason") or "stop"}
    yield event({**head, "choices": [end]})
    yield event({**head, "choices": [], "usage": value["usage"], "foveate": value["foveate"]})
    yield DONE


def _blank(side: int) -> str:
    """A grey square as a data URL."""
    return data_url(Image.new("RGB", (side, side), (128, 128, 128))) if side else ""


async def _in_thread(function: Any, *arguments: Any) -> Any:
    return await anyio.to_thread.run_sync(lambda: function(*arguments))
