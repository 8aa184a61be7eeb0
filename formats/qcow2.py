"""qcow2 versions 2 and 3.

Follows QEMU's docs/interop/qcow2.txt. Guest offset → L1 entry → L2 table (one cluster) → cluster, which is
unallocated (reads from the backing file, else zero), zero, plain at an offset of the file, or compressed. With
extended L2 entries each cluster splits into 32 subclusters that are unallocated, zero or plain one by one. An
internal snapshot is another L1 table. With an external data file the plain clusters lie there, each at the guest's
own offset.

Design notes
- All integers are big-endian. L2 tables are decoded a table at a time (qcow2_l2.py), into runs: neighbours of one
  kind are one. Decoded tables are kept in a small cache that follows memory, not size.
- A backing or data file is a fact: it is reported, and only ever opened through the resolver the caller passes.
- Every pointer is checked against the file before it is followed: alignment, end of file.
- Bytes may be missing from the file past the guest's end, nowhere else.

Not here: encrypted data (reported and refused), the state of the machine in snapshots, dirty bitmaps. Writing is in
qcow2_writer.py, checks of the whole structure are in qcow2_check.py, repairs in qcow2_repair.py.
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from imagekit.errors import CorruptImage, InvalidImage, UnsupportedFeature
from imagekit.formats.base import (
    AS_IS,
    JSON,
    SECTOR,
    Buffer,
    Change,
    DiskFormat,
    DiskImage,
    Extent,
    Fact,
    File,
    ImageInfo,
    ImageWriter,
    KiB,
    MiB,
    OpenOptions,
    Problem,
    Range,
    Reference,
    Resolver,
    WriterOptions,
    clip,
    merge_extents,
    read_exactly,
)
from imagekit.formats.chain import Below
from imagekit.formats.decoders import Decoder, raw_inflater, unzstd
from imagekit.formats.qcow2_header import (
    CORRUPT,
    DIRTY,
    KNOWN_INCOMPATIBLE,
    MAGIC,
    MAX_BACKING_NAME,
    RAW_EXTERNAL,
    Extensions,
    Qcow2Header,
)
from imagekit.formats.qcow2_l2 import (
    COMPRESSED,
    COMPRESSED_FLAG,
    L2,
    OFFSET_MASK,
    PLAIN,
    SUBCLUSTERS,
    UNALLOCATED,
    ZERO,
    compressed_offset_mask,
    decode_l2,
)
from imagekit.formats.qcow2_snapshots import Snapshot, as_header, find_snapshot, read_snapshots
from imagekit.formats.words import used, words64

if TYPE_CHECKING:
    from imagekit.formats.words import Words

CACHE_BYTES = 16 * MiB
SPAN_BYTES = 128 * KiB
"""Compressed neighbours are read by one pread up to this much: what a core's cache holds until it is decoded."""

PIECE_BYTES = 128 * KiB
"""Plain clusters are handed out in pieces of this size, and for the same reason."""
LISTED_SNAPSHOTS = 1000
LISTED_NAME = 256
"""Characters of a snapshot's name that are reported."""


class _Run(NamedTuple):
    """Guest bytes of one kind. ``entries`` holds the descriptors of a compressed run, one a cluster."""

    start: int
    length: int
    kind: int
    offset: int
    entries: Words = array("Q")


