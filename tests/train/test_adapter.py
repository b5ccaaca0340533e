"""A stage with LoRA that keeps its adapter: every door puts it on its base, with the same result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModel, PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import foveate
from foveate import FoveateError, FoveateForConditionalGeneration, FoveateProcessor
from foveate.data.toy import write_toy_data
from foveate.model.card import CARD, unchanged
from foveate.tiny import tiny_model
from foveate.train.run import train
from tests.command import foveate as run_foveate
from tests.docs.stand_ins import hf_llava
from tests.support import chat, gap, picture
from tests.train.support import stage, write_recipe

LORA = {"on": ["language_model.model"], "rank": 4, "alpha": 8.0}
LOADED: dict[str, Any] = {"tiny": False, "method": None, "template": None}


def run(folder: Path, save: str | None, base: Path, *others: str, **more: Any) -> Path:
    """Trains on a base; the result."""
    folder.mkdir(parents=True)
    data = write_toy_data(folder / "toy", 12)
    one = stage(["connector", *others], data, steps=3, lora={**LORA, "save": save})
    torch.manual_seed(0)  # for the adapters' first weights
    return train(write_recipe(folder, {"all": one}, **{**LOADED, "load": str(base), **more})) / "model"


def logits(model: Any, folder: Path) -> Tensor:
    processor = FoveateProcessor.from_pretrained(folder)
    inputs = processor.apply_chat_template(
        chat("What colour?", picture(60, 90)),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize("method", ["llava", "coroi"])  # coroi: with injectors, which are in the connector
def test_every_door_puts_it_on_its_base(method: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_model(method, template="chatml").save(base)
    whole = run(tmp_path / "whole", None, base)
    folder = run(tmp_path / "apart", "adapter", base)
    right = logits(foveate.load(whole, device="cpu", dtype="float32").model, base)
    assert gap(right, logits(foveate.load(base, device="cpu", dtype="float32").model, base)) > 0.1
    merged = tmp_path / "merged"
    assert run_foveate("convert", folder, merged).code == 0
    bare = FoveateForConditionalGeneration.from_pretrained(base)
    doors = {
        "load": lambda: foveate.load(folder, device="cpu", dtype="float32").model,
        "ours": lambda: FoveateForConditionalGeneration.from_pretrained(folder),
        "auto": lambda: AutoModelForImageTextToText.from_pretrained(folder),
        "peft": lambda: PeftModel.from_pretrained(bare, folder),
        "peft's auto": lambda: AutoPeftModel.from_pretrained(folder, import_allowlist=["foveate"]),
        "converted": lambda: foveate.load(merged, device="cpu", dtype="float32").model,
        "pipeline": lambda: pipeline("image-text-to-text", model=str(folder)).model,
    }
    for name, door in doors.items():
        assert gap(logits(door(), base), right) < 1e-4, name  # float32, added in another order
    assert type(AutoProcessor.from_pretrained(folder)) is FoveateProcessor


def test_what_is_in_its_folder(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_model("llava", template="chatml").save(base)
    layer = "vision_tower.model.encoder.layers.1"
    folder = run(tmp_path / "run", "adapter", base, layer)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert set(config["modules_to_save"]) == {"connector", layer}
    assert all(name.startswith("language_model.model.layers.") for name in config["target_modules"])
    own = set(tiny_model("llava").model.state_dict())
    keys = {key.removeprefix("base_model.model.") for key in load_file(folder / "adapter_model.safetensors")}
    whole = {key for key in own if key.startswith(("connector.", f"{layer}."))}
    assert keys & own == whole
    assert {key.partition(".lora_")[0] for key in keys - own} == set(config["target_modules"])
    assert not (folder / "model.safetensors").exists() and not (folder / "config.json").exists()
    text = (folder / CARD).read_text()
    assert unchanged(text) and str(tmp_path) not in text and f"`{layer}`, `connector`" in text
    assert ModelCard(text).data.to_dict() == {
        "library_name": "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": ["foveate", "llava", "lora"],
    }
    assert "toy.json" in text
    done = run_foveate("push", folder, "me/mine")
    assert done.code == 2 and "is no id on the hub: push the base" in done.stderr


def test_on_the_stage_before_it(tmp_path: Path) -> None:
    """Then the base is that stage's result."""
    data = write_toy_data(tmp_path / "toy", 12)
    stages = {
        "pretrain": stage(["connector"], data, steps=2),
        "finetune": stage([], data, steps=2, lora={**LORA, "save": "adapter"}),
    }
    model = train(write_recipe(tmp_path, stages)) / "model"
    base = tmp_path / "run" / "stages" / "pretrain" / "model"
    config = json.loads((model / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base) and config["modules_to_save"] is None
    made = FoveateForConditionalGeneration.from_pretrained(base)
    apart = logits(PeftModel.from_pretrained(made, model), base)
    assert gap(apart, logits(foveate.load(model, device="cpu", dtype="float32").model, base)) < 1e-5


def test_what_an_adapter_cannot_hold_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_model("anyres", template="chatml").save(base)
    adapter = run(tmp_path / "first", "adapter", base)
    hf_llava(tmp_path / "theirs")
    cases: dict[str, tuple[Path, dict[str, Any], str]] = {
        "template": (base, {"template": "vicuna_v1"}, "has the chat template of its base"),
        "options": (base, {"options": {"max_visual_tokens": 40}}, "has the method of its base"),
        "positions": (base, {"max_positions": 4000}, "has the max_positions of its base"),
        "adapter": (adapter, {}, "the base of an adapter is a whole model in Foveate's own layout"),
        "released": (tmp_path / "theirs", {"template": "chatml"}, "in Foveate's own layout"),
        "tiny": (base, {"tiny": True, "load": None, "method": "llava"}, "name its folder in model.load"),
        "subfolder": (tmp_path, {"subfolder": "base"}, "peft finds no base in a subfolder"),
    }
    for name, (folder, more, message) in cases.items():
        with pytest.raises(FoveateError, match=f"lora.save: .*{message}"):
            run(tmp_path / name, "adapter", folder, **more)
    data = write_toy_data(tmp_path / "toy", 12)
    kept = stage([], data, steps=2, lora={**LORA, "save": "adapter"})
    after = stage(["connector"], data, steps=2)
    for stages, message in (
        ({"first": kept, "second": after}, "stages.first.lora.save: only the last stage may save an adapter"),
        ({"first": {**after, "template": "plain"}, "second": kept}, "give stage first those of stage second"),
    ):
        with pytest.raises(FoveateError, match=message):
            train(write_recipe(tmp_path, stages))
