"""Grain directories and grain tables: which part of the disk lies where in a sparse file.

One reader for the three layouts that vmdk_header.py knows. Guest offset → directory entry → grain table → grain,
which is a hole, zero, plain at an offset of the file, or compressed.

Design notes
- Nothing is read before it is asked for, and then in windows of some 64 KiB of tables: a capacity may be huge, its
  directory alone 128 MiB. Decoded windows are kept in a small cache.
- Every pointer is checked against the file before it is followed: outside of it, or on its header, descriptor or
  directories, is damage. Bytes may be missing from the file past the guest's end, nowhere else.
- Where there is a redundant directory its tables are read along, and must say the same.

Overlaps among grains and tables are for the check (vmdk_check.py).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from imagekit.errors import CorruptImage
from imagekit.formats.base import SECTOR, Buffer, File, KiB, MiB, read_exactly
from imagekit.formats.vmdk_header import TRUNCATED, GrainLayout

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Offsets = NDArray[np.int64]

HOLE, ZERO, PLAIN, COMPRESSED = range(4)

WINDOW_BYTES = 64 * KiB
"""Tables that are decoded together."""

DIRECTORY_PIECE = 64 * KiB
CACHE_BYTES = 16 * MiB

# The upper half of an SESparse directory entry that leads to a table, and the top digit of a table's entries.
_SE_TABLE = 0x10000000
_SE_HOLE, _SE_UNMAPPED, _SE_ZERO, _SE_DATA = range(4)


class Run(NamedTuple):
    """Guest bytes of one kind. ``offsets`` are where the grains of a compressed run lie, one a grain."""

    start: int
    length: int
    kind: int
    offset: int
    offsets: Any = None


class Window(NamedTuple):
    """Some neighbouring grain tables, decoded: an item a grain."""

    kinds: NDArray[np.uint8]
    offsets: Offsets


class GrainTables:
    """The grains of one sparse file. Safe to share between threads."""

    def __init__(self, file: File, layout: GrainLayout) -> None:
        self.file = file
        self.layout = layout
        self._size = file.size
        self.per_window = max(1, WINDOW_BYTES // layout.table_bytes)
        """Tables in a window."""

        self._lock = threading.Lock()
        self._cache: OrderedDict[int, Window | None] = OrderedDict()
        entries = self.per_window * layout.per_table
        self._cached = max(2, CACHE_BYTES // (9 * entries))

    # --- directories -----------------------------------------------------------------------------------------

    def _words(self, data: Buffer) -> NDArray[Any]:
        import numpy as np

        return np.frombuffer(data, "<u8" if self.layout.width == 8 else "<u4")

    def directory(self, first: int, count: int, *, backup: bool = False) -> Offsets:
        """Where the tables from ``first`` lie, 0 where there is none; each checked against the file."""
        import numpy as np

        layout, width = self.layout, self.layout.width
        start = layout.backup if backup else layout.directory
        assert start is not None
        at = start + first * width
        words = self._words(read_exactly(self.file, at, count * width, "the grain directory"))
        if width == 8:
            wrong = (words != 0) & (words >> np.uint64(32) != _SE_TABLE)
            self._reject(wrong, at, lambda index: f"directory entry {first + index} is {int(words[index]):#x}")
            numbers = (words & np.uint64(0xFFFFFFFF)).astype(np.int64)
            offsets = np.where(words != 0, layout.tables_at + numbers * layout.table_bytes, 0)
        else:
            offsets = words.astype(np.int64) * SECTOR
        outside = (offsets != 0) & (offsets > self._size - layout.table_bytes)
        outside |= (offsets != 0) & self._on_fixed(offsets, layout.table_bytes)
        self._reject(
            outside,
            at,
            lambda index: (
                f"grain table {first + index} should lie at {int(offsets[index]):#x}, which is on other "
                f"metadata or behind the file's end {self._size:#x}"
            ),
        )
        return offsets

    def _on_fixed(self, offsets: Offsets, length: int | Offsets) -> NDArray[np.bool_]:
        import numpy as np

        found: NDArray[np.bool_] = np.zeros(len(offsets), dtype=np.bool_)
        for one in self.layout.fixed:
            found |= (offsets < one.offset + one.length) & (offsets + length > one.offset)
        return found

    def _reject(self, wrong: NDArray[np.bool_], at: int, what: Any) -> None:
        """CorruptImage for the first of some entries that are wrong."""
        import numpy as np

        found = np.flatnonzero(wrong)
        if len(found):
            index = int(found[0])
            raise CorruptImage(
                what(index), hint=TRUNCATED, path=self.file.name, offset=at + index * self.layout.width
            )

    def next_table(self, first: int, end: int) -> int:
        """The first table from ``first`` on that either directory has, ``end`` when there is none before it."""
        import numpy as np

        layout, width = self.layout, self.layout.width
        while first < end:
            count = min(DIRECTORY_PIECE // width, end - first)
            found = end
            for start in (layout.directory, layout.backup):
                if start is not None:
                    raw = read_exactly(self.file, start + first * width, count * width, "the grain directory")
                    used = np.flatnonzero(self._words(raw))
                    found = min(found, first + int(used[0])) if len(used) else found
            if found < end:
                return found
            first += count
        return end

    # --- tables ----------------------------------------------------------------------------------------------

    def read_tables(self, tables: Offsets) -> NDArray[Any]:
        """The entries of the tables at these offsets, in a row; zeros for one that does not exist (offset 0)."""
        size = self.layout.table_bytes
        out = bytearray(len(tables) * size)
        view = memoryview(out)
        places = tables.tolist()
        first = 0
        while first < len(places):
            last = first + 1
            if places[first]:
                # Writers keep tables side by side: one read for as many as lie so.
                while last < len(places) and places[last] == places[last - 1] + size:
                    last += 1
                part = view[first * size : last * size]
                if self.file.pread_into(places[first], part) != len(part):
                    raise CorruptImage(
                        "a grain table is cut short", hint=TRUNCATED, path=self.file.name, offset=places[first]
                    )
            first = last
        return self._words(out)

    def _bounds(self, number: int) -> tuple[int, int]:
        """First table of a window and how many there are."""
        first = number * self.per_window
        return first, min(self.per_window, self.layout.tables - first)

    def _entries(self, number: int) -> tuple[Offsets, NDArray[Any], int | None]:
        """Where a window's tables lie, their entries, and the first grain of which the redundant ones say else."""
        import numpy as np

        first, count = self._bounds(number)
        tables = self.directory(first, count)
        entries = self.read_tables(tables)
        if self.layout.backup is None:
            return tables, entries, None
        other = self.read_tables(self.directory(first, count, backup=True))
        found = np.flatnonzero(entries != other)
        return tables, entries, first * self.layout.per_table + int(found[0]) if len(found) else None

    def difference(self, limit: int) -> int | None:
        """The first grain of which the two directories say something else, among ``limit`` bytes of tables.

        None also where a table cannot be followed: whoever reads on hears of that.
        """
        number, done = 0, 0
        while self.layout.backup is not None and done < limit:
            table = self.next_table(number * self.per_window, self.layout.tables)
            if table == self.layout.tables:
                break
            number = table // self.per_window
            try:
                found = self._entries(number)[2]
            except CorruptImage:
                break
            if found is not None:
                return found
            done += self.per_window * self.layout.table_bytes
            number += 1
        return None

    def window(self, number: int) -> Window | None:
        """The decoded tables of a window, None when all of it is a hole."""
        with self._lock:
            if number in self._cache:
                self._cache.move_to_end(number)
                return self._cache[number]
        window = self._read_window(number)
        with self._lock:
            self._cache[number] = window
            while len(self._cache) > self._cached:
                self._cache.popitem(last=False)
        return window

    def _read_window(self, number: int) -> Window | None:
        import numpy as np

        tables, entries, differs = self._entries(number)
        if differs is not None:
            raise CorruptImage(
                f"the redundant grain directory leads to something else for grain {differs}",
                hint="ask where the image comes from: two programs would see two different disks",
                path=self.file.name,
            )
        if not entries.any():
            return None
        low = number * self.per_window * self.layout.per_table
        entries = entries[: self.layout.grains - low]
        if self.layout.width == 8:
            kinds, offsets = self._decode_sesparse(entries)
        else:
            kinds = np.where(entries != 0, COMPRESSED if self.layout.compressed else PLAIN, HOLE).astype(np.uint8)
            if self.layout.zero_grains:
                kinds[entries == 1] = ZERO
            offsets = np.where(kinds >= PLAIN, entries.astype(np.int64) * SECTOR, 0)
        self._check_grains(kinds, offsets, low, tables)
        return Window(kinds, offsets)

    def _decode_sesparse(self, entries: NDArray[np.uint64]) -> tuple[NDArray[np.uint8], Offsets]:
        import numpy as np

        layout = self.layout
        tops = (entries >> np.uint64(60)).astype(np.int64)
        low, high = entries & np.uint64((1 << 48) - 1), entries >> np.uint64(48) & np.uint64(0xFFF)
        # More than a file has grains is behind its end, however large; the rest fits 64 bits when multiplied.
        grains = np.minimum(low << np.uint64(12) | high, np.uint64(self._size // layout.grain + 1)).astype(np.int64)
        kinds = np.full(len(entries), HOLE, dtype=np.uint8)
        kinds[(tops == _SE_UNMAPPED) | (tops == _SE_ZERO)] = ZERO
        kinds[tops == _SE_DATA] = PLAIN
        wrong = np.flatnonzero((tops > _SE_DATA) | ((tops == _SE_HOLE) & (entries != 0)))
        if len(wrong):
            raise CorruptImage(
                f"a grain table entry is {int(entries[wrong[0]]):#018x}, which means nothing", path=self.file.name
            )
        return kinds, np.where(kinds == PLAIN, layout.grains_at + grains * layout.grain, 0)

    def _check_grains(self, kinds: NDArray[np.uint8], offsets: Offsets, low: int, tables: Offsets) -> None:
        """Every grain lies inside the file, as far as the guest can see it, and on nothing that has its place."""
        import numpy as np

        layout = self.layout
        lengths = np.full(len(kinds), SECTOR if layout.compressed else layout.grain, dtype=np.int64)
        if not layout.compressed and low + len(kinds) == layout.grains:
            lengths[-1] = layout.virtual_size - (layout.grains - 1) * layout.grain
        used = kinds >= PLAIN
        outside = (offsets < layout.overhead) | (offsets + lengths > self._size)
        wrong = np.flatnonzero(used & (outside | self._on_fixed(offsets, lengths)))
        if len(wrong):
            index = int(wrong[0])
            table, entry = divmod(index, layout.per_table)
            at = int(offsets[index])
            raise CorruptImage(
                f"grain {low + index} should lie at {at:#x}..{at + int(lengths[index]):#x}, which is on metadata or "
                f"behind the file's end {self._size:#x}",
                hint="the file looks damaged or truncated; fetch it again and compare its checksum",
                path=self.file.name,
                offset=int(tables[table]) + entry * layout.width,
            )

    # --- the guest's view ------------------------------------------------------------------------------------

    def runs(self, start: int, end: int) -> Iterator[Run]:
        """Runs of one kind that cover exactly start..end."""
        per_table = self.layout.grain * self.layout.per_table
        span = per_table * self.per_window
        while start < end:
            number = start // span
            stop = min(end, (number + 1) * span)
            window = self.window(number)
            if window is not None:
                yield from self._window_runs(window, number * span, start, stop)
            else:
                # On to the next table, over all neighbours without one.
                table = self.next_table((number + 1) * self.per_window, -(-end // per_table))
                stop = end if table * per_table >= end else table // self.per_window * span
                yield Run(start, stop - start, HOLE, 0)
            start = stop

    def _window_runs(self, window: Window, base: int, start: int, stop: int) -> Iterator[Run]:
        import numpy as np

        grain = self.layout.grain
        first, last = (start - base) // grain, -(-(stop - base) // grain)
        kinds, offsets = window.kinds[first:last], window.offsets[first:last]
        cut = kinds[1:] != kinds[:-1]
        cut |= (kinds[1:] == PLAIN) & (offsets[1:] != offsets[:-1] + grain)
        edges = np.concatenate(([0], np.flatnonzero(cut) + 1, [len(kinds)])).tolist()
        for one, other in pairwise(edges):
            begin = max(start, base + (first + one) * grain)
            end = min(stop, base + (first + other) * grain)
            kind = int(kinds[one])
            inside = begin - (base + (first + one) * grain) if kind == PLAIN else 0
            places = offsets[one:other] if kind == COMPRESSED else None
            yield Run(begin, end - begin, kind, int(offsets[one]) + inside, places)
