"""The vocabulary: extents that join, slots in arrival order, reads that must not come up short."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagekit.errors import CorruptImage
from imagekit.formats.base import (
    Extent,
    FlatLayout,
    SlotMap,
    clip,
    merge_extents,
    read_exactly,
    round_up,
)
from imagekit.formats.files import MemoryFile
from imagekit.formats.raw import RawImage


@st.composite
def neighbours(draw: st.DrawFn) -> list[Extent]:
    """Extents side by side, of few kinds, so that many of them could be one."""
    out, start = [], draw(st.integers(0, 3))
    for length, kind, moved in draw(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3), st.booleans()))):
        offset = None if kind % 2 else start + 100 + 50 * moved
        out.append(Extent(start, length, data=kind < 2, zero=kind >= 2, offset=offset))
        start += length
    return out


@given(neighbours())
def test_merged_extents_say_the_same_of_every_byte_and_none_can_be_joined_further(extents: list[Extent]) -> None:
    def by_byte(some: list[Extent]) -> list[tuple[object, ...]]:
        return [
            (one.start + at, one.data, one.zero, None if one.offset is None else one.offset + at)
            for one in some
            for at in range(one.length)
        ]

    merged = list(merge_extents(extents))
    assert by_byte(merged) == by_byte(extents)
    assert not any(one.joins(other) for one, other in pairwise(merged))


def test_extents_with_a_gap_between_them_are_not_joined() -> None:
    assert not Extent(0, 4, data=False, zero=True).joins(Extent(5, 4, data=False, zero=True))


def test_an_extent_has_the_keys_of_qemu_img_map() -> None:
    with_offset = Extent(0, 512, data=True, zero=False, offset=4096).to_json()
    assert with_offset == {
        "start": 0,
        "length": 512,
        "depth": 0,
        "present": True,
        "zero": False,
        "data": True,
        "compressed": False,
        "offset": 4096,
    }
    assert "offset" not in Extent(0, 512, data=True, zero=False, compressed=True).to_json()


@given(st.integers(0, 1 << 70), st.integers(1, 1 << 40))
def test_rounding_up_gives_the_next_multiple(value: int, unit: int) -> None:
    rounded = round_up(value, unit)
    assert rounded % unit == 0
    assert value <= rounded < value + unit


def test_a_short_read_is_an_error_that_says_what_where_and_how_much() -> None:
    with pytest.raises(CorruptImage, match=r"the BAT is cut short: 8 bytes expected, 6 found .* \(at offset 0x4\)"):
        read_exactly(MemoryFile(bytes(10)), 4, 8, "the BAT")


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [(0, None, (0, 100)), (40, 10, (40, 50)), (90, 50, (90, 100)), (200, 5, (100, 100)), (0, 0, (0, 0))],
)
def test_a_range_is_cut_at_the_end_of_the_disk(start: int, length: int | None, expected: tuple[int, int]) -> None:
    assert clip(start, length, 100) == expected


@pytest.mark.parametrize(("start", "length"), [(-1, None), (0, -1)])
def test_a_negative_range_is_the_callers_mistake(start: int, length: int | None) -> None:
    with pytest.raises(ValueError, match="negative range"):
        clip(start, length, 100)


@pytest.mark.parametrize(("offset", "length", "expected"), [(6, 9, b"6789"), (10, 1, b""), (99, 1, b""), (2, 0, b"")])
def test_a_read_of_the_guests_bytes_ends_where_the_disk_ends(offset: int, length: int, expected: bytes) -> None:
    assert RawImage(MemoryFile(b"0123456789"), 10).pread(offset, length) == expected


# --- slots -----------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 5)), max_size=20))
def test_slots_are_handed_out_in_arrival_order_whatever_the_blocks(arrivals: list[tuple[int, int]]) -> None:
    """Against a plain dictionary. A run that repeats a block is refused, and changes nothing."""
    slots, expected = SlotMap(), dict[int, int]()
    for first, count in arrivals:
        blocks = range(first, first + count)
        if any(block in expected for block in blocks):
            with pytest.raises(ValueError, match="has a slot already"):
                slots.add(first, count)
        else:
            assert slots.add(first, count) == len(expected)
            expected.update({block: len(expected) + at for at, block in enumerate(blocks)})
        assert slots.count == len(expected)
    assert {block: slot for block in range(50) if (slot := slots.get(block)) is not None} == expected
    spread = {first + at: slot + at for first, count, slot in slots.runs() for at in range(count)}
    assert spread == expected
    assert [first for first, _, _ in slots.runs()] == sorted(first for first, _, _ in slots.runs())


def test_blocks_that_arrive_in_order_share_one_run() -> None:
    """Memory follows fragmentation: a disk of a million blocks written in order is one entry."""
    slots = SlotMap()
    for block in range(5, 1005):
        slots.add(block)
    assert list(slots.runs()) == [(5, 1000, 0)]


def test_slots_in_bulk_and_one_by_one_are_the_same() -> None:
    one_by_one = SlotMap()
    for block in (3, 4, 5, 9, 10):
        one_by_one.add(block)
    assert list(SlotMap([(3, 3), (9, 2)]).runs()) == list(one_by_one.runs())


def test_in_a_flat_layout_every_block_has_its_own_place_and_the_trailer_is_last() -> None:
    layout = FlatLayout(1000, 512, b"trailer")
    assert (layout.place(0), layout.place(7)) == (0, 3584)
    assert layout.file_size == 1007
    assert list(layout.metadata()) == [(1000, b"trailer")]
    assert list(FlatLayout(1000, 512).metadata()) == []
