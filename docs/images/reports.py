"""Draws the figures of the reports in docs/reports: one a report, its learning curves, its sizes of glyphs.

python docs/images/reports.py [FOLDER]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from foveate.lab.pace import with_pace
from foveate.lab.report import plot, plot_curves
from foveate.lab.sizes import plot_sizes

HERE = Path(__file__).parent
LONGER = ("coroi_long", "coroi_scorer", "slime_longer", "duel_tables")  # a table on their page is all


def main(folder: Path) -> None:
    for report in sorted((HERE.parent / "reports").glob("*.json")):
        if report.stem in LONGER:
            continue
        whole = json.loads(report.read_text(encoding="utf-8"))
        results = with_pace(whole, report.parent / "pace" / report.name)
        plot(results, folder / f"{report.stem}.png")
        if all("curve" in result for result in results):
            plot_curves(results, folder / f"{report.stem}_curves.png")
    for report in sorted((HERE.parent / "reports" / "sizes").glob("*.json")):
        plot_sizes(json.loads(report.read_text(encoding="utf-8")), folder / f"{report.stem}_sizes.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "lab")
