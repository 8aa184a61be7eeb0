"""VHDX: what Windows, QEMU and disk2vhd write is read; what cannot be right is refused, in bounded memory."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import tracemalloc
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fixtures import vhdx_images as made
from fixtures.vhdx_images import FULL, PARTIAL, ZERO, Block, Header, Recipe, Region, RegionTable, linked_to, make
from fixtures.vhdx_logs import Entry, Run, rewrite, with_log
from imagekit.errors import CorruptImage, ImagekitError, InvalidImage, UnsupportedFeature
from imagekit.formats.base import DiskImage, Extent, Reference
from imagekit.formats.files import LocalFile, MemoryFile
from imagekit.formats.raw import RawImage
from imagekit.formats.vhdx import FORMAT
from imagekit.formats.vhdx_bat import WINDOW
from imagekit.formats.vhdx_image import VhdxImage
from tests.disks import assert_extents_agree, content, cut, noise, read_or_error, text
from tests.samples import sample, sample_facts

KiB, MiB, GiB, TiB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
BELOW = noise(5 * MiB, 100)


class Parent:
    """A resolver that knows one disk, and counts how often it is asked."""

    def __init__(self, disk: bytes = BELOW) -> None:
        self.disk = disk
        self.asked: list[Reference] = []

    def __call__(self, reference: Reference) -> DiskImage:
        self.asked.append(reference)
        return RawImage(MemoryFile(self.disk), len(self.disk))


def image_of(recipe: Recipe, resolver: Callable[[Reference], DiskImage] | None = None) -> VhdxImage:
    return FORMAT.open(MemoryFile(make(recipe).bytes(), "disk.vhdx"), resolver=resolver)


def facts(recipe: Recipe) -> list[str]:
    return [fact.code for fact in image_of(recipe).info().facts]


def shape(extents: Iterator[Extent]) -> list[tuple[int, int, bool, bool, int | None]]:
    """(first MiB, MiB, data, present, offset in MiB) of extents that begin and end at one."""
    return [
        (
            one.start // MiB,
            one.length // MiB,
            one.data,
            one.present,
            None if one.offset is None else one.offset // MiB,
        )
        for one in extents
    ]


SMALL = Recipe(size=3 * MiB, blocks={2: Block(data=noise(MiB, 2)), 0: Block(data=text(MiB, 3))})
CHILD = Recipe(size=4 * MiB, parent=linked_to(made.guid("AAAAAAAA-1111-4222-8333-444444444444")))


# --- reading what others wrote ---------------------------------------------------------------------------------

DATA = [noise(MiB, 1), text(MiB, 2), bytes(MiB), bytes(MiB // 2) + noise(MiB // 2, 3)]


@st.composite
def recipes(draw: st.DrawFn, *, child: bool) -> Recipe:
    """Disks of every layout and sector size, blocks of every state and in any order."""
    sector = draw(st.sampled_from([512, 4096]))
    block = draw(st.sampled_from([MiB, 2 * MiB]))
    count = draw(st.integers(1, 4))
    numbers = draw(st.permutations(range(count)))
    blocks: dict[int, Block] = {}
    for number in numbers[: draw(st.integers(0, count))]:
        state = draw(st.sampled_from([1, 2, 3, 5, 6, 6, 7, 7]))
        data = draw(st.sampled_from(DATA)) if state in (6, 7) else None
        edges = draw(st.lists(st.integers(0, block // sector), max_size=6).map(sorted))
        present = frozenset(at for one, other in itertools.pairwise(edges[::2]) for at in range(one, other))
        stale = draw(st.sampled_from([0, MiB, 64 * TiB])) if data is None else None
        blocks[number] = Block(state=state, data=data, present=present if state == PARTIAL else None, offset=stale)
    return Recipe(
        size=count * block - draw(st.integers(0, block // 4096 - 1)) * 4096,
        blocks=blocks,
        block_size=block,
        sector=sector,
        fixed=draw(st.booleans()),
        parent=linked_to(made.DATA_WRITE) if child else None,
        layout=draw(st.sampled_from(["windows", "qemu", "disk2vhd"])) if not child else "windows",
        bitmaps_last=draw(st.booleans()),
    )


@settings(max_examples=25)
@given(recipes(child=False))
def test_a_guest_reads_what_the_blocks_hold_and_extents_agree(recipe: Recipe) -> None:
    file = MemoryFile(make(recipe).bytes())
    image = FORMAT.open(file)
    assert_extents_agree(image, file, made.content(recipe))
    assert (image.sector_size, image.virtual_size) == (recipe.sector, recipe.size)
    assert image.info().facts == ()


@settings(max_examples=25)
@given(recipes(child=True), st.sampled_from([0, 4096, 3 * MiB, 5 * MiB, 9 * MiB]))
def test_a_child_reads_its_parent_where_it_holds_nothing(recipe: Recipe, below: int) -> None:
    """Zeros, also unmapped ones, hide the parent; behind the parent's end there are zeros."""
    disk = (BELOW * 2)[:below]
    file = MemoryFile(make(recipe).bytes())
    image = FORMAT.open(file, resolver=Parent(disk))
    extents = assert_extents_agree(image, file, made.content(recipe, disk))
    assert all((extent.file is None) == (extent.depth == 0) for extent in extents if extent.offset is not None)
    assert all(extent.depth or not extent.data or extent.offset is not None for extent in extents)


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(recipes(child=True), st.data())
def test_any_part_of_the_disk_reads_as_it_does_within_the_whole(recipe: Recipe, data: st.DataObject) -> None:
    image, expected = image_of(recipe, Parent()), made.content(recipe, BELOW)
    whole = list(image.extents())
    for _ in range(8):
        start = data.draw(st.integers(0, len(expected)))
        length = data.draw(st.integers(0, 3000) | st.integers(0, 3 * MiB))
        assert image.pread(start, length) == expected[start : start + length]
        assert list(image.extents(start, length)) == cut(whole, start, start + length)


