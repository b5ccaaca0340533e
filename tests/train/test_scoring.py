"""Scores while a stage trains: what is asked, what is said of it, and that training does not notice."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from foveate import FoveateError
from foveate.data.toy import write_toy_data
from foveate.train.run import train
from tests.train.support import losses, same, stage, weights, write_recipe


def run(folder: Path, data: Path, eval_data: dict[str, Any] | None, **settings: Any) -> tuple[Path, str]:
    """The run's folder, and what it has shown."""
    settings = {"steps": 6, "log_steps": 2, **settings}
    if eval_data is not None:
        settings["eval_data"] = {"path": str(data), "max_new_tokens": 3, **eval_data}
    folder.mkdir()
    path = write_recipe(folder, {"all": stage(["connector", "language_model"], data, **settings)})
    shown = StringIO()
    return train(path, console=Console(file=shown, width=200)), shown.getvalue()


def toy(folder: Path) -> Path:
    """The toy data about pictures."""
    path = write_toy_data(folder, 12)
    path.write_text(json.dumps([record for record in json.loads(path.read_text()) if "image" in record]))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy(tmp_path_factory.mktemp("toy"))


def test_training_does_not_notice(data: Path, tmp_path: Path) -> None:
    """Also with dropout in what trains: random numbers and modes are as they were."""
    lora = {"on": ["language_model.model"], "rank": 4, "alpha": 8.0, "dropout": 0.3}
    runs = [
        run(tmp_path / name, data, given, lora=lora, freezes=["language_model"])
        for name, given in (("without", None), ("with", {"steps": 2}))
    ]
    assert losses(runs[0][0], "all") == losses(runs[1][0], "all")
    assert same(*(weights(folder / "model") for folder, _ in runs))


def test_scores_come_every_so_many_steps_and_at_the_end(data: Path, tmp_path: Path) -> None:
    folder, shown = run(tmp_path / "run", data, {"steps": 2, "limit": 9, "batch": 4, "shown": 2})
    lines = [json.loads(line) for line in (folder / "stages/all/scores.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert len(line["samples"]) == 9 and 0 <= line["scores"]["exact"]["mean"] <= 1
        assert set(line["most_frequent"]) == {"prediction", "share", "always", "one_answer"}
    logged = json.loads((folder / "stages/all/trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in logged if "eval_exact" in entry] == [2, 4, 6]
    assert "all: step 4 of 6, exact match" in shown and "(always one answer: " in shown
    assert shown.count(" -> ") == 6 and "of the answers are" in shown


def test_one_answer_for_all_is_called_so(tmp_path: Path) -> None:
    """The loss falls all the same: every record of what is learnt has the answer of the first."""
    learnt, asked = (toy(tmp_path / name) for name in ("learnt", "asked"))
    records = json.loads(learnt.read_text())
    for record in records:
        record["conversations"][1]["value"] = "red"
    learnt.write_text(json.dumps(records))
    given = {"path": str(asked), "max_new_tokens": 3}
    folder, shown = run(tmp_path / "run", learnt, given, steps=30, lr=1e-2)
    assert losses(folder, "all")[-1] < 0.2 * losses(folder, "all")[0]
    assert "of the answers are 'red': the model has learnt one answer" in shown


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"path": "none.jsonl"}, "stages.all.eval_data: no data file at none.jsonl"),
        ({"metrics": ["bleu"]}, "stages.all.eval_data: unknown metric 'bleu'"),
        ({"metrics": ["iou"]}, "stages.all.eval_data: .* has no box"),
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"every": 3}, "unknown key 'every'"),
    ],
)
def test_wrong_questions_are_refused_before_training(
    given: dict[str, Any], problem: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(FoveateError, match=problem):
        run(tmp_path / "run", data, given)
    assert not (tmp_path / "run/run").exists() or not (tmp_path / "run/run/stages").exists()
