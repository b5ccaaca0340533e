"""The tower, the ConvNeXt, the LLM and the tokenizer that methods start from, and how they are made."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    CLIPVisionModel,
    ConvNextModel,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from foveate.errors import FoveateError
from foveate.files import explained, write
from foveate.lab.data import CPU
from foveate.lab.reader import comprehension, train_reader
from foveate.lab.scales import Scale, scale_named
from foveate.lab.tower import legibility, tower_scenes, train_tower
from foveate.lab.words import lab_tokenizer

ASSETS = Path(__file__).parent / "assets"
PARTS = ("tower", "reader", "convnet")
NOTES = "prepared.json"  # in a part's folder: its accuracy and training time
Report = Callable[[str, int, int, float], None]  # what, step, steps, loss


@dataclass(frozen=True)
class Parts:
    """The result of `prepare`.

    Attributes:
        tower: frozen, the stand-in for CLIP.
        reader: the LLM, the stand-in for Vicuna.
        tokenizer: of the LLM.
        tower_key, reader_key, convnet_key: name their weights.
        convnet: folder of the ConvNeXt for methods that have one; None if there is none.
    """

    tower: CLIPVisionModel
    reader: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    tower_key: str
    reader_key: str
    convnet_key: str
    convnet: Path | None


class Prepared(NamedTuple):
    """A pre-trained part and its accuracy, per kind of question."""

    model: PreTrainedModel
    accuracy: dict[str, Any]
    tokenizer: PreTrainedTokenizerFast | None = None


def prepare(
    name: str,
    scale: Scale,
    folder: Path,
    seed: int = 0,
    report: Report | None = None,
    parts: Sequence[str] = PARTS,
    device: torch.device = CPU,
) -> Path:
    """Pre-trains and writes those of `parts` that a scale lacks.

    Returns the folder of the parts, each in transformers' own layout with a `prepared.json` that holds its
    accuracy and training time.

    Raises:
        FoveateError: unknown parts.
    """
    if scale.parts is not None:
        raise FoveateError(f"scale {name!r} has the networks of {scale.parts!r}: prepare those")
    if unknown := set(parts) - set(PARTS):
        raise FoveateError(f"unknown parts {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    makers = {
        "tower": partial(_prepare_tower, scale, False),
        "reader": partial(_prepare_reader, scale),
        "convnet": partial(_prepare_tower, scale, True),
    }
    steps = {"tower": scale.tower.steps, "reader": scale.reader.steps, "convnet": scale.convnet.steps}
    for part in parts:
        place = folder / "parts" / name / part
        if (place / NOTES).is_file():
            continue

        def tell(step: int, loss: float, part: str = part) -> None:
            if report:
                report(part, step, steps[part], loss)

        start = time.process_time()
        made = makers[part](seed, tell, device)
        notes = {"seconds": round(time.process_time() - start), "accuracy": made.accuracy}
        with explained(place):
            made.model.to(torch.bfloat16).save_pretrained(place)
            if made.tokenizer is not None:
                made.tokenizer.save_pretrained(place)
        write(place / NOTES, json.dumps(notes, indent=2) + "\n")
    return folder / "parts" / name


def _prepare_tower(
    scale: Scale, convolutional: bool, seed: int, tell: Callable[[int, float], None], device: torch.device
) -> Prepared:
    tower, head = train_tower(scale, convolutional, seed, tell, device)
    return Prepared(
        tower, legibility(tower, head, scale, tower_scenes(scale, "test", scale.tower_test_scenes))
    )


def _prepare_reader(
    scale: Scale, seed: int, tell: Callable[[int, float], None], device: torch.device
) -> Prepared:
    tokenizer = lab_tokenizer()
    reader = train_reader(scale, tokenizer, seed, tell, device)
    return Prepared(reader, comprehension(reader, tokenizer, scale.levels), tokenizer)


def load_parts(name: str, folder: Path) -> Parts:
    """The parts in `folder`, or those shipped with the package; the ConvNeXt may be missing.

    Raises:
        FoveateError: neither has them.
    """
    name = scale_named(name).parts or name
    places = {part: _find(name, part, folder) for part in PARTS}
    tower_place, reader_place, convnet = places["tower"], places["reader"], places["convnet"]
    if tower_place is None or reader_place is None:
        raise FoveateError(
            f"{folder / 'parts' / name}: no tower and LLM of scale {name!r}; "
            f"run `foveate lab prepare --scale {name}`"
        )
    tower = CLIPVisionModel.from_pretrained(tower_place, dtype=torch.float32).eval()
    reader = LlamaForCausalLM.from_pretrained(reader_place, dtype=torch.float32)
    convnet_key = "" if convnet is None else _key(ConvNextModel.from_pretrained(convnet, dtype=torch.float32))
    return Parts(tower, reader, lab_tokenizer(), _key(tower), _key(reader), convnet_key, convnet)


def _find(name: str, part: str, folder: Path) -> Path | None:
    places = [folder / "parts" / name / part, ASSETS / name / part]
    return next((place for place in places if (place / NOTES).is_file()), None)


def _key(model: nn.Module) -> str:
    digest = blake2b(digest_size=4)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
