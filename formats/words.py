"""Tables of numbers, as image formats store them: big- or little-endian words of 32 or 64 bits.

A table is an ``array`` of the host's own integers (``I`` or ``Q``), made and stored in one step. What is looked for
in one is found by iterators that run in C (``itertools``, ``operator``): 40 to 160 ns an entry, next to nothing
where it is zero. numpy would be faster, but for the time it takes to load: most images have fewer than a million.
"""

from __future__ import annotations

import functools
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import compress, groupby
from operator import ne, sub
from typing import TYPE_CHECKING, Literal, TypeAlias

from imagekit.formats.base import Buffer

if TYPE_CHECKING:
    Words: TypeAlias = array[int]

Order: TypeAlias = Literal["big", "little"]

_PIECE = 4096
"""Words that are made by one calculation."""


def words32(raw: Buffer, order: Order) -> Words:
    """The whole words of 32 bits in ``raw``."""
    return _words("I", raw, order)


def words64(raw: Buffer, order: Order) -> Words:
    """The whole words of 64 bits in ``raw``."""
    return _words("Q", raw, order)


def _words(code: Literal["I", "Q"], raw: Buffer, order: Order) -> Words:
    words = array(code)
    view = memoryview(raw).cast("B")
    words.frombytes(view[: len(view) - len(view) % words.itemsize])
    if order != sys.byteorder:
        words.byteswap()
    return words


def packed(words: Words, order: Order) -> bytes:
    """The words as they are stored."""
    if order != sys.byteorder:
        words = words[:]
        words.byteswap()
    return words.tobytes()


def sequence(first: int, count: int, step: int) -> Words:
    """``count`` words of 64 bits from ``first`` on, each ``step`` more than the one before."""
    words, whole = array("Q"), count - count % _PIECE
    if whole:  # many at a time, as the digits of one large number
        ones, numbers = _pieces()
        for at in range(0, whole, _PIECE):
            piece = numbers * step + ones * (first + at * step)
            words.frombytes(piece.to_bytes(_PIECE * words.itemsize, sys.byteorder))
    words.extend(range(first + whole * step, first + count * step, step))
    return words


@functools.cache
def _pieces() -> tuple[int, int]:
    """A piece of words that are all 1, and one of 0, 1, 2, 3 and so on."""
    ones, numbers = array("Q", [1]) * _PIECE, array("Q", range(_PIECE))
    return int.from_bytes(ones, sys.byteorder), int.from_bytes(numbers, sys.byteorder)


def is_sequence(words: Words, step: int) -> bool:
    """Whether each of the words of 64 bits, one at least, is ``step`` more than the one before."""
    first, count = words[0], len(words)
    return words[-1] == first + (count - 1) * step and words == sequence(first, count, step)


def is_zero(raw: bytes) -> bool:
    """Whether there is nothing but zero bytes: at the speed of a comparison of memory."""
    return raw == bytes(len(raw))


def used(words: Sequence[int]) -> Iterator[int]:
    """Indexes of the entries that are not zero."""
    return compress(range(len(words)), words)


def differing(one: Sequence[int], other: Sequence[int]) -> Iterator[int]:
    """Indexes of the entries that are not the same in both, which are equally long."""
    return compress(range(len(one)), map(ne, one, other))


def bits(raw: bytes, order: Order) -> bytearray:
    """The bits as digits, ``0`` and ``1``: those of a byte from the highest on (big) or from the lowest on."""
    ordered = raw if order == "big" else raw.translate(_reversed())
    return bytearray(f"{int.from_bytes(ordered, 'big'):0{len(raw) * 8}b}" if raw else "", "ascii")


def packed_bits(digits: bytearray, order: Order) -> bytes:
    """Such digits as whole bytes, the last one filled up with zeros."""
    length = -(-len(digits) // 8)
    raw = int(digits.ljust(length * 8, b"0") or b"0", 2).to_bytes(length, "big")
    return raw if order == "big" else raw.translate(_reversed())


@cache
def _reversed() -> bytes:
    """Each byte with its bits the other way round."""
    return bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def stretches(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of the runs of consecutive numbers, of ascending ones."""
    listed = list(numbers)
    at = 0
    for _, group in groupby(map(sub, listed, range(len(listed)))):
        count = sum(1 for _ in group)
        yield listed[at], count
        at += count
