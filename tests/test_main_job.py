"""The main job of every door, small and whole: what has to work with each version of transformers.

Runs in `make newest` and `make oldest` too. Warnings of transformers that something will be taken away fail
these tests, as all others.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

import foveate
from foveate import Foveate, Zoom
from foveate.annotate import annotate_data
from foveate.data.toy import write_toy_data
from foveate.lab.experiment import Experiment, Variant
from foveate.lab.parts import prepare
from foveate.lab.run import run as run_lab
from foveate.lab.scales import SCALES
from foveate.methods import METHODS
from foveate.train.run import train
from tests.lab.conftest import NANO
from tests.methods.conftest import fresh
from tests.support import chat, picture
from tests.train.support import losses, stage, write_recipe

ROOT = Path(__file__).parents[1]
SIGNS = ROOT / "examples" / "signs.jpg"


@pytest.fixture(scope="module")
def embedded() -> Foveate:
    return foveate.load(device="cpu")


def test_ask(embedded: Foveate, tmp_path: Path) -> None:
    answer = embedded.ask(SIGNS, "what digit is on the red shape?")
    assert answer.text == "9"
    assert answer.ledger.views == 10 and answer.ledger.tflop > 0 and answer.ledger.kv_megabytes > 0
    answer.show(tmp_path / "seen.png")
    assert answer._repr_png_() == (tmp_path / "seen.png").read_bytes()  # what a notebook shows


def test_chat_keeps_its_context(embedded: Foveate) -> None:
    talk = embedded.chat(SIGNS)
    first, second = (talk.ask(q) for q in ("what colour is the sign?", "how many shapes are there?"))
    assert first.text == "yellow"
    assert first.ledger.kept_tokens == 0
    assert second.ledger.kept_tokens >= first.ledger.prompt_tokens


def test_beams(embedded: Foveate) -> None:
    question = "what digit is on the red shape?"
    assert embedded.ask(SIGNS, question, num_beams=3).text == "9"
    assert embedded.ask(SIGNS, question, generation_config=GenerationConfig(num_beams=3)).text == "9"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_answers(method: str) -> None:
    """Greedy, by beams, and a second question about the same picture."""
    talk = fresh(method).chat(picture(70, 90))
    assert talk.ask("What is it?", max_new_tokens=3).ledger.new_tokens > 0
    again = talk.ask("Sure?", max_new_tokens=3)
    assert again.ledger.kept_tokens > 0
    assert fresh(method).ask(picture(70, 90), "What is it?", max_new_tokens=3, num_beams=2).ledger.new_tokens


def test_training_with_adapters_and_asking_what_was_trained(tmp_path: Path) -> None:
    data = write_toy_data(tmp_path / "toy", 16)
    lora = {"on": ["language_model.model.layers"], "rank": 4, "alpha": 8.0, "dropout": 0.0}
    stages = {
        "pretrain": stage(["connector"], data, steps=4, template="plain"),
        "finetune": stage(["connector"], data, epochs=4, lora=lora),
    }
    run = train(write_recipe(tmp_path, stages))
    fell = losses(run, "finetune")
    assert fell[-1] < fell[0]
    assert not list(run.rglob("training_args.bin"))
    answer = foveate.load(run / "model", device="cpu").ask(picture(60, 80), "Which colour?", max_new_tokens=3)
    assert answer.ledger.new_tokens > 0


def test_annotate(tmp_path: Path) -> None:
    data = write_toy_data(tmp_path / "toy", 4)
    report = annotate_data(data, tmp_path / "regions.jsonl", batch=2, check=2, device="cpu", dtype="float32")
    assert report is not None
    lines = [json.loads(line) for line in (tmp_path / "regions.jsonl").read_text().splitlines()]
    assert len(lines) >= 4 and all(line["box"] is not None for line in lines)


@pytest.mark.parametrize("region", ["answer", "relevance"])
def test_zoom_by_the_auto_classes(region: str, tmp_path: Path) -> None:
    fresh("llava").save(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    zoom = Zoom(model, AutoProcessor.from_pretrained(tmp_path), region=region)
    answer = zoom.ask(picture(200, 300), "What is it?", max_new_tokens=3)
    assert 0 <= answer.confidence <= 1
    looked = zoom.ask(picture(200, 300), "What is it?", box=(20, 20, 80, 90), max_new_tokens=3)
    assert looked.regions


def test_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are made, and a baseline and a method that reads the question are trained and compared."""
    monkeypatch.setitem(SCALES, "nano", NANO)
    prepare("nano", NANO, tmp_path)
    variants = (Variant("llava"), Variant("slime"))
    ran = run_lab(Experiment(variants, "easy", "nano", (0,), 2, 2), tmp_path)
    assert ran.missing == 0
    assert ran.report is not None and "SliME" in ran.report.read_text()


def test_bfloat16_and_forward_by_hand(embedded: Foveate) -> None:
    """A forward pass with loss and cache, as a user writes it."""
    made: Any = fresh("slime")
    messages = chat("What is it?", picture(70, 90))
    kwargs = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs = made.processor.apply_chat_template(messages, **kwargs)
    made.model.to(torch.bfloat16)
    output = made.model(**inputs.to(torch.bfloat16), labels=inputs["input_ids"], use_cache=True)
    assert torch.isfinite(output.loss)
    assert output.logits.dtype == torch.bfloat16
