"""The BAT of a VHDX and its sector bitmaps, decoded window by window.

Follows Microsoft's MS-VHDX, 2.5 "BAT". The BAT of a 64 TiB disk has 512 MiB: it is never in memory as a whole. A
window of blocks is read and decoded, into bytes that are kinds and an array of offsets, and checked then: every block
that a guest can see lies behind the first MiB, inside the file, and on no region's place. A few windows and a few
pieces of sector bitmaps are kept.

Design notes
- QEMU before 8.0.1 could leave junk in entries that no block uses, so what is not needed is not looked at: the
  entries of sector bitmaps where there is no parent, and those behind the last block.
- The last block may be cut short by the file's end, past the end of the disk.
- A partially present block where there is no parent is read as a present one, as Windows does.
- A window is judged as a whole, by what runs in C; block by block only where something in it is wrong, to name that.
"""

from __future__ import annotations

import functools
import re
import threading
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import chain, compress, pairwise, repeat
from operator import add, mul, ne
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from imagekit.errors import CorruptImage
from imagekit.formats.base import File, KiB, read_exactly
from imagekit.formats.vhdx_header import HEADER_AREA, MAX_FILE
from imagekit.formats.vhdx_metadata import (
    BITMAP_PRESENT,
    BITMAP_SIZE,
    ENTRY_SIZE,
    FULLY_PRESENT,
    NOT_PRESENT,
    OFFSET_BITS,
    PARTIALLY_PRESENT,
    RESERVED_BITS,
    STATE_BITS,
    Geometry,
)
from imagekit.formats.words import is_sequence, is_zero, packed, used, words64

if TYPE_CHECKING:
    from imagekit.formats.words import Words

# What a run of the guest's disk is.
ABSENT, HERE, ZEROED, PARTIAL = 0, 1, 2, 3

WINDOW = 1 << 15
"""Blocks decoded at a time."""

BITMAP_PIECE = 64 * KiB
"""Bytes of a sector bitmap read at a time: the largest block has no more bits."""

_WINDOWS, _PIECES = 8, 16
_DAMAGED = "the file looks damaged or truncated; fetch it again and compare its checksum"
_INVALID = 4  # the one state that does not exist

# For bytes.translate: the state in the first byte of an entry, the kind of a state, whether a kind has a place.
_STATES = bytes(value & STATE_BITS for value in range(256))
_OF_STATES = {NOT_PRESENT: ABSENT, FULLY_PRESENT: HERE, PARTIALLY_PRESENT: PARTIAL}
_CHILDS_KINDS = bytes(_OF_STATES.get(state, ZEROED) for state in range(256))
_KINDS = _CHILDS_KINDS.replace(bytes([PARTIAL]), bytes([HERE]))
_PLACED = bytes(kind in (HERE, PARTIAL) for kind in range(256))
_UNPLACED = bytes(kind not in (HERE, PARTIAL) for kind in range(256))

# What the first and the third byte of an entry without reserved bits can be; the second is zero.
_FIRST_BYTES, _THIRD_BYTES = bytes(range(STATE_BITS + 1)), bytes(range(0, 256, 16))

_ALIKE = re.compile(rb"\x00+|\x01+|\x02+|\x03+")
_ALIKE_BITS = re.compile("0+|1+")

Value = TypeVar("Value")


class Run(NamedTuple):
    """A part of the guest's disk of one kind. ``offset`` is where it lies in the file (HERE)."""

    start: int
    length: int
    kind: int
    offset: int = 0

    def joins(self, after: Run) -> bool:
        """Whether ``after``, which begins where this ends, continues it in the file too."""
        return self.kind == after.kind and (self.kind != HERE or self.offset + self.length == after.offset)


class Window(NamedTuple):
    """Decoded entries of neighbouring blocks: one byte each; a place in the file or 0, not to be changed."""

    states: bytes
    kinds: bytes
    offsets: Words


