"""L2 tables of qcow2, decoded: what each cluster or subcluster is and where it lies.

Follows QEMU's docs/interop/qcow2.txt, "Cluster mapping" and "Extended L2 Entries". A table is decoded as a whole into
runs of one kind; entries that no sound image has are CorruptImage.

With an external data file the offsets are those of that file, and an offset of 0 with the copied flag is a place.
That they must be the guest's own offsets is for the reader to see: a table does not know where in the disk it is.

Design notes
- Each entry is made a byte that says what kind it is, and each offset is compared with its neighbour's, for all
  entries of a table at once: by bytes.translate, and by adding and comparing numbers as long as the table.
- Where all entries are the same (a disk of zeros) one comparison of memory finds it.
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from itertools import compress, groupby, repeat
from operator import and_
from typing import TYPE_CHECKING, NamedTuple

from imagekit.errors import CorruptImage
from imagekit.formats.base import File
from imagekit.formats.qcow2_header import Qcow2Header
from imagekit.formats.words import used, words64

if TYPE_CHECKING:
    from imagekit.formats.words import Words

OFFSET_MASK = 0x00FFFFFFFFFFFE00
COPIED_FLAG = 1 << 63
COMPRESSED_FLAG = 1 << 62
ZERO_FLAG = 1

UNALLOCATED, ZERO, PLAIN, COMPRESSED = range(4)
MIXED = 4
"""A cluster whose subclusters are of several kinds; only inside a decoded table."""
SUBCLUSTERS = 32

HAS_PLACE, HAS_ZERO, IS_COMPRESSED, IS_COPIED, IS_RESERVED = (1 << bit for bit in range(5))
"""What the byte that stands for an entry says; a compressed one has only that and the copied flag for certain."""

_ALL = (1 << SUBCLUSTERS) - 1
_BITMAPS = {0: UNALLOCATED, _ALL: PLAIN, _ALL << SUBCLUSTERS: ZERO}


def translation(meaning: Callable[[int], int]) -> bytes:
    """A table for bytes.translate."""
    return bytes(map(meaning, range(256)))


def _top(byte: int) -> int:
    return IS_COPIED * (byte >> 7) | IS_COMPRESSED * (byte >> 6 & 1) | IS_RESERVED * (byte & 0x3F != 0)


_BYTES = (
    translation(_top),
    *[translation(bool)] * 5,
    translation(lambda byte: HAS_PLACE * (byte > 1) | IS_RESERVED * (byte & 1)),
    translation(lambda byte: HAS_ZERO * (byte & 1) | IS_RESERVED * (byte > 1)),
)
"""What each byte of an entry adds to the byte that stands for it."""


def compressed_offset_mask(header: Qcow2Header) -> int:
    """The bits of a compressed cluster's descriptor that say where its stream starts; above them is its length."""
    return (1 << (62 - (header.cluster_bits - 8))) - 1


