"""VHD: what other programs write is read, and what is written is laid out as Windows does it."""

from __future__ import annotations

import dataclasses
import itertools
import random
import struct
import tracemalloc
import uuid
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures import vhd_images
from imagekit.errors import CorruptImage, ImagekitError, InvalidImage, UnsupportedFeature
from imagekit.formats import registry
from imagekit.formats.base import DiskImage, ImageWriter, OpenOptions, WriterOptions
from imagekit.formats.files import MemoryFile
from imagekit.formats.vhd import FORMAT, VhdImage
from imagekit.formats.vhd_header import MAX_SIZE, VHD_EPOCH, DynamicHeader, Footer
from tests.disks import (
    IDENTIFIER,
    OPTIONS,
    assert_extents_agree,
    content,
    convert,
    cut,
    disks,
    noise,
    pieces,
    read_or_error,
    text,
)
from tests.samples import sample, sample_facts

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
BLOCK = 4 * KiB


def image_of(data: bytes) -> VhdImage:
    return FORMAT.open(MemoryFile(data))


def facts(data: bytes) -> list[str]:
    return [fact.code for fact in image_of(data).info().facts]


# --- reading what others wrote ---------------------------------------------------------------------------------


@st.composite
def dynamic_disks(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """(file, content) of dynamic disks: block sizes, blocks in any order, gaps, spare entries, paddings."""
    block = draw(st.sampled_from([512, BLOCK, 32 * KiB]))
    numbers = draw(st.lists(st.integers(0, 9), max_size=8, unique=True))
    size = (max(numbers, default=0) * block // 512 + draw(st.integers(1, 2 * block // 512))) * 512
    blocks = {number: draw(pieces(block)) for number in numbers}
    data = vhd_images.dynamic(
        size,
        blocks,
        block_size=block,
        spare_entries=draw(st.integers(0, 200)),
        bat_padding=draw(st.sampled_from([0, 0xFF])),
        gap=draw(st.sampled_from([0, 512, 3584])),
    )
    return data, vhd_images.dynamic_content(size, blocks, block_size=block)


@given(dynamic_disks())
def test_a_guest_reads_what_the_blocks_hold_and_extents_agree(disk: tuple[bytes, bytes]) -> None:
    data, expected = disk
    file = MemoryFile(data)
    assert_extents_agree(FORMAT.open(file), file, expected)
    assert FORMAT.check(file) == []


@given(dynamic_disks(), st.data())
def test_any_part_of_the_disk_reads_as_it_does_within_the_whole(
    disk: tuple[bytes, bytes], data: st.DataObject
) -> None:
    image, expected = image_of(disk[0]), disk[1]
    whole = list(image.extents())
    for _ in range(10):
        start = data.draw(st.integers(0, len(expected)))
        length = data.draw(st.integers(0, 20 * KiB))
        assert image.pread(start, length) == expected[start : start + length]
        assert list(image.extents(start, length)) == cut(whole, start, start + length)


@given(disks())
def test_a_fixed_disk_is_its_data_and_a_footer(data: bytes) -> None:
    file = MemoryFile(vhd_images.fixed(data))
    image = FORMAT.open(file)
    assert_extents_agree(image, file, data)
    assert image.info().subformat == "fixed"
    assert FORMAT.check(file) == []


def test_blocks_are_data_at_their_offset_and_the_rest_is_not_there() -> None:
    data = vhd_images.dynamic(5 * BLOCK, {3: noise(BLOCK), 1: text(BLOCK)}, block_size=BLOCK)
    extents = list(image_of(data).extents())
    assert [(one.start // BLOCK, one.data, one.zero, one.present, one.offset) for one in extents] == [
        (0, False, True, False, None),
        (1, True, False, True, 2048 + 512 + BLOCK + 512),
        (2, False, True, False, None),
        (3, True, False, True, 2048 + 512),
        (4, False, True, False, None),
    ]


def test_a_clear_bit_in_a_bitmap_hides_nothing() -> None:
    """In a dynamic disk every writer leaves zeros under a clear bit, and some leave bits clear over data."""
    data = bytearray(vhd_images.dynamic(BLOCK, {0: noise(BLOCK)}, block_size=BLOCK))
    data[2048 : 2048 + 512] = bytes(512)
    assert content(image_of(bytes(data))) == noise(BLOCK)


def test_the_first_sector_of_a_fixed_disk_is_the_guests_even_if_it_looks_like_a_footer() -> None:
    inner = vhd_images.dynamic(BLOCK, {}, block_size=BLOCK)
    image = image_of(vhd_images.fixed(inner))
    assert content(image) == inner
    assert image.info().subformat == "fixed"


def test_the_size_may_come_from_the_geometry() -> None:
    """As `vpc ` and `qemu` disks have it: the guest saw cylinders, heads and sectors."""
    footer = vhd_images.Footer(size=4 * MiB, creator=b"qemu", geometry=(120, 4, 17))
    data = vhd_images.dynamic(4 * MiB, {0: noise(2 * MiB)}, footer=footer)
    image = image_of(data)
    assert image.virtual_size == 120 * 4 * 17 * 512 == 4177920
    assert len(content(image)) == 4177920


def test_a_footer_of_511_bytes_is_a_footer() -> None:
    data = vhd_images.fixed(noise(1024), footer_length=511)
    assert FORMAT.probe(MemoryFile(data)) == "VHD footer in the last 511 bytes"
    assert content(image_of(data)) == noise(1024)
    blocks = {0: noise(BLOCK)}
    whole = vhd_images.dynamic(BLOCK, blocks, block_size=BLOCK)
    assert content(image_of(whole[:-1])) == noise(BLOCK)
    assert facts(whole[:-1]) == []


def test_both_ends_of_a_file_are_looked_at() -> None:
    dynamic, fixed = vhd_images.dynamic(BLOCK, {}, block_size=BLOCK), vhd_images.fixed(bytes(1024))
    assert FORMAT.probe(MemoryFile(dynamic)) == "VHD footer copy at 0"
    assert FORMAT.probe(MemoryFile(fixed)) == "VHD footer in the last 512 bytes"
    assert [FORMAT.probe(MemoryFile(bytes(length))) for length in (0, 8, 511, 512, 4096)] == [None] * 5


def test_info_says_what_the_footer_says() -> None:
    footer = vhd_images.Footer(
        size=40 * MiB,
        creator=b"vbox",
        creator_version=0x00040003,
        geometry=(963, 5, 17),
        unique_id=uuid.UUID("01234567-89ab-cdef-0123-456789abcdef").bytes_le,
        saved_state=1,
    )
    info = image_of(vhd_images.dynamic(40 * MiB, {}, footer=footer)).info()
    assert (info.format, info.subformat, info.virtual_size, info.block_size) == ("vhd", "dynamic", 40 * MiB, 2 * MiB)
    assert info.features == {
        "creator-app": "vbox",
        "creator-version": "4.3",
        "creator-os": "Wi2k",
        "unique-id": "01234567-89ab-cdef-0123-456789abcdef",
        "geometry": "963/5/17",
        "size-from": "current",
        "original-size": 40 * MiB,
        "current-size": 40 * MiB,
        "chs-size": 963 * 5 * 17 * 512,
        "saved-state": True,
    }


@pytest.mark.parametrize(
    ("creator", "wanted", "expected"),
    [
        (b"qemu", None, "chs"),
        (b"qemu", "current", "current"),
        (b"win ", None, "current"),
        (b"win ", "chs", "chs"),
        (b"vbox", "chs", "chs"),
    ],
)
def test_the_caller_may_say_which_size_counts(
    creator: bytes, wanted: Literal["current", "chs"] | None, expected: str
) -> None:
    footer = vhd_images.Footer(size=4 * MiB, original_size=3 * MiB, creator=creator, geometry=(120, 4, 17))
    file = MemoryFile(vhd_images.dynamic(4 * MiB, {1: noise(2 * MiB)}, footer=footer))
    image = FORMAT.open(file, options=OpenOptions(size_from=wanted))
    sizes = {"current": 4 * MiB, "chs": 120 * 4 * 17 * 512, "original": 3 * MiB}
    assert image.virtual_size == image.info().virtual_size == sizes[expected]
    assert content(image) == (bytes(2 * MiB) + noise(2 * MiB))[: sizes[expected]]
    features = image.info().features
    assert features["size-from"] == expected
    assert [features[f"{name}-size"] for name in ("original", "current", "chs")] == [
        sizes[name] for name in ("original", "current", "chs")
    ]


def test_a_geometry_that_is_not_there_gives_no_size() -> None:
    file = MemoryFile(vhd_images.dynamic(4 * MiB, {}, footer=vhd_images.Footer(size=4 * MiB)))
    with pytest.raises(InvalidImage, match="the footer has none") as caught:
        FORMAT.open(file, options=OpenOptions(size_from="chs"))
    assert caught.value.hint == "leave out --size-from"


@pytest.mark.parametrize("kind", ["fixed", "dynamic"])
def test_a_geometry_larger_than_the_disk_is_bounded_as_any_size(kind: str) -> None:
    """Whoever made it up: no byte is read that the table or the file does not have."""
    footer = vhd_images.Footer(size=4 * MiB, geometry=(65535, 16, 63), disk_type=2 if kind == "fixed" else 3)
    data = (
        vhd_images.fixed(bytes(4 * MiB), footer)
        if kind == "fixed"
        else vhd_images.dynamic(4 * MiB, {}, footer=footer)
    )
    with pytest.raises((CorruptImage, InvalidImage), match=r"only 4194304 before|the BAT has 2 entries"):
        FORMAT.open(MemoryFile(data), options=OpenOptions(size_from="chs"))


def test_virtual_pcs_own_disk_has_the_size_its_guest_saw() -> None:
    file = MemoryFile(sample("virtualpc-dynamic.vhd").read_bytes())
    assert FORMAT.open(file).virtual_size == 136363130880
    assert FORMAT.open(file, options=OpenOptions(size_from="current")).virtual_size == 136365211648


@pytest.mark.parametrize(("app", "version"), [(b"wa\0\0", 0x00070000), (b"win ", 0x000A0000), (b"qem2", 0x00050003)])
def test_a_disk_for_azure_is_whatever_wrote_it(app: bytes, version: int) -> None:
    """Its footers all say Wi2k; which of its tools wrote it changes nothing."""
    footer = vhd_images.Footer(
        size=2 * MiB, disk_type=2, creator=app, creator_version=version, geometry=(65535, 16, 255)
    )
    image = image_of(vhd_images.fixed(noise(2 * MiB), footer))
    assert content(image) == noise(2 * MiB)
    assert image.info().features["creator-os"] == "Wi2k"
    assert image.info().facts == ()


def test_the_identity_is_what_children_know_the_disk_by() -> None:
    image = image_of(vhd_images.fixed(noise(512), vhd_images.Footer(size=512, disk_type=2, unique_id=b"i" * 16)))
    assert (image.identity, image.disk_id, image.sector_size) == (b"i" * 16, None, 512)


# --- two footers -----------------------------------------------------------------------------------------------

SOUND = vhd_images.Footer(size=BLOCK)


def with_footers(head: bytes, tail: bytes) -> bytes:
    return vhd_images.dynamic(BLOCK, {0: noise(BLOCK)}, block_size=BLOCK, head=head, tail=tail)


@pytest.mark.parametrize(
    ("head", "tail", "code"),
    [
        (SOUND.bytes(), SOUND.bytes(), None),
        (SOUND.bytes(), b"", "footer-missing"),
        (SOUND.bytes(), SOUND.bytes(checksum_off_by=1), "footer-missing"),
        (bytes(512), SOUND.bytes(), "footer-copy-missing"),
        (SOUND.bytes(checksum_off_by=1), SOUND.bytes(), "footer-copy-missing"),
        (SOUND.bytes(), dataclasses.replace(SOUND, hidden=1).bytes(), "footers-differ-slightly"),
        (SOUND.bytes(), dataclasses.replace(SOUND, timestamp=1).bytes(), "footers-differ-slightly"),
        (dataclasses.replace(SOUND, size=2 * BLOCK).bytes(), SOUND.bytes(), "footers-differ"),
        (dataclasses.replace(SOUND, unique_id=b"x" * 16).bytes(), SOUND.bytes(), "footers-differ"),
        (dataclasses.replace(SOUND, disk_type=4).bytes(), SOUND.bytes(), "footers-differ"),
    ],
    ids=[
        "equal",
        "no tail",
        "damaged tail",
        "no head",
        "damaged head",
        "hidden flag",
        "timestamp",
        "size",
        "id",
        "type",
    ],
)
def test_what_is_odd_about_the_footers_is_a_fact_and_the_last_one_counts(
    head: bytes, tail: bytes, code: str | None
) -> None:
    data = with_footers(head, tail)
    assert facts(data) == ([] if code is None else [code])
    assert content(image_of(data)) == noise(BLOCK)


@pytest.mark.parametrize(
    ("original", "code"), [(BLOCK // 2, "original-size-differs"), (2 * BLOCK, "original-size-larger")]
)
def test_an_original_size_that_is_not_the_current_one_is_a_fact(original: int, code: str) -> None:
    footer = dataclasses.replace(SOUND, original_size=original)
    assert facts(vhd_images.dynamic(BLOCK, {}, block_size=BLOCK, footer=footer)) == [code]


def test_without_any_sound_footer_there_is_no_disk() -> None:
    bad = SOUND.bytes(checksum_off_by=1)
    with pytest.raises(CorruptImage, match="footer's checksum") as caught:
        image_of(with_footers(bad, bad))
    assert caught.value.hint is not None
    assert "both copies are lost" in caught.value.hint
    with pytest.raises(InvalidImage, match="no VHD footer"):
        image_of(bytes(4096))


@pytest.mark.parametrize("length", [0, 1, 511, 512, 513, 1023, 2048])
def test_a_fixed_disk_that_lost_its_footer_is_none(length: int) -> None:
    """A footer of a fixed disk at the start is no copy: the guest may have written it there."""
    footer = vhd_images.Footer(size=0, disk_type=2)
    with pytest.raises((CorruptImage, InvalidImage)):
        image_of((footer.bytes() + bytes(1536))[:length])


def test_a_fixed_disk_shorter_than_its_size_is_cut_short() -> None:
    footer = vhd_images.Footer(size=8 * KiB, disk_type=2)
    with pytest.raises(CorruptImage, match="a fixed disk of 8192 bytes, but only 4096 before the footer"):
        image_of(vhd_images.fixed(bytes(4 * KiB), footer))


@pytest.mark.parametrize("disk_type", [0, 1, 5, 6, 7, 0xFFFFFFFF])
def test_other_disk_types_are_not_supported(disk_type: int) -> None:
    footer = dataclasses.replace(SOUND, disk_type=disk_type)
    with pytest.raises(UnsupportedFeature, match=f"VHD disk type {disk_type}"):
        image_of(vhd_images.dynamic(BLOCK, {}, block_size=BLOCK, footer=footer))


def test_another_version_of_footer_or_header_is_not_supported() -> None:
    footer = dataclasses.replace(SOUND, version=0x00020000)
    with pytest.raises(UnsupportedFeature, match="VHD footer has version 2"):
        image_of(vhd_images.dynamic(BLOCK, {}, block_size=BLOCK, footer=footer))
    data = bytearray(vhd_images.dynamic(BLOCK, {}, block_size=BLOCK))
    data[536:540] = struct.pack(">I", 0x00000001)
    data[512:1536] = vhd_images.with_checksum(bytes(data[512:1536]), 36)
    with pytest.raises(UnsupportedFeature, match="VHD dynamic header has version 0"):
        image_of(bytes(data))


@pytest.mark.parametrize("disk_type", [vhd_images.FIXED, vhd_images.DYNAMIC])
@pytest.mark.parametrize("size", [4097, 2040 * GiB + 512, 1 << 63, (1 << 64) - 512])
def test_a_size_that_no_vhd_has_is_invalid(size: int, disk_type: int) -> None:
    footer = vhd_images.Footer(size=size, disk_type=disk_type)
    with pytest.raises(InvalidImage, match=f"current size {size}, expected a multiple of 512 up to 2040 GiB"):
        image_of(bytes(4608) + footer.bytes())


# --- blocks that lie -------------------------------------------------------------------------------------------


def test_what_is_wrong_with_a_large_table_is_said_before_it_is_read() -> None:
    """The table has 32 MiB; its first entry leads to the footer's copy."""
    size, block = 2040 * GiB, 256 * KiB
    head = vhd_images.Footer(size=size).bytes() + vhd_images.dynamic_header(entries=size // block, block_size=block)
    file = MemoryFile(head + bytes(4))
    file.truncate(40 * MiB)
    file.pwrite(40 * MiB, vhd_images.Footer(size=size).bytes())
    image = registry.find("vhd").open(file)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptImage, match=r"block 0 lies at 0x0\.\."):
            next(image.extents())
        assert tracemalloc.get_traced_memory()[1] < 8 * MiB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("sector", "message"),
    [
        (0, r"block 0 lies at 0x0\.\."),
        (2, r"block 0 lies at 0x400\.\."),
        (3, r"block 0 lies at 0x600\.\."),
        (5, r"block 0 lies at 0xa00\.\."),
        (0xFFFFFFFE, r"block 0 lies at 0x1fffffffc00\.\."),
    ],
    ids=["on the footer", "on the header", "on the BAT", "over the footer", "far behind"],
)
def test_a_block_outside_the_data_is_damage(sector: int, message: str) -> None:
    data = bytearray(vhd_images.dynamic(BLOCK, {0: noise(BLOCK)}, block_size=BLOCK))
    data[1536:1540] = struct.pack(">I", sector)
    with pytest.raises(CorruptImage, match=message) as caught:
        content(image_of(bytes(data)))
    assert caught.value.offset == 1536


def test_the_last_block_may_end_where_the_disk_ends() -> None:
    """Old QEMU wrote it that short; what is missing is past the end of the disk."""
    size = 2 * BLOCK - 1024
    data = vhd_images.dynamic(size, {1: noise(BLOCK)}, block_size=BLOCK)
    short = data[: -512 - 1024] + data[-512:]
    assert content(image_of(short)) == bytes(BLOCK) + noise(BLOCK)[: BLOCK - 1024]
    shorter = data[: -512 - 1536] + data[-512:]
    with pytest.raises(CorruptImage, match="block 1 lies at"):
        content(image_of(shorter))


@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
def test_an_image_cut_anywhere_is_an_error_or_the_same_content(kind: str) -> None:
    """Every length, a byte at a time: never zeros where there was data. A lost footer copy loses no content."""
    if kind == "dynamic":
        blocks = {1: noise(512), 0: text(512)}
        data = vhd_images.dynamic(1500 // 512 * 512, blocks, block_size=512)
        expected = vhd_images.dynamic_content(1024, blocks, block_size=512)
    else:
        expected = noise(2048)
        data = vhd_images.fixed(expected)
    read = [read_or_error("vhd", data[:length]) for length in range(len(data))]
    assert all(isinstance(one, ImagekitError) or one == expected for one in read)
    whole = [length for length, one in enumerate(read) if one == expected]
    # A dynamic disk is whole without its last footer, a fixed one with all but the footer's last byte.
    assert whole == (list(range(len(data) - 512, len(data))) if kind == "dynamic" else [len(data) - 1])


@given(st.data())
@settings(max_examples=200)
def test_any_flipped_bits_give_other_content_or_a_typed_error(data: st.DataObject) -> None:
    blocks = {2: noise(512), 0: text(512)}
    broken = bytearray(vhd_images.dynamic(2048, blocks, block_size=512, tail=data.draw(st.sampled_from([None, b""]))))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.sampled_from([0, 512, 1536, len(broken) - 512])) + data.draw(st.integers(0, 90))
        broken[at % len(broken)] ^= 1 << data.draw(st.integers(0, 7))
    try:
        image = image_of(bytes(broken))
        image.info()
        content(image)
        FORMAT.check(MemoryFile(bytes(broken)))
    except ImagekitError:
        return


# --- writing ---------------------------------------------------------------------------------------------------


def write(writer: ImageWriter, disk: bytes, order: list[int]) -> MemoryFile:
    """Blocks in the order in which they arrive, each placed only then: the way of a pipe."""
    layout, file = writer.layout(), MemoryFile()
    for block in order:
        data = disk[block * writer.block_size : (block + 1) * writer.block_size]
        file.pwrite(layout.place(block) - len(layout.prefix), layout.prefix, data)
    file.truncate(layout.file_size)
    for offset, metadata in layout.metadata():
        file.pwrite(offset, metadata)
    assert file.size == layout.file_size
    return file


@given(disks(unit=BLOCK), st.sampled_from([BLOCK, 8 * KiB, 64 * KiB, 2 * MiB]), st.randoms(use_true_random=False))
def test_blocks_written_in_any_order_read_back_as_the_disk(disk: bytes, block: int, chance: random.Random) -> None:
    writer = FORMAT.writer(len(disk), dataclasses.replace(OPTIONS, block_size=block))
    order = [at for at in range(-(-len(disk) // block)) if any(disk[at * block : (at + 1) * block])]
    chance.shuffle(order)
    file = write(writer, disk, order)
    image = FORMAT.open(file)
    assert_extents_agree(image, file, disk)
    assert FORMAT.check(file) == []
    assert image.info().facts == ()


@given(disks(unit=BLOCK), st.sampled_from([BLOCK, 16 * KiB, 512 * KiB]), st.integers(0, 9))
def test_any_disk_comes_back_from_a_dynamic_vhd(disk: bytes, block: int, grown: int) -> None:
    options = WriterOptions(IDENTIFIER, block_size=block)
    size = len(disk) + grown * BLOCK
    file = convert(MemoryFile(disk), "raw", "vhd", options=options, size=size)
    assert_extents_agree(FORMAT.open(file), file, disk.ljust(size, b"\0"))
    assert FORMAT.check(file) == []


@given(disks(), st.integers(0, 9))
def test_any_disk_comes_back_from_a_fixed_vhd(disk: bytes, grown: int) -> None:
    size = len(disk) + grown * 512
    options = WriterOptions(IDENTIFIER, subformat="fixed")
    file = convert(MemoryFile(disk), "raw", "vhd", options=options, size=size)
    assert file.size == size + 512
    assert_extents_agree(FORMAT.open(file), file, disk.ljust(size, b"\0"))
    footer = Footer.parse(bytes(file.data[-512:]))
    assert (footer.disk_type, footer.current_size, footer.original_size) == (2, size, size)
    assert footer.data_offset == 2**64 - 1


def empty(size: int, options: WriterOptions = OPTIONS) -> bytes:
    """An empty dynamic disk, without reserving room for its content."""
    return bytes(write(FORMAT.writer(size, options), b"", []).data)


@pytest.mark.parametrize(
    ("size", "file_size", "footer_at"),
    [(40 * MiB, 8192, 0x1E00), (1 * GiB, 8192, 0x1E00), (127 * GiB, 266240, 0x40E00)],
    ids=["40 MiB", "1 GiB", "127 GiB"],
)
def test_an_empty_disk_has_the_size_that_windows_gives_it(size: int, file_size: int, footer_at: int) -> None:
    data = empty(size)
    assert len(data) == file_size
    assert data.index(b"conectix", 512) == footer_at
    assert data[:512] == data[-512:]


def test_blocks_lie_where_windows_puts_them() -> None:
    """Bitmaps at 0x1E00 and on by 0x201000: data on 4 KiB, the footer where the next bitmap would go."""
    disk = noise(4 * MiB)
    file = convert(MemoryFile(disk), "raw", "vhd")
    assert struct.unpack(">2I", file.data[1536:1544]) == (0x1E00 // 512, 0x202E00 // 512)
    assert file.data[1544:4096] == b"\xff" * 2552
    assert file.size == 0x404000
    assert file.data[0x403E00 : 0x403E00 + 8] == b"conectix"
    for bitmap in (0x1E00, 0x202E00):
        assert file.data[bitmap : bitmap + 512] == b"\xff" * 512
    assert file.data[0x2000 : 0x2000 + 2 * MiB] == disk[: 2 * MiB]


@given(st.sampled_from([BLOCK, 512 * KiB, 2 * MiB, 4 * MiB, 64 * MiB]), st.integers(1, 5000), st.integers(0, 20))
def test_data_is_aligned_and_the_file_is_a_whole_number_of_pages(block: int, blocks: int, used: int) -> None:
    layout = FORMAT.writer(blocks * block, WriterOptions(IDENTIFIER, block_size=block)).layout()
    places = [layout.place(at) for at in range(min(used, blocks))]
    assert all(place % 4096 == 0 for place in places)
    assert layout.file_size % 4096 == 0
    assert len(layout.prefix) == vhd_images.bitmap_length(block)
    assert all(other - one >= block + len(layout.prefix) for one, other in itertools.pairwise(places))


@pytest.mark.parametrize("name", ["win8.vhd", "win8.1-1GB.vhd", "hyperv2012r2-dynamic.vhd", "ntfs-dynamic.vhd"])
def test_a_disk_is_the_one_that_windows_makes(name: str) -> None:
    """Byte for byte, with the same content, size, id and time; only the version of Windows is its own."""
    theirs = sample(name).read_bytes()
    footer = Footer.parse(theirs[:512])
    options = WriterOptions(uuid.UUID(bytes_le=footer.unique_id), timestamp=VHD_EPOCH + footer.timestamp)
    target = convert(MemoryFile(theirs), "vhd", "vhd", options=options)
    ours = Footer.parse(bytes(target.data[:512]))
    assert dataclasses.replace(ours, creator_version=footer.creator_version) == footer
    assert target.data[512:-512] == theirs[512:-512]
    assert target.data[-512:] == target.data[:512]
    assert target.size == sample_facts(name).size


def test_the_footer_is_one_that_old_and_new_programs_read_alike() -> None:
    footer = Footer.parse(empty(40 * MiB)[:512])
    assert footer.creator_app == b"win "
    assert footer.creator_os == b"Wi2k"
    assert footer.original_size == footer.current_size == 40 * MiB
    assert (footer.cylinders, footer.heads, footer.sectors) == (963, 5, 17)
    assert footer.unique_id == IDENTIFIER.bytes_le
    assert (footer.features, footer.version, footer.saved_state, footer.reserved) == (2, 0x10000, 0, bytes(427))
    header = DynamicHeader.parse(empty(40 * MiB)[512:1536])
    assert header == DynamicHeader(1536, 20, 2 * MiB)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(VHD_EPOCH, 0), (VHD_EPOCH + 5, 5), (0, 0), (-1, 0), (VHD_EPOCH + 2**32 - 1, 2**32 - 1), (2**40, 2**32 - 1)],
)
def test_a_time_before_2000_is_the_start_of_2000(seconds: int, expected: int) -> None:
    options = dataclasses.replace(OPTIONS, timestamp=seconds)
    assert Footer.parse(empty(MiB, options)[:512]).timestamp == expected


def test_equal_input_gives_equal_bytes_and_the_id_is_part_of_the_input() -> None:
    disk = noise(MiB) + bytes(3 * MiB)
    assert convert(MemoryFile(disk), "raw", "vhd").data == convert(MemoryFile(disk), "raw", "vhd", jobs=4).data
    other = WriterOptions(uuid.UUID(int=1))
    assert convert(MemoryFile(disk), "raw", "vhd", options=other).data != convert(MemoryFile(disk), "raw", "vhd").data


def test_a_disk_larger_than_a_vhd_holds_is_sent_to_vhdx() -> None:
    FORMAT.writer(MAX_SIZE, OPTIONS)
    with pytest.raises(UnsupportedFeature, match="at most 2040 GiB") as caught:
        FORMAT.writer(MAX_SIZE + 512, OPTIONS)
    assert caught.value.hint is not None
    assert "VHDX" in caught.value.hint


def test_the_largest_disk_that_is_full_still_has_addresses_for_its_blocks() -> None:
    """A BAT entry is a 32-bit sector number."""
    layout = FORMAT.writer(MAX_SIZE, OPTIONS).layout(((0, MAX_SIZE // (2 * MiB)),))
    assert layout.place(MAX_SIZE // (2 * MiB) - 1) // 512 < 2**32 - 1


def test_smaller_blocks_may_leave_no_address_for_the_last_ones_of_a_full_disk() -> None:
    blocks = MAX_SIZE // (512 * KiB)
    writer = FORMAT.writer(MAX_SIZE, dataclasses.replace(OPTIONS, block_size=512 * KiB))
    with pytest.raises(UnsupportedFeature, match="a VHD's blocks lie in the first 2 TiB"):
        writer.layout(((0, blocks),))
    layout = writer.layout(((0, blocks * 99 // 100),))
    with pytest.raises(UnsupportedFeature, match="a VHD's blocks lie in the first 2 TiB"):
        for block in range(blocks * 99 // 100, blocks):
            layout.place(block)


@pytest.mark.parametrize("block", [0, 512, 2048, 3 * MiB, 512 * MiB, -4096])
def test_a_block_size_that_no_reader_takes_is_refused(block: int) -> None:
    if block == 0:
        assert FORMAT.writer(MiB, dataclasses.replace(OPTIONS, block_size=0)).block_size == 2 * MiB
        return
    with pytest.raises(UnsupportedFeature, match=f"block size {block}"):
        FORMAT.writer(MiB, dataclasses.replace(OPTIONS, block_size=block))


def test_blocks_too_small_for_the_disk_are_refused() -> None:
    """The table would be longer than any reader takes."""
    with pytest.raises(UnsupportedFeature, match=f"block size 4096 is too small for a disk of {MAX_SIZE} bytes"):
        FORMAT.writer(MAX_SIZE, dataclasses.replace(OPTIONS, block_size=4096))


@pytest.mark.parametrize(("subformat", "block"), [("differencing", None), ("split", None), ("fixed", 2 * MiB)])
def test_what_is_not_written_is_refused(subformat: str, block: int | None) -> None:
    with pytest.raises(UnsupportedFeature):
        FORMAT.writer(MiB, WriterOptions(IDENTIFIER, subformat=subformat, block_size=block))


# --- real disks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ntfs-dynamic.vhd", "fat-parent.vhd"])
def test_the_ranges_of_a_disk_that_windows_made_do_not_overlap(name: str) -> None:
    image: DiskImage = FORMAT.open(MemoryFile(sample(name).read_bytes()))
    ranges = sorted((one.offset, one.length) for one in image.ranges())
    assert all(one[0] + one[1] <= other[0] for one, other in itertools.pairwise(ranges))
    assert ranges[-1][0] + ranges[-1][1] == sample_facts(name).size
