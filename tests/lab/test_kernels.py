"""Parts of a decoder layer: values of transformers' own, gradients of finite differences; linear layers in
bfloat16."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, rotate_half

from foveate.lab.kernels import Bfloat16Linear, gated, multiply_in_bfloat16, normed, turned


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def angles(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of both halves the same, as rotary positions are."""
    half = torch.randn(*shape[:-1], shape[-1] // 2, dtype=torch.float64)
    both = torch.cat([half, half], -1)
    return both.cos(), both.sin()


def test_the_norm_is_that_of_transformers() -> None:
    theirs, x = LlamaRMSNorm(6, eps=1e-3).double(), drawn(2, 5, 6)
    weight = drawn(6)
    theirs.weight.data.copy_(weight.detach())
    # transformers' own squares in float32
    torch.testing.assert_close(normed(x, weight, 1e-3), theirs(x), rtol=1e-6, atol=1e-6)
    assert torch.autograd.gradcheck(lambda x, w: normed(x, w, 1e-3), (x, weight))


def test_the_gate_is_that_of_transformers() -> None:
    gate, up = drawn(3, 4), drawn(3, 4)
    torch.testing.assert_close(gated(gate, up), F.silu(gate) * up)
    assert torch.autograd.gradcheck(gated, (gate, up))


def test_the_turn_is_that_of_transformers() -> None:
    x, (cosine, sine) = drawn(2, 3, 5, 8), angles(2, 1, 5, 8)
    torch.testing.assert_close(turned(x, cosine, sine), x * cosine + rotate_half(x) * sine)
    assert torch.autograd.gradcheck(lambda x: turned(x, cosine, sine), (x,))


def test_linear_layers_multiply_in_bfloat16_while_they_train_and_only_then() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 8, bias=False))
    halves = deepcopy(plain)
    multiply_in_bfloat16(halves)
    kinds = [type(layer) for layer in halves]
    assert kinds == [Bfloat16Linear, nn.LayerNorm, Bfloat16Linear]
    assert {*halves.state_dict()} == {*plain.state_dict()}
    x = torch.randn(5, 64)
    assert torch.equal(halves.eval()(x), plain.eval()(x))
    found = []
    for network in (plain.train(), halves.train()):
        made = network(x)
        made.square().sum().backward()
        found.append([made.detach(), *(weight.grad for weight in network.parameters())])
    for exact, rounded in zip(*found, strict=True):
        assert rounded.dtype == torch.float32
        assert 0 < (rounded - exact).norm() / exact.norm() < 0.02
