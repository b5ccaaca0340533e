"""`look` and `ask` as an agent calls them: the SDK's own client, over standard input and output."""

from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from mcp import Client, StdioServerParameters
from PIL import Image

from foveate import FoveateError
from foveate.picture.limits import Limits
from foveate.serve.mcp import Allowed, Tools, server
from tests.command import foveate
from tests.support import picture
from tests.upstream import upstream

WHOLE = picture(900, 1200)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a picture, and one beside it that is not allowed."""
    inside = tmp_path / "inside"
    inside.mkdir()
    WHOLE.save(inside / "a.png")
    picture(20, 20).save(tmp_path / "secret.png")
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    (inside / "text.png").write_text("no picture")
    return inside


def run(tools: Tools | StdioServerParameters, use: Callable[[Client], Any]) -> Any:
    async def session() -> Any:
        async with Client(server(tools) if isinstance(tools, Tools) else tools) as client:
            return await use(client)

    return anyio.run(session)


def call(tools: Tools, name: str, **arguments: Any) -> Any:
    return run(tools, lambda client: client.call_tool(name, arguments))


def nobody() -> Any:
    raise AssertionError("no model is needed")


def decoded(result: Any) -> tuple[str, Image.Image]:
    text, shown = result.content
    assert not result.is_error and shown.mime_type == "image/png"
    return text.text, Image.open(io.BytesIO(base64.b64decode(shown.data)))


def test_over_standard_input_and_output(folder: Path) -> None:
    """The command in a process of its own: it names its tools, shows pixels, asks a server."""
    with upstream() as behind:
        behind.script = ["[0.5, 0.5, 1.0, 1.0]", "a dog", "a cat"]
        arguments = ["-m", "foveate", "mcp", "--folder", str(folder), "--upstream", behind.url, "--name", "m"]
        command = StdioServerParameters(command=sys.executable, args=arguments, env=dict(PATH_OF_SOURCES))

        async def use(client: Client) -> Any:
            listed = await client.list_tools()
            looked = await client.call_tool("look", {"picture": "a.png", "box": [100, 200, 500, 600]})
            asked = await client.call_tool("ask", {"picture": "a.png", "question": "Who?"})
            wrong = await client.call_tool("ask", {"picture": "../secret.png", "question": "Who?"})
            return listed, looked, asked, wrong

        listed, looked, asked, wrong = run(command, use)
    schemas = {tool.name: tool.input_schema for tool in listed.tools}
    assert set(schemas) == {"look", "ask"} and schemas["look"]["required"] == ["picture"]
    said, shown = decoded(looked)
    assert said == ("a.png has 1200 x 900 pixels; this is [100, 200, 500, 600] of it, at 400 x 400 pixels.")
    assert np.array_equal(np.asarray(shown), np.asarray(WHOLE)[200:600, 100:500])
    found = json.loads(asked.content[0].text)
    assert found["answer"] == "a cat" and found["regions"] == [[570, 428, 1200, 900]]
    assert wrong.is_error and "not in a folder whose pictures may be read" in wrong.content[0].text


PATH_OF_SOURCES = {"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"}


def test_what_look_returns(folder: Path) -> None:
    tools = Tools(Allowed([folder]), nobody)
    said, shown = decoded(call(tools, "look", picture="a.png"))
    assert shown.size == (1200, 900) and "[0, 0, 1200, 900]" in said
    _, shown = decoded(call(tools, "look", picture="a.png", max_pixels=10_000))
    assert shown.width * shown.height <= 10_300
    said, shown = decoded(call(tools, "look", picture="a.png", box=[10, 10, 40, 40]))
    assert shown.size == (336, 336) and "[10, 10, 40, 40]" in said  # enlarged
    said, shown = decoded(call(tools, "look", picture="a.png", box=[1100, 800, 5000, 5000]))
    assert "[1100, 800, 1200, 900]" in said
    _, shown = decoded(call(tools, "look", picture=str(folder / "a.png"), box=[0, 0, 400, 400]))
    assert np.array_equal(np.asarray(shown), np.asarray(WHOLE)[:400, :400])


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"picture": "../secret.png"}, "not in a folder"),
        ({"picture": "/etc/passwd"}, "not in a folder"),
        ({"picture": "link.png"}, "not in a folder"),
        ({"picture": "~/a.png"}, "no picture at"),
        ({"picture": "file:///etc/passwd"}, "not from file"),
        ({"picture": "http://127.0.0.1/a.png"}, "by URL are not allowed"),
        ({"picture": "a\0.png"}, "no picture at"),
        ({"picture": "x" * 5000}, ""),
        ({"picture": ""}, "is a folder"),
        ({"picture": "none.png"}, "no picture at"),
        ({"picture": "text.png"}, "cannot be read"),
        ({"picture": "a.png", "box": [5, 5, 5, 9]}, "no area"),
        ({"picture": "a.png", "box": [2000, 0, 3000, 9]}, "outside the picture"),
        ({"picture": "a.png", "box": [0.1, 0.1, 0.5, 0.5]}, "look like fractions"),
        ({"picture": "a.png", "box": [1, 2, 3]}, "box"),
        ({"picture": "a.png", "box": "left"}, "box"),
        ({"picture": "a.png", "max_pixels": 0}, "max_pixels"),
        ({"picture": 7}, "picture"),
        ({}, "picture"),
    ],
)
def test_calls_that_make_no_sense(folder: Path, arguments: dict[str, Any], why: str) -> None:
    result = call(Tools(Allowed([folder]), nobody), "look", **arguments)
    assert result.is_error and why in result.content[0].text
    assert "Traceback" not in result.content[0].text


def test_bounds_of_pictures(folder: Path) -> None:
    tools = Tools(Allowed([folder], limits=Limits(max_pixels=1000)), nobody)
    assert "more than max_pixels" in call(tools, "look", picture="a.png").content[0].text
    private = Tools(Allowed([folder], urls=True), nobody)
    result = call(private, "look", picture="http://127.0.0.1:1/a.png")
    assert result.is_error and "not a public address" in result.content[0].text


def test_a_model_is_made_when_it_is_asked(folder: Path) -> None:
    """Once, and what it refuses is told."""
    made = []

    class Refusing:
        def ask(self, *args: Any, **more: Any) -> Any:
            raise FoveateError("the question contains <image>")

    tools = Tools(Allowed([folder]), lambda: made.append(1) or Refusing())
    for _ in range(2):
        result = call(tools, "ask", picture="a.png", question="Who?")
        assert result.is_error and "contains <image>" in result.content[0].text
    assert made == [1]


def test_wrong_commands(tmp_path: Path) -> None:
    for options, why in (
        (("--folder", tmp_path / "none"), "there is no folder"),
        (("--upstream", "http://a/v1"), "give it, and no --model"),
        (("--name", "m"), "are for --upstream"),
        (("--upstream", "a", "--name", "m"), "is not the address of a server"),
        (("--upstream", "http://a/v1", "--name", "m", "--zoom", "relevance"), "choose answer or tool"),
        (("--upstream", "http://a/v1", "--name", "m", "--boxes", "xywh"), "unknown box format"),
    ):
        found = foveate("mcp", *options)
        assert found.code == 2 and why in " ".join(found.stderr.split()), found.stderr
