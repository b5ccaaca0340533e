"""Methods of other packages, and those registered by hand, are known everywhere like Foveate's own."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForImageTextToText

import foveate
from foveate import FoveateError, register_method
from foveate.data.toy import write_toy_data
from foveate.lab.parts import prepare
from foveate.lab.scales import SCALES
from foveate.methods import METHODS, method_class, method_names, usable_methods
from foveate.methods.base import Method, MethodOptions
from foveate.methods.llava import Llava
from foveate.shipped import find
from foveate.tiny import tiny_model
from tests.command import foveate as run
from tests.docs.blocks import ROOT, blocks_of
from tests.lab.conftest import NANO
from tests.support import picture

CODE = next(b.text for b in blocks_of("docs/methods/adding.md") if b.title == "quarters/foveate_quarters.py")
Install = Callable[..., Path]


def write_package(folder: Path, name: str, code: str, **methods: str) -> Path:
    """A package as pip leaves it in a folder: one module, and its metadata with entry points."""
    module = name.replace("-", "_")
    metadata = folder / f"{module}-0.1.dist-info"
    metadata.mkdir(parents=True)
    (folder / f"{module}.py").write_text(textwrap.dedent(code))
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    lines = [f"{method} = {place}" for method, place in methods.items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[foveate.methods]", *lines, ""]))
    return folder


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Writes a package where Python finds it, until the test ends."""
    before = {*sys.modules}

    def put(name: str, code: str, **methods: str) -> Path:
        folder = write_package(tmp_path / "site" / name, name, code, **methods)
        monkeypatch.syspath_prepend(folder)
        return folder

    monkeypatch.setattr(foveate.methods, "_registered", {})
    yield put
    for name in {*sys.modules} - before:
        if "site" in str(getattr(sys.modules[name], "__file__", "")) and str(tmp_path) in str(
            sys.modules[name].__file__
        ):
            del sys.modules[name]


@pytest.fixture
def quarters(install: Install) -> Path:
    """The package of docs/methods/adding.md; the folder that it lies in."""
    return install("foveate-quarters", CODE, quarters="foveate_quarters:Quarters")


def python(*arguments: str, path: Path) -> subprocess.CompletedProcess[str]:
    """A new process, in which a folder's packages are installed."""
    places = f"{path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": places},
    )


def said(result: Any) -> str:
    """What a refused command says."""
    assert result.code == 2
    assert len(result.stderr.splitlines()) == 1
    return str(result.stderr)


# Every door


