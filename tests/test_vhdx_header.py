"""The structures of a VHDX: what others write is parsed, what is packed is what was parsed, and every number has
its bounds.
"""

from __future__ import annotations

import dataclasses
import struct
import subprocess
import sys
import tracemalloc
import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures import vhdx_images as made
from imagekit.errors import CorruptImage, InvalidImage, UnsupportedFeature
from imagekit.formats.crc32c import crc32c
from imagekit.formats.vhdx_header import (
    BAT_REGION,
    METADATA_REGION,
    NO_GUID,
    FileIdentifier,
    Header,
    Region,
    RegionTable,
)
from imagekit.formats.vhdx_metadata import (
    FILE_PARAMETERS,
    INCOMPLETE,
    IS_REQUIRED,
    IS_USER,
    PARENT_LOCATOR,
    VIRTUAL_DISK_SIZE,
    FileParameters,
    Geometry,
    Item,
    Metadata,
    MetadataTable,
    ParentLocator,
)
from tests.disks import noise

KiB, MiB, GiB, TiB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
U64, U32, U16 = (st.integers(0, (1 << bits) - 1) for bits in (64, 32, 16))
GUIDS = st.binary(min_size=16, max_size=16)


# --- CRC-32C ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
    ids=["nothing", "check value", "zeros", "ones", "ascending", "descending"],
)
def test_the_checksum_of_known_inputs_is_the_one_of_rfc_3720(data: bytes, expected: int) -> None:
    assert crc32c(data) == expected


@pytest.mark.parametrize("length", [511, 512, 513, 767, 1023, 4095, 4096, 4097, 65535, 65536, 70001, (1 << 20) + 77])
def test_the_checksum_of_any_length_is_the_one_taken_bit_by_bit(length: int) -> None:
    data = noise(length)
    assert crc32c(data) == made.crc32c(data)


@settings(max_examples=30)
@given(st.binary(max_size=40), st.integers(0, 5000), st.integers(0, 5000))
def test_a_checksum_can_be_continued_at_any_place(head: bytes, zeros: int, at: int) -> None:
    data = head + bytes(zeros) + head
    assert crc32c(data[at:], crc32c(data[:at])) == crc32c(data) == made.crc32c(data)


@pytest.mark.parametrize("length", [1, 300, 513, 4096, 65536 - 300, 70001])
def test_zeros_at_the_end_count_as_much_as_other_bytes(length: int) -> None:
    for data in (bytes(length), noise(300) + bytes(length), noise(1000) + bytes(length)):
        assert crc32c(data) == made.crc32c(data)


def test_a_checksum_is_taken_of_any_kind_of_buffer() -> None:
    data = noise(5000)
    assert crc32c(data) == crc32c(bytearray(data)) == crc32c(memoryview(b"x" + data)[1:])


