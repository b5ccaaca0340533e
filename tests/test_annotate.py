"""Region labels: what is written, that nothing is lost or doubled whatever happens, and the report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from foveate.annotate import (
    Annotator,
    Paths,
    Settings,
    annotate_data,
    elsewhere,
    masked,
    quality,
    run,
    square,
)
from foveate.data.questions import Question, open_annotatable, questions
from foveate.data.regions import Regions
from foveate.data.toy import write_toy_data
from foveate.errors import FoveateError
from foveate.files import LOCK
from foveate.layers import weights_of
from foveate.picture.geometry import Box, Size
from foveate.picture.reading import read_picture
from foveate.tiny import tiny_model
from foveate.zoom.relevance import RegionRule
from foveate.zoom.vlm import VLM
from tests import forked
from tests.command import foveate
from tests.support import picture
from tests.vlms import VLMS

N = 26  # records; every sixth has no picture
QUESTIONS = N - N // 6
BATCH = 3
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module", autouse=True)
def _short_answers() -> Iterator[None]:
    """A random model never ends an answer that is to be compared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("foveate.annotate.ANSWER_TOKENS", 4)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model("llava").save(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_data(tmp_path_factory.mktemp("data"), n=N)


@pytest.fixture(scope="module")
def vlm() -> VLM:
    made = tiny_model("llava")
    return VLM(made.model, made.processor)


def command(data: Path, out: Path, model: Path, *more: object) -> list[str]:
    words = ["annotate", data, "--model", model, "--out", out, "--batch", BATCH, "--check", 4, *more]
    return [str(word) for word in words] + ["--device", "cpu", "--dtype", "float32"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, data: Path, model: Path) -> Path:
    """The file of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("unbroken") / "regions.jsonl"
    result = foveate(*command(data, out, model))
    assert result.code == 0, result.stderr
    return out


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_both_formats(unbroken: Path, data: Path) -> None:
    """A line for each question, boxes inside the picture; the authors' file has a square around each."""
    records = lines(unbroken)
    authors = json.loads(unbroken.with_suffix(".json").read_text())
    source = json.loads(data.read_text())
    shown = [i for i, record in enumerate(source) if "image" in record]
    assert [r["index"] for r in records] == shown
    assert list(authors) == [f"{i:06d}_{source[i]['id']}_q0" for i in shown]
    for record in records:
        with Image.open(data.parent / source[record["index"]]["image"]) as image:
            assert (record["width"], record["height"]) == image.size
        left, top, right, bottom = record["box"]
        assert 0 <= left < right <= record["width"]
        assert 0 <= top < bottom <= record["height"]
        y, x, size = authors[record["key"]]["params"]
        assert x <= left and right <= x + size and y <= top and bottom <= y + size
        assert size == max(right - left, bottom - top)
    assert not unbroken.with_name("regions.jsonl.parts").exists()


def test_training_reads_both_formats(unbroken: Path) -> None:
    for path in (unbroken, unbroken.with_suffix(".json")):
        regions = Regions(path)
        assert (len(regions), regions.malformed) == (QUESTIONS, 0)
    first = lines(unbroken)[0]
    assert Regions(unbroken).of(first["index"], first["id"]) == {0: Box(*first["box"])}


def test_about_pictures(tmp_path: Path, data: Path, model: Path, unbroken: Path) -> None:
    """One region for each picture, however many questions there are; no file of the authors' kind."""
    two = json.loads(data.read_text())[:2]
    again = [{"from": "human", "value": "And its size?"}, {"from": "gpt", "value": "small"}]
    two[0]["conversations"] += again
    path = data.with_name("two.json")  # beside its pictures
    path.write_text(json.dumps(two))
    out = tmp_path / "pictures.jsonl"
    result = foveate(*command(path, out, model, "--about", "pictures"))
    assert result.code == 0, result.stderr
    records = lines(out)
    assert [(r["index"], r["number"]) for r in records] == [(0, None), (1, None)]
    assert not out.with_suffix(".json").exists()
    assert Regions(out).of(0, two[0]["id"]) == {None: Box(*records[0]["box"])}
    refused = foveate(*command(path, out, model))
    assert refused.code == 2 and "about pictures, not questions" in refused.stderr


def test_report(unbroken: Path) -> None:
    report = json.loads(unbroken.with_suffix(".report.json").read_text())
    assert report["questions"] == report["regions"] == QUESTIONS
    assert report["records_without_one_picture"] == N // 6
    assert 4 <= report["checked"] <= 5
    records = lines(unbroken)
    checked = [r for r in records if "answer" in r]
    assert len(checked) == report["checked"]
    assert report["compared"] <= report["checked"]
    assert report["settings"]["batch"] == BATCH


def test_kill_in_the_middle(tmp_path: Path, data: Path, model: Path, unbroken: Path) -> None:
    """kill -9 of the real command, then the same command again: the files of an unbroken run, to the byte."""
    out = tmp_path / "regions.jsonl"
    parts = tmp_path / "regions.jsonl.parts"
    arguments = command(data, out, model)
    process = forked.foveate(*arguments)
    part = parts / "00000.jsonl"
    deadline = time.monotonic() + 240
    while not (part.is_file() and part.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None, "the command ended before it could be killed"
        assert time.monotonic() < deadline, "the command wrote nothing"
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = part.read_bytes().count(b"\n")
    assert 2 <= done < -(-QUESTIONS // BATCH)
    assert not out.exists()
    with part.open("ab") as file:  # as if the kill had come in the middle of a write
        file.write(b'{"batch": 3, "records": [{"key": "0000')
    result = foveate(*arguments)
    assert result.code == 0, result.stderr
    for suffix in (".jsonl", ".json"):
        assert out.with_suffix(suffix).read_bytes() == unbroken.with_suffix(suffix).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "regions.json",
        "regions.jsonl",
        "regions.report.json",
    ]
    again = foveate(*arguments)  # complete: nothing to do
    assert again.code == 0 and json.loads(again.stdout)["questions"] == QUESTIONS


def settings(source: Any, **changes: Any) -> Settings:
    values = {
        "model": "tiny",
        "dtype": "float32",
        "rule": RegionRule(),
        "batch": BATCH,
        "check": 4,
        **changes,
    }
    return Settings(data="toy", fingerprint=source.fingerprint, images=None, weights="", **values)


def test_files_of_others_are_left_alone(tmp_path: Path, data: Path, model: Path) -> None:
    """The authors' format of DATA.jsonl would be DATA.json: the data itself."""
    for beside in ("mine.json", "mine.report.json"):
        (tmp_path / beside).write_text("precious")
        result = foveate(*command(data, tmp_path / "mine.jsonl", model))
        assert result.code == 2 and f"{beside} exists already" in result.stderr
        assert [path.name for path in tmp_path.iterdir()] == [beside]
        assert (tmp_path / beside).read_text() == "precious"
        (tmp_path / beside).unlink()
    before = data.read_bytes()
    result = foveate(*command(data, data.with_suffix(".jsonl"), model))
    assert result.code == 2 and f"{data} exists already" in result.stderr
    assert data.read_bytes() == before


def test_pictures_and_weights_of_others_are_refused(tmp_path: Path, data: Path, unbroken: Path) -> None:
    """Also where folder and model have the same name as before."""
    out = tmp_path / "regions.jsonl"
    for suffix in (".jsonl", ".json", ".report.json"):
        out.with_suffix(suffix).write_bytes(unbroken.with_suffix(suffix).read_bytes())
    other = tiny_model("llava")
    with torch.no_grad():
        other.model.language_model.model.norm.weight += 0.5
    other.save(tmp_path / "tiny")
    before = json.loads(out.with_suffix(".report.json").read_text())["settings"]["model"]
    report = out.with_suffix(".report.json")
    report.write_text(report.read_text().replace(before, str(tmp_path / "tiny")))
    result = foveate(*command(data, out, tmp_path / "tiny"))
    assert result.code == 2 and "from a run with weights" in result.stderr
    report.write_bytes(unbroken.with_suffix(".report.json").read_bytes())
    result = foveate(*command(data, out, Path(before), "--images", data.parent))
    assert result.code == 2 and "from a run with images None" in result.stderr


def test_one_run_a_file(tmp_path: Path, data: Path, vlm: VLM) -> None:
    source = open_annotatable(data)
    (tmp_path / "regions.jsonl.parts").mkdir()
    with (
        FileLock(tmp_path / "regions.jsonl.parts" / LOCK),
        pytest.raises(FoveateError, match="another run is writing"),
    ):
        run(settings(source), Annotator(vlm, source, RegionRule()), tmp_path / "regions.jsonl")
    assert run(settings(source), Annotator(vlm, source, RegionRule()), tmp_path / "regions.jsonl")


class Stopped(Exception):
    pass


class StopsAfter(Annotator):
    """Stops after this number of batches, and counts them."""

    def __init__(self, vlm: VLM, source: Any, batches: int) -> None:
        super().__init__(vlm, source, RegionRule())
        self.left, self.did = batches, list[str]()

    def annotate(self, batch: Sequence[Question], *rest: Any) -> list[dict[str, Any]]:
        if not self.left:
            raise Stopped
        self.left -= 1
        self.did += [question.key for question in batch]
        return super().annotate(batch, *rest)


def test_what_is_done_is_not_done_again(tmp_path: Path, data: Path, vlm: VLM, unbroken: Path) -> None:
    source, out, did = open_annotatable(data), tmp_path / "regions.jsonl", list[str]()
    for batches in (1, 2, 0, 3):
        annotator = StopsAfter(vlm, source, batches)
        with pytest.raises(Stopped):
            run(settings(source), annotator, out)
        did += annotator.did
    rest = StopsAfter(vlm, source, 100)
    run(settings(source), rest, out)
    did += rest.did
    assert len(did) == len(set(did)) == QUESTIONS
    assert out.read_bytes() == unbroken.read_bytes()


class Worker:
    """One of several processes, whose turns come one after the other."""

    def __init__(self, index: int, count: int) -> None:
        self.process_index, self.num_processes = index, count

    def wait_for_everyone(self) -> None:
        """They never run at once."""


def test_parts_of_several_processes_make_one_file(
    tmp_path: Path, data: Path, vlm: VLM, unbroken: Path
) -> None:
    """Three processes start, one is killed; two resume, and one alone finishes: the same file."""
    source, out = open_annotatable(data), tmp_path / "regions.jsonl"
    did = []
    for index, batches in ((1, 9), (2, 1)):
        worker = StopsAfter(vlm, source, batches)
        (tmp_path / "regions.jsonl.parts").mkdir(exist_ok=True)
        with suppress(Stopped, FileNotFoundError):  # the report is not there yet
            run(settings(source), worker, out, Worker(index, 3))
        did += worker.did
    parts = sorted(p.name for p in (tmp_path / "regions.jsonl.parts").iterdir())
    assert parts == ["00001.jsonl", "00002.jsonl"]
    worker = StopsAfter(vlm, source, 100)
    run(settings(source), worker, out, Worker(0, 1))
    did += worker.did
    assert len(did) == len(set(did)) == QUESTIONS
    assert out.read_bytes() == unbroken.read_bytes()


@pytest.mark.slow
def test_two_real_processes(tmp_path: Path, data: Path, model: Path) -> None:
    """torchrun with two processes writes the file that one writes."""
    written = []
    for name, launched in (("one", ()), ("two", TORCHRUN)):
        out = tmp_path / f"{name}.jsonl"
        done = subprocess.run(
            [sys.executable, *launched, "-m", "foveate", *command(data, out, model)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr
        written.append(out.read_bytes())
    assert written[0] == written[1]


def test_a_run_with_other_settings_is_refused(tmp_path: Path, data: Path, vlm: VLM) -> None:
    source, out = open_annotatable(data), tmp_path / "regions.jsonl"
    with pytest.raises(Stopped):
        run(settings(source), StopsAfter(vlm, source, 1), out)
    with pytest.raises(FoveateError, match="is from a run with batch 3, not 5"):
        run(settings(source, batch=5), StopsAfter(vlm, source, 9), out)
    run(settings(source), StopsAfter(vlm, source, 99), out)
    with pytest.raises(FoveateError, match=r"is from a run with rule .*0.5.*, not .*0.7"):
        run(settings(source, rule=RegionRule(threshold=0.7)), StopsAfter(vlm, source, 99), out)


def test_broken_parts_are_told_from_torn_ones(tmp_path: Path, data: Path, vlm: VLM) -> None:
    source, out = open_annotatable(data), tmp_path / "regions.jsonl"
    with pytest.raises(Stopped):
        run(settings(source), StopsAfter(vlm, source, 3), out)
    part = tmp_path / "regions.jsonl.parts" / "00000.jsonl"
    kept = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(kept[0] + b"{broken\n" + kept[2])
    with pytest.raises(FoveateError, match=r"00000.jsonl line 2 is broken"):
        run(settings(source), StopsAfter(vlm, source, 99), out)


def test_a_file_of_something_else_is_left_alone(tmp_path: Path, data: Path, vlm: VLM) -> None:
    source, out = open_annotatable(data), tmp_path / "regions.jsonl"
    out.write_text("mine")
    with pytest.raises(FoveateError, match="has no report beside it"):
        run(settings(source), StopsAfter(vlm, source, 99), out)
    assert out.read_text() == "mine"
    with pytest.raises(FoveateError, match=r"must end in .jsonl"):
        Paths.of(tmp_path / "regions.json")
    with pytest.raises(FoveateError, match="is not a folder"):
        Paths.of(tmp_path / "nowhere" / "regions.jsonl")


def test_pictures_that_cannot_be_read_are_named(tmp_path: Path, vlm: VLM) -> None:
    """A missing and a broken picture cost their questions, not the run; they get no region."""
    picture(40, 60).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    more = [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "This."}]
    records = [
        {"id": "a/1", "image": "good.png", "conversations": turns + more},
        {"id": "b", "image": "bad.png", "conversations": turns},
        {"id": "c", "image": "gone.png", "conversations": turns},
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    source, out = open_annotatable(tmp_path / "data.json"), tmp_path / "regions.jsonl"
    report = run(settings(source), Annotator(vlm, source, RegionRule()), out)
    assert list(json.loads(out.with_suffix(".json").read_text())) == ["000000_a_1_q0", "000000_a_1_q1"]
    assert [r["question"] for r in lines(out)][:2] == ["What?", "And?"]
    assert (report["regions"], report["problems"]) == (2, 2)
    assert "000002_c_q0: no picture at" in report["first_problems"][1]
    assert Regions(out).malformed == 2


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"pictures": "a.png", "turns": []}, "it has neither 'conversations' (LLaVA) nor 'messages'"),
        (
            {"image": "a.png", "conversations": [{"role": "human", "value": "<image>"}]},
            "'from' of a turn is None",
        ),
        ({"image": 3, "conversations": [{"from": "human", "value": "<image>"}]}, "must be given as a path"),
    ],
)
def test_wrong_keys_are_one_clear_sentence(tmp_path: Path, model: Path, record: Any, sentence: str) -> None:
    (tmp_path / "data.json").write_text(json.dumps([record]))
    result = foveate(*command(tmp_path / "data.json", tmp_path / "regions.jsonl", model))
    assert result.code == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "data.json sample 0" in result.stderr and sentence in result.stderr
    assert not (tmp_path / "regions.jsonl.parts").exists()


