"""Images that qemu-img makes, in every way it can: nothing is wrong with them, and no rule refuses one."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagekit.formats.base import KiB, MiB
from imagekit.policy import Severity
from imagekit.sources import Reading, open_source
from tests.disks import noise, text
from tests.oracles import need_tool

pytestmark = [pytest.mark.slow, pytest.mark.oracle]

SIZE = 24 * MiB + 512


def _qcow2() -> Iterator[str]:
    for bits, preallocation in itertools.product((12, 16, 21), ("off", "metadata", "falloc", "full")):
        yield f"cluster_size={1 << bits},preallocation={preallocation}"
    yield "cluster_size=512"
    for width in (1, 2, 8, 16, 32, 64):
        yield f"refcount_bits={width}"
    yield from ("compat=0.10", "lazy_refcounts=on", "compression_type=zstd", "cluster_size=512,refcount_bits=64")
    for preallocation in ("off", "metadata"):
        yield f"extended_l2=on,cluster_size=128k,preallocation={preallocation}"


WAYS = [
    ("vdi", "preallocation=off"),
    *(("qcow2", how) for how in _qcow2()),
    *(("vmdk", f"subformat={one}") for one in ("monolithicSparse", "streamOptimized")),
    *(("vpc", f"subformat={one},force_size={size}") for one in ("dynamic", "fixed") for size in ("on", "off")),
    *(("vhdx", f"subformat={one}") for one in ("dynamic", "fixed")),
    *(("vhdx", f"block_size={size}M") for size in (1, 256)),
]


def qemu_img(*arguments: str | Path) -> None:
    subprocess.run([need_tool("qemu-img"), *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data here and there, some of it easy to compress, up to the very end."""
    path = tmp_path_factory.mktemp("honest") / "disk.raw"
    with path.open("wb") as file:
        file.truncate(SIZE)
        for number, at in enumerate((0, 3 * MiB + 512, 3 * MiB + 64 * KiB, 11 * MiB, SIZE - 5 * KiB)):
            file.seek(at)
            file.write(noise(5 * KiB, number) if number % 2 else text(5 * KiB, number))
    return path


def assert_passes(path: Path) -> None:
    with open_source(path, Reading(deep=True)) as source:
        for _ in source.image.extents():
            pass
        refused = [one for one in source.findings if one.severity is Severity.REFUSE or one.rule == "structure"]
        assert refused == []


@pytest.mark.parametrize(("driver", "how"), WAYS, ids=[f"{driver} {how}" for driver, how in WAYS])
def test_an_image_that_qemu_img_makes_passes(driver: str, how: str, disk: Path, tmp_path: Path) -> None:
    """New and empty, filled, and compressed where there is such a thing."""
    path = tmp_path / f"disk.{'vhd' if driver == 'vpc' else driver}"
    qemu_img("create", "-f", driver, "-o", how, path, str(SIZE))
    assert_passes(path)
    qemu_img("convert", "-f", "raw", "-O", driver, "-o", how, disk, path)
    assert_passes(path)
    if driver == "qcow2" and "preallocation=off" in how + ",preallocation=off" * ("preallocation" not in how):
        qemu_img("convert", "-c", "-f", "raw", "-O", driver, "-o", how, disk, path)
        assert_passes(path)


def test_a_qcow2_with_snapshots_bitmaps_and_a_new_size_passes(disk: Path, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", disk, path)
    for step in (
        ("snapshot", "-c", "one", path),
        ("bitmap", "--add", path, "dirty"),
        ("resize", path, "+64M"),
        ("snapshot", "-c", "two", path),
        ("snapshot", "-d", "one", path),
        ("resize", "--shrink", path, f"{SIZE + 8 * MiB - 512}"),
        ("amend", "-o", "lazy_refcounts=on", path),
    ):
        qemu_img(*step)
        assert_passes(path)
