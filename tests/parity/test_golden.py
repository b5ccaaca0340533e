"""Golden vectors of the authors' own code: `pytest tests/parity --golden DIR`, one test per case of DIR.

`-k slime`, `-k llavahr`, `-k inf`, `-k coroi`, `-k cos` select a method's cases.
"""

from __future__ import annotations

import pytest
import torch

from foveate.methods import METHODS
from tests.conftest import UNREAD, golden_folder
from tests.parity.golden import Case, Measure, cases, check, family, kind


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    folder = golden_folder(metafunc.config)
    if folder is None:
        skip = pytest.mark.skip(reason="no golden vectors at ../shared/golden: give --golden DIR")
        metafunc.parametrize("case", [pytest.param(None, marks=skip, id="none")])
        return
    found = list(cases(folder))
    if not any(case.family for case in found):
        raise pytest.UsageError(f"{folder} holds no case of a known method")
    metafunc.parametrize("case", found, ids=[case.id for case in found])


@torch.no_grad()
def test_golden(case: Case, measure: Measure, request: pytest.FixtureRequest) -> None:
    if not case.family:
        pytest.skip("its name begins with that of no known method")
    found = family(case.family)
    method = found.methods.get(kind(case) or "", found.method)
    if method not in METHODS:
        pytest.skip(f"method {method} is not here yet")
    unread = check(case, measure)
    if unread:
        request.node.user_properties.append((UNREAD, (case.id, unread)))
