"""The page behind a web server: only for this machine by default, with bounds on what is sent."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from tempfile import TemporaryDirectory
from typing import Any

from foveate.ask.foveate import Foveate
from foveate.errors import FoveateError, require
from foveate.picture.limits import Limits

NEEDED = ("gradio", "uvicorn")
HERE = ("127.0.0.1", "localhost", "::1")
# Nothing is loaded from other hosts, whatever a model writes or Gradio would like to show.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "worker-src 'self' blob:; frame-ancestors 'none'"
)
BODY = 2**20  # bytes of a request beside an upload's own

Receive = Callable[[], Any]
Send = Callable[[Any], Any]


class Guard:
    """Refuses requests that are too large or name another host, and lets pages load from here alone.

    Args:
        app: what answers.
        most: bytes of a request's body.
        hosts: names by which this server may be called; None: any.
    """

    def __init__(self, app: Any, most: int, hosts: tuple[str, ...] | None) -> None:
        self.app, self.most, self.hosts = app, most, hosts

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """One connection, as ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "").rpartition(":")[0] or headers.get("host", "")
        if self.hosts is not None and host.strip("[]") not in self.hosts:
            await _refuse(send, 421, "this page is for the machine that it runs on")
            return
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self.most:
            await _refuse(send, 413, f"a request may have {self.most} bytes at most")
            return
        got, started = 0, False

        async def counted() -> Any:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > self.most:
                raise _TooMuch
            return message

        async def guarded(message: Any) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = {**message, "headers": [*message["headers"], *_HEADERS]}
            await send(message)

        try:
            await self.app(scope, counted, guarded)
        except _TooMuch:
            if not started:
                await _refuse(send, 413, f"a request may have {self.most} bytes at most")


class _TooMuch(Exception):
    """A body went beyond the bound."""


_HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


async def _refuse(send: Send, status: int, why: str) -> None:
    body = f"{why}\n".encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def application(
    models: Mapping[str, Foveate], limits: Limits, most_tokens: int, host: str, examples: bool = False
) -> Any:
    """The page as an ASGI application.

    Args:
        models: by name, at least one.
        limits: on the pictures that are read; `max_bytes` also bounds an upload.
        most_tokens: bound on the answers' length that visitors may choose.
        host: where it will listen.
        examples: whether the first model is the embedded one, for which there are examples.
    """
    import gradio as gr
    from fastapi import FastAPI

    from foveate.demo.page import STYLE, Page, theme

    blocks = Page(models, limits, most_tokens, examples).blocks()
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        blocks,
        path="/",
        server_name=host,
        footer_links=[],
        show_error=False,
        max_file_size=limits.max_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        theme=theme(),
        css=STYLE,
    )
    return Guard(app, limits.max_bytes + BODY, HERE if host in HERE else None)


def listening(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 takes any free one. Raises `FoveateError` if it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except (OSError, OverflowError) as error:
        made.close()
        raise FoveateError(
            f"{host}:{port} cannot be listened at: {error}; choose --host and --port"
        ) from error
    return made


def check_packages() -> None:
    """Raises `FoveateError` where the extra is not installed."""
    for module in NEEDED:
        require(module, "demo", "foveate demo")


def server(app: Any) -> Any:
    """A server of an application, ready to run on a socket."""
    import uvicorn

    return uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))


def serve(
    models: Mapping[str, Foveate],
    limits: Limits,
    most_tokens: int,
    host: str,
    port: int,
    ready: Callable[[str], None],
    examples: bool = False,
) -> None:
    """Serves the page until it is interrupted; uploads are deleted then.

    Args:
        models: as for `application`; so are limits, most_tokens and examples.
        limits: on the pictures that are read.
        most_tokens: bound on the answers' length that visitors may choose.
        host: address to listen at.
        port: 0 takes any free one.
        ready: is told the page's address.
        examples: whether the first model is the embedded one.
    """
    with TemporaryDirectory(prefix="foveate-demo-") as folder, listening(host, port) as at:
        os.environ["GRADIO_TEMP_DIR"] = folder
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        made = server(application(models, limits, most_tokens, host, examples))
        shown = f"[{host}]" if ":" in host else host
        ready(f"http://{shown}:{at.getsockname()[1]}/")
        made.run(sockets=[at])
