"""A server in a thread, and raw requests to it."""

from __future__ import annotations

import base64
import io
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from threading import Thread
from typing import Any, NamedTuple

from fastapi import FastAPI
from PIL import Image

from foveate.serve.http import Listener, Place


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The error, which must have OpenAI's shape."""
        value = json.loads(self.body)
        assert set(value) == {"error"} and set(value["error"]) == {"message", "type", "param", "code"}
        assert isinstance(value["error"]["message"], str) and self.status >= 400
        assert "Traceback" not in value["error"]["message"] and "/foveate" not in value["error"]["message"]
        return value["error"]


@contextmanager
def served(app: FastAPI, seconds: int = 5) -> Iterator[Listener]:
    """An app that listens at a free port of this machine; stopped at the end."""
    listener = Listener(app, Place(port=0, seconds=seconds))
    thread = Thread(target=listener.listen)
    thread.start()
    try:
        wait_for(lambda: listener.started)
        yield listener
    finally:
        listener.stop()
        thread.join(30)
        assert not thread.is_alive()


def wait_for(true: Callable[[], Any], seconds: float = 10) -> None:
    """Returns when something is true. Fails if it does not become so."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not become true"
        time.sleep(0.005)


def ask(
    listener: Listener,
    path: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
    method: str | None = None,
) -> Reply:
    """One request, whose body is bytes or a value for JSON."""
    content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    given = {"Content-Type": "application/json"} if body is not None else {}
    connection = HTTPConnection(listener.place.host, listener.place.port, timeout=20)
    try:
        way = method or ("GET" if body is None else "POST")
        connection.request(way, path, content, {**given, **(headers or {})})
        got = connection.getresponse()
        return Reply(got.status, {k.lower(): v for k, v in got.getheaders()}, got.read())
    finally:
        connection.close()


def plug(listener: Listener) -> socket.socket:
    """A bare connection."""
    return socket.create_connection((listener.place.host, listener.place.port), timeout=20)


def data_url(image: Image.Image) -> str:
    content = io.BytesIO()
    image.save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
