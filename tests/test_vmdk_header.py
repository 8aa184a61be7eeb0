"""The headers of VMDK's sparse files: what goes in comes out, and numbers that lie are caught in time."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixtures import vmdk_images
from fixtures.vmdk_images import Recipe, Vmdk, cowd, hosted, qemu_stream, sesparse, stream
from imagekit.errors import CorruptImage, ImagekitError, InvalidImage, UnsupportedFeature
from imagekit.formats.vmdk_header import CowdHeader, HostedHeader, SeSparseHeader
from tests.disks import content, noise
from tests.vmdk_recipes import sparse

U16, U32, U64 = st.integers(0, 0xFFFF), st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFFFFFFFFFFFFFF)
RECIPE = Recipe(size=4 << 13, grains={1: noise(1 << 13)})

# Where fields lie.
VERSION, FLAGS, CAPACITY, GRAIN, TEXT_AT, TEXT_SIZE, ENTRIES = 4, 8, 12, 20, 28, 36, 44
REDUNDANT, DIRECTORY, OVERHEAD, UNCLEAN, NEWLINES, COMPRESSION = 48, 56, 64, 72, 73, 77


@given(
    st.builds(
        HostedHeader,
        capacity=U64,
        version=st.integers(1, 3),
        flags=U32.map(lambda flags: flags & ~0x30001),
        grain_size=U64,
        descriptor_offset=U64,
        descriptor_size=U64,
        table_entries=st.integers(1, 512),
        redundant_offset=U64,
        directory_offset=U64,
        overhead=U64,
        unclean=st.integers(0, 255),
        newlines=st.binary(min_size=4, max_size=4),
        padding=st.binary(min_size=433, max_size=433),
    )
)
def test_a_header_packed_and_parsed_is_the_same(header: HostedHeader) -> None:
    data = header.pack()
    assert len(data) == 512
    assert HostedHeader.parse(data) == header
    assert HostedHeader.parse(data).pack() == data


def test_every_field_is_where_the_specification_has_it() -> None:
    data = bytearray(HostedHeader(capacity=1).pack())
    for at, width, value in (
        (FLAGS, 4, 0x5),
        (CAPACITY, 8, 1001),
        (GRAIN, 8, 256),
        (TEXT_AT, 8, 1),
        (TEXT_SIZE, 8, 20),
        (ENTRIES, 4, 511),
        (REDUNDANT, 8, 21),
        (DIRECTORY, 8, 26),
        (OVERHEAD, 8, 128),
        (UNCLEAN, 1, 1),
    ):
        data[at : at + width] = value.to_bytes(width, "little")
    assert HostedHeader.parse(bytes(data)) == HostedHeader(
        capacity=1001,
        flags=5,
        grain_size=256,
        descriptor_offset=1,
        descriptor_size=20,
        table_entries=511,
        redundant_offset=21,
        directory_offset=26,
        overhead=128,
        unclean=1,
    )


@pytest.mark.parametrize(
    ("at", "width", "value", "kind", "message"),
    [
        (VERSION, 4, 0, UnsupportedFeature, "VMDK version 0"),
        (VERSION, 4, 4, UnsupportedFeature, "VMDK version 4"),
        (VERSION, 4, 0xFFFFFFFF, UnsupportedFeature, "VMDK version 4294967295"),
        (FLAGS, 4, 0x10003, InvalidImage, "contradict each other"),
        (COMPRESSION, 2, 1, InvalidImage, "contradict each other"),
        (COMPRESSION, 2, 2, UnsupportedFeature, "unknown VMDK compression 2"),
        (CAPACITY, 8, 0, InvalidImage, "a capacity of 0 sectors"),
        (CAPACITY, 8, 1 << 54, InvalidImage, "a capacity of"),
        (CAPACITY, 8, (1 << 64) - 1, InvalidImage, "a capacity of"),
        (CAPACITY, 8, 1 << 40, InvalidImage, "needs 134217728 grain tables"),
        (CAPACITY, 8, 1 << 36, CorruptImage, "grain directory at"),
        (GRAIN, 8, 0, InvalidImage, "grains of 0 sectors"),
        (GRAIN, 8, 17, InvalidImage, "grains of 17 sectors"),
        (GRAIN, 8, 1 << 22, InvalidImage, "grains of 4194304 sectors"),
        (GRAIN, 8, 1 << 63, InvalidImage, "grains of 9223372036854775808 sectors"),
        (ENTRIES, 4, 0, InvalidImage, "0 entries in a grain table"),
        (ENTRIES, 4, 513, InvalidImage, "513 entries in a grain table"),
        (DIRECTORY, 8, 0, InvalidImage, "the header and the grain directory overlap"),
        (DIRECTORY, 8, 1, InvalidImage, "the grain directory and the descriptor overlap"),
        (DIRECTORY, 8, 1 << 20, CorruptImage, "the grain directory at 0x20000000 ends at"),
        (DIRECTORY, 8, (1 << 64) - 2, CorruptImage, "the grain directory at"),
        (DIRECTORY, 8, (1 << 64) - 1, CorruptImage, "does not end in a footer"),
        (REDUNDANT, 8, 1 << 20, CorruptImage, "the redundant grain directory at"),
        (TEXT_AT, 8, 1 << 50, CorruptImage, "the descriptor at"),
        (TEXT_SIZE, 8, 1 << 40, CorruptImage, "the descriptor at"),
        (OVERHEAD, 8, 1 << 30, CorruptImage, "the data should begin at"),
        (NEWLINES, 4, 0x0A0A200A, CorruptImage, "transferred as text"),
    ],
)
def test_a_number_that_lies_is_caught(
    at: int, width: int, value: int, kind: type[ImagekitError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        sparse(hosted(RECIPE).poked(at, value, width).data)


def test_a_descriptor_may_have_64_kib_and_no_more() -> None:
    recipe = dataclasses.replace(RECIPE, text_sectors=128)
    assert content(sparse(hosted(recipe).data)) == recipe.content()
    with pytest.raises(InvalidImage, match="a descriptor of 66048 bytes"):
        sparse(hosted(dataclasses.replace(RECIPE, text_sectors=129)).data)


def test_compressed_grains_must_fit_in_memory() -> None:
    with pytest.raises(InvalidImage, match="grains of 32768 sectors, expected a power of two up to 16384"):
        sparse(qemu_stream(RECIPE).poked(GRAIN, 1 << 15, 8).data)


def test_compressed_grains_without_markers_are_not_read() -> None:
    with pytest.raises(UnsupportedFeature, match="without markers"):
        sparse(qemu_stream(RECIPE).poked(FLAGS, 0x10003).data)


def test_the_newline_test_counts_only_where_it_was_made() -> None:
    recipe = dataclasses.replace(RECIPE, newlines=b"abcd")
    assert content(sparse(hosted(recipe).data)) == recipe.content()


@pytest.mark.parametrize("length", [0, 3, 4, 78, 511])
@pytest.mark.parametrize("maker", [hosted, stream, sesparse, cowd])
def test_a_header_cut_short_is_an_error(maker: type, length: int) -> None:
    made: Vmdk = maker(RECIPE)
    with pytest.raises((InvalidImage, CorruptImage)):
        sparse_or_error(made.data[:length])


def sparse_or_error(data: bytes) -> object:
    return sparse(data) if data[:4] in (b"KDMV", b"COWD") else SeSparseHeader.parse(data)


# --- ESX -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "value", "kind", "message"),
    [
        (4, 2, UnsupportedFeature, "COWD version 2"),
        (12, 0, InvalidImage, "a capacity of 0 sectors"),
        (12, 0xFFFFFFFF, InvalidImage, "has 1 entries, the capacity needs 65536"),
        (16, 0, InvalidImage, "grains of 0 sectors"),
        (16, 3, InvalidImage, "grains of 3 sectors"),
        (20, 0, InvalidImage, "the header and the grain directory overlap"),
        (20, 0xFFFFFFFF, CorruptImage, "the grain directory at"),
        (24, 0, InvalidImage, "has 0 entries, the capacity needs 1"),
        (24, 0xFFFFFFFF, CorruptImage, "the grain directory at"),
    ],
)
def test_a_cowd_number_that_lies_is_caught(at: int, value: int, kind: type[ImagekitError], message: str) -> None:
    with pytest.raises(kind, match=message):
        sparse(cowd(RECIPE).poked(at, value).data)


@pytest.mark.parametrize(
    ("word", "value", "kind", "message"),
    [
        (1, 0x200000002, UnsupportedFeature, "SESparse version 0x200000002"),
        (2, 0, InvalidImage, "a capacity of 0 sectors"),
        (2, 1 << 63, InvalidImage, "the capacity needs"),
        (3, 16, UnsupportedFeature, "SESparse grain size 0x10"),
        (4, 1, UnsupportedFeature, "SESparse grain table size 0x1"),
        (5, 1, UnsupportedFeature, "SESparse flags 0x1"),
        (6, 1, UnsupportedFeature, "SESparse reserved field 0x1"),
        (10, 1 << 40, CorruptImage, "the volatile header at"),
        (10, 2, InvalidImage, "overlap"),
        (16, 0, InvalidImage, "overlap"),
        (16, 1 << 60, CorruptImage, "the grain directory at"),
        (17, 0, InvalidImage, "has 0 entries"),
        (17, 1 << 60, CorruptImage, "the grain directory at"),
        (18, 0, InvalidImage, "the grain tables start at"),
        (18, 1 << 63, InvalidImage, "the grain tables start at"),
        (24, (1 << 64) - 1, InvalidImage, "the grains start at"),
        (30, 1, UnsupportedFeature, "something behind the fields"),
    ],
)
def test_an_sesparse_number_that_lies_is_caught(
    word: int, value: int, kind: type[ImagekitError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        sparse(sesparse(RECIPE).poked(word * 8, value, 8).data)


def test_an_sesparse_file_needs_its_volatile_header() -> None:
    made = sesparse(RECIPE)
    with pytest.raises(CorruptImage, match="volatile header is damaged or missing"):
        sparse(made.poked(512, 0, 8).data)


def test_the_fields_of_esx_headers_are_where_their_files_have_them() -> None:
    assert CowdHeader.parse(cowd(RECIPE).data) == CowdHeader(64, 16, 4, 1, 1, 3, 53)
    header = SeSparseHeader.parse(sesparse(RECIPE).data)
    assert (header.capacity, header.volatile_offset, header.directory_offset) == (64, 1, 2)
    assert (header.tables_offset, header.grains_offset) == (3, 67)


def test_the_fixture_says_what_it_was_told() -> None:
    """The generator shares nothing with the reader, so its own header is worth a look."""
    header = HostedHeader.parse(vmdk_images.hosted(RECIPE).data)
    assert (header.capacity, header.grain_size, header.table_entries, header.descriptor_offset) == (64, 16, 512, 1)
