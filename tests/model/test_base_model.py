"""FoveateModel: the model without its head, by itself and inside the whole one."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM

import foveate
from foveate import FoveateError, FoveateForConditionalGeneration, compose
from foveate.model.modeling import FoveateModel
from foveate.tiny import tiny_tokenizer, tiny_vision
from tests.methods.conftest import METHODS, fresh
from tests.methods.test_invariants import chats, prepare
from tests.model.test_modeling import FAMILIES, LLM
from tests.support import chat, picture


def saved(made: Any, folder: Path) -> Path:
    made.model.save_pretrained(folder)
    made.processor.save_pretrained(folder)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_its_states_under_the_head_are_the_logits(method: str, tmp_path: Path) -> None:
    """As AutoModel gives it, and as the whole model holds it."""
    made = fresh(method)
    folder = saved(made, tmp_path / "saved")
    base, whole = AutoModel.from_pretrained(folder), AutoModelForMultimodalLM.from_pretrained(folder)
    assert type(base) is type(whole.base_model) is FoveateModel
    assert type(AutoModelForImageTextToText.from_pretrained(folder)) is FoveateForConditionalGeneration
    batch = prepare(made.processor, chats())
    logits, states = whole(**batch).logits, base(**batch).last_hidden_state
    assert torch.equal(whole.get_output_embeddings()(states), logits)
    assert torch.equal(whole.model(**batch).last_hidden_state, states)
    plain = base(**batch, return_dict=False)
    assert isinstance(plain, tuple) and torch.equal(plain[0], states)


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILIES)
def test_any_llm_without_its_head(kind: str, tmp_path: Path) -> None:
    """The names of decoder and head differ from LLM to LLM; saved folders know one of each."""
    text = CONFIG_MAPPING[kind](**LLM, **FAMILIES[kind])
    made = compose(tiny_vision(), text, "llava", tokenizer=tiny_tokenizer())
    folder = saved(made, tmp_path / "saved")
    base = AutoModel.from_pretrained(folder)
    batch = prepare(made.processor, chats())
    given = made.model.model(**batch).last_hidden_state
    assert torch.equal(base(**batch).last_hidden_state, given)
    base.save_pretrained(tmp_path / "base")
    again = AutoModel.from_pretrained(tmp_path / "base")
    assert torch.equal(again(**batch).last_hidden_state, given)
    new = FoveateModel(base.config)
    new.load_state_dict(base.state_dict())
    new.save_pretrained(tmp_path / "new")
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "new").eval()(**batch).last_hidden_state, given)


def test_a_folder_without_the_head_is_no_whole_model(tmp_path: Path) -> None:
    fresh("llava").model.model.save_pretrained(tmp_path)
    assert not any("lm_head" in key for key in load_file(tmp_path / "model.safetensors"))
    with pytest.raises(FoveateError, match=r"lacks .*language_model\.lm_head\.weight"):
        foveate.FoveateForConditionalGeneration.from_pretrained(tmp_path)


@torch.no_grad()
def test_what_changes_in_the_whole_model_changes_in_its_base() -> None:
    """Also a part that is replaced, as peft does, a copy, and training mode."""
    model = fresh("llava").model
    batch = prepare(fresh("llava").processor, chats())
    before = model.model(**batch).last_hidden_state
    other = copy.deepcopy(model)
    for parameter in other.connector.parameters():
        parameter.add_(0.1)
    assert not torch.equal(other.model(**batch).last_hidden_state, before)
    assert torch.equal(model.model(**batch).last_hidden_state, before)
    model.connector = other.connector
    changed = model.model(**batch).last_hidden_state
    assert torch.equal(changed, other.model(**batch).last_hidden_state)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again.model(**batch).last_hidden_state, changed)
    model.train()
    model.vision_tower.eval()  # as one does for a frozen tower
    assert model.model.training and not model.vision_tower.training
    assert not any(name.startswith(("model.", "_headless")) for name, _ in model.named_parameters())


def test_pictures_as_a_tuple() -> None:
    m = fresh("llava")
    batch = prepare(m.processor, [chat("What?", picture(60, 80))])
    given = {name: batch[name] for name in ("pixel_values", "image_sizes")}
    tokens = m.model.model.get_image_features(**given).pooler_output
    plain = m.model.model.get_image_features(**given, return_dict=False)
    assert isinstance(plain, tuple) and torch.equal(plain[0][0], tokens[0])


def test_an_adapter_without_the_head(tmp_path: Path) -> None:
    """The adapter's names are those of the whole model."""
    from peft import LoraConfig, get_peft_model

    made = fresh("llava")
    folder = saved(made, tmp_path / "base")
    whole = AutoModelForImageTextToText.from_pretrained(folder)
    tuned = get_peft_model(whole, LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj"))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    tuned.save_pretrained(tmp_path / "adapter")
    batch = prepare(made.processor, chats())
    with torch.no_grad():
        states = AutoModel.from_pretrained(tmp_path / "adapter")(**batch).last_hidden_state
        plain = AutoModel.from_pretrained(folder)(**batch).last_hidden_state
        merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter")
        assert torch.equal(states, merged.model(**batch).last_hidden_state)
    assert not torch.allclose(states, plain)
