"""What a look at the largest disks costs: time of processors and memory of the whole command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fixtures import qcow2_images, vhdx_images
from fixtures.qcow2_images import Plain
from fixtures.vhdx_images import Block
from imagekit.formats.base import KiB, MiB, TiB
from tests.disks import noise
from tests.timing import assert_within

WATCHED = """
import json, sys, time
from imagekit.cli.app import run
code = run(sys.argv[1:])
with open("/proc/self/status") as file:
    peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
print(json.dumps({"peak": peak, "seconds": time.process_time()}), file=sys.stderr)
sys.exit(code)
"""
"""What a rusage says of memory counts what the process was forked from."""

SECONDS = 1.0
MEMORY = 64 * MiB
DEEP_MEMORY = 128 * MiB


def _vhdx(path: Path) -> int:
    """The largest VHDX there is, in its smallest blocks: a BAT of 512 MiB."""
    last = (64 * TiB - 1) // MiB
    recipe = vhdx_images.Recipe(size=64 * TiB, blocks={0: Block(data=noise(MiB)), last: Block(data=noise(MiB, 1))})
    vhdx_images.make(recipe).write(path)
    return recipe.size


def _qcow2(path: Path) -> int:
    last = 16 * TiB // (64 * KiB) - 1
    clusters = {0: Plain(noise(64 * KiB)), last // 2: Plain(noise(64 * KiB, 1)), last: Plain(noise(64 * KiB, 2))}
    path.write_bytes(qcow2_images.make(qcow2_images.Recipe(size=16 * TiB, clusters=clusters)).data)
    return 16 * TiB


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux' own")
@pytest.mark.parametrize("deep", [False, True], ids=["headers", "all tables"])
@pytest.mark.parametrize("make", [_vhdx, _qcow2], ids=["64 TiB VHDX", "16 TiB qcow2"])
def test_info_on_a_huge_disk_takes_neither_time_nor_memory(
    make: Callable[[Path], int], deep: bool, tmp_path: Path
) -> None:
    path = tmp_path / "disk"
    size = make(path)
    peaks = list[int]()

    def attempt() -> float:
        command = [sys.executable, "-c", WATCHED, "info", str(path), "--output", "json", *(["--deep"] * deep)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found, used = json.loads(done.stdout), json.loads(done.stderr)
        assert (found["virtual-size"], found["findings"]) == (size, [])
        peaks.append(used["peak"] * KiB)
        return float(used["seconds"])

    assert_within(SECONDS if not deep else 10 * SECONDS, attempt)
    print(f"{path.stat().st_size} bytes: at most {max(peaks) / MiB:.0f} MiB")
    assert max(peaks) < (DEEP_MEMORY if deep else MEMORY)
