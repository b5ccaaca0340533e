"""INF-LLaVA checkpoints as their authors release them, tiny and random."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from foveate import Foveate
from foveate.tiny import tiny_model, tiny_text, tiny_tokenizer, tiny_vision


def released_names(key: str) -> str:
    """Our name of a weight -> the authors', where the two differ."""
    for ours, theirs in (
        ("connector.projector.", "model.mm_projector."),
        ("connector.attention.both.query.", "model.spatial_embed.attention.linears.0."),
        ("connector.attention.both.key.", "model.spatial_embed.attention.linears.1."),
        ("connector.attention.both.value.", "model.spatial_embed.attention.linears.2."),
        ("connector.attention.both.out.", "model.spatial_embed.attention.linears.3."),
        ("connector.attention.both.norm.", "model.spatial_embed.attention.ln."),
        ("connector.fusion.embed.local.", "model.spatial_embed.ffn_crop."),
        ("connector.fusion.embed.global.", "model.spatial_embed.ffn_stride."),
        ("connector.fusion.norm.", "model.spatial_embed.ln_fuse."),
        ("language_model.", ""),
        ("vision_tower.model.", "model.vision_tower.vision_tower.vision_model."),
    ):
        key = key.replace(ours, theirs)
    return key


def write_release(model: Path, tower: Path, kind: str = "one") -> Foveate:
    """A tiny model, written to a folder as its authors release theirs: one file, or shards of either kind.

    `tower` is what its config.json names as vision tower.
    """
    m = tiny_model("inf_llava")
    weights = {released_names(key): t.clone() for key, t in m.model.state_dict().items()}
    unread = tiny_model("inf_llava", seed=3).model.vision_tower.model.encoder.layers[0].state_dict()
    prefix = "model.vision_tower.vision_tower.vision_model."
    weights |= {f"{prefix}encoder.layers.2.{key}": t.clone() for key, t in unread.items()}
    weights |= {f"{prefix}post_layernorm.{name}": torch.zeros(32) for name in ("weight", "bias")}
    model.mkdir(parents=True)
    if not tower.exists():
        tiny_vision().save_pretrained(tower)
    config = {
        **tiny_text().to_dict(),
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "mm_vision_tower": str(tower),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "image_aspect_ratio": "pad",
        "mm_patch_merge_type": "flat",
    }
    (model / "config.json").write_text(json.dumps(config))
    tiny_tokenizer().save_pretrained(model)
    write: Callable[[dict[str, Tensor], Path], Any] = torch.save if kind == "bin" else save_file
    ending, stem = ("bin", "pytorch_model") if kind == "bin" else ("safetensors", "model")
    if kind == "one":
        write(weights, model / f"{stem}.{ending}")
        return m
    places = {}
    for i in range(2):
        part = {key: weights[key] for key in sorted(weights)[i::2]}
        write(part, model / f"{stem}-{i + 1:05}-of-00002.{ending}")
        places |= dict.fromkeys(part, f"{stem}-{i + 1:05}-of-00002.{ending}")
    (model / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": places}))
    return m
