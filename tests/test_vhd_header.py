"""The structures of a VHD: against bytes written from the specification, and values from real disks."""

from __future__ import annotations

import dataclasses
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixtures import vhd_images
from imagekit.errors import CorruptImage, ImagekitError, InvalidImage
from imagekit.formats.vhd_header import (
    MAX_ENTRIES,
    MAX_GEOMETRY,
    MAX_SIZE,
    DynamicHeader,
    Footer,
    Locator,
    batmap,
    bitmap_size,
    checksum,
    geometry,
)
from tests.samples import sample

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
u8, u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32, 64))
four, sixteen = st.binary(min_size=4, max_size=4), st.binary(min_size=16, max_size=16)

footers = st.builds(
    Footer,
    current_size=u64,
    disk_type=u32,
    unique_id=sixteen,
    data_offset=u64,
    timestamp=u32,
    creator_app=four,
    creator_version=u32,
    creator_os=four,
    original_size=u64,
    cylinders=u16,
    heads=u8,
    sectors=u8,
    features=u32,
    version=u32,
    saved_state=u8,
    reserved=st.binary(min_size=427, max_size=427),
)
headers = st.builds(
    DynamicHeader,
    bat_offset=u64,
    max_entries=u32,
    block_size=u32,
    next_offset=u64,
    version=u32,
    parent_id=sixteen,
    parent_timestamp=u32,
    reserved=u32,
    parent_name=st.binary(min_size=512, max_size=512),
    locators=st.tuples(*[st.builds(Locator, four, u32, u32, u64)] * 8),
    tail=st.binary(min_size=256, max_size=256),
)


@given(footers)
def test_a_footer_parses_to_what_was_packed(footer: Footer) -> None:
    packed = footer.pack()
    assert len(packed) == 512
    assert Footer.parse(packed) == footer
    assert Footer.parse(packed).pack() == packed


@given(headers)
def test_a_dynamic_header_parses_to_what_was_packed(header: DynamicHeader) -> None:
    packed = header.pack()
    assert len(packed) == 1024
    assert DynamicHeader.parse(packed) == header
    assert DynamicHeader.parse(packed).pack() == packed


def test_a_footer_written_by_the_book_is_understood_field_by_field() -> None:
    raw = vhd_images.Footer(
        size=40 * MiB,
        original_size=30 * MiB,
        creator=b"vbox",
        creator_version=0x00040003,
        creator_os=b"Mac ",
        geometry=(963, 5, 17),
        unique_id=b"0123456789abcdef",
        timestamp=77,
        saved_state=1,
        hidden=1,
    ).bytes()
    footer = Footer.parse(raw)
    assert footer == Footer(
        current_size=40 * MiB,
        original_size=30 * MiB,
        disk_type=3,
        unique_id=b"0123456789abcdef",
        data_offset=512,
        timestamp=77,
        creator_app=b"vbox",
        creator_version=0x00040003,
        creator_os=b"Mac ",
        cylinders=963,
        heads=5,
        sectors=17,
        saved_state=1,
        reserved=b"\1" + bytes(426),
    )
    assert footer.pack() == raw


def test_a_dynamic_header_written_by_the_book_is_understood() -> None:
    locator = vhd_images.Locator(b"W2ru", b"name", 4096)
    raw = vhd_images.dynamic_header(
        entries=20, block_size=2 * MiB, parent_id=b"p" * 16, parent_name="Eltern.vhd", locators=[locator]
    )
    header = DynamicHeader.parse(raw)
    assert (header.bat_offset, header.max_entries, header.block_size) == (1536, 20, 2 * MiB)
    assert header.parent_id == b"p" * 16
    assert header.parent_name.decode("utf-16-be").rstrip("\0") == "Eltern.vhd"
    assert header.locators[0] == Locator(b"W2ru", 512, 4, 4096)
    assert header.pack() == raw


def test_a_footer_of_511_bytes_lacks_only_a_zero() -> None:
    """So wrote Virtual PC before 2004; the checksum is the same."""
    raw = vhd_images.Footer(size=MiB).bytes()
    assert Footer.parse(raw[:511]) == Footer.parse(raw)