def test_extents_say_where_blocks_lie_and_what_is_there_or_not() -> None:
    blocks = {4: Block(data=DATA[0]), 5: Block(data=DATA[1]), 1: Block(state=ZERO), 2: Block(state=3, offset=MiB)}
    image = image_of(Recipe(size=7 * MiB, blocks={**blocks, 0: Block(data=DATA[0])}))
    assert shape(image.extents()) == [
        (0, 1, True, True, 6),
        (1, 2, False, True, None),
        (3, 1, False, False, None),
        (4, 2, True, True, 4),
        (6, 1, False, False, None),
    ]


@pytest.mark.parametrize(("block", "sector"), [(MiB, 512), (MiB, 4096), (2 * MiB, 512), (256 * MiB, 512)])
def test_bitmaps_are_followed_over_their_pieces_and_chunks(block: int, sector: int, tmp_path: Path) -> None:
    """Neighbours in one piece of a bitmap, in two pieces, in two chunks; sectors at both ends of each block."""
    per_block, ratio = block // sector, (sector << 23) // block
    first = max(1, (64 * KiB * 8 * sector) // block) - 1
    bits = [
        frozenset({0, 1, per_block - 1}),
        frozenset({0, 9, per_block - 2, per_block - 1}),
        frozenset({per_block - 1}),
    ]
    numbers = [first, first + 1, ratio - 1, ratio]
    blocks = {
        n: Block(state=PARTIAL, data=noise(MiB, n), present=one) for n, one in zip(numbers, bits * 2, strict=False)
    }
    recipe = Recipe(size=(ratio + 1) * block, blocks=blocks, block_size=block, sector=sector, parent=CHILD.parent)
    with LocalFile.open_source(make(recipe).write(tmp_path / "child.vhdx")) as file:
        image = FORMAT.open(file, resolver=Parent(b"\xbb" * MiB))
        for number, one in blocks.items():
            for at in {0, 1, 2, 8, 9, 10, per_block // 2, per_block - 2, per_block - 1}:
                place, length = number * block + at * sector, len(image.pread(number * block + at * sector, sector))
                inside = (one.data or b"")[at * sector : (at + 1) * sector].ljust(sector, b"\0")
                below = (b"\xbb" if place < MiB else b"\0") * sector
                assert length == sector
                assert image.pread(place, sector) == (inside if at in (one.present or ()) else below), (number, at)
        here = [one for one in image.extents() if one.depth == 0 and one.data]
        count = sum(len(one.present or ()) for one in blocks.values())
        assert sum(one.length for one in here) == count * sector
        assert all(one.offset is not None for one in here)


@pytest.mark.parametrize("number", [WINDOW - 1, WINDOW, 4095, 4096, 2 * WINDOW - 2])
def test_blocks_are_found_at_the_edges_of_windows_and_chunks(number: int, tmp_path: Path) -> None:
    blocks = {number: Block(data=noise(MiB, 1)), number + 1: Block(data=noise(MiB, 2))}
    recipe = Recipe(size=2 * WINDOW * MiB, blocks=blocks)
    with LocalFile.open_source(make(recipe).write(tmp_path / "disk.vhdx")) as file:
        image = FORMAT.open(file)
        assert shape(image.extents()) == [
            (0, number, False, False, None),
            (number, 2, True, True, 4),
            *([(number + 2, 2 * WINDOW - number - 2, False, False, None)] if number + 2 < 2 * WINDOW else []),
        ]
        assert image.pread(number * MiB - 5, 2 * MiB + 10) == (
            bytes(5) + noise(MiB, 1) + noise(MiB, 2) + bytes(5 if number + 2 < 2 * WINDOW else 0)
        )


def test_threads_read_side_by_side() -> None:
    recipe = dataclasses.replace(
        CHILD, blocks={n: Block(state=PARTIAL, data=DATA[1], present=frozenset({n, 99})) for n in range(4)}
    )
    parent = Parent()
    image, expected = image_of(recipe, parent), made.content(recipe, BELOW)
    places = [at * 37777 % (4 * MiB) for at in range(200)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda at: image.pread(at, 70000), places)) == [
            expected[at : at + 70000] for at in places
        ]
    assert len(parent.asked) == 1


# --- what real files taught ------------------------------------------------------------------------------------


def test_junk_in_entries_that_nobody_uses_is_ignored() -> None:
    """QEMU before 8.0.1 left some behind the last block; sector bitmaps have no use without a parent."""
    recipe = Recipe(size=20 * 256 * MiB, block_size=256 * MiB, entries={16: 0x7, 21: 0x2, 22: 0xFFFF_FFFF_FFFF_FFFF})
    image = image_of(recipe)
    assert [(one.length, one.data) for one in image.extents()] == [(20 * 256 * MiB, False)]
    assert FORMAT.check(image.file) == []


def test_what_no_longer_fits_a_whole_mib_is_no_damage() -> None:
    """disk2vhd: metadata before the BAT in the region table, one header twice, 512 bytes more at the end."""
    recipe = dataclasses.replace(SMALL, layout="disk2vhd")
    image = image_of(recipe)
    assert image.file.size % MiB == 512
    assert (content(image), image.info().facts) == (made.content(recipe), ())


def test_the_last_block_may_be_cut_short_behind_the_disks_end() -> None:
    recipe = Recipe(size=MiB + 4096, blocks={0: Block(data=DATA[0]), 1: Block(data=DATA[1])})
    size = 5 * MiB + 4096
    assert content(image_of(dataclasses.replace(recipe, file_size=size))) == made.content(recipe)
    with pytest.raises(CorruptImage, match="block 1 does not lie in the file"):
        content(image_of(dataclasses.replace(recipe, file_size=size - 1)))


def test_a_fixed_disk_shows_the_holes_of_its_file(tmp_path: Path) -> None:
    """A fixed disk is as large as its content from the start; what was never written need not be read."""
    blocks = {at: Block(data=noise(MiB) if at == 3 else b"") for at in range(8)}
    recipe = Recipe(size=8 * MiB, blocks=blocks, fixed=True)
    with LocalFile.open_source(make(recipe).write(tmp_path / "fixed.vhdx")) as file:
        extents = assert_extents_agree(FORMAT.open(file), file, made.content(recipe))
        if list(file.data_ranges(4 * MiB, 3 * MiB)) == []:
            assert [(one.start // MiB, one.length // MiB, one.data) for one in extents] == [
                (0, 3, False),
                (3, 1, True),
                (4, 4, False),
            ]


@pytest.mark.parametrize("state", [made.UNDEFINED, made.ZERO, made.UNMAPPED, made.UNMAPPED_095])
@pytest.mark.parametrize("parent", [None, CHILD.parent], ids=["alone", "child"])
def test_a_block_without_content_is_zero_whatever_place_it_keeps(
    state: int, parent: list[tuple[str, str]] | None
) -> None:
    blocks = {
        0: Block(state=state, offset=0),
        1: Block(state=state, offset=MiB),
        2: Block(state=state, offset=99 * TiB),
    }
    image = image_of(Recipe(size=3 * MiB, blocks=blocks, parent=parent), Parent())
    assert shape(image.extents()) == [(0, 3, False, True, None)]
    assert content(image) == bytes(3 * MiB)


def test_a_partial_block_without_a_parent_is_a_whole_one() -> None:
    recipe = Recipe(size=MiB, blocks={0: Block(state=PARTIAL, data=DATA[0], present=frozenset({1}))})
    assert content(image_of(recipe)) == DATA[0]


# --- headers and region tables ---------------------------------------------------------------------------------

NEW, OLD = made.guid("00000000-0000-0000-0000-00000000000A"), made.guid("00000000-0000-0000-0000-00000000000B")


@pytest.mark.parametrize(("first", "second", "expected"), [(1, 2, NEW), (2, 1, OLD), (0, (1 << 64) - 1, NEW)])
def test_the_header_with_the_higher_number_counts(first: int, second: int, expected: bytes) -> None:
    headers = Header(sequence=first, data_write=OLD), Header(sequence=second, data_write=NEW)
    image = image_of(dataclasses.replace(SMALL, headers=headers))
    assert (image.identity, image.info().facts) == (expected, ())


HEADER_CASES = [
    (Header(crc_off_by=1, sequence=9), Header(), "header-invalid", 0x10004),
    (Header(), bytes(4096), "header-invalid", 0x20000),
    (Header(), Header(data_write=NEW), "headers-differ", 0x20000),
]


@pytest.mark.parametrize(("first", "second", "code", "offset"), HEADER_CASES, ids=["damaged", "none", "differ"])
def test_a_header_that_is_not_as_it_should_be_is_a_fact(
    first: Header | bytes, second: Header | bytes, code: str, offset: int
) -> None:
    """The other one, or the first of two with one number, counts."""
    recipe = dataclasses.replace(SMALL, headers=(first, second))
    (fact,) = image_of(recipe).info().facts
    assert (fact.code, fact.offset) == (code, offset)
    assert image_of(recipe).identity == made.DATA_WRITE
    assert content(image_of(recipe)) == made.content(recipe)


def test_an_image_without_a_valid_header_is_refused() -> None:
    damaged = dataclasses.replace(SMALL, headers=(bytes(4096), Header(crc_off_by=1)))
    with pytest.raises(CorruptImage, match="header's checksum") as caught:
        image_of(damaged)
    assert caught.value.hint is not None
    assert (caught.value.path, caught.value.offset) == ("disk.vhdx", 0x20004)
    with pytest.raises(InvalidImage, match="no VHDX header"):
        image_of(dataclasses.replace(SMALL, headers=(bytes(4096), bytes(4096))))


LINES = made.region_lines(SMALL)
MOVED = RegionTable(regions=[Region(made.BAT, 2 * MiB), Region(made.METADATA, 3 * MiB)])


@pytest.mark.parametrize(
    ("tables", "code"),
    [
        ((RegionTable(crc_off_by=1), RegionTable()), "region-table-invalid"),
        ((RegionTable(), RegionTable(signature=b"")), "region-table-invalid"),
        ((RegionTable(), MOVED), "region-tables-differ"),
        ((RegionTable(), RegionTable(reserved=1)), None),
    ],
    ids=["first damaged", "second is none", "differ", "differ in what means nothing"],
)
def test_a_region_table_that_is_not_as_it_should_be_is_a_fact(
    tables: tuple[RegionTable, RegionTable], code: str | None
) -> None:
    recipe = dataclasses.replace(SMALL, region_tables=tables)
    assert facts(recipe) == ([] if code is None else [code])
    assert content(image_of(recipe)) == made.content(recipe)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"region_tables": (RegionTable(crc_off_by=1),) * 2}, CorruptImage, "region table's checksum"),
        ({"region_tables": (RegionTable(regions=LINES[:1]),) * 2}, CorruptImage, "names no metadata region"),
        ({"region_tables": (RegionTable(regions=LINES[1:]),) * 2}, CorruptImage, "names no BAT region"),
        ({"regions": [Region(made.UNKNOWN, 6 * MiB)]}, UnsupportedFeature, "needs the region 0e110e11"),
        ({"items": {made.UNKNOWN: made.Item(data=b"x")}}, UnsupportedFeature, "needs the metadata item 0e110e11"),
        ({"items": {made.INCOMPLETE: made.Item(data=b"")}}, CorruptImage, "did not finish"),
        ({"items": {made.VIRTUAL_SIZE: made.Item(data=bytes(4))}}, CorruptImage, "has 4 bytes, not 8"),
        ({"items": {made.PAGE_83: None}}, CorruptImage, "no metadata item page 83 data"),
        ({"size": 131073 * MiB}, CorruptImage, "the BAT has room for 131072 entries, .* needs 131105"),
        ({"block_size": 512 * MiB, "blocks": {}}, InvalidImage, "block size 536870912"),
        ({"patches": [(0, b"vhdxfilE")]}, InvalidImage, "no VHDX: signature"),
        ({"patches": [(2 * MiB, b"\0")]}, InvalidImage, "no VHDX metadata table"),
        ({"headers": (Header(version=2),) * 2}, UnsupportedFeature, "VHDX version 2"),
        ({"headers": (Header(log_guid=NEW, log_length=0),) * 2}, InvalidImage, "the log of 0 bytes"),
        ({"headers": (Header(log_guid=NEW, log_offset=64 * MiB),) * 2}, CorruptImage, "ends behind the file's end"),
        ({"headers": (Header(log_guid=NEW),) * 2}, CorruptImage, "no valid sequence"),
        ({"file_size": 3 * MiB}, CorruptImage, "the BAT region .* ends behind the file's end"),
        ({"file_size": MiB}, CorruptImage, "ends behind the file's end"),
        ({"file_size": 8}, InvalidImage, "no VHDX header: 0 bytes are left"),
    ],
)
def test_what_cannot_be_a_vhdx_is_refused_with_a_reason(
    changes: dict[str, object], kind: type[ImagekitError], message: str
) -> None:
    recipe = dataclasses.replace(SMALL, bat_length=MiB, **changes)  # type: ignore[arg-type]
    with pytest.raises(kind, match=message) as caught:
        image_of(recipe)
    assert caught.value.path == "disk.vhdx"


