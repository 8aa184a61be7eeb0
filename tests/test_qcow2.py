"""Reading qcow2: every kind of cluster, any sizes, and pointers that lie."""

from __future__ import annotations

import dataclasses
import random
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.qcow2_images import (
    COMPRESSED,
    SUBCLUSTERS,
    Cluster,
    Compressed,
    Plain,
    Qcow2,
    Recipe,
    Split,
    Zero,
    compress,
    make,
)
from imagekit.errors import CorruptImage, ImagekitError, InvalidImage, UnsupportedFeature
from imagekit.formats import qcow2
from imagekit.formats.base import Extent, round_up
from imagekit.formats.files import MemoryFile
from imagekit.formats.qcow2 import FORMAT, Qcow2Image
from tests.disks import assert_extents_agree, content, cut, noise, qcow2_recipes, read_or_error, text

KiB = 1 << 10
K64 = 64 * KiB


def image_of(made: Qcow2) -> Qcow2Image:
    return FORMAT.open(MemoryFile(made.data))


def kinds(extent: Extent) -> tuple[bool, bool, bool, bool]:
    return extent.data, extent.zero, extent.present, extent.compressed


# --- what a guest reads ----------------------------------------------------------------------------------------


@given(qcow2_recipes())
@settings(max_examples=150)
def test_a_guest_reads_what_the_image_says_and_extents_agree(recipe: Recipe) -> None:
    file = MemoryFile(make(recipe).data)
    assert_extents_agree(FORMAT.open(file), file, recipe.content())


@given(qcow2_recipes(), st.data())
def test_any_part_of_the_disk_reads_as_it_does_within_the_whole(recipe: Recipe, data: st.DataObject) -> None:
    """Reads and extents that begin and end anywhere, also inside a compressed cluster or a subcluster."""
    image, expected = image_of(make(recipe)), recipe.content()
    whole = list(image.extents())
    for _ in range(10):
        start = data.draw(st.integers(0, recipe.size))
        length = data.draw(st.integers(0, 3 * recipe.cluster_size))
        assert image.pread(start, length) == expected[start : start + length]
        assert list(image.extents(start, length)) == cut(whole, start, start + length)


@pytest.mark.parametrize("bits", range(9, 22))
@pytest.mark.parametrize("zstd", [False, True], ids=["zlib", "zstd"])
def test_every_cluster_size_with_plain_and_compressed_clusters_mixed(bits: int, zstd: bool) -> None:
    size = 1 << bits
    clusters: dict[int, Cluster] = {
        3: Plain(noise(size)),
        1: Compressed(text(size)),
        2: Compressed(text(size, 1)),
        4: Zero(),
        6: Compressed(bytes(size)),
        5: Plain(text(size)),
    }
    recipe = Recipe(size=7 * size - 512, clusters=clusters, cluster_bits=bits, zstd=zstd)
    file = MemoryFile(make(recipe).data)
    assert_extents_agree(FORMAT.open(file), file, recipe.content())


