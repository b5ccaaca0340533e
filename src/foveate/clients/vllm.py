"""What vLLM must know about a model: its names, its pictures' tokens, and which methods it can run.

The classes that vLLM loads are in `vllm_model`: they put a model into vLLM's Transformers backend. vLLM
encodes each picture once, without its question and apart from the LLM, and keeps its tokens for every prompt
that shows it. A method whose tokens depend on more is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from foveate.errors import FoveateError
from foveate.layers import name_of
from foveate.methods.base import Method
from foveate.picture.geometry import Size, ViewPlan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ARCHITECTURE = "FoveateForConditionalGeneration"  # in a folder's config.json
MODEL = "foveate.clients.vllm_model:FoveateVllm"
MISSING = "vLLM is not installed, or not whole: docs/clients.md says how to install it"
PER_PICTURE = ("image_sizes",)  # inputs with one row per picture, not one per view
WIDEST = 16  # rows and columns of tiles among which the picture with the most tokens is looked for


def register() -> None:
    """Tells vLLM about the model: vLLM calls it in each of its processes, through an entry point."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, MODEL)


def refusal(method: Method, why: str) -> FoveateError:
    return FoveateError(f"{method.title} does not run in vLLM, {why}: serve it with `foveate serve`")


def check_method(method: Method) -> None:
    """Raises `FoveateError` for a method that vLLM cannot run."""
    if method.only_here is not None:
        raise refusal(method, method.only_here)


def further_turns(method: Method) -> int:
    """How many turns the method takes after the first one."""
    return len(method.turn_sizes(Size(1, 1))) - 1


def check_turn(method: Method, pictures: int) -> None:
    """Raises `FoveateError` for a prompt of a later turn, which shows another part of the picture.

    vLLM runs the first turn alone: it does not cut pictures as the model's reply says.
    """
    if further_turns(method) and pictures > 1:
        raise FoveateError(
            f"a prompt shows {pictures} pictures: vLLM runs the first turn of {method.title}, about one "
            "picture; all of its turns run with `foveate serve`"
        )


def check_encoded(method: Method, drops: bool, injects: bool) -> None:
    """Raises `FoveateError` for visual tokens that the LLM must not see, or for changes of its states."""
    if drops or injects:
        what = "its connector drops visual tokens" if drops else "it changes states inside the LLM"
        raise refusal(method, what)


def field_sizes(views: list[int]) -> dict[str, list[int]]:
    """Per input of the model how many of its rows belong to each picture, from its number of views."""
    return {"pixel_values": views, **{name: [1] * len(views) for name in PER_PICTURE}}


def begun(prompt: list[int], tokenizer: Any) -> list[int]:
    """A prompt's tokens with the one that begins a text, if the tokenizer writes one and it is not there.

    vLLM takes a chat template's text as it is; Foveate's templates leave that token to the tokenizer if the
    LLM's own format does.
    """
    start = tokenizer.bos_token_id
    if start is None or prompt[:1] == [start] or tokenizer("")["input_ids"][:1] != [start]:
        return prompt
    return [start, *prompt]


def renamings(text_config: PreTrainedConfig) -> dict[str, str]:
    """Regular expressions on the keys of a saved model -> keys of the model in vLLM, for `re.sub`.

    vLLM holds the model without its head, whose LLM is its decoder alone, under `model`, and the head apart.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(text_config, trust_remote_code=False)
    decoder, head = (name_of(causal, part) for part in (causal.get_decoder(), causal.get_output_embeddings()))
    return {
        rf"^language_model\.{re.escape(decoder)}\.": "model.language_model.",
        rf"^language_model\.{re.escape(head)}\.": "lm_head.",
        r"^(?=(?:vision_tower|connector)\.)": "model.",
    }


def fullest_picture(plan: Callable[[int, int], ViewPlan], side: int) -> Size:
    """The smallest picture found with the most visual tokens, and among these the most views.

    Which picture that is depends on its shape as well as its size: pictures of up to `WIDEST` tiles each way
    are tried.

    Args:
        plan: of a method, for a height and a width.
        side: of the tower's input, pixels.
    """
    sizes = [Size(rows * side, columns * side) for rows, columns in product(range(1, WIDEST + 1), repeat=2)]

    def fullness(size: Size) -> tuple[int, int, int]:
        made = plan(*size)
        return made.tokens, len(made.views), -size.height * size.width

    return max(sizes, key=fullness)
