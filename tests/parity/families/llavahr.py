"""LLaVA-HR: adapter, final fusion, whole dual tower, preprocessing, a checkpoint with its stage-1 file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPVisionConfig

from foveate import FoveateForConditionalGeneration
from foveate.methods.base import Widths
from foveate.methods.layouts import convert_key
from foveate.methods.llava_hr import (
    DualTower,
    FinalFusion,
    LlavaHR,
    LlavaHRConnector,
    LlavaHROptions,
    MRAdapter,
    Pair,
    as_map,
    as_tokens,
)
from foveate.model.checkpoints import fill_connector, read_preprocessor, stage_files
from foveate.model.processing import CLIP_MEAN, CLIP_STD, FoveateImageProcessor, image_processor_for
from foveate.options import build_options
from tests.parity.checkpoints import embedded, load, model_folder, prompt, stage_folder, tower_folder, words
from tests.parity.golden import Case, Comparison, Family, Tensors
from tests.support import greedy

LAYOUT = LlavaHR.layouts[0]
GROUPS = 4  # into which the authors' code cuts the ViT's blocks
ADAPTER = "model.vision_tower.align_stages_latent.0."


def fill(module: nn.Module, state: Mapping[str, Tensor], theirs: str, ours: str) -> None:
    """Loads weights under the authors' names; `theirs` and `ours`: where the module is in the two models."""
    renamed = {}
    for key, tensor in state.items():
        name = convert_key(LAYOUT, f"{theirs}{key}")
        if name is not None and not any(re.search(pattern, name) for pattern in LAYOUT.optional):
            renamed[name.removeprefix(ours)] = tensor
    module.load_state_dict(renamed)


def numbered(tensors: Iterable[str], name: str) -> list[int]:
    """The numbers of a case's pictures or adapters: i for each tensor that is called `name`i."""
    return sorted(int(key.removeprefix(name)) for key in tensors if re.fullmatch(rf"{name}\d+", key))


def mr_adapter(compare: Comparison) -> None:
    """Equations 3 and 4 as the code has them, on equal, coarser and finer high-resolution grids."""
    case = compare.case
    given, out = case.part("in"), case.part("out")
    adapter = MRAdapter(case.config["fast_dim"], case.config["slow_dim"], LlavaHROptions())
    fill(adapter, case.part("state"), ADAPTER, "vision_tower.adapters.0.")
    for i in numbered(given, "fast_"):
        low, high = as_map(given[f"fast_{i}"]), given[f"slow_{i}"]
        kept, gate, incoming = adapter.parts(low, high)
        results = {
            f"fast_mid_{i}": as_tokens(kept),
            f"slow_aligned_{i}": as_tokens(incoming),
            f"gate_tanh_{i}": gate.flatten(1),
            f"fused_{i}": as_tokens(adapter(low, high)),
        }
        compare.those(out, results)


def mr_adapter_paper(compare: Comparison) -> None:
    """The same equations as the paper has them: a vector gate without biases that reads f_l(F) alone."""
    case = compare.case
    given, out, state = case.part("in"), case.part("paper_out"), case.part("state")
    options = LlavaHROptions(gate_per="channel", gate_reads="mapped")
    adapter = MRAdapter(case.config["fast_dim"], case.config["slow_dim"], options)
    adapter.load_state_dict(
        {
            "f_l.0.weight": state["f_l.dw"],
            "f_l.0.bias": state["f_l.dw_b"],
            "f_l.2.weight": state["f_l.pw"][..., None, None],
            "f_l.2.bias": state["f_l.pw_b"],
            "f_h.0.weight": state["f_h.fc1"][..., None, None],
            "f_h.0.bias": state["f_h.fc1_b"],
            "f_h.2.weight": state["f_h.fc2"][..., None, None],
            "f_h.2.bias": state["f_h.fc2_b"],
            "gate.0.weight": state["W1"],
            "gate.2.weight": state["W2"],
        }
    )
    low, high = as_map(given["fast"]), as_map(given["slow"])
    kept, gate, incoming = adapter.parts(low, high)
    results = {
        "f_l": as_tokens(kept) - given["fast"],
        "f_h": as_tokens(incoming),
        "gate": gate.flatten(1),
        "fused": as_tokens(adapter(low, high)),
    }
    compare.those(out, results)


def final_fusion(compare: Comparison) -> None:
    case = compare.case
    given, out = case.part("in"), case.part("out")
    fusion = FinalFusion(case.config["fast_dim"], case.config["slow_dim"], LlavaHROptions())
    fill(fusion, case.part("state"), "model.vision_tower.align_stages.0.", "vision_tower.fusion.")
    for i in numbered(given, "fast_"):
        tokens = given[f"fast_{i}"]
        fused = fusion(tokens, given[f"slow_{i}"], isqrt(tokens.shape[1]))
        compare.close(f"fused {i}", fused, out[f"fused_{i}"])


