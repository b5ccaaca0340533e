"""Every benchmark runs, at its smallest size: its arguments are checked, its table holds finite numbers."""

from __future__ import annotations

import importlib
import math
import re
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from foveate.towers import vit as encoders

FOLDER = Path(__file__).parents[1] / "benchmarks"
# script -> its smallest size, and how many rows its table has
SMALLEST = {
    "chain_of_spot": ("--layers 4 --width 64 --new-tokens 1", 2),
    "coroi": ("--layers 2 --width 64 --pixels 90 120", 2),
    "inf_llava": ("--layers 2 --width 64", 2),
    "llava_hr": ("--layers 4 --side 64", 3),
    "peers": ("--layers 2 --width 64 --pixels 90 120", 6),
    "proxy": ("--pixels 60 90", 3),
    "serving": ("--requests 4 --clients 2 --pictures 2", 6),
    "slime_connector": ("--width 128 --words 2", 2),
    "slime_prefill": ("--layers 1 --pixels 90 120", 4),
    "tower": ("--layers 1 --width 64 --views 1", 5),
    "vllm_parity": ("--pictures 2 --tokens 1", 9),
}
NUMBER = re.compile(r"-?\b(?:\d[\d.]*(?:e[-+]?\d+)?|nan|inf)\b")


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What benchmarks set for their whole process is set back."""
    monkeypatch.setattr(encoders, "WIDEST", encoders.WIDEST)
    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    yield
    torch.set_num_threads(threads)
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


def run(script: str, options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [script, *options.split()])
    importlib.import_module(f"benchmarks.{script}").main()


def test_every_benchmark_is_run() -> None:
    assert set(SMALLEST) == {path.stem for path in FOLDER.glob("*.py")} - {"arguments"}


@pytest.mark.parametrize("script", SMALLEST)
def test_smallest_size(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options, rows = SMALLEST[script]
    run(script, f"--rounds 1 --threads 1 {options}", monkeypatch)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    head, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert len(body) == rows
    for name, *cells in body:
        assert len(cells) == len(head) - 1, name
        for what, cell in zip(head[1:], cells, strict=True):
            numbers = [float(number) for number in NUMBER.findall(cell)]
            assert numbers and all(map(math.isfinite, numbers)), f"{name}, {what}: {cell}"


@pytest.mark.parametrize("script", SMALLEST)
def test_wrong_sizes_are_refused(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for options in ("--rounds 0", "--threads -1", "--rounds two"):
        with pytest.raises(SystemExit) as end:
            run(script, options, monkeypatch)
        assert end.value.code == 2
        assert "error: argument --" in capsys.readouterr().err


def test_parity_with_vllm_says_where_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parity = importlib.import_module("benchmarks.vllm_parity")
    monkeypatch.setattr(parity, "models", lambda folder: ())
    run("vllm_parity", "--pictures 1", monkeypatch)
    assert "vLLM is not there: --make FOLDER makes an environment with it" in capsys.readouterr().out
    venv.create(tmp_path / "empty", with_pip=False)
    for options, place in (
        (f"--environment {tmp_path}", f"in {tmp_path}"),
        (f"--environment {tmp_path / 'empty'}", f"in {tmp_path / 'empty'}"),
        (f"--report {tmp_path / 'page.md'}", "--report is written of answers of vLLM"),
    ):
        with pytest.raises(SystemExit, match=re.escape(place)):
            run("vllm_parity", f"--pictures 1 {options}", monkeypatch)
    assert not (tmp_path / "page.md").exists()


def test_sizes_that_do_not_divide_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run("tower", "--width 65", monkeypatch)
    assert (
        "--width: '65' should be a whole number of at least 1 and a multiple of 64" in capsys.readouterr().err
    )
