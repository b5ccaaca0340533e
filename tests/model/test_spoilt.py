"""Files of a model that are spoilt in every way: one sentence each, that names the file or the folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from foveate import FoveateError, load
from foveate.cli import app
from foveate.composing import compose
from foveate.model.checkpoints import read_config
from foveate.tiny import tiny_model, tiny_text, tiny_tokenizer, tiny_vision
from foveate.zoom.vlm import VLM
from tests.docs.stand_ins import clip_tower, hf_llava, hf_llava_next, language_model
from tests.support import picture

Door = Callable[[Path], Any]


def ask(folder: Path) -> Any:
    return load(folder, device="cpu").ask(picture(9, 9), "What?", max_new_tokens=1)


# what is written, and what reads it
MODELS: dict[str, tuple[Callable[[Path], Any], Door]] = {
    "own": (lambda folder: tiny_model("llava").save(folder), ask),
    "llava": (hf_llava, ask),
    "llava by Zoom": (hf_llava, lambda folder: VLM.load(folder, "cpu")),
    "next by Zoom": (hf_llava_next, lambda folder: VLM.load(folder, "cpu")),
    "LLM": (language_model, lambda folder: compose(tiny_vision(), folder)),
    "tower": (clip_tower, lambda folder: compose(folder, tiny_text(), tokenizer=tiny_tokenizer())),
}
JSONS: tuple[str, ...] = (
    "config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
)
JSONS += ("tokenizer.json", "generation_config.json", "chat_template.json")
CONTENTS: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"model_type": "fov',
    "a list": b"[]",
    "a text": b'"text"',
    "a number": b"1",
    "null": b"null",
    "an empty object": b"{}",
    "zeros": b"\0" * 100,
    "not text": b"\xff\xfe\xfd\x80",
    "utf-16": '{"model_type": "foveate"}'.encode("utf-16"),
    "deep": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    for name, (write, _) in MODELS.items():
        write(place / name)
    return place


def refused(door: Door, folder: Path) -> str:
    """What a door says; nothing if it reads the folder all the same."""
    try:
        door(folder)
    except FoveateError as error:
        text = str(error)
        assert "\n" not in text.strip()
        assert len(text) < 1500
        return text
    return ""


def copied(originals: Path, name: str, place: Path) -> Path:
    return Path(shutil.copytree(originals / name, place / "model"))


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("model", MODELS)
def test_spoilt_json(model: str, content: str, originals: Path, tmp_path: Path) -> None:
    """Every file in turn. What no door reads does not matter."""
    folder = copied(originals, model, tmp_path)
    for file in JSONS:
        path = folder / file
        if not path.is_file():
            continue
        before = path.read_bytes()
        path.write_bytes(CONTENTS[content])
        said = refused(MODELS[model][1], folder)
        if file == "config.json":
            assert said and str(folder) in said, file
        path.write_bytes(before)
    for file in JSONS:  # with a byte-order mark
        if content == "empty" and (folder / file).is_file():
            before = (folder / file).read_bytes()
            (folder / file).write_bytes(b"\xef\xbb\xbf" + before)
            refused(MODELS[model][1], folder)
            (folder / file).write_bytes(before)


VALUES: list[Any] = [None, -1, 0, 1.5, "x", "", [], {}, True, [[1]], {"a": []}, 10**30, "\ud800"]
KEYS = {
    "config.json": (
        *("model_type", "method", "options", "vision_config", "text_config", "vision_feature_layer"),
        *("image_token_id", "image_token_index", "separator_token_id", "architectures", "dtype"),
        *("hidden_size", "num_hidden_layers", "vocab_size", "image_size", "projector_hidden_act"),
    ),
    "processor_config.json": ("image_processor", "processor_class", "patch_size", "image_token"),
    "tokenizer_config.json": ("tokenizer_class", "added_tokens_decoder", "eos_token", "chat_template"),
    "generation_config.json": ("eos_token_id", "max_length", "num_beams", "temperature"),
}


@pytest.mark.parametrize("file", KEYS)
@pytest.mark.parametrize("model", ["own", "llava", "LLM"])
def test_spoilt_values(model: str, file: str, originals: Path, tmp_path: Path) -> None:
    folder = copied(originals, model, tmp_path)
    path = folder / file
    if not path.is_file():
        return
    before = path.read_text()
    door: Door = MODELS[model][1]
    for key in KEYS[file]:
        for i, value in enumerate(VALUES):
            if (i + len(key)) % (2 if file == "config.json" and model != "LLM" else 7):
                continue  # others with other keys
            path.write_text(json.dumps({**json.loads(before), key: value}))
            refused(read_config if file == "config.json" and model != "LLM" else door, folder)
    path.write_text(before)


PARTS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "image_size", "patch_size")
PARTS += ("hidden_act", "model_type", "rope_parameters", "max_position_embeddings", "eos_token_id")


@pytest.mark.parametrize("part", ["vision_config", "text_config", "image_processor"])
@pytest.mark.parametrize("model", ["own", "llava"])
def test_spoilt_parts(model: str, part: str, originals: Path, tmp_path: Path) -> None:
    folder = copied(originals, model, tmp_path)
    path = folder / ("processor_config.json" if part == "image_processor" else "config.json")
    before = path.read_text()
    keys = (
        PARTS if part != "image_processor" else ("method", "options", "image_size", "patch_size", "image_std")
    )
    for key in keys:
        for i, value in enumerate((None, -1, 0, "x", [], {}, 1.5)):
            if (i + len(key)) % 4:
                continue
            values = json.loads(before)
            values[part] = {**values[part], key: value}
            path.write_text(json.dumps(values))
            refused(ask, folder)


INDICES: dict[str, Any] = {
    "no metadata": lambda places: {"weight_map": places},
    "metadata is a list": lambda places: {"metadata": [], "weight_map": places},
    "no weight_map": lambda places: {"metadata": {}},
    "weight_map is a list": lambda places: {"weight_map": [*places]},
    "weight_map is empty": lambda places: {"weight_map": {}},
    "a list": lambda places: [places],
    "a number": lambda places: 3,
    "numbers": lambda places: {"weight_map": dict.fromkeys(places, 3)},
    "a file that is not there": lambda places: {"weight_map": dict.fromkeys(places, "no.safetensors")},
    "an empty name": lambda places: {"weight_map": dict.fromkeys(places, "")},
    "a long name": lambda places: {"weight_map": dict.fromkeys(places, "n" * 5000)},
    "NUL": lambda places: {"weight_map": dict.fromkeys(places, "a\0b")},
    "a surrogate": lambda places: {"weight_map": dict.fromkeys(places, "\ud800")},
    "a key too many": lambda places: {"weight_map": {**places, "more": next(iter(places.values()))}},
}


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("model", MODELS)
def test_spoilt_indices(model: str, index: str, originals: Path, tmp_path: Path) -> None:
    from tests.core.test_strangers import sharded

    folder = copied(originals, model, tmp_path)
    places = sharded(folder)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(INDICES[index](places)))
    said = refused(MODELS[model][1], folder)
    assert said or index in ("no metadata", "metadata is a list", "a key too many")


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\xff" * 8, b"\x08" + b"\0" * 7 + b"{}      ", "cut", "text"]
)
@pytest.mark.parametrize("model", MODELS)
def test_spoilt_weights(model: str, content: bytes | str, originals: Path, tmp_path: Path) -> None:
    folder = copied(originals, model, tmp_path)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(content if isinstance(content, bytes) else whole[:-9] if content == "cut" else whole[9:])
    assert refused(MODELS[model][1], folder)


@pytest.mark.parametrize(
    "template", ["{{ messages", "{% for %}", "{{ 1 + 'a' }}", "{{ raise_exception('no') }}", b"\xff\xfe"]
)
@pytest.mark.parametrize("model", ["own", "llava"])
def test_spoilt_templates(model: str, template: bytes, originals: Path, tmp_path: Path) -> None:
    folder = copied(originals, model, tmp_path)
    (folder / "chat_template.jinja").write_bytes(
        template if isinstance(template, bytes) else template.encode()
    )
    assert "template" in refused(ask, folder)


NAMES = {
    "empty": "",
    "long": "n" * 300,
    "long parts": "/".join(["n" * 300] * 20),
    "long id": f"me/{'n' * 300}",
    "NUL": "a\0b",
    "surrogate": "a\ud800b",
    "surrogate in an id": "me/a\udcffb",
    "lines": "a\nb",
    "a device": "/dev/null",
    "a URL": "https://huggingface.co/me/model",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_no_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    given = NAMES[name]
    for door in (
        lambda: load(given, device="cpu"),
        lambda: VLM.load(given, "cpu"),
        lambda: compose(given, tiny_text(), tokenizer=tiny_tokenizer()),
        lambda: load(device="cpu", vision_tower=given),
    ):
        with pytest.raises(FoveateError) as raised:
            door()
        text = str(raised.value)
        assert text.isprintable() and len(text) < 600
        text.encode()


def test_names_that_are_none() -> None:
    for given in (5, b"folder", ["a"], 1.5):
        with pytest.raises(FoveateError, match="a model is given as a folder or as an id on the hub"):
            load(given)  # type: ignore[arg-type]


def test_the_command_line_ends_with_a_sentence(originals: Path, tmp_path: Path) -> None:
    folder = copied(originals, "own", tmp_path)
    picture(9, 9).save(tmp_path / "p.png")
    for file in ("config.json", "tokenizer.json", "processor_config.json", "model.safetensors"):
        (folder / file).write_bytes(b"[1")
        result = CliRunner().invoke(app, ["ask", str(tmp_path / "p.png"), "What?", "--model", str(folder)])
        assert isinstance(result.exception, FoveateError), (file, result.exception)
        shutil.copy(originals / "own" / file, folder / file)
