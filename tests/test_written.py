"""One rule for values that people write, at every door: an option's type says what is meant."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

import foveate
from foveate import FoveateError, register_method
from foveate.lab.cell import Cell
from foveate.lab.cli import _options as lab_options
from foveate.lab.experiment import Experiment, StageSpec, Variant, read_experiment
from foveate.methods.llava import Llava, LlavaOptions
from foveate.options import build_options, merged
from foveate.tiny import tiny_model
from foveate.train.models import stage_options, typed
from foveate.train.recipe import Recipe, load_recipe, to_dict
from foveate.written import read_pairs
from tests.command import foveate as run
from tests.support import picture


@dataclass(frozen=True)
class Shape:
    depth: int = 1
    name: str = ""


@dataclass(frozen=True)
class KindsOptions(LlavaOptions):
    text: str = ""
    note: str | None = None
    whole: int = 0
    limit: int | None = 1
    rate: float = 0.0
    on: bool = False
    mode: Literal["no", "1e3", "null"] = "no"
    level: Literal[1, 2, "auto"] = 1
    sizes: tuple[tuple[int, int], ...] = ()
    layers: Literal["six", "on"] | tuple[int, ...] = "six"
    words: tuple[str, ...] = ()
    table: dict[str, float] = field(default_factory=dict)
    shape: Shape = field(default_factory=Shape)
    place: Shape | None = None


class Kinds(Llava):
    """Options of every type that an option may have."""

    title = "Kinds"
    Options = KindsOptions


# option, as it is typed, what it means; the same on the command line and in a file
SAME: list[tuple[str, str, Any]] = [
    ("text", "yes", "yes"),
    ("text", "no", "no"),
    ("text", "on", "on"),
    ("text", "true", "true"),
    ("text", "null", "null"),
    ("text", "~", "~"),
    ("text", "", ""),
    ("text", "1e3", "1e3"),
    ("text", "007", "007"),
    ("text", "1_000", "1_000"),
    ("text", "12:30", "12:30"),
    ("text", "2020-01-01", "2020-01-01"),
    ("text", "=", "="),
    ("text", "two words", "two words"),
    ("text", '"yes"', "yes"),
    ("text", "'Answer: yes'", "Answer: yes"),
    ("text", '"[sic]"', "[sic]"),
    ("text", r'"\nAnswer."', "\nAnswer."),
    ("text", '""', ""),
    ("note", "null", None),
    ("note", "~", None),
    ("note", "", None),
    ("note", '"null"', "null"),
    ("note", "none", "none"),
    ("note", "yes", "yes"),
    ("note", "3", "3"),
    ("whole", "3", 3),
    ("whole", "-3", -3),
    ("whole", "010", 10),
    ("whole", "0x10", 16),
    ("limit", "null", None),
    ("limit", "7", 7),
    ("rate", "1e-3", 0.001),
    ("rate", "1", 1.0),
    ("rate", ".5", 0.5),
    ("rate", "-2.5E+1", -25.0),
    ("on", "true", True),
    ("on", "False", False),
    ("mode", "no", "no"),
    ("mode", "1e3", "1e3"),
    ("mode", "null", "null"),
    ("level", "2", 2),
    ("level", "auto", "auto"),
    ("sizes", "[[1, 2], [3, 4]]", [[1, 2], [3, 4]]),
    ("sizes", "[]", []),
    ("layers", "[0, 2]", [0, 2]),
    ("layers", "on", "on"),
    ("words", "[yes, 1e3, null, 'a, b']", ["yes", "1e3", "null", "a, b"]),
    ("table", "{a: 1e-3, yes: 2}", {"a": 0.001, "yes": 2.0}),
    ("shape", "{depth: 2, name: yes}", {"depth": 2, "name": "yes"}),
    ("place", "{depth: 3}", {"depth": 3}),
    ("place", "null", None),
]
# What is special in YAML, and not on the command line, where nothing but brackets and quotes around all is.
TYPED: list[tuple[str, str, Any]] = [
    ("text", "Answer: yes", "Answer: yes"),
    ("text", "- yes", "- yes"),
    ("text", "two words, and more", "two words, and more"),
    ("text", "#1 of 2 # or 3", "#1 of 2 # or 3"),
    ("text", " with a blank", " with a blank"),
    ("text", "\nIn a line of its own.", "\nIn a line of its own."),
    ("text", "*", "*"),
    ("text", "!!int 3", "!!int 3"),
    ("text", '"a" or "b"', '"a" or "b"'),
    ("text", "'tis", "'tis"),
    ("text", "a=b", "a=b"),
    ("text", "a [b", "a [b"),
    ("rate", " 0.5 ", 0.5),
]
WRONG: list[tuple[str, str, str]] = [
    ("whole", "1e3", "whole: expected whole number, got '1e3'"),
    ("whole", "1_000", "whole: expected whole number, got '1_000'"),
    ("whole", "1:30", "whole: expected whole number, got '1:30'"),
    ("whole", "true", "whole: expected whole number, got 'true'"),
    ("whole", '"3"', "whole: expected whole number, got '3'"),
    ("whole", "", "whole: expected whole number, got nothing"),
    ("limit", "yes", "limit: expected whole number, got 'yes'"),
    ("rate", "fast", "rate: expected number, got 'fast'"),
    ("rate", ".inf", "rate: expected number, got '.inf'"),
    ("rate", "nan", "rate: expected number, got 'nan'"),
    ("rate", "true", "rate: expected number, got 'true'"),
    ("on", "yes", "on: expected true or false, got 'yes'"),
    ("on", "off", "on: expected true or false, got 'off'"),
    ("on", "1", "on: expected true or false, got '1'"),
    ("on", '"true"', "on: expected true or false, got 'true'"),
    ("on", "null", "on: expected true or false, got 'null'"),
    ("mode", "yes", "mode: 'yes' is not one of no, 1e3, null"),
    ("level", "3", "level: '3' is not one of 1, 2, auto"),
    ("sizes", "3", "sizes: expected a list, got '3'"),
    ("sizes", "[[1, yes]]", r"sizes[0][1]: expected whole number, got 'yes'"),
    ("table", "{a: yes}", "table.a: expected number, got 'yes'"),
    ("shape", "{depth: deep}", "shape: depth: expected whole number, got 'deep'"),
    ("shape", "{deep: 1}", "shape: unknown key 'deep'; did you mean 'depth'?"),
    (
        "text",
        "[sic]",
        "text: expected text, got ['sic']; put quotes around a text that starts with a bracket",
    ),
    ("text", "{a: b}", "text: expected text, got {'a': 'b'}; put quotes around"),
]
STAGES = "{only: {trains: [connector], lr: 1e-3, data: [{path: a.json}]}}"
Door = Callable[[str, str], Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("written")


@pytest.fixture(scope="module", autouse=True)
def kinds(folder: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(foveate.methods, "_registered", {})
        register_method("kinds", Kinds)
        tiny_model("kinds", {"shape": {"depth": 5}}).save(folder / "saved")
        yield


numbers = count()


def write(folder: Path, text: str) -> Path:
    path = folder / f"{next(numbers)}.yaml"
    path.write_text(text)
    return path


def recipe(options: str, stage: str = "{}") -> str:
    return (
        f"output: run\nmodel:\n  tiny: true\n  method: kinds\n  options:\n{options}\n"
        f"stages:\n  only: {{trains: [connector], lr: 1e-3, data: [{{path: a.json}}], options: {stage}}}\n"
    )


def of_recipe(read: Recipe, key: str) -> Any:
    """The value that the run is made of, which is also what its folder notes down."""
    made = typed(read)
    options = merged(KindsOptions, made.model.options, made.stages["only"].options)
    again = typed(build_options(Recipe, yaml.safe_load(yaml.safe_dump(to_dict(made))), "again"))
    assert merged(KindsOptions, again.model.options, again.stages["only"].options) == options
    built = stage_options(read.model, read.stages["only"].options)
    assert built == stage_options(made.model, made.stages["only"].options)
    build_options(KindsOptions, built, "options")
    return options[key]


def of_cell(variant: Variant, key: str) -> Any:
    cell = Cell.of(Experiment((variant,)), variant, 0)
    build_options(KindsOptions, cell.options, "options")
    return cell.options[key]


def command_line_doors(folder: Path) -> dict[str, Door]:
    base = write(folder, recipe("    fit: pad"))
    return {
        "lab run -o": lambda key, text: of_cell(
            Variant("kinds", options=lab_options([f"kinds.{key}={text}"])["kinds"]), key
        ),
        "train, model": lambda key, text: of_recipe(load_recipe(base, [f"model.options.{key}={text}"]), key),
        "train, stage": lambda key, text: of_recipe(
            load_recipe(base, [f"stages.only.options.{key}={text}"]), key
        ),
        "any -o": lambda key, text: build_and_give(read_pairs([f"{key}={text}"]), key),
    }


def build_and_give(options: dict[str, Any], key: str) -> Any:
    found = merged(KindsOptions, {}, options)
    build_options(KindsOptions, found, "options")
    return found[key]


def file_doors(folder: Path) -> dict[str, Door]:
    def experiment(key: str, text: str) -> Any:
        rows = f"variants:\n  - method: kinds\n    options:\n      {key}: {text}\n"
        return of_cell(read_experiment(write(folder, rows)).variants[0], key)

    def stage_of_experiment(key: str, text: str) -> Any:
        stage = f"      - part: 1\n        trains: [connector]\n        options:\n          {key}: {text}\n"
        rows = f"variants:\n  - method: kinds\n    stages:\n{stage}"
        variant = read_experiment(write(folder, rows)).variants[0]
        options = Cell.of(Experiment((variant,)), variant, 0).stages[0].options
        build_options(KindsOptions, options, "options")
        return options[key]

    return {
        "recipe": lambda key, text: of_recipe(load_recipe(write(folder, recipe(f"    {key}: {text}"))), key),
        "recipe, in braces": lambda key, text: of_recipe(
            load_recipe(write(folder, recipe("    fit: pad", f"{{{key}: {text}}}"))), key
        ),
        "experiment": experiment,
        "experiment, stage": stage_of_experiment,
    }


def same(found: Any, expected: Any) -> bool:
    """Equal, of the same type, and exactly that type: nothing of how it was written is left."""
    if isinstance(expected, dict):
        return (
            type(found) is dict
            and found.keys() == expected.keys()
            and all(type(key) is str and same(found[key], expected[key]) for key in found)
        )
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    return type(found) is type(expected) and found == expected


def test_the_same_everywhere(folder: Path) -> None:
    doors = {**command_line_doors(folder), **file_doors(folder)}
    assert len(doors) == 8
    for door, value in doors.items():
        for key, text, expected in SAME:
            found = value(key, text)
            assert same(found, expected), f"{door}: {key}={text} is {found!r}, not {expected!r}"


def test_as_it_was_typed_on_the_command_line(folder: Path) -> None:
    for door, value in command_line_doors(folder).items():
        for key, text, expected in TYPED:
            found = value(key, text)
            assert same(found, expected), f"{door}: {key}={text} is {found!r}, not {expected!r}"


def test_the_same_is_refused_everywhere(folder: Path) -> None:
    for door, value in {**command_line_doors(folder), **file_doors(folder)}.items():
        for key, text, problem in WRONG:
            with pytest.raises(FoveateError) as caught:
                value(key, text)
            assert problem in str(caught.value), f"{door}: {key}={text} says {caught.value}"


def test_brackets_are_lists_and_keys_or_wrong(folder: Path) -> None:
    for value in command_line_doors(folder).values():
        for text in ("[", "[1", "{a: b", "[a]b", "{a: 1, a: 2}"):
            with pytest.raises(FoveateError, match="the value is not valid YAML; put quotes around a text"):
                value("words", text)


def test_a_model_that_is_made_keeps_it(folder: Path) -> None:
    """`compose`, what it saves, and what `ask` and `load` change."""
    rounds: list[dict[str, tuple[str, Any]]] = []
    for key, text, expected in SAME + TYPED:
        free = next((r for r in rounds if key not in r), None)
        if free is None:
            rounds.append(free := {})
        free[key] = (text, expected)
    texts = next(r for r in rounds[::-1] if len(r) == 1)  # one round of many options, and one text
    for i, chosen in enumerate([rounds[0], rounds[1], texts]):
        words = [word for key, (text, _) in chosen.items() for word in ("-o", f"{key}={text}")]
        made = run("compose", folder / f"made{i}", "--tiny", "--method", "kinds", *words)
        assert made.code == 0, made.stderr
        loaded = foveate.load(folder / "saved", device="cpu", options=read_pairs(words[1::2]))
        for config in (
            json.loads((folder / f"made{i}" / "config.json").read_text())["options"],
            loaded.model.config.options,
            loaded.processor.image_processor.options,
        ):
            for key, (_, expected) in chosen.items():
                if key == "shape" and config is not None and "depth" not in expected:
                    continue
                assert same(config[key], expected), f"{key}: {config[key]!r}"


def test_an_option_within_an_option_is_changed_alone(folder: Path) -> None:
    loaded = foveate.load(folder / "saved", device="cpu", options=read_pairs(["shape={name: on}"]))
    assert loaded.model.config.options["shape"] == {"depth": 5, "name": "on"}
    assert loaded.model.method.options.shape == Shape(5, "on")


@pytest.mark.parametrize("command", ["ask", "chat", "inspect", "compose", "convert", "lab run", "train"])
def test_every_command_says_what_is_wrong(command: str, folder: Path) -> None:
    image = folder / "it.png"
    picture(6, 9).save(image)
    words = {
        "ask": ["ask", image, "Why?", "--model", folder / "saved", "-o", "on=yes"],
        "chat": ["chat", image, "--model", folder / "saved", "-o", "on=yes"],
        "inspect": ["inspect", image, "--model", folder / "saved", "-o", "on=yes"],
        "compose": ["compose", folder / "new", "--tiny", "--method", "kinds", "-o", "on=yes"],
        "convert": ["convert", folder / "saved", folder / "new", "-o", "on=yes"],
        "lab run": ["lab", "run", "--methods", "kinds", "-o", "kinds.on=yes", "--folder", folder / "lab"],
        "train": ["train", write(folder, recipe("    fit: pad")), "model.options.on=yes"],
    }[command]
    done = run(*words)
    assert done.code == 2
    assert "on: expected true or false, got 'yes'" in done.stderr


# Values whose types the file's own dataclasses say


def test_a_recipes_own_values(folder: Path) -> None:
    changes = [
        "output=1e3",
        "model.template=null",
        "stages.only.lr=1e-3",
        "stages.only.bf16=False",
        "stages.only.lrs={connector.projector: 1e-4, on: 2}",
        "stages.only.trains=[yes, connector]",
        "stages.only.steps=010",
        "stages.only.data.0.path=2020-01-01",
    ]
    read = load_recipe(write(folder, recipe("    fit: pad")), changes)
    stage = read.stages["only"]
    assert (read.output, read.model.template, stage.lr, stage.bf16) == ("1e3", None, 1e-3, False)
    assert (stage.lrs, stage.trains) == ({"connector.projector": 1e-4, "on": 2.0}, ["yes", "connector"])
    assert (stage.steps, stage.data[0].path) == (10, "2020-01-01")
    for change, problem in (
        ("stages.only.bf16=yes", "stages.only: bf16: expected true or false, got 'yes'"),
        ("stages.only.steps=1e3", "steps: expected whole number, got '1e3'"),
        ("output=", "output is empty: name the folder of the run"),
        ("stages.only.trains=connector", "trains: expected a list, got 'connector'"),
    ):
        with pytest.raises(FoveateError, match=problem.replace("[", r"\[")):
            load_recipe(write(folder, recipe("    fit: pad")), [change])


def test_an_experiments_own_values(folder: Path) -> None:
    text = "level: easy\nseeds: [0, 010]\nvariants:\n  - {method: llava, label: 1e3, told: false}\n"
    read = read_experiment(write(folder, text))
    assert (read.seeds, read.variants[0].label, read.variants[0].told) == ((0, 10), "1e3", False)
    with pytest.raises(FoveateError, match="told: expected true or false, got 'no'"):
        read_experiment(write(folder, text.replace("told: false", "told: no")))


def test_yaml_as_such(folder: Path) -> None:
    """Shared keys and tags are read as ever; a key that is given twice is an error."""
    text = recipe("    &a\n    <<: {fit: crop}\n    text: !!str 1\n    whole: !!int '3'")
    options = typed(load_recipe(write(folder, text))).model.options
    assert options == {"fit": "crop", "text": "1", "whole": 3}
    with pytest.raises(FoveateError, match="'fit' is given twice"):
        load_recipe(write(folder, recipe("    fit: crop\n    fit: pad")))


def test_values_of_python_are_taken_as_they_are() -> None:
    """A program's text is a text: nothing is guessed."""
    with pytest.raises(FoveateError, match="whole: expected whole number, got '3'"):
        tiny_model("kinds", {"whole": "3"})
    given = {"note": "null", "sizes": ((1, 2),)}
    assert merged(KindsOptions, {}, given) == given
    assert StageSpec(1.0, ("connector",), options=given).options == given
