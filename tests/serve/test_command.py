"""`foveate serve` as a process: its options, its key, its end."""

from __future__ import annotations

import os
import re
import signal
import socket
from pathlib import Path

import openai
import pytest

from tests import forked
from tests.command import foveate
from tests.serve.support import data_url, wait_for
from tests.support import picture

KEY = "FOVEATE_API_KEY"


def test_a_served_model_ends_when_it_is_told(tmp_path: Path) -> None:
    key, errors = tmp_path / "key", tmp_path / "errors"
    key.write_text("a-secret\n")
    errors.touch()
    process = forked.foveate(
        *("serve", "--port", "0", "--api-key-file", key, "--dtype", "float32", "--max-tokens", "8"),
        errors=errors,
    )
    try:
        wait_for(lambda: "answers at" in errors.read_text() or process.poll() is not None, 60)
        found = re.search(
            r"embedded answers at (http://127\.0\.0\.1:\d+/v1), cpu, float32", errors.read_text()
        )
        assert found is not None, errors.read_text()
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=found[1], api_key="other", max_retries=0).models.list()
        client = openai.OpenAI(base_url=found[1], api_key="a-secret", max_retries=0)
        shown = {"type": "image_url", "image_url": {"url": data_url(picture(70, 90))}}
        asked = [{"role": "user", "content": [{"type": "text", "text": "a private question"}, shown]}]
        answer = client.chat.completions.create(model="embedded", messages=asked)  # type: ignore[arg-type]
        assert answer.usage is not None and answer.usage.completion_tokens <= 8
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait() == -signal.SIGTERM  # as systemd and Docker expect
    finally:
        process.kill()
    log = errors.read_text()
    assert re.search(r"POST /v1/chat/completions 200 \d+\.\d+s in=\d+ out=\d+ prompt=\d+ cached=0", log)
    assert "private" not in log and "a-secret" not in log and "Traceback" not in log


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("--host", "0.0.0.0"),
            "other machines can reach 0.0.0.0: set an API key, or say that none is wanted",
        ),
        (("--host", "nowhere.invalid", "--no-api-key"), "cannot be listened at"),
        (("--api-key-file", "nothing"), "nothing"),
        (("--api-key-file", "empty"), "is empty: write the API key into it"),
        (("--api-key-file", "key", "--no-api-key"), "--no-api-key contradicts --api-key-file"),
        (("no-such-model",), "no-such-model"),
        (("--kv-memory", "0"), "kv_bytes must be above 0"),
    ],
)
def test_options_that_make_no_sense(
    options: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").touch()
    (tmp_path / "key").write_text("k")
    result = foveate("serve", *options)
    assert result.code == 2 and said in " ".join(result.stderr.split()), result.stderr


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = foveate("serve", "--port", port)
    assert result.code == 2 and f"127.0.0.1:{port} cannot be listened at" in result.stderr


def test_the_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "of the environment")
    result = foveate("serve", "--no-api-key")
    assert result.code == 2 and f"--no-api-key contradicts {KEY}" in result.stderr
    monkeypatch.setenv(KEY, "")
    result = foveate("serve")
    assert result.code == 2 and "the API key must be of printable ASCII characters" in result.stderr
