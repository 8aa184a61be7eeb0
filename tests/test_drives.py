"""Config drives of others are read like ours, and a medium from strangers costs neither time nor memory."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest

from fixtures import efi_disks
from fixtures.efi_disks import ESP, LINUX, gpt_disk, mbr_disk
from imagekit.cloudinit.iso import write_iso
from imagekit.cloudinit.vfat import write_vfat
from imagekit.contents import drives
from imagekit.contents.drives import Drive, read_drive
from imagekit.errors import CorruptImage, InvalidImage, SourceError, UnknownFormat, UnsafeImage, UnsupportedFeature
from imagekit.formats.base import GiB, MiB

TREE = {"openstack/latest/meta_data.json": b'{"uuid": "x"}', "openstack/latest/user_data": b"#!/bin/sh\n"}
FAT_TREE = {"META_DAT": b"short", "openstack/latest/meta_data.json": b"{}", "empty": b""}


def read(tmp_path: Path, data: bytes, name: str = "medium.img") -> Drive:
    path = tmp_path / name
    path.write_bytes(data)
    return read_drive(path)


@pytest.mark.parametrize("bits", [12, 16, 32])
@pytest.mark.parametrize("scattered", [False, True], ids=["in a row", "scattered"])
def test_a_fat_file_system_of_another_writer_is_read_whole(tmp_path: Path, bits: int, scattered: bool) -> None:
    (volume,) = read(tmp_path, efi_disks.Fat(FAT_TREE, bits=bits, scattered=scattered).volume()).volumes
    assert (volume.label, volume.tree, volume.details) == ("A VOLUME", FAT_TREE, (f"FAT{bits}",))


@pytest.mark.parametrize("make", ["mbr", "gpt"])
def test_every_partition_with_fat_is_read_and_nothing_else(tmp_path: Path, make: str) -> None:
    first, second = (
        write_vfat(TREE, label="config-2"),
        write_vfat({"meta-data": b"", "user-data": b""}, label="CIDATA"),
    )
    other = b"\xeb\x63\x90".ljust(MiB, b"x")
    disk = (
        mbr_disk([(0x0C, first), (0x83, other), (0x0E, second)])
        if make == "mbr"
        else gpt_disk([(ESP, first), (LINUX, other), (LINUX, second)])
    )
    volumes = read(tmp_path, disk).volumes
    assert [(volume.partition, volume.label, len(volume.tree)) for volume in volumes] == [
        (1, "config-2", 2),
        (3, "CIDATA", 2),
    ]


def test_the_letters_that_windows_nt_remembers_are_shown(tmp_path: Path) -> None:
    """Short names of lower-case letters without a long name, as Windows writes them."""
    volume = bytearray(efi_disks.Fat({"README.TXT": b"1", "USER.DAT": b"2"}, bits=12).volume())
    for name, flags in ((b"README  TXT", 0x18), (b"USER    DAT", 0x08)):
        volume[volume.index(name) + 12] = flags
    (found,) = read(tmp_path, bytes(volume)).volumes
    assert set(found.tree) == {"readme.txt", "user.DAT"}


def test_a_label_in_the_boot_sector_alone_counts(tmp_path: Path) -> None:
    volume = bytearray(write_vfat(TREE, label="config-2"))
    at = volume.rindex(b"config-2   \x08")
    volume[at] = 0xE5
    assert read(tmp_path, bytes(volume)).volumes[0].label == "config-2"
    volume[43:54] = b"NO NAME    "
    assert read(tmp_path, bytes(volume)).volumes[0].label == ""


def test_windows_sees_bare_iso_names_where_there_is_no_joliet(tmp_path: Path) -> None:
    medium = bytearray(write_iso(TREE))
    at = medium.index(b"\x02CD001")
    medium[at] = 0  # a boot record, which nobody reads
    (volume,) = read(tmp_path, bytes(medium)).volumes
    assert volume.details == ("Rock Ridge",)
    assert volume.tree == TREE
    assert set(volume.windows) == {"OPENSTACK/LATEST/META_DATA.JSON", "OPENSTACK/LATEST/USER_DATA"}


def test_an_iso_on_a_large_disk_is_read_and_the_rest_is_not(tmp_path: Path) -> None:
    path = tmp_path / "large.img"
    path.write_bytes(write_iso(TREE))
    with path.open("r+b") as file:
        file.truncate(100 * GiB)
    assert read_drive(path).volumes[0].tree == TREE


def test_a_packed_medium_is_read(tmp_path: Path) -> None:
    drive = read(tmp_path, gzip.compress(write_iso(TREE)), "drive.iso.gz")
    assert drive.volumes[0].tree == TREE


@pytest.mark.parametrize(
    "data",
    [
        bytes(MiB),
        b"\xeb\x3c\x90".ljust(510, b"\xff") + b"\x55\xaa" + bytes(MiB),
        b"\xfa".ljust(510, b"\0") + b"\x55\xaa" + bytes(MiB),
        gpt_disk([(LINUX, bytes(MiB))]),
    ],
    ids=["zeros", "a boot sector", "an MBR", "a GPT"],
)
def test_what_holds_no_file_system_for_guests_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(InvalidImage):
        read(tmp_path, data)


def test_udf_alone_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeature, match="UDF"):
        read(tmp_path, bytes(32768) + b"\0BEA01\1" + bytes(MiB))


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnknownFormat, match="empty"):
        read(tmp_path, b"")


def test_a_file_that_is_not_there_is_a_source_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        read_drive(tmp_path / "missing.iso")


def test_a_medium_that_names_another_file_is_refused(tmp_path: Path) -> None:
    backing = b"/etc/passwd"
    header = struct.pack(">4sIQIIQ", b"QFI\xfb", 2, 72, len(backing), 16, MiB) + struct.pack(
        ">IIQQIIQ", 0, 1, 65536, 0, 0, 0, 0
    )
    with pytest.raises(UnsafeImage):
        read(tmp_path, (header + backing).ljust(3 * 65536, b"\0"), "medium.qcow2")


def test_files_of_more_bytes_than_are_taken_into_memory_are_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drives, "MAX_FILES", 20)
    with pytest.raises(InvalidImage, match="the most that is read"):
        read(tmp_path, write_vfat(TREE))


def damaged(at: int, new: bytes, *, volume: bytes) -> bytes:
    return volume[:at] + new + volume[at + len(new) :]


def test_damage_is_said_with_its_partition(tmp_path: Path) -> None:
    medium = write_vfat({"file": b"x" * 9000}, partitioned=True)
    with pytest.raises(CorruptImage, match=r"partition 1 is damaged: a chain of clusters leaves") as caught:
        read(tmp_path, damaged(MiB + 512 + 3, b"\xf0\xff", volume=medium))
    assert caught.value.offset == MiB


def test_folders_that_contain_themselves_end(tmp_path: Path) -> None:
    volume = bytearray(write_vfat({"a/b/c": b"1"}))
    inner = volume.index(b"B          \x10")
    outer = volume.index(b"A          \x10")
    volume[inner + 26 : inner + 28] = volume[outer + 26 : outer + 28]
    with pytest.raises(CorruptImage, match="contain themselves"):
        read(tmp_path, bytes(volume))


def test_a_name_that_is_there_twice_is_damage(tmp_path: Path) -> None:
    """Which of the two a guest reads is anybody's guess."""
    volume = write_vfat({"AAA": b"1", "BBB": b"2"})
    with pytest.raises(CorruptImage, match="AAA twice"):
        read(tmp_path, volume.replace(b"BBB        \x20", b"AAA        \x20"))


