"""Differencing VHDs: on their parents, by their parents' names, and as others make and read them."""

from __future__ import annotations

import dataclasses
import struct
import uuid
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures import vhd_images
from imagekit.errors import CorruptImage, ImagekitError, InvalidImage, UnsupportedFeature
from imagekit.formats.base import Extent, ParentLink, Reference, WriterOptions, merge_extents
from imagekit.formats.files import MemoryFile
from imagekit.formats.raw import RawImage
from imagekit.formats.vhd import FORMAT, VhdImage
from imagekit.formats.vhd_header import VHD_EPOCH, Footer
from tests.disks import IDENTIFIER, OPTIONS, assert_extents_agree, content, cut, md5, noise
from tests.samples import PARENTS, sample, sample_facts
from tests.vhd_chains import XEN_0_1, Child, chained, child_of, children, empty, link_to, on_zeros, over, raw

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
BLOCK = 4 * KiB


# --- reading ---------------------------------------------------------------------------------------------------


@given(children())
def test_a_set_bit_is_a_sector_of_the_child_and_a_clear_one_of_the_parent(child: Child) -> None:
    """Behind the parent's end there are zeros; XenServer's first version counted bits the other way round."""
    file = MemoryFile(child.data)
    image = FORMAT.open(file, resolver=lambda _: raw(child.below))
    assert_extents_agree(image, file, child.content)
    assert FORMAT.check(file) == []
    for extent in image.extents():
        assert (extent.offset is not None) == (extent.present and (extent.depth == 0 or extent.file is not None))
        assert extent.file is None or extent.depth


@given(children(), st.data())
def test_any_part_of_a_child_reads_as_it_does_within_the_whole(child: Child, data: st.DataObject) -> None:
    image = over(child.data, raw(child.below))
    whole = list(image.extents())
    for _ in range(6):
        start = data.draw(st.integers(0, len(child.content)))
        length = data.draw(st.integers(0, 20 * KiB))
        assert image.pread(start, length) == child.content[start : start + length]
        assert list(image.extents(start, length)) == cut(whole, start, start + length)


def test_a_block_larger_than_what_is_looked_at_together_reads_as_one() -> None:
    """Windows' largest is 2 MiB, the format's is not; 8 MiB of sector bits are taken at a time."""
    data = vhd_images.differencing(32 * MiB, "p.vhd", block_size=32 * MiB)
    writes = [(at, noise(1024, at)) for at in (0, 8 * MiB - 512, 16 * MiB, 24 * MiB - 1024, 32 * MiB - 1024)]
    for at, written in writes:
        data = vhd_images.write(data, at, written)
    image = over(data, raw(b"\xee" * 32 * MiB))
    for at in (0, 8 * MiB - 4096, 16 * MiB - 4096, 24 * MiB - 4096, 32 * MiB - 8192):
        expected = vhd_images.overlaid(
            b"\xee" * 8192, 8192, [(start - at, one) for start, one in writes if start >= at]
        )
        assert image.pread(at, 8192) == expected[:8192]
    assert [(one.start, one.length) for one in image.extents() if one.depth == 0] == [(at, 1024) for at, _ in writes]


def test_extents_tell_how_deep_the_bytes_lie() -> None:
    files = [MemoryFile(vhd_images.fixed(noise(4 * BLOCK)))]
    files.append(MemoryFile(vhd_images.write(bytes(child_of(files[0], 1, BLOCK).data), BLOCK, noise(BLOCK, 1))))
    files.append(MemoryFile(vhd_images.write(bytes(child_of(files[1], 2, BLOCK).data), BLOCK, noise(512, 2))))
    image = chained(files)
    extents = list(image.extents())
    assert [(one.start, one.depth, one.file or files[2]) for one in extents] == [
        (0, 2, files[0]),
        (BLOCK, 0, files[2]),
        (BLOCK + 512, 1, files[1]),
        (2 * BLOCK, 2, files[0]),
    ]
    for one in extents:
        assert one.offset is not None
        assert (one.file or files[2]).pread(one.offset, one.length) == image.pread(one.start, one.length)


