"""Loading any VLM, and what is refused before it is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from foveate.errors import FoveateError
from foveate.model.modeling import FoveateForConditionalGeneration
from foveate.picture.geometry import Size
from foveate.zoom.asking import message
from foveate.zoom.places import token_places
from foveate.zoom.vlm import VLM
from tests.support import picture
from tests.vlms import VLMS


def saved(name: str, folder: Path) -> VLM:
    """A tiny LLaVA, written as transformers writes it, with the processor that AutoProcessor knows."""
    made = VLMS[name]()
    processor = LlavaProcessor(
        made.processor.image_processor,
        made.processor.tokenizer,
        patch_size=made.processor.patch_size,
        vision_feature_select_strategy=made.processor.vision_feature_select_strategy,
        num_additional_image_tokens=made.processor.num_additional_image_tokens,
        chat_template=made.processor.chat_template,
    )
    made.model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return VLM(made.model, processor)


def loaded(folder: Path) -> VLM:
    return VLM.load(folder, device="cpu", dtype="float32")


def test_llava_with_a_tower_of_transformers_alone(tmp_path: Path) -> None:
    before, after = saved("llava_pixtral", tmp_path), loaded(tmp_path)
    assert type(after.model) is LlavaForConditionalGeneration and not after.model.training
    asked = [message(picture(40, 60), "What is this?")]
    assert after.answer(asked, max_new_tokens=4) == before.answer(asked, max_new_tokens=4)


@pytest.mark.parametrize("name", ["llava", "llava_siglip"])
def test_llava_that_foveate_knows_stays_with_it(name: str, tmp_path: Path) -> None:
    before, after = saved(name, tmp_path), loaded(tmp_path)
    assert type(after.model) is FoveateForConditionalGeneration
    asked = [message(picture(40, 60), "What is this?")]
    assert after.answer(asked, max_new_tokens=4)[0].text == before.answer(asked, max_new_tokens=4)[0].text


def test_both_refusals_are_told(tmp_path: Path) -> None:
    saved("llava_pixtral", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        FoveateError, match=r"'full' is not supported; and by transformers: .* cannot be load"
    ):
        loaded(tmp_path)


def test_weights_that_lack_a_part_are_refused(tmp_path: Path) -> None:
    """Transformers would continue with random numbers in its place."""
    saved("llava_siglip", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(key for key in weights if "multi_modal_projector.linear_1.weight" in key)
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(FoveateError, match=r"lacks .*multi_modal_projector\.linear_1\.weight"):
        loaded(tmp_path)


def test_the_original_layout_of_llava_is_foveates_alone(tmp_path: Path) -> None:
    config = {"model_type": "llava", "mm_vision_tower": str(tmp_path / "none"), "mm_projector_type": "odd"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FoveateError) as refusal:
        loaded(tmp_path)
    assert "transformers" not in str(refusal.value)


@pytest.mark.parametrize(("device", "dtype"), [("abacus", None), ("cpu", "float8")])
def test_wrong_devices_and_types_are_refused_once(device: str, dtype: str | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    with pytest.raises(FoveateError, match=f"'{dtype or device}'"):
        VLM.load(tmp_path, device=device, dtype=dtype)


@pytest.mark.parametrize("name", VLMS)
def test_image_tokens_are_the_features(name: str) -> None:
    """As many as the model has features for, so that its forward pass takes them."""
    model = VLMS[name]()
    inputs = model.inputs([message(picture(60, 90), "What is this?")])
    tokens = inputs["input_ids"] == model.image_token_id
    assert int(tokens.sum()) > 1
    with torch.no_grad():
        seen = model.model(**inputs).logits
        inputs["input_ids"] = inputs["input_ids"].masked_fill(tokens, 0)
        with pytest.raises((FoveateError, ValueError, RuntimeError)):  # no token for any of the features
            model.model(**inputs)
    assert bool(seen.isfinite().all())


def test_a_model_without_a_token_for_pictures() -> None:
    model = VLMS["llava"]()
    model.model.config.image_token_id = model.processor.image_token_id = None
    with pytest.raises(FoveateError, match="LlavaForConditionalGeneration has no token for pictures"):
        token_places(model, Size(60, 90))


@pytest.mark.parametrize("tokens", [0, -1])
def test_answers_of_no_token_are_refused(tokens: int) -> None:
    with pytest.raises(FoveateError, match=f"max_new_tokens must be at least 1, it is {tokens}"):
        VLMS["llava"]().answer([message(picture(60, 90), "Why?")], max_new_tokens=tokens)


def test_questions_may_not_hold_what_stands_for_a_picture() -> None:
    for name, tokens in (("gemma3", 2), ("llava", 1)):
        model = VLMS[name]()
        soft = model.processor.tokenizer.convert_ids_to_tokens(model.image_token_id)
        marks = {soft, model.processor.image_token}
        assert len(marks) == tokens
        for mark in marks:
            with pytest.raises(FoveateError, match="stands for a picture"):
                model.check_question(f"What is {mark}?")
        with pytest.raises(FoveateError, match="the question is empty"):
            model.check_question(" ")
        model.check_question("What is this?")
