"""Parts that two or more methods use."""

from __future__ import annotations

from hashlib import blake2b
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a number -> integer type
Activation: TypeAlias = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]


class QuickGELU(nn.Module):
    """The approximation of GELU with which CLIP was trained."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def activation_layer(name: Activation) -> nn.Module:
    """The layer of an activation."""
    if name == "gelu_tanh":
        return nn.GELU(approximate="tanh")
    return {"gelu": nn.GELU, "quick_gelu": QuickGELU, "relu": nn.ReLU, "silu": nn.SiLU}[name]()


def mlp_projector(vision: int, text: int, depth: int = 2, activation: Activation = "gelu") -> nn.Sequential:
    """LLaVA's projector: `depth` linear layers with exact GELU between, vision width C -> LLM width D.

    LLaVA-1.5 section 3.2; depth 2 is its `mlp2x_gelu`, depth 1 the linear projection of the first LLaVA.
    """
    layers: list[nn.Module] = []
    for i, (wide_in, wide_out) in enumerate(pairwise([vision] + [text] * depth)):
        layers += [activation_layer(activation)] if i else []
        layers += [nn.Linear(wide_in, wide_out)]
    return nn.Sequential(*layers)


def projected(layer: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """The i-th of a layer's equal parts, of the i-th input: several projections held by one linear layer.

    Only those parts are computed, unless the layer is more than a linear one: adapters and quantised weights
    need to be called.
    """
    if type(layer) is not nn.Linear:
        return [layer(x).chunk(len(inputs), -1)[i] for i, x in enumerate(inputs)]
    weights, biases = layer.weight.chunk(len(inputs)), layer.bias.chunk(len(inputs))
    return [F.linear(x, weight, bias) for x, weight, bias in zip(inputs, weights, biases, strict=True)]


def exact(x: Tensor) -> torch.autocast:
    """A context without autocast, for full precision on the device of `x`."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


def dtype_of(module: nn.Module) -> torch.dtype:
    """The number format of a module's first floating parameter: quantised weights are whole numbers."""
    return next(p.dtype for p in module.parameters() if p.is_floating_point())


def name_of(parent: nn.Module, child: nn.Module) -> str:
    """The dotted name of a module inside another."""
    return next(name for name, module in parent.named_modules() if module is child)


def weights_of(model: nn.Module) -> str:
    """A fingerprint of a model: names, shapes and the sum of the bits of all its weights."""
    digest = blake2b(digest_size=8)
    for name, weight in model.state_dict().items():
        bits = weight.detach().contiguous().view(WORDS[weight.element_size()])
        total = int(bits.sum(dtype=torch.int64))  # independent of order and device
        digest.update(f"{name} {tuple(weight.shape)} {total}".encode())
    return digest.hexdigest()
