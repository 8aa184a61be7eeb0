"""A VHDX gets another size in place: what was there stays, what was not is zero, wherever it is interrupted."""

from __future__ import annotations

import dataclasses
import time
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fixtures import vhdx_images as made
from fixtures.vhdx_images import FULL, PARTIAL, ZERO, Block, Header, Item, Recipe, Region, RegionTable
from imagekit import changes
from imagekit.errors import UnsupportedFeature
from imagekit.formats.base import Truncate, Write
from imagekit.formats.files import MemoryFile
from imagekit.formats.vhdx import FORMAT
from tests.disks import content, noise
from tests.vhdx_disks import (
    DISK,
    GRANDPARENT,
    UNKNOWN_ID,
    WIDE,
    GiB,
    KiB,
    MiB,
    TiB,
    assert_interruptible,
    assert_sound,
    file_of,
    grown,
    opened,
    prefixes,
    read,
    recipes,
    wide,
)

# --- any disk -------------------------------------------------------------------------------------------------------


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(recipes(), st.sampled_from([4096, 64 * KiB, MiB - 4096, MiB, 3 * MiB + 8192]))
def test_a_grown_disk_has_zeros_behind_its_old_end(recipe: Recipe, more: int) -> None:
    """Whatever lay there unseen: in the last block, in the BAT, in the parent."""
    old, size = made.content(recipe, GRANDPARENT), recipe.size + more
    file = assert_interruptible(
        recipe,
        lambda file: FORMAT.resize(file, size),
        lambda image: content(image) in (old, grown(old, size)),
    )
    image = assert_sound(file)
    assert read(file) == grown(old, size)
    assert image.identity != made.DATA_WRITE
    if recipe.fixed:
        assert all(extent.data for extent in image.extents())


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(recipes(), st.sampled_from([4096, 64 * KiB, MiB - 4096, MiB, 3 * MiB + 8192]))
def test_a_disk_that_grew_can_shrink_back_and_grow_again(recipe: Recipe, more: int) -> None:
    old, size = made.content(recipe, GRANDPARENT), recipe.size + more
    file = file_of(recipe)
    changes.apply(FORMAT.resize(file, size), file)
    long = file.size
    steps = list(FORMAT.resize(file, recipe.size))
    for number in prefixes(file, steps):
        assert read(file) in (old, grown(old, size)), number
    assert_sound(file)
    assert (read(file), file.size <= long) == (old, True)
    changes.apply(FORMAT.resize(file, size), file)
    assert read(file) == grown(old, size)


def shrunk(recipe: Recipe, size: int) -> MemoryFile:
    return assert_interruptible(
        recipe,
        lambda file: FORMAT.resize(file, size),
        lambda image: content(image) in (made.content(recipe), made.content(recipe)[:size]),
    )


def test_a_fixed_disk_of_zeros_gives_its_room_back() -> None:
    blocks = {number: Block(data=noise(MiB, number) if number < 2 else b"") for number in range(5)}
    recipe = Recipe(size=5 * MiB, blocks=blocks, fixed=True)
    file = shrunk(recipe, 2 * MiB + 512)
    assert_sound(file)
    assert file.size == 4 * MiB + 3 * MiB
    assert [extent.length for extent in FORMAT.open(file).extents()] == [2 * MiB + 512]


def test_blocks_that_lie_before_kept_ones_keep_the_file_long() -> None:
    recipe = Recipe(size=3 * MiB, blocks={2: Block(data=b""), 0: Block(data=noise(MiB))})
    file = shrunk(recipe, MiB)
    assert file.size == 6 * MiB
    assert file.pread(3 * MiB, 24) == (5 * MiB | FULL).to_bytes(8, "little") + bytes(16)


def test_a_sector_bitmap_behind_all_blocks_is_kept() -> None:
    blocks = {0: Block(state=PARTIAL, data=noise(MiB), present=frozenset({3})), 1: Block(data=b"")}
    recipe = Recipe(size=2 * MiB, blocks=blocks, parent=made.linked_to(UNKNOWN_ID), bitmaps_last=True)
    file = file_of(recipe)
    changes.apply(FORMAT.resize(file, MiB), file)
    assert read(file) == made.content(recipe, GRANDPARENT)[:MiB]
    assert file.size == 7 * MiB


@pytest.mark.parametrize("at", [MiB + 512, 2 * MiB - 1, 2 * MiB + 5])
def test_data_behind_the_new_end_are_not_lost(at: int) -> None:
    disk = bytearray(3 * MiB)
    disk[at] = 1
    blocks = {number: Block(data=bytes(disk[number * MiB :][:MiB])) for number in range(3)}
    file = file_of(Recipe(size=3 * MiB, blocks=blocks))
    with pytest.raises(UnsupportedFeature, match=f"holds data at {at:#x}"):
        FORMAT.resize(file, MiB + 512)


def test_what_a_parent_may_hold_behind_the_new_end_is_not_lost() -> None:
    file = file_of(Recipe(size=3 * MiB, blocks={1: Block(state=ZERO)}, parent=made.linked_to(UNKNOWN_ID)))
    with pytest.raises(UnsupportedFeature, match=r"from 0x200000 on.*its parent"):
        FORMAT.resize(file, MiB)


@pytest.mark.parametrize("size", [0, -512, 4 * MiB + 511, 64 * TiB + 512])
def test_a_size_no_disk_can_have_is_refused(size: int) -> None:
    with pytest.raises(UnsupportedFeature, match="a multiple of 512 up to 64 TiB"):
        FORMAT.resize(file_of(DISK), size)


