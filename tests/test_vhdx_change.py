"""Changes of a VHDX in place: repair, another parent, and what holds for every change."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures import vhdx_images as made
from fixtures.vhdx_images import FULL, Block, Header, Recipe, RegionTable
from fixtures.vhdx_logs import Descriptor, Entry, Run, Zeros, rewrite, with_log
from imagekit import changes
from imagekit.errors import CorruptImage, ImagekitError, UnsupportedFeature
from imagekit.formats.base import Change, ParentLink, Reference
from imagekit.formats.files import MemoryFile
from imagekit.formats.vhdx import FORMAT
from tests.disks import content, noise
from tests.vhdx_disks import (
    CHILD,
    DISK,
    GRANDPARENT,
    UNKNOWN_ID,
    KiB,
    MiB,
    assert_interruptible,
    assert_sound,
    file_of,
    grown,
    opened,
    raw_disk,
    read,
)

LINK = ParentLink(b"new parent's id.", 4 * MiB, ".\\other.vhdx", "D:\\vms\\other.vhdx")


# --- repair ------------------------------------------------------------------------------------------------------

PLACES = DISK.places()


def logged(*descriptors: Descriptor, recipe: Recipe = DISK, start: int = 0) -> Recipe:
    """The disk with its changes in the log: one entry a descriptor, an empty one before them."""
    entries = [Entry(sequence=5), *(Entry(sequence=6 + at, descriptors=[one]) for at, one in enumerate(descriptors))]
    return with_log(recipe, Run(start, entries))


MOVED = dataclasses.replace(DISK, metadata_at=6 * MiB, file_size=8 * MiB)
DIRTY = {
    "data": logged(*rewrite(PLACES.first_block + 8 * KiB, noise(12 * KiB, 7))),
    "around the ring's end": logged(*rewrite(PLACES.first_block, noise(12 * KiB, 7)), start=MiB - 8 * KiB),
    "zeros": logged(
        *rewrite(PLACES.first_block, noise(8 * KiB, 7)), Zeros(offset=PLACES.first_block + 4 * KiB, length=64 * KiB)
    ),
    "a block": logged(
        *rewrite(
            PLACES.bat, made.make(dataclasses.replace(DISK, blocks={1: Block(data=b"")})).bytes()[3 * MiB :][:4096]
        )
    ),
    "region tables": logged(
        *rewrite(192 * KiB, made.make(MOVED).bytes()[192 * KiB : 196 * KiB]),
        *rewrite(256 * KiB, made.make(MOVED).bytes()[192 * KiB : 196 * KiB]),
        *rewrite(6 * MiB, made.make(MOVED).bytes()[6 * MiB : 6 * MiB + 68 * KiB][:4096]),
        *rewrite(6 * MiB + 64 * KiB, made.make(MOVED).bytes()[6 * MiB + 64 * KiB :][:4096]),
        recipe=dataclasses.replace(DISK, file_size=8 * MiB),
    ),
    "nothing": logged(),
    "a longer file": with_log(
        dataclasses.replace(DISK, file_size=6 * MiB - 1),
        Run(0, [Entry(sequence=9, flushed=MiB, last=9 * MiB, descriptors=rewrite(7 * MiB, noise(4096, 8)))]),
    ),
}


@pytest.mark.parametrize("name", DIRTY)
def test_a_log_is_written_back_and_the_disk_reads_as_it_did_with_the_log_in_memory(name: str) -> None:
    expected = read(file_of(DIRTY[name]))
    file = assert_interruptible(DIRTY[name], FORMAT.repair, lambda image: content(image) == expected)
    image = assert_sound(file)
    assert content(image) == expected
    assert (image.replayed, list(image.facts())) == (None, [])
    assert (image.header.file_write_guid != DIRTY[name].data_write[::-1], image.identity) == (True, made.DATA_WRITE)
    assert FORMAT.repair(file) == []


@pytest.mark.parametrize("name", DIRTY)
def test_a_disk_with_a_log_can_be_resized_at_once(name: str) -> None:
    expected = read(file_of(DIRTY[name]))
    size = DISK.size + 2 * MiB
    file = assert_interruptible(
        DIRTY[name],
        lambda file: FORMAT.resize(file, size),
        lambda image: content(image) in (expected, grown(expected, size)),
    )
    assert content(assert_sound(file)) == grown(expected, size)


@pytest.mark.parametrize("slot", [0, 1])
@pytest.mark.parametrize("bad", [Header(sequence=9, crc_off_by=1), bytes(4096)], ids=["checksum", "zeros"])
def test_a_damaged_header_is_written_anew_from_the_good_one(slot: int, bad: Header | bytes) -> None:
    good = Header(sequence=3)
    recipe = dataclasses.replace(DISK, headers=(bad, good) if slot == 0 else (good, bad))
    file = assert_interruptible(recipe, FORMAT.repair, lambda image: content(image) == made.content(DISK))
    image = assert_sound(file)
    assert (image.headers.slot, image.header.sequence, image.identity) == (slot, 4, made.DATA_WRITE)


@pytest.mark.parametrize("bad", [0, 1])
def test_a_damaged_region_table_is_written_anew_from_the_good_one(bad: int) -> None:
    tables = [RegionTable(crc_off_by=7), RegionTable()]
    recipe = dataclasses.replace(DISK, region_tables=(tables[bad], tables[1 - bad]))
    file = assert_interruptible(recipe, FORMAT.repair, lambda image: content(image) == made.content(DISK))
    assert bytes(file.data) == made.make(DISK).bytes()


@pytest.mark.parametrize("layout", ["windows", "qemu", "disk2vhd"])
def test_there_is_nothing_to_repair_in_a_sound_file(layout: str) -> None:
    assert FORMAT.repair(file_of(dataclasses.replace(DISK, layout=layout))) == []


AMBIGUOUS = {
    "headers": {"headers": (Header(sequence=4), Header(sequence=4, data_write=bytes(16)))},
    "region tables": {
        "region_tables": (RegionTable(), RegionTable(regions=made.region_lines(DISK)[::-1])),
    },
}


@pytest.mark.parametrize("what", AMBIGUOUS)
@pytest.mark.parametrize(
    "change",
    [
        FORMAT.repair,
        lambda file: FORMAT.resize(file, 8 * MiB),
        lambda file: FORMAT.rebase(file, LINK),
        lambda file: FORMAT.absorb(file, raw_disk(bytes(8 * MiB))),
    ],
    ids=["repair", "resize", "rebase", "absorb"],
)
def test_of_two_copies_that_differ_none_is_chosen(what: str, change: Callable[[MemoryFile], object]) -> None:
    recipe = dataclasses.replace(DISK, **AMBIGUOUS[what])  # type: ignore[arg-type]
    with pytest.raises(CorruptImage, match="differ"):
        change(file_of(recipe))


@pytest.mark.parametrize(
    "change",
    [lambda file: FORMAT.resize(file, 8 * MiB), lambda file: FORMAT.absorb(file, raw_disk(bytes(8 * MiB)))],
    ids=["resize", "absorb"],
)
def test_a_damaged_disk_is_not_changed(change: Callable[[MemoryFile], object]) -> None:
    """A block on another's place would be changed with it."""
    recipe = dataclasses.replace(DISK, entries={0: PLACES.first_block | FULL, 2: PLACES.first_block | FULL})
    with pytest.raises(CorruptImage, match=r"block.* 2"):
        change(file_of(recipe))