def test_wrong_options_are_refused(tmp_path: Path, data: Path, model: Path) -> None:
    for more, sentence in (
        (("--threshold", 2), "threshold"),
        (("--reading", "chafer"), "chafer"),
        (("--images", tmp_path / "none"), "there is no folder"),
        (("--detector", "yolo"), "unknown detector 'yolo'"),
    ):
        result = foveate(*command(data, tmp_path / "regions.jsonl", model, *more))
        assert result.code == 2 and sentence in result.stderr, result.stderr


# Hugging Face datasets.


def rows(n: int = 3) -> dict[str, list[Any]]:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    return {
        "id": [f"x/{i}" for i in range(n)],
        "image": [picture(40, 60, i) for i in range(n)],
        "conversations": [turns] * n,
    }


@pytest.mark.parametrize("columns", ["conversations", "messages", "question"])
def test_datasets(tmp_path: Path, vlm: VLM, columns: str) -> None:
    """Pictures inside a dataset of `datasets`, with conversations, messages or questions: the same boxes."""
    datasets = pytest.importorskip("datasets")
    table = rows()
    if columns == "messages":
        said = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "That."}]
        table["messages"] = [said] * 3
    if columns == "question":
        table["question"] = ["What?"] * 3
    for other in {"conversations", "messages", "question"} - {columns}:
        table.pop(other, None)
    datasets.DatasetDict({"val": datasets.Dataset.from_dict(table)}).save_to_disk(tmp_path / "set")
    source = open_annotatable(tmp_path / "set", split="val")
    run(settings(source), Annotator(vlm, source, RegionRule()), tmp_path / "regions.jsonl")

    for i in range(3):
        picture(40, 60, i).save(tmp_path / f"{i}.png")
    turns = rows()["conversations"][0]
    records = [{"id": f"x/{i}", "image": f"{i}.png", "conversations": turns} for i in range(3)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    same = open_annotatable(tmp_path / "data.json")
    run(settings(same), Annotator(vlm, same, RegionRule()), tmp_path / "same.jsonl")
    assert (tmp_path / "regions.jsonl").read_bytes() == (tmp_path / "same.jsonl").read_bytes()


def test_datasets_without_the_columns(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"photo": ["a"], "text": ["b"]}).save_to_disk(tmp_path / "set")
    with pytest.raises(FoveateError, match="has the columns photo, text: it needs image or images"):
        open_annotatable(tmp_path / "set")
    datasets.DatasetDict({"val": datasets.Dataset.from_dict(rows(1))}).save_to_disk(tmp_path / "other")
    with pytest.raises(FoveateError, match="has no split 'train': choose one of val"):
        open_annotatable(tmp_path / "other")
    with pytest.raises(FoveateError, match=r"cannot be read as a dataset"):
        open_annotatable(tmp_path)


