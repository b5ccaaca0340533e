"""Keys of other people's configurations: every one is honoured, refused by name, or without effect."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
)

from foveate import FoveateError, FoveateForConditionalGeneration, FoveateProcessor, load
from foveate.composing import compose
from foveate.tiny import tiny_model, tiny_text, tiny_tokenizer
from tests.docs.stand_ins import clip_tower, hf_llava, hf_llava_next
from tests.model.test_checkpoints import ORIGINAL, original_folders
from tests.support import gap, picture

REFUSED, SAME = "refused by name", "no effect"


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# key, value, and what becomes of it; "honoured" has tests of its own below
ORIGINALS: list[tuple[str, Any, str]] = [
    ("mm_vision_select_feature", "patch", SAME),
    ("mm_vision_select_feature", "cls_patch", REFUSED),
    ("mm_vision_select_layer", [-2, -5], REFUSED),
    ("mm_use_im_start_end", False, SAME),
    ("mm_use_im_start_end", True, REFUSED),
    ("mm_use_im_patch_token", True, SAME),  # a token that no prompt contains
    ("mm_hidden_size", 32, SAME),
    ("mm_projector_lr", 2e-5, SAME),
    ("mm_projector_type", "identity", "config.json"),
    ("mm_patch_merge_type", "flat", SAME),
    ("mm_vision_tower", None, REFUSED),
    ("mm_vision_tower", 5, REFUSED),
    ("mm_new_thing", "on", REFUSED),
    ("mm_new_thing", None, SAME),
    ("mm_new_thing", False, SAME),
    ("use_mm_proj", True, SAME),
    ("use_mm_proj", False, REFUSED),
    ("s2", True, REFUSED),
    ("image_crop_resolution", 224, REFUSED),
    ("image_split_resolution", 224, REFUSED),
    ("image_crop_resolution", None, SAME),
    ("tune_mm_mlp_adapter", True, SAME),
    ("freeze_mm_mlp_adapter", True, SAME),
    ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantised"),
]
HUGGING: list[tuple[str, Any, str]] = [
    ("vision_feature_select_strategy", "default", SAME),
    ("vision_feature_select_strategy", "full", REFUSED),
    ("vision_feature_layer", [-2, -5], REFUSED),
    ("multimodal_projector_bias", True, SAME),
    ("multimodal_projector_bias", False, REFUSED),
    ("projector_hidden_act", "mish", REFUSED),
    ("image_seq_length", 16, SAME),
    ("image_token_index", 7, REFUSED),
    ("quantization_config", {"quant_method": "gptq", "bits": 4}, r"quantised \(gptq\)"),
]
PICTURES: list[tuple[str, Any, str]] = [
    ("resample", 3, SAME),
    ("resample", 2, REFUSED),
    ("do_rescale", True, SAME),
    ("do_rescale", False, REFUSED),
    ("rescale_factor", 1 / 255, SAME),
    ("rescale_factor", 0.00392156862745098, SAME),
    ("rescale_factor", 1 / 127.5, REFUSED),
    ("rescale_factor", "x", REFUSED),
    ("do_resize", True, SAME),
    ("do_resize", False, REFUSED),
    ("do_convert_rgb", True, SAME),
    ("do_convert_rgb", None, SAME),
    ("do_convert_rgb", False, REFUSED),
    ("do_normalize", True, SAME),
    ("do_flip_channel_order", True, REFUSED),
    ("do_flip_channel_order", False, SAME),
    ("crop_pct", 0.9, REFUSED),
    ("size", {"shortest_edge": 56}, SAME),
    ("size", 56, SAME),
    ("size", {"height": 56, "width": 56}, SAME),
    ("size", {"shortest_edge": 64}, REFUSED),
    ("size", {"height": 56, "width": 64}, REFUSED),
    ("size", {"longest_edge": 56}, REFUSED),
    ("size", "big", REFUSED),
    ("crop_size", {"height": 48, "width": 48}, REFUSED),
    ("crop_size", 48, REFUSED),
    ("image_mean", [0.5, 0.5], REFUSED),
    ("image_mean", 0.5, REFUSED),
    ("image_std", [0, 0, 0], REFUSED),
    ("image_std", "abc", REFUSED),
]


def outcome(key: str, value: Any, what: str, door: Callable[[], Any]) -> None:
    if what == SAME:
        door()
        return
    with pytest.raises(FoveateError, match=key if what == REFUSED else what) as raised:
        door()
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("released")
    hf_llava(place / "hf")
    hf_llava_next(place / "next")
    original_folders(place / "original", ORIGINAL)
    clip_tower(place / "clip")
    images = (place / "hf" / "processor_config.json").read_text()
    (place / "original" / "tower" / "preprocessor_config.json").write_text(
        json.dumps(json.loads(images)["image_processor"])
    )
    return place


@pytest.fixture
def copied(released: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(released, tmp_path / "copy"))


@pytest.mark.parametrize(("key", "value", "what"), ORIGINALS)
def test_original_configs(key: str, value: Any, what: str, copied: Path) -> None:
    folder = copied / "original"
    change(folder / "model" / "config.json", **{key: value})
    tower = None if key == "mm_vision_tower" else folder / "tower"
    outcome(key, value, what, lambda: FoveateProcessor.from_pretrained(folder / "model", vision_tower=tower))


@pytest.mark.parametrize("layout", ["hf", "next"])
@pytest.mark.parametrize(("key", "value", "what"), HUGGING)
def test_transformers_configs(key: str, value: Any, what: str, layout: str, copied: Path) -> None:
    change(copied / layout / "config.json", **{key: value})
    outcome(key, value, what, lambda: load(copied / layout, device="cpu"))


def test_next_has_its_newline(copied: Path) -> None:
    change(copied / "next" / "config.json", use_image_newline_parameter=False)
    with pytest.raises(
        FoveateError, match="use_image_newline_parameter must be True: False is not supported"
    ):
        load(copied / "next", device="cpu")


@pytest.mark.parametrize("layout", ["hf", "next", "original"])
@pytest.mark.parametrize(("key", "value", "what"), PICTURES)
def test_preprocessors(key: str, value: Any, what: str, layout: str, copied: Path) -> None:
    folder = copied / layout
    if layout == "original":
        change(folder / "tower" / "preprocessor_config.json", **{key: value})
        folder = folder / "model"
    else:
        path = folder / "processor_config.json"
        values = json.loads(path.read_text())
        values["image_processor"] |= {key: value}
        path.write_text(json.dumps(values))
    tower = copied / "original" / "tower" if layout == "original" else None
    outcome(key, value, what, lambda: FoveateProcessor.from_pretrained(folder, vision_tower=tower))


@pytest.mark.parametrize(
    ("key", "value"), [("resample", 2), ("do_rescale", False), ("do_normalize", False), ("size", 64)]
)
def test_our_own_processor_and_calls(key: str, value: Any, tmp_path: Path) -> None:
    made = tiny_model("llava")
    with pytest.raises(FoveateError, match=key):
        made.processor.image_processor(picture(20, 20), **{key: value})
    made.save(tmp_path)
    values = json.loads((tmp_path / "processor_config.json").read_text())
    values["image_processor"] |= {key: value}
    (tmp_path / "processor_config.json").write_text(json.dumps(values))
    with pytest.raises(FoveateError, match=key):
        load(tmp_path, device="cpu")


def test_towers_of_new_models(copied: Path) -> None:
    """Mean and std are read and steps checked; the size is the tower's own."""
    path = copied / "clip" / "preprocessor_config.json"
    if not path.is_file():
        path.write_text("{}")

    def made() -> Any:
        return compose(copied / "clip", tiny_text(), tokenizer=tiny_tokenizer()).processor.image_processor

    change(path, size={"shortest_edge": 64}, image_mean=[0.1, 0.2, 0.3])
    assert made().image_mean == [0.1, 0.2, 0.3]
    change(path, do_normalize=False)
    assert (made().image_mean, made().image_std) == ([0.0] * 3, [1.0] * 3)
    change(path, resample=0)
    with pytest.raises(FoveateError, match="resample must be 3: 0 is not supported"):
        made()


