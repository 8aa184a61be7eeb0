"""VDI: what VirtualBox and QEMU write is read, and what contradicts itself is not."""

from __future__ import annotations

import dataclasses
import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures import vdi_images
from fixtures.vdi_images import Recipe, make
from imagekit.errors import CorruptImage, ImagekitError, InvalidImage, UnsupportedFeature
from imagekit.formats.base import Extent, Reference
from imagekit.formats.files import MemoryFile
from imagekit.formats.vdi import FORMAT, VdiImage
from imagekit.formats.vdi_header import VdiHeader
from tests.disks import assert_extents_agree, content, cut, noise, pieces, read_or_error, text

KiB, MiB, TiB = 1 << 10, 1 << 20, 1 << 40
BLOCK = 4 * KiB
RECIPE = Recipe(size=5 * BLOCK, blocks={3: noise(BLOCK), 1: text(BLOCK), 4: None}, block_size=BLOCK)


def image_of(data: bytes) -> VdiImage:
    return FORMAT.open(MemoryFile(data))


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Blocks of every kind, in any order, and disks whose sizes end anywhere."""
    block = draw(st.sampled_from([BLOCK, 2 * BLOCK]))
    numbers = draw(st.lists(st.integers(0, 9), max_size=8, unique=True))
    return Recipe(
        size=max(numbers, default=0) * block + draw(st.integers(1, 2 * block // 512)) * 512,
        blocks={number: draw(pieces(block) | st.none()) for number in numbers},
        block_size=block,
        image_type=draw(st.sampled_from([vdi_images.DYNAMIC, vdi_images.STATIC])),
        spare_blocks=draw(st.integers(0, 200)),
        data_offset=draw(st.sampled_from([None, 4096, 8192])),
        header_size=draw(st.sampled_from([384, 400])),
    )


# --- reading ---------------------------------------------------------------------------------------------------


@given(recipes())
def test_a_guest_reads_what_the_blocks_hold_and_extents_agree(recipe: Recipe) -> None:
    file = MemoryFile(make(recipe).data)
    assert_extents_agree(FORMAT.open(file), file, recipe.content())
    assert FORMAT.check(file) == []


@given(recipes(), st.data())
def test_any_part_of_the_disk_reads_as_it_does_within_the_whole(recipe: Recipe, data: st.DataObject) -> None:
    image, expected = image_of(make(recipe).data), recipe.content()
    whole = list(image.extents())
    for _ in range(8):
        start = data.draw(st.integers(0, len(expected)))
        length = data.draw(st.integers(0, 20 * KiB))
        assert image.pread(start, length) == expected[start : start + length]
        assert list(image.extents(start, length)) == cut(whole, start, start + length)


def test_blocks_are_data_at_their_offset_and_the_rest_is_not_there_or_zero() -> None:
    made = make(RECIPE)
    assert list(image_of(made.data).extents()) == [
        Extent(0, BLOCK, data=False, zero=True, present=False),
        Extent(BLOCK, BLOCK, data=True, zero=False, offset=made.data_offset + BLOCK),
        Extent(2 * BLOCK, BLOCK, data=False, zero=True, present=False),
        Extent(3 * BLOCK, BLOCK, data=True, zero=False, offset=made.data_offset),
        Extent(4 * BLOCK, BLOCK, data=False, zero=True, present=True),
    ]


def test_the_map_is_read_in_windows_and_blocks_join_across_them() -> None:
    """Two windows of 16384 entries; the blocks of a static disk are one extent."""
    blocks = (1 << 14) + 3
    data = make(Recipe(size=blocks * BLOCK, block_size=BLOCK)).data
    start, count = vdi_images.MAP_AT, blocks * 4
    offset = -(-(start + count) // 512) * 512
    block_map = b"".join(number.to_bytes(4, "little") for number in range(blocks))
    file = MemoryFile(data[:start] + block_map + data[start + count : offset])
    file.truncate(offset + blocks * BLOCK)
    file.pwrite(offset + ((1 << 14) - 1) * BLOCK, text(2 * BLOCK))
    image = FORMAT.open(file)
    assert list(image.extents()) == [Extent(0, blocks * BLOCK, data=True, zero=False, offset=offset)]
    assert image.pread(((1 << 14) - 1) * BLOCK, 2 * BLOCK) == text(2 * BLOCK)


def test_a_disk_of_no_whole_sector_ends_in_zeros() -> None:
    """VBoxManage makes such from raw files; QEMU rounds up as well."""
    made = make(dataclasses.replace(RECIPE, size=5 * BLOCK)).poked(vdi_images.AT_DISK_SIZE, 4 * BLOCK + 513, 8)
    assert image_of(made.data).virtual_size == 4 * BLOCK + 1024
    assert content(image_of(made.data)) == RECIPE.content()[: 4 * BLOCK + 1024]


def test_info_says_what_the_header_says() -> None:
    info = image_of(make(RECIPE).data).info()
    assert (info.format, info.subformat, info.virtual_size, info.block_size) == ("vdi", "dynamic", 5 * BLOCK, BLOCK)
    assert (info.references, info.facts) == ((), ())
    assert info.features == {
        "creator": "Oracle VM VirtualBox Disk Image",
        "uuid": "03020100-0504-0706-0809-0a0b0c0d0e0f",
        "modification-uuid": "13121110-1514-1716-1819-1a1b1c1d1e1f",
        "image-flags": 0,
        "blocks-allocated": 2,
    }
    static = dataclasses.replace(RECIPE, image_type=vdi_images.STATIC)
    assert image_of(make(static).data).info().subformat == "static"


PARENT = uuid.UUID("01234567-89ab-cdef-0123-456789abcdef")


@pytest.mark.parametrize(
    ("change", "name", "subformat"),
    [
        ({"image_type": 4, "link_id": PARENT.bytes_le}, str(PARENT), "differencing"),
        ({"image_type": 3, "link_id": PARENT.bytes_le}, str(PARENT), "undo"),
        ({"image_type": 4}, "", "differencing"),
        ({"image_type": 3}, "", "undo"),
        ({"link_id": PARENT.bytes_le}, str(PARENT), "dynamic"),
        ({"parent_modify_id": PARENT.bytes_le}, str(PARENT), "dynamic"),
        ({"image_type": 2, "link_id": PARENT.bytes_le}, str(PARENT), "static"),
    ],
    ids=["differencing", "undo", "differencing, no id", "undo, no id", "link", "parent's state", "static"],
)
def test_a_disk_with_a_parent_is_described_and_not_read(change: dict[str, object], name: str, subformat: str) -> None:
    """Read alone it would give zeros where the parent's data is."""
    image = image_of(make(dataclasses.replace(RECIPE, **change)).data)  # type: ignore[arg-type]
    assert image.info().references == (Reference("parent-file", name, "vdi"),)
    assert image.info().subformat == subformat
    for read in (lambda: list(image.extents()), lambda: content(image)):
        with pytest.raises(UnsupportedFeature, match="is in its parent"):
            read()


