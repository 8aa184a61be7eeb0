"""The qcow2 header: every number is bounded before it is used."""

from __future__ import annotations

import dataclasses
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixtures.qcow2_images import Recipe, make
from imagekit.errors import CorruptImage, ImagekitError, InvalidImage, UnsupportedFeature
from imagekit.formats.qcow2_header import EXT_DATA_FILE, MAGIC, MAX_EXTENSIONS, Extensions, Qcow2Header

u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
SOUND = Qcow2Header.parse(make(Recipe(size=1 << 20)).data)


@st.composite
def headers(draw: st.DrawFn) -> Qcow2Header:
    version = draw(st.sampled_from([2, 3]))
    fixed = (u64, u32, u32, u64, u32, u32, u64, u64, u32, u32, u64)
    header = Qcow2Header(version, *(draw(one) for one in fixed))
    if version == 2:
        return header
    length = draw(st.sampled_from([104, 112, 120]))
    return dataclasses.replace(
        header,
        incompatible=draw(u64),
        compatible=draw(u64),
        autoclear=draw(u64),
        refcount_order=draw(u32),
        header_length=length,
        compression_type=draw(st.integers(0, 255)) if length > 104 else 0,
    )


@given(headers())
def test_what_is_packed_parses_to_the_same_header(header: Qcow2Header) -> None:
    packed = header.pack()
    assert len(packed) == header.header_length
    assert Qcow2Header.parse(packed) == header
    assert Qcow2Header.parse(packed).pack() == packed


@given(headers())
def test_no_header_at_all_makes_validation_do_anything_but_pass_or_refuse(header: Qcow2Header) -> None:
    try:
        header.validate(1 << 30)
    except ImagekitError:
        return
    assert 9 <= header.cluster_bits <= 21
    assert header.l1_offset + header.l1_size * 8 <= 1 << 30