# Honoured: the same numbers as transformers


@torch.no_grad()
def logits(model: Any, processor: Any, shown: Any = None) -> torch.Tensor:
    said = [{"role": "user", "content": [{"type": "image", "image": shown or picture(30, 47)}]}]
    said[0]["content"].append({"type": "text", "text": "What?"})
    inputs = processor.apply_chat_template(said, tokenize=True, return_dict=True, return_tensors="pt")
    return model.eval()(**inputs).logits[:, -5:]


ACTIVATIONS = ["gelu", "relu", "silu", "swish", "quick_gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast"]


@pytest.mark.parametrize("layout", ["hf", "next"])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_the_projector_s_activation(act: str, layout: str, copied: Path, tmp_path: Path) -> None:
    folder = copied / layout
    change(folder / "config.json", projector_hidden_act=act)
    kind = LlavaForConditionalGeneration if layout == "hf" else LlavaNextForConditionalGeneration
    theirs = kind.from_pretrained(folder)
    expected = logits(theirs, AutoProcessor.from_pretrained(folder))
    made = load(folder, device="cpu", dtype="float32")
    assert gap(logits(made.model, made.processor), expected) < 1e-3
    made.save(tmp_path / "ours")
    again = load(tmp_path / "ours", device="cpu", dtype="float32")
    assert gap(logits(again.model, again.processor), expected) < 1e-3
    if layout == "hf":
        spotted = load(folder, device="cpu", dtype="float32", method="chain_of_spot")
        name = type(made.model.connector.projector[1])
        assert isinstance(spotted.model.connector.projector[1], name)


