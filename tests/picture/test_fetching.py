"""Pictures by URL, from a server that behaves well, badly, or wants us somewhere else."""

from __future__ import annotations

import base64
import gzip
import io
import socket
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foveate import FoveateError, Limits, Zoom
from foveate.picture import fetching
from foveate.picture.fetching import fetch, named, public
from foveate.picture.geometry import Size
from foveate.picture.reading import read_picture, read_size
from foveate.tiny import tiny_model
from tests.support import chat, picture

HOME = Limits(private=True, seconds=5, max_bytes=200_000)


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


IMAGE = picture(20, 30)
DATA = png(IMAGE)
REDIRECTS = {
    "/file": "file:///etc/passwd",
    "/ftp": "ftp://example.org/a.png",
    "/loop": "/loop",
    "/once": "/good.png",
    "/nowhere": "http://[",
    "/secret": "http://user:hunter2@127.0.0.1/x",
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    seen: list[tuple[str, dict[str, str]]] = []  # noqa: RUF012

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.seen.append((self.path, dict(self.headers)))
        if path in REDIRECTS:
            self.answer(302, b"", Location=REDIRECTS[path])
        elif path == "/lost":
            self.answer(302, b"")
        elif path in ("/good.png", "/caf%C3%A9%20bar.png"):
            self.answer(200, DATA)
        elif path == "/zipped.png":
            self.answer(200, gzip.compress(DATA), **{"Content-Encoding": "gzip"})
        elif path == "/deflated.png":
            self.answer(200, zlib.compress(DATA), **{"Content-Encoding": "deflate"})
        elif path == "/brotli":
            self.answer(200, DATA, **{"Content-Encoding": "br"})
        elif path == "/bomb":
            self.answer(200, gzip.compress(bytes(50_000_000)), **{"Content-Encoding": "gzip"})
        elif path == "/torn":
            self.answer(200, gzip.compress(DATA)[:-20], **{"Content-Encoding": "gzip"})
        elif path == "/lies":
            self.answer(200, DATA[:100], **{"Content-Length": str(len(DATA))})
            self.close_connection = True
        elif path == "/huge":
            self.answer(200, b"", **{"Content-Length": "99999999999"})
        elif path == "/page":
            self.answer(200, b"<!DOCTYPE html><html>Not a picture</html>")
        elif path == "/none":
            self.answer(204, b"")
        elif path in ("/endless", "/slow", "/chunks"):
            self.send_response(200)
            if path == "/chunks":
                self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            piece = {
                "/endless": bytes(65536),
                "/slow": b"x",
                "/chunks": b"10000\r\n" + bytes(65536) + b"\r\n",
            }[path]
            with suppress(OSError):
                for _ in range(500):
                    self.wfile.write(piece)
                    time.sleep(0.1 if path == "/slow" else 0)
            self.close_connection = True
        elif path == "/headers":
            with suppress(OSError):
                self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                for _ in range(500):
                    self.wfile.write(b"X")
                    time.sleep(0.1)
        elif path == "/nonsense":
            self.wfile.write(b"hello there\r\n\r\n")
            self.close_connection = True
        else:
            self.answer(404, b"nothing")

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.daemon_threads = True
    thread = Thread(target=served.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{served.server_address[1]}"
    served.shutdown()
    served.server_close()


@pytest.mark.parametrize(
    "path", ["good.png", "once", "zipped.png", "deflated.png", "good.png?a=1#b", "café bar.png"]
)
def test_a_picture_is_fetched(server: str, path: str) -> None:
    assert np.array_equal(np.asarray(read_picture(f"{server}/{path}", HOME)), np.asarray(IMAGE))
    assert read_size(f"{server.upper()}/{path}", HOME) == Size(20, 30)
    _, headers = Handler.seen[-1]
    assert headers["Host"] == server.removeprefix("http://") and "Authorization" not in headers


BAD = {
    "gone": "404 Not Found",
    "none": "204 No Content",
    "file": "it leads to file, not to http or https",
    "ftp": "it leads to ftp",
    "loop": "it redirects more than 5 times",
    "lost": "it answers 302 without saying where to",
    "nowhere": "not a valid URL",
    "secret": "user name or a password",
    "endless": "larger than max_bytes 200000",
    "chunks": "larger than max_bytes 200000",
    "huge": "larger than max_bytes 200000",
    "bomb": "larger than max_bytes 200000",
    "torn": "the connection broke off",
    "lies": "the connection broke off",
    "brotli": "compressed as br",
    "page": "it is a web page: give the address of the picture itself",
    "nonsense": "not valid HTTP",
}


@pytest.mark.parametrize("path", BAD)
def test_a_bad_answer_is_one_sentence(server: str, path: str) -> None:
    with pytest.raises(FoveateError, match=BAD[path]) as caught:
        read_picture(f"{server}/{path}?token=hunter2", HOME)
    assert f"{server}/{path}" in str(caught.value)
    assert "hunter2" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["slow", "headers"])
def test_the_time_is_bounded_as_a_whole(server: str, path: str) -> None:
    """However often a byte comes."""
    start = time.monotonic()
    with pytest.raises(FoveateError, match=r"it took longer than 0\.5 s"):
        read_picture(f"{server}/{path}", Limits(private=True, seconds=0.5))
    assert time.monotonic() - start < 3


def test_a_slow_resolver_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(2) or [])
    with pytest.raises(FoveateError, match=r"it took longer than 0\.2 s"):
        fetch("http://example.org/a.png", Limits(seconds=0.2))


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "[::]", "2130706433", "0x7f.1"),
        *("0177.0.0.1", "127.1", "10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "100.64.0.1"),
        *("224.0.0.1", "255.255.255.255", "240.0.0.1", "[fe80::1]", "[fc00::1]", "[2002:7f00:1::]"),
        *("[64:ff9b::7f00:1]", "[fec0::1]", "[ff02::1]", "192.0.2.1", "198.18.0.1", "①②⑦.⓪.⓪.①"),
    ],
)
def test_addresses_that_are_not_public(host: str, server: str) -> None:
    port = server.rpartition(":")[2]
    with pytest.raises(FoveateError, match=r"not a public address.*--allow-private|is not known") as caught:
        read_picture(f"http://{host}:{port}/good.png")
    if not host.startswith("["):  # a machine without IPv6 does not know those
        assert "not a public address" in str(caught.value)


