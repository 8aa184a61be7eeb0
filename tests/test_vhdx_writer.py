"""VHDX as it is written: Windows' layout, byte by byte what an independent generator makes of the same disk."""

from __future__ import annotations

import dataclasses
import itertools
import struct
import time
import tracemalloc
import uuid
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures import vhdx_images as made
from fixtures.vhdx_images import FULL, Block, Header, Recipe, make
from imagekit.errors import UnsupportedFeature
from imagekit.formats.base import DiskImage, Layout, ParentLink, Reference, WriterOptions
from imagekit.formats.files import MemoryFile
from imagekit.formats.raw import RawImage
from imagekit.formats.vhdx import FORMAT
from imagekit.formats.vhdx_writer import WINDOW, make_writer
from tests.disks import IDENTIFIER, assert_extents_agree, content, convert, disks, noise, text
from tests.samples import sample

KiB, MiB, GiB, TiB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
PARENT = ParentLink(bytes(range(16)), 8 * MiB, ".\\parent.vhdx", "C:\\VMs\\parent.vhdx", disk_id=b"what guests know")


def options(subformat: str | None = None, **fields: object) -> WriterOptions:
    if subformat == "differencing":
        fields.setdefault("parent", PARENT)
    return WriterOptions(IDENTIFIER, subformat, **fields)  # type: ignore[arg-type]


def written(layout: Layout, blocks: dict[int, bytes]) -> MemoryFile:
    """The file, with its blocks in the order given."""
    file = MemoryFile()
    for block, data in blocks.items():
        file.pwrite(layout.place(block), layout.prefix, data)
    file.truncate(layout.file_size)
    for offset, data in layout.metadata():
        file.pwrite(offset, data)
    assert file.size == layout.file_size
    return file


def as_generated(size: int, chosen: WriterOptions, blocks: dict[int, bytes], block_size: int) -> Recipe:
    """The same disk, in the words of the generator."""
    guids = {name: uuid.uuid5(IDENTIFIER, name).bytes_le for name in ("FileWriteGuid", "DataWriteGuid")}
    header = Header(sequence=1, file_write=guids["FileWriteGuid"], data_write=guids["DataWriteGuid"])
    parent = chosen.parent if chosen.subformat == "differencing" else None
    linked = None if parent is None else made.linked_to(parent.identity, folder="C:\\VMs\\")
    return Recipe(
        size=size,
        block_size=block_size,
        sector=chosen.sector_size or 512,
        fixed=chosen.subformat == "fixed",
        blocks={number: Block(data=data) for number, data in blocks.items()},
        parent=None if linked is None else [pair for pair in linked if pair[0] != "volume_path"],
        disk_id=IDENTIFIER.bytes_le if parent is None or parent.disk_id is None else parent.disk_id,
        headers=(header, dataclasses.replace(header, sequence=2)),
        creator="imagekit",
    )


# --- the bytes ---------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.data())
def test_the_file_is_what_the_generator_makes_of_the_disk(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["dynamic", "fixed", "differencing"]))
    block = data.draw(st.sampled_from([MiB, 2 * MiB]))
    count = data.draw(st.integers(1, 4))
    numbers = data.draw(st.permutations(range(count)))
    blocks = {number: noise(block, number) for number in numbers[: data.draw(st.integers(0, count))]}
    if kind == "fixed":
        blocks = {number: noise(block, number) for number in range(count)}
    chosen = options(kind, block_size=block, sector_size=data.draw(st.sampled_from([None, 512])))
    size = count * block - data.draw(st.sampled_from([0, 512, 4096, 65536]))
    file = written(make_writer(size, chosen).layout(), blocks)
    assert file.data == make(as_generated(size, chosen, blocks, block)).bytes()


@pytest.mark.parametrize("kind", ["dynamic", "fixed", "differencing"])
def test_sectors_of_4096_bytes_are_written(kind: str) -> None:
    parent = dataclasses.replace(PARENT, sector_size=4096)
    chosen = options(kind, sector_size=4096, block_size=MiB, parent=parent)
    blocks = {0: noise(MiB, 1), 1: noise(MiB, 2)}
    file = written(make_writer(MiB + 8192, chosen).layout(), blocks)
    assert file.data == make(as_generated(MiB + 8192, chosen, blocks, MiB)).bytes()
    assert FORMAT.open(file).sector_size == 4096