def test_the_fields_of_an_image_made_by_the_book_are_found() -> None:
    made = make(Recipe(size=77 << 20, cluster_bits=12, refcount_order=2, zstd=True))
    header = Qcow2Header.parse(made.data)
    assert (header.version, header.size, header.cluster_size) == (3, 77 << 20, 4096)
    assert (header.refcount_order, header.compression_type, header.header_length) == (2, 1, 112)
    assert (header.l1_offset, header.refcount_offset) == (made.l1, made.refcount_table)
    assert header.l1_size == -(-77 * 256 // 512)
    header.validate(len(made.data))


@pytest.mark.parametrize("length", [0, 3, 71, 72, 100, 103])
def test_a_header_that_is_cut_short_is_invalid(length: int) -> None:
    with pytest.raises(InvalidImage):
        Qcow2Header.parse(SOUND.pack()[:length])


def test_another_magic_is_no_qcow2() -> None:
    with pytest.raises(InvalidImage, match="no qcow2 header"):
        Qcow2Header.parse(b"QFI\xfa" + bytes(200))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cluster_bits": 8}, "cluster_bits 8"),
        ({"cluster_bits": 22}, "cluster_bits 22"),
        ({"cluster_bits": 2**32 - 1}, "cluster_bits 4294967295"),
        ({"cluster_bits": 13, "incompatible": 16}, "extended L2 entries with cluster_bits 13"),
        ({"size": 1 << 63}, "virtual size 9223372036854775808"),
        ({"size": (1 << 63) - 1}, "the L1 table has 1 entries, the virtual size needs"),
        ({"header_length": 96}, "header length 96"),
        ({"header_length": 108}, "header length 108"),
        ({"header_length": 1 << 20}, "header length 1048576"),
        ({"compression_type": 1}, "against its feature bit"),
        ({"incompatible": 8}, "against its feature bit"),
        ({"refcount_order": 7}, "refcount order 7"),
        ({"l1_size": 0}, "the L1 table has 0 entries"),
        ({"l1_size": 2**32 - 1}, "more than 32 MiB"),
        ({"l1_offset": 65536 + 512}, "not on a cluster"),
        ({"l1_offset": 0}, "not on a cluster"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(f"{name}={field}" for name, field in value.items()),
)
def test_a_number_that_no_valid_image_has_is_refused(change: dict[str, int], message: str) -> None:
    header = dataclasses.replace(SOUND, **change)
    with pytest.raises(InvalidImage, match=message):
        header.validate(1 << 30)


def test_an_l1_table_behind_the_end_of_the_file_is_damage() -> None:
    with pytest.raises(CorruptImage, match="behind the file's end"):
        SOUND.validate(SOUND.l1_offset + 7)
    SOUND.validate(SOUND.l1_offset + 8)


@pytest.mark.parametrize("version", [0, 1, 4, 0xFFFFFFFF])
def test_other_versions_are_not_supported(version: int) -> None:
    with pytest.raises(UnsupportedFeature, match=f"qcow version {version}"):
        dataclasses.replace(SOUND, version=version).validate(1 << 30)


def test_version_1_gets_a_hint_at_the_way_out() -> None:
    with pytest.raises(UnsupportedFeature) as caught:
        dataclasses.replace(SOUND, version=1).validate(1 << 30)
    assert caught.value.hint is not None
    assert "-f qcow --allow external-qemu-img" in caught.value.hint


# --- extensions ------------------------------------------------------------------------------------------------


def extension(kind: int, body: bytes) -> bytes:
    return struct.pack(">II", kind, len(body)) + body + bytes(-len(body) % 8)


def test_extensions_are_found_behind_ones_that_mean_nothing_to_us() -> None:
    data = (
        extension(0x6803F857, b"feature names")
        + extension(0xE2792ACA, b"raw")
        + extension(0x12345678, bytes(100))
        + extension(0x44415441, "dätä.raw".encode())
        + extension(0x23852875, struct.pack(">IIQQ", 3, 0, 96, 0x50000))
        + extension(0x0537BE77, struct.pack(">QQ", 0x60000, 2048))
        + extension(0, b"")
        + extension(0xE2792ACA, b"behind the end")
    )
    found = Extensions.parse(bytes(104) + data, 104)
    assert found == Extensions(
        backing_format="raw",
        data_file="dätä.raw",
        bitmaps=3,
        bitmap_directory=(0x50000, 96),
        crypto_header=(0x60000, 2048),
    )


def test_extensions_end_where_their_cluster_ends() -> None:
    assert Extensions.parse(bytes(104) + extension(0xE2792ACA, b"raw"), 104).backing_format == "raw"


def test_an_extension_that_leaves_its_cluster_is_invalid() -> None:
    for length in (9, 0xFFFFFFFF):
        data = struct.pack(">II", 0xE2792ACA, length) + bytes(8)
        with pytest.raises(InvalidImage, match="leaves its cluster"):
            Extensions.parse(data, 0)


def test_extensions_without_end_are_refused_and_not_followed() -> None:
    """A 2 MiB header cluster holds 262144 empty extensions, and behind them one that names another file."""
    name = extension(EXT_DATA_FILE, b"/etc/passwd")
    assert Extensions.parse(extension(1, b"") * (MAX_EXTENSIONS - 1) + name, 0).data_file == "/etc/passwd"
    for count in (MAX_EXTENSIONS, 262142):
        with pytest.raises(InvalidImage, match="more than 64 header extensions"):
            Extensions.parse(extension(1, b"") * count + name, 0)


@given(st.binary(max_size=300))
def test_any_bytes_parse_as_extensions_or_are_refused(data: bytes) -> None:
    try:
        Extensions.parse(data, 0)
    except InvalidImage:
        return


@given(st.binary(max_size=200))
def test_any_bytes_parse_as_a_header_or_are_refused(data: bytes) -> None:
    file_size = 1 << 30
    try:
        header = Qcow2Header.parse(MAGIC + data)
        header.validate(file_size)
    except ImagekitError:
        return
    assert header.version in (2, 3) and 9 <= header.cluster_bits <= 21
    assert header.l1_offset + header.l1_size * 8 <= file_size
    assert header.size <= header.l1_size * header.l2_entries * header.cluster_size
