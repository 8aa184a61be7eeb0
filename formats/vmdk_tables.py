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
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import compress, islice
from operator import ne
from typing import TYPE_CHECKING, NamedTuple

from imagekit.errors import CorruptImage
from imagekit.formats.base import SECTOR, Buffer, File, KiB, MiB, Range, read_exactly
from imagekit.formats.vmdk_header import TRUNCATED, GrainLayout
from imagekit.formats.words import differing, is_zero, used, words32, words64

if TYPE_CHECKING:
    from imagekit.formats.words import Words

HOLE, ZERO, PLAIN, COMPRESSED = range(4)

WINDOW_BYTES = 64 * KiB
"""Tables that are decoded together."""

DIRECTORY_PIECE = 64 * KiB
CACHE_BYTES = 16 * MiB

PAGE = 512
"""Entries that are looked at together: most pages are one run."""

# The upper half of an SESparse directory entry that leads to a table. An entry of its tables has its kind on top (a
# hole, unmapped, zero, data), below it the lower 12 bits of the grain's number, then the upper 48.
_SE_TABLE = 0x10000000
_SE_UNMAPPED, _SE_DATA, _SE_BEYOND = 1 << 60, 3 << 60, 4 << 60
_SE_NEXT = 1 << 48


class Run(NamedTuple):
    """Guest bytes of one kind. ``sectors`` are where the grains of a compressed run lie, one a grain."""

    start: int
    length: int
    kind: int
    offset: int
    sectors: Sequence[int] = ()


class Window(NamedTuple):
    """Some neighbouring grain tables: their entries, at which of them the runs start, and each run's kind."""

    words: Words
    edges: Words
    kinds: bytearray


