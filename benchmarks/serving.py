"""A server's throughput with many clients beside that with one; whether each answer is the one given alone.

    MALLOC_ARENA_MAX=2 python -m benchmarks.serving [--requests 1000] [--clients 32] [--pictures 20]

The embedded model is served by a process of its own, float32. Clients ask questions about parts of
`examples/signs.jpg`, each over one connection that it keeps: first one client alone, then all at once, each
time on a new server, which has answered one question about each picture before. They ask for a description,
which this model answers with words up to the bound of 32; questions that it has learnt, of which most are
answered by one word; and these questions about a picture of each request's own, so that nothing is known of
it. Every answer is compared with that of `Foveate.ask`. Prints a Markdown table; times are those of a client,
whose work takes a share of the machine. MALLOC_ARENA_MAX keeps glibc from holding memory for every thread.
"""

from __future__ import annotations

import base64
import io
import json
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from threading import local
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from transformers.utils import logging

from benchmarks.arguments import Whole, arguments
from foveate.ask.foveate import Foveate, load
from foveate.serve.app import Server, Serving
from foveate.serve.http import Listener, Place
from foveate.serve.scheduler import Bounds

PICTURE = Path(__file__).parents[1] / "examples" / "signs.jpg"
SIDE = 336  # of the pictures that are sent
QUESTIONS = (
    "what digit is on the red shape?",
    "what colour is the sign?",
    "how many shapes are there?",
    "what word is on the sign?",
    "what shape is red?",
    "where is the sign?",
    "what letter is on the circle?",
    "what colour is the circle?",
    "how many red shapes are there?",
    "where is the circle?",
    "what shape has digit 9?",
)
DESCRIPTIONS = (
    "describe the picture",
    "say all that you see",
    "name every shape and its colour",
    "a picture of",
    "describe all shapes: the",
    "tell me about the shapes in this picture",
)
WORDS = 32  # bound on an answer, in tokens
# Bytes kept of earlier requests: reached in the first quarter, so that memory can be seen to stay.
PREFIXES, FEATURES = 2**26, 2**24
ALONE = 4  # one client sends this many times fewer requests


@dataclass(frozen=True)
class Asked:
    """A request."""

    picture: int
    question: str


@dataclass
class Record:
    """What clients saw of a server."""

    seconds: list[float] = field(default_factory=list)  # per request
    rates: list[float] = field(default_factory=list)  # requests per second, of each round
    answers: list[tuple[Asked, str | None]] = field(default_factory=list)  # None: an error
    processor: float = 0.0  # seconds that the servers worked
    memory: list[tuple[float, float]] = field(default_factory=list)  # MB after a quarter, and at the end


