"""The command line: speed, wrong input, and what each command prints and writes."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

import foveate as library
from foveate.ask.live import Live, printable
from foveate.methods import METHODS
from foveate.tiny import tiny_tokenizer
from foveate.towers.vit import VisionTower
from tests import vlms
from tests.command import Result, foveate, on_a_terminal
from tests.support import picture

SCRIPT = Path(sys.executable).parent / "foveate"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny AnyRes model."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    assert foveate("compose", folder, "--tiny", "--method", "anyres").code == 0
    return folder


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    picture(90, 120).save(path)
    return path


@pytest.fixture
def twelve_megapixels(tmp_path: Path) -> Path:
    path = tmp_path / "large.jpg"
    Image.new("RGB", (4000, 3000), "teal").save(path)
    return path


def refused(result: Result, *words: str) -> None:
    """Exit code 2, nothing on stdout, one sentence on stderr that names what is wrong."""
    assert result.code == 2, result
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


def ask(*arguments: object) -> Result:
    return foveate("ask", *arguments, "--max-new-tokens", 3, "--device", "cpu", "--dtype", "float32")


# Speed


def test_help_is_instant() -> None:
    """Nothing heavy is loaded for it, counted in modules: seconds depend on what else the machine does."""
    code = (
        "import sys\nfrom foveate.cli import main\nsys.argv = ['foveate', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    print(*sys.modules)"
    )
    python = [sys.executable, "-c", code]
    *shown, loaded = subprocess.run(python, check=True, capture_output=True, text=True).stdout.splitlines()
    assert any("inspect" in line for line in shown)
    assert not {"torch", "transformers", "numpy", "PIL"} & {*loaded.split()}
    assert len(loaded.split()) < 500


@pytest.mark.parametrize("command", ["ask", "chat", "inspect", "compose", "convert", "train"])
def test_help_of_each_command(command: str) -> None:
    result = foveate(command, "--help")
    assert result.code == 0
    assert f"foveate {command}" in result.stdout


def test_python_m_and_script_are_the_same_command() -> None:
    module = subprocess.run(
        [sys.executable, "-m", "foveate", "ask", "none.png", "Why?", "--model", "none"],
        capture_output=True,
        text=True,
        check=False,
    )
    refused(Result(module.returncode, module.stdout, module.stderr), "none.png")


# ask, chat, inspect


def test_ask_answers_every_question(photo: Path, model: Path) -> None:
    result = ask(photo, "What is it?", "And where?", "--model", model)
    assert result.code == 0, result.stderr
    first, second = result.stdout.index("What is it?"), result.stdout.index("And where?")
    assert first < second
    assert result.stdout.count("visual tokens") == 2


def test_ask_encodes_a_picture_once(photo: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    encode = VisionTower.forward

    def counted(self: VisionTower, pixel_values: Tensor) -> Tensor:
        if not pixel_values.is_meta:  # the ledger's prices are counted on a model without weights
            seen.append(len(pixel_values))
        return encode(self, pixel_values)

    monkeypatch.setattr(VisionTower, "forward", counted)
    result = ask(photo, "What is it?", "And where?", "Since when?", "--model", model, "--json")
    ledgers = [answer["ledger"] for answer in json.loads(result.stdout)]
    assert seen == [ledgers[0]["views"]]
    assert [ledger["encoded_views"] for ledger in ledgers] == [ledgers[0]["views"], 0, 0]


def test_ask_prints_json(photo: Path, model: Path) -> None:
    result = ask(photo, "What is it?", "--model", model, "--json")
    answer = json.loads(result.stdout)
    expected = library.load(model, device="cpu", dtype="float32").ask(photo, "What is it?", max_new_tokens=3)
    assert answer["answer"] == expected.text
    assert answer["question"] == "What is it?"
    assert answer["regions"][0] == [0, 0, 120, 90]
    assert answer["ledger"]["visual_tokens"] == expected.ledger.visual_tokens


def test_ask_draws(photo: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "seen.png"
    assert ask(photo, "What is it?", "--model", model, "--out", out).code == 0
    with Image.open(out) as drawing:
        drawing.load()
        assert drawing.width > 600
        assert len(drawing.convert("RGB").getcolors(1 << 24) or []) > 100
    assert ask(photo, "What?", "Where?", "--model", model, "--out", out.with_name("two.jpg")).code == 0
    assert {p.name for p in tmp_path.glob("two*")} == {"two-1.jpg", "two-2.jpg"}


def test_options_of_the_method_reach_it(photo: Path, model: Path) -> None:
    result = ask(photo, "What is it?", "--model", model, "--json", "-o", "max_visual_tokens=50")
    assert json.loads(result.stdout)["ledger"]["visual_tokens"] <= 50


def test_chat_talks_until_an_empty_line(photo: Path, model: Path) -> None:
    arguments = ("chat", photo, "--model", model, "--max-new-tokens", 3)
    result = foveate(*arguments, stdin="What is it?\nAnd where?\n\nNever asked\n")
    assert result.code == 0, result.stderr
    assert result.stdout.count("visual tokens") == 2
    assert "(0 encoded now)" in result.stdout
    until_end_of_input = foveate(*arguments, stdin="What is it?\n")
    assert until_end_of_input.code == 0
    assert until_end_of_input.stdout.count("visual tokens") == 1


# On a terminal


@pytest.mark.parametrize("method", ["anyres", "chain_of_spot"])
def test_a_terminal_gets_what_a_pipe_gets(method: str, photo: Path, tmp_path: Path) -> None:
    """The answer once, then the rest; steps on the way to it are not shown."""
    model = tmp_path / "model"
    assert foveate("compose", model, "--tiny", "--method", method).code == 0
    arguments = ("ask", photo, "What is it?", "And where?", "--model", model, "--max-new-tokens", 8)
    code, shown = on_a_terminal(*arguments)
    assert code == 0
    assert _timeless(shown) == _timeless(foveate(*arguments).stdout)
    code, shown = on_a_terminal(*arguments, "--json")
    assert [answer["question"] for answer in json.loads(shown)] == ["What is it?", "And where?"]


def test_the_answer_appears_while_it_is_written(
    photo: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    plain, ended = Live.on_finalized_text, library.ask.foveate.Foveate.ask

    def noted(self: Live, text: str, stream_end: bool = False) -> None:
        events.append("end" if stream_end else "text")
        plain(self, text, stream_end)

    def ask_and_note(self: Any, *arguments: Any, **more: Any) -> Any:
        answer = ended(self, *arguments, **more)
        events.append("answer")
        return answer

    monkeypatch.setattr(Live, "on_finalized_text", noted)
    monkeypatch.setattr(library.ask.foveate.Foveate, "ask", ask_and_note)
    arguments = ("ask", photo, "What is it?", "--model", model, "--max-new-tokens", 8)
    assert foveate(*arguments).code == 0
    assert events == ["answer"]  # nothing is streamed into a pipe
    events.clear()
    assert on_a_terminal(*arguments)[0] == 0
    assert events.index("text") < events.index("end") < events.index("answer")


def test_chat_on_a_terminal(photo: Path, model: Path) -> None:
    arguments = ("chat", photo, "--model", model, "--max-new-tokens", 8)
    code, shown = on_a_terminal(*arguments, stdin="What is it?\n<image>\nAnd where?\n\n")
    assert code == 0
    talk = library.load(model).chat(photo)
    for question in ("What is it?", "And where?"):
        text = printable(talk.ask(question, max_new_tokens=8).text)
        assert shown.count(text) == 1
    assert shown.count("looked at the whole picture, in 4 tiles") == shown.count("visual tokens") == 2


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        ([" ", "a ", "b", "\n", "c", " \n"], "a b\nc\n"),
        (["\x1b[31m", "red"], "[31mred\n"),
        (["", " \n"], "(no text)\n"),
        ([":bus: [bold]"], ":bus: [bold]\n"),
    ],
)
def test_pieces_of_a_streamed_answer(pieces: list[str], shown: str) -> None:
    out = io.StringIO()
    live = Live(tiny_tokenizer(), Console(file=out))
    for piece in pieces:
        live.on_finalized_text(piece)
    live.close("".join(pieces).strip())
    assert out.getvalue() == shown


def test_an_answer_that_is_not_what_was_streamed_is_shown() -> None:
    out = io.StringIO()
    live = Live(tiny_tokenizer(), Console(file=out))
    live.on_finalized_text("box: 1 2", True)
    live.close("a bus")
    assert out.getvalue() == "box: 1 2\na bus\n"


def test_models_that_search_by_beams_are_not_streamed(photo: Path, model: Path, tmp_path: Path) -> None:
    copy = copied(model, tmp_path)
    change_json(copy / "generation_config.json", num_beams=2)
    code, shown = on_a_terminal("ask", photo, "What is it?", "--model", copy, "--max-new-tokens", 8)
    assert code == 0 and shown.count("visual tokens") == 1
    talked = foveate("chat", photo, "--model", copy, "--max-new-tokens", 8, stdin="What is it?\n")
    assert talked.code == 0 and talked.stdout.count("visual tokens") == 1


def _timeless(text: str) -> str:
    return re.sub(r"\d+\.\d\d s\b", "", text)


# Where it looked


def test_where_a_method_looked(photo: Path, model: Path, tmp_path: Path) -> None:
    """Chosen regions are listed, the views of a method that looks everywhere are counted."""
    assert "\nlooked at the whole picture, in 4 tiles\n" in ask(photo, "What?", "--model", model).stdout
    for method, said in (("llava", "the whole picture\n"), ("coroi", "[")):
        assert foveate("compose", tmp_path / method, "--tiny", "--method", method).code == 0
        assert f"\nlooked at {said}" in ask(photo, "What?", "--model", tmp_path / method).stdout


def test_inspect_a_twelve_megapixel_photograph(twelve_megapixels: Path) -> None:
    found = {}
    for method in ("llava", "anyres"):
        one = json.loads(foveate("inspect", twelve_megapixels, "--method", method, "--json").stdout)
        assert (one["width"], one["height"]) == (4000, 3000)
        assert one["methods"].keys() == {method}
        found |= one["methods"]
    assert found["llava"]["visual_tokens"] == 576
    assert found["llava"]["views"] == 1
    assert found["anyres"]["visual_tokens"] > 576


def test_inspect_turns_photographs_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (400, 300)).save(tmp_path / "turned.jpg", exif=exif)
    value = json.loads(foveate("inspect", tmp_path / "turned.jpg", "--method", "llava", "--json").stdout)
    assert (value["width"], value["height"]) == (300, 400)


def test_inspect_prices_a_model(photo: Path, model: Path) -> None:
    value = json.loads(foveate("inspect", photo, "--model", model, "--method", "anyres", "--json").stdout)
    asked = json.loads(ask(photo, "What is it?", "--model", model, "--json").stdout)
    assert value["methods"]["anyres"]["visual_tokens"] == asked["ledger"]["visual_tokens"]


# compose, convert


def test_convert_changes_no_answer(photo: Path, model: Path, tmp_path: Path) -> None:
    assert foveate("convert", model, tmp_path / "new").code == 0
    answers = [ask(photo, "What is it?", "--model", m, "--json") for m in (model, tmp_path / "new")]
    first, second = (json.loads(answer.stdout)["answer"] for answer in answers)
    assert first == second


def test_compose_joins_folders(tmp_path: Path, photo: Path) -> None:
    from tests.docs.stand_ins import clip_tower, language_model

    clip_tower(tmp_path / "tower")
    language_model(tmp_path / "lm")
    parts = ("--vision", tmp_path / "tower", "--text", tmp_path / "lm")
    assert foveate("compose", tmp_path / "new", *parts).code == 0
    assert ask(photo, "What is it?", "--model", tmp_path / "new").code == 0


# Wrong input


@pytest.mark.parametrize("command", ["ask", "chat", "inspect"])
@pytest.mark.parametrize("kind", ["missing", "broken", "text", "empty", "folder"])
def test_pictures_that_are_none(command: str, kind: str, tmp_path: Path, photo: Path, model: Path) -> None:
    bad = tmp_path / "bad.png"
    if kind == "broken":
        bad.write_bytes(photo.read_bytes()[:200])
    elif kind == "text":
        bad.write_text("not a picture")
    elif kind == "empty":
        bad.touch()
    elif kind == "folder":
        bad.mkdir()
    if (command, kind) == ("inspect", "broken"):
        bad.write_bytes(photo.read_bytes()[:20])  # it reads no more than the header
    questions = ["What is it?"] if command == "ask" else []
    models = [] if command == "inspect" else ["--model", model]
    refused(foveate(command, bad, *questions, *models), str(bad))


@pytest.mark.parametrize("question", ["", "  \n"])
def test_empty_question(question: str, photo: Path, model: Path) -> None:
    refused(ask(photo, "What is it?", question, "--model", model), "question is empty")


def test_model_that_is_none(photo: Path, tmp_path: Path, model: Path) -> None:
    refused(ask(photo, "Why?", "--model", tmp_path / "nowhere"), str(tmp_path / "nowhere"))
    refused(ask(photo, "Why?", "--model", tmp_path), "config.json")
    refused(ask(photo, "Why?", "--model", model / "config.json"), "config.json")
    (tmp_path / "config.json").write_text("{broken")
    refused(ask(photo, "Why?", "--model", tmp_path), "config.json", "JSON")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    refused(ask(photo, "Why?", "--model", tmp_path), "gpt2", "layout")


def copied(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder / "copy"))


def test_model_without_weights(photo: Path, tmp_path: Path, model: Path) -> None:
    copy = copied(model, tmp_path)
    (copy / "model.safetensors").unlink()
    refused(ask(photo, "Why?", "--model", copy), "no weights")
    refused(foveate("convert", copy, tmp_path / "new"), "no weights")
    assert not (tmp_path / "new").exists()


def test_model_with_missing_and_unexpected_keys(photo: Path, tmp_path: Path, model: Path) -> None:
    copy = copied(model, tmp_path)
    tensors = load_file(copy / "model.safetensors")
    key = "connector.projector.0.weight"
    save_file(
        {name: t for name, t in tensors.items() if name != key}, copy / "model.safetensors", {"format": "pt"}
    )
    refused(ask(photo, "Why?", "--model", copy), "lacks", key)
    save_file(
        {**tensors, "connector.other": tensors[key].clone()}, copy / "model.safetensors", {"format": "pt"}
    )
    refused(ask(photo, "Why?", "--model", copy), "unexpected", "connector.other")
    save_file({**tensors, key: tensors[key][:3].clone()}, copy / "model.safetensors", {"format": "pt"})
    refused(ask(photo, "Why?", "--model", copy), key)
    (copy / "model.safetensors").write_bytes(b"not a tensor")
    refused(ask(photo, "Why?", "--model", copy), "model.safetensors")


def test_options_that_are_none(photo: Path, tmp_path: Path, model: Path) -> None:
    refused(ask(photo, "Why?", "--model", model, "-o", "grid=1"), "grid", "grids")
    refused(ask(photo, "Why?", "--model", model, "-o", "grids"), "key=value")
    refused(ask(photo, "Why?", "--model", model, "-o", "grids=[[0, 1]]"), "grids")
    refused(ask(photo, "Why?", "--model", model, "-o", "max_visual_tokens=3"), "max_visual_tokens")
    refused(foveate("inspect", photo, "-o", "sharpness=2"), "sharpness")
    refused(foveate("compose", tmp_path / "new", "--tiny", "-o", "fit=stretch"), "fit", "pad")
    assert not (tmp_path / "new").exists()


def test_method_template_device_and_dtype_that_are_none(photo: Path, tmp_path: Path, model: Path) -> None:
    refused(foveate("inspect", photo, "--method", "clairvoyance"), "clairvoyance", "llava")
    refused(foveate("compose", tmp_path / "new", "--tiny", "--method", "clairvoyance"), "clairvoyance")
    refused(foveate("compose", tmp_path / "new", "--tiny", "--template", "runes"), "runes", "vicuna_v1")
    refused(ask(photo, "Why?", "--model", model, "--template", "runes"), "runes")
    refused(foveate("ask", photo, "Why?", "--model", model, "--device", "abacus"), "abacus")
    refused(foveate("ask", photo, "Why?", "--model", model, "--dtype", "float7"), "float7", "float32")
    assert not (tmp_path / "new").exists()


OTHERWISE = {
    "llava_hr": "blocks=[1]",
    "slime": "gamma=0.5",
    "coroi": "chain=true",
    "inf_llava": "low_view=none",
}


@pytest.mark.parametrize("method", METHODS)
def test_tiny_is_tiny_for_every_method(method: str, tmp_path: Path, photo: Path) -> None:
    """README: it makes a model of tiny random parts, to try commands with any method."""
    other = OTHERWISE.get(method)
    for given in ([], ["-o", other]) if other else ([],):
        out = tmp_path / f"model{len(given)}"
        result = foveate("compose", out, "--tiny", "--method", method, *given)
        assert result.code == 0, result.stderr
        assert sum(file.stat().st_size for file in out.iterdir()) < 1_000_000
    assert ask(photo, "What is it?", "--model", out).code == 0


def test_compose_without_parts(tmp_path: Path) -> None:
    for parts in (
        [],
        ["--vision", "x"],
        ["--tiny", "--vision", "x", "--text", "y"],
        ["--tiny", "--text", "y"],
    ):
        refused(foveate("compose", tmp_path / "new", *parts), "--tiny")
    assert not (tmp_path / "new").exists()


def test_out_that_cannot_be_written(photo: Path, tmp_path: Path, model: Path) -> None:
    refused(
        ask(photo, "Why?", "--model", model, "--out", tmp_path / "none" / "a.png"), str(tmp_path / "none")
    )
    refused(ask(photo, "Why?", "--model", model, "--out", tmp_path / "seen.docx"), "seen.docx", ".png")
    (tmp_path / "folder.png").mkdir()
    refused(ask(photo, "Why?", "--model", model, "--out", tmp_path / "folder.png"), "folder.png")
    assert {p.name for p in tmp_path.iterdir()} == {"photo.png", "folder.png"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_out_in_a_folder_without_permission(photo: Path, tmp_path: Path, model: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    refused(ask(photo, "Why?", "--model", model, "--out", closed / "a.png"), "a.png")
    refused(foveate("compose", closed / "new", "--tiny"), "new")


def test_out_below_a_file(tmp_path: Path, model: Path) -> None:
    (tmp_path / "file").touch()
    refused(foveate("compose", tmp_path / "file" / "new", "--tiny"), "file")
    refused(foveate("convert", model, tmp_path / "file" / "new"), "file")


@pytest.mark.parametrize("command", ["compose", "convert"])
def test_existing_folders_stay_as_they_are(command: str, tmp_path: Path, model: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (there / "thesis.tex").write_text("mine")
    arguments = ["--tiny"] if command == "compose" else []
    given = [model] if command == "convert" else []
    refused(foveate(command, *given, there, *arguments), str(there), "exists")
    refused(foveate(command, *given, there / "thesis.tex", *arguments), "exists")
    assert [p.name for p in there.iterdir()] == ["thesis.tex"]
    assert (there / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("arguments", [["ask"], ["ask", "a.png"], ["see"], ["inspect", "a", "--fast"]])
def test_usage_errors(arguments: list[str]) -> None:
    """Missing arguments, unknown commands and flags: typer's own message, the same exit code."""
    result = foveate(*arguments)
    assert result.code == 2
    assert "Usage: foveate" in result.stderr
    assert "Traceback" not in result.stderr