def test_every_command_knows_it(quarters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    picture(60, 100).save("it.png")
    alone = json.loads(run("inspect", "it.png", "--method", "quarters", "-o", "pool=4", "--json").stdout)
    assert alone["methods"]["quarters"]["title"] == "Quarters"
    assert alone["methods"]["quarters"]["visual_tokens"] == 144
    assert "unknown key 'pol'" in said(run("compose", "no", "--tiny", "--method", "quarters", "-o", "pol=4"))
    made = run("compose", "made", "--tiny", "--method", "quarters", "-o", "pool=4")
    assert made.code == 0, made.stderr
    short = ["--max-new-tokens", 2, "--json"]
    answered = run("ask", "it.png", "Why?", "--model", "made", *short, "--out", "a.png")
    assert answered.code == 0, answered.stderr
    assert json.loads(answered.stdout)["ledger"]["visual_tokens"] == 4
    loaded = AutoModelForImageTextToText.from_pretrained("made")
    assert type(loaded.method).__name__ == "Quarters"
    assert loaded.method.options.pool == 4
    assert foveate.load("made", device="cpu", options={"pool": 2}).plan(picture(9, 9)).tokens == 16


def test_a_recipe_trains_it(quarters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_toy_data("toy", 4)
    changes = [
        "model={tiny: true, method: quarters, options: {pool: 4}}",
        "stages={only: {trains: [connector], lr: 1e-3, steps: 1, batch: 2, micro_batch: 2, workers: 0, "
        "data: [{path: toy/toy.json}]}}",
    ]
    for more in (["--dry-run"], []):
        trained = run("train", "tiny", "output=run", *changes, *more)
        assert trained.code == 0, trained.stderr
    assert json.loads(Path("run/model/config.json").read_text())["method"] == "quarters"
    assert (
        run("ask", "toy/pictures/00000.png", "Why?", "--model", "run/model", "--max-new-tokens", 2).code == 0
    )


def test_the_lab_compares_it(quarters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCALES, "nano", NANO)
    prepare("nano", NANO, tmp_path / "lab")
    words = ["--scale", "nano", "--steps", 2, "--batch", 2, "--folder", tmp_path / "lab"]
    done = run("lab", "run", "--methods", "quarters", "-o", "quarters.pool=2", "--seeds", 0, *words)
    assert done.code == 0, done.stderr
    (report,) = (tmp_path / "lab" / "reports").glob("*/*.md")
    assert "Quarters (pool=2)" in report.read_text()


def test_the_duel_gets_it_by_one_command(
    quarters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one more row, with the steps, the pictures and the seeds of the others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SCALES, "nano", NANO)
    prepare("nano", NANO, tmp_path / "lab")
    duel = find("experiment", "duel").read_text(encoding="utf-8").replace("steps: 4000", "steps: 8")
    duel = duel.replace("batch: 16", "batch: 4\nscale: nano").replace("{least: 2000}", "{least: 4}")
    Path("duel.yaml").write_text(duel, encoding="utf-8")
    words = ["lab", "run", "duel.yaml", "--rows", "LLaVA-1.5", "--methods", "quarters", "--seeds", 0]
    done = run(*words, "-o", "quarters.pool=2", "-o", "quarters.max_visual_tokens=36")
    assert done.code == 0, done.stderr
    results = json.loads(Path("lab/reports/duel/report.json").read_text(encoding="utf-8"))
    assert [result["title"] for result in results] == ["LLaVA-1.5", "Quarters"]
    own = results[1]["cell"]
    assert own["converge"]["least"] == 4 and own["batch"] == 4 and own["level"] == "words"
    assert results[1]["tokens"] == 36
    again = run(*shlex.split(results[1]["command"])[1:])
    assert again.code == 0, again.stderr
    assert json.loads(Path("lab/reports/duel/report.json").read_text(encoding="utf-8")) == results[1:]


def test_its_layouts_come_along(install: Install, tmp_path: Path) -> None:
    """Their checkpoint is found by the keys of its weights, though its config.json is like another's."""
    install(
        "foveate-forked",
        """
        from foveate.methods.layouts import HF_PROJECTOR, Layout
        from foveate.methods.llava import Llava

        class Forked(Llava):
            title = "Forked"
            layouts = (
                Layout(
                    name="theirs/forked",
                    family="hf",
                    recognises=lambda config: "vision_config" in config,
                    options=lambda config, preprocessor: {"fit": "squash"},
                    keys=HF_PROJECTOR,
                    told_by=r"^forked\\.",
                ),
            )
        """,
        forked="foveate_forked:Forked",
    )
    from safetensors.torch import save_file
    from torch import zeros

    from foveate.model.checkpoints import read_config

    tiny = tiny_model("llava").model.config
    parts = {name: getattr(tiny, name).to_dict() for name in ("vision_config", "text_config")}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", **parts}))
    save_file({"forked.weight": zeros(1)}, tmp_path / "model.safetensors")
    config = read_config(tmp_path)
    assert (config.method, config.options) == ("forked", {"fit": "squash"})
    save_file({"other.weight": zeros(1)}, tmp_path / "model.safetensors")
    assert read_config(tmp_path).method == "llava"
    assert read_config(tmp_path, method="llava").method == "llava"


def test_a_class_is_registered_by_hand(install: Install, tmp_path: Path) -> None:
    class Mine(Llava):
        title = "Mine"

    register_method("mine", Mine)
    register_method("mine", Mine)  # as a notebook's cell does
    assert method_class("mine") is Mine
    assert method_names()[-1] == "mine"
    made = tiny_model("mine", {"fit": "squash"})
    made.save(tmp_path)
    assert repr(foveate.load(tmp_path, device="cpu", dtype="float32")) == "Foveate(Mine, cpu, float32)"
    with pytest.raises(FoveateError, match="options of method Mine: unknown key 'fat'; did you mean 'fit'"):
        tiny_model("mine", {"fat": "squash"})


@pytest.mark.slow
def test_the_invariants_run_on_it(quarters: Path) -> None:
    words = ["-m", "pytest", "-p", "no:cacheprovider", "tests/methods/test_invariants.py"]
    words += ["--method", "quarters", "--method-option", "pool=4", "-k", "count or saving or gradient"]
    done = python(*words, path=quarters)
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout


# What is wrong with a package is reported in a sentence, and does not affect other methods


def test_it_is_imported_when_it_is_used(install: Install) -> None:
    """Neither by `import foveate`, nor by the help, nor for another method."""
    folder = install("foveate-loud", "raise SystemExit('imported')", loud="foveate_loud:Loud")
    code = "import foveate, foveate.methods as m; print(m.method_names()[-1], m.method_class('llava').title)"
    assert python("-c", code, path=folder).stdout == "loud LLaVA-1.5\n"
    assert "Ask multimodal LLMs" in python("-m", "foveate", "--help", path=folder).stdout


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import nothing_of_that_name", "(ModuleNotFoundError: No module named 'nothing_of_that_name')"),
        ("def", "SyntaxError"),
        ("1 / 0", "(ZeroDivisionError: division by zero)"),
        ("Other = 3", "(AttributeError: module 'foveate_broken' has no attribute 'Broken')"),
        ("Broken = 3", "is not a subclass of foveate.methods.base.Method"),
        ("class Broken: pass", "is not a subclass of foveate.methods.base.Method"),
        (
            "from foveate.methods.base import Method\nclass Broken(Method):\n    plan = None",
            "does not define build_connector",
        ),
    ],
)
def test_a_broken_package_breaks_nothing_else(
    install: Install, tmp_path: Path, code: str, problem: str
) -> None:
    install("foveate-broken", code, broken="foveate_broken:Broken")
    picture(6, 9).save(tmp_path / "it.png")
    for refused in (
        run("inspect", tmp_path / "it.png", "--method", "broken"),
        run("compose", tmp_path / "out", "--tiny", "--method", "broken"),
        run("lab", "run", "--methods", "broken"),
    ):
        assert "the package foveate-broken" in said(refused)
        assert problem in said(refused)
    kinds, problems = usable_methods()
    assert list(kinds) == list(METHODS)
    assert len(problems) == 1 and problem in problems[0]


