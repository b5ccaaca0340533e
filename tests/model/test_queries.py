"""Questions that travel along with the visual tokens of a text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoProcessor

from foveate import FoveateError
from foveate.model.queries import carried, padded_queries, read_carried
from tests.methods.conftest import fresh
from tests.methods.test_invariants import prepare
from tests.support import chat, picture


def test_they_come_back() -> None:
    rows, counts = [[5, 0, 7], [], [9]], [4, 2, 1]
    visual = [[False, True, True, True, True, False, True, True], [False] * 3, [False, True]]
    marks = carried(rows, counts, visual)
    assert marks == [[0, 7, 2, 9, 1, 0, 1, 1], [0, 0, 0], [0, 11]]
    padded = torch.zeros(3, 12, dtype=torch.long)  # on either side, and gone on with
    for i, row in enumerate(marks):
        padded[i, i + 1 : i + 1 + len(row)] = torch.tensor(row)
    ids, mask = read_carried(padded, counts)
    expected = padded_queries(rows, 0)
    assert torch.equal(ids, expected[0]) and torch.equal(mask, expected[1])
    with pytest.raises(FoveateError, match="mm_token_type_ids mark 7 of 8 visual tokens"):
        read_carried(padded, [5, 2, 1])
    assert carried([[1, 2, 3]], [2], [[True, True]]) is None


@torch.no_grad()
def test_a_model_reads_them() -> None:
    """As if they came by themselves, in a batch, in every text that its trainer made of it."""
    made = fresh("slime", gamma=0.3, router_text="question")
    two = [chat("Why is it so?", picture(60, 90), picture(90, 50)), chat("What?", picture(70, 70))]
    batch = prepare(made.processor, two)
    assert batch["mm_token_type_ids"].shape == batch["input_ids"].shape
    expected = made.model(**batch).logits
    carried = {name: value for name, value in batch.items() if not name.startswith("query")}
    assert torch.equal(made.model(**carried).logits, expected)
    marks = batch["mm_token_type_ids"]
    other = made.model(**{**carried, "mm_token_type_ids": torch.where(marks > 1, 2, marks)}).logits
    assert not torch.equal(other, expected)


@pytest.mark.parametrize("method", ["llava", "anyres", "inf_llava"])
def test_an_image_processor_counts_views(method: str, tmp_path: Any) -> None:
    """`num_patches`, and a call with an argument of those that cut tiles on demand."""
    made = fresh(method)
    pictures = [picture(60, 90), picture(20, 300)]
    made.processor.save_pretrained(tmp_path)
    images = AutoProcessor.from_pretrained(tmp_path).image_processor
    encoded = images(pictures, crop_to_patches=True, return_tensors="pt")
    counts = [len(images.plan(p.height, p.width).views) for p in pictures]
    assert encoded["num_patches"].tolist() == counts and len(encoded["pixel_values"]) == sum(counts)
    assert "num_patches" not in made.processor(images=pictures, text="<image><image>")
