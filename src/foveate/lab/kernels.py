"""Parts of networks that train faster on a CPU.

Those of a decoder layer take fewer passes over memory, and compute what transformers' modules do, to
rounding: at the lab's widths, passes cost as much as matrix products. Linear layers may multiply in bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = (length.square() / x.shape[-1] + epsilon).rsqrt()
        unit = x * scale
        context.save_for_backward(unit, scale, weight)
        return unit * weight

    @staticmethod
    @once_differentiable
    def backward(context: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        unit, scale, weight = context.saved_tensors
        product = grad * unit
        along = (product @ weight)[..., None] / unit.shape[-1]
        of_x = (grad * weight).addcmul_(unit, along, value=-1).mul_(scale)
        return of_x, product.flatten(0, -2).sum(0), None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, gate: Tensor, up: Tensor) -> Tensor:
        context.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(context: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = context.saved_tensors
        share = torch.sigmoid(gate)
        open_ = gate * share
        of_up = grad * open_
        # d silu(g) = s + g s (1 - s), s the sigmoid of g
        slope = share.addcmul_(open_, 1 - share)
        return slope.mul_(grad).mul_(up), of_up


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        context.save_for_backward(cosine, sine)
        return _turn(x, cosine, sine, 1.0)

    @staticmethod
    @once_differentiable
    def backward(context: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = context.saved_tensors
        return _turn(grad, cosine, sine, -1.0), None, None


class Bfloat16Linear(nn.Linear):
    """Multiplies in bfloat16 while it trains. What enters and leaves it, its weights and all gradients are
    float32; when it is measured, it is any linear layer."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        bias = None if self.bias is None else self.bias.bfloat16()
        return F.linear(input.bfloat16(), self.weight.bfloat16(), bias).float()


def _turn(x: Tensor, cosine: Tensor, sine: Tensor, way: float) -> Tensor:
    half = x.shape[-1] // 2
    turned = x * cosine
    turned[..., :half].addcmul_(x[..., half:], sine[..., :half], value=-way)
    turned[..., half:].addcmul_(x[..., :half], sine[..., half:], value=way)
    return turned


def normed(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root mean square norm over the last dimension, as `LlamaRMSNorm`.

    On a CPU, `F.rms_norm` takes about twice the time, forward and backward.
    """
    made: Tensor = _Norm.apply(x, weight, epsilon)
    return made


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, as between the layers of `LlamaMLP`."""
    made: Tensor = _Gated.apply(gate, up)
    return made


def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions of queries or keys (..., n, D), as `apply_rotary_pos_emb`.

    `cosine` and `sine`, which may be broadcast, are the same for both halves of the last dimension.
    """
    made: Tensor = _Turned.apply(x, cosine, sine)
    return made


def multiply_in_bfloat16(module: nn.Module) -> None:
    """Makes all linear layers below a module `Bfloat16Linear`.

    Attention stays in float32: on a CPU, torch takes three times as long for its gradients in bfloat16.
    """
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = Bfloat16Linear
