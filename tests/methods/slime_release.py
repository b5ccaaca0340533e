"""SliME checkpoints as its authors release them, tiny and random."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from foveate import Foveate
from foveate.tiny import tiny_model, tiny_text, tiny_tokenizer, tiny_vision


def released_names(key: str) -> str:
    """Our name of a weight -> the authors', where the two differ."""
    for ours, theirs in (
        ("connector.adapter.mlp.", "model.mm_projector.projection."),
        ("connector.adapter.gate", "model.mm_projector.w_gate"),
        ("connector.adapter.former.", "model.mm_projector.attn."),
        ("connector.compressor.", "model.sampler.post_qformer."),
        ("language_model.", ""),
        ("vision_tower.model.", "model.vision_tower.vision_tower.vision_model."),
        (".positions", ".pos_embed"),
        (".queries", ".query"),
        ("query_norm", "ln_q"),
        ("feature_norm", "ln_kv"),
        ("output_norm", "ln_post"),
        (".project_in.", ".attn.in_proj_"),
        (".project_out.", ".attn.out_proj."),
    ):
        key = key.replace(ours, theirs)
    return key


def write_release(model: Path, tower: Path, kind: str = "one") -> Foveate:
    """A tiny model, written to a folder as its authors release theirs: one file, or shards of either kind.

    `tower` is what its config.json names as vision tower.
    """
    m = tiny_model("slime", {"queries": 4, "gamma": 0.9})
    weights = {released_names(key): t.clone() for key, t in m.model.state_dict().items()}
    extra = {name: torch.zeros(n) for name, n in (("w_noise", (32, 2)), ("mean", (1,)), ("std", (1,)))}
    weights |= {f"model.mm_projector.{name}": t.bfloat16() for name, t in extra.items()}
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(6)  # as old versions saved it
    model.mkdir(parents=True)
    if not tower.exists():
        tiny_vision().save_pretrained(tower)
    comma = m.processor.tokenizer(",", add_special_tokens=False)["input_ids"][-1]
    config = {
        **tiny_text().to_dict(),
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "mm_vision_tower": str(tower),
        "mm_projector_type": "gated",
        "mm_resampler_type": "cosine",
        "mm_resampler_dim": 4,
        "mm_resampler_topp": 0.9,
        "mm_resampler_temp": 1.0,
        "seperator": comma,
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial",
    }
    (model / "config.json").write_text(json.dumps(config))
    tiny_tokenizer().save_pretrained(model)
    names = sorted(weights)
    shards = {"bin": 2, "safetensors": 2, "one": 1}[kind]
    ending = "bin" if kind == "bin" else "safetensors"
    stem = "pytorch_model" if kind == "bin" else "model"
    weight_map = {}
    for i in range(shards):
        file = f"{stem}.{ending}" if shards == 1 else f"{stem}-{i + 1:05}-of-{shards:05}.{ending}"
        part = {name: weights[name] for name in names[i::shards]}
        (torch.save if kind == "bin" else save_file)(part, model / file)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        (model / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return m