def test_files_that_share_clusters_cannot_claim_more_than_there_is(tmp_path: Path) -> None:
    tree = {f"F{number}": b"x" * MiB for number in range(2)}
    volume = bytearray(write_vfat(tree))
    for number in range(2):
        at = volume.index(b"F%d         \x20" % number)
        volume[at + 28 : at + 32] = struct.pack("<I", len(volume) - 1)
    with pytest.raises(CorruptImage, match="claim more bytes"):
        read(tmp_path, bytes(volume))


def test_folders_without_end_are_not_followed(tmp_path: Path) -> None:
    """Ten thousand folders, all on one chain as long as chains may be: listed in full it would take hours."""
    clusters = 4000
    links = [0xFF8, 0xFFF, *range(3, clusters), 0xFFF]
    fat = b"".join(
        (low | high << 12).to_bytes(3, "little") for low, high in zip(links[::2], [*links[1::2], 0], strict=False)
    )
    volume = bytearray(write_vfat({"big": bytes(7 * MiB - 100_000)}))
    _, fats, entries = struct.unpack_from("<HBH", volume, 14)
    size = struct.unpack_from("<H", volume, 22)[0] * 512
    volume[512 : 512 + len(fat)] = fat[:size]
    root = 512 + fats * size
    for number in range(entries):
        name = b"%-11d" % number
        entry = name + b"\x10" + bytes(14) + struct.pack("<HI", 2 + number * 4, 0)
        volume[root + number * 32 : root + number * 32 + 32] = entry
    data = root + entries * 32
    for at in range(data, len(volume) - 32, 32):
        volume[at : at + 32] = b"\xe5" + bytes(31)  # deleted: goes on, says nothing
    with pytest.raises(CorruptImage, match="directories are longer"):
        read(tmp_path, bytes(volume))
