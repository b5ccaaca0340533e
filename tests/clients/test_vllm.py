"""vLLM: what its plugin knows without it. `benchmarks/vllm_parity.py` runs vLLM itself."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import CONFIG_MAPPING

from foveate import FoveateConfig, FoveateError, FoveateForConditionalGeneration
from foveate.clients.vllm import (
    ARCHITECTURE,
    MISSING,
    MODEL,
    begun,
    check_encoded,
    check_method,
    check_turn,
    field_sizes,
    fullest_picture,
    register,
    renamings,
)
from foveate.methods import method_class, method_names
from foveate.methods.base import Method, TowerGeometry
from foveate.model.modeling import FoveateModel
from foveate.options import merged
from foveate.tiny import tiny_model, tiny_text, tiny_tokenizer, tiny_vision
from tests.model.test_modeling import FAMILIES, LLM
from tests.support import picture

SERVED: Mapping[str, Mapping[str, Any]] = {"slime": {"gamma": 1.0}, "coroi": {"chain": False}}


def method(name: str, **options: Any) -> Method:
    kind = method_class(name)
    return kind(TowerGeometry(56, 14), merged(kind.Options, kind.tiny, options))


# The plugin


def test_the_entry_point_is_there() -> None:
    found = {point.name: point.value for point in entry_points(group="vllm.general_plugins")}
    assert found["foveate"] == f"{register.__module__}:{register.__name__}"
    assert MODEL == "foveate.clients.vllm_model:FoveateVllm"
    assert FoveateForConditionalGeneration.__name__ == ARCHITECTURE


def test_without_vllm_the_error_says_where_it_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "foveate.clients.vllm_model", raising=False)
    with pytest.raises(FoveateError) as error:
        importlib.import_module("foveate.clients.vllm_model")
    assert str(error.value).startswith(MISSING)


# What it refuses


@pytest.mark.parametrize("name", method_names())
def test_a_method_that_needs_the_question_or_the_picture_is_refused(name: str) -> None:
    made = method(name)
    assert (made.only_here is not None) == (made.uses_query or made.reads_source)
    if made.only_here is None:
        check_method(made)
        return
    with pytest.raises(FoveateError, match=r"does not run in vLLM, as .*: serve it with `foveate serve`"):
        check_method(made)
    check_method(method(name, **SERVED[name]))


def test_a_budget_brings_the_router_back() -> None:
    with pytest.raises(FoveateError, match="gamma: 1 without max_visual_tokens"):
        check_method(method("slime", gamma=1.0, max_visual_tokens=40))


def test_a_second_turn_is_refused() -> None:
    check_turn(method("chain_of_spot"), 1)
    check_turn(method("llava"), 2)
    with pytest.raises(FoveateError, match=r"vLLM runs the first turn of Chain-of-Spot.*`foveate serve`"):
        check_turn(method("chain_of_spot"), 2)


def test_what_a_connector_gives_besides_tokens_is_refused() -> None:
    check_encoded(method("llava"), drops=False, injects=False)
    with pytest.raises(FoveateError, match="drops visual tokens: serve it with `foveate serve`"):
        check_encoded(method("llava"), drops=True, injects=False)
    with pytest.raises(FoveateError, match="changes states inside the LLM: serve it with"):
        check_encoded(method("llava"), drops=False, injects=True)


# Counts


@pytest.mark.parametrize("name", method_names())
def test_counts_are_those_of_the_prompt(name: str) -> None:
    processor = tiny_model(name, SERVED.get(name)).processor
    images = [picture(*size) for size in ((60, 100), (200, 40), (56, 56), (1, 9))]
    told = processor._get_num_multimodal_tokens([(image.height, image.width) for image in images])
    for image, tokens, views in zip(images, told["num_image_tokens"], told["num_image_patches"], strict=True):
        made = processor(images=image, text="<image>", return_tensors="pt")
        assert int((made["input_ids"] == processor.image_token_id).sum()) == tokens
        assert len(made["pixel_values"]) == views
    assert "num_image_tokens" not in processor._get_num_multimodal_tokens()


@pytest.mark.parametrize("name", method_names())
@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 3000), width=st.integers(1, 3000))
def test_no_picture_has_more_tokens_than_the_fullest(name: str, height: int, width: int) -> None:
    made = method(name, **SERVED.get(name, {}))
    most = fullest_picture(made.plan, 56)
    plan = made.plan(height, width)
    assert (plan.tokens, len(plan.views)) <= (made.plan(*most).tokens, len(made.plan(*most).views))


def test_the_fullest_picture_has_the_shape_of_the_grid() -> None:
    """A square would leave half of each of these grids empty."""
    made = method("anyres", grids=[[1, 2], [2, 1]])
    assert fullest_picture(made.plan, 56) in ((56, 112), (112, 56))
    assert made.plan(10_000, 10_000).tokens < made.plan(56, 112).tokens


@torch.no_grad()
@pytest.mark.parametrize("name", method_names())
def test_each_picture_gets_its_own_rows(name: str) -> None:
    """vLLM cuts the inputs of several pictures apart, and puts those of several prompts together."""
    made = tiny_model(name, SERVED.get(name))
    images = [picture(*size) for size in ((60, 100), (33, 40), (56, 56), (300, 40))]
    inputs = made.processor.image_processor(images)
    views = made.processor._get_num_multimodal_tokens([image.size[::-1] for image in images])
    assert inputs.pop("num_patches").tolist() == views["num_image_patches"]  # for other programs
    sizes = field_sizes(views["num_image_patches"])
    assert sizes.keys() == set(inputs)
    cut = {key: inputs[key].split(rows) for key, rows in sizes.items()}
    for i, image in enumerate(images):
        alone = made.processor.image_processor(image)
        assert all(torch.equal(parts[i], alone[key]) for key, parts in cut.items())
    order = (2, 0, 3)
    mixed = {key: torch.cat([parts[i] for i in order]) for key, parts in cut.items()}
    tokens = made.model.model.get_image_features(**mixed).pooler_output
    whole = made.model.model.get_image_features(**inputs).pooler_output
    for row, i in zip(tokens, order, strict=True):
        torch.testing.assert_close(row, whole[i], atol=1e-5, rtol=1e-4)


# Names and prompts


@pytest.mark.parametrize("kind", ["llama", *FAMILIES])
def test_names_are_those_of_the_model_without_its_head(kind: str) -> None:
    text = tiny_text() if kind == "llama" else CONFIG_MAPPING[kind](**LLM, **FAMILIES[kind])
    config = FoveateConfig(vision_config=tiny_vision(), text_config=text, method="anyres")
    with torch.device("meta"):
        saved = FoveateForConditionalGeneration(config).state_dict()
        wanted = FoveateModel(config).state_dict()
    renamed = {}
    for key, tensor in saved.items():
        for pattern, new in renamings(text).items():
            key = re.sub(pattern, new, key)
        renamed[key] = tensor.shape
    heads = {key: shape for key, shape in renamed.items() if key.startswith("lm_head.")}
    assert heads.keys() - {"lm_head.bias"} == {"lm_head.weight"}
    assert renamed == heads | {f"model.{key}": tensor.shape for key, tensor in wanted.items()}


def test_a_prompt_begins_as_the_tokenizer_begins_it() -> None:
    plain, begins = tiny_tokenizer(), tiny_tokenizer()
    start = begins.bos_token_id
    begins.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", start)]
    )
    assert begun([7, 8], plain) == [7, 8]
    assert begun([7, 8], begins) == [start, 7, 8]
    assert begun([start, 7], begins) == [start, 7]
    assert begun([], begins) == [start]
