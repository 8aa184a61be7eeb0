"""Tables of numbers, as image formats store them: big- or little-endian words of 32 or 64 bits.

A table is an ``array`` of the host's own integers (``I`` or ``Q``), made and stored in one step. What is looked for
in one is found by iterators that run in C (``itertools``, ``operator``): some 50 ns an entry, next to nothing where
it is zero. numpy would be faster, but for the time it takes to load: most images have less than a million entries.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress, groupby
from operator import ne, sub
from typing import TYPE_CHECKING, Literal, TypeAlias

from imagekit.formats.base import Buffer

if TYPE_CHECKING:
    Words: TypeAlias = array[int]

Order: TypeAlias = Literal["big", "little"]


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


def is_zero(raw: bytes) -> bool:
    """Whether there is nothing but zero bytes: at the speed of a comparison of memory."""
    return raw == bytes(len(raw))


def used(words: Sequence[int]) -> Iterator[int]:
    """Indexes of the entries that are not zero."""
    return compress(range(len(words)), words)


def differing(one: Sequence[int], other: Sequence[int]) -> Iterator[int]:
    """Indexes of the entries that are not the same in both, which are equally long."""
    return compress(range(len(one)), map(ne, one, other))


def stretches(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of the runs of consecutive numbers, of ascending ones."""
    listed = list(numbers)
    at = 0
    for _, group in groupby(map(sub, listed, range(len(listed)))):
        count = sum(1 for _ in group)
        yield listed[at], count
        at += count
