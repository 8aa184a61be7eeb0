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
class Goal:
    """What is asked of a case, and what it came to."""

    rival: str | None
    """Against whom; None: of ours alone."""

    text: str
    met: bool
    got: Spread


@dataclass(frozen=True)
class Result:
    """One case, measured."""

    case: Case
    volume: str
    data: int
    """Bytes of data on the disk."""

    runs: dict[str, list[Run]]

    def goals(self) -> Iterator[Goal]:
        case, ours = self.case, self.runs[OURS]
        for rival, factor in case.rivals.items():
            if factor and rival in self.runs:
                got = ratios(ours, self.runs[rival])
                yield Goal(rival, f"≥ {factor:g}×", got.median >= factor, got)
        if case.cpu is not None and BEST in self.runs:
            share = cpu_share(ours, self.runs[BEST])
            yield Goal(BEST, f"CPU ≤ {100 * case.cpu:.0f} %", share.median <= case.cpu, share.times(100))
        if case.seconds is not None:
            allowed = case.seconds + case.per_block * self.data / BLOCK
            taken = Spread.of([run.wall for run in ours])
            yield Goal(None, f"≤ {allowed:.2f} s", taken.median <= allowed, taken)
        peak = Spread.of([run.peak / MIB for run in ours])
        yield Goal(None, f"peak ≤ {case.peak} MiB", peak.most <= case.peak, peak)
        if case.extra is not None:
            room = Spread.of([run.taken / MIB for run in ours])
            yield Goal(None, f"room ≤ {case.extra} MiB", room.most <= case.extra, room)

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
        for goal in self.goals():
            asked.setdefault(goal.rival, []).append(f"{goal.text} {'yes' if goal.met else 'NO'}")
        for rival, theirs in [(name, runs) for name, runs in self.runs.items() if name != OURS]:
            spread: Spread = ratios(ours, theirs)
            goals = (asked.pop(None, []) if own[0] else []) + asked.get(rival, [])
            yield (
                *own,
                rival,
                f"{statistics.median(run.wall for run in theirs):.2f}",
                f"{spread.median:.2f}",
                f"{spread.least:.2f}–{spread.most:.2f}",
                f"{100 * cpu_share(ours, theirs).median:.0f} %",
                ", ".join(goals),
            )
            own = ("", "", "", "")
        if own[0]:
            yield (*own, "", "", "", "", "", ", ".join(asked.get(None, [])))

    def verdicts(self) -> Iterator[str]:
        """A line for each goal: met or not, what was measured (median, least, most), in how many rounds."""
        for goal in self.goals():
            against = "" if goal.rival is None else f" against {goal.rival}"
            got, count = goal.got, len(self.runs[goal.rival or OURS])
            yield (
                f"{'met    ' if goal.met else 'NOT MET'} {self.case.name} [{self.volume}]: {goal.text}{against}: "
                f"{got.median:.2f} ({got.least:.2f}–{got.most:.2f}, {count} rounds)"
            )

    def to_json(self) -> dict[str, object]:
        return {
            "case": self.case.name,
            "file-system": self.volume,
            "runs": {name: [asdict(run) for run in runs] for name, runs in self.runs.items()},
            "goals": [asdict(goal) for goal in self.goals()],
        }


def line(cells: tuple[str, ...]) -> str:
    """A row of the table: names to the left, numbers to the right."""
    out = []
    for number, (cell, width) in enumerate(zip(cells, WIDTHS, strict=True)):
        out.append(cell.ljust(width) if number in (0, 4, 9) else cell.rjust(width))
    return " ".join(out).rstrip()
