"""Errors under a transformers that is newer than the tested ones say so; others are as they are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from foveate import versions

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


# Each call in a child of one process, which has imported what takes long.
RUNNER = """
import os, sys, traceback
import torch
import transformers.models.llama.modeling_llama as m
def forward(self, *, other): ...
m.LlamaForCausalLM.forward = forward
for code in sys.argv[1:]:
    if not os.fork():
        try:
            exec(code, {})
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 1, code
    print("--- the next ---", file=sys.stderr, flush=True)
"""


@pytest.mark.skipif(sys.version_info < (3, 11), reason="untested versions of transformers need Python 3.11")
def test_every_door_says_it(tmp_path: Path) -> None:
    """With a transformers that calls itself 9.1.0 and whose LLM takes other arguments."""
    from foveate.tiny import tiny_model
    from tests.support import picture

    tiny, image = str(tmp_path / "tiny"), str(tmp_path / "picture.png")
    tiny_model("llava").save(tiny)
    picture(60, 90).save(image)
    metadata = tmp_path / "newer" / "transformers-9.1.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 9.1.0\n")
    path = os.pathsep.join([str(metadata.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.run(
        [sys.executable, "-c", RUNNER, *(call.format(tiny=tiny, picture=image) for call in CALLS.values())],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    errors = process.stderr.split("--- the next ---\n")[:-1]
    for door, error in zip(CALLS, errors, strict=True):
        assert error.count(NEWER) == 1, f"{door}: {error}"
        assert re.search(INSTALL, error), door
        assert "TypeError" in error, door
