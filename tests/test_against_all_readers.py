"""Everything that is written, read by programs that others wrote: qemu-img, libvhdi, dissect and 7-Zip.

Faults of theirs that are known (and not ours to be judged by) are left out by name, with the reason.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from imagekit.formats import registry
from imagekit.formats.base import MiB
from imagekit.formats.files import MemoryFile
from tests.disks import md5
from tests.oracles import dissect_md5, need_tool, qemu_img_md5, vhdi_md5
from tests.test_matrix import PLAIN, converted
from tests.variants import TARGETS, Made

pytestmark = pytest.mark.oracle

QEMU_NAMES = {"vhd": "vpc"}
QEMU_OPTIONS = {"vhd": {"force_size_calc": "current_size"}}
VHD_FAMILY = [name for name, (fmt, _) in TARGETS.items() if fmt in ("vhd", "vhdx")]
BY_QEMU = [name for name in TARGETS if name != "vhdx dynamic, 4096"]
"""It reads logical sectors of 512 bytes only."""
BY_DISSECT = [name for name in TARGETS if name not in ("raw", "qcow2 zstd")]
"""Its zstd would need a package that is not among its pins."""


def written(target: str, folder: Path, disk: bytes = PLAIN) -> tuple[Path, str, str]:
    """The disk as that kind: the file, its format, and the digest of what a guest reads."""
    file = converted(Made(disk, "raw"), target)
    fmt = TARGETS[target][0]
    path = folder / f"disk.{fmt}"
    path.write_bytes(file.data)
    size = registry.find(fmt).open(MemoryFile(file.data)).virtual_size
    return path, fmt, md5(disk.ljust(size, b"\0"))


@pytest.mark.parametrize("target", BY_QEMU)
def test_qemu_img_reads_what_was_converted(target: str, tmp_path: Path) -> None:
    path, fmt, expected = written(target, tmp_path)
    assert qemu_img_md5(path, QEMU_NAMES.get(fmt, fmt), **QEMU_OPTIONS.get(fmt, {})) == expected


@pytest.mark.parametrize("target", [name for name in BY_QEMU if TARGETS[name][0] in ("vhdx", "qcow2")])
def test_qemu_img_finds_nothing_wrong(target: str, tmp_path: Path) -> None:
    path, fmt, _ = written(target, tmp_path)
    done = subprocess.run([need_tool("qemu-img"), "check", "-f", fmt, str(path)], capture_output=True, text=True)
    assert (done.returncode, "No errors were found" in done.stdout) == (0, True), done.stdout + done.stderr


@pytest.mark.parametrize("target", VHD_FAMILY)
def test_libvhdi_reads_what_was_converted(target: str, tmp_path: Path) -> None:
    path, _, expected = written(target, tmp_path)
    assert vhdi_md5(path) == expected


@pytest.mark.parametrize("target", BY_DISSECT)
def test_dissect_reads_what_was_converted(target: str, tmp_path: Path) -> None:
    path, fmt, expected = written(target, tmp_path)
    assert dissect_md5(path, fmt) == expected


@pytest.mark.parametrize("target", VHD_FAMILY)
def test_7zip_reads_what_was_converted(target: str, tmp_path: Path) -> None:
    even = PLAIN.ljust(3 * MiB, b"\0")  # it opens no VHDX with an odd number of sectors
    path, fmt, expected = written(target, tmp_path, even)
    done = subprocess.run([need_tool("7z"), "x", f"-t{fmt}", "-so", str(path)], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert md5(done.stdout) == expected
