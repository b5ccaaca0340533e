"""The card of a model: valid metadata, what is known, commands that work; somebody's own is kept."""

from __future__ import annotations

import hashlib
import io
import json
import runpy
import shlex
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import foveate
from foveate import FoveateConfig, FoveateError
from foveate.composing import compose
from foveate.data.toy import write_toy_data
from foveate.methods import METHODS, method_class
from foveate.model.card import CARD, unchanged
from foveate.tiny import tiny_model
from foveate.train.run import train
from tests.command import foveate as run_foveate
from tests.docs.blocks import commands, parse
from tests.docs.stand_ins import clip_tower, hf_llava, language_model
from tests.model.test_folders import commit
from tests.support import picture
from tests.train.support import stage, write_recipe


@pytest.mark.parametrize("method", METHODS)
def test_a_card_says_what_is_known(method: str, tmp_path: Path) -> None:
    made = tiny_model(method)
    made.save(tmp_path / "model")
    text = (tmp_path / "model" / CARD).read_text()
    data = ModelCard(text).data.to_dict()
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["foveate", method, "custom_code"],
    }
    kind = method_class(method)
    assert kind.title in text and kind.paper in text
    for option, value in made.model.method.describe_options().items():
        assert f"| `{option}` | `{json.dumps(value)}` |" in text
    for part in ("vision_tower", "connector", "language_model"):
        count = sum(p.numel() for p in made.model.get_submodule(part).parameters())
        assert f"| `{part}` | {count:,} |" in text
    plan = made.processor.image_processor.plan(3000, 4000)
    if method != "chain_of_spot":  # which looks twice
        assert f"| 4000 x 3000 | {len(plan.views)} | {plan.tokens} |" in text
    assert str(tmp_path) not in text


def test_its_commands_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    tiny_model("llava").save(folder)
    picture(40, 60).save(folder / "picture.jpg")
    monkeypatch.chdir(folder)
    blocks = list(parse((folder / CARD).read_text(), CARD))
    assert [block.language for block in blocks] == ["bash", "python", "python"]
    (command, _), *_ = commands(blocks[0])
    assert run_foveate(*shlex.split(command)[1:]).code == 0
    for i, block in enumerate(blocks[1:]):
        (tmp_path / f"{i}.py").write_text(block.text)
        with redirect_stdout(io.StringIO()):
            runpy.run_path(str(tmp_path / f"{i}.py"))


def test_where_it_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hub ids are named, folders of this machine are not."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, write in {"me/llava": hf_llava, "me/tower": clip_tower, "me/text": language_model}.items():
        commit(cache, name, "main", write)
    foveate.load("me/llava", device="cpu").save(tmp_path / "loaded")
    compose("me/tower", "me/text", "llava").save(tmp_path / "composed")
    clip_tower(tmp_path / "tower")
    compose(tmp_path / "tower", "me/text", "llava").save(tmp_path / "half")
    foveate.load(tmp_path / "composed", device="cpu").save(tmp_path / "again")
    expected = {
        "loaded": "me/llava",
        "composed": ["me/text", "me/tower"],
        "half": ["me/text"],
        "again": ["me/text", "me/tower"],
    }
    for name, base in expected.items():
        text = (tmp_path / name / CARD).read_text()
        assert ModelCard(text).data.to_dict()["base_model"] in (base, [base]), name
        assert (
            str(tmp_path) not in text and str(tmp_path) not in (tmp_path / name / "config.json").read_text()
        )


def test_what_trained_it(tmp_path: Path) -> None:
    data = write_toy_data(tmp_path / "toy", 8)
    stages = {name: stage(["connector"], data, steps=1) for name in ("first", "second")}
    run = train(write_recipe(tmp_path, stages))
    recipe = hashlib.sha256((run / "recipe.yaml").read_bytes()).hexdigest()
    digest = json.loads((run / "stages" / "first" / "data.json").read_text())[str(data)]
    foveate.load(run / "model", device="cpu").save(tmp_path / "again")
    for folder in (run / "model", tmp_path / "again"):
        config = FoveateConfig.from_pretrained(folder)
        assert config.trained == [
            {"stage": name, "recipe": recipe, "data": {data.name: digest}} for name in stages
        ]
        text = (folder / CARD).read_text()
        for name in stages:
            assert f"| {name} | `{recipe[:16]}` | {data.name} `{digest[:16]}` |" in text
        assert str(tmp_path) not in text


@pytest.mark.parametrize("change", ["written anew", "one word", "added to"])
def test_somebody_s_own_card_is_kept(change: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model("llava").save(folder)
    text = (folder / CARD).read_text()
    mine = {
        "written anew": "# Mine\n",
        "one word": text.replace("Not filled in yet", "Apache-2.0"),
        "added to": text + "\nMore.\n",
    }[change]
    (folder / CARD).write_text(mine)
    made = tiny_model("anyres")
    made.save(folder)
    assert (folder / CARD).read_text() == mine
    assert FoveateConfig.from_pretrained(folder).method == "anyres"
    made.model.save_pretrained(folder)
    assert (folder / CARD).read_text() == mine


def test_a_card_that_nobody_changed_is_written_anew(tmp_path: Path) -> None:
    tiny_model("llava").save(tmp_path / "model")
    tiny_model("anyres").save(tmp_path / "model")
    text = (tmp_path / "model" / CARD).read_text()
    assert "AnyRes" in text and "LLaVA-1.5" not in text and unchanged(text)


@pytest.mark.parametrize(
    ("key", "value"),
    [("made_from", "me/mine"), ("made_from", {"model": 1}), ("trained", {}), ("trained", [{"stage": "a"}])],
)
def test_a_config_with_another_story_is_refused(key: str, value: object) -> None:
    with pytest.raises(FoveateError, match=f"{key} should"):
        FoveateConfig(**{key: value})
