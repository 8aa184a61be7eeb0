"""Compressed grains and the markers before them; and a streamOptimized VMDK read in one pass, as from a pipe.

Follows "Stream-Optimized Compressed Sparse Extents" of VMware's "Virtual Disk Format 5.0". A grain is a marker (the
sector of the disk that it holds, the length of what follows) and a zlib stream; the next one starts on a sector.

    VMware, VirtualBox   header, descriptor, (grains, grain table)…, grain directory, footer, end of stream
    QEMU                 header, descriptor, directories and tables, grains; then the file ends, or zeros follow

Design notes
- Whoever reads by the tables and whoever reads by the markers must see one disk. So the pass checks each grain
  against the tables: QEMU's are known before the grains, the others' come behind theirs. A grain that no table has,
  or that is missing where a table has it, is damage, found at the latest when the stream ends.
- What was read cannot be taken back: a caller publishes nothing before the iteration has ended without an error.
- Memory is bounded: tables wait only for their grains, and no more of them than `MAX_WAITING` allows.
"""

from __future__ import annotations

import struct
import zlib
from array import array
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeAlias

from imagekit.errors import CorruptImage, UnsupportedFeature
from imagekit.formats.base import SECTOR, Buffer, ImageInfo, KiB, MiB, round_up
from imagekit.formats.vmdk_descriptor import Descriptor
from imagekit.formats.vmdk_header import AT_END, TRUNCATED, GrainLayout, HostedHeader
from imagekit.formats.vmdk_info import check_readable, sparse_info
from imagekit.formats.words import differing, is_zero, packed, used, words32
from imagekit.records import dataclass

if TYPE_CHECKING:
    from imagekit.formats.words import Words

Read: TypeAlias = Callable[[int], bytes]
"""Up to so many bytes; none only at the end."""

END_OF_STREAM, GRAIN_TABLE, GRAIN_DIRECTORY, FOOTER = range(4)
FOOTER_BYTES = 3 * SECTOR
"""Footer marker, footer, end-of-stream marker: the last of a file that was written in one pass."""

MAX_WAITING = 64 * MiB
"""Grain tables kept in memory: those of 1 TiB of data, or QEMU's for a disk of 512 GiB."""

MAX_SPARE = 64 * KiB
"""Unused bytes of a grain directory, and a piece of what is behind the end."""

PIECE = 16384
"""Entries of a grain directory that are compared at once."""

_MARKER = struct.Struct("<QII")
GRAIN_MARKER_BYTES = 12


@dataclass(frozen=True, slots=True)
class Marker:
    """The start of a sector in a stream. ``type`` is meaningless where ``size`` is not 0: a grain follows."""

    value: int
    """The disk's sector that a grain holds; else the sectors that follow."""

    size: int = 0
    """Compressed bytes of a grain, from the 12th byte of the marker on."""

    type: int = END_OF_STREAM

    @classmethod
    def parse(cls, data: Buffer) -> Marker:
        """From at least 16 bytes; a grain's own 12 are enough for ``value`` and ``size``."""
        return cls(*_MARKER.unpack(bytes(data[: _MARKER.size]).ljust(_MARKER.size, b"\0")))

    def pack(self) -> bytes:
        return _MARKER.pack(self.value, self.size, self.type)

    def check_grain(self, grain: int) -> None:
        """A grain is not empty, and no writer lets one grow to twice its size."""
        if not 0 < self.size <= 2 * grain:
            raise CorruptImage(f"a compressed grain of {self.size} bytes, expected 1 to {2 * grain}")


def inflate(data: Buffer, least: int, most: int) -> Buffer:
    """A grain from its zlib stream. The last one of a disk may hold just what the disk has, or be whole."""
    import deflate

    try:
        out: Buffer = deflate.zlib_decompress(data, most)
    except deflate.DeflateError:
        # libdeflate says no more than no: the slow decoder tells what is wrong.
        try:
            out = zlib.decompressobj().decompress(data, most + 1)
        except zlib.error as error:
            raise CorruptImage(f"the zlib stream is damaged: {error}") from None
        raise CorruptImage(
            f"the zlib stream holds more than its grain of {most} bytes"
            if len(out) > most
            else f"the zlib stream is not complete: {len(out)} bytes came out, {most} expected"
        ) from None
    if len(out) < least:
        raise CorruptImage(f"the zlib stream holds {len(out)} bytes, the grain has {least}")
    return out