@pytest.mark.parametrize("extra", [{}, {"index": None, "text": None}])
def test_messages_of_parts(tmp_path: Path, extra: dict[str, Any]) -> None:
    """Pictures as parts, as many training sets have them; without ids, records are named as in a file."""
    datasets = pytest.importorskip("datasets")
    asked = [{**extra, "type": "image"}, {**extra, "type": "text", "text": "What?"}]
    said = [{**extra, "type": "text", "text": "That."}]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    table = {"images": [[picture(40, 60, i)] for i in range(2)], "messages": [turns] * 2}
    datasets.Dataset.from_dict(table).save_to_disk(tmp_path / "set")
    asked_of, left_out = questions(open_annotatable(tmp_path / "set"))
    assert [(q.key, q.text) for q in asked_of] == [("000000_0_q0", "What?"), ("000001_1_q0", "What?")]
    assert left_out == 0


def test_rows_with_several_pictures_are_left_out(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    images = [[picture(8, 9, seed=i) for i in range(n)] for n in (2, 1, 0)]
    features = datasets.Features({"images": [datasets.Image()], "question": datasets.Value("string")})
    table = {"images": images, "question": ["What?"] * 3}
    datasets.Dataset.from_dict(table, features=features).save_to_disk(tmp_path / "set")
    source = open_annotatable(tmp_path / "set")
    asked_of, left_out = questions(source)
    assert [q.record for q in asked_of] == [1] and left_out == 2
    assert read_picture(source.picture(1)).size == (9, 8)


def test_rows_whose_texts_show_other_pictures_are_named(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    features = datasets.Features(
        {
            "images": [datasets.Image()],
            "conversations": [{"from": datasets.Value("string"), "value": datasets.Value("string")}],
        }
    )
    table = {"images": [[picture(8, 9), picture(9, 8)]], "conversations": [turns]}
    datasets.Dataset.from_dict(table, features=features).save_to_disk(tmp_path / "set")
    with pytest.raises(FoveateError, match="record 0: 1 <image> in its texts for 2 pictures"):
        questions(open_annotatable(tmp_path / "set"))


def test_a_dataset_without_rows_is_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "question": datasets.Value("string")})
    empty = datasets.Dataset.from_dict({"image": [], "question": []}, features=features)
    empty.save_to_disk(tmp_path / "set")
    with pytest.raises(FoveateError, match=r"cannot be read as a dataset|no record of the data"):
        questions(open_annotatable(tmp_path / "set"))