def test_a_bitmap_full_of_holes_asks_the_parent_once() -> None:
    """One sector here, the next one there: a question for each would be a way to keep a reader busy."""
    asked: list[tuple[int, int | None]] = []

    class Parent(RawImage):
        def extents(self, start: int = 0, length: int | None = None) -> Iterable[Extent]:  # type: ignore[override]
            asked.append((start, length))
            return super().extents(start, length)

    data = vhd_images.differencing(2 * MiB, "p.vhd")
    for at in range(0, 2 * MiB, 1024):
        data = vhd_images.write(data, at, noise(512)) if at == 0 else data
    bitmap = data.index(b"\x80" + bytes(511))
    data = data[:bitmap] + b"\xaa" * 512 + data[bitmap + 512 :]
    image = over(data, Parent(MemoryFile(bytes(2 * MiB)), 2 * MiB))
    assert len(list(image.extents())) == 4096
    assert asked == [(512, 2 * MiB - 512)]


@pytest.mark.parametrize("name", ["fat-differential.vhd", "win8-child.vhd"])
def test_a_chain_that_windows_made_reads_as_on_windows(name: str) -> None:
    files = [MemoryFile(sample(one).read_bytes()) for one in (PARENTS[name], name)]
    expected = sample_facts(name).content_md5 or md5(bytes(40 * MiB))
    image = chained(files)
    assert md5(content(image)) == expected
    assert FORMAT.check(files[1]) == []
    (reference,) = image.info().references
    assert reference.names[0] == ".\\" + PARENTS[name]
    assert reference.names[1].endswith("\\" + PARENTS[name])
    assert (reference.identities, reference.size) == ((FORMAT.open(files[0]).identity,), image.virtual_size)


def test_without_leave_nothing_but_the_file_itself_is_read() -> None:
    image = FORMAT.open(MemoryFile(vhd_images.write(vhd_images.differencing(2 * BLOCK, "p.vhd"), 0, noise(512))))
    assert image.info().subformat == "differencing"
    assert image.pread(0, 512) == noise(512)
    for read in (lambda: list(image.extents()), lambda: content(image)):
        with pytest.raises(
            UnsupportedFeature, match=r"needs its parent file 'p\.vhd', and nobody allowed to open it"
        ):
            read()
    assert {one.kind for one in image.ranges()} >= {"parent locator", "BAT", "block", "footer copy", "footer"}


def test_closing_a_child_closes_the_parent_it_opened() -> None:
    closed: list[str] = []

    class Parent(RawImage):
        def close(self) -> None:
            closed.append("parent")

    image = over(vhd_images.differencing(512, "p.vhd"), Parent(MemoryFile(), 0))
    image.pread(0, 512)
    image.close()
    assert closed == ["parent"]


# --- names of the parent ---------------------------------------------------------------------------------------

WIDE = "utf-16-le"
PLACE = vhd_images.locators_at(512)


def named(*locators: vhd_images.Locator, name: str = "", footer: vhd_images.Footer | None = None) -> VhdImage:
    return FORMAT.open(MemoryFile(vhd_images.differencing(512, name, locators=locators, footer=footer)))


def locator(code: bytes, data: bytes, place: int = 0, space: int = 512) -> vhd_images.Locator:
    return vhd_images.Locator(code, data, PLACE + place * 512, space)


def spoilt(code: bytes, data: bytes) -> vhd_images.Locator:
    return locator(code, data, 1)


