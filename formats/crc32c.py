"""CRC-32C (Castagnoli), the checksum of VHDX: reflected polynomial 0x82F63B78, start and final XOR all ones.

Python's ``zlib`` and ``binascii`` know another polynomial only. Up to a few hundred bytes go through a table, byte
by byte. Longer input is cut into lanes of equal length, which numpy advances side by side, four bytes a step; the
lanes are joined pairwise, as CRC(A + B) = shift(CRC(A), length of B) xor CRC(B) and the shift is linear. Zeros at the
end, most of a VHDX's tables, are such a shift, and cost neither.

Measured on one core: 4 KiB in 0.25 ms, 64 KiB in 0.6 ms, about 250 MB/s from 1 MiB on.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from imagekit.formats.base import Buffer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

POLYNOMIAL = 0x82F63B78
_ONES = 0xFFFFFFFF
_SHORT = 512
"""Up to here the table beats numpy."""


def crc32c(data: Buffer, value: int = 0) -> int:
    """The checksum of ``data``; ``value`` is the checksum of what comes before it."""
    view = memoryview(data).cast("B")
    zeros = len(view)
    if zeros > _SHORT and not view[-1]:
        view = memoryview(bytes(view).rstrip(b"\0"))
    zeros -= len(view)
    crc = value ^ _ONES
    while len(view) > _SHORT:
        # The largest lanes first, then smaller ones for the rest: at most three rounds.
        lane, count = _lanes(len(view))
        part, view = view[: lane * count], view[lane * count :]
        crc = _advance(crc, len(part)) ^ _crc_of_lanes(part, lane, count)
    table = _table()
    for byte in view:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    while zeros:
        lowest = zeros & -zeros
        crc = _advance(crc, lowest)
        zeros ^= lowest
    return crc ^ _ONES


def _lanes(length: int) -> tuple[int, int]:
    """(bytes of a lane, number of lanes): both powers of two, at most 1 MiB together."""
    bits = min(length, 1 << 20).bit_length() - 1
    lane = 1 << min(9, max(2, (bits - 1) // 2))
    return lane, (1 << bits) // lane


def _crc_of_lanes(part: memoryview, lane: int, count: int) -> int:
    """The CRC register after ``part``, started at zero."""
    import numpy as np

    low, high = _wide_tables()
    words = np.ascontiguousarray(np.frombuffer(part, "<u4").reshape(count, lane // 4).T)
    crc = np.zeros(count, dtype=np.uint32)
    for row in words:
        crc ^= row
        crc = low.take(crc & 0xFFFF) ^ high.take(crc >> 16)
    length = lane
    while len(crc) > 1:
        crc = _shift(crc[0::2], length) ^ crc[1::2]
        length *= 2
    return int(crc[0])


@cache
def _table() -> tuple[int, ...]:
    """The register after one byte, for each value of its lowest byte."""
    out = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = (crc >> 1) ^ (POLYNOMIAL if crc & 1 else 0)
        out.append(crc)
    return tuple(out)


@cache
def _wide_tables() -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """The register after four bytes, for each value of its lower and of its upper half."""
    import numpy as np

    one = np.array(_table(), dtype=np.uint32)
    after = [one]
    for _ in range(3):
        after.append(one[after[-1] & 0xFF] ^ (after[-1] >> 8))
    half = np.arange(1 << 16)
    return after[3][half & 0xFF] ^ after[2][half >> 8], after[1][half & 0xFF] ^ after[0][half >> 8]


@cache
def _operator(power: int) -> tuple[int, ...]:
    """The register after 2**power zero bytes, for each of its bits alone."""
    if power == 0:
        table = _table()
        return tuple(table[(1 << bit) & 0xFF] ^ ((1 << bit) >> 8) for bit in range(32))
    half = _operator(power - 1)
    return tuple(_apply(half, value) for value in half)


def _apply(operator: tuple[int, ...], value: int) -> int:
    out = 0
    while value:
        lowest = value & -value
        out ^= operator[lowest.bit_length() - 1]
        value ^= lowest
    return out


def _advance(crc: int, length: int) -> int:
    """The register after ``length`` zero bytes, a power of two."""
    return _apply(_operator(length.bit_length() - 1), crc)


@cache
def _shift_tables(length: int) -> tuple[NDArray[np.uint32], ...]:
    """The register after ``length`` zero bytes, for each value of each of its four bytes."""
    import numpy as np

    operator = _operator(length.bit_length() - 1)
    tables = []
    for place in (0, 8, 16, 24):
        table = np.zeros(256, dtype=np.uint32)
        for bit in range(8):  # linear: what a bit more changes is the same for all values of the bits below
            table[1 << bit : 2 << bit] = table[: 1 << bit] ^ np.uint32(operator[place + bit])
        tables.append(table)
    return tuple(tables)


def _shift(crc: NDArray[np.uint32], length: int) -> NDArray[np.uint32]:
    first, second, third, fourth = _shift_tables(length)
    out: NDArray[np.uint32] = first[crc & 0xFF] ^ second[(crc >> 8) & 0xFF]
    out ^= third[(crc >> 16) & 0xFF] ^ fourth[crc >> 24]
    return out
