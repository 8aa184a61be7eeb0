"""FAT file systems are read as their specification says, and damage in them is said, never followed."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixtures import efi_disks
from fixtures.efi_disks import SECTOR, Tree
from imagekit.contents import fat
from imagekit.contents.fat import Entry, Fat, FatError
from imagekit.formats.base import MiB
from imagekit.formats.files import MemoryFile
from imagekit.formats.raw import RawImage

LOADER = ("EFI", "BOOT", "BOOTX64.EFI")
WINDOWS = ("EFI", "Microsoft", "Boot", "bootmgfw.efi")
FILES: Tree = {
    "EFI/BOOT/BOOTX64.EFI": random.Random(1).randbytes(20_000),
    "EFI/Microsoft/Boot/bootmgfw.efi": random.Random(2).randbytes(512),
    "EFI/a name of more than thirteen characters/empty": b"",
}


def opened(data: bytes, start: int = 0, length: int | None = None) -> Fat:
    return Fat(RawImage(MemoryFile(data), len(data)), start, len(data) - start if length is None else length)


def damaged(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


@pytest.fixture(scope="module")
def volume() -> bytes:
    return efi_disks.Fat(FILES).volume()


@pytest.mark.parametrize("bits", [12, 16, 32])
@pytest.mark.parametrize("cluster", [512, 2048])
@pytest.mark.parametrize("scattered", [False, True], ids=["in a row", "scattered"])
def test_every_file_is_found_and_read_whole(bits: int, cluster: int, scattered: bool) -> None:
    system = opened(efi_disks.Fat(FILES, bits=bits, cluster=cluster, scattered=scattered).volume())
    for path, content in FILES.items():
        entry = system.find(path.split("/"))
        assert entry is not None and entry.size == len(content)
        assert system.read(entry, 0, len(content) + 100) == content


@pytest.mark.parametrize("path", [("efi", "boot", "bootx64.efi"), ("EFI", "MICROS~2"), ("Efi", "MICROSOFT")])
def test_names_are_found_in_any_case_by_their_long_and_their_short_form(volume: bytes, path: tuple[str, ...]) -> None:
    assert opened(volume).find(path) is not None


@pytest.mark.parametrize(
    "path",
    [
        ("EFI", "BOOT", "BOOTAA64.EFI"),
        ("BOOTX64.EFI",),
        (*LOADER, "more"),
        ("A VOLUME",),
        ("EFI", "\u00e5ELETED.TXT"),
    ],
    ids=["not there", "elsewhere", "below a file", "a label", "deleted"],
)
def test_what_is_not_there_is_not_found(volume: bytes, path: tuple[str, ...]) -> None:
    assert opened(volume).find(path) is None


def test_the_way_back_to_the_root_is_a_folder_too(volume: bytes) -> None:
    assert opened(volume).find(("EFI", "..", *LOADER)) == opened(volume).find(LOADER)


@given(st.integers(0, 20_500), st.integers(0, 20_500))
def test_any_part_of_a_file_can_be_read(offset: int, length: int) -> None:
    system = opened(efi_disks.Fat(FILES, bits=12, scattered=True).volume())
    entry = system.find(LOADER)
    assert entry is not None
    assert system.read(entry, offset, length) == FILES["EFI/BOOT/BOOTX64.EFI"][offset : offset + length]


def test_a_file_system_is_read_where_its_partition_is(volume: bytes) -> None:
    entry = opened(bytes(4096) + volume, 4096).find(LOADER)
    assert entry == opened(volume).find(LOADER)


def test_a_folder_of_many_files_is_searched_to_its_end() -> None:
    files = {f"EFI/file number {number}": b"x" for number in range(300)} | {"EFI/BOOT/BOOTX64.EFI": b"MZ"}
    assert opened(efi_disks.Fat(files).volume()).find(LOADER) is not None


def test_a_long_name_that_belongs_to_another_entry_is_not_a_name(volume: bytes) -> None:
    """Programs that know no long names leave them standing; their checksum gives them away."""
    short = volume.index(b"MICROS~2")
    orphaned = damaged(volume, short, b"RENAMED ")
    assert opened(orphaned).find(("EFI", "RENAMED")) is not None
    assert opened(orphaned).find(("EFI", "Microsoft")) is None


BPB = {
    "nothing": (0, bytes(SECTOR)),
    "no signature": (510, b"\0\0"),
    "odd sectors": (11, struct.pack("<H", 500)),
    "huge sectors": (11, struct.pack("<H", 32768)),
    "no sectors in a cluster": (13, b"\0"),
    "three sectors in a cluster": (13, b"\3"),
    "nothing reserved": (14, b"\0\0"),
    "no FAT": (16, b"\0"),
    "no clusters": (19, struct.pack("<H", 55)),
}


@pytest.mark.parametrize(("at", "new"), BPB.values(), ids=BPB)
def test_a_boot_sector_that_makes_no_sense_is_refused(volume: bytes, at: int, new: bytes) -> None:
    with pytest.raises(FatError):
        opened(damaged(volume, at, new))


def test_a_partition_without_a_sector_is_refused() -> None:
    with pytest.raises(FatError, match="longer than the partition"):
        opened(b"", 1 << 40, 4096)


def test_nothing_beyond_the_partition_is_read(volume: bytes) -> None:
    with pytest.raises(FatError, match="longer than the partition"):
        opened(volume, 0, 5 * SECTOR).find(LOADER)


@pytest.mark.parametrize("value", [0, 1, 6002, 0xFFF6], ids=["free", "reserved", "behind the last", "far away"])
def test_a_chain_that_leaves_the_file_system_is_refused(volume: bytes, value: int) -> None:
    system = opened(volume)
    entry = system.find(LOADER)
    assert entry is not None
    broken = opened(damaged(volume, SECTOR + (entry.cluster + 1) * 2, struct.pack("<H", value)))
    with pytest.raises(FatError, match="leaves"):
        broken.read(entry, 0, 4096)


def test_a_chain_that_bites_its_tail_ends_with_the_file(volume: bytes) -> None:
    entry = opened(volume).find(LOADER)
    assert entry is not None
    looped = opened(damaged(volume, SECTOR + entry.cluster * 2, struct.pack("<H", entry.cluster)))
    assert len(looped.read(entry, 0, entry.size)) == entry.size


def test_a_folder_that_bites_its_tail_is_searched_for_a_while_only() -> None:
    files = {f"EFI/file number {number}": b"x" for number in range(40)}
    data = efi_disks.Fat(files).volume()
    folder = opened(data).find(("EFI",))
    assert folder is not None
    looped = opened(damaged(data, SECTOR + folder.cluster * 2, struct.pack("<H", folder.cluster)))
    assert looped.find(LOADER) is None


def test_a_file_that_says_it_is_longer_than_its_clusters_is_refused(volume: bytes) -> None:
    entry = opened(volume).find(LOADER)
    assert entry is not None
    with pytest.raises(FatError, match="longer than its clusters"):
        opened(volume).read(Entry(entry.cluster, entry.size + 1000, False), 0, 1 << 20)


def test_chains_that_jump_about_are_not_followed_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    data = efi_disks.Fat({"EFI/x": bytes(MiB)}, bits=32, scattered=True).volume()
    entry = opened(data).find(("EFI", "x"))
    assert entry is not None
    assert opened(data).read(entry, 0, MiB) == bytes(MiB)
    monkeypatch.setattr(fat, "MAX_WINDOWS", 1)
    with pytest.raises(FatError, match="scattered"):
        opened(data).read(entry, 0, MiB)


def test_of_a_huge_file_nothing_is_read(volume: bytes) -> None:
    with pytest.raises(FatError, match="more than are looked at"):
        opened(volume).read(Entry(3, fat.MAX_FILE + 1, False), 0, 512)


@given(st.data())
def test_no_damage_is_more_than_a_fat_error(data: st.DataObject) -> None:
    """Whatever bytes stand in the boot sector, the FAT and the directories."""
    bits = data.draw(st.sampled_from([12, 16]))
    volume = bytearray(efi_disks.Fat(FILES, bits=bits).volume())
    places = (
        st.integers(0, 63) | st.integers(SECTOR, SECTOR + 200) | st.integers(len(volume) // 60, len(volume) // 10)
    )
    for _ in range(data.draw(st.integers(1, 8))):
        volume[data.draw(places)] = data.draw(st.integers(0, 255))
    try:
        system = opened(bytes(volume))
        for path in (LOADER, WINDOWS):
            entry = system.find(path)
            if entry is not None:
                system.read(entry, 0, 4096)
                system.read(entry, entry.size - 100, 4096)
    except FatError as error:
        assert str(error)
