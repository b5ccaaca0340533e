"""ConvNeXt, stage by stage, and weights under the names of timm or transformers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from foveate.errors import FoveateError, report_keys

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

WIDE = 2**22  # bound on the activations at a time in the wide layer of a block at inference; at least one row


@dataclass(frozen=True)
class ConvNextShape:
    """The high-resolution tower; by default CLIP-ConvNeXt-L."""

    weights: str | None = None  # folder or hub id that a fresh model starts from, with names of timm or HF
    depths: tuple[int, ...] = (3, 3, 27, 3)  # blocks per stage
    widths: tuple[int, ...] = (192, 384, 768, 1536)  # channels per stage
    patch: int = 4  # stride of the stem; each further stage halves the grid
    version: Literal[1, 2] = 1  # 2: ConvNeXtV2
    norm_eps: float = 1e-6  # of all layer norms; 1e-5 in CLIP-ConvNeXt-XXL
    layer_scale: float = 1e-6  # of fresh blocks

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.widths) or not self.depths:
            raise FoveateError("convnext needs as many depths as widths, at least one")
        if min(*self.depths, *self.widths, self.patch) < 1:
            raise FoveateError("depths, widths and patch of convnext must be at least 1")

    @property
    def stride(self) -> int:
        """Pixels of the picture per feature of the last stage."""
        return self.patch * 2 ** (len(self.depths) - 1)


class ConvNextBlock(nn.Module):
    """transformers' ConvNeXt block, with its names, in little memory at inference.

    The layer between its two linear ones is four times as wide and needs the most memory in this tower, on
    large maps far more than the ViT's attention. Without gradients, the block processes a few rows of the map
    at a time, so that it holds little more than its input and its output.
    """

    dwconv: nn.Conv2d
    layernorm: nn.Module
    pwconv1: nn.Linear
    act: nn.Module
    grn: nn.Module
    pwconv2: nn.Module
    layer_scale_parameter: Tensor | None

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name, module in layer.named_children():
            self.add_module(name, module)
        scale = dict(layer.named_parameters(recurse=False)).get("layer_scale_parameter")
        self.register_parameter("layer_scale_parameter", scale)  # none in ConvNeXtV2
        self.wide = self.pwconv1.out_features  # read here: the layer may be replaced by one without it

    def forward(self, features: Tensor) -> Tensor:
        """(V, C, h, w) -> (V, C, h, w)"""
        normalises = "grn" in self._modules  # its norm is over the whole map
        if normalises or torch.is_grad_enabled():
            return features + self._update(self.dwconv(features), normalises).permute(0, 3, 1, 2)
        views, _, height, width = features.shape
        rows = max(WIDE // (views * width * self.wide), 1)
        changed: Tensor | None = None
        for top in range(0, height, rows):
            below = min(top + rows, height)
            update = self._update(self._convolved(features, top, below), normalises)
            if changed is None:  # under autocast the format may be wider than the features'
                kind = torch.promote_types(features.dtype, update.dtype)
                changed = torch.empty_like(features, dtype=kind, memory_format=torch.channels_last)
            here = slice(top, below)
            torch.add(features[:, :, here], update.permute(0, 3, 1, 2), out=changed[:, :, here])
        assert changed is not None
        return changed

    def _update(self, convolved: Tensor, normalises: bool) -> Tensor:
        """After the convolution: (V, C, h, w) -> (V, h, w, C)"""
        hidden = self.act(self.pwconv1(self.layernorm(convolved.permute(0, 2, 3, 1))))
        hidden = self.pwconv2(self.grn(hidden) if normalises else hidden)
        scale = self.layer_scale_parameter
        return hidden if scale is None else scale * hidden

    def _convolved(self, features: Tensor, top: int, below: int) -> Tensor:
        """Rows `top` to `below` of the convolution's output for the map."""
        first = max(top - int(self.dwconv.padding[0]), 0)
        read = features[:, :, first : below + int(self.dwconv.padding[0])]  # rows near a cut come out wrong
        return self.dwconv(read)[:, :, top - first : below - first]