@pytest.mark.parametrize("check", [0, 1, 5, 6, 500])
def test_as_many_are_checked_as_were_asked_for(tmp_path: Path, data: Path, vlm: VLM, check: int) -> None:
    source = open_annotatable(data)
    report = run(
        settings(source, check=check), Annotator(vlm, source, RegionRule()), tmp_path / f"{check}.jsonl"
    )
    assert report["checked"] == min(check, report["regions"])


def test_every_weight_counts_in_the_fingerprint() -> None:
    model = tiny_model("llava").model
    before = weights_of(model)
    assert weights_of(tiny_model("llava").model) == before
    for weight in (model.get_input_embeddings().weight, model.connector.projector[0].weight):
        with torch.no_grad():
            weight.view(-1)[-1] += 1
        assert weights_of(model) != before
        with torch.no_grad():
            weight.view(-1)[-1] -= 1
    assert weights_of(model.half()) != before


def test_what_cannot_be_annotated_costs_its_question_alone(tmp_path: Path) -> None:
    """Broken bytes and no picture in a dataset, a picture that the processor refuses, half a character."""
    datasets = pytest.importorskip("datasets")
    good = picture(40, 60)
    good.save(tmp_path / "good.png")
    shown = [[{"bytes": b"no picture", "path": None}], [], [str(tmp_path / "good.png")]]
    features = datasets.Features({"images": [datasets.Image()], "question": datasets.Value("string")})
    table = {"images": shown, "question": ["What?"] * 3}
    datasets.Dataset.from_dict(table, features=features).save_to_disk(tmp_path / "set")
    qwen, source = VLMS["qwen3_vl"](), open_annotatable(tmp_path / "set")
    report = run(settings(source), Annotator(qwen, source, RegionRule()), tmp_path / "a.jsonl")
    assert (report["regions"], report["problems"], report["records_without_one_picture"]) == (1, 1, 1)
    assert "cannot be read" in report["first_problems"][0]

    picture(2, 500).save(tmp_path / "thin.png")
    turns = [{"from": "human", "value": "<image>\nWhat?\ud83d"}, {"from": "gpt", "value": "That."}]
    records = [{"image": name, "conversations": turns} for name in ("good.png", "thin.png", "good.png")]
    (tmp_path / "data.json").write_text(json.dumps(records))
    source = open_annotatable(tmp_path / "data.json")
    report = run(settings(source), Annotator(qwen, source, RegionRule()), tmp_path / "b.jsonl")
    assert (report["regions"], report["problems"]) == (2, 1)
    assert "does not accept the picture" in report["first_problems"][0]


