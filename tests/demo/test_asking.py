"""What the page does, without a page: streaming by several models, what can be drawn, and what guards it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import foveate
from foveate import Foveate, FoveateError, Limits
from foveate.ask.answer import Answer
from foveate.demo.app import HERE, Guard, listening
from foveate.demo.asking import (
    Settings,
    Talk,
    costs,
    drawn,
    layers,
    names_of,
    pictures,
    read,
    stream,
    switched_on,
)
from foveate.tiny import tiny_model
from tests.command import foveate as run
from tests.support import picture

SIGNS = Path(foveate.__file__).parent / "demo" / "signs.jpg"


@pytest.fixture(scope="module")
def embedded() -> Foveate:
    return foveate.load(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def chained() -> Foveate:
    return tiny_model("coroi")


def talk(model: Foveate, shown: Image.Image | Path = SIGNS) -> Talk:
    return Talk("some", str(shown), model.chat(shown))


def test_two_models_stream_at_once(embedded: Foveate, chained: Foveate) -> None:
    talks = [talk(embedded), talk(chained)]
    got = [*stream(talks, "what word is on the sign?", Settings(max_new_tokens=6))]
    for number, one in enumerate(talks):
        pieces = [piece for n, piece in got if n == number]
        assert isinstance(pieces[-1], Answer) and pieces[-1] is one.chat.last
        assert "".join(str(piece) for piece in pieces[:-1]).strip() == pieces[-1].text
        assert len(pieces) > 2
    assert got[-1][1].text == "open" or talks[0].chat.last.text == "open"  # type: ignore[union-attr]


def test_who_leaves_stops_the_model(chained: Foveate) -> None:
    one = talk(chained, picture(30, 40))
    answers = stream([one], "Why?", Settings(max_new_tokens=1500))
    next(answers)
    answers.close()
    assert one.chat.last is not None and one.chat.last.ledger.new_tokens < 1000


def test_what_a_model_raises_is_raised(embedded: Foveate) -> None:
    with pytest.raises(FoveateError, match="the question is empty"):
        [*stream([talk(embedded)], "  ", Settings())]


def test_questions_are_alone_or_remember(embedded: Foveate) -> None:
    one = talk(embedded)
    for remember, messages in ((False, 2), (False, 2), (True, 4)):
        [*stream([one], "what word is on the sign?", Settings(max_new_tokens=4, remember=remember))]
        assert len(one.chat.messages) == messages
    sampled = Settings(temperature=0.5).generation
    assert sampled == {"max_new_tokens": 256, "do_sample": True, "temperature": 0.5}


def test_layers_and_their_drawing(embedded: Foveate, chained: Foveate) -> None:
    one, other = talk(embedded), talk(chained)
    [*stream([one, other], "what word is on the sign?", Settings(max_new_tokens=4))]
    views = layers(one)
    assert [*views] == ["1 global", *(f"{n} tile" for n in range(2, 11))]
    assert switched_on([*views]) == [*views]
    chains = layers(other)
    assert [*chains] == ["1 global", "chain 2x", "chain 3x", "chain 4x"] and len(chains["chain 2x"]) == 4
    assert switched_on([*chains]) == ["chain 2x", "chain 3x", "chain 4x"]
    assert switched_on(["1 global", "region 1"]) == ["region 1"]
    shown = one.chat.picture
    plain, some = drawn(shown, {}), drawn(shown, {"2 tile": views["2 tile"]})
    assert plain.size != some.size  # numbers stand around the picture
    assert len(pictures(one.chat.views())) == 10
    ledger = costs(one.chat.last.ledger)  # type: ignore[union-attr]
    assert ledger["visual tokens"] == "511" and "seconds to generate" in ledger


def test_names_and_errors_do_not_tell_where_files_lie(tmp_path: Path, embedded: Foveate) -> None:
    (tmp_path / "a" / "net").mkdir(parents=True)
    (tmp_path / "b" / "net").mkdir(parents=True)
    models = [None, str(tmp_path / "a" / "net"), str(tmp_path / "b" / "net"), "someone/net"]
    assert names_of(models) == ["embedded", "net", "net (3)", "someone/net"]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(FoveateError) as error:
        read(str(tmp_path / "broken.png"), Limits(), embedded)
    assert str(error.value).startswith("broken.png ") and str(tmp_path) not in str(error.value)
    picture(30, 40).save(tmp_path / "large.png")
    with pytest.raises(FoveateError, match="more than max_pixels 100"):
        read(str(tmp_path / "large.png"), Limits(max_pixels=100), embedded)


# The guard before the page.


def answered(
    guard: Guard, headers: Mapping[str, str], chunks: tuple[bytes, ...] = (b"",)
) -> tuple[int, dict[str, str]]:
    """Status and headers of what a guard lets a request get."""
    waiting, sent = [*chunks], []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "headers": [(k.encode(), v.encode()) for k, v in headers.items()]}
    asyncio.run(guard(scope, receive, send))
    return sent[0]["status"], {k.decode(): v.decode() for k, v in sent[0]["headers"]}


async def echo(scope: Any, receive: Any, send: Any) -> None:
    more = True
    while more:
        more = (await receive())["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


def test_the_guard() -> None:
    guard = Guard(echo, 10, HERE)
    status, headers = answered(guard, {"host": "127.0.0.1:80"})
    assert status == 200 and "default-src 'self'" in headers["content-security-policy"]
    assert answered(guard, {"host": "localhost"})[0] == answered(guard, {"host": "[::1]:80"})[0] == 200
    assert answered(guard, {"host": "evil.example:80"})[0] == answered(guard, {})[0] == 421
    assert answered(Guard(echo, 10, None), {"host": "evil.example"})[0] == 200
    assert answered(guard, {"host": "localhost", "content-length": "11"})[0] == 413
    assert answered(guard, {"host": "localhost", "content-length": "-1"})[0] == 413
    assert answered(guard, {"host": "localhost"}, (b"12345", b"67890"))[0] == 200
    assert answered(guard, {"host": "localhost"}, (b"12345", b"678901"))[0] == 413


def test_a_port_that_is_taken() -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    with taken, pytest.raises(FoveateError, match="cannot be listened at"):
        listening("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(FoveateError, match="cannot be listened at"):
        listening("no.such.host.invalid", 0)


def test_wrong_input_is_one_sentence() -> None:
    result = run("demo", "--model", "a", "--model", "a")
    assert result.code == 2 and len(result.stderr.splitlines()) == 1
    assert "names one model twice" in result.stderr
