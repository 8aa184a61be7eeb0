"""The BAT of a VHDX and its sector bitmaps, decoded window by window.

Follows Microsoft's MS-VHDX, 2.5 "BAT". The BAT of a 64 TiB disk has 512 MiB: it is never in memory as a whole. A
window of blocks is read and decoded by numpy, into an array of kinds and one of offsets, and checked then: every
block that a guest can see lies behind the first MiB, inside the file, and on no region's place. A few windows and a
few pieces of sector bitmaps are kept.

Design notes
- QEMU before 8.0.1 could leave junk in entries that no block uses, so what is not needed is not looked at: the
  entries of sector bitmaps where there is no parent, and those behind the last block.
- The last block may be cut short by the file's end, past the end of the disk.
- A partially present block where there is no parent is read as a present one, as Windows does.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import pairwise
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

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# What a run of the guest's disk is.
ABSENT, HERE, ZEROED, PARTIAL = 0, 1, 2, 3

WINDOW = 1 << 15
"""Blocks decoded at a time."""

BITMAP_PIECE = 64 * KiB
"""Bytes of a sector bitmap read at a time: the largest block has no more bits."""

_WINDOWS, _PIECES = 8, 16
_DAMAGED = "the file looks damaged or truncated; fetch it again and compare its checksum"
_INVALID = 4  # the one state that does not exist

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
    """Decoded entries of neighbouring blocks. Read-only arrays."""

    states: NDArray[np.uint8]
    kinds: NDArray[np.uint8]
    offsets: NDArray[np.int64]


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
        import numpy as np

        geometry = self.geometry
        first, stop = number * WINDOW, min((number + 1) * WINDOW, geometry.blocks)
        start, end = geometry.payload_index(first), geometry.payload_index(stop - 1) + 1
        raw = read_exactly(self._file, self.offset + start * ENTRY_SIZE, (end - start) * ENTRY_SIZE, "the BAT")
        blocks = np.arange(first, stop, dtype=np.int64)
        entries = np.frombuffer(raw, "<u8")[blocks + blocks // geometry.chunk_ratio - start]
        if not entries.any():
            nothing = np.zeros(len(entries), np.uint8)
            return Window(nothing, nothing, np.zeros(len(entries), np.int64))
        states = (entries & np.uint64(STATE_BITS)).astype(np.uint8)
        kinds = np.full(len(states), ZEROED, dtype=np.uint8)
        kinds[states == NOT_PRESENT] = ABSENT
        kinds[states == FULLY_PRESENT] = HERE
        kinds[states == PARTIALLY_PRESENT] = PARTIAL if geometry.differencing else HERE
        here = (kinds == HERE) | (kinds == PARTIAL)
        self._refuse(states == _INVALID, first, entries, "has the state 4, which does not exist")
        self._refuse(here & ((entries & np.uint64(RESERVED_BITS)) != 0), first, entries, "has reserved bits set")
        outside = self._outside(first, entries & np.uint64(OFFSET_BITS))
        self._refuse(here & outside, first, entries, "does not lie in the file, or lies on one of its tables")
        offsets = np.where(here, entries & np.uint64(OFFSET_BITS), 0).astype(np.int64)
        return Window(states, kinds, offsets)

    def _outside(self, first: int, places: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which of the blocks from ``first``, at ``places``, do not lie where a block can lie."""
        import numpy as np

        limit = min(self._file.size, MAX_FILE)
        beyond = places > np.uint64(limit)
        starts = np.where(beyond, 0, places).astype(np.int64)
        lengths = np.full(len(starts), self.geometry.block_size, dtype=np.int64)
        if first + len(starts) == self.geometry.blocks:
            lengths[-1] = self.geometry.virtual_size - (self.geometry.blocks - 1) * self.geometry.block_size
        taken = np.array(self._taken, dtype=np.int64)
        # What is taken does not overlap itself, so only the last of it that begins before a block's end can reach it.
        nearest = taken[:, 0].searchsorted(starts + self.geometry.block_size) - 1
        result: NDArray[np.bool_] = beyond | (starts + lengths > limit) | (taken[nearest, 1] > starts)
        return result

    def _refuse(self, wrong: NDArray[np.bool_], first: int, entries: NDArray[np.uint64], what: str) -> None:
        import numpy as np

        for at in np.flatnonzero(wrong)[:1].tolist():
            index = self.geometry.payload_index(first + at)
            raise CorruptImage(
                f"block {first + at} {what}: its BAT entry is {int(entries[at]):#x}",
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
        import numpy as np

        size = self.geometry.block_size
        while start < end:
            number = start // size // WINDOW
            window = self.window(number)
            base = number * WINDOW
            stop = min(end, (base + WINDOW) * size)
            first, last = start // size - base, -(-stop // size) - base
            kinds, offsets = window.kinds[first:last], window.offsets[first:last]
            edges = [0, 1]
            if len(kinds) > 1:  # most reads are of one block
                cut = kinds[1:] != kinds[:-1]
                cut |= (kinds[1:] == HERE) & (offsets[1:] != offsets[:-1] + size)
                edges = [0, *(np.flatnonzero(cut) + 1).tolist(), len(kinds)]
            for one, other in pairwise(edges):
                until = min(stop, (base + first + other) * size)
                if kinds[one] == PARTIAL:
                    yield from self._partial_runs(offsets[one:other], base + first + one, start, until)
                else:
                    inside = start - (base + first + one) * size
                    yield Run(start, until - start, int(kinds[one]), int(offsets[one]) + inside)
                start = until

    def _partial_runs(self, offsets: NDArray[np.int64], block: int, start: int, end: int) -> Iterator[Run]:
        """Runs of start..end, which lies in partially present blocks from ``block`` at ``offsets``."""
        import numpy as np

        size, sector = self.geometry.block_size, self.geometry.sector_size
        per_piece = BITMAP_PIECE * 8  # sectors; whole blocks, as both are powers of two
        base = block * size // sector
        while start < end:
            first = start // sector
            stop = min(-(-end // sector), (first // per_piece + 1) * per_piece)
            chunk, number = divmod(first // per_piece, BITMAP_SIZE // BITMAP_PIECE)
            inside = first % per_piece
            bits = np.unpackbits(
                np.frombuffer(self._piece(chunk, number), np.uint8)[inside // 8 : -(-(inside + stop - first) // 8)],
                bitorder="little",
            )[inside % 8 :][: stop - first]
            # Cut where a bit differs from the one before it, and between blocks.
            between = np.arange(-first % (size // sector), stop - first, size // sector)
            cuts = np.union1d(np.flatnonzero(bits[1:] != bits[:-1]) + 1, between)
            edges = [0, *cuts[cuts > 0].tolist(), stop - first]
            for one, other in pairwise(edges):
                until = min(end, (first + other) * sector)
                if bits[one]:
                    index = (first + one - base) * sector // size
                    offset = int(offsets[index]) + start - (block + index) * size
                    yield Run(start, until - start, HERE, offset)
                else:
                    yield Run(start, until - start, ABSENT)
                start = until
