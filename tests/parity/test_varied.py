"""The golden runner on cases that were made here: other names, sizes and counts, and wrong tensors."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from foveate.model.checkpoints import read_tensors
from tests.conftest import ROOT
from tests.measuring import Measured, Measures, summarise
from tests.parity.golden import FAMILIES, Case, cases, check, kind
from tests.parity.varied.making import Made, Maker
from tests.parity.varied.slime import below, formed, kept, mixed, mlp, similarities

MAKERS: dict[str, Maker] = {
    f"{prefix}_{kind}": maker
    for prefix in FAMILIES
    for kind, maker in import_module(f"tests.parity.varied.{prefix}").MAKERS.items()
}
KINDS = pytest.mark.parametrize(("name", "maker"), MAKERS.items(), ids=list(MAKERS))


def write(path: Path, made: Made) -> None:
    path.write_text(json.dumps(made.about), encoding="utf-8")
    if made.tensors:  # of its own memory each, as files hold them
        own = {key: tensor.clone().contiguous() for key, tensor in made.tensors.items()}
        save_file(own, path.with_suffix(".safetensors"))


def written(folder: Path, name: str, made: Made) -> Case:
    """The case as a file, found as the runner finds it."""
    write(folder / f"{name}.json", made)
    (case,) = cases(folder)
    return case


def checked(case: Case, measures: Measures | None = None) -> list[str]:
    """Runs the case's checker as the runner does; returns what it did not read."""
    noted = Measures() if measures is None else measures

    def measure(what: str, error: float, tolerance: float, wrong: str = "") -> None:
        noted.add(Measured(case.id, what, error, tolerance))
        assert error <= tolerance, f"{what} {wrong or error}"

    return check(case, measure)


@KINDS
@pytest.mark.parametrize("seed", [0, 1])
@torch.no_grad()
def test_other_sizes(name: str, maker: Maker, seed: int, tmp_path: Path) -> None:
    assert checked(written(tmp_path, f"{name}_{'bc'[seed]}", maker(seed))) == []


def spoilt(tensor: Tensor) -> Tensor:
    """With its last number changed."""
    wrong = tensor.flatten().clone()
    wrong[-1] = wrong[-1] + 0.01 if wrong.is_floating_point() else wrong[-1] ^ 1
    return wrong.view(tensor.shape)


@KINDS
@torch.no_grad()
def test_every_expected_tensor_is_compared(name: str, maker: Maker, tmp_path: Path) -> None:
    """One wrong number anywhere fails the case, and the table shows by how much."""
    made = maker(0)
    for key in (key for key in made.tensors if key.startswith(("out.", "paper_out."))):
        tensors, measures = {**made.tensors, key: spoilt(made.tensors[key])}, Measures()
        with pytest.raises(AssertionError):
            checked(written(tmp_path, name, Made(made.about, tensors)), measures)
        ((worst, _),) = measures.worst()
        assert worst.used > 1 and worst.error > 5e-3, key
        (row,) = (line for line in summarise(measures, {}) if line.startswith(name))
        assert f"{worst.error:.2e}" in row and worst.what in row


WRONG: dict[str, tuple[str | int, ...]] = {  # a number that a JSON expects
    "coroi_windows": ("table", 1, "windows", "2", "mean"),
    "coroi_layers": ("table", "12", "base3", 0),
    "coroi_positions": ("table", 0, "sequence_positions", 3),
    "coroi_crops": ("table", 0, "lr_box_xyxy", 2),
    "coroi_inject": ("rois", 1, "positions", 0),
    "coroi_chain": ("chains", 2, "chain", 1, "mean"),
    "slime_grid_table": ("rows", 5, "official", "resized", 0),
    "slime_router": ("kept_counts", "050"),
    "slime_connector": ("token_counts", "090_1"),
    "inf_dcm": ("not_divisible", "cases", 0, "extract_pixels_N_view_shapes", 2, 0),
    "cos_roi_from_regions": ("table", 1, "extended_clipped", 3),
    "cos_eval_roi": ("strings_to_crops", 0, "crop", 0, "size", 1),
    "cos_train_items": ("table", 1, "crop_size", 0),
}


@pytest.mark.parametrize(("name", "path"), WRONG.items(), ids=list(WRONG))
@torch.no_grad()
def test_wrong_numbers_of_a_json_are_reported(name: str, path: tuple[str | int, ...], tmp_path: Path) -> None:
    made = MAKERS[name](0)
    at: Any = made.about
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] += 1
    with pytest.raises(AssertionError):
        checked(written(tmp_path, name, made))


# Names.


