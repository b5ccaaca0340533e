"""The model that comes with the package: what it answers, at any size, and that it says what it is."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image
from transformers import TextIteratorStreamer

import foveate
from foveate.ask.foveate import EMBEDDED, Foveate
from foveate.lab.photographs import KINDS, trials
from tests.command import foveate as run
from tests.command import on_a_terminal

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def model() -> Foveate:
    return foveate.load(device="cpu")


def test_the_demo_is_answered(tmp_path: Path) -> None:
    """What `make demo` asks, and the other objects of its picture."""
    questions = (
        "what digit is on the red shape?",
        "what colour is the sign?",
        "how many shapes are there?",
        "what word is on the sign?",
    )
    drawing = tmp_path / "seen.png"
    result = run("ask", EXAMPLES / "signs.jpg", *questions, "--json", "--out", drawing)
    assert result.code == 0
    assert [answer["answer"] for answer in json.loads(result.stdout)] == ["9", "yellow", "3", "open"]
    assert "embedded model" in result.stderr  # who does not name a model is told which one answers
    assert all(drawing.with_stem(f"seen-{n}").is_file() for n in (1, 2, 3, 4))


def test_what_is_streamed_is_the_answer(model: Foveate) -> None:
    """Without the token that ends it, and piece by piece."""
    streamer = TextIteratorStreamer(model.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    arguments = {"streamer": streamer}
    question = "what word is on the sign?"
    thread = Thread(target=model.ask, args=(EXAMPLES / "signs.jpg", question), kwargs=arguments)
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    answer = model.ask(EXAMPLES / "signs.jpg", question)
    assert streamed == answer.text == "open"
    assert answer.ledger.new_tokens > 1  # the last of them ends it


def test_a_terminal_shows_the_answer() -> None:
    code, shown = on_a_terminal("ask", EXAMPLES / "signs.jpg", "what word is on the sign?", "--device", "cpu")
    assert code == 0
    lines = shown.splitlines()
    assert lines[:3] == ["what word is on the sign?", "open", "looked at the whole picture, in 9 tiles"]
    assert len(lines) == 4 and "visual tokens" in lines[3]


def test_objects_of_a_ninth_of_a_photograph_are_read(model: Foveate) -> None:
    """Letters, digits and words on a photograph of 16 megapixels that no training has seen."""
    found = list(trials(model, [EXAMPLES / "dandelions.jpg"], parts=(1 / 4, 1 / 9), repeats=5))
    right = {kind: [trial.right for trial in found if trial.kind == kind] for kind in KINDS}
    assert [len(answers) for answers in right.values()] == [10, 10, 10]
    assert sum(map(sum, right.values())) >= 24
    assert sum(right["word"]) >= 4  # words that no training has shown


def test_what_is_not_there_is_none(model: Foveate) -> None:
    picture = EXAMPLES / "signs.jpg"
    assert model.ask(picture, "what letter is on the triangle?").text == "none"


@pytest.mark.parametrize("size", [(1, 1), (3000, 20), (20, 3000), (112, 112), (640, 480)])
def test_any_size_is_answered(size: tuple[int, int], model: Foveate) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    answer = model.ask(Image.fromarray(noise), "how many shapes are there?", max_new_tokens=8)
    assert answer.ledger.visual_tokens <= 800 and answer.regions


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in EMBEDDED.iterdir()) < 20e6
    assert not [file for file in EMBEDDED.iterdir() if file.suffix in (".bin", ".pt", ".pkl")]
