"""Other people's checkpoints, and folders that are broken: one clear sentence each, and no code is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, set_seed

from foveate import FoveateConfig, FoveateError, FoveateForConditionalGeneration, FoveateProcessor, load
from foveate.methods import METHODS
from foveate.model.checkpoints import recognise
from foveate.tiny import tiny_model, tiny_text, tiny_tokenizer, tiny_vision
from foveate.zoom.vlm import VLM
from tests.docs.stand_ins import hf_llava, hf_llava_next
from tests.methods.conftest import fresh
from tests.support import picture

# The keys by which released checkpoints differ, with the values of their config.json.
ORIGINAL = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava",
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "image_aspect_ratio": "pad",
}
LLAVA_HR = {
    **ORIGINAL,
    "vision_tower_slow": "convnext_large_mlp.clip_laion2b_ft_320",
    "is_multipath_encoder": True,
    "input_image_size": 1024,
}
SLIME = {
    **ORIGINAL,
    "model_type": "llava_llama",
    "architectures": ["LlavaLlamaForCausalLM"],
    "mm_projector_type": "gated",
    "mm_resampler_type": "qformer",
    "mm_patch_merge_type": "spatial",
    "image_aspect_ratio": "anyres",
}
INF_LLAVA = {**ORIGINAL, "model_type": "llava_llama", "mm_patch_merge_type": "flat"}
"""To its config.json, INF-LLaVA is LLaVA-1.5: only its weights tell."""


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def original_folders(root: Path, config: dict[str, Any]) -> tuple[Path, Path]:
    """A tiny random LLaVA-1.5 as its authors release it: the model's folder, and its tower's."""
    tiny = tiny_model("llava").model
    state = tiny.state_dict()
    names = {
        "language_model.model.": "model.",
        "language_model.lm_head.": "lm_head.",
        "connector.projector.": "model.mm_projector.",
    }
    weights = {}
    for key, tensor in state.items():
        new = next((key.replace(old, name, 1) for old, name in names.items() if key.startswith(old)), None)
        if new:
            weights[new] = tensor.clone()
    model, tower = root / "model", root / "tower"
    text = tiny_text().to_dict()
    write_json(model / "config.json", {**text, **config})
    torch.save(weights, model / "pytorch_model.bin")
    tiny_tokenizer().save_pretrained(model)
    set_seed(5)
    words = CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    CLIPModel(CLIPConfig(text_config=words, vision_config=tiny_vision())).save_pretrained(tower)
    return model, tower


# What is recognised, and as what.


@pytest.mark.parametrize(
    ("config", "method"),
    [(ORIGINAL, "llava"), (LLAVA_HR, "llava_hr"), (SLIME, "slime")],
    ids=["llava", "llava_hr", "slime"],
)
def test_no_method_takes_another_ones_checkpoint(config: dict[str, Any], method: str, tmp_path: Path) -> None:
    _, tower = original_folders(tmp_path, config)
    if method in METHODS:
        released = recognise(tmp_path / "model", tower)
        assert released is not None
        assert released.method == method
    else:
        with pytest.raises(FoveateError, match="not of a layout known here"):
            recognise(tmp_path / "model", tower)


@pytest.mark.parametrize("folder", ["slime", "llava_hr", "inf_llava", "chain_of_spot"])
def test_golden_checkpoints_are_not_mistaken(folder: str, pytestconfig: pytest.Config) -> None:
    from tests.conftest import golden_folder

    golden = golden_folder(pytestconfig)
    if golden is None or not (golden / "checkpoints" / folder).is_dir():
        pytest.skip("no golden vectors here")
    tower = next((golden / "checkpoints" / folder).glob("clip*"))
    owner = "llava" if folder == "chain_of_spot" else folder
    model = golden / "checkpoints" / folder / "checkpoint"
    if owner in METHODS:
        released = recognise(model, tower)
        assert released is not None
        assert released.method == owner
    else:
        with pytest.raises(FoveateError, match=r"not of a layout known here|has unexpected"):
            FoveateForConditionalGeneration.from_pretrained(model, vision_tower=tower)


def test_weights_tell_inf_llava_from_llava(tmp_path: Path) -> None:
    """In one file of either kind, in shards, and in what a first stage leaves; the rest is then missed."""
    model, tower = original_folders(tmp_path, INF_LLAVA)
    weights = torch.load(model / "pytorch_model.bin", weights_only=True)

    def method() -> str:
        released = recognise(model, tower)
        assert released is not None
        return released.method

    assert method() == "llava"
    weights["model.spatial_embed.attention.linears.0.weight"] = torch.zeros(3, 3)
    torch.save(weights, model / "pytorch_model.bin")
    assert method() == "inf_llava"
    with pytest.raises(
        FoveateError, match=r"lacks connector\.attention.*the wrong shape for connector\.attention"
    ):
        FoveateForConditionalGeneration.from_pretrained(model, vision_tower=tower)
    (model / "pytorch_model.bin").unlink()
    save_file(weights, model / "model.safetensors")
    assert method() == "inf_llava"
    (model / "model.safetensors").unlink()
    assert method() == "llava"
    places = {key: "pytorch_model-00001-of-00001.bin" for key in weights}
    write_json(model / "pytorch_model.bin.index.json", {"weight_map": places})
    assert method() == "inf_llava"
    (model / "pytorch_model.bin.index.json").unlink()
    torch.save(weights, model / "mm_projector.bin")
    assert method() == "inf_llava"


@torch.no_grad()
def test_original_layout_with_a_tower_apart(tmp_path: Path) -> None:
    model, tower = original_folders(tmp_path, ORIGINAL)
    made = load(model, vision_tower=tower, dtype="float32", device="cpu")
    given = load_file(tower / "model.safetensors")
    built = made.model.vision_tower.state_dict()
    assert all(torch.equal(built[key], given[key.replace("model.", "vision_model.", 1)]) for key in built)
    answer = made.ask(torch.zeros(20, 30, 3, dtype=torch.uint8).numpy(), "What?", max_new_tokens=3)
    assert answer.ledger.visual_tokens == 16
    change_config(mm_vision_tower=str(tower))(model)  # now as config.json says
    again = FoveateForConditionalGeneration.from_pretrained(model).state_dict()
    assert all(torch.equal(again[key], value) for key, value in made.model.state_dict().items())
    made.save(tmp_path / "ours")
    assert FoveateProcessor.from_pretrained(tmp_path / "ours").chat_template == made.processor.chat_template


def test_original_layout_with_an_unknown_llm(tmp_path: Path) -> None:
    model, tower = original_folders(tmp_path, {**ORIGINAL, "model_type": "llava_qwen"})
    with pytest.raises(FoveateError, match="no LLM is known here for model_type 'llava_qwen'"):
        FoveateForConditionalGeneration.from_pretrained(model, vision_tower=tower)


def test_original_layout_with_the_tower_inside(tmp_path: Path) -> None:
    """Saving a trained model writes its tower too, with the layers that nothing reads."""
    model, tower = original_folders(tmp_path, ORIGINAL)
    apart = FoveateForConditionalGeneration.from_pretrained(model, vision_tower=tower).state_dict()
    weights = torch.load(model / "pytorch_model.bin", weights_only=True)
    inside = {
        f"model.vision_tower.vision_tower.{key}": value + 1
        for key, value in load_file(tower / "model.safetensors").items()
        if key.startswith("vision_model.")
    }
    inside["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    inside["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(6)
    (model / "pytorch_model.bin").unlink()
    save_file({**weights, **inside}, model / "model.safetensors", {"format": "pt"})
    within = FoveateForConditionalGeneration.from_pretrained(model, vision_tower=tower).state_dict()
    for key, value in apart.items():
        assert torch.equal(within[key], value + 1 if key.startswith("vision_tower.") else value)


@pytest.mark.parametrize("write", [hf_llava, hf_llava_next])
def test_transformers_layouts_without_a_chat_template(write: Callable[[Path], None], tmp_path: Path) -> None:
    """Only asking needs one, and a named one does; nothing is guessed of the LLM."""
    photo, folder = picture(60, 90), tmp_path / "model"
    set_seed(0)
    write(folder)
    expected = load(folder, device="cpu").ask(photo, "What is it?", max_new_tokens=4).text
    file = folder / "chat_template.jinja"
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": file.read_text()}]
    file.unlink()
    FoveateForConditionalGeneration.from_pretrained(folder)
    without = load(folder, device="cpu")
    without.save(tmp_path / "ours")
    for made in (without, load(tmp_path / "ours", device="cpu")):
        assert made.processor(images=photo, text="<image> What is it?")["pixel_values"].shape[0] > 0
        with pytest.raises(FoveateError, match=r"no chat_template\.jinja: name the template .* vicuna_v1"):
            made.ask(photo, "What is it?")
    with pytest.raises(FoveateError, match="has no chat template: set processor"):
        VLM.load(folder, "cpu")
    chosen = load(folder, device="cpu", template="vicuna_v1")
    assert chosen.ask(photo, "What is it?", max_new_tokens=4).text == expected
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", {**settings, "chat_template": named})
    of_several = load(folder, device="cpu")
    assert of_several.ask(photo, "What is it?", max_new_tokens=4).text == expected


def test_bin_files_of_every_age(tmp_path: Path) -> None:
    """Old ones are no zip archives and cannot be memory-mapped; shards have an index."""
    model, tower = original_folders(tmp_path, ORIGINAL)
    loaded = FoveateForConditionalGeneration.from_pretrained(model, vision_tower=tower).state_dict()
    first = {key: value.clone() for key, value in loaded.items()}  # not the file's own pages
    weights = torch.load(model / "pytorch_model.bin", weights_only=True)
    torch.save(weights, model / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    old = FoveateForConditionalGeneration.from_pretrained(model, vision_tower=tower).state_dict()
    keys = sorted(weights)
    (model / "pytorch_model.bin").unlink()
    shards = {"pytorch_model-00001-of-00002.bin": keys[:9], "pytorch_model-00002-of-00002.bin": keys[9:]}
    for name, part in shards.items():
        torch.save({key: weights[key] for key in part}, model / name)
    places = {key: name for name, part in shards.items() for key in part}
    write_json(model / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": places})
    sharded = FoveateForConditionalGeneration.from_pretrained(model, vision_tower=tower).state_dict()
    for key, value in first.items():
        assert torch.equal(old[key], value)
        assert torch.equal(sharded[key], value)
    (model / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(FoveateError, match=r"pytorch_model-00002-of-00002\.bin is missing, though the index"):
        FoveateForConditionalGeneration.from_pretrained(model, vision_tower=tower)


class Bomb:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("old", [False, True])
def test_code_in_a_bin_file_is_not_run(old: bool, tmp_path: Path) -> None:
    model, tower = original_folders(tmp_path, ORIGINAL)
    weights = torch.load(model / "pytorch_model.bin", weights_only=True)
    bomb = Bomb(tmp_path / "run")
    with pytest.raises(FileExistsError):  # it does go off where it is let
        pickle.loads(pickle.dumps(Bomb(tmp_path)))
    zipped = {"_use_new_zipfile_serialization": not old}
    traps = {
        "alone": lambda path: path.write_bytes(pickle.dumps({"lm_head.weight": bomb})),
        "beside tensors": lambda path: torch.save({**weights, "bomb": bomb}, path, **zipped),
    }
    for trap in traps.values():
        trap(model / "pytorch_model.bin")
        with pytest.raises(FoveateError, match=r"pytorch_model\.bin is broken or holds more than tensors"):
            FoveateForConditionalGeneration.from_pretrained(model, vision_tower=tower)
        assert not (tmp_path / "run").exists()


def test_generation_settings_come_along(tmp_path: Path) -> None:
    model, tower = original_folders(tmp_path, ORIGINAL)
    write_json(model / "generation_config.json", {"eos_token_id": [2, 77], "max_length": 4096})
    made = FoveateForConditionalGeneration.from_pretrained(model, vision_tower=tower)
    assert made.generation_config.eos_token_id == [2, 77]


# Broken folders of our own.


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_model("llava").save(folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def change_config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        write_json(file, {**json.loads(file.read_text()), **values})

    return change


def change_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return changed


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    def written(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return written


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


BROKEN = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "config is no JSON": (write("config.json", '{"model_type": "fov'), "config.json is not valid JSON"),
    "config is a list": (write("config.json", "[]"), "should hold a JSON object"),
    "config is binary": (write("config.json", b"\xff\xfe\x00"), "config.json is not valid JSON"),
    "weights are no weights": (write("model.safetensors", b"nothing"), r"model\.safetensors is broken"),
    "weights are empty": (write("model.safetensors", b""), r"model\.safetensors is broken"),
    "weights are cut": (cut, r"model\.safetensors is broken"),
    "a key is missing": (
        change_weights(lambda w: w.pop("connector.projector.0.weight")),
        r"lacks connector\.projector\.0\.weight",
    ),
    "a key too many": (
        change_weights(lambda w: w.update({"connector.more": torch.zeros(2)})),
        r"unexpected connector\.more",
    ),
    "a key of another shape": (
        change_weights(lambda w: w.update({"connector.projector.0.bias": torch.zeros(2)})),
        r"has the wrong shape for connector\.projector\.0\.bias",
    ),
    "unknown method": (change_config(method="lava"), "unknown method 'lava'"),
    "unknown option": (change_config(options={"fitt": "pad"}), "unknown key 'fitt'; did you mean 'fit'"),
    "wrong value": (change_config(options={"fit": "stretch"}), "'stretch' is not one of pad, crop, squash"),
    "another kind of model": (change_config(model_type="bert"), "not of a layout known here"),
    "unknown tower": (change_config(vision_config={"model_type": "eye"}), "knows no model_type 'eye'"),
    "unknown LLM": (change_config(text_config={"model_type": "parrot"}), "knows no model_type 'parrot'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders(name: str, copied: Path) -> None:
    break_it, message = BROKEN[name]
    break_it(copied)
    with pytest.raises(FoveateError, match=message) as raised:
        FoveateForConditionalGeneration.from_pretrained(copied)
    text = str(raised.value)
    assert "\n" not in text.strip()
    assert len(text) < 500


def test_folders_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for given, message in (
        (tmp_path / "nothing", "no model folder at"),
        (tmp_path / "file", "is a file: give the model's folder"),
        (tmp_path, "has no config.json: it is not a model folder"),
        ("a name with spaces", "no model folder at a name with spaces"),
    ):
        for cls in (FoveateForConditionalGeneration, FoveateProcessor):
            with pytest.raises(FoveateError, match=message):
                cls.from_pretrained(given)


def test_options_at_loading(saved: Path) -> None:
    made = load(saved, options={"fit": "crop"}, device="cpu", dtype="float32")
    assert made.model.method.options.fit == made.processor.image_processor.planner().options.fit == "crop"
    for options, message in (
        ({"max_visual_token": 3}, "unknown key 'max_visual_token'; did you mean 'max_visual_tokens'"),
        ({"max_visual_tokens": 0}, "max_visual_tokens must be at least 1"),
        ({"max_visual_tokens": "many"}, "max_visual_tokens"),
        ({"fit": 3}, "3 is not one of"),
    ):
        with pytest.raises(FoveateError, match=message):
            load(saved, options=options, device="cpu")
    small = load(saved, options={"max_visual_tokens": 3}, device="cpu")
    with pytest.raises(FoveateError, match=r"needs at least 16 visual tokens for this picture, .* allows 3"):
        small.plan(tiny_picture())
    with pytest.raises(FoveateError, match="unknown dtype 'float8'"):
        load(saved, dtype="float8", device="cpu")
    with pytest.raises(FoveateError, match="unknown device 'tpu'"):
        load(saved, device="tpu")


def tiny_picture() -> Any:
    from tests.support import picture

    return picture(9, 9)


def test_configs_from_parts() -> None:
    config = FoveateConfig(vision_config=tiny_vision(), text_config=tiny_text().to_dict(), method="anyres")
    again = FoveateConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert again.vision_config.hidden_size == 32
    assert again.get_text_config().hidden_size == 48


@pytest.mark.parametrize("method", ["slime", "llava_hr", "inf_llava", "coroi", "chain_of_spot"])
def test_options_that_are_gone_load_with_the_value_that_is_left(method: str, tmp_path: Path) -> None:
    """Folders hold all options of their method, also those of an earlier version."""
    made = fresh(method)
    made.save(tmp_path)
    gone = dict(made.model.method.Options.retired)
    assert gone
    for name, keys in (("config.json", ()), ("processor_config.json", ("image_processor",))):
        change_options(tmp_path / name, keys, gone)
    again = load(tmp_path, device="cpu")
    image = picture(60, 90)
    words = {"max_new_tokens": 4}
    assert again.ask(image, "What is it?", **words).text == made.ask(image, "What is it?", **words).text
    name, value = next(iter(gone.items()))
    change_options(tmp_path / "config.json", (), {name: "else"})
    with pytest.raises(FoveateError, match=f"{name} is always {value!r}, not 'else'"):
        load(tmp_path, device="cpu")


def change_options(path: Path, keys: Sequence[str], more: Mapping[str, Any]) -> None:
    """Adds options to a JSON file, in the mapping that `keys` lead to."""
    values = json.loads(path.read_text())
    place = values
    for key in keys:
        place = place[key]
    place["options"] |= more
    path.write_text(json.dumps(values))
