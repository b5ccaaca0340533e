"""Files of questions: order, errors, kills, memory; over a server, with a model, over a cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from foveate import FoveateError
from foveate.batch.run import Asking, Counts, Job, Line, digest_of, in_threads, lines_of, run
from foveate.evaluate.models import Given, Pair
from foveate.picture.geometry import Box
from foveate.zoom.asking import Unavailable
from tests.command import foveate
from tests.support import picture
from tests.upstream import Refusal, Text, Upstream, upstream


class Stand:
    """Answers with the picture's width and the question; the number in the question is waited for."""

    transparency = "white"

    def __init__(self, wait: float = 0.0) -> None:
        self.wait, self.running, self.most, self.lock = wait, 0, 0, threading.Lock()
        self.fails: list[str] = []
        self.asked: list[str] = []

    def describe(self) -> dict[str, Any]:
        return {"kind": "stand-in"}

    def answer(self, pairs: Sequence[Pair], max_new_tokens: int) -> list[Given]:
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
            self.asked += [question for _, question in pairs]
        try:
            time.sleep(self.wait * (hash(pairs[0][1]) % 5))
            for _, question in pairs:
                if "down" in self.fails and question.endswith("7?"):
                    raise Unavailable("no server")
                if question in self.fails:
                    raise FoveateError("cannot be asked")
            return [Given(f"{image.width} {question}", [Box(0, 0, 2, 3)]) for image, question in pairs]
        finally:
            with self.lock:
                self.running -= 1


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve questions about three pictures, with an empty line between."""
    for i in range(3):
        picture(20, 30 + i).save(tmp_path / f"{i}.png")
    rows = [json.dumps({"image": f"{i % 3}.png", "question": f"No. {i}?", "id": f"q{i}"}) for i in range(12)]
    (tmp_path / "data.jsonl").write_text("\n".join([*rows[:5], "  ", *rows[5:]]))
    return tmp_path / "data.jsonl"


def answers(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_bytes().splitlines()]


def ask(data: Path, out: Path, stand: Stand, batch: int = 1, at_once: int = 4) -> Counts:
    digest, total = digest_of(data)
    asking = Asking(stand, data, data.parent, 16)
    job = Job(data.name, digest, stand.describe(), 16, "white")
    return run(job, total, data, out, in_threads(asking, batch, at_once))


@pytest.mark.parametrize(("batch", "at_once"), [(1, 1), (1, 4), (5, 1), (3, 2)])
def test_answers_keep_the_order_of_questions(data: Path, tmp_path: Path, batch: int, at_once: int) -> None:
    stand = Stand(wait=0.004)
    counts = ask(data, tmp_path / "out.jsonl", stand, batch, at_once)
    found = answers(tmp_path / "out.jsonl")
    assert [one["id"] for one in found] == [f"q{i}" for i in range(12)]
    assert [one["line"] for one in found] == [1, 2, 3, 4, 5, *range(7, 14)]
    told = {"answer": "31 No. 4?", "regions": [[0, 0, 2, 3]], "notes": []}
    assert found[4] == {"line": 5, "id": "q4", "question": "No. 4?", **told}
    assert (counts.lines, counts.answers, counts.errors, counts.total) == (12, 12, 0, 12)
    assert stand.most <= at_once


def test_what_cannot_be_asked_is_written_in_its_place(data: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    lines = [
        *data.read_text().splitlines()[:2],
        "{not JSON",
        "[1, 2]",
        '{"image": "none.png", "question": "?"}',
        '{"image": "../../etc/passwd", "question": "?"}',
        '{"image": "text.png", "question": "Who?", "id": "t"}',
        '{"image": "0.png", "question": " "}',
        '{"image": "0.png", "question": "refused"}',
        '{"image": "http://a/b.png", "question": "?"}',
        '{"image": ["0.png", "1.png"], "question": "?"}',
        "[" * 100000,
        data.read_text().splitlines()[2],
    ]
    data.write_text("\n".join(lines) + "\n")
    stand = Stand()
    stand.fails = ["refused"]
    for batch in (1, 13):
        out = tmp_path / f"{batch}.jsonl"
        counts = ask(data, out, stand, batch)
        found = answers(out)
        assert [one["line"] for one in found] == list(range(1, 14))
        assert ["answer" in one for one in found] == [True, True, *[False] * 10, True]
        assert (counts.answers, counts.errors) == (3, 10)
        assert "cannot be asked" in found[8]["error"] and "is not JSON" in found[2]["error"]
        assert found[6]["id"] == "t" and "text.png cannot be read" in found[6]["error"]


def test_a_conversation_has_several_answers(data: Path, tmp_path: Path) -> None:
    turns = [("human", "<image>\nA?"), ("gpt", "a"), ("human", "B?"), ("gpt", "b")]
    record = {
        "id": "c",
        "image": "0.png",
        "conversations": [{"from": who, "value": text} for who, text in turns],
    }
    data.write_text(json.dumps(record) + "\n" + data.read_text())
    out = tmp_path / "out.jsonl"
    ask(data, out, Stand())
    whole = out.read_bytes()
    assert [one["id"] for one in answers(out)][:3] == ["c/0", "c/1", "q0"]
    first = whole.index(b"\n") + 1
    for cut in (first, first + 5, 3):  # a kill between two answers of one line, and within them
        out.write_bytes(whole[:cut])
        stand = Stand()
        ask(data, out, stand)
        assert out.read_bytes() == whole and "A?" in stand.asked  # several are asked at once


def test_a_torn_end_is_cut_off(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    ask(data, out, Stand())
    whole = out.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in (0, 10, ends[0], ends[5] - 1, ends[5] + 1, len(whole) - 1):
        out.write_bytes(whole[:cut])
        stand = Stand()
        ask(data, out, stand)
        assert out.read_bytes() == whole
        assert len(stand.asked) == 12 - sum(end <= cut for end in ends)
    assert ask(data, out, Stand()).answers == 12  # nothing is left to do
    out.write_bytes(whole[: ends[2]] + b"{broken\n" + whole[ends[3] :])
    with pytest.raises(FoveateError, match=r"out\.jsonl is broken at byte"):
        ask(data, out, Stand())


def test_other_runs_are_refused(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    ask(data, out, Stand())
    data.write_text(data.read_text() + "\n{}")
    with pytest.raises(FoveateError, match="is from a run with digest"):
        ask(data, out, Stand())
    (tmp_path / "mine.jsonl").write_text("mine")
    with pytest.raises(FoveateError, match="exists already and is of no run"):
        ask(data, tmp_path / "mine.jsonl", Stand())
    assert (tmp_path / "mine.jsonl").read_text() == "mine"
    with pytest.raises(FoveateError, match="must end in"):
        ask(data, tmp_path / "out.txt", Stand())
    with pytest.raises(FoveateError, match="there is no folder"):
        ask(data, tmp_path / "none" / "out.jsonl", Stand())


def test_who_does_not_answer_ends_the_run_and_it_goes_on(data: Path, tmp_path: Path) -> None:
    out, stand = tmp_path / "out.jsonl", Stand()
    stand.fails = ["down"]
    with pytest.raises(Unavailable, match="no server"):
        ask(data, out, stand)
    assert [one["id"] for one in answers(out)] == [f"q{i}" for i in range(7)]
    stand.fails = []
    ask(data, out, stand)
    assert [one["id"] for one in answers(out)] == [f"q{i}" for i in range(12)]


def test_only_a_window_is_ahead(data: Path, tmp_path: Path) -> None:
    """However long the file, lines are read as answers are taken."""
    data.write_text("".join(f'{{"image": "0.png", "question": "{i}?"}}\n' for i in range(5000)))
    read = 0

    def counted() -> Iterator[Line]:
        nonlocal read
        for line in lines_of(data):
            read += 1
            yield line

    work = in_threads(Asking(Stand(), data, data.parent, 16), 2, 3)(counted())
    for taken in range(50):
        next(work)
        assert read - taken <= 2 * (3 + 1)
    work.close()  # type: ignore[attr-defined]
    assert read < 70


@pytest.mark.parametrize("content", [b"", b"\n\n", b"a", b"a\n", b"\na\n\n bc \n", b"x" * 3_000_000 + b"\ny"])
def test_lines_and_their_places(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    found = [(line.number, content[line.start : line.start + line.length]) for line in lines_of(path)]
    assert found == [(i, line) for i, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    assert digest_of(path)[1] == len(found)


@pytest.fixture
def server() -> Iterator[Upstream]:
    with upstream() as made:
        yield made


def test_a_kill_in_the_middle(data: Path, server: Upstream, tmp_path: Path) -> None:
    """kill -9, then the same command: every question once, in order; those on their way are asked again."""
    server.script = [Text([f"answer {i}"], wait=0.0 if i < 5 else 60.0) for i in range(9)]
    out = tmp_path / "out.jsonl"
    arguments = ["batch", str(data), str(out), "--upstream", server.url, "--name", "m", "--batch", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "foveate", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OPENAI_API_KEY": "k"},
    )
    end = time.monotonic() + 120
    while (not out.exists() or len(out.read_bytes().splitlines()) < 5) and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(answers(out))
    assert done == 5
    with out.open("ab") as file:
        file.write(b'{"line": 7, "id": "q')  # as a kill in the middle of writing leaves it
    before = len(server.requests)
    server.script.clear()
    found = foveate(*arguments)
    assert found.code == 0, found.stderr
    assert [one["id"] for one in answers(out)] == [f"q{i}" for i in range(12)]
    assert len(server.requests) - before == 12 - done and "12 answers in" in found.stdout


def test_a_server_with_a_closer_look(data: Path, server: Upstream, tmp_path: Path) -> None:
    server.script = ["[0, 0, 0.5, 0.5]", "a dog", "a cat", Refusal(400, "too long")]
    data.write_text("".join(f'{{"image": "0.png", "question": "{i}?"}}\n' for i in range(2)))
    where = ("batch", data, tmp_path / "out.jsonl", "--name", "m", "--upstream")
    found = foveate(*where, server.url, "--zoom", "answer", "--batch", "1")
    assert found.code == 0 and "1 answers" not in found.stderr
    first, second = answers(tmp_path / "out.jsonl")
    assert first["answer"] == "a cat" and first["regions"] == [[0, 0, 16, 16]]
    assert second["answer"] == "fine" and "too long" in second["notes"][0]
    other = foveate(*where, server.url, "--batch", "1")
    assert other.code == 2 and "is from a run with model" in " ".join(other.stderr.split())


def test_a_model(data: Path, tmp_path: Path) -> None:
    """The embedded one answers as `foveate ask` does."""
    found = foveate("batch", data, tmp_path / "out.jsonl", "--max-new-tokens", "2", "--batch", "4")
    assert found.code == 0, found.stderr
    told = foveate("ask", tmp_path / "1.png", "No. 1?", "--max-new-tokens", "2", "--json")
    assert answers(tmp_path / "out.jsonl")[1]["answer"] == json.loads(told.stdout)["answer"]


def test_wrong_commands(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    for arguments, why in (
        ((data, out, "--model", "a", "--upstream", "http://a/v1"), "not both"),
        ((data, out, "--upstream", "a"), "is not the address of a server"),
        ((data, out, "--upstream", "http://a/v1"), "say which model of it with --name"),
        ((data, out, "--actors", "2"), "are for --ray"),
        ((tmp_path / "none.jsonl", out), "give a file of questions"),
        ((tmp_path, out), "give a file of questions"),
        ((data, out, "--images", tmp_path / "none"), "there is no folder"),
        ((data, out, "--boxes", "qwen3_vl"), "--boxes is for the address of a server"),
    ):
        found = foveate("batch", *arguments)
        assert found.code == 2 and why in " ".join(found.stderr.split()), found.stderr
    (tmp_path / "empty.jsonl").write_text("\n \n")
    found = foveate("batch", tmp_path / "empty.jsonl", out)
    assert found.code == 2 and "holds no questions" in " ".join(found.stderr.split())
    assert not out.exists()
