"""What tests of several folders share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from foveate.picture.source import Source


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Random pixels, the same for the same seed and size."""
    rng = np.random.default_rng((seed, height, width))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    """One random picture per (height, width)."""
    return [picture(*size, seed=i) for i, size in enumerate(sizes)]


def chat(question: str, *images: Any) -> list[dict[str, Any]]:
    """One user message: pictures, then a question."""
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def source_of(*images: Image.Image) -> Source:
    """Original pictures, and a tower that hands on their views' pixels as features."""
    pixels = [torch.from_numpy(np.array(image)) for image in images]
    norms = torch.tensor([[0.5] * 3, [0.25] * 3]).expand(len(images), -1, -1)
    return Source(pixels, norms, lambda views: views.flatten(2).transpose(1, 2))


def gap(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference."""
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    return float((a.detach().float() - b.detach().float()).abs().max())


def awake(module: Any) -> Any:
    """Layers that start as zero, and hide what comes before them, get other weights. Returns the module."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.LayerNorm) and not layer.weight.any():
            layer.reset_parameters()
    return module


@contextmanager
def tower_calls(model: Any) -> Iterator[list[int]]:
    """Views of every call of the tower."""
    seen: list[int] = []
    hook = model.vision_tower.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    yield seen
    hook.remove()


def right_padded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same batch with its padding moved from the left to the right."""
    mask = inputs["attention_mask"]
    order = (1 - mask).argsort(dim=1, stable=True)  # real tokens first, in order
    moved = {name: inputs[name].gather(1, order) for name in ("input_ids", "attention_mask")}
    return {**inputs, **moved}


def rows(logits: Tensor, mask: Tensor) -> list[Tensor]:
    """Per sample the logits at real tokens, (B, T, vocabulary) -> list of (T_b, vocabulary)."""
    return [row[keep.bool()] for row, keep in zip(logits, mask, strict=True)]


def largest_gap(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return max(gap(x, y) for x, y in zip(a, b, strict=True))


def checkpoint_activations(model: Any, on: bool = True) -> None:
    """Recomputes activations in the backward pass, or not; transformers 5.23 has renamed how to ask."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{name}_checkpointing_disable")()


@torch.no_grad()
def greedy(model: Any, inputs: dict[str, Any], tokens: int = 8, **kwargs: Any) -> list[list[int]]:
    """New tokens of greedy decoding, per sample; the end-of-sequence token does not stop it."""
    out = model.generate(**inputs, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, **kwargs)
    return out[:, inputs["input_ids"].shape[1] :].tolist()
