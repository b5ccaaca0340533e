"""Trained rows at sizes of glyphs that they have not learnt from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from foveate.errors import FoveateError
from foveate.lab import levels, sizes
from foveate.lab.experiment import Experiment, Variant
from foveate.lab.levels import LEVELS
from foveate.lab.run import run
from foveate.lab.sizes import level_at, markdown, measure_sizes
from tests.lab.conftest import NANO


def test_all_glyphs_of_a_level_are_of_one_size_and_no_larger_than_half_of_their_object() -> None:
    for name in ("words", "dense"):
        for glyph in sizes.GLYPHS:
            level = level_at(LEVELS[name], glyph)
            assert level.glyph == (glyph, glyph) and 2 * glyph <= level.side[0] <= level.side[1]
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
    path, missing = measure_sizes(wanted, tmp_path, (18, 10), NANO.test_scenes)
    assert missing == 1
    results = json.loads((path.parent / "sizes.json").read_text())
    for trained, found in zip(done, results, strict=True):
        assert [*found["sizes"]] == ["10", "18"]
        assert found["sizes"]["10"]["fine"] == trained["accuracy"]["fine"]
        assert found["sizes"]["10"]["chance"] == trained["lines"]["chance"]["fine"]
    assert path.read_text() == markdown(results)
    table = [line for line in path.read_text().splitlines() if line.startswith("|")]
    assert len(table) == 2 + 2 + 2 and table[0] == "|  | seeds | 10 pixels | 18 pixels |"
    with Image.open(path.parent / "sizes.png") as drawn:
        assert drawn.width > 1000
    monkeypatch.setattr(sizes, "measure", None)  # nothing is measured again
    assert measure_sizes(wanted, tmp_path, (10, 18), NANO.test_scenes) == (path, 1)


@pytest.mark.parametrize(("glyphs", "pictures"), [((), 2), ((0,), 2), ((10,), 0)])
def test_nothing_to_measure(glyphs: tuple[int, ...], pictures: int, tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match="each 1 or more"):
        measure_sizes(Experiment((Variant("llava"),), "easy", "nano", steps=4), tmp_path, glyphs, pictures)
