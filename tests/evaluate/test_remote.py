"""A server of OpenAI's protocol, asked by the official client."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from PIL import Image

from foveate import FoveateError
from foveate.evaluate.metrics import chosen
from foveate.evaluate.models import Remote
from foveate.evaluate.run import evaluate
from foveate.evaluate.samples import read_questions
from foveate.zoom.server import Server as Client
from tests.support import picture


def remote_at(url: str, name: str, key: str | None = None) -> Remote:
    return Remote(Client(url, name, key))


class Server(ThreadingHTTPServer):
    """Answers with the size of the picture that it gets, after `failures` times a status of its own."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, Any]] = []
        self.failures: list[int] = []
        self.content: Any = "size"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append({**body, "key": self.headers["Authorization"]})
        if self.server.failures:
            self._reply(self.server.failures.pop(), {"error": {"message": "not now"}})
            return
        content = self.server.content
        if content == "size":
            url = body["messages"][0]["content"][0]["image_url"]["url"]
            shown = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
            content = f" {shown.width} x {shown.height}\n"
        message = {"role": "assistant", "content": content}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        made = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        self._reply(200, made)

    def _reply(self, status: int, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        """Writes nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = []
    for i in range(5):
        picture(20 + i, 30).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": f"How large is {i}?", "answer": f"30 x {20 + i}"})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data.jsonl"


def test_a_server_is_evaluated(server: Server, data: Path, tmp_path: Path) -> None:
    """Every picture as it is, greedily, several at once; a server that is busy is asked again."""
    server.failures = [429]
    questions = read_questions(data)
    remote = remote_at(server.url, "served", "secret")
    assert isinstance(remote.server.client, OpenAI)
    metrics = chosen(["exact"], questions.samples)
    report = evaluate(remote, questions, metrics, tmp_path / "out", batch=3, max_new_tokens=7)
    assert report["scores"]["exact"]["mean"] == 1 and report["visual_tokens"] is None
    assert report["plan"]["model"] == {"kind": "server", "url": server.url, "name": "served"}
    assert len(server.requests) == 6
    for request in server.requests:
        assert (request["model"], request["temperature"], request["max_tokens"]) == ("served", 0, 7)
        assert request["key"] == "Bearer secret"
    assert "secret" not in (tmp_path / "out/report.json").read_text()


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refusal_is_one_sentence(status: int, server: Server, data: Path, tmp_path: Path) -> None:
    server.failures = [status] * 9
    questions = read_questions(data)
    with pytest.raises(FoveateError, match=r"line 1: http://127.0.0.1:\d+/v1 gave no answer: .*not now"):
        evaluate(remote_at(server.url, "m"), questions, [], tmp_path / "out")


def test_answers_without_text_and_no_server(server: Server, data: Path, tmp_path: Path) -> None:
    server.content = None
    with pytest.raises(FoveateError, match="gave an answer without text"):
        evaluate(remote_at(server.url, "m"), read_questions(data), [], tmp_path / "out")
    with pytest.raises(FoveateError, match="gave no answer: Connection error"):
        evaluate(remote_at("http://127.0.0.1:9/v1", "m"), read_questions(data), [], tmp_path / "none")
