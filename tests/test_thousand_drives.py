"""A thousand config drives in one process: how fast, and that memory does not grow with their number."""

from __future__ import annotations

import sys
import time
import tracemalloc
from pathlib import Path

import pytest

from imagekit import api
from tests.cloudinit_specs import FULL

pytestmark = pytest.mark.slow

WARM_UP = 50
SPEC = {key: value for key, value in FULL.items() if key != "password"}  # a hash is meant to take its time


@pytest.mark.parametrize(("name", "count"), [("drive.iso", 1000), ("drive.img", 200), ("drive.vhdx", 200)])
def test_a_thousand_drives_take_no_more_memory_than_fifty(tmp_path: Path, name: str, count: int) -> None:
    """Every one is rendered, written, read back and published; each has a guest of its own."""
    before, started = 0, time.monotonic()
    digests = set()
    for number in range(count):
        if number == WARM_UP:
            before = resident()
        spec = {**SPEC, "uuid": f"00000000-0000-4000-8000-{number + 1:012x}", "name": f"web{number}"}
        media = "vfat" if name.endswith("img") else "iso"
        drive = api.build_config_drive(spec, tmp_path / name, media=media, overwrite=True, sync=False)  # type: ignore[arg-type]
        digests.add(drive.sha256)
    seconds = time.monotonic() - started
    grown = resident() - before
    print(f"\n{name}: {count / seconds:.0f} a second, {resident() >> 20} MiB resident, grown by {grown >> 10} KiB")
    assert len(digests) == count
    assert grown < 16 << 20


def test_what_a_drive_takes_is_given_back(tmp_path: Path) -> None:
    """In bytes that Python counts: nothing is kept of a drive that is done."""
    for _ in range(3):
        api.build_config_drive(SPEC, tmp_path / "drive.vhdx", media="vfat", overwrite=True, sync=False)
    tracemalloc.start()
    try:
        first = tracemalloc.get_traced_memory()[0]
        for _ in range(20):
            api.build_config_drive(SPEC, tmp_path / "drive.vhdx", media="vfat", overwrite=True, sync=False)
        assert tracemalloc.get_traced_memory()[0] - first < 256 << 10
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def resident() -> int:
    """Bytes of this process in memory."""
    if sys.platform != "linux":
        pytest.skip("resident memory is read from /proc")
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096
