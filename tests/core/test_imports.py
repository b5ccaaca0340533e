"""`import foveate` is cheap, and no order of imports matters."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import foveate
from foveate.tiny import tiny_model

# Imports torch once, then forks: each child is an interpreter without transformers and foveate.
RUNNER = """
import json, os, sys, traceback
import torch
failures = {}
for name, code in json.loads(sys.stdin.read()).items():
    read, write = os.pipe()
    if not os.fork():
        try:
            exec(code, {})
            problem = ""
        except BaseException:
            problem = traceback.format_exc()
        os.write(write, problem.encode()[-60000:])
        os._exit(0)
    os.close(write)
    problem = os.fdopen(read, "rb").read().decode()
    os.wait()
    if problem:
        failures[name] = problem
print(json.dumps(failures))
"""

SUBMODULES = [
    module.name
    for module in pkgutil.walk_packages(foveate.__path__, "foveate.")
    if not module.name.endswith("__main__")
]

# Modules of transformers that reach its Auto classes, some while they are half imported themselves.
TRANSFORMERS = [
    "processing_utils",
    "pipelines",
    "models.auto.modeling_auto",
    "models.auto.processing_auto",
    "models.clip.image_processing_pil_clip",
]

LOADS = """
from transformers import AutoConfig
config = AutoConfig.from_pretrained({folder!r})
assert type(config).__name__ == "FoveateConfig", type(config)
from transformers import AutoImageProcessor
assert type(AutoImageProcessor.from_pretrained({folder!r})).__name__ == "FoveateImageProcessor"
from transformers import AutoModelForImageTextToText, AutoProcessor
assert type(AutoProcessor.from_pretrained({folder!r})).__name__ == "FoveateProcessor"
model = AutoModelForImageTextToText.from_pretrained({folder!r})
assert type(model).__name__ == "FoveateForConditionalGeneration"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("saved")
    tiny = tiny_model("llava")
    tiny.model.save_pretrained(made)
    tiny.processor.save_pretrained(made)
    return made


def start(scenarios: dict[str, str]) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", RUNNER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdin.write(json.dumps(scenarios))
    process.stdin.close()
    process.stdin = None
    return process


def test_every_order_of_imports(folder: Path) -> None:
    loads = LOADS.format(folder=str(folder))
    scenarios = {name: f"import {name}\n" for name in SUBMODULES}
    scenarios |= {
        f"foveate, then {name}": f"import foveate, transformers.{name}\n{loads}" for name in TRANSFORMERS
    }
    scenarios |= {
        f"{name} between": f"import foveate.config, transformers.{name}\n{loads}" for name in TRANSFORMERS[:1]
    }
    scenarios["transformers first"] = f"import transformers.pipelines, foveate\n{loads}"
    for auto in ("AutoImageProcessor", "AutoModelForImageTextToText"):
        scenarios[f"{auto} alone"] = (
            f"import foveate\nfrom transformers import {auto}\n"
            f"assert 'Foveate' in type({auto}.from_pretrained({str(folder)!r})).__name__"
        )
    items = list(scenarios.items())
    halves = [start(dict(items[i::2])) for i in range(2)]
    for process in halves:
        out, error = process.communicate(timeout=300)
        failures = json.loads(out) if out else {"runner": error}
        assert not failures, "\n".join(f"{name}:\n{problem}" for name, problem in failures.items())


def test_import_is_cheap() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import foveate; took = time.perf_counter() - start\n"
        "assert not {'torch', 'transformers', 'numpy', 'PIL'} & sys.modules.keys()\n"
        "print(took)"
    )
    took = [
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
        for _ in range(3)
    ]
    assert min(took) < 0.3  # noise only ever adds


def test_public_names() -> None:
    assert set(foveate.__all__) <= set(dir(foveate))
    for name in foveate.__all__:
        assert getattr(foveate, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = foveate.nothing
