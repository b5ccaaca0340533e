"""trl's trainers on a tiny vision data set: they learn it, with every view and every question in place."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import foveate
from foveate import Foveate, FoveateError
from foveate.tiny import tiny_model

if sys.version_info < (3, 11):
    pytest.skip("trl needs Python 3.11", allow_module_level=True)
datasets, trl = import_module("datasets"), import_module("trl")

COLORS = ["red", "green", "blue", "white"]
PICTURES = [Image.new("RGB", (90 + 10 * i, 60), color) for i, color in enumerate(COLORS)]
ASKED = [{"role": "user", "content": "which color?"}]
METHODS = ["llava", "anyres", "slime", "inf_llava"]
OPTIONS: Mapping[str, dict[str, Any]] = {"slime": {"gamma": 0.5, "router_text": "question"}}


def told(word: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": word}]


def evenness(completions: list[Any], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """The share of tokens with an even id: about a half of what a new model writes."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


DATA: dict[str, dict[str, Any]] = {
    "conversations": {"messages": [ASKED + told(color) for color in COLORS]},
    "completions": {"prompt": [ASKED] * 4, "completion": [told(color) for color in COLORS]},
    "preferences": {
        "prompt": [ASKED] * 4,
        "chosen": [told(color) for color in COLORS],
        "rejected": [told("none")] * 4,
    },
    "prompts": {"prompt": [ASKED] * 4},
}


def trainer(kind: str, made: Foveate, folder: Path, steps: int, **given: Any) -> Any:
    data = DATA[{"assistant": "conversations"}.get(kind, kind)]
    given["train_dataset"] = datasets.Dataset.from_dict({"images": [[p] for p in PICTURES], **data})
    given["processing_class"] = made.processor
    common = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 4,
        "max_steps": steps,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    if kind == "preferences":
        return trl.DPOTrainer(made.model, args=trl.DPOConfig(**common), **given)
    if kind == "prompts":
        common |= {"per_device_train_batch_size": 8}
        config = trl.GRPOConfig(**common, num_generations=8, max_completion_length=6)
        return trl.GRPOTrainer(made.model, evenness, args=config, **given)
    config = trl.SFTConfig(**common, assistant_only_loss=kind == "assistant")
    return trl.SFTTrainer(made.model, config, **given)


@pytest.fixture
def loaded(tmp_path: Path) -> Callable[[str], Foveate]:
    """From a folder, as DPO reads its reference model again."""

    def of(method: str) -> Foveate:
        tiny = tiny_model(method, OPTIONS.get(method))
        tiny.model.save_pretrained(tmp_path / "model")
        tiny.processor.save_pretrained(tmp_path / "model")
        made = foveate.load(tmp_path / "model", dtype="float32")
        made.model.train()
        return made

    return of


@contextmanager
def questions(made: Foveate) -> Iterator[list[str]]:
    """What the connector reads, run after run; nothing for one that reads none."""
    read: list[str] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        query = args[2]
        if query is None:
            return
        table = made.model.get_input_embeddings().weight.detach()
        for embeds, mask in zip(query.embeds, query.mask.bool(), strict=True):
            ids = (embeds[mask][:, None] == table).all(-1).int().argmax(-1)
            read.append(made.processor.tokenizer.decode(ids))

    hook = made.model.connector.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield read
    finally:
        hook.remove()


def processed(made: Foveate) -> Any:
    picture = {"type": "image", "image": PICTURES[0]}
    asked = [{"role": "user", "content": [picture, {"type": "text", "text": ASKED[0]["content"]}]}]
    return made.processor.apply_chat_template(asked, tokenize=True, return_dict=True, return_tensors="pt")


def cases() -> list[Any]:
    """Every method with every trainer; all kinds of data with the method that reads the question."""
    quick = {("slime", kind) for kind in ("conversations", "assistant", "completions", "preferences")}
    quick |= {(method, "completions") for method in METHODS}
    kinds = ("conversations", "assistant", "completions", "preferences")
    every = [(method, kind) for method in METHODS for kind in kinds]
    return [pytest.param(*case, marks=() if case in quick else pytest.mark.slow) for case in every]


@pytest.mark.parametrize(("method", "kind"), cases())
def test_a_loss_falls(method: str, kind: str, loaded: Callable[[str], Foveate], tmp_path: Path) -> None:
    """With trl's own defaults, of which one is to cut texts at 1,024 tokens."""
    made = loaded(method)
    made.model.requires_grad_(False)
    made.model.connector.requires_grad_(True)
    made.model.language_model.requires_grad_(True)
    run = trainer(kind, made, tmp_path, steps=8)
    with questions(made) as read:
        run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == 8 and losses[-1] < 0.5 * losses[0]
    wanted = {"which color?"} if made.model.method.uses_query else set()
    assert set(read) == wanted  # not the answer, nor another part of the text


@pytest.mark.parametrize(
    "method", ["slime", *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS if m != "slime")]
)
def test_a_reward_rises(method: str, loaded: Callable[[str], Foveate], tmp_path: Path) -> None:
    """GRPO hands on what it knows alone: the question comes along with the tokens."""
    torch.manual_seed(0)
    made = loaded(method)
    run = trainer("prompts", made, tmp_path, steps=10)
    with questions(made) as read:
        run.train()
    assert set(read) == ({"which color?"} if made.model.method.uses_query else set())
    rewards = [entry["reward"] for entry in run.state.log_history if "reward" in entry]
    assert sum(rewards[-4:]) > sum(rewards[:4])


def test_grpo_without_the_original_pictures_is_one_sentence(
    loaded: Callable[[str], Foveate], tmp_path: Path
) -> None:
    run = trainer("prompts", loaded("coroi"), tmp_path, steps=1)
    with pytest.raises(FoveateError, match="CoRoI looks at the original pictures: give source_pixels"):
        run.train()


def test_an_adapter_of_trl(loaded: Callable[[str], Foveate], tmp_path: Path) -> None:
    """What it saves is loaded as any other adapter, and answers as what was trained."""
    from peft import LoraConfig

    made = loaded("llava")
    config = LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    run = trainer("completions", made, tmp_path, steps=4, peft_config=config)
    run.train()
    run.save_model(str(tmp_path / "lora"))
    again = foveate.load(tmp_path / "lora", dtype="float32")
    batch = processed(made)
    with torch.no_grad():
        expected = run.model.eval()(**batch).logits
        assert torch.allclose(again.model(**batch).logits, expected, atol=1e-4)
        with run.model.disable_adapter():
            assert not torch.allclose(run.model(**batch).logits, expected, atol=1e-4)
