"""Against sfdisk and fdisk: the same partitions, and the same bytes when the second copy is moved."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from fixtures.gpt_disks import SYSTEM, Part, Recipe, make
from imagekit.contents import gpt
from imagekit.contents.patched import PatchedImage
from imagekit.formats.files import LocalFile
from imagekit.formats.raw import RawImage
from tests.oracles import need_tool

pytestmark = pytest.mark.oracle

MiB = 1 << 20
PARTS = (Part(2048, 4095, "root"), Part(4096, 6000, "EFI", SYSTEM))
RECIPES = {
    "usual": Recipe(8192, PARTS),
    "aligned": Recipe(8192, PARTS, first_usable=2048),
    "many entries": Recipe(8192, PARTS, entry_count=256),
    "large entries": Recipe(8192, PARTS, entry_size=256),
    "windows": Recipe(8192, PARTS, mbr=[(0xEE, 1, 0xFFFFFFFF)]),
    "empty": Recipe(8192),
}
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def sfdisk(*arguments: str | Path, answer: str = "") -> str:
    done = subprocess.run(
        [need_tool("sfdisk"), *map(str, arguments)], input=answer, capture_output=True, text=True, env={"LC_ALL": "C"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def table_of(path: Path) -> gpt.Gpt:
    with LocalFile.open_source(path) as file:
        found = gpt.find(RawImage(file, file.size))
    assert found is not None
    return found


def assert_read_alike(path: Path) -> None:
    theirs = json.loads(sfdisk("-J", path))["partitiontable"]
    ours = table_of(path)
    assert ours.header is not None
    assert theirs["id"] == str(ours.header.disk_guid).upper()
    assert (theirs["firstlba"], theirs["lastlba"]) == (ours.header.first_usable_lba, ours.header.last_usable_lba)
    assert [
        (one["start"], one["size"], one["type"], one["uuid"], one.get("name", ""))
        for one in theirs.get("partitions", [])
    ] == [
        (one.first_lba, one.last_lba - one.first_lba + 1, str(one.type).upper(), str(one.unique).upper(), one.name)
        for one in ours.partitions
    ]


def assert_sound(path: Path) -> None:
    said = sfdisk("--verify", path)
    assert "No errors detected" in said, said
    assert "mismatch" not in said, said


def moved(path: Path, size: int, target: Path) -> None:
    with LocalFile.open_source(path) as file:
        image = RawImage(file, file.size)
        target.write_bytes(PatchedImage(image, gpt.moved_backup(image, size), size).pread(0, size))


@every_recipe
def test_made_disks_are_read_alike(recipe: Recipe, tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(make(recipe))
    assert_sound(disk)
    assert_read_alike(disk)
    assert table_of(disk).problems == ()


def test_a_disk_that_sfdisk_partitioned_is_read_alike(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(64 * MiB)
    sfdisk("-q", disk, answer="label: gpt\nsize=8MiB, type=uefi, name=esp\nsize=16MiB, name=root\ntype=swap\n")
    assert_read_alike(disk)
    table = table_of(disk)
    assert table.problems == ()
    assert gpt.backup_is_last(table, 64 * MiB)
    grown = tmp_path / "grown.raw"
    moved(disk, 65 * MiB, grown)
    assert_sound(grown)
    assert_read_alike(grown)


@every_recipe
@pytest.mark.parametrize("more", [1, 20, 40, 2048], ids="{} sectors".format)
def test_the_second_copy_is_moved_to_the_same_bytes(recipe: Recipe, more: int, tmp_path: Path) -> None:
    """But for the old header, which sfdisk leaves behind."""
    disk, theirs, ours = tmp_path / "disk.raw", tmp_path / "theirs.raw", tmp_path / "ours.raw"
    data = make(recipe)
    size = len(data) + more * 512
    disk.write_bytes(data)
    theirs.write_bytes(data + bytes(more * 512))
    sfdisk("-q", "--relocate", "gpt-bak-std", theirs)
    moved(disk, size, ours)
    assert_sound(ours)
    assert_read_alike(ours)
    expected = bytearray(theirs.read_bytes())
    old = slice(len(data) - 512, len(data))
    if expected[old] == data[old]:  # where the new copy is not over it
        expected[old] = bytes(512)
    assert ours.read_bytes() == expected


def fdisk_of_4096(path: Path) -> tuple[list[tuple[int, int]], str]:
    """First and last sectors of the partitions, and the complaints."""
    done = subprocess.run(
        [need_tool("fdisk"), "-b", "4096", "-l", str(path)], capture_output=True, text=True, env={"LC_ALL": "C"}
    )
    assert "Disklabel type: gpt" in done.stdout, done.stderr
    rows = re.findall(r"^\S+raw\d\s+(\d+)\s+(\d+)", done.stdout, re.MULTILINE)
    return [(int(first), int(last)) for first, last in rows], done.stderr


def test_sectors_of_4096_bytes_are_understood_by_fdisk(tmp_path: Path) -> None:
    disk, grown = tmp_path / "disk.raw", tmp_path / "grown.raw"
    disk.write_bytes(make(Recipe(1024, (Part(256, 511, "root"), Part(512, 700, "EFI", SYSTEM)), sector_size=4096)))
    moved(disk, 8 * MiB, grown)
    for path in (disk, grown):
        expected = [(one.first_lba, one.last_lba) for one in table_of(path).partitions]
        assert fdisk_of_4096(path) == (expected, "")
    with disk.open("ab") as file:
        file.truncate(8 * MiB)
    assert "backup GPT table is not on the end" in fdisk_of_4096(disk)[1]  # so its silence above means something
