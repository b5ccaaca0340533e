"""`foveate inspect` as the tool to choose with: rows, reasons, marks, sizes without a picture, any VLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from foveate.methods import METHODS
from foveate.model.folders import CONFIGURATIONS, PATTERNS
from tests.command import Result, foveate
from tests.vlms import VLMS, write

TWELVE = ("inspect", "--size", "4000x3000")


def priced(*arguments: object) -> dict[str, Any]:
    result = foveate(*TWELVE, *arguments, "--json")
    assert result.code == 0, result.stderr
    return json.loads(result.stdout)


def refused(result: Result, *words: str) -> None:
    assert (result.code, result.stdout) == (2, ""), result
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


# Methods


def test_a_budget_gives_a_row_or_a_reason_for_every_method() -> None:
    value = priced("-o", "max_visual_tokens=1000")
    assert value["methods"].keys() | value["refused"].keys() == set(METHODS)
    assert value["refused"].keys() == {"anyres"}
    assert "at least 1026" in value["refused"]["anyres"]
    for name, row in value["methods"].items():
        assert row["over_budget"] == (row["visual_tokens"] > 1000) == (name == "chain_of_spot")
    assert value["methods"]["chain_of_spot"]["visual_tokens"] == 1152
    shown = foveate(*TWELVE, "-o", "max_visual_tokens=1000").stdout
    assert "1152 *" in shown and shown.count(" * ") == 1
    assert "Chain-of-Spot: more than max_visual_tokens 1000 in its 2 turns together" in shown
    assert "no row for anyres: AnyRes needs at least 1026 visual tokens" in shown


def test_without_a_budget_nothing_is_marked() -> None:
    value = priced("--method", "chain_of_spot")
    assert "over_budget" not in value["methods"]["chain_of_spot"]
    assert value["refused"] == {}


def test_whether_a_picture_is_shrunk() -> None:
    assert priced("--method", "llava")["methods"]["llava"]["shrunk"] is True
    small = foveate("inspect", "--size", "336x336", "--method", "llava", "--json")
    assert json.loads(small.stdout)["methods"]["llava"]["shrunk"] is False


def test_several_methods_and_options_for_one_of_them() -> None:
    both = ("--method", "slime", "--method", "anyres", "--method", "slime")
    value = priced(*both, "-o", "max_visual_tokens=1300", "-o", "slime.max_visual_tokens=700")
    assert [*value["methods"]] == ["slime", "anyres"]
    assert value["methods"]["slime"]["visual_tokens"] <= 700 < value["methods"]["anyres"]["visual_tokens"]
    assert priced("--method", "all")["methods"].keys() == set(METHODS)
    alone = priced("--method", "slime", "-o", "slime.max_visual_tokens=700")
    assert alone["methods"]["slime"] == value["methods"]["slime"]


def test_an_option_that_only_some_have() -> None:
    value = priced("-o", "gamma=0.5")
    assert [*value["methods"]] == ["slime"]
    assert value["refused"].keys() == METHODS.keys() - {"slime"}
    assert all("'gamma'" in reason for reason in value["refused"].values())
    wrong = priced("--method", "slime", "--method", "llava", "-o", "slime.gama=1")
    assert "did you mean 'gamma'" in wrong["refused"]["slime"] and [*wrong["methods"]] == ["llava"]


def test_reasons_stand_alone_where_no_method_fits() -> None:
    few = ("--method", "llava", "--method", "anyres", "-o", "max_visual_tokens=10")
    result = foveate(*TWELVE, *few)
    assert result.code == 2
    assert result.stdout.count("no row for") == 2 and "error: none of the 2 methods" in result.stderr
    value = json.loads(foveate(*TWELVE, *few, "--json").stdout)
    assert value["methods"] == {} and value["refused"].keys() == {"llava", "anyres"}
    refused(foveate(*TWELVE, "--method", "llava", "-o", "max_visual_tokens=10"), "at least 576")


def test_a_size_is_a_picture_of_that_size() -> None:
    picture = Path(__file__).parents[1] / "docs/images/street.png"
    seen = json.loads(foveate("inspect", picture, "--method", "anyres", "--json").stdout)
    assert seen == priced("--method", "anyres")
    for written in ("4000X3000", " 4000 x 3000 ", "4000\u00d73000"):
        assert foveate("inspect", "--size", written, "--method", "llava").code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--size", "0x10"), ("0x10", "no pixels")),
        (("--size", "4000x"), ("4000x3000",)),
        (("--size", "-4x3"), ("4000x3000",)),
        (("--size", "4e3x3"), ("4000x3000",)),
        (("--size", "9" * 5000 + "x1"), ("4000x3000",)),
        (("--size", "100000x100000"), ("max_pixels",)),
        (("--size", "20x20", "--max-pixels", "300"), ("max_pixels",)),
        (("--size", "20x20", "a.png"), ("--size",)),
        ((), ("--size",)),
        (("--size", "20x20", "--method", "llava", "--method", "clairvoyance"), ("clairvoyance",)),
        (("--size", "20x20", "--method", "all", "--method", "clairvoyance"), ("clairvoyance",)),
        (("--size", "20x20", "-o", "clairvoyance.a=1"), ("clairvoyance",)),
        (("--size", "20x20", "--method", "llava", "-o", "slime.gamma=1"), ("slime.gamma", "not among")),
        (("--size", "20x20", "-o", "gama=1"), ("gama", "'gamma' of slime")),
        (("--size", "20x20", "-o", "quux=1"), ("quux", "none of llava")),
        (("--size", "20x20", "--revision", "v2"), ("--model",)),
    ],
)
def test_wrong_input(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    refused(foveate("inspect", *arguments), *words)


# VLMs of transformers


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(VLMS["qwen3_vl"](), tmp_path_factory.mktemp("qwen"))


def test_a_vlm_by_its_configuration(qwen: Path) -> None:
    value = priced("--model", qwen, "-o", "max_visual_tokens=20")
    (row,) = value["methods"].values()
    assert (row["effective_width"], row["effective_height"]) == (84, 70)
    assert row["visual_tokens"] == 30 and row["over_budget"] and row["shrunk"]
    assert row["prefill_flops"] > row["decode_flops"] > 0 < row["kv_bytes"]
    shown = foveate(*TWELVE, "--model", qwen, "-o", "max_visual_tokens=20").stdout
    assert "the picture is shrunk to 84 x 70, 0.049 % of its pixels" in shown and "30 *" in shown
    small = foveate("inspect", "--size", "42x42", "--model", qwen).stdout
    assert "the picture is not shrunk" in small


def test_layouts_that_foveate_reads_are_priced_as_methods(tmp_path: Path) -> None:
    """LLaVA-NeXT is AnyRes; one whose options are unknown here is priced as transformers runs it."""
    folder = write(VLMS["llava_next"](), tmp_path)
    assert [*priced("--model", folder)["methods"]] == ["anyres"]
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps({**config, "projector_hidden_act": "silu", "multimodal_projector_bias": False})
    )
    (row,) = priced("--model", folder)["methods"].values()
    assert row["class"] == "LlavaNextForConditionalGeneration" and row["visual_tokens"] > 0


def test_llava_that_foveate_does_not_read(tmp_path: Path) -> None:
    folder = write(VLMS["llava_siglip"](), tmp_path)
    (row,) = priced("--model", folder)["methods"].values()
    assert row["visual_tokens"] == 16


def test_wrong_input_for_vlms(qwen: Path, tmp_path: Path) -> None:
    refused(foveate(*TWELVE, "--model", qwen, "--method", "llava"), "--method")
    refused(foveate(*TWELVE, "--model", qwen, "-o", "grids=[[2, 2]]"), "grids")
    refused(foveate(*TWELVE, "--model", qwen, "-o", "max_visual_tokens=0"), "max_visual_tokens")
    refused(foveate("inspect", "--size", "1x1000", "--model", qwen), "too narrow")
    refused(foveate("inspect", "--size", "130000000x1", "--model", qwen), "too narrow")
    refused(foveate(*TWELVE, "--model", tmp_path / "none"), "none")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    refused(foveate(*TWELVE, "--model", tmp_path), "gpt2")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl"}')
    refused(foveate(*TWELVE, "--model", tmp_path), "processor_config.json")
    (tmp_path / "config.json").write_text('{"model_type": ["qwen3_vl"]}')
    refused(foveate(*TWELVE, "--model", tmp_path), "qwen3_vl")


def test_a_hub_id_costs_no_weights(monkeypatch: pytest.MonkeyPatch, qwen: Path) -> None:
    asked = []

    def snapshot(name: str, *, allow_patterns: list[str], **rest: Any) -> str:
        asked.append((name, tuple(allow_patterns)))
        return str(qwen)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert foveate(*TWELVE, "--model", "Qwen/Qwen3-VL-4B-Instruct").code == 0
    assert asked == [("Qwen/Qwen3-VL-4B-Instruct", CONFIGURATIONS)]
    assert {"*.safetensors", "*.bin"} == {*PATTERNS} - {*CONFIGURATIONS}
