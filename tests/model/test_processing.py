"""What the processor hands to a model, depending on its method."""

from __future__ import annotations

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