@pytest.mark.parametrize(
    "values",
    [{"do_normalize": False}, {"do_center_crop": False, "size": {"height": 56, "width": 56}}],
    ids=["not normalised", "not cropped"],
)
def test_what_a_preprocessor_says(values: dict[str, Any], copied: Path) -> None:
    path = copied / "hf" / "processor_config.json"
    whole = json.loads(path.read_text())
    whole["image_processor"] |= values
    path.write_text(json.dumps(whole))
    theirs = LlavaForConditionalGeneration.from_pretrained(copied / "hf")
    expected = logits(theirs, AutoProcessor.from_pretrained(copied / "hf"))
    made = load(copied / "hf", device="cpu", dtype="float32")
    assert gap(logits(made.model, made.processor), expected) < 1e-3


# LLaVA-NeXT as its authors release it


def test_llava_next_of_its_authors(released: Path, tmp_path: Path) -> None:
    """The same model in transformers' layout gives the same logits."""
    hf = released / "next"
    renamed = {}
    for key, tensor in load_file(hf / "model.safetensors").items():
        new = key.removeprefix("model.")
        if new.startswith("language_model.lm_head."):
            new = new.removeprefix("language_model.")
        elif new.startswith("language_model."):
            new = "model." + new.removeprefix("language_model.").removeprefix("model.")
        elif new.startswith("multi_modal_projector.linear_"):
            number = "0" if "linear_1" in new else "2"
            new = f"model.mm_projector.{number}.{new.rpartition('.')[2]}"
        elif new.startswith("vision_tower."):
            inner = new.removeprefix("vision_tower.").removeprefix("vision_model.")
            new = "model.vision_tower.vision_tower.vision_model." + inner
        elif new == "image_newline":
            new = "model.image_newline"
        renamed[new] = tensor.clone()
    folder, tower = original_folders(
        tmp_path,
        {
            **ORIGINAL,
            "image_aspect_ratio": "anyres",
            "mm_patch_merge_type": "spatial_unpad",
            "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]],
            "mm_vision_tower_lr": 2e-6,
            "image_crop_resolution": None,
        },
    )
    (folder / "pytorch_model.bin").unlink()
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    made = load(folder, vision_tower=tower, device="cpu", dtype="float32")
    other = load(hf, device="cpu", dtype="float32")
    assert made.model.config.method == "anyres"
    assert made.plan(picture(30, 90)).tokens == other.plan(picture(30, 90)).tokens
    shown = picture(100, 150)  # small ones fit several grids alike, and the port lists them in another order
    inputs = other.processor
    assert gap(logits(made.model, inputs, shown), logits(other.model, inputs, shown)) < 1e-4
    for values, message in (
        ({"mm_patch_merge_type": "flat"}, "mm_patch_merge_type 'flat'"),
        ({"image_grid_pinpoints": "(1x1),(2x2)"}, "image_grid_pinpoints should be a list"),
    ):
        change(folder / "config.json", **values)
        with pytest.raises(FoveateError, match=message):
            load(folder, vision_tower=tower, device="cpu")
        change(folder / "config.json", mm_patch_merge_type="spatial_unpad")


def test_quantised_folders_say_so(tmp_path: Path) -> None:
    tiny_model("llava").save(tmp_path)
    change(
        tmp_path / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
    )
    for door in (load, FoveateProcessor.from_pretrained, FoveateForConditionalGeneration.from_pretrained):
        with pytest.raises(FoveateError, match=r"the weights are quantised \(bitsandbytes, 4 bits\)"):
            door(tmp_path)
