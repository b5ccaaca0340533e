"""How far results are from what was expected: collected while tests run, shown in one table."""

from __future__ import annotations

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
        """Part of the tolerance that is used up; exact quantities use all of it or nothing."""
        if self.error != self.error:  # not a number
            return float("inf")
        return self.error / self.tolerance if self.tolerance else float(bool(self.error)) * float("inf")


@dataclass
class Measures:
    """All comparisons of a run."""

    all: list[Measured] = field(default_factory=list)

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
    reasons: dict[str, list[str]] = {}
    for case, reason in absent.items():
        reasons.setdefault(reason, []).append(case)
    for reason, cases in reasons.items():
        yield f"not compared, {reason}: {', '.join(cases) if cases != [''] else 'all'}"
