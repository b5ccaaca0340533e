"""A stand-in for a server of OpenAI's protocol: its answers are scripted, and so is what goes wrong."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image


@dataclass
class Text:
    """An answer: its text in pieces, each with the logarithm of its probability."""

    pieces: Sequence[str]
    logprobs: Sequence[float] = ()
    calls: Sequence[tuple[str, Any]] = ()  # of tools: name and arguments
    wait: float = 0.0  # seconds before each piece of a stream, and before an answer as a whole

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@dataclass
class Refusal:
    """A status other than 200."""

    status: int
    message: str = "not now"
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None


@dataclass
class Drop:
    """The connection breaks after these bytes of an answer that should be longer."""

    body: bytes = b'{"choices": '


@dataclass
class Endless:
    """An answer that never ends; a chunk of it every `wait` seconds."""

    chunk: bytes = b" " * 1000
    wait: float = 0.01


Reply = str | Text | Refusal | Drop | Endless | bytes


class Upstream(ThreadingHTTPServer):
    """Gives its scripted replies in order, then "fine" for ever.

    Attributes:
        requests: the bodies that came, each with its `path` and `headers`.
        script: replies that are still to come.
        left: how many clients have gone away before their answer's end.
        counted: makes the `usage` of an answer from its request, instead of a fixed one.
        refuses: words; a request whose body holds one gets a 400 that names it.
    """

    daemon_threads = True
    block_on_close = False  # an endless answer would hold up the end

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, Any]] = []
        self.script: list[Reply] = []
        self.left = 0
        self.counted: Callable[[dict[str, Any]], dict[str, int]] | None = None
        self.refuses: list[str] = []
        self.ends = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of the tests."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def asked(self) -> list[str]:
        """The text of the last message of each request."""
        return [texts(request["body"]["messages"][-1]) for request in self.requests]

    def pictures(self, request: int) -> list[Image.Image]:
        """The pictures of a request, decoded."""
        return [shown(url) for message in self.requests[request]["body"]["messages"] for url in urls(message)]

    def wait_until(self, left: int, seconds: float = 5.0) -> bool:
        """Whether so many clients go away within so many seconds."""
        end = time.monotonic() + seconds
        while self.left < left and time.monotonic() < end:
            time.sleep(0.01)
        return self.left >= left


def texts(message: dict[str, Any]) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return "|".join(part["text"] for part in content if part["type"] == "text")


def urls(message: dict[str, Any]) -> list[str]:
    if not isinstance(message.get("content"), list):
        return []
    return [part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"]


def shown(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


class Handler(BaseHTTPRequestHandler):
    server: Upstream
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.requests.append({"path": self.path, "headers": self._names(), "body": None})
        if self.server.script:
            self._reply(self.server.script.pop(0), {})
            return
        self._send(200, json.dumps({"object": "list", "data": [{"id": "m", "path": self.path}]}).encode())

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):
            body = None
        request = {"path": self.path, "headers": self._names(), "body": body, "raw": raw}
        self.server.requests.append(request)
        if refused := next((word for word in self.server.refuses if word.encode() in raw), None):
            self._reply(Refusal(400, f"{refused} is not supported"), body)
            return
        reply = self.server.script.pop(0) if self.server.script else "fine"
        self._reply(reply, body if isinstance(body, dict) else {})

    def _names(self) -> dict[str, str]:
        return {name.lower(): value for name, value in self.headers.items()}

    def _reply(self, reply: Reply, body: Any) -> None:
        try:
            self._write(reply, body)
        except (BrokenPipeError, ConnectionResetError):
            self.server.left += 1
            self.close_connection = True

    def _write(self, reply: Reply, body: Any) -> None:
        if isinstance(reply, str):
            reply = Text([reply])
        if isinstance(reply, bytes):
            self._send(200, reply)
        elif isinstance(reply, Refusal):
            content = reply.body
            if content is None:
                content = json.dumps(
                    {"error": {"message": reply.message, "type": "t", "param": None, "code": None}}
                ).encode()
            self._send(reply.status, content, reply.headers)
        elif isinstance(reply, Drop):
            self._head(200, {"Content-Length": "1000"})
            self.wfile.write(reply.body)
            self.wfile.flush()
            self.close_connection = True
        elif isinstance(reply, Endless):
            self._head(200, {"Content-Type": "text/event-stream"} if body.get("stream") else {})
            self.close_connection = True
            while not self.server.ends.wait(reply.wait):
                self.wfile.write(reply.chunk)
                self.wfile.flush()
        elif body.get("stream"):
            self._stream(reply, body)
        else:
            if reply.wait and self._gone(reply.wait):
                raise BrokenPipeError
            made = completion(reply, body)
            if self.server.counted is not None:
                made["usage"] = self.server.counted(body)
            self._send(200, json.dumps(made).encode())

    def _gone(self, seconds: float) -> bool:
        """Waits; whether the client goes away meanwhile."""
        self.connection.settimeout(seconds)
        try:
            return self.connection.recv(1) == b""
        except TimeoutError:
            return False
        finally:
            self.connection.settimeout(None)

    def _stream(self, reply: Text, body: dict[str, Any]) -> None:
        self._head(200, {"Content-Type": "text/event-stream"})
        self.close_connection = True
        for event in events(reply, body):
            if reply.wait and self._gone(reply.wait):
                raise BrokenPipeError
            self.wfile.write(event)
            self.wfile.flush()

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        known = {"Content-Type": "application/json", "Content-Length": str(len(content))}
        self._head(status, {**known, **(headers or {})})
        self.wfile.write(content)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"X-Request-Id": "up-1", **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Writes nothing."""


