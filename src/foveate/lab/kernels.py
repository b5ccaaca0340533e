"""Parts of a decoder layer in fewer passes over memory, for training on a CPU.

What transformers' modules compute, to rounding. At the lab's widths, passes over memory cost as much as the
matrix products do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
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