class _Cache(Generic[Value]):
    """The values used last. Safe to share between threads."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[tuple[int, int], Value] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[int, int]) -> Value | None:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: tuple[int, int], value: Value) -> None:
        with self._lock:
            self._values[key] = value
            while len(self._values) > self._size:
                self._values.popitem(last=False)


class Bat:
    """Which block lies where. ``taken`` are the (start, end) of everything else in the file."""

    def __init__(self, file: File, geometry: Geometry, offset: int, taken: Iterable[tuple[int, int]]) -> None:
        self.geometry = geometry
        self.offset = offset
        self._file = file
        self._taken = sorted([(0, HEADER_AREA), *taken])
        self._windows: _Cache[Window] = _Cache(_WINDOWS)
        self._pieces: _Cache[bytes] = _Cache(_PIECES)

    # --- entries ---------------------------------------------------------------------------------------------

    def window(self, number: int) -> Window:
        """The blocks from ``number * WINDOW``; CorruptImage when an entry points where no block can be."""
        found = self._windows.get((number, 0))
        if found is None:
            found = self._load(number)
            self._windows.put((number, 0), found)
        return found

    def _load(self, number: int) -> Window:
        geometry = self.geometry
        first, stop = number * WINDOW, min((number + 1) * WINDOW, geometry.blocks)
        start, end = geometry.payload_index(first), geometry.payload_index(stop - 1) + 1
        raw = read_exactly(self._file, self.offset + start * ENTRY_SIZE, (end - start) * ENTRY_SIZE, "the BAT")
        count = stop - first
        if is_zero(raw):
            return _nothing(count)
        entries = words64(raw, "little")
        del entries[geometry.bitmap_slots(start, end)]
        stored = packed(entries, "little")
        states = stored[::ENTRY_SIZE].translate(_STATES)
        kinds = states.translate(_CHILDS_KINDS if geometry.differencing else _KINDS)
        here = kinds.translate(_PLACED)
        self._refuse(states.find(_INVALID), first, entries, "has the state 4, which does not exist")
        if _has_reserved(stored):
            wrong = next((at for at in used(here) if entries[at] & RESERVED_BITS), -1)
            self._refuse(wrong, first, entries, "has reserved bits set")
        places = bytearray(stored)
        places[::ENTRY_SIZE] = bytes(count)
        offsets = words64(places, "little")
        if 0 in here and any(compress(offsets, kinds.translate(_UNPLACED))):
            offsets = array("Q", map(mul, offsets, here))
        if not self._all_inside(offsets, here):
            wrong = next((at for at in used(here) if self._is_outside(first + at, offsets[at])), -1)
            self._refuse(wrong, first, entries, "does not lie in the file, or lies on one of its tables")
        return Window(states, kinds, offsets)

    def _all_inside(self, offsets: Words, here: bytes) -> bool:
        """Whether blocks of full length at the ``offsets`` that are places lie where blocks can lie."""
        size = self.geometry.block_size
        in_order = is_sequence(offsets, size)
        places = offsets if in_order else list(compress(offsets, here))
        if not places:
            return True
        lowest, highest = (places[0], places[-1]) if in_order else (min(places), max(places))
        near = [(start, end) for start, end in self._taken if end > lowest]
        if near and not in_order:
            places = sorted(places)
        return highest + size <= min(self._file.size, MAX_FILE) and all(
            bisect_left(places, start - size + 1) == bisect_left(places, end) for start, end in near
        )

    def _is_outside(self, block: int, place: int) -> bool:
        """Whether a block at ``place`` does not lie where it can lie."""
        size = self.geometry.block_size
        end = place + min(size, self.geometry.virtual_size - block * size)
        # What is taken does not overlap itself, so only the last of it that begins before a block's end can reach it.
        nearest = bisect_left(self._taken, (place + size, 0)) - 1
        return end > min(self._file.size, MAX_FILE) or self._taken[nearest][1] > place

    def _refuse(self, at: int, first: int, entries: Words, what: str) -> None:
        """CorruptImage for the block whose entry is number ``at``, unless that is -1."""
        if at >= 0:
            index = self.geometry.payload_index(first + at)
            raise CorruptImage(
                f"block {first + at} {what}: its BAT entry is {entries[at]:#x}",
                hint=_DAMAGED,
                path=self._file.name,
                offset=self.offset + index * ENTRY_SIZE,
            )

    def bitmap_entry(self, chunk: int) -> int:
        """The raw BAT entry of a chunk's sector bitmap."""
        at = self.offset + self.geometry.bitmap_index(chunk) * ENTRY_SIZE
        return int.from_bytes(read_exactly(self._file, at, ENTRY_SIZE, "the BAT"), "little")

    def bitmap(self, chunk: int) -> int | None:
        """Where a chunk's sector bitmap lies, None where there is none; CorruptImage where it cannot lie."""
        entry = self.bitmap_entry(chunk)
        if entry & STATE_BITS == NOT_PRESENT:
            return None
        offset = entry & OFFSET_BITS
        end = offset + BITMAP_SIZE
        wrong = (
            entry & STATE_BITS != BITMAP_PRESENT
            or entry & RESERVED_BITS
            or end > min(self._file.size, MAX_FILE)
            or self._taken[bisect_left(self._taken, (end, 0)) - 1][1] > offset
        )
        if wrong:
            raise CorruptImage(
                f"the sector bitmap of chunk {chunk} has the BAT entry {entry:#x}, where none can be",
                hint=_DAMAGED,
                path=self._file.name,
                offset=self.offset + self.geometry.bitmap_index(chunk) * ENTRY_SIZE,
            )
        return offset

    def _piece(self, chunk: int, number: int) -> bytes:
        """``BITMAP_PIECE`` bytes of a chunk's sector bitmap."""
        found = self._pieces.get((chunk, number))
        if found is None:
            offset = self.bitmap(chunk)
            if offset is None:
                raise CorruptImage(
                    f"chunk {chunk} has blocks that are partially present, and no sector bitmap",
                    hint=_DAMAGED,
                    path=self._file.name,
                    offset=self.offset + self.geometry.bitmap_index(chunk) * ENTRY_SIZE,
                )
            found = read_exactly(self._file, offset + number * BITMAP_PIECE, BITMAP_PIECE, "a sector bitmap")
            self._pieces.put((chunk, number), found)
        return found

    # --- runs ------------------------------------------------------------------------------------------------

    def runs(self, start: int, end: int) -> Iterator[Run]:
        """Runs of the kinds ABSENT, HERE and ZEROED that cover exactly start..end; neighbours are joined."""
        last: Run | None = None
        for run in self._runs(start, end):
            if last is not None and last.joins(run):
                last = last._replace(length=last.length + run.length)
                continue
            if last is not None:
                yield last
            last = run
        if last is not None:
            yield last

    def _runs(self, start: int, end: int) -> Iterator[Run]:
        size = self.geometry.block_size
        while start < end:
            base = start // size // WINDOW * WINDOW
            window = self.window(base // WINDOW)
            stop = min(end, (base + WINDOW) * size)
            for alike in _ALIKE.finditer(window.kinds, start // size - base, -(-stop // size) - base):
                one, other = alike.span()
                kind = window.kinds[one]
                if kind == HERE:
                    for at, after in self._joined(window.offsets, one, other):
                        until = min(stop, (base + after) * size)
                        yield Run(start, until - start, HERE, window.offsets[at] + start - (base + at) * size)
                        start = until
                    continue
                until = min(stop, (base + other) * size)
                if kind == PARTIAL:
                    yield from self._partial_runs(window.offsets[one:other], base + one, start, until)
                else:
                    yield Run(start, until - start, kind)
                start = until

    def _joined(self, offsets: Words, one: int, other: int) -> Iterator[tuple[int, int]]:
        """(first, end) of the parts of one..other that lie in one piece in the file."""
        size, part = self.geometry.block_size, offsets[one:other]
        if is_sequence(part, size):
            return iter([(one, other)])
        cuts = compress(range(one + 1, other), map(ne, part[1:], map(add, part, repeat(size))))
        return pairwise(chain([one], cuts, [other]))

    def _partial_runs(self, offsets: Words, block: int, start: int, end: int) -> Iterator[Run]:
        """Runs of start..end, which lies in partially present blocks from ``block`` at ``offsets``."""
        size, sector = self.geometry.block_size, self.geometry.sector_size
        per_piece = BITMAP_PIECE * 8  # sectors; whole blocks, as both are powers of two
        while start < end:
            first = start // sector
            stop = min(-(-end // sector), (first // per_piece + 1) * per_piece)
            chunk, number = divmod(first // per_piece, BITMAP_SIZE // BITMAP_PIECE)
            inside = first % per_piece
            piece = self._piece(chunk, number)[inside // 8 : -(-(inside + stop - first) // 8)]
            bits = f"{int.from_bytes(piece, 'little'):0{len(piece) * 8}b}"[::-1]
            skipped = inside % 8
            for alike in _ALIKE_BITS.finditer(bits, skipped, skipped + stop - first):
                one, other = alike.span()
                until = min(end, (first + other - skipped) * sector)
                if bits[one] == "0":
                    yield Run(start, until - start, ABSENT)
                    start = until
                while start < until:
                    index, within = divmod(start - block * size, size)
                    after = min(until, start - within + size)
                    yield Run(start, after - start, HERE, offsets[index] + within)
                    start = after


@functools.lru_cache(maxsize=2)
def _nothing(count: int) -> Window:
    """Blocks that are not there."""
    return Window(bytes(count), bytes(count), array("Q", bytes(count * ENTRY_SIZE)))


def _has_reserved(entries: bytes) -> bool:
    """Whether any of the entries, used or not, has a reserved bit set."""
    return bool(
        entries[::ENTRY_SIZE].translate(None, _FIRST_BYTES)
        or not is_zero(entries[1::ENTRY_SIZE])
        or entries[2::ENTRY_SIZE].translate(None, _THIRD_BYTES)
    )