def test_a_checksum_is_the_same_without_the_c_extension_and_nobody_is_warned() -> None:
    """As on a system for which the library has no wheel, with warnings being errors."""
    script = (
        "import sys; sys.modules['google_crc32c._crc32c'] = None\n"
        "from imagekit.formats.crc32c import crc32c\n"
        "import google_crc32c\n"
        "print(google_crc32c.implementation, hex(crc32c(b'6789', crc32c(memoryview(b'12345')))))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("python 0xe3069283\n", "")


# --- the file identifier and the headers -----------------------------------------------------------------------


@given(st.text(st.characters(min_codepoint=1, max_codepoint=0xD7FF), max_size=256))
def test_a_file_identifier_packs_to_what_it_is_parsed_from(creator: str) -> None:
    packed = FileIdentifier(creator).pack()
    assert len(packed) == 520
    assert FileIdentifier.parse(packed) == FileIdentifier(creator)
    assert packed.startswith(b"vhdxfile" + creator.encode("utf-16-le"))


def test_a_creator_that_is_not_text_is_still_shown() -> None:
    assert FileIdentifier.parse(b"vhdxfile" + b"\x00\xd8a\0\0\0b\0" + bytes(504)).creator == "\ufffda"


def test_another_signature_is_no_vhdx() -> None:
    with pytest.raises(InvalidImage, match="signature b'conectix', expected b'vhdxfile'"):
        FileIdentifier.parse(b"conectix" + bytes(512))


@given(st.builds(Header, U64, GUIDS, GUIDS, GUIDS, U64, U32, U16, U16))
def test_a_header_packs_to_what_it_is_parsed_from(header: Header) -> None:
    packed = header.pack()
    assert len(packed) == 4096
    assert Header.parse(packed) == header
    other = made.Header(
        sequence=header.sequence,
        file_write=header.file_write_guid,
        data_write=header.data_write_guid,
        log_guid=header.log_guid,
        log_version=header.log_version,
        version=header.version,
        log_length=header.log_length,
        log_offset=header.log_offset,
    )
    assert packed == other.bytes()


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (made.Header().bytes()[:4095], InvalidImage, "4095 bytes are left"),
        (made.Header(signature=b"daeh").bytes(), InvalidImage, "signature b'daeh', expected b'head'"),
        (made.Header(crc_off_by=1).bytes(), CorruptImage, "header's checksum is 0x[0-9a-f]{8}, expected 0x"),
        (bytes(4096), InvalidImage, "no VHDX header"),
    ],
    ids=["cut", "signature", "checksum", "zeros"],
)
def test_what_is_no_header_is_refused(data: bytes, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        Header.parse(data)


HEADER = Header(1, bytes(16), bytes(16))
LOGGED = dataclasses.replace(HEADER, log_guid=b"1" * 16)


@pytest.mark.parametrize(
    ("header", "kind"),
    [
        (dataclasses.replace(HEADER, version=2), UnsupportedFeature),
        (dataclasses.replace(LOGGED, log_version=1), UnsupportedFeature),
        (dataclasses.replace(LOGGED, log_length=0), InvalidImage),
        (dataclasses.replace(HEADER, log_length=MiB + 4096), InvalidImage),
        (dataclasses.replace(HEADER, log_offset=MiB + 4096), InvalidImage),
        (dataclasses.replace(HEADER, log_offset=0), InvalidImage),
        (dataclasses.replace(HEADER, log_offset=3 * MiB), CorruptImage),
        (dataclasses.replace(HEADER, log_offset=(1 << 64) - MiB), CorruptImage),
        (dataclasses.replace(HEADER, log_length=0xFFF00000), CorruptImage),
    ],
    ids=["version", "log version", "empty log", "odd length", "odd place", "on the headers", "end", "far", "long"],
)
def test_a_header_with_a_number_that_cannot_be_is_refused(header: Header, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        header.validate(3 * MiB)


@pytest.mark.parametrize(
    "header",
    [
        HEADER,
        LOGGED,
        dataclasses.replace(HEADER, log_length=0, log_offset=0),
        dataclasses.replace(HEADER, log_version=7),
    ],
    ids=["clean", "with a log", "no log at all", "a log version that nobody needs"],
)
def test_a_header_of_a_sound_file_is_accepted(header: Header) -> None:
    header.validate(3 * MiB)
    assert header.has_log == (header.log_guid != NO_GUID)


# --- the region table ------------------------------------------------------------------------------------------

REGIONS = st.builds(Region, GUIDS, U64, U32, st.booleans())


@given(st.lists(REGIONS, max_size=20))
def test_a_region_table_packs_to_what_it_is_parsed_from(regions: list[Region]) -> None:
    packed = RegionTable(tuple(regions)).pack()
    assert RegionTable.parse(packed) == RegionTable(tuple(regions))
    lines = [made.Region(one.guid, one.offset, one.length, one.required) for one in regions]
    assert packed == made.RegionTable(regions=lines).bytes()


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (made.RegionTable().bytes()[:-1], InvalidImage, "65535 bytes are left"),
        (made.RegionTable(signature=b"regj").bytes(), InvalidImage, "no VHDX region table"),
        (made.RegionTable(crc_off_by=1).bytes(), CorruptImage, "region table's checksum"),
        (made.RegionTable(count=2048).bytes(), InvalidImage, "2048 entries, at most 2047"),
        (made.RegionTable(count=0xFFFFFFFF).bytes(), InvalidImage, "4294967295 entries"),
    ],
    ids=["cut", "signature", "checksum", "one more", "all ones"],
)
def test_what_is_no_region_table_is_refused(data: bytes, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        RegionTable.parse(data)


def test_a_full_region_table_is_parsed() -> None:
    lines = [made.Region(uuid.UUID(int=at).bytes, at * MiB) for at in range(2047)]
    assert len(RegionTable.parse(made.RegionTable(regions=lines).bytes()).regions) == 2047


BAT, META = Region(BAT_REGION, 3 * MiB, MiB), Region(METADATA_REGION, 2 * MiB, MiB)
OTHER = uuid.UUID(int=7).bytes


@pytest.mark.parametrize(
    ("regions", "kind", "message"),
    [
        ((BAT, Region(OTHER, 4 * MiB, MiB)), UnsupportedFeature, "needs the region 00000000-"),
        ((Region(BAT_REGION, 3 * MiB + 4096, MiB),), InvalidImage, "the BAT region .* not whole MiB"),
        ((Region(BAT_REGION, 3 * MiB, MiB + 512),), InvalidImage, "not whole MiB"),
        ((Region(BAT_REGION, 3 * MiB, 0),), InvalidImage, "not whole MiB"),
        ((Region(BAT_REGION, 0, MiB),), InvalidImage, "not whole MiB"),
        ((Region(BAT_REGION, 5 * MiB, MiB),), CorruptImage, "behind the file's end"),
        ((Region(BAT_REGION, (1 << 64) - MiB, MiB),), CorruptImage, "behind the file's end"),
        ((Region(OTHER, 9 * MiB, MiB, required=False),), CorruptImage, "behind the file's end"),
        ((BAT, META, Region(OTHER, 3 * MiB, MiB, required=False)), CorruptImage, "overlap at 0x300000"),
        ((Region(METADATA_REGION, 2 * MiB, 2 * MiB), BAT), CorruptImage, "the metadata region and the BAT region"),
        ((Region(BAT_REGION, MiB, MiB),), CorruptImage, "overlap at 0x100000"),
        ((BAT, Region(BAT_REGION, 2 * MiB, MiB)), InvalidImage, "names a region twice"),
    ],
    ids=[
        "unknown",
        "odd place",
        "odd length",
        "empty",
        "on the headers",
        "end",
        "far",
        "optional, end",
        "on another",
        "into another",
        "on the log",
        "twice",
    ],
)
def test_a_region_that_cannot_be_is_refused(regions: tuple[Region, ...], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        RegionTable(regions).validate(HEADER, 5 * MiB)


def test_an_unknown_region_that_is_not_required_is_nobodys_business() -> None:
    RegionTable((BAT, META, Region(OTHER, 4 * MiB, MiB, required=False))).validate(HEADER, 5 * MiB)


# --- the metadata ----------------------------------------------------------------------------------------------


@given(st.lists(st.builds(Item, GUIDS, U32, U32, U32), max_size=20))
def test_a_metadata_table_packs_to_what_it_is_parsed_from(items: list[Item]) -> None:
    packed = MetadataTable(tuple(items)).pack()
    assert len(packed) == 64 * KiB
    assert MetadataTable.parse(packed) == MetadataTable(tuple(items))


def test_a_metadata_table_is_parsed_as_others_write_it() -> None:
    items = made.standard_items(made.Recipe(size=GiB))
    found = MetadataTable.parse(made.metadata(items)[: 64 * KiB]).items
    assert [(one.guid, one.offset - 64 * KiB, one.length, one.flags) for one in found] == [
        (made.FILE_PARAMETERS, 0, 8, 4),
        (made.VIRTUAL_SIZE, 8, 8, 6),
        (made.LOGICAL_SECTOR, 16, 4, 6),
        (made.PHYSICAL_SECTOR, 20, 4, 6),
        (made.PAGE_83, 24, 16, 6),
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (made.metadata({}, signature=b"metadatA")[: 64 * KiB], "no VHDX metadata table"),
        (made.metadata({}, count=2048)[: 64 * KiB], "2048 entries"),
        (made.metadata({})[:1000], "no VHDX metadata table"),
    ],
    ids=["signature", "too many", "cut"],
)
def test_what_is_no_metadata_table_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(InvalidImage, match=message):
        MetadataTable.parse(data)


SIZE = Item(VIRTUAL_DISK_SIZE, 64 * KiB, 8)


@pytest.mark.parametrize(
    ("items", "kind", "message"),
    [
        ((Item(OTHER, 64 * KiB, 8),), UnsupportedFeature, "needs the metadata item 00000000-"),
        ((Item(VIRTUAL_DISK_SIZE, 64 * KiB, 8, IS_REQUIRED | IS_USER),), UnsupportedFeature, "needs the metadata"),
        ((Item(INCOMPLETE, 0, 0),), CorruptImage, "did not finish"),
        ((Item(OTHER, 64 * KiB, MiB + 1, 0),), CorruptImage, "does not lie in its region"),
        ((Item(OTHER, 1024, 8, 0),), CorruptImage, "does not lie in its region"),
        ((Item(OTHER, MiB - 4, 8, 0),), CorruptImage, "does not lie in its region"),
        ((Item(OTHER, 0xFFFFFFFF, 0xFFFFFFFF, 0),), CorruptImage, "does not lie in its region"),
        ((SIZE, dataclasses.replace(SIZE, offset=65 * KiB)), InvalidImage, "names an item twice"),
        ((SIZE, Item(FILE_PARAMETERS, 64 * KiB + 4, 8)), CorruptImage, "virtual disk size and file parameters"),
    ],
    ids=["unknown", "a user's", "incomplete", "long", "on the table", "end", "far", "twice", "overlap"],
)
def test_a_metadata_item_that_cannot_be_is_refused(
    items: tuple[Item, ...], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        MetadataTable(items).validate(MiB)


def test_metadata_that_nobody_needs_is_skipped() -> None:
    """An unknown item, a user's item under a known name, and one without content."""
    table = MetadataTable((SIZE, Item(OTHER, 65 * KiB, 8, 0), Item(VIRTUAL_DISK_SIZE, 0, 0, IS_USER)))
    table.validate(MiB)
    assert table.find(VIRTUAL_DISK_SIZE) == SIZE
    assert table.find(OTHER) is None
    assert table.find(FILE_PARAMETERS) is None


def metadata(**changes: bytes | None) -> Metadata:
    """The metadata of a disk of 1 GiB, with one or the other item changed."""
    items = {name: item.data for name, item in made.standard_items(made.Recipe(size=GiB)).items()}
    given: dict[bytes, bytes | None] = {**items, **{getattr(made, name): data for name, data in changes.items()}}
    return Metadata.from_items(given.get)


@given(st.builds(FileParameters, U32, st.booleans(), st.booleans()))
def test_file_parameters_pack_to_what_they_are_parsed_from(parameters: FileParameters) -> None:
    assert FileParameters.parse(parameters.pack()) == parameters


def test_metadata_is_read_from_its_items() -> None:
    found = metadata()
    assert (found.parameters, found.virtual_size) == (FileParameters(MiB), GiB)
    assert (found.logical_sector, found.physical_sector, found.page83) == (512, 4096, made.DISK_ID)
    assert found.locator is None


@pytest.mark.parametrize("block", [0, 1, 512, 3 * MiB, 512 * KiB, 512 * MiB, 2 * GiB, 0xFFFFFFFF])
def test_a_block_size_that_is_none_is_refused(block: int) -> None:
    with pytest.raises(InvalidImage, match=f"block size {block}, expected a power of two"):
        metadata(FILE_PARAMETERS=struct.pack("<II", block, 0))


@pytest.mark.parametrize("name", ["LOGICAL_SECTOR", "PHYSICAL_SECTOR"])
@pytest.mark.parametrize("size", [0, 1, 1000, 520, 2048, 8192, 0xFFFFFFFF])
def test_a_sector_size_that_is_none_is_refused(name: str, size: int) -> None:
    with pytest.raises(InvalidImage, match=f"sector size {size}, expected 512 or 4096"):
        metadata(**{name: struct.pack("<I", size)})


@pytest.mark.parametrize("size", [0, 1, 513, 64 * TiB + 512, 1 << 63, (1 << 64) - 1, (1 << 64) - 512])
def test_a_virtual_size_that_is_none_is_refused(size: int) -> None:
    with pytest.raises(InvalidImage, match=f"virtual size {size}, expected a multiple of 512 up to 64 TiB"):
        metadata(VIRTUAL_SIZE=struct.pack("<Q", size))


def test_a_virtual_size_is_a_multiple_of_the_disks_own_sectors() -> None:
    with pytest.raises(InvalidImage, match="multiple of 4096"):
        metadata(VIRTUAL_SIZE=struct.pack("<Q", 4096 + 512), LOGICAL_SECTOR=struct.pack("<I", 4096))
    assert metadata(VIRTUAL_SIZE=struct.pack("<Q", 64 * TiB)).virtual_size == 64 * TiB


@pytest.mark.parametrize("name", ["FILE_PARAMETERS", "VIRTUAL_SIZE", "LOGICAL_SECTOR", "PHYSICAL_SECTOR", "PAGE_83"])
def test_an_item_that_is_missing_or_has_another_length_is_refused(name: str) -> None:
    with pytest.raises(CorruptImage, match="has no metadata item"):
        metadata(**{name: None})
    for data in (b"", bytes(3), bytes(17)):
        with pytest.raises(CorruptImage, match=f"has {len(data)} bytes, not"):
            metadata(**{name: data})


# --- the parent locator ----------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(min_codepoint=1, max_codepoint=0xFFFF, exclude_categories=["Cs"]), max_size=20)


@given(st.dictionaries(TEXTS, TEXTS, max_size=8))
def test_a_parent_locator_packs_to_what_it_is_parsed_from(pairs: dict[str, str]) -> None:
    locator = ParentLocator(tuple(pairs.items()))
    assert ParentLocator.parse(locator.pack()) == locator
    assert locator.pack() == made.parent_locator(pairs.items())


def test_a_parent_has_its_names_in_the_order_to_try_them() -> None:
    locator = ParentLocator.parse(made.parent_locator(made.linked_to(made.DATA_WRITE, "base.vhdx")))
    assert locator.paths == (
        r".\base.vhdx",
        r"\\?\Volume{01234567-89ab-cdef-0123-456789abcdef}\disks\base.vhdx",
        r"C:\disks\base.vhdx",
    )
    assert ParentLocator((("absolute_win32_path", "x"), ("relative_path", ""))).paths == ("x",)


OTHER_ID = uuid.UUID(int=9)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (OTHER_ID, None, [OTHER_ID]),
        (OTHER_ID, uuid.UUID(int=0), [OTHER_ID]),
        (OTHER_ID, uuid.UUID(int=5), [OTHER_ID, uuid.UUID(int=5)]),
        (uuid.UUID(int=0), None, [uuid.UUID(int=0)]),
    ],
    ids=["one", "as Windows 10", "two", "a parent that has none"],
)
def test_a_parent_is_known_by_one_or_two_guids(
    first: uuid.UUID, second: uuid.UUID | None, expected: list[uuid.UUID]
) -> None:
    """An all-zero second one is none; an all-zero first one does not become "any will do"."""
    pairs = [("parent_linkage", f"{{{str(first).upper()}}}")]
    if second is not None:
        pairs.append(("parent_linkage2", f"{{{second}}}"))
    assert ParentLocator(tuple(pairs)).linkages == tuple(one.bytes_le for one in expected)


