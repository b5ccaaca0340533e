"""Foveate against transformers' own LLaVA classes: the same weights, pixels and questions, timed alternately.

    python -m benchmarks.peers [--rounds 7] [--threads 2] [--layers 24] [--width 1024] [--pixels 3000 4000]

Prints a Markdown table of medians with their range, and the ratio of the medians. The vision tower has the
shape of CLIP ViT-L/14-336, the LLM is small, so that the vision side, where the two differ, is what is seen.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from rich.console import Console
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
)

import foveate
from benchmarks.arguments import Whole, arguments
from foveate.tiny import tiny_text, tiny_tokenizer

SIDE = 336
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
SIZES = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
PROMPT = "USER: <image>\nWhat is written on the sign? ASSISTANT:"


def peers(layers: int, width: int) -> dict[str, tuple[Any, Any]]:
    """Method -> transformers' model and processor, with random weights."""
    tokenizer = tiny_tokenizer()
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": width // 64}
    parts = {
        "vision_config": CLIPVisionConfig(**shape, image_size=SIDE, patch_size=14),
        "text_config": tiny_text(),
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
    }
    common = {
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    return {
        "llava": (
            LlavaForConditionalGeneration(LlavaConfig(**parts)).eval(),
            LlavaProcessor(CLIPImageProcessorPil(**SIZES), tokenizer, **common),
        ),
        "anyres": (
            LlavaNextForConditionalGeneration(
                LlavaNextConfig(**parts, image_grid_pinpoints=PINPOINTS)
            ).eval(),
            LlavaNextProcessor(
                LlavaNextImageProcessorPil(**SIZES, image_grid_pinpoints=PINPOINTS), tokenizer, **common
            ),
        ),
    }


def compare(
    ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int
) -> tuple[list[float], list[float]]:
    """Seconds of both, called in turn after one warm-up each."""
    ours(), theirs()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for call, record in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            call()
            record.append(time.perf_counter() - start)
    return times


def main() -> None:
    given = arguments(
        __doc__,
        rounds=7,
        layers=Whole(24, least=2, help="of the tower, of which the last is not read"),
        width=Whole(1024, step=64, help="channels of the tower"),
        pixels=Whole((3000, 4000), help="height and width of the picture"),
    )
    height, width = given.pixels
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console = Console(width=200, highlight=False, markup=False)
    console.print(
        f"{platform.machine()}, {given.threads} threads, float32, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, tower of {given.layers} layers, {given.width} wide, "
        f"{given.rounds} rounds, picture {width} x {height}\n"
    )
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    console.print("| what | Foveate s (range) | transformers s (range) | ratio |")
    console.print("|---|---|---|---|")
    for name, (model, processor) in peers(given.layers, given.width).items():
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(Path(folder))
            processor.save_pretrained(Path(folder))
            ours = foveate.load(folder, device="cpu", dtype="float32", template="vicuna_v1")
        inputs = processor(images=picture, text=PROMPT, return_tensors="pt")
        views = ours.processor(images=picture, text=PROMPT, return_tensors="pt")
        calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            "picture -> pixels": (
                lambda ours=ours: ours.processor.image_processor(picture),
                lambda processor=processor: processor.image_processor(picture, return_tensors="pt"),
            ),
            "pixels -> visual tokens": (
                lambda ours=ours, views=views: ours.model.get_image_features(
                    views["pixel_values"], views["image_sizes"]
                ),
                lambda model=model, inputs=inputs: model.get_image_features(
                    **{key: inputs[key] for key in ("pixel_values", "image_sizes") if key in inputs}
                ),
            ),
            "a second question": (
                lambda ours=ours: ours.ask(picture, "What is written on the sign?", max_new_tokens=4),
                lambda model=model, processor=processor: model.generate(
                    **processor(images=picture, text=PROMPT, return_tensors="pt"),
                    max_new_tokens=4,
                    do_sample=False,
                ),
            ),
        }
        for what, (mine, theirs) in calls.items():
            with torch.no_grad():
                a, b = compare(mine, theirs, given.rounds)
            cells = [f"{statistics.median(t):.3f} ({min(t):.3f} - {max(t):.3f})" for t in (a, b)]
            ratio = statistics.median(b) / statistics.median(a)
            console.print(f"| {name}: {what} | {cells[0]} | {cells[1]} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
