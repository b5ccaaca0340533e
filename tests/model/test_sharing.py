"""Saved folders in interpreters that never said `import foveate`, and in those that did."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

import foveate
from foveate import FoveateConfig, FoveateProcessor
from foveate.data.toy import write_toy_data
from foveate.model.sharing import CODE, IMAGE_PROCESSORS, MODELS, PROCESSORS
from foveate.tiny import tiny_model
from foveate.train.run import train
from tests.command import foveate as run_foveate
from tests.conftest import ROOT
from tests.train.support import stage, write_recipe

# Imports transformers once, then forks: each child is an interpreter without foveate. Prints what they print.
RUNNER = """
import json, os, sys, traceback
import transformers.pipelines
from transformers import AutoModelForImageTextToText, AutoProcessor
assert "foveate" not in sys.modules
answers = {}
for name, code in json.loads(sys.stdin.read()).items():
    read, write = os.pipe()
    if not os.fork():
        os.close(read)
        os.dup2(write, 1)
        try:
            exec(code, {})
        except BaseException:
            traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
        os._exit(0)
    os.close(write)
    answers[name] = os.fdopen(read, "rb").read().decode()
    os.wait()
sys.stderr.write("ANSWERS" + json.dumps(answers))
"""
MISSING = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "foveate":
            raise ModuleNotFoundError("No module named 'foveate'", name="foveate")
sys.meta_path.insert(0, Missing())
"""


