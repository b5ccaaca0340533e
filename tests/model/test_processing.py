"""What the processor hands to a model, depending on its method."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from foveate import FoveateError, Zoom, load
from foveate.composing import compose
from foveate.data.dataset import encode
from foveate.tiny import tiny_model, tiny_text, tiny_tokenizer, tiny_vision
from foveate.zoom.vlm import VLM
from tests.methods.conftest import fresh
from tests.methods.test_invariants import prepare
from tests.support import chat, picture


def test_other_methods_get_no_original_pictures() -> None:
    inputs = tiny_model("llava").processor(images=picture(60, 80), text="<image>", return_tensors="pt")
    assert not {"source_pixels", "source_norms"} & inputs.keys()
    inputs = fresh("coroi", chain=False).processor(
        images=picture(60, 80), text="<image>", return_tensors="pt"
    )
    assert not {"source_pixels", "source_norms"} & inputs.keys()


def test_which_text_is_read() -> None:
    processor = fresh("coroi").processor
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    inputs = prepare(processor, [[system, *chat("What is it?", picture(60, 80))]])
    read = processor.decode(inputs["query_ids"][0][inputs["query_mask"][0].bool()])
    assert read == "What is it?"


@pytest.mark.parametrize("counts", [[2, 0], [0, 2], [2], [1, 1, 0]])
def test_lists_of_pictures_go_with_their_texts(counts: list[int]) -> None:
    """Dealt out flat, each text would get some picture, of whichever list."""
    processor = tiny_model("llava").processor
    texts = ["<image>\nWhat?", "<image>\nAnd here?"]
    lists = [[picture(20, 30)] * n for n in counts]
    with pytest.raises(
        FoveateError, match=re.escape(f"lists of {counts} pictures for texts that show [1, 1]")
    ):
        processor(images=lists, text=texts, padding=True, return_tensors="pt")
    right = processor(images=[lists[0][:1] or [picture(20, 30)]] * 2, text=texts, padding=True)
    flat = processor(images=[picture(20, 30)] * 2, text=texts, padding=True)
    assert right["input_ids"] == flat["input_ids"]


# What transparent pictures show


def clear_red(folder: Path) -> Path:
    """A picture that is red where it is drawn, and under all that is transparent."""
    image = Image.new("RGBA", (40, 40), (200, 0, 0, 0))
    image.putpixel((0, 0), (200, 0, 0, 255))
    image.save(folder / "clear.png")
    return folder / "clear.png"


COLOURS = {"white": (255, 255, 255), "bare": (200, 0, 0)}


@pytest.mark.parametrize("kind", COLOURS)
def test_every_door_shows_transparent_pictures_alike(kind: Any, tmp_path: Path) -> None:
    """And a saved folder keeps the choice."""
    file, plain = clear_red(tmp_path), tmp_path / "plain.png"
    shown = Image.new("RGB", (40, 40), COLOURS[kind])
    shown.putpixel((0, 0), (200, 0, 0))
    shown.save(plain)
    tiny_model("llava").save(tmp_path / "model")
    made = load(tmp_path / "model", device="cpu", transparency=kind)
    made.save(tmp_path / "kept")
    kept = load(tmp_path / "kept", device="cpu")
    vlm = VLM.load(tmp_path / "kept", "cpu")
    composed = compose(tiny_vision(), tiny_text(), tokenizer=tiny_tokenizer(), transparency=kind).processor
    said = [{"role": "user", "content": [{"type": "image", "image": str(file)}]}]
    answered = [*said, {"role": "assistant", "content": "No"}]
    for one in (made, kept):
        images, processor = one.processor.image_processor, one.processor
        assert images.read(file).tobytes() == images.read(plain).tobytes() == shown.tobytes()
        expected = images(plain)["pixel_values"]
        tokens = processor.apply_chat_template(said, tokenize=True, return_dict=True, return_tensors="pt")
        for views in (
            images(file)["pixel_values"],
            processor(images=[str(file)], text="<image>")["pixel_values"],
            tokens["pixel_values"],
            encode(processor, answered)["pixel_values"],
        ):
            assert torch.equal(torch.as_tensor(views), torch.as_tensor(expected))
        assert one.chat(file).picture.tobytes() == shown.tobytes()
        assert one.ask(file, "What?", max_new_tokens=2).picture.tobytes() == shown.tobytes()
    assert Zoom(vlm.model, vlm.processor).vlm.transparency == vlm.transparency == kind
    assert composed.image_processor.transparency == kind
    assert AutoProcessor.from_pretrained(tmp_path / "kept").image_processor.transparency == kind


def test_other_words_for_transparency_are_refused(tmp_path: Path) -> None:
    tiny_model("llava").save(tmp_path)
    with pytest.raises(FoveateError, match="transparency should be white or bare, not 'black'"):
        load(tmp_path, device="cpu", transparency="black")  # type: ignore[arg-type]
