"""What lacks an optional package is one sentence: the package, the extra that brings it, what installs it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from transformers import Qwen2VLImageProcessorPil

from foveate import FoveateError, annotate, errors, load
from foveate.data.questions import DatasetSource
from foveate.demo.app import check_packages
from foveate.lab.experiment import Experiment, Variant
from foveate.lab.materials import font, materials
from foveate.lab.run import run as run_lab
from foveate.model.text import load_tokenizer
from foveate.serve import cli as serving
from foveate.tiny import tiny_tokenizer
from foveate.train.run import train
from foveate.zoom.detectors import load_detector
from foveate.zoom.vlm import VLM
from tests.conftest import ROOT
from tests.vlms import qwen2_5_vl


def serve() -> None:
    """The command, whose errors are not caught."""
    app = typer.Typer()
    app.command()(serving.serve)
    typer.main.get_command(app).main([], standalone_mode=False)


LORA = "stages.finetune.lora={on: [language_model.model]}"
# module, its package, the extra, and what needs it
DOORS: list[tuple[str, str, str, Callable[[Path], object]]] = [
    ("accelerate", "accelerate", "train", lambda folder: train("tiny", [f"output={folder / 'run'}"])),
    ("tensorboard", "tensorboard", "train", lambda folder: train("tiny", [f"output={folder / 'run'}"])),
    ("peft", "peft", "train", lambda folder: train("tiny", [f"output={folder / 'run'}", LORA])),
    ("sklearn", "scikit-learn", "lab", lambda folder: materials.__wrapped__("test")),
    ("matplotlib", "matplotlib", "lab", lambda folder: font.__wrapped__("DejaVuSans", 12)),
    ("matplotlib", "matplotlib", "lab", lambda folder: run_lab(Experiment((Variant("llava"),)), folder)),
    ("accelerate", "accelerate", "annotate", lambda folder: annotate.processes()),
    ("datasets", "datasets", "annotate", lambda folder: DatasetSource(str(folder), "train", None)),
    ("pyarrow", "pyarrow", "annotate", lambda folder: DatasetSource(str(folder), "train", None)),
    ("bitsandbytes", "bitsandbytes", "quantize", lambda folder: load(quantize="4bit", device="cpu")),
    ("torchvision", "torchvision", "detector", lambda folder: load_detector("faster_rcnn")),
    ("gradio", "gradio", "demo", lambda folder: check_packages()),
    ("sentencepiece", "sentencepiece", "original", load_tokenizer),
    ("google.protobuf", "protobuf", "original", load_tokenizer),
    ("fastapi", "fastapi", "serve", lambda folder: serve()),
    ("uvicorn", "uvicorn", "serve", lambda folder: serve()),
    ("prometheus_client", "prometheus-client", "serve", lambda folder: serve()),
]


@pytest.mark.parametrize(("module", "package", "extra", "door"), DOORS)
def test_every_door_names_what_it_lacks(
    module: str,
    package: str,
    extra: str,
    door: Callable[[Path], object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where the package is not installed: Python's finder does not know it."""
    known = errors.find_spec
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name == module else known(name))
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "tokenizer.model").write_bytes(b"no tokenizer of any kind")
    with pytest.raises(FoveateError) as error:
        door(tmp_path)
    assert str(error.value).endswith(
        f" needs the package {package}: install Foveate's extra {extra}, in a clone with "
        f"pip install -e '.[{extra}]'"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.model"]


def test_a_broken_tokenizer_is_no_missing_package(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"no tokenizer of any kind")
    with pytest.raises(FoveateError, match="no tokenizer that transformers can read"):
        load_tokenizer(tmp_path)


@pytest.mark.skipif(errors.installed("torchvision"), reason="torchvision is here")
def test_a_vlm_whose_processor_needs_torchvision(tmp_path: Path) -> None:
    qwen2_5_vl().model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    Qwen2VLImageProcessorPil().save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"processor_class": "Qwen2_5_VLProcessor"}')
    with pytest.raises(FoveateError, match=r"^the processor in .* needs the package torchvision: "):
        VLM.load(tmp_path, "cpu")


def test_modules_that_are_parts_of_missing_packages() -> None:
    assert errors.installed("foveate.errors")
    assert not errors.installed("no_such_package.part")


def test_extras_bring_what_is_said_of_them() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for _, package, extra, _ in DOORS:
        if package != "pyarrow":  # comes with datasets
            group = re.search(rf"^{extra} = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
            assert group is not None and f'"{package}>' in group[1], f"{extra}: {package}"
