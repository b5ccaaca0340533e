"""Options and fixtures of the whole suite, and the table of largest errors at its end."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

from tests.measuring import Measured, Measures, summarise
from tests.slow import SLOW

ROOT = Path(__file__).resolve().parents[1]
# The files that take longest. They come first: a file runs in one process, and the last would run alone.
LONGEST = ("docs/test_commands.py", "train/test_run.py", "methods/test_invariants.py", "lab/test_cells.py")
LONGEST += ("test_annotate.py", "test_cli.py", "model/test_spoilt.py", "methods/test_inf_llava.py")
# Properties of a test's report, which reaches the table at the end from other processes, too.
MEASURE = "measure"  # a comparison
UNREAD = "unread"  # a case, and what of it was not compared


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        metavar="DIR",
        type=Path,
        default=None,
        help="folder of golden vectors for tests/parity (default: ../shared/golden beside the repository)",
    )
    parser.addoption(
        "--method",
        metavar="NAME",
        default=None,
        help="the only method that tests/methods/test_invariants.py runs",
    )
    parser.addoption(
        "--method-option",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="option of that method which suits a tower of 56 pixels and 4 x 4 tokens; repeatable",
    )


def pytest_configure(config: pytest.Config) -> None:
    given = config.getoption("--golden")
    if given is not None and not given.is_dir():
        raise pytest.UsageError(f"--golden {given}: no such folder")
    if not _only_deals(config):
        import torch

        torch.set_num_threads(min(2, torch.get_num_threads()))


def _only_deals(config: pytest.Config) -> bool:
    """Whether this process leaves all tests to others: it need not import what they need."""
    return bool(config.getoption("numprocesses", None)) and not hasattr(config, "workerinput")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    found, slow = set(), {one.test: one for one in SLOW}
    for item in items:
        name, _, case = item.nodeid.removeprefix("tests/").partition("[")
        if name not in slow:
            continue
        begins = [begin for begin in (*slow[name].cases, *slow[name].quick) if case.startswith(begin)]
        found |= {(name, begin) for begin in begins}
        if begins and not any(begin in slow[name].quick for begin in begins):
            item.add_marker(pytest.mark.slow)
    named = {(one.test, begin) for one in SLOW for begin in (*one.cases, *one.quick)}
    if config.args == config.getini("testpaths") and found != named:
        gone = "; ".join(" ".join(key) for key in named - found)
        raise pytest.UsageError(f"tests/slow.py names tests that are not there: {gone}")
    first = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.path, len(first)))


def pytest_collection_finish() -> None:
    """What was imported and collected stays: no collection of garbage looks at it again.

    Each end of a training collects all garbage, and would spend most of a second on these objects.
    """
    gc.collect()
    gc.freeze()


def golden_folder(config: pytest.Config) -> Path | None:
    """The folder of golden vectors; None where there is none."""
    given = config.getoption("--golden") or ROOT.parent / "shared" / "golden"
    return given.resolve() if given.is_dir() else None


def _within(package: str) -> bool:
    """Whether a module of this package is among the callers."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(package):
            return True
        frame = frame.f_back
    return False


class Announcements(logging.Handler):
    """What transformers says, in its log, that it will take away.

    Its own pipelines hand `generate` a configuration and arguments, up to 5.18; that is not ours.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        if "deprecated" in said and not ("`generation_config`" in said and _within("transformers.pipelines")):
            self.heard.append(said)


@pytest.fixture(autouse=True)
def _nothing_deprecated() -> Iterator[None]:
    """Fails where transformers announces the end of something that was used; warnings are errors already."""
    handler, log = Announcements(), logging.getLogger("transformers")
    log.addHandler(handler)
    yield
    log.removeHandler(handler)
    assert not handler.heard, "\n".join(handler.heard)


@pytest.fixture(autouse=True)
def _no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers on every machine: on processors that multiply it, models load in it by default."""
    monkeypatch.setattr("torch.cpu.get_capabilities", dict)


@pytest.fixture(autouse=True)
def _short_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random models never end the reply that should be a box: they would write up to the bound each time."""
    monkeypatch.setattr("foveate.methods.chain_of_spot.REGION_TOKENS", 12)


@pytest.fixture
def measure(request: pytest.FixtureRequest) -> Callable[..., None]:
    """measure(what, error, tolerance): noted for the table at the end, and asserted.

    A fourth argument says what is wrong if the error is not a usable number.
    """
    case = request.node.name.partition("[")[2].removesuffix("]") or request.node.name

    def note(what: str, error: float, tolerance: float, wrong: str = "") -> None:
        request.node.user_properties.append((MEASURE, (case, what, error, tolerance)))
        wrong = wrong or f"differs by {error:.2e}, more than {tolerance:.0e}"
        assert error <= tolerance, f"{case}: {what} {wrong}"

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    reasons = {
        report.nodeid: report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple) and "test_golden" in report.nodeid
    }
    absent = {node.partition("[")[2].removesuffix("]"): reason for node, reason in reasons.items()}
    measures = Measures()
    for report in (*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")):
        if report.when == "call":
            for name, value in report.user_properties:
                if name == MEASURE:
                    measures.add(Measured(*value))
                elif name == UNREAD:
                    case, keys = value
                    measures.unread[case] = list(keys)
    for line in summarise(measures, absent):
        terminalreporter.write_line(line)
