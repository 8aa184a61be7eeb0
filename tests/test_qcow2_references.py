"""What a qcow2 refers to: backing files of any size and format, external data files, and nothing without leave."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.qcow2_images import COMPRESSED, COPIED, Cluster, Compressed, Plain, Qcow2, Recipe, Split, Zero, make
from imagekit import copying
from imagekit.errors import CorruptImage, InvalidImage, UnsupportedFeature
from imagekit.formats import registry
from imagekit.formats.base import DiskImage, Reference
from imagekit.formats.files import MemoryFile
from imagekit.formats.qcow2 import FORMAT, Qcow2Image
from imagekit.formats.raw import RawImage
from imagekit.plan import build_plan
from tests.disks import OPTIONS, content, noise, qcow2_recipes, text

KiB = 1 << 10
K16, K64 = 16 * KiB, 64 * KiB


def image_of(made: Qcow2) -> Qcow2Image:
    return FORMAT.open(MemoryFile(made.data))


def raw(data: bytes) -> RawImage:
    return RawImage(MemoryFile(data), len(data))


def on_top_of(made: Qcow2, below: DiskImage) -> Qcow2Image:
    return FORMAT.open(MemoryFile(made.data), resolver=lambda _: below)


def with_data(made: Qcow2) -> Qcow2Image:
    return on_top_of(made, raw(made.external))


# --- backing files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/etc/passwd", "../base.raw", 'json:{"driver":"nbd"}', "nbd://host/x", "bäse"])
def test_a_backing_file_is_named_and_never_opened(name: str) -> None:
    image = image_of(make(Recipe(size=K64, backing=name, backing_format="raw")))
    assert image.info().references == (Reference("backing-file", name, "raw"),)
    with pytest.raises(UnsupportedFeature, match=r"needs its backing file .*, and nobody allowed to open it"):
        list(image.extents())
    with pytest.raises(UnsupportedFeature):
        content(image)


def test_a_backing_name_right_behind_the_header_is_not_taken_for_extensions() -> None:
    """As QEMU wrote it before there were extensions; qemu-img reads such images, naming the backing file."""
    made = bytearray(make(Recipe(size=K64, version=2)).data)
    name = b"/srv/images/base.raw"
    struct.pack_into(">QI", made, 8, 72, len(name))
    made[72 : 72 + len(name)] = name
    assert FORMAT.open(MemoryFile(made)).references == (Reference("backing-file", name.decode(), None),)


def test_what_the_image_itself_holds_is_read_without_the_backing_file() -> None:
    recipe = Recipe(size=2 * K64, clusters={0: Plain(noise(K64)), 1: Zero()}, backing="base")
    assert content(image_of(make(recipe))) == recipe.content()


@pytest.mark.parametrize("below", [K64 // 2, K64 + 700, 4 * K64], ids=["shorter", "a bit longer", "longer"])
def test_a_backing_file_that_the_caller_opens_shows_through(below: int) -> None:
    base = noise(below)
    recipe = Recipe(size=3 * K64, clusters={1: Plain(text(K64))}, backing="base")
    expected = bytearray(base.ljust(3 * K64, b"\0")[: 3 * K64])
    expected[K64 : 2 * K64] = text(K64)
    asked: list[Reference] = []

    def resolver(reference: Reference) -> RawImage:
        asked.append(reference)
        return RawImage(MemoryFile(base), below)

    image = FORMAT.open(MemoryFile(make(recipe).data), resolver=resolver)
    assert content(image) == expected
    extents = list(image.extents())
    assert sum(one.length for one in extents) == 3 * K64
    assert all((one.file is None) == (one.depth == 0) for one in extents if one.offset is not None and one.data)
    assert {one.depth for one in extents if one.data} == ({0, 1} if below else {0})
    assert image.pread(K64 - 10, 20) == expected[K64 - 10 : K64 + 10]
    assert asked == [Reference("backing-file", "base", None)]


def test_closing_an_image_closes_what_it_was_read_with() -> None:
    closed: list[str] = []

    class Watched(MemoryFile):
        def close(self) -> None:
            closed.append(self.name)

    made = make(Recipe(size=K64, backing="base"))
    base = RawImage(Watched(bytes(K64), name="base"), K64)
    with FORMAT.open(Watched(made.data, name="image"), resolver=lambda _: base) as image:
        assert image.pread(0, 10) == bytes(10)
    assert sorted(closed) == ["base", "image"]


PART = K16 // 32
KINDS: dict[str, tuple[Recipe, Callable[[bytearray], None]]] = {}
"""Overlays of 100 KiB by kind, and what each does to what lies below."""


def overlay(name: str, clusters: dict[int, Cluster], **options: bool) -> None:
    def apply(disk: bytearray) -> None:
        for number, cluster in clusters.items():
            at = number * K16
            if isinstance(cluster, Plain | Compressed):
                disk[at : at + K16] = cluster.data
            elif isinstance(cluster, Zero):
                disk[at : at + K16] = bytes(K16)
            else:
                for index, part in enumerate(cluster.parts):
                    if part is not None:
                        disk[at + index * PART : at + (index + 1) * PART] = part or bytes(PART)

    recipe = Recipe(size=100 * KiB, clusters=clusters, cluster_bits=14, backing="base", **options)  # type: ignore[arg-type]
    KINDS[name] = recipe, apply


SPLIT = Split((None, noise(PART, 1), b"", text(PART, 2)) * 8)
overlay("plain", {1: Plain(noise(K16, 3)), 4: Zero(), 6: Plain(noise(K16, 4))})
overlay("compressed", {0: Compressed(text(K16, 3)), 3: Compressed(text(K16, 4)), 5: Zero(noise(K16))})
overlay("zstd", {1: Compressed(text(K16, 3)), 2: Compressed(text(K16, 4))}, zstd=True)
overlay("extended", {0: SPLIT, 3: Plain(noise(K16, 5)), 5: SPLIT, 6: SPLIT}, extended_l2=True)
overlay("extended, compressed", {2: Compressed(text(K16, 6)), 3: SPLIT, 4: Zero()}, extended_l2=True)
overlay("empty", {})

BASES = {
    "shorter": 37 * KiB + 512,
    "of the same size": 100 * KiB,
    "longer": 200 * KiB,
    "a sector": 512,
}


def as_qcow2(disk: bytes) -> Qcow2Image:
    parts = {at: disk[at * 4096 : (at + 1) * 4096].ljust(4096, b"\0") for at in range(-(-len(disk) // 4096))}
    clusters = {at: (Compressed if at % 3 == 0 else Plain)(part) for at, part in parts.items() if any(part)}
    return image_of(make(Recipe(size=len(disk), clusters=clusters, cluster_bits=12)))


@pytest.mark.parametrize("size", BASES.values(), ids=BASES)
@pytest.mark.parametrize("base", [raw, as_qcow2], ids=["raw", "qcow2"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_overlay_of_any_kind_shows_what_lies_below_it(
    kind: str, base: Callable[[bytes], DiskImage], size: int
) -> None:
    recipe, apply = KINDS[kind]
    below = text(size // 2, 9) + bytes(size // 4) + noise(size - size // 2 - size // 4, 8)
    disk = bytearray(below[: recipe.size].ljust(7 * K16, b"\0"))
    apply(disk)
    expected = bytes(disk[: recipe.size])
    image = on_top_of(make(recipe), base(below))
    assert content(image) == expected
    extents = list(image.extents())
    assert sum(one.length for one in extents) == image.virtual_size
    for one in extents:
        assert one.data or not any(expected[one.start : one.end])
        assert one.offset is None or (one.file is None) == (one.depth == 0)
        if one.file is not None and one.offset is not None and one.data:
            assert one.file.pread(one.offset, one.length) == expected[one.start : one.end]
    for start in range(0, recipe.size - 1000, 777):
        assert image.pread(start, 1000) == expected[start : start + 1000]


def test_a_chain_of_three_reads_each_cluster_from_the_highest_that_has_it() -> None:
    size = 4 * K64
    bottom = raw(noise(size, 1))
    middle = on_top_of(make(Recipe(size=size, clusters={1: Plain(text(K64)), 2: Zero()}, backing="base")), bottom)
    top = on_top_of(make(Recipe(size=size, clusters={2: Compressed(text(K64, 1))}, backing="middle")), middle)
    assert content(top) == noise(size, 1)[:K64] + text(K64) + text(K64, 1) + noise(size, 1)[3 * K64 :]
    assert [(one.start // K64, one.depth) for one in top.extents()] == [(0, 2), (1, 1), (2, 0), (3, 2)]


@given(qcow2_recipes(cluster_bits=(9, 12)), st.integers(0, 40), st.data())
@settings(max_examples=40)
def test_what_an_overlay_does_not_hold_is_that_of_any_base(recipe: Recipe, sectors: int, data: st.DataObject) -> None:
    """Unallocated parts and no others; the same recipe without a base says which these are."""
    base = noise(sectors * 512, 11)
    alone = image_of(make(recipe))
    expected = bytearray(recipe.content())
    for one in alone.extents():
        if not one.present:
            expected[one.start : one.end] = base[one.start : one.end].ljust(one.length, b"\0")
    made = make(Recipe(**{name: getattr(recipe, name) for name in recipe.__slots__} | {"backing": "base"}))
    image = on_top_of(made, raw(base))
    assert content(image) == expected
    start = data.draw(st.integers(0, recipe.size))
    assert image.pread(start, 5000) == expected[start : start + 5000]


def test_an_error_below_reaches_the_reader_of_the_overlay() -> None:
    damaged = make(Recipe(size=K64, clusters={0: Compressed(b"", stream=b"\xff" * 100)}))
    image = on_top_of(make(Recipe(size=K64, backing="base")), image_of(damaged))
    with pytest.raises(CorruptImage, match="deflate stream"):
        content(image)


# --- external data files ---------------------------------------------------------------------------------------

EXTERNAL: dict[int, Cluster] = {0: Plain(noise(K16)), 3: Zero(noise(K16, 2)), 5: Zero(), 8: Plain(text(K16))}


def external(*, extended: bool = False, **more: object) -> Recipe:
    clusters = EXTERNAL | ({7: SPLIT} if extended else {})
    recipe = {"size": 9 * K16 - 512, "clusters": clusters, "cluster_bits": 14, "data_file": "data"}
    return Recipe(**recipe | {"extended_l2": extended} | more)  # type: ignore[arg-type]


@pytest.mark.parametrize("extended", [False, True], ids=["", "extended"])
@pytest.mark.parametrize("raw_external", [False, True], ids=["", "raw"])
def test_a_data_file_is_read_where_the_caller_opens_it(raw_external: bool, extended: bool) -> None:
    """The first cluster lies at offset 0 of it, which elsewhere means that there is none."""
    recipe = external(extended=extended, raw_external=raw_external)
    made = make(recipe)
    asked: list[Reference] = []

    def resolver(reference: Reference) -> RawImage:
        asked.append(reference)
        return raw(made.external)

    image = FORMAT.open(MemoryFile(made.data), resolver=resolver)
    assert content(image) == recipe.content()
    assert image.info().features["data-file-raw"] is raw_external
    assert asked == [Reference("data-file", "data", "raw")]


def test_what_lies_in_a_data_file_has_its_offset_there_and_says_so() -> None:
    """The kernel copies from the file that is named: from our own it would copy something else."""
    image = with_data(make(external()))
    extents = list(image.extents())
    assert sum(one.length for one in extents) == image.virtual_size
    assert [(one.start // K16, one.data, one.present) for one in extents] == [
        (0, True, True),
        (1, False, False),
        (3, False, True),
        (4, False, False),
        (5, False, True),
        (6, False, False),
        (8, True, True),
    ]
    assert image.container is not None
    for one in extents:
        assert (one.offset is None) == (one.file is None)
        if one.file is not None and one.data:
            assert one.file is not image.container
            assert one.offset == one.start
            assert one.file.pread(one.start, one.length) == image.pread(one.start, one.length)
        assert "offset" not in one.to_json()


def test_a_hole_of_the_data_file_is_zeros() -> None:
    class Holes(MemoryFile):
        def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
            yield offset + K16, K16

    data = bytes(K16) + noise(K16)
    clusters = {0: Plain(bytes(K16)), 1: Plain(noise(K16))}
    made = make(Recipe(size=2 * K16, clusters=clusters, cluster_bits=14, data_file="data"))
    image = on_top_of(made, RawImage(Holes(data), 2 * K16))
    assert [(one.start, one.data, one.present) for one in image.extents()] == [(0, False, True), (K16, True, True)]
    assert content(image) == data


def test_an_image_may_have_a_data_file_and_a_backing_file() -> None:
    made = make(Recipe(size=4 * K64, clusters={1: Plain(text(K64))}, data_file="data", backing="base"))
    opened = {"data-file": raw(made.external), "backing-file": raw(noise(2 * K64))}
    image = FORMAT.open(MemoryFile(made.data), resolver=lambda reference: opened[reference.kind])
    assert content(image) == noise(2 * K64)[:K64] + text(K64) + bytes(2 * K64)
    assert [(one.start // K64, one.depth) for one in image.extents()] == [(0, 1), (1, 0), (2, 0)]


@pytest.mark.parametrize("length", [0, K16, 9 * K16 - 513], ids=["empty", "a cluster", "all but a byte"])
def test_a_data_file_that_is_too_short_is_damage(length: int) -> None:
    """Other readers show zeros; what a guest wrote there is missing."""
    made = make(external())
    for read in (content, lambda image: list(image.extents())):
        with pytest.raises(CorruptImage, match="but the data file ends at"):
            read(on_top_of(made, raw(made.external[:length])))
    assert content(on_top_of(made, raw(made.external[: 9 * K16 - 512]))) == external().content()


@pytest.mark.parametrize("extended", [False, True], ids=["", "extended"])
@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (7 * K16 | COPIED, "should lie at 0x1c000 of the data file, not at their own"),
        (1 << 40 | COPIED, "should lie at 0x10000000000 of the data file"),
        (8 * K16 + 512 | COPIED, "not on a cluster"),
        (COMPRESSED | 5, "a compressed cluster in an image whose data lies in another file"),
    ],
    ids=["elsewhere", "far", "unaligned", "compressed"],
)
def test_a_cluster_of_a_data_file_lies_at_the_guests_own_offset(entry: int, message: str, extended: bool) -> None:
    made = make(external(extended=extended))
    with pytest.raises(CorruptImage, match=message):
        content(with_data(made.poked(made.l2_entry(8), entry)))


def test_one_table_for_two_parts_of_a_disk_is_damage_with_a_data_file() -> None:
    """The table fits the first; whether it was read before makes no difference."""
    made = make(Recipe(size=200 * 512, clusters={3: Plain(noise(512)), 70: Zero()}, cluster_bits=9, data_file="d"))
    made = made.poked(made.l1_entry(1), made.number(made.l1_entry(0)))
    image = with_data(made)
    assert image.pread(3 * 512, 512) == noise(512)
    with pytest.raises(CorruptImage, match="guest bytes from 0x8600 should lie at 0x600"):
        image.pread(67 * 512, 512)


def test_a_data_file_is_named_and_nothing_is_read_without_leave() -> None:
    """Not even the zeros that are in the image itself."""
    image = image_of(make(Recipe(size=K64, data_file="/dev/sda")))
    assert image.info().references == (Reference("data-file", "/dev/sda", "raw"),)
    for read in (content, lambda image: list(image.extents())):
        with pytest.raises(UnsupportedFeature, match="needs its data file '/dev/sda', and nobody allowed"):
            read(image)


def test_a_data_file_that_the_feature_bits_know_nothing_of_is_named_and_refused() -> None:
    """Every program ignores the name: whoever wrote it meant to mislead somebody."""
    made = make(Recipe(size=K64, data_file="/dev/sda")).poked(72, 0)
    for image in (image_of(made), on_top_of(made, raw(bytes(K64)))):
        assert image.info().references == (Reference("data-file", "/dev/sda", "raw"),)
        with pytest.raises(InvalidImage, match="its feature bits say there is none"):
            content(image)


def test_a_data_file_without_a_name_is_refused() -> None:
    made = make(Recipe(size=K64)).poked(72, 4)
    image = on_top_of(made, raw(bytes(K64)))
    assert image.info().references == (Reference("data-file", "", "raw"),)
    with pytest.raises(InvalidImage, match="which the header does not name"):
        content(image)


def test_closing_an_image_closes_its_data_file() -> None:
    closed: list[str] = []

    class Watched(MemoryFile):
        def close(self) -> None:
            closed.append(self.name)

    made = make(external())
    data = RawImage(Watched(made.external, name="data"), len(made.external))
    with FORMAT.open(Watched(made.data, name="image"), resolver=lambda _: data) as image:
        assert image.pread(0, 10) == noise(K16)[:10]
    assert sorted(closed) == ["data", "image"]


def test_an_image_with_a_data_file_becomes_one_file() -> None:
    recipe = external(size=9 * K16)
    made = make(recipe)
    source = MemoryFile(made.data)
    image = on_top_of(made, raw(made.external))
    plan = build_plan(
        image, source_format="qcow2", target_format="vhd", options=OPTIONS, virtual_size=image.virtual_size
    )
    target = MemoryFile()
    copying.copy_image(plan, image, source, target, jobs=2)
    assert content(registry.find("vhd").open(target)) == recipe.content()
