"""Trained rows at sizes of glyphs that they have not learnt from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from foveate.errors import FoveateError
from foveate.lab import levels, sizes, training
from foveate.lab.cli import app
from foveate.lab.data import Examples
from foveate.lab.experiment import Experiment, Variant
from foveate.lab.levels import LEVELS
from foveate.lab.run import run
from foveate.lab.sizes import level_at, markdown, measure_sizes
from foveate.lab.student import Student
from foveate.lab.training import Measured
from tests.lab.conftest import NANO


def test_all_glyphs_of_a_level_are_of_one_size_and_no_larger_than_their_object_allows() -> None:
    for name, least in (("words", 2), ("dense", 3)):  # two side by side need more
        for glyph in sizes.GLYPHS:
            level = level_at(LEVELS[name], glyph)
            assert level.glyph == (glyph, glyph) and least * glyph <= level.side[0] <= level.side[1]
        assert level_at(LEVELS[name], 6).side == LEVELS[name].side


def test_rows_at_other_sizes(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the size of its own level, a cell gets what its result says; what is measured is kept."""
    (tmp_path / "parts").symlink_to(prepared / "parts")
    monkeypatch.setitem(levels.LEVELS, "one", replace(LEVELS["words"], glyph=(10, 10)))
    rows = (Variant("llava"), Variant("coroi", options={"layers": [0, 1]}), Variant("oracle"))
    wanted = Experiment(rows, "one", "nano", steps=4, points=1)
    with pytest.raises(FoveateError, match="none of these 3 cells is trained"):
        measure_sizes(wanted, tmp_path, (10,), 2)
    some = replace(wanted, variants=rows[:2])
    done = json.loads(run(some, tmp_path).report.with_suffix(".json").read_text())  # type: ignore[union-attr]
    read: list[float] = []

    def measuring(student: Student, data: Examples) -> Measured:
        read.append(float(next(student.model.connector.parameters()).detach().sum()))
        return training.measure(student, data)

    monkeypatch.setattr(sizes, "measure", measuring)
    path, missing = measure_sizes(wanted, tmp_path, (18, 10, 18), NANO.test_scenes)
    assert missing == 1
    results = json.loads((path.parent / "sizes.json").read_text())
    for trained, found in zip(done, results, strict=True):
        assert [*found["sizes"]] == ["10", "18"]
        assert found["sizes"]["10"]["fine"] == trained["accuracy"]["fine"]
        assert found["sizes"]["10"]["chance"] == trained["lines"]["chance"]["fine"]
    kept = sorted(tmp_path.glob("cells/*/*/weights.pt"), key=lambda file: "coroi" in str(file))
    weights = [torch.load(file, weights_only=True) for file in kept]
    first = [next(t for key, t in some.items() if key.startswith("connector.")) for some in weights]
    assert read == [float(one.sum()) for one in first for _ in range(2)]
    assert path.read_text() == markdown(results)
    table = [line for line in path.read_text().splitlines() if line.startswith("|")]
    assert len(table) == 2 + 2 + 2 and table[0] == "|  | seeds | 10 pixels | 18 pixels |"
    with Image.open(path.parent / "sizes.png") as drawn:
        assert drawn.width > 1000
    monkeypatch.setattr(sizes, "measure", None)  # nothing is measured again
    assert measure_sizes(wanted, tmp_path, (10, 18), NANO.test_scenes) == (path, 1)
    with pytest.raises(FoveateError, match="glyphs of 100 pixels leave no room"):
        measure_sizes(wanted, tmp_path, (100,), 2)
    with pytest.raises(FoveateError, match="two seeds, are the same"):
        measure_sizes(replace(wanted, seeds=(0, 0)), tmp_path, (10,), 2)


@pytest.mark.parametrize(("glyphs", "pictures"), [((), 2), ((0,), 2), ((10,), 0)])
def test_nothing_to_measure(glyphs: tuple[int, ...], pictures: int, tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match="each 1 or more"):
        measure_sizes(Experiment((Variant("llava"),), "easy", "nano", steps=4), tmp_path, glyphs, pictures)


def test_the_command(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what the command `run` has trained, a method that asks where to look."""
    monkeypatch.chdir(tmp_path)
    Path("lab").mkdir()
    Path("lab/parts").symlink_to(prepared / "parts")
    Path("some.yaml").write_text(
        "level: words\nscale: nano\nsteps: 4\nseeds: [0, 1]\nvariants:\n  - method: llava\n"
        "  - method: chain_of_spot\n    label: Chain, of Spot\n"
    )
    asked = ["some.yaml", "--rows", "Chain, of Spot", "--seeds", "1"]
    assert CliRunner().invoke(app, ["run", *asked]).exit_code == 0
    done = CliRunner().invoke(app, ["sizes", *asked, "--glyphs", "9,12", "--pictures", "2"])
    assert done.exit_code == 0 and "not trained" not in done.output
    (found,) = json.loads(Path("lab/reports/some/sizes.json").read_text())
    assert [*found["sizes"]] == ["9", "12"] and found["pictures"] == 2 and found["cell"]["seed"] == 1
    assert found["command"] == "foveate lab run some.yaml --rows 'Chain, of Spot' --seeds 1"
    wrong = CliRunner().invoke(app, ["sizes", "some.yaml", "--glyphs", "9,x"])
    assert "--glyphs 9,x: expected whole numbers" in str(wrong.exception)
