"""LLaVA-HR: what the tests of all methods do not ask."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CONFIG_MAPPING,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextModel,
    ConvNextV2Config,
    ConvNextV2Model,
    Dinov2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from foveate import FoveateError, FoveateForConditionalGeneration, compose
from foveate.methods.base import TowerGeometry
from foveate.methods.llava_hr import DualTower, LlavaHR, LlavaHROptions, MRAdapter
from foveate.model.checkpoints import recognise, stage_files
from foveate.model.cost import reference_config, shared_pricer
from foveate.options import build_options
from foveate.picture.drawing import COLOURS
from foveate.picture.geometry import Size
from foveate.shipped import find
from foveate.tiny import tiny_model, tiny_text, tiny_tokenizer, tiny_vision
from foveate.towers import convnext
from foveate.towers.convnext import ConvNext, ConvNextShape
from foveate.towers.vit import CLIP_LIKE
from foveate.train.recipe import load_recipe
from tests.methods.conftest import fresh
from tests.support import awake, checkpoint_activations, gap, picture

SHAPE = LlavaHR.tiny["convnext"]
CLIP = TowerGeometry(336, 14)


def fresh_tower(layers: int = 4, **options: Any) -> DualTower:
    """A dual tower with 56 and 128 pixels and 4 ViT layers."""
    torch.manual_seed(0)
    given = {"resolutions": [[56, 128]], "convnext": SHAPE, **options}
    config = tiny_vision(num_hidden_layers=layers)
    return LlavaHR(TowerGeometry.of(config), given).build_tower(config, -1).eval()


def tower(layers: int = 4, **options: Any) -> DualTower:
    """The same with its adapters awake."""
    return awake(fresh_tower(layers, **options))


def views(side: int = 128, count: int = 2) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def options(**given: Any) -> LlavaHROptions:
    return build_options(LlavaHROptions, given, "options")


# The adapter.


@torch.no_grad()
@pytest.mark.parametrize("gate", ["tanh", "sigmoid", "none"])
@pytest.mark.parametrize("per", ["picture", "channel"])
def test_a_fresh_adapter_changes_nothing(gate: str, per: str) -> None:
    adapter = MRAdapter(12, 20, options(gate=gate, gate_per=per))
    low, high = torch.randn(2, 12, 4, 4), torch.randn(2, 20, 8, 8)
    assert torch.equal(adapter(low, high), low)
    assert gap(awake(adapter)(low, high), low) > 0.01


@torch.no_grad()
def test_gates() -> None:
    low, high = torch.randn(3, 12, 4, 4), torch.randn(3, 20, 4, 4)
    for per, channels in (("picture", 1), ("channel", 12)):
        tanh = awake(MRAdapter(12, 20, options(gate_per=per)))
        sigmoid = MRAdapter(12, 20, options(gate_per=per, gate="sigmoid"))
        sigmoid.load_state_dict(tanh.state_dict())
        gate = tanh.parts(low, high).gate
        assert gate.shape == (3, channels, 1, 1)
        assert len(gate.unique()) == 3 * channels  # of every picture its own
        assert gap(sigmoid.parts(low, high).gate, gate.atanh().sigmoid()) < 1e-5
        biased = {name for name, _ in tanh.named_parameters() if name.startswith("gate") and "bias" in name}
        assert bool(biased) == (per == "picture")
    without = awake(MRAdapter(12, 20, options(gate="none")))
    kept, gate, incoming = without.parts(low, high)
    assert gate.unique().tolist() == [1.0]
    assert torch.equal(without(low, high), kept + incoming)


@torch.no_grad()
def test_what_the_gate_reads() -> None:
    """F + f_l(F) or f_l(F), pooled, beside the incoming features."""
    low, high = torch.randn(2, 12, 4, 4), torch.randn(2, 20, 4, 4)
    for reads in ("sum", "mapped"):
        adapter = awake(MRAdapter(12, 20, options(gate_reads=reads)))
        kept, gate, incoming = adapter.parts(low, high)
        read = adapter.f_l(low) if reads == "mapped" else low + adapter.f_l(low)
        pooled = torch.cat([read.mean((2, 3)), incoming.mean((2, 3))], 1)
        assert gap(gate.flatten(1), adapter.gate(pooled).tanh()) == 0.0
        assert torch.equal(kept, low + adapter.f_l(low))


@pytest.mark.parametrize(("low_map", "low_kernel"), [("conv", 7), ("mlp", 1)])
@pytest.mark.parametrize(("high_map", "high_kernel"), [("conv", 7), ("mlp", 1)])
def test_structures(low_map: str, low_kernel: int, high_map: str, high_kernel: int) -> None:
    adapter = MRAdapter(12, 20, options(low_map=low_map, high_map=high_map))
    assert adapter.f_l[0].weight.shape == ((12, 1, 7, 7) if low_map == "conv" else (12, 12, 1, 1))
    assert adapter.f_h[0].weight.shape == ((20, 1, 7, 7) if high_map == "conv" else (20, 20, 1, 1))
    assert adapter.f_h[2].weight.shape == (12, 20, 1, 1)
    assert adapter(torch.randn(1, 12, 4, 4), torch.randn(1, 20, 2, 2)).shape == (1, 12, 4, 4)
    assert (adapter.f_l[0].kernel_size[0], adapter.f_h[0].kernel_size[0]) == (low_kernel, high_kernel)


# The tower.


@torch.no_grad()
def test_sleeping_adapters_are_fresh_ones() -> None:
    """The first stage without adapters computes what one with fresh ones would, bit for bit."""
    with_them, without = fresh_tower(), fresh_tower(adapters=False)
    assert without.state_dict().keys() == with_them.state_dict().keys()
    assert torch.equal(with_them(views()), without(views()))
    assert gap(tower()(views()), tower(adapters=False)(views())) > 1e-3


def test_where_adapters_are() -> None:
    assert tower().places == (1, 2, 3)
    assert tower(groups=2).places == (2,)
    assert tower(blocks=[1, 4]).places == (1, 4)
    assert len(tower(blocks=[]).adapters) == 0
    assert tower(layers=8).places == (2, 4, 6)
    assert tower(direction="low_to_high").places == (1, 2, 3)
    with pytest.raises(FoveateError, match="a ViT of 6 blocks cannot be cut into 4 equal groups"):
        tower(layers=6)
    with pytest.raises(FoveateError, match="blocks must be increasing numbers from 1 to 4"):
        tower(blocks=[2, 5])
    with pytest.raises(FoveateError, match="blocks must be increasing"):
        tower(blocks=[2, 1])
    with pytest.raises(FoveateError, match="blocks are the ViT's"):
        tower(blocks=[2], direction="low_to_high")


@torch.no_grad()
@pytest.mark.parametrize("direction", ["high_to_low", "low_to_high"])
def test_adapters_carry_from_one_pathway_into_the_other(direction: str) -> None:
    """With the last sum's other side silenced, only what went through the adapters is left of a pathway."""
    built = tower(direction=direction)
    pixels = views()
    before = built(pixels)
    silent = built.fusion.high if direction == "high_to_low" else built.fusion.low
    source = (built.convnext.stages[-1] if direction == "high_to_low" else built.model.encoder).layers[-1]
    nn.init.zeros_(silent.weight)
    heard = built(pixels)
    hook = source.register_forward_hook(lambda module, given, out: 2 * out)
    assert gap(built(pixels), heard) > 1e-4
    for adapter in built.adapters:
        nn.init.zeros_(adapter.f_h[2].weight)
    deaf = built(pixels)
    hook.remove()
    assert torch.equal(built(pixels), deaf)
    assert before.shape == heard.shape