def test_names_are_tried_in_the_order_in_which_they_are_likely_to_lead_somewhere() -> None:
    image = named(
        locator(b"MacX", "file:///Elternplatte/ö.vhd".encode(), 0),
        locator(b"Wi2k", b"C:\\old\\p.vhd", 1),
        locator(b"W2ku", "C:\\new\\ö.vhd".encode(WIDE), 2),
        locator(b"Wi2r", b".\\old-\xf6.vhd", 3),
        locator(b"W2ru", ".\\new.vhd".encode(WIDE), 4),
        locator(b"Mac ", b"an alias, which is no name", 5),
        name="field.vhd",
    )
    (reference,) = image.info().references
    assert reference == Reference(
        "parent-file",
        "field.vhd",
        "vhd",
        names=(
            ".\\new.vhd",
            ".\\old-ö.vhd",
            "C:\\new\\ö.vhd",
            "C:\\old\\p.vhd",
            "file:///Elternplatte/ö.vhd",
            "field.vhd",
        ),
        identities=(b"p" * 16,),
        size=512,
    )
    assert image.info().facts == ()


def test_a_path_of_xenserver_is_taken_as_the_path_it_is() -> None:
    """It writes ``file://`` and then a path from the child's folder, nothing of it escaped."""
    image = named(locator(b"MacX", b"file://./base/100%25.vhd"))
    assert image.info().references[0].names == ("./base/100%25.vhd",)


@pytest.mark.parametrize("space", [1, 2, 512, 4096, 65536, 0, 520])
def test_the_room_of_a_name_may_be_sectors_or_bytes(space: int) -> None:
    """The specification says sectors, Windows writes bytes; where the name lies does not depend on it."""
    image = named(locator(b"W2ru", ".\\p.vhd".encode(WIDE), 0, space))
    assert image.info().references[0].names == (".\\p.vhd",)
    assert image.dynamic is not None
    assert image.dynamic.locators[0].room == {1: 512, 2: 1024, 0: 14, 520: 14}.get(space, space)


def test_a_name_ends_at_the_first_nul_and_is_told_once() -> None:
    image = named(
        locator(b"W2ru", "p.vhd\0/etc/shadow\0".encode(WIDE)), locator(b"W2ku", "p.vhd".encode(WIDE), 1), name="p.vhd"
    )
    assert image.info().references[0].names == ("p.vhd",)


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (vhd_images.Locator(b"W2ru", b"p\0", 1 << 20), "behind the file's end"),
        (vhd_images.Locator(b"W2ru", b"p\0", (1 << 64) - 1), "behind the file's end"),
        (spoilt(b"W2ru", b""), "a name of 0 bytes, expected 1 to 65536"),
        (spoilt(b"W2ru", b"p" * 65537), "a name of 65537 bytes, expected 1 to 65536"),
        (spoilt(b"W2ru", b"p\0q"), "no utf-16-le text"),
        (spoilt(b"W2ku", b"\x00\xdc"), "no utf-16-le text"),
        (spoilt(b"MacX", b"file:///\xff"), "no utf-8 text"),
        (spoilt(b"Wi2r", b"\x81"), "no cp1252 text"),
        (spoilt(b"W2ru", b"\0\0p\0"), "is empty"),
        (spoilt(b"what", b"p\0"), "unknown platform code"),
    ],
    ids=["outside", "far", "none", "long", "odd", "surrogate", "not utf-8", "not ansi", "empty", "unknown"],
)
def test_a_damaged_locator_is_a_fact_and_the_others_count(damaged: vhd_images.Locator, message: str) -> None:
    image = named(locator(b"W2ku", "C:\\p.vhd".encode(WIDE)), damaged)
    assert image.info().references[0].names == ("C:\\p.vhd",)
    (fact,) = image.info().facts
    assert fact.code == "parent-locator-damaged"
    assert message in fact.message
    assert fact.offset == 512 + 576 + 24
    assert [problem.code for problem in FORMAT.check(MemoryFile(image.file.pread(0, 1 << 20)))] == [fact.code]


def test_a_child_that_names_no_parent_says_so() -> None:
    (fact,) = named().info().facts
    assert fact.code == "parent-unnamed"
    assert named().info().references[0].names == ()


