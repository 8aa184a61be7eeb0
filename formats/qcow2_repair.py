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

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress, groupby
from typing import TYPE_CHECKING

from imagekit.formats.base import Barrier, Change, Write
from imagekit.formats.qcow2 import Qcow2Image
from imagekit.formats.qcow2_check import CopiedFlags, Counting, Found, Window, refuse_unknown
from imagekit.formats.qcow2_claims import COPIED
from imagekit.formats.qcow2_header import AUTOCLEAR_AT, DIRTY, INCOMPATIBLE_AT, KNOWN_AUTOCLEAR
from imagekit.formats.qcow2_refcounts import pack_refcounts, unpack_refcounts
from imagekit.formats.words import packed, stretches, words64

if TYPE_CHECKING:
    from imagekit.formats.words import Words


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
    raised, cleared, lowered, flagged = steps
    largest = (1 << (1 << image.header.refcount_order)) - 1
    low, stored, used = window.low, window.stored, window.used
    differing = window.differences()
    can = array("I", (at for at in differing if used[at] <= largest and counting.refcount_at(low + at) is not None))
    up, down = (array("I", (at for at in can if (used[at] > stored[at]) is more)) for more in (True, False))
    counts = stored[:] if can else stored
    for at in up:
        counts[at] = used[at]
    raised += _refcounts(image, counting, low, up, counts)
    for at in down:
        counts[at] = used[at]
    lowered += _refcounts(image, counting, low, down, counts)
    for flags in counting.copied_flags(window, counts):
        cleared += _flags(image, flags, compress(flags.entries, flags.set), 0)
        flagged += _flags(image, flags, compress(flags.entries, map((0).__eq__, flags.set)), COPIED)
    return len(can) == len(differing)


def _refcounts(
    image: Qcow2Image, counting: Counting, low: int, changed: Sequence[int], counts: Words
) -> Iterator[Write]:
    """A write for each refcount block with changes, from the first of them to the last."""
    order = image.header.refcount_order
    per_byte = max(1, 8 >> order)
    for _, group in groupby(changed, lambda at: (low + at) // counting.per_block):
        part = list(group)
        first = part[0] // per_byte * per_byte
        count = -(-(part[-1] + 1 - first) // per_byte) * per_byte
        offset = counting.refcount_at(low + first)
        assert offset is not None  # only counts that are stored are changed
        length = count << order >> 3
        # Past the file's end, in the last byte, are counts that nobody asked about: they stay.
        numbers = unpack_refcounts(image.file.pread(offset, length).ljust(length, b"\0"), order)
        known = min(count, len(counts) - first)
        numbers[:known] = counts[first : first + known]
        yield Write(offset, pack_refcounts(numbers, order))


def _flags(image: Qcow2Image, flags: CopiedFlags, entries: Iterable[int], value: int) -> Iterator[Write]:
    """The entries with the flag set or cleared; neighbours by one write."""
    parts = stretches(entries) if flags.step == 8 else ((entry, 1) for entry in entries)
    for first, count in parts:
        offset = flags.table + first * flags.step
        words = words64(image.file.pread(offset, count * 8), "big")
        yield Write(offset, packed(array("Q", (word & (COPIED - 1) | value for word in words)), "big"))
