"""A VLM priced by its configuration alone costs what it costs when it runs."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Gemma3Config,
    Gemma3ImageProcessorPil,
    GotOcr2ImageProcessorPil,
    Idefics3Config,
    Idefics3ImageProcessorPil,
    InternVLConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessorPil,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
)

from foveate import upstream
from foveate.errors import FoveateError, installed
from foveate.picture.geometry import Size
from foveate.picture.limits import Limits
from foveate.zoom.asking import message
from foveate.zoom.unloaded import Unloaded
from foveate.zoom.vlm import VLM
from tests.vlms import VLMS, write

# PixtralProcessor needs torchvision; Foveate's own models are priced as methods.
FAMILIES = [name for name in VLMS if not name.startswith("foveate") and name != "llava_pixtral"]
FEW = [Size(77, 123), Size(300, 400), Size(200, 30), Size(16, 16)]


@cache
def vlm_of(family: str) -> VLM:
    return VLMS[family]()


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(family: str, tmp_path: Path) -> Path:
    return write(vlm_of(family), tmp_path)


def sizes(seed: int, count: int) -> list[Size]:
    """Of any shape, but none that Qwen's processors refuse as too narrow."""
    draw = random.Random(seed)
    found = [Size(draw.randint(8, 300), draw.randint(8, 300)) for _ in range(count)]
    assert all(max(size) < 200 * min(size) for size in found)
    return found


def noise(size: Size) -> Image.Image:
    pixels = torch.randint(256, (*size, 3), dtype=torch.uint8, generator=torch.manual_seed(size.height))
    return Image.fromarray(pixels.numpy())


def test_tokens_are_those_of_the_processor(family: str, folder: Path) -> None:
    """For 100 sizes: what `apply_chat_template` of the whole processor writes for a picture of noise."""
    vlm, unloaded = vlm_of(family), Unloaded(folder)
    without = vlm.inputs([message("?")])["input_ids"].shape[1]
    for size in sizes(5, 100):
        inputs = vlm.inputs([message(noise(size), "?")])
        tokens = int((inputs["input_ids"] == vlm.image_token_id).sum())
        found = unloaded.shown(size)
        around = 2 if family.startswith("qwen") else 0  # marks that its template writes, not its processor
        assert found.visual_tokens == tokens, size
        assert found.picture_tokens == inputs["input_ids"].shape[1] - without - around, size


def test_without_a_tokenizer_tokens_are_the_same(family: str, tmp_path: Path) -> None:
    vlm = vlm_of(family)
    unloaded = Unloaded(write(vlm, tmp_path, tokenizer=False))
    for size in FEW:
        tokens = int((vlm.inputs([message(noise(size), "?")])["input_ids"] == vlm.image_token_id).sum())
        price = unloaded.price(size)
        assert (price.visual_tokens, price.picture_tokens) == (tokens, tokens)
        assert [note for note in price.notes if "no tokenizer" in note] == [*price.notes]


@sdpa_kernel(SDPBackend.MATH)  # torch has no formula for its attention on the CPU
def test_costs_are_those_of_the_network_as_it_runs(family: str, folder: Path) -> None:
    """torch's own counter on real weights; the network's own cache and features."""
    vlm = vlm_of(family)
    network, decoder = vlm.model, vlm.model.get_decoder()
    for size in FEW[:3]:
        price = Unloaded(folder).price(size, text_tokens=9)
        inputs = vlm.processor(images=noise(size), text=vlm.processor.image_token, return_tensors="pt")
        rest = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
        given = {key: value for key, value in inputs.items() if key not in rest}
        with torch.no_grad(), FlopCounterMode(display=False) as encode:
            found = network.get_image_features(**given).pooler_output
        rows = sum(row[..., 0].numel() for row in (found if isinstance(found, tuple | list) else [found]))
        embeds = torch.zeros(1, price.picture_tokens + 9, decoder.config.hidden_size)
        with torch.no_grad(), FlopCounterMode(display=False) as prefill:
            out = decoder(inputs_embeds=embeds, use_cache=True)
            network.get_output_embeddings()(out.last_hidden_state[:, -1:])
        assert price.visual_tokens == rows
        assert price.notes == ()
        assert price.encode_flops == encode.get_total_flops() > 0
        assert price.prefill_flops == prefill.get_total_flops() > price.decode_flops > 0
        assert price.kv_bytes == upstream.cache_bytes(out[upstream.CACHE]) // 2  # float32 here


def real(folder: Path, config: Any, images: Any, processor: str, **values: Any) -> Unloaded:
    """Released shapes with a shallow network: its depth changes no size and no number of tokens."""
    config.save_pretrained(folder)
    images.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": processor, **values}))
    return Unloaded(folder)


SHORT = {"num_hidden_layers": 1}
GRIDS = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]


def qwen3_vl(folder: Path) -> Unloaded:
    config = Qwen3VLConfig(text_config=SHORT, vision_config={"depth": 1, "deepstack_visual_indexes": [0]})
    size = {"shortest_edge": 65536, "longest_edge": 16777216}
    images = Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, size=size)
    return real(folder, config, images, "Qwen3VLProcessor")


