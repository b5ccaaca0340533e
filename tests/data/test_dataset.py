"""Conversations as model inputs: what is learnt, their lengths, padding and order."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from foveate import FoveateError
from foveate.data.dataset import IGNORED, Collator, Samples, encode
from foveate.data.formats import read_conversations
from foveate.data.sampling import EpochSampler, repeated
from foveate.data.toy import COLOURS, write_toy_data
from foveate.model.text import TEMPLATES
from foveate.tiny import tiny_model
from tests.methods.conftest import fresh
from tests.methods.test_invariants import chats
from tests.support import picture

TEXT = {"type": "text", "text": "What is it?"}
END = {
    "plain": "\n",
    "bare": "</s>",
    "vicuna_v1": "</s>",
    "llama3": "<|eot_id|>",
    "llama3_v1": "<|eot_id|>",
    "mistral": "</s>",
    "chatml": "<|im_end|>",
}


def samples(path: Path, method: str = "llava", template: str = "chatml") -> Samples:
    source = read_conversations(path)
    records = np.stack([np.zeros(len(source), dtype=np.int64), np.arange(len(source))], axis=1)
    return Samples([source], records, tiny_model(method, template=template).processor)


@pytest.fixture
def talk(tmp_path: Path) -> Path:
    """Two turns about two pictures, a text, and one turn about a picture."""
    for i, size in enumerate([(30, 80), (90, 40), (60, 60)]):
        picture(*size).save(tmp_path / f"{i}.png")
    user, gpt = "human", "gpt"
    conversations = [
        (
            [
                (user, "<image>\nWhat?"),
                (gpt, "A dog."),
                (user, "And <image>\nor <image>\n?"),
                (gpt, "Two é."),
            ],
            3,
        ),
        ([(user, "Hello"), (gpt, "Hi")], 0),
        ([(user, "<image>\nWhat?"), (gpt, "Noise.")], 1),
    ]
    records = [
        {
            "image": [f"{i}.png" for i in range(pictures)],
            "conversations": [{"from": side, "value": value} for side, value in turns],
        }
        for turns, pictures in conversations
    ]
    path = tmp_path / "talk.json"
    path.write_text(json.dumps(records))
    return path


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("method", ["llava", "anyres", "slime"])
def test_only_answers_are_learnt(talk: Path, method: str, template: str) -> None:
    data, end = samples(talk, method, template), END[template]
    start = " " if template in ("vicuna_v1", "mistral") else ""  # where the prompt ends in "ASSISTANT:"
    tokenizer = data.processor.tokenizer
    answers = [["A dog.", "Two é."], ["Hi"], ["Noise."]]
    for i, expected in enumerate("".join(f"{start}{a}{end}" for a in spoken) for spoken in answers):
        item = data[i]
        learnt = item["labels"] != IGNORED
        assert tokenizer.decode(item["labels"][learnt]) == expected
        assert torch.equal(item["labels"][learnt], item["input_ids"][learnt])
        assert len(item["input_ids"]) == data.measure(i)[0]
    stop = data.processor.answer_end()
    assert stop == (None if template == "plain" else tokenizer.convert_tokens_to_ids(end))


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_turn_without_loss_is_shown_and_not_learnt(talk: Path, template: str) -> None:
    records = json.loads(talk.read_text())
    records[0]["conversations"][1]["loss"] = False
    records[0]["system"] = "Be brief."
    talk.write_text(json.dumps(records))
    data, start = samples(talk, template=template), " " if template in ("vicuna_v1", "mistral") else ""
    item, tokenizer = data[0], data.processor.tokenizer
    assert tokenizer.decode(item["labels"][item["labels"] != IGNORED]) == f"{start}Two é.{END[template]}"
    shown = tokenizer.decode(item["input_ids"])
    assert "A dog." in shown and shown.index("Be brief.") < shown.index("What?")


def test_half_of_a_character_is_refused(talk: Path) -> None:
    records = json.loads(talk.read_text())
    records[1]["conversations"][0]["value"] = "So \ud83d"
    talk.write_text(json.dumps(records))
    with pytest.raises(
        FoveateError, match=r"sample 1: a text of the user has half of a character, '.ud83d' at"
    ):
        samples(talk).measure(1)


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_answer_is_learnt_from_its_first_token(template: str) -> None:
    """What is asked for is what was learnt: the prompt, then the first token that the loss is taken on."""
    processor = tiny_model(template=template).processor
    question = [{"role": "user", "content": [{"type": "image", "image": picture(40, 50)}, TEXT]}]
    prompt = processor.apply_chat_template(
        [question], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    learnt = encode(processor, [*question, {"role": "assistant", "content": "A dog."}])
    first = int((learnt["labels"] != IGNORED).int().argmax())
    assert prompt["input_ids"][0] == learnt["input_ids"][:first].tolist()


@pytest.mark.parametrize("method", ["llava", "anyres"])
def test_a_batch_is_its_samples(talk: Path, method: str) -> None:
    """The loss of a padded batch is the mean over the tokens of its samples' losses."""
    data, model = samples(talk, method), tiny_model(method).model
    items = [data[i] for i in range(3)]
    batch = Collator(data.processor.tokenizer.pad_token_id)(items)
    longest = max(len(item["input_ids"]) for item in items)
    assert batch["input_ids"].shape == batch["labels"].shape == (3, longest)
    assert batch["image_sizes"].tolist() == [[30, 80], [90, 40], [60, 60], [30, 80]]
    short = len(items[1]["input_ids"])
    assert batch["attention_mask"][1].tolist() == [1] * short + [0] * (longest - short)
    assert (batch["labels"][1, short:] == IGNORED).all()
    with torch.no_grad():
        whole = model(**batch).loss
        single = [model(**Collator(3)([item])).loss for item in items]
    counts = [int((item["labels"] != IGNORED).sum()) for item in items]
    expected = sum(loss * n for loss, n in zip(single, counts, strict=True)) / sum(counts)
    assert abs(float(whole - expected)) < 1e-5