@pytest.mark.parametrize(
    ("name", "stated", "found"),
    [
        ("slime_router_b", None, "router"),
        ("slime_router2", None, "router"),
        ("slime_b_router", None, "router"),
        ("b", "slime_router", "router"),
        ("slime_b", "slime_router", "router"),
        ("inf_dem_b_small", None, "dem_small"),
        ("inf_dem_n5", None, "dem"),
        ("llavahr_mr_adapter_b", None, "mr_adapter"),
        ("llavahr_mr_adapter_paper_b", None, "mr_adapter_paper"),
        ("slime_teapot", None, None),
    ],
)
def test_names(name: str, stated: str | None, found: str | None, tmp_path: Path) -> None:
    assert kind(written(tmp_path, name, Made({"name": stated}, {}))) == found


def test_tensors_of_a_json_that_was_renamed_alone(tmp_path: Path) -> None:
    made = MAKERS["slime_router"](0)
    case = written(
        tmp_path, "slime_router", Made({**made.about, "file": "slime_router.safetensors"}, made.tensors)
    )
    case.path.rename(tmp_path / "slime_router_b.json")
    (renamed,) = cases(tmp_path)
    assert renamed.id == "slime_router_b" and checked(renamed) == []


def test_a_case_without_anything_to_compare_fails(tmp_path: Path) -> None:
    made = MAKERS["slime_local_compressor"](0)
    given = {key: t for key, t in made.tensors.items() if not key.startswith("out.")}
    with pytest.raises(AssertionError, match="nothing of slime_local_compressor was compared"):
        checked(written(tmp_path, "slime_local_compressor", Made(made.about, given)))
    with pytest.raises(AssertionError, match="no checker in"):
        checked(written(tmp_path / "..", "slime_teapot", made))


def test_what_no_checker_reads_is_told(tmp_path: Path) -> None:
    made = MAKERS["inf_mha"](0)
    tensors = {**made.tensors, "out.steam": torch.zeros(2)}
    assert checked(written(tmp_path, "inf_mha", Made(made.about, tensors))) == ["out.steam"]


@pytest.mark.slow
def test_the_runner_s_table(tmp_path: Path) -> None:
    """Of a folder with a case that passes, one that is wrong in one number, and a file of no method."""
    for name in ("slime_router", "coroi_chain"):
        made = MAKERS[name](0)
        tensors = dict(made.tensors)
        if name == "coroi_chain":
            tensors["out.V_low"] = spoilt(tensors["out.V_low"])
        write(tmp_path / f"{name}_b.json", Made(made.about, {**tensors, "more": torch.zeros(1)}))
    write(tmp_path / "teapot.json", Made({}, {}))
    command = [sys.executable, "-m", "pytest", "tests/parity/test_golden.py", "--golden", str(tmp_path)]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = told.stdout.splitlines()
    assert told.returncode == 1, told.stdout + told.stderr
    assert any(line.startswith("coroi_chain_b") and "1.00e-02" in line for line in lines)
    assert any(line.startswith("slime_router_b") and "1e-05" in line for line in lines)
    assert "not compared, no checker reads it: more of slime_router_b" in lines
    assert any(line.startswith("not compared") and line.endswith(": teapot") for line in lines)


# Checkpoints: the golden ones, laid out otherwise.


def copied(golden: Path, folder: Path, drops: tuple[str, ...], **changes: Any) -> Path:
    """A golden checkpoint elsewhere, without some of its tensors and folders, its JSON changed."""
    folder.mkdir(parents=True)
    changed = {key: value for key, value in {**about(golden), **changes}.items() if value is not None}
    (folder / "expected.json").write_text(json.dumps(changed), encoding="utf-8")
    tensors = load_file(golden / "expected.safetensors")
    own = {key: tensor for key, tensor in tensors.items() if not key.startswith(drops)}
    save_file(own, folder / "expected.safetensors")
    for path in golden.iterdir():
        if not path.name.startswith(("expected.", *drops)):
            (folder / path.name).symlink_to(path)
    return folder


def laid_out(folder: Path, name: str, state: Mapping[str, Tensor], shards: int) -> None:
    """A folder of the checkpoint with other weights, in this number of files."""
    golden = (folder / name).resolve()
    (folder / name).unlink()
    (folder / name).mkdir()
    for path in golden.iterdir():
        if path.suffix not in (".bin", ".safetensors"):
            (folder / name / path.name).symlink_to(path)
    places = {key: f"model-{i % shards + 1}.safetensors" for i, key in enumerate(sorted(state))}
    for file in {*places.values()}:
        own = {key: state[key].clone().contiguous() for key in state if places[key] == file}
        save_file(own, folder / name / (file if shards > 1 else "model.safetensors"))
    if shards > 1:
        index = {"metadata": {}, "weight_map": places}
        (folder / name / "model.safetensors.index.json").write_text(json.dumps(index))