def elsewhere(codes: dict[str, str], cache: Path) -> dict[str, str]:
    """What each piece of code prints in an interpreter that has not imported Foveate."""
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(codes),
        env={**os.environ, "HF_MODULES_CACHE": str(cache), "TRANSFORMERS_VERBOSITY": "error"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "ANSWERS" in done.stderr, done.stderr
    return json.loads(done.stderr.partition("ANSWERS")[2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("shared") / "model"
    tiny_model("anyres").save(made)
    return made


def test_every_auto_class_finds_ours(folder: Path, tmp_path: Path) -> None:
    said = f"{str(folder)!r}, trust_remote_code=True"
    ours = {**MODELS, **IMAGE_PROCESSORS, **PROCESSORS}
    codes = {
        auto: f"from transformers import {auto} as auto\nprint(type(auto.from_pretrained({said})).__name__)"
        for auto in ours
    }
    codes["AutoTokenizer"] = (
        f"from transformers import AutoTokenizer\nprint(len(AutoTokenizer.from_pretrained({said})))"
    )
    parts = [{"type": "image", "image": str(ROOT / "docs/images/anyres.png")}, {"type": "text", "text": "?"}]
    messages = [{"role": "user", "content": parts}]
    codes["pipeline"] = (
        "from transformers import pipeline\n"
        f"ask = pipeline('image-text-to-text', model={said})\n"
        f"print(ask(text={messages}, max_new_tokens=4)[0]['generated_text'][-1]['role'])"
    )
    codes["again"] = (
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        f"for auto in (AutoModelForImageTextToText, AutoProcessor):\n"
        f"    auto.from_pretrained({said}).save_pretrained({str(tmp_path / 'again')!r})\n"
        "print('saved')"
    )
    expected = {**ours, "AutoTokenizer": "266", "pipeline": "assistant", "again": "saved"}
    assert {name: text.strip() for name, text in elsewhere(codes, tmp_path / "modules").items()} == expected
    # saved from there, the folder holds the same: none of the package's source
    assert names(tmp_path / "again") == names(folder)
    for name in ("processor_config.json", CODE.name):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name


def test_without_the_package_it_is_named(folder: Path, tmp_path: Path) -> None:
    codes = {
        auto: f"{MISSING}\nfrom transformers import {auto} as auto\n"
        f"auto.from_pretrained({str(folder)!r}, trust_remote_code=True)"
        for auto in ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor")
    }
    for auto, printed in elsewhere(codes, tmp_path).items():
        last = printed.strip().splitlines()[-1]
        assert last == (
            "ImportError: this model needs the package foveate, which is not installed: run `pip install .` "
            "in a clone of Foveate's repository"
        ), auto


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def trained(folder: Path) -> None:
    data = write_toy_data(folder / "toy", 8)
    recipe = write_recipe(folder, {"all": stage(["connector"], data, steps=1)})
    train(recipe)
    (folder / "run" / "model").rename(folder / "model")


def composed(folder: Path) -> None:
    assert run_foveate("compose", str(folder / "model"), "--tiny", "--method", "llava").code == 0


def converted(folder: Path) -> None:
    tiny_model("llava").save(folder / "before")
    for name in ("config.json", "processor_config.json"):  # as of a version that wrote no auto_map
        values = json.loads((folder / "before" / name).read_text())
        del values["auto_map"]
        (folder / "before" / name).write_text(json.dumps(values))
    (folder / "before" / CODE.name).unlink()
    assert run_foveate("convert", str(folder / "before"), str(folder / "model")).code == 0


WRITERS: dict[str, Callable[[Path], None]] = {"train": trained, "compose": composed, "convert": converted}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_writer_names_the_classes(writer: str, tmp_path: Path) -> None:
    WRITERS[writer](tmp_path)
    folder = tmp_path / "model"
    assert (folder / CODE.name).read_bytes() == CODE.read_bytes()
    assert not {path.name for path in folder.glob("*.py")} - {CODE.name}
    read = json.loads((folder / "config.json").read_text())["auto_map"]
    assert read == {auto: f"foveate_classes.{ours}" for auto, ours in MODELS.items()}
    processor = json.loads((folder / "processor_config.json").read_text())
    assert processor["auto_map"] == {"AutoProcessor": "foveate_classes.FoveateProcessor"}
    assert processor["image_processor"]["auto_map"] == {
        "AutoImageProcessor": "foveate_classes.FoveateImageProcessor"
    }


def test_parts_that_are_saved_alone(folder: Path, tmp_path: Path) -> None:
    processor = FoveateProcessor.from_pretrained(folder)
    processor.image_processor.save_pretrained(tmp_path / "images")
    FoveateConfig.from_pretrained(folder).save_pretrained(tmp_path / "config")
    for name, file, auto in (
        ("images", "preprocessor_config.json", "AutoImageProcessor"),
        ("config", "config.json", "AutoConfig"),
    ):
        assert auto in json.loads((tmp_path / name / file).read_text())["auto_map"]
        assert (tmp_path / name / CODE.name).is_file()


def test_nobody_is_asked_where_foveate_is_imported(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor does the folder's file run."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    for said in ({}, {"trust_remote_code": True}):
        assert type(AutoConfig.from_pretrained(folder, **said)) is foveate.FoveateConfig
        assert type(AutoProcessor.from_pretrained(folder, **said)) is foveate.FoveateProcessor
        assert type(AutoImageProcessor.from_pretrained(folder, **said)) is foveate.FoveateImageProcessor
        model = AutoModelForImageTextToText.from_pretrained(folder, **said)
        assert type(model) is foveate.FoveateForConditionalGeneration
        assert len(AutoTokenizer.from_pretrained(folder, **said)) == 266
    assert "[y/N]" not in capsys.readouterr().out
    assert not [name for name in sys.modules if "foveate_classes" in name]


def test_a_folder_s_word_on_its_code_is_not_passed_on(folder: Path, tmp_path: Path) -> None:
    config = FoveateConfig.from_dict(
        {**FoveateConfig.from_pretrained(folder).to_dict(), "auto_map": {"AutoModel": "stranger--code.Model"}}
    )
    assert not any("stranger" in name for name in config.auto_map.values())  # trl and vLLM read it
    config.save_pretrained(tmp_path)
    assert "stranger" not in (tmp_path / "config.json").read_text()
