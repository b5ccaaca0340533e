"""What comes with a model folder from a stranger: its Python code never runs."""

from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import foveate
from foveate import FoveateError, FoveateProcessor
from foveate.composing import compose
from foveate.tiny import tiny_model, tiny_text, tiny_tokenizer, tiny_vision
from foveate.train.prepare import prepare
from foveate.train.recipe import load_recipe
from foveate.zoom.vlm import VLM
from tests.docs.stand_ins import clip_tower, hf_llava, language_model
from tests.train.support import stage, write_recipe

ROOT = Path(foveate.__file__).parent
# Classes whose loading runs no code of a folder, whatever its files say.
CONCRETE = {
    *("CLIPVisionModel", "LlamaForCausalLM", "ConvNextModel", "GenerationConfig"),
    *("FoveateConfig", "FoveateProcessor", "FoveateForConditionalGeneration"),
}
CODE = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers import LlavaForConditionalGeneration, LlavaProcessor
class Config(LlamaConfig):
    model_type = "stranger"
class Model(LlamaForCausalLM): ...
class Tokenizer: ...
class Processor(LlavaProcessor): ...
"""
AUTO = {
    "AutoConfig": "code.Config",
    "AutoModel": "code.Model",
    "AutoModelForCausalLM": "code.Model",
    "AutoModelForImageTextToText": "code.Model",
    "AutoTokenizer": ["code.Tokenizer", None],
    "AutoProcessor": "code.Processor",
}


def test_every_call_says_that_no_code_runs() -> None:
    found = 0
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = ast.unparse(node.func.value)
            if node.func.attr not in ("from_pretrained", "from_config") or owner in CONCRETE:
                continue
            if path.name == "modeling.py" and owner == "super()":  # of a class that transformers is handed
                continue
            said = ast.unparse(node)
            assert "trust_remote_code" in said, f"{path.name}:{node.lineno}: {said}"
            found += 1
    assert found > 12


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is there once a stranger's code ran; whoever is asked says yes."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    return tmp_path / "ran"


def strange(folder: Path, mark: Path, model_type: str | None, part: str | None = None) -> Path:
    """Puts a stranger's code into a folder, and names it in all its files, or in one part of its config."""
    (folder / "code.py").write_text(CODE.format(mark=str(mark)))
    for name in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            values = json.loads((folder / name).read_text())
            place = values if part is None or name != "config.json" else values[part]
            place["auto_map"] = AUTO
            if model_type is not None and name == "config.json":
                place["model_type"] = model_type
            if "tokenizer_class" in place:
                place["tokenizer_class"] = "Tokenizer"
            (folder / name).write_text(json.dumps(values))
    return folder


def tower(folder: Path) -> Path:
    clip_tower(folder)
    return folder


def llm(folder: Path) -> Path:
    language_model(folder)
    return folder


def vlm(folder: Path) -> Path:
    hf_llava(folder)
    return folder


def own(folder: Path) -> Path:
    tiny_model("llava").save(folder)
    return folder


def dry_run(text: Path, place: Path) -> Any:
    path = write_recipe(place, {"all": stage(["connector"], place / "none.json", steps=1)})
    return prepare(
        load_recipe(path, ["model.tiny=false", f"model.vision={tower(place / 'v')}", f"model.text={text}"]),
        "all",
    )


DOORS: dict[str, tuple[Callable[[Path], Path], Callable[[Path, Path], Any]]] = {
    "load": (own, lambda folder, _: foveate.load(folder, device="cpu")),
    "processor": (own, lambda folder, _: FoveateProcessor.from_pretrained(folder)),
    "released": (vlm, lambda folder, _: foveate.load(folder, device="cpu")),
    "composed LLM": (
        llm,
        lambda folder, _: compose(tiny_vision(), folder, "llava", tokenizer=tiny_tokenizer()),
    ),
    "composed tower": (
        tower,
        lambda folder, _: compose(folder, tiny_text(), "llava", tokenizer=tiny_tokenizer()),
    ),
    "recipe": (llm, dry_run),
    "any VLM": (vlm, lambda folder, _: VLM.load(folder, device="cpu")),
}


@pytest.mark.parametrize("model_type", [None, "stranger"])
@pytest.mark.parametrize("door", DOORS)
def test_no_code_of_a_folder_runs(door: str, model_type: str | None, tmp_path: Path, mark: Path) -> None:
    """Named in its files, with a type that transformers knows and with one that it does not."""
    write, enter = DOORS[door]
    folder = strange(write(tmp_path / "model"), mark, model_type)
    try:
        enter(folder, tmp_path)
    except FoveateError as error:
        assert "trust_remote_code" not in str(error)
    assert not mark.exists()


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_no_code_of_a_part_runs(part: str, tmp_path: Path, mark: Path) -> None:
    folder = strange(own(tmp_path / "model"), mark, None, part)
    try:
        foveate.load(folder, device="cpu")
    except FoveateError as error:
        assert "trust_remote_code" not in str(error)
    assert not mark.exists()


def test_whoever_says_so_may_run_it(tmp_path: Path, mark: Path) -> None:
    folder = strange(vlm(tmp_path / "model"), mark, "stranger")
    with pytest.raises((FoveateError, AttributeError, TypeError)):  # a text model is not a VLM
        VLM.load(folder, device="cpu", trust_remote_code=True)
    assert mark.exists()


def sharded(folder: Path) -> dict[str, str]:
    """Splits a folder's weights; returns its weight_map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = ("model-1-of-2.safetensors", "model-2-of-2.safetensors")
    places = {key: names[i % 2] for i, key in enumerate(tensors)}
    for name in names:
        part = {key: tensor for key, tensor in tensors.items() if places[key] == name}
        save_file(part, folder / name, {"format": "pt"})
    return places


INDEXED = {name: DOORS[name] for name in ("load", "released", "composed LLM", "composed tower", "any VLM")}


@pytest.mark.parametrize("kind", ["absolute", "above", "link", "link to a folder"])
@pytest.mark.parametrize("door", INDEXED)
def test_shards_outside_the_folder_are_refused(door: str, kind: str, tmp_path: Path) -> None:
    write, enter = INDEXED[door]
    folder = write(tmp_path / "models" / "model")
    places = sharded(folder)
    first = next(iter(places.values()))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (folder / first).rename(elsewhere / first)
    name = {
        "absolute": str(elsewhere / first),
        "above": f"../../elsewhere/{first}",
        "link": first,
        "link to a folder": f"inner/{first}",
    }[kind]
    if kind == "link":
        (folder / first).symlink_to(elsewhere / first)
    elif kind == "link to a folder":
        (folder / "inner").symlink_to(elsewhere)
    places = {key: name if place == first else place for key, place in places.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(FoveateError, match=f"weight_map names {re.escape(repr(name))}, which lies outside"):
        enter(folder, tmp_path)


def test_the_hub_s_cache_is_no_place_outside(tmp_path: Path) -> None:
    cache = tmp_path / "models--me--mine"
    snapshot, blobs = cache / "snapshots" / "1a2b", cache / "blobs"
    index = {"metadata": {}, "weight_map": sharded(own(snapshot))}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    blobs.mkdir()
    for file in list(snapshot.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(Path("../../blobs") / file.name)
    foveate.load(snapshot, device="cpu")


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": None}])
def test_a_malformed_index_is_named(index: dict[str, Any], tmp_path: Path) -> None:
    folder = own(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FoveateError, match="weight_map should say for each tensor which file holds it"):
        foveate.load(folder, device="cpu")
