"""``make bench``: convert the same image with imagekit and with qemu-img, in turn, and compare medians.

Interpreter start is included, the cache is warm, and neither side waits for the medium (``--no-sync``). Only ratios
of pairs are worth quoting: the machine's own speed drifts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.benchmarks.corpus import GIB

QEMU_OPTIONS = ["-m", "16", "-W", "-O", "vpc", "-o", "subformat=dynamic,force_size=on"]


@dataclass(frozen=True)
class Run:
    """One process: seconds and bytes."""

    wall: float
    cpu: float
    peak: int


def measure(command: list[str]) -> Run:
    """Run a command to its end."""
    if sys.platform == "win32":
        sys.exit("the benchmark needs Linux: a process's figures come from wait4")
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - started
    assert process.stderr is not None
    if status:
        sys.exit(f"failed: {' '.join(command)}\n{process.stderr.read().decode()}")
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def pair(source: Path, folder: Path) -> tuple[Run, Run]:
    """imagekit, then qemu-img, each to a new file that is removed again."""
    ours, theirs = folder / "imagekit.vhd", folder / "qemu-img.vhd"
    imagekit = [sys.executable, "-m", "imagekit", "convert", "--no-sync", "-q", str(source), str(ours)]
    qemu = ["qemu-img", "convert", *QEMU_OPTIONS, str(source), str(theirs)]
    runs = measure(imagekit), measure(qemu)
    ours.unlink()
    theirs.unlink()
    return runs


def report(name: str, pairs: list[tuple[Run, Run]]) -> dict[str, object]:
    """Print a line, and return it as data."""
    ratios = [theirs.wall / ours.wall for ours, theirs in pairs]
    cpu = [ours.cpu / theirs.cpu for ours, theirs in pairs]
    one, other = (statistics.median(run[side].wall for run in pairs) for side in (0, 1))
    peak = max(ours.peak for ours, _ in pairs) / (1 << 20)
    print(
        f"{name:<12} {one:>9.2f} {other:>9.2f} {statistics.median(ratios):>7.2f}  "
        f"{min(ratios):>5.2f}–{max(ratios):<5.2f} {100 * statistics.median(cpu):>6.0f} % {peak:>6.0f} MiB"
    )
    return {"source": name, "pairs": [[asdict(run) for run in both] for both in pairs]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench")
    parser.add_argument("--data", type=float, default=2, help="GiB of data (default 2)")
    parser.add_argument("--disk", type=float, default=10, help="GiB of the disk (default 10)")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the targets are written")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    asked = parser.parse_args()
    if shutil.which("qemu-img") is None:
        sys.exit("qemu-img is needed: apt-get install qemu-utils")
    sizes = [str(int(size * GIB)) for size in (asked.data, asked.disk)]
    made = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.corpus", *sizes], check=True, stdout=subprocess.PIPE
    )
    corpus = json.loads(made.stdout)
    print(f"{asked.disk:g} GiB disk, {asked.data:g} GiB data → dynamic VHD; seconds, medians of {asked.pairs} pairs")
    print(f"{'source':<12} {'imagekit':>9} {'qemu-img':>9} {'faster':>7}  {'(range)':<11} {'CPU':>8} {'peak':>9}")
    results = []
    with tempfile.TemporaryDirectory(prefix="imagekit-bench-", dir=asked.folder) as name:
        folder = Path(name)
        for kind, path in corpus.items():
            source = Path(path)
            pair(source, folder)  # warms the cache
            results.append(report(kind, [pair(source, folder) for _ in range(asked.pairs)]))
    if asked.json is not None:
        asked.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