def test_each_kind_of_cluster_has_its_own_flags() -> None:
    clusters: dict[int, Cluster] = {
        0: Plain(noise(K64)),
        1: Compressed(text(K64)),
        2: Zero(),
        3: Zero(noise(K64)),
    }
    made = make(Recipe(size=6 * K64, clusters=clusters))
    extents = list(image_of(made).extents())
    assert [(one.start // K64, one.length // K64, *kinds(one)) for one in extents] == [
        (0, 1, True, False, True, False),
        (1, 1, True, False, True, True),
        (2, 2, False, True, True, False),
        (4, 2, False, True, False, False),
    ]
    assert [one.offset is not None for one in extents] == [True, False, False, False]


def test_each_kind_of_subcluster_reads_as_its_bit_says() -> None:
    part = K64 // SUBCLUSTERS
    parts = (noise(part, 1), noise(part, 2), b"", None, *([None] * 26), b"", noise(part, 3))
    recipe = Recipe(size=K64, clusters={0: Split(parts)}, extended_l2=True)
    file = MemoryFile(make(recipe).data)
    extents = assert_extents_agree(FORMAT.open(file), file, recipe.content())
    assert [(one.start // part, one.length // part, *kinds(one)) for one in extents] == [
        (0, 2, True, False, True, False),
        (2, 1, False, True, True, False),
        (3, 27, False, True, False, False),
        (30, 1, False, True, True, False),
        (31, 1, True, False, True, False),
    ]


def test_neighbours_in_the_guest_and_in_the_file_are_one_extent() -> None:
    clusters = {number: Plain(noise(512, number)) for number in range(100)}
    extents = list(image_of(make(Recipe(size=100 * 512, clusters=clusters, cluster_bits=9))).extents())
    # An L2 table lies between the 64th and the 65th cluster.
    assert [one.length for one in extents] == [64 * 512, 36 * 512]


def test_clusters_written_in_another_order_read_in_the_guests_order() -> None:
    order = list(range(30))
    random.Random(1).shuffle(order)
    recipe = Recipe(size=30 * 512, clusters={number: Plain(noise(512, number)) for number in order}, cluster_bits=9)
    assert content(image_of(make(recipe))) == recipe.content()


def test_a_disk_without_clusters_is_zeros() -> None:
    assert content(image_of(make(Recipe(size=5 * K64 + 512)))) == bytes(5 * K64 + 512)


def test_a_disk_of_no_bytes_has_no_extents() -> None:
    image = image_of(make(Recipe(size=0)))
    assert (list(image.extents()), content(image)) == ([], b"")


def test_a_huge_empty_disk_is_one_extent_at_once() -> None:
    """8 EiB would be 2^47 clusters: the work follows the tables."""
    made = make(Recipe(size=32 << 40, cluster_bits=21))
    assert [one.length for one in image_of(made).extents()] == [32 << 40]


def test_more_tables_than_the_cache_holds_read_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qcow2, "CACHE_BYTES", 0)
    clusters = {number * 64: Plain(noise(512, number)) for number in range(12)}
    recipe = Recipe(size=12 * 64 * 512, clusters=clusters, cluster_bits=9)
    image, expected = image_of(make(recipe)), recipe.content()
    for start in random.Random(1).sample(range(0, recipe.size, 512), 200):
        assert image.pread(start, 512) == expected[start : start + 512]


def test_threads_may_share_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads are positional and the tables are behind a lock; the small cache makes threads throw out each other's."""
    monkeypatch.setattr(qcow2, "CACHE_BYTES", 0)
    clusters = {number * 16: (Plain if number % 2 else Compressed)(text(512, number)) for number in range(40)}
    recipe = Recipe(size=40 * 16 * 512, clusters=clusters, cluster_bits=9)
    image, expected = image_of(make(recipe)), recipe.content()
    wrong: list[int] = []

    def read(seed: int) -> None:
        for start in random.Random(seed).sample(range(recipe.size - 700), 300):
            if image.pread(start, 700) != expected[start : start + 700]:
                wrong.append(start)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- bytes that are missing ------------------------------------------------------------------------------------


def test_the_file_may_end_where_the_disk_ends_inside_the_last_cluster() -> None:
    recipe = Recipe(size=2 * K64 - 1024, clusters={0: Plain(noise(K64)), 1: Plain(noise(K64, 1))})
    data = make(recipe).data
    assert read_or_error("qcow2", data[:-1024]) == recipe.content()
    assert isinstance(read_or_error("qcow2", data[:-1025]), CorruptImage)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(
            size=5 * 512,
            clusters={0: Plain(noise(512)), 1: Compressed(text(512)), 2: Zero(), 4: Plain(noise(512))},
            cluster_bits=9,
        ),
        Recipe(size=1000, clusters={1: Plain(noise(512)), 0: Compressed(noise(200) + bytes(312))}, cluster_bits=9),
        Recipe(
            size=1024, clusters={0: Compressed(text(512)), 1: Compressed(text(512, 1))}, cluster_bits=9, zstd=True
        ),
        Recipe(size=1024, clusters={0: Plain(noise(512))}, cluster_bits=9, version=2),
    ],
    ids=["plain last", "compressed last", "zstd last", "version 2"],
)
def test_an_image_cut_anywhere_is_an_error_or_the_same_content(recipe: Recipe) -> None:
    """Every length, a byte at a time: never zeros where there was data."""
    data, expected = make(recipe).data, recipe.content()
    whole = [length for length in range(len(data)) if read_or_error("qcow2", data[:length]) == expected]
    others = [read_or_error("qcow2", data[:length]) for length in range(len(data)) if length not in whole]
    assert all(isinstance(other, ImagekitError) for other in others)
    # What may be missing: the part of the last cluster past the disk's end, or the padding of the last stream.
    assert len(whole) < 512


