"""Writing: on a disk that is really full, interrupted by a kill, and by two writers at once."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from foveate.ask.foveate import EMBEDDED
from foveate.errors import FoveateError
from foveate.files import alone, changed_folder, explained, new_file, new_folder, read_json, write
from foveate.tiny import tiny_model
from foveate.train.recipe import load_recipe, to_dict
from foveate.train.run import train
from tests import forked
from tests.command import foveate
from tests.train.support import two_stages

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "images" / "street.png"
PYTHON = [sys.executable, "-m", "foveate"]


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the commands of tests/full_disk.py did on disks that were really full."""
    if shutil.which("unshare") is None:
        pytest.skip("only Linux's unshare makes a disk of a given size without an administrator")
    folder = tmp_path_factory.mktemp("disk")
    script = f"mount -t tmpfs tmpfs {folder} && exec {sys.executable} -m tests.full_disk {folder}"
    done = subprocess.run(["unshare", "-Urm", "sh", "-c", script], capture_output=True, text=True, cwd=ROOT)
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        pytest.skip("this system lets nobody mount a disk of a given size")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["compose", "convert", "annotate", "train"])
def test_a_command_on_a_full_disk(small_disk: dict[str, Any], name: str) -> None:
    """It says so in one sentence; with room, the same command succeeds, and nothing else is left."""
    code, said, found = small_disk[name]
    assert code == 2 and said.endswith("cannot be written: the disk is full"), said
    assert name not in found or name == "train"  # no half of a result has its name
    code, said, found = small_disk[f"{name} again"]
    assert code == 0, said
    assert found == RESULTS[name]


RESULTS = {
    "compose": ["compose"],
    "convert": ["convert"],
    "annotate": ["annotate.json", "annotate.jsonl", "annotate.report.json"],
    "train": ["train"],
}


def test_training_goes_on_exactly_after_a_full_disk(small_disk: dict[str, Any]) -> None:
    """The Trainer writes its checkpoints by itself."""
    assert small_disk["same weights as without interruption"] is True


def test_a_full_disk_leaves_the_model_that_was_there(small_disk: dict[str, Any]) -> None:
    assert small_disk["save"] == ["save cannot be written: the disk is full", True, ["save"]]


def test_the_labs_pictures_on_a_full_disk(small_disk: dict[str, Any]) -> None:
    """Pages of a mapped file without room would end the process (SIGBUS)."""
    assert small_disk["lab"].startswith("lab/data/")
    assert small_disk["lab"].endswith("cannot be written: the disk is full")


def test_output_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    sentence = "error: the output cannot be written: the disk is full\n"
    with full.open("w") as out:  # in an interpreter of its own, which would write again as it ends
        done = subprocess.run([*PYTHON, "--help"], stdout=out, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, sentence)
    errors = tmp_path / "errors.txt"
    inspected = forked.foveate("inspect", PICTURE, "--method", "llava", output=full, errors=errors)
    assert (inspected.wait(), errors.read_text()) == (2, sentence)


def test_two_at_once_on_one_folder(tmp_path: Path) -> None:
    """The second is refused; a kill frees the folder."""
    out = tmp_path / "model"
    with alone(tmp_path / "model.unfinished"):
        done = foveate("compose", out, "--tiny")
    assert done.code == 2
    assert (
        " ".join(done.stderr.split())
        == f"error: another run is writing {out}: wait for its end, or choose another place"
    )

    def hold() -> None:
        with new_folder(out) as part:
            (part / "half").touch()
            time.sleep(600)

    process = forked.Forked(hold)
    until((tmp_path / "model.unfinished" / "half").exists)
    with pytest.raises(FoveateError, match="another run is writing"), new_folder(out):
        pass
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = foveate("convert", EMBEDDED, out)
    assert done.code == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and not (out / "half").exists()


def test_two_trainings_in_one_folder(tmp_path: Path) -> None:
    recipe = two_stages(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(to_dict(load_recipe(recipe))))
    with alone(tmp_path / "run"), pytest.raises(FoveateError, match="another run is writing"):
        train(recipe)


def until(there: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write(path, "{}")
    with pytest.raises(KeyboardInterrupt), new_file(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "{}" and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    path.write_text('{"a"')
    with pytest.raises(FoveateError, match=r"a\.json is broken: delete it"):
        read_json(path, "delete it")


def test_weights_of_another_division_do_not_stay(tmp_path: Path) -> None:
    """Loading would find the older ones first."""
    tiny_model("llava").save(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    (tmp_path / "notes.txt").touch()
    tiny_model("llava", seed=1).save(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert "model-00001-of-00002.safetensors" not in names and {"notes.txt", "model.safetensors"} <= names


@pytest.mark.parametrize(
    ("number", "reason"),
    [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "can only be read"), (errno.EACCES, "no permission")],
)
def test_reasons(number: int, reason: str) -> None:
    with pytest.raises(FoveateError, match=f"x cannot be written: .*{reason}"), explained("x"):
        try:
            raise OSError(number, "said by the system")
        except OSError as error:
            raise RuntimeError("said by a library") from error
    with pytest.raises(RuntimeError, match="of another kind"), explained("x"):
        raise RuntimeError("of another kind")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "file/below"])
def test_names_that_no_folder_can_have(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    for make in (lambda: new_folder(tmp_path / name), lambda: changed_folder(tmp_path / name, "*.x")):
        with pytest.raises(FoveateError, match=r"cannot be (written|made)"), make():
            pass
    with pytest.raises(FoveateError, match=r"cannot be written"):
        write(tmp_path / name, "")
