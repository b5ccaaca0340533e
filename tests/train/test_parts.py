"""What trains: patterns, gradients, learning rates, adapters."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foveate import FoveateError, load
from foveate.composing import compose
from foveate.data.dataset import Collator, Samples
from foveate.data.formats import read_conversations
from foveate.data.toy import write_toy_data
from foveate.tiny import tiny_model, tiny_text, tiny_tokenizer, tiny_vision
from foveate.train.parts import add_adapters, learning_rate, matches, merge_adapters, parts, select
from foveate.train.recipe import DataFile, Lora, Stage


def make(trains: list[str], **more: Any) -> Stage:
    return Stage(trains=trains, data=[DataFile("x.json")], lr=1e-3, **more)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_data(tmp_path_factory.mktemp("toy"), 6)


def batch(toy: Path, processor: Any) -> dict[str, torch.Tensor]:
    source = read_conversations(toy)
    samples = Samples([source], np.array([[0, i] for i in range(6)]), processor)
    return Collator(processor.tokenizer.pad_token_id)([samples[i] for i in range(6)])


STAGES = {
    "connector": (make(["connector"]), ["connector."]),
    "projector": (make(["connector.projector"]), ["connector.projector."]),
    "llm": (make(["connector", "language_model"]), ["connector.", "language_model."]),
    "head": (make(["language_model.lm_head"]), ["language_model.lm_head."]),
    "all": (
        make(["connector", "language_model", "vision_tower"]),
        ["connector.", "language_model.", "vision_tower."],
    ),
    "layers": (
        make(["language_model.model.layers.*.mlp"]),
        [f"language_model.model.layers.{i}.mlp." for i in range(4)],
    ),
    "tower": (
        make(["vision_tower"], freezes=["vision_tower.model.embeddings"]),
        ["vision_tower.model.encoder.", "vision_tower.model.pre_layrnorm."],
    ),
}


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("method", ["llava", "anyres"])
def test_gradients_reach_what_trains_and_nothing_else(toy: Path, method: str, name: str) -> None:
    stage, prefixes = STAGES[name]
    foveate = tiny_model(method)
    select(foveate.model, stage, "stage")
    foveate.model.train()(**batch(toy, foveate.processor)).loss.backward()
    names = {key for key, _ in foveate.model.named_parameters()}
    reached = {key for key, p in foveate.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {key for key in names if key.startswith(tuple(prefixes))}
    assert reached


def test_patterns() -> None:
    assert matches("connector.projector.0.weight", "connector")
    assert matches("connector.projector.0.weight", "connector.projector")
    assert matches("connector.projector.0.weight", "connector.*.weight")
    assert not matches("connector.projector.0.weight", "connector.proj")
    assert not matches("connector.projector.0.weight", "projector")


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (make(["conector"]), "s: trains: 'conector' matches no module; did you mean connector?"),
        (make(["connector.projection"]), "did you mean connector.projector"),
        (make(["zzz"]), "did you mean vision_tower or connector or language_model?"),
        (make(["connector"], freezes=["lm_head"]), "s: freezes: 'lm_head' matches no module"),
        (make(["connector"], lrs={"vision": 1.0}), "s: lrs: 'vision' matches no module"),
        (make(["connector"], freezes=["connector"]), "s: 'freezes' leaves nothing of 'trains' to train"),
        (
            make(["connector"], lrs={"vision_tower": 1.0}),
            "lrs gives vision_tower a learning rate, but it does not",
        ),
        (make(["connector"], lora=Lora(on=["language"])), "s: lora.on: 'language' matches no module"),
        (
            make(["language_model"], lora=Lora(on=["language_model.lm_head"])),
            "language_model.lm_head is in trains and in lora.on",
        ),
    ],
)
def test_a_stage_that_does_not_fit_is_refused(stage: Stage, message: str) -> None:
    model = tiny_model().model
    with pytest.raises(FoveateError, match=message.replace("?", r"\?")):
        if stage.lora is not None:
            add_adapters(model, stage, "s")
        select(model, stage, "s")


def test_learning_rates() -> None:
    stage = make(
        ["connector", "language_model", "vision_tower"],
        lrs={"vision_tower": 1e-4, "vision_tower.model.embeddings": 1e-5},
    )
    assert learning_rate("connector.projector.0.weight", stage) == 1e-3
    assert learning_rate("vision_tower.model.encoder.layers.0.mlp.fc1.weight", stage) == 1e-4
    assert learning_rate("vision_tower.model.embeddings.class_embedding", stage) == 1e-5
    model = tiny_model().model
    select(model, stage, "s")
    rows = {part.name: part for part in parts(model, stage)}
    assert rows["vision_tower"].lrs == (1e-5, 1e-4)
    assert sum(part.parameters for part in rows.values()) == sum(p.numel() for p in model.parameters())
    assert all(part.parameters == part.trainable for part in rows.values())


def test_adapters_train_alone_and_merge_exactly(toy: Path) -> None:
    foveate = tiny_model("anyres")
    inputs = batch(toy, foveate.processor)
    stage = make(["connector"], lora=Lora(on=["language_model.model.layers"], rank=4, alpha=8.0, dropout=0.0))
    before = {name: p.clone() for name, p in foveate.model.named_parameters()}
    add_adapters(foveate.model, stage, "s")
    select(foveate.model, stage, "s")
    trainable = {name for name, p in foveate.model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trainable} == {"connector", "language_model"}
    assert all("lora_" in name or name.startswith("connector.") for name in trainable)
    optimizer = torch.optim.SGD([p for p in foveate.model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        foveate.model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        adapted = foveate.model(**inputs).logits
        merge_adapters(foveate.model)
        merged = foveate.model(**inputs).logits
    after = dict(foveate.model.named_parameters())
    assert after.keys() == before.keys()
    assert (adapted - merged).abs().max() < 1e-4
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    layers = {
        name
        for name in before
        if ".layers." in name and name.startswith("language_model.") and "norm" not in name
    }
    assert changed == layers | {name for name in before if name.startswith("connector.")}


def tied() -> Any:
    """A model whose LLM's head is its embedding."""
    text = tiny_text(tie_word_embeddings=True)
    return compose(tiny_vision(), text, tokenizer=tiny_tokenizer())


