"""`compiled=True`: each method's vision tower goes through `torch.compile`, and answers as before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import foveate
from foveate.methods import METHODS
from tests.methods.conftest import fresh
from tests.support import picture


@pytest.mark.parametrize("method", METHODS)
def test_the_tower_is_compiled(method: str, tmp_path: Path) -> None:
    fresh(method).save(tmp_path)
    plain = foveate.load(tmp_path, device="cpu", dtype="float32")
    model = foveate.load(tmp_path, device="cpu", dtype="float32", compiled=True)
    shown, question = picture(70, 90), "What is it?"
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="recompile"):
        model.ask(shown, question, max_new_tokens=3)
    with torch.compiler.set_stance("force_eager"):
        answer = model.ask(shown, question, max_new_tokens=3)
    assert answer.text == plain.ask(shown, question, max_new_tokens=3).text


@pytest.mark.slow
def test_a_compiled_tower_answers_alike() -> None:
    answer = foveate.load(device="cpu", dtype="float32", compiled=True).ask(
        Path(__file__).parents[2] / "examples" / "signs.jpg", "what digit is on the red shape?"
    )
    assert answer.text == "9"