def test_a_stream_that_needs_sectors_behind_the_end_of_the_file_is_read_if_it_is_whole() -> None:
    recipe = Recipe(size=K64, clusters={0: Compressed(text(K64))})
    data = make(recipe).data
    stream = compress(text(K64))
    start = data.rindex(stream)
    assert read_or_error("qcow2", data[: start + len(stream)]) == recipe.content()
    assert isinstance(read_or_error("qcow2", data[: start + len(stream) // 2]), CorruptImage)


# --- damage ----------------------------------------------------------------------------------------------------

SMALL = make(Recipe(size=4 * K64, clusters={0: Plain(noise(K64)), 1: Compressed(text(K64)), 2: Zero()}))
EXTENDED = make(Recipe(size=2 * K64, clusters={0: Split((noise(2048),) * 32), 1: Zero()}, extended_l2=True))


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (SMALL.l1_entry(0), SMALL.l2[0] + 512, "L1 entry 0 points to .*, not on a cluster"),
        (SMALL.l1_entry(0), round_up(len(SMALL.data), K64), "L1 entry 0 points to .*, behind the file's end"),
        (SMALL.l1_entry(0), 1 << 55, "L1 entry 0 points to 0x80000000000000, behind"),
        (SMALL.l2_entry(0), SMALL.number(SMALL.l2_entry(0)) + 512, "not on a cluster"),
        (SMALL.l2_entry(0), 1 << 40, "behind the file's end"),
        (SMALL.l2_entry(1), COMPRESSED | 1 << 40, "starts at 0x10000000000, behind"),
        (SMALL.l2_entry(1), COMPRESSED | SMALL.l1, "deflate stream is damaged|does not yield"),
    ],
    ids=["L1 unaligned", "L1 at the end", "L1 far", "L2 unaligned", "L2 far", "stream far", "stream elsewhere"],
)
def test_a_pointer_that_leads_nowhere_is_damage(at: int, value: int, message: str) -> None:
    with pytest.raises(CorruptImage, match=message):
        content(image_of(SMALL.poked(at, value)))


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (EXTENDED.l2_entry(0) + 8, 1 << 32 | 1),
        (EXTENDED.l2_entry(1) + 8, 1),
        (EXTENDED.l2_entry(0), EXTENDED.number(EXTENDED.l2_entry(0)) | 1),
    ],
    ids=["zero and allocated", "allocated nowhere", "zero flag"],
)
def test_a_bitmap_that_contradicts_its_entry_is_damage(at: int, value: int) -> None:
    with pytest.raises(CorruptImage, match="contradicts its bitmap"):
        content(image_of(EXTENDED.poked(at, value)))


def test_a_zero_flag_in_version_2_is_damage() -> None:
    """Version 2 has no such flag: what the cluster holds cannot be known."""
    made = make(Recipe(size=2 * K64, clusters={0: Plain(noise(K64))}, version=2))
    with pytest.raises(CorruptImage, match="zero flag"):
        content(image_of(made.poked(made.l2_entry(1), 1)))


@pytest.mark.parametrize("zstd", [False, True], ids=["zlib", "zstd"])
@pytest.mark.parametrize(
    "stream",
    [text(K64 + 1), text(K64 - 1), b"", noise(1 << 20) + text(1 << 22)],
    ids=["a byte too long", "a byte short", "empty", "a bomb"],
)
def test_a_stream_that_is_not_exactly_a_cluster_is_damage_and_says_where(stream: bytes, zstd: bool) -> None:
    packed = compress(stream, zstd=zstd)[: 2 * K64]
    made = make(Recipe(size=3 * K64, clusters={1: Compressed(b"", stream=packed)}, zstd=zstd))
    image = image_of(made)
    with pytest.raises(CorruptImage, match="guest bytes from 0x10000: "):
        image.pread(K64 + 100, 10)
    assert image.pread(0, K64) == bytes(K64)


