"""LLaVA-HR: adapter, final fusion, whole dual tower, preprocessing, a checkpoint with its stage-1 file."""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPVisionConfig

from foveate import FoveateForConditionalGeneration
from foveate.checkpoints import fill_connector, read_preprocessor, stage_files
from foveate.layouts import convert_key
from foveate.methods.base import TowerGeometry, Widths
from foveate.methods.llava_hr import (
    DualTower,
    FinalFusion,
    LlavaHR,
    LlavaHROptions,
    MRAdapter,
    as_map,
    as_tokens,
)
from foveate.processing import CLIP_MEAN, CLIP_STD, FoveateImageProcessor, image_processor_for
from tests.parity.checkpoints import load, prompt, tower_folder
from tests.parity.golden import Case, Comparison, Family
from tests.support import greedy

LAYOUT = LlavaHR.layouts[0]
NARROW = 1e-5


def fill(module: nn.Module, state: dict[str, Tensor], theirs: str, ours: str) -> None:
    """Loads weights under the authors' names; `theirs` and `ours`: where the module is in the two models."""
    renamed = {}
    for key, tensor in state.items():
        name = convert_key(LAYOUT, f"{theirs}{key}")
        if name is not None and not any(re.search(pattern, name) for pattern in LAYOUT.optional):
            renamed[name.removeprefix(ours)] = tensor
    module.load_state_dict(renamed)


def mr_adapter(compare: Comparison) -> None:
    """Equations 3 and 4 as the code has them, on equal, coarser and finer high-resolution grids."""
    case = compare.case
    widths, given, out = case.json["config"], case.part("in"), case.part("out")
    adapter = MRAdapter(widths["fast_dim"], widths["slow_dim"], LlavaHROptions())
    fill(adapter, case.part("state"), "model.vision_tower.align_stages_latent.0.", "vision_tower.adapters.0.")
    for i in range(len(widths["cases"])):
        low, high = as_map(given[f"fast_{i}"]), given[f"slow_{i}"]
        kept, gate, incoming = adapter.parts(low, high)
        compare.close(f"kept {i}", as_tokens(kept), out[f"fast_mid_{i}"])
        compare.close(f"incoming {i}", as_tokens(incoming), out[f"slow_aligned_{i}"])
        compare.close(f"gate {i}", gate.flatten(1), out[f"gate_tanh_{i}"])
        compare.close(f"fused {i}", as_tokens(adapter(low, high)), out[f"fused_{i}"])


def mr_adapter_paper(compare: Comparison) -> None:
    """The same equations as the paper has them: a vector gate without biases that reads f_l(F) alone."""
    case = compare.case
    widths, given, out, state = (
        case.json["config"],
        case.part("in"),
        case.part("paper_out"),
        case.part("state"),
    )
    options = LlavaHROptions(gate_per="channel", gate_reads="mapped")
    adapter = MRAdapter(widths["fast_dim"], widths["slow_dim"], options)
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
    compare.close("f_l", as_tokens(kept) - given["fast"], out["f_l"])
    compare.close("f_h", as_tokens(incoming), out["f_h"])
    compare.close("gate", gate.flatten(1), out["gate"])
    compare.close("fused", as_tokens(adapter(low, high)), out["fused"])


def final_fusion(compare: Comparison) -> None:
    case = compare.case
    widths, given, out = case.json["config"], case.part("in"), case.part("out")
    fusion = FinalFusion(widths["fast_dim"], widths["slow_dim"], LlavaHROptions())
    fill(fusion, case.part("state"), "model.vision_tower.align_stages.0.", "vision_tower.fusion.")
    for i, sides in enumerate(widths["cases"]):
        fused = fusion(given[f"fast_{i}"], given[f"slow_{i}"], sides["fast_side"])
        compare.close(f"fused {i}", fused, out[f"fused_{i}"])