def test_a_batch_of_texts_has_no_pictures(talk: Path) -> None:
    data = samples(talk)
    assert set(Collator(3)([data[1], data[1]])) == {"input_ids", "attention_mask", "labels"}


def test_questions_are_padded_as_when_asking() -> None:
    text = {
        "input_ids": torch.ones(2, dtype=torch.long),
        "attention_mask": torch.ones(2),
        "labels": torch.ones(2),
    }
    views = {"pixel_values": torch.zeros(1, 3, 4, 4), "image_sizes": torch.tensor([[4, 4]])}
    asked = [
        {**text, **views, "query_ids": torch.tensor([ids]), "query_mask": torch.ones(1, len(ids))}
        for ids in ([7, 8, 9], [5])
    ]
    batch = Collator(3)([asked[0], text, asked[1]])
    assert batch["query_ids"].tolist() == [[7, 8, 9], [3, 3, 5]]
    assert batch["query_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_a_missing_or_broken_picture_is_named(talk: Path) -> None:
    data = samples(talk)
    whole = io.BytesIO()
    picture(30, 80).save(whole, "JPEG")
    (talk.parent / "0.png").write_bytes(whole.getvalue()[:-200])
    assert data.measure(2)[0] > 16  # the size is still readable
    with pytest.raises(FoveateError, match=r"talk.json sample 2: .*0.png cannot be read as a picture"):
        data[2]
    (talk.parent / "0.png").unlink()
    with pytest.raises(FoveateError, match=r"talk.json sample 2: no picture at .*0.png"):
        data.measure(2)[0]


LENGTHS = np.random.default_rng(0).integers(5, 50, 103)
PICTURES = (np.arange(103) % 3 > 0).astype(int)


@pytest.mark.parametrize("group_by", ["modality", "none"])
def test_an_epoch_sees_every_sample_once(group_by: str) -> None:
    sampler = EpochSampler(LENGTHS, PICTURES, 8, group_by, seed=1)  # type: ignore[arg-type]
    first = list(sampler)
    assert sorted(first) == list(range(103))
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(second) == list(range(103)) and second != first
    other = EpochSampler(LENGTHS, PICTURES, 8, group_by, seed=2)  # type: ignore[arg-type]
    assert list(other) != first


def test_steps_are_alike() -> None:
    order = np.array(list(EpochSampler(LENGTHS, PICTURES, 8, "modality", seed=1)))
    full = (PICTURES == 1).sum() // 8 + (PICTURES == 0).sum() // 8
    for step in order[: full * 8].reshape(-1, 8):
        assert len(set(PICTURES[step])) == 1
        assert (np.diff(LENGTHS[step]) <= 0).all()
    kinds = [PICTURES[step[0]] for step in order[: full * 8].reshape(-1, 8)]
    assert kinds != sorted(kinds) and kinds != sorted(kinds, reverse=True)


def test_repeats() -> None:
    rng = np.random.default_rng(0)
    assert repeated(4, 1.0, rng).tolist() == [0, 1, 2, 3]
    assert np.bincount(repeated(4, 2.5, rng)).tolist().count(3) == 2
    half = repeated(100, 0.5, rng)
    assert len(half) == len(set(half.tolist())) == 50


def test_toy_data_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    first, second = (write_toy_data(tmp_path / name, n=12) for name in "ab")
    other = write_toy_data(tmp_path / "c", n=12, seed=1)
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()
    for path in (tmp_path / "a" / "pictures").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / "pictures" / path.name).read_bytes()
    read = read_conversations(first)
    assert read.pictures.tolist() == [1, 1, 1, 1, 1, 0] * 2
    answers = {read.messages(i)[1]["content"][0]["text"] for i in range(5)}
    assert answers <= set(COLOURS)


def test_text_and_pictures_in_one_training_batch() -> None:
    m = fresh("coroi")
    conversations = [
        [*one, {"role": "assistant", "content": [{"type": "text", "text": "It is."}]}] for one in chats()
    ]
    items = [encode(m.processor, conversation) for conversation in conversations]
    assert "source_pixels" not in items[-1]
    batch = Collator(m.processor.tokenizer.pad_token_id)(items)
    assert len(batch["source_pixels"]) == 3 * int(batch["image_sizes"].prod(1).sum())
    assert batch["source_norms"].shape == (6, 2, 3)
    assert torch.isfinite(m.model.train()(**batch).loss)
    text_only = Collator(m.processor.tokenizer.pad_token_id)(items[-1:])
    assert "source_pixels" not in text_only