class Qcow2Image(DiskImage):
    def __init__(self, file: File, resolver: Resolver | None = None, snapshot: str | None = None) -> None:
        self.file = file
        self.header = Qcow2Header.parse(file.pread(0, 105))
        self.header.validate(file.size)
        cluster = self.header.cluster_size
        head = file.pread(0, cluster)
        # The name of the backing file ends them too: older writers put no end mark before it.
        self.extensions = Extensions.parse(head[: self.header.backing_offset or None], self.header.header_length)
        self.references = self._references(head)
        self.snapshot = None if snapshot is None else find_snapshot(self.snapshots(), snapshot, file)
        self._disk = self.header if self.snapshot is None else as_header(self.header, self.snapshot, file)
        self.virtual_size = self._disk.size
        by_kind = {one.kind: one for one in self.references}
        self._below = Below(by_kind.get("backing-file"), resolver, file.name)
        self._external = Below(by_kind.get("data-file"), resolver, file.name)
        self._lock = threading.Lock()
        self._l1: Words | None = None
        self._with_table = array("I")  # the L1 entries that lead to a table
        self._cache: OrderedDict[int, L2] = OrderedDict()
        self._unit = cluster // SUBCLUSTERS if self.header.extended_l2 else cluster
        self._decode: Decoder = unzstd if self.header.compression_type == 1 else raw_inflater()
        # The table as stored, and as many runs as it has entries.
        per_table = cluster + 13 * self.header.l2_entries
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
        if header.external_data or self.extensions.data_file is not None:
            found.append(Reference("data-file", self.extensions.data_file or "", "raw"))
        return tuple(found)

    def snapshots(self) -> list[Snapshot]:
        """The internal snapshots; InvalidImage or CorruptImage when the table of them cannot be read."""
        return list(read_snapshots(self.file, self.header))

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

    @property
    def container(self) -> File:
        return self.file

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
        if header.external_data:
            features["data-file-raw"] = bool(header.autoclear & RAW_EXTERNAL)
        if self.snapshot is not None:
            features["snapshot"] = self.snapshot.name[:LISTED_NAME]
        facts = list(self._facts())
        try:
            listed: list[JSON] = [
                {"id": one.id[:LISTED_NAME], "name": one.name[:LISTED_NAME]}
                for one in islice(read_snapshots(self.file, header), LISTED_SNAPSHOTS)
            ]
        except (InvalidImage, CorruptImage) as error:
            facts.append(Fact("snapshot-table", f"the snapshots cannot be listed: {error.message}", error.offset))
        else:
            if listed:
                features["snapshot-list"] = listed
        return ImageInfo(
            format="qcow2",
            virtual_size=self.virtual_size,
            subformat=f"v{header.version}",
            block_size=header.cluster_size,
            features=features,
            references=self.references,
            facts=tuple(facts),
            table_memory=self._disk.l1_size * 16,  # as read and as decoded
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
        if self.extensions.data_file is not None and not self.header.external_data:
            raise InvalidImage(
                f"the header names a data file {self.extensions.data_file!r}, and its feature bits say there is none",
                hint="no program writes such an image: ask who made it",
                path=self.file.name,
            )
        if self.header.external_data and not self.extensions.data_file:
            raise InvalidImage(
                "the guest's data is in another file, which the header does not name", path=self.file.name
            )
        self._external.image()  # nothing is read of an image whose data nobody allowed to open

    def _l1_table(self) -> Words:
        if self._l1 is None:
            self._readable()
            l1 = words64(read_exactly(self.file, self._disk.l1_offset, self._disk.l1_size * 8, "the L1 table"), "big")
            self._with_table = array("I", (at for at in used(l1) if l1[at] & OFFSET_MASK))
            self._l1 = l1
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
            offset=self._disk.l1_offset + index * 8,
        )

    def _l2_table(self, index: int) -> L2 | None:
        """The decoded L2 table of an L1 index, None when there is none."""
        entry = self._l1_table()[index]
        if not entry & OFFSET_MASK:
            return None
        offset = self.l2_offset(entry, index)
        with self._lock:
            table = self._cache.get(offset)
            if table is not None:
                self._cache.move_to_end(offset)
                return table
        raw = read_exactly(self.file, offset, self.header.cluster_size, "an L2 table")
        table = decode_l2(raw, self.header, self.file, offset)
        with self._lock:
            self._cache[offset] = table
            while len(self._cache) > self._cached_tables:
                self._cache.popitem(last=False)
        return table

    # --- the guest's view ------------------------------------------------------------------------------------

    def _runs(self, start: int, end: int) -> Iterator[_Run]:
        """Runs of one kind that cover exactly start..end."""
        span = self.header.cluster_size * self.header.l2_entries
        self._l1_table()
        while start < end:
            index = start // span
            stop = min(end, (index + 1) * span)
            table = self._l2_table(index)
            if table is None:
                # One step over all neighbouring L1 entries that have no table.
                later = bisect_left(self._with_table, index)
                stop = min(end, self._with_table[later] * span) if later < len(self._with_table) else end
                yield _Run(start, stop - start, UNALLOCATED, 0)
            else:
                yield from self._table_runs(table, index * span, start, stop)
            start = stop

    def _table_runs(self, table: L2, base: int, start: int, stop: int) -> Iterator[_Run]:
        unit = self._unit
        per_cluster = self.header.cluster_size // unit
        for first, last, kind, offset in table.runs((start - base) // unit, -(-(stop - base) // unit)):
            begin, end = max(start, base + first * unit), min(stop, base + last * unit)
            if kind == COMPRESSED:
                entries = table.descriptors[first // per_cluster : -(-last // per_cluster)]
                yield _Run(begin, end - begin, kind, 0, entries)
            elif kind == PLAIN:
                place = offset + begin - (base + first * unit)
                if self.header.external_data and place != begin:
                    raise CorruptImage(
                        f"guest bytes from {begin:#x} should lie at {place:#x} of the data file, not at their own "
                        "offset",
                        hint="the file looks damaged; fetch it again and compare its checksum",
                        path=self.file.name,
                    )
                yield _Run(begin, end - begin, kind, place)
            else:
                yield _Run(begin, end - begin, kind, 0)

    def extents(self, start: int = 0, length: int | None = None) -> Iterator[Extent]:
        return merge_extents(self._extents(*clip(start, length, self.virtual_size)))

    def _extents(self, start: int, end: int) -> Iterator[Extent]:
        for run in self._runs(start, end):
            if run.kind == PLAIN:
                data = self._external.image()
                self._check_end(run, self.file.size if data is None else data.virtual_size)
                if data is None:
                    yield Extent(run.start, run.length, data=True, zero=False, offset=run.offset)
                else:
                    for one in data.extents(run.offset, run.length):
                        yield one.elsewhere(one.start, data.container)
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
                at = 0
                for out in self._decoded(run):
                    part[at : at + len(out)] = out
                    at += len(out)
            elif run.kind == UNALLOCATED:
                self._below.pread_into(run.start, part)
            else:
                part[:] = bytes(len(part))

    def pieces(self, offset: int, buffer: memoryview) -> Iterator[Buffer]:
        for run in self._runs(offset, offset + len(buffer)):
            if run.kind == COMPRESSED:
                yield from self._decoded(run)
                continue
            for at in range(run.start, run.start + run.length, PIECE_BYTES):
                part = buffer[at - offset : min(at + PIECE_BYTES, run.start + run.length) - offset]
                if run.kind == PLAIN:
                    self._read_plain(_Run(at, len(part), PLAIN, run.offset + at - run.start), part)
                elif run.kind == UNALLOCATED:
                    self._below.pread_into(at, part)
                else:
                    part[:] = bytes(len(part))
                yield part

    def _check_end(self, run: _Run, end: int) -> None:
        if run.offset + run.length > end:
            raise CorruptImage(
                f"guest bytes from {run.start:#x} should lie up to {run.offset + run.length:#x}, "
                f"but the {'data ' * self.header.external_data}file ends at {end:#x}",
                hint="the file looks truncated; fetch it again and compare its checksum",
                path=self.file.name,
                offset=None if self.header.external_data else run.offset,
            )

    def _read_plain(self, run: _Run, part: memoryview) -> None:
        data = self._external.image()
        if data is not None:
            self._check_end(run, data.virtual_size)
            data.pread_into(run.offset, part)
            return
        count = self.file.pread_into(run.offset, part)
        if count != len(part):
            raise CorruptImage(
                f"guest bytes from {run.start:#x}: {len(part)} expected, {count} found before the file ends",
                hint="the file looks truncated; fetch it again and compare its checksum",
                path=self.file.name,
                offset=run.offset,
            )

    def compressed_spans(self, descriptors: Iterable[int]) -> list[tuple[int, int]]:
        """Offsets and available bytes of compressed clusters, from their descriptors."""
        mask = compressed_offset_mask(self.header)
        shift, rest = mask.bit_length(), COMPRESSED_FLAG - 1
        return [(word & mask, (((word & rest) >> shift) + 1) * SECTOR - (word & SECTOR - 1)) for word in descriptors]

    def _decoded(self, run: _Run) -> Iterator[Buffer]:
        """The bytes of a compressed run, a cluster or what the run has of it at a time."""
        cluster, decode = self.header.cluster_size, self._decode
        skip, left = run.start % cluster, run.length  # the range may begin inside the first cluster
        for group, blob, base in self._grouped(self.compressed_spans(run.entries)):
            for offset, length in group:
                try:
                    out = decode(blob[offset - base : offset - base + length], cluster)
                except CorruptImage as error:
                    at = (run.start + run.length - left) // cluster * cluster
                    raise CorruptImage(
                        f"guest bytes from {at:#x}: {error.message}", path=self.file.name, offset=offset
                    ) from None
                if skip or left < cluster:
                    out = memoryview(out)[skip : skip + left]
                    skip = 0
                left -= len(out)
                yield out

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
        return memoryview(self.file.pread(base, end - base))

    def ranges(self) -> Iterator[Range]:
        from imagekit.formats.qcow2_claims import claimed_ranges

        return claimed_ranges(self)

    def close(self) -> None:
        self._below.close()
        self._external.close()
        self.file.close()


class Qcow2Format(DiskFormat):
    name = "qcow2"
    suffixes = (".qcow2", ".qcow")
    subformats = ("v3",)
    reads = ("snapshot",)
    writes = ("block_size", "compression")

    def probe(self, file: File) -> str | None:
        return "qcow2 magic at 0" if file.pread(0, 4) == MAGIC else None

    def open(self, file: File, *, resolver: Resolver | None = None, options: OpenOptions = AS_IS) -> Qcow2Image:
        return Qcow2Image(file, resolver, options.snapshot)

    def writer(self, virtual_size: int, options: WriterOptions) -> ImageWriter:
        from imagekit.formats.qcow2_writer import new_writer

        return new_writer(virtual_size, options)

    def check(self, file: File) -> list[Problem]:
        from imagekit.formats.qcow2_check import check

        return check(self.open(file))

    def repair(self, file: File) -> list[Change]:
        from imagekit.formats.qcow2_repair import repair

        return repair(self.open(file))


FORMAT = Qcow2Format()
