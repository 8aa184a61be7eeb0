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
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import compress, repeat
from operator import gt
from typing import TYPE_CHECKING, TypeAlias

from imagekit.errors import CorruptImage, UnsupportedFeature
from imagekit.formats.base import Buffer, File, KiB, MiB, read_exactly, round_up
from imagekit.formats.crc32c import crc32c
from imagekit.formats.vhdx_header import MAX_FILE, REGION_TABLE_OFFSETS, UNIT, Header
from imagekit.formats.words import words32, words64

if TYPE_CHECKING:
    from imagekit.formats.words import Words

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
_DATA, _ZERO = (int.from_bytes(kind, "little") for kind in (DATA_DESCRIPTOR, ZERO_DESCRIPTOR))
_DESCRIPTOR = 32
"""Bytes: signature, a page's last four, its first eight or how much is zeroed, offset, sequence number."""

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
        starts = [at for at in range(0, self.length, LOG_SECTOR) if self._data.startswith(ENTRY_SIGNATURE, at)]
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
        if crc32c(data[8:], crc32c(data[:4] + bytes(4))) != header.checksum:
            return False
        sequence = header.sequence.to_bytes(8, "little")
        descriptors = data[_ENTRY.size : _ENTRY.size + header.descriptors * _DESCRIPTOR]
        signatures = words32(descriptors, "little")[0::8]
        pages = signatures.count(_DATA)
        return (
            pages + signatures.count(_ZERO) == header.descriptors
            and words64(descriptors, "little")[3::4].count(header.sequence) == header.descriptors
            and header.area + pages * LOG_SECTOR == header.length
            and all(
                data.startswith(DATA_SIGNATURE + sequence[4:], at)
                and data.startswith(sequence[:4], at + LOG_SECTOR - 4)
                for at in range(header.area, header.length, LOG_SECTOR)
            )
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


class Ranges:
    """Ranges of a file, sorted and apart."""

    def __init__(self, starts: Words, ends: Words) -> None:
        self.starts = starts
        self.ends = ends

    @classmethod
    def union(cls, starts: Sequence[int], ends: Sequence[int]) -> Ranges:
        """Of ranges in any order, overlapping or adjacent."""
        starts, ends = sorted(starts), sorted(ends)
        # Between two of the starts is a gap where as many ranges have ended as have begun.
        gaps = bytes(map(gt, starts[1:], ends))
        return cls(
            array("Q", [*starts[:1], *compress(starts[1:], gaps)]),
            array("Q", [*compress(ends, gaps), *ends[-1:]]),
        )

    def before(self, end: int) -> Ranges:
        """Their parts before ``end``."""
        count = bisect_left(self.starts, end)
        return Ranges(self.starts[:count], array("Q", map(min, self.ends[:count], repeat(end))))

    def within(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """(start, end) of their parts between ``start`` and ``end``."""
        for at in range(bisect_right(self.ends, start), bisect_left(self.starts, end)):
            yield max(start, self.starts[at]), min(end, self.ends[at])


class ReplayedFile:
    """A file with pages and zeroed ranges over it, read-only; a :class:`imagekit.formats.base.File`.

    ``pages`` are 4 KiB each, by offset; a page lies over both the file and the zeros. ``size`` may exceed that of
    the file: there it reads as zero. ``entries`` says how many log entries were replayed.
    """

    def __init__(self, file: File, size: int, pages: dict[int, bytes], zeros: Ranges, entries: int) -> None:
        self.name = file.name
        self.file = file
        self.pages = dict(sorted(pages.items()))
        self.zeros = zeros
        self.entries = entries
        self._size = size
        self._page_starts = list(self.pages)
        grown = [file.size] if size > file.size else []
        ends = [at + LOG_SECTOR for at in self._page_starts] + [size] * len(grown)
        self._changed = Ranges.union(
            array("Q", self._page_starts + grown) + zeros.starts, array("Q", ends) + zeros.ends
        )

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


Pages: TypeAlias = dict[int, tuple[int, bytes]]
"""By offset: how many ranges were zeroed before the page was written, and its bytes."""


def _apply(file: File, header: Header, ring: Ring, active: list[Entry]) -> ReplayedFile:
    last = active[-1].header.last_file_offset
    size = round_up(last, UNIT) if last > file.size else file.size
    pages: Pages = {}
    starts, ends = array("Q"), array("Q")
    log, log_end = header.log_offset, header.log_offset + header.log_length
    for entry in active:
        data, sector = ring.read(entry.at, entry.header.length), entry.header.area
        descriptors = memoryview(data)[_ENTRY.size : _ENTRY.size + entry.header.descriptors * _DESCRIPTOR]
        words, signatures = words64(descriptors, "little"), words32(descriptors, "little")[0::8]
        for at, (signature, second, offset) in enumerate(zip(signatures, words[1::4], words[2::4], strict=True)):
            length = LOG_SECTOR if signature == _DATA else second
            end = offset + length
            if (
                (offset | length) % LOG_SECTOR
                or not FIRST_WRITABLE <= offset <= end <= MAX_FILE
                or (end > log and offset < log_end)
            ):
                raise CorruptImage(
                    f"the log changes {length} bytes at {offset:#x}, where a log may not change anything"
                )
            if signature == _DATA:
                one = descriptors[at * _DESCRIPTOR : (at + 1) * _DESCRIPTOR]
                page = b"".join((one[8:16], data[sector + 8 : sector + LOG_SECTOR - 4], one[4:8]))
                pages[offset] = len(starts), page
                sector += LOG_SECTOR
                size = max(size, end)
            elif length:
                starts.append(offset)
                ends.append(end)
    return _overlay(file, size, pages, starts, ends, entries=len(active))


def _overlay(file: File, size: int, pages: Pages, starts: Words, ends: Words, *, entries: int) -> ReplayedFile:
    """What is left of the pages when each zeroed range has zeroed those that came before it."""
    left = {offset: data for offset, (_, data) in pages.items()}
    undecided = sorted(pages)
    for at in reversed(range(len(starts))):  # the last range over a page decides
        if not undecided:
            break
        over = slice(bisect_left(undecided, starts[at]), bisect_left(undecided, ends[at]))
        for offset in undecided[over]:
            if pages[offset][0] <= at:
                del left[offset]
        del undecided[over]
    zeros = Ranges.union(starts, ends).before(size)
    return ReplayedFile(file, size, left, zeros, entries)
