"""A closer look through a server of OpenAI's protocol, from Python and by `foveate eval`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foveate import FoveateError, Zoom
from foveate.picture.geometry import Box, Size
from foveate.zoom.asking import Unavailable
from foveate.zoom.looking import QUESTION, REGION, Answered, Budget, ByTool
from foveate.zoom.server import Server
from foveate.zoom.tools import LAST
from foveate.zoom.wire import NEXT, Served
from tests.command import foveate
from tests.support import picture
from tests.upstream import Drop, Endless, Refusal, Text, Upstream, upstream

SMALL = Budget(min_pixels=1, min_side=4)
BOX = Box(18, 30, 54, 60)  # of 90 x 60 pixels
ZOOM = "image_zoom_in_tool"


@pytest.fixture
def server() -> Iterator[Upstream]:
    with upstream() as made:
        yield made


def zoom(server: Upstream, region: Any = Answered(extend=0), **more: Any) -> Zoom:  # noqa: B008  it is frozen
    return Zoom.remote(server.url, "m", key="secret", region=region, **{"budget": SMALL, **more})


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("unit_xyxy", "[0.2, 0.5, 0.6, 1.0]"),
        ("unit_xxyy", "[0.2, 0.6, 0.5, 1.0]"),
        ("qwen_vl", "<box>(200,500),(600,1000)</box>"),
        ("qwen2_vl", "<|box_start|>(200,500),(600,1000)<|box_end|>"),
        ("qwen3_vl", '{"bbox_2d": [200, 500, 600, 1000]}'),
        ("internvl", "<box>[[200, 500, 600, 1000]]</box>"),
        # The picture is sent as 84 x 56, so that no server resizes it: boxes count those.
        ("qwen2_5_vl", '{"bbox_2d": [16.8, 28, 50.4, 56]}'),
    ],
)
def test_every_convention(server: Upstream, form: str, words: str) -> None:
    """Asked where, without and with the crop: three requests, with the original's own pixels."""
    server.script = [words, Text(["a ", "dog"], [math.log(0.5), 0.0]), Text(["a cat"], [math.log(0.25)])]
    whole = picture(60, 90)
    found = zoom(server, served=Served(form=form)).ask(whole, "Who?", max_new_tokens=7)
    assert found.regions == [BOX]
    assert (found.first.text, found.first.confidence) == ("a dog", pytest.approx(0.75))
    assert (found.text, found.confidence) == ("a cat", pytest.approx(0.25))
    assert (found.first.tokens, found.proposals[0].said) == (2, words)
    where, first, closer = server.asked()
    assert '"Who?"' in where and first == "Who?"
    assert closer == f"{REGION}|{QUESTION.replace('{question}', 'Who?')}"
    assert server.pictures(0)[0].size == ((84, 56) if form == "qwen2_5_vl" else (90, 60))
    seen, crop = server.pictures(2)
    assert np.array_equal(np.asarray(seen), np.asarray(whole))
    assert np.array_equal(np.asarray(crop), np.asarray(whole)[30:60, 18:54])
    bodies = [request["body"] for request in server.requests]
    assert [(body["max_tokens"], body["temperature"]) for body in bodies] == [(64, 0), (7, 0), (7, 0)]
    assert server.requests[0]["headers"]["authorization"] == "Bearer secret"
    json.dumps(found.to_dict())
    assert found.show().width > 600


@pytest.mark.parametrize(
    "words", ["nowhere", "[0, 0]", "[1, 2, 3, 4, 5, 6, 7, 8]", "[0, 0, 1, 1]", "[5, 5, 5, 5]"]
)
def test_nonsense_leaves_the_first_answer(server: Upstream, words: str) -> None:
    server.script = [words, "a dog"]
    found = zoom(server).ask(picture(60, 90), "Who?")
    assert (found.text, found.confidence, found.zoomed, found.regions) == ("a dog", None, None, [])
    assert found.problems and len(server.requests) == 2


def test_large_pictures_are_counted_in_a_smaller_copy() -> None:
    shown, size = Served(form="qwen2_5_vl").drawn(picture(1500, 2000))
    assert (shown.height, shown.width) == size == Size(840, 1148)
    assert Served().drawn(picture(3, 400))[1] == Size(28, 392)


