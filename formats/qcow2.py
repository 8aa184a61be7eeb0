"""qcow2 versions 2 and 3, for reading.

Follows QEMU's docs/interop/qcow2.txt. Guest offset → L1 entry → L2 table (one cluster) → cluster, which is
unallocated (reads from the backing file, else zero), zero, plain at an offset of the file, or compressed. With
extended L2 entries each cluster splits into 32 subclusters that are unallocated, zero or plain one by one.

Design notes
- All integers are big-endian. L2 tables are decoded by numpy, a table at a time, into arrays of kind and offset;
  neighbours of one kind become one run. Decoded tables are kept in a small cache that follows memory, not size.
- A backing or data file is a fact: it is reported, and only ever opened through the resolver the caller passes.
- Every pointer is checked against the file before it is followed: alignment, end of file.
- Bytes may be missing from the file past the guest's end, nowhere else.

Not here: writing, internal snapshots as a source, encrypted data, external data files (reported and refused).
Checks of the whole structure are in qcow2_check.py.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from imagekit.errors import CorruptImage, InvalidImage, UnsupportedFeature
from imagekit.formats.base import (
    AS_IS,
    JSON,
    DiskFormat,
    DiskImage,
    Extent,
    Fact,
    File,
    ImageInfo,
    MiB,
    OpenOptions,
    Problem,
    Range,
    Reference,
    Resolver,
    clip,
    merge_extents,
    read_exactly,
)
from imagekit.formats.chain import Below
from imagekit.formats.decoders import Decoder, inflate_raw, unzstd
from imagekit.formats.qcow2_header import (
    CORRUPT,
    DATA_FILE,
    DIRTY,
    KNOWN_INCOMPATIBLE,
    MAGIC,
    MAX_BACKING_NAME,
    Extensions,
    Qcow2Header,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Table = NDArray[np.uint64]

OFFSET_MASK = 0x00FFFFFFFFFFFE00
COMPRESSED_FLAG = 1 << 62
ZERO_FLAG = 1

UNALLOCATED, ZERO, PLAIN, COMPRESSED = range(4)
SUBCLUSTERS = 32
CACHE_BYTES = 16 * MiB
SPAN_BYTES = 4 * MiB
"""Compressed neighbours are read by one pread up to this much."""


class _Run(NamedTuple):
    """Guest bytes of one kind. ``entries`` holds the descriptors of a compressed run, one a cluster."""

    start: int
    length: int
    kind: int
    offset: int
    entries: Any = None


class _L2(NamedTuple):
    """One decoded L2 table: an item a cluster, or a subcluster with extended L2 entries."""

    kinds: NDArray[np.uint8]
    offsets: Table
    descriptors: Table  # one a cluster


class Qcow2Image(DiskImage):
    def __init__(self, file: File, resolver: Resolver | None = None) -> None:
        self.file = file
        self.header = Qcow2Header.parse(file.pread(0, 105))
        self.header.validate(file.size)
        self.virtual_size = self.header.size
        cluster = self.header.cluster_size
        head = file.pread(0, cluster)
        # The name of the backing file ends them too: older writers put no end mark before it.
        self.extensions = Extensions.parse(head[: self.header.backing_offset or None], self.header.header_length)
        self.references = self._references(head)
        backing = next((one for one in self.references if one.kind == "backing-file"), None)
        self._below = Below(backing, resolver, file.name)
        self._lock = threading.Lock()
        self._l1: Table | None = None
        self._cache: OrderedDict[int, _L2] = OrderedDict()
        self._unit = cluster // SUBCLUSTERS if self.header.extended_l2 else cluster
        self._decode: Decoder = unzstd if self.header.compression_type == 1 else inflate_raw
        # The table as stored and the two decoded arrays (an item a subcluster with extended L2).
        per_table = cluster + 9 * self.header.l2_entries * (cluster // self._unit)
        self._cached_tables = max(4, CACHE_BYTES // per_table)

    # --- facts -----------------------------------------------------------------------------------------------

    def _references(self, head: bytes) -> tuple[Reference, ...]:
        header, found = self.header, []
        if header.backing_offset:
            if header.backing_length > MAX_BACKING_NAME:
                raise InvalidImage(f"backing file name of {header.backing_length} bytes, at most 1023", offset=16)
            end = header.backing_offset + header.backing_length
            if end > len(head):
                raise InvalidImage(f"the backing file name ends at {end:#x}, outside the first cluster", offset=8)
            name = head[header.backing_offset : end].decode("utf-8", "replace")
            found.append(Reference("backing-file", name, self.extensions.backing_format))
        if header.incompatible & DATA_FILE or self.extensions.data_file is not None:
            found.append(Reference("data-file", self.extensions.data_file or "", "raw"))
        return tuple(found)

    def _facts(self) -> Iterator[Fact]:
        header = self.header
        if header.incompatible & DIRTY:
            yield Fact("dirty", "the dirty bit is set: refcounts may be stale, guest data is not affected", 72)
        if header.incompatible & CORRUPT:
            yield Fact("corrupt-bit", "QEMU marked this image corrupt", 72)
        unknown = header.incompatible & ~KNOWN_INCOMPATIBLE
        if unknown:
            yield Fact("unknown-feature", f"unknown incompatible feature bits {unknown:#x}", 72)
        if header.compression_type > 1:
            yield Fact("unknown-feature", f"unknown compression type {header.compression_type}", 104)
        if header.crypt_method:
            yield Fact("encrypted", f"the data is encrypted ({self._encryption()})", 32)

    def _encryption(self) -> str:
        return {1: "AES", 2: "LUKS"}.get(self.header.crypt_method, f"method {self.header.crypt_method}")

    def info(self) -> ImageInfo:
        header = self.header
        features: dict[str, JSON] = {
            "version": header.version,
            "compression-type": {0: "zlib", 1: "zstd"}.get(header.compression_type, "unknown"),
            "extended-l2": header.extended_l2,
            "refcount-bits": 1 << header.refcount_order,
            "lazy-refcounts": bool(header.compatible & 1),
            "snapshots": header.snapshot_count,
            "bitmaps": self.extensions.bitmaps,
            "encrypted": header.crypt_method != 0,
            "dirty": bool(header.incompatible & DIRTY),
            "corrupt": bool(header.incompatible & CORRUPT),
        }
        return ImageInfo(
            format="qcow2",
            virtual_size=self.virtual_size,
            subformat=f"v{header.version}",
            block_size=header.cluster_size,
            features=features,
            references=self.references,
            facts=tuple(self._facts()),
        )

    # --- tables ----------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        """Refuse what this reader would read wrongly."""
        if self.header.crypt_method:
            raise UnsupportedFeature(
                f"the data is encrypted ({self._encryption()})",
                hint="decrypt it first: qemu-img convert --object secret,id=s,file=PASSPHRASE "
                "--image-opts driver=qcow2,encrypt.key-secret=s,file.filename=IMAGE -O raw OUT",
                path=self.file.name,
                offset=32,
            )
        for fact in self._facts():
            if fact.code == "unknown-feature":
                raise UnsupportedFeature(fact.message, path=self.file.name, offset=fact.offset)
        if any(reference.kind == "data-file" for reference in self.references):
            raise UnsupportedFeature(
                "the guest's data is in another file, which imagekit does not read",
                hint="make it one file with qemu-img convert, where its origin is trusted",
                path=self.file.name,
            )

    def _l1_table(self) -> Table:
        if self._l1 is None:
            import numpy as np

            self._readable()
            raw = read_exactly(self.file, self.header.l1_offset, self.header.l1_size * 8, "the L1 table")
            self._l1 = np.frombuffer(raw, ">u8").astype(np.uint64)
        return self._l1

    def l2_offset(self, entry: int, index: int) -> int:
        """Where an L1 entry points; CorruptImage when it cannot be an L2 table."""
        offset = entry & OFFSET_MASK
        if offset % self.header.cluster_size:
            raise self._corrupt(f"L1 entry {index} points to {offset:#x}, not on a cluster", index)
        if offset + self.header.cluster_size > self.file.size:
            raise self._corrupt(f"L1 entry {index} points to {offset:#x}, behind the file's end", index)
        return offset

    def _corrupt(self, message: str, index: int) -> CorruptImage:
        return CorruptImage(
            message,
            hint="the file looks damaged or truncated; fetch it again and compare its checksum",
            path=self.file.name,
            offset=self.header.l1_offset + index * 8,
        )

    def _l2_table(self, index: int) -> _L2 | None:
        """The decoded L2 table of an L1 index, None when there is none."""
        entry = int(self._l1_table()[index])
        if not entry & OFFSET_MASK:
            return None
        offset = self.l2_offset(entry, index)
        with self._lock:
            table = self._cache.get(offset)
            if table is not None:
                self._cache.move_to_end(offset)
                return table
        table = self._read_l2(offset)
        with self._lock:
            self._cache[offset] = table
            while len(self._cache) > self._cached_tables:
                self._cache.popitem(last=False)
        return table

    def _read_l2(self, offset: int) -> _L2:
        import numpy as np

        raw = np.frombuffer(read_exactly(self.file, offset, self.header.cluster_size, "an L2 table"), ">u8")
        if self.header.extended_l2:
            words = raw.astype(np.uint64).reshape(-1, 2)
            kinds, offsets = self._decode_extended(words, offset)
            return _L2(kinds, offsets, words[:, 0])
        descriptors = raw.astype(np.uint64)
        compressed = (descriptors & np.uint64(COMPRESSED_FLAG)) != 0
        offsets = np.where(compressed, np.uint64(0), descriptors & np.uint64(OFFSET_MASK))
        kinds = np.where(offsets != 0, PLAIN, UNALLOCATED).astype(np.uint8)
        kinds[(descriptors & np.uint64(ZERO_FLAG)) != 0] = ZERO
        kinds[compressed] = COMPRESSED
        if self.header.version == 2 and (kinds == ZERO).any():
            entry = int((kinds == ZERO).argmax())
            raise CorruptImage(
                "an L2 entry has the zero flag, which version 2 does not have",
                path=self.file.name,
                offset=offset + entry * 8,
            )
        self._check_plain(offsets, kinds, offset)
        return _L2(kinds, offsets, descriptors)

    def _decode_extended(self, words: Table, at: int) -> tuple[NDArray[np.uint8], Table]:
        """Kinds and offsets by subcluster (bit i of each half of the bitmap, low half: allocated)."""
        import numpy as np

        descriptors, bitmaps = words[:, 0], words[:, 1]
        # Little-endian bytes with little bit order: column i is bit i.
        bits = np.unpackbits(bitmaps.astype("<u8").view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
        allocated, zero = bits[:, :SUBCLUSTERS] != 0, bits[:, SUBCLUSTERS:] != 0
        compressed = (descriptors & np.uint64(COMPRESSED_FLAG)) != 0
        offsets = np.where(compressed, np.uint64(0), descriptors & np.uint64(OFFSET_MASK))
        lost = (allocated & zero).any(axis=1) | (allocated.any(axis=1) & (offsets == 0))
        wrong = np.flatnonzero((lost | ((descriptors & np.uint64(1)) != 0)) & ~compressed)
        if len(wrong):
            raise CorruptImage(
                "an extended L2 entry contradicts its bitmap",
                path=self.file.name,
                offset=at + int(wrong[0]) * 16,
            )
        kinds = np.where(allocated, PLAIN, UNALLOCATED).astype(np.uint8)
        kinds[zero] = ZERO
        kinds[compressed] = COMPRESSED
        steps = np.arange(SUBCLUSTERS, dtype=np.uint64) * np.uint64(self._unit)
        spread = np.where(offsets[:, None] != 0, offsets[:, None] + steps, np.uint64(0))
        self._check_plain(offsets, np.where((kinds == PLAIN).any(axis=1), PLAIN, UNALLOCATED), at)
        return kinds.reshape(-1), spread.reshape(-1)

    def _check_plain(self, offsets: Table, kinds: NDArray[Any], at: int) -> None:
        import numpy as np

        mask = np.uint64(self.header.cluster_size - 1)
        # A file may end inside its last cluster, where the guest's disk ends too: checked when that is read.
        wrong = np.flatnonzero((kinds == PLAIN) & (((offsets & mask) != 0) | (offsets >= np.uint64(self.file.size))))
        if len(wrong):
            entry = int(wrong[0])
            raise CorruptImage(
                f"an L2 entry points to {int(offsets[entry]):#x}: not on a cluster or behind the file's end "
                f"{self.file.size:#x}",
                hint="the file looks damaged or truncated; fetch it again and compare its checksum",
                path=self.file.name,
                offset=at + entry * self.header.l2_entry_size,
            )

    # --- the guest's view ------------------------------------------------------------------------------------

    def _runs(self, start: int, end: int) -> Iterator[_Run]:
        """Runs of one kind that cover exactly start..end."""
        import numpy as np

        span = self.header.cluster_size * self.header.l2_entries
        l1 = self._l1_table()
        while start < end:
            index = start // span
            stop = min(end, (index + 1) * span)
            table = self._l2_table(index)
            if table is None:
                # One step over all neighbouring L1 entries that have no table.
                later = np.flatnonzero(l1[index : -(-end // span)] & np.uint64(OFFSET_MASK))
                stop = min(end, (index + int(later[0])) * span) if len(later) else end
                yield _Run(start, stop - start, UNALLOCATED, 0)
            else:
                yield from self._table_runs(table, index * span, start, stop)
            start = stop

    def _table_runs(self, table: _L2, base: int, start: int, stop: int) -> Iterator[_Run]:
        import numpy as np

        unit = self._unit
        first, last = (start - base) // unit, -(-(stop - base) // unit)
        kinds, offsets = table.kinds[first:last], table.offsets[first:last]
        cut = kinds[1:] != kinds[:-1]
        plain = kinds[1:] == PLAIN
        cut |= plain & (offsets[1:] != offsets[:-1] + np.uint64(unit))
        edges = np.concatenate(([0], np.flatnonzero(cut) + 1, [len(kinds)])).tolist()
        per_cluster = self.header.cluster_size // unit
        for one, other in pairwise(edges):
            begin = max(start, base + (first + one) * unit)
            end = min(stop, base + (first + other) * unit)
            kind = int(kinds[one])
            if kind == COMPRESSED:
                clusters = slice((first + one) // per_cluster, -(-(first + other) // per_cluster))
                yield _Run(begin, end - begin, kind, 0, table.descriptors[clusters])
            else:
                inside = begin - (base + (first + one) * unit)
                yield _Run(begin, end - begin, kind, int(offsets[one]) + inside)

    def extents(self, start: int = 0, length: int | None = None) -> Iterator[Extent]:
        return merge_extents(self._extents(*clip(start, length, self.virtual_size)))

    def _extents(self, start: int, end: int) -> Iterator[Extent]:
        for run in self._runs(start, end):
            if run.kind == PLAIN:
                if run.offset + run.length > self.file.size:
                    raise CorruptImage(
                        f"guest bytes from {run.start:#x} should lie up to {run.offset + run.length:#x}, "
                        f"but the file ends at {self.file.size:#x}",
                        hint="the file looks truncated; fetch it again and compare its checksum",
                        path=self.file.name,
                        offset=run.offset,
                    )
                yield Extent(run.start, run.length, data=True, zero=False, offset=run.offset)
            elif run.kind == COMPRESSED:
                yield Extent(run.start, run.length, data=True, zero=False, compressed=True)
            elif run.kind == ZERO:
                yield Extent(run.start, run.length, data=False, zero=True)
            else:
                yield from self._below.extents(run.start, run.length)

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        for run in self._runs(offset, offset + len(buffer)):
            part = buffer[run.start - offset : run.start - offset + run.length]
            if run.kind == PLAIN:
                self._read_plain(run, part)
            elif run.kind == COMPRESSED:
                self._read_compressed(run, part)
            elif run.kind == UNALLOCATED:
                self._below.pread_into(run.start, part)
            else:
                part[:] = bytes(len(part))

    def _read_plain(self, run: _Run, part: memoryview) -> None:
        count = self.file.pread_into(run.offset, part)
        if count != len(part):
            raise CorruptImage(
                f"guest bytes from {run.start:#x}: {len(part)} expected, {count} found before the file ends",
                hint="the file looks truncated; fetch it again and compare its checksum",
                path=self.file.name,
                offset=run.offset,
            )

    def compressed_spans(self, descriptors: Table) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Offsets and available bytes of compressed clusters, from their descriptors."""
        import numpy as np

        shift = 62 - (self.header.cluster_bits - 8)
        offsets = descriptors & np.uint64((1 << shift) - 1)
        sectors = (descriptors & np.uint64(COMPRESSED_FLAG - 1)) >> np.uint64(shift)
        lengths = (sectors + np.uint64(1)) * np.uint64(512) - (offsets & np.uint64(511))
        return offsets.astype(np.int64), lengths.astype(np.int64)

    def _read_compressed(self, run: _Run, part: memoryview) -> None:
        cluster = self.header.cluster_size
        skip = run.start % cluster  # the range may begin inside the first cluster
        offsets, lengths = self.compressed_spans(run.entries)
        spans = list(zip(offsets.tolist(), lengths.tolist(), strict=True))
        at = 0
        for group, blob, base in self._grouped(spans):
            for offset, length in group:
                source = blob[offset - base : offset - base + length]
                try:
                    out = self._decode(source, cluster)
                except CorruptImage as error:
                    raise CorruptImage(
                        f"guest bytes from {run.start - run.start % cluster + at:#x}: {error.message}",
                        path=self.file.name,
                        offset=offset,
                    ) from None
                lo, hi = max(at, skip), min(at + cluster, skip + run.length)
                part[lo - skip : hi - skip] = memoryview(out)[lo - at : hi - at]
                at += cluster

    def _grouped(self, spans: list[tuple[int, int]]) -> Iterator[tuple[list[tuple[int, int]], memoryview, int]]:
        """Neighbours in the file, each group with its bytes, read at once, and where these begin."""
        group: list[tuple[int, int]] = []
        for offset, length in spans:
            if group:
                base, edge = group[0][0], group[-1][0] + group[-1][1]
                if not group[-1][0] <= offset <= edge or offset + length - base > SPAN_BYTES:
                    yield group, self._blob(group), base
                    group = []
            group.append((offset, length))
        if group:
            yield group, self._blob(group), group[0][0]

    def _blob(self, group: list[tuple[int, int]]) -> memoryview:
        # The last stream's sectors may reach behind the file's end: the decoder decides whether that matters.
        base, end = group[0][0], max(offset + length for offset, length in group)
        blob = memoryview(bytearray(end - base))
        return blob[: self.file.pread_into(base, blob)]

    def ranges(self) -> Iterator[Range]:
        from imagekit.formats.qcow2_claims import claimed_ranges

        return claimed_ranges(self)

    def close(self) -> None:
        self._below.close()
        self.file.close()


class Qcow2Format(DiskFormat):
    name = "qcow2"
    suffixes = (".qcow2", ".qcow")

    def probe(self, file: File) -> str | None:
        return "qcow2 magic at 0" if file.pread(0, 4) == MAGIC else None

    def open(self, file: File, *, resolver: Resolver | None = None, options: OpenOptions = AS_IS) -> Qcow2Image:
        return Qcow2Image(file, resolver)

    def check(self, file: File) -> list[Problem]:
        from imagekit.formats.qcow2_check import check

        return check(self.open(file))


FORMAT = Qcow2Format()
