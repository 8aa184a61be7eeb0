"""``make bench``: the same conversions by imagekit and by others, in turn, and the ratios of each round.

Whole processes are measured, the start of the interpreter included; the sources are in the page cache. Only ratios
within a round are worth quoting: the machine's own speed drifts. Without ``fsync`` in the case's name neither side
waits for the medium. ``--quick`` takes a smaller disk and the main cases; ``--only`` chooses by name.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from tests.benchmarks import installed, network, volumes
from tests.benchmarks.cases import CASES, MIB, Case
from tests.benchmarks.contenders import contenders
from tests.benchmarks.measure import Failed, rounds
from tests.benchmarks.table import HEAD, Result, line

GIB = 1 << 30
QUICK = (512 * MIB, 3 * GIB)
FULL = (2 * GIB, 10 * GIB)
QUICK_ROUNDS = 3
WARM = 32 * GIB
"""Larger sources are mostly hole and are not read beforehand."""

CHILD = "child.vhdx"
CHILD_BASE = "dynamic.vhdx"


def corpus(kinds: set[str], data: int, disk: int) -> dict[str, Path]:
    """Paths of the images, made if need be."""
    command = [sys.executable, "-m", "tests.benchmarks.corpus", str(data), str(disk), *sorted(kinds)]
    made = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return {kind: Path(path) for kind, path in json.loads(made.stdout).items()}


def on_volume(paths: dict[str, Path], kinds: set[str], folder: Path, volume: str) -> dict[str, Path]:
    """Where the images lie on that file system: copied there unless it holds the corpus already."""
    if volume == "ext4":
        return paths
    there = {}
    for kind in sorted(kinds - {CHILD}):
        there[kind] = folder / paths[kind].name
        # Holes stay holes: where cp lets a file system set blocks aside ahead of it, those are no source's own.
        subprocess.run(["cp", "--sparse=always", str(paths[kind]), str(there[kind])], check=True)
    if CHILD in kinds:
        there[CHILD] = make_child(paths["disk.raw"], there[CHILD_BASE], folder)
    subprocess.run(["sync", "-f", str(folder)], check=True)
    return there


def make_child(disk: Path, base: Path, folder: Path) -> Path:
    """A differencing disk on ``base``, which is a form of ``disk``, with 64 MiB of its own at the start."""
    changed, child = folder / "changed.raw", folder / CHILD
    subprocess.run(["cp", "--sparse=auto", str(disk), str(changed)], check=True)
    with changed.open("r+b") as file:
        for _ in range(64):
            file.write(os.urandom(MIB))
    imagekit = installed.command()
    subprocess.run([imagekit, "convert", "-q", str(changed), str(child), "--parent", str(base)], check=True)
    changed.unlink()
    return child


def run_cases(chosen: list[Case], data: int, disk: int, asked: argparse.Namespace) -> list[Result]:
    """Measure the cases, a file system at a time, and print each as it is done."""
    needed = set().union(*(case.needs for case in chosen))
    if CHILD in needed:
        needed = (needed - {CHILD}) | {"disk.raw", CHILD_BASE}
    say("making the corpus")
    paths = corpus(needed, data, disk)
    say("")
    print(line(HEAD))
    results: list[Result] = []
    until = time.monotonic() + 60 * asked.minutes if asked.minutes else None
    for volume in dict.fromkeys(case.volume for case in chosen):
        reason = volumes.missing(volume)
        if reason:
            print(f"{volume}: left out, {reason}")
            continue
        mine = [case for case in chosen if case.volume == volume]
        kinds = set().union(*(case.needs for case in mine))
        if CHILD in kinds:
            kinds.add(CHILD_BASE)
        with volumes.mounted(volume, 2 * len(kinds) * data + 8 * GIB) as folder:
            sources = on_volume(paths, kinds, folder, volume)
            for case in mine:
                count = 1 if until is not None and time.monotonic() > until else asked.rounds or case.rounds
                try:
                    results.append(run_case(case, sources, folder, data, count))
                except Failed as error:
                    print(f"{case.name} [{volume}]: FAILED: {error}", flush=True)
    return results


def run_case(case: Case, sources: dict[str, Path], folder: Path, data: int, count: int) -> Result:
    warm(sources[kind] for kind in case.needs)
    said = lambda what: say(f"{case.name}: {what}")  # noqa: E731
    if network.is_over_network(case):
        runs = network.measured(case, sources[case.source], folder, count, said)
    else:
        runs = rounds(contenders(case, sources, folder), count, said)
    result = Result(case, case.volume, data, runs)
    say("")
    for row in result.rows():
        print(line(row), flush=True)
    return result


def warm(paths: Iterable[Path]) -> None:
    """Read the files once, so that they are in the page cache."""
    for path in paths:
        if path.stat().st_size <= WARM:
            subprocess.run(["cat", str(path)], stdout=subprocess.DEVNULL, check=True)


def say(text: str) -> None:
    """What is going on, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _load() -> float | None:
    if sys.platform == "win32":
        return None
    return os.getloadavg()[0]