def seen_in(tower: DualTower) -> dict[str, Tensor]:
    """The tensors inside the tower's next pass, under the names that the golden vectors have for them."""
    seen: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda _, given, out: seen.__setitem__(name, out))

    layers = tower.model.encoder.layers
    note("fast_embed", tower.model.embeddings)
    note("fast_pre_ln", tower.model.pre_layrnorm)
    for i in range(4):
        note(f"fast_group{i}", layers[(i + 1) * len(layers) // 4 - 1])
        note(f"slow_stage{i}", tower.convnext.stages[i].layers[-1])
    for i, adapter in enumerate(tower.adapters):
        note(f"fused{i}", adapter)
    return seen


def encoder(compare: Comparison) -> None:
    """The whole dual tower and projector: every stage, every group of blocks, every adapter."""
    case = compare.case
    about, state, out = case.json["config"], case.part("state"), case.part("out")
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
    options = {
        "resolutions": [[about["fast_size"], about["input_image_size"]]],
        "convnext": {
            "depths": convnext["depths"],
            "widths": convnext["dims"],
            "norm_eps": convnext["norm_eps"],
        },
        "blocks": [] if about["freeze_vision"] else None,
    }
    method = LlavaHR(TowerGeometry.of(vision), options)
    tower = method.build_tower(vision, -2).eval()
    connector = method.build_connector(Widths(clip["hidden"], about["llm_hidden"]))
    projector = {key: state.pop(key) for key in list(state) if key.startswith("mm_projector.")}
    fill(tower, state, "model.vision_tower.", "vision_tower.")
    fill(connector, projector, "model.", "connector.")
    pixels = normalised(case.part("in")["image_uint8"])
    seen = seen_in(tower)
    seen["features"] = tower(pixels)
    seen["llm_tokens"] = connector.projector(seen["features"])
    seen["fast_image"] = tower.shrunk(pixels, about["fast_size"])
    assert seen.keys() >= {name for name in out if not name.startswith("fused")}
    for name, expected in out.items():
        found = as_tokens(seen[name]) if name.startswith("fused") else seen[name]
        compare.close(name, found, expected, NARROW)


def normalised(pixels: Tensor) -> Tensor:
    """(V, 3, h, w) bytes -> what the tower gets."""
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (CLIP_MEAN, CLIP_STD))
    return (pixels.float() / 255 - mean) / std


def preprocess(compare: Comparison) -> None:
    case = compare.case
    side = case.json["config"]["input_image_size"]
    for fit in ("pad", "crop"):
        images = FoveateImageProcessor("llava_hr", {"resolutions": [[28, side]], "fit": fit})
        for i in range(len(case.json["config"]["images"])):
            picture = Image.fromarray(case.part("in")[f"image_{i}"].numpy())
            pixels = images(picture)["pixel_values"][0]
            compare.close(f"{fit} {i}", pixels, case.part("out")[f"{fit}_{i}"], 1e-6)


def tiny_options(case: Case) -> dict[str, Any]:
    """Sizes of the tiny checkpoint, which its config.json does not tell."""
    sizes = case.json["size_settings_to_apply"]
    side = json.loads((case.folder / "checkpoint" / "config.json").read_text())["input_image_size"]
    convnext = {
        "depths": sizes["convnext_depths"],
        "widths": sizes["convnext_dims"],
        "norm_eps": sizes["convnext_norm_eps"],
    }
    return {"resolutions": [[sizes["min_fast_size"], side]], "convnext": convnext}


def checkpoint(compare: Comparison) -> None:
    """Pixels, features, visual tokens, logits everywhere, greedy tokens; then the same with stage-1 files."""
    case = compare.case
    options = tiny_options(case)
    model = load(case, options=options)
    picture = Image.fromarray(case.tensors["image_uint8"].numpy())
    size = [(picture.height, picture.width)]
    stored = case.tensors["pixel_values"]
    images = image_processor_for(model.config, read_preprocessor(tower_folder(case)))
    compare.close("pixels", images(picture)["pixel_values"], stored, 1e-6)
    seen = seen_in(model.vision_tower)
    inputs = prompt(model, case.tensors["input_ids"], stored, size)
    features = model.encode_views(stored)
    visual = model.connect(features, inputs["image_sizes"]).pooler_output[0]
    for i in range(3):
        compare.close(f"fused {i}", as_tokens(seen[f"fused{i}"])[0], case.tensors[f"fused_{i}"], NARROW)
    compare.close("last stage", seen["slow_stage3"][0], case.tensors["slow_last_stage"], NARROW)
    compare.close("features", features[0], case.tensors["vision_features"], NARROW)
    compare.close("visual_tokens", visual, case.tensors["visual_tokens"])
    compare.close(
        "logits", model(**inputs).logits[0, :, : case.tensors["logits"].shape[-1]], case.tensors["logits"]
    )
    expected = case.tensors["greedy_tokens"].tolist()
    compare.equal("greedy_tokens", greedy(model, inputs, len(expected))[0], expected)
    text = case.tensors["text_only.input_ids"]
    logits = model(input_ids=text).logits[0, :, : case.tensors["text_only.logits"].shape[-1]]
    compare.close("text alone", logits, case.tensors["text_only.logits"], case.tolerance("logits"))
    stage1(compare, model)


def stage1(compare: Comparison, model: FoveateForConditionalGeneration) -> None:
    """The projector and fusion of mm_projector.bin in the same model, at low resolution, without adapters."""
    case = compare.case
    about = case.json["stage_files"]
    stage = stage_files(case.folder / "stage1")
    low = {**tiny_options(case), "resolutions": [[about["fast_size"], about["input_image_size"]]]}
    model.config.options = {**stage.options, **low}
    first = FoveateForConditionalGeneration(model.config).eval()
    first.load_state_dict(model.state_dict())
    fill_connector(first, stage)
    picture = Image.fromarray(case.tensors["image_uint8"].numpy())
    stored = case.tensors["stage1.pixel_values"]
    images = image_processor_for(first.config, read_preprocessor(tower_folder(case)))
    compare.close("stage 1 pixels", images(picture)["pixel_values"], stored, 1e-6)
    inputs = prompt(first, case.tensors["input_ids"], stored, [(picture.height, picture.width)])
    features = first.encode_views(stored)
    visual = first.connect(features, inputs["image_sizes"]).pooler_output[0]
    compare.close("stage 1 features", features[0], case.tensors["stage1.vision_features"], NARROW)
    compare.close(
        "stage 1 visual tokens", visual, case.tensors["stage1.visual_tokens"], case.tolerance("visual_tokens")
    )
    expected = case.tensors["stage1.logits"]
    logits = first(**inputs).logits[0, :, : expected.shape[-1]]
    compare.close("stage 1 logits", logits, expected, case.tolerance("logits"))


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