class GrainTables:
    """The grains of one sparse file. Safe to share between threads."""

    def __init__(self, file: File, layout: GrainLayout) -> None:
        self.file = file
        self.layout = layout
        self._size = file.size
        self.per_window = max(1, WINDOW_BYTES // layout.table_bytes)
        """Tables in a window."""

        self._wide = layout.width == 8
        self._data = COMPRESSED if layout.compressed else PLAIN
        # Entries above the limit are grains; from one to the next in the file they go up by the step.
        self._limit = _SE_DATA - 1 if self._wide else int(layout.zero_grains)
        self._step = _SE_NEXT if self._wide else layout.grain // SECTOR
        self._free = _longest_gap(layout, self._size)
        self._lock = threading.Lock()
        self._cache: OrderedDict[int, Window | None] = OrderedDict()
        entries = self.per_window * layout.per_table
        self._cached = max(2, CACHE_BYTES // ((layout.width + 5) * entries))

    # --- directories -----------------------------------------------------------------------------------------

    def words(self, data: Buffer) -> Words:
        """Entries of a directory or a table, as they are stored."""
        return words64(data, "little") if self._wide else words32(data, "little")

    def directory(self, first: int, count: int, *, backup: bool = False) -> list[int]:
        """Where the tables from ``first`` lie, 0 where there is none; each checked against the file."""
        layout = self.layout
        start = layout.backup if backup else layout.directory
        assert start is not None
        at = start + first * layout.width
        words = self.words(read_exactly(self.file, at, count * layout.width, "the grain directory"))
        if self._wide:
            wrong = (index for index in used(words) if words[index] >> 32 != _SE_TABLE)
            self._reject(wrong, at, lambda index: f"directory entry {first + index} is {words[index]:#x}")
            base, size = layout.tables_at, layout.table_bytes
            offsets = [base + (word & 0xFFFFFFFF) * size if word else 0 for word in words]
        else:
            offsets = [word * SECTOR for word in words]
        self._reject(
            self._misplaced_tables(offsets),
            at,
            lambda index: (
                f"grain table {first + index} should lie at {offsets[index]:#x}, which is on other "
                f"metadata or behind the file's end {self._size:#x}"
            ),
        )
        return offsets

    def _misplaced_tables(self, offsets: list[int]) -> Iterator[int]:
        """Indexes of the tables that are on what has its place, or not in the file."""
        there = list(filter(None, offsets))
        if not there:
            return
        length = self.layout.table_bytes
        low, high = min(there), max(there) + length
        near = [one for one in self.layout.fixed if _meet(low, high, one)]
        if not near and high <= self._size:
            return
        for index in used(offsets):
            at = offsets[index]
            if at + length > self._size or any(_meet(at, at + length, one) for one in near):
                yield index

    def _reject(self, wrong: Iterator[int], at: int, what: Callable[[int], str]) -> None:
        """CorruptImage for the first of some entries that are wrong."""
        for index in wrong:
            raise CorruptImage(
                what(index), hint=TRUNCATED, path=self.file.name, offset=at + index * self.layout.width
            )

    def next_table(self, first: int, end: int) -> int:
        """The first table from ``first`` on that either directory has, ``end`` when there is none before it."""
        layout, width = self.layout, self.layout.width
        piece = DIRECTORY_PIECE // 16
        while first < end:
            count = min(piece // width, end - first)
            found = end
            for start in (layout.directory, layout.backup):
                if start is not None:
                    raw = read_exactly(self.file, start + first * width, count * width, "the grain directory")
                    if not is_zero(raw):
                        found = min(found, first + next(used(self.words(raw))))
            if found < end:
                return found
            first, piece = first + count, DIRECTORY_PIECE
        return end

    # --- tables ----------------------------------------------------------------------------------------------

    def read_tables(self, tables: Sequence[int]) -> bytes:
        """The tables at these offsets, in a row; zeros for one that does not exist (offset 0)."""
        size = self.layout.table_bytes
        parts = []
        first = 0
        while first < len(tables):
            last, place = first + 1, tables[first]
            # Writers keep tables side by side: one read for as many as lie so.
            while last < len(tables) and tables[last] == (tables[last - 1] + size if place else 0):
                last += 1
            length = (last - first) * size
            part = self.file.pread(place, length) if place else bytes(length)
            if len(part) != length:
                raise CorruptImage("a grain table is cut short", hint=TRUNCATED, path=self.file.name, offset=place)
            parts.append(part)
            first = last
        return b"".join(parts)

    def _bounds(self, number: int) -> tuple[int, int]:
        """First table of a window and how many there are."""
        first = number * self.per_window
        return first, min(self.per_window, self.layout.tables - first)

    def _entries(self, number: int) -> tuple[list[int], bytes, int | None]:
        """Where a window's tables lie, their entries, and the first grain of which the redundant ones say else."""
        first, count = self._bounds(number)
        tables = self.directory(first, count)
        entries = self.read_tables(tables)
        if self.layout.backup is None:
            return tables, entries, None
        other = self.read_tables(self.directory(first, count, backup=True))
        if entries == other:
            return tables, entries, None
        found = next(differing(self.words(entries), self.words(other)))
        return tables, entries, first * self.layout.per_table + found

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
        tables, entries, differs = self._entries(number)
        if differs is not None:
            raise CorruptImage(
                f"the redundant grain directory leads to something else for grain {differs}",
                hint="ask where the image comes from: two programs would see two different disks",
                path=self.file.name,
            )
        if is_zero(entries):
            return None
        low = number * self.per_window * self.layout.per_table
        window = self._cut(self.words(entries)[: self.layout.grains - low])
        self._check_grains(window, low, tables)
        return window

    def _offset(self, word: int) -> int:
        """Where the grain of an entry lies."""
        if self._wide:
            return self.layout.grains_at + ((word & (1 << 48) - 1) << 12 | word >> 48 & 0xFFF) * self.layout.grain
        return word * SECTOR

    def _cut(self, words: Words) -> Window:
        """The runs of a window's entries."""
        edges, kinds = array("I"), bytearray()
        for first in range(0, len(words), PAGE):
            starts, found = self._page(words[first : first + PAGE])
            goes_on = int(
                bool(kinds)
                and found[0] == kinds[-1]
                and (found[0] != PLAIN or words[first] == words[first - 1] + self._step)
            )
            edges.extend([first + at for at in starts[goes_on:]])
            kinds += found[goes_on:]
        return Window(words, edges, kinds)

    def _page(self, words: Words) -> tuple[Sequence[int], bytes]:
        """Where each run starts, and its kind. Of SESparse some end early: where the lower bits of a number wrap."""
        first, count, limit, step, data = words[0], len(words), self._limit, self._step, self._data
        if first <= limit:
            alike = words == words[:1] * count
        elif data == COMPRESSED:
            alike = min(words) > limit
        else:
            alike = words[-1] == first + (count - 1) * step < _SE_BEYOND
            alike = alike and words == array(words.typecode, range(first, first + count * step, step))
        if self._wide:
            self._reject_meaningless(words[:1] if alike else words)
        if alike:
            return (0,), bytes((data if first > limit else ZERO if first else HOLE,))
        # A key for each entry, the same throughout a run: 0 for a hole, 1 for zeros, more for data.
        if data == COMPRESSED:
            keys = [COMPRESSED if word > limit else word > 0 for word in words]
        else:
            places = zip(words, range(-count * step, 0, step), strict=True)
            keys = [word - at if word > limit else word > 0 for word, at in places]
        starts = [0, *compress(range(1, count), map(ne, islice(keys, 1, None), keys))]
        return starts, bytes([data if keys[at] > ZERO else keys[at] for at in starts])

    def _reject_meaningless(self, words: Words) -> None:
        """CorruptImage for an SESparse entry that is no grain, and no hole either."""
        low, high = _SE_UNMAPPED, _SE_BEYOND
        for word in [word for word in words if not low <= word < high and word]:
            raise CorruptImage(f"a grain table entry is {word:#018x}, which means nothing", path=self.file.name)

    def _check_grains(self, window: Window, low: int, tables: Sequence[int]) -> None:
        """Every grain lies inside the file, as far as the guest can see it, and on nothing that has its place."""
        words, edges, kinds = window
        grain, place = self.layout.grain, self._offset
        ends = [*edges[1:], len(words)]
        spans = [(first, last) for first, last, kind in zip(edges, ends, kinds, strict=True) if kind >= PLAIN]
        if self._data == PLAIN:
            bounds = [(place(words[first]), place(words[last - 1]) + grain) for first, last in spans]
        else:
            bounds = [(place(min(part)), place(max(part)) + SECTOR) for part in (words[a:b] for a, b in spans)]
        free, end = self._free
        for (first, last), (start, stop) in zip(spans, bounds, strict=True):
            if start < free or stop > end:
                for index in range(first, last):
                    self._check_grain(low + index, words[index], tables[index // self.layout.per_table])

    def _length(self, number: int) -> int:
        """Bytes that a grain has at least in the file."""
        if self.layout.compressed:
            return SECTOR
        return min(self.layout.grain, self.layout.virtual_size - number * self.layout.grain)

    def _check_grain(self, number: int, word: int, table: int) -> None:
        layout = self.layout
        start, length = self._offset(word), self._length(number)
        if self._wide:
            # More than a file has grains is behind its end, however large.
            start = min(start, layout.grains_at + (self._size // layout.grain + 1) * layout.grain)
        stop = start + length
        if (
            start >= layout.overhead
            and stop <= self._size
            and not any(_meet(start, stop, one) for one in layout.fixed)
        ):
            return
        raise CorruptImage(
            f"grain {number} should lie at {start:#x}..{stop:#x}, which is on metadata or "
            f"behind the file's end {self._size:#x}",
            hint="the file looks damaged or truncated; fetch it again and compare its checksum",
            path=self.file.name,
            offset=table + number % layout.per_table * layout.width,
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
        words, edges, kinds = window
        grain = self.layout.grain
        at = bisect_right(edges, (start - base) // grain) - 1
        while start < stop:
            first, kind = edges[at], kinds[at]
            at += 1
            end = min(stop, base + edges[at] * grain) if at < len(edges) else stop
            if kind == PLAIN:
                yield Run(start, end - start, PLAIN, self._offset(words[first]) + start - (base + first * grain))
            elif kind == COMPRESSED:
                sectors = words[(start - base) // grain : -(-(end - base) // grain)]
                yield Run(start, end - start, COMPRESSED, sectors[0] * SECTOR, sectors)
            else:
                yield Run(start, end - start, kind, 0)
            start = end


def _meet(start: int, end: int, fixed: Range) -> bool:
    return start < fixed.offset + fixed.length and end > fixed.offset


def _longest_gap(layout: GrainLayout, size: int) -> tuple[int, int]:
    """Where nothing has its place: grains that lie in there need no closer look."""
    best, at = (0, 0), layout.overhead
    for start, length in sorted([(one.offset, one.length) for one in layout.fixed] + [(size, 0)]):
        best = max(best, (at, start), key=lambda gap: gap[1] - gap[0])
        at = max(at, start + length)
    return best