def seen_in(tower: DualTower) -> dict[str, Tensor]:
    """The tensors inside the tower's next pass, under the names that the golden vectors have for them."""
    seen: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda _, given, out: seen.__setitem__(name, out))

    layers = tower.model.encoder.layers
    note("fast_embed", tower.model.embeddings)
    note("fast_pre_ln", tower.model.pre_layrnorm)
    for i in range(GROUPS):
        note(f"fast_group{i}", layers[(i + 1) * len(layers) // GROUPS - 1])
    for i, stage in enumerate(tower.convnext.stages):
        note(f"slow_stage{i}", stage.layers[-1])
    for i, adapter in enumerate(tower.adapters):
        note(f"fused{i}", adapter)
    return seen


def encoder(compare: Comparison) -> None:
    """The whole dual tower and projector: every stage, every group of blocks, every adapter."""
    case, about = compare.case, compare.case.config
    clip, convnext = about["clip"], about["convnext"]
    vision = CLIPVisionConfig(
        hidden_size=clip["hidden"],
        intermediate_size=clip["intermediate"],
        num_hidden_layers=clip["layers"],
        num_attention_heads=clip["heads"],
        image_size=clip["pretrained_image_size"],
        patch_size=clip["patch"],
        hidden_act=clip["act"],
        layer_norm_eps=clip["ln_eps"],
    )
    state = dict(case.part("state"))
    adapted = any(key.startswith("align_stages_latent.") for key in state)
    stem = state["slow_vision_tower.vision_tower.stem.0.weight"]  # (C, 3, p, p)
    shape = {"depths": convnext["depths"], "widths": convnext["dims"], "norm_eps": convnext["norm_eps"]}
    given = {
        "convnext": {**shape, "patch": stem.shape[-1]},
        "groups": GROUPS,
        "blocks": None if adapted else [],
        "projector_depth": sum(re.fullmatch(r"mm_projector\.\d+\.weight", key) is not None for key in state),
    }
    options = build_options(LlavaHROptions, given, compare.case.id)
    # Made apart from the method, which refuses grids if neither divides the other: theirs enlarges any.
    pair = Pair(about["fast_size"], about["input_image_size"], about["fast_size"] // clip["patch"])
    tower = DualTower(vision, options, [pair]).eval()
    connector = LlavaHRConnector(Widths(clip["hidden"], about["llm_hidden"]), options.projector_depth)
    projector = {key: state.pop(key) for key in list(state) if key.startswith("mm_projector.")}
    fill(tower, state, "model.vision_tower.", "vision_tower.")
    fill(connector, projector, "model.", "connector.")
    pixels = normalised(case.part("in")["image_uint8"])
    seen = seen_in(tower)
    seen["features"] = tower(pixels)
    seen["llm_tokens"] = connector.projector(seen["features"])
    seen["fast_image"] = tower.shrunk(pixels, about["fast_size"])
    for name, expected in case.part("out").items():
        found = as_tokens(seen[name]) if name.startswith("fused") else seen[name]
        compare.close(name, found, expected)


def normalised(pixels: Tensor) -> Tensor:
    """(V, 3, h, w) bytes -> what the tower gets."""
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (CLIP_MEAN, CLIP_STD))
    return (pixels.float() / 255 - mean) / std


def preprocess(compare: Comparison) -> None:
    case, given, out = compare.case, compare.case.part("in"), compare.case.part("out")
    for key, expected in out.items():
        fit, i = key.split("_")
        # Pictures are prepared for the ConvNeXt's side alone: grids of a token per pixel fit any side.
        side = expected.shape[-1]
        grids = {"resolutions": [[side, side]], "convnext": {"patch": 1, "depths": [1], "widths": [1]}}
        images = FoveateImageProcessor("llava_hr", {"fit": fit, **grids}, image_size=side, patch_size=1)
        picture = Image.fromarray(given[f"image_{i}"].numpy())
        pixels = images(picture)["pixel_values"][0]
        compare.close(f"{fit} {i}", pixels, expected, case.tolerance(default=1e-6))


def low_side(high: int, floor: int) -> int:
    """Of the ViT's view, as the authors' code derives it from the ConvNeXt's; it has 336 as floor."""
    return max(high * 14 // 32, floor)


def tiny_options(case: Case, high: int) -> dict[str, Any]:
    """Sizes of the tiny checkpoint, which its config.json does not tell."""
    sizes = case.json["size_settings_to_apply"]
    convnext = {
        "depths": sizes["convnext_depths"],
        "widths": sizes["convnext_dims"],
        "norm_eps": sizes["convnext_norm_eps"],
    }
    return {"resolutions": [[low_side(high, sizes["min_fast_size"]), high]], "convnext": convnext}


def side_in(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["input_image_size"]


def checkpoint(compare: Comparison) -> None:
    """Pixels, features, visual tokens, logits everywhere, greedy tokens; then the same with stage-1 files."""
    case, tensors = compare.case, compare.case.tensors
    options = tiny_options(case, side_in(model_folder(case)))
    stated = case.json.get("input", {}).get("fast_size", options["resolutions"][0][0])
    compare.equal("low side", options["resolutions"][0][0], stated)
    model = load(case, options=options)
    picture = Image.fromarray(tensors["image_uint8"].numpy())
    stored = tensors["pixel_values"]
    images = image_processor_for(model.config, read_preprocessor(tower_folder(case)))
    compare.close("pixels", images(picture)["pixel_values"], stored, 1e-6)
    seen = seen_in(model.vision_tower)
    inputs = prompt(case, model, tensors["input_ids"], stored, [(picture.height, picture.width)])
    features = model.encode_views(stored)
    visual = model.connect(features, inputs["image_sizes"]).pooler_output[0]
    inside(compare, model, seen, tensors)
    results = {
        "vision_features": features[0],
        "visual_tokens": visual,
        "inputs_embeds": embedded(model, inputs, visual),
        "logits": lambda: words(model(**inputs).logits[0], tensors["logits"]),
    }
    for name, result in results.items():
        compare.those(tensors, {name: result}, tolerance(case, name))
    if "greedy_tokens" in tensors:
        expected = tensors["greedy_tokens"].tolist()
        compare.equal("greedy_tokens", greedy(model, inputs, len(expected))[0], expected)
    alone = tensors.part("text_only")
    if "logits" in alone:
        logits = model(input_ids=alone["input_ids"]).logits[0]
        expected = alone["logits"]
        compare.close("text alone", words(logits, expected), expected, tolerance(case, "logits"))
    folder = stage_folder(case)
    if folder is not None and "stage1.pixel_values" in tensors:
        stage1(compare, model, folder)


def tolerance(case: Case, name: str = "") -> float:
    """That of the logits, or that of the visual tokens: they are a linear map away from what is inside."""
    return case.tolerance("logits" if name == "logits" else "visual_tokens")


def inside(
    compare: Comparison,
    model: FoveateForConditionalGeneration,
    seen: Mapping[str, Tensor],
    expected: Tensors,
) -> None:
    """What the dual tower has made on the way, where the case has it."""
    last = len(model.vision_tower.convnext.stages) - 1
    for i in numbered(expected, "fused_"):
        own = as_tokens(seen[f"fused{i}"])[0]
        compare.close(f"fused {i}", own, expected[f"fused_{i}"], tolerance(compare.case))
    results = {"slow_last_stage": seen[f"slow_stage{last}"][0]}
    compare.those(expected, results, tolerance(compare.case))


def stage1(compare: Comparison, model: FoveateForConditionalGeneration, folder: Path) -> None:
    """The projector and fusion of mm_projector.bin in the same model, at low resolution, without adapters."""
    case, tensors, expected = compare.case, compare.case.tensors, compare.case.part("stage1")
    stage = stage_files(folder)
    options = tiny_options(case, side_in(folder))
    about = case.json.get("stage_files", {})
    low = options["resolutions"][0][0]
    compare.equal("stage 1 low side", low, about.get("fast_size", low))
    model.config.options = {**stage.options, **options}
    first = FoveateForConditionalGeneration(model.config).eval()
    first.load_state_dict(model.state_dict())
    fill_connector(first, stage)
    picture = Image.fromarray(tensors["image_uint8"].numpy())
    stored = expected["pixel_values"]
    images = image_processor_for(first.config, read_preprocessor(tower_folder(case)))
    compare.close("stage 1 pixels", images(picture)["pixel_values"], stored, 1e-6)
    inputs = prompt(case, first, tensors["input_ids"], stored, [(picture.height, picture.width)])
    seen = seen_in(first.vision_tower)
    features = first.encode_views(stored)
    inside(compare, first, seen, expected)
    results = {
        "vision_features": features[0],
        "visual_tokens": first.connect(features, inputs["image_sizes"]).pooler_output[0],
        "logits": lambda: words(first(**inputs).logits[0], expected["logits"]),
    }
    for name, result in results.items():
        compare.those(expected, {name: result}, tolerance(case, name), of="stage 1")


FAMILY = Family(
    method="llava_hr",
    checkers={
        "mr_adapter": mr_adapter,
        "mr_adapter_paper": mr_adapter_paper,
        "final_fusion": final_fusion,
        "encoder": encoder,
        "preprocess": preprocess,
        "checkpoint": checkpoint,
    },
)