def test_sequence_numbers_do_not_run_over() -> None:
    last = 2**64 - 1
    recipe = dataclasses.replace(DISK, headers=(Header(sequence=last - 1), Header(sequence=last)))
    with pytest.raises(UnsupportedFeature, match="used up"):
        FORMAT.resize(file_of(recipe), 8 * MiB)


# --- rebase ------------------------------------------------------------------------------------------------------


def test_a_child_gets_another_parent() -> None:
    old = FORMAT.open(file_of(CHILD)).reference
    new = Reference(
        "parent-file",
        LINK.relative,
        "vhdx",
        names=(LINK.relative, "D:\\vms\\other.vhdx"),
        identities=(LINK.identity,),
        size=4 * MiB,
    )
    file = assert_interruptible(
        CHILD,
        lambda file: FORMAT.rebase(file, LINK),
        lambda image: image.reference in (old, new) and content(image) == made.content(CHILD, GRANDPARENT),
    )
    image = assert_sound(file)
    assert (image.reference, image.disk_id) == (new, made.DISK_ID)
    assert image.identity != made.DATA_WRITE


def test_a_parent_that_only_moved_does_not_change_what_the_child_is() -> None:
    """So the children of that child still know it."""
    file = file_of(CHILD)
    changes.apply(FORMAT.rebase(file, dataclasses.replace(LINK, identity=UNKNOWN_ID)), file)
    image = assert_sound(file)
    assert (image.identity, image.header.file_write_guid == made.DATA_WRITE[::-1]) == (made.DATA_WRITE, False)