# --- pointers that lie -----------------------------------------------------------------------------------------

WRONG_ENTRIES = {
    "a state that is none": 8 * MiB | 4,
    "reserved bits": 8 * MiB | 8 | FULL,
    "all ones": (1 << 64) - 1,
    "on the headers": 0 | FULL,
    "on the log": MiB | FULL,
    "on the metadata": 2 * MiB | FULL,
    "on the BAT": 3 * MiB | FULL,
    "behind the end": 11 * MiB | FULL,
    "over the end": 10 * MiB | FULL,
    "far": ((1 << 64) - MiB) | FULL,
    "negative": (1 << 63) | FULL,
}


@pytest.mark.parametrize("entry", WRONG_ENTRIES.values(), ids=WRONG_ENTRIES.keys())
@pytest.mark.parametrize("child", [False, True], ids=["alone", "child"])
def test_a_block_that_lies_where_none_can_be_is_refused(entry: int, *, child: bool) -> None:
    """When the BAT is read: opening the image is not reading it."""
    recipe = Recipe(
        size=4 * MiB,
        block_size=2 * MiB,
        blocks={0: Block(data=DATA[0])},
        entries={1: entry},
        file_size=11 * MiB,
        parent=CHILD.parent if child else None,
    )
    image = image_of(recipe, Parent())
    image.info()
    for use in (lambda: list(image.extents()), lambda: image.pread(3 * MiB, 1), lambda: list(image.ranges())):
        with pytest.raises(CorruptImage, match="block 1 ") as caught:
            use()
        assert (caught.value.path, caught.value.offset) == ("disk.vhdx", 3 * MiB + 8)