class ConvNext(nn.Module):
    """transformers' ConvNeXt, stage by stage, without the norm and head after the last one."""

    # For the blocks; transformers sets both when it switches checkpointing of the ViT's layers.
    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor]

    def __init__(self, shape: ConvNextShape) -> None:
        super().__init__()
        from transformers import AutoModel, ConvNextConfig, ConvNextV2Config

        sizes: dict[str, Any] = {
            "num_stages": len(shape.depths),
            "depths": list(shape.depths),
            "hidden_sizes": list(shape.widths),
            "patch_size": shape.patch,
        }
        if shape.version == 1:
            config: PreTrainedConfig = ConvNextConfig(**sizes, layer_scale_init_value=shape.layer_scale)
        else:
            config = ConvNextV2Config(**sizes)
        model = AutoModel.from_config(config, trust_remote_code=False)
        self.embeddings, self.stages = model.embeddings, model.encoder.stages
        for stage in self.stages:
            stage.layers = nn.ModuleList(ConvNextBlock(layer) for layer in stage.layers)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):  # 1e-6 in all of them, whatever the configuration says
                module.eps = shape.norm_eps

    def run_stage(self, number: int, features: Tensor) -> Tensor:
        """Stage `number`, from 1: (V, C, h, h) -> (V, 2 C, h / 2, h / 2), the first one does not shrink."""
        stage = self.stages[number - 1]
        for layer in stage.downsampling_layer:
            features = layer(features)
        for block in stage.layers:
            if self.gradient_checkpointing and self.training:
                features = self._gradient_checkpointing_func(block.__call__, features)
            else:
                features = block(features)
        return features


# Names in timm's ConvNeXts -> transformers'. The authors renamed timm's `gamma` to `weight`.
TIMM_KEYS = {
    r"stem\.0\.": r"embeddings.patch_embeddings.",
    r"stem\.1\.": r"embeddings.layernorm.",
    r"stages\.(\d+)\.downsample\.": r"stages.\1.downsampling_layer.",
    r"stages\.(\d+)\.blocks\.(\d+)\.(?:gamma|weight)$": r"stages.\1.layers.\2.layer_scale_parameter",
    r"stages\.(\d+)\.blocks\.(\d+)\.conv_dw\.": r"stages.\1.layers.\2.dwconv.",
    r"stages\.(\d+)\.blocks\.(\d+)\.norm\.": r"stages.\1.layers.\2.layernorm.",
    r"stages\.(\d+)\.blocks\.(\d+)\.mlp\.fc(\d)\.": r"stages.\1.layers.\2.pwconv\3.",
    r"stages\.(\d+)\.blocks\.(\d+)\.mlp\.grn\.": r"stages.\1.layers.\2.grn.",
}
UNREAD = r"^(?:head|classifier|layernorm)\."  # norms and heads after the last stage


def convnext_weights(
    shape: ConvNextShape, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of `shape.weights`, with timm's or transformers' names, under `own` keys.

    Raises `FoveateError` that names missing, unexpected and wrongly shaped keys.
    """
    given: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        plain = re.sub(r"^(?:convnext\.|convnextv2\.)?(?:encoder\.)?", "", key)
        for pattern, replacement in TIMM_KEYS.items():
            plain = re.sub(f"^{pattern}", replacement, plain)
        if not re.search(UNREAD, plain):
            given[plain] = tensor
    found = [re.fullmatch(r"stages\.(\d+)\.layers\.(\d+)\.dwconv\.bias", key) for key in given]
    stages = sorted((int(match[1]), int(match[2]), len(given[match[0]])) for match in found if match)
    widths = {stage: width for stage, _, width in stages}
    depths = {stage: block + 1 for stage, block, _ in stages}
    if (tuple(depths.values()), tuple(widths.values())) != (tuple(shape.depths), tuple(shape.widths)):
        raise FoveateError(
            f"the ConvNeXt in {shape.weights} has depths {list(depths.values())} and widths "
            f"{list(widths.values())}: set both in convnext"
        )
    wrong = [key for key in given if key in own and given[key].numel() != own[key].numel()]
    report_keys(str(shape.weights), own.keys() - given.keys(), given.keys() - own.keys(), wrong)
    # some of timm's models have 1 x 1 convolutions where others have linear layers
    return {key: tensor.view_as(own[key]) for key, tensor in given.items()}
