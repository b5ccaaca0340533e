"""Questions of users: the forms that are read, and wrong ones in one sentence that names the record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from foveate import FoveateError
from foveate.evaluate.samples import ASK_OPTION, read_questions
from foveate.picture.geometry import Box
from tests.support import picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pictures")
    picture(30, 40).save(place / "a.png")
    return place


def written(folder: Path, *rows: Any, name: str = "data.jsonl") -> Path:
    path = folder / name
    text = json.dumps(list(rows)) if name.endswith(".json") else "".join(json.dumps(r) + "\n" for r in rows)
    path.write_text(text)
    return path


ROW = {"image": "a.png", "question": "What?", "answer": "red"}


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_what_a_record_may_hold(name: str, folder: Path) -> None:
    rows = [
        ROW,
        {**ROW, "id": 7, "answer": 3, "group": 1, "category": "ocr"},
        {**ROW, "id": "x", "answer": 2.0, "box": [1, 2, 30.5, 20]},
        {**ROW, "id": "y", "answers": ["red", {"answer": "Red"}, 0.5, True], "images": ["a.png"]},
        {**ROW, "id": "z", "options": ["cat", "dog"], "answer": "B"},
        {**ROW, "id": "l", "options": {"A": "cat", "C": 4}, "answer": "C"},
        {"id": "n", "image": "a.png", "question": "Why?"},
    ]
    one, two, three, four, five, six, seven = read_questions(written(folder, *rows, name=name)).samples
    assert (one.id, one.answers, one.question) == ("0", ("red",), "What?")
    assert (two.id, two.answers, two.group, two.category) == ("7", ("3",), "1", "ocr")
    assert three.answers == ("2",) and three.box == Box(1, 2, 30.5, 20)
    assert four.answers == ("red", "Red", "0.5", "yes")
    assert (
        five.options == {"A": "cat", "B": "dog"} and five.question == f"What?\nA. cat\nB. dog\n{ASK_OPTION}"
    )
    assert six.options == {"A": "cat", "C": "4"} and seven.answers == ()


def test_conversations(folder: Path) -> None:
    turns = [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "Red."},
        {"from": "human", "value": "Why?"},
        {"from": "gpt", "value": "So."},
    ]
    path = written(folder, {"id": "c", "image": "a.png", "conversations": turns}, name="data.json")
    samples = read_questions(path).samples
    assert [(s.id, s.question, s.answers) for s in samples] == [
        ("c/0", "What?", ("Red.",)),
        ("c/1", "Why?", ("So.",)),
    ]


def test_parquet_with_pictures_inside(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(
        [{"image": picture(20, 30), "question": "What?", "answers": ["a", "b"]}]
    )
    rows.cast_column("image", datasets.Image()).to_parquet(folder / "data.parquet")
    questions = read_questions(folder / "data.parquet")
    assert questions.samples[0].answers == ("a", "b")
    assert isinstance(questions.picture(questions.samples[0]), bytes)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({**ROW, "image": "../secret.png"}, "has a picture outside of the folder"),
        ({**ROW, "image": "/etc/hostname"}, "has a picture outside of the folder"),
        ({**ROW, "image": "b.png"}, "has no picture at .*b.png"),
        ({**ROW, "image": None}, "has no picture: its image should be a path"),
        ({**ROW, "image": ["a.png", "a.png"]}, "has 2 pictures: a question is about one"),
        ({**ROW, "image": "https://example.org/a.png"}, "is not fetched: download it"),
        ({**ROW, "question": " "}, "has an empty question"),
        ({**ROW, "answer": {"text": "red"}}, "should be a text or a number|has the answer None"),
        ({**ROW, "answer": [["red"]]}, r"has the answer \['red'\]"),
        ({**ROW, "box": [5, 5, 1, 9]}, "has the box .*left, top, right, bottom in pixels"),
        ({**ROW, "box": "whole"}, "has the box 'whole'"),
        ({**ROW, "options": "AB"}, "options that are neither a list nor letters"),
        ({**ROW, "options": {"1": "a"}}, "has an option '1'"),
        ({"image": "a.png"}, "has neither a question nor a conversation"),
        ([1], "is not an object"),
    ],
)
def test_wrong_records(row: Any, problem: str, folder: Path) -> None:
    path = written(folder, ROW, row)
    with pytest.raises(FoveateError, match=problem) as error:
        read_questions(path)
    assert f"{path} line 2" in str(error.value)


def test_an_id_that_comes_twice(folder: Path) -> None:
    path = written(folder, {**ROW, "id": "a"}, {**ROW, "id": "b"}, {**ROW, "id": "a"})
    with pytest.raises(FoveateError, match=r"line 3 \(id a\): id 'a' is also that of .*line 1"):
        read_questions(path)


def test_bytes_that_are_no_utf_8(folder: Path) -> None:
    path = folder / "data.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b"\n" + b'{"question": "\xff"}\n')
    with pytest.raises(FoveateError, match="line 2 is not UTF-8"):
        read_questions(path)


def test_a_link_that_leads_out(folder: Path, tmp_path: Path) -> None:
    picture(9, 9).save(tmp_path / "far.png")
    (folder / "near.png").symlink_to(tmp_path / "far.png")
    with pytest.raises(FoveateError, match="outside of the folder"):
        read_questions(written(folder, {**ROW, "image": "near.png"}))
    with pytest.raises(FoveateError, match="there is no folder"):
        read_questions(written(folder, ROW), images=folder / "none")
