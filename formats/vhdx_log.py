"""The log of a VHDX, replayed in memory: the file as it would be had its last writer closed it.

Follows Microsoft's MS-VHDX, 2.3 "Log". The log is a ring of 4 KiB sectors that holds entries; each entry holds
descriptors of 4 KiB pages to be written and of ranges to be zeroed. Any structure but the headers may be waiting in
the log, so it is replayed before anything but the headers is read.

    ring  →  valid entries  →  the active sequence  →  pages and zeroed ranges over the file

Design notes
- Inside a valid entry no sector begins like an entry does: candidates that reach into the next one's first sector
  are not valid, and so the checksums of a ring take one pass over it, however it was made.
- An entry follows another that ends where it starts, with a sequence number one higher. Of the runs made so, those
  count whose last entry (the head) names a tail within the run, and of those the one with the highest number.
- The source is never written. Pages are kept one by one (no more than the ring holds), zeros as ranges: a zeroed
  range of a terabyte costs nothing.

Not here: writing the log, or writing what was replayed into the file (vhdx_change.py).
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from imagekit.errors import CorruptImage, UnsupportedFeature
from imagekit.formats.base import Buffer, File, KiB, MiB, read_exactly, round_up
from imagekit.formats.crc32c import crc32c
from imagekit.formats.vhdx_header import MAX_FILE, REGION_TABLE_OFFSETS, UNIT, Header
from imagekit.records import dataclass

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LOG_SECTOR = 4 * KiB
MAX_LOG = 8 * MiB
"""Windows and QEMU write logs of 1 MiB. What waits in a log is kept in memory, and every entry has a checksum to be
made, so that there must be a limit."""

ENTRY_SIGNATURE = b"loge"
DATA_DESCRIPTOR = b"desc"
ZERO_DESCRIPTOR = b"zero"
DATA_SIGNATURE = b"data"
FIRST_WRITABLE = REGION_TABLE_OFFSETS[0]
"""Nothing in a log may change what comes before: the file identifier and the headers."""

_ENTRY = struct.Struct("<4sIIIQII16sQQ")
_DESCRIPTOR = [("signature", "S4"), ("trailing", "V4"), ("leading", "V8"), ("offset", "<u8"), ("sequence", "<u8")]
_HINT = "attach and detach the image on Hyper-V, or fetch it again"


@dataclass(frozen=True, slots=True)
class EntryHeader:
    """The first 64 bytes of a log entry. ``length`` and ``tail`` in bytes, ``tail`` from the start of the log."""

    length: int
    tail: int
    sequence: int
    descriptors: int
    log_guid: bytes
    flushed_file_offset: int
    """The file had at least this size when the entry was written."""

    last_file_offset: int
    """The file needs at least this size for what it holds then."""

    checksum: int = 0

    @classmethod
    def parse(cls, data: bytes) -> EntryHeader:
        """From at least 64 bytes; the signature and the checksum are the caller's to compare."""
        _, checksum, length, tail, sequence, count, _, guid, flushed, last = _ENTRY.unpack_from(data)
        return cls(length, tail, sequence, count, guid, flushed, last, checksum)

    def pack(self) -> bytes:
        return _ENTRY.pack(
            ENTRY_SIGNATURE,
            self.checksum,
            self.length,
            self.tail,
            self.sequence,
            self.descriptors,
            0,
            self.log_guid,
            self.flushed_file_offset,
            self.last_file_offset,
        )

    @property
    def area(self) -> int:
        """Bytes of the header and the descriptors, whole sectors."""
        return round_up(_ENTRY.size + self.descriptors * 32, LOG_SECTOR)


@dataclass(frozen=True, slots=True)
class Entry:
    """A valid entry and where in the ring it starts."""

    at: int
    header: EntryHeader


