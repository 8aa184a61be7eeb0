"""Repairs of a qcow2 that are certain: refcounts, copied flags and the dirty bit.

How often a cluster is used is what the tables say, so a stored refcount that differs can be put right: a leak is
freed, a count that is too low is raised. The copied flags follow. None of it changes what a guest reads.

Design notes
- Where anything else is wrong (a pointer that leads nowhere, two uses of one place by metadata) the tables do not say
  all that is used, and freeing what seems unused could lose it for good: then nothing is done.
- The steps come in an order that leaves a program which finds the image half mended no worse off: counts are raised
  first, then copied flags go where a cluster is shared, then counts are lowered, then flags are set, and the dirty
  bit goes last, when every count is right.

Not here: refcount blocks that are missing, counts that do not fit their width, QEMU's mark that an image is corrupt.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from imagekit.formats.base import Barrier, Change, Write
from imagekit.formats.qcow2 import Qcow2Image
from imagekit.formats.qcow2_check import CopiedFlags, Counting, Found, Window, refuse_unknown, unpack_refcounts
from imagekit.formats.qcow2_claims import COPIED
from imagekit.formats.qcow2_header import AUTOCLEAR_AT, DIRTY, INCOMPATIBLE_AT, KNOWN_AUTOCLEAR

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from imagekit.formats.qcow2_check import Counts


def repair(image: Qcow2Image) -> list[Change]:
    """The changes, none where nothing is wrong or the damage is of another kind."""
    refuse_unknown(image)
    header, found = image.header, Found()
    counting = Counting(image, found)
    steps: tuple[list[Change], ...] = ([], [], [], [])
    exact = True
    for window in counting.windows():
        counting.report_overlap(window)
        exact &= _mend(image, counting, window, steps)
    if found.damaged:
        return []
    changes: list[Change] = []
    for step in steps:
        changes += [*step, Barrier()] if step else []
    if exact and header.incompatible & DIRTY:
        changes += [_word(INCOMPATIBLE_AT, header.incompatible & ~DIRTY), Barrier()]
    if changes and header.autoclear & ~KNOWN_AUTOCLEAR:
        # Who does not know a feature that must be kept in step says so before writing.
        changes[:0] = [_word(AUTOCLEAR_AT, header.autoclear & KNOWN_AUTOCLEAR), Barrier()]
    return changes


def _word(offset: int, value: int) -> Write:
    return Write(offset, value.to_bytes(8, "big"))


def _mend(image: Qcow2Image, counting: Counting, window: Window, steps: tuple[list[Change], ...]) -> bool:
    """Add what puts a window right to the four steps; whether all of it is right then."""
    import numpy as np

    raised, cleared, lowered, flagged = steps
    largest = (1 << (1 << image.header.refcount_order)) - 1
    can = counting.has_refcount(window) & (window.used <= np.uint64(largest))
    right = np.where(can, window.used, window.stored)
    between = np.maximum(window.stored, right)
    raised += _refcounts(image, counting, window.low, window.stored, between)
    lowered += _refcounts(image, counting, window.low, between, right)
    for flags in counting.copied_flags(window, right):
        cleared += _flags(image, flags, flags.entries[flags.set], 0)
        flagged += _flags(image, flags, flags.entries[~flags.set], COPIED)
    return bool((right == window.used).all())


def _refcounts(image: Qcow2Image, counting: Counting, low: int, old: Counts, new: Counts) -> Iterator[Write]:
    """A write for each refcount block with changes, from the first of them to the last."""
    import numpy as np

    order = image.header.refcount_order
    per_byte = max(1, 8 >> order)
    changed = np.flatnonzero(old != new)
    borders = np.flatnonzero(np.diff((changed + low) // counting.per_block)) + 1
    for part in np.split(changed, borders) if len(changed) else ():
        first = int(part[0]) // per_byte * per_byte
        count = -(-(int(part[-1]) + 1 - first) // per_byte) * per_byte
        offset = counting.refcount_at(low + first)
        length = count << order >> 3
        # Past the file's end, in the last byte, are counts that nobody asked about: they stay.
        numbers = unpack_refcounts(image.file.pread(offset, length).ljust(length, b"\0"), order)
        numbers[: len(new) - first] = new[first : first + count]
        yield Write(offset, pack_refcounts(numbers, order))


def _flags(image: Qcow2Image, flags: CopiedFlags, entries: NDArray[np.int64], value: int) -> Iterator[Write]:
    """The entries with the flag set or cleared; neighbours by one write."""
    import numpy as np

    joined = flags.step == 8
    borders = np.flatnonzero(np.diff(entries) != 1) + 1 if joined else np.arange(1, len(entries))
    for part in np.split(entries, borders) if len(entries) else ():
        offset = flags.table + int(part[0]) * flags.step
        words = np.frombuffer(image.file.pread(offset, len(part) * 8), ">u8").astype(np.uint64)
        mended = (words & np.uint64(COPIED - 1)) | np.uint64(value)
        yield Write(offset, mended.astype(">u8").tobytes())


def pack_refcounts(numbers: Counts, order: int) -> bytes:
    """The inverse of :func:`unpack_refcounts`; a whole number of bytes."""
    import numpy as np

    if order >= 3:
        return numbers.astype(f">u{1 << (order - 3)}").tobytes()
    width = 1 << order
    bits = (numbers[:, None] >> np.arange(width, dtype=np.uint64)) & np.uint64(1)
    return np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little").tobytes()
