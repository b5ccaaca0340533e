"""Recipes: those that come with Foveate are complete and say the truth; wrong ones are named."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from foveate import FoveateError
from foveate.methods import METHODS, method_class
from foveate.options import build_options, type_name
from foveate.shipped import find, shipped
from foveate.train.models import typed
from foveate.train.recipe import DataFile, Lora, ModelSpec, Recipe, Stage, difference, load_recipe, to_dict

RECIPES = [find("recipe", name) for name in shipped("recipe")]
TINY = find("recipe", "tiny")


def keys(node: yaml.Node, kind: Any) -> Iterator[tuple[type, str, int]]:
    """Every key of a recipe that is a field of a dataclass: class, name, line (0-based)."""
    kind = next(
        (arg for arg in typing.get_args(kind) if arg is not type(None)), kind
    )  # list[X], X | None -> X
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from keys(item, kind)
    elif isinstance(node, yaml.MappingNode) and dataclasses.is_dataclass(kind):
        types = typing.get_type_hints(kind)
        for key, value in node.value:
            yield kind, key.value, key.start_mark.line
            if key.value == "stages":
                for _, stage in value.value:
                    yield from keys(stage, Stage)
            else:
                yield from keys(value, types[key.value])


def expected_comment(kind: type, name: str) -> str:
    field = next(f for f in dataclasses.fields(kind) if f.name == name)
    words = type_name(typing.get_type_hints(kind)[name])
    if field.default_factory is not dataclasses.MISSING:
        return f"# {words}, default {field.default_factory()}: "
    if field.default is dataclasses.MISSING:
        return f"# {words}, required: "
    default = str(field.default)
    return (
        f"# {words}, default { {'None': 'null', 'True': 'true', 'False': 'false'}.get(default, default) }: "
    )


def comment_over(lines: list[str], number: int) -> str:
    """The first line of the block of comments over a line."""
    first = number
    while lines[first - 1].strip().startswith("#"):
        first -= 1
    return lines[first].strip()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_load(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.model.method == path.stem or path == TINY
    method = method_class(recipe.model.method or "")
    for name, stage in recipe.stages.items():
        build_options(method.Options, {**recipe.model.options, **stage.options}, name)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_key_has_its_type_and_default_over_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    node = yaml.compose(text)
    found = list(keys(node, Recipe))
    assert {"output", "path", "lr"} <= {name for _, name, _ in found}
    for kind, name, line in found:
        comment = comment_over(text.splitlines(), line)
        assert comment.startswith(expected_comment(kind, name)), f"{path.name} line {line + 1}: {comment}"
    for stage in next(value for key, value in node.value if key.value == "stages").value:
        comment = comment_over(text.splitlines(), stage[0].start_mark.line)
        assert comment.startswith("# keys and values, required: ")


def test_the_tiny_recipe_names_every_key() -> None:
    named = {(kind, name) for kind, name, _ in keys(yaml.compose(TINY.read_text()), Recipe)}
    every = {
        (kind, field.name)
        for kind in (Recipe, ModelSpec, Stage, DataFile, Lora)
        for field in dataclasses.fields(kind)
    }
    assert named == every


def test_every_baseline_has_a_recipe() -> None:
    assert {"llava", "anyres"} <= METHODS.keys() & {path.stem for path in RECIPES}


def test_llava_is_trained_as_published() -> None:
    """Values of scripts/v1_5/pretrain.sh and finetune.sh of haotian-liu/LLaVA."""
    pretrain, finetune = load_recipe("llava").stages.values()
    assert (pretrain.trains, finetune.trains) == (["connector"], ["connector", "language_model"])
    assert (pretrain.lr, finetune.lr) == (1e-3, 2e-5)
    assert (pretrain.batch, finetune.batch) == (256, 128)
    for stage in (pretrain, finetune):
        assert (stage.schedule, stage.warmup_ratio, stage.weight_decay) == ("cosine", 0.03, 0.0)
        assert (stage.epochs, stage.max_length, stage.bf16) == (1, 2048, True)
    assert (pretrain.group_by, finetune.group_by) == ("none", "modality")


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return path


SMALL = """
output: runs/x
model: {tiny: true, method: llava, options: {fit: pad}}
stages:
  pretrain: {trains: [connector], lr: 1e-3, data: [{path: a.json}, {path: b.json}]}
  finetune: {trains: [language_model], lr: 1e-3, lora: {on: [language_model]}, data: [{path: a.json}]}