def change_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda f: (f / "processor_config.json").unlink(), ["processor_config.json", "missing"]),
        (lambda f: (f / "processor_config.json").write_text("{"), ["processor_config.json", "JSON"]),
        (lambda f: (f / "tokenizer.json").unlink(), ["tokenizer"]),
        (lambda f: (f / "tokenizer.json").write_text("{}"), ["tokenizer"]),
        (lambda f: (f / "chat_template.jinja").unlink(), ["chat_template"]),
        (lambda f: (f / "chat_template.jinja").write_text("{% for"), ["chat template"]),
        (lambda f: change_json(f / "config.json", options=[1]), ["config.json", "options"]),
        (lambda f: change_json(f / "config.json", text_config="x"), ["config.json", "text_config"]),
        (lambda f: change_json(f / "config.json", method=None), ["config.json", "method"]),
        (lambda f: change_json(f / "config.json", image_token_id=999_999), ["config.json", "vocabulary"]),
        (lambda f: change_json(f / "config.json", vision_feature_layer="x"), ["vision_feature_layer"]),
    ],
)
def test_broken_model_folders(
    model: Path, photo: Path, tmp_path: Path, break_it: Callable[[Path], object], words: list[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    break_it(broken)
    refused(ask(photo, "Why?", "--model", broken), *words)


def test_a_placeholder_in_the_question(model: Path, photo: Path) -> None:
    refused(ask(photo, "What is <image> here?", "--model", model), "<image>", "question")
    result = foveate("chat", photo, "--model", model, "--max-new-tokens", 2, stdin="<image>\nWhy?\n\n")
    assert result.code == 0
    assert "leave it out" in result.stdout and "visual tokens" in result.stdout


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("stages.pretrain.lr=nan", ["lr", "number"]),
        ("stages.pretrain.lr=.inf", ["lr", "number"]),
        ("seed=-1", ["seed"]),
        ("output=photo.png/x", ["output", "photo.png"]),
    ],
)
def test_wrong_changes_of_a_recipe_write_nothing(
    photo: Path, monkeypatch: pytest.MonkeyPatch, change: str, words: list[str]
) -> None:
    monkeypatch.chdir(photo.parent)
    before = sorted(photo.parent.rglob("*"))
    refused(foveate("train", "tiny", "output=run", change), *words)
    assert sorted(photo.parent.rglob("*")) == before