@pytest.mark.parametrize(
    "entry",
    [0, 7, 2, 8 * MiB | 8 | FULL, MiB | FULL, 3 * MiB | FULL, 99 * MiB | FULL, (1 << 63) | FULL],
    ids=["none", "partial", "zero", "reserved", "on the log", "on the BAT", "behind the end", "negative"],
)
def test_a_sector_bitmap_that_lies_where_none_can_be_is_refused(entry: int) -> None:
    recipe = dataclasses.replace(
        CHILD, blocks={1: Block(state=PARTIAL, data=DATA[0], present=frozenset({0}))}, entries={4096: entry}
    )
    image = image_of(recipe, Parent())
    assert image.pread(0, MiB) == BELOW[:MiB]
    with pytest.raises(CorruptImage, match=r"sector bitmap") as caught:
        image.pread(MiB, MiB)
    assert caught.value.offset == 3 * MiB + 4096 * 8


def test_a_block_may_lie_in_no_region_even_one_nobody_knows() -> None:
    regions = [Region(made.UNKNOWN, 6 * MiB, flags=0)]
    recipe = dataclasses.replace(SMALL, regions=regions, entries={1: 6 * MiB | FULL}, file_size=8 * MiB)
    with pytest.raises(CorruptImage, match="lies on one of its tables"):
        content(image_of(recipe))