def test_tools_are_called_in_the_protocol(server: Upstream) -> None:
    call = Text([], calls=[(ZOOM, {"bbox_2d": [200, 500, 600, 1000], "label": "it", "img_idx": 0})])
    server.script = ["a dog", call, Text(["a cat"], [0.0])]
    whole = picture(60, 90)
    found = zoom(server, "tool").ask(whole, "Who?")
    assert found.regions == [BOX] and (found.text, found.confidence) == ("a cat", 1.0)
    assert "tools" not in server.requests[0]["body"]
    assert server.requests[1]["body"]["tools"][0]["function"]["name"] == ZOOM
    *_, told, result = server.requests[2]["body"]["messages"]
    assert told["tool_calls"][0]["id"] == result["tool_call_id"] == "call0"
    assert np.array_equal(np.asarray(server.pictures(2)[-1]), np.asarray(whole)[30:60, 18:54])
    assert result["content"][-1] == {"type": "text", "text": LAST}


def test_servers_that_take_less_are_asked_for_less(server: Upstream) -> None:
    """Without probabilities, with crops in messages of the user's, with tools in the system message."""
    call = {"name": ZOOM, "arguments": {"bbox_2d": [200, 500, 600, 1000]}}
    call = f"<tool_call>{json.dumps(call)}</tool_call>"
    server.refuses = ['"logprobs"', '"tools"']
    server.script = ["a dog", f"Well: {call}", "a cat"]
    remote = zoom(server, "tool")
    found = remote.ask(picture(60, 90), "Who?")
    assert found.regions == [BOX] and (found.text, found.confidence) == ("a cat", None)
    system, _, said, result = server.requests[-1]["body"]["messages"]
    assert ZOOM in system["content"][0]["text"] and call in said["content"]
    assert result["role"] == "user" and result["content"][1]["type"] == "image_url"
    assert len(server.requests) == 5
    server.script = ["a dog", call, "a cat"]
    remote.ask(picture(60, 90), "Who?")
    assert len(server.requests) == 8, "what it refuses is remembered"


def test_pictures_that_a_tools_result_may_not_hold(server: Upstream) -> None:
    call = Text([], calls=[(ZOOM, {"bbox_2d": [200, 500, 600, 1000], "label": "it", "img_idx": 0})])
    server.script = ["a dog", call, Refusal(400, "content must be a string"), "a cat"]
    found = zoom(server, "tool", budget=Budget(turns=2, min_pixels=1)).ask(picture(60, 90), "Who?")
    assert found.text == "a cat"
    *_, result, crop = server.requests[-1]["body"]["messages"]
    assert (result["role"], result["content"]) == ("tool", NEXT)
    assert crop["role"] == "user" and crop["content"][1]["type"] == "image_url"


def test_calls_that_a_server_tells_badly(server: Upstream) -> None:
    bad = Text([], calls=[(ZOOM, "{not JSON"), ("other", {})])
    good = Text([], calls=[(ZOOM, {"bbox_2d": [200, 500, 600, 1000]})])
    server.script = ["a dog", bad, good, "a cat"]
    found = zoom(server, "tool").ask(picture(60, 90), "Who?")
    assert found.text == "a cat" and len(found.problems) == 2
    results = server.requests[2]["body"]["messages"][-2:]
    assert [one["content"] for one in results] == [f"Error: {why}." for why in found.problems]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_is_busy_is_asked_again(server: Upstream, status: int) -> None:
    server.script = [Refusal(status, headers={"Retry-After": "0"}), Drop(), "[0, 0, 0.5, 0.5]", "dog", "cat"]
    assert zoom(server).ask(picture(60, 90), "Who?").text == "cat"