@pytest.mark.slow
def test_all_are_priced_but_the_broken_one(quarters: Path, install: Install, tmp_path: Path) -> None:
    install("foveate-broken", "1 / 0", broken="foveate_broken:Broken")
    picture(6, 9).save(tmp_path / "it.png")
    priced = run("inspect", tmp_path / "it.png", "--json")
    assert priced.code == 0
    assert list(json.loads(priced.stdout)["methods"]) == [*METHODS, "quarters"]
    assert "the package foveate-broken, cannot be imported (ZeroDivisionError" in priced.stderr


def test_a_package_without_metadata_is_named_by_its_module(install: Install) -> None:
    folder = install("foveate-bare", "1 / 0", bare="foveate_bare:Bare")
    next(folder.glob("*.dist-info/METADATA")).unlink()
    with pytest.raises(
        FoveateError, match="foveate_bare:Bare of the package foveate_bare, cannot be imported"
    ):
        method_class("bare")


def test_a_name_has_one_owner(install: Install) -> None:
    """Foveate's own keep theirs, and nobody is preferred among others."""
    install("foveate-one", CODE, llava="foveate_one:Quarters", quarters="foveate_one:Quarters")
    assert method_class("quarters").title == "Quarters"
    with pytest.warns(UserWarning, match="'llava' is foveate.methods.llava:Llava; .* package foveate-one"):
        assert method_class("llava") is Llava
    install("foveate-two", CODE, quarters="foveate_two:Quarters")
    with pytest.raises(
        FoveateError,
        match="'quarters' is claimed by foveate_two:Quarters of the package foveate-two and "
        "foveate_one:Quarters of the package foveate-one",
    ):
        method_class("quarters")
    assert "quarters" not in method_names()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "quarters" not in usable_methods()[0]


class Other(Llava):
    title = "Other"


def test_a_taken_name_cannot_be_registered(quarters: Path) -> None:
    with pytest.raises(
        FoveateError,
        match=r"test_outside:Other cannot .*'llava': foveate\.methods\.llava:Llava has that name",
    ):
        register_method("llava", Other)
    with pytest.raises(FoveateError, match="foveate_quarters:Quarters of the package foveate-quarters has"):
        register_method("quarters", Other)
    from foveate_quarters import Quarters

    register_method("quarters", Quarters)  # the same
    register_method("other", Other)
    with pytest.raises(FoveateError, match=r"foveate_quarters:Quarters cannot .*test_outside:Other has that"):
        register_method("other", Quarters)


@dataclass(frozen=True)
class NoOptions:
    """Not derived from MethodOptions."""


def no_method() -> dict[str, tuple[Any, str]]:
    class Untitled(Method):
        idea = paper = "x"
        plan = build_connector = None  # type: ignore[assignment]

    class Optionless(Llava):
        Options = NoOptions  # type: ignore[assignment]

    return {
        "a number": (3, "is not a subclass of"),
        "a text": ("theirs:Method", "is not a subclass of"),
        "another class": (MethodOptions, "is not a subclass of"),
        "an object": (Llava.__new__(Llava), "is not a subclass of"),
        "the base class": (Method, "does not define build_connector and plan"),
        "no title": (Untitled, "has no title"),
        "other options": (Optionless, "Options that are not a dataclass derived from MethodOptions"),
    }


@pytest.mark.parametrize("case", no_method())
def test_what_is_no_method_is_refused(case: str, install: Install) -> None:
    given, problem = no_method()[case]
    with pytest.raises(FoveateError, match=problem):
        register_method("it", given)
    assert "it" not in method_names()


@pytest.mark.parametrize("name", ["", "all", "a.b", "a,b", "a b", "a=b"])
def test_a_name_that_no_command_line_takes_is_refused(name: str, install: Install) -> None:
    with pytest.raises(FoveateError, match="use letters, digits, - and _"):
        register_method(name, Other)


def test_a_folder_of_an_unknown_method(install: Install, tmp_path: Path) -> None:
    register_method("mine", Other)
    tiny_model("mine").save(tmp_path)
    foveate.methods._registered.clear()
    picture(6, 9).save(tmp_path / "it.png")
    for words in (["ask", tmp_path / "it.png", "Why?"], ["inspect", tmp_path / "it.png"]):
        refused = said(run(*words, "--model", tmp_path))
        assert f"{tmp_path / 'config.json'}: unknown method 'mine': choose one of llava," in refused
        assert "or install the package that brings it" in refused
    with pytest.raises(FoveateError, match="unknown method 'mine'"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)
