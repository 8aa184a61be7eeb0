"""The results: a row for each case and rival, and all figures as data."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from tests.benchmarks.cases import BEST, MIB, Case
from tests.benchmarks.contenders import OURS
from tests.benchmarks.measure import Run, Spread, cpu_share, ratios

BLOCK = 2 * MIB
HEAD = ("case", "s", "CPU s", "MiB", "against", "s", "faster", "(range)", "CPU", "goal")
WIDTHS = (38, 6, 6, 5, 19, 6, 7, 13, 6, 0)


@dataclass(frozen=True)
class Result:
    """One case, measured."""

    case: Case
    volume: str
    data: int
    """Bytes of data on the disk."""

    runs: dict[str, list[Run]]

    def goals(self) -> Iterator[tuple[str | None, str, bool]]:
        """(rival, what is asked, whether it was met); None: of ours alone."""
        case, ours = self.case, self.runs[OURS]
        for rival, factor in case.rivals.items():
            if factor and rival in self.runs:
                got = ratios(ours, self.runs[rival]).median
                yield rival, f"≥ {factor:g}×", got >= factor
        if case.cpu is not None and BEST in self.runs:
            yield BEST, f"CPU ≤ {100 * case.cpu:.0f} %", cpu_share(ours, self.runs[BEST]) <= case.cpu
        if case.seconds is not None:
            allowed = case.seconds + case.per_block * self.data / BLOCK
            yield None, f"≤ {allowed:.2f} s", statistics.median(run.wall for run in ours) <= allowed
        yield None, f"≤ {case.peak} MiB", max(run.peak for run in ours) <= case.peak * MIB
        if case.extra is not None:
            taken = max(run.taken for run in ours)
            yield None, f"takes {taken / MIB:.0f} ≤ {case.extra} MiB", taken <= case.extra * MIB

    def rows(self) -> Iterator[tuple[str, ...]]:
        """A row of ours alone, or one for each rival."""
        ours = self.runs[OURS]
        own = (
            f"{self.case.name} [{self.volume}]",
            f"{statistics.median(run.wall for run in ours):.2f}",
            f"{statistics.median(run.cpu for run in ours):.2f}",
            f"{max(run.peak for run in ours) / MIB:.0f}",
        )
        asked: dict[str | None, list[str]] = {}
        for rival, text, met in self.goals():
            asked.setdefault(rival, []).append(f"{text} {'yes' if met else 'NO'}")
        for rival, theirs in [(name, runs) for name, runs in self.runs.items() if name != OURS]:
            spread: Spread = ratios(ours, theirs)
            goals = (asked.pop(None, []) if own[0] else []) + asked.get(rival, [])
            yield (
                *own,
                rival,
                f"{statistics.median(run.wall for run in theirs):.2f}",
                f"{spread.median:.2f}",
                f"{spread.least:.2f}–{spread.most:.2f}",
                f"{100 * cpu_share(ours, theirs):.0f} %",
                ", ".join(goals),
            )
            own = ("", "", "", "")
        if own[0]:
            yield (*own, "", "", "", "", "", ", ".join(asked.get(None, [])))

    def to_json(self) -> dict[str, object]:
        return {
            "case": self.case.name,
            "file-system": self.volume,
            "runs": {name: [asdict(run) for run in runs] for name, runs in self.runs.items()},
            "goals": [{"against": rival, "goal": text, "met": met} for rival, text, met in self.goals()],
        }


def line(cells: tuple[str, ...]) -> str:
    """A row of the table: names to the left, numbers to the right."""
    out = []
    for number, (cell, width) in enumerate(zip(cells, WIDTHS, strict=True)):
        out.append(cell.ljust(width) if number in (0, 4, 9) else cell.rjust(width))
    return " ".join(out).rstrip()