def machine() -> dict[str, object]:
    """What the figures depend on."""
    model = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((one.partition(":")[2].strip() for one in lines if one.startswith("model name")), "")
    qemu = subprocess.run(["qemu-img", "--version"], stdout=subprocess.PIPE, text=True, check=True)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "qemu-img": qemu.stdout.split("\n")[0].removeprefix("qemu-img version "),
        "load": _load(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small disk and the main cases, under three minutes")
    parser.add_argument("--only", action="append", metavar="TEXT", help="cases with this in name or file system")
    parser.add_argument("--rounds", type=int, help="instead of each case's own number")
    parser.add_argument("--leave-out", action="append", default=[], metavar="TEXT", help="the opposite of --only")
    parser.add_argument("--minutes", type=float, help="after so many a case gets one round only")
    parser.add_argument("--data", type=float, help="GiB of data on the disk")
    parser.add_argument("--disk", type=float, help="GiB of the disk")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--list", action="store_true", help="name the cases and end")
    asked = parser.parse_args()
    chosen = [case for case in (*CASES, *network.CASES) if case.quick or not asked.quick]
    if asked.quick:
        chosen = [
            replace(case, rounds=min(case.rounds, QUICK_ROUNDS) if case.source else case.rounds) for case in chosen
        ]
    if asked.only:
        chosen = [case for case in chosen if any(text in f"{case.name} [{case.volume}]" for text in asked.only)]
    left_out = asked.leave_out
    chosen = [case for case in chosen if not any(text in f"{case.name} [{case.volume}]" for text in left_out)]
    if asked.list or not chosen:
        print("\n".join(f"{case.name} [{case.volume}]" for case in chosen) or "no such case")
        return
    if shutil.which("qemu-img") is None:
        sys.exit("qemu-img is needed: apt-get install qemu-utils")
    data, disk = QUICK if asked.quick else FULL
    data = int(asked.data * GIB) if asked.data else data
    disk = int(asked.disk * GIB) if asked.disk else disk
    started, about = time.monotonic(), machine()
    print("; ".join(f"{name} {value}" for name, value in about.items()))
    print(
        f"{disk / GIB:g} GiB disk, {data / GIB:g} GiB of files; medians of whole processes; sources in the page cache"
    )
    installed.command()
    results = run_cases(chosen, data, disk, asked)
    missed = sum(not goal.met for result in results for goal in result.goals())
    total = sum(1 for result in results for _ in result.goals())
    print("\nGoals: median (least–most)")
    for result in results:
        print("\n".join(result.verdicts()))
    print(f"{total - missed} of {total} goals met, in {time.monotonic() - started:.0f} s")
    if asked.json is not None:
        document = {"machine": about, "data": data, "disk": disk, "results": [one.to_json() for one in results]}
        asked.json.write_text(json.dumps(document, indent=2))
    if len(results) < len([case for case in chosen if volumes.missing(case.volume) is None]):
        sys.exit("a case failed")


if __name__ == "__main__":
    main()
