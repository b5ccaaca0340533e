"""The door of every server: keys, bounds, errors, slow clients, a stop in the middle of an answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest
from fastapi import Request
from PIL import Image
from starlette.responses import Response

from foveate import FoveateError
from foveate.picture.limits import Limits
from foveate.serve.http import (
    DONE,
    Door,
    Events,
    Listener,
    Metrics,
    Pictures,
    Place,
    Refused,
    Room,
    answer,
    event,
    is_local,
    new_app,
    note,
    read_json,
    same,
    unless_gone,
)
from tests.serve.support import Reply, ask, data_url, plug, served, wait_for
from tests.support import picture

KEY = "a-key"
AUTHORISED = {"Authorization": f"Bearer {KEY}"}


class Echo:
    """Routes that read, answer, stream, wait and fail."""

    def __init__(self, door: Door, pictures: Pictures) -> None:
        self.metrics, self.ready = Metrics(), True
        self.app = new_app(door, self.metrics, lambda: self.ready)
        self.closed: list[str] = []
        self.go_on = asyncio.Event()

        @self.app.post("/echo")
        async def echo(request: Request) -> Response:
            value = await read_json(request)
            note(request, f"fields={len(value)}")
            return answer(value)

        @self.app.post("/pictures")
        async def sizes(request: Request) -> Response:
            value = await read_json(request)
            urls = [(url, f"pictures[{i}]") for i, url in enumerate(value["pictures"])]
            return answer([image.size for image in await pictures.read(request, urls)])

        @self.app.post("/wait")
        async def wait(request: Request) -> Response:
            await request.body()

            async def work() -> str:
                try:
                    await asyncio.sleep(60)
                finally:
                    self.closed.append("wait")
                return "never"

            return answer(await unless_gone(request, work))

        @self.app.post("/stream")
        async def stream(request: Request) -> Response:
            value = await read_json(request)

            async def source() -> AsyncGenerator[bytes, None]:
                try:
                    for i in range(value["number"]):
                        yield event({"i": i, "filling": "x" * value.get("size", 0)})
                        await asyncio.sleep(value.get("pause", 0))
                    yield DONE
                finally:
                    self.closed.append("stream")

            return Events(source())

        @self.app.post("/fail")
        async def fail(request: Request) -> Response:
            await request.body()
            raise RuntimeError(f"of {__file__}")

        @self.app.post("/wrong")
        async def wrong(request: Request) -> Response:
            raise FoveateError("it is wrong")


@pytest.fixture(scope="module")
def echo() -> Echo:
    door = Door.at("127.0.0.1", KEY, max_body=2**16, max_bodies=2**17, seconds=0.5, stall=0.5)
    return Echo(door, Pictures(Limits(max_pixels=10_000), most=3, room=20_000))


@pytest.fixture(scope="module")
def listener(echo: Echo) -> Iterator[Listener]:
    with served(echo.app) as found:
        yield found


def post(listener: Listener, path: str, body: Any, **headers: str) -> Reply:
    return ask(listener, path, body, {**AUTHORISED, **headers})


def test_a_request_is_answered_counted_and_logged_without_its_content(
    listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "foveate.serve"):
        reply = post(listener, "/echo", {"secret words": [1, "ä"]})
        wait_for(lambda: caplog.records)
    assert reply.status == 200 and reply.body == '{"secret words":[1,"ä"]}'.encode()
    name = reply.headers["x-request-id"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{name} POST /echo 200 ") and line.endswith(" in=31 out=25 fields=1")
    assert "secret" not in line and "server" not in reply.headers
    page = post(listener, "/metrics", None).body.decode()
    assert 'foveate_http_requests_total{path="/echo",status="200"} 1.0' in page
    assert "foveate_http_requests_running 1.0" in page  # this one


def test_keys(listener: Listener) -> None:
    for headers in (
        {},
        {"Authorization": "Bearer other"},
        {"Authorization": KEY},
        {"Authorization": "Bearer"},
    ):
        for path in ("/echo", "/metrics", "/nothing"):
            reply = ask(listener, path, {} if path == "/echo" else None, headers)
            assert reply.status == 401 and reply.error["code"] == "invalid_api_key", headers
            assert reply.error["type"] == "authentication_error"
    assert ask(listener, "/health").status == ask(listener, "/ready").status == 200
    assert ask(listener, "/echo", {}, {"Authorization": f"bearer  {KEY} "}).status == 200
    assert same("ключ", "ключ") and not same("", "a")
    assert repr(Door(KEY)).count(KEY) == 0


def test_readiness(echo: Echo, listener: Listener) -> None:
    echo.ready = False
    reply = ask(listener, "/ready")
    echo.ready = True
    assert reply.status == 503 and reply.headers["retry-after"] == "1" and reply.error["code"] == "overloaded"


def test_where_a_server_may_listen_without_a_key() -> None:
    assert all(map(is_local, ("localhost", "127.0.0.1", "127.9.9.9", "::1", "[::1]")))
    assert not any(map(is_local, ("0.0.0.0", "::", "10.0.0.1", "example.org", "")))
    for host in ("0.0.0.0", "::", "example.org"):
        with pytest.raises(FoveateError, match="other machines can reach"):
            Door.at(host, None)
        assert Door.at(host, None, unlocked=True).hosts is None and Door.at(host, KEY).hosts is None
    for key in ("", "two\nlines", "schlüssel"):
        with pytest.raises(FoveateError, match="the API key must be"):
            Door(key)
    with pytest.raises(FoveateError, match="max_body must be above 0"):
        Door(max_body=0)


def test_no_web_page_reaches_a_local_server_under_another_name() -> None:
    echo = Echo(Door.at("127.0.0.1", None), Pictures())
    with served(echo.app) as listener:
        for host, status in (
            ("localhost:8000", 200),
            ("127.0.0.1", 200),
            ("[::1]:80", 200),
            ("evil.example:8000", 403),
            ("127.0.0.1.evil.example", 403),
            ("", 403),
        ):
            assert ask(listener, "/echo", {}, {"Host": host}).status == status, host
        reply = ask(listener, "/echo", b"{}", {"Content-Type": "text/plain"})
        assert reply.status == 415 and "application/json" in reply.error["message"]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"", 400, "not valid JSON: EOF"),
        (b"{", 400, "not valid JSON"),
        (b'{"a": NaN}', 400, "not valid JSON"),
        (b'{"a": Infinity}', 400, "not valid JSON"),
        (b'{"a": "\xff"}', 400, "not valid JSON"),
        (b'{"a": "\\ud800"}', 400, "not valid JSON"),
        (b"[" * 60_000, 400, "recursion limit"),
        (b'{"a":' * 10_000, 400, "recursion limit"),
        (b"[]", 400, "must be a JSON object"),
        (b"null", 400, "must be a JSON object"),
        (b'{"a": 1}{', 400, "trailing characters"),
        (b"1" * 60_000, 400, "number out of range"),
        (b"x" * 2**17, 413, "larger than 65536 bytes"),
    ],
)
def test_bodies_that_are_refused(body: bytes, status: int, said: str, listener: Listener) -> None:
    reply = post(listener, "/echo", body)
    assert reply.status == status and said in reply.error["message"]


def test_numbers_that_are_not_finite_are_null(listener: Listener) -> None:
    assert post(listener, "/echo", b'{"a": 1e999}').body == b'{"a":null}'


def test_a_body_of_very_many_values_is_refused(monkeypatch: pytest.MonkeyPatch, listener: Listener) -> None:
    monkeypatch.setattr("foveate.serve.http.MOST_MARKS", 100)
    assert post(listener, "/echo", {"a": [0] * 90}).status == 200
    for value in ([0] * 110, [[]] * 60, [{}] * 60):
        assert post(listener, "/echo", {"a": value}).status == 413


def test_unknown_paths_and_ways(listener: Listener) -> None:
    assert post(listener, "/nothing", {}).error["message"] == "there is nothing at this path"
    reply = ask(listener, "/echo", headers=AUTHORISED)
    assert reply.status == 405 and reply.error["type"] == "invalid_request_error"
    for path in ("/docs", "/openapi.json", "/redoc", "/echo/"):
        assert ask(listener, path, headers=AUTHORISED).status == 404


def test_a_fault_of_the_server_tells_the_log_alone(
    listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    reply = post(listener, "/fail", {})
    assert reply.status == 500 and reply.error["type"] == "server_error"
    assert "support" not in reply.body.decode() and "test_http" not in reply.body.decode()
    assert any(record.exc_info for record in caplog.records)
    assert post(listener, "/wrong", {}).error["message"] == "it is wrong"


def head(length: int, path: str = "/echo") -> bytes:
    lines = f"POST {path} HTTP/1.1", "Host: here", f"Authorization: Bearer {KEY}"
    return "\r\n".join(
        (*lines, "Content-Type: application/json", f"Content-Length: {length}", "", "")
    ).encode()


def test_a_body_that_grows_beyond_its_bound_is_refused_on_the_way(listener: Listener) -> None:
    """Without a length, and with one that is refused before anything is sent."""
    with plug(listener) as wire:
        chunked = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        wire.sendall(chunked + b"".join(b"4000\r\n" + b" " * 2**14 + b"\r\n" for _ in range(5)))
        assert wire.recv(4096).startswith(b"HTTP/1.1 413 ")
    with plug(listener) as wire:
        wire.sendall(head(2**17))
        assert wire.recv(4096).startswith(b"HTTP/1.1 413 ")
    with plug(listener) as wire:
        wire.sendall(head(0).replace(b"Length: 0", b"Length: many"))
        assert wire.recv(4096).startswith(b"HTTP/1.1 4")


def test_a_slow_client_is_told_so(echo: Echo, listener: Listener) -> None:
    with plug(listener) as wire:
        wire.sendall(head(100) + b'{"a":')
        reply = wire.recv(4096)
    assert reply.startswith(b"HTTP/1.1 408 ") and b"connection: close" in reply.lower()
    wait_for(lambda: gate(echo).bodies.taken == 0)


def gate(echo: Echo) -> Any:
    """The middleware, of which the app has one."""
    layer = echo.app.middleware_stack
    while type(layer).__name__ != "Gate":
        layer = layer.app
    return layer


def test_a_client_that_takes_nothing_is_cut_off(echo: Echo, listener: Listener) -> None:
    before = len(echo.closed)
    with plug(listener) as wire:
        body = b'{"number": 100000, "size": 100000}'
        wire.sendall(head(len(body), "/stream") + body)
        wait_for(lambda: len(echo.closed) > before)


def test_a_client_that_leaves_ends_what_was_done_for_it(
    echo: Echo, listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "foveate.serve")
    for path, body in (("/stream", b'{"number": 1000, "pause": 0.05}'), ("/wait", b"{}")):
        before = len(echo.closed)
        wire = plug(listener)
        wire.sendall(head(len(body), path) + body)
        if path == "/stream":
            assert b"200 OK" in wire.recv(4096)
        wait_for(lambda: echo.metrics.running._value.get() > 0)
        wire.close()
        wait_for(lambda n=before: len(echo.closed) > n)
    wait_for(lambda: sum(" 499 " in record.getMessage() for record in caplog.records) == 2)
    wire = plug(listener)  # in the middle of its request
    wire.sendall(head(100) + b"{")
    wire.close()
    wait_for(lambda: sum(" 499 " in record.getMessage() for record in caplog.records) == 3)
    assert gate(echo).bodies.taken == 0


def test_streams_end_with_the_mark_of_openai(listener: Listener) -> None:
    reply = post(listener, "/stream", {"number": 2})
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.body.endswith(b'data: {"i":1,"filling":""}\n\ndata: [DONE]\n\n')


def test_room_for_all() -> None:
    room = Room(10, "cups")
    room.take(6)
    with pytest.raises(Refused, match="holds as many cups as it may") as full:
        room.take(5)
    assert full.value.status == 503 and full.value.headers["Retry-After"] == "1"
    with pytest.raises(Refused, match="needs 11 cups, at most 10") as never:
        room.take(11)
    assert never.value.status == 413
    room.give_back(6)
    room.take(10)


def test_pictures_of_a_request(echo: Echo, listener: Listener) -> None:
    good = data_url(picture(20, 30))
    assert post(listener, "/pictures", {"pictures": [good, good]}).body == b"[[30,20],[30,20]]"
    letters = good.partition(",")[2]
    truncated = f"data:image/png;base64,{letters[: len(letters) // 8 * 4]}"
    for url, said in (
        (data_url(picture(101, 100)), "more than max_pixels 10000"),
        ("data:image/png;base64,", "it is empty"),
        ("data:image/png;base64,!!!", "not valid base64"),
        ("data:image/png;base64,AAAA", "cannot be read as a picture"),
        ("data:image/png", "no comma"),
        (truncated, "cannot be read as a picture"),
        ("file:///etc/passwd", "must be a URL that starts with data:image/"),
        ("/etc/passwd", "must be a URL"),
        ("", "must be a URL"),
        ("ftp://example.org/a.png", "must be a URL"),
        ("https://example.org/a.png", "--allow-urls"),
    ):
        reply = post(listener, "/pictures", {"pictures": [good, url]})
        assert reply.status == 400 and said in reply.error["message"], url[:60]
        assert reply.error["param"] == "pictures[1]"
    reply = post(listener, "/pictures", {"pictures": [""] * 100})
    assert reply.status == 400 and "has 100 pictures, at most 3" in reply.error["message"]
    large = data_url(Image.new("RGB", (100, 100)))
    reply = post(listener, "/pictures", {"pictures": [large] * 3})
    assert reply.status == 503 and "holds as many pixels" in reply.error["message"]
    assert post(listener, "/pictures", {"pictures": [large] * 2}).status == 200  # room was given back


def test_an_address_inside_of_the_network_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    echo = Echo(Door(), Pictures(urls=True))
    with served(echo.app) as listener, caplog.at_level(logging.INFO, "foveate.serve"):
        url = f"http://localhost:{listener.place.port}/health?token=secret"
        reply = ask(listener, "/pictures", {"pictures": [url]})
    assert (
        reply.status == 400 and "no picture could be fetched from http://localhost" in reply.error["message"]
    )
    assert "127.0.0.1" not in reply.error["message"] and "secret" not in reply.error["message"]
    assert any("not a public address" in record.getMessage() for record in caplog.records)


def test_a_stop_lets_answers_end() -> None:
    echo = Echo(Door(), Pictures())
    with served(echo.app) as listener, plug(listener) as wire:
        body = b'{"number": 12, "pause": 0.05}'
        wire.sendall(head(len(body), "/stream") + body)
        got = wire.recv(4096)
        listener.stop()
        while piece := wire.recv(4096):
            got += piece
        assert got.rstrip().endswith(b"0") and DONE in got
        with pytest.raises(OSError):
            plug(listener)


def test_places() -> None:
    with pytest.raises(FoveateError, match="port must be from 0 to 65535"):
        Place(port=65536)
    with pytest.raises(FoveateError, match="at least 1"):
        Place(seconds=0)
    echo = Echo(Door(), Pictures())
    with served(echo.app) as listener:
        assert listener.url == f"http://127.0.0.1:{listener.place.port}/v1"
        with pytest.raises(FoveateError, match="cannot be listened at: Address already in use"):
            Listener(echo.app, listener.place)
    with pytest.raises(FoveateError, match=r"nowhere\.invalid:1 cannot be listened at"):
        Listener(echo.app, Place("nowhere.invalid", 1))