def test_entries_of_large_disks_are_where_the_generator_has_them() -> None:
    """Across sector bitmap entries and across the windows in which the BAT is made."""
    for block, sector, numbers in (
        (256 * MiB, 512, (15, 16, 31, 47, 48, 17, 4000)),
        (MiB, 512, (4095, 4096, 65519, 65520, 65521, 131_000, 8191, 8192)),
        (MiB, 4096, (32767, 32768, 65534, 65535, 65536)),
    ):
        size = 1 << 40
        layout = make_writer(size, options(block_size=block, sector_size=sector)).layout()
        for number in numbers:
            layout.place(number)
        recipe = as_generated(size, options(sector_size=sector), dict.fromkeys(numbers, b""), block)
        bat: dict[int, int] = {}
        for offset, data in layout.metadata():
            if offset >= 3 * MiB:
                entries = struct.iter_unpack("<Q", data)
                bat |= {offset // 8 + at: entry for at, (entry,) in enumerate(entries) if entry}
        pieces = [(at, data) for at, data in make(recipe).pieces if 3 * MiB <= at < recipe.places().first_block]
        assert bat == {at // 8: struct.unpack("<Q", data)[0] for at, data in pieces}


def test_runs_of_blocks_and_single_ones_give_the_same_file() -> None:
    runs = ((3, 2), (WINDOW - 30, 100), (200_000, 1), (7, 1))
    one = make_writer(1 << 40, options(block_size=MiB)).layout(runs)
    other = make_writer(1 << 40, options(block_size=MiB)).layout()
    for first, count in runs:
        for number in range(first, first + count):
            assert one.place(number) == other.place(number)
    assert list(one.metadata()) == list(other.metadata())
    assert one.file_size == other.file_size == one.place(7) + MiB


def test_blocks_lie_in_the_order_in_which_they_arrive() -> None:
    layout = make_writer(8 * MiB, options()).layout()
    assert [layout.place(block) // MiB for block in (5, 2, 5, 7, 0, 2)] == [4, 5, 4, 6, 7, 5]
    assert layout.file_size == 8 * MiB


def test_a_fixed_disk_has_all_its_blocks_in_their_own_order() -> None:
    layout = make_writer(5 * MiB, options("fixed")).layout(((3, 1), (1, 1)))
    assert [layout.place(block) // MiB for block in (4, 0, 3)] == [8, 4, 7]
    assert layout.file_size == 9 * MiB
    file = written(layout, {3: noise(MiB)})
    image = FORMAT.open(file)
    assert content(image) == bytes(3 * MiB) + noise(MiB) + bytes(MiB)
    assert [(one.data, one.offset) for one in image.extents()] == [(True, 4 * MiB)]
    assert image.info().subformat == "fixed"


def test_the_tables_are_those_of_windows() -> None:
    """Region tables and metadata of its own files; what differs is what must."""
    theirs = sample("fat-parent.vhdx").read_bytes()
    chosen = WriterOptions(uuid.UUID(bytes_le=theirs[2 * MiB + 0x10018 :][:16]), "fixed", 2 * MiB)
    layout = make_writer(4 * MiB, chosen).layout()
    ours = bytes(written(layout, {0: theirs[4 * MiB : 6 * MiB], 1: theirs[6 * MiB :]}).data)
    assert ours[192 * KiB : MiB] == theirs[192 * KiB : MiB]
    table = theirs[2 * MiB : 2 * MiB + 32 + 5 * 32]  # behind it Windows leaves a sixth entry that does not count
    assert ours[2 * MiB :][: len(table)] == table
    assert ours[2 * MiB + 64 * KiB :] == theirs[2 * MiB + 64 * KiB :]


def test_the_locator_is_that_of_windows_without_the_volume() -> None:
    theirs = FORMAT.open(MemoryFile(sample("fat-differential.vhdx").read_bytes())).metadata.locator
    assert theirs is not None
    link = ParentLink(
        theirs.linkages[0], 4 * MiB, theirs.get("relative_path") or "", theirs.get("absolute_win32_path")
    )
    file = written(make_writer(4 * MiB, options("differencing", parent=link)).layout(), {})
    ours = FORMAT.open(file).metadata.locator
    assert ours is not None
    assert ours.pairs == tuple(pair for pair in theirs.pairs if pair[0] != "volume_path")


# --- disks -------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(disks(unit=256 * KiB), st.sampled_from(["dynamic", "fixed"]), st.sampled_from([None, 2 * MiB]))
def test_a_converted_disk_reads_as_its_source(disk: bytes, kind: str, block: int | None) -> None:
    file = convert(MemoryFile(disk), "raw", "vhdx", options=options(kind, block_size=block))
    image = FORMAT.open(file)
    assert_extents_agree(image, file, disk)
    assert FORMAT.check(file) == []
    assert image.info().facts == ()
    assert file.size % MiB == 0


def test_a_child_shows_its_parent_where_nothing_was_written() -> None:
    file = written(make_writer(8 * MiB, options("differencing")).layout(), {1: text(2 * MiB)})
    below = noise(8 * MiB)

    def resolve(reference: Reference) -> DiskImage:
        assert reference.identities == (PARENT.identity,)
        assert reference.names == (PARENT.relative, PARENT.absolute)
        return RawImage(MemoryFile(below), len(below))

    image = FORMAT.open(file, resolver=resolve)
    assert content(image) == below[: 2 * MiB] + text(2 * MiB) + below[4 * MiB :]
    assert image.info().subformat == "differencing"
    assert image.disk_id == PARENT.disk_id
    assert FORMAT.check(file) == []


def test_a_child_of_a_parent_without_an_id_has_its_own() -> None:
    parent = dataclasses.replace(PARENT, disk_id=None, absolute=None)
    image = FORMAT.open(written(make_writer(8 * MiB, options("differencing", parent=parent)).layout(), {}))
    assert image.disk_id == IDENTIFIER.bytes_le
    assert image.reference is not None
    assert image.reference.names == (parent.relative,)


def test_a_child_has_the_sectors_of_its_parent() -> None:
    parent = dataclasses.replace(PARENT, sector_size=4096)
    file = written(make_writer(8 * MiB, options("differencing", parent=parent)).layout(), {})
    assert FORMAT.open(file).sector_size == 4096


def test_the_identifier_decides_every_guid() -> None:
    one, same, other = (
        FORMAT.open(written(make_writer(MiB, WriterOptions(identifier)).layout(), {}))
        for identifier in (IDENTIFIER, IDENTIFIER, uuid.UUID(int=7))
    )
    assert (one.header, one.disk_id) == (same.header, same.disk_id)
    guids = [guid for image in (one, other) for guid in (*_guids(image.header), image.disk_id)]
    assert len(set(guids)) == len(guids) == 6
    assert one.disk_id == IDENTIFIER.bytes_le
    assert one.identity == uuid.uuid5(IDENTIFIER, "DataWriteGuid").bytes_le


def _guids(header: object) -> tuple[object, object]:
    return header.file_write_guid, header.data_write_guid  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("size", "sector", "kind", "block"),
    [
        (512, 512, "dynamic", 1),
        (10 * GiB, 512, "dynamic", 1),
        (10 * GiB, 512, "fixed", 1),
        (2 * TiB - GiB, 512, "dynamic", 1),
        (2 * TiB, 512, "dynamic", 2),
        (4 * TiB - 4 * GiB, 512, "fixed", 2),
        (4 * TiB, 512, "dynamic", 8),
        (16 * TiB, 512, "dynamic", 32),
        (64 * TiB, 512, "dynamic", 32),
        (2 * TiB - GiB, 4096, "dynamic", 1),
        (512, 512, "differencing", 2),
        (3 * TiB, 512, "differencing", 2),
        (64 * TiB, 512, "differencing", 32),
    ],
)
def test_the_block_nobody_asked_for_is_small_while_the_bat_is_too(
    size: int, sector: int, kind: str, block: int
) -> None:
    parent = dataclasses.replace(PARENT, sector_size=sector)
    assert make_writer(size, options(kind, sector_size=sector, parent=parent)).block_size == block * MiB


@pytest.mark.parametrize("kind", ["dynamic", "fixed", "differencing"])
@pytest.mark.parametrize("block", [MiB, 32 * MiB])
def test_64_tib_take_little_memory(kind: str, block: int) -> None:
    tracemalloc.start()
    try:
        started = time.perf_counter()
        writer = make_writer(64 * TiB, options(kind, block_size=block))
        layout = writer.layout(((5, 2), (64 * TiB // block - 1, 1)))
        # A fixed disk has an entry a block: behind the first windows there is more of the same.
        for _, data in itertools.islice(layout.metadata(), 50):
            assert len(data) <= MiB
        assert layout.file_size > 64 * TiB if kind == "fixed" else layout.file_size < 1 * GiB
        assert time.perf_counter() - started < 2
        assert tracemalloc.get_traced_memory()[1] < 16 * MiB
    finally:
        tracemalloc.stop()


def test_an_empty_disk_of_64_tib_is_read_as_one() -> None:
    layout = make_writer(64 * TiB, options()).layout()
    file = written(layout, {})
    assert file.size == 3 * MiB + 17 * MiB
    image = FORMAT.open(file)
    assert [(one.length, one.zero) for one in image.extents()] == [(64 * TiB, True)]


# --- what cannot be written --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "chosen", "message"),
    [
        (64 * TiB + 512, options, r"a VHDX holds from one sector to 64 TiB"),
        (0, options, r"a VHDX holds from one sector to 64 TiB"),
        (4096 + 512, lambda: options(sector_size=4096), r"4608 bytes are not a multiple of the sector size 4096"),
        (MiB, lambda: options(sector_size=2048), r"logical sectors of 2048 bytes"),
        (MiB, lambda: options(block_size=3 * MiB), r"block size 3145728: a power of two from 1 MiB to 256 MiB"),
        (MiB, lambda: options(block_size=512 * KiB), r"block size 524288: a power of two"),
        (MiB, lambda: options(block_size=512 * MiB), r"block size 536870912: a power of two"),
        (MiB, lambda: options("sparse"), r"VHDX subformat 'sparse' is not written"),
        (MiB, lambda: WriterOptions(IDENTIFIER, "differencing"), r"a differencing disk needs a parent"),
        (MiB, lambda: options("differencing", sector_size=4096), r"the parent has logical sectors of 512 bytes"),
        (
            MiB,
            lambda: options("differencing", parent=dataclasses.replace(PARENT, relative="x" * 40000)),
            r"a parent's name of 40000 characters; 32767 in UTF-16 fit",
        ),
    ],
    ids=[
        "too large",
        "empty",
        "not whole sectors",
        "sectors",
        "no power",
        "small",
        "large",
        "subformat",
        "no parent",
        "parent's sectors",
        "name",
    ],
)
def test_what_no_vhdx_can_be_is_refused_with_what_to_do(
    size: int, chosen: Callable[[], WriterOptions], message: str
) -> None:
    with pytest.raises(UnsupportedFeature, match=message) as caught:
        FORMAT.writer(size, chosen())
    assert caught.value.hint or "64 TiB" in message


def test_the_hint_names_a_size_that_fits() -> None:
    with pytest.raises(UnsupportedFeature) as caught:
        make_writer(10_000_384, options(sector_size=4096))
    assert caught.value.hint == "give a size: --size 10002432"
    assert make_writer(10_002_432, options(sector_size=4096)).virtual_size == 10_002_432


def test_nothing_is_written_where_only_zeros_would_go() -> None:
    layout = make_writer(64 * TiB, options(block_size=MiB)).layout(((40_000_000, 1),))
    offsets = [offset for offset, _ in layout.metadata()]
    index = 40_000_000 + 40_000_000 // 4096
    assert offsets[-1] == 3 * MiB + index * 8 // 4096 * 4096
    assert len(offsets) == 7
    assert list(layout.metadata())[-1][1].count(0) < 4096
    assert struct.unpack_from("<Q", list(layout.metadata())[-1][1], index * 8 % 4096) == (
        layout.place(40_000_000) | FULL,
    )
