"""qcow2 version 3, for writing: plain, or compressed cluster by cluster.

The file is header, L1 table, data, L2 tables, refcount blocks, refcount table, in this order: the data begins where
it can be known before any of it is, and what depends on the data comes behind. Clusters lie in arrival order. The
metadata is computed when it is asked for, in pieces; memory follows what is stored, not the size of the disk.

Compressed clusters are packed as QEMU packs them (qcow2_alloc_bytes): a stream begins right behind the last one, also
in the middle of a host cluster, and may go on in the next cluster where that is its neighbour. The refcount of a host
cluster is the number of streams that touch it.

Not here: version 2, extended L2 entries, backing files, encryption.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import islice
from operator import lt
from typing import TYPE_CHECKING, Literal

from imagekit.errors import UnsupportedFeature
from imagekit.formats.base import (
    SECTOR,
    BlockRuns,
    Buffer,
    EncodedLayout,
    ImageWriter,
    KiB,
    Layout,
    MiB,
    SlotMap,
    WriterOptions,
)
from imagekit.formats.encoders import Encoder, deflate_raw, zstd
from imagekit.formats.qcow2_header import (
    COMPRESSION_TYPE,
    MAX_CLUSTER,
    MAX_L1_BYTES,
    MAX_REFCOUNT_BYTES,
    MIN_CLUSTER,
    Qcow2Header,
    feature_names,
)
from imagekit.formats.qcow2_l2 import COMPRESSED_FLAG, COPIED_FLAG
from imagekit.formats.words import packed
from imagekit.records import dataclass

if TYPE_CHECKING:
    from imagekit.formats.words import Words

DEFAULT_CLUSTER = 64 * KiB
HEADER_LENGTH = 112
REFCOUNT_ORDER = 4
MAX_REFCOUNT = (1 << (1 << REFCOUNT_ORDER)) - 1
MAX_OFFSET = 1 << 56  # of what L1 and L2 entries can say
PIECE = 2 * MiB
"""Bytes of metadata made at once, where a table is not larger."""

Compression = Literal["zlib", "zstd"]
ENCODERS: dict[Compression, Encoder] = {"zlib": deflate_raw, "zstd": zstd}


@dataclass(frozen=True, slots=True)
class _Shape:
    """How many clusters a file has of each kind, and so where each kind begins."""

    cluster: int
    l1: int
    data: int
    tables: int

    @property
    def data_offset(self) -> int:
        return (1 + self.l1) * self.cluster

    @property
    def tables_offset(self) -> int:
        return self.data_offset + self.data * self.cluster

    @property
    def blocks_offset(self) -> int:
        return self.tables_offset + self.tables * self.cluster

    def refcounts(self) -> tuple[int, int]:
        """Clusters of refcount blocks and of the refcount table: they count themselves too."""
        per_block = self.cluster * 8 >> REFCOUNT_ORDER
        others = 1 + self.l1 + self.data + self.tables
        blocks = table = 0
        while True:
            needed = -(-(others + blocks + table) // per_block)
            if needed == blocks:
                return blocks, table
            blocks, table = needed, -(-needed * 8 // self.cluster)

    @property
    def clusters(self) -> int:
        return 1 + self.l1 + self.data + self.tables + sum(self.refcounts())


@dataclass(frozen=True, slots=True)
class _Disk:
    """What every file of one writer has in common."""

    virtual_size: int
    cluster: int
    compression: Compression | None

    @property
    def entries(self) -> int:
        """Entries of an L2 table."""
        return self.cluster // 8

    @property
    def l1_size(self) -> int:
        return -(-self.virtual_size // (self.cluster * self.entries))

    def shape(self, data: int, tables: int) -> _Shape:
        return _Shape(self.cluster, -(-self.l1_size * 8 // self.cluster), data, tables)

    def tables(self, blocks: Iterable[tuple[int, int]]) -> BlockRuns:
        """The L2 tables that lead to the blocks, as runs; the blocks are sorted."""
        runs: list[tuple[int, int]] = []
        for first, count in blocks:
            low, high = first // self.entries, -(-(first + count) // self.entries)
            start, end = (runs[-1][0], sum(runs[-1])) if runs else (-1, -1)
            if low <= end:
                runs[-1] = start, max(end, high) - start
            else:
                runs.append((low, high - low))
        return tuple(runs)

    def header(self, shape: _Shape) -> bytes:
        blocks, table = shape.refcounts()
        kind = 1 if self.compression == "zstd" else 0
        incompatible = COMPRESSION_TYPE if kind else 0
        header = Qcow2Header(
            version=3,
            backing_offset=0,
            backing_length=0,
            cluster_bits=self.cluster.bit_length() - 1,
            size=self.virtual_size,
            crypt_method=0,
            l1_size=self.l1_size,
            l1_offset=self.cluster,
            refcount_offset=shape.blocks_offset + blocks * self.cluster,
            refcount_clusters=table,
            snapshot_count=0,
            snapshots_offset=0,
            incompatible=incompatible,
            refcount_order=REFCOUNT_ORDER,
            header_length=HEADER_LENGTH,
            compression_type=kind,
        )
        # A reader too old for a feature can say by its name what it lacks.
        return header.pack() + (feature_names(incompatible) if incompatible else b"") + bytes(8)


def _count(runs: BlockRuns) -> int:
    return sum(count for _, count in runs)


def _metadata(
    disk: _Disk, shape: _Shape, tables: BlockRuns, entries: Iterable[Words], counts: Words
) -> Iterator[tuple[int, bytes]]:
    """Everything but the data; the header last. ``entries`` are the L2 tables' in order, by :func:`_pieces`;
    ``counts`` the refcounts of the data clusters, where they are not one.
    """
    at = shape.tables_offset
    for words in entries:
        yield at, packed(words, "big")
        at += len(words) * 8
    yield from _refcounts(shape, counts)
    l1 = _zeros(shape.l1 * disk.cluster // 8)
    at = shape.tables_offset
    for first, count in tables:
        l1[first : first + count] = _side_by_side(at, count, disk.cluster, COPIED_FLAG)
        at += count * disk.cluster
    yield disk.cluster, packed(l1, "big")
    yield 0, disk.header(shape)


def _zeros(count: int) -> Words:
    return array("q", [0]) * count


def _side_by_side(first: int, count: int, cluster: int, flag: int = 0) -> Words:
    """Entries for clusters that follow one another. As signed numbers, because a range of larger ones is slow."""
    signed = first - flag  # the flag is the highest bit, or none
    return array("q", range(signed, signed + count * cluster, cluster))


def _refcounts(shape: _Shape, counts: Words) -> Iterator[tuple[int, bytes]]:
    """The refcount blocks and the table of them."""
    blocks, table = shape.refcounts()
    per_block = shape.cluster * 8 >> REFCOUNT_ORDER
    step = max(1, PIECE // shape.cluster)
    first_data, clusters = 1 + shape.l1, shape.clusters
    for first in range(0, blocks, step):
        low, high = first * per_block, min(first + step, blocks) * per_block
        there = min(high, clusters) - low
        numbers = array("H", [1]) * there + array("H", [0]) * (high - low - there)
        start, end = max(low, first_data), min(high, first_data + len(counts))
        if start < end:
            numbers[start - low : end - low] = counts[start - first_data : end - first_data]
        yield shape.blocks_offset + first * shape.cluster, packed(numbers, "big")
    pointers = _side_by_side(shape.blocks_offset, blocks, shape.cluster)
    pointers.extend(_zeros(table * shape.cluster // 8 - blocks))
    yield shape.blocks_offset + blocks * shape.cluster, packed(pointers, "big")


def _pieces(disk: _Disk, tables: BlockRuns) -> Iterator[tuple[int, int]]:
    """(first block, count of blocks) of tables side by side that are made at once."""
    step = max(1, PIECE // disk.cluster)
    for first, count in tables:
        for table in range(first, first + count, step):
            yield table * disk.entries, min(step, first + count - table) * disk.entries


class PlainLayout:
    """Every cluster as it is, in arrival order."""

    prefix = b""

    def __init__(self, disk: _Disk, blocks: BlockRuns) -> None:
        self._disk = disk
        self._slots = SlotMap(blocks)
        self._base = disk.shape(0, 0).data_offset

    def _tables(self) -> BlockRuns:
        return self._disk.tables((first, count) for first, count, _ in self._slots.runs())

    @property
    def file_size(self) -> int:
        return self._disk.shape(self._slots.count, _count(self._tables())).clusters * self._disk.cluster

    def place(self, block: int) -> int:
        slot = self._slots.get(block)
        if slot is None:
            slot = self._slots.add(block)
        return self._base + slot * self._disk.cluster

    def metadata(self) -> Iterator[tuple[int, bytes]]:
        tables = self._tables()
        shape = self._disk.shape(self._slots.count, _count(tables))
        return _metadata(self._disk, shape, tables, self._entries(tables), array("H"))

    def _entries(self, tables: BlockRuns) -> Iterator[Words]:
        runs = self._slots.runs()
        first, count, slot = next(runs, (0, 0, 0))
        for low, length in _pieces(self._disk, tables):
            words = _zeros(length)
            while count and first < low + length:
                inside = min(count, low + length - first)
                offset = self._base + self._disk.cluster * slot
                entries = _side_by_side(offset, inside, self._disk.cluster, COPIED_FLAG)
                words[first - low : first - low + inside] = entries
                # What is left of a run goes on in the next piece.
                first, count, slot = first + inside, count - inside, slot + inside
                if not count:
                    first, count, slot = next(runs, (0, 0, 0))
            yield words


class PackedLayout(EncodedLayout):
    """Clusters compressed where that makes them smaller; zeros are not stored."""

    prefix = b""

    def __init__(self, disk: _Disk, blocks: BlockRuns) -> None:
        assert disk.compression is not None
        self._disk = disk
        self._compress = ENCODERS[disk.compression]
        self._zeros = bytes(disk.cluster)
        self._base = disk.shape(0, 0).data_offset
        self._shift = 62 - (disk.cluster.bit_length() - 1 - 8)
        self._expected = _count(blocks)
        self._expected_tables = _count(disk.tables(sorted(blocks)))
        self._blocks, self._descriptors = array("Q"), array("Q")  # in arrival order
        self._tables: set[int] = set()
        self._counts = array("H")  # of each data cluster: the streams that touch it
        self._end = 0
        """Where the next stream may begin, from the first data cluster on."""

    def encode(self, data: Buffer) -> Buffer:
        if data == self._zeros:
            return b""
        packed = self._compress(data)
        return packed if len(packed) < self._disk.cluster else data

    @property
    def file_size(self) -> int:
        # Whatever is still to come takes a cluster at most, and a table unless that is there already.
        there = len(self._tables)
        tables = min(there + self._expected, max(there, self._expected_tables))
        return self._disk.shape(len(self._counts) + self._expected, tables).clusters * self._disk.cluster

    def place(self, block: int) -> int:
        return self.add(block, self._disk.cluster)

    def add(self, block: int, length: int) -> int:
        self._expected = max(0, self._expected - 1)
        if not length:
            return 0
        if length >= self._disk.cluster:
            offset = self._base + len(self._counts) * self._disk.cluster
            self._counts.append(1)
            descriptor = offset | COPIED_FLAG
        else:
            offset = self._base + self._reserve(length)
            more = (offset + length - 1) // SECTOR - offset // SECTOR
            descriptor = COMPRESSED_FLAG | more << self._shift | offset
        self._blocks.append(block)
        self._descriptors.append(descriptor)
        self._tables.add(block // self._disk.entries)
        return offset

    def _reserve(self, length: int) -> int:
        """Room for a stream: behind the last one, or from a new cluster on."""
        size, counts = self._disk.cluster, self._counts
        left = -self._end % size
        current = self._end // size
        fits = left and (length <= left or current == len(counts) - 1)
        at = self._end if fits and counts[current] < MAX_REFCOUNT else len(counts) * size
        for cluster in range(at // size, (at + length - 1) // size + 1):
            if cluster == len(counts):
                counts.append(0)
            counts[cluster] += 1
        self._end = at + length
        return at

    def metadata(self) -> Iterator[tuple[int, bytes]]:
        blocks, descriptors = self._blocks[:], self._descriptors[:]
        if not all(map(lt, blocks, islice(blocks, 1, None))):
            order = sorted(range(len(blocks)), key=blocks.__getitem__)
            blocks = array("Q", map(self._blocks.__getitem__, order))
            descriptors = array("Q", map(self._descriptors.__getitem__, order))
        tables = self._disk.tables((table * self._disk.entries, 1) for table in sorted(self._tables))
        shape = self._disk.shape(len(self._counts), _count(tables))
        return _metadata(self._disk, shape, tables, self._entries(tables, blocks, descriptors), self._counts)

    def _entries(self, tables: BlockRuns, blocks: Words, descriptors: Words) -> Iterator[Words]:
        for low, length in _pieces(self._disk, tables):
            start, end = bisect_left(blocks, low), bisect_left(blocks, low + length)
            words = array("Q", [0]) * length
            for block, descriptor in zip(blocks[start:end], descriptors[start:end], strict=True):
                words[block - low] = descriptor
            yield words


class Qcow2Writer:
    """Writes version 3."""

    def __init__(self, disk: _Disk) -> None:
        self._disk = disk
        self.virtual_size = disk.virtual_size
        self.block_size = disk.cluster

    def layout(self, blocks: BlockRuns = ()) -> Layout:
        if self._disk.compression is None:
            return PlainLayout(self._disk, blocks)
        return PackedLayout(self._disk, blocks)


def new_writer(virtual_size: int, options: WriterOptions) -> ImageWriter:
    """A writer for that disk; UnsupportedFeature for what no qcow2 can hold or this writer does not write."""
    if options.subformat not in (None, "v3"):
        raise UnsupportedFeature(f"qcow2 subformat {options.subformat!r} is not written", hint="choose one of: v3")
    if options.parent is not None:
        raise UnsupportedFeature("qcow2 images on top of another are not written", hint="leave out the parent")
    if options.sector_size not in (None, SECTOR):
        raise UnsupportedFeature("a qcow2 does not say how large sectors are", hint="leave out --sector-size")
    cluster = options.block_size or DEFAULT_CLUSTER
    if cluster & (cluster - 1) or not MIN_CLUSTER <= cluster <= MAX_CLUSTER:
        raise UnsupportedFeature(
            f"cluster size {cluster}: a power of two from 512 bytes to 2 MiB is needed",
            hint="leave out --block-size for 64K",
        )
    disk = _Disk(virtual_size, cluster, options.compression)
    _check_size(disk)
    return Qcow2Writer(disk)


def _check_size(disk: _Disk) -> None:
    """Whether the tables can lead to all of the disk, as QEMU bounds them."""
    full = disk.shape(-(-disk.virtual_size // disk.cluster), disk.l1_size)
    _, table = full.refcounts()
    highest = MAX_OFFSET if disk.compression is None else min(MAX_OFFSET, 1 << (62 - disk.cluster.bit_length() + 9))
    if (
        disk.l1_size * 8 > MAX_L1_BYTES
        or table * disk.cluster > MAX_REFCOUNT_BYTES
        or full.clusters * disk.cluster > highest
    ):
        raise UnsupportedFeature(
            f"a qcow2 with clusters of {disk.cluster} bytes cannot hold a disk of {disk.virtual_size}",
            hint="choose larger clusters: --block-size 2M" if disk.cluster < MAX_CLUSTER else None,
        )
