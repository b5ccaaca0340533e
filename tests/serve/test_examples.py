"""What the page about serving shows, and the options of the examples."""

from __future__ import annotations

import io
import re
import runpy
import shlex
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

import foveate
from foveate.cli import app
from foveate.serve.app import Server, Serving
from tests.docs.blocks import ROOT, blocks_of, commands
from tests.serve.support import ask, served

PAGE = "docs/serving.md"
SHOWN = "python ask_server.py"


def test_the_client_of_the_page_prints_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = list(blocks_of(PAGE))
    (client,) = (block.text for block in blocks if block.title == "ask_server.py")
    (expected,) = (out for block in blocks for command, out in _commands(block) if command == SHOWN)
    monkeypatch.chdir(ROOT)
    model = foveate.load(device="cpu", dtype="float32")
    with served(Server(model, Serving("embedded")).app) as listener:
        path = tmp_path / "ask_server.py"
        path.write_text(client.replace("http://localhost:8000/v1", listener.url))
        out = io.StringIO()
        with redirect_stdout(out):
            runpy.run_path(str(path), run_name="__main__")
        assert out.getvalue().strip() == expected.strip()
        page = {name for name in re.findall(r"`(/\w+)`", (ROOT / PAGE).read_text(encoding="utf-8"))}
        assert {"/health", "/ready", "/metrics"} <= page
        assert {ask(listener, name).status for name in ("/health", "/ready", "/metrics")} == {200}


def _commands(block: Any) -> list[tuple[str, str]]:
    return list(commands(block)) if block.language == "console" else []


def words_of_examples() -> dict[str, list[str]]:
    """The words behind `foveate serve` in each example."""
    compose = yaml.safe_load((ROOT / "examples/compose.yaml").read_text(encoding="utf-8"))
    unit = (ROOT / "examples/foveate.service").read_text(encoding="utf-8")
    (start,) = re.findall(r"^ExecStart=\S+/foveate serve (.*)$", unit, re.MULTILINE)
    service = compose["services"]["foveate"]
    assert 'ENTRYPOINT ["foveate", "serve"]' in service["build"]["dockerfile_inline"]
    return {"compose": service["command"], "unit": shlex.split(start)}


@pytest.mark.parametrize("example", ["compose", "unit"])
def test_options_of_the_examples_are_known(example: str) -> None:
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    given = command.make_context("serve", list(words_of_examples()[example])).params
    assert given["model"].startswith("/") and given["api_key_file"] is not None
    assert given["stop_seconds"] < 40  # what both examples wait before they kill it


def test_every_option_of_the_page_is_known() -> None:
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    named = {*re.findall(r"`(--[\w-]+)`", text)} - {"--json"}
    assert len(named) > 20 and named <= known, named - known