@given(st.data())
@settings(max_examples=200)
def test_any_flipped_bits_give_other_content_or_a_typed_error(data: st.DataObject) -> None:
    """Nothing but our own errors, and no read that never ends."""
    made = data.draw(st.sampled_from([SMALL, EXTENDED]))
    broken = bytearray(made.data)
    for _ in range(data.draw(st.integers(1, 3))):
        places = [0, made.l1, made.l2[0], made.refcount_table]
        at = data.draw(st.sampled_from(places)) + data.draw(st.integers(0, 127))
        broken[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        image = FORMAT.open(MemoryFile(bytes(broken)))
        image.info()
        if image.virtual_size < 1 << 24:
            assert sum(extent.length for extent in image.extents()) == image.virtual_size
            assert len(content(image)) == image.virtual_size
    except ImagekitError:
        return


# --- facts and references --------------------------------------------------------------------------------------


def test_the_header_tells_all_about_an_image_that_is_not_read() -> None:
    recipe = Recipe(size=1 << 30, clusters={0: Plain(noise(K64))}, zstd=True, refcount_order=3, incompatible=3)
    info = image_of(make(recipe)).info()
    assert (info.format, info.subformat, info.virtual_size, info.block_size) == ("qcow2", "v3", 1 << 30, K64)
    assert info.features == {
        "version": 3,
        "compression-type": "zstd",
        "extended-l2": False,
        "refcount-bits": 8,
        "lazy-refcounts": False,
        "snapshots": 0,
        "bitmaps": 0,
        "encrypted": False,
        "dirty": True,
        "corrupt": True,
    }
    assert [fact.code for fact in info.facts] == ["dirty", "corrupt-bit"]


def test_an_image_cut_while_it_is_read_is_an_error() -> None:
    made = make(Recipe(size=2 * K64, clusters={0: Plain(noise(K64)), 1: Plain(noise(K64, 1))}))
    file = MemoryFile(made.data)
    image = FORMAT.open(file)
    assert image.pread(0, 10) == noise(K64)[:10]
    file.truncate(len(made.data) - 100)
    with pytest.raises(CorruptImage, match="guest bytes from 0x10000: 65536 expected, 65436 found"):
        image.pread(K64, K64)


@pytest.mark.parametrize(("method", "name"), [(1, "AES"), (2, "LUKS"), (9, "method 9")])
def test_encrypted_data_is_refused_with_a_way_out(method: int, name: str) -> None:
    image = image_of(SMALL.poked(32, method, 4))
    assert [fact.code for fact in image.info().facts] == ["encrypted"]
    with pytest.raises(UnsupportedFeature, match=f"the data is encrypted \\({name}\\)") as caught:
        content(image)
    assert caught.value.hint is not None


@pytest.mark.parametrize(
    ("recipe", "compression"),
    [(Recipe(size=K64, incompatible=1 << 40), 0), (Recipe(size=K64, zstd=True), 7)],
    ids=["feature bit", "compression type"],
)
def test_a_feature_nobody_told_us_about_is_a_fact_and_refused(recipe: Recipe, compression: int) -> None:
    made = make(recipe)
    if compression:
        made = made.poked(104, compression, 1)
    image = image_of(made)
    assert [fact.code for fact in image.info().facts] == ["unknown-feature"]
    with pytest.raises(UnsupportedFeature, match="unknown"):
        content(image)


@pytest.mark.parametrize(("length", "offset"), [(1024, 200), (10, 65530), (10, 1 << 60)])
def test_a_backing_name_outside_the_first_cluster_is_invalid(length: int, offset: int) -> None:
    made = make(Recipe(size=K64)).poked(8, offset).poked(16, length, 4)
    with pytest.raises(InvalidImage, match="backing file name"):
        image_of(made)


def test_an_image_is_recognised_by_its_magic_alone() -> None:
    assert FORMAT.probe(MemoryFile(SMALL.data)) == "qcow2 magic at 0"
    assert FORMAT.probe(MemoryFile(b"QFI")) is None
    assert FORMAT.probe(MemoryFile(b"")) is None


def test_a_file_shorter_than_the_readers_window_is_read_by_what_it_has() -> None:
    """Some readers ask for a fixed window first and take less for 'not mine'."""
    header = make(Recipe(size=0, version=2, cluster_bits=9)).data
    image = FORMAT.open(MemoryFile(header[:520]))
    assert image.virtual_size == 0
    assert dataclasses.replace(image.header).version == 2