@given(footers, st.integers(0, 4095))
def test_a_flipped_bit_in_a_footer_is_noticed(footer: Footer, bit: int) -> None:
    """A sum of bytes sees every single bit, also in the cookie and in the checksum itself."""
    raw = bytearray(footer.pack())
    raw[bit // 8] ^= 1 << bit % 8
    with pytest.raises((CorruptImage, InvalidImage)):
        Footer.parse(bytes(raw))


def test_a_wrong_checksum_names_both_values_and_its_place() -> None:
    raw = vhd_images.Footer(size=MiB).bytes(checksum_off_by=1)
    with pytest.raises(CorruptImage, match=r"checksum is 0x[0-9a-f]{8}, expected 0x[0-9a-f]{8}") as caught:
        Footer.parse(raw, offset=0x1000)
    assert caught.value.offset == 0x1000 + 64
    raw = vhd_images.dynamic_header(entries=1, block_size=MiB, checksum_off_by=1)
    with pytest.raises(CorruptImage, match="dynamic header's checksum") as caught:
        DynamicHeader.parse(raw, offset=512)
    assert caught.value.offset == 512 + 36


def test_other_bytes_are_no_footer_and_no_header() -> None:
    with pytest.raises(InvalidImage, match="no VHD footer: cookie b'conectiX'"):
        Footer.parse(b"conectiX" + bytes(504))
    with pytest.raises(InvalidImage, match="no VHD dynamic header: cookie"):
        DynamicHeader.parse(bytes(1024))


@pytest.mark.parametrize("length", [0, 7, 8, 100, 510])
def test_a_footer_cut_short_is_not_taken(length: int) -> None:
    with pytest.raises((CorruptImage, InvalidImage)):
        Footer.parse(vhd_images.Footer(size=MiB).bytes()[:length])


def test_the_checksum_is_the_complement_of_the_sum() -> None:
    assert checksum(b"") == 0xFFFFFFFF
    assert checksum(b"\x01\x02") == 0xFFFFFFFC
    assert checksum(b"\xff" * (1 << 20)) == 0xFFFFFFFF - 255 * (1 << 20)


# --- geometry --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (4 * MiB, (120, 4, 17)),
        (10 * MiB, (301, 4, 17)),
        (40 * MiB, (963, 5, 17)),
        (512 * MiB, (1040, 16, 63)),
        (1 * GiB, (2080, 16, 63)),
        (3 * GiB, (6241, 16, 63)),
        (127 * GiB, (65278, 16, 255)),
        (MAX_SIZE, MAX_GEOMETRY),
    ],
)
def test_the_geometry_is_the_one_found_in_disks_that_windows_made(size: int, expected: tuple[int, int, int]) -> None:
    assert geometry(size) == expected


@given(st.integers(0, MAX_SIZE // 512).map(lambda sectors: sectors * 512))
def test_a_geometry_never_promises_more_than_the_disk_has(size: int) -> None:
    """Old QEMU takes the product for the size: more than there is would read past the end."""
    cylinders, heads, per_track = geometry(size)
    assert cylinders * heads * per_track * 512 <= size
    assert cylinders <= 65535
    assert heads <= 16
    assert per_track <= 255


# --- the size that counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("creator", "chs", "by_geometry"),
    [
        (b"vpc ", (1000, 4, 17), True),
        (b"qemu", (1000, 4, 17), True),
        (b"vpc ", MAX_GEOMETRY, False),
        (b"qemu", MAX_GEOMETRY, False),
        (b"vpc ", (0, 0, 0), False),
        *[
            (creator, (1000, 4, 17), False)
            for creator in (b"win ", b"qem2", b"d2v\0", b"tap\0", b"CTXS", b"wa\0\0", b"vbox", b"vs  ", b"\0\0\0\0")
        ],
    ],
)
def test_the_current_size_counts_except_where_two_creators_rounded(
    creator: bytes, chs: tuple[int, int, int], *, by_geometry: bool
) -> None:
    footer = Footer.parse(vhd_images.Footer(size=40 * MiB, creator=creator, geometry=chs).bytes())
    assert footer.virtual_size == (1000 * 4 * 17 * 512 if by_geometry else 40 * MiB)


def test_what_decides_the_content_does_not_include_what_tools_update_in_one_copy() -> None:
    footer = Footer(current_size=MiB, disk_type=3, unique_id=bytes(16))
    same = dataclasses.replace(footer, saved_state=1, timestamp=5, reserved=b"\1" + bytes(426))
    assert same.content_fields == footer.content_fields
    for other in (
        dataclasses.replace(footer, current_size=2 * MiB),
        dataclasses.replace(footer, disk_type=2),
        dataclasses.replace(footer, data_offset=1024),
        dataclasses.replace(footer, unique_id=b"\1" * 16),
    ):
        assert other.content_fields != footer.content_fields


# --- bounds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 0}, "block size 0"),
        ({"block_size": 1}, "block size 1"),
        ({"block_size": 256}, "block size 256"),
        ({"block_size": 3 * MiB}, "block size 3145728"),
        ({"block_size": 2 * GiB}, "block size 2147483648"),
        ({"max_entries": 0}, "the BAT has 0 entries, the virtual size needs 20"),
        ({"max_entries": 19}, "the BAT has 19 entries, the virtual size needs 20"),
        ({"max_entries": 2**32 - 1}, "ends behind the file's end"),
        ({"bat_offset": 1537}, "not on a sector"),
        ({"bat_offset": 0}, "not on a sector"),
        ({"bat_offset": 2**64 - 512}, "ends behind the file's end"),
        ({"bat_offset": 3584}, None),
        ({"bat_offset": 4096}, "ends behind the file's end"),
    ],
)
def test_numbers_are_bounded_before_they_are_used(change: dict[str, int], message: str | None) -> None:
    numbers = {"bat_offset": 1536, "max_entries": 20, "block_size": 2 * MiB} | change
    header = DynamicHeader(numbers["bat_offset"], numbers["max_entries"], numbers["block_size"])
    if message is None:
        header.validate(40 * MiB, 4096)
        return
    with pytest.raises((InvalidImage, CorruptImage), match=message):
        header.validate(40 * MiB, 4096)


