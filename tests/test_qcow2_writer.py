"""Writing qcow2: sound files of any size, packed as tightly as they can be, the same whoever writes them."""

from __future__ import annotations

import dataclasses
import itertools
import tracemalloc
import uuid
from collections import Counter
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.qcow2_images import Compressed, Plain, Recipe, make
from imagekit import copying
from imagekit.errors import UnsupportedFeature
from imagekit.formats import qcow2_writer
from imagekit.formats.base import BlockRuns, EncodedLayout, Layout, ParentLink, WriterOptions
from imagekit.formats.files import MemoryFile
from imagekit.formats.qcow2 import FORMAT, Qcow2Image
from imagekit.formats.qcow2_header import Qcow2Header
from imagekit.formats.raw import RawImage
from imagekit.plan import ConversionPlan, build_plan
from tests.disks import IDENTIFIER, OPTIONS, assert_extents_agree, content, convert, disks, noise, qcow2_recipes, text

KiB, MiB, GiB, TiB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
K64 = 64 * KiB

Compression = Literal["zlib", "zstd"]
COMPRESSIONS: list[Compression | None] = [None, "zlib", "zstd"]
each_compression = pytest.mark.parametrize("compression", COMPRESSIONS, ids=["plain", "zlib", "zstd"])


def options(cluster: int | None = None, compression: Compression | None = None) -> WriterOptions:
    return WriterOptions(IDENTIFIER, block_size=cluster, compression=compression)


