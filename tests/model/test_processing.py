"""What the processor hands to a model, depending on its method."""

from __future__ import annotations

import re

import pytest

from foveate import FoveateError
from foveate.tiny import tiny_model
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
