"""Shards give the same samples as JSON with the same pictures, and name their mistakes by file and row."""

from __future__ import annotations

import base64
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

import foveate
from foveate import FoveateError
from foveate.data.dataset import Samples
from foveate.data.formats import Conversations, read_conversations
from foveate.data.questions import open_annotatable, questions
from foveate.picture.reading import png
from foveate.tiny import tiny_model
from tests.command import foveate as run
from tests.support import picture

PNGS = [png(picture(20 + 9 * i, 50, seed=i)) for i in range(4)]


def record(i: int, *pictures: Any, **more: Any) -> dict[str, Any]:
    """Record i, about one picture or two."""
    shown = "<image>\n" * len(pictures)
    turns = [{"from": "human", "value": f"{shown}What is {i}?"}, {"from": "gpt", "value": f"It is {i}."}]
    return {"id": f"r{i}", "images": list(pictures), "conversations": turns, **more}


def urls(*pictures: bytes) -> list[str]:
    return [f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in pictures]


OF_RECORDS = ([0], [1], [2, 3], [3])  # the pictures of each


def write_json(folder: Path) -> Path:
    path = folder / "a.json"
    path.write_text(json.dumps([record(i, *urls(*(PNGS[p] for p in of))) for i, of in enumerate(OF_RECORDS)]))
    return path


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_tars(folder: Path) -> Path:
    """Two shards."""
    for shard in range(2):
        members = {}
        for i in (2 * shard, 2 * shard + 1):
            for n, p in enumerate(OF_RECORDS[i]):
                members[f"{i:03}.{n}.png"] = PNGS[p]
            named = {"images": [f"{n}.png" for n in range(len(OF_RECORDS[i]))]} if i % 2 else {}
            kept = record(i, *OF_RECORDS[i]) | {"images": None} | named
            members[f"{i:03}.json"] = json.dumps(kept).encode()
        write_tar(folder / f"s-{shard}.tar", members)
    return folder / "s-*.tar"


def table(start: int = 0, end: int = 4) -> datasets.Dataset:
    rows = [
        record(i, *({"bytes": PNGS[p], "path": f"{p}.png"} for p in of)) for i, of in enumerate(OF_RECORDS)
    ]
    made = datasets.Dataset.from_list(rows[start:end])
    return made.cast_column("images", datasets.Sequence(datasets.Image()))


def write_parquet(folder: Path) -> Path:
    """A folder of two files."""
    (folder / "parquet").mkdir()
    table(0, 3).to_parquet(str(folder / "parquet" / "0.parquet"))
    table(3, 4).to_parquet(str(folder / "parquet" / "1.parquet"))
    return folder / "parquet"


def write_saved(folder: Path) -> Path:
    table().save_to_disk(str(folder / "saved"))
    return folder / "saved"


WRITERS = (write_tars, write_parquet, write_saved)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def samples(source: Conversations, method: str = "llava") -> Samples:
    records = np.stack([np.zeros(len(source), dtype=np.int64), np.arange(len(source))], axis=1)
    return Samples([source], records, tiny_model(method, template="chatml").processor)