def test_a_name_field_that_is_no_text_is_no_name() -> None:
    header = vhd_images.dynamic_header(entries=1, block_size=512)
    header = vhd_images.with_checksum(header[:64] + b"\xdc\x00" + header[66:], 36)
    footer = vhd_images.Footer(size=512, disk_type=4).bytes()
    image = FORMAT.open(MemoryFile(footer + header + b"\xff" * 512 + footer))
    assert [fact.code for fact in image.info().facts] == ["parent-unnamed"]


def test_the_name_field_of_xenservers_first_version_is_little_endian() -> None:
    header = vhd_images.dynamic_header(entries=1, block_size=512)
    name = "\ufeffp.vhd".encode(WIDE)
    header = vhd_images.with_checksum(header[:64] + name + header[64 + len(name) :], 36)
    footer = dataclasses.replace(XEN_0_1, size=512).bytes()
    image = FORMAT.open(MemoryFile(footer + header + b"\xff" * 512 + footer))
    assert image.info().references[0].names == ("p.vhd",)


# --- what must not be believed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sector", [0, 2, 3, 4, 0xFFFFFFFE])
def test_a_childs_block_outside_the_data_is_damage(sector: int) -> None:
    """The bitmap lies there too: nothing of it is read."""
    data = bytearray(vhd_images.write(vhd_images.differencing(BLOCK, "p.vhd", block_size=BLOCK), 0, noise(512)))
    data[1536:1540] = struct.pack(">I", sector if sector != 4 else len(data) // 512 - 2)
    with pytest.raises(CorruptImage, match=r"block 0 lies at 0x[0-9a-f]+\.\."):
        content(over(bytes(data), raw(b"")))


def test_a_block_on_a_locator_is_damage() -> None:
    data = bytearray(vhd_images.write(vhd_images.differencing(BLOCK, "p.vhd", block_size=BLOCK), 0, noise(512)))
    place = vhd_images.locators_at(BLOCK, block_size=BLOCK)
    data[1536:1540] = struct.pack(">I", place // 512)
    found = FORMAT.check(MemoryFile(data))
    assert [problem.code for problem in found] == ["overlap", "overlap"]
    assert found[0].message == f"block 0 and the parent locator overlap at {place:#x}"


def test_two_blocks_of_a_child_on_one_place_are_damage() -> None:
    data = bytearray(vhd_images.write(vhd_images.differencing(4 * BLOCK, "p.vhd", block_size=BLOCK), 0, noise(512)))
    data[1540:1544] = data[1536:1540]
    assert [problem.code for problem in FORMAT.check(MemoryFile(data))] == ["overlap"]


def small_chain() -> tuple[bytes, bytes]:
    parent = vhd_images.dynamic(2048, {2: noise(512), 0: noise(512, 1)}, block_size=512)
    child = vhd_images.differencing(2048, "p.vhd", block_size=1024)
    return parent, vhd_images.write(vhd_images.write(child, 512, noise(512, 2)), 1536, noise(512, 3))


@given(st.data())
@settings(max_examples=150)
def test_any_damage_to_a_chain_gives_other_content_or_a_typed_error(data: st.DataObject) -> None:
    """Checksums mended after it, so that the damage gets past them; every reading door is tried."""
    parent, child = (bytearray(one) for one in small_chain())
    for _ in range(data.draw(st.integers(1, 4))):
        broken = data.draw(st.sampled_from([parent, child, child]))
        start, length = data.draw(st.sampled_from([(0, 90), (512, 96), (1088, 60), (1536, 40), (2048, 520)]))
        at = (start + data.draw(st.integers(0, length))) % len(broken)
        broken[at] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))
    for broken in (parent, child):
        broken[:512] = vhd_images.with_checksum(bytes(broken[:512]), 64)
        broken[512:1536] = vhd_images.with_checksum(bytes(broken[512:1536]), 36)
        broken[-512:] = broken[:512]
    below, top = bytes(parent), bytes(child)

    def chain() -> VhdImage:
        return FORMAT.open(MemoryFile(top), resolver=lambda _: FORMAT.open(MemoryFile(below)))

    link = ParentLink(b"q" * 16, 2048, ".\\q.vhd")
    doors: list[Callable[[], object]] = [
        lambda: chain().info(),
        lambda: chain().pread(0, MiB),
        lambda: list(chain().extents(0, MiB)),
        lambda: list(chain().ranges()),
        lambda: FORMAT.check(MemoryFile(top)),
        lambda: FORMAT.repair(MemoryFile(top)),
        lambda: list(FORMAT.resize(MemoryFile(top), 4096)),
        lambda: list(FORMAT.rebase(MemoryFile(top), link)),
        lambda: list(FORMAT.absorb(MemoryFile(below), chain())),
    ]
    for door in doors:
        try:
            door()
        except ImagekitError as error:
            assert isinstance(error, InvalidImage | CorruptImage | UnsupportedFeature)