def test_a_tower_for_a_model_that_has_one(model: Path, photo: Path, tmp_path: Path) -> None:
    refused(ask(photo, "Why?", "--model", model, "--vision-tower", tmp_path), "vision tower")


# Boundaries: whatever is given ends in a sentence


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ask", "{photo}", "half \udc80 of a pair"], "the question is not text at character 5"),
        (["ask", "{photo}", "What?", "--out", "x" * 300 + ".png"], "File name too long"),
        (["ask", "{photo}", "What?", "-o", "fit=2024-99-99", "--model", "{model}"], "unknown key 'fit'"),
        (["lab", "show", "x.png", "--seed", "-1"], "Invalid value for '--seed'"),
        (["lab", "show", "x.png", "--seed", "9" * 30], "Invalid value for '--seed'"),
        (["inspect", "{photo}", "--text-tokens", "9" * 30], "Invalid value for '--text-tokens'"),
        (["train", "tiny", "output=" + "x" * 300], "File name too long"),
    ],
)
def test_odd_values_end_in_a_sentence(
    arguments: list[str],
    words: str,
    photo: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = foveate(*(argument.format(photo=photo, model=model) for argument in arguments))
    assert result.code == 2 and "Traceback" not in result.stderr
    assert words in " ".join(result.stderr.replace("│", " ").split()), result.stderr


@pytest.mark.parametrize("command", ["ask", "inspect"])
def test_pictures_by_url_and_their_bounds(
    command: str, photo: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda self, *_: asked.append(self.path))
    rest = {"ask": ["What?", "--model", model, "--max-new-tokens", 1], "inspect": ["--method", "llava"]}[
        command
    ]
    size = Image.open(photo).size
    with HTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=photo.parent)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/{photo.name}"
        refused(foveate(command, url, *rest), "not a public address", "--allow-private")
        found = foveate(command, url, *rest, "--allow-private")
        assert found.code == 0, found.stderr
        assert asked == [f"/{photo.name}"]  # fetched once
        assert foveate(command, photo.as_uri(), *rest).code == 0
        refused(foveate(command, f"{url}.gone", *rest, "--allow-private"), "404 Not Found")
        server.shutdown()
    pixels = size[0] * size[1]
    refused(
        foveate(command, photo, *rest, "--max-pixels", pixels - 1), f"max_pixels {pixels - 1}", "--max-pixels"
    )
    assert foveate(command, photo, *rest, "--max-pixels", pixels).code == 0


def test_any_vlm_answers_with_and_without_a_closer_look(photo: Path, tmp_path: Path) -> None:
    """One that Foveate does not read; and options that only its own models have."""
    folder = tmp_path / "vlm"
    made = vlms.gemma3()
    made.model.save_pretrained(vlms.write(made, folder))
    plain = json.loads(ask(photo, "Why?", "--model", folder, "--json").stdout)
    assert plain["regions"] == [] and plain["zoomed"] is None and 0 < plain["confidence"] <= 1
    drawing = tmp_path / "seen.png"
    closer = ask(photo, "Why?", "--model", folder, "--zoom", "relevance", "--out", drawing)
    assert closer.code == 0 and "looked closer at [" in closer.stdout and drawing.exists()
    refused(
        ask(photo, "Why?", "--model", folder, "-o", "grids=[[1, 1]]"), "--option is for models that Foveate"
    )
    refused(
        ask(photo, "Why?", "--zoom", "answer", "--method", "llava"), "--method is for models that Foveate"
    )