@given(headers, footers)
def test_no_header_at_all_makes_validation_do_anything_but_pass_or_refuse(
    header: DynamicHeader, footer: Footer
) -> None:
    try:
        header.validate(footer.virtual_size, 1 << 30)
    except ImagekitError:
        return
    assert header.block_size
    assert header.bat_offset + header.max_entries * 4 <= 1 << 30


@pytest.mark.parametrize(
    ("block", "expected"), [(512, 512), (4 * KiB, 512), (512 * KiB, 512), (2 * MiB, 512), (4 * MiB, 1024)]
)
def test_a_sector_bitmap_takes_whole_sectors(block: int, expected: int) -> None:
    assert bitmap_size(block) == vhd_images.bitmap_length(block) == expected


def test_a_table_has_a_most_of_entries() -> None:
    """A file may be long and hold nothing: its length alone must not decide how much is read."""
    header = DynamicHeader(1536, 2**32 - 1, 512)
    header.validate(MAX_ENTRIES * 512, 1 << 40)
    with pytest.raises(InvalidImage, match=f"needs a BAT of {MAX_ENTRIES + 1} entries, expected at most"):
        header.validate(MAX_ENTRIES * 512 + 512, 1 << 40)


@pytest.mark.parametrize(
    ("app", "version", "order"),
    [
        (b"tap\0", 0x00000001, "little"),
        (b"tap\0", 0x00010001, "big"),
        (b"tap\0", 0x00010003, "big"),
        (b"win ", 0x00000001, "big"),
    ],
)
def test_only_xenservers_first_version_counted_bits_from_the_other_end(app: bytes, version: int, order: str) -> None:
    footer = Footer(current_size=MiB, disk_type=4, unique_id=bytes(16), creator_app=app, creator_version=version)
    assert footer.bit_order == order
    assert footer.is_xen == (app == b"tap\0")


@pytest.mark.parametrize("entries", [1, 20, 4095, 4096, 4097, 4104, 4105])
def test_a_map_of_full_blocks_is_read_as_xenserver_reads_it(entries: int) -> None:
    """By blktap's own arithmetic: header behind the table, length by whole bytes, sum over what it reads."""
    runs = [(0, 1), (entries // 2, entries - entries // 2)]
    data = batmap(0x800, entries, runs)
    cookie, offset, sectors, version, total, marker = struct.unpack(">8sQIIIB", data[:29])
    assert (cookie, offset, version, marker) == (b"tdbatmap", 0xA00, 0x00010002, 0)
    assert sectors * 512 * 8 >= entries
    assert len(data) == 512 + sectors * 512
    read = data[512 : 512 + max(1, -(-(entries >> 3) // 512)) * 512]
    assert total == ~sum(read) & 0xFFFFFFFF
    bits = "".join(f"{byte:08b}" for byte in data[512:])
    full = {block for block in range(len(bits)) if bits[block] == "1"}
    assert full == {block for first, count in runs for block in range(first, first + count) if block < len(read) * 8}


def test_an_empty_map_is_the_one_of_a_disk_that_xenserver_made() -> None:
    theirs = sample("xapi.vhd").read_bytes()
    assert batmap(0x800, 20) == theirs[0x800:0xC00]