def test_public_addresses() -> None:
    assert all(
        map(public, ("8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8", "2002:808:808::"))
    )
    assert not any(
        map(public, ("fe80::1%eth0", "::ffff:10.0.0.1", "64:ff9b::8.8.8.8", "::8.8.8.8", "2001:db8::"))
    )


def resolving(monkeypatch: pytest.MonkeyPatch, answers: dict[str, list[str]], server: str) -> list[Any]:
    """Names mean these addresses, and every connection reaches the server. Returns what was connected to."""
    reached: list[Any] = []
    port = int(server.rpartition(":")[2])
    connect = socket.socket.connect

    def lookup(host: str, at: int, **kwargs: Any) -> list[Any]:
        found = answers[host]
        names = found[:1] if len(found) == 1 else [found.pop(0)]
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (name, at)) for one in names for name in one.split()
        ]

    def redirected(self: socket.socket, address: Any) -> None:
        reached.append(address)
        connect(self, ("127.0.0.1", port))

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setattr(fetching.socket.socket, "connect", redirected)
    return reached


def test_a_name_is_resolved_once(monkeypatch: pytest.MonkeyPatch, server: str) -> None:
    """The connection goes to the address that was checked, and the server hears the name."""
    reached = resolving(monkeypatch, {"cats.example": ["8.8.8.8", "127.0.0.1"]}, server)
    assert fetch("http://cats.example/good.png", Limits(seconds=5)) == DATA
    assert reached == [("8.8.8.8", 80)]
    assert Handler.seen[-1][1]["Host"] == "cats.example"


def test_all_addresses_of_a_name_are_checked(monkeypatch: pytest.MonkeyPatch, server: str) -> None:
    reached = resolving(monkeypatch, {"cats.example": ["8.8.8.8 10.0.0.7"]}, server)
    with pytest.raises(FoveateError, match=r"cats\.example is 10\.0\.0\.7, which is not a public address"):
        fetch("http://cats.example/good.png", Limits(seconds=5))
    assert not reached


def test_a_redirect_into_the_local_network(monkeypatch: pytest.MonkeyPatch, server: str) -> None:
    reached = resolving(monkeypatch, {"cats.example": ["8.8.8.8"], "intern.example": ["192.168.0.9"]}, server)
    monkeypatch.setitem(REDIRECTS, "/inwards", "http://intern.example/good.png")
    with pytest.raises(FoveateError, match=r"intern\.example is 192\.168\.0\.9, which is not a public"):
        fetch("http://cats.example/inwards", Limits(seconds=5))
    assert len(reached) == 1


