"""Tables of numbers: stored and read in both orders, and searched."""

from __future__ import annotations

import struct
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from imagekit.formats import words

NUMBERS64 = st.lists(st.integers(0, (1 << 64) - 1) | st.just(0), max_size=40)
NUMBERS32 = st.lists(st.integers(0, (1 << 32) - 1) | st.just(0), max_size=40)


@given(NUMBERS64, st.binary(max_size=7))
def test_words_of_64_bits_are_those_of_struct_in_both_orders(numbers: list[int], rest: bytes) -> None:
    for order, sign in (("big", ">"), ("little", "<")):
        raw = struct.pack(f"{sign}{len(numbers)}Q", *numbers)
        found = words.words64(raw + rest, order)  # type: ignore[arg-type]
        assert found.tolist() == numbers
        assert words.packed(found, order) == raw  # type: ignore[arg-type]
        assert found.tolist() == numbers, "packing changed them"


@given(NUMBERS32)
def test_words_of_32_bits_are_those_of_struct_in_both_orders(numbers: list[int]) -> None:
    for order, sign in (("big", ">"), ("little", "<")):
        raw = struct.pack(f"{sign}{len(numbers)}I", *numbers)
        found = words.words32(memoryview(raw), order)  # type: ignore[arg-type]
        assert found.tolist() == numbers
        assert words.packed(found, order) == raw  # type: ignore[arg-type]


@given(NUMBERS64)
def test_used_entries_are_those_that_are_not_zero(numbers: list[int]) -> None:
    found = words.words64(struct.pack(f"<{len(numbers)}Q", *numbers), "little")
    assert list(words.used(found)) == [at for at, number in enumerate(numbers) if number]
    assert words.is_zero(found.tobytes()) == (not any(numbers))


@given(st.integers(0, 1 << 60), st.integers(0, 9000), st.sampled_from([1, 3, 1 << 20, 1 << 45]))
def test_a_sequence_goes_up_by_its_step_and_is_known_again(first: int, count: int, step: int) -> None:
    found = words.sequence(first, count, step)
    assert (found.typecode, found.tolist()) == ("Q", list(range(first, first + count * step, step)))
    if count:
        assert words.is_sequence(found, step)
    if count > 2:
        assert not words.is_sequence(found, step + 1)
        found[count // 2] += 1
        assert not words.is_sequence(found, step)


def test_a_sequence_can_reach_the_largest_word() -> None:
    top = (1 << 64) - 1
    assert words.sequence(top - 8191, 8192, 1)[-1] == top
    assert words.is_sequence(words.words64(b"\xff" * 8, "little"), 1 << 20)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3))))
def test_differing_entries_are_named(pairs: list[tuple[int, int]]) -> None:
    one, other = [a for a, _ in pairs], [b for _, b in pairs]
    assert list(words.differing(one, other)) == [at for at, (a, b) in enumerate(pairs) if a != b]


@given(st.binary(max_size=40))
def test_bits_of_a_byte_are_counted_from_either_end(raw: bytes) -> None:
    numbers = range(len(raw) * 8)
    assert words.bits(raw, "big") == bytes(ord("0") + (raw[at // 8] >> (7 - at % 8) & 1) for at in numbers)
    assert words.bits(raw, "little") == bytes(ord("0") + (raw[at // 8] >> at % 8 & 1) for at in numbers)
    for order in ("big", "little"):
        assert words.packed_bits(words.bits(raw, order), order) == raw


def test_bits_that_fill_no_byte_are_followed_by_zeros() -> None:
    assert words.packed_bits(bytearray(b"101"), "big") == b"\xa0"
    assert words.packed_bits(bytearray(b"101"), "little") == b"\x05"
    assert words.packed_bits(bytearray(b"0" * 8 + b"1"), "big") == b"\0\x80"


@given(st.sets(st.integers(0, 60)))
def test_stretches_cover_the_numbers_and_never_touch(numbers: set[int]) -> None:
    found = list(words.stretches(sorted(numbers)))
    assert [number for first, count in found for number in range(first, first + count)] == sorted(numbers)
    assert all(one + count < other for (one, count), (other, _) in pairwise(found))
