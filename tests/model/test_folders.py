"""Where a model comes from: revisions and subfolders of the hub's cache, LoRA adapters, processors alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
)
from typer.testing import CliRunner

import foveate
from foveate import FoveateConfig, FoveateError, FoveateForConditionalGeneration, FoveateProcessor
from foveate.cli import app
from foveate.composing import compose
from foveate.model.checkpoints import read_config, stage_files
from foveate.model.folders import Hub
from foveate.tiny import tiny_model, tiny_text, tiny_tokenizer, tiny_vision
from foveate.train.models import first_model, skeleton
from foveate.train.recipe import ModelSpec, load_recipe
from foveate.zoom.vlm import VLM
from tests.docs.stand_ins import clip_tower, hf_llava, language_model
from tests.model.test_checkpoints import ORIGINAL, original_folders
from tests.support import gap, picture
from tests.train.support import stage, write_recipe

MINE, TEXT, TOWER = "me/mine", "me/text", "me/tower"
REVISIONS = ("main", "v2")


def commit(cache: Path, name: str, revision: str, write: Callable[[Path], Any]) -> Path:
    """A snapshot as the hub's cache keeps it."""
    place = cache / f"models--{name.replace('/', '--')}"
    number = (revision * 40)[:40]
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / revision).write_text(number)
    write(place / "snapshots" / number)
    return place / "snapshots" / number


def model_of(seed: int, method: str = "llava", template: str = "vicuna_v1") -> Callable[[Path], None]:
    """A model of this seed, and another in its subfolder."""

    def write(folder: Path) -> None:
        tiny_model(method, seed=seed, template=template).save(folder)
        made = tiny_model(method, seed=seed + 10, template=template)
        made.model.generation_config.max_length = 100 + seed
        made.save(folder / "inner")

    return write


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("hub")
    commit(cache, MINE, "main", model_of(1))
    commit(cache, MINE, "v2", model_of(2, template="chatml"))
    for seed, revision in enumerate(REVISIONS, 1):
        torch.manual_seed(seed)
        commit(cache, TEXT, revision, language_model)
        commit(cache, TOWER, revision, clip_tower)
    return cache


def seen(model: Any) -> Tensor:
    """What tells the models apart."""
    return model.connector.projector[0].weight.detach()


EXPECTED = {("main", ""): 1, ("v2", ""): 2, ("main", "inner"): 11, ("v2", "inner"): 12}
HERE: dict[str, Any] = {"local_files_only": True}