@torch.no_grad()
def test_one_pathway_alone() -> None:
    pixels = views()
    low, high = tower(paths="low"), tower(paths="high")
    assert {name.partition(".")[0] for name, _ in low.named_parameters()} == {"model"}
    assert {name.partition(".")[0] for name, _ in high.named_parameters()} == {"convnext", "fusion"}
    assert high(pixels).shape == (2, 16, 32)
    assert low(views(56)).shape == (2, 16, 32)
    assert LlavaHR(CLIP, {"paths": "low"}).plan(60, 90).views[0].size == Size(448, 448)
    assert LlavaHR(CLIP, {"paths": "high"}).plan(60, 90).views[0].size == Size(1024, 1024)


@torch.no_grad()
def test_both_sides_of_the_last_sum_have_a_layer() -> None:
    built = tower()
    names = [name for name, _ in built.fusion.named_parameters()]
    assert names == ["low.weight", "low.bias", "high.weight", "high.bias"]
    nn.init.zeros_(built.fusion.high.weight)
    nn.init.zeros_(built.fusion.high.bias)
    pixels = views()
    plain = built.read_low(built.shrunk(pixels, 56), built.read_high(pixels))
    assert torch.equal(built(pixels), built.fusion.low(plain))


@torch.no_grad()
def test_low_view() -> None:
    """Without antialiasing: far more of noise is left than an antialiased view keeps."""
    noise = views(1024, 1)
    sharp = tower().shrunk(noise, 448)
    smooth = F.interpolate(noise, (448, 448), mode="bicubic", align_corners=False, antialias=True)
    assert sharp.shape == smooth.shape == (1, 3, 448, 448)
    assert sharp.std() > 1.4 * smooth.std()
    assert torch.equal(tower().shrunk(noise, 1024), noise)
    for kind in (torch.bfloat16, torch.float16):  # computed in float32
        low = tower().shrunk(noise.to(kind), 448)
        assert low.dtype == kind
        assert gap(low.float(), sharp) < 0.03


