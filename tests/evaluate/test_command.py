"""`foveate eval` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command import foveate
from tests.support import picture
from tests.test_cli import refused

SHORT = ("--max-new-tokens", 3, "--device", "cpu", "--dtype", "float32")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six receipts, of which a model may have learnt one answer."""
    rows = []
    for i in range(6):
        picture(40, 60 + i).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": "What is the total?", "answer": f"{i}.50"})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data.jsonl"


def test_a_model_is_scored_and_compared(data: Path, tmp_path: Path) -> None:
    result = foveate("eval", data, "--out", tmp_path / "a", *SHORT)
    assert result.code == 0 and "exact match" in result.stdout and "ANLS" in result.stdout
    assert "6 samples; report in" in result.stdout
    made = foveate("eval", data, "--out", tmp_path / "b", "--json", "-o", "grids=[[1, 1]]", *SHORT)
    report = json.loads(made.stdout)
    assert report["plan"]["model"]["options"]["grids"] == [[1, 1]] and report["samples"] == 6
    page = tmp_path / "page.html"
    both = foveate("eval", "--compare", tmp_path / "a", tmp_path / "b", "--out", page)
    assert both.code == 0 and "of 6 answers differ" in both.stdout and page.exists()
    assert (
        json.loads(foveate("eval", "--compare", tmp_path / "a", tmp_path / "b", "--json").stdout)["samples"]
        == 6
    )


def test_one_answer_is_said_in_words(data: Path, tmp_path: Path) -> None:
    """Of a model that says the same about every receipt: its score is no more than that."""
    result = foveate("eval", data, "--out", tmp_path / "a", *SHORT)
    (share,) = {json.loads(line)["prediction"] for line in (tmp_path / "a/samples.jsonl").open()}
    assert f"100.0 % of the answers are the same, {share!r}" in result.stdout.replace("\n", "")
    assert "the model has learnt one answer" in result.stdout


def test_wrong_uses_are_one_sentence(data: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    refused(foveate("eval", data), "--out for the report")
    refused(foveate("eval", tmp_path / "none.jsonl", *out), "no data file at")
    refused(foveate("eval", data, *out, "--metric", "bleu"), "unknown metric 'bleu'")
    refused(foveate("eval", data, *out, "--metric", "vqa"), "line 1 has 1 answers")
    refused(foveate("eval", data, *out, "--name", "m"), "--name is for the address of a server")
    refused(foveate("eval", data, *out, "--model", "http://127.0.0.1:9/v1"), "which model of it with --name")
    server = ("--model", "http://127.0.0.1:9/v1", "--name", "m")
    refused(foveate("eval", data, *out, *server, "--zoom", "relevance"), "which a server does not let us")
    refused(foveate("eval", data, *out, *server, "--template", "plain"), "are for models here")
    gone = foveate("eval", data, *out, *server, "--json")
    refused(gone, "line 1: http://127.0.0.1:9/v1 gave no answer: Connection error")
    refused(foveate("eval", data, *out, "--zoom", "answer", "--method", "llava"), "leave out --method")
    refused(foveate("eval", "--compare", data), "takes the folders of two runs, not 1")
    refused(foveate("eval", "--compare", tmp_path, tmp_path), "holds no finished run")
