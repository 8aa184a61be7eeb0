"""Formats that only qemu-img knows: never without leave, and then with the same promises as any conversion."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import imagekit
from imagekit.errors import SourceError, TargetError, UnsafeImage, UnsupportedFeature
from imagekit.formats.base import MiB
from imagekit.report import Report
from tests.disks import noise
from tests.oracles import need_tool

pytestmark = pytest.mark.oracle
LEAVE = ("external-qemu-img",)
DISK = noise(MiB, 1) + bytes(3 * MiB) + noise(512 * 3, 2)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    need_tool("qemu-img")
    path = tmp_path / "disk.raw"
    path.write_bytes(DISK)
    return path


def by_qemu_img(raw: Path, fmt: str) -> Path:
    path = raw.with_suffix(f".{fmt}")
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", fmt, str(raw), str(path)], check=True)
    return path


@pytest.mark.parametrize("fmt", ["qed", "parallels"])
def test_a_format_that_only_qemu_img_reads_needs_leave_by_name(fmt: str, raw: Path, tmp_path: Path) -> None:
    path = by_qemu_img(raw, fmt)
    with pytest.raises(UnsupportedFeature, match=f"this is a {fmt} image"):
        imagekit.convert(path, tmp_path / "a.vhdx", allow=LEAVE)  # not named
    with pytest.raises(UnsafeImage) as caught:
        imagekit.convert(path, tmp_path / "a.vhdx", source_format=fmt)
    assert caught.value.rule == "external-qemu-img"
    report = imagekit.convert(path, tmp_path / "a.vhdx", source_format=fmt, allow=LEAVE, verify="content", sync=False)
    assert report.source == str(path)
    assert imagekit.compare(tmp_path / "a.vhdx", raw).same
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.vhdx", f"disk.{fmt}", "disk.raw"]


def test_a_look_at_it_needs_leave_too(raw: Path) -> None:
    path = by_qemu_img(raw, "qed")
    with pytest.raises(UnsafeImage, match="external-qemu-img"):
        imagekit.info(path, format="qed")


@pytest.mark.parametrize(
    ("fmt", "subformat"),
    [
        ("vmdk", None),
        ("vmdk", "streamOptimized"),
        ("vdi", None),
        ("vdi", "fixed"),
        ("qed", None),
        ("parallels", None),
    ],
)
def test_a_target_that_only_qemu_img_writes_holds_the_disk(
    fmt: str, subformat: str | None, raw: Path, tmp_path: Path
) -> None:
    source, target = tmp_path / "disk.qcow2", tmp_path / f"out.{fmt}"
    imagekit.convert(raw, source, sync=False)
    with pytest.raises(UnsafeImage, match="external-qemu-img"):
        imagekit.convert(source, target, target_format=fmt, subformat=subformat)
    report = imagekit.convert(
        source, target, target_format=fmt, subformat=subformat, allow=LEAVE, verify="content", sync=False
    )
    assert isinstance(report, Report)
    assert (report.target_format, report.target_size) == (fmt, target.stat().st_size)
    assert report.verified == ("content" if fmt in ("vmdk", "vdi") else "none")
    done = subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", fmt, str(raw), str(target)], capture_output=True)
    assert done.returncode == 0, done.stdout
    assert sorted(one.name for one in tmp_path.iterdir()) == ["disk.qcow2", "disk.raw", target.name]


def test_an_existing_target_stays_unless_told(raw: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.vdi"
    target.write_bytes(b"mine")
    with pytest.raises(TargetError, match="exists already"):
        imagekit.convert(raw, target, target_format="vdi", allow=LEAVE)
    assert target.read_bytes() == b"mine"
    imagekit.convert(raw, target, target_format="vdi", allow=LEAVE, overwrite=True, sync=False)
    assert imagekit.info(target).info.format == "vdi"


def test_a_failure_leaves_nothing(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        imagekit.convert(tmp_path / "missing.raw", tmp_path / "out.vdi", target_format="vdi", allow=LEAVE)
    with pytest.raises(UnsupportedFeature, match="no subformat 'flat'"):
        imagekit.convert(raw, tmp_path / "out.vdi", target_format="vdi", subformat="flat", allow=LEAVE)
    for options in ({"dry_run": True}, {"verify": "qemu-img"}, {"block_size": MiB}):
        with pytest.raises(UnsupportedFeature):
            imagekit.convert(raw, tmp_path / "out.vdi", target_format="vdi", allow=LEAVE, **options)
    assert [one.name for one in tmp_path.iterdir()] == ["disk.raw"]
