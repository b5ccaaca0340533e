"""`import foveate` is cheap, and no order of imports matters."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Container
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import foveate
from foveate.tiny import tiny_model

# Imports torch and other libraries that take long once, then forks: each child is an interpreter without
# transformers and foveate.
RUNNER = """
import json, os, sys, traceback
import accelerate, huggingface_hub, jinja2, PIL.Image, scipy.optimize, sympy
import torch, torch.distributed.tensor
assert not {"transformers", "foveate"} & sys.modules.keys()
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

ROOT = Path(foveate.__file__).parent
# The rooms of the house from the ground up: the way of a picture, then the doors.
ROOMS = (
    (
        *("errors", "versions", "upstream", "options", "written", "files", "layers", "devices", "shipped"),
        *("remembered", "resuming"),
    ),
    ("picture",),
    ("towers",),
    ("methods",),
    ("model",),
    ("explaining",),
    ("ask", "data"),
    ("zoom",),
    ("choosing", "composing", "tiny", "train", "lab", "annotate", "clients", "evaluate", "serve", "demo"),
    ("batch",),
    ("cli", "__main__"),
)

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


def modules() -> dict[str, Path]:
    """Every module of the package and its file."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: Container[str], everywhere: bool = False) -> set[str]:
    """The package's modules that a file imports as it is imported itself; `everywhere`: in functions, too."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{path}: a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & {*known}
            found |= inner or {node.module}
        elif everywhere or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)
    return found & {*known}


def test_no_import_runs_upwards() -> None:
    """Every file imports from its own room and from those below it, in functions, too."""
    floor = {room: n for n, rooms in enumerate(ROOMS) for room in rooms}
    known = modules()
    upwards = []
    for name, path in known.items():
        if name != "foveate":  # its public names lie in all rooms
            for other in imports(path, known, everywhere=True) - {"foveate"}:
                own, theirs = (module.split(".")[1] for module in (name, other))
                if floor[theirs] > floor[own]:
                    upwards.append(f"{name} imports {other}")
    assert not upwards, "\n".join(upwards)
    assert {module.split(".")[1] for module in known if module != "foveate"} == floor.keys()


def test_no_file_imports_in_a_circle() -> None:
    """So that every file can be imported first: no order of imports matters."""
    known = modules()
    graph = {name: imports(path, known) for name, path in known.items()}
    assert len(graph) > 80 and "foveate.errors" in graph["foveate.cli"]
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_circles_are_found(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("class A:\n    from two import b\n")
    (tmp_path / "two.py").write_text("if True:\n    import one\n")
    (tmp_path / "late.py").write_text("from __future__ import annotations\ndef f():\n    import late\n")
    graph = {n: imports(tmp_path / f"{n}.py", {"one", "two", "late"}) for n in ("one", "two", "late")}
    assert graph == {"one": {"two"}, "two": {"one"}, "late": set()}


def scenarios(folder: Path) -> dict[str, str]:
    """Entry points alone, and Foveate before, between and after modules that reach the Auto classes."""
    loads = LOADS.format(folder=str(folder))
    first = ("foveate.model.modeling", "foveate.model.processing", "foveate.cli")
    orders = {f"{name} alone": f"import {name}\n" for name in first}
    orders |= {f"foveate, {name}": f"import foveate, transformers.{name}\n{loads}" for name in TRANSFORMERS}
    orders["between"] = f"import foveate.model.config, transformers.{TRANSFORMERS[0]}\n{loads}"
    orders["transformers first"] = f"import transformers.pipelines, foveate\n{loads}"
    for auto in ("AutoImageProcessor", "AutoModelForImageTextToText"):
        orders[auto] = (
            f"import foveate\nfrom transformers import {auto}\n"
            f"assert 'Foveate' in type({auto}.from_pretrained({str(folder)!r})).__name__"
        )
    return orders


USUAL = ("foveate.model.modeling alone", "transformers first", "AutoImageProcessor")


@pytest.mark.parametrize("usual", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_orders_of_imports(folder: Path, usual: bool) -> None:
    orders = scenarios(folder)
    assert {*USUAL} < {*orders}
    chosen = {name: code for name, code in orders.items() if (name in USUAL) == usual}
    process = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(chosen),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    failures = json.loads(process.stdout) if process.stdout else {"runner": process.stderr}
    assert not failures, "\n".join(f"{name}:\n{problem}" for name, problem in failures.items())


def test_import_is_cheap() -> None:
    """Counted in modules, as seconds depend on what else the machine does."""
    code = "import sys; before = {*sys.modules}; import foveate; print(*{*sys.modules} - before)"
    python = [sys.executable, "-c", code]
    loaded = subprocess.run(python, check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "transformers", "numpy", "PIL", "rich", "typer"} & {*loaded}
    assert "foveate" in loaded and len(loaded) < 200  # most of them wrapt's


def test_public_names() -> None:
    assert set(foveate.__all__) <= set(dir(foveate))
    for name in foveate.__all__:
        assert getattr(foveate, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = foveate.nothing
