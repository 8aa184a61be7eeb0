"""GPTs: read from a disk, judged, and moved to the end of a larger one."""

from __future__ import annotations

import contextlib
import random
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixtures.gpt_disks import DISK_GUID, LINUX, SYSTEM, Part, Recipe, make
from imagekit.contents import gpt
from imagekit.contents.patched import Patch, PatchedImage
from imagekit.errors import UnsupportedFeature
from imagekit.formats.files import MemoryFile
from imagekit.formats.raw import RawImage
from tests.disks import content, noise

PARTS = (Part(64, 99, "root"), Part(100, 149, "EFI system", SYSTEM, 1 << 63 | 1), Part(40, 60, "täst 💾"))
SMALL = Recipe(256, PARTS)
LARGE_SECTORS = Recipe(200, (Part(64, 99, "root"),), sector_size=4096)
both_sizes = pytest.mark.parametrize("recipe", [SMALL, LARGE_SECTORS], ids=["512", "4096"])


def disk(data: bytes, sector_size: int = 512) -> RawImage:
    image = RawImage(MemoryFile(data), len(data))
    image.sector_size = sector_size
    return image


def found(recipe: Recipe) -> gpt.Gpt:
    table = gpt.find(disk(make(recipe)))
    assert table is not None
    return table


def codes(table: gpt.Gpt) -> list[str]:
    return [problem.code for problem in table.problems]


def grown(data: bytes, more: int) -> PatchedImage:
    """The disk with that many bytes more, its GPT moved to the new end."""
    image = disk(data)
    return PatchedImage(image, gpt.moved_backup(image, len(data) + more), len(data) + more)


# --- reading ---------------------------------------------------------------------------------------------------


def test_partitions_are_read_as_they_were_written() -> None:
    table = found(SMALL)
    uniques = [uuid.UUID(int=0xFACE0000 + number) for number in (1, 2, 3)]
    assert table.partitions == (
        gpt.Partition(1, LINUX, uniques[0], 64, 99, 0, "root"),
        gpt.Partition(2, SYSTEM, uniques[1], 100, 149, 1 << 63 | 1, "EFI system"),
        gpt.Partition(3, LINUX, uniques[2], 40, 60, 0, "täst 💾"),
    )
    assert gpt.SYSTEM_PARTITION == SYSTEM
    assert (table.sector_size, table.problems) == (512, ())


