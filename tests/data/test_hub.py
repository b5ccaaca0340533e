"""Data sets on the hub: the first rows of a stream, or all of it, are what JSON with the same records is."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch

import foveate
from foveate import FoveateError
from foveate.data.formats import read_conversations
from foveate.data.shards import OnHub
from tests.command import foveate as run
from tests.data.test_shards import PNGS, record, urls
from tests.hub import Hub, serving

SHARDS = [f"train-0000{i}-of-00004.parquet" for i in range(4)]


def parquet(numbers: range) -> bytes:
    rows = [record(i, {"bytes": PNGS[i], "path": None}) for i in numbers]
    table = datasets.Dataset.from_list(rows)
    table = table.cast_column("images", datasets.Sequence(datasets.Image()))
    file = io.BytesIO()
    table.to_parquet(file)
    return file.getvalue()


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as hub:
        hub.files["me/some"] = {"main": {name: parquet(range(i, i + 1)) for i, name in enumerate(SHARDS)}}
        yield hub


def as_json(path: Path, count: int) -> Path:
    path.write_text(json.dumps([record(i, *urls(PNGS[i])) for i in range(count)]))
    return path


def test_only_the_first_rows_of_a_stream_are_downloaded(hub: Hub, tmp_path: Path) -> None:
    stages = (
        "stages={only: {trains: [connector], lr: 1e-3, data: [{path: me/some, split: train, limit: 2}], "
        "eval_data: {path: me/some, split: train, limit: 1}}}"
    )
    done = subprocess.run(
        [*(sys.executable, "-m", "foveate", "train", "tiny", "--dry-run"), "output=run", stages],
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "2 samples of up to" in done.stdout and "2 with pictures" in done.stdout
    assert hub.sent[SHARDS[1]] and not hub.sent[SHARDS[3]]  # it looks one shard ahead


def test_all_of_it_trains_as_json_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some").mkdir()
    (tmp_path / "some/train-00000-of-00001.parquet").write_bytes(parquet(range(2)))
    stages = (
        "stages={{only: {{trains: [connector], lr: 1e-3, steps: 1, batch: 2, micro_batch: 2, workers: 0, "
        "data: [{}]}}}}"
    )
    weights = []
    for name, data in (
        ("hub", "{path: some, split: train}"),
        ("json", f"{{path: {as_json(tmp_path / 'a.json', 2)}}}"),
    ):
        done = run(
            "train", "tiny", f"output={name}", "model={tiny: true, method: llava}", stages.format(data)
        )
        assert done.code == 0, done.stderr
        model = foveate.load(f"{name}/model", device="cpu").model
        weights.append(model.state_dict())
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())
    trained = json.loads(Path("hub/model/config.json").read_text())["trained"]
    assert trained[0]["data"].keys() == {"some train"}


def test_a_folder_of_several_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "some"
    folder.mkdir()
    (folder / "train-00000-of-00001.parquet").write_bytes(parquet(range(3)))
    (folder / "test-00000-of-00001.parquet").write_bytes(parquet(range(1, 2)))
    data = OnHub(str(folder), "train")
    found, expected = read_conversations(data), read_conversations(as_json(tmp_path / "a.json", 3))
    assert [found.messages(i) for i in range(3)] == [expected.messages(i) for i in range(3)]
    assert found.where(1) == f"{folder} row 1 (id r1)"
    assert len(read_conversations(replace(data, first=2))) == 2
    assert len(read_conversations(replace(data, first=9))) == 3
    for asked, problem in (
        (replace(data, split="dev"), 'Unknown split "dev"'),
        (replace(data, subset="none"), "'none' not found"),
        (OnHub(str(tmp_path / "nowhere"), "train"), "cannot be read as a dataset"),
    ):
        with pytest.raises(FoveateError, match=problem):
            read_conversations(asked)
    arguments = ("--split", "test", "--out", tmp_path / "report", "--metric", "exact", "--max-new-tokens", 2)
    done = run("eval", folder, *arguments)
    assert done.code == 0, done.stderr
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert report["samples"] == 1 and report["data"]["hub"]["split"] == "test"
    done = run("eval", "--compare", tmp_path / "report", tmp_path / "report", "--out", tmp_path / "page.html")
    assert done.code == 0 and (tmp_path / "page.html").read_text().count("data:image") == 1


def test_a_split_is_named(tmp_path: Path) -> None:
    stages = "stages={only: {trains: [connector], lr: 1e-3, data: [{path: me/some, subset: x}]}}"
    done = run("train", "tiny", f"output={tmp_path}", stages)
    assert done.code == 2 and "subset and revision belong to split" in done.stderr
    done = run("eval", "me/some", "--subset", "x", "--out", tmp_path / "report")
    assert done.code == 2 and "--subset is for a data set on the hub: give its --split" in done.stderr
