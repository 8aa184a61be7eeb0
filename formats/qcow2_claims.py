"""What a qcow2 claims in its file: the walk that the check and ``ranges()`` share.

Follows QEMU's docs/interop/qcow2.txt: "Host cluster management", "Cluster mapping", "Snapshots", "Bitmaps".

A claim is a set of byte ranges of one kind. The walk states them and what is wrong with the pointers it meets; a
pointer that cannot be followed is reported and not followed. Each L2 table is read once a walk, however many L1
entries lead to it, so the work follows the file's size and not what its tables say.

Not here: refcounts (qcow2_check.py).
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from heapq import merge
from itertools import compress, count, groupby, islice, repeat
from operator import add, and_, lt, mul, sub
from typing import TYPE_CHECKING, NamedTuple, Protocol

from imagekit.formats.base import MiB, Range, round_up
from imagekit.formats.qcow2_header import MAX_L1_BYTES, MAX_REFCOUNT_BYTES
from imagekit.formats.qcow2_l2 import (
    HAS_PLACE,
    HAS_ZERO,
    IS_COMPRESSED,
    IS_COPIED,
    IS_RESERVED,
    ZERO_FLAG,
    entry_marks,
    entry_runs,
    translation,
)
from imagekit.formats.qcow2_snapshots import MAX_SNAPSHOT_BYTES, SNAPSHOT
from imagekit.formats.words import used, words64

if TYPE_CHECKING:
    from imagekit.formats.qcow2 import Qcow2Image
    from imagekit.formats.words import Words

# Bits that the specification reserves in the entries of each table.
L1_RESERVED = 0x7F000000000001FF
L2_RESERVED = 0x3F000000000001FE
REFCOUNT_RESERVED = 0xFF000000000001FF  # the upper byte belongs to the offset; no file reaches that far
COPIED = 1 << 63
COMPRESSED = 1 << 62
OFFSET = 0x00FFFFFFFFFFFE00

MAX_DIRECTORY_BYTES = 64 * MiB
MAX_CRYPTO_BYTES = 64 * MiB

KEPT_BYTES = 16 * MiB
"""What the L2 tables take that are kept once they were read; others are read again."""
SORTED = 1 << 18
"""Numbers that are sorted at once, as a list: each takes five times the bytes it has in an array."""

_BITMAP = struct.Struct(">QIIBBHI")


class Report(Protocol):
    """Takes what is wrong: entries of a table by index, each with the file offset of the entry."""

    def __call__(self, code: str, what: Callable[[int], str], entries: Sequence[int], at: int, step: int) -> None: ...


def ignore(code: str, what: Callable[[int], str], entries: Sequence[int], at: int, step: int) -> None:
    """A report to nobody."""


class Claim(NamedTuple):
    """Byte ranges of one kind and length."""

    kind: str
    offsets: Sequence[int]
    length: int


class Pointers(NamedTuple):
    """Where the entries of a table lead, of those that lead to where something can be."""

    entries: Words
    offsets: Words


class L2Table(NamedTuple):
    """The clusters an L2 table points to: plain ones (or zero with a place kept), and compressed spans.

    Plain ones come in runs of entries whose places follow one another and whose copied flags are the same.
    """

    entries: Words
    counts: Words
    places: Words
    copied: bytes
    compressed: Words
    lengths: Words


NO_CLUSTERS = L2Table(array("I"), array("I"), array("Q"), b"", array("Q"), array("I"))


@cache
def _chosen(all_of: int, none_of: int = 0) -> bytes:
    """The entries with all of some marks and none of others."""
    return translation(lambda mark: int(mark & all_of == all_of and not mark & none_of))


_PLACED = translation(
    lambda mark: 0 if mark & IS_COMPRESSED or not mark & HAS_PLACE else 2 if mark & IS_COPIED else 1
)


def ascending(numbers: Sequence[int]) -> bool:
    """Whether each is larger than the one before."""
    return all(map(lt, numbers, islice(numbers, 1, None)))


def in_order(numbers: Words) -> Words:
    """The numbers sorted."""
    if ascending(numbers):
        return numbers
    parts = (array(numbers.typecode, sorted(numbers[at : at + SORTED])) for at in range(0, len(numbers), SORTED))
    return array(numbers.typecode, merge(*parts))


def counted(numbers: Words) -> tuple[Words, Words]:
    """Each number once, sorted, and how often it is there."""
    if ascending(numbers):
        return numbers, array("I", [1]) * len(numbers)
    unique, times = array("Q"), array("I")
    for number, group in groupby(in_order(numbers)):
        unique.append(number)
        times.append(sum(1 for _ in group))
    return unique, times


class Walk:
    """One pass over an image's metadata. The arrays it keeps are as large as the L1 tables."""

    def __init__(self, image: Qcow2Image, report: Report = ignore) -> None:
        self.image = image
        self.file = image.file
        self.size = image.file.size
        self.header = image.header
        self.cluster = image.header.cluster_size
        self.own_data = not image.header.external_data
        self._report = report
        self._kept: dict[int, L2Table] = {}
        self._room = KEPT_BYTES
        self.refcount_blocks = self._refcount_blocks()
        """Where the refcount blocks lie; None when there is no table that could say it."""
        self.l1, self.l1_pointers = self._l1_table(image.header.l1_offset, image.header.l1_size)
        """The active L1 table as stored, and where its entries lead."""
        self._snapshots_end, self._snapshot_tables = self._snapshots()

    def _one(self, code: str, what: str, at: int) -> None:
        self._report(code, lambda _: what, [0], at, 0)

    def _region(self, kind: str, offset: int, length: int, limit: int) -> bool:
        """Whether a table that starts on a cluster can be read."""
        if offset % self.cluster:
            self._one("unaligned", f"the {kind} lies at {offset:#x}, not on a cluster", offset)
        elif length > limit:
            self._one("too-large", f"the {kind} has {length} bytes, at most {limit}", offset)
        elif offset + length > self.size:
            end = offset + length
            self._one("outside", f"the {kind} ends at {end:#x}, behind the file's end {self.size:#x}", offset)
        else:
            return True
        return False

    def _words(self, offset: int, length: int) -> Words:
        return words64(self.file.pread(offset, length).ljust(length, b"\0"), "big")

    def _pointers(self, kind: str, words: Words, at: int, *, reserved: int, partial: bool = False) -> Pointers:
        entries, stored = array("I", used(words)), array("Q", compress(words, words))
        self._reserved(kind, words, array("I", compress(entries, map(and_, stored, repeat(reserved)))), at, 8)
        offsets = array("Q", map(and_, stored, repeat(OFFSET)))
        if not all(offsets):
            entries, offsets = array("I", compress(entries, offsets)), array("Q", filter(None, offsets))
        inside = round_up(self.size, self.cluster) if partial else self.size
        most = inside - self.cluster
        unaligned = array("I", compress(entries, map(and_, offsets, repeat(self.cluster - 1))))
        outside = array("I")
        if max(offsets, default=0) > most:
            pairs = zip(entries, offsets, strict=True)
            outside = array("I", (entry for entry, offset in pairs if offset > most and not offset % self.cluster))
        self._misplaced(kind, words, unaligned, outside, at, 8)
        if unaligned or outside:
            right = [offset <= most and not offset % self.cluster for offset in offsets]
            entries, offsets = array("I", compress(entries, right)), array("Q", compress(offsets, right))
        return Pointers(entries, offsets)

    def _reserved(self, kind: str, words: Words, entries: Sequence[int], at: int, step: int) -> None:
        self._report(
            "reserved-bits",
            lambda entry: f"{kind} {entry} ({words[entry]:#x}) has reserved bits set",
            entries,
            at,
            step,
        )

    def _misplaced(
        self, kind: str, words: Words, unaligned: Sequence[int], outside: Sequence[int], at: int, step: int
    ) -> None:
        def points(entry: int) -> str:
            return f"{kind} {entry} points to {words[entry] & OFFSET:#x}"

        self._report("unaligned", lambda entry: f"{points(entry)}, not on a cluster", unaligned, at, step)
        self._report("outside", lambda entry: f"{points(entry)}, behind the file's end", outside, at, step)

    # --- metadata --------------------------------------------------------------------------------------------

    def _refcount_blocks(self) -> Pointers | None:
        offset, length = self.header.refcount_offset, self.header.refcount_clusters * self.cluster
        if not self._region("refcount table", offset, length, MAX_REFCOUNT_BYTES):
            return None
        words = self._words(offset, length)
        return self._pointers("refcount table entry", words, offset, reserved=REFCOUNT_RESERVED, partial=True)

    def _snapshots(self) -> tuple[int, list[tuple[int, int]]]:
        """End of the snapshot table, and (offset, entries) of the L1 tables in it."""
        start, count = self.header.snapshots_offset, self.header.snapshot_count
        at, tables = start, []
        if count == 0 or not self._region("snapshot table", start, count * SNAPSHOT.size, MAX_SNAPSHOT_BYTES):
            return start, []
        for number in range(count):
            data = self.file.pread(at, SNAPSHOT.size)
            offset, entries, id_length, name_length, *_, extra = SNAPSHOT.unpack(data.ljust(SNAPSHOT.size, b"\0"))
            end = at + SNAPSHOT.size + extra + id_length + name_length
            if end > min(self.size, start + MAX_SNAPSHOT_BYTES):
                self._one("outside", f"snapshot {number} ends at {end:#x}, behind its table or the file", at)
                break
            if self._region(f"L1 table of snapshot {number}", offset, entries * 8, MAX_L1_BYTES):
                tables.append((offset, entries))
            at = round_up(end, 8)
        return at, tables

    def metadata(self) -> Iterator[Claim]:
        """Everything that exactly one pointer leads to."""
        header = self.header
        yield Claim("header", [0], self.cluster)
        yield Claim("L1 table", [header.l1_offset], header.l1_size * 8)
        blocks = self.refcount_blocks
        if blocks is not None:
            yield Claim("refcount table", [header.refcount_offset], header.refcount_clusters * self.cluster)
            yield Claim("refcount block", blocks.offsets, self.cluster)
        if self._snapshots_end > header.snapshots_offset:
            length = self._snapshots_end - header.snapshots_offset
            yield Claim("snapshot table", [header.snapshots_offset], length)
        for offset, entries in self._snapshot_tables:
            yield Claim("snapshot L1 table", [offset], entries * 8)
        crypto = self.image.extensions.crypto_header
        if crypto is not None and self._region("encryption header", *crypto, MAX_CRYPTO_BYTES):
            yield Claim("encryption header", [crypto[0]], crypto[1])
        yield from self._bitmaps()

    def _bitmaps(self) -> Iterator[Claim]:
        extensions = self.image.extensions
        # Without its autoclear bit the directory is stale, and nobody's.
        if extensions.bitmap_directory is None or not self.header.bitmaps_valid:
            return
        offset, length = extensions.bitmap_directory
        if not self._region("bitmap directory", offset, length, MAX_DIRECTORY_BYTES):
            return
        yield Claim("bitmap directory", [offset], length)
        data, at = self.file.pread(offset, length), 0
        for number in range(extensions.bitmaps):
            if at + _BITMAP.size > len(data):
                self._one("cut-short", f"the bitmap directory ends before bitmap {number}", offset + at)
                return
            table, entries, _, _, _, name_length, extra = _BITMAP.unpack_from(data, at)
            if self._region(f"table of bitmap {number}", table, entries * 8, MAX_L1_BYTES):
                yield Claim("bitmap table", [table], entries * 8)
                words = self._words(table, entries * 8)
                places = self._pointers(f"bitmap {number} entry", words, table, reserved=~OFFSET & ~1 & (1 << 64) - 1)
                yield Claim("bitmap", places.offsets, self.cluster)
            at = round_up(at + _BITMAP.size + extra + name_length, 8)

    # --- the guest's data ------------------------------------------------------------------------------------

    def _l1_table(self, offset: int, entries: int) -> tuple[Words, Pointers]:
        words = self._words(offset, entries * 8)
        nowhere = array("I", (at for at in used(words) if words[at] & (OFFSET | COPIED) == COPIED))
        self._report("contradiction", "L1 entry {} is marked as copied and leads nowhere".format, nowhere, offset, 8)
        return words, self._pointers("L1 entry", words, offset, reserved=L1_RESERVED)

    @property
    def has_snapshots(self) -> bool:
        """Whether there are L1 tables besides the active one."""
        return bool(self._snapshot_tables)

    def active_tables(self) -> tuple[Words, Words]:
        """Where the L2 tables of the active L1 table lie, sorted, and how many of its entries lead to each."""
        return counted(self.l1_pointers.offsets)

    def l2_tables(self) -> tuple[Words, Words]:
        """The same of all L1 tables."""
        found, total = self.l1_pointers.offsets[:], 0
        for offset, entries in self._snapshot_tables:
            total += entries * 8
            if total > self.size:
                self._one("overlap", "the L1 tables together are larger than the file", self.header.snapshots_offset)
                break
            found += self._l1_table(offset, entries)[1].offsets
        return counted(found)

    def l2_table(self, offset: int, *, report: bool = False) -> L2Table:
        """What one L2 table points to. With ``report``, also what is wrong with its entries."""
        table = None if report else self._kept.get(offset)
        if table is None:
            table = self._read_l2_table(offset, report)
            # A number in an array has 4 or 8 bytes; the arrays themselves, and the place of the table, some more.
            size = 1000 + 17 * len(table.entries) + 12 * len(table.compressed)
            if table is not NO_CLUSTERS and size <= self._room and offset not in self._kept:
                self._kept[offset] = table
                self._room -= size
        return table

    def _read_l2_table(self, offset: int, report: bool) -> L2Table:
        step = self.header.l2_entry_size
        raw = self.file.pread(offset, self.cluster).ljust(self.cluster, b"\0")
        if self._leads_nowhere(raw, step):
            return NO_CLUSTERS
        marks, words = entry_marks(raw, step), words64(raw, "big")
        descriptors = words[:: step // 8]
        streams: Sequence[int] = ()
        spans: list[tuple[int, int]] = []
        if self.own_data:
            streams = array("I", used(marks.translate(_chosen(IS_COMPRESSED))))
            spans = self.image.compressed_spans(map(descriptors.__getitem__, streams))
        kinds = marks.translate(_PLACED) if self.own_data else bytes(len(marks))
        borders = entry_runs(kinds, raw, self.header, b"\1\2")
        runs = bytes(map(kinds.__getitem__, borders))
        entries = array("I", compress(borders, runs))
        counts = array("I", compress(map(sub, [*borders[1:], len(kinds)], borders), runs))
        places = array("Q", map(and_, map(descriptors.__getitem__, entries), repeat(OFFSET)))
        starts = array("Q", (start for start, _ in spans))
        lengths = array("I", (length for _, length in spans))
        copied = bytes(map((2).__eq__, filter(None, runs)))
        table = L2Table(entries, counts, places, copied, starts, lengths)
        if report:
            self._report_entries(marks, descriptors, words[1::2], offset)
            self._report_places(table, descriptors, streams, offset)
        return table

    def _leads_nowhere(self, raw: bytes, step: int) -> bool:
        """Whether a table says the same of all clusters, and that they are nowhere: nothing is wrong with it then."""
        if raw != raw[:step] * (len(raw) // step):
            return False
        word = int.from_bytes(raw[:8], "big")
        if self.header.extended_l2:
            return word == 0 and not any(raw[12:16])
        return word == 0 or (word == ZERO_FLAG and self.header.version > 2)

    def _report_places(self, table: L2Table, descriptors: Words, streams: Sequence[int], at: int) -> None:
        step, inside = self.header.l2_entry_size, round_up(self.size, self.cluster)
        unaligned, outside = array("I"), array("I")
        ends = map(add, table.places, map(mul, table.counts, repeat(self.cluster)))
        right = not any(map(and_, table.places, repeat(self.cluster - 1))) and max(ends, default=0) <= inside
        for entry, number, place in () if right else zip(table.entries, table.counts, table.places, strict=True):
            if place % self.cluster:
                unaligned.extend(range(entry, entry + number))
            elif place + number * self.cluster > inside:
                outside.extend(range(entry + max(0, (inside - place) // self.cluster), entry + number))
        self._misplaced("L2 entry", descriptors, unaligned, outside, at, step)
        # A stream may end before its last sector does, so only where it starts can be judged.
        behind = [entry for entry, start in zip(streams, table.compressed, strict=True) if start >= self.size]
        self._report("outside", "compressed L2 entry {} points behind the file's end".format, behind, at, step)

    def _report_entries(self, marks: bytes, descriptors: Words, bitmaps: Words, at: int) -> None:
        step = self.header.l2_entry_size
        reserved = marks.translate(_chosen(IS_RESERVED, IS_COMPRESSED))
        if self.header.version == 2 or self.header.extended_l2:
            flagged = marks.translate(_chosen(HAS_ZERO, IS_COMPRESSED))
            reserved = bytes(map(max, reserved, flagged)) if 1 in flagged else reserved
        self._reserved("L2 entry", descriptors, array("I", used(reserved)), at, step)
        if not self.own_data:
            uncopied = array("I", used(marks.translate(_chosen(HAS_PLACE, IS_COMPRESSED | IS_COPIED))))
            what = "L2 entry {}: no copied flag on a cluster of the data file"
            self._report("copied-flag", what.format, uncopied, at, step)
        wrong = marks.translate(_chosen(IS_COMPRESSED | IS_COPIED * self.own_data))
        contradicting = array("I", used(wrong))
        if self.header.extended_l2:
            placed = HAS_PLACE if self.own_data else HAS_PLACE | IS_COPIED
            contradicting = array(
                "I",
                compress(count(), map(_contradicts, wrong, marks, bitmaps, repeat(placed))),
            )
        self._report(
            "contradiction",
            lambda entry: f"L2 entry {entry} ({descriptors[entry]:#x}) contradicts its flags or its bitmap",
            contradicting,
            at,
            step,
        )


def _contradicts(wrong: int, mark: int, bitmap: int, placed: int) -> bool:
    """Of an extended L2 entry."""
    if mark & IS_COMPRESSED:
        return bool(wrong or bitmap)
    return bool(bitmap & bitmap >> 32 & 0xFFFFFFFF or (bitmap & 0xFFFFFFFF and not mark & placed))


def claimed_ranges(image: Qcow2Image) -> Iterator[Range]:
    """All metadata and data the image claims in its file, a range a pointer; nothing is judged."""
    walk = Walk(image)
    for claim in walk.metadata():
        for offset in claim.offsets:
            yield Range(offset, claim.length, claim.kind)
    for offset in walk.l2_tables()[0]:
        yield Range(offset, walk.cluster, "L2 table")
        table = walk.l2_table(offset)
        for number, place in zip(table.counts, table.places, strict=True):
            for at in range(place, place + number * walk.cluster, walk.cluster):
                yield Range(at, walk.cluster, "data")
        for start, length in zip(table.compressed, table.lengths, strict=True):
            yield Range(start, length, "compressed data")