@both_sizes
def test_both_copies_are_read(recipe: Recipe) -> None:
    table = found(recipe)
    length = -(-128 * 128 // recipe.sector_size)
    usable = (2 + length, recipe.sectors - length - 2)
    common = {"disk_guid": DISK_GUID, "entry_count": 128, "entry_size": 128}
    assert table.sector_size == recipe.sector_size
    assert table.primary is not None
    assert table.primary == table.header
    crc = table.primary.entries_crc
    assert table.primary == gpt.Header(1, recipe.sectors - 1, *usable, entries_lba=2, entries_crc=crc, **common)  # type: ignore[arg-type]
    assert table.backup == gpt.Header(
        recipe.sectors - 1, 1, *usable, entries_lba=recipe.sectors - 1 - length, entries_crc=crc, **common  # type: ignore[arg-type]
    )  # fmt: skip


@both_sizes
def test_a_header_is_packed_as_it_was_read(recipe: Recipe) -> None:
    data, table = make(recipe), found(recipe)
    for header in (table.primary, table.backup):
        assert header is not None
        at = header.my_lba * recipe.sector_size
        assert header.pack() == data[at : at + 92]


def test_the_disk_s_own_sector_size_is_looked_at_first() -> None:
    """In a disk of 4096-byte sectors, bytes 512.. belong to the first sector, and are anybody's."""
    data = bytearray(make(LARGE_SECTORS))
    data[512:520] = b"EFI PART"
    for sector_size in (512, 4096):
        table = gpt.find(disk(bytes(data), sector_size))
        assert table is not None
        assert table.sector_size == sector_size


@pytest.mark.parametrize(
    "data",
    [b"", bytes(511), bytes(512), bytes(100_000), noise(100_000), make(SMALL)[:512][:510] + b"\0\0" + bytes(99_000)],
    ids=["empty", "short", "sector", "zeros", "noise", "no signature"],
)
def test_a_disk_without_one_has_none(data: bytes) -> None:
    assert gpt.find(disk(data)) is None
    assert gpt.moved_backup(disk(data), len(data) + 4096) == ()


def test_an_ordinary_partition_table_is_none() -> None:
    data = make(Recipe(256, mbr=[(0x83, 64, 100)]))
    without = data[:512] + bytes(len(data) - 512)
    assert gpt.find(disk(without)) is None


@pytest.mark.parametrize(
    "mbr", [(), [(0x83, 64, 36)], [(0xEE, 1, 63), (0x83, 64, 36)]], ids=["none", "mbr", "hybrid"]
)
def test_a_gpt_counts_without_a_protective_mbr_too(mbr: list[tuple[int, int, int]]) -> None:
    assert found(Recipe(256, PARTS, mbr=mbr)).primary is not None


@both_sizes
def test_a_lost_first_copy_is_said_and_the_second_counts(recipe: Recipe) -> None:
    data = bytearray(make(recipe))
    size = recipe.sector_size
    for damage in (bytes(size), data[size : size + 40] + b"\xff" + data[size + 41 : 2 * size]):
        data[size : 2 * size] = damage
        table = gpt.find(disk(bytes(data)))
        assert table is not None
        assert (table.primary, codes(table)) == (None, ["gpt-primary-damaged"])
        assert table.header == table.backup is not None
        assert table.sector_size == size
        assert [one.name for one in table.partitions] == [one.name for one in recipe.parts]


def test_a_lost_second_copy_is_said() -> None:
    data = make(SMALL)
    table = gpt.find(disk(data[:-512] + bytes(512)))
    assert table is not None
    assert (table.backup, codes(table)) == (None, ["gpt-backup-damaged"])
    assert len(table.partitions) == 3


def test_a_disk_that_only_says_that_it_has_one_is_told_so() -> None:
    data = make(SMALL)
    table = gpt.find(disk(data[:512] + bytes(len(data) - 512)))
    assert table is not None
    assert (table.header, table.partitions) == (None, ())
    assert codes(table) == ["gpt-primary-damaged", "gpt-backup-damaged"]


def test_a_disk_that_was_cut_is_told_so() -> None:
    table = gpt.find(disk(make(SMALL)[:-512]))
    assert table is not None
    assert codes(table) == ["gpt-disk-cut"]


@pytest.mark.parametrize("field", ["first", "last", "table_crc"])
def test_copies_that_differ_are_told_apart(field: str) -> None:
    """With the table's checksum changed, the second copy is damaged; else it is sound and says something else."""
    table = found(Recipe(256, PARTS, backup={field: 100}))
    assert codes(table) == ["gpt-backup-damaged" if field == "table_crc" else "gpt-copies-differ"]


@pytest.mark.parametrize(
    "fields",
    [
        {"crc": 1},
        {"table_crc": 1},
        {"my": 2},
        {"revision": 0x20000},
        {"length": 91},
        {"length": 513},
        {"length": 0xFFFFFFFF},
        {"size": 64},
        {"size": 192},
        {"size": 8192},
        {"size": 0},
        {"count": 0},
        {"count": 0xFFFFFFFF},
        {"count": 32769},
        {"entries": 1},
        {"entries": 0},
        {"entries": 3},
        {"entries": 225},
        {"entries": 0xFFFFFFFFFFFFFFFF},
        {"first": 33},
        {"first": 0},
        {"first": 0xFFFFFFFFFFFFFFFF},
        {"last": 255},
        {"last": 0xFFFFFFFFFFFFFFFF},
        {"alternate": 1},
        {"alternate": 0},
    ],
    ids=str,
)
def test_numbers_that_lie_make_a_copy_count_for_nothing(fields: dict[str, int]) -> None:
    table = found(Recipe(256, PARTS, primary=fields))
    assert table.primary is None
    assert "gpt-primary-damaged" in codes(table)
    with pytest.raises(UnsupportedFeature, match="the primary GPT does not count"):
        gpt.moved_backup(disk(make(Recipe(256, PARTS, primary=fields))), 1 << 20)


def test_a_longer_header_and_larger_entries_are_read_and_kept() -> None:
    recipe = Recipe(256, PARTS, entry_size=256, entry_count=64, primary={"length": 120}, backup={"length": 120})
    table = found(recipe)
    assert codes(table) == []
    assert len(table.partitions) == 3
    moved = gpt.find(grown(make(recipe), 8192))
    assert moved is not None
    assert moved.primary is not None
    assert (moved.primary.rest, moved.primary.entry_size) == (bytes(28), 256)
    assert moved.problems == ()


@given(st.data())
def test_any_damage_to_the_tables_is_read_or_said(data: st.DataObject) -> None:
    damaged = bytearray(make(SMALL))
    places = [*range(440, 604), *range(1024, 1500), *range(len(damaged) - 600, len(damaged))]
    for _ in range(data.draw(st.integers(1, 5))):
        damaged[data.draw(st.sampled_from(places))] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xEE, 0xFF]))
    image = disk(bytes(damaged))
    gpt.find(image)
    with contextlib.suppress(UnsupportedFeature):
        PatchedImage(image, gpt.moved_backup(image, len(damaged) + 5120), len(damaged) + 5120)


