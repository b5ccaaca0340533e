"""The wheel, for who has no clone: nothing is missing in it, and it works from wherever it is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[1]
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]

# Makes the toy data, then runs commands one after another in this process; prints where the package lies, all
# files of the data, and each exit code.
COMMANDS = """
import json, runpy, sys
from pathlib import Path
import foveate
from foveate.cli import main
print(foveate.__file__)
arguments, sys.argv = sys.argv[1:], ["toy", "runs/toy"]
runpy.run_module("foveate.data.toy", run_name="__main__")
print(json.dumps(sorted(map(str, Path.cwd().rglob("*")))), flush=True)
for arguments in json.loads(arguments[0]):
    sys.argv = ["foveate", *arguments]
    try:
        main()
    except SystemExit as end:
        print("exit code", end.code or 0, flush=True)
"""


def run(*command: object, **more: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **more)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"
    return str(done.stdout)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: builds leave files, and use those that they find."""
    copy, out = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    left_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", copy / "src", ignore=left_out)
    run(*PIP, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", out, copy)
    (made,) = out.glob("foveate-*.whl")
    return made


def test_every_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    source = ROOT / "src"
    expected = {
        path.relative_to(source).as_posix()
        for path in (source / "foveate").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {"foveate/train/recipes/slime.yaml", "foveate/lab/experiments/slime.yaml"} <= expected
    assert packed == expected


def test_an_installed_wheel_works_without_a_clone(wheel: Path, tmp_path: Path) -> None:
    """The main job, a recipe and an experiment by name, and where they are looked for."""
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    run(*PIP, "install", "--no-index", "--no-deps", "--target", site, wheel)
    environment = {**os.environ, "PYTHONPATH": str(site), "COLUMNS": "80"}
    commands = [
        ["ask", str(ROOT / "examples" / "signs.jpg"), "what digit is on the red shape?", "--json"],
        ["train", "tiny", "--dry-run"],
        ["lab", "run", "slime", "--rows", "none"],
        ["train", "slim"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)],
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
    )
    place, before, *said = done.stdout.splitlines()
    assert Path(place).is_relative_to(site), done.stderr
    assert [line for line in said if line.startswith("exit code")] == [
        "exit code 0",
        "exit code 0",
        "exit code 2",
        "exit code 2",
    ], done.stderr
    answer = json.loads(done.stdout[done.stdout.index("{") : done.stdout.index("exit code")])
    assert answer["answer"] == "9"
    recipes = site / "foveate" / "train" / "recipes"
    assert f"everything is well with {recipes / 'tiny.yaml'}; nothing was written" in said
    assert "error: unknown rows none: there are llava, anyres, pooled, SliME, " in done.stderr
    assert (
        f"error: no recipe at slim: give a YAML file, or the name of one in {recipes}: anyres, "
        in done.stderr
    )
    assert sorted(map(str, empty.rglob("*"))) == json.loads(before)
    assert str(empty / "runs" / "toy" / "toy.json") in json.loads(before)
