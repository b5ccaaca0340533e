"""The proxy in front of a stand-in for a server: what it passes on, and how it looks closer."""

from __future__ import annotations

import base64
import json
import math
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from http.client import IncompleteRead
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai import OpenAI

from foveate import FoveateError
from foveate.picture.limits import Limits
from foveate.serve.app import Server, Serving
from foveate.serve.http import Door, Listener, Pictures
from foveate.serve.proxy import Proxy, Rules, Upstream
from foveate.serve.scheduler import Bounds
from foveate.zoom.looking import QUESTION, REGION, Answered, Budget, ByTool, Given
from foveate.zoom.measuring import seen_pixels
from foveate.zoom.wire import Served
from tests.command import foveate
from tests.methods.conftest import fresh
from tests.serve.support import ask, data_url, plug, served, wait_for
from tests.support import picture
from tests.upstream import Drop, Endless, Refusal, Text, shown, upstream
from tests.upstream import Upstream as StandIn

WHOLE = picture(60, 90)
URL = data_url(WHOLE)
BOX = {"picture": 0, "box": [18, 30, 54, 60]}
WHERE = "[0.2, 0.5, 0.6, 1.0]"
ALWAYS = {"zoom": "always"}
BUDGET = Budget(min_pixels=1, min_side=4)


class Pair:
    """A stand-in for a server, proxies in front of it, and clients of these."""

    def __init__(self, behind: StandIn, stack: ExitStack) -> None:
        self.behind, self.stack = behind, stack

    def start(self, door: Door | None = None, pictures: Pictures | None = None, **given: Any) -> Listener:
        """A proxy with other settings."""
        rules = {name: given.pop(name) for name in ("zoom", "tokens") if name in given}
        region, budget = given.pop("region", Answered(extend=0)), given.pop("budget", BUDGET)
        known = {"url": self.behind.url, "sees": 90 * 60, **given}
        proxy = Proxy(
            Upstream(**known), Rules(region=region, budget=budget, **rules), door or Door(), pictures
        )
        return self.stack.enter_context(served(proxy.app, seconds=1))


def client(listener: Listener, key: str = "mine") -> OpenAI:
    return OpenAI(base_url=listener.url, api_key=key, max_retries=0, timeout=20)


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with upstream() as behind, ExitStack() as stack:
        yield Pair(behind, stack)


@pytest.fixture(scope="module")
def common(pair: Pair) -> Listener:
    return pair.start()


@pytest.fixture
def proxy(common: Listener, pair: Pair) -> Listener:
    """The proxy that most tests share, with nothing asked yet."""
    pair.behind.requests.clear()
    pair.behind.script.clear()
    pair.behind.left = 0
    return common