def test_a_model_that_cannot_be_annotated_with_stops_at_once(tmp_path: Path, data: Path) -> None:
    made = tiny_model("slime", {"max_visual_tokens": 20})
    source = open_annotatable(data)
    annotator = Annotator(VLM(made.model, made.processor), source, RegionRule())
    with pytest.raises(FoveateError, match="max_visual_tokens 20 the question decides which there are"):
        run(settings(source), annotator, tmp_path / "a.jsonl")
    assert not list(tmp_path.glob("a.*"))  # the file is free for another model


def test_malformed_lines_of_a_file_of_regions(tmp_path: Path) -> None:
    good = {"index": 0, "id": "a\ud83d", "number": 0, "box": [1, 2, 30, 40]}
    bad = [
        {**good, "index": 10**30},
        {**good, "number": -1},
        {**good, "number": 1, "box": [0, 0, 10**400, 9]},
        {**good, "box": [5, 5, 6, 6]},
    ]
    path = tmp_path / "regions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [good, *bad]))
    regions = Regions(path)
    assert (len(regions), regions.malformed) == (1, 4)
    assert regions.of(0, "a\ud83d") == {0: Box(1, 2, 30, 40)}
    assert "record 0: a second region of question 0" in regions.report()
    squares = {f"{'9' * 30}_a_q0": {"params": [0, 0, 9]}, "000000_a_q0": {"params": [0, 0, 9]}}
    (tmp_path / "regions.json").write_text(json.dumps(squares))
    assert Regions(tmp_path / "regions.json").malformed == 1


