"""The refcounts that a qcow2 stores: unpacked, packed, and compared with how often clusters are used.

Follows QEMU's docs/interop/qcow2.txt, "Host cluster management": big-endian numbers of 1 to 64 bits.

Where all clusters of a stretch are used the same number of times, what is stored of them is compared as bytes.

Not here: where refcounts lie (qcow2_check.py).
"""

from __future__ import annotations

import sys
from array import array
from functools import lru_cache
from typing import TYPE_CHECKING

from imagekit.formats.words import is_zero, words32, words64

if TYPE_CHECKING:
    from imagekit.formats.words import Words

PIECE = 1 << 12
"""Clusters whose counts are compared with the stored ones at once."""


@lru_cache(maxsize=4)
def alike(value: int, number: int) -> Words:
    """The same number many times; not to be changed."""
    return array("Q", [value]) * number


@lru_cache(maxsize=4)
def _stored_alike(value: int, number: int, order: int) -> bytes:
    """Refcounts that are all the same, as they are stored; nothing where they cannot be."""
    if value >> (1 << order):
        return b""
    per_byte = max(1, 8 >> order)
    return pack_refcounts(array("Q", [value]) * per_byte, order) * (number // per_byte)


def compared(used: Words, stored: Words, raw: bytes, order: int, first: int, end: int) -> Words:
    """``stored`` with the refcounts of some clusters, a copy of ``used`` as soon as these differ."""
    zero = is_zero(raw)
    for at in range(first, end, PIECE):
        number = min(PIECE, end - at)
        part = used[at : at + number]
        same = part == alike(part[0], number)
        if zero:
            if same and not part[0]:
                continue
            numbers = alike(0, number)
        else:
            piece = raw[(at - first << order) // 8 : -(-(at - first + number << order) // 8)]
            if same and piece == _stored_alike(part[0], number, order):
                continue
            numbers = unpack_refcounts(piece, order)[:number]
        if numbers != part:
            stored = used[:] if stored is used else stored
            stored[at : at + number] = numbers
    return stored


def unpack_refcounts(raw: bytes, order: int) -> Words:
    """Refcounts of 2^order bits as integers; those below a byte begin with its least significant bits."""
    if order >= 5:
        return array("Q", words32(raw, "big")) if order == 5 else words64(raw, "big")
    if order == 4:
        numbers = array("H", raw)
        if sys.byteorder == "little":
            numbers.byteswap()
        return array("Q", numbers)
    width, per_byte = 1 << order, 8 >> order
    out = bytearray(len(raw) * per_byte)
    for at in range(per_byte):
        out[at::per_byte] = raw.translate(_parts(at * width, width))
    return array("Q", list(out))


def pack_refcounts(numbers: Words, order: int) -> bytes:
    """The inverse of :func:`unpack_refcounts`; a whole number of bytes."""
    if order >= 3:
        stored = array("BHIQ"[order - 3], numbers)
        if sys.byteorder == "little":
            stored.byteswap()
        return stored.tobytes()
    width, per_byte = 1 << order, 8 >> order
    out = 0
    for at in range(per_byte):
        out |= int.from_bytes(bytes(list(numbers[at::per_byte])), "little") << at * width
    return out.to_bytes(len(numbers) // per_byte, "little")


@lru_cache(maxsize=16)
def _parts(shift: int, width: int) -> bytes:
    return bytes(byte >> shift & (1 << width) - 1 for byte in range(256))
