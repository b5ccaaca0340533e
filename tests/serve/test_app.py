"""The server as OpenAI's own client sees it."""

from __future__ import annotations

import base64
import json
import resource
import struct
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from openai import OpenAI

from foveate import Foveate
from foveate.picture.limits import Limits
from foveate.serve.app import Server, Serving
from foveate.serve.http import Door, Listener, Pictures
from foveate.serve.scheduler import Bounds
from tests.methods.conftest import fresh
from tests.serve.support import Reply, ask, data_url, plug, served, wait_for
from tests.support import picture

NAME = "tiny"
WORDS = 6
IMAGE = picture(70, 90)


@pytest.fixture(scope="module")
def model() -> Foveate:
    made = fresh("llava")
    made.model.generation_config.repetition_penalty = 1.3
    return made


@pytest.fixture(scope="module")
def server(model: Foveate) -> Server:
    pictures = Pictures(Limits(max_pixels=10**6), most=4)
    bounds = Bounds(places=4, waiting=40, new_tokens=1500)
    return Server(model, Serving(NAME, Door(max_body=2**21), pictures, bounds, new_tokens=WORDS))


@pytest.fixture(scope="module")
def listener(server: Server) -> Iterator[Listener]:
    with served(server.app) as found:
        yield found


@pytest.fixture(scope="module")
def client(listener: Listener) -> OpenAI:
    return OpenAI(base_url=listener.url, api_key="none", max_retries=0)


def user(*parts: Any) -> dict[str, Any]:
    """A message of the user: texts and pictures."""
    shown = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_url(part)}}
        for part in parts
    ]
    return {"role": "user", "content": shown}


def create(client: OpenAI, *messages: Any, **more: Any) -> Any:
    given = list(messages) or [user("What is it?", IMAGE)]
    return client.chat.completions.create(model=NAME, messages=given, **more)