@pytest.mark.parametrize("pairs", [(), (("parent_linkage", ""),), (("parent_linkage", "{12}"),)])
def test_a_locator_that_any_file_would_satisfy_is_refused(pairs: tuple[tuple[str, str], ...]) -> None:
    with pytest.raises(CorruptImage, match="linkage"):
        _ = ParentLocator(pairs).linkages


def locator_with(text: bytes, *, key: int = 0, length: int | None = None) -> bytes:
    data = made.parent_locator([("", "")])
    return data[:20] + struct.pack("<IIHH", 32 + key, 32, 0, len(text) if length is None else length) + text


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (b"", CorruptImage, "has 0 bytes"),
        (made.parent_locator([], kind=bytes(16)), UnsupportedFeature, "type 00000000-"),
        (made.parent_locator([], count=1), CorruptImage, "1 entries, which do not fit"),
        (made.parent_locator([], count=65535), CorruptImage, "65535 entries"),
        (locator_with(b"ab", length=65534), CorruptImage, "behind its end"),
        (locator_with(b"ab", key=0xFFFFFFDF), CorruptImage, "behind its end"),
        (locator_with(b"a\0b"), CorruptImage, "not UTF-16"),
        (locator_with(b"\x00\xd8"), CorruptImage, "not UTF-16"),
        (locator_with("p.vhdx\0.txt".encode("utf-16-le")), CorruptImage, "an end in its middle"),
        (made.parent_locator([("k", "a"), ("k", "b")]), CorruptImage, "a key twice"),
    ],
    ids=["empty", "type", "count", "count, all ones", "length", "offset", "odd", "half", "hidden text", "twice"],
)
def test_a_locator_that_cannot_be_is_refused(data: bytes, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        ParentLocator.parse(data)


def test_a_locator_whose_texts_are_the_same_megabyte_again_and_again_is_refused_at_once() -> None:
    """Read one by one, the texts would have 64 MiB."""
    count, length = 1024, 65534
    head = made.parent_locator([], count=count)
    places = struct.pack("<IIHH", len(head) + 12 * count, len(head) + 12 * count, 2, length) * count
    tracemalloc.start()
    try:
        with pytest.raises(CorruptImage, match="texts that overlap"):
            ParentLocator.parse(head + places + b"a\0" * (length // 2))
        assert tracemalloc.get_traced_memory()[1] < MiB
    finally:
        tracemalloc.stop()


def test_text_that_ends_in_zeros_ends_before_them() -> None:
    assert ParentLocator.parse(locator_with("p.vhdx\0".encode("utf-16-le"))).get("") == "p.vhdx"


def test_the_locator_is_part_of_the_metadata() -> None:
    item = made.parent_locator(made.linked_to(made.DATA_WRITE))
    found = metadata(PARENT_LOCATOR=item).locator
    assert found is not None
    assert found.linkages == (made.DATA_WRITE,)
    assert PARENT_LOCATOR == made.PARENT_LOCATOR


# --- the BAT's arithmetic --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "sector", "ratio"),
    [
        (MiB, 512, 4096),
        (2 * MiB, 512, 2048),
        (8 * MiB, 512, 512),
        (32 * MiB, 512, 128),
        (256 * MiB, 512, 16),
        (MiB, 4096, 32768),
        (256 * MiB, 4096, 128),
    ],
)
def test_a_chunk_has_as_many_blocks_as_one_bitmap_covers(block: int, sector: int, ratio: int) -> None:
    assert Geometry(TiB, block, sector).chunk_ratio == ratio


@given(st.integers(1, 64 * TiB // 4096), st.integers(0, 8), st.sampled_from([512, 4096]), st.booleans())
def test_entries_are_where_the_independent_generator_puts_them(
    sectors: int, power: int, sector: int, differencing: bool
) -> None:
    size, block = sectors * 4096, MiB << power
    geometry = Geometry(size, block, sector, differencing)
    recipe = made.Recipe(size=size, block_size=block, sector=sector, parent=[] if differencing else None)
    assert (geometry.blocks, geometry.entries) == (recipe.count, recipe.bat_entries)
    last = geometry.blocks - 1
    assert geometry.payload_index(last) == recipe.entry_of(last) < geometry.entries
    chunk = geometry.chunks - 1
    assert geometry.bitmap_index(chunk) == recipe.bitmap_entry_of(chunk)
    if differencing:
        assert geometry.bitmap_index(chunk) == geometry.entries - 1
    assert geometry.bat_length % MiB == 0
    assert 0 <= geometry.bat_length - geometry.entries * 8 < MiB


def test_no_two_entries_share_a_place() -> None:
    geometry = Geometry(40 * 256 * MiB, 256 * MiB, 512, True)
    places = [geometry.payload_index(block) for block in range(40)]
    places += [geometry.bitmap_index(chunk) for chunk in range(3)]
    assert len(set(places)) == len(places)
    assert max(places) < geometry.entries == 3 * 17