@torch.no_grad()
@pytest.mark.parametrize(("low", "high"), [(56, 64), (56, 128), (56, 256), (112, 128), (28, 128)])
def test_grids_that_agree(low: int, high: int) -> None:
    """Equal, coarser and finer high-resolution grids."""
    built = tower(resolutions=[[low, high]])
    assert built(views(high)).shape == (2, (low // 14) ** 2, 32)


@torch.no_grad()
def test_another_stride() -> None:
    """48-pixel views of 36 tokens, and a ConvNeXt of stride 8 at 144: its grid of 18 is averaged to 6."""
    config = tiny_vision(image_size=48, patch_size=8, num_hidden_layers=4)
    method = LlavaHR(TowerGeometry.of(config), LlavaHR.options_for(3))
    assert (method.pairs[0].low, method.pairs[0].high, method.pairs[0].grid) == (48, 144, 6)
    built = method.build_tower(config, -1).eval()
    assert built.read_high(views(144)).shape == (2, 96, 18, 18)
    assert built(views(144)).shape == (2, 36, 32)


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}


@torch.no_grad()
@pytest.mark.parametrize("kind", CLIP_LIKE)
def test_towers_like_clips(kind: str) -> None:
    config = CONFIG_MAPPING[kind](**SIZES, image_size=56, patch_size=14)
    given = {"resolutions": [[56, 128]], "convnext": SHAPE}
    method = LlavaHR(TowerGeometry.of(config), given)
    assert method.build_tower(config, -1).eval()(views()).shape == (2, 16, 32)


@torch.no_grad()
def test_the_last_layer_is_read() -> None:
    """H9: as transformers' SigLIP runs, which has no class token, whatever hidden state is named."""
    config = SiglipVisionConfig(**SIZES, image_size=56, patch_size=14)
    siglip = SiglipVisionModel(config).eval()
    method = LlavaHR(TowerGeometry.of(config), {"paths": "low", "resolutions": [[56, 56]]})
    pixels = views(56)
    expected = siglip(pixels, output_hidden_states=True).hidden_states[-1]
    for layer in (-1, -2):
        built = method.build_tower(config, layer).eval()
        method.fill_tower(built, siglip)
        assert gap(built(pixels), expected) < 1e-5


@torch.no_grad()
def test_dino_is_not_like_clip() -> None:
    method = LlavaHR(CLIP)
    dino = Dinov2Config(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=56)
    with pytest.raises(FoveateError, match="'dinov2' is not a ViT like CLIP's"):
        method.build_tower(dino, -1)


@torch.no_grad()
def test_the_class_token_takes_no_part(tiny: Callable[[str], Any]) -> None:
    built = tiny("llava_hr").model.vision_tower
    assert not any("class_embedding" in name for name, _ in built.named_parameters())
    lengths = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1]))
        for layer in built.model.encoder.layers
    ]
    built(views())
    assert lengths == [16, 16, 16]
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("version", [1, 2])
def test_blocks_in_parts(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a block computes a few rows at a time at inference is what it computes at once in training."""
    monkeypatch.setattr(convnext, "WIDE", 2500)
    built = ConvNext(build_options(ConvNextShape, {**SHAPE, "version": version}, "x"))
    block = built.stages[1].layers[0]
    for p in block.parameters():
        nn.init.normal_(p)
    calls: list[int] = []
    block.pwconv1.register_forward_hook(lambda _, given, out: calls.append(out.numel()))
    features = torch.randn(2, 16, 9, 9)
    expected = block(features).detach()
    assert calls == [2 * 81 * 64]
    with torch.no_grad():
        assert gap(block(features), expected) < 1e-5 * float(expected.abs().max())
    if version == 1:
        assert max(calls[1:]) <= 2500
        assert sum(calls[1:]) == calls[0]
    with torch.autocast("cpu", torch.bfloat16):
        expected = block(features.bfloat16()).detach()
        with torch.no_grad():
            found = block(features.bfloat16())
    assert found.dtype == expected.dtype
    assert version == 2 or found.dtype == torch.float32  # the layer scale's
    assert gap(found, expected) < 0.02 * float(expected.abs().max())


# Positions.


def test_positions_are_resampled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built = tower(resolutions=[[56, 128], [28, 64]])
    embeddings = built.model.embeddings
    table = embeddings.position_embedding.weight
    calls: list[Any] = []
    resampled = embeddings._resampled
    monkeypatch.setattr(embeddings, "_resampled", lambda side: calls.append(side) or resampled(side))
    with torch.no_grad():
        first = built(views(64))
        assert torch.equal(built(views(64)), first)
    with torch.inference_mode():
        built(views(64))
    assert calls == [2]
    with torch.no_grad():
        table.mul_(2)
        changed = built(views(64))
    assert calls == [2, 2]
    assert gap(changed, first) > 1e-4
    built(views(64)).sum().backward()  # it learns: not from the store
    assert calls == [2, 2, 2]
    assert table.grad[1:].abs().sum() > 0


@pytest.mark.parametrize("fused", [True, False])
def test_positions_follow_the_optimizer(fused: bool) -> None:
    """A fused optimizer changes a weight without counting up its version."""
    built = tower(resolutions=[[28, 64]])
    table = built.model.embeddings.position_embedding.weight
    optimizer = torch.optim.AdamW([table], lr=0.1, fused=fused)
    for _ in range(2):
        with torch.no_grad():
            before = built(views(64))
        built(views(64)).sum().backward()
        optimizer.step()
        with torch.no_grad():
            after = built(views(64))
            assert gap(after, before) > 1e-3
            built.model.embeddings.cached = None
            assert torch.equal(built(views(64)), after)


@torch.no_grad()
def test_positions_are_resampled_with_antialiasing() -> None:
    embeddings = tower().model.embeddings
    square = embeddings.position_embedding.weight[1:].T.reshape(1, 32, 4, 4)
    for side in (2, 3, 9):
        expected = F.interpolate(square, (side, side), mode="bicubic", antialias=True)
        assert gap(embeddings.positions(side), expected.flatten(2)[0].T) == 0.0
        plain = F.interpolate(square, (side, side), mode="bicubic")
        assert gap(expected, plain) > 1e-3  # even when it grows
    assert torch.equal(embeddings.positions(4), embeddings.position_embedding.weight[1:])


# Checkpointed activations.


def test_checkpointing_switches_both_towers_and_changes_nothing() -> None:
    made = fresh("llava_hr")
    model = made.model
    pixels = views(128, 1)
    ran: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        return lambda *_: ran.__setitem__(name, ran.get(name, 0) + 1)

    # the layer norm runs once, and once more where its block is computed again on the way back
    model.vision_tower.convnext.stages[2].layers[1].layernorm.register_forward_hook(count("convnext"))
    model.vision_tower.model.encoder.layers[1].layer_norm1.register_forward_hook(count("vit"))

    def gradients() -> dict[str, Tensor]:
        ran.clear()
        model.zero_grad()
        model.vision_tower(pixels).square().mean().backward()
        return {name: p.grad.clone() for name, p in model.vision_tower.named_parameters()}

    model.train()
    plain = gradients()
    assert ran == {"convnext": 1, "vit": 1}
    checkpoint_activations(model)
    checkpointed = gradients()
    assert ran == {"convnext": 2, "vit": 2}
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)
    model.eval()
    gradients()
    assert ran == {"convnext": 1, "vit": 1}  # not at inference
    checkpoint_activations(model.train(), False)
    gradients()
    assert ran == {"convnext": 1, "vit": 1}


def test_no_attention_maps() -> None:
    built = fresh("llava_hr").model.vision_tower
    assert built.model.config._attn_implementation == "sdpa"


# Plans.


def test_the_budget_picks_the_pair() -> None:
    def plan(budget: int | None) -> tuple[int, int]:
        plan = LlavaHR(CLIP, {"max_visual_tokens": budget}).plan(3000, 4000)
        return plan.tokens, plan.views[0].size.width

    assert plan(None) == plan(1024) == plan(5000) == (1024, 1024)
    assert plan(1023) == plan(576) == (576, 768)
    assert plan(575) == plan(256) == (256, 512)
    with pytest.raises(FoveateError, match="LLaVA-HR needs at least 256 visual tokens"):
        plan(255)


@pytest.mark.parametrize(
    ("tower", "pairs"),
    [
        (TowerGeometry(336, 14), [(224, 512), (336, 768), (448, 1024)]),
        (TowerGeometry(224, 14), [(224, 512), (336, 768), (448, 1024)]),
        (TowerGeometry(224, 16), [(256, 512), (384, 768), (512, 1024)]),
        (TowerGeometry(384, 16), [(256, 512), (384, 768), (512, 1024)]),
        (TowerGeometry(224, 32), [(512, 512), (768, 768), (1024, 1024)]),
        (TowerGeometry(64, 8), [(128, 512), (192, 768), (256, 1024)]),
    ],
)
@pytest.mark.parametrize(
    "more", [{}, {"direction": "low_to_high"}, {"paths": "high"}, {"convnext": {"patch": 8}}]
)
def test_default_sides_follow_the_patch(
    tower: TowerGeometry, pairs: list[tuple[int, int]], more: dict[str, Any]
) -> None:
    method = LlavaHR(tower, more)
    assert [(pair.low, pair.high) for pair in method.pairs] == pairs
    assert [pair.grid for pair in method.pairs] == [16, 24, 32]
    assert (method.plan(3000, 4000).tokens, method.plan(3000, 4000).views[0].size.width) == (1024, 1024)
    assert [pair.low for pair in LlavaHR(tower, {"paths": "low"}).pairs] == [low for low, _ in pairs]


@torch.no_grad()
@pytest.mark.parametrize(("patch", "low"), [(16, 256), (32, 512)])
def test_a_tower_of_larger_patches_sees_a_picture_with_the_defaults(patch: int, low: int) -> None:
    config = tiny_vision(image_size=64, patch_size=patch)
    method = LlavaHR(TowerGeometry.of(config), {"convnext": SHAPE, "groups": 1, "max_visual_tokens": 256})
    built = method.build_tower(config, -1).eval()
    assert built.shrunk(views(512, 1), method.pairs[0].low).shape == (1, 3, low, low)
    assert built(views(512, 1)).shape == (1, 256, config.hidden_size)


@pytest.mark.parametrize(
    ("tower", "given", "named"),
    [
        (TowerGeometry(224, 16), {"resolutions": [[224, 512]]}, [[256, 512], [224, 448]]),
        (TowerGeometry(224, 32), {"resolutions": [[224, 512]]}, [[512, 512], [224, 224]]),
        (CLIP, {"resolutions": [[448, 1536]]}, [[672, 1536], [448, 1024]]),
        (CLIP, {"resolutions": [[448, 1000]]}, [[434, 992], [448, 1024]]),
        (CLIP, {"resolutions": [[440, 1024]]}, [[448, 1024], [434, 992]]),
        (CLIP, {"resolutions": [[3, 1024]]}, [[448, 1024], [14, 32]]),
        (CLIP, {"resolutions": [[450, 1024]], "convnext": {"patch": 8}}, [[224, 1024], [448, 2048]]),
        (CLIP, {"resolutions": [[504, 384]], "direction": "low_to_high"}, [[168, 384], [504, 1152]]),
        (CLIP, {"resolutions": [[450, 1024]], "paths": "low"}, [[448, 448]]),
        (CLIP, {"magnify": 3}, [[448, 1024], [336, 768]]),
    ],
)
def test_what_does_not_fit_is_refused_with_pairs_that_do(
    tower: TowerGeometry, given: dict[str, Any], named: list[list[int]]
) -> None:
    with pytest.raises(FoveateError) as refused:
        LlavaHR(tower, given)
    assert str(refused.value).endswith(f"; {' or '.join(map(str, named))} would fit")
    for pair in named:
        more = {key: value for key, value in given.items() if key != "magnify"}
        assert LlavaHR(tower, {**more, "resolutions": [pair]}).pairs[0][:2] == tuple(pair)


@pytest.mark.parametrize(("low", "high", "tokens"), [(336, 384, 576), (448, 1024, 1024), (672, 1536, 2304)])
def test_pairs_of_the_paper(low: int, high: int, tokens: int) -> None:
    method = LlavaHR(CLIP, {"resolutions": [[low, high]]})
    for size in ((1, 1), (1, 20000), (20000, 1), (20000, 20000), (480, 640)):
        plan = method.plan(*size)
        assert (plan.tokens, plan.views[0].size) == (tokens, Size(high, high))
    assert method.pairs[0].low == low


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"resolutions": [[448, 1000]]}, "1000 pixels cannot be divided by the ConvNeXt's stride of 32"),
        ({"resolutions": [[440, 1024]]}, "440 pixels cannot be divided by the ViT's patch of 14"),
        ({"resolutions": [[448, 1536]]}, "grids of 32 and 48: neither divides the other"),
        ({"resolutions": []}, "pairs of a low and a high side"),
        ({"resolutions": [[448]]}, "pairs of a low and a high side"),
        ({"resolutions": [[336, 768], [448, 768]]}, "different high sides"),
        ({"magnify": 3}, "1008 pixels cannot be divided"),
        ({"magnify": 0}, "magnify must be at least 1"),
        ({"convnext": {"depths": [1, 1]}}, "as many depths as widths"),
        ({"convnext": {"patch": 0}}, "must be at least 1"),
        ({"convnext": {"patch": 8}, "resolutions": [[448, 1056]]}, "stride of 64"),
        ({"convnext": {"depth": [1]}}, "did you mean 'depths'"),
        ({"gate": "relu"}, "'relu' is not one of tanh, sigmoid, none"),
        (
            {"direction": "low_to_high", "resolutions": [[504, 384]]},
            "grid of 36, not divisible by stage 3's of 24",
        ),
    ],
)
def test_wrong_options(given: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        LlavaHR(CLIP, given)


def test_views_of_another_size() -> None:
    with pytest.raises(FoveateError, match=r"views of 64 x 64 pixels: the high sides in resolutions are 128"):
        tower()(views(64))


@pytest.mark.parametrize("size", [(1, 1), (1, 9000), (9000, 1), (2000, 3000)])
def test_pictures_of_any_size(size: tuple[int, int], tiny: Callable[[str], Any]) -> None:
    made = tiny("llava_hr")
    inputs = made.processor.image_processor(picture(*size))
    assert inputs["pixel_values"].shape == (1, 3, 128, 128)
    with torch.no_grad():
        tokens = made.model.get_image_features(**inputs).pooler_output[0]
    assert tokens.shape == (16, 48)
    assert torch.isfinite(tokens).all()


def test_price() -> None:
    """Parameters as the authors count them; more pixels cost vision, never tokens of the LLM."""
    pricer = shared_pricer(reference_config("llava_hr"))
    built = pricer.model.vision_tower
    millions = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (built.adapters[0], built.fusion)]
    assert [round(n, 2) for n in millions] == [6.09, 2.62]
    cost = pricer.price(Size(3000, 4000))
    assert (cost.visual_tokens, cost.effective_width, cost.effective_height) == (1024, 1024, 768)
    first = shared_pricer(reference_config("llava_hr", {"resolutions": [[336, 384]], "adapters": False}))
    assert first.price(Size(3000, 4000)).encode_flops < cost.encode_flops / 3


# ConvNeXt weights.


def test_norm_eps_of_every_layer() -> None:
    def found(**given: Any) -> set[float]:
        built = ConvNext(build_options(ConvNextShape, {"depths": [1, 1], "widths": [8, 16], **given}, "x"))
        return {module.eps for module in built.modules() if isinstance(module, nn.LayerNorm)}

    assert found() == {1e-6}
    assert found(norm_eps=1e-5) == {1e-5}


def timm_names(state: dict[str, Tensor], scale: str = "gamma", prefix: str = "") -> dict[str, Tensor]:
    """transformers' names -> timm's, written down from timm 0.9.11."""
    renamed = {}
    for key, tensor in state.items():
        new = key.removeprefix("convnext.").removeprefix("encoder.")
        for ours, theirs in (
            ("embeddings.patch_embeddings.", "stem.0."),
            ("embeddings.layernorm.", "stem.1."),
            (".downsampling_layer.", ".downsample."),
            (".layers.", ".blocks."),
            (".dwconv.", ".conv_dw."),
            (".layernorm.", ".norm."),
            (".pwconv1.", ".mlp.fc1."),
            (".pwconv2.", ".mlp.fc2."),
            (".grn.", ".mlp.grn."),
            (".layer_scale_parameter", f".{scale}"),
        ):
            new = new.replace(ours, theirs)
        if new.startswith(("stem.", "stages.")):
            renamed[prefix + new] = tensor.flatten() if "grn" in new else tensor.clone()
    return renamed


def convnext_folder(
    folder: Path, version: int = 1, names: str = "gamma", **changes: Any
) -> dict[str, Tensor]:
    """A folder as timm publishes it; returns the weights under transformers' names."""
    torch.manual_seed(3)
    sizes = {"depths": SHAPE["depths"], "hidden_sizes": SHAPE["widths"], **changes}
    model = (
        ConvNextModel(ConvNextConfig(**sizes)) if version == 1 else ConvNextV2Model(ConvNextV2Config(**sizes))
    )
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    state = model.state_dict()
    named = timm_names(state, names)
    head = {"head.norm.weight": torch.ones(32), "head.fc.weight": torch.ones(7, 32)}
    folder.mkdir(parents=True)
    save_file({**named, **head}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "convnext_large_mlp"}))
    return state


