"""The proxy against none: the same requests to the same server, directly and through it.

    python -m benchmarks.proxy [--rounds 200] [--threads 2] [--pixels 1500 2000]

A server that answers at once, the proxy and the client are three processes of this machine. Both ways are
taken in turn, over connections that stand. Nothing is zoomed: without a picture, or with one that the model
sees as it is, which the proxy has to look at to know it. Prints a Markdown table of milliseconds a request:
medians with the 10th and 90th percentile, and the processor time of the proxy, which other work lengthens
less than the clock's.
"""

from __future__ import annotations

import base64
import io
import json
import multiprocessing
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx2
import psutil
from fastapi import FastAPI, Request
from PIL import Image
from rich.console import Console
from starlette.responses import Response

from benchmarks.arguments import Whole, arguments
from foveate.serve.http import Door, Listener, Place
from foveate.serve.proxy import Proxy, Rules, Upstream

ANSWER = {
    "id": "1",
    "object": "chat.completion",
    "created": 0,
    "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "a cat"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12},
}
EVENTS = b"".join(b"data: " + json.dumps({"choices": [], "n": n}).encode() + b"\n\n" for n in range(20))
START = 60  # seconds
PHOTOGRAPH = Path(__file__).parents[1] / "examples" / "signs.jpg"


def answer_at_once(port: Connection) -> None:
    """A server of OpenAI's protocol that knows its answer."""
    app, whole = FastAPI(), json.dumps(ANSWER).encode()

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await request.body()
        if b'"stream": true' in body[-100:]:
            return Response(EVENTS, media_type="text/event-stream")
        return Response(whole, media_type="application/json")

    listener = Listener(app, Place(port=0))
    port.send(listener.url)
    listener.listen()


def pass_on(port: Connection, upstream: str, pixels: int) -> None:
    """The proxy, which zooms pictures of more pixels than this."""
    proxy = Proxy(Upstream(upstream, sees=pixels), Rules(zoom="auto"), Door())
    listener = Listener(proxy.app, Place(port=0))
    port.send(listener.url)
    listener.listen()


@contextmanager
def running(target: Callable[..., None], *given: Any) -> Iterator[tuple[str, psutil.Process]]:
    """A server in a process of its own; its address, and the process."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=target, args=(there, *given), daemon=True)
    process.start()
    try:
        if not here.poll(START):
            raise SystemExit("a server did not start")
        url = here.recv()
        wait_for(url)
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.join()


def wait_for(url: str) -> None:
    """Returns when a server takes connections."""
    at, end = httpx2.URL(url), time.monotonic() + START
    while True:
        try:
            socket.create_connection((at.host, at.port or 80), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise SystemExit("a server did not start") from None
            time.sleep(0.01)


def bodies(pixels: tuple[int, int]) -> dict[str, bytes]:
    """What is asked, by name."""
    height, width = pixels
    content = io.BytesIO()
    with Image.open(PHOTOGRAPH) as photograph:
        photograph.resize((width, height)).save(content, "JPEG", quality=85)
    url = f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
    shown = {"type": "image_url", "image_url": {"url": url}}
    text = {"type": "text", "text": "Who is this?"}
    plain = {"model": "m", "messages": [{"role": "user", "content": [text]}]}
    seen = {"model": "m", "messages": [{"role": "user", "content": [shown, text]}]}
    size = len(json.dumps(seen)) / 2**10
    return {
        "a question": json.dumps(plain).encode(),
        "streamed": json.dumps({**plain, "stream": True}).encode(),
        f"a picture, {size:.0f} KB": json.dumps(seen).encode(),
    }


def timed(client: httpx2.Client, url: str, body: bytes) -> float:
    """Milliseconds of one request, answer included."""
    start = time.perf_counter()
    headers = {"Content-Type": "application/json"}
    client.post(f"{url}/chat/completions", content=body, headers=headers).raise_for_status()
    return 1000 * (time.perf_counter() - start)


def used(process: psutil.Process) -> float:
    """Milliseconds of processor time of a process so far."""
    times = process.cpu_times()
    return 1000 * float(times.user + times.system)


def cell(values: list[float]) -> str:
    ordered = sorted(values)
    low, high = (ordered[min(len(values) * part // 10, len(values) - 1)] for part in (1, 9))
    return f"{statistics.median(values):.2f} ({low:.2f} - {high:.2f})"


def main() -> None:
    given = arguments(__doc__, 200, pixels=Whole((1500, 2000), least=28, help="height and width"))
    asked = bodies(tuple(given.pixels))
    console = Console(width=200)
    console.print("| request | directly | through the proxy | added | processor time |")
    console.print("|---|---:|---:|---:|---:|")
    with (
        running(answer_at_once) as (direct, _),
        running(pass_on, direct, given.pixels[0] * given.pixels[1]) as (proxied, process),
        httpx2.Client(timeout=60, trust_env=False) as client,
    ):
        for name, body in asked.items():
            for url in (direct, proxied):
                timed(client, url, body)
            before = used(process)
            pairs = [(timed(client, direct, body), timed(client, proxied, body)) for _ in range(given.rounds)]
            spent = (used(process) - before) / given.rounds
            added = [through - plain for plain, through in pairs]
            ways = [[pair[way] for pair in pairs] for way in (0, 1)]
            console.print(f"| {name} | {cell(ways[0])} | {cell(ways[1])} | {cell(added)} | {spent:.2f} |")


if __name__ == "__main__":
    main()