def test_models(client: OpenAI) -> None:
    assert [one.id for one in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "foveate"
    with pytest.raises(openai.NotFoundError, match="'other' is not served here"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="'tiny' is") as error:
        client.chat.completions.create(model="other", messages=[user("Hello?")])
    assert (error.value.code, error.value.param) == ("model_not_found", "model")


def test_an_answer(client: OpenAI, model: Foveate) -> None:
    expected = model.ask(IMAGE, "What is it?", max_new_tokens=WORDS)
    found = create(client)
    (choice,) = found.choices
    assert choice.message.content == expected.text and choice.message.role == "assistant"
    assert choice.finish_reason == "length" and choice.logprobs is None and found.object == "chat.completion"
    cost = expected.ledger
    assert found.usage.prompt_tokens == cost.prompt_tokens and found.usage.completion_tokens == WORDS
    assert found.usage.total_tokens == cost.prompt_tokens + WORDS
    assert found.usage.prompt_tokens_details.image_tokens == cost.visual_tokens == 16
    looked = found.foveate
    assert looked["regions"] == looked["views"] == [{"picture": 0, "box": [0, 0, 90, 70]}]
    assert looked["notes"] == [] and looked["ledger"]["views"] == 1
    again = create(client)
    assert again.usage.prompt_tokens_details.cached_tokens == cost.prompt_tokens - 1
    assert again.choices[0].message.content == expected.text and again.id != found.id


def test_an_answer_in_pieces(client: OpenAI) -> None:
    whole = create(client, max_tokens=20, logprobs=True, top_logprobs=2)
    (choice,) = whole.choices
    given = choice.logprobs.content
    assert len(given) == 20 and all(len(one.top_logprobs) == 2 for one in given)
    assert bytes(b for one in given for b in one.bytes or ()) or given
    for usage in (False, True):
        options = {"stream_options": {"include_usage": True}} if usage else {}
        stream = create(client, max_tokens=20, logprobs=True, top_logprobs=2, stream=True, **options)
        first, *rest = list(stream)
        assert first.choices[0].delta.role == "assistant" and first.object == "chat.completion.chunk"
        end = rest.pop() if usage else None
        *pieces, last = rest
        text = "".join(one.choices[0].delta.content or "" for one in pieces)
        assert text == choice.message.content and last.choices[0].finish_reason == "length"
        tokens = [t for one in pieces if one.choices[0].logprobs for t in one.choices[0].logprobs.content]
        assert [t.token for t in tokens] == [t.token for t in given]
        assert last.foveate["regions"] == whole.foveate["regions"]
        if end is not None:
            assert end.choices == [] and end.usage.completion_tokens == 20
            assert all(one.usage is None for one in (first, *rest))


def test_what_ends_an_answer(client: OpenAI) -> None:
    text = create(client, max_tokens=20).choices[0].message.content
    for end in (text[4], text[3:6], [text[5], "never"]):
        first = end if isinstance(end, str) else end[0]
        found = create(client, max_tokens=20, stop=end, logprobs=True).choices[0]
        assert found.message.content == text[: text.index(first)].strip() and found.finish_reason == "stop"
        assert len(found.logprobs.content) < 20
        live = create(client, max_tokens=20, stop=end, stream=True)
        pieces = [one.choices[0].delta.content or "" for one in live]
        assert "".join(pieces) == found.message.content
    assert create(client, max_completion_tokens=2).usage.completion_tokens == 2


def test_drawing(client: OpenAI) -> None:
    how = {"temperature": 1.0, "seed": 7, "top_p": 0.9, "max_tokens": 12}
    texts = {create(client, **how).choices[0].message.content for _ in range(3)}
    assert len(texts) == 1 and texts != {create(client, **{**how, "seed": 8}).choices[0].message.content}


def test_many_clients_get_the_answers_of_one(client: OpenAI, model: Foveate) -> None:
    pictures = [picture(64, 64, seed=i) for i in range(3)]
    asked = [(i % 3, f"What is {i % 4}?") for i in range(24)]
    with ThreadPoolExecutor(12) as pool:
        answers = pool.map(lambda one: create(client, user(one[1], pictures[one[0]])), asked)
        texts = [answer.choices[0].message.content for answer in answers]
    alone = {one: model.ask(pictures[one[0]], one[1], max_new_tokens=WORDS).text for one in {*asked}}
    assert texts == [alone[one] for one in asked] and len({*alone.values()}) > 2


def test_conversations(client: OpenAI) -> None:
    """Several pictures and turns, a system message, and an answer sent back as it came."""
    one = create(client, user("Which is larger?", IMAGE, picture(40, 40)))
    assert one.usage.prompt_tokens_details.image_tokens == 32
    assert [look["picture"] for look in one.foveate["views"]] == [0, 1]
    told = [{"role": "system", "content": "Be brief."}, user("What is it?", IMAGE)]
    first = create(client, *told)
    said = first.choices[0].message.model_dump()
    second = create(client, *told, said, user("Sure?"))
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens
    assert create(client, {"role": "user", "content": "No picture?"}).foveate["views"] == []
    for system in ("developer", "system"):
        typed = create(
            client, {"role": system, "content": [{"type": "text", "text": "</s>"}]}, user("<image>?")
        )
        assert typed.usage.prompt_tokens_details.image_tokens == 0


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"n": 2}, "n", "n is not supported: leave it out, or give 1"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "tools is not supported"),
    ({"extra_body": {"top_k": 3}}, "top_k", "top_k is not supported"),
    ({"frequency_penalty": 0.5}, "frequency_penalty", "is not supported"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "is not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format.type", "is not supported"),
    ({"temperature": 3}, "temperature", "less than or equal to 2"),
    ({"temperature": -1}, "temperature", "greater than or equal to 0"),
    ({"temperature": "hot"}, "temperature", "valid number"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": "7"}, "max_tokens", "valid integer"),
    ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
    ({"max_tokens": True}, "max_tokens", "valid integer"),
    ({"max_tokens": 1501}, "None", "may have 1500 tokens at most"),
    ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens", "two names of one bound"),
    ({"seed": 2**70}, "seed", "less than"),
    ({"stop": ["a"] * 5}, "stop", "at most 4"),
    ({"stop": ""}, "stop[0]", "at least 1"),
    ({"stop": 5}, "stop", "valid list"),
    ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": "Hello"}, "messages", "valid list"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[0]", "'tool'"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "field required"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "valid string"),
    ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages[0].name", "not supported"),
    ({"messages": [{"role": "user", "content": " "}]}, "None", "a message is empty"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "None", "the last message must be the user's"),
    (
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
        "messages[0].content[0]",
        "'input_audio'",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 5}}]}]},
        "messages[0].content[0].image_url.url",
        "valid string",
    ),
    (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "data:,", "detail": "low"}}],
                }
            ]
        },
        "messages[0].content[0].image_url.detail",
        "'auto' or 'high'",
    ),
    ({"messages": [{"role": "user", "content": "What? " * 3000}]}, "None", "the LLM has 2048 positions"),
]


