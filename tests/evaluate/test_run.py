"""Runs: the same answers however they are asked, and everything that made them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from foveate import FoveateError, Zoom
from foveate.evaluate.compare import compare
from foveate.evaluate.metrics import chosen
from foveate.evaluate.models import AnyVLM, Given, Own
from foveate.evaluate.run import evaluate
from foveate.evaluate.samples import read_questions
from foveate.evaluate.statistics import interval
from foveate.picture.geometry import Size
from foveate.picture.reading import Transparency
from foveate.tiny import tiny_model
from foveate.zoom.vlm import VLM
from tests.methods.conftest import METHODS, fresh
from tests.support import picture

WORDS = ["red", "green", "blue", "white", "grey", "pink", "black"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven questions about pictures of different sizes."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for i, word in enumerate(WORDS):
        picture(50 + 13 * i, 90 - 5 * i).save(folder / f"{i}.png")
        asked = f"What is the color of part {i}?" + " Say it." * i
        rows.append({"id": f"q{i}", "image": f"{i}.png", "question": asked, "answer": word})
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "questions.jsonl"


class Scripted:
    """Answers as told, and remembers how it was asked."""

    transparency: Transparency = "white"

    def __init__(self, answers: Sequence[str], shown: Size | None = None) -> None:
        self.answers, self.shown, self.asked = list(answers), shown, []

    def describe(self) -> dict[str, Any]:
        return {"kind": "scripted"}

    def answer(self, pairs: Sequence[tuple[Image.Image, str]], max_new_tokens: int) -> list[Given]:
        self.asked.append(len(pairs))
        return [Given(self.answers.pop(0), shown=self.shown) for _ in pairs]


class Interrupted(Own):
    """Stops before the fourth answer."""

    def answer(self, pairs: Sequence[tuple[Image.Image, str]], max_new_tokens: int) -> list[Given]:
        self.said = vars(self).get("said", 0) + 1
        if self.said > 3:
            raise InterruptedError
        return super().answer(pairs, max_new_tokens)


def run(answering: Any, data: Path, out: Path, **more: Any) -> dict[str, Any]:
    given = {name: more.get(name) for name in ("limit", "seed")}
    questions = read_questions(data, **given)
    return evaluate(answering, questions, chosen(more.pop("metrics", []), questions.samples), out, **more)


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", METHODS)
def test_the_same_answers_in_any_batch(method: str, data: Path, tmp_path: Path) -> None:
    """To the letter, of a model whose parts all do something; also of a run that was cut off."""
    made = Own(fresh(method))
    said = {}
    with pytest.raises(InterruptedError):
        run(Interrupted(made.model), data, tmp_path / "1", batch=1, max_new_tokens=12)
    assert len((tmp_path / "1/parts/00000.jsonl").read_bytes().splitlines()) == 3
    for batch in (1, 3, 8):
        run(made, data, tmp_path / str(batch), batch=batch, max_new_tokens=12)
        said[batch] = records(tmp_path / str(batch))
    assert said[1] == said[3] == said[8]
    assert len({record["prediction"] for record in said[1]}) > 1
    assert all(record["visual_tokens"] > 0 and "<image>" in record["prompt"] for record in said[1])


def test_what_made_an_answer(data: Path, tmp_path: Path) -> None:
    made = fresh("llava")
    report = run(Own(made), data, tmp_path / "out", max_new_tokens=4)
    plan = report["plan"]
    assert plan["model"]["method"] == "llava" and plan["model"]["options"]["projector_depth"] == 2
    assert len(plan["model"]["weights"]) == 16 and plan["model"]["dtype"] == "float32"
    assert {"foveate", "torch", "transformers", "python"} <= report["versions"].keys()
    first, last = records(tmp_path / "out")[0], records(tmp_path / "out")[-1]
    assert first["size"] == [90, 50] and first["shown"] == [56, 31]  # padded to a square of 56
    assert last["downscaled"] and report["downscaled"] == sum(
        r["downscaled"] for r in records(tmp_path / "out")
    )
    assert report == json.loads((tmp_path / "out/report.json").read_text())
    assert not (tmp_path / "out/parts").exists()


def test_other_metrics_of_the_same_answers(data: Path, tmp_path: Path) -> None:
    """Without asking again."""
    scripted = Scripted(["red", "Green.", "blu", *["no"] * 4])
    first = run(scripted, data, tmp_path / "out", metrics=["exact"])
    again = run(scripted, data, tmp_path / "out", metrics=["anls"])
    assert (first["scores"]["exact"]["mean"], len(scripted.asked)) == (pytest.approx(2 / 7), 7)
    assert again["scores"]["anls"]["mean"] == pytest.approx((1 + 5 / 6 + 3 / 4) / 7)
    with pytest.raises(FoveateError, match=r"out is from a run with max_new_tokens 64, not 3"):
        run(scripted, data, tmp_path / "out", max_new_tokens=3)


def test_one_answer_for_everything_is_called_so(data: Path, tmp_path: Path) -> None:
    learnt = run(Scripted(["red"] * 7), data, tmp_path / "one", metrics=["exact"])["most_frequent"]
    assert learnt["one_answer"] and learnt["share"] == 1 and learnt["prediction"] == "red"
    assert learnt["always"]["exact"] == pytest.approx(1 / 7)
    good = run(Scripted([*WORDS[:3], *["red"] * 4]), data, tmp_path / "good", metrics=["exact"])
    assert good["most_frequent"]["share"] == pytest.approx(5 / 7) and not good["most_frequent"]["one_answer"]


def test_strict(data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FoveateError, match=r"line 1 \(id q0\): the model sees this picture of 90 x 50 .* at 9 x 8"
    ):
        run(Scripted(WORDS, Size(8, 9)), data, tmp_path / "out", strict=True)
    run(Scripted(WORDS, Size(200, 200)), data, tmp_path / "large", strict=True)


def test_limit_and_seed(data: Path, tmp_path: Path) -> None:
    first = [s.id for s in read_questions(data, limit=3).samples]
    drawn = [s.id for s in read_questions(data, limit=3, seed=1).samples]
    assert first == ["q0", "q1", "q2"] and drawn != first
    assert drawn == [s.id for s in read_questions(data, limit=3, seed=1).samples]
    assert run(Scripted(WORDS), data, tmp_path / "out", limit=2)["samples"] == 2


def test_a_run_goes_on_after_an_error(data: Path, tmp_path: Path) -> None:
    """Of any kind; a line that was half written is asked again."""
    with pytest.raises(IndexError):
        run(Scripted(WORDS[:3]), data, tmp_path / "out", batch=2)
    part = tmp_path / "out/parts/00000.jsonl"
    assert part.read_text().count("\n") == 1
    with part.open("a") as file:
        file.write('{"batch": 2, "rec')
    rest = Scripted(WORDS[2:])
    report = run(rest, data, tmp_path / "out", batch=1)
    assert rest.asked == [1] * 5 and report["scores"]["exact"]["mean"] == 1
    with pytest.raises(FoveateError, match="from a run with model"):
        run(Own(tiny_model("llava")), data, tmp_path / "out")


SCRIPT = """
import sys
from pathlib import Path
from tests.evaluate.test_run import run
from tests.methods.conftest import METHODS, fresh
from foveate.evaluate.models import Own
from foveate.methods import chain_of_spot
chain_of_spot.REGION_TOKENS = 12  # as conftest.py has it
for name in METHODS:
    run(Own(fresh(name)), Path(sys.argv[1]), Path(sys.argv[2]) / name, batch=1, max_new_tokens=12)