def composed(weights: Path, **convnext: Any) -> FoveateForConditionalGeneration:
    given = {
        "resolutions": [[56, 128]],
        "convnext": {**SHAPE, "weights": str(weights), **convnext},
        "groups": 3,
    }
    return compose(tiny_vision(), tiny_text(), "llava_hr", given, tokenizer=tiny_tokenizer()).model


@torch.no_grad()
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("names", ["gamma", "weight"])
def test_timm_names(version: int, names: str, tmp_path: Path) -> None:
    """Weights that timm wrote give what transformers' class gives with them; no timm is installed."""
    convnext_folder(tmp_path / "timm", version, names)
    kind, config = (ConvNextModel, ConvNextConfig) if version == 1 else (ConvNextV2Model, ConvNextV2Config)
    expected = kind(config(depths=SHAPE["depths"], hidden_sizes=SHAPE["widths"])).eval()
    expected.load_state_dict(convnext_folder(tmp_path / "again", version, names))
    built = composed(tmp_path / "timm", version=version).vision_tower.eval()
    assert gap(built.read_high(views()), expected(views()).last_hidden_state) < 1e-5
    with pytest.raises(ModuleNotFoundError):
        __import__("timm")


@torch.no_grad()
def test_transformers_names(tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = ConvNextConfig(depths=SHAPE["depths"], hidden_sizes=SHAPE["widths"], layer_scale_init_value=0.5)
    model = ConvNextForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "hf")
    built = composed(tmp_path / "hf").vision_tower.eval()
    assert gap(built.read_high(views()), model.convnext(views()).last_hidden_state) < 1e-5