# --- writing ---------------------------------------------------------------------------------------------------


def test_a_child_is_the_one_that_windows_10_makes() -> None:
    """Byte for byte, from its names, its ids and its time."""
    theirs = sample("win8-child.vhd").read_bytes()
    footer, image = Footer.parse(theirs[:512]), on_zeros(theirs)
    relative, absolute = image.info().references[0].names
    (identity,) = image.info().references[0].identities
    options = WriterOptions(
        uuid.UUID(bytes_le=footer.unique_id),
        "differencing",
        parent=ParentLink(identity, 40 * MiB, relative, absolute),
        timestamp=VHD_EPOCH + footer.timestamp,
    )
    assert bytes(empty(40 * MiB, options).data) == theirs


def test_a_disk_is_the_one_that_xenserver_makes() -> None:
    theirs = sample("xapi.vhd").read_bytes()
    footer = Footer.parse(theirs[:512])
    options = WriterOptions(
        uuid.UUID(bytes_le=footer.unique_id), creator="tap", timestamp=VHD_EPOCH + footer.timestamp
    )
    assert bytes(empty(40 * MiB, options).data) == theirs


@given(st.integers(1, 40), st.integers(0, 3), st.sampled_from([None, "tap"]))
@settings(max_examples=20)
def test_blocks_of_a_child_are_written_whole(blocks: int, used: int, creator: str | None) -> None:
    """And hide the parent from their first sector to their last."""
    parent = MemoryFile(vhd_images.fixed(b"\xee" * 512, vhd_images.Footer(size=512, disk_type=2)))
    size = blocks * 2 * MiB
    link = dataclasses.replace(link_to(parent), virtual_size=size)
    options = WriterOptions(IDENTIFIER, "differencing", parent=link, creator=creator)
    layout, file = FORMAT.writer(size, options).layout(), MemoryFile()
    for block in range(min(used, blocks)):
        file.pwrite(layout.place(block) - len(layout.prefix), layout.prefix, noise(512, block))
    file.truncate(layout.file_size)
    for offset, data in layout.metadata():
        file.pwrite(offset, data)
    image = on_zeros(bytes(file.data))
    assert [(one.start, one.depth) for one in merge_extents(image.extents())][:1] == [(0, 0 if used else 1)]
    assert sum(one.length for one in image.extents() if one.depth == 0) == min(used, blocks) * 2 * MiB
    assert all(image.pread(block * 2 * MiB, 512) == noise(512, block) for block in range(min(used, blocks)))
    assert all(layout.place(block) % 4096 == 0 for block in range(min(used, blocks)))
    assert FORMAT.check(file) == []
    assert image.info().facts == ()


@pytest.mark.parametrize("length", [10, 250, 251, 3000, 30000])
def test_a_long_path_has_the_room_it_needs(length: int) -> None:
    path = "C:\\" + "d" * (length - 10) + "\\ü.vhd"
    link = ParentLink(b"p" * 16, 4 * MiB, ".\\" + path[3:], path)
    image = on_zeros(bytes(empty(4 * MiB, WriterOptions(IDENTIFIER, "differencing", parent=link)).data))
    field = path if length < 256 else "ü.vhd"
    assert image.info().references[0].names == tuple(dict.fromkeys((link.relative, path, field)))
    assert image.dynamic is not None
    assert image.dynamic.parent_name.decode("utf-16-be").rstrip("\0") == field
    assert FORMAT.check(image.file) == []