# --- the log ---------------------------------------------------------------------------------------------------


def test_everything_but_the_headers_may_be_waiting_in_the_log() -> None:
    """Region tables, metadata, the BAT and a part of a block."""
    whole = make(SMALL)
    steps = [one for offset, data in whole.pieces[3:7] if data for one in rewrite(offset, data[: 72 * KiB])]
    steps += rewrite(3 * MiB, whole.bytes()[3 * MiB : 3 * MiB + 4096])
    steps += rewrite(4 * MiB + 8 * KiB, b"new!" * 1024)
    bare = dataclasses.replace(SMALL, patches=[(192 * KiB, bytes(128 * KiB)), (2 * MiB, bytes(2 * MiB))])
    recipe = with_log(bare, Run(0, [Entry(sequence=5, descriptors=steps)]))
    file = MemoryFile(make(recipe).bytes())
    before = bytes(file.data)
    image = FORMAT.open(file)
    expected = bytearray(made.content(SMALL))
    expected[2 * MiB + 8 * KiB : 2 * MiB + 12 * KiB] = b"new!" * 1024
    extents = assert_extents_agree(image, file, bytes(expected))
    assert [(one.start // 1024, one.length // 1024, one.offset is not None) for one in extents if one.data] == [
        (0, 1024, True),
        (2048, 8, True),
        (2056, 4, False),
        (2060, 1012, True),
    ]
    info = image.info()
    assert [fact.code for fact in info.facts] == ["log-replayed"]
    assert (info.features["log-replayed"], info.features["log-entries"]) == (True, 1)
    assert bytes(file.data) == before


def test_blocks_behind_the_files_end_are_zeros_when_the_log_says_so() -> None:
    """The log made the file longer before the block in it was written."""
    recipe = with_log(
        dataclasses.replace(SMALL, blocks={}, entries={0: 6 * MiB | FULL}),
        Run(0, [Entry(sequence=1, last=7 * MiB)]),
    )
    image = image_of(recipe)
    assert [(one.data, one.offset) for one in image.extents(0, MiB)] == [(True, None)]
    assert content(image) == bytes(3 * MiB)


# --- differencing disks ----------------------------------------------------------------------------------------


def test_a_child_says_what_its_parent_is() -> None:
    """``info`` works, and asks nobody, when the parent is not there."""
    parent = Parent()
    image = image_of(CHILD, parent)
    info = image.info()
    assert info.subformat == "differencing"
    assert info.features["has-parent"] is True
    assert info.references == (
        Reference(
            "parent-file",
            r".\parent.vhdx",
            "vhdx",
            names=(
                r".\parent.vhdx",
                r"\\?\Volume{01234567-89ab-cdef-0123-456789abcdef}\disks\parent.vhdx",
                r"C:\disks\parent.vhdx",
            ),
            identities=(uuid.UUID("AAAAAAAA-1111-4222-8333-444444444444").bytes_le,),
            size=4 * MiB,
        ),
    )
    assert parent.asked == []
    assert image.pread(0, 10) == BELOW[:10]
    assert parent.asked == list(info.references)


def test_a_child_without_its_parent_is_not_read() -> None:
    image = image_of(dataclasses.replace(CHILD, blocks={0: Block(data=DATA[0])}))
    assert image.pread(0, MiB) == DATA[0]
    with pytest.raises(UnsupportedFeature, match="nobody allowed to open it"):
        image.pread(MiB, 1)
    with pytest.raises(UnsupportedFeature, match="nobody allowed to open it"):
        list(image.extents())


def test_a_parents_names_are_as_many_as_there_are() -> None:
    for pairs, names in (
        ([("parent_linkage", f"{uuid.UUID(int=1)}")], ()),
        ([("absolute_win32_path", "x"), ("parent_linkage", f"{{{uuid.UUID(int=1)}}}")], ("x",)),
    ):
        reference = image_of(dataclasses.replace(CHILD, parent=pairs)).reference
        assert reference is not None
        assert (reference.name, reference.names) == (names[0] if names else "", names)


def test_a_child_that_does_not_say_what_its_parent_is_is_refused() -> None:
    with pytest.raises(CorruptImage, match="does not say what its parent is"):
        image_of(dataclasses.replace(CHILD, items={made.PARENT_LOCATOR: None}))
    with pytest.raises(CorruptImage, match="no parent_linkage"):
        image_of(dataclasses.replace(CHILD, parent=[("relative_path", "x")]))


def test_a_parent_of_a_disk_that_has_none_is_a_fact() -> None:
    """Two programs would see two disks: one looks at the flag, the other at the locator."""
    locator = made.Item(data=made.parent_locator(linked_to(made.DATA_WRITE)), flags=made.REQUIRED)
    recipe = dataclasses.replace(SMALL, items={made.PARENT_LOCATOR: locator})
    assert facts(recipe) == ["parent-locator-unused"]
    assert image_of(recipe).info().references == ()
    assert content(image_of(recipe)) == made.content(recipe)


# --- what the headers say --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "subformat"),
    [
        (SMALL, "dynamic"),
        (dataclasses.replace(SMALL, fixed=True), "fixed"),
        (CHILD, "differencing"),
        (dataclasses.replace(CHILD, fixed=True), "differencing"),
    ],
)
def test_the_kind_of_disk_follows_its_parameters(recipe: Recipe, subformat: str) -> None:
    assert image_of(recipe).info().subformat == subformat