def check_footer(header: HostedHeader, data: bytes, *, offset: int) -> HostedHeader:
    """The footer's header from the last three sectors; CorruptImage unless it is the header's, with a directory."""
    marker, end = Marker.parse(data[:SECTOR]), Marker.parse(data[2 * SECTOR :])
    if len(data) != FOOTER_BYTES or (marker.size, marker.type) != (0, FOOTER) or end != Marker(0):
        raise CorruptImage(
            "the file does not end in a footer and an end-of-stream marker", hint=TRUNCATED, offset=offset
        )
    footer = HostedHeader.parse(data[SECTOR : 2 * SECTOR], offset=offset + SECTOR)
    if footer.content_fields != header.content_fields:
        raise CorruptImage(
            "the footer describes another disk than the header", hint="ask who made it", offset=offset + SECTOR
        )
    if footer.directory_offset == AT_END:
        raise CorruptImage("the footer does not say where the grain directory is", offset=offset + SECTOR + 56)
    return footer


# --- one pass --------------------------------------------------------------------------------------------------


class _Input:
    """Reads exactly, and knows where it is."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self.position = 0

    def upto(self, length: int) -> bytes:
        parts = []
        while length:
            part = self._read(length)
            if not part:
                break
            parts.append(part)
            length -= len(part)
            self.position += len(part)
        return b"".join(parts)

    def exactly(self, length: int, what: str) -> bytes:
        data = self.upto(length)
        if len(data) != length:
            raise CorruptImage(
                f"{what} is cut short: {length} bytes expected, {len(data)} found",
                hint=TRUNCATED,
                offset=self.position,
            )
        return data


class GrainStream:
    """A streamOptimized VMDK as it passes by. Iterate once: (guest offset, bytes) of each grain, in file order.

    Header and descriptor are there before the first grain. What is not yielded is zero.
    """

    def __init__(self, read: Read, name: str = "-") -> None:
        self._input = _Input(read)
        self._name = name
        self.header = header = HostedHeader.parse(self._input.exactly(SECTOR, "the VMDK header"))
        if not header.compressed:
            raise UnsupportedFeature(
                "a VMDK that is not streamOptimized cannot be read in one pass", hint="save it to a file first"
            )
        self._layout = header.layout()
        self._layout.validate(name, None)
        self.virtual_size = self._layout.virtual_size
        front = self._read_front()
        self.descriptor = self._read_descriptor(front)
        self._tables: _TablesFirst | _TablesLast
        if header.directory_offset < header.overhead:
            self._tables = _TablesFirst(self._layout, front)
        else:
            self._tables = _TablesLast(header, self._layout)

    def _read_front(self) -> bytes:
        """All that is before the grains: the descriptor and, as QEMU writes it, the tables."""
        length = self.header.overhead * SECTOR
        if length > MAX_WAITING:
            raise UnsupportedFeature(
                f"{length} bytes of tables before the data, at most {MAX_WAITING} are kept",
                hint="save it to a file first",
            )
        return self.header.pack() + self._input.exactly(max(0, length - SECTOR), "what is before the grains")

    def _read_descriptor(self, front: bytes) -> Descriptor | None:
        start, length = self.header.descriptor_offset * SECTOR, self.header.descriptor_size * SECTOR
        if start and start + length > len(front):
            raise UnsupportedFeature("the descriptor lies behind the data", hint="save it to a file first", offset=28)
        return Descriptor.embedded(front[start : start + length], offset=start) if start else None

    def info(self) -> ImageInfo:
        """What header and descriptor say; the facts to judge before the content is used."""
        return sparse_info(self.header, self._layout, self.descriptor)

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        check_readable(self.header, self.descriptor, self._name)
        source = self._input
        while True:
            at = source.position
            head = source.upto(SECTOR)
            if not head and self._tables.may_just_end:
                break
            if len(head) != SECTOR:
                raise CorruptImage("the stream ends without an end-of-stream marker", hint=TRUNCATED, offset=at)
            marker = Marker.parse(head)
            try:
                if marker.size:
                    yield self._grain(marker, head, at)
                    continue
                if marker.type == END_OF_STREAM:
                    self._end(marker)
                    break
                self._tables.metadata(marker, source)
            except CorruptImage as error:
                error.offset = at if error.offset is None else error.offset
                error.path = error.path or self._name
                raise
        self._tables.finish()

    def _grain(self, marker: Marker, head: bytes, at: int) -> tuple[int, bytes]:
        layout = self._layout
        marker.check_grain(layout.grain)
        index, inside = divmod(marker.value * SECTOR, layout.grain)
        if inside or index >= layout.grains:
            raise CorruptImage(f"a grain for sector {marker.value}, which starts no grain of this disk")
        end = GRAIN_MARKER_BYTES + marker.size
        # The last bytes of a file that just ends need not be there: nothing of the grain is in them.
        data = head + self._input.upto(round_up(end, SECTOR) - SECTOR)
        if len(data) < end:
            raise CorruptImage(f"a grain is cut short: {end} bytes expected, {len(data)} found", hint=TRUNCATED)
        start = index * layout.grain
        seen = min(layout.grain, self.virtual_size - start)
        out = inflate(memoryview(data)[GRAIN_MARKER_BYTES:end], seen, layout.grain)
        self._tables.take(index, at // SECTOR)
        return start, bytes(memoryview(out)[:seen])

    def _end(self, marker: Marker) -> None:
        if marker.value:
            raise CorruptImage("a damaged end-of-stream marker")
        while rest := self._input.upto(MAX_SPARE):
            # QEMU makes room for the next grain, and leaves it behind when there is none.
            if rest.count(0) != len(rest) or not self._tables.may_just_end:
                raise CorruptImage("there is more behind the end-of-stream marker")


def read_stream(read: Read, name: str = "-") -> GrainStream:
    """A streamOptimized VMDK from whatever can be read forward only; ``name`` is for messages.

    UnsupportedFeature when it needs random access, InvalidImage or CorruptImage when it is damaged.
    """
    return GrainStream(read, name)


# --- what the tables say of the grains -------------------------------------------------------------------------


def _table(front: bytes, place: int, layout: GrainLayout) -> bytes:
    return front[place : place + layout.table_bytes]


def _grains(table: bytes, layout: GrainLayout) -> Words:
    """The entries of a table, 0 where one leads to no grain."""
    entries = words32(table, "little")
    if layout.zero_grains:
        entries = array("I", [0 if entry == 1 else entry for entry in entries])
    return entries


class _TablesFirst:
    """The tables lie before the grains: each grain is crossed off where a table has it."""

    may_just_end = True

    def __init__(self, layout: GrainLayout, front: bytes) -> None:
        self._layout = layout
        self._waiting: dict[int, Words] = {}
        self._left: dict[int, int] = {}
        """How many grains of a table are still to come."""

        own = self._read(front, layout.directory)
        if layout.backup is not None:
            other = self._read(front, layout.backup)
            for number in sorted(own.keys() | other.keys()):
                one, two = own.get(number), other.get(number)
                if one is None or two is None or _table(front, one, layout) != _table(front, two, layout):
                    raise CorruptImage(f"the two grain directories lead to different tables {number}")
        for number, place in own.items():
            entries = _grains(_table(front, place, layout), layout)[: layout.grains - number * layout.per_table]
            if left := len(entries) - entries.count(0):
                self._waiting[number], self._left[number] = entries, left

    def _read(self, front: bytes, directory: int) -> dict[int, int]:
        """Where the tables of a directory lie that hold anything."""
        layout = self._layout
        end = directory + layout.tables * 4
        places = words32(front[directory:end], "little") if end <= len(front) else None
        if places is None or max(places) * SECTOR > len(front) - layout.table_bytes:
            raise UnsupportedFeature(
                "the grain tables lie behind the data, their directory before it", hint="save it to a file first"
            )
        there = {number: places[number] * SECTOR for number in used(places)}
        if len(there) * layout.table_bytes > len(front):
            raise CorruptImage(f"{len(there)} grain tables in {len(front)} bytes: they overlap")
        return {number: place for number, place in there.items() if not is_zero(_table(front, place, layout))}

    def take(self, index: int, sector: int) -> None:
        """A grain came by; CorruptImage unless a table has it just there."""
        number, slot = divmod(index, self._layout.per_table)
        entries = self._waiting.get(number)
        if entries is None or entries[slot] != sector:
            raise CorruptImage(f"grain {index} lies where no grain table has it, or comes twice")
        entries[slot] = 0
        self._left[number] -= 1
        if not self._left[number]:
            del self._waiting[number], self._left[number]

    def metadata(self, marker: Marker, source: _Input) -> None:
        raise CorruptImage(f"a marker of type {marker.type} behind the data, where the tables were before it")

    def finish(self) -> None:
        if self._waiting:
            number = min(self._waiting)
            grain = number * self._layout.per_table + next(used(self._waiting[number]))
            raise CorruptImage(f"the stream ends, and grain {grain} is missing", hint=TRUNCATED)


class _TablesLast:
    """Each table comes behind its grains, the directory behind the tables: each is compared with what came."""

    may_just_end = False

    def __init__(self, header: HostedHeader, layout: GrainLayout) -> None:
        if layout.backup is not None:
            raise UnsupportedFeature("a redundant grain directory behind the data", hint="save it to a file first")
        if layout.tables * 4 > MAX_WAITING:
            raise UnsupportedFeature(
                f"a grain directory of {layout.tables} entries, at most {MAX_WAITING // 4} are kept",
                hint="save it to a file first",
            )
        self._header = header
        self._layout = layout
        self._waiting: dict[int, Words] = {}
        self._first: dict[int, int] = {}
        """By the sector of the grain that came first of a table: the number of the table."""

        self._located = array("I", [0]) * layout.tables
        self._empty: set[int] = set()
        """Sectors of tables without a grain, which any table without a grain may be."""

        self._directory: int | None = None
        self._footer = False

    def take(self, index: int, sector: int) -> None:
        """A grain came by; CorruptImage when it did before, or after its table."""
        number, slot = divmod(index, self._layout.per_table)
        if self._directory is not None or self._located[number] or sector > 0xFFFFFFFF:
            raise CorruptImage(f"grain {index} comes behind its grain table, or where no table can point to")
        entries = self._waiting.get(number)
        if entries is None:
            if len(self._waiting) * self._layout.table_bytes >= MAX_WAITING:
                raise UnsupportedFeature("the grain tables come too late", hint="save it to a file first")
            entries = self._waiting[number] = array("I", [0]) * self._layout.per_table
            self._first[sector] = number
        if entries[slot]:
            raise CorruptImage(f"grain {index} comes twice")
        entries[slot] = sector

    def metadata(self, marker: Marker, source: _Input) -> None:
        """A marker that is followed by as many sectors as it says."""
        sector, length = source.position // SECTOR, marker.value * SECTOR
        needed = {GRAIN_TABLE: self._layout.table_bytes, GRAIN_DIRECTORY: len(self._located) * 4, FOOTER: SECTOR}
        if marker.type not in needed:
            raise CorruptImage(f"a marker of unknown type {marker.type}")
        spare = length - round_up(needed[marker.type], SECTOR)
        # Only the directory has a size that writers may round up further.
        if not 0 <= spare <= (MAX_SPARE if marker.type == GRAIN_DIRECTORY else 0):
            raise CorruptImage(f"a marker of type {marker.type} that announces {marker.value} sectors")
        if self._footer or (self._directory is None) == (marker.type == FOOTER):
            raise CorruptImage(f"a marker of type {marker.type} out of place")
        data = source.exactly(length, "the metadata behind the data")
        if marker.type == GRAIN_TABLE:
            self._table(data, sector)
        elif marker.type == GRAIN_DIRECTORY:
            self._grain_directory(data, sector)
        else:
            self._check_footer(data)

    def _table(self, data: bytes, sector: int) -> None:
        entries = _grains(data[: self._layout.table_bytes], self._layout)
        if not any(entries):
            self._empty.add(sector)
            return
        first = next(filter(self._first.__contains__, entries), None)
        number = None if first is None else self._first.pop(first)
        if number is None or self._waiting.pop(number) != entries:
            raise CorruptImage("a grain table does not say where the grains before it lie")
        self._located[number] = sector

    def _grain_directory(self, data: bytes, sector: int) -> None:
        if any(data[len(self._located) * 4 :]):
            raise CorruptImage("the grain directory has more entries than the disk")
        for first in range(0, len(self._located), PIECE):
            located = self._located[first : first + PIECE]
            piece = data[first * 4 : (first + len(located)) * 4]
            if piece == packed(located, "little"):
                continue
            entries = words32(piece, "little")
            for at in differing(entries, located):
                if located[at] or entries[at] not in self._empty:
                    raise CorruptImage(f"the grain directory does not say where grain table {first + at} lies")
        if self._waiting:
            raise CorruptImage(f"the grain directory comes before grain table {min(self._waiting)}")
        self._directory = sector

    def _check_footer(self, data: bytes) -> None:
        footer = HostedHeader.parse(data)
        if footer.content_fields != self._header.content_fields or footer.directory_offset != self._directory:
            raise CorruptImage("the footer describes another disk than the header, or another directory")
        self._footer = True

    def finish(self) -> None:
        wanted = self._header.directory_offset
        if self._directory is None or not (self._footer if wanted == AT_END else wanted == self._directory):
            raise CorruptImage("the stream ends before its grain directory or its footer", hint=TRUNCATED)
