"""LLaVA-1.5: one view of the whole picture, every patch token through a two-layer MLP.

Paper: Liu et al., Improved Baselines with Visual Instruction Tuning, arXiv 2310.03744, section 3.
Authors' code: haotian-liu/LLaVA (Apache-2.0).

    picture -> one square view              plan      section 3.3 (336 x 336, padded to keep the aspect ratio)
    patch tokens -> MLP -> LLM              LlavaConnector   section 3.2 (the MLP), 576 tokens

Where versions differ: the authors train and run with the picture padded to a square in the mean colour
(`fit: pad`, at original resolution, before resizing); their pretraining stage, and the image processor that
Hugging Face ships with its converted checkpoints, crop to the centre (`fit: crop`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from torch import Tensor

from foveate.layers import Activation, mlp_projector
from foveate.methods.base import Connector, Method, MethodOptions, Query, VisualTokens, Widths, flat
from foveate.methods.layouts import (
    HF_PROJECTOR,
    Export,
    Layout,
    connector_options,
    hf_activation,
    hf_export,
    known_projector,
)
from foveate.picture.geometry import Size, View, ViewPlan, centre_cropped, padded_square, squashed, whole


@dataclass(frozen=True)
class LlavaOptions(MethodOptions):
    fit: Literal["pad", "crop", "squash"] = "pad"  # how a picture becomes a square
    projector_depth: int = 2  # linear layers of the projector
    activation: Activation = "gelu"  # between them


class LlavaConnector(Connector):
    def __init__(self, widths: Widths, depth: int, activation: Activation = "gelu") -> None:
        super().__init__()
        self.projector = mlp_projector(widths.vision, widths.text, depth, activation)

    def forward(self, features: Tensor, plans: Sequence[ViewPlan], query: Query | None) -> VisualTokens:
        return VisualTokens(flat(self.projector(features)))  # (V, N, C) -> (V N, D)


class Llava(Method):
    title = "LLaVA-1.5"
    idea = "one view of the whole picture at the tower's own size"
    paper = "arXiv 2310.03744"
    Options = LlavaOptions
    options: LlavaOptions

    @lru_cache(maxsize=4096)  # noqa: B019  a handful of instances per process
    def plan(self, height: int, width: int) -> ViewPlan:
        picture, side = Size(height, width), self.tower.image_size
        if not self._within_budget(self.tower.tokens):
            raise self._refuse_budget(self.tower.tokens)
        canvas = {
            "pad": lambda: padded_square(picture, side),
            "crop": lambda: centre_cropped(picture, side),
            "squash": lambda: squashed(picture, self.tower.side),
        }[self.options.fit]()
        view = View(0, whole(self.tower.side), "global")
        return ViewPlan(picture, (canvas,), (view,), self.tower.tokens)

    def export(self) -> Export:
        options, side = self.options, self.tower.image_size
        pictures = "LlavaImageProcessorPil" if options.fit == "pad" else "CLIPImageProcessorPil"
        steps: dict[str, dict[str, Any]] = {
            "pad": {"do_pad": True},
            "crop": {},
            "squash": {"do_center_crop": False, "size": {"height": side, "width": side}},
        }
        return hf_export("llava", pictures, options.projector_depth, options.activation, steps[options.fit])

    def build_connector(self, widths: Widths) -> LlavaConnector:
        return LlavaConnector(widths, self.options.projector_depth, self.options.activation)


def _hf_options(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    cropped = preprocessor.get("do_center_crop")
    if cropped is None:  # CLIP's crops unless told otherwise, others have no such step
        cropped = not preprocessor or preprocessor.get("crop_size") is not None
    fit = "pad" if preprocessor.get("do_pad") else "crop" if cropped else "squash"
    return {"fit": fit, **hf_activation(config)}


Llava.layouts = (
    Layout(
        name="llava-hf/llava-1.5-*",
        family="hf",
        recognises=lambda config: config.get("model_type") == "llava" and "vision_config" in config,
        options=_hf_options,
        keys=HF_PROJECTOR,
    ),
    Layout(
        name="liuhaotian/llava-v1.5-*",
        family="original",
        recognises=lambda config: (
            known_projector(config)
            and config.get("image_aspect_ratio") in (None, "pad", "square")
            and not config.get("mm_resampler_type")
            and not config.get("vision_tower_slow")
        ),
        options=lambda config, preprocessor: connector_options(config),
        keys={
            r"^model\.mm_projector\.(\d)\.": r"connector.projector.\1.",
            r"^model\.mm_projector\.(weight|bias)$": r"connector.projector.0.\1",
        },
        connector_files=("mm_projector.bin",),
    ),
)