# --- numbers that lie ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "width", "value", "kind", "message"),
    [
        (vdi_images.AT_SIGNATURE, 4, 0, InvalidImage, "no VDI header"),
        (vdi_images.AT_VERSION, 4, 0x00000001, UnsupportedFeature, "VDI version 0.1"),
        (vdi_images.AT_VERSION, 4, 0x00020000, UnsupportedFeature, "VDI version 2.0"),
        (vdi_images.AT_TYPE, 4, 0, UnsupportedFeature, "VDI type 0"),
        (vdi_images.AT_TYPE, 4, 5, UnsupportedFeature, "VDI type 5"),
        (vdi_images.AT_HEADER_SIZE, 4, 383, InvalidImage, "a header of 383 bytes"),
        (vdi_images.AT_HEADER_SIZE, 4, 441, InvalidImage, "a header of 441 bytes"),
        (vdi_images.AT_HEADER_SIZE, 4, 0xFFFFFFFF, InvalidImage, "a header of 4294967295 bytes"),
        (vdi_images.AT_MAP, 4, 513, InvalidImage, "not on sectors, or on each other"),
        (vdi_images.AT_MAP, 4, 1024, InvalidImage, "not on sectors, or on each other"),
        (vdi_images.AT_DATA, 4, 1025, InvalidImage, "not on sectors, or on each other"),
        (vdi_images.AT_DATA, 4, 512, InvalidImage, "not on sectors, or on each other"),
        (vdi_images.AT_DATA, 4, 0xFFFFFE00, CorruptImage, "block 1 should lie at"),
        (vdi_images.AT_SECTOR_SIZE, 4, 0, InvalidImage, "sectors of 0 bytes"),
        (vdi_images.AT_SECTOR_SIZE, 4, 4096, InvalidImage, "sectors of 4096 bytes"),
        (vdi_images.AT_DISK_SIZE, 8, 0, InvalidImage, "a disk of 0 bytes"),
        (vdi_images.AT_DISK_SIZE, 8, 5 * BLOCK + 1, InvalidImage, "a disk of 20481 bytes, and 5 blocks"),
        (vdi_images.AT_DISK_SIZE, 8, (1 << 64) - 1, InvalidImage, "a disk of 18446744073709551615 bytes"),
        (vdi_images.AT_BLOCK_SIZE, 4, 0, InvalidImage, "block size 0"),
        (vdi_images.AT_BLOCK_SIZE, 4, 512, InvalidImage, "block size 512"),
        (vdi_images.AT_BLOCK_SIZE, 4, 3 * BLOCK, InvalidImage, "block size 12288"),
        (vdi_images.AT_BLOCK_SIZE, 4, 1 << 31, InvalidImage, "block size 2147483648"),
        (vdi_images.AT_BLOCK_EXTRA, 4, 512, UnsupportedFeature, "512 bytes before the data"),
        (vdi_images.AT_BLOCKS, 4, 4, InvalidImage, "a disk of 20480 bytes, and 4 blocks"),
        (vdi_images.AT_BLOCKS, 4, 0x40000000, InvalidImage, "1073741824 blocks, at most"),
        (vdi_images.AT_BLOCKS, 4, 0x3FFFFFFF, InvalidImage, "not on sectors, or on each other"),
    ],
)
def test_a_number_that_lies_is_caught(
    at: int, width: int, value: int, kind: type[ImagekitError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        content(image_of(make(RECIPE).poked(at, value, width).data))


def test_a_map_behind_the_end_of_the_file_is_damage() -> None:
    made = make(RECIPE).poked(vdi_images.AT_BLOCKS, 0x100000).poked(vdi_images.AT_DATA, 0x800000)
    with pytest.raises(CorruptImage, match="the block map of 1048576 entries ends at 0x400200"):
        image_of(made.data)


@pytest.mark.parametrize("entry", [2, 3, 0x00100000, 0xFFFFFFFD], ids=hex)
def test_a_block_behind_the_end_of_the_file_is_damage(entry: int) -> None:
    made = make(RECIPE)
    with pytest.raises(CorruptImage, match="block 2 should lie at") as caught:
        content(image_of(made.poked(made.entry(2), entry).data))
    assert caught.value.offset == made.entry(2)


def test_the_last_block_may_end_where_the_disk_ends() -> None:
    made = make(Recipe(size=BLOCK + 1024, blocks={0: noise(BLOCK), 1: noise(1024)}, block_size=BLOCK))
    short = made.data[: len(made.data) - BLOCK + 1024]
    assert content(image_of(short)) == made.recipe.content()
    with pytest.raises(CorruptImage, match="block 1 should lie at"):
        content(image_of(short[:-1]))


def test_an_image_cut_anywhere_is_an_error_or_the_same_content() -> None:
    """Never zeros where there was data."""
    recipe = Recipe(size=4 * BLOCK - 1024, blocks={2: noise(BLOCK), 3: text(BLOCK - 1024)}, block_size=BLOCK)
    data, expected = make(recipe).data, recipe.content()
    lengths = sorted({*range(0, len(data), 512), *range(1, len(data), 61)})
    read = [read_or_error("vdi", data[:length]) for length in lengths]
    assert all(isinstance(one, ImagekitError) or one == expected for one in read)
    assert all(length >= len(data) - 1024 for length, one in zip(lengths, read, strict=True) if one == expected)


@given(st.data())
@settings(max_examples=200)
def test_any_flipped_bits_give_other_content_or_a_typed_error(data: st.DataObject) -> None:
    made = make(dataclasses.replace(RECIPE, spare_blocks=4))
    broken = bytearray(made.data)
    places = st.integers(64, 84) | st.integers(340, 456) | st.integers(512, 560)
    for _ in range(data.draw(st.integers(1, 3))):
        broken[data.draw(places)] = data.draw(st.sampled_from([0, 1, 2, 0x7F, 0x80, 0xFE, 0xFF]))
    try:
        image = image_of(bytes(broken))
        image.info()
        list(image.ranges())
        if image.virtual_size <= 16 * MiB:
            content(image)
        FORMAT.check(MemoryFile(bytes(broken)))
    except ImagekitError:
        return


@given(st.binary(max_size=600))
def test_a_signature_and_anything_behind_it_is_a_vdi_or_an_error(data: bytes) -> None:
    file = MemoryFile(bytes(64) + b"\x7f\x10\xda\xbe" + data)
    assert FORMAT.probe(file) == "VDI signature at 0x40"
    with pytest.raises(ImagekitError):
        FORMAT.open(file)


@pytest.mark.parametrize("data", [b"", bytes(67), bytes(4096), bytes(64) + b"\x7f\x10\xda", noise(4096)])
def test_what_has_no_signature_is_no_vdi(data: bytes) -> None:
    assert FORMAT.probe(MemoryFile(data)) is None
    with pytest.raises(InvalidImage, match="no VDI header"):
        image_of(data)


# --- the header ------------------------------------------------------------------------------------------------

U32, U64, ID = st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFFFFFFFFFFFFFF), st.binary(min_size=16, max_size=16)


@given(
    st.builds(
        VdiHeader,
        disk_size=U64,
        blocks=U32,
        map_offset=U32,
        data_offset=U32,
        image_type=U32,
        block_size=U32,
        blocks_allocated=U32,
        block_extra=U32,
        sector_size=U32,
        header_size=U32,
        version=U32,
        flags=U32,
        text=st.binary(max_size=63).map(lambda text: text + b"."),
        comment=st.binary(max_size=255).map(lambda text: text + b"."),
        geometry=st.tuples(U32, U32, U32),
        dummy=U32,
        create_id=ID,
        modify_id=ID,
        link_id=ID,
        parent_modify_id=ID,
    )
)
def test_a_header_packed_and_parsed_is_the_same(header: VdiHeader) -> None:
    assert VdiHeader.parse(header.pack()) == header


def test_the_header_is_laid_out_as_the_generator_has_it() -> None:
    """Two writers of one layout that share no code."""
    made = make(RECIPE)
    header = VdiHeader.parse(made.data)
    assert (header.disk_size, header.blocks, header.blocks_allocated) == (5 * BLOCK, 5, 2)
    assert (header.map_offset, header.data_offset, header.header_size) == (512, 1024, 400)
    assert header.pack() == made.data[:456]


# --- the check -------------------------------------------------------------------------------------------------


def problems(data: bytes) -> list[tuple[str, int | None]]:
    return [(problem.code, problem.offset) for problem in FORMAT.check(MemoryFile(data))]


def test_two_blocks_in_one_place_overlap() -> None:
    made = make(RECIPE)
    poked = made.poked(made.entry(0), 1).poked(vdi_images.AT_ALLOCATED, 3)
    assert problems(poked.data) == [("overlap", made.entry(1))]
    assert len(content(image_of(poked.data))) == 5 * BLOCK


def test_a_wrong_number_of_blocks_is_a_problem() -> None:
    assert problems(make(RECIPE).poked(vdi_images.AT_ALLOCATED, 3).data) == [("block-count", 388)]


def test_blocks_past_the_disk_are_checked_too() -> None:
    made = make(dataclasses.replace(RECIPE, spare_blocks=2))
    assert problems(made.poked(made.entry(6), 1).data) == [("overlap", made.entry(6)), ("block-count", 388)]
    assert problems(made.poked(made.entry(6), 99).data) == [("outside", made.entry(6)), ("block-count", 388)]


def test_a_block_far_into_a_file_that_is_too_long_is_a_problem() -> None:
    """More blocks of data than the disk has: nobody put them there."""
    made = make(RECIPE)
    data = made.poked(made.entry(1), 9).data + bytes(10 * BLOCK)
    assert problems(data) == [("outside", made.entry(1))]


def test_as_much_aliasing_as_a_map_can_hold_ends_the_check() -> None:
    made = make(Recipe(size=10_000 * BLOCK, blocks={0: noise(BLOCK)}, block_size=BLOCK))
    data = made.data[:512] + bytes(40_000) + made.data[40_512:]
    found = problems(data)
    assert [code for code, _ in found] == ["overlap"] * 100 + ["more"]


def test_a_disk_with_a_parent_is_checked_like_any_other() -> None:
    assert problems(make(dataclasses.replace(RECIPE, image_type=4, link_id=PARENT.bytes_le)).data) == []


def test_ranges_are_all_that_the_file_holds() -> None:
    made = make(RECIPE)
    ranges = sorted((one.offset, one.offset + one.length, one.kind) for one in image_of(made.data).ranges())
    assert ranges == [
        (0, 472, "header"),
        (512, 532, "block map"),
        (1024, 1024 + BLOCK, "data"),
        (1024 + BLOCK, 1024 + 2 * BLOCK, "data"),
    ]


def test_a_huge_disk_costs_what_is_in_it() -> None:
    """A map of a million entries in a file with holes: read a window at a time."""
    blocks = 1 << 20
    made = make(Recipe(size=BLOCK, block_size=BLOCK))
    file = MemoryFile(made.poked(vdi_images.AT_BLOCKS, blocks).poked(vdi_images.AT_DISK_SIZE, blocks * BLOCK, 8).data)
    file.pwrite(vdi_images.AT_DATA, (512 + blocks * 4).to_bytes(4, "little"))
    file.pwrite(512, b"\xff" * blocks * 4)
    image = FORMAT.open(file)
    assert list(image.extents()) == [Extent(0, blocks * BLOCK, data=False, zero=True, present=False)]
    assert image.pread(blocks * BLOCK - 512, 512) == bytes(512)
