"""One process measured, and rounds of several in alternating order.

This module and its caller stay small: Linux counts a child's peak memory from what its parent had when it forked.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Run:
    """One process, its children included: seconds and bytes."""

    wall: float
    cpu: float
    peak: int
    taken: int = 0
    """Room on the medium that its target took."""


@dataclass(frozen=True)
class Contender:
    """A command to measure. What it writes to ``target`` is removed again, outside the measurement."""

    name: str
    command: tuple[str, ...]
    target: Path | None = None
    self_timed: bool = False
    """The command prints the seconds that count."""

    rounds: int | None = None
    """It takes part in no more than the first so many."""


class Failed(Exception):
    """A command that was measured did not end well; says which, and what it said."""


def measure(one: Contender) -> Run:
    """Run the command to its end. Of what it prints only seconds are used, or, when it fails, the errors."""
    if sys.platform == "win32":
        sys.exit("the benchmark needs Linux: a process's figures come from wait4")
    free = _free(one.target)
    started = time.monotonic()
    output = subprocess.PIPE if one.self_timed else subprocess.DEVNULL
    process = subprocess.Popen(one.command, stdout=output, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.stderr is not None
    with process.stderr as errors:
        if status:
            raise Failed(f"{' '.join(one.command)}\n{errors.read().decode()}")
    if process.stdout is not None:
        with process.stdout:
            wall = float(process.stdout.read())
    taken = 0
    if one.target is not None:
        taken = max(0, free - _free(one.target)) if free else one.target.stat().st_blocks * 512
        one.target.unlink()
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, taken)


def _free(target: Path | None) -> int:
    """Free bytes where the target lies; 0 where others may use that file system too.

    Synced first: what XFS sets aside for a file that may grow comes back with that, and btrfs counts then only.
    """
    if target is None or sys.platform == "win32" or not target.parent.is_mount():
        return 0
    subprocess.run(["sync", "-f", str(target.parent)], check=True)
    info = os.statvfs(target.parent)
    return info.f_bfree * info.f_frsize


def rounds(contenders: Sequence[Contender], count: int, said: Callable[[str], None]) -> dict[str, list[Run]]:
    """Measure each of them ``count`` times, in turn: A B C, C B A, A B C …"""
    runs: dict[str, list[Run]] = {one.name: [] for one in contenders}
    for number in range(count):
        for one in contenders if number % 2 == 0 else reversed(contenders):
            if one.rounds is None or number < one.rounds:
                said(f"{number + 1}/{count} {one.name}")
                runs[one.name].append(measure(one))
    return runs


@dataclass(frozen=True)
class Spread:
    """Median, least and most of some figures."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def times(self, factor: float) -> Spread:
        return Spread(self.median * factor, self.least * factor, self.most * factor)


def ratios(ours: Sequence[Run], theirs: Sequence[Run]) -> Spread:
    """How many times as long theirs took, round by round."""
    return Spread.of([other.wall / one.wall for one, other in zip(ours, theirs, strict=False)])


def cpu_share(ours: Sequence[Run], theirs: Sequence[Run]) -> Spread:
    """Our CPU time as a share of theirs, round by round."""
    return Spread.of([one.cpu / max(other.cpu, 1e-3) for one, other in zip(ours, theirs, strict=False)])
