"""Tiny random checkpoints in the layouts of the released ones that the pages name: tests have no network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    set_seed,
)

from foveate.model.text import chat_template
from foveate.tiny import tiny_text, tiny_tokenizer, tiny_vision
from tests.methods import inf_llava_release
from tests.methods.slime_release import write_release
from tests.vlms import VLMS
from tests.vlms import write as write_vlm

SIZES = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
TOWER = "openai/clip-vit-large-patch14-336"
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]


def hf_llava(folder: Path) -> None:
    """LLaVA-1.5 as transformers saves it."""
    config = LlavaConfig(**_parts(), image_seq_length=16)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(CLIPImageProcessorPil(**SIZES), tiny_tokenizer(), **_common()).save_pretrained(folder)


def hf_llava_next(folder: Path) -> None:
    """LLaVA-NeXT as transformers saves it."""
    config = LlavaNextConfig(**_parts(), image_grid_pinpoints=PINPOINTS)
    LlavaNextForConditionalGeneration(config).save_pretrained(folder)
    images = LlavaNextImageProcessorPil(**SIZES, image_grid_pinpoints=PINPOINTS)
    LlavaNextProcessor(images, tiny_tokenizer(), **_common()).save_pretrained(folder)


def clip_tower(folder: Path) -> None:
    """A CLIP vision tower."""
    CLIPVisionModel(tiny_vision()).save_pretrained(folder)
    CLIPImageProcessorPil(**SIZES).save_pretrained(folder)


def language_model(folder: Path) -> None:
    """A Llama with its tokenizer."""
    LlamaForCausalLM(tiny_text()).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def original_llava(folder: Path) -> None:
    """LLaVA-1.5 as its authors' code saves it: a flat config, `mm_*` keys, the tower named but kept apart."""
    model = LlavaForConditionalGeneration(LlavaConfig(**_parts(), image_seq_length=16))
    renamed = {}
    for key, tensor in model.state_dict().items():
        if key.startswith("lm_head."):
            renamed[key] = tensor
        elif key.startswith("model.language_model."):
            renamed[key.replace("language_model.", "", 1)] = tensor
        elif key.startswith("model.multi_modal_projector.linear_"):
            number = "0" if "linear_1" in key else "2"
            renamed[f"model.mm_projector.{number}.{key.rpartition('.')[2]}"] = tensor
    folder.mkdir(parents=True)
    save_file({key: t.clone() for key, t in renamed.items()}, folder / "model.safetensors", {"format": "pt"})
    config = {
        **tiny_text().to_dict(),
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": str(folder.parents[1] / TOWER),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "image_aspect_ratio": "pad",
    }
    (folder / "config.json").write_text(json.dumps(config))
    tiny_tokenizer().save_pretrained(folder)


def original_slime(folder: Path) -> None:
    """SliME as its authors release it."""
    write_release(folder, folder.parents[1] / TOWER)


def original_inf_llava(folder: Path) -> None:
    """INF-LLaVA as its authors release it."""
    inf_llava_release.write_release(folder, folder.parents[1] / TOWER)


def qwen3_vl(folder: Path) -> None:
    """Qwen3-VL's configuration and processor, without weights."""
    write_vlm(VLMS["qwen3_vl"](), folder)


# A name on a page -> its stand-in.
STAND_INS: dict[str, Callable[[Path], None]] = {
    "llava-hf/llava-1.5-7b-hf": hf_llava,
    "llava-hf/llava-v1.6-vicuna-7b-hf": hf_llava_next,
    "liuhaotian/llava-v1.5-7b": original_llava,
    "Zuyan/llava-CoS-13B": original_llava,
    TOWER: clip_tower,
    "lmsys/vicuna-7b-v1.5": language_model,
    "yifanzhang114/SliME-vicuna-7B": original_slime,
    "WeihuangLin/INF-LLaVA-sft": original_inf_llava,
    "Qwen/Qwen3-VL-4B-Instruct": qwen3_vl,
}


def write_all(folder: Path) -> dict[str, Path]:
    """Writes every stand-in below `folder`; hub id -> its folder.

    Every second token ends an answer: random weights would otherwise write up to the bound each time.
    """
    made, ends = {}, {"eos_token_id": [2, *range(3, len(tiny_tokenizer()), 2)], "pad_token_id": 0}
    for name, write in STAND_INS.items():
        set_seed(0)
        made[name] = folder / name
        write(made[name])
        if name != TOWER:
            (made[name] / "generation_config.json").write_text(json.dumps(ends))
    return made


def _parts() -> dict[str, Any]:
    image_token = tiny_tokenizer().convert_tokens_to_ids("<image>")
    return {
        "vision_config": tiny_vision(),
        "text_config": tiny_text(),
        "image_token_index": image_token,
    }


def _common() -> dict[str, Any]:
    return {
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": chat_template("vicuna_v1"),
    }