def test_a_saved_model_needs_the_convnexts_folder_no_more(tmp_path: Path) -> None:
    convnext_folder(tmp_path / "timm")
    model = composed(tmp_path / "timm").eval()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "timm" / "model.safetensors").unlink()
    again = FoveateForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert torch.equal(again.vision_tower(views()), model.vision_tower(views()))


def test_wrong_convnext_weights(tmp_path: Path) -> None:
    convnext_folder(tmp_path / "other", depths=[1, 2, 2, 1])
    with pytest.raises(
        FoveateError, match=r"has depths \[1, 2, 2, 1\] and widths \[8, 16, 24, 32\]: set both"
    ):
        composed(tmp_path / "other")
    state = timm_names(convnext_folder(tmp_path / "cut"))
    del state["stages.1.blocks.0.mlp.fc1.bias"]
    save_file({**state, "stages.0.extra": torch.ones(1)}, tmp_path / "cut" / "model.safetensors")
    with pytest.raises(
        FoveateError, match=r"lacks stages.1.layers.0.pwconv1.bias; it has unexpected stages.0.extra"
    ):
        composed(tmp_path / "cut")
    convnext_folder(tmp_path / "patch", patch_size=2)
    with pytest.raises(FoveateError, match=r"the wrong shape for embeddings.patch_embeddings.weight"):
        composed(tmp_path / "patch")


