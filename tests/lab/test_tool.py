"""`foveate lab` as a tool: what it says on the way, what it refuses, what it leaves on the disk."""

from __future__ import annotations

import io
import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from foveate.errors import FoveateError
from foveate.lab import progress
from foveate.lab import run as lab_run
from foveate.lab.cell import Bench, Cell, cells_of
from foveate.lab.cli import app, several
from foveate.lab.controls import controls
from foveate.lab.experiment import Experiment, StageSpec, Variant, read_experiment
from foveate.lab.parallel import chains
from foveate.lab.parts import load_parts, prepare
from foveate.lab.run import clean, run
from foveate.lab.scales import SCALES
from tests.lab.conftest import REAL


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["a,b"], ["a", "b"]),
        (["a", "b , c,"], ["a", "b", "c"]),
        (["one, with a comma", "a"], ["one, with a comma", "a"]),
        ([""], []),
    ],
)
def test_several_names_are_given_in_one_way(given: list[str], names: list[str]) -> None:
    assert several(given, ["one, with a comma", "a"]) == names


def test_off_a_terminal_there_are_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with progress.telling(Console(file=out, width=200)) as tell:
        for step in range(1, 101):
            now[0] += 1
            tell("a cell", step, 100, f"loss {step}")
        tell("pictures", 1, None)
    assert out.getvalue().splitlines() == [
        "a cell: 1 of 100, loss 1",
        "a cell: 31 of 100, loss 31",
        "a cell: 61 of 100, loss 61",
        "a cell: 91 of 100, loss 91",
        "a cell: 100 of 100, loss 100",
        "pictures: 1",
    ]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (Variant("anyres", options={"max_visual_tokens": 10}), "max_visual_tokens"),
        (Variant("llava", told=True), "does not look again"),
        (Variant("llava", stages=(StageSpec(1.0, ("connector.ear",)),)), "no module 'connector.ear'"),
        (Variant("coroi", options={"layers": [7]}), "do not fit an LLM of 3 layers"),
    ],
)
def test_wrong_rows_are_refused_before_anything_is_drawn(
    row: Variant, said: str, prepared: Path, tmp_path: Path
) -> None:
    (tmp_path / "parts").symlink_to(prepared / "parts")
    with pytest.raises(FoveateError, match=said):
        run(Experiment((Variant("llava"), row), "easy", "nano", steps=4), tmp_path)
    assert {place.name for place in tmp_path.iterdir()} == {"parts"}


def test_the_disk_is_told_before_it_is_taken_and_cleaned(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "parts").symlink_to(prepared / "parts")
    told: list[int] = []
    known: list[str] = []

    def tell(what: str, done: int, total: int) -> None:
        assert told, "says how much before it draws"
        known.append(what)

    rows = (Variant("llava"), Variant("coroi", options={"layers": [0]}))
    experiment = Experiment(rows, "near", "nano", points=1)
    done = run(experiment, tmp_path, tell=tell, takes=told.append)
    assert {what.split()[0] for what in known} == {"drawing", "encoding"}
    made = [
        file.stat().st_size - 128  # of a header
        for name in ("data", "features")
        for file in (tmp_path / name).rglob("*.npy")
    ]
    assert told == [sum(made)]
    run(experiment, tmp_path, takes=told.append)
    assert len(told) == 1
    freed = clean(tmp_path)
    assert freed > told[0]
    assert not (tmp_path / "data").exists() and not (tmp_path / "features").exists()
    assert done.report is not None and done.report.is_file() and list(tmp_path.glob("cells/*/*/result.json"))
    assert clean(tmp_path) == 0


def test_a_budget_stops_a_run_which_goes_on(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "parts").symlink_to(prepared / "parts")
    clock = [0.0]
    monkeypatch.setattr(lab_run.time, "process_time", lambda: clock[0])

    def report(cell: object, step: int, steps: int, loss: float) -> None:
        seen.append(step)
        clock[0] += 10

    seen: list[int] = []
    experiment = Experiment((Variant("llava"),), "near", "nano", seeds=(0, 1), steps=4, points=1)
    first = run(experiment, tmp_path, report, budget=25)
    assert (first.report, first.missing, seen) == (None, 2, [1, 2, 3])
    seen.clear()
    second = run(experiment, tmp_path, report)
    assert second.missing == 0 and seen == [4, 1, 2, 3, 4]
    assert second.report is not None
    assert len(json.loads(second.report.with_suffix(".json").read_text(encoding="utf-8"))) == 2


