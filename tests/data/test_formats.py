"""Files of conversations: both kinds in both containers, and every mistake named with its place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foveate import FoveateError
from foveate.data.formats import read_conversations

Write = Callable[[str, list[Any]], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def records(name: str, values: list[Any]) -> Path:
        path = tmp_path / name
        lines = name.endswith(".jsonl")
        text = "\n".join(json.dumps(v, ensure_ascii=False) for v in values) if lines else ""
        path.write_text(text or json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")
        return path

    return records


def llava(*turns: str, image: Any = None, **more: Any) -> dict[str, Any]:
    """A LLaVA record whose turns alternate, beginning with the human."""
    sides = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    return {**more, **({"image": image} if image else {}), "conversations": sides}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_records_of_both_kinds(write: Write, name: str, tmp_path: Path) -> None:
    records = [
        llava("Was ist das? ü\n<image>", "Ein Hund. 犬", image="p/1.png", id=7),
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "image", "image": "2.png"}, text("What?")]},
                {"role": "assistant", "content": [text("A cat.")]},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "First <image>\nthen <image>."},
                {"role": "assistant", "content": "Yes."},
            ],
            "images": ["3.png", "/else/4.png"],
        },
        llava("Hello", "Hi", "Bye", "See you"),
    ]
    read = read_conversations(write(name, records))

    def image(path: str) -> dict[str, str]:
        return {"type": "image", "image": str(tmp_path / path)}

    assert read.pictures.tolist() == [1, 1, 2, 0]
    assert [read.messages(i) for i in range(len(read))] == [
        [
            {"role": "user", "content": [image("p/1.png"), text("Was ist das? ü")]},
            {"role": "assistant", "content": [text("Ein Hund. 犬")]},
        ],
        [
            {"role": "system", "content": [text("Be brief.")]},
            {"role": "user", "content": [image("2.png"), text("What?")]},
            {"role": "assistant", "content": [text("A cat.")]},
        ],
        [
            {
                "role": "user",
                "content": [text("First "), image("3.png"), text("then "), image("/else/4.png"), text(".")],
            },
            {"role": "assistant", "content": [text("Yes.")]},
        ],
        [
            {"role": "user", "content": [text("Hello")]},
            {"role": "assistant", "content": [text("Hi")]},
            {"role": "user", "content": [text("Bye")]},
            {"role": "assistant", "content": [text("See you")]},
        ],
    ]
    place = "sample 0" if name == "a.json" else "line 1"
    assert read.where(0) == f"{tmp_path / name} {place} (id 7)"


def test_pictures_start_at_their_folder(write: Write, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    path = write("a.json", [llava("<image>\nWhat?", "That.", image="1.png")])
    read = read_conversations(path, tmp_path / "pictures")
    assert read.messages(0)[0]["content"][0]["image"] == str(tmp_path / "pictures" / "1.png")


def test_without_prompts_only_the_picture_stays(write: Write) -> None:
    records = [llava("Describe it.\n<image>", "A dog.", image="1.png"), llava("Hello", "Hi")]
    read = read_conversations(write("a.json", records), prompts=False)
    assert [part["type"] for part in read.messages(0)[0]["content"]] == ["image"]
    assert read.messages(1)[0]["content"] == [text("Hello")]


def test_a_first_turn_by_the_assistant_is_dropped(write: Write) -> None:
    record = {"conversations": [{"from": "gpt", "value": "So?"}, *llava("Hello", "Hi")["conversations"]]}
    roles = [m["role"] for m in read_conversations(write("a.json", [record])).messages(0)]
    assert roles == ["user", "assistant"]


GOOD = llava("Hello", "Hi")
MISTAKES = [
    (
        llava("<image><image>", "That.", image="1.png"),
        "2 <image> in its texts for 1 pictures: make the numbers",
    ),
    (llava("What?", "That.", image="1.png"), "0 <image> in its texts for 1 pictures"),
    (llava("<image>\nWhat?", "That."), "1 <image> in its texts for 0 pictures"),
    (llava("What?", "<image>", image="1.png"), "in a turn of the assistant: only the user shows pictures"),
    (llava("What?", ""), "it has no answer by the assistant"),
    (llava("What?"), "it has no answer by the assistant"),
    ({"conversations": []}, "'conversations' must be a list of turns"),
    ({"conversations": [{"from": "bot", "value": "x"}]}, "'from' of a turn is 'bot': choose one of"),
    ({"conversations": [{"from": "human"}]}, "a turn's content must be a text"),
    ({"conversations": GOOD["conversations"][:1] * 2}, "turn 2 is by the user, not the assistant"),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "a part must be"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "1 <image> in its texts for 0 pictures",
    ),
    ({**GOOD, "image": {"path": "x"}}, "pictures must be given as a path or a list of paths"),
    ({"text": "x"}, "neither 'conversations' .LLaVA. nor 'messages'"),
    (["x"], "a record must be a JSON object"),
]


@pytest.mark.parametrize(("record", "message"), MISTAKES, ids=[message[:30] for _, message in MISTAKES])
@pytest.mark.parametrize(("name", "place"), [("a.json", "sample 2"), ("a.jsonl", "line 3")])
def test_a_wrong_record_is_named(write: Write, name: str, place: str, record: Any, message: str) -> None:
    with pytest.raises(FoveateError, match=f"{name} {place}: .*{message}"):
        read_conversations(write(name, [GOOD, GOOD, record, GOOD]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"conversations": [}]', "a.json line 1 is not valid JSON"),
        ("a.json", "[\n{}\n{}]", "a.json"),
        ("a.json", '{"conversations": []}', "should hold a JSON list"),
        ("a.json", "[]", "holds no samples"),
        ("a.json", "", "should hold a JSON list"),
        ("a.json", json.dumps([GOOD])[:-1], "expected a comma or the list's end"),
        ("a.json", json.dumps([GOOD]) + "garbage", "more after the list's end"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.jsonl", json.dumps(GOOD) + "\n\n{", "a.jsonl line 3 is not valid JSON"),
        ("a.jsonl", "\n", "holds no samples"),
        ("a.csv", "x", r"must end in .json .* or .jsonl"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(FoveateError, match=message):
        read_conversations(tmp_path / name)


def test_a_missing_file_or_folder_is_named(write: Write, tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match=r"no data file at .*none.json"):
        read_conversations(tmp_path / "none.json")
    with pytest.raises(FoveateError, match=r"there is no folder nowhere for its pictures"):
        read_conversations(write("a.json", [GOOD]), "nowhere")
