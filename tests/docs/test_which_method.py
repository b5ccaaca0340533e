"""The numbers of docs/choosing.md are those of `foveate inspect`, the recipes and the lab's reports."""

from __future__ import annotations

import json

import pytest

from foveate.lab.report import markdown
from foveate.methods import METHODS, method_class
from foveate.model.cost import Pricer, reference_config
from foveate.train.recipe import load_recipe
from tests.docs.test_claims import ROOT, TWELVE_MEGAPIXELS, read, rows

PAGE = read("docs/choosing.md")
PARTS = {"connector": "connector", "language_model": "LLM", "vision_tower": "tower"}


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_asks(method: str) -> None:
    table = {row[0].strip("`"): row[1:] for row in rows(PAGE, "Method")}
    assert [*table] == [*METHODS]
    weights, regions, trains, tokens, seen, tflop = table[method]
    pricer = Pricer(reference_config(method))
    cost = pricer.price(TWELVE_MEGAPIXELS)
    assert tokens == str(cost.visual_tokens)
    assert seen == f"{cost.effective_width} x {cost.effective_height}"
    assert tflop == f"{sum(round(n / 1e12, 2) for n in (cost.encode_flops, cost.prefill_flops)):.2f}"
    assert regions == ("yes" if pricer.model.method.learns_regions else "no")
    *_, last = load_recipe(method).stages.values()
    assert trains.replace("towers", "tower") == ", ".join(PARTS[part] for part in last.trains)
    known = {(row[0].strip("`"), row[1].strip("`")) for row in rows(read("docs/checkpoints.md"), "Method")}
    named = {(method, weights.strip("`"))} - {(method, "none")}
    assert named <= known
    assert bool(named) == bool(method_class(method).layouts)


def test_the_labs_rows_are_those_of_its_reports() -> None:
    said = rows(PAGE, "Report")
    assert len(said) > 10
    for report, *cells in said:
        path = ROOT / "docs/reports" / f"{report.strip('`')}.json"
        lines = markdown(json.loads(path.read_text(encoding="utf-8"))).splitlines()
        tables = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
        heads = tables[0]
        found = next(row for row in tables[1:] if row[0] == cells[0])
        wanted = ("fine", "coarse", "visual tokens", "GFLOP")
        assert cells[1:] == [found[heads.index(column)] for column in wanted], (report, cells[0])