"""


def test_changes_behind_the_recipe(tmp_path: Path) -> None:
    changes = [
        "stages.pretrain.lr=2e-4",
        "stages.pretrain.data.1.limit=5",
        "stages.finetune.lora.rank=4",
        "stages.finetune.options.fit=crop",
        "stages.pretrain.trains=[connector, vision_tower]",
        "model.template=chatml",
        "seed=3",
    ]
    recipe = load_recipe(write(tmp_path, SMALL), changes)
    pretrain, finetune = recipe.stages.values()
    assert pretrain.lr == 2e-4 and pretrain.data[1].limit == 5 and pretrain.data[0].limit is None
    assert pretrain.trains == ["connector", "vision_tower"]
    assert finetune.lora is not None and finetune.lora.rank == 4 and finetune.lora.on == ["language_model"]
    assert finetune.options == {"fit": "crop"}
    assert (recipe.seed, recipe.model.template) == (3, "chatml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sead=3", "unknown key 'sead'; did you mean 'seed'"),
        (
            "stages.pretrian.lr=1",
            "stages.pretrian.lr=1: unknown key 'pretrian' in stages; did you mean 'pretrain'",
        ),
        ("stages.pretrain.rl=1", "stages.pretrain: unknown key 'rl'; known: trains, data, lr"),
        ("stages.pretrain.epoch=1", "stages.pretrain: unknown key 'epoch'; did you mean 'epochs'"),
        ("stages.pretrain.data.2.limit=1", "stages.pretrain.data has 2 entries, 0 to 1"),
        ("stages.pretrain.data.x=1", "stages.pretrain.data has 2 entries"),
        ("stages.pretrain.lr.x=1", "stages.pretrain.lr has no keys of its own"),
        ("stages.pretrain.lr=fast", "stages.pretrain: lr: expected number, got 'fast'"),
        ("stages.pretrain.lr=0", "stages.pretrain: lr must be more than 0"),
        ("stages.pretrain.trains=[]", "stages.pretrain: 'trains' is empty: name at least one module"),
        ("stages.pretrain.trains=connector", "stages.pretrain: trains: expected a list, got 'connector'"),
        ("stages.pretrain.data=[]", "stages.pretrain: 'data' is empty"),
        ("stages.pretrain.schedule=step", "schedule: 'step' is not one of cosine, linear, constant"),
        ("stages.pretrain.warmup_ratio=1.5", "warmup_ratio must be at least 0 and below 1"),
        ("stages.pretrain.batch=20", "batch 20 is not a multiple of micro_batch 8"),
        ("stages.pretrain.steps=0", "steps must be at least 1"),
        ("stages.pretrain.workers=-1", "workers must not be negative"),
        ("stages.pretrain.data.0.repeat=0", "repeat must be more than 0"),
        ("stages.finetune.lora.on=[]", "'on' names no module"),
        ("stages={}", "'stages' is empty"),
        ("stages={a/b: {}}", "stages.a/b: 'trains' is missing"),
        ("model.load=x", "model: give one of load, vision with text, or tiny"),
        ("model={vision: x, method: llava}", "vision and text belong together"),
        ("model={tiny: true}", "'method' is missing"),
        ("model={tiny: true, method: x, vision_tower: y}", "vision_tower belongs to load"),
        ("model.dtype=float16", "'float16' is not one of float32, bfloat16"),
        ("stages.pretrain.lr=nan", "stages.pretrain: lr: expected number, got 'nan'"),
        ("stages.pretrain.lr=1e999", "stages.pretrain: lr: expected number, got inf"),
        ("stages.pretrain.lr=" + "9" * 5000, "stages.pretrain: lr: expected number, got '99"),
        ("stages.pretrain.batch=" + "9" * 5000, "stages.pretrain: batch: expected whole number, got '99"),
        ("stages.pretrain.batch=0", "batch must be more than 0, not 0"),
        ("stages.pretrain.steps=-1", "steps must be at least 1, not -1"),
        ("stages.pretrain.epochs=1e300", "epochs must be at most 1000000"),
        ("stages.pretrain.data.0.repeat=1e18", "repeat must be more than 0 and at most 1000000"),
        ("stages.pretrain.lrs={connector: -1}", "lrs: connector must be more than 0, not -1.0"),
        ("stages.finetune.lora.alpha=0", "alpha must be more than 0"),
        ("stages.pretrain.missing_pictures=skip", "missing_pictures: 'skip' is not one of refuse, leave_out"),
        ("stages.pretrain.data.².path=x", "stages.pretrain.data has 2 entries"),
        ("seed=-1", "seed must be at least 0"),
        ("seed=[!!timestamp 2024-99-99]", "the value is not valid YAML"),
        ("seed=[!!int x]", "the value is not valid YAML"),
        ("seed=" + "[" * 5000, "the value is not valid YAML"),
        ("model.options={a: &x {b: *x}}", "the value is not valid YAML"),
        ("output=\0", "output '.x00' is not the name of a folder"),
        ("seed", "seed: expected key=value"),
        ("seed=[", "the value is not valid YAML"),
    ],
)
def test_a_wrong_change_is_named(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(FoveateError, match=message.replace("[", r"\[")):
        load_recipe(write(tmp_path, SMALL), [change])


# Each list holds the one before it ten times.
LAUGHS = "a0: &a0 x\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "r.yaml line 1: "),
        ("- a", "should hold keys and values"),
        (SMALL + "output: y\n", "'output' is given twice"),
        (SMALL.replace("output: runs/x", ""), "r.yaml: 'output' is missing"),
        (SMALL.replace("pretrain:", "a/b:"), "stage 'a/b': use only letters"),
        (SMALL.encode("utf-16"), "r.yaml is not UTF-8 at byte 0: save it as UTF-8"),
        (SMALL.replace("1e-3", "!!float .nan"), "stages.pretrain: lr: expected number, got nan"),
        (SMALL.replace("1e-3", "!!int " + "9" * 5000), "r.yaml is not a YAML file"),
        (SMALL.replace("1e-3", "!!timestamp 2024-99-99"), "r.yaml is not a YAML file: month must be in"),
        ("{" * 5000, "r.yaml is not a YAML file: it is nested too deeply"),
        ("a: &a {b: *a}", "r.yaml is not a YAML file: it "),
        ("a: \0", "r.yaml is not a YAML file: unacceptable character"),
        (LAUGHS, "r.yaml is not a YAML file: it holds more than 100000 values"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FoveateError, match=message) as error:
        load_recipe(path)
    assert "\n" not in str(error.value)


def test_a_mixture_is_one_that_exists_and_changes_no_run(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, SMALL), ["mixture=llava"])
    assert difference(to_dict(load_recipe(write(tmp_path, SMALL))), to_dict(recipe)) is None
    with pytest.raises(FoveateError, match=r"no mixture at lava: .*: chain_of_spot, .*, slime$"):
        load_recipe(write(tmp_path, SMALL), ["mixture=lava"])


def test_a_mark_of_the_byte_order_changes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL)
    plain = load_recipe(path)
    path.write_bytes(b"\xef\xbb\xbf" + SMALL.encode())
    assert load_recipe(path) == plain


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match=r"no recipe at .*none\.yaml: give a YAML file, or"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(FoveateError, match=r"x{200} cannot be read: File name too long"):
        load_recipe("x" * 300)


def test_a_name_is_a_recipe_unless_a_file_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert load_recipe("tiny") == load_recipe(TINY)
    (tmp_path / "tiny").rmdir()
    (tmp_path / "tiny").write_text(SMALL)
    assert load_recipe("tiny").output == "runs/x"
    with pytest.raises(FoveateError, match=r"no recipe at slim: .*: anyres, chain_of_spot, .*, slime, tiny$"):
        load_recipe("slim")


def test_what_differs_between_recipes(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL)
    one = to_dict(load_recipe(path))
    assert difference(one, to_dict(load_recipe(path, ["stages.pretrain.save_steps=7", "output=y"]))) is None
    assert difference(one, to_dict(load_recipe(path, ["stages.pretrain.batch=16"]))) == (
        "stages.pretrain.batch was 128 and is now 16"
    )
    before = {**one, "model": {key: value for key, value in one["model"].items() if key != "max_positions"}}
    assert difference(before, one) is None  # of a run that was begun before there was such a key
    assert difference(before, to_dict(load_recipe(path, ["model.max_positions=9000"]))) == (
        "model.max_positions was None and is now 9000"
    )
    changed = difference(one, to_dict(load_recipe(path, ["stages.pretrain.options.fit=crop"])))
    assert changed is not None and "stages.pretrain.options" in changed


def test_reading_a_recipe_needs_no_torch() -> None:
    code = (
        "import sys; from foveate.train.recipe import load_recipe; load_recipe(sys.argv[1]); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(TINY)]).returncode == 0


def test_coroi_is_trained_as_published() -> None:
    """Sections 3.3 and 4.1."""
    recipe = typed(load_recipe("coroi"))
    pretrain, finetune = recipe.stages.values()
    assert (pretrain.trains, finetune.trains) == (["connector.projector"], ["connector", "language_model"])
    assert (pretrain.options, finetune.options) == ({"chain": False}, {})
    assert (pretrain.lr, finetune.lr) == (1e-3, 2e-5)
    for one in (pretrain, finetune):
        assert (one.batch, one.epochs, one.schedule, one.warmup_ratio, one.weight_decay) == (
            128,
            1,
            "cosine",
            0.03,
            0,
        )
    named = " ".join(source.path for source in [*pretrain.data, *finetune.data]).lower()
    for data in (
        "558k",
        "allava-caption",
        "665k_without_textcaps",
        "sharegpt4v",
        "laion_gpt4v",
        "docvqa",
        "ai2d",
    ):
        assert data in named
    large = load_recipe(
        "coroi",
        ["model.text=NousResearch/Nous-Hermes-2-Yi-34B", "model.template=chatml", "stages.finetune.lr=1e-5"],
    )
    assert large.stages["finetune"].lr == 1e-5