# Parts.


def test_a_detector_of_ones_own(tmp_path: Path, data: Path, vlm: VLM) -> None:
    """With a detector, regions are unions of what it found."""
    source = open_annotatable(data)

    def halves(shown: Image.Image) -> list[Box]:
        return [Box(0, 0, shown.width / 2, shown.height), Box(shown.width / 2, 0, shown.width, shown.height)]

    annotator = Annotator(vlm, source, RegionRule(extension=0), halves)
    run(settings(source, detector="halves"), annotator, tmp_path / "regions.jsonl")
    for record in lines(tmp_path / "regions.jsonl"):
        left, top, right, bottom = record["box"]
        middle = record["width"] / 2
        assert (top, bottom) == (0, record["height"])
        assert (left, right) in ((0, int(np.ceil(middle))), (int(middle), record["width"]))


def test_squares() -> None:
    assert square(Box(10, 20, 30, 30), Size(100, 100)) == (15, 10, 20)
    assert square(Box(0, 90, 30, 100), Size(100, 100)) == (70, 0, 30)  # moved inside
    assert square(Box(5, 0, 95, 40), Size(40, 100)) == (0, 5, 90)  # sticks out below
    assert square(Box(95, 0, 100, 100), Size(100, 100)) == (0, 0, 100)


def test_masking() -> None:
    shown = picture(40, 60)
    hidden = np.asarray(masked(shown, Box(10, 5, 30, 25)))
    kept = np.ones((40, 60), dtype=bool)
    kept[5:25, 10:30] = False
    assert np.array_equal(hidden[kept], np.asarray(shown)[kept])
    assert len(np.unique(hidden[~kept].reshape(-1, 3), axis=0)) == 1
    assert elsewhere(Box(0, 0, 10, 10), Size(40, 60)) == Box(50, 30, 60, 40)
    assert elsewhere(Box(40, 25, 60, 40), Size(40, 60)) == Box(0, 0, 20, 15)