def messages(question: str = "Who?", url: str = URL) -> list[Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


def chat(listener: Listener, extra: dict[str, Any] | None = ALWAYS, **more: Any) -> Any:
    given = {"model": "m", "messages": messages(), "extra_body": extra, **more}
    return client(listener).chat.completions.create(**given)


# Passing on.


def test_what_is_not_zoomed_is_passed_on_byte_for_byte(pair: Pair, proxy: Listener) -> None:
    """The body as it was written, the client's key, and upstream's answer with its headers."""
    odd = b'{ "messages":[{"role":"user","content":"\\u00e9"}],"model":"m" ,"unheard_of": 1.0}'
    answer = b'{"any": "thing"}  '
    pair.behind.script = [answer]
    got = ask(proxy, "/v1/chat/completions?a=b", odd, {"Authorization": "Bearer mine", "X-Odd": "1"})
    (request,) = pair.behind.requests
    assert request["raw"] == odd and request["path"] == "/v1/chat/completions?a=b"
    assert (request["headers"]["authorization"], request["headers"]["x-odd"]) == ("Bearer mine", "1")
    assert "user-agent" not in request["headers"] and request["headers"]["accept-encoding"] == "identity"
    assert (got.status, got.body, got.headers["x-request-id"]) == (200, answer, "up-1")


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/a%2Fb", "/v1/embeddings", "/v1/made/up"])
def test_other_paths_are_upstreams(pair: Pair, proxy: Listener, path: str) -> None:
    got = ask(proxy, path)
    assert json.loads(got.body)["data"][0]["path"].replace("%2F", "/") == path.replace("%2F", "/")
    posted = ask(proxy, path, b"not json at all")
    assert posted.status == 200 and pair.behind.requests[-1]["raw"] == b"not json at all"
    assert ask(proxy, "/other").status == 404 and len(pair.behind.requests) == 2


@pytest.mark.parametrize("status", [400, 401, 404, 422, 429, 500, 503])
@pytest.mark.parametrize("extra", [ALWAYS, {"zoom": "off"}])
def test_errors_of_upstream_reach_the_client(
    pair: Pair, proxy: Listener, status: int, extra: dict[str, Any]
) -> None:
    """Also those that come while it looks closer."""
    script = [Refusal(status, "no & no", {"Retry-After": "7"})]
    pair.behind.script = [WHERE, *script] if extra is ALWAYS else script
    got = ask(proxy, "/v1/chat/completions", {"model": "m", "messages": messages(), **extra})
    assert got.status == status and got.headers["retry-after"] == "7"
    assert got.error["message"] == "no & no"


def test_a_busy_upstream_is_waited_for_by_the_client(pair: Pair, proxy: Listener) -> None:
    """The official client goes by `Retry-After`."""
    pair.behind.script = [Refusal(429, headers={"Retry-After": "0.01"}), WHERE, "a dog", "a cat"]
    patient = client(proxy).with_options(max_retries=2)
    got = patient.chat.completions.create(model="m", messages=messages(), extra_body=ALWAYS)
    assert got.choices[0].message.content == "a cat"


def test_a_stream_is_passed_on_as_it_comes(pair: Pair, proxy: Listener) -> None:
    pair.behind.script = [Text(["a", " ", "cat"], wait=0.15)]
    start, times, texts = time.monotonic(), [], []
    for chunk in chat(proxy, None, stream=True):
        texts.append(chunk.choices[0].delta.content)
        times.append(time.monotonic() - start)
    assert texts == ["a", " ", "cat", None]
    assert times[0] < times[-1] - 0.3, "it waited for the whole"


def test_a_client_that_leaves_a_stream_ends_it_upstream(pair: Pair, proxy: Listener) -> None:
    pair.behind.script = [Endless(b"data: {}\n\n")]
    with plug(proxy) as connection:
        connection.sendall(raw({"model": "m", "stream": True, "messages": []}))
        assert connection.recv(100)
    assert pair.behind.wait_until(left=1)


@pytest.mark.parametrize("extra", [ALWAYS, {}])
def test_a_client_that_leaves_before_the_answer_cancels_it(
    pair: Pair, proxy: Listener, extra: dict[str, Any]
) -> None:
    pair.behind.script = [Text(["late"], wait=20)]
    with plug(proxy) as connection:
        connection.sendall(raw({"model": "m", "messages": messages(), **extra}))
        wait_for(lambda: pair.behind.requests)
    assert pair.behind.wait_until(left=1)


def raw(body: Any) -> bytes:
    content = json.dumps(body).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def test_a_stream_that_breaks_upstream_breaks_here(pair: Pair, proxy: Listener) -> None:
    """A client must not take half of an answer for the whole."""
    pair.behind.script = [Drop(b'data: {"choices": []}\n\n')]
    with pytest.raises(openai.APIError), chat(proxy, None, stream=True) as events:
        for _ in events:
            pass


# When to look closer.


def test_a_second_look(pair: Pair, proxy: Listener) -> None:
    pair.behind.script = [WHERE, Text(["a ", "dog"], [math.log(0.5), 0.0]), Text(["a cat"], [math.log(0.25)])]
    got = chat(proxy, max_tokens=7, temperature=0.3, seed=5, extra_headers={"X-Mine": "1"})
    assert got.choices[0].message.content == "a cat" and got.choices[0].logprobs is None
    assert got.foveate == {
        "regions": [BOX],
        "first": {"text": "a dog", "confidence": pytest.approx(0.75)},
        "zoomed": {"text": "a cat", "confidence": pytest.approx(0.25)},
        "problems": [],
    }
    assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens) == (30, 4, 34)
    assert got.system_fingerprint == "fp"
    where, first, closer = (request["body"] for request in pair.behind.requests)
    assert (where["max_tokens"], where["temperature"], "seed" in where) == (64, 0, False)
    for body in (first, closer):
        assert (body["max_tokens"], body["temperature"], body["seed"]) == (7, 0.3, 5)
    assert "zoom" not in where and first["messages"] == messages()
    assert pair.behind.asked()[2] == f"{REGION}|{QUESTION.replace('{question}', 'Who?')}"
    seen, crop = pair.behind.pictures(2)
    assert np.array_equal(np.asarray(seen), np.asarray(WHOLE))
    assert np.array_equal(np.asarray(crop), np.asarray(WHOLE)[30:60, 18:54])
    assert all(request["headers"]["x-mine"] == "1" for request in pair.behind.requests)


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("unit_xxyy", "[0.2, 0.6, 0.5, 1.0]"),
        ("qwen3_vl", '{"bbox_2d": [200, 500, 600, 1000]}'),
        ("qwen2_5_vl", '{"bbox_2d": [16.8, 28, 50.4, 56]}'),
        ("internvl", "<box>[[200, 500, 600, 1000]]</box>"),
    ],
)
def test_box_formats(pair: Pair, proxy: Listener, form: str, words: str) -> None:
    pair.behind.script = [words, "a dog", "a cat"]
    got = chat(pair.start(served=Served(form=form), zoom="always"), None)
    assert got.foveate["regions"] == [BOX] and got.foveate["first"]["confidence"] is None
    assert pair.behind.pictures(0)[0].size == ((84, 56) if form == "qwen2_5_vl" else (90, 60))