@pytest.mark.parametrize(("given", "param", "said"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_is_refused(given: dict[str, Any], param: str, said: str, client: OpenAI) -> None:
    messages = given.get("messages", [{"role": "user", "content": "Hello?"}])
    rest = {key: value for key, value in given.items() if key != "messages"}
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model=NAME, messages=messages, **rest)
    assert said in error.value.message and str(error.value.param) == param
    assert error.value.type == "invalid_request_error" and len(error.value.message) < 400


def huge_png(side: int, size: int) -> bytes:
    """A PNG file that says it is so large, of this many bytes."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(bytes(size), 0)), (b"IEND", b"")]
    packed = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_a_huge_picture_costs_nothing(listener: Listener) -> None:
    url = f"data:image/png;base64,{base64.b64encode(huge_png(50_000, 10**6)).decode()}"
    part = {"type": "image_url", "image_url": {"url": url}}
    body = json.dumps({"model": NAME, "messages": [{"role": "user", "content": [part]}]}).encode()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    reply = ask(listener, "/v1/chat/completions", body)
    seconds = time.perf_counter() - start
    assert reply.status == 400 and "50000 x 50000 pixels are more than max_pixels" in reply.error["message"]
    assert reply.error["param"] == "messages[0].content[0].image_url.url"
    assert seconds < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


def post(listener: Listener, body: Any) -> Reply:
    return ask(listener, "/v1/chat/completions", body)


def test_bodies_that_are_no_requests(listener: Listener) -> None:
    for body in (
        b"",
        b"{",
        b"null",
        b'{"model": "tiny", "messages": NaN}',
        b"[" * 1000,
        b'{"model": 5}',
        b"{}",
    ):
        assert 400 <= post(listener, body).status < 500 and post(listener, body).error["message"]
    nan = b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": 1e999}'
    assert post(listener, nan).error["param"] == "temperature"
    many = {"model": NAME, "messages": [user("Which?", *[picture(9, 9)] * 100)]}
    reply = post(listener, many)
    assert reply.status == 400 and "has 100 pictures, at most 4" in reply.error["message"]


def test_a_client_that_leaves_frees_its_place(server: Server, listener: Listener) -> None:
    for stream in (True, False):
        body = {"model": NAME, "messages": [user("What is it?", IMAGE)], "max_tokens": 1500, "stream": stream}
        content = json.dumps(body).encode()
        before = server.scheduler.counts.cancelled
        with plug(listener) as wire:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
            wire.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
            wait_for(lambda: server.scheduler.active == 1)
            if stream:
                assert b"200 OK" in wire.recv(4096)
        wait_for(lambda n=before: server.scheduler.active == 0 and server.scheduler.counts.cancelled == n + 1)
        assert server.serving.pictures.room.taken == 0


def test_a_full_queue_says_when_to_come_back(model: Foveate) -> None:
    small = Server(model, Serving(NAME, bounds=Bounds(places=1, waiting=1, new_tokens=1500)))
    with served(small.app) as listener:
        client = OpenAI(base_url=listener.url, api_key="none", max_retries=0)
        running = [create(client, max_tokens=1500, stream=True)]
        with ThreadPoolExecutor(1) as pool:
            waits = pool.submit(create, client, max_tokens=2)
            wait_for(lambda: small.scheduler.waiting == 1)
            assert ask(listener, "/ready").status == 503 and ask(listener, "/health").status == 200
            with pytest.raises(openai.InternalServerError, match="wait already") as error:
                create(client, max_tokens=2)
            assert error.value.status_code == 503 and error.value.code == "overloaded"
            assert int(error.value.response.headers["Retry-After"]) >= 1
            running[0].close()
            assert waits.result().usage.completion_tokens == 2
        page = ask(listener, "/metrics").body.decode()
        for line in ("foveate_answers_total 1.0", "foveate_cancelled_total 1.0", "foveate_waiting 0.0"):
            assert line in page.splitlines()
        assert "foveate_first_token_seconds_count 1.0" in page
    assert not small.scheduler.alive


def test_a_late_answer_and_a_fault(model: Foveate, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Server(model, Serving(NAME, bounds=Bounds(seconds=0.2, new_tokens=1500)))
    with served(slow.app) as listener:
        client = OpenAI(base_url=listener.url, api_key="none", max_retries=0)
        with pytest.raises(openai.InternalServerError, match=r"longer than 0\.2 s") as error:
            create(client, max_tokens=1500)
        assert error.value.status_code == 504
        with pytest.raises(openai.APIError, match=r"longer than 0\.2 s"):  # in the middle of a stream
            list(create(client, max_tokens=1500, stream=True))

        def breaks(*arguments: Any, **more: Any) -> Any:
            raise RuntimeError(f"in {__file__}")

        monkeypatch.setattr(model.engine, "encode", breaks)
        with pytest.raises(openai.InternalServerError, match="the server failed: its log says how"):
            create(client, user("What?", picture(31, 31)))


def test_a_stop_lets_streams_end(model: Foveate) -> None:
    stopped = Server(model, Serving(NAME, bounds=Bounds(new_tokens=1500)))
    with served(stopped.app, seconds=30) as listener:
        client = OpenAI(base_url=listener.url, api_key="none", max_retries=0)
        stream = iter(create(client, max_tokens=100, stream=True))
        next(stream)
        listener.stop()
        assert list(stream)[-1].choices[0].finish_reason == "length"
        wait_for(lambda: not stopped.scheduler.alive)
        with pytest.raises(openai.APIConnectionError):
            create(client)
