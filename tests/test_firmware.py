"""Which generation and which Secure Boot a disk is made for, from the boot loader on it."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixtures.efi_disks import ESP, LINUX, MIB, SECTOR, UEFI_CA, WINDOWS_CA, Fat, gpt_disk, loader, mbr_disk
from fixtures.uefi_guest import uefi_application
from imagekit.contents.firmware import Choice, Loader, SecureBoot, choose, find_loader
from imagekit.errors import CorruptImage, UnsupportedFeature
from imagekit.formats.files import MemoryFile
from imagekit.formats.raw import RawImage

PATH = "EFI/BOOT/BOOTX64.EFI"
REASON = r"the EFI system partition has \EFI\BOOT\BOOTX64.EFI"


def image(data: bytes) -> RawImage:
    return RawImage(MemoryFile(data), len(data))


def esp(program: bytes | None = None, **options: int) -> bytes:
    """An EFI system partition with ``program`` as its boot loader."""
    return Fat({PATH: loader() if program is None else program}, **options).volume()  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [12, 16, 32])
def test_a_loader_in_the_system_partition_of_a_gpt_is_found(bits: int) -> None:
    disk = gpt_disk([(LINUX, bytes(MIB)), (ESP, esp(bits=bits))])
    assert find_loader(image(disk)) == Loader(True, REASON)


def test_a_loader_in_a_partition_of_type_ef_of_an_mbr_is_found() -> None:
    assert find_loader(image(mbr_disk([(0x83, bytes(MIB)), (0xEF, esp())]))) == Loader(True, REASON)


def test_sectors_of_4096_bytes_count_as_such() -> None:
    disk = gpt_disk([(ESP, esp())], sector=4096)
    assert find_loader(image(disk)).found


def test_a_program_that_boots_for_real_is_a_loader() -> None:
    assert find_loader(image(gpt_disk([(ESP, esp(uefi_application()))]))) == Loader(True, REASON)


def test_of_two_system_partitions_either_may_have_it() -> None:
    empty = Fat({"EFI/debian/grub.cfg": b""}).volume()
    assert find_loader(image(gpt_disk([(ESP, empty), (ESP, esp())]))).found
    assert find_loader(image(gpt_disk([(ESP, b"rubbish" * 1000), (ESP, esp())]))).found


NO_LOADER: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing at all": (lambda: b"", "no EFI system partition"),
    "an empty disk": (lambda: bytes(4 * MIB), "no EFI system partition"),
    "a GPT without one": (lambda: gpt_disk([(LINUX, esp())]), "no EFI system partition"),
    "an MBR without one": (lambda: mbr_disk([(0x83, esp())]), "no EFI system partition"),
    "no loader": (lambda: gpt_disk([(ESP, Fat({"EFI/x": b""}).volume())]), r"has no \\EFI\\BOOT\\BOOTX64\.EFI"),
    "a folder of that name": (lambda: gpt_disk([(ESP, Fat({f"{PATH}/x": b""}).volume())]), "has no"),
    "for another processor": (lambda: gpt_disk([(ESP, esp(loader(machine=0xAA64)))]), "no program for x86-64"),
    "not a program": (lambda: gpt_disk([(ESP, esp(b"#!/bin/sh"))]), "no program for x86-64"),
    "an empty file": (lambda: gpt_disk([(ESP, esp(b""))]), "no program for x86-64"),
    "another file system": (lambda: gpt_disk([(ESP, b"\x53\xef" * 4096)]), "cannot be read: it holds no FAT"),
    "cut short": (lambda: mbr_disk([(0xEF, esp())])[: MIB + 3 * SECTOR], "cannot be read"),
    "a table of an earlier life": (lambda: bytes(SECTOR) + gpt_disk([(ESP, esp())])[SECTOR:], "no EFI system"),
}


@pytest.mark.parametrize(("make", "reason"), NO_LOADER.values(), ids=NO_LOADER)
def test_without_a_loader_the_reason_says_what_is_missing(make: Callable[[], bytes], reason: str) -> None:
    found = find_loader(image(make()))
    assert not found.found and found.signer is None
    assert re.search(reason, found.reason)


@pytest.mark.parametrize(
    ("signers", "signer"),
    [
        ([], None),
        ([UEFI_CA], "linux"),
        (["Microsoft UEFI CA 2023"], "linux"),
        ([UEFI_CA, "Microsoft UEFI CA 2023"], "linux"),
        ([WINDOWS_CA], "windows"),
        (["Windows UEFI CA 2023"], "windows"),
        (["Some Company CA"], None),
    ],
    ids=["nobody", "UEFI CA", "its successor", "both", "Windows", "its successor too", "somebody else"],
)
def test_the_signature_tells_for_whom_the_loader_is(signers: list[str], signer: SecureBoot | None) -> None:
    found = find_loader(image(gpt_disk([(ESP, esp(loader(signers=signers)))])))
    assert (found.signer, found.signed) == (signer, bool(signers))


def test_the_name_of_an_authority_outside_the_signature_means_nothing() -> None:
    found = find_loader(image(gpt_disk([(ESP, esp(loader()[:-100] + UEFI_CA.ljust(100).encode()))])))
    assert (found.found, found.signed, found.signer) == (True, False, None)


@pytest.mark.parametrize("where", [(0xFFFFFFFF, 0xFFFFFFFF), (0, 0xFFFFFFFF), (7000, 1), (1, 0)])
def test_a_signature_that_is_not_where_it_should_be_is_none(where: tuple[int, int]) -> None:
    program = bytearray(loader())
    directory = 0x80 + 24 + 112 + 4 * 8
    program[directory : directory + 8] = struct.pack("<II", *where)
    found = find_loader(image(gpt_disk([(ESP, esp(bytes(program)))])))
    assert found.found and found.signer is None


@given(st.data())
def test_no_damage_of_the_disk_is_an_error(data: st.DataObject) -> None:
    disk = bytearray(gpt_disk([(ESP, Fat({PATH: loader(signers=[UEFI_CA])}, bits=12).volume())]))
    start = MIB + 16 * SECTOR  # where the files begin, about
    places = st.integers(0, 1200) | st.integers(MIB, MIB + 100) | st.integers(start, start + 4096)
    for _ in range(data.draw(st.integers(1, 8))):
        disk[data.draw(places)] = data.draw(st.integers(0, 255))
    assert find_loader(image(bytes(disk))).reason


def test_an_image_that_cannot_be_read_is_an_error() -> None:
    class Broken(RawImage):
        def pread_into(self, offset: int, buffer: memoryview) -> None:
            raise CorruptImage("broken")

    with pytest.raises(CorruptImage):
        find_loader(Broken(MemoryFile(bytes(MIB)), MIB))


# --- the decision ----------------------------------------------------------------------------------------------

NONE = Loader(False, "the disk has no EFI system partition")
UNSIGNED = Loader(True, REASON)
SIGNED: dict[SecureBoot, Loader] = {
    "linux": Loader(True, REASON, "linux", True),
    "windows": Loader(True, REASON, "windows", True),
}
OWN = Loader(True, REASON, None, True)


def test_a_disk_without_loader_is_generation_1() -> None:
    assert choose("auto", "auto", NONE) == Choice(1, "off", NONE.reason, "generation 1 has none")


@pytest.mark.parametrize(
    ("found", "secure_boot", "why"),
    [
        (SIGNED["linux"], "linux", "the boot loader is signed by the Microsoft UEFI CA"),
        (SIGNED["windows"], "windows", "the boot loader is signed by Microsoft Windows"),
        (UNSIGNED, "off", "the boot loader is unsigned"),
        (OWN, "off", "the boot loader is signed by neither Microsoft authority"),
    ],
    ids=["UEFI CA", "Windows", "unsigned", "somebody else's"],
)
def test_a_disk_with_a_loader_is_generation_2_with_the_template_that_lets_it_through(
    found: Loader, secure_boot: SecureBoot, why: str
) -> None:
    assert choose("auto", "auto", found) == Choice(2, secure_boot, REASON, why)


@pytest.mark.parametrize("generation", [1, 2])
def test_what_was_asked_for_is_done(generation: Literal[1, 2]) -> None:
    for found in (NONE, SIGNED["linux"]):
        choice = choose(generation, "off", found)
        assert (choice.generation, choice.secure_boot, choice.generation_reason) == (generation, "off", "as asked")


def test_generation_2_for_a_disk_that_will_not_boot_on_it_is_warned_about() -> None:
    choice = choose(2, "auto", NONE)
    assert (choice.generation, choice.secure_boot) == (2, "linux")
    assert choice.warnings == ("the disk has no EFI system partition: as generation 2 it has nothing to boot",)
    assert choose(2, "auto", SIGNED["linux"]).warnings == ()


@pytest.mark.parametrize("secure_boot", ["linux", "windows"])
@pytest.mark.parametrize("found", [UNSIGNED, OWN, *SIGNED.values()], ids=["unsigned", "own", "linux", "windows"])
def test_a_template_that_will_refuse_the_loader_is_warned_about(
    found: Loader, secure_boot: Literal["linux", "windows"]
) -> None:
    choice = choose("auto", secure_boot, found)
    assert choice.secure_boot == secure_boot
    assert any("will refuse it" in warning for warning in choice.warnings) == (found.signer != secure_boot)


def test_secure_boot_off_is_never_warned_about() -> None:
    assert choose("auto", "off", UNSIGNED).warnings == ()


@pytest.mark.parametrize("generation", ["auto", 1])
def test_secure_boot_with_generation_1_is_refused_with_the_reason(generation: Literal["auto", 1]) -> None:
    with pytest.raises(UnsupportedFeature, match="generation 1") as caught:
        choose(generation, "linux", NONE)
    assert ("as asked" if generation == 1 else NONE.reason) in caught.value.message
    assert caught.value.hint is not None and "--generation 2" in caught.value.hint