def completion(reply: Text, body: dict[str, Any]) -> dict[str, Any]:
    """A whole answer."""
    message: dict[str, Any] = {"role": "assistant", "content": reply.text or None}
    if reply.calls:
        message["tool_calls"] = [
            {"id": f"call{i}", "type": "function", "function": {"name": name, "arguments": given}}
            for i, (name, given) in enumerate(
                (name, given if isinstance(given, str) else json.dumps(given)) for name, given in reply.calls
            )
        ]
    elif reply.text == "":
        message["content"] = None
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "message": message}
    if body.get("logprobs") and reply.logprobs:
        choice["logprobs"] = {"content": logprobs(reply.pieces, reply.logprobs)}
    usage = {"prompt_tokens": 10, "completion_tokens": len(reply.pieces)}
    usage["total_tokens"] = sum(usage.values())
    made = {"id": "1", "object": "chat.completion", "created": 0, "model": body.get("model", "m")}
    return {**made, "choices": [choice], "usage": usage, "system_fingerprint": "fp"}


def logprobs(pieces: Sequence[str], values: Sequence[float]) -> list[dict[str, Any]]:
    return [
        {"token": piece, "logprob": value, "bytes": None, "top_logprobs": []}
        for piece, value in zip(pieces, values, strict=True)
    ]


def events(reply: Text, body: dict[str, Any]) -> Iterator[bytes]:
    """A stream's events: one for each piece, the end, and what it has used if that is asked for."""
    head = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": body.get("model", "m")}
    for i, piece in enumerate(reply.pieces):
        choice: dict[str, Any] = {"index": 0, "delta": {"content": piece}, "finish_reason": None}
        if body.get("logprobs") and reply.logprobs:
            choice["logprobs"] = {"content": logprobs([piece], [reply.logprobs[i]])}
        yield _event({**head, "choices": [choice]})
    yield _event({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    if (body.get("stream_options") or {}).get("include_usage"):
        usage = {"prompt_tokens": 10, "completion_tokens": len(reply.pieces)}
        yield _event({**head, "choices": [], "usage": {**usage, "total_tokens": sum(usage.values())}})
    yield b"data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


@contextmanager
def upstream() -> Iterator[Upstream]:
    """A server that listens."""
    with Upstream() as made:
        threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield made
        made.ends.set()
        made.shutdown()