def test_the_smallest_scale_needs_no_preparation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCALES, "nano", REAL)
    words = ["run", "--methods", "llava", "--scale", "nano", "--folder", str(tmp_path / "lab")]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0 and "16 of 16, loss" in done.stdout and "GB more in" in done.stdout
    assert load_parts("nano", tmp_path).tower_key == load_parts("tiny", tmp_path).tower_key
    with pytest.raises(FoveateError, match="scale 'nano' has the networks of 'tiny'"):
        prepare("nano", REAL, tmp_path)


def test_cells_that_train_at_once_are_those_that_train_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCALES, "nano", REAL)  # which other processes have
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True})
    experiment = Experiment((Variant("llava"), Variant("anyres")), "near", "nano", steps=4, points=2)
    told: list[tuple[str, int]] = []
    drawn: list[str] = []
    found = []
    for jobs in (1, 2):
        done = run(
            experiment,
            tmp_path / str(jobs),
            lambda cell, step, steps, loss: told.append((cell.method, step)),
            tell=lambda what, done, total: drawn.append(what.split()[0]),
            jobs=jobs,
            bf16=True,
        )
        assert done.report is not None and done.missing == 0
        cells = json.loads(done.report.with_suffix(".json").read_text(encoding="utf-8"))
        assert all(cell["bf16"] for cell in cells)
        assert "trained in bfloat16 in 2 of 2 cells" in done.report.read_text(encoding="utf-8")
        found.append([(cell["title"], cell["losses"], cell["marks"], cell["steps"]) for cell in cells])
        assert sorted(told) == sorted((m, n) for m in ("llava", "anyres") for n in range(1, 5))
        assert {*drawn} == {"drawing", "encoding"}
        told.clear()
        drawn.clear()
    assert found[0] == found[1]
    other = replace(experiment, variants=experiment.variants[1:], seeds=(1,))
    with controls():
        cell = Cell.of(other, other.variants[0], 1)
        place = cells_of(tmp_path / "2", "nano", load_parts("nano", tmp_path)) / cell.key
    place.mkdir(parents=True)
    (place / "checkpoint.pt").write_bytes(b"half")
    with pytest.raises(FoveateError, match="is broken: delete it"):
        run(other, tmp_path / "2", jobs=2)
    (place / "checkpoint.pt").unlink()
    with pytest.raises(FoveateError, match=r"ended with exit code -9.* run again, it goes on"):
        run(other, tmp_path / "2", lambda *step: multiprocessing.active_children()[0].kill(), jobs=2)
    assert not multiprocessing.active_children()
    assert run(other, tmp_path / "2").missing == 0


@pytest.mark.parametrize("words", [["run", "--methods", "llava", "--scale", "nano"], ["pace", "duel"]])
def test_bfloat16_is_refused_where_nothing_multiplies_it(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match="cpu does not multiply bfloat16 here: leave out --bf16"):
        CliRunner().invoke(app, [*words, "--bf16", "--folder", str(tmp_path)], catch_exceptions=False)
    assert not list(tmp_path.iterdir())


def test_rows_that_share_weights_train_in_turn(bench: Bench) -> None:
    experiment = read_experiment("duel_tables")
    with controls():
        cells = [Cell.of(experiment, row, seed) for row in experiment.variants for seed in (0, 1)]
        told = [replace(cell, told=True) for cell in cells if cell.label == "CoRoI"]
        found = chains([(cell, "") for cell in (*cells, *told)], bench)
    several = [[(cell.label, cell.seed, cell.told) for cell, _ in chain] for chain in found if len(chain) > 1]
    assert several == [
        *([("CoRoI", seed, False), ("CoRoI", seed, True)] for seed in (0, 1)),
        *([("Chain-of-Spot", seed, False), ("centre crop", seed, False)] for seed in (0, 1)),
    ]