def test_a_parent_whose_place_on_windows_is_not_known_has_a_relative_name_alone() -> None:
    link = ParentLink(b"p" * 16, 4 * MiB, "..\\base\\p.vhd")
    image = on_zeros(bytes(empty(4 * MiB, WriterOptions(IDENTIFIER, "differencing", parent=link)).data))
    assert image.info().references[0].names == ("..\\base\\p.vhd",)
    assert image.dynamic is not None
    assert image.dynamic.bat_offset == 0x2000


def test_a_child_for_xenserver_has_the_names_that_its_tools_expect() -> None:
    """A file URL and a relative path that both end in the name in the header; no Windows path."""
    link = ParentLink(b"p" * 16, 4 * MiB, "..\\base\\p.vhd", "C:\\base\\p.vhd")
    options = WriterOptions(IDENTIFIER, "differencing", parent=link, creator="tap")
    image = on_zeros(bytes(empty(4 * MiB, options).data))
    assert image.dynamic is not None
    assert [one.code for one in image.dynamic.locators[:3]] == [b"MacX", b"W2ru", bytes(4)]
    first = image.dynamic.locators[0]
    assert image.file.pread(first.offset, first.length) == b"file://../base/p.vhd"
    assert image.dynamic.parent_name.decode("utf-16-be").rstrip("\0") == "p.vhd"


def test_the_same_input_gives_the_same_child() -> None:
    parent = MemoryFile(vhd_images.fixed(noise(4096)))
    assert child_of(parent).data == child_of(parent).data
    assert child_of(parent).data != child_of(parent, 2).data


PARENT = ParentLink(b"p" * 16, 4 * MiB, ".\\p.vhd")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subformat": "differencing", "parent": None}, "a differencing disk needs a parent"),
        ({"subformat": "dynamic"}, "a dynamic disk has no parent"),
        ({"subformat": "fixed"}, "a fixed disk has no parent"),
        ({"parent": dataclasses.replace(PARENT, virtual_size=2 * MiB)}, "0xC03A0017"),
        ({"parent": dataclasses.replace(PARENT, virtual_size=6 * MiB), "creator": "tap"}, "0xC03A0017"),
        ({"parent": dataclasses.replace(PARENT, identity=b"")}, "must be a VHD"),
        ({"sector_size": 4096}, "sectors of 512 bytes, not 4096"),
        ({"compression": "zlib"}, "not compressed"),
        ({"creator": "vbox"}, "unknown conventions 'vbox'"),
        ({"creator": "tap", "block_size": 512 * KiB}, "XenServer has blocks of 2 MiB only"),
    ],
)
def test_what_no_host_would_open_is_not_written(change: dict[str, object], message: str) -> None:
    options = dataclasses.replace(OPTIONS, **({"parent": PARENT} | change))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedFeature, match=message):
        FORMAT.writer(4 * MiB, options)


def test_a_sector_size_of_4096_is_sent_to_vhdx() -> None:
    FORMAT.writer(4 * MiB, dataclasses.replace(OPTIONS, sector_size=512))
    with pytest.raises(UnsupportedFeature) as caught:
        FORMAT.writer(4 * MiB, dataclasses.replace(OPTIONS, sector_size=4096))
    assert "VHDX" in (caught.value.hint or "")


def test_for_xenserver_a_disk_ends_on_2_mib() -> None:
    with pytest.raises(UnsupportedFeature, match="XenServer would not see its end") as caught:
        FORMAT.writer(3 * MiB, dataclasses.replace(OPTIONS, creator="tap"))
    assert caught.value.hint == f"--size {4 * MiB}"
