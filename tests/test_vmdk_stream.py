"""A streamOptimized VMDK in one pass: the same disk as by its tables, and no damage that the pass does not see."""

from __future__ import annotations

import dataclasses
import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures import vmdk_images
from fixtures.vmdk_images import COMPRESSED, MARKERS, Recipe, Vmdk, descriptor, hosted, marker, qemu_stream, stream
from imagekit.errors import CorruptImage, ImagekitError, InvalidImage, UnsupportedFeature
from imagekit.formats.base import Reference
from imagekit.formats.vmdk_stream import END_OF_STREAM, Marker, Read, inflate, read_stream
from tests.disks import content, noise, text
from tests.vmdk_recipes import recipes, small, sparse

KiB, MiB = 1 << 10, 1 << 20
GRAIN = 8 * KiB
RECIPE = Recipe(size=7 * GRAIN, grains={2: noise(GRAIN, 1), 0: text(GRAIN, 2), 5: noise(GRAIN, 3)})
TINY = small(9 * 512, {1: noise(512, 1), 0: text(512, 2), 8: noise(512, 3)})

BOTH = pytest.mark.parametrize("maker", [stream, qemu_stream], ids=["vmware", "qemu"])


def piecewise(data: bytes, most: int) -> Read:
    """As a pipe gives it: at most so many bytes at once."""
    source = io.BytesIO(data)
    return lambda length: source.read(min(length, most))


def assembled(data: bytes, most: int = 1 << 20) -> bytes:
    """What a whole pass yields, put together."""
    passing = read_stream(piecewise(data, most))
    out = bytearray(passing.virtual_size)
    for offset, grain in passing:
        out[offset : offset + len(grain)] = grain
    return bytes(out)


# --- the same disk ---------------------------------------------------------------------------------------------


@given(recipes(), st.integers(1, 2000))
def test_a_pass_yields_what_the_tables_lead_to(recipe: Recipe, most: int) -> None:
    for made in (stream(recipe), stream(recipe, tables_last=True), qemu_stream(recipe)):
        assert assembled(made.data, most) == recipe.content()