def test_proxies_of_the_environment_are_not_used(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert fetch(f"{server}/good.png", HOME) == DATA


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("ftp://example.org/a.png", "from http, https, data and file URLs, not from ftp"),
        ("s3://bucket/a.png", "not from s3"),
        ("http://", "it names no host"),
        ("https:///a.png", "it names no host"),
        ("http:/127.0.0.1/a.png", "it names no host"),
        ("http://127.0.0.1:99999/a.png", "not a valid URL"),
        ("http://127.0.0.1:port/a.png", "not a valid URL"),
        ("http://[::1/a.png", "not a valid URL"),
        ("http://me:hunter2@127.0.0.1/a.png", "user name or a password"),
        ("http://me:hunter2@exa\u2100mple.org/a.png", "not a valid URL"),
        ("http://nobody.invalid/a.png", "is not known"),
        ("http://" + "a" * 300 + ".org/a.png", "is not known"),
        ("file://elsewhere/a.png", "a file of another machine"),
        ("file:///nothing/at/all.png", "no picture at /nothing/at/all.png"),
        ("data:image/png", "no comma"),
        ("data:image/png;base64,!!!", "not valid base64"),
        ("data:image/png;base64,é", "not valid base64"),
        ("data:image/png;base64,AAAA", "cannot be read as a picture"),
    ],
)
def test_addresses_that_lead_nowhere(url: str, problem: str) -> None:
    with pytest.raises(FoveateError, match=problem) as caught:
        read_picture(url, HOME)
    assert "hunter2" not in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_data_and_file_urls(tmp_path: Path) -> None:
    code = base64.b64encode(DATA).decode()
    path = tmp_path / "a b.png"
    path.write_bytes(DATA)
    lines = "\n".join(code[i : i + 60] for i in range(0, len(code), 60))
    for url in (
        f"data:image/png;base64,{code}",
        f"DATA:image/png;charset=x;BASE64,{lines}",
        f"data:;base64,{code.rstrip('=')}",
        f"data:;base64,{code.replace('+', '-').replace('/', '_')}",
        f"data:;base64,{code.replace('+', '%2B')}",
        "data:image/png," + "".join(f"%{byte:02x}" for byte in DATA),
        path.as_uri(),
        f"file://localhost{path.as_posix()}",
    ):
        assert np.array_equal(np.asarray(read_picture(url)), np.asarray(IMAGE))
    with pytest.raises(FoveateError, match="larger than max_bytes 100"):
        read_picture(f"data:;base64,{code}", Limits(max_bytes=100))


def test_names_in_messages() -> None:
    assert named("https://a:b@c.org/d.png?e#f") == "https://c.org/d.png"
    assert named("a\nb\udc80\x1b[31m") == "a\\nb\\udc80\\x1b[31m"
    assert len(named("x" * 5000)) < 130
    assert named("data:image/png;base64," + "A" * 999).startswith("data:image/png;base64,A")


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_pixels": 0},
        {"max_bytes": -1},
        {"seconds": 0},
        {"max_pixels": 1.5},
        {"max_bytes": "1"},
        {"seconds": float("nan")},
        {"seconds": float("inf")},
    ],
)
def test_limits_are_numbers_above_0(wrong: dict[str, Any]) -> None:
    with pytest.raises(FoveateError, match=next(iter(wrong))):
        Limits(**wrong)


def test_every_door_fetches_by_the_same_rule(server: str) -> None:
    url, made = f"{server}/good.png", tiny_model()
    images = made.processor.image_processor
    doors: dict[str, Any] = {
        "ask": lambda: made.ask(url, "What?", max_new_tokens=1),
        "chat": lambda: made.chat(url).ask("What?", max_new_tokens=1),
        "processor": lambda: made.processor(images=url, text="<image>What?"),
        "nested": lambda: made.processor(images=[[url]], text=["<image>What?"]),
        "image processor": lambda: images(url),
        "prompt": lambda: made.processor.prompt(chat("What?", url)),
        "zoom": lambda: Zoom(made.model, made.processor, limits=images.limits).ask(
            url, "What?", no_zoom=True
        ),
    }
    for key in ("image", "url", "path"):
        messages = [
            {"role": "user", "content": [{"type": "image", key: url}, {"type": "text", "text": "What?"}]}
        ]
        doors[key] = lambda m=messages: made.processor.apply_chat_template(
            m, tokenize=True, return_dict=True, add_generation_prompt=True
        )
    for name, door in doors.items():
        with pytest.raises(FoveateError, match="not a public address"):
            door()
        images.limits = HOME
        assert door() is not None, name
        images.limits = Limits()


def test_a_folder_cannot_set_limits(tmp_path: Path) -> None:
    import json

    from foveate import FoveateProcessor

    tiny_model().save(tmp_path)
    file = tmp_path / "processor_config.json"
    values = json.loads(file.read_text())
    assert "limits" not in values["image_processor"]
    values["image_processor"]["limits"] = {"private": True}
    file.write_text(json.dumps(values))
    assert FoveateProcessor.from_pretrained(tmp_path).image_processor.limits == Limits()
