"""Seconds of a step: every stage of every row, and what they make of a report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foveate.errors import FoveateError
from foveate.lab.cli import app
from foveate.lab.experiment import Experiment, Variant
from foveate.lab.pace import measure_pace, seconds_at, timed, with_pace
from foveate.lab.run import run


def test_a_report_gets_the_seconds_of_steps_that_were_timed(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "parts").symlink_to(prepared / "parts")
    rows = (Variant("pooled"), Variant("coroi", options={"layers": [0]}))
    experiment = Experiment(rows, "near", "nano", seeds=(1,), steps=8, batch=4, points=2)
    path = measure_pace(experiment, tmp_path, rounds=2)
    paces = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert [[stage["steps"] for stage in pace["stages"]] for pace in paces] == [[2, 6], [2, 6]]
    seconds = [stage["seconds"] for pace in paces for stage in pace["stages"]]
    assert all(len(some) == 2 and min(some) > 0 and max(some) < 30 for some in seconds)
    text = path.read_text(encoding="utf-8")
    assert "Device: cpu; threads:" in text and "| pooled tiles |" in text and "CoRoI" in text
    done = run(experiment, tmp_path)
    assert done.report is not None
    results = json.loads(done.report.with_suffix(".json").read_text(encoding="utf-8"))
    new = timed(results, paces)
    for before, after, pace in zip(results, new, paces, strict=True):
        assert after["seconds"] == {**before["seconds"], "training": seconds_at(pace, 8)}
        assert [p["seconds"] for p in after["curve"]] == [
            seconds_at(pace, p["step"]) for p in before["curve"]
        ]
        assert {**after, "seconds": 0, "curve": 0} == {**before, "seconds": 0, "curve": 0}
    assert with_pace(results, path.with_suffix(".json")) == new
    assert with_pace(results, tmp_path / "none.json") == results
    with pytest.raises(FoveateError, match="CoRoI has no pace: `foveate lab pace`"):
        timed(results, paces[:1])
    with pytest.raises(FoveateError, match="pooled tiles has no pace"):
        timed([{**results[0], "bf16": True}], paces)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True})
    halves = measure_pace(replace(experiment, variants=rows[:1]), tmp_path, rounds=1, name="b", bf16=True)
    assert "Device: cpu, bfloat16; threads:" in halves.read_text(encoding="utf-8")
    with pytest.raises(FoveateError, match="rounds must be at least 1, not 0"):
        measure_pace(experiment, tmp_path, rounds=0)


def test_seconds_are_summed_over_stages() -> None:
    pace = {"stages": [{"steps": 10, "seconds": [1.0, 9.0, 2.0]}, {"steps": 30, "seconds": [0.5]}]}
    assert [seconds_at(pace, step) for step in (0, 4, 10, 12, 40)] == [0, 8, 20, 21, 35]


def test_the_command_names_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match="unknown rows LLaVA-2"):
        words = ["pace", "duel", "--rows", "LLaVA-2", "--folder", str(tmp_path)]
        CliRunner().invoke(app, words, catch_exceptions=False)
    assert not list(tmp_path.iterdir())