def test_sectors_of_4096_bytes_stay_whole() -> None:
    with pytest.raises(UnsupportedFeature, match="a multiple of 4096"):
        FORMAT.resize(file_of(Recipe(size=MiB, sector=4096)), MiB + 512)


def test_the_size_it_has_takes_no_step() -> None:
    assert list(FORMAT.resize(file_of(DISK), DISK.size)) == []


def test_a_last_block_that_the_file_cuts_short_is_completed() -> None:
    blocks = {0: Block(data=noise(2 * MiB)), 1: Block(data=noise(512))}
    recipe = Recipe(size=2 * MiB + 512, block_size=2 * MiB, blocks=blocks, file_size=6 * MiB + 512)
    old = made.content(recipe)
    file = assert_interruptible(
        recipe,
        lambda file: FORMAT.resize(file, 4 * MiB),
        lambda image: content(image) in (old, grown(old, 4 * MiB)),
    )
    assert file.size == 8 * MiB
    assert_sound(file)


def test_a_size_across_two_sectors_moves_to_one_place() -> None:
    """Eight bytes that a disk may write half of are not written over."""
    old, new = 3 * MiB, 4 * GiB + 4 * MiB
    size = Item(data=old.to_bytes(8, "little"), offset=68 * KiB - 4)
    recipe = Recipe(
        size=old,
        items={made.VIRTUAL_SIZE: size},
        patches=[(2 * MiB + 68 * KiB - 4, old.to_bytes(8, "little"))],
    )
    file = assert_interruptible(
        recipe, lambda file: FORMAT.resize(file, new), lambda image: image.virtual_size in (old, new), torn=8
    )
    assert assert_sound(file).virtual_size == new


@pytest.mark.parametrize("slot", [0, 1])
def test_the_header_that_counts_is_written_last(slot: int) -> None:
    pair = Header(sequence=7 - slot), Header(sequence=6 + slot)
    file = file_of(dataclasses.replace(DISK, headers=pair))
    first, _, second, *_ = FORMAT.resize(file, 4 * MiB)
    assert [one.offset // (64 * KiB) - 1 for one in (first, second) if isinstance(one, Write)] == [1 - slot, slot]


def test_a_child_whose_last_block_is_not_there_gets_one_that_ends_with_it() -> None:
    """The parent shows up to the old end; behind it there are zeros, whatever it holds and however it grows."""
    for other in ({}, {0: Block(state=PARTIAL, data=noise(MiB), present=frozenset({9}))}):
        recipe = Recipe(size=2 * MiB + 512, blocks=other, parent=made.linked_to(UNKNOWN_ID))
        old = made.content(recipe, GRANDPARENT)
        file = assert_interruptible(
            recipe,
            lambda file: FORMAT.resize(file, 4 * MiB),
            lambda image: content(image) in (old, grown(old, 4 * MiB)),  # noqa: B023
            torn=4,
        )
        assert_sound(file)
        assert read(file) == grown(old, 4 * MiB)


# --- a BAT that has to move --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tables", ["both", "first", "second"])
@pytest.mark.parametrize("kind", ["dynamic", "differencing"])
def test_a_bat_without_room_moves_to_the_end_of_the_file(kind: str, tables: str) -> None:
    bad = RegionTable(crc_off_by=1)
    pair = {"both": (RegionTable(),) * 2, "first": (RegionTable(), bad), "second": (bad, RegionTable())}
    recipe = wide(kind, region_tables=pair[tables])
    old = made.content(recipe, GRANDPARENT)
    file = assert_interruptible(
        recipe,
        lambda file: FORMAT.resize(file, WIDE),
        lambda image: image.virtual_size in (len(old), WIDE) and image.pread(0, len(old)) == old,
    )
    image = assert_sound(file)
    assert (image.virtual_size, image.bat_region.offset % MiB, image.bat_region.length) == (WIDE, 0, 3 * MiB)
    whole = opened(file)
    assert whole.pread(0, 6 * MiB) == grown(old, 6 * MiB)
    behind = list(whole.extents(6 * MiB))
    assert [(one.data, one.depth, one.present) for one in behind] == [(False, 0, kind == "differencing")]
    assert image.region_tables.copies[0] == image.region_tables.copies[1]


def test_a_bat_whose_entry_is_far_from_its_tables_checksum_stays() -> None:
    others = [
        Region(made.guid(f"0000{number:04x}-0000-4000-8000-000000000000"), 20 * MiB, MiB, 0) for number in range(15)
    ]
    placed = [dataclasses.replace(one, offset=one.offset + at * MiB) for at, one in enumerate(others)]
    recipe = wide("dynamic", file_size=40 * MiB)
    table = RegionTable(regions=[*placed, *made.region_lines(recipe)])
    file = file_of(dataclasses.replace(recipe, region_tables=(table, table)))
    with pytest.raises(UnsupportedFeature, match="number 16 of the region table"):
        FORMAT.resize(file, WIDE)
    changes.apply(FORMAT.resize(file, GiB), file)
    assert assert_sound(file).virtual_size == GiB


def test_growing_to_64_tib_takes_little_memory() -> None:
    tracemalloc.start()
    try:
        started = time.perf_counter()
        steps = list(FORMAT.resize(file_of(wide("dynamic")), 64 * TiB))
        assert time.perf_counter() - started < 5
        assert tracemalloc.get_traced_memory()[1] < 64 * MiB
    finally:
        tracemalloc.stop()
    assert sum(len(one.data) for one in steps if isinstance(one, Write)) < MiB
    assert max(one.size for one in steps if isinstance(one, Truncate)) < 600 * MiB
