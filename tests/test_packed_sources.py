"""Packed images through the library: opened as what is inside; and partition tables that a disk outgrows."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import imagekit
from fixtures import gpt_disks
from imagekit.contents import gpt
from imagekit.errors import CorruptImage, SourceError, UnsafeImage, UnsupportedFeature
from imagekit.formats.base import GiB, MiB
from imagekit.formats.encoders import zstd
from imagekit.progress import Progress
from tests.disks import noise

DISK = noise(MiB, 1) + bytes(4 * MiB) + noise(70 * 512, 2)


def _tarred(image: Path, packed: Path, mode: str) -> None:
    with tarfile.open(packed, mode) as archive:  # type: ignore[call-overload]
        archive.add(image, "folder/disk.qcow2")


def _zipped(image: Path, packed: Path) -> None:
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(image, "disk.qcow2")
        archive.writestr("README.txt", "about the disk")


PACKERS: dict[str, Callable[[Path, Path], object]] = {
    "gz": lambda image, packed: packed.write_bytes(gzip.compress(image.read_bytes())),
    "bz2": lambda image, packed: packed.write_bytes(bz2.compress(image.read_bytes())),
    "xz": lambda image, packed: packed.write_bytes(lzma.compress(image.read_bytes())),
    "zst": lambda image, packed: packed.write_bytes(zstd(image.read_bytes())),
    "zip": _zipped,
    "tar": lambda image, packed: _tarred(image, packed, "w"),
    "tar.xz": lambda image, packed: _tarred(image, packed, "w:xz"),
}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/disk.raw").write_bytes(DISK)
    imagekit.convert(tmp_path / "in/disk.raw", tmp_path / "in/disk.qcow2", compression="zlib", sync=False)
    return tmp_path / "in/disk.qcow2"


@pytest.mark.parametrize("packer", PACKERS)
def test_a_packed_image_is_converted_as_what_is_inside(packer: str, image: Path, tmp_path: Path) -> None:
    packed = tmp_path / f"disk.qcow2.{packer}"
    PACKERS[packer](image, packed)
    report = imagekit.convert(packed, tmp_path / "out.vhdx", verify="content", sync=False)
    assert (report.source, report.source_format, report.source_size) == (
        str(packed),
        "qcow2",
        packed.stat().st_size,
    )
    assert any("was unpacked" in note for note in report.notes)
    assert imagekit.compare(tmp_path / "out.vhdx", tmp_path / "in/disk.raw").same
    assert sorted(one.name for one in tmp_path.iterdir()) == ["disk.qcow2." + packer, "in", "out.vhdx"]


def test_the_format_declared_is_that_of_what_is_inside(image: Path, tmp_path: Path) -> None:
    packed = tmp_path / "disk.gz"
    PACKERS["gz"](image, packed)
    assert imagekit.info(packed, format="qcow2").info.format == "qcow2"
    with pytest.raises(UnsafeImage, match="rule format-mismatch"):
        imagekit.convert(packed, tmp_path / "out.raw", source_format="vhd")


def test_bytes_declared_raw_are_not_unpacked(tmp_path: Path) -> None:
    """A guest may write anything to its first sector: a raw disk that looks packed is a raw disk."""
    packed = tmp_path / "disk.img"
    packed.write_bytes(gzip.compress(noise(100_000)).ljust(200_192, b"\0"))
    assert imagekit.info(packed, format="raw").info.virtual_size == 200_192


def test_a_packed_raw_disk_is_a_raw_disk(tmp_path: Path) -> None:
    packed = tmp_path / "disk.raw.xz"
    packed.write_bytes(lzma.compress(DISK))
    found = imagekit.info(packed)
    assert (found.info.format, found.info.virtual_size) == ("raw", len(DISK))
    assert [one.rule for one in found.findings] == ["wrapped"]


def test_a_packed_image_cut_short_is_corrupt_and_leaves_nothing(image: Path, tmp_path: Path) -> None:
    packed = tmp_path / "disk.qcow2.gz"
    packed.write_bytes(gzip.compress(image.read_bytes())[:-20])
    with pytest.raises(CorruptImage):
        imagekit.convert(packed, tmp_path / "out.vhd")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["disk.qcow2.gz", "in"]


def test_a_packed_image_is_not_changed_in_place(image: Path, tmp_path: Path) -> None:
    packed = tmp_path / "disk.qcow2.gz"
    PACKERS["gz"](image, packed)
    before = packed.read_bytes()
    for change in (
        lambda: imagekit.resize(packed, GiB),
        lambda: imagekit.check(packed, repair=True),
    ):
        with pytest.raises(UnsupportedFeature, match="packed"):
            change()
    assert packed.read_bytes() == before


def test_an_archive_that_changes_while_it_is_converted_is_noticed(image: Path, tmp_path: Path) -> None:
    packed = tmp_path / "disk.qcow2.gz"
    PACKERS["gz"](image, packed)

    def touch(told: Progress) -> None:
        if told.phase == "copy":
            with packed.open("ab") as file:
                file.write(b"\0")

    with pytest.raises(SourceError, match="changed while it was read"):
        imagekit.convert(packed, tmp_path / "out.vhd", progress=touch)
    assert not (tmp_path / "out.vhd").exists()


# --- partition tables ------------------------------------------------------------------------------------------


def gpt_disk(tmp_path: Path, sectors: int = 40_001) -> Path:
    path = tmp_path / "gpt.raw"
    path.write_bytes(gpt_disks.make(gpt_disks.Recipe(sectors, [gpt_disks.Part(64, 20_000)])))
    return path


@pytest.mark.parametrize("target", ["a.vhd", "a.vhdx", "a.qcow2", "a.raw"])
def test_a_disk_that_grows_gets_its_backup_header_to_the_last_sector_when_asked(target: str, tmp_path: Path) -> None:
    source = gpt_disk(tmp_path)
    report = imagekit.convert(source, tmp_path / target, size=64 * MiB, fix_gpt=True, verify="content", sync=False)
    assert "the GPT's backup header was moved to the last sector" in report.notes
    with imagekit.open_image(tmp_path / target) as disk:
        table = gpt.find(disk)
        assert table is not None
        assert gpt.backup_is_last(table, disk.virtual_size)
        assert disk.pread(disk.virtual_size - 512, 8) == b"EFI PART"
        plain = source.read_bytes()
        assert disk.pread(64 * 512, 19_000 * 512) == plain[64 * 512 : 19_064 * 512]


def test_a_disk_that_grows_is_told_where_its_backup_header_is_otherwise(tmp_path: Path) -> None:
    source = gpt_disk(tmp_path)
    report = imagekit.convert(source, tmp_path / "a.vhd", align=MiB, sync=False)
    assert report.virtual_size == 20 * MiB
    assert "the GPT's backup header is not in the last sector; --fix-gpt moves it there" in report.notes
    with imagekit.open_image(tmp_path / "a.vhd") as disk:
        assert disk.pread(0, source.stat().st_size) == source.read_bytes()


def test_azure_gets_whole_mib_a_fixed_vhd_and_a_sound_gpt(tmp_path: Path) -> None:
    source = gpt_disk(tmp_path)
    report = imagekit.convert(source, tmp_path / "a.vhd", profile="azure", verify="content", sync=False)
    assert (report.virtual_size, report.target_size) == (20 * MiB, 20 * MiB + 512)
    assert (tmp_path / "a.vhd").read_bytes()[-512 + 28 : -512 + 40][8:] == b"Wi2k"
    with imagekit.open_image(tmp_path / "a.vhd") as disk:
        table = gpt.find(disk)
        assert table is not None
        assert gpt.backup_is_last(table, 20 * MiB)


def test_without_a_target_the_profile_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = gpt_disk(tmp_path, 8192)
    monkeypatch.chdir(tmp_path)
    report = imagekit.convert(source, profile="hyperv", sync=False)
    assert (report.target, report.target_format, report.subformat) == ("gpt.vhdx", "vhdx", "dynamic")
    assert (tmp_path / "gpt.vhdx").exists()