def test_quality_by_hand() -> None:
    made = [
        {"key": "a", "box": [0, 0, 10, 10], "width": 10, "height": 10},
        {
            "key": "b",
            "box": [0, 0, 5, 10],
            "width": 10,
            "height": 10,
            "answer": "x",
            "answer_masked": "y",
            "answer_masked_elsewhere": "x",
        },
        {"key": "c", "box": None, "problem": "gone"},
        {
            "key": "d",  # so large that any place of its size has a part of it
            "box": [0, 0, 9, 9],
            "width": 10,
            "height": 10,
            "answer": "x",
            "answer_masked": "x",
            "answer_masked_elsewhere": "y",
        },
    ]
    report = quality(made)
    assert (report["questions"], report["regions"], report["problems"]) == (4, 3, 1)
    assert report["first_problems"] == ["c: gone"]
    assert report["box_share"] == pytest.approx({"p10": 0.5, "p50": 0.81, "p90": 1.0, "mean": 0.77})
    assert report["whole_picture"] == pytest.approx(1 / 3)
    assert (report["checked"], report["compared"]) == (2, 1)
    assert (report["changed_masked"], report["changed_masked_elsewhere"]) == (1.0, 0.0)
    assert quality([made[2]])["box_share"] is None


def test_keys_are_the_authors() -> None:
    assert Question(7, "coco/train/9", 2, "?").key == "000007_coco_train_9_q2"


def test_data_without_questions(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(
        json.dumps([{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}])
    )
    with pytest.raises(FoveateError, match="no record of the data has a question about exactly one picture"):
        questions(open_annotatable(tmp_path / "data.json"))


def test_from_python(tmp_path: Path, data: Path, model: Path, unbroken: Path) -> None:
    out = tmp_path / "regions.jsonl"
    report = annotate_data(data, out, model=model, batch=BATCH, check=4, device="cpu", dtype="float32")
    assert report is not None and report["questions"] == QUESTIONS
    assert out.read_bytes() == unbroken.read_bytes()
