"""Errors under a transformers that is newer than the tested ones say so; others are as they are."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from foveate import versions
from foveate.tiny import tiny_model
from tests import forked
from tests.support import picture

NEWER = "transformers 9.1.0 is newer than those that Foveate 0.1.0 was tested with"
INSTALL = r"pip install 'transformers(<[\d.]+,>=[\d.]+|>=[\d.]+,<[\d.]+)'"


def moved() -> None:
    raise TypeError("forward() got an unexpected keyword argument 'memory'")


def notes_of(version: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: version if name == "transformers" else real(name))
    with pytest.raises(TypeError, match="memory") as caught:
        versions.names_versions(versions.names_versions(moved))()
    return getattr(caught.value, "__notes__", [])


@pytest.mark.parametrize("version", ["9.1.0", "5.999.0.dev0", "6.0.0"])
def test_newer_is_named_once(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (note,) = notes_of(version, monkeypatch)
    assert note.startswith(f"transformers {version} is newer than")
    assert re.search(INSTALL, note)


def test_the_first_untested_version_is_newer_while_it_is_developed(monkeypatch: pytest.MonkeyPatch) -> None:
    (note,) = notes_of("9.0", monkeypatch)
    first = re.search(r"<([\d.]+)", note)
    assert first is not None
    (note,) = notes_of(f"{first[1]}.0.dev0", monkeypatch)
    assert "is newer than" in note


def test_older_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    (note,) = notes_of("4.57.1", monkeypatch)
    assert "transformers 4.57.1 is older than" in note


@pytest.mark.parametrize("version", ["5.18.0", "5.20.2"])
def test_tested_versions_get_none(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert notes_of(version, monkeypatch) == []


def test_other_errors_get_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong() -> None:
        raise ValueError("5")

    monkeypatch.setattr(versions, "untested", lambda: "newer")
    with pytest.raises(ValueError, match="5") as caught:
        versions.names_versions(wrong)()
    assert getattr(caught.value, "__notes__", []) == []


CALLS = {
    "python": "import foveate; foveate.load({tiny!r}).ask({picture!r}, 'What is it?')",
    "transformers' class": "from transformers import AutoModelForImageTextToText as A\n"
    "import foveate, torch; A.from_pretrained({tiny!r})(torch.tensor([[1, 5]]))",
    "command": "import sys; from foveate.cli import main\n"
    "sys.argv = ['foveate', 'ask', {picture!r}, 'What is it?', '--model', {tiny!r}]; main()",
}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="untested versions of transformers need Python 3.11")
@pytest.mark.parametrize("door", CALLS)
def test_every_door_says_it(door: str, tmp_path: Path) -> None:
    """With a transformers that calls itself 9.1.0 and whose LLM takes other arguments."""
    tiny, image = str(tmp_path / "tiny"), str(tmp_path / "picture.png")
    tiny_model("llava").save(tiny)
    picture(60, 90).save(image)
    described = tmp_path / "newer" / "transformers-9.1.0.dist-info" / "METADATA"
    described.parent.mkdir(parents=True)
    described.write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 9.1.0\n")

    def forward(self: Any, *, other: Any) -> None: ...

    def work() -> None:
        sys.path.insert(0, str(described.parents[1]))
        LlamaForCausalLM.forward = forward
        exec(CALLS[door].format(tiny=tiny, picture=image), {})

    assert forked.Forked(work, output=tmp_path / "said.txt").wait() == 1
    error = (tmp_path / "said.txt").read_text()
    assert error.count(NEWER) == 1, error
    assert re.search(INSTALL, error)
    assert "TypeError" in error