def llava_onevision(folder: Path) -> Unloaded:
    vision = {"model_type": "siglip_vision_model", "hidden_size": 144, "intermediate_size": 288}
    vision |= {"num_attention_heads": 2, "image_size": 384, "patch_size": 14, "vision_use_head": False}
    config = LlavaOnevisionConfig(
        text_config={**SHORT, "model_type": "qwen2"},
        vision_config={**vision, **SHORT},
        image_grid_pinpoints=GRIDS,
        vision_feature_layer=-1,
    )
    images = LlavaOnevisionImageProcessorPil(size={"height": 384, "width": 384}, image_grid_pinpoints=GRIDS)
    strategy = {"vision_feature_select_strategy": "full"}
    return real(folder, config, images, "LlavaOnevisionProcessor", num_image_tokens=729, **strategy)


def internvl(folder: Path) -> Unloaded:
    config = InternVLConfig(text_config={**SHORT, "model_type": "qwen2"}, vision_config=SHORT)
    images = GotOcr2ImageProcessorPil(
        size={"height": 448, "width": 448}, crop_to_patches=True, max_patches=12
    )
    return real(folder, config, images, "InternVLProcessor", image_seq_length=256)


def smolvlm(folder: Path) -> Unloaded:
    vision = {"hidden_size": 144, "image_size": 384, "patch_size": 14, "num_attention_heads": 2}
    config = Idefics3Config(
        text_config={**SHORT, "model_type": "llama"}, vision_config={**vision, **SHORT}, scale_factor=3
    )
    sides = {"size": {"longest_edge": 1536}, "max_image_size": {"longest_edge": 384}}
    return real(folder, config, Idefics3ImageProcessorPil(**sides), "Idefics3Processor", image_seq_len=81)


def gemma3(folder: Path) -> Unloaded:
    vision = {"hidden_size": 144, "image_size": 896, "patch_size": 14, "num_attention_heads": 2}
    config = Gemma3Config(text_config=SHORT, vision_config={**vision, **SHORT, "vision_use_head": False})
    images = Gemma3ImageProcessorPil(size={"height": 896, "width": 896})
    return real(folder, config, images, "Gemma3Processor", image_seq_length=256)


@pytest.mark.parametrize(
    ("family", "width", "height", "seen", "tokens", "views"),
    [
        (qwen3_vl, 4000, 3000, (4000, 3008), 125 * 94, 1),
        (qwen3_vl, 400, 5000, (384, 4992), 12 * 156, 1),
        (llava_onevision, 3000, 2250, (2304, 1728), 7309, 31),
        (llava_onevision, 500, 400, (768, 615), 729 + 44 * 54 + 44, 5),
        (internvl, 2000, 1500, (1792, 1344), 13 * 256, 13),
        (internvl, 1000, 3000, (896, 2688), 13 * 256, 13),
        (smolvlm, 4000, 3000, (1536, 1152), 13 * 81, 13),
        (smolvlm, 3000, 1000, (1536, 768), 9 * 81, 9),
        (gemma3, 4000, 3000, (896, 896), 256, 1),
    ],
)
def test_released_shapes(
    family: Any, width: int, height: int, seen: tuple[int, int], tokens: int, views: int, tmp_path: Path
) -> None:
    """By the papers' and processors' own rules, worked out by hand."""
    found = family(tmp_path).shown(Size(height, width))
    assert found.seen == Size(*reversed(seen))
    assert found.visual_tokens == tokens
    assert found.views == views
    assert found.part is None


def test_a_view_that_shows_only_the_middle_says_so(tmp_path: Path) -> None:
    """LLaVA's processor cuts a square out of the middle."""
    price = Unloaded(write(vlm_of("llava"), tmp_path)).price(Size(300, 900))
    assert price.part is not None and price.part.height == 300 and abs(price.part.width - 300) <= 5
    assert price.effective_height == 56 and abs((price.effective_width or 0) - 168) <= 2


def test_enlarged_pictures_are_measured_too(tmp_path: Path) -> None:
    price = Unloaded(write(vlm_of("llava_siglip"), tmp_path)).price(Size(3, 2))
    assert (price.effective_height, price.effective_width) == (28, 28)


# Wrong input


def test_config_and_processor_that_do_not_belong_together(tmp_path: Path) -> None:
    folder = write(vlm_of("internvl"), tmp_path)
    path = folder / "processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_seq_length": 9}))
    (note,) = Unloaded(folder).price(Size(28, 28)).notes
    assert "4 features" in note and "9 places" in note


def test_folders_that_are_none(tmp_path: Path) -> None:
    folder = write(vlm_of("qwen3_vl"), tmp_path)
    with pytest.raises(FoveateError, match="too narrow"):
        Unloaded(folder).price(Size(1, 1000))
    with pytest.raises(FoveateError, match="max_pixels 100"):
        Unloaded(folder, Limits(max_pixels=100)).price(Size(20, 20))
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"num_heads": 2', '"num_heads": "two"'))
    with pytest.raises(FoveateError, match=r"config\.json"):
        Unloaded(folder)
    (folder / "config.json").write_text(config)
    path = folder / "processor_config.json"
    values = json.loads(path.read_text())
    for name, said in (("SeeingProcessor", "SeeingProcessor"), ("CLIPModel", "CLIPModel"), (7, "7")):
        path.write_text(json.dumps({**values, "processor_class": name}))
        with pytest.raises(FoveateError, match=said):
            Unloaded(folder)
    if not installed("torchvision"):
        path.write_text(json.dumps({**values, "processor_class": "PixtralProcessor"}))
        with pytest.raises(FoveateError, match="torchvision"):
            Unloaded(folder)
    path.unlink()
    with pytest.raises(FoveateError, match="neither"):
        Unloaded(folder)
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(FoveateError, match="gpt2"):
        Unloaded(folder)