@pytest.mark.parametrize(
    ("reply", "kind", "why"),
    [
        (Refusal(429), Unavailable, "gave no answer: .*not now"),
        (Refusal(500), Unavailable, "gave no answer"),
        (Refusal(401), Unavailable, "gave no answer"),
        (Refusal(400, "too long"), FoveateError, "gave no answer: .*too long"),
        (Drop(), Unavailable, "broke off"),
        (Drop(b""), Unavailable, "gave"),
        (Endless(), Unavailable, "gave no answer within 0.5 s"),
        (Endless(b"x" * 2**22, 0.0), Unavailable, "gave an answer of more than"),
        (Text(["late"], wait=3.0), Unavailable, "timed out"),
        (b"<html>", FoveateError, "is not JSON"),
        (b"[" * 100000, FoveateError, "is not JSON"),
        (b"{}", FoveateError, "without choices"),
        (b'{"choices": []}', FoveateError, "without choices"),
        (b'{"choices": [{"message": {"content": [1]}}]}', FoveateError, "without text"),
        (b'{"choices": [{"message": {"tool_calls": 7}}]}', FoveateError, "without choices"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_what_goes_wrong_is_one_sentence(
    server: Upstream, reply: Any, kind: type[Exception], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foveate.zoom.server.MOST_BYTES", 2**23)
    server.script = [reply]
    with pytest.raises(FoveateError, match=rf"^{server.url} .*{why}") as error:
        seconds = 0.5 if "0.5" in why or "timed out" in why else 20.0
        zoom(server, seconds=seconds, retries=0).ask(picture(60, 90), "Who?", no_zoom=True)
    assert type(error.value) is kind


def test_a_refused_question_about_the_region_leaves_the_first_answer(server: Upstream) -> None:
    refusal = Refusal(400, "too long")
    for script in ([refusal, "a dog"], ["[0, 0, 0.5, 0.5]", "a dog", refusal]):
        server.script = list(script)
        found = zoom(server, retries=0).ask(picture(60, 90), "Who?")
        assert (found.text, found.regions, found.zoomed) == ("a dog", [], None)
        assert "too long" in found.problems[-1]
    server.script = [Refusal(503)]
    with pytest.raises(Unavailable):
        zoom(server, retries=0).ask(picture(60, 90), "Who?")


def test_a_server_that_goes_down_in_the_loop_is_an_error(server: Upstream) -> None:
    """A first answer does not hide it; a question that is refused on the way leaves it."""
    server.script = ["a dog", Refusal(503)]
    with pytest.raises(Unavailable):
        zoom(server, "tool", retries=0).ask(picture(60, 90), "Who?")
    server.script = ["a dog", Refusal(400, "context length exceeded")]
    found = zoom(server, "tool", retries=0).ask(picture(60, 90), "Who?")
    assert found.text == "a dog" and "context length exceeded" in found.problems[0]


def test_wrong_input_is_refused(server: Upstream) -> None:
    for url in ("localhost:8000/v1", "", "file:///etc/passwd", None):
        with pytest.raises(FoveateError, match="is not the address of a server"):
            Zoom.remote(url, "m")  # type: ignore[arg-type]
    with pytest.raises(FoveateError, match="relevance is measured inside a model"):
        zoom(server, "relevance")
    with pytest.raises(FoveateError, match="unknown box format 'xywh'"):
        Served(form="xywh")
    with pytest.raises(FoveateError, match="unknown tool convention 'eyes'"):
        Served(convention="eyes")
    with pytest.raises(FoveateError, match="seconds must be above 0"):
        Server(server.url, "m", seconds=0)
    for name, value in (("streamer", print), ("do_sample", True)):
        with pytest.raises(FoveateError, match=name):
            zoom(server).ask(picture(60, 90), "Who?", no_zoom=True, **{name: value})
    with pytest.raises(FoveateError, match="is empty"):
        zoom(server).ask(picture(60, 90), " ")
    assert server.requests == []


def test_settings_are_those_of_the_request(server: Upstream) -> None:
    zoom(server, ByTool("deepeyes")).ask(
        picture(60, 90), "Who?", no_zoom=True, temperature=0.7, extra_body={"top_k": 3}
    )
    body = server.requests[0]["body"]
    assert (body["temperature"], body["top_k"]) == (0.7, 3)


def test_eval_zooms(server: Upstream, tmp_path: Path) -> None:
    picture(60, 90).save(tmp_path / "a.png")
    record = {"image": "a.png", "question": "Who?", "answer": "a cat", "box": list(BOX)}
    (tmp_path / "data.jsonl").write_text(json.dumps(record))
    server.script = ['{"bbox_2d": [200, 500, 600, 1000]}', "a dog", "a cat"]
    where = ("eval", tmp_path / "data.jsonl", "--model", server.url, "--name", "m", "--out")
    found = foveate(*where, tmp_path / "out", "--zoom", "answer", "--boxes", "qwen3_vl", "--json")
    assert found.code == 0, found.stderr
    report = json.loads(found.stdout)
    assert report["scores"]["exact"]["mean"] == 1 and report["scores"]["hit"]["mean"] == 1
    assert report["plan"]["model"]["zoom"]["served"]["form"] == "qwen3_vl"
    refused = foveate(*where, tmp_path / "no", "--zoom", "relevance")
    assert refused.code == 2 and "choose answer or tool" in " ".join(refused.stderr.split())
    refused = foveate("eval", tmp_path / "data.jsonl", "--out", tmp_path / "no", "--boxes", "qwen3_vl")
    assert refused.code == 2 and "--boxes is for the address of a server" in refused.stderr