def entry_marks(raw: bytes, step: int) -> bytes:
    """A byte for each of the entries, ``step`` bytes long, of a table."""
    marks = 0
    for at, table in enumerate(_BYTES):
        marks |= int.from_bytes(raw[at::step].translate(table), "little")
    return marks.to_bytes(len(raw) // step, "little")


def entry_runs(kinds: bytes, raw: bytes, header: Qcow2Header, split: bytes) -> list[int]:
    """The entries that runs begin with: of one kind, and those of a kind in ``split`` of places that go on."""
    number = int.from_bytes(kinds, "big")
    borders = {0, *used((number ^ number >> 8).to_bytes(len(kinds), "big"))}
    if any(kind in kinds for kind in split):
        borders.update(_cuts(raw, header, kinds.translate(_one_of(split))))
    return sorted(borders)


@cache
def _one_of(kinds: bytes) -> bytes:
    return translation(lambda kind: kind in kinds)


@lru_cache(maxsize=16)
def _lanes(value: int, step: int, count: int) -> int:
    """A number as long as a table, with the same first word in each entry."""
    return int.from_bytes((value.to_bytes(8, "big") + bytes(step - 8)) * count, "big")


def _cuts(raw: bytes, header: Qcow2Header, chosen: bytes) -> Iterator[int]:
    """Those of the chosen entries that do not lie a cluster behind the one before, ascending."""
    step = header.l2_entry_size
    count = len(raw) // step
    # Offsets end far below the top of their words: no sum carries into the next.
    places = int.from_bytes(raw, "big") & _lanes(OFFSET_MASK, step, count)
    expected = (places >> step * 8) + _lanes(header.cluster_size, step, count)
    differences = words64((places ^ expected).to_bytes(len(raw), "big"), sys.byteorder)
    return compress(used(chosen), compress(differences[:: step // 8], chosen))


class L2(NamedTuple):
    """One decoded L2 table, as runs of clusters of one kind."""

    starts: Words
    """The clusters that runs begin with, and one more for the end."""
    kinds: bytes
    offsets: Words
    """Where plain runs lie."""
    descriptors: Words
    """One a cluster, where any are needed: of compressed and mixed ones."""
    bitmaps: Words
    """One a cluster, with extended L2 entries."""
    cluster_size: int
    extended: bool

    def runs(self, first: int, last: int) -> Iterator[tuple[int, int, int, int]]:
        """(first, end, kind, offset of plain ones) of clusters, or of subclusters with extended L2 entries."""
        return self._subcluster_runs(first, last) if self.extended else self._cluster_runs(first, last)

    def _cluster_runs(self, first: int, last: int) -> Iterator[tuple[int, int, int, int]]:
        starts, kinds = self.starts, self.kinds
        at = bisect_right(starts, first) - 1
        while first < last:
            end, kind = min(starts[at + 1], last), kinds[at]
            offset = self.offsets[at] + (first - starts[at]) * self.cluster_size if kind == PLAIN else 0
            yield first, end, kind, offset
            first = end
            at += 1

    def _subcluster_runs(self, first: int, last: int) -> Iterator[tuple[int, int, int, int]]:
        """The same, with parts of clusters put together where they go on."""
        unit = self.cluster_size // SUBCLUSTERS
        start, edge, kind, offset = first, first, UNALLOCATED, 0
        for one, end, other, place in self._parts(first // SUBCLUSTERS, -(-last // SUBCLUSTERS)):
            begin, stop = max(one, first), min(end, last)
            if begin >= stop:
                continue
            at = place + (begin - one) * unit
            if other != kind or (kind == PLAIN and at != offset + (begin - start) * unit):
                if edge > start:
                    yield start, edge, kind, offset
                start, kind, offset = begin, other, at
            edge = stop
        if edge > start:
            yield start, edge, kind, offset

    def _parts(self, first: int, last: int) -> Iterator[tuple[int, int, int, int]]:
        unit = self.cluster_size // SUBCLUSTERS
        for one, end, kind, offset in self._cluster_runs(first, last):
            if kind != MIXED:
                yield one * SUBCLUSTERS, end * SUBCLUSTERS, kind, offset
                continue
            for cluster in range(one, end):
                place, base = self.descriptors[cluster] & OFFSET_MASK, cluster * SUBCLUSTERS
                for start, stop, part in _bitmap_runs(self.bitmaps[cluster]):
                    yield base + start, base + stop, part, place + start * unit


@lru_cache(maxsize=4096)
def _bitmap_runs(bitmap: int) -> tuple[tuple[int, int, int], ...]:
    """(first, end, kind) of the subclusters: bit i of the low half is allocated, of the high half zero."""
    kinds = [
        PLAIN if bitmap >> at & 1 else ZERO if bitmap >> (at + SUBCLUSTERS) & 1 else UNALLOCATED
        for at in range(SUBCLUSTERS)
    ]
    found, at = [], 0
    for kind, group in groupby(kinds):
        end = at + len(list(group))
        found.append((at, end, kind))
        at = end
    return tuple(found)


def decode_l2(raw: bytes, header: Qcow2Header, file: File, at: int) -> L2:
    """``raw`` is the table, a cluster read at ``at`` of the file."""
    step = header.l2_entry_size
    count = len(raw) // step
    if raw == raw[:step] * count:
        word = int.from_bytes(raw[:step], "big")
        if word == 0 or (word == ZERO_FLAG and header.version > 2 and not header.extended_l2):
            return _alike(word, count, header.cluster_size, header.extended_l2)
    marks, words = entry_marks(raw, step), words64(raw, "big")
    descriptors, bitmaps = (words[::2], words[1::2]) if header.extended_l2 else (words, array("Q"))
    _check_compressed(marks, descriptors, header, file, at)
    if header.extended_l2:
        kinds = _extended_kinds(marks, descriptors, bitmaps, header, file, at)
    else:
        kinds = marks.translate(_kinds(header.external_data))
        if header.version == 2 and ZERO in kinds:
            raise CorruptImage(
                "an L2 entry has the zero flag, which version 2 does not have",
                path=file.name,
                offset=at + kinds.index(ZERO) * 8,
            )
    starts = array("I", entry_runs(kinds, raw, header, bytes([PLAIN])))
    found = bytes(map(kinds.__getitem__, starts))
    offsets = array("Q", map(and_, map(descriptors.__getitem__, starts), repeat(OFFSET_MASK)))
    starts.append(count)
    for index, kind in enumerate(found):
        if kind == PLAIN:
            _check_plain(offsets[index], starts[index], starts[index + 1], header, file, at)
        elif kind == MIXED:
            for cluster in range(starts[index], starts[index + 1]):
                if bitmaps[cluster] & _ALL:
                    _check_plain(descriptors[cluster] & OFFSET_MASK, cluster, cluster + 1, header, file, at)
    if COMPRESSED not in kinds and MIXED not in kinds:
        descriptors, bitmaps = array("Q"), array("Q")
    return L2(starts, found, offsets, descriptors, bitmaps, header.cluster_size, header.extended_l2)


@lru_cache(maxsize=8)
def _alike(word: int, count: int, cluster_size: int, extended: bool) -> L2:
    """A table of nothing, or of nothing but zeros."""
    kind = ZERO if word else UNALLOCATED
    return L2(array("I", [0, count]), bytes([kind]), array("Q", [0]), array("Q"), array("Q"), cluster_size, extended)


@cache
def _kinds(external: bool) -> bytes:
    """The kind of an entry by its marks. With an external data file the copied flag alone says it has a place."""
    placed = HAS_PLACE | IS_COPIED * external

    def kind(mark: int) -> int:
        if mark & IS_COMPRESSED:
            return COMPRESSED
        return ZERO if mark & HAS_ZERO else PLAIN if mark & placed else UNALLOCATED

    return translation(kind)


def _extended_kinds(
    marks: bytes, descriptors: Words, bitmaps: Words, header: Qcow2Header, file: File, at: int
) -> bytes:
    placed = HAS_PLACE | IS_COPIED * header.external_data
    kinds = bytearray(map(_BITMAPS.get, bitmaps, repeat(MIXED)))
    for entry, (mark, bitmap) in enumerate(zip(marks, bitmaps, strict=True)):
        if mark & IS_COMPRESSED:
            kinds[entry] = COMPRESSED
        elif mark & HAS_ZERO or bitmap & bitmap >> SUBCLUSTERS or (bitmap & _ALL and not mark & placed):
            raise CorruptImage(
                "an extended L2 entry contradicts its bitmap",
                path=file.name,
                offset=at + entry * 16,
            )
    return bytes(kinds)


def _check_plain(place: int, first: int, end: int, header: Qcow2Header, file: File, at: int) -> None:
    """Entries that lie one behind the other from ``place`` on."""
    cluster = header.cluster_size
    entry = end
    if place % cluster:
        entry = first
    elif not header.external_data and place + (end - first - 1) * cluster >= file.size:
        # A file may end inside its last cluster, where the guest's disk ends too: checked when that is read.
        entry = first + max(0, -(-(file.size - place) // cluster))
    if entry < end:
        place += (entry - first) * cluster
        raise CorruptImage(
            f"an L2 entry points to {place:#x}: not on a cluster or behind the file's end {file.size:#x}",
            hint="the file looks damaged or truncated; fetch it again and compare its checksum",
            path=file.name,
            offset=at + entry * header.l2_entry_size,
        )


_COMPRESSED_MARKS = translation(lambda mark: int(mark & IS_COMPRESSED != 0))


def _check_compressed(marks: bytes, descriptors: Words, header: Qcow2Header, file: File, at: int) -> None:
    compressed = marks.translate(_COMPRESSED_MARKS)
    if 1 not in compressed:
        return
    if header.external_data:
        raise CorruptImage(
            "a compressed cluster in an image whose data lies in another file",
            path=file.name,
            offset=at + compressed.index(1) * header.l2_entry_size,
        )
    # A stream may end before its last sector does, so only where it starts can be judged here.
    mask = compressed_offset_mask(header)
    if max(map(and_, compress(descriptors, compressed), repeat(mask))) < file.size:
        return
    entry = next(at for at in used(compressed) if descriptors[at] & mask >= file.size)
    raise CorruptImage(
        f"a compressed cluster starts at {descriptors[entry] & mask:#x}, behind the file's end {file.size:#x}",
        hint="the file looks damaged or truncated; fetch it again and compare its checksum",
        path=file.name,
        offset=at + entry * header.l2_entry_size,
    )
