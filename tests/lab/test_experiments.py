"""The experiments that come with the project: every row can be trained."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from foveate.lab.cell import Bench, Cell
from foveate.lab.controls import controls
from foveate.lab.conversing import make_student, under
from foveate.lab.experiment import Experiment, Variant, read_experiment
from foveate.shipped import find, shipped

FILES = [find("experiment", name) for name in shipped("experiment")]
ROWS = [(file.stem, variant) for file in FILES for variant in read_experiment(file).variants]


@pytest.mark.parametrize(("file", "variant"), ROWS, ids=lambda value: str(value)[:40])
def test_every_row_learns_in_every_stage(file: str, variant: Variant, shared_bench: Bench) -> None:
    cell = Cell.of(Experiment((variant,), "words", "nano", steps=16), variant, 0)
    with controls():
        student = make_student(cell, shared_bench)
        student.ready()
        assert student.stages()
        for stage in student.stages():
            learner = under(student, stage)
            learner.model.train()
            learner.optimiser(stage)
            learner.loss(shared_bench.train, [0, 1], stage.captions).backward()
            for name in stage.trains:
                grads = [p.grad for p in learner.model.get_submodule(name).parameters()]
                assert any(grad is not None and grad.abs().max() > 0 for grad in grads), name


def test_rows_of_an_experiment_differ() -> None:
    for file in FILES:
        experiment = read_experiment(file)
        variants = experiment.variants
        assert len({variant.label or variant.method for variant in variants}) == len(variants)
        keys = {Cell.of(experiment, v, 0).key for v in variants}
        assert len(keys) == len(variants)


def test_the_experiment_in_the_docs_is_one(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "lab.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        (tmp_path / "shown.yaml").write_text(block, encoding="utf-8")
        assert len(read_experiment(tmp_path / "shown.yaml").variants) > 1
