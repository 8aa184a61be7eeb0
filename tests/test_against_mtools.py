"""FAT file systems that dosfstools and mtools made are read, and theirs is the last word on our own fixture."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from fixtures import efi_disks
from fixtures.efi_disks import ESP, MIB, SECTOR, UEFI_CA, gpt_disk, loader
from imagekit import api
from imagekit.contents.fat import Fat
from imagekit.contents.firmware import find_loader
from tests.oracles import need_tool

pytestmark = pytest.mark.oracle

FILES = {
    "EFI/BOOT/BOOTX64.EFI": loader(signers=[UEFI_CA], padding=100_000),
    "EFI/Microsoft/Boot/bootmgfw.efi": random.Random(1).randbytes(70_000),
    "EFI/lower/case.txt": b"both parts in lower case",
    "EFI/a long name, with a comma/and ünïcode.txt": b"long",
}


def run(program: str, *arguments: str) -> str:
    done = subprocess.run([need_tool(program), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (4 * MIB, ["-F", "12"]),
        (64 * MIB, ["-F", "16"]),
        (64 * MIB, ["-F", "32", "-s", "1"]),
        (64 * MIB, ["-F", "32"]),  # fewer clusters than the specification asks for: found in the wild
        (16 * MIB, ["-S", "4096"]),
    ],
    ids=["FAT12", "FAT16", "FAT32", "small FAT32", "4 KiB sectors"],
)
def test_what_mtools_wrote_is_found_and_read_whole(tmp_path: Path, size: int, options: list[str]) -> None:
    volume = tmp_path / "volume.img"
    with volume.open("wb") as file:
        file.truncate(size)
    run("mkfs.vfat", *options, str(volume))
    folders = {str(parent) for path in FILES for parent in Path(path).parents if str(parent) != "."}
    run("mmd", "-i", str(volume), *(f"::{folder}" for folder in sorted(folders)))
    for number, (path, content) in enumerate(FILES.items()):
        source = tmp_path / f"source{number}"
        source.write_bytes(content)
        run("mcopy", "-i", str(volume), str(source), f"::{path}")
    with api.open_image(volume, format="raw") as image:
        system = Fat(image, 0, size)
        for path, content in FILES.items():
            entry = system.find(path.split("/"))
            assert entry is not None, path
            assert system.read(entry, 0, entry.size) == content


def test_the_loader_is_found_on_a_disk_that_sfdisk_and_mtools_made(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(80 * MIB)
    table = "label: gpt\nsize=1M, type=L\nsize=64M, type=U\n"
    subprocess.run([need_tool("sfdisk"), "-q", str(disk)], input=table, text=True, check=True, capture_output=True)
    run("mkfs.vfat", "-F", "16", "--offset", str(2 * MIB // SECTOR), str(disk), str(64 * 1024))
    (tmp_path / "loader").write_bytes(FILES["EFI/BOOT/BOOTX64.EFI"])
    where = f"{disk}@@2M"
    run("mmd", "-i", where, "::/EFI", "::/EFI/BOOT")
    run("mcopy", "-i", where, str(tmp_path / "loader"), "::/EFI/BOOT/BOOTX64.EFI")
    with api.open_image(disk, format="raw") as image:
        found = find_loader(image)
    assert (found.found, found.signer) == (True, "linux")


@pytest.mark.parametrize("bits", [12, 16, 32])
@pytest.mark.parametrize("scattered", [False, True], ids=["in a row", "scattered"])
def test_the_fixtures_file_system_is_sound_and_holds_its_files(tmp_path: Path, bits: int, scattered: bool) -> None:
    """Else a reader that agrees with it would prove nothing."""
    volume = tmp_path / "volume.img"
    volume.write_bytes(efi_disks.Fat(FILES, bits=bits, scattered=scattered).volume())
    run("fsck.vfat", "-n", str(volume))
    for path, content in FILES.items():
        copy = tmp_path / "copy"
        run("mcopy", "-n", "-i", str(volume), f"::{path}", str(copy))
        assert copy.read_bytes() == content
        copy.unlink()


def test_the_fixtures_partition_table_is_sound(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(gpt_disk([(ESP, efi_disks.Fat(FILES).volume())]))
    said = run("sfdisk", "--verify", str(tmp_path / "disk.raw"))
    assert "No errors detected" in said
    assert "EFI System" in run("sfdisk", "--list", str(tmp_path / "disk.raw"))
