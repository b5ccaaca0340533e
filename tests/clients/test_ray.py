"""Ray: a model is put into its store, and answers in workers as here."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

import foveate
from foveate.tiny import tiny_model
from tests.support import picture

ray = pytest.importorskip("ray", reason="Ray is not installed")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.parametrize("method", ["anyres", "slime"])
def test_a_model_answers_in_workers(method: str) -> None:
    model = tiny_model(method)
    shown = [picture(60, 90), picture(90, 60)]
    stored = ray.put(model)

    @ray.remote
    def ask(model: foveate.Foveate, image: object) -> str:
        return model.ask(image, "What?", max_new_tokens=4).text

    answers = ray.get([ask.remote(stored, image) for image in shown])
    assert answers == [model.ask(image, "What?", max_new_tokens=4).text for image in shown]