def test_every_cut_of_a_disk_is_read() -> None:
    data = make(SMALL)
    for length in [*range(0, 2000, 37), *range(0, len(data), 512)]:
        gpt.find(disk(data[:length]))


# --- the end of the disk ---------------------------------------------------------------------------------------


@both_sizes
def test_the_second_copy_is_last_or_it_is_not(recipe: Recipe) -> None:
    table, size = found(recipe), recipe.sectors * recipe.sector_size
    assert gpt.backup_is_last(table, size)
    assert gpt.backup_is_last(table, size + recipe.sector_size - 1)  # a part of a sector is none
    assert not gpt.backup_is_last(table, size + recipe.sector_size)
    assert not gpt.backup_is_last(table, size - 1)
    assert not gpt.backup_is_last(found(Recipe(256, PARTS, backup_at=254)), 256 * 512)


# --- moving ----------------------------------------------------------------------------------------------------


@both_sizes
@pytest.mark.parametrize("more", [1, 8, 32, 33, 34, 500], ids="{} sectors".format)
def test_a_grown_disk_has_both_copies_where_they_belong(recipe: Recipe, more: int) -> None:
    """Also where the new copy lies over the old one."""
    data, size = make(recipe), recipe.sector_size
    image = grown(data, more * size)
    table = gpt.find(image)
    assert table is not None
    assert table.problems == ()
    assert gpt.backup_is_last(table, image.virtual_size)
    assert table.partitions == found(recipe).partitions
    length = -(-128 * 128 // size)
    assert table.primary is not None
    assert table.primary.last_usable_lba == recipe.sectors + more - length - 2
    # It is the same as if the disk had been made so, but for the old copy's entries in free space.
    larger = make(Recipe(recipe.sectors + more, recipe.parts, sector_size=size))
    old_entries = slice((recipe.sectors - 1 - length) * size, (recipe.sectors - 1) * size)
    now = bytearray(content(image))
    if more > length:
        now[old_entries] = bytes(length * size)
    else:
        kept = slice(old_entries.start, min(old_entries.stop, (recipe.sectors + more - 1 - length) * size))
        now[kept] = bytes(kept.stop - kept.start)
    assert now == larger


@both_sizes
def test_the_old_header_is_erased(recipe: Recipe) -> None:
    """A program that looks for a header in the middle must not find one."""
    data, size = make(recipe), recipe.sector_size
    assert grown(data, 1 << 20).pread(len(data) - size, size) == bytes(size)


def test_an_old_place_that_holds_no_header_is_left_alone() -> None:
    data = make(SMALL)
    data = data[:-512] + b"\xcd" * 512
    assert grown(data, 1 << 20).pread(len(data) - 512, 512) == b"\xcd" * 512


def test_a_header_inside_a_partition_is_left_alone() -> None:
    data = make(Recipe(256, (Part(64, 230, "root"),), backup_at=200, primary={"last": 150}, backup={"last": 150}))
    image = grown(data, 1 << 20)
    assert image.pread(200 * 512, 512) == data[200 * 512 : 201 * 512]


@both_sizes
def test_nothing_is_changed_where_nothing_is_wrong(recipe: Recipe) -> None:
    data = make(recipe)
    assert gpt.moved_backup(disk(data), len(data)) == ()


def test_a_second_copy_that_is_not_at_the_end_is_moved_without_growing() -> None:
    """As after a conversion that rounded the size up and did not look."""
    data = make(Recipe(256, PARTS, backup_at=230))
    table = gpt.find(grown(data, 0))
    assert table is not None
    assert (table.problems, gpt.backup_is_last(table, len(data))) == ((), True)


def test_a_damaged_second_copy_is_written_anew() -> None:
    data = make(SMALL)
    table = gpt.find(grown(data[:-512] + bytes(512), 0))
    assert table is not None
    assert table.problems == ()
    assert content(grown(data[:-512] + bytes(512), 0)) == data


def test_patches_are_whole_sectors_that_do_not_touch_partitions() -> None:
    data = make(SMALL)
    patches = gpt.moved_backup(disk(data), len(data) + 5120)
    assert all(patch.offset % 512 == 0 and len(patch.data) % 512 == 0 for patch in patches)
    for part in PARTS:
        assert all(patch.end <= part.first * 512 or patch.offset > part.last * 512 for patch in patches)


@pytest.mark.parametrize(
    ("mbr", "changed"),
    [
        ([(0xEE, 1, 255)], 265),
        ([(0, 0, 0), (0xEE, 1, 17)], 265),
        ([(0xEE, 1, 0xFFFFFFFF)], 265),
        ([(0xEE, 1, 63), (0x83, 64, 36)], 63),
        ([(0xEE, 2, 17)], 17),
    ],
    ids=["whole", "second entry", "windows", "hybrid", "not from 1"],
)
def test_the_protective_entry_grows_where_it_is_for_the_whole_disk(
    mbr: list[tuple[int, int, int]], changed: int
) -> None:
    image = grown(make(Recipe(256, PARTS, mbr=mbr)), 5120)
    place = 446 + 16 * next(number for number, entry in enumerate(mbr) if entry[0] == 0xEE)
    assert int.from_bytes(image.pread(place + 12, 4), "little") == changed


def test_a_disk_beyond_the_mbr_s_reach_says_so_in_it() -> None:
    data = make(SMALL)
    patches = gpt.moved_backup(disk(data), 4 << 40)
    assert patches[0].data[446 + 12 : 446 + 16] == b"\xff\xff\xff\xff"


def test_a_disk_without_an_mbr_gets_none() -> None:
    data = make(Recipe(256, PARTS, mbr=()))
    assert grown(data, 5120).pread(0, 512) == bytes(512)


def test_a_cut_disk_is_mended_when_its_partitions_are_whole() -> None:
    data = make(SMALL)[: 200 * 512]
    table = gpt.find(grown(data, 0))
    assert table is not None
    assert table.problems == ()
    assert table.partitions == found(SMALL).partitions


@pytest.mark.parametrize("sectors", [150, 180])
def test_a_partition_in_the_way_is_refused(sectors: int) -> None:
    data = make(SMALL)[: sectors * 512]
    with pytest.raises(UnsupportedFeature, match="partition 2 is in the way"):
        gpt.moved_backup(disk(data), len(data))


def test_a_disk_too_small_for_two_copies_is_refused() -> None:
    data = make(Recipe(256))[: 60 * 512]
    with pytest.raises(UnsupportedFeature, match="its first copy is in the way"):
        gpt.moved_backup(disk(data), len(data))


@pytest.mark.parametrize("size", [256 * 512 - 512, 256 * 512 + 256, 0])
def test_a_size_that_cannot_be_is_refused(size: int) -> None:
    with pytest.raises(UnsupportedFeature, match=f"cannot have {size} bytes"):
        gpt.moved_backup(disk(make(SMALL)), size)


def test_what_is_no_whole_sector_of_4096_is_refused() -> None:
    data = make(LARGE_SECTORS)
    with pytest.raises(UnsupportedFeature, match="sectors of 4096"):
        gpt.moved_backup(disk(data), len(data) + 512)


def test_noise_behind_the_old_end_is_not_read_as_a_table() -> None:
    data = make(SMALL) + random.Random(1).randbytes(5120)
    table = gpt.find(disk(data))
    assert table is not None
    assert not gpt.backup_is_last(table, len(data))
    moved = gpt.find(PatchedImage(disk(data), gpt.moved_backup(disk(data), len(data))))
    assert moved is not None
    assert moved.problems == ()


def test_patches_are_plain_values() -> None:
    assert Patch(512, b"abc").end == 515
