"""Packed questions have the logits of conversations of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from foveate.composing import compose
from foveate.lab.levels import LEVELS
from foveate.lab.packing import IGNORED, Sample, all_right, encode, pack
from foveate.lab.questions import ask_about
from foveate.lab.scales import SCALES
from foveate.lab.scenes import make_scene
from foveate.lab.words import lab_tokenizer
from tests.support import gap


@pytest.fixture(scope="module")
def model() -> object:
    torch.manual_seed(0)
    tokenizer, scale = lab_tokenizer(), SCALES["tiny"]
    text = scale.text_config(len(tokenizer))
    text.initializer_range = 0.2
    return compose(scale.vision_config(), text, tokenizer=tokenizer, template="plain")


def asked(count: int) -> list[list[Sample]]:
    tokenizer, level = lab_tokenizer(), LEVELS["words"]
    scenes = [make_scene(level, 48, 1.0, "train", 0, i) for i in range(count)]
    return [
        [encode(q, tokenizer) for q in ask_about(scene, level.questions, np.random.default_rng(0))]
        for scene in scenes
    ]


@torch.no_grad()
def test_packed_logits_are_those_of_single_questions(model: object) -> None:
    network = model.model  # type: ignore[attr-defined]
    placeholder, padding = network.config.image_token_id, 3
    rows = asked(3)
    sizes, pixels = torch.tensor([[144, 144]] * 3), torch.randn(3, 3, 48, 48)
    pictures = network.get_image_features(pixels, sizes)
    packed = pack(rows, 36, placeholder, padding)
    together = network(**packed.inputs(), mm_encoder_outputs={"image": pictures}, use_cache=False).logits
    assert len({len(row) for row in rows}) > 1 or len({len(s.ids) for row in rows for s in row}) > 1
    for b, row in enumerate(rows):
        for number, sample in enumerate(row, 1):
            ids = torch.tensor([[placeholder] * 36 + sample.ids])
            alone = network(input_ids=ids, pixel_values=pixels[b : b + 1], image_sizes=sizes[:1]).logits
            assert gap(together[b][packed.blocks[b] == number], alone[0, 36:]) < 2e-4
    swapped = pack([row[::-1] for row in rows], 36, placeholder, padding)
    other = network(**swapped.inputs(), mm_encoder_outputs={"image": pictures}, use_cache=False).logits
    assert gap(together[0][packed.blocks[0] == 1], other[0][swapped.blocks[0] == len(rows[0])]) < 2e-4


@torch.no_grad()
def test_a_question_that_sees_another_has_other_logits(model: object) -> None:
    """The mask is what keeps questions apart: without it the logits differ."""
    network = model.model  # type: ignore[attr-defined]
    packed = pack(asked(1), 0, 0, 3)
    causal = torch.ones_like(packed.attention_mask).tril()
    kept = network(**packed.inputs(), use_cache=False).logits
    leaked = network(**{**packed.inputs(), "attention_mask": causal}, use_cache=False).logits
    second = packed.blocks[0] == 2
    assert gap(kept[0][second], leaked[0][second]) > 1e-2


def test_labels_are_the_answers_and_their_ends() -> None:
    tokenizer, rows = lab_tokenizer(), asked(2)
    packed = pack(rows, 5, 4, 3)
    for b, row in enumerate(rows):
        expected = [token for sample in row for token in sample.ids[sample.answer :]]
        labels = packed.labels[b]
        assert labels[labels != IGNORED].tolist() == expected
        assert expected.count(tokenizer.eos_token_id) == len(row)
        assert packed.position_ids[b, 5] == 5 and packed.position_ids[b, 5 + len(row[0].ids)] == 5


def test_given_positions_are_kept() -> None:
    places = torch.tensor([[3, 10, 400]])
    packed = pack(asked(1), 3, 0, 3, places)
    assert packed.position_ids[0, :4].tolist() == [3, 10, 400, 401]


def test_an_answer_is_right_only_as_a_whole() -> None:
    row = [Sample([7, 8, 20, 21, 2], 2), Sample([7, 22, 2], 1)]
    packed = pack([row, row[:1]], 0, 0, 3)
    logits = torch.zeros(2, packed.input_ids.shape[1], 30)
    logits[:, :-1].scatter_(2, packed.input_ids[:, 1:, None], 5.0)
    assert all_right(logits, packed) == [[True, True], [True]]
    logits[0, 2] = torch.nn.functional.one_hot(torch.tensor(9), 30) * 9.0  # second token of the first answer
    logits[1, 0] = (
        torch.nn.functional.one_hot(torch.tensor(9), 30) * 9.0
    )  # a token of the question: no matter
    assert all_right(logits, packed) == [[False, True], [True]]
