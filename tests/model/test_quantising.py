"""The LLM in 8 or 4 bits: every method answers, and what a quantised model cannot do is one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import foveate
from foveate import FoveateError, FoveateForConditionalGeneration
from foveate.methods import METHODS
from foveate.model.export import to_transformers
from foveate.tiny import tiny_model
from foveate.zoom.relevance import Highlighter
from foveate.zoom.vlm import VLM
from tests.command import foveate as run_foveate
from tests.docs.stand_ins import hf_llava
from tests.model.test_folders import adapted
from tests.support import chat, gap, picture

HERE: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
KINDS = {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}


def test_other_values_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match="quantize should be 8bit or 4bit, not '3bit'"):
        foveate.load(quantize="3bit", **HERE)  # type: ignore[arg-type]
    assert run_foveate("ask", "x.png", "What?", "--quantize", "3bit").code == 2


def dense(model: Any, like: Any) -> Any:
    """The unquantised model with the weights that a quantised one computes with."""
    from bitsandbytes.functional import dequantize_4bit

    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            like.get_submodule(name).weight.data = weight.to(torch.float32)
    return like


@pytest.mark.parametrize("quantize", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_answers(method: str, quantize: Any, tmp_path: Path) -> None:
    tiny_model(method).save(tmp_path)
    made = foveate.load(tmp_path, quantize=quantize, **HERE)
    kinds: dict[str, set[str]] = {}
    for name, module in made.model.named_modules():
        if isinstance(module, nn.Linear):
            part = "head" if name.endswith("lm_head") else name.partition(".")[0]
            kinds.setdefault(part, set()).add(type(module).__name__)
    assert kinds.pop("language_model") == {KINDS[quantize]}
    assert not {kind for found in kinds.values() for kind in found} & {*KINDS.values()}
    assert {"vision_tower", "connector", "head"} == set(kinds)
    answer = made.ask(picture(60, 90), "What?", max_new_tokens=4)
    assert answer.ledger.new_tokens >= 1
    if quantize == "4bit":  # the same as by the weights that it stands for
        right = foveate.Foveate(dense(made.model, foveate.load(tmp_path, **HERE).model), made.processor)
        assert right.ask(picture(60, 90), "What?", max_new_tokens=4).text == answer.text


@pytest.mark.parametrize("quantize", KINDS)
def test_regions_of_zoom(quantize: Any, tmp_path: Path) -> None:
    tiny_model("llava").save(tmp_path)
    made, whole = foveate.load(tmp_path, quantize=quantize, **HERE), foveate.load(tmp_path, **HERE)
    asked = foveate.Zoom(made.model, made.processor, region="answer").ask(picture(90, 120), "What?")
    assert asked.proposals[0].said is not None
    right = whole.model if quantize == "8bit" else dense(made.model, whole.model)
    heats = []
    for model in (made.model, right):
        (found,) = Highlighter(VLM(model, made.processor))([picture(90, 120)], ["What?"])
        heats.append(torch.tensor([value for _, value in found.heat]))
    # 8 bits also round what goes through the layers
    assert float(heats[1].std()) > 0.1 and gap(*heats) < (0.1 if quantize == "8bit" else 1e-3)


@pytest.mark.parametrize("quantize", KINDS)
def test_other_layouts_and_adapters(quantize: Any, tmp_path: Path) -> None:
    hf_llava(tmp_path / "hf")
    made = foveate.load(tmp_path / "hf", quantize=quantize, **HERE)
    assert type(made.model.language_model.model.layers[0].mlp.up_proj).__name__ == KINDS[quantize]
    assert made.ask(picture(60, 90), "What?", max_new_tokens=2).ledger.new_tokens >= 1
    base = tiny_model("llava")
    base.save(tmp_path / "base")
    adapted(base.model, tmp_path / "adapter", tmp_path / "base", target_modules=["q_proj"])
    inputs = base.processor.apply_chat_template(
        chat("What?", picture(60, 90)),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    plain, adapter = (foveate.load(tmp_path / n, quantize=quantize, **HERE) for n in ("base", "adapter"))
    whole = foveate.load(tmp_path / "base", **HERE).model
    right = PeftModel.from_pretrained(dense(plain.model, whole), tmp_path / "adapter").eval()
    with torch.no_grad():
        said, expected, without = (m(**inputs).logits for m in (adapter.model, right, plain.model))
    # 8 bits are compared with the whole weights
    assert gap(said, expected) < (gap(without, expected) / 2 if quantize == "8bit" else 1e-3)


def test_what_it_cannot_do(tmp_path: Path) -> None:
    tiny_model("llava").save(tmp_path / "model")
    made = foveate.load(tmp_path / "model", quantize="4bit", **HERE)
    for do in (
        lambda: made.save(tmp_path / "again"),
        lambda: made.model.save_pretrained(tmp_path / "again"),
        lambda: made.push_to_hub("me/mine"),
        lambda: to_transformers(made.model, made.processor),
    ):
        with pytest.raises(FoveateError, match="a quantised model is not supported"):
            do()
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("quantize", KINDS)
def test_an_adapter_of_peft_learns_on_it(quantize: Any, tmp_path: Path) -> None:
    tiny_model("llava").save(tmp_path)
    made = foveate.load(tmp_path, quantize=quantize, **HERE)
    model = get_peft_model(made.model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    inputs = made.processor.apply_chat_template(
        chat("What?", picture(60, 90)), tokenize=True, return_dict=True, return_tensors="pt"
    )
    rates, losses = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2), []
    for _ in range(4):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        losses.append(float(loss.detach()))
        loss.backward()
        rates.step()
        rates.zero_grad()
    assert losses[-1] < losses[0]


def test_a_configuration_of_one_s_own(tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    tiny_model("coroi").save(tmp_path)
    load = FoveateForConditionalGeneration.from_pretrained
    own = BitsAndBytesConfig(load_in_4bit=True)
    made = load(tmp_path, quantization_config=own)
    assert own.llm_int8_skip_modules is None
    assert not [n for n, m in made.connector.named_modules() if type(m).__name__ == "Linear4bit"]
    few = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["language_model"])
    made = load(tmp_path, quantization_config=few)
    assert [n for n, m in made.connector.named_modules() if type(m).__name__ == "Linear4bit"]
    assert not [n for n, m in made.language_model.named_modules() if type(m).__name__ == "Linear4bit"]


def test_the_command(tmp_path: Path) -> None:
    tiny_model("anyres").save(tmp_path / "model")
    picture(60, 90).save(tmp_path / "picture.png")
    done = run_foveate(
        *("ask", tmp_path / "picture.png", "What?", "--model", tmp_path / "model", "--quantize", "8bit"),
        *("--max-new-tokens", 2, "--device", "cpu"),
    )
    assert (done.code, done.stderr) == (0, "")
