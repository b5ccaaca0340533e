"""Chain-of-Spot: the second turn on top of the first, against reading and encoding everything again.

    python -m benchmarks.chain_of_spot [--rounds 5] [--threads 2] [--layers 32] [--width 256] [--new-tokens 8]

The LLM has the 32 layers of a 7B model, the tower the 24 layers (three for four of the LLM's) and 576 tokens
a view of CLIP ViT-L/14-336; both are narrow and have random weights. The first turn's answer is a fixed box,
since a random model writes none. Both forms run alternately on the same model and give the same tokens.
Prints a Markdown table of the second turn alone, from the picture of the crop to the last token of the
answer: medians with their range, in seconds on the clock and in seconds of processor time, which other work
on the machine does not lengthen.
"""

from __future__ import annotations

import platform
import statistics
import time
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from transformers import set_seed

from benchmarks.arguments import Whole, arguments
from foveate import Foveate
from foveate.ask.answer import Ledger
from foveate.ask.context import Context
from foveate.ask.conversation import content
from foveate.composing import compose
from foveate.methods.base import Turn
from foveate.tiny import tiny_text, tiny_tokenizer, tiny_vision

BOX = "[0.125, 0.71, 0.2, 0.83]"
QUESTION = "What is written on the sign to the left of the door?"


def build(layers: int, width: int) -> Foveate:
    """`layers` of LLM and three quarters as many of tower, `width` channels wide."""
    set_seed(0)
    wide = {"hidden_size": width, "num_attention_heads": width // 64}
    text = tiny_text(
        **wide, num_hidden_layers=layers, intermediate_size=width * 11 // 4, num_key_value_heads=1
    )
    vision = tiny_vision(
        **wide,
        num_hidden_layers=layers * 3 // 4,
        intermediate_size=width * 4,
        image_size=336,
        initializer_factor=1.0,
    )
    return compose(vision, text, "chain_of_spot", {}, tokenizer=tiny_tokenizer(), template="chatml")


def second_turn(foveate: Foveate, picture: Image.Image, new_tokens: int) -> tuple[str, float, float, Ledger]:
    """Both turns: answer and seconds of the second, on the clock and of the processor; cost of both."""
    conversation = foveate.model.method.converse(picture, QUESTION)
    messages, context = [message(next(conversation))], Context()
    (first,) = foveate.engine.say([messages], context, max_new_tokens=1, min_new_tokens=1)
    messages.append({"role": "assistant", "content": [{"type": "text", "text": BOX}]})
    messages.append(message(conversation.send(BOX)))
    limits = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    clock, processor = time.perf_counter(), time.process_time()
    (second,) = foveate.engine.say([messages], context, **limits)
    seconds = time.perf_counter() - clock, time.process_time() - processor
    first.ledger.add(second.ledger)
    return second.text, *seconds, first.ledger


def message(turn: Turn) -> dict[str, Any]:
    return {"role": "user", "content": content(turn)}


def main() -> None:
    given = arguments(
        __doc__,
        rounds=5,
        layers=Whole(32, least=4, step=4, help="of the LLM"),
        width=Whole(256, step=64, help="channels of LLM and tower"),
        new_tokens=Whole(8, help="of the second turn's answer"),
    )
    made, rng = build(given.layers, given.width), np.random.default_rng(0)
    forms = {
        "kept": Foveate(made.model, made.processor),
        "read anew": Foveate(made.model, made.processor, memory=0, keep_context=False),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    ledgers: dict[str, Ledger] = {}
    for n in range(given.rounds + 1):  # the first is the warm-up, also of what counts FLOPs
        picture = Image.fromarray(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8))  # none is remembered
        answers = set()
        for name, form in forms.items():
            reply, clock, processor, ledgers[name] = second_turn(form, picture, given.new_tokens)
            answers.add(reply)
            seconds[name] += [(clock, processor)] if n else []
        assert len(answers) == 1, "the two forms answer differently"
    console = Console(width=140)
    console.print(
        f"{platform.machine()}, torch {torch.__version__}, {given.threads} threads, {given.layers} layers, "
        f"width {given.width}, {given.rounds} rounds, {given.new_tokens} new tokens; both turns: "
        + "; ".join(
            f"{name}: {ledger.prompt_tokens} tokens read, {ledger.encoded_views} views encoded"
            for name, ledger in ledgers.items()
        ),
        soft_wrap=True,
    )
    console.print("| second turn | kept s (range) | read anew s (range) | ratio |\n|---|---|---|---|")
    for kind, what in enumerate(("on the clock", "of processor time")):
        cells, medians = [], []
        for record in seconds.values():
            mine = [both[kind] for both in record]
            medians.append(statistics.median(mine))
            cells.append(f"{medians[-1]:.2f} ({min(mine):.2f} - {max(mine):.2f})")
        console.print(f"| {what} | {' | '.join(cells)} | {medians[0] / medians[1]:.3f} |", soft_wrap=True)


if __name__ == "__main__":
    main()