# Released checkpoints.


def released(folder: Path, **changes: Any) -> Path:
    """config.json of a released model, as far as it matters."""
    config = {
        "model_type": "llava",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_projector_type": "mlp2x_gelu",
        "vision_tower_slow": "convnext_large_mlp.clip_laion2b_ft_320",
        "is_multipath_encoder": True,
        "input_image_size": 1024,
        "image_aspect_ratio": "pad",
        "freeze_vision": False,
        **changes,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    tiny_vision().save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def test_released_configurations(tmp_path: Path, clip: Path) -> None:
    def found(name: str, **changes: Any) -> tuple[str, LlavaHROptions]:
        given = recognise(released(tmp_path / name, **changes), clip)
        assert given is not None
        return given.method, options(**given.layout.options(given.config, given.preprocessor))

    method, large = found("large")
    assert method == "llava_hr"
    defaults = options(resolutions=[[448, 1024]])
    assert large == defaults  # the defaults are what the released checkpoints need
    assert LlavaHR(CLIP).plan(9, 9) == LlavaHR(CLIP, {"resolutions": [[448, 1024]]}).plan(9, 9)
    _, xxl = found("xxl", vision_tower_slow="convnext_xxlarge.clip_laion2b_soup")
    assert (xxl.convnext.depths, xxl.convnext.widths) == ((3, 4, 30, 3), (384, 768, 1536, 3072))
    assert xxl.convnext.norm_eps == 1e-5
    _, first = found("first", input_image_size=384, freeze_vision=True, image_aspect_ratio=None)
    assert (first.resolutions, first.fit, first.adapters) == (((336, 384),), "crop", False)
    with pytest.raises(FoveateError, match="vision_tower_slow 'resnet50' is not one of"):
        found("other", vision_tower_slow="resnet50")
    for name, size in (("null", None), ("text", "1024")):
        with pytest.raises(FoveateError, match="input_image_size a number of pixels, not 'convnext"):
            found(name, input_image_size=size)
    one = recognise(released(tmp_path / "one", vision_tower_slow=None, is_multipath_encoder=False), clip)
    assert one is not None and one.method == "llava"


def test_frozen_towers_have_no_adapters(tmp_path: Path, clip: Path) -> None:
    folder = released(tmp_path / "frozen", freeze_vision=True)
    save_file({"model.layers.0.mlp.up_proj.weight": torch.zeros(1)}, folder / "model.safetensors")
    given = recognise(folder, clip)
    assert given is not None
    found = options(**given.layout.options(given.config, given.preprocessor))
    assert (found.blocks, found.adapters) == ((), False)


def authors_state(built: FoveateForConditionalGeneration) -> dict[str, Tensor]:
    """A model's fusion and projector under the authors' names."""
    names = {
        "vision_tower.fusion.low.": "model.vision_tower.align_stages.0.fast_proj.",
        "vision_tower.fusion.high.": "model.vision_tower.align_stages.0.slow_proj.",
        "connector.projector.": "model.mm_projector.",
    }
    return {
        key.replace(ours, theirs): torch.full_like(tensor, 0.25)
        for key, tensor in built.state_dict().items()
        for ours, theirs in names.items()
        if key.startswith(ours)
    }


def test_stage_1_projectors(tmp_path: Path) -> None:
    """`compose` takes projector and fusion from mm_projector.bin, and what the first stage saw."""
    folder = released(
        tmp_path / "stage1", input_image_size=128, freeze_vision=True, image_aspect_ratio="square"
    )
    changes = {"resolutions": [[56, 128]], "convnext": SHAPE, "groups": 3}
    parts = (tiny_vision(), tiny_text())
    state = authors_state(compose(*parts, "llava_hr", changes, tokenizer=tiny_tokenizer()).model)
    torch.save(state, folder / "mm_projector.bin")
    model = compose(*parts, None, changes, connector=folder, tokenizer=tiny_tokenizer()).model
    assert model.config.method == "llava_hr"
    assert (model.method.options.fit, model.method.options.adapters) == ("crop", False)
    taken = {key for key, p in model.named_parameters() if p.unique().tolist() == [0.25]}
    assert {key.rpartition(".")[0] for key in taken} == {
        "vision_tower.fusion.low",
        "vision_tower.fusion.high",
        "connector.projector.0",
        "connector.projector.2",
    }
    assert len(stage_files(folder).tensors) == 8
    xxl = {"vision_tower_slow": "convnext_xxlarge", "input_image_size": 128}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **xxl}))
    merged = compose(*parts, None, changes, connector=folder, tokenizer=tiny_tokenizer()).model
    shape = merged.method.options.convnext
    assert (shape.norm_eps, shape.depths) == (1e-5, tuple(SHAPE["depths"]))  # the XXL's, and ours
    (folder / "config.json").write_text(json.dumps(config))
    missing = "model.vision_tower.align_stages.0.slow_proj.bias"
    torch.save({key: t for key, t in state.items() if key != missing}, folder / "mm_projector.bin")
    with pytest.raises(FoveateError, match=r"lacks vision_tower\.fusion\.high\.bias"):
        compose(*parts, None, changes, connector=folder, tokenizer=tiny_tokenizer())
    torch.save({**state, "model.vision_tower.more": torch.ones(1)}, folder / "mm_projector.bin")
    with pytest.raises(FoveateError, match=r"unexpected model\.vision_tower\.more"):
        compose(*parts, None, changes, connector=folder, tokenizer=tiny_tokenizer())


