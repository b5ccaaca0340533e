"""Files of conversations: both kinds in both containers, and every mistake named with its place."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from foveate import FoveateError
from foveate.data.dataset import size_of
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
SHOWN = llava("<image>\nWhat?", "That.")
TALK = {
    "messages": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "That."}]
}


@pytest.mark.parametrize("record", [SHOWN, TALK], ids=["llava", "messages"])
@pytest.mark.parametrize("key", ["image", "images"])
@pytest.mark.parametrize("given", ["1.png", ["1.png"]], ids=["path", "list"])
def test_either_kind_takes_either_key(
    write: Write, tmp_path: Path, record: dict[str, Any], key: str, given: Any
) -> None:
    read = read_conversations(write("a.json", [{**record, key: given}]))
    assert read.messages(0)[0]["content"][0] == {"type": "image", "image": str(tmp_path / "1.png")}


def test_a_system_text_is_the_first_turn(write: Write) -> None:
    for record in (
        llava("Hello", "Hi", system="Be brief."),
        {**TALK, "image": "1.png", "system": "Be brief."},
    ):
        messages = read_conversations(write("a.json", [record])).messages(0)
        assert [m["role"] for m in messages] == ["system", "user", "assistant"]
        assert messages[0]["content"] == [text("Be brief.")]
    empty = read_conversations(write("a.json", [llava("Hello", "Hi", system="")])).messages(0)
    assert [m["role"] for m in empty] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("name", "no", "yes"), [("loss", False, True), ("weight", 0, 1), ("weight", 0.0, 1.0)]
)
def test_turns_without_loss_are_marked(write: Write, name: str, no: Any, yes: Any) -> None:
    record = llava("Hello", "Hi", "Bye", "See you")
    record["conversations"][0][name] = record["conversations"][1][name] = no
    record["conversations"][3][name] = yes
    messages = read_conversations(write("a.json", [record])).messages(0)
    assert [m.get("loss", True) for m in messages] == [True, False, True, True]


def png() -> bytes:
    made = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(made, "PNG")
    return made.getvalue()


PNG = base64.b64encode(png()).decode()


def test_pictures_in_other_words(write: Write, tmp_path: Path) -> None:
    local = (tmp_path / "a b.png").as_uri()
    assert "%20" in local
    parts = [
        {"type": "image", "url": local},
        {"type": "image", "path": "1.png", "image": None, "text": None},
        {"type": "image", "base64": PNG},
        {"type": "image", "url": f"data:image/png;base64,{PNG}"},
    ]
    turns = [{"role": "user", "content": [*parts, text("What?")]}, {"role": "assistant", "content": "That."}]
    read = read_conversations(write("a.json", [{"messages": turns}, {**SHOWN, "image": local}]))
    shown = [part["image"] for part in read.messages(0)[0]["content"][:4]]
    assert shown == [str(tmp_path / "a b.png"), str(tmp_path / "1.png"), png(), png()]
    assert read.messages(1)[0]["content"][0]["image"] == str(tmp_path / "a b.png")
    assert [size_of(picture) for picture in shown[2:]] == [(2, 3), (2, 3)]


def test_other_fields_are_ignored(write: Write) -> None:
    more = {"id": 1, "source": "x", "image_id": 7, "width": 3, "video": None, "tools": [], "image": None}
    assert len(read_conversations(write("a.json", [{**GOOD, **more}]))) == 1
    named = {**SHOWN, "image": "1.png", "image_path": "1.png", "picture": "1.png"}
    assert len(read_conversations(write("a.json", [named]))) == 1


def turn(**more: Any) -> dict[str, Any]:
    """A record whose answer has more fields."""
    return {"conversations": [GOOD["conversations"][0], {**GOOD["conversations"][1], **more}]}


def part(**piece: Any) -> dict[str, Any]:
    """A record whose question is one part."""
    return {"messages": [{"role": "user", "content": [piece]}, {"role": "assistant", "content": "That."}]}


DROPPED = [
    ({**llava("<video>\nWhat?", "That."), "video": "1.mp4"}, "it has 'video', which is not read"),
    ({**GOOD, "audio": "1.wav"}, "it has 'audio', which is not read"),
    ({**GOOD, "tools": [{"name": "x"}]}, "it has 'tools', which is not read"),
    ({**GOOD, "Image": "1.png"}, "it has 'Image', which is not read; did you mean 'image'?"),
    ({**GOOD, "picture": "1.png"}, "it has 'picture', which is not read; did you mean 'image'?"),
    ({**GOOD, "image_path": "1.png"}, "it has 'image_path', which is not read; did you mean 'image'?"),
    ({**GOOD, "system_prompt": "x"}, "it has 'system_prompt', which is not read; did you mean 'system'?"),
    ({"conversation": GOOD["conversations"]}, "did you mean 'conversations' by 'conversation'?"),
    ({"dialog": GOOD["conversations"]}, "did you mean 'conversations' by 'dialog'?"),
    ({**GOOD, "messages": TALK["messages"]}, "it has 'conversations' and 'messages': keep one"),
    ({**SHOWN, "image": "1.png", "images": ["2.png"]}, "it has 'image' and 'images': keep one"),
    ({**SHOWN, "image": ""}, "'image' is an empty text"),
    ({**SHOWN, "images": ["1.png", " "]}, "'images' is an empty text"),
    ({**SHOWN, "image": float("nan")}, "'image': its pictures must be given as a path"),
    ({**SHOWN, "image": "https://example.org/1.png"}, "is not fetched: download it"),
    ({**SHOWN, "image": "file://1.png"}, "write file:/// before an absolute path"),
    ({**SHOWN, "image": "data:image/png,abc"}, "a data: URL needs ;base64"),
    ({**SHOWN, "image": "data:image/png;base64,?"}, "'?' is not a picture in base64"),
    ({**SHOWN, "image": PNG * 100}, "a picture in base64 starts with data:image/png;base64,"),
    ({"conversations": None}, "'conversations' must be a list of turns, not null"),
    ({**GOOD, "system": ["x"]}, "'system' must be a text, not a list"),
    (
        {"system": "x", "conversations": [{"from": "system", "value": "y"}, *GOOD["conversations"]]},
        "it has 'system' and a first turn by the system",
    ),
    (turn(loss="no"), "'loss' of a turn is 'no': give true or false"),
    (turn(weight=0.5), "'weight' of a turn is 0.5: give 0 or 1"),
    (turn(weight=float("nan")), "'weight' of a turn is nan: give 0 or 1"),
    (turn(loss=True, weight=0), "'loss' and 'weight' of a turn disagree"),
    (turn(loss=False), "no answer of it is learnt, as 'loss' or 'weight' say"),
    (turn(loss_weight=0), "a turn has 'loss_weight', which is not read"),
    (turn(tool_calls=[{"name": "x"}]), "a turn has 'tool_calls', which is not read"),
    (turn(images=["1.png"]), "a turn has 'images', which is not read"),
    (
        {"conversations": [{**GOOD["conversations"][0], "loss": True}, GOOD["conversations"][1]]},
        "only the assistant's turns are learnt",
    ),
    (part(type="video", video="1.mp4"), "not of type 'video'"),
    (part(type="input_image", image_url="1.png"), "not of type 'input_image'"),
    (part(type="imgae", image="1.png"), "not of type 'imgae'"),
    (part(text="x"), "a part of a message must be"),
    (part(type="text", text="x", image="1.png"), "a part of a message has a text and a picture"),
    (
        part(type="image", image="1.png", url="2.png"),
        "a picture of a message is given twice, as image and url",
    ),
    (part(type="image", base64="?"), "'?' is not a picture in base64"),
    (part(type="image", image=""), "a part must give its picture as a path"),
]


@pytest.mark.parametrize(("record", "message"), DROPPED, ids=[message[:50] for _, message in DROPPED])
@pytest.mark.parametrize(("name", "place"), [("a.json", "sample 1"), ("a.jsonl", "line 2")])
def test_what_would_be_dropped_is_refused(
    write: Write, name: str, place: str, record: Any, message: str
) -> None:
    with pytest.raises(FoveateError, match=f"{name} {place}: .*{re.escape(message)}") as error:
        read_conversations(write(name, [GOOD, record, GOOD]))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


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
    (
        {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
        "a part of a message must be .*, not of type .video.",
    ),
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
        (
            "a.arrow",
            "x",
            r"convert it with datasets.Dataset.from_file\('a.arrow'\).to_json\('a.jsonl'\)",
        ),
        ("a.parquet", "x", "a.parquet is not a Parquet file"),
        ("a.tar", "x", "a.tar is not a tar file that is whole and not compressed"),
        (
            "a.jsonl",
            json.dumps([GOOD], indent=1),
            "a.jsonl line 1 begins a JSON list: give the file the ending",
        ),
        (
            "a.jsonl",
            json.dumps(GOOD, indent=1),
            "a.jsonl line 1 is not valid JSON: .*a record takes one line",
        ),
        ("a.json", json.dumps([GOOD]).encode("utf-16"), "is not UTF-8 but looks like UTF-16"),
        ("a.jsonl", json.dumps(GOOD).encode("utf-16-le"), "is not UTF-8 but looks like UTF-16"),
        ("a.jsonl", b'{"id": "\xff"}', "a.jsonl line 1 is not UTF-8 at byte 8"),
        ("a.json", b'[{"id": "\xff"}]', "a.json sample 0 is not UTF-8 at byte 8"),
        ("a.json", '[{"id": ' + "9" * 5000 + "}]", "a.json sample 0 has a number of thousands of digits"),
        ("a.jsonl", '{"id": ' + "9" * 5000 + "}", "a.jsonl line 1 has a number of thousands of digits"),
        ("a.jsonl", '{"id": ' + "[" * 100_000, "a.jsonl line 1 is nested too deeply"),
        ("a.jsonl", '{"id": "' + "x" * 10**6 + '"}', "line 1 .id x{80}....: it has neither 'conversations'"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(FoveateError, match=message):
        read_conversations(tmp_path / name)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_byte_order_mark_changes_nothing(write: Write, name: str) -> None:
    path = write(name, [GOOD, llava("Ü", "犬")])
    read = read_conversations(path)
    whole = [read.messages(i) for i in range(2)]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    with pytest.raises(FoveateError, match="has changed since it was checked"):
        read.messages(1)
    read = read_conversations(path)
    assert [read.messages(i) for i in range(2)] == whole


def test_a_missing_file_or_folder_is_named(write: Write, tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match=r"is a folder: name the .json or .jsonl file in it"):
        read_conversations(tmp_path)
    with pytest.raises(FoveateError, match=r"no data file at x+.json"):
        read_conversations("x" * 300 + ".json")
    with pytest.raises(FoveateError, match=r"no data file at .*none.json"):
        read_conversations(tmp_path / "none.json")
    with pytest.raises(FoveateError, match=r"there is no folder nowhere for its pictures"):
        read_conversations(write("a.json", [GOOD]), "nowhere")