class Ring:
    """The log as it lies in the file."""

    def __init__(self, file: File, header: Header) -> None:
        if header.log_length > MAX_LOG:
            raise UnsupportedFeature(
                f"a log of {header.log_length} bytes waits to be replayed; imagekit replays up to {MAX_LOG}",
                hint="attach and detach the image on Hyper-V",
                path=file.name,
                offset=header.log_offset,
            )
        self.length = header.log_length
        self._guid = header.log_guid
        self._data = read_exactly(file, header.log_offset, header.log_length, "the log")

    def read(self, at: int, length: int) -> bytes:
        """Bytes from ``at``, around the ring's end if need be."""
        at %= self.length
        first = self._data[at : at + length]
        return first + self._data[: length - len(first)]

    def entries(self) -> Iterator[Entry]:
        """All valid entries, by place. No two of them overlap."""
        import numpy as np

        sectors = np.frombuffer(self._data, "S4")[:: LOG_SECTOR // 4]
        starts = (np.flatnonzero(sectors == ENTRY_SIGNATURE) * LOG_SECTOR).tolist()
        for start, following in zip(starts, [*starts[1:], *(at + self.length for at in starts[:1])], strict=True):
            header = EntryHeader.parse(self.read(start, _ENTRY.size))
            if header.length <= following - start and self._is_valid(start, header):
                yield Entry(start, header)

    def _is_valid(self, start: int, header: EntryHeader) -> bool:
        if (
            header.log_guid != self._guid
            or header.sequence == 0
            or header.area > header.length
            or header.length % LOG_SECTOR
            or header.tail % LOG_SECTOR
            or header.tail >= self.length
        ):
            return False
        data = self.read(start, header.length)
        if crc32c(data[:4] + bytes(4) + data[8:]) != header.checksum:
            return False
        descriptors, sectors = split_entry(data, header)
        is_data = descriptors["signature"] == DATA_DESCRIPTOR
        known = is_data | (descriptors["signature"] == ZERO_DESCRIPTOR)
        return (
            bool(known.all())
            and bool((descriptors["sequence"] == header.sequence).all())
            and len(sectors) == int(is_data.sum())
            and bool((sectors["signature"] == DATA_SIGNATURE).all())
            and bool((sectors["high"] == header.sequence >> 32).all())
            and bool((sectors["low"] == header.sequence & 0xFFFFFFFF).all())
        )

    def active(self) -> list[Entry]:
        """The entries to replay, the oldest first; empty when no sequence is valid."""
        by_start = {entry.at: entry for entry in self.entries()}
        before: dict[int, Entry] = {}
        heads: list[Entry] = []
        for entry in by_start.values():
            after = by_start.get((entry.at + entry.header.length) % self.length)
            if after is not None and after.header.sequence == entry.header.sequence + 1:
                before[after.at] = entry
            else:
                heads.append(entry)
        found: dict[int, list[Entry]] = {}
        for head in heads:
            run = [head]
            while run[-1].at != head.header.tail and run[-1].at in before:
                run.append(before[run[-1].at])
            if run[-1].at == head.header.tail:
                if head.header.sequence in found:
                    raise CorruptImage(f"two sequences in the log end with number {head.header.sequence}", hint=_HINT)
                found[head.header.sequence] = run[::-1]
        return found[max(found)] if found else []


def split_entry(data: bytes, header: EntryHeader) -> tuple[NDArray[Any], NDArray[Any]]:
    """The descriptors and the data sectors of an entry, as structured arrays."""
    import numpy as np

    sector = [("signature", "S4"), ("high", "<u4"), ("payload", "V4084"), ("low", "<u4")]
    return (
        np.frombuffer(data, np.dtype(_DESCRIPTOR), count=header.descriptors, offset=_ENTRY.size),
        np.frombuffer(data, np.dtype(sector), offset=header.area),
    )


class Ranges:
    """Ranges of a file, sorted and apart."""

    def __init__(self, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
        self.starts = starts
        self.ends = ends

    @classmethod
    def union(cls, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> Ranges:
        """Of ranges in any order, overlapping or adjacent."""
        import numpy as np

        if not len(starts):
            return cls(starts, ends)
        order = np.argsort(starts, kind="stable")
        starts, reach = starts[order], np.maximum.accumulate(ends[order])
        apart = np.flatnonzero(starts[1:] > reach[:-1])
        return cls(starts[np.append(0, apart + 1)], reach[np.append(apart, -1)])

    def within(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """(start, end) of their parts between ``start`` and ``end``."""
        first = int(self.ends.searchsorted(start, "right"))
        last = int(self.starts.searchsorted(end, "left"))
        for at in range(first, last):
            yield max(start, int(self.starts[at])), min(end, int(self.ends[at]))


class ReplayedFile:
    """A file with pages and zeroed ranges over it, read-only; a :class:`imagekit.formats.base.File`.

    ``pages`` are 4 KiB each, by offset; a page lies over both the file and the zeros. ``size`` may exceed that of
    the file: there it reads as zero. ``entries`` says how many log entries were replayed.
    """

    def __init__(self, file: File, size: int, pages: dict[int, bytes], zeros: Ranges, entries: int) -> None:
        import numpy as np

        self.name = file.name
        self.file = file
        self.pages = dict(sorted(pages.items()))
        self.zeros = zeros
        self.entries = entries
        self._size = size
        self._page_starts = list(self.pages)
        grown = [file.size] if size > file.size else []
        starts = np.array(self._page_starts + grown, dtype=np.int64)
        ends = np.append(starts[: len(self.pages)] + LOG_SECTOR, [size] * len(grown)).astype(np.int64)
        self._changed = Ranges.union(np.append(starts, zeros.starts), np.append(ends, zeros.ends))

    @property
    def size(self) -> int:
        return self._size

    @property
    def allocated_size(self) -> int:
        return self.file.allocated_size

    def pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """(offset, length, whether the file itself holds these bytes) of a range, in order."""
        end = offset + length
        for start, stop in self._changed.within(offset, end):
            if offset < start:
                yield offset, start - offset, True
            yield start, stop - start, False
            offset = stop
        if offset < end:
            yield offset, end - offset, True

    def pread_into(self, offset: int, buffer: memoryview) -> int:
        buffer = buffer[: max(0, self._size - offset)]
        end = offset + len(buffer)
        count = self.file.pread_into(offset, buffer) if offset < self.file.size else 0
        buffer[count:] = bytes(len(buffer) - count)
        for start, stop in self.zeros.within(offset, end):
            buffer[start - offset : stop - offset] = bytes(stop - start)
        for page in self._page_starts[bisect_right(self._page_starts, offset - LOG_SECTOR) :]:
            if page >= end:
                break
            start, stop = max(page, offset), min(page + LOG_SECTOR, end)
            buffer[start - offset : stop - offset] = self.pages[page][start - page : stop - page]
        return len(buffer)

    def pread(self, offset: int, length: int) -> bytes:
        data = bytearray(max(0, min(length, self._size - offset)))
        self.pread_into(offset, memoryview(data))
        return bytes(data)

    def pwrite(self, offset: int, *buffers: Buffer) -> None:
        raise self._read_only()

    def truncate(self, size: int) -> None:
        raise self._read_only()

    def _read_only(self) -> UnsupportedFeature:
        return UnsupportedFeature("the log is replayed in memory only; repair the image first", path=self.name)

    def flush(self) -> None:
        pass

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        length = min(length, self._size - offset)
        if length > 0:
            yield offset, length

    def fileno(self) -> int | None:
        return None  # the kernel would read what is under the log

    def close(self) -> None:
        self.file.close()


def replay(file: File, header: Header) -> ReplayedFile:
    """The file with its log replayed over it. CorruptImage when the log holds no valid sequence."""
    ring = Ring(file, header)
    try:
        active = ring.active()
        if not active:
            raise CorruptImage("the image was not closed, and its log holds no valid sequence of entries", hint=_HINT)
        _check_sizes(file.size, active[-1].header)
        return _apply(file, header, ring, active)
    except CorruptImage as error:
        error.path = file.name
        error.offset = header.log_offset
        raise


def _check_sizes(file_size: int, head: EntryHeader) -> None:
    if file_size < head.flushed_file_offset:
        raise CorruptImage(
            f"the file has {file_size} bytes; it had {head.flushed_file_offset} when its log was written",
            hint="the file looks truncated; fetch it again and compare its checksum",
        )
    if head.last_file_offset > MAX_FILE:
        raise CorruptImage(f"the log makes the file {head.last_file_offset} bytes long, more than any VHDX needs")


def _apply(file: File, header: Header, ring: Ring, active: list[Entry]) -> ReplayedFile:
    import numpy as np

    last = active[-1].header.last_file_offset
    size = round_up(last, UNIT) if last > file.size else file.size
    pages: dict[int, tuple[int, bytes]] = {}  # by offset: (zeroed ranges before it, bytes)
    starts: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    ends: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    earlier = 0
    for entry in active:
        descriptors, sectors = split_entry(ring.read(entry.at, entry.header.length), entry.header)
        is_data, offsets, stops = _targets(descriptors, header)
        before = (earlier + np.cumsum(~is_data))[is_data].tolist()
        rows = zip(descriptors[is_data], sectors["payload"], before, offsets[is_data].tolist(), strict=True)
        for descriptor, payload, count, offset in rows:
            leading, trailing = descriptor["leading"].tobytes(), descriptor["trailing"].tobytes()
            pages[offset] = count, leading + payload.tobytes() + trailing
            size = max(size, offset + LOG_SECTOR)
        starts.append(offsets[~is_data])
        ends.append(stops[~is_data])
        earlier += len(starts[-1])
    return _overlay(file, size, pages, np.concatenate(starts), np.concatenate(ends), entries=len(active))


def _targets(
    descriptors: NDArray[Any], header: Header
) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
    """Whether each descriptor is one of data, and from where to where it changes the file; all bounded."""
    import numpy as np

    is_data = descriptors["signature"] == DATA_DESCRIPTOR
    offsets = descriptors["offset"]
    lengths = np.where(is_data, LOG_SECTOR, np.ascontiguousarray(descriptors["leading"]).view("<u8"))
    log_end = header.log_offset + header.log_length
    # Both are bounded before they are added: the sum of two u64 may wrap around.
    small = (offsets <= MAX_FILE) & (lengths <= MAX_FILE)
    starts, ends = (
        np.where(small, offsets, 0).astype(np.int64),
        np.where(small, offsets + lengths, 0).astype(np.int64),
    )
    aligned = (offsets % LOG_SECTOR == 0) & (lengths % LOG_SECTOR == 0)
    apart = (ends <= header.log_offset) | (starts >= log_end)
    wrong = np.flatnonzero(~(small & aligned & apart & (starts >= FIRST_WRITABLE) & (ends <= MAX_FILE)))
    if len(wrong):
        offset, length = int(offsets[wrong[0]]), int(lengths[wrong[0]])
        raise CorruptImage(f"the log changes {length} bytes at {offset:#x}, where a log may not change anything")
    return is_data, starts, ends


def _overlay(
    file: File,
    size: int,
    pages: dict[int, tuple[int, bytes]],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    *,
    entries: int,
) -> ReplayedFile:
    """What is left of the pages when each zeroed range has zeroed those that came before it."""
    import numpy as np

    order = sorted(pages)
    places = np.array(order, dtype=np.int64)
    last = np.zeros(len(order), dtype=np.int64)  # 1 + the last zeroed range over each page
    if len(order):
        edges = zip(places.searchsorted(starts).tolist(), places.searchsorted(ends).tolist(), strict=True)
        for at, (first, stop) in enumerate(edges):
            last[first:stop] = at + 1
    left = {at: pages[at][1] for at, zeroed in zip(order, last.tolist(), strict=True) if pages[at][0] >= zeroed}
    # Behind the end there is nothing to be zeroed, and a range that became empty is none.
    ends = np.minimum(ends, size)
    real = starts < ends
    return ReplayedFile(file, size, left, Ranges.union(starts[real], ends[real]), entries)