def main() -> None:
    given = arguments(
        __doc__,
        rounds=2,
        requests=Whole(1000, help="of all clients together"),
        clients=Whole(32),
        pictures=Whole(20, help="that the requests are about"),
    )
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # threads of this process would be missing in the servers
    model = load(device="cpu", dtype="float32")
    pictures = [part_of_picture(i) for i in range(max(given.pictures, given.requests))]
    urls = [data_url(picture) for picture in pictures]
    asks = [QUESTIONS[i % len(QUESTIONS)] for i in range(given.requests)]
    few = [Asked(i % given.pictures, question) for i, question in enumerate(asks)]
    kinds = {
        "descriptions": [
            Asked(i % given.pictures, DESCRIPTIONS[i % len(DESCRIPTIONS)]) for i in range(given.requests)
        ],
        "questions": few,
        "a picture each": [Asked(i, question) for i, question in enumerate(asks)],
    }
    records = {(kind, clients): Record() for kind in kinds for clients in (1, given.clients)}
    for _ in range(given.rounds):
        for (kind, clients), record in records.items():
            asked = kinds[kind][: given.requests if clients > 1 else -(-given.requests // ALONE)]
            warm = few[: given.pictures] if asked[-1].picture < given.pictures else few[:clients]
            with server(model, given.threads) as place:
                measure(record, place, warm, asked, urls, clients)
    alone = answers_alone(model, pictures, {one for record in records.values() for one, _ in record.answers})
    show(given, records, alone)


def show(given: Any, records: dict[tuple[str, int], Record], alone: dict[Asked, str]) -> None:
    console = Console(width=200, highlight=False, markup=False)
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores, {given.threads} threads, float32, "
        f"torch {torch.__version__}, {given.rounds} rounds\n"
    )
    console.print(
        "| requests | clients | number | errors | equal to alone | requests / s (range) "
        "| of one client | p50 ms | p99 ms | processor ms / request | MB after a quarter, at the end |"
    )
    console.print("|---|---:|---:|---:|---:|---|---:|---:|---:|---:|---|")
    for (kind, clients), record in records.items():
        rate, first = statistics.median(record.rates), statistics.median(records[kind, 1].rates)
        half, most = (1000 * seconds for seconds in np.quantile(record.seconds, (0.5, 0.99)))
        equal = sum(text == alone[one] for one, text in record.answers)
        errors = sum(text is None for _, text in record.answers)
        before, after = (statistics.median(kind) for kind in zip(*record.memory, strict=True))
        console.print(
            f"| {kind} | {clients} | {len(record.answers)} | {errors} | {equal} | {rate:.1f} "
            f"({min(record.rates):.1f} - {max(record.rates):.1f}) | {rate / first:.2f} "
            f"| {half:.0f} | {most:.0f} "
            f"| {1000 * record.processor / len(record.answers):.1f} | {before:.0f}, {after:.0f} |"
        )


def part_of_picture(number: int) -> Image.Image:
    """A part of the picture, another one for every number."""
    with Image.open(PICTURE) as image:
        image.draft("RGB", (1200, 1200))
        whole = image.convert("RGB").resize((1200, 1200))
    left, top, size = 7 * number % 200, 13 * number % 190, 900 + 11 * number % 90
    return whole.crop((left, top, left + size, top + size)).resize((SIDE, SIDE))


def data_url(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=95)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


@contextmanager
def server(model: Foveate, threads: int) -> Iterator[tuple[int, int]]:
    """The model behind a port; gives the port and the process's number."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(model, theirs, threads))
    process.start()
    try:
        assert process.pid is not None
        yield ours.recv(), process.pid
    finally:
        ours.send("stop")
        process.join()


def serve(model: Foveate, wire: Any, threads: int) -> None:
    torch.set_num_threads(threads)
    remembering = Foveate(model.model, model.processor, memory=FEATURES)
    served = Server(remembering, Serving("embedded", bounds=Bounds(prefix_bytes=PREFIXES)))
    listener = Listener(served.app, Place(port=0))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(listener.listen)
        while not listener.started:
            time.sleep(0.01)
        wire.send(listener.place.port)
        wire.recv()
        listener.stop()
        running.result()


def measure(
    record: Record,
    place: tuple[int, int],
    warm: list[Asked],
    asked: list[Asked],
    urls: list[str],
    clients: int,
) -> None:
    """Sends the requests, each client one after the other."""
    port, process = place
    mine = local()

    def send(one: Asked) -> tuple[Asked, str | None, float]:
        start = time.perf_counter()
        if not hasattr(mine, "wire"):
            mine.wire = HTTPConnection("127.0.0.1", port, timeout=600)
        try:
            text = answer_of(mine.wire, urls[one.picture], one.question)
        except (OSError, HTTPException):
            text = None
            mine.wire.close()
        return one, text, time.perf_counter() - start

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(send, warm))
        before, start = processor_seconds(process), time.perf_counter()
        quarter = len(asked) // 4
        found = list(pool.map(send, asked[:quarter]))
        early = megabytes(process)
        found += pool.map(send, asked[quarter:])
        record.rates.append(len(found) / (time.perf_counter() - start))
    record.processor += processor_seconds(process) - before
    record.memory.append((early, megabytes(process)))
    record.seconds += [seconds for *_, seconds in found]
    record.answers += [(one, text) for one, text, _ in found]


def answer_of(wire: HTTPConnection, url: str, question: str) -> str | None:
    """The answer; None for an error."""
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    body = {
        "model": "embedded",
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": WORDS,
    }
    wire.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    reply = wire.getresponse()
    content = json.loads(reply.read())
    return content["choices"][0]["message"]["content"] if reply.status == 200 else None


def processor_seconds(process: int) -> float:
    words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def megabytes(process: int) -> float:
    """Of memory that a process holds."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def answers_alone(model: Foveate, pictures: list[Image.Image], asked: set[Asked]) -> dict[Asked, str]:
    """What `Foveate.ask` answers, of pictures as they arrive."""
    read = {}
    for one in asked:
        content = base64.b64decode(data_url(pictures[one.picture]).partition(",")[2])
        read[one] = model.ask(content, one.question, max_new_tokens=WORDS).text
    return read


if __name__ == "__main__":
    main()