@pytest.mark.parametrize("write", WRITERS)
def test_shards_are_what_json_is(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    expected, found = read_conversations(write_json(tmp_path)), read_conversations(write(tmp_path))
    assert len(found) == 4
    assert [found.messages(i) for i in range(4)] == [expected.messages(i) for i in range(4)]
    assert [found.id(i) for i in range(4)] == ["r0", "r1", "r2", "r3"]
    assert found.pictures.tolist() == [1, 1, 2, 1]
    assert found.digest == read_conversations(found.path).digest
    items = pickle.loads(pickle.dumps(samples(found)))  # as workers get them
    for i in (3, 0, 2):  # in any order
        one, other = items[i], samples(expected)[i]
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert items.measure(i) == samples(expected).measure(i)


@pytest.mark.parametrize("write", WRITERS)
def test_they_train_a_model(
    tmp_path: Path, write: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = []
    for name, path in (("json", write_json(tmp_path)), ("shards", write(tmp_path))):
        stages = (
            "stages={only: {trains: [connector], lr: 1e-3, steps: 2, batch: 2, micro_batch: 2, workers: 0, "
            f"data: [{{path: '{path}'}}]}}}}"
        )
        done = run("train", "tiny", f"output={name}", "model={tiny: true, method: llava}", stages)
        assert done.code == 0, done.stderr
        weights.append(foveate.load(f"{name}/model", device="cpu").model.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize("write", WRITERS)
def test_they_are_annotated(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    source, expected = open_annotatable(write(tmp_path)), open_annotatable(write_json(tmp_path))
    assert questions(source) == questions(expected)
    model = tiny_model("llava")
    asked = [(source.picture(q.record), q.text) for q in questions(source)[0]]
    wanted = [(expected.picture(q.record), q.text) for q in questions(expected)[0]]
    assert [a.text for a in model.ask_all(asked, max_new_tokens=3)] == [
        a.text for a in model.ask_all(wanted, max_new_tokens=3)
    ]


def test_rows_of_a_stream_are_asked() -> None:
    """Pictures as `datasets` gives them, decoded or not."""
    model, stream = tiny_model("llava"), table().to_iterable_dataset()
    bare = stream.cast_column("images", datasets.Sequence(datasets.Image(decode=False)))
    answers = [
        [a.text for a in model.ask_all(((row["images"][0], row["id"]) for row in rows), max_new_tokens=3)]
        for rows in (stream, bare)
    ]
    assert answers[0] == answers[1]
    assert len(answers[0]) == 4


def refused(path: Path) -> str:
    with pytest.raises(FoveateError) as error:
        read_conversations(path)
    return str(error.value)


def test_a_row_is_named_by_its_file(tmp_path: Path) -> None:
    good, bad = table(0, 1).to_list(), table(1, 2).to_list()
    bad[0]["conversations"][0]["from"] = "dog"
    for name, rows in (("0.parquet", good), ("1.parquet", good + bad)):
        datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / name))
    assert refused(tmp_path / "*.parquet").startswith(
        f"{tmp_path / '1.parquet'} row 1 (id r1): 'from' of a turn is 'dog': choose one of"
    )


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ({"a.png": PNGS[0]}, "sample a: it has 0 members .json: one must hold its conversation"),
        ({"a.json": b"{"}, "sample a: its .json is not valid JSON"),
        ({"a.json": b"[]"}, "sample a: a record must be a JSON object"),
        (
            {"a.json": json.dumps(record(0, "x.png", "y.png")).encode(), "a.png": PNGS[0]},
            "sample a: its .json names 2 pictures, the shard has 1",
        ),
        (
            {"p/b.json": json.dumps({**record(0), "images": None}).encode(), "p/b.jpg": PNGS[0]},
            "sample p/b (id r0): 0 <image> in its texts for 1 pictures: make the numbers equal",
        ),
        ({}, "holds no samples"),
    ],
)
def test_a_sample_is_named_by_its_shard(tmp_path: Path, members: dict[str, bytes], problem: str) -> None:
    path = write_tar(tmp_path / "s.tar", members)
    assert refused(path) == f"{path} {problem}"


def test_what_is_no_shard_is_refused(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", {"a.json": b"x" * 3000}).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:1500])
    assert "cut.tar" in refused(tmp_path / "cut.tar")
    assert refused(tmp_path / "none.tar") == f"no data file at {tmp_path / 'none.tar'}"
    assert refused(tmp_path / "none-*.tar") == f"no data file at {tmp_path / 'none-*.tar'}"
    table(0, 1).to_parquet(str(tmp_path / "a.parquet"))
    assert refused(tmp_path) == f"{tmp_path}: shards must be of one kind, .tar or .parquet"
    compressed = tmp_path / "z.tar"
    with tarfile.open(compressed, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.json"))
    assert refused(compressed) == f"{compressed} is not a tar file that is whole and not compressed"