HEAD, TABLE = "language_model.lm_head", "language_model.model.embed_tokens"


@pytest.mark.parametrize("meta", [False, True], ids=["weights", "skeleton"])
@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (make([HEAD]), f"s: trains: '{HEAD}' shares its weights with {TABLE}: name that, for both"),
        (make(["*.lm_head"]), f"s: trains: '[*].lm_head' shares its weights with {TABLE}"),
        (make(["language_model"], freezes=[HEAD]), f"s: freezes: '{HEAD}' shares its weights with {TABLE}"),
        (make(["language_model"], lrs={HEAD: 1.0}), f"s: lrs: '{HEAD}' shares its weights with {TABLE}"),
        (
            make([], lora=Lora(on=[HEAD])),
            f"s: lora.on: {HEAD} shares its weights with the embedding, so that an adapter on it cannot",
        ),
        (make([], lora=Lora(on=["connector", HEAD])), f"s: lora.on: {HEAD} shares its weights"),
    ],
)
def test_a_tied_head_is_named(stage: Stage, message: str, meta: bool) -> None:
    with torch.device("meta") if meta else nullcontext():
        model = tied().model
    with pytest.raises(FoveateError, match=message):
        if stage.lora is not None:
            add_adapters(model, stage, "s")
        select(model, stage, "s")


def test_adapters_on_an_llm_leave_out_its_tied_head(toy: Path, tmp_path: Path) -> None:
    foveate = tied()
    inputs = batch(toy, foveate.processor)
    stage = make([], lora=Lora(on=["language_model"], rank=4, alpha=8.0, dropout=0.0))
    before = foveate.model.get_input_embeddings().weight.clone()
    add_adapters(foveate.model, stage, "s")
    select(foveate.model, stage, "s")
    assert not any("lora_" in name for name, _ in foveate.model.language_model.lm_head.named_parameters())
    with torch.no_grad():
        for name, p in foveate.model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
        adapted = foveate.model(**inputs).logits
        merge_adapters(foveate.model)
        assert (foveate.model(**inputs).logits - adapted).abs().max() < 1e-4
    assert torch.equal(foveate.model.get_input_embeddings().weight, before)
    foveate.save(tmp_path / "model")
    loaded = load(tmp_path / "model", device="cpu", dtype="float32").model
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    with torch.no_grad():
        assert (loaded(**inputs).logits - adapted).abs().max() < 1e-4
