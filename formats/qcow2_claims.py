"""What a qcow2 claims in its file: the walk that the check and ``ranges()`` share.

Follows QEMU's docs/interop/qcow2.txt: "Host cluster management", "Cluster mapping", "Snapshots", "Bitmaps".

A claim is a set of byte ranges of one kind. The walk states them and what is wrong with the pointers it meets; a
pointer that cannot be followed is reported and not followed. Each L2 table is read once a walk, however many L1
entries lead to it, so the work follows the file's size and not what its tables say.

Not here: refcounts (qcow2_check.py).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

from imagekit.formats.base import MiB, Range, round_up
from imagekit.formats.qcow2_header import MAX_L1_BYTES, MAX_REFCOUNT_BYTES
from imagekit.formats.qcow2_snapshots import MAX_SNAPSHOT_BYTES, SNAPSHOT

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from imagekit.formats.qcow2 import Qcow2Image

    Offsets = NDArray[np.int64]
    Words = NDArray[np.uint64]

# Bits that the specification reserves in the entries of each table.
L1_RESERVED = 0x7F000000000001FF
L2_RESERVED = 0x3F000000000001FE
REFCOUNT_RESERVED = 0xFF000000000001FF  # the upper byte belongs to the offset; no file reaches that far
COPIED = 1 << 63
COMPRESSED = 1 << 62
OFFSET = 0x00FFFFFFFFFFFE00

MAX_DIRECTORY_BYTES = 64 * MiB
MAX_CRYPTO_BYTES = 64 * MiB

_BITMAP = struct.Struct(">QIIBBHI")


class Report(Protocol):
    """Takes what is wrong: entries of a table by index, each with the file offset of the entry."""

    def __call__(
        self, code: str, what: Callable[[int], str], entries: Offsets | list[int], at: int, step: int
    ) -> None: ...


def ignore(code: str, what: Callable[[int], str], entries: Offsets | list[int], at: int, step: int) -> None:
    """A report to nobody."""


class Claim(NamedTuple):
    """Byte ranges of one kind."""

    kind: str
    offsets: Offsets
    lengths: Offsets


class L2Table(NamedTuple):
    """The clusters an L2 table points to: plain ones (or zero with a place kept), and compressed spans."""

    plain: Offsets
    copied: NDArray[np.bool_]
    entries: Offsets
    compressed: Offsets
    lengths: Offsets


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
        self.refcount_blocks = self._refcount_blocks()
        """Where each refcount block lies (-1: none); None when there is no table that could say it."""
        self.l1, self.l1_places = self._l1_table(image.header.l1_offset, image.header.l1_size)
        """The active L1 table as stored, and where its entries lead (-1: nowhere)."""
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
        import numpy as np

        data = self.file.pread(offset, length)
        return np.frombuffer(data.ljust(length, b"\0"), ">u8").astype(np.uint64)

    def _claim(self, kind: str, offsets: Offsets | int, length: int) -> Claim:
        import numpy as np

        places = np.atleast_1d(np.asarray(offsets, dtype=np.int64))
        return Claim(kind, places, np.full(len(places), length, dtype=np.int64))

    def _pointers(self, kind: str, words: Words, at: int, *, reserved: int, partial: bool = False) -> Offsets:
        """Where the entries of a table point, -1 where to nothing or to where nothing can be."""
        import numpy as np

        offsets = (words & np.uint64(OFFSET)).astype(np.int64)
        self._reserved(kind, words, at, 8, reserved)
        inside = round_up(self.size, self.cluster) if partial else self.size
        return self._placed(kind, offsets, offsets != 0, at, 8, inside)

    def _reserved(self, kind: str, words: Words, at: int, step: int, bits: int) -> None:
        import numpy as np

        self._report(
            "reserved-bits",
            lambda entry: f"{kind} {entry} ({int(words[entry]):#x}) has reserved bits set",
            np.flatnonzero(words & np.uint64(bits)),
            at,
            step,
        )

    def _placed(
        self, kind: str, offsets: Offsets, used: NDArray[np.bool_], at: int, step: int, inside: int
    ) -> Offsets:
        import numpy as np

        unaligned = used & (offsets % self.cluster != 0)
        outside = used & ~unaligned & (offsets + self.cluster > inside)

        def points(entry: int) -> str:
            return f"{kind} {entry} points to {int(offsets[entry]):#x}"

        misplaced = np.flatnonzero(unaligned)
        self._report("unaligned", lambda entry: f"{points(entry)}, not on a cluster", misplaced, at, step)
        behind = np.flatnonzero(outside)
        self._report("outside", lambda entry: f"{points(entry)}, behind the file's end", behind, at, step)
        return np.where(used & ~unaligned & ~outside, offsets, -1)

    # --- metadata --------------------------------------------------------------------------------------------

    def _refcount_blocks(self) -> Offsets | None:
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
        yield self._claim("header", 0, self.cluster)
        yield self._claim("L1 table", header.l1_offset, header.l1_size * 8)
        blocks = self.refcount_blocks
        if blocks is not None:
            yield self._claim("refcount table", header.refcount_offset, header.refcount_clusters * self.cluster)
            yield self._claim("refcount block", blocks[blocks >= 0], self.cluster)
        if self._snapshots_end > header.snapshots_offset:
            yield self._claim(
                "snapshot table", header.snapshots_offset, self._snapshots_end - header.snapshots_offset
            )
        for offset, entries in self._snapshot_tables:
            yield self._claim("snapshot L1 table", offset, entries * 8)
        crypto = self.image.extensions.crypto_header
        if crypto is not None and self._region("encryption header", *crypto, MAX_CRYPTO_BYTES):
            yield self._claim("encryption header", *crypto)
        yield from self._bitmaps()

    def _bitmaps(self) -> Iterator[Claim]:
        extensions = self.image.extensions
        # Without its autoclear bit the directory is stale, and nobody's.
        if extensions.bitmap_directory is None or not self.header.bitmaps_valid:
            return
        offset, length = extensions.bitmap_directory
        if not self._region("bitmap directory", offset, length, MAX_DIRECTORY_BYTES):
            return
        yield self._claim("bitmap directory", offset, length)
        data, at = self.file.pread(offset, length), 0
        for number in range(extensions.bitmaps):
            if at + _BITMAP.size > len(data):
                self._one("cut-short", f"the bitmap directory ends before bitmap {number}", offset + at)
                return
            table, entries, _, _, _, name_length, extra = _BITMAP.unpack_from(data, at)
            if self._region(f"table of bitmap {number}", table, entries * 8, MAX_L1_BYTES):
                yield self._claim("bitmap table", table, entries * 8)
                words = self._words(table, entries * 8)
                places = self._pointers(f"bitmap {number} entry", words, table, reserved=~OFFSET & ~1 & (1 << 64) - 1)
                yield self._claim("bitmap", places[places >= 0], self.cluster)
            at = round_up(at + _BITMAP.size + extra + name_length, 8)

    # --- the guest's data ------------------------------------------------------------------------------------

    def _l1_table(self, offset: int, entries: int) -> tuple[Words, Offsets]:
        import numpy as np

        words = self._words(offset, entries * 8)
        nowhere = np.flatnonzero((words & np.uint64(OFFSET | COPIED)) == np.uint64(COPIED))
        self._report("contradiction", "L1 entry {} is marked as copied and leads nowhere".format, nowhere, offset, 8)
        return words, self._pointers("L1 entry", words, offset, reserved=L1_RESERVED)

    def l2_tables(self) -> tuple[Offsets, Offsets]:
        """Where the L2 tables lie, sorted, and how many L1 entries lead to each."""
        import numpy as np

        found, total = [self.l1_places], 0
        for offset, entries in self._snapshot_tables:
            total += entries * 8
            if total > self.size:
                self._one("overlap", "the L1 tables together are larger than the file", self.header.snapshots_offset)
                break
            found.append(self._l1_table(offset, entries)[1])
        places = np.concatenate(found)
        return np.unique(places[places >= 0], return_counts=True)

    def l2_table(self, offset: int, *, report: bool = False) -> L2Table:
        """What one L2 table points to. With ``report``, also what is wrong with its entries."""
        import numpy as np

        step = self.header.l2_entry_size
        words = self._words(offset, self.cluster).reshape(-1, step // 8)
        descriptors = words[:, 0]
        is_compressed = (descriptors & np.uint64(COMPRESSED)) != 0
        places = (descriptors & np.uint64(OFFSET)).astype(np.int64)
        used = (places != 0) & ~is_compressed & self.own_data
        streams = np.flatnonzero(is_compressed & self.own_data)
        starts, lengths = self.image.compressed_spans(descriptors[streams])
        if report:
            self._report_entries(words, is_compressed, places, offset)
            self._placed("L2 entry", places, used, offset, step, round_up(self.size, self.cluster))
            # A stream may end before its last sector does, so only where it starts can be judged.
            behind = streams[starts >= self.size]
            self._report(
                "outside", "compressed L2 entry {} points behind the file's end".format, behind, offset, step
            )
        entries = np.flatnonzero(used)
        copied = (descriptors[entries] & np.uint64(COPIED)) != 0
        return L2Table(places[entries], copied, entries, starts, lengths)

    def _report_entries(self, words: Words, is_compressed: NDArray[np.bool_], places: Offsets, at: int) -> None:
        import numpy as np

        descriptors, step = words[:, 0], self.header.l2_entry_size
        plain = np.where(is_compressed, np.uint64(0), descriptors)
        no_zero_flag = self.header.version == 2 or self.header.extended_l2
        self._reserved("L2 entry", plain, at, step, L2_RESERVED | no_zero_flag)
        copied = (descriptors & np.uint64(COPIED)) != 0
        wrong = is_compressed & copied
        if not self.own_data:
            wrong |= is_compressed
            uncopied = np.flatnonzero((places != 0) & ~is_compressed & ~copied)
            what = "L2 entry {}: no copied flag on a cluster of the data file"
            self._report("copied-flag", what.format, uncopied, at, step)
        if self.header.extended_l2:
            bitmaps = words[:, 1]
            allocated = bitmaps & np.uint64(0xFFFFFFFF)
            both = allocated & (bitmaps >> np.uint64(32))
            nowhere = (places == 0) & (self.own_data | ~copied)
            wrong |= np.where(is_compressed, bitmaps != 0, (both != 0) | ((allocated != 0) & nowhere))
        self._report(
            "contradiction",
            lambda entry: f"L2 entry {entry} ({int(descriptors[entry]):#x}) contradicts its flags or its bitmap",
            np.flatnonzero(wrong),
            at,
            step,
        )


def claimed_ranges(image: Qcow2Image) -> Iterator[Range]:
    """All metadata and data the image claims in its file, a range a pointer; nothing is judged."""
    walk = Walk(image)
    for claim in walk.metadata():
        yield from _as_ranges(claim)
    tables, _ = walk.l2_tables()
    for offset in tables.tolist():
        yield Range(offset, walk.cluster, "L2 table")
        table = walk.l2_table(offset)
        for place in table.plain.tolist():
            yield Range(place, walk.cluster, "data")
        yield from _as_ranges(Claim("compressed data", table.compressed, table.lengths))


def _as_ranges(claim: Claim) -> Iterator[Range]:
    for offset, length in zip(claim.offsets.tolist(), claim.lengths.tolist(), strict=True):
        yield Range(offset, length, claim.kind)