@pytest.mark.parametrize("words", ["nowhere", "[1, 2]", "[0, 0, 1, 1]", ""])
def test_nonsense_leaves_the_first_answer(pair: Pair, proxy: Listener, words: str) -> None:
    pair.behind.script = [Text([words or " "]), "a dog"]
    got = chat(proxy)
    assert got.choices[0].message.content == "a dog" and len(pair.behind.requests) == 2
    assert got.foveate["regions"] == [] and got.foveate["zoomed"] is None and got.foveate["problems"]


def test_auto_is_for_pictures_larger_than_the_model_sees(pair: Pair, proxy: Listener) -> None:
    pair.behind.script = ["as it is", WHERE, "a dog", "a cat"]
    assert not hasattr(chat(proxy, None), "foveate")
    assert len(pair.behind.requests) == 1
    larger = {"messages": messages(url=data_url(picture(61, 90)))}
    assert chat(proxy, None, **larger).foveate["regions"] == [{"picture": 0, "box": [18, 30, 54, 61]}]
    assert not hasattr(chat(proxy, {"zoom": "off"}, **larger), "foveate")


def test_what_the_model_sees_is_measured_once(pair: Pair, proxy: Listener) -> None:
    """By the tokens that upstream counts for grey squares: 28 x 28 pixels a token, 300 tokens at most."""
    measured = pair.start(sees=None)

    def counted(request: dict[str, Any]) -> Any:
        urls = [part["image_url"]["url"] for part in request["messages"][0]["content"] if "image_url" in part]
        pixels = math.prod(shown(urls[0]).size) if urls else 0
        return {"prompt_tokens": 5 + min(pixels // 784, 300), "completion_tokens": 1, "total_tokens": 0}

    pair.behind.counted = counted
    small, large = (messages(url=data_url(picture(*size))) for size in ((400, 500), (500, 500)))
    try:
        assert not hasattr(chat(measured, None, messages=small), "foveate")
        assert len(pair.behind.requests) == 6 and pair.behind.requests[0]["body"]["max_tokens"] == 1
        pair.behind.requests.clear()
        assert not hasattr(chat(measured, None, messages=small), "foveate")
        assert len(pair.behind.requests) == 1
        pair.behind.script = [WHERE, "a dog", "a cat"]
        assert chat(measured, None, messages=large).foveate["regions"]
    finally:
        pair.behind.counted = None


def test_pixels_by_tokens() -> None:
    assert seen_pixels({224: 64, 448: 256, 896: 576, 1792: 576}) == round(576 * 448 * 448 / 256)
    assert seen_pixels({224: 576, 448: 576, 896: 576}) == 336 * 336  # one fixed view
    assert seen_pixels({224: 64, 448: 256, 896: 1024, 1792: 4096}) is None  # as far as was tried, all
    assert seen_pixels({}) is None and seen_pixels({224: 0}) is None


UNFIT = {
    "no picture": {"messages": [{"role": "user", "content": "Who?"}]},
    "two pictures": {"messages": [*messages(), *messages()]},
    "a hundred": {"messages": [{"role": "user", "content": messages()[0]["content"] * 100}]},
    "tools": {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    "several answers": {"n": 2},
    "the model speaks": {"messages": [*messages(), {"role": "assistant", "content": "I"}]},
    "no question": {"messages": [{"role": "user", "content": messages()[0]["content"][:1]}]},
    "sound": {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
    "no messages": {"messages": 7},
    "no roles": {"messages": [7]},
}


@pytest.mark.parametrize("body", UNFIT.values(), ids=list(UNFIT))
def test_what_cannot_be_zoomed(pair: Pair, proxy: Listener, body: dict[str, Any]) -> None:
    """It is passed on; asked for always, it is refused before upstream is asked."""
    larger = {"model": "m", "messages": messages(url=data_url(picture(80, 90))), **body}
    assert ask(proxy, "/v1/chat/completions", larger).status == 200
    assert json.loads(pair.behind.requests[0]["raw"]) == larger and len(pair.behind.requests) == 1
    got = ask(proxy, "/v1/chat/completions", {**larger, **ALWAYS})
    assert got.status == 400 and got.error["param"] == "zoom" and len(pair.behind.requests) == 1


BOMB = (  # the head of a PNG of 50,000 x 50,000 pixels
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\xc3P\x00\x00\xc3P\x08\x02\x00\x00\x00"
    b"\x17\x11\xf9\xcd" + b"\0" * 2**20
)
BROKEN = {
    "huge": BOMB,
    "truncated": b"\x89PNG\r\n\x1a\n\x00\x00\x00\r",
    "not a picture": b"%PDF-1.7",
    "nothing": b"",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=list(BROKEN))
def test_broken_pictures(pair: Pair, proxy: Listener, content: bytes) -> None:
    """Upstream says what it thinks of them; asked for always, they are refused here, and quickly."""
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    body = {"model": "m", "messages": messages(url=url)}
    assert ask(proxy, "/v1/chat/completions", body).status == 200
    start = time.process_time()
    got = ask(proxy, "/v1/chat/completions", {**body, **ALWAYS})
    assert got.status == 400 and got.error["param"] == "messages[0].content[0].image_url"
    assert time.process_time() - start < 1 and len(pair.behind.requests) == 1


def test_pictures_by_url(pair: Pair, proxy: Listener) -> None:
    """They are upstream's to fetch; zoomed only where a flag allows it."""
    body = {"model": "m", "messages": messages(url="http://example.com/a.png")}
    assert ask(proxy, "/v1/chat/completions", body).status == 200
    got = ask(proxy, "/v1/chat/completions", {**body, **ALWAYS})
    assert got.status == 400 and "--allow-urls" in got.error["message"]
    private = pair.start(pictures=Pictures(urls=True))
    got = ask(
        private, "/v1/chat/completions", {**body, "messages": messages(url="http://127.0.0.1:1/a")} | ALWAYS
    )
    assert got.status == 400 and "127.0.0.1" not in got.error["message"].replace("http://127.0.0.1:1/a", "")


@pytest.mark.parametrize("zoom", ["on", True, None, 7, {}])
def test_unknown_values_of_zoom(pair: Pair, proxy: Listener, zoom: Any) -> None:
    got = ask(proxy, "/v1/chat/completions", {"model": "m", "messages": messages(), "zoom": zoom})
    assert got.status == 400 and got.error["message"] == "zoom must be off, auto or always"
    assert pair.behind.requests == []


@pytest.mark.parametrize("body", [b"{", b"[1]", b'"zoom"', b"\xff", b'{"zoom": "always"', b"[" * 10**6])
def test_what_is_not_json_is_upstreams_to_refuse(pair: Pair, proxy: Listener, body: bytes) -> None:
    assert ask(proxy, "/v1/chat/completions", body).status == 200
    assert pair.behind.requests[0]["raw"] == body


def test_a_conversation_before_the_question(pair: Pair, proxy: Listener) -> None:
    """The picture in an earlier turn, which stays there; the question is asked where it stands."""
    talk = [
        {"role": "system", "content": "Be short."},
        *messages("What is it?"),
        {"role": "assistant", "content": "A zoo."},
        {"role": "user", "content": "Who is there?"},
    ]
    pair.behind.script = [WHERE, "a dog", "a cat"]
    assert chat(proxy, messages=talk).choices[0].message.content == "a cat"
    for request in pair.behind.requests:
        assert request["body"]["messages"][:3] == talk[:3]
    *_, closer = pair.behind.requests[2]["body"]["messages"]
    assert [part["type"] for part in closer["content"]] == ["text", "image_url", "text"]
    assert "Who is there?" in closer["content"][-1]["text"]


def test_only_the_models_that_were_named(pair: Pair, proxy: Listener) -> None:
    one = pair.start(model="m", zoom="always")
    pair.behind.script = [WHERE, "a dog", "a cat", "other"]
    assert chat(one, None).choices[0].message.content == "a cat"
    with pytest.raises(openai.BadRequestError, match="only m is zoomed here"):
        chat(one, ALWAYS, model="other")
    assert not hasattr(chat(one, {"zoom": "auto"}, model="other"), "foveate")


# How.


def test_a_streamed_second_look(pair: Pair, proxy: Listener) -> None:
    """The last answer as it comes, then what led to it; tokens of all requests together."""
    pair.behind.script = [WHERE, Text(["a dog"], [0.0]), Text(["a", " cat"], [math.log(0.5), 0.0], wait=0.1)]
    events = list(chat(proxy, stream=True, stream_options={"include_usage": True}))
    assert "".join(e.choices[0].delta.content or "" for e in events if e.choices) == "a cat"
    assert all(e.choices[0].logprobs is None for e in events if e.choices)
    assert events[-1].foveate["regions"] == [BOX] and events[-1].choices == []
    assert events[-1].foveate["zoomed"] == {"text": "a cat", "confidence": pytest.approx(0.75)}
    (usage,) = [event.usage for event in events if event.usage]
    assert (usage.prompt_tokens, usage.completion_tokens) == (30, 4)
    bodies = [request["body"] for request in pair.behind.requests]
    assert [body.get("stream") for body in bodies] == [None, None, True]


def test_a_streamed_answer_without_a_closer_look(pair: Pair, proxy: Listener) -> None:
    pair.behind.script = ["nowhere", Text(["a ", "dog"], [0.0, 0.0])]
    events = list(chat(proxy, stream=True, logprobs=True))
    assert "".join(e.choices[0].delta.content or "" for e in events if e.choices) == "a dog"
    assert events[0].choices[0].logprobs.content[0].logprob == 0
    assert events[-1].foveate["zoomed"] is None and events[-1].foveate["first"]["confidence"] == 1


def test_models_that_call_a_tool(pair: Pair, proxy: Listener) -> None:
    by_tool = pair.start(region=ByTool(), zoom="always")
    call = Text([], calls=[("image_zoom_in_tool", {"bbox_2d": [200, 500, 600, 1000], "img_idx": 0})])
    for streams in (False, True):
        pair.behind.requests.clear()
        pair.behind.script = ["a dog", call, "<think>.</think> a cat"]
        got = chat(by_tool, None, stream=streams)
        if streams:
            *pieces, last = got
            text, found = "".join(e.choices[0].delta.content or "" for e in pieces), last.foveate
        else:
            text, found = got.choices[0].message.content, got.foveate
        assert text == "a cat" and found["regions"] == [BOX] and found["first"]["text"] == "a dog"
        assert len(pair.behind.requests) == 3
    pair.behind.script = ["a dog", "a wolf"]
    got = chat(by_tool, None)
    assert got.choices[0].message.content == "a dog" and "did not call" in got.foveate["problems"][0]


def test_a_crop_that_upstream_refuses(pair: Pair, proxy: Listener) -> None:
    """A model that takes one picture a request: its first answer stays, streamed or not."""
    refusal = Refusal(400, "At most 1 image(s) may be provided")
    for streams in (False, True):
        pair.behind.script = [WHERE, "a dog", refusal]
        got = chat(proxy, stream=streams)
        if streams:
            *pieces, last = got
            assert "".join(e.choices[0].delta.content or "" for e in pieces) == "a dog"
        else:
            assert got.choices[0].message.content == "a dog"
            last = got
        assert "At most 1 image(s)" in last.foveate["problems"][0] and last.foveate["regions"] == []


def test_upstreams_without_probabilities(pair: Pair, proxy: Listener) -> None:
    plain = pair.start(zoom="always")
    pair.behind.refuses = ['"logprobs"']
    try:
        pair.behind.script = [WHERE, "a dog", "a cat"] * 2
        assert chat(plain, None).foveate["zoomed"] == {"text": "a cat", "confidence": None}
        assert chat(plain, None).choices[0].message.content == "a cat"
    finally:
        pair.behind.refuses = []
    assert len(pair.behind.requests) == 7, "what it refuses is remembered"


@pytest.mark.parametrize(
    ("reply", "status"),
    [
        (Drop(), 502),
        (Drop(b""), 502),
        (Endless(), 504),
        (Endless(b"x" * 2**20, 0.0), 502),
        (Text(["late"], wait=20), 504),
        (b"<html>", 502),
        (b"[]", 502),
        (b"{}", 502),
        (b'{"choices": [{"message": {"content": null}}]}', 502),
    ],
    ids=["drop", "nothing", "endless", "long", "slow", "html", "list", "empty", "no text"],
)
def test_what_goes_wrong_upstream_ends(pair: Pair, proxy: Listener, reply: Any, status: int) -> None:
    short = pair.start(seconds=1.0, stall=0.5, max_bytes=2**22)
    pair.behind.script = [WHERE, reply]
    got = ask(short, "/v1/chat/completions", {"model": "m", "messages": messages(), **ALWAYS})
    assert got.status == status and got.error["code"].startswith("upstream_")


@pytest.mark.parametrize(
    "reply",
    [Endless(b"data: {}\n\n"), Endless(b"x" * 2**20, 0.0), Drop(b"data: {}\n\n")],
    ids=["events", "an event", "broken"],
)
@pytest.mark.parametrize("extra", [{}, ALWAYS])
def test_streams_that_never_end_are_ended(
    pair: Pair, proxy: Listener, reply: Any, extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foveate.serve.proxy.MOST_EVENT", 2**22)
    short = pair.start(seconds=0.7, stall=0.5)
    pair.behind.script = [WHERE, "a dog", reply] if extra else [reply]
    with pytest.raises((IncompleteRead, ConnectionError)):
        ask(short, "/v1/chat/completions", {"model": "m", "stream": True, "messages": messages(), **extra})


def test_no_upstream(pair: Pair, proxy: Listener) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = pair.start(url=f"http://127.0.0.1:{free.getsockname()[1]}/v1")
        for body in ({"model": "m", "messages": []}, {"model": "m", "messages": messages(), **ALWAYS}):
            got = ask(nobody, "/v1/chat/completions", body)
            assert got.status == 502 and got.error["code"] == "upstream_unreachable"


def test_keys(pair: Pair, proxy: Listener) -> None:
    """The proxy's own key never reaches upstream, which gets its own."""
    locked = pair.start(door=Door(key="front"), key="back")
    assert ask(locked, "/v1/models").status == 401
    assert ask(locked, "/v1/models", headers={"Authorization": "Bearer front"}).status == 200
    assert pair.behind.requests[-1]["headers"]["authorization"] == "Bearer back"
    own = pair.start(door=Door(key="front"))
    assert ask(own, "/v1/models", headers={"Authorization": "Bearer front"}).status == 200
    assert "authorization" not in pair.behind.requests[-1]["headers"]


def test_limits_of_pictures(pair: Pair, proxy: Listener) -> None:
    small = pair.start(pictures=Pictures(Limits(max_pixels=1000)))
    with pytest.raises(openai.BadRequestError, match="more than max_pixels"):
        chat(small)


def test_metrics_count_what_was_zoomed(pair: Pair, proxy: Listener) -> None:
    fresh = pair.start()
    pair.behind.script = [WHERE, "a dog", "a cat"]
    chat(fresh)
    chat(fresh, None)
    page = ask(fresh, "/metrics").body.decode()
    assert 'foveate_zoom_requests_total{zoom="yes"} 1.0' in page
    assert 'foveate_zoom_requests_total{zoom="no"} 1.0' in page
    assert ask(fresh, "/ready").status == 200


def test_tokens_asked_of_upstream(pair: Pair, proxy: Listener) -> None:
    bounded = pair.start(budget=Budget(min_pixels=1, min_side=4, tokens=50), tokens=True, zoom="always")
    pair.behind.script = [WHERE, "a dog", "a cat"]
    chat(bounded, None)
    bounds = [request["body"].get("max_tokens") for request in pair.behind.requests]
    assert bounds == [50, None, 49]


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://a/v1", "http://", "", "http://[::1", None])
def test_wrong_addresses(url: Any) -> None:
    with pytest.raises(FoveateError, match="is not the address of a server"):
        Upstream(url)


def test_wrong_settings() -> None:
    with pytest.raises(FoveateError, match="sees must be above 0"):
        Upstream("http://a/v1", sees=0)
    with pytest.raises(FoveateError, match="zoom must be off, auto or always, not 'on'"):
        Rules(zoom="on")  # type: ignore[arg-type]


def test_in_front_of_our_own_server(pair: Pair, proxy: Listener) -> None:
    """A random model: its answers with and without the crop, their probabilities, tokens of both."""
    own = Server(fresh("llava"), Serving("tiny", Door(), Pictures(), Bounds(places=2), new_tokens=4))
    behind = pair.stack.enter_context(served(own.app))
    in_front = pair.start(url=behind.url, region=Given((18, 30, 54, 60)), zoom="always")
    got = chat(in_front, None, model="tiny")
    assert got.foveate["regions"] == [BOX] and 0 < got.foveate["zoomed"]["confidence"] <= 1
    assert got.choices[0].message.content.strip() == got.foveate["zoomed"]["text"]
    assert got.usage.completion_tokens <= 8 and got.usage.prompt_tokens > 40
    events = list(chat(in_front, None, model="tiny", stream=True))
    assert (
        "".join(e.choices[0].delta.content or "" for e in events if e.choices).strip()
        == (got.foveate["zoomed"]["text"])
    )
    assert [one.id for one in client(in_front).models.list()] == ["tiny"]


# The command.


def test_the_command(pair: Pair, proxy: Listener, tmp_path: Path) -> None:
    """It starts without torch, shows upstream its key, zooms as its options say, and ends when it is told."""
    key, errors = tmp_path / "key", tmp_path / "errors"
    key.write_text("back\n")
    errors.touch()
    options = ("--upstream", pair.behind.url, "--model", "m", "--upstream-key-file", key, "--port", "0")
    options += ("--zoom", "always", "--boxes", "qwen3_vl", "--look-tokens", "40", "--crop-pixels", "500")
    with errors.open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", WITHOUT_TORCH, *map(str, options)], stderr=log)
    try:
        wait_for(lambda: " at http" in errors.read_text() or process.poll() is not None, 60)
        found = re.search(r"a second look for m of \S+ at (http://127\.0\.0\.1:\d+/v1)", errors.read_text())
        assert found is not None, errors.read_text()
        pair.behind.script = ['{"bbox_2d": [200, 500, 600, 1000]}', "a dog", "a cat"]
        started = OpenAI(base_url=found[1], api_key="front")
        got = started.chat.completions.create(model="m", messages=messages())
        assert got.choices[0].message.content == "a cat"
        assert pair.behind.requests[0]["headers"]["authorization"] == "Bearer back"
        assert pair.behind.requests[2]["body"]["max_tokens"] == 39
        crop = pair.behind.pictures(2)[1]
        assert crop.width * crop.height <= 520
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == -signal.SIGTERM
    finally:
        process.kill()


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
sys.argv[1:1] = ["serve"]
from foveate.cli import main
main()
"""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("a-model", "--upstream", "http://a/v1"), "a model here and --upstream do not go together"),
        (("--upstream", "http://a/v1", "--device", "cpu"), "--device and --upstream do not go together"),
        (("--upstream", "a/v1"), "is not the address of a server"),
        (("--upstream", "http://a/v1", "--boxes", "xywh"), "unknown box format 'xywh'"),
        (("--upstream", "http://a/v1", "--tool", "eyes"), "unknown tool convention 'eyes'"),
        (("--upstream", "http://a/v1", "--upstream-key-file", "none"), "none"),
        (("--upstream", "http://a/v1", "--host", "0.0.0.0"), "set an API key"),
        (("--zoom", "always"), "--zoom is for --upstream"),
        (("--model", "m"), "--model is for --upstream"),
    ],
)
def test_commands_that_make_no_sense(
    options: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = foveate("serve", *options)
    assert found.code == 2 and said in " ".join(found.stderr.split()), found.stderr
