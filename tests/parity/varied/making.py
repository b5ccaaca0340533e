"""What makers of cases share: random numbers, and the layers that all papers are built of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
COLOUR = (122, 116, 104)  # of what pads a square


class Made(NamedTuple):
    """A case: what its JSON holds, and its tensors."""

    about: dict[str, Any]
    tensors: dict[str, Tensor]


Maker = Callable[[int], Made]


class Random:
    """Tensors that are the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=self.generator) * scale

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def linear(self, name: str, wide_out: int, wide_in: int) -> dict[str, Tensor]:
        weight = self(wide_out, wide_in, scale=wide_in**-0.5)
        return {f"{name}.weight": weight, f"{name}.bias": self(wide_out, scale=0.1)}

    def norm(self, name: str, width: int) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + self(width, scale=0.1), f"{name}.bias": self(width, scale=0.1)}


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{key}": tensor for key, tensor in tensors.items()}


def linear(x: Tensor, state: Mapping[str, Tensor], name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(x: Tensor, state: Mapping[str, Tensor], name: str, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def attended(query: Tensor, key: Tensor, value: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """(..., M, C), (..., N, C) twice -> what is read (..., M, C), and the maps (..., heads, M, N)."""
    width = query.shape[-1] // heads
    read, maps = [], []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = query[..., part] @ key[..., part].transpose(-1, -2) / math.sqrt(width)
        maps.append(scores.softmax(-1))
        read.append(maps[-1] @ value[..., part])
    return torch.cat(read, -1), torch.stack(maps, -3)


def photo(seed: int, width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def drawn(coefficients: Sequence[Sequence[int]], width: int, height: int) -> Image.Image:
    """pixel[y, x, c] = (k0 x + k1 y + k2 x y) mod 256"""
    page = np.zeros((height, width, 3), dtype=np.uint8)
    for y in range(height):
        for x in range(width):
            page[y, x] = [(a * x + b * y + c * x * y) % 256 for a, b, c in coefficients]
    return Image.fromarray(page)


def bytes_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image))


def padded(image: Image.Image) -> Image.Image:
    """On a square of CLIP's mean colour, in the middle."""
    side = max(image.size)
    page = Image.new("RGB", (side, side), COLOUR)
    page.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return page


def normalised(image: Image.Image) -> Tensor:
    """(3, h, w)"""
    values = (np.asarray(image, dtype=np.float64) / 255 - CLIP_MEAN) / CLIP_STD
    return torch.from_numpy(values.transpose(2, 0, 1)).float()


def resized(image: Image.Image, width: int, height: int) -> Image.Image:
    return image.resize((width, height), Image.Resampling.BICUBIC)