# Training and drawing.


def test_a_first_stage_then_a_second(tmp_path: Path) -> None:
    """The first trains projector and fusion; the second wakes the adapters, which start as nothing."""
    base = {**LlavaHR.tiny, "blocks": [1]}
    first = tiny_model("llava_hr", {**base, "adapters": False, "resolutions": [[56, 64]], "fit": "crop"})
    first.model.requires_grad_(False)
    first.model.connector.requires_grad_(True)
    first.model.vision_tower.fusion.requires_grad_(True)
    inputs = first.processor.image_processor(picture(70, 50))
    first.model.get_image_features(**inputs).pooler_output[0].square().mean().backward()
    learns = {name.rsplit(".", 2)[0] for name, p in first.model.named_parameters() if p.grad is not None}
    assert learns == {"connector.projector", "vision_tower.fusion"}
    first.save(tmp_path)
    changed = {"adapters": True, "resolutions": [[56, 128]], "fit": "pad"}
    second = FoveateForConditionalGeneration.from_pretrained(tmp_path, options=changed)
    asleep = FoveateForConditionalGeneration.from_pretrained(tmp_path, options={**changed, "adapters": False})
    with torch.no_grad():
        assert torch.equal(second.vision_tower(views()), asleep.vision_tower(views()))
    optimise = torch.optim.SGD(second.parameters(), lr=1e-4)
    for _ in range(2):  # the first step moves the last layers of f_l and f_h; then all others can follow
        optimise.zero_grad()
        second.vision_tower(views()).square().mean().backward()
        optimise.step()
    unmoved = [n for n, p in second.vision_tower.adapters.named_parameters() if not p.grad.abs().sum() > 0]
    assert unmoved == []