"""


def started(data: Path, out: Path, **environment: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", SCRIPT, str(data), str(out)]
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, cwd=root, env={**os.environ, **environment})


def test_killed_and_on_two_processes(data: Path, tmp_path: Path) -> None:
    """Runs of which `kill -9` ended one and left the rest, gone on with by two: the same to the letter."""
    out, first = tmp_path / "out", next(iter(METHODS))
    process = started(data, out)
    part = out / first / "parts/00000.jsonl"
    end = time.monotonic() + 120
    while not (part.exists() and part.stat().st_size) and time.monotonic() < end and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / first / "report.json").exists() and part.exists()
    rank = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611", "LOCAL_WORLD_SIZE": "2"}
    both = [started(data, out, RANK=str(r), LOCAL_RANK=str(r), **rank) for r in range(2)]
    for name in METHODS:
        run(Own(fresh(name)), data, tmp_path / name, batch=8, max_new_tokens=12)
    assert [process.wait(timeout=240) for process in both] == [0, 0]
    for name in METHODS:
        assert records(out / name) == records(tmp_path / name), name


def test_any_vlm_and_its_closer_look(data: Path, tmp_path: Path) -> None:
    made = fresh("llava")
    plain = run(AnyVLM(VLM(made.model, made.processor)), data, tmp_path / "plain", max_new_tokens=4)
    assert plain["plan"]["model"]["zoom"] is None and plain["visual_tokens"] == 16
    run(Own(made), data, tmp_path / "own", max_new_tokens=4)
    for measured, planned in zip(records(tmp_path / "plain"), records(tmp_path / "own"), strict=True):
        same = ("downscaled", "visual_tokens", "prediction", "prompt")
        assert [measured[name] for name in same] == [planned[name] for name in same]
        pairs = zip(measured["shown"], planned["shown"], strict=True)
        assert all(abs(one - other) <= 1 for one, other in pairs)  # of a pixel that is shown in part
    zoom = Zoom(made.model, made.processor, "relevance")
    zoomed = run(AnyVLM(zoom.vlm, zoom), data, tmp_path / "zoom", max_new_tokens=4)
    assert "Relevant" in zoomed["plan"]["model"]["zoom"]["region"]
    assert any(record["regions"] for record in records(tmp_path / "zoom"))


def test_two_runs_are_compared(data: Path, tmp_path: Path) -> None:
    run(Scripted(["red", "green", *["no"] * 5]), data, tmp_path / "a", metrics=["exact", "anls"])
    run(Scripted(["red", "no", *WORDS[2:6], "no"]), data, tmp_path / "b", metrics=["exact"])
    found = compare(tmp_path / "a", tmp_path / "b", tmp_path / "page.html")
    exact = found["scores"]["exact"]
    assert list(found["scores"]) == ["exact"] and found["samples"] == 7
    assert exact["mean"] == pytest.approx(3 / 7) and (exact["better"], exact["worse"]) == (4, 1)
    assert exact["interval"][0] < exact["mean"] < exact["interval"][1]
    assert found["changed"] == ["q1", "q2", "q3", "q4", "q5"]
    page = (tmp_path / "page.html").read_text()
    assert page.count("<img") == 7 and "http" not in page.replace("http://www.w3.org", "")
    run(Scripted(WORDS), data, tmp_path / "c", limit=3)
    with pytest.raises(FoveateError, match="asked other samples"):
        compare(tmp_path / "a", tmp_path / "c")
    with pytest.raises(FoveateError, match="holds no finished run"):
        compare(tmp_path / "a", tmp_path)


def test_a_page_shows_text_as_text(data: Path, tmp_path: Path) -> None:
    run(Scripted(["<script>alert(1)</script>", *WORDS[1:]]), data, tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_intervals() -> None:
    """They hold the true mean about as often as they say, and are wider for groups."""
    import numpy as np

    random = np.random.default_rng(0)
    inside = 0
    for _ in range(60):
        low, high = interval(list((random.random(120) < 0.3).astype(float)))
        inside += low <= 0.3 <= high
    assert inside >= 51
    scores = [float(n % 8 < 4) for n in range(80)]
    alone, together = interval(scores), interval(scores, [str(n // 4) for n in range(80)])
    assert together[1] - together[0] > 1.5 * (alone[1] - alone[0])
    assert interval(scores) == alone