@BOTH
def test_grains_come_in_the_order_of_the_file_and_end_with_the_disk(maker: Callable[[Recipe], Vmdk]) -> None:
    recipe = dataclasses.replace(RECIPE, size=5 * GRAIN + 512)
    passing = read_stream(piecewise(maker(recipe).data, 99))
    assert [(offset // GRAIN, len(grain)) for offset, grain in passing] == [(2, GRAIN), (0, GRAIN), (5, 512)]


def test_header_and_descriptor_are_known_before_the_first_grain() -> None:
    passing = read_stream(piecewise(stream(RECIPE).data, 100))
    assert passing.virtual_size == 7 * GRAIN
    assert passing.info() == sparse(stream(RECIPE).data).info()
    assert passing.descriptor is not None
    assert passing.descriptor.create_type == "streamOptimized"


def test_facts_are_told_before_the_first_grain() -> None:
    text = descriptor("streamOptimized", 'RW 112 SPARSE "/etc/passwd"')
    passing = read_stream(piecewise(stream(dataclasses.replace(RECIPE, text=text)).data, 100))
    assert [one.code for one in passing.info().facts] == ["embedded-extent"]


def test_zeros_behind_the_last_grain_are_qemus_room_for_the_next() -> None:
    made = qemu_stream(RECIPE, trailing=300_000)
    assert assembled(made.data, 99_999) == RECIPE.content() == content(sparse(made.data))
    with pytest.raises(CorruptImage, match="more behind the end-of-stream marker"):
        assembled(made.data[:-1] + b"x")


def test_a_directory_may_be_known_without_a_footer() -> None:
    """A writer that can seek puts the place of the directory into the header at the end."""
    made = stream(RECIPE)
    assert assembled(made.poked(56, made.directory // 512, 8).data) == RECIPE.content()
    without = made.poked(56, made.directory // 512, 8).data[:-1536] + marker(0)
    assert assembled(without) == RECIPE.content() == content(sparse(without))


def test_a_directory_may_be_rounded_up_with_zeros() -> None:
    made = stream(RECIPE)
    at = made.directory
    data = made.data[: at - 512] + marker(4, kind=2) + made.data[at : at + 512] + bytes(1536) + made.data[at + 512 :]
    assert assembled(data) == RECIPE.content() == content(sparse(data))


def test_memory_follows_the_grains_in_hand() -> None:
    """8 MiB of data in 128 tables: one table and one grain at a time."""
    recipe = Recipe(size=32 * MiB, grains={at: noise(GRAIN, at) for at in range(1024)}, table_entries=8)
    data = stream(recipe).data
    read = piecewise(data, 1 << 16)
    tracemalloc.start()
    try:
        for _ in read_stream(read):
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 512 * KiB


# --- what only random access can read --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (hosted(RECIPE).data, "not streamOptimized"),
        (stream(RECIPE).poked(64, 1 << 20, 8).data, "of tables before the data"),
        (stream(RECIPE).poked(28, 10, 8).data, "the descriptor lies behind the data"),
        (qemu_stream(RECIPE).poked(qemu_stream(RECIPE).directory, 99).data, "grain tables lie behind the data"),
        (stream(RECIPE).poked(8, 0x30003).poked(48, 900, 8).data, "a redundant grain directory behind"),
        (stream(RECIPE).poked(12, 1 << 38, 8).data, "a grain directory of 33554432 entries"),
        (stream(RECIPE).poked(8, 0x70001).data, "unknown VMDK flags 0x40000"),
        (stream(RECIPE).poked(4, 4).data, "VMDK version 4"),
    ],
)
def test_what_needs_more_than_a_pass_is_said_at_once(data: bytes, message: str) -> None:
    with pytest.raises(UnsupportedFeature, match=message):
        assembled(data)


def test_a_delta_disk_is_described_and_not_read() -> None:
    text = descriptor("streamOptimized", 'RW 112 SPARSE "a"', parent="12345678")
    passing = read_stream(piecewise(stream(dataclasses.replace(RECIPE, text=text)).data, 100))
    assert passing.info().references == (Reference("parent-file", "", "vmdk"),)
    with pytest.raises(UnsupportedFeature, match="a delta disk"):
        next(iter(passing))


# --- damage ----------------------------------------------------------------------------------------------------


@BOTH
def test_a_stream_cut_anywhere_is_an_error(maker: Callable[[Recipe], Vmdk]) -> None:
    """QEMU's just ends, without a mark: what its tables announced and did not come is missing."""
    data = maker(TINY).data
    last = max(maker(TINY).grains.values()) + len(vmdk_images.compressed(TINY, 8))
    for length in [*range(0, len(data), 512), *range(7, len(data), 61)]:
        try:
            whole = assembled(data[:length])
        except ImagekitError as error:
            assert error.exit_code in (11, 12)
        else:
            assert maker is qemu_stream
            assert length >= last
            assert whole == TINY.content()


@pytest.mark.parametrize("cut_out", [2, 0, 5])
@BOTH
def test_a_grain_that_is_missing_is_missed(maker: Callable[[Recipe], Vmdk], cut_out: int) -> None:
    made = maker(RECIPE)
    at = made.grains[cut_out]
    end = -(-(at + 12 + made.number(at + 8)) // 512) * 512
    with pytest.raises(CorruptImage):
        assembled(made.data[:at] + made.data[end:])


@BOTH
def test_a_grain_that_no_table_has_is_noticed(maker: Callable[[Recipe], Vmdk]) -> None:
    """It would be on the disk for who reads the markers, and not for who reads the tables."""
    made = maker(RECIPE)
    more = dataclasses.replace(RECIPE, grains={3: noise(GRAIN, 9)})
    extra = vmdk_images.compressed(more, 3)
    at = made.tables[0] - 512 if maker is stream else len(made.data)
    data = made.data[:at] + extra + bytes(-len(extra) % 512) + made.data[at:]
    with pytest.raises(CorruptImage, match=r"does not say where|lies where no grain table has it"):
        assembled(data)


@BOTH
def test_a_grain_that_comes_twice_is_noticed(maker: Callable[[Recipe], Vmdk]) -> None:
    made = maker(RECIPE)
    again = vmdk_images.compressed(RECIPE, 0)
    at = made.grains[5]
    data = made.data[:at] + again + bytes(-len(again) % 512) + made.data[at:]
    with pytest.raises(CorruptImage, match="twice"):
        assembled(data)


def test_tables_that_differ_are_noticed() -> None:
    made = qemu_stream(RECIPE)
    other = made.poked(made.entry(3, redundant=True), made.number(made.entry(2)))
    with pytest.raises(CorruptImage, match="lead to different tables 0"):
        assembled(other.data)


def test_directory_entries_cannot_multiply_a_table() -> None:
    """Ten thousand entries for one table would keep ten thousand copies of it."""
    recipe = Recipe(size=10_000 * 512 * 512, grains={0: noise(512)}, grain_sectors=1, redundant=False)
    made = qemu_stream(dataclasses.replace(recipe, all_tables=False))
    first = made.data[made.directory : made.directory + 4]
    data = made.data[: made.directory] + first * 10_000 + made.data[made.directory + 40_000 :]
    with pytest.raises(CorruptImage, match=r"10000 grain tables in .* bytes: they overlap"):
        assembled(data)


def test_a_footer_for_another_disk_is_noticed() -> None:
    made = stream(RECIPE, footer=dataclasses.replace(RECIPE, size=8 * GRAIN))
    with pytest.raises(CorruptImage, match="the footer describes another disk"):
        assembled(made.data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: made.poked(made.entry(0), made.number(made.entry(2))), "does not say where the grains"),
        (lambda made: made.poked(made.entry(1), 3), "does not say where the grains"),
        (lambda made: made.poked(made.entry(0), 0), "does not say where the grains"),
        (lambda made: made.poked(made.directory, 1), "directory does not say where grain table 0"),
        (lambda made: made.poked(made.directory + 4, 1), "directory has more entries than the disk"),
        (lambda made: made.poked(made.tables[0] - 512, 5, 8), "announces 5 sectors"),
        (lambda made: made.poked(made.tables[0] - 512 + 12, 9), "a marker of unknown type 9"),
        (lambda made: made.poked(made.tables[0] - 512 + 12, 3), "type 3 that announces 4 sectors"),
        (lambda made: made.poked(made.directory - 512 + 12, 3), "a marker of type 3 out of place"),
        (lambda made: made.poked(made.directory - 512, 900, 8), "announces 900 sectors"),
        (lambda made: made.poked(made.grains[0], 1, 8), "starts no grain of this disk"),
        (lambda made: made.poked(made.grains[0], 112, 8), "starts no grain of this disk"),
        (lambda made: made.poked(made.grains[0], (1 << 64) - 16, 8), "starts no grain of this disk"),
        (lambda made: made.poked(made.grains[0] + 8, 0xFFFFFFFF), "a compressed grain of 4294967295 bytes"),
        (lambda made: made.poked(made.grains[0] + 14, 0xFF, 1), "zlib stream"),
        (lambda made: made.poked(len(made.data) - 1024 + 56, 1, 8), "or another directory"),
        (lambda made: made.poked(len(made.data) - 512, 1, 8), "a damaged end-of-stream marker"),
        (lambda made: dataclasses.replace(made, data=made.data + b"\0"), "more behind the end-of-stream marker"),
        (lambda made: dataclasses.replace(made, data=made.data[:-1536] + marker(0)), "before its grain directory"),
        (lambda made: dataclasses.replace(made, data=made.data[: made.directory - 512] + marker(0)), "stream ends"),
    ],
)
def test_metadata_behind_the_data_must_say_what_was_there(change: Callable[[Vmdk], Vmdk], message: str) -> None:
    with pytest.raises(CorruptImage, match=message):
        assembled(change(stream(RECIPE)).data)


def test_a_table_may_be_empty_if_nothing_of_it_came() -> None:
    recipe = dataclasses.replace(TINY, grains={0: text(512), 8: None})
    assert assembled(stream(recipe).data) == recipe.content()
    made = stream(recipe)
    directory = made.poked(made.directory + 8, made.tables[0] // 512)
    with pytest.raises(CorruptImage, match="directory does not say where grain table 2"):
        assembled(directory.data)


def test_grains_behind_their_table_are_out_of_place() -> None:
    made = stream(RECIPE)
    grain = vmdk_images.compressed(dataclasses.replace(RECIPE, grains={3: noise(GRAIN)}), 3)
    at = made.directory - 512
    with pytest.raises(CorruptImage, match="behind its grain table"):
        assembled(made.data[:at] + grain + bytes(-len(grain) % 512) + made.data[at:])


def test_tables_that_never_come_are_not_waited_for_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagekit.formats.vmdk_stream.MAX_WAITING", 4 * KiB)
    recipe = Recipe(size=40 * 512, grains={at: text(512, at) for at in range(0, 40, 4)}, grain_sectors=1)
    recipe = dataclasses.replace(recipe, table_entries=4)
    assert assembled(stream(recipe).data) == recipe.content()
    monkeypatch.setattr("imagekit.formats.vmdk_stream.MAX_WAITING", 128)
    with pytest.raises(UnsupportedFeature):
        assembled(stream(recipe, tables_last=True).data)


@pytest.mark.parametrize("data", [b"", b"KDMV", bytes(512), noise(512)])
def test_what_is_no_header_is_an_error(data: bytes) -> None:
    with pytest.raises((CorruptImage, InvalidImage)):
        read_stream(piecewise(data, 100))


@BOTH
@given(data=st.data())
@settings(max_examples=120)
def test_any_flipped_bits_give_other_content_or_a_typed_error(
    maker: Callable[[Recipe], Vmdk], data: st.DataObject
) -> None:
    """Where both ways of reading accept the file, they see the same disk."""
    made = maker(TINY)
    broken = bytearray(made.data)
    places = st.integers(0, 80) | st.sampled_from(
        [made.directory, made.directory - 512, *made.tables.values(), *made.grains.values(), len(broken) - 1024]
    )
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(places) + data.draw(st.integers(0, 16))
        broken[at % len(broken)] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
    try:
        passing = read_stream(piecewise(bytes(broken), 300))
        if passing.virtual_size > MiB:
            return
        found = assembled(bytes(broken))
        image = sparse(bytes(broken))
        other = content(image)
    except ImagekitError:
        return
    assert found == other


# --- markers and grains ----------------------------------------------------------------------------------------


@given(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 32) - 1))
def test_a_marker_packed_and_parsed_is_the_same(value: int, size: int, kind: int) -> None:
    found = Marker(value, size, kind)
    assert Marker.parse(found.pack()) == found
    assert found.pack() == struct.pack("<QII", value, size, kind)
    assert Marker.parse(marker(value)) == Marker(value, 0, END_OF_STREAM)


@given(st.binary(max_size=2000))
def test_a_stream_inflates_to_at_least_and_at_most(data: bytes) -> None:
    packed = zlib.compress(data)
    assert bytes(inflate(packed, 0, 2000)) == data
    assert bytes(inflate(packed + b"padding", len(data), len(data) or 1)) == data
    with pytest.raises(CorruptImage):
        inflate(packed, len(data) + 1, 2001)
    with pytest.raises(CorruptImage):
        inflate(packed[:-1], 0, 2000)


def test_a_stream_that_goes_on_is_not_read_on() -> None:
    """64 MiB of zeros: what comes out is bounded, whatever goes in."""
    packed = zlib.compress(bytes(64 * MiB), 9)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptImage, match="more than its grain of 8192 bytes"):
            inflate(packed, 0, GRAIN)
        assert tracemalloc.get_traced_memory()[1] < MiB
    finally:
        tracemalloc.stop()


def test_flags_of_a_stream_are_the_two_that_make_it_one() -> None:
    passing = read_stream(piecewise(stream(RECIPE).data, 100))
    assert passing.header.flags & (COMPRESSED | MARKERS) == COMPRESSED | MARKERS