def test_parents_can_be_changed_again_and_again() -> None:
    file = file_of(CHILD)
    for number in range(40):
        link = dataclasses.replace(LINK, relative=".\\" + "x" * (number * 800), absolute=None)
        changes.apply(FORMAT.rebase(file, link), file)
        image = assert_sound(file)
        assert image.reference is not None
        assert image.reference.names == (link.relative,)
    assert content(opened(file)) == made.content(CHILD, GRANDPARENT)


def test_a_locator_without_room_is_refused_before_the_first_step() -> None:
    room = made.Item(data=bytes(900 * KiB), flags=0)
    recipe = dataclasses.replace(CHILD, items={made.UNKNOWN: room})
    with pytest.raises(UnsupportedFeature, match="has no room"):
        FORMAT.rebase(file_of(recipe), dataclasses.replace(LINK, relative="x" * 32000, absolute="y" * 32000))


def test_a_disk_without_a_parent_gets_none() -> None:
    with pytest.raises(UnsupportedFeature, match="no parent"):
        FORMAT.rebase(file_of(DISK), LINK)


def test_a_parent_of_other_sectors_is_refused() -> None:
    with pytest.raises(UnsupportedFeature, match="logical sectors of 4096 bytes, its child of 512"):
        FORMAT.rebase(file_of(CHILD), dataclasses.replace(LINK, sector_size=4096))


LONG = "x" * 32768


@pytest.mark.parametrize(
    "link",
    [dataclasses.replace(LINK, relative=LONG), dataclasses.replace(LINK, absolute=LONG)],
    ids=["relative", "absolute"],
)
def test_a_name_longer_than_a_locator_can_hold_is_refused(link: ParentLink) -> None:
    with pytest.raises(UnsupportedFeature, match="32767 in UTF-16 fit"):
        FORMAT.rebase(file_of(CHILD), link)


# --- all of them -------------------------------------------------------------------------------------------------

REPLACEMENT = noise(9 * MiB, 5)
CHANGES: dict[str, Callable[[MemoryFile], Iterable[Change]]] = {
    "resize": lambda file: FORMAT.resize(file, 9 * MiB),
    "rebase": lambda file: FORMAT.rebase(file, LINK),
    "absorb": lambda file: FORMAT.absorb(file, raw_disk(REPLACEMENT)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_same_change_gives_the_same_bytes(name: str) -> None:
    results = []
    for _ in range(2):
        file = file_of(CHILD)
        changes.apply(CHANGES[name](file), file, image=raw_disk(REPLACEMENT))
        results.append(bytes(file.data))
    assert results[0] == results[1]


@pytest.mark.parametrize("name", CHANGES)
def test_steps_listed_beforehand_are_those_taken_one_by_one(name: str) -> None:
    """What a step changes is not read again to decide a later one."""
    source = raw_disk(REPLACEMENT)
    one, other = file_of(CHILD), file_of(CHILD)
    changes.apply(list(CHANGES[name](one)), one, image=source)
    changes.apply(CHANGES[name](other), other, image=source)
    assert one.data == other.data


def test_different_changes_of_one_file_give_it_different_identities() -> None:
    names = {}
    for name, change in CHANGES.items():
        file = file_of(CHILD)
        changes.apply(change(file), file, image=raw_disk(REPLACEMENT))
        names[name] = uuid.UUID(bytes_le=FORMAT.open(file).identity or b"")
    assert len(set(names.values())) == len(CHANGES)


@settings(max_examples=25)
@given(st.data())
def test_a_file_with_anything_in_it_is_refused_or_changed(data: st.DataObject) -> None:
    broken = bytearray(made.make(CHILD).bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        area = data.draw(st.sampled_from([64 * KiB, 128 * KiB, 192 * KiB, 2 * MiB, 2 * MiB + 64 * KiB, 3 * MiB]))
        at = area + data.draw(st.integers(0, 250))
        broken[at : at + 2] = data.draw(st.binary(min_size=2, max_size=2))
    for name, change in (*CHANGES.items(), ("repair", FORMAT.repair)):
        file = MemoryFile(broken)
        try:
            changes.apply(change(file), file, image=raw_disk(REPLACEMENT))
            opened(file)
        except ImagekitError as error:
            assert error.path, name
