"""Any Hugging Face vision tower behind one signature: (V, 3, h, w) -> (V, N, C)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from foveate.errors import FoveateError
from foveate.layers import dtype_of
from foveate.upstream import changes

# Towers that are built only up to the selected layer: model type -> name of the norm after the last layer,
# which hidden states do not include. Other towers run whole, and one of their hidden states is used.
FINAL_NORM = {
    "clip_vision_model": "post_layernorm",
    "siglip_vision_model": "post_layernorm",
    "dinov2": "layernorm",
    "dinov2_with_registers": "layernorm",
}
# Towers whose patch embedding, positions and layers are CLIP's -> the norm before their first layer.
CLIP_LIKE: dict[str, str | None] = {
    "clip_vision_model": "pre_layrnorm",
    "chinese_clip_vision_model": "pre_layrnorm",
    "siglip_vision_model": None,
}
# Bytes of the widest activation at a time, at inference on a CPU: the C library hands larger blocks back to
# the system at once, and each layer would page them in anew (`benchmarks/tower.md`).
WIDEST = 2**25


class VisionTower(nn.Module):
    """A vision transformer that stops at the hidden state a LLaVA-style model reads.

    Layers after the selected one, the final norm and a pooling head are not built for the towers listed in
    `FINAL_NORM`: they would cost time and memory without being used.

    Args:
        config: the tower's own configuration, with all its layers.
        layer: hidden state to return, counted as transformers does (-1 last layer, -2 the one before).

    Raises:
        FoveateError: no such layer; in `forward`, a tower without exactly one token per patch.
    """

    def __init__(self, config: PreTrainedConfig, layer: int) -> None:
        super().__init__()
        depth = config.num_hidden_layers
        self.index = layer if layer >= 0 else depth + 1 + layer
        if not 0 < self.index <= depth:
            raise FoveateError(f"vision_feature_layer {layer}: the tower has {depth} layers")
        self.truncated = config.model_type in FINAL_NORM
        if self.truncated:
            config = copy.deepcopy(config)
            config.num_hidden_layers = self.index
            if config.model_type == "siglip_vision_model":
                config.vision_use_head = False
        self.model = AutoModel.from_config(config, trust_remote_code=False)
        if self.truncated:
            setattr(self.model, FINAL_NORM[config.model_type], nn.Identity())
        self.patches = (config.image_size // config.patch_size) ** 2

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(V, 3, h, w) -> (V, N, C), class and register tokens dropped."""
        pixel_values = pixel_values.to(dtype=dtype_of(self))
        if torch.is_grad_enabled() or pixel_values.device.type != "cpu":
            return self.encode(pixel_values)
        view = 4 * self.model.config.hidden_size * self.patches * pixel_values.element_size()  # bytes
        return torch.cat([self.encode(views) for views in pixel_values.split(max(WIDEST // view, 1))])

    def encode(self, pixel_values: Tensor) -> Tensor:
        """(V, 3, h, w) -> (V, N, C) in one pass of the layers."""
        if self.truncated:
            hidden = self.model(pixel_values).last_hidden_state  # (V, 1 + N, C)
        else:
            hidden = self.model(pixel_values, output_hidden_states=True).hidden_states[self.index]
        if hidden.dim() != 3 or hidden.shape[1] < self.patches:
            raise FoveateError(
                f"vision tower {self.model.config.model_type!r} gives {tuple(hidden.shape[1:])} per view, "
                f"not one token for each of its {self.patches} patches: choose a ViT"
            )
        return hidden[:, hidden.shape[1] - self.patches :]  # (V, N, C)


def as_map(tokens: Tensor) -> Tensor:
    """(V, N, C) -> (V, C, h, h), sharing memory."""
    side = round(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def as_tokens(features: Tensor) -> Tensor:
    """(V, C, h, h) -> (V, N, C)"""
    return features.flatten(2).transpose(1, 2)


class PatchEmbeddings(nn.Module):
    """CLIP's patch embedding and positions for any grid, without its class token.

    The position table is resampled as the authors do, bicubic with antialiasing (transformers' own way has
    none), and cached per grid until the table changes.
    """

    def __init__(self, patch_embedding: nn.Module, position_embedding: nn.Embedding, patches: int) -> None:
        super().__init__()
        self.patch_embedding = patch_embedding
        self.position_embedding = position_embedding
        self.rows = self.position_embedding.num_embeddings
        self.class_rows = self.rows - patches
        self.cached: tuple[Any, Tensor] | None = None

    def forward(self, pixels: Tensor) -> Tensor:
        """(V, 3, h, h) -> (V, N, C)"""
        embedded = self.patch_embedding(pixels)
        return as_tokens(embedded) + self.positions(embedded.shape[-1])

    def positions(self, side: int) -> Tensor:
        """(N, C) for a grid of `side` rows."""
        tables = list(self.position_embedding.parameters())
        if torch.is_grad_enabled() and any(p.requires_grad for p in tables):  # it changes with every step
            self.cached = None  # fused optimizers change it without increasing its version
            return self._resampled(side)
        state = (side, *((changes(p), p.data_ptr(), p.dtype, p.device) for p in tables))
        cached = self.cached  # read once: another thread may replace it
        if cached is None or cached[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                cached = self.cached = (state, self._resampled(side))
        return cached[1]

    def _resampled(self, side: int) -> Tensor:
        device = next(self.position_embedding.parameters()).device
        rows = self.position_embedding(torch.arange(self.class_rows, self.rows, device=device))  # (n, C)
        if len(rows) == side**2:
            return rows
        resampled = F.interpolate(
            as_map(rows[None].float()), (side, side), mode="bicubic", align_corners=False, antialias=True
        )
        return as_tokens(resampled)[0].to(rows.dtype)


def build_vit(config: PreTrainedConfig) -> PreTrainedModel:
    """A CLIP-like ViT without its last norm and its class token."""
    if config.model_type not in CLIP_LIKE:
        raise FoveateError(
            f"vision tower {config.model_type!r} is not a ViT like CLIP's: "
            f"choose one of {', '.join(CLIP_LIKE)}"
        )
    config = copy.deepcopy(config)
    if config.model_type == "siglip_vision_model":
        config.vision_use_head = False
    model = AutoModel.from_config(config, trust_remote_code=False)
    own, patches = model.embeddings, (config.image_size // config.patch_size) ** 2
    model.embeddings = PatchEmbeddings(own.patch_embedding, own.position_embedding, patches)
    model.post_layernorm = nn.Identity()
    return model