def plan_for(disk: bytes, how: WriterOptions) -> tuple[RawImage, ConversionPlan]:
    image = RawImage(MemoryFile(disk), len(disk))
    size = -(-len(disk) // 512) * 512
    return image, build_plan(image, source_format="raw", target_format="qcow2", options=how, virtual_size=size)


def written(layout: Layout, size: int = 0) -> MemoryFile:
    """The file of a layout, with nothing in its clusters."""
    file = MemoryFile()
    file.truncate(max(size, layout.file_size))
    for offset, data in layout.metadata():
        file.pwrite(offset, data)
    return file


def assert_sound(file: MemoryFile, expected: bytes, cluster: int) -> Qcow2Image:
    assert FORMAT.check(file) == []
    assert file.size % cluster == 0
    image = FORMAT.open(file)
    assert_extents_agree(image, file, expected)
    return image


# --- any disk --------------------------------------------------------------------------------------------------


@each_compression
@given(disk=disks(unit=2048), bits=st.integers(9, 14), jobs=st.integers(1, 3), grown=st.integers(0, 200))
@settings(max_examples=50)
def test_any_disk_reads_back_from_a_sound_file(
    compression: Compression | None, disk: bytes, bits: int, jobs: int, grown: int
) -> None:
    size = len(disk) + grown * 512
    file = convert(MemoryFile(disk), "raw", "qcow2", options=options(1 << bits, compression), size=size, jobs=jobs)
    assert_sound(file, disk.ljust(size, b"\0"), 1 << bits)


@each_compression
@pytest.mark.parametrize("bits", range(9, 22))
def test_every_cluster_size(bits: int, compression: Compression | None) -> None:
    """Data, text, zeros and an end inside a cluster."""
    cluster = 1 << bits
    disk = noise(cluster, 1) + bytes(2 * cluster) + text(3 * cluster, 2) + noise(cluster + 512, 3)
    file = convert(MemoryFile(disk), "raw", "qcow2", options=options(cluster, compression))
    image = assert_sound(file, disk, cluster)
    assert image.header.cluster_bits == bits


@each_compression
@given(recipe=qcow2_recipes(cluster_bits=(9, 12)))
@settings(max_examples=30)
def test_any_qcow2_becomes_the_same_disk_in_other_clusters(compression: Compression | None, recipe: Recipe) -> None:
    file = convert(MemoryFile(make(recipe).data), "qcow2", "qcow2", options=options(1024, compression), jobs=2)
    assert_sound(file, recipe.content(), 1024)


def test_exactly_the_planned_clusters_are_allocated() -> None:
    disk = bytes(3 * KiB) + noise(2 * KiB) + bytes(9000 * KiB) + text(KiB)
    image, plan = plan_for(disk, options(KiB))
    file = MemoryFile()
    copying.copy_image(plan, image, image.file, file)
    found = [(one.start // KiB, one.length // KiB) for one in FORMAT.open(file).extents() if one.present]
    assert plan.blocks == ((3, 2), (9005, 1))
    assert tuple(found) == plan.blocks


@each_compression
def test_a_disk_without_data_is_header_and_tables(compression: Compression | None) -> None:
    file = convert(MemoryFile(bytes(MiB)), "raw", "qcow2", options=options(compression=compression))
    assert file.size == 4 * K64
    assert_sound(file, bytes(MiB), K64)


# --- the header ------------------------------------------------------------------------------------------------


def test_the_header_says_what_qemu_says() -> None:
    file = convert(MemoryFile(noise(5 * MiB)), "raw", "qcow2", size=GiB)
    header = Qcow2Header.parse(file.pread(0, 105))
    assert dataclasses.asdict(header) | {"refcount_offset": 0} == {
        "version": 3,
        "backing_offset": 0,
        "backing_length": 0,
        "cluster_bits": 16,
        "size": GiB,
        "crypt_method": 0,
        "l1_size": 2,
        "l1_offset": K64,
        "refcount_offset": 0,
        "refcount_clusters": 1,
        "snapshot_count": 0,
        "snapshots_offset": 0,
        "incompatible": 0,
        "compatible": 0,
        "autoclear": 0,
        "refcount_order": 4,
        "header_length": 112,
        "compression_type": 0,
    }
    info = FORMAT.open(file).info()
    assert (info.subformat, info.facts, info.references) == ("v3", (), ())


def test_a_zstd_image_names_the_feature_that_an_old_reader_lacks() -> None:
    file = convert(MemoryFile(text(K64)), "raw", "qcow2", options=options(512, "zstd"))
    header = Qcow2Header.parse(file.pread(0, 105))
    assert (header.incompatible, header.compression_type) == (8, 1)
    assert file.pread(112, 26) == bytes.fromhex("6803f857 00000030 00 03") + b"compression type"


def test_the_file_depends_on_the_disk_alone() -> None:
    """Neither on the clock nor on the identity, which this format has no room for."""
    one = convert(MemoryFile(text(MiB)), "raw", "qcow2")
    other = WriterOptions(uuid.uuid4(), timestamp=1_700_000_000)
    assert convert(MemoryFile(text(MiB)), "raw", "qcow2", options=other).data == one.data


# --- the layout ------------------------------------------------------------------------------------------------


@given(st.permutations(range(0, 200, 7)), st.integers(0, 3), st.sampled_from([512, 1024]))
@settings(max_examples=30)
def test_clusters_may_arrive_in_any_order(order: list[int], planned: int, cluster: int) -> None:
    """Each gets the next place; those that are known beforehand come first."""
    blocks: BlockRuns = ((3, planned),) if planned else ()
    writer = FORMAT.writer(200 * cluster, options(cluster))
    layout = writer.layout(blocks)
    places = {block: layout.place(block) for block in (*range(3, 3 + planned), *order)}
    assert places == {block: layout.place(block) for block in places}
    first = min(places.values())
    assert [places[block] for block in dict.fromkeys((*range(3, 3 + planned), *order))] == [
        first + at * cluster for at in range(len(places))
    ]
    file = written(layout)
    for block, place in places.items():
        file.pwrite(place, noise(cluster, block))
    expected = b"".join(noise(cluster, block) if block in places else bytes(cluster) for block in range(200))
    assert_sound(file, expected, cluster)


@pytest.mark.parametrize("piece", [512, 4096, qcow2_writer.PIECE])
def test_it_makes_no_difference_how_much_metadata_is_made_at_once(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = ((0, 3), (70, 1), (100, 900), (5000, 64), (5130, 10))
    writer = FORMAT.writer(6000 * 512, options(512))
    expected = written(writer.layout(blocks)).data
    monkeypatch.setattr(qcow2_writer, "PIECE", piece)
    layout = writer.layout(blocks)
    assert written(layout).data == expected
    largest = max(len(data) for _, data in layout.metadata())
    assert largest <= max(piece, -(-6000 // 64) * 8 // 512 * 512 + 512)


@pytest.mark.parametrize("size", [16 * TiB, 900 * TiB], ids=["16 TiB", "900 TiB"])
@each_compression
def test_a_huge_disk_takes_memory_for_what_it_holds(size: int, compression: Compression | None) -> None:
    cluster = K64
    blocks = tuple((at * (size // cluster // 20), 2) for at in range(20))
    tracemalloc.start()
    try:
        layout = FORMAT.writer(size, options(cluster, compression)).layout(blocks)
        if isinstance(layout, EncodedLayout):
            for first, count in blocks:
                for block in range(first, first + count):
                    layout.add(block, 1000)
        largest = 0
        for _, data in layout.metadata():
            largest = max(largest, len(data))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 48 * MiB
    assert largest <= max(qcow2_writer.PIECE, -(-size // (cluster * cluster // 8)) * 8 + cluster)


def test_a_disk_of_16_tib_is_a_small_file_that_reads_as_one() -> None:
    size, places = 16 * TiB, (0, 7 * TiB, 7 * TiB + GiB, 16 * TiB - K64)
    layout = FORMAT.writer(size, options()).layout(tuple((place // K64, 1) for place in places))
    file = written(layout)
    for at, place in enumerate(places):
        file.pwrite(layout.place(place // K64), noise(K64, at))
    assert file.size < 2 * MiB
    assert FORMAT.check(file) == []
    image = FORMAT.open(file)
    assert [one.start for one in image.extents() if one.data] == list(places)
    assert [image.pread(place, K64) for place in places] == [noise(K64, at) for at in range(4)]


@pytest.mark.parametrize("clusters", [*range(240, 256), 15_800, 15_900, 16_000, 16_100])
def test_refcounts_count_themselves(clusters: int) -> None:
    """Around the sizes where one more block, and one more cluster of the table of them, is needed."""
    layout = FORMAT.writer(70_000 * 512, options(512)).layout(((0, clusters),))
    file = written(layout)
    assert file.size == layout.file_size
    assert FORMAT.check(file) == []


# --- compressed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_each_cluster_is_stored_the_smallest_way(compression: Compression) -> None:
    disk = noise(K64, 1) + text(2 * K64) + bytes(K64) + noise(K64, 2) + b"\x01" + bytes(K64 - 1)
    file = convert(MemoryFile(disk), "raw", "qcow2", options=options(compression=compression))
    image = assert_sound(file, disk, K64)
    assert [(one.start // K64, one.data, one.present, one.compressed) for one in image.extents()] == [
        (0, True, True, False),
        (1, True, True, True),
        (3, False, False, False),
        (4, True, True, False),
        (5, True, True, True),
    ]
    # Header, L1, three clusters of data, an L2 table, refcounts.
    assert file.size == 8 * K64


def test_zeros_that_the_source_stores_compressed_are_not_stored() -> None:
    """The plan cannot know of them: nothing is decompressed to look."""
    recipe = Recipe(size=9 * K64, clusters={2: Compressed(bytes(K64)), 8: Compressed(text(K64))})
    source = MemoryFile(make(recipe).data)
    file = convert(source, "qcow2", "qcow2", options=options(compression="zstd"))
    assert [one.start // K64 for one in FORMAT.open(file).extents() if one.present] == [8]
    assert (
        file.data == convert(MemoryFile(recipe.content()), "raw", "qcow2", options=options(compression="zstd")).data
    )


@each_compression
def test_the_result_tells_the_size_of_the_finished_file(compression: Compression | None) -> None:
    disk = text(5 * MiB) + noise(MiB) + bytes(MiB)
    image, plan = plan_for(disk, options(compression=compression))
    file = MemoryFile()
    result = copying.copy_image(plan, image, image.file, file, jobs=2)
    assert result.file_size == file.size
    assert (file.size == plan.file_size) is (compression is None)
    assert file.size <= plan.file_size
    assert result.data_bytes == 6 * MiB


def packed(cluster: int, count: int) -> tuple[EncodedLayout, int]:
    """A layout for that many clusters, and where its data begins."""
    layout = FORMAT.writer(count * cluster, options(cluster, "zlib")).layout(((0, count),))
    assert isinstance(layout, EncodedLayout)
    tables = -(-count // (cluster // 8))
    return layout, (1 + -(-tables * 8 // cluster)) * cluster


@given(st.lists(st.integers(0, 512) | st.sampled_from([1, 30, 511, 512]), max_size=150), st.integers(2, 9))
@settings(max_examples=150)
def test_streams_and_clusters_are_packed_without_overlap_and_counted_right(lengths: list[int], limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qcow2_writer, "MAX_REFCOUNT", limit)
        layout, base = packed(512, 150)
        bound = layout.file_size
        places = [(layout.add(block, length), length) for block, length in enumerate(lengths)]
        for length in range(len(lengths), 150):
            assert layout.add(length, 0) == 0
    used: Counter[int] = Counter()
    taken: set[int] = set()
    for at, length in places:
        if length:
            assert at >= base
            assert length < 512 or at % 512 == 0
            assert taken.isdisjoint(range(at, at + length))
            taken.update(range(at, at + length))
            used.update(range(at // 512, (at + length - 1) // 512 + 1))
    assert max(used.values(), default=0) <= limit
    assert not used or sorted(used) == list(range(base // 512, max(used) + 1))
    assert layout.file_size <= bound
    file = written(layout)
    assert file.size == layout.file_size
    assert [one for one in FORMAT.check(file) if one.code != "cut-short"] == []


def test_streams_lie_back_to_back_and_go_on_in_the_next_cluster() -> None:
    layout, base = packed(512, 10)
    assert [layout.add(block, 200) - base for block in range(5)] == [0, 200, 400, 600, 800]


def test_a_cluster_between_streams_ends_the_row_and_the_room_before_it_is_used_while_it_lasts() -> None:
    layout, base = packed(512, 10)
    lengths = [200, 512, 300, 20, 20]
    # 12 bytes are left of the first cluster when the fourth comes, and what lies behind is taken.
    assert [layout.add(block, length) - base for block, length in enumerate(lengths)] == [0, 512, 200, 1024, 1044]


def test_a_cluster_that_cannot_count_another_stream_takes_none() -> None:
    """16 bits: one byte each would be more streams than that in a cluster of 2 MiB."""
    layout, base = packed(2 * MiB, 65_540)
    places = [layout.add(block, 1) - base for block in range(65_540)]
    assert places[:65_535] == list(range(65_535))
    assert places[65_535:] == [2 * MiB + at for at in range(5)]
    image = FORMAT.open(written(layout))
    assert image.virtual_size == 65_540 * 2 * MiB


def test_a_bound_is_known_before_and_the_size_after() -> None:
    layout, _ = packed(512, 64)
    sizes = [layout.file_size]
    for block in range(64):
        layout.add(block, 100 if block % 2 else 0)
        sizes.append(layout.file_size)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 512 * (1 + 1 + 64 + 1 + 1 + 1)
    assert sizes[-1] == 512 * (1 + 1 + 7 + 1 + 1 + 1)


# --- what cannot be ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster", [256, 1000, K64 + 512, 4 * MiB, -512])
def test_a_cluster_size_that_the_format_does_not_have_is_refused(cluster: int) -> None:
    with pytest.raises(UnsupportedFeature, match="from 512 bytes to 2 MiB"):
        FORMAT.writer(MiB, options(cluster))


@each_compression
@pytest.mark.parametrize(("cluster", "size"), [(512, 60 * GiB), (4096, 4 * TiB), (K64, 1 << 50), (2 * MiB, 1 << 48)])
def test_a_disk_that_the_tables_cannot_lead_to_is_refused(
    cluster: int, size: int, compression: Compression | None
) -> None:
    assert FORMAT.writer(size, options(cluster, compression)).virtual_size == size
    with pytest.raises(UnsupportedFeature, match="cannot hold a disk of") as caught:
        FORMAT.writer((1 << 63) - 512, options(cluster, compression))
    assert (caught.value.hint is None) is (cluster == 2 * MiB)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"subformat": "v2"}, "subformat 'v2' is not written"),
        ({"subformat": "differencing"}, "subformat 'differencing' is not written"),
        ({"parent": ParentLink(b"", 512, "x")}, "on top of another are not written"),
        ({"sector_size": 4096}, "does not say how large sectors are"),
    ],
    ids=["version 2", "differencing", "parent", "sectors"],
)
def test_what_is_not_written_is_refused(how: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedFeature, match=message):
        FORMAT.writer(MiB, dataclasses.replace(OPTIONS, **how))  # type: ignore[arg-type]


def test_the_default_may_be_named() -> None:
    assert FORMAT.subformats == ("v3",)
    writer = FORMAT.writer(MiB, dataclasses.replace(OPTIONS, subformat="v3", sector_size=512))
    assert writer.block_size == K64


# --- what a reader can do with it -------------------------------------------------------------------------------


def test_data_of_a_plain_image_can_be_copied_by_the_kernel_in_one_piece() -> None:
    """Clusters in the order of the source lie side by side, also across the tables that lead to them."""
    disk = noise(200 * 512)
    image = FORMAT.open(convert(MemoryFile(disk), "raw", "qcow2", options=options(512)))
    assert [(one.length, one.offset is not None) for one in image.extents()] == [(200 * 512, True)]


def test_a_file_cut_off_while_it_is_written_has_no_header() -> None:
    order: list[int] = []

    class Watched(MemoryFile):
        def pwrite(self, offset: int, *buffers: bytes | bytearray | memoryview) -> None:
            order.append(offset)
            super().pwrite(offset, *buffers)

    for compression in COMPRESSIONS:
        order.clear()
        image, plan = plan_for(text(5 * MiB), options(compression=compression))
        copying.copy_image(plan, image, image.file, Watched(), jobs=1)
        assert order.index(0) == len(order) - 1


def test_a_layout_made_twice_is_the_same() -> None:
    disk = {at: Plain(noise(4096, at)) for at in range(0, 90, 3)}
    source = MemoryFile(make(Recipe(size=100 * 4096, clusters=disk, cluster_bits=12)).data)
    files = [convert(source, "qcow2", "qcow2", options=options(4096), jobs=jobs).data for jobs in (1, 2, 3)]
    assert all(one == other for one, other in itertools.pairwise(files))
    assert content(FORMAT.open(MemoryFile(files[0]))) == content(FORMAT.open(source))