INSIDE = "model.vision_tower.vision_tower."
GOLDEN = ROOT.parent / "shared" / "golden" / "checkpoints"


@pytest.fixture
def golden() -> Path:
    """Always those beside the repository: --golden chooses what the runner takes."""
    if not GOLDEN.is_dir():
        pytest.skip("no golden checkpoints beside the repository")
    return GOLDEN


def about(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "expected.json").read_text(encoding="utf-8"))


@torch.no_grad()
def test_a_tower_inside_the_checkpoint_and_shards(golden: Path, tmp_path: Path) -> None:
    folder = copied(golden / "chain_of_spot", tmp_path / "deep" / "below" / "some_b", ("turn1.clip",))
    inside = {f"{INSIDE}{key}": tensor for key, tensor in read_tensors(folder / "clip_vit").items()}
    laid_out(folder, "checkpoint", read_tensors(folder / "checkpoint") | inside, 3)
    (case,) = cases(tmp_path)
    assert case.id == "cos-checkpoint-some_b" and checked(case) == []


@torch.no_grad()
def test_a_checkpoint_without_its_tower_and_first_stage(golden: Path, tmp_path: Path) -> None:
    folder = copied(golden / "inf_llava", tmp_path / "b", ("stage1",))
    state = read_tensors(folder / "checkpoint")
    laid_out(folder, "checkpoint", {k: t for k, t in state.items() if not k.startswith(INSIDE)}, 2)
    (case,) = cases(tmp_path)
    assert checked(case) == []


@torch.no_grad()
def test_a_low_side_above_its_floor(golden: Path, tmp_path: Path) -> None:
    """128 pixels are 4 times the ConvNeXt's stride: 56 pixels of the ViT, whatever lower floor there is."""
    sizes = {**about(golden / "llava_hr")["size_settings_to_apply"], "min_fast_size": 28}
    drops, changes = ("stage1", "text_only"), {"size_settings_to_apply": sizes, "stage_files": None}
    copied(golden / "llava_hr", tmp_path / "b", drops, **changes)
    (case,) = cases(tmp_path)
    assert checked(case) == []


COMPARED = (
    "image_uint8",
    "pixel_views",
    "input_ids",
    "vision_features",
    "visual_tokens",
    "kept_local_indices",
)


@torch.no_grad()
def test_other_heads_than_the_width_tells(golden: Path, tmp_path: Path) -> None:
    """What the authors' modules make of the golden features with four heads, the tower laid apart."""
    known, tensors, heads = about(golden / "slime"), load_file(golden / "slime" / "expected.safetensors"), 4
    sizes = {**known["size_settings_to_apply"], "resampler_heads": heads}
    drops = ("stage1", *(key for key in tensors if key not in COMPARED))
    changes = {"size_settings_to_apply": sizes, "stage_files": None}
    folder = copied(golden / "slime", tmp_path / "b", drops, **changes)
    state = read_tensors(folder / "checkpoint")
    projector, words = below(state, "model.mm_projector"), state["model.embed_tokens.weight"]
    features, ids = tensors["vision_features"], tensors["input_ids"][0]
    compressed = formed(features[1:], below(state, "model.sampler.post_qformer"), heads)
    columns, rows = known["input"]["grid_cols_rows"]
    side = math.isqrt(compressed.shape[1])
    local = mlp(compressed, projector).unflatten(1, (side, side)).unflatten(0, (rows, columns))
    local = local.transpose(1, 2).flatten(0, 3)  # (rows, columns, h, w, D) -> (n, D)
    scores = similarities(local, words[ids[ids >= 0]]).sum(1)
    chosen = kept(scores, known["gamma"], 1.0)
    comma = words[known["visual_block"]["separator_token_id"]]
    tokens = torch.cat([mixed(features[:1], projector, heads)[1][0], comma[None], local[chosen]])
    own = {key: tensors[key] for key in COMPARED} | {"visual_tokens": tokens, "kept_local_indices": chosen}
    save_file(own, folder / "expected.safetensors")
    apart = {key.removeprefix(INSIDE): t for key, t in state.items() if key.startswith(INSIDE)}
    laid_out(folder, "clip", apart, 1)
    laid_out(folder, "checkpoint", {k: t for k, t in state.items() if not k.startswith(INSIDE)}, 1)
    (case,) = cases(tmp_path)
    assert checked(case) == []