@pytest.mark.parametrize("place", EXPECTED)
@pytest.mark.parametrize("named", [True, False])
def test_every_door_takes_the_revision_and_subfolder(
    place: tuple[str, str], named: bool, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the cache given, and with the one of the environment."""
    revision, subfolder = place
    where = {**HERE, "revision": revision, "subfolder": subfolder}
    if named:
        where["cache_dir"] = cache
    else:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    right = tiny_model("llava", seed=EXPECTED[place])
    ends = "chatml" if revision == "v2" else "vicuna_v1"
    template = tiny_model("llava", template=ends).processor.chat_template
    doors: dict[str, Callable[[], Any]] = {
        "load": lambda: foveate.load(MINE, device="cpu", **where).model,
        "ours": lambda: FoveateForConditionalGeneration.from_pretrained(MINE, **where),
        "auto": lambda: AutoModelForImageTextToText.from_pretrained(MINE, trust_remote_code=False, **where),
        "vlm": lambda: VLM.load(MINE, "cpu", **where).model,
    }
    for name, door in doors.items():
        with monkeypatch.context() as patch:
            # transformers itself looks for an adapter without `local_files_only`, for 20 seconds
            patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", name == "auto")
            assert torch.equal(seen(door()), seen(right.model)), name
    processors = {
        "load": lambda: foveate.load(MINE, device="cpu", **where).processor,
        "ours": lambda: FoveateProcessor.from_pretrained(MINE, **where),
        "auto": lambda: AutoProcessor.from_pretrained(MINE, trust_remote_code=False, **where),
        "vlm": lambda: VLM.load(MINE, "cpu", **where).processor,
    }
    for name, door in processors.items():
        assert door().chat_template == template, name
    most = 100 + EXPECTED[place] - 10 if subfolder else None
    if subfolder:
        assert foveate.load(MINE, device="cpu", **where).model.generation_config.max_length == most
    for config in (AutoConfig, FoveateConfig):
        assert config.from_pretrained(MINE, trust_remote_code=False, **where).method == "llava"
    spec = ModelSpec(load=MINE, revision=revision, subfolder=subfolder)
    if not named:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert torch.equal(seen(first_model(recipe_of(spec), {})), seen(right.model))
        assert skeleton(spec, {}, None)[1].chat_template == template


def recipe_of(spec: ModelSpec) -> Any:
    class OfOne:
        model, seed = spec, 0

    return OfOne()


def test_local_folders_have_subfolders(cache: Path, tmp_path: Path) -> None:
    model_of(3)(tmp_path / "model")
    made = foveate.load(tmp_path / "model", device="cpu", subfolder="inner")
    assert torch.equal(seen(made.model), seen(tiny_model("llava", seed=13).model))
    assert read_config(tmp_path / "model", hub=Hub(subfolder="inner")).method == "llava"
    for revision in (None, "main"):
        foveate.load(tmp_path / "model", device="cpu", revision=revision)


MISSING = {
    "revision": ({"revision": "v3"}, r"no model folder at me/mine, and the hub's cache .* its revision v3"),
    "commit": ({"revision": "0" * 40}, r"does not have its revision 0{40}"),
    "subfolder": ({"subfolder": "outer"}, r"me/mine has no subfolder outer"),
    "subfolder of a revision": ({"subfolder": "no", "revision": "v2"}, r"no subfolder no at revision v2"),
    "above": ({"subfolder": "../main"}, r"subfolder \.\./main is not a folder inside the model's"),
    "absolute": ({"subfolder": "/tmp"}, r"subfolder /tmp is not a folder inside the model's"),
    "NUL": ({"subfolder": "a\0b"}, r"subfolder a\\x00b is not a folder inside"),
    "cache": ({"cache_dir": "/nowhere"}, r"the hub's cache does not have it"),
}


@pytest.mark.parametrize("kind", MISSING)
def test_what_is_not_there_is_one_sentence(kind: str, cache: Path) -> None:
    changes, message = MISSING[kind]
    where = {"cache_dir": cache, **HERE, **changes}
    doors: list[Callable[[], Any]] = [
        lambda: foveate.load(MINE, device="cpu", **where),
        lambda: FoveateForConditionalGeneration.from_pretrained(MINE, **where),
        lambda: FoveateProcessor.from_pretrained(MINE, **where),
        lambda: VLM.load(MINE, "cpu", **where),
    ]
    for door in doors:
        with pytest.raises(FoveateError, match=message) as raised:
            door()
        assert "\n" not in str(raised.value)


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    tiny_model("llava").save(tmp_path)
    with pytest.raises(FoveateError, match="a folder of this machine, which has no revision v2: leave out"):
        foveate.load(tmp_path, device="cpu", revision="v2")
    with pytest.raises(FoveateError, match="has no revision v2"):
        foveate.load(device="cpu", revision="v2")
    with pytest.raises(TypeError, match="unexpected keyword argument 'revison'"):
        foveate.load(tmp_path, revison="v2")


def test_a_tower_that_a_config_names_has_its_own_revision(cache: Path, tmp_path: Path) -> None:
    """And comes from the same cache."""

    def write(folder: Path) -> None:
        model, _ = original_folders(tmp_path / folder.name, {**ORIGINAL, "mm_vision_tower": TOWER})
        shutil.copytree(model, folder)

    for revision in REVISIONS[1:]:
        commit(cache, "me/original", revision, write)
    where = {"cache_dir": cache, **HERE}
    made = FoveateForConditionalGeneration.from_pretrained("me/original", revision="v2", **where)
    first = load_file(cache / "models--me--tower" / "snapshots" / ("main" * 10) / "model.safetensors")
    own = made.vision_tower.model.embeddings.patch_embedding.weight
    assert torch.equal(own, first["embeddings.patch_embedding.weight"])


def test_parts_have_revisions_of_their_own(cache: Path) -> None:
    where = {"cache_dir": cache, **HERE}
    made = {
        (vision, text): compose(TOWER, TEXT, vision_revision=vision, text_revision=text, **where).model
        for vision, text in (("main", "v2"), ("v2", "main"), ("v2", "v2"))
    }
    towers = {key: m.vision_tower.model.embeddings.patch_embedding.weight for key, m in made.items()}
    heads = {key: m.language_model.lm_head.weight for key, m in made.items()}
    assert torch.equal(towers["v2", "main"], towers["v2", "v2"])
    assert not torch.equal(towers["main", "v2"], towers["v2", "v2"])
    assert torch.equal(heads["main", "v2"], heads["v2", "v2"])
    assert not torch.equal(heads["v2", "main"], heads["v2", "v2"])
    with pytest.raises(FoveateError, match="its revision v3"):
        compose(TOWER, TEXT, text_revision="v3", **where)
    with pytest.raises(FoveateError, match="give vision_revision or text_revision"):
        compose(TOWER, TEXT, revision="v2", **where)


def test_the_command_line_takes_revisions(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    picture(20, 20).save(tmp_path / "p.png")

    def run(*words: str) -> Any:
        return CliRunner().invoke(app, list(words), catch_exceptions=True)

    out = str(tmp_path / "out")
    assert run("convert", MINE, out, "--revision", "v2", "--subfolder", "inner").exit_code == 0
    made = FoveateForConditionalGeneration.from_pretrained(out)
    assert torch.equal(seen(made), seen(tiny_model("llava", seed=12).model))
    both = ("--vision", TOWER, "--text", TEXT, "--vision-revision", "v2", "--text-revision", "main")
    assert run("compose", str(tmp_path / "composed"), *both).exit_code == 0
    asked = (str(tmp_path / "p.png"), "--model", MINE)
    assert (
        run("ask", asked[0], "What?", *asked[1:], "--revision", "v2", "--max-new-tokens", "1").exit_code == 0
    )
    assert run("inspect", *asked, "--revision", "v2").exit_code == 0
    for words in (
        ("ask", asked[0], "What?", *asked[1:]),
        ("chat", *asked),
        ("inspect", *asked),
        ("convert", MINE, str(tmp_path / "new")),
    ):
        failed = run(*words, "--revision", "v3")
        assert isinstance(failed.exception, FoveateError), words
        assert "revision v3" in str(failed.exception)


# LoRA adapters


def adapted(model: Any, folder: Path, base: Path | str, **settings: Any) -> Any:
    """Saves a random adapter to a model; returns the model with it."""
    torch.manual_seed(4)
    config = LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, **settings)
    made = get_peft_model(model, config)
    made.save_pretrained(folder)
    values = json.loads((folder / "adapter_config.json").read_text())
    values["base_model_name_or_path"] = str(base)
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return made


@torch.no_grad()
def logits(model: Any, processor: Any) -> Tensor:
    said = [{"role": "user", "content": [{"type": "image", "image": picture(30, 20)}]}]
    said[0]["content"].append({"type": "text", "text": "What?"})
    inputs = processor.apply_chat_template(said, tokenize=True, return_dict=True, return_tensors="pt")
    return model.eval()(**inputs).logits


ON = {
    "names": {"target_modules": ["q_proj", "v_proj"]},
    "pattern": {"target_modules": r".*language_model.*\.(down_proj|o_proj)", "use_rslora": True},
    "ranks": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"up_proj": 3},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 9},
    },
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
    "more": {"target_modules": ["q_proj", "linear_1"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", ON)
def test_an_adapter_is_merged_into_its_base(kind: str, tmp_path: Path) -> None:
    base = tiny_model("llava")
    base.save(tmp_path / "base")
    settings = {**ON[kind]}
    if kind == "more":
        settings["target_modules"] = ["q_proj", "projector.0"]
    right = adapted(base.model, tmp_path / "adapter", tmp_path / "base", **settings)
    expected = logits(right, base.processor)
    for made in (foveate.load(tmp_path / "adapter", device="cpu"), VLM.load(tmp_path / "adapter", "cpu")):
        assert gap(logits(made.model, made.processor), expected) < 1e-4
    plain = foveate.load(tmp_path / "base", device="cpu")
    assert gap(logits(plain.model, plain.processor), expected) > 1e-2
    assert not any("lora" in key for key in made.model.state_dict())


@pytest.mark.parametrize("kind", ON)
def test_an_adapter_of_transformers_own_llava(kind: str, tmp_path: Path) -> None:
    """Its keys are renamed like those of its base."""
    hf_llava(tmp_path / "base")
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    expected = logits(
        adapted(theirs, tmp_path / "adapter", tmp_path / "base", **ON[kind]),
        AutoProcessor.from_pretrained(tmp_path / "base"),
    )
    for made in (foveate.load(tmp_path / "adapter", device="cpu"), VLM.load(tmp_path / "adapter", "cpu")):
        assert gap(logits(made.model, made.processor), expected) < 1e-4


def test_an_adapter_of_an_llm(tmp_path: Path) -> None:
    language_model(tmp_path / "base")
    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    right = adapted(llm, tmp_path / "adapter", tmp_path / "base", target_modules=["q_proj"])
    made = compose(tiny_vision(), tmp_path / "adapter", "llava").model.language_model.eval()
    ids = torch.tensor([[1, 20, 30]])
    with torch.no_grad():
        assert gap(made(ids).logits[..., :266], right.eval()(ids).logits[..., :266]) < 1e-4


def test_an_adapter_from_the_hub(cache: Path, tmp_path: Path) -> None:
    """Its base has a revision of its own, and the same cache."""
    base = tiny_model("llava", seed=2)

    def write(folder: Path) -> None:
        adapted(base.model, folder, MINE, target_modules=["q_proj"], revision="v2")

    commit(cache, "me/adapter", "new", write)
    made = foveate.load("me/adapter", device="cpu", revision="new", cache_dir=cache, **HERE)
    assert torch.equal(seen(made.model), seen(tiny_model("llava", seed=2).model))


def change(name: str, **values: Any) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**found, **values}))

    return changed


BROKEN = {
    "no base": (change("adapter_config.json", base_model_name_or_path=""), "should name the model it was"),
    "base is not there": (
        change("adapter_config.json", base_model_name_or_path="/no/where"),
        "its base_model_name_or_path cannot be loaded: no model folder at /no/where",
    ),
    "another kind": (change("adapter_config.json", peft_type="IA3"), "peft_type 'IA3' is not supported"),
    "no weights": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        "holds no weights: no adapter_model",
    ),
    "cut weights": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"abc"),
        r"adapter_model\.safetensors is broken",
    ),
    "no JSON": (
        lambda f: (f / "adapter_config.json").write_text("{"),
        "adapter_config.json is not valid JSON",
    ),
    "odd values": (change("adapter_config.json", lora_alpha="many"), "the LoRA adapter in .* does not fit"),
    "other sizes": (change("adapter_config.json", r=3), None),
    "a model too": (
        lambda f: (f / "model.safetensors").write_bytes(b""),
        "holds a whole model and a LoRA adapter",
    ),
    "LLaVA's own": (
        lambda f: (f / "non_lora_trainables.bin").write_bytes(b""),
        "merge it with the authors' scripts",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_adapters_that_are_broken(name: str, tmp_path: Path) -> None:
    base = tiny_model("llava")
    base.save(tmp_path / "base")
    adapted(base.model, tmp_path / "adapter", tmp_path / "base", target_modules=["q_proj"])
    spoil, message = BROKEN[name]
    spoil(tmp_path / "adapter")
    if message is None:  # the weights say their rank
        foveate.load(tmp_path / "adapter", device="cpu")
        return
    with pytest.raises(FoveateError, match=message) as raised:
        foveate.load(tmp_path / "adapter", device="cpu")
    assert "\n" not in str(raised.value)


def test_an_adapter_is_no_tower_and_no_stage(tmp_path: Path) -> None:
    base = tiny_model("llava")
    base.save(tmp_path / "base")
    adapted(base.model, tmp_path / "adapter", tmp_path / "base", target_modules=["q_proj"])
    for door in (
        lambda: compose(tmp_path / "adapter", tiny_text(), "llava", tokenizer=tiny_tokenizer()),
        lambda: stage_files(tmp_path / "adapter"),
    ):
        with pytest.raises(FoveateError, match="holds a LoRA adapter alone: give the whole model here"):
            door()


# Processors alone, and models without a tokenizer


def test_a_processor_alone(tmp_path: Path) -> None:
    made = tiny_model("anyres", {"grids": [[1, 2]]})
    made.processor.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
    for again in (
        FoveateProcessor.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path, trust_remote_code=False),
    ):
        assert isinstance(again, FoveateProcessor)
        assert again.chat_template == made.processor.chat_template
        assert again.image_processor.plan(56, 112) == made.processor.image_processor.plan(56, 112)
    assert FoveateProcessor.from_pretrained(tmp_path, template="bare").chat_template != again.chat_template
    with pytest.raises(FoveateError, match="holds a processor alone: leave out the method"):
        FoveateProcessor.from_pretrained(tmp_path, method="llava")
    with pytest.raises(FoveateError, match=r"has no config\.json: it is not a model folder"):
        foveate.load(tmp_path, device="cpu") and None


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    tiny_model("llava").save(tmp_path)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    FoveateForConditionalGeneration.from_pretrained(tmp_path)
    with pytest.raises(FoveateError, match="has no tokenizer"):
        foveate.load(tmp_path, device="cpu")


def test_recipes_check_what_belongs_together(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, {"all": stage(["connector"], tmp_path / "none.json", steps=1)})
    for change_, message in (
        ("model.revision=v2", "revision and subfolder belong to load"),
        ("model.text_revision=v2", "vision_revision and text_revision belong to vision and text"),
    ):
        with pytest.raises(FoveateError, match=message):
            load_recipe(path, [change_])