def test_it_learns_from_a_fresh_start() -> None:
    """What only the high resolution shows: stripes one pixel wide, upright or lying, under noise."""
    torch.manual_seed(0)
    config = tiny_vision(image_size=48, patch_size=8, num_hidden_layers=2, initializer_factor=1.0)
    method = LlavaHR(TowerGeometry.of(config), LlavaHR.options_for(2))
    built, head = method.build_tower(config, -1).train(), nn.Linear(32, 1)
    optimise = torch.optim.AdamW([*built.parameters(), *head.parameters()], lr=3e-3)
    stripes = (torch.arange(96) % 2).float().expand(3, 96, 96)  # upright
    losses = []
    for _ in range(30):
        lying = torch.rand(8) < 0.5
        pixels = torch.where(lying[:, None, None, None], stripes.mT, stripes)
        logits = head(built(pixels + 0.3 * torch.randn(8, 3, 96, 96)).mean(1))[:, 0]
        loss = F.binary_cross_entropy_with_logits(logits, lying.float())
        optimise.zero_grad()
        loss.backward()
        optimise.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.1 < 0.5 < np.mean(losses[:3])


def test_drawing_shows_both_views_gates_and_changes(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    made = tiny("llava_hr")
    image = picture(60, 100)
    answer = made.ask(image, "What is it?", max_new_tokens=3)
    processor, built = made.processor.image_processor, made.model.vision_tower
    pixels = torch.from_numpy(processor.views(image, answer.plan))
    account = made.engine.account(image)
    ((role, low),) = account.views
    assert (role, low.shape) == ("low resolution", (3, 56, 56))
    assert processor.shown(pixels[0]).tobytes() == processor.paint(image, answer.plan.canvases[0]).tobytes()
    with torch.no_grad():
        adapter = built.adapters[0]
        seen: list[Any] = []
        hook = adapter.register_forward_pre_hook(lambda _, given: seen.append(given))
        built(pixels)
        hook.remove()
        gate = adapter.parts(*seen[0]).gate.item()
    assert account.notes[0] == f"gates after blocks 1: {gate:.3f}"
    boxes, weights = zip(*account.heat(), strict=True)
    assert max(weights) == 1.0
    assert min(weights) == 0.01
    assert sum(float(box.width * box.height) for box in boxes) == pytest.approx(6000)  # padding is left out
    drawing = answer.show(tmp_path / "seen.png")
    other = tiny("llava").ask(image, "What is it?", max_new_tokens=3).show()
    frames = [(np.asarray(page) == COLOURS[1]).all(-1).sum() for page in (drawing, other)]
    assert frames[0] > 1000 > frames[1] == 0  # the second view's
    assert (tmp_path / "seen.png").stat().st_size > 0


# The recipe.


def test_recipe_is_the_papers() -> None:
    recipe = load_recipe("llava_hr")
    first, second = recipe.stages.values()
    assert (first.trains, second.trains) == (
        ["connector", "vision_tower.fusion"],
        ["connector", "language_model", "vision_tower"],
    )
    assert (first.lr, second.lr, first.batch, second.batch) == (1e-3, 2e-5, 256, 128)
    assert (first.epochs, second.epochs, first.max_length - 576, second.max_length - 1024) == (
        1,
        1,
        2048,
        2496,
    )
    seen = [options(**{**recipe.model.options, **stage.options}) for stage in (first, second)]
    assert [o.resolutions for o in seen] == [((336, 384),), ((448, 1024),)]
    assert [(o.fit, o.adapters) for o in seen] == [("crop", False), ("pad", True)]


def test_the_larger_model_is_a_change_behind_the_recipe() -> None:
    """The command in the recipe's header."""
    header = find("recipe", "llava_hr").read_text(encoding="utf-8").split("LLaVA-HR-X")[1]
    convnext = header.split("'")[1].replace("\n#", "\n")
    assert convnext.startswith("{weights: timm/convnext_xxlarge")
    recipe = load_recipe("llava_hr", [f"model.options.convnext={convnext}"])
    shape = options(**recipe.model.options).convnext
    assert (shape.depths, shape.widths, shape.norm_eps) == ((3, 4, 30, 3), (384, 768, 1536, 3072), 1e-5)
