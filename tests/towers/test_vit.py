"""The vision tower against transformers' own classes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    PreTrainedConfig,
    SiglipVisionConfig,
    SwinConfig,
    ViTConfig,
)

from foveate.errors import FoveateError
from foveate.towers import vit as encoders
from foveate.towers.vit import VisionTower

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
CONFIGS = [
    CLIPVisionConfig(**SHAPE),
    SiglipVisionConfig(**SHAPE),
    Dinov2Config(**SHAPE),
    Dinov2WithRegistersConfig(**SHAPE),
    ViTConfig(**SHAPE),  # runs whole
]


def pair(config: PreTrainedConfig, layer: int) -> tuple[torch.nn.Module, VisionTower]:
    """transformers' model, and a tower with its weights."""
    torch.manual_seed(0)
    peer, tower = AutoModel.from_config(config).eval(), VisionTower(config, layer).eval()
    given = peer.state_dict()
    tower.model.load_state_dict({key: given[key] for key in tower.model.state_dict()})
    return peer, tower


@pytest.mark.parametrize("layer", [-1, -2, 2])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
@torch.inference_mode()
def test_a_tower_returns_the_hidden_state_of_its_patches(config: PreTrainedConfig, layer: int) -> None:
    peer, tower = pair(config, layer)
    views = torch.randn(3, 3, 28, 28)
    hidden = peer(views, output_hidden_states=True).hidden_states[layer]
    torch.testing.assert_close(tower(views), hidden[:, -16:], atol=1e-6, rtol=0)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_a_few_views_at_a_time_at_inference(
    config: PreTrainedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, tower = pair(config, -2)
    views = torch.randn(5, 3, 28, 28)
    passes: list[int] = []

    def count(_: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
        passes.append(len(given[0]))

    tower.model.register_forward_pre_hook(count)
    whole = tower(views)
    with torch.no_grad():
        tower(views)
        monkeypatch.setattr(encoders, "WIDEST", 2 * 4 * 16 * 16 * 4 + 1)  # two views of 16 tokens, float32
        parts, half = tower(views), tower.bfloat16()(views)
    assert passes == [5, 5, 2, 2, 1, 4, 1]
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)
    assert half.dtype == torch.bfloat16
    with torch.no_grad():
        monkeypatch.setattr(encoders, "WIDEST", 1)  # less than a view
        assert tower(views).shape == whole.shape
    tower(views)  # what trains takes all at once
    assert passes[7:] == [1] * 5 + [5]


def test_a_tower_without_a_token_per_patch() -> None:
    tower = VisionTower(
        SwinConfig(image_size=64, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2]), -2
    )
    with pytest.raises(
        FoveateError, match=r"'swin' gives .* not one token for each of its 256 patches: choose a ViT"
    ):
        tower(torch.zeros(1, 3, 64, 64))
