"""The tower, the LLM and the tokenizer that every method of the lab starts from, and how they are made."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionModel, LlamaForCausalLM, PreTrainedTokenizerFast

from foveate.errors import FoveateError
from foveate.lab.reader import comprehension, train_reader
from foveate.lab.scales import Scale
from foveate.lab.tower import legibility, tower_scenes, train_tower
from foveate.lab.words import lab_tokenizer

ASSETS = Path(__file__).parent / "assets"
Report = Callable[[str, int, int, float], None]  # what, step, steps, loss


@dataclass(frozen=True)
class Parts:
    """What `prepare` makes.

    Attributes:
        tower: frozen, the stand-in for CLIP.
        reader: the LLM, the stand-in for Vicuna.
        tokenizer: of the LLM.
        tower_key, reader_key: name their weights.
    """

    tower: CLIPVisionModel
    reader: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    tower_key: str
    reader_key: str


def prepare(name: str, scale: Scale, folder: Path, seed: int = 0, report: Report | None = None) -> Path:
    """Pre-trains what is missing of a scale's tower and LLM, and writes them.

    Returns the folder of the parts: `tower` and `reader` in transformers' own layout, and `prepared.json`
    with what they can do and how long they took.
    """
    place = folder / "parts" / name
    notes_file = place / "prepared.json"
    notes: dict[str, Any] = json.loads(notes_file.read_text(encoding="utf-8")) if notes_file.is_file() else {}

    def tell(what: str, steps: int) -> Callable[[int, float], None]:
        return lambda step, loss: report(what, step, steps, loss) if report else None

    if "tower" not in notes:
        start = time.process_time()
        tower, head = train_tower(scale, seed, report=tell("tower", scale.tower.steps))
        seconds = time.process_time() - start
        table = legibility(tower, head, scale, tower_scenes(scale, "test", 800))
        tower.to(torch.bfloat16).save_pretrained(place / "tower")
        notes["tower"] = {"seconds": round(seconds), "accuracy_by_zoom": table}
        _write_notes(notes_file, notes)
    if "reader" not in notes:
        start = time.process_time()
        tokenizer = lab_tokenizer()
        reader = train_reader(scale, tokenizer, seed, report=tell("reader", scale.reader.steps))
        seconds = time.process_time() - start
        notes["reader"] = {
            "seconds": round(seconds),
            "accuracy": comprehension(reader, tokenizer, scale.levels),
        }
        reader.to(torch.bfloat16).save_pretrained(place / "reader")
        tokenizer.save_pretrained(place / "reader")
        _write_notes(notes_file, notes)
    return place


def load_parts(name: str, folder: Path) -> Parts:
    """The parts in `folder`, or those that come with the package.

    Raises:
        FoveateError: neither has them.
    """
    places = [folder / "parts" / name, ASSETS / name]
    place = next((p for p in places if (p / "prepared.json").is_file()), None)
    if place is None:
        raise FoveateError(
            f"{places[0]}: no tower and LLM of scale {name!r}; run `foveate lab prepare --scale {name}`"
        )
    tower = CLIPVisionModel.from_pretrained(place / "tower", dtype=torch.float32).eval()
    reader = LlamaForCausalLM.from_pretrained(place / "reader", dtype=torch.float32)
    return Parts(tower, reader, lab_tokenizer(), _key(tower), _key(reader))


def _key(model: nn.Module) -> str:
    digest = blake2b(digest_size=4)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def _write_notes(path: Path, notes: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(notes, indent=2) + "\n", encoding="utf-8")
