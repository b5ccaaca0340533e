"""Golden vectors of the authors' own code: `pytest tests/parity --golden DIR`, one test per case of DIR.

`-k slime`, `-k llavahr`, `-k inf`, `-k coroi`, `-k cos` select a method's cases.
"""

from __future__ import annotations

import pytest
import torch

from foveate.methods import METHODS
from tests.conftest import golden_folder
from tests.parity.golden import Case, Comparison, Measure, cases, family


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    folder = golden_folder(metafunc.config)
    if folder is None:
        skip = pytest.mark.skip(reason="no golden vectors at ../shared/golden: give --golden DIR")
        metafunc.parametrize("case", [pytest.param(None, marks=skip, id="none")])
        return
    found = list(cases(folder))
    if not found:
        raise pytest.UsageError(f"{folder} holds no case of a known method")
    metafunc.parametrize("case", found, ids=[case.id for case in found])


@torch.no_grad()
def test_golden(case: Case, measure: Measure) -> None:
    checkers = family(case.family)
    rest = "checkpoint" if case.is_checkpoint else case.name.removeprefix(f"{case.family}_")
    key = checkers.checker(rest)
    method = checkers.methods.get(key or "", checkers.method)
    if method not in METHODS:
        pytest.skip(f"method {method} is not here yet")
    if key is None:
        pytest.fail(f"no checker in tests/parity/families/{case.family}.py takes {case.id}")
    checkers.checkers[key](Comparison(case, measure))