def test_info_names_what_identifies_the_disk_and_its_state() -> None:
    image = image_of(dataclasses.replace(SMALL, sector=4096, size=3 * MiB, creator="Who \N{SNOWMAN}"))
    assert image.info().features == {
        "creator": "Who \N{SNOWMAN}",
        "logical-sector-size": 4096,
        "physical-sector-size": 4096,
        "disk-id": "1d000000-1111-4222-8333-444444444444",
        "data-write-guid": "d0000000-1111-4222-8333-444444444444",
        "file-write-guid": str(uuid.UUID(bytes_le=made.DATA_WRITE[::-1])),
        "has-parent": False,
        "log-replayed": False,
        "log-entries": 0,
    }
    assert (image.info().format, image.info().block_size) == ("vhdx", MiB)
    assert (image.identity, image.disk_id, image.sector_size) == (made.DATA_WRITE, made.DISK_ID, 4096)


def test_everything_claimed_is_named_once() -> None:
    recipe = dataclasses.replace(
        CHILD,
        size=6 * MiB,
        blocks={
            0: Block(data=DATA[0]),
            3: Block(state=PARTIAL, data=DATA[1], present=frozenset({5})),
            1: Block(state=2),
        },
        regions=[Region(made.UNKNOWN, 9 * MiB, flags=0)],
    )
    image = image_of(recipe, Parent())
    ranges = sorted((one.offset // (64 * KiB), one.length // (64 * KiB), one.kind) for one in image.ranges())
    assert ranges == [
        (0, 1, "file identifier"),
        (1, 1, "header"),
        (2, 1, "header"),
        (3, 1, "region table"),
        (4, 1, "region table"),
        (16, 16, "log"),
        (32, 16, "metadata"),
        (48, 16, "BAT"),
        (64, 16, "sector bitmap"),
        (80, 16, "block"),
        (96, 16, "block"),
        (144, 16, "0e110e11-0000-4000-8000-0e110e110e11"),
    ]


def test_a_disk_of_64_tib_is_opened_and_walked_without_its_bat_in_memory(tmp_path: Path) -> None:
    """The BAT has 512 MiB; only windows of it are ever held."""
    last = (64 * TiB - 1) // MiB
    recipe = Recipe(size=64 * TiB, blocks={0: Block(data=noise(MiB)), last: Block(data=noise(MiB, 1))})
    with LocalFile.open_source(make(recipe).write(tmp_path / "large.vhdx")) as file:
        tracemalloc.start()
        image = FORMAT.open(file)
        assert image.info().virtual_size == 64 * TiB
        opened = tracemalloc.get_traced_memory()[1]
        assert image.pread(64 * TiB - 8, 8) == noise(MiB, 1)[-8:]
        assert [(one.start, one.data) for one in image.extents(0, TiB)] == [(0, True), (MiB, False)]
        walked = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert opened < 2 * MiB
    assert walked < 16 * MiB


# --- whatever the bytes are ------------------------------------------------------------------------------------

LOGGED = make(with_log(SMALL, Run(0, [Entry(sequence=3, descriptors=rewrite(4 * MiB, b"logged" * 600))]))).bytes()
EXPECTED = content(FORMAT.open(MemoryFile(LOGGED)))
SUMMED = st.one_of(
    st.integers(0x10000, 0x10FFF),
    st.integers(0x20000, 0x20FFF),
    st.integers(0x30000, 0x30000 + 200),
    st.integers(0x40000, 0x40000 + 200),
    st.integers(MiB, MiB + 8191),
)
ANYWHERE = SUMMED | st.one_of(
    st.integers(0, 600),
    st.integers(2 * MiB, 2 * MiB + 300),
    st.integers(2 * MiB + 64 * KiB, 2 * MiB + 64 * KiB + 100),
    st.integers(3 * MiB, 3 * MiB + 100),
)
FLIPS = st.integers(1, 255)


@settings(max_examples=40)
@given(st.lists(st.tuples(SUMMED, FLIPS), min_size=1, max_size=3, unique_by=lambda one: one[0]))
def test_a_byte_that_flips_under_a_checksum_changes_nothing_or_is_refused(flips: list[tuple[int, int]]) -> None:
    data = bytearray(LOGGED)
    for at, flip in flips:
        data[at] ^= flip
    found = read_or_error("vhdx", bytes(data))
    assert isinstance(found, ImagekitError) or found == EXPECTED


@settings(max_examples=100)
@given(st.lists(st.tuples(ANYWHERE, st.binary(min_size=1, max_size=8)), min_size=1, max_size=4), st.booleans())
def test_no_bytes_make_the_reader_fail_in_any_other_way(places: list[tuple[int, bytes]], child: bool) -> None:
    base = make(CHILD).bytes() if child else LOGGED
    data = bytearray(base)
    for at, piece in places:
        data[at : at + len(piece)] = piece
    file = MemoryFile(bytes(data))
    try:
        image = FORMAT.open(file, resolver=Parent())
        image.info()
        for extent in itertools.islice(image.extents(), 50):
            image.pread(extent.start, min(extent.length, 4096))
        FORMAT.check(file)
    except ImagekitError as error:
        assert str(error)


@settings(max_examples=60)
@given(st.integers(0, len(LOGGED)))
def test_a_file_cut_anywhere_reads_as_before_or_is_refused(length: int) -> None:
    found = read_or_error("vhdx", LOGGED[:length])
    assert isinstance(found, ImagekitError) or found == EXPECTED


# --- real images -----------------------------------------------------------------------------------------------


def digest(image: DiskImage) -> str:
    """MD5 of the whole content; what extents call zero is not read."""
    found, zeros = hashlib.md5(usedforsecurity=False), bytes(8 * MiB)
    for extent in image.extents():
        for at in range(extent.start, extent.end, len(zeros)):
            length = min(len(zeros), extent.end - at)
            found.update(image.pread(at, length) if extent.data else zeros[:length])
    return found.hexdigest()


def opened(name: str, resolver: Callable[[Reference], DiskImage] | None = None) -> VhdxImage:
    return FORMAT.open(LocalFile.open_source(sample(name)), resolver=resolver)


SAMPLES = [
    ("fat-parent.vhdx", "fixed", 4 * MiB, []),
    ("ntfs-dynamic.vhdx", "dynamic", 4 * MiB, []),
    ("ext2.vhdx", "dynamic", 4 * MiB, []),
    ("test-disk2vhd.vhdx", "dynamic", 256 * MiB, []),
    ("vhdx-log-replay.vhdx", "dynamic", GiB, ["log-replayed"]),
    ("iotest-dynamic-1G.vhdx", "dynamic", GiB, []),
    pytest.param("swap.vhdx", "dynamic", 10 * GiB, [], marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "subformat", "size", "codes"), SAMPLES)
def test_a_real_image_reads_as_every_other_reader_reads_it(
    name: str, subformat: str, size: int, codes: list[str]
) -> None:
    with opened(name) as image:
        info = image.info()
        assert (info.subformat, info.virtual_size) == (subformat, size)
        assert [fact.code for fact in info.facts] == codes
        assert digest(image) == sample_facts(name).content_md5
    with LocalFile.open_source(sample(name)) as file:
        assert [problem.code for problem in FORMAT.check(file)] == codes


def test_a_real_child_reads_through_its_parent() -> None:
    asked: list[Reference] = []

    def resolver(reference: Reference) -> DiskImage:
        asked.append(reference)
        return opened("fat-parent.vhdx")

    with opened("fat-differential.vhdx", resolver) as image:
        assert digest(image) == sample_facts("fat-differential.vhdx").content_md5
        assert asked[0].names[0] == r".\fat-parent.vhdx"
        with opened("fat-parent.vhdx") as parent:
            assert asked[0].identities == (parent.identity,)
            assert (image.disk_id, asked[0].size) == (parent.disk_id, parent.virtual_size)


def test_a_real_log_holds_what_the_disk_begins_with() -> None:
    """The file alone has an empty BAT; the log's last two entries put the first block into it."""
    with opened("vhdx-log-replay.vhdx") as image:
        assert image.pread(510, 2) == b"\x55\xaa"
        assert image.info().features["log-entries"] == 2


def test_a_file_without_its_identifier_is_somebody_elses() -> None:
    assert FORMAT.probe(MemoryFile(b"vhdx")) is None
    assert FORMAT.probe(MemoryFile(b"vhdxfile")) == "VHDX file identifier at 0"
