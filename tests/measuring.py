"""How far results are from what was expected: collected while tests run, shown in one table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Measured:
    """One comparison of one case."""

    case: str
    what: str
    error: float
    tolerance: float

    @property
    def used(self) -> float:
        """Part of the tolerance that is used up; of no tolerance, nothing or infinitely much."""
        if self.error == 0:
            return 0.0
        if math.isnan(self.error) or self.tolerance == 0:
            return math.inf
        return self.error / self.tolerance


@dataclass
class Measures:
    """All comparisons of a run, and per case what nothing was compared with."""

    all: list[Measured] = field(default_factory=list)
    unread: dict[str, list[str]] = field(default_factory=dict)

    def add(self, measured: Measured) -> None:
        self.all.append(measured)

    def worst(self) -> Iterator[tuple[Measured, int]]:
        """Per case the comparison that is nearest to its tolerance, and how many there were."""
        cases: dict[str, list[Measured]] = {}
        for measured in self.all:
            cases.setdefault(measured.case, []).append(measured)
        for many in cases.values():
            yield max(many, key=lambda m: (m.used, m.error)), len(many)


def summarise(measures: Measures, absent: Mapping[str, str]) -> Iterator[str]:
    """Lines of the table: case, largest error against its tolerance; then what could not be compared."""
    rows = [
        (m.case, f"{m.error:.2e}", f"{m.tolerance:.0e}" if m.tolerance else "exact", f"{m.what}, of {count}")
        for m, count in measures.worst()
    ]
    if rows:
        yield ""
        rows.insert(0, ("case", "largest error", "tolerance", "in"))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        for case, error, tolerance, what in rows:
            yield f"{case:<{widths[0]}}  {error:>{widths[1]}}  {tolerance:>{widths[2]}}  {what}"
    for case, keys in measures.unread.items():
        yield f"not compared, no checker reads it: {', '.join(keys)} of {case}"
    reasons: dict[str, list[str]] = {}
    for case, reason in absent.items():
        reasons.setdefault(reason, []).append(case)
    for reason, cases in reasons.items():
        yield f"not compared, {reason}: {', '.join(cases) if cases != [''] else 'all'}"
