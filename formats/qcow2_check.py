"""The check of a whole qcow2: what its tables refer to against the refcounts it stores.

Follows QEMU's docs/interop/qcow2.txt and agrees with ``qemu-img check`` about what is damage (a cluster used more
often than its refcount says, a pointer that leads nowhere, a wrong copied flag) and what is a leak (the opposite).
Beyond it, metadata that overlaps anything is damage even where the refcounts allow for it, and so is what the reader
refuses to read.

Clusters are counted in windows of the file, in the order of the file; memory follows the window, not the image. What
a window needs of the L2 tables is read again where it is not kept: they are small, and most lead to few windows.
Counts that are all the same are compared with what is stored as bytes, so what is sound costs next to nothing.

Not here: the walk through the tables (qcow2_claims.py), repairs (qcow2_repair.py), which begin with this count.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import compress, count, repeat
from operator import add, eq, floordiv, gt, mul, ne, rshift, sub
from typing import TYPE_CHECKING, NamedTuple

from imagekit.errors import CorruptImage, InvalidImage, UnsupportedFeature
from imagekit.formats.base import SECTOR, Problem, Reference, round_up
from imagekit.formats.files import MemoryFile
from imagekit.formats.qcow2 import Qcow2Image
from imagekit.formats.qcow2_claims import COPIED, L2Table, Pointers, Walk, ascending, in_order
from imagekit.formats.qcow2_header import CORRUPT, KNOWN_INCOMPATIBLE
from imagekit.formats.qcow2_refcounts import PIECE, alike, compared
from imagekit.formats.raw import RawImage
from imagekit.formats.words import differing

if TYPE_CHECKING:
    from imagekit.formats.words import Words

WINDOW = 1 << 20
"""Clusters counted at once: 64 GiB of a file with the usual clusters."""
MAX_WINDOWS = 1024
"""Each costs some 5 ms: more than the largest file that anybody has, and no hours for a few entries."""
SHORT = 16
"""Clusters that are counted one by one."""
LISTED = 100
"""Problems listed one by one, of damage and of leaks each."""
MOST_DEFLATED = 1100
"""Bytes that one byte of a deflate stream can stand for are 1032; more means that clusters share their streams."""
MOST_COMPARED = 1 << 20
"""Compressed clusters whose places are compared with one another across tables: 8 MiB of numbers."""
MAX_DISK = 1 << 63


def check(image: Qcow2Image) -> list[Problem]:
    """Everything wrong with the structure; empty when sound. UnsupportedFeature for what is not understood."""
    refuse_unknown(image)
    header, found = image.header, Found()
    if header.incompatible & CORRUPT:
        found.add("corrupt-bit", "QEMU marked this image corrupt", 72)
    counting = Counting(image, found)
    for window in counting.windows():
        _check_window(counting, window, found)
    counting.report_aliases()
    if not found.damaged:
        _read_through(image, found)
    return found.problems()


def refuse_unknown(image: Qcow2Image) -> None:
    """UnsupportedFeature for an image with features that may mean anything."""
    unknown = image.header.incompatible & ~KNOWN_INCOMPATIBLE
    if unknown:
        raise UnsupportedFeature(f"unknown incompatible feature bits {unknown:#x}", path=image.file.name, offset=72)


def _check_window(counting: Counting, window: Window, found: Found) -> None:
    stored, used = window.stored, window.used

    def what(at: int) -> str:
        return f"used {used[at]} times, but its refcount is {stored[at]}"

    wrong = window.differences()
    low = array("I", (at for at in wrong if stored[at] < used[at]))
    leaked = array("I", (at for at in wrong if stored[at] > used[at]))
    counting.report_clusters("refcount-low", low, window.low, what)
    counting.report_clusters("leak", leaked, window.low, what, leak=True)
    counting.report_overlap(window)
    for flags in counting.copied_flags(window, stored):
        message = f"{flags.name} entry {{}}: the copied flag does not go with the refcount"
        found.entries("copied-flag", message.format, flags.entries, flags.table, flags.step)


def _read_through(image: Qcow2Image, found: Found) -> None:
    """What the reader refuses is damage too: a cluster cut short by the file's end."""

    def zeros(reference: Reference) -> RawImage:
        return RawImage(MemoryFile(), MAX_DISK if reference.kind == "data-file" else 0)

    try:
        for _ in Qcow2Image(image.file, resolver=zeros).extents():
            pass
    except CorruptImage as error:
        found.add("contradiction" if image.header.external_data else "cut-short", error.message, error.offset)
    except (InvalidImage, UnsupportedFeature):
        return  # encrypted, or nobody knows where the data is: the structure is all there is to check


class Found:
    """The problems: the first of all and of each kind one by one, the rest as a number.

    However many there are of one kind, another one is seen: what is harmless must not hide what is not.
    """

    def __init__(self) -> None:
        self._seen = set[str]()
        self._listed: dict[bool, list[Problem]] = {False: [], True: []}
        self._total = {False: 0, True: 0}

    @property
    def damaged(self) -> bool:
        return self._total[False] > 0

    def add(self, code: str, message: str, offset: int | None) -> None:
        self.entries(code, lambda _: message, [0], offset or 0, 0)

    def entries(
        self,
        code: str,
        what: Callable[[int], str],
        entries: Sequence[int],
        at: int,
        step: int,
        *,
        leak: bool = False,
    ) -> None:
        """A problem for each of some numbered things; only those that are listed are put into words."""
        listed = self._listed[leak]
        self._total[leak] += len(entries)
        room = max(LISTED - len(listed), int(code not in self._seen))
        if len(entries):
            self._seen.add(code)
        for entry in entries[:room]:
            listed.append(Problem(code, what(entry), at + entry * step, leak))

    def problems(self) -> list[Problem]:
        out = []
        for leak, name in ((False, "problems"), (True, "leaked clusters")):
            out += self._listed[leak]
            more = self._total[leak] - len(self._listed[leak])
            if more:
                out.append(Problem("more", f"and {more} more {name}", None, leak))
        return out


class Window(NamedTuple):
    """Clusters from ``low`` on: their stored refcounts, how often they are used, and which tables lead to them."""

    low: int
    stored: Words
    """The very array of ``used`` where all are the same."""
    used: Words
    overlap: Sequence[int]
    near: Sequence[int]

    def differences(self) -> Words:
        """The clusters, from ``low`` on, that are not used as often as is stored."""
        found = array("I")
        if self.stored is not self.used:
            for at in range(0, len(self.used), PIECE):
                stored, used = self.stored[at : at + PIECE], self.used[at : at + PIECE]
                if stored != used:
                    found.extend(map(at.__add__, differing(stored, used)))
        return found


class CopiedFlags(NamedTuple):
    """Entries of one table, at ``table`` of the file and each ``step`` bytes long, whose copied flag is wrong."""

    name: str
    table: int
    step: int
    entries: Words
    set: bytes
    """Whether it is set, of each of them."""


class Counting:
    """Counts the references to each cluster and compares with what is stored."""

    def __init__(self, image: Qcow2Image, found: Found) -> None:
        self._file = image.file
        self._header = image.header
        self._found = found
        self._size = image.header.cluster_size
        self._clusters = -(-image.file.size // self._size)
        self._walk = walk = Walk(image, found.entries)
        self._ranges: list[tuple[int, int]] = []
        """First and last + 1 of the clusters of metadata, ``_singles`` those of one cluster each, sorted."""
        singles = array("Q")
        for claim in walk.metadata():
            if claim.length == self._size and not any(offset % self._size for offset in claim.offsets):
                singles.extend(map(floordiv, claim.offsets, repeat(self._size)))
            elif claim.length:
                self._ranges += (self._touched(offset, claim.length) for offset in claim.offsets)
        self._singles = in_order(singles)
        self._tables, self._weights = walk.l2_tables()
        nothing = bytes(8 * len(self._tables))
        self._first, self._end = array("Q", nothing), array("Q", nothing)
        """First and last + 1 of the clusters that the entries of each table lead to."""
        self._plain, self._compressed = (array("I", [0]) * len(self._tables) for _ in range(2))
        """How many entries of each table are plain, and compressed."""
        active, times = walk.active_tables() if walk.has_snapshots else (self._tables, self._weights)
        self._active, self._times = active, times
        self._led_to = self._by_window(walk.l1_pointers.offsets)
        """Which of the active L1 table's pointers lead to each window, in the order of the table."""
        found.entries(
            "overlap",
            lambda entry: f"{times[entry]} L1 entries lead to the L2 table at {active[entry]:#x}",
            array("I", compress(range(len(times)), map(gt, times, repeat(1)))),
            self._header.l1_offset,
            0,
        )

    def _by_window(self, offsets: Words) -> dict[int, Words]:
        found: dict[int, Words] = {}
        for at, window in enumerate(map(floordiv, offsets, repeat(self._size * WINDOW))):
            led = found.get(window)
            if led is None:
                led = found[window] = array("I")
            led.append(at)
        return found

    def report_aliases(self) -> None:
        """Say so when the guest's disk holds more than the file can: then clusters share their places."""
        walk = self._walk
        plain = streams = stored = 0
        starts, repeated = array("Q"), False
        for offset, times in zip(self._active, self._times, strict=True):
            index = bisect_left(self._tables, offset)
            plain += self._plain[index] * times * walk.cluster
            if not self._compressed[index]:
                continue
            table = walk.l2_table(offset)
            streams += len(table.compressed) * times
            stored += sum(table.lengths) * times
            # Among the first ones none may be there twice; how much all of them can be is counted in any case.
            if len(starts) < MOST_COMPARED:
                starts += table.compressed
            else:
                repeated |= not ascending(in_order(table.compressed))
        repeated |= not ascending(in_order(starts))
        room = round_up(walk.size, walk.cluster)
        inflated = streams * walk.cluster
        # An entry counts sectors, so it says up to one more than its stream needs.
        most_stored = room + streams * SECTOR
        if repeated or plain > room or inflated > room * MOST_DEFLATED or stored > most_stored:
            message = f"a file of {walk.size} bytes holds {plain + inflated} bytes in clusters that share places"
            self._found.add("aliased", message, walk.header.l1_offset)

    def windows(self) -> Iterator[Window]:
        """The windows of the file that anything leads to, in order; none where there are no refcounts."""
        windows = self._look_at_tables()
        blocks = self._walk.refcount_blocks
        if blocks is None:
            return  # said already; without refcounts there is nothing to compare with
        if len(windows) > MAX_WINDOWS:
            raise UnsupportedFeature(f"the image has references to {len(windows)} windows of {WINDOW} clusters")
        for window in sorted(windows):
            yield self._count(blocks, window * WINDOW, min((window + 1) * WINDOW, self._clusters))

    def _look_at_tables(self) -> set[int]:
        """Report what is wrong with L2 entries; note which windows anything leads to."""
        windows = set(map(floordiv, self._tables, repeat(self._size * WINDOW)))
        windows.update(map(floordiv, self._singles, repeat(WINDOW)))
        for first, end in self._ranges:
            windows.update(self._windows(first, end))
        for index, offset in enumerate(self._tables):
            table = self._walk.l2_table(offset, report=True)
            if not table.entries and not table.compressed:
                continue
            self._plain[index], self._compressed[index] = sum(table.counts), len(table.compressed)
            first, end = self._first[index], self._end[index] = self._reach(table)
            if len(whole := self._windows(first, end)) > 1:
                for run in self._runs(table):
                    windows.update(self._windows(*run))
            else:
                windows.update(whole)
        blocks = self._walk.refcount_blocks
        if blocks is not None:
            for block in blocks.entries:
                start = block * self.per_block
                if start >= self._clusters:
                    break
                windows.update(self._windows(start, start + self.per_block))
        return windows

    def _windows(self, first: int, end: int) -> range:
        """The windows of clusters that lie in the file."""
        if first >= self._clusters:
            return range(0)
        return range(first // WINDOW, -(-min(end, self._clusters) // WINDOW))

    def _touched(self, offset: int, length: int) -> tuple[int, int]:
        """First and last + 1 of the clusters that bytes touch."""
        return offset // self._size, (offset + length - 1) // self._size + 1

    def _reach(self, table: L2Table) -> tuple[int, int]:
        """First and last + 1 of the clusters that entries touch."""
        first = min(min(table.places, default=MAX_DISK), min(table.compressed, default=MAX_DISK))
        plain = map(add, table.places, map(mul, table.counts, repeat(self._size)))
        end = max(max(plain, default=0), max(map(add, table.compressed, table.lengths), default=0))
        return first // self._size, -(-end // self._size)

    def _runs(
        self, table: L2Table, low: int = 0, high: int = MAX_DISK, *, streams: bool = True
    ) -> Iterator[tuple[int, int]]:
        """First and last + 1 of the clusters that entries touch, each once an entry, where any are in low..high."""
        size, bits = self._size, self._header.cluster_bits
        for number, place in zip(table.counts, table.places, strict=True):
            first = place >> bits
            if first >= high or first + number < low:
                continue
            yield first, first + number
            if place & size - 1:
                yield first + 1, first + number + 1
        for start, length in zip(table.compressed, table.lengths, strict=True) if streams else ():
            first, end = start >> bits, (start + length - 1 >> bits) + 1
            if first < high and end > low:
                yield first, end

    # --- one window ------------------------------------------------------------------------------------------

    def _count(self, blocks: Pointers, low: int, high: int) -> Window:
        used = array("Q", [0]) * (high - low)
        for first, end in self._ranges:
            _add(used, first - low, end - low, 1)
        singles = self._singles[bisect_left(self._singles, low) : bisect_left(self._singles, high)]
        for cluster in singles:
            used[cluster - low] += 1
        one, other = (bisect_left(self._tables, cluster * self._size) for cluster in (low, high))
        for at in range(one, other):
            used[self._tables[at] // self._size - low] += self._weights[at]
        near = array("I", (at for at, end in enumerate(self._end) if end > low and self._first[at] < high))
        for index in near:
            table, weight = self._walk.l2_table(self._tables[index]), self._weights[index]
            within = low <= self._first[index] and self._end[index] <= high
            if within:
                self._add_streams(used, table, low, weight)
            for first, end in self._runs(table, low, high, streams=not within):
                if end - first == 1 and low <= first < high:
                    used[first - low] += weight
                else:
                    _add(used, first - low, end - low, weight)
        # Metadata is used once, a table as often as entries lead to it: what is used more often, by something else.
        places = ((at, self._tables[at] // self._size - low) for at in range(one, other))
        overlap = {cluster for at, cluster in places if used[cluster] > self._weights[at]}
        overlap.update(cluster - low for cluster in singles if used[cluster - low] > 1)
        for first, end in self._ranges:
            at = max(first - low, 0)
            overlap.update(compress(count(at), map(gt, used[at : max(end - low, 0)], repeat(1))))
        return Window(low, self._stored(blocks, used, low), used, sorted(overlap), near)

    def _add_streams(self, used: Words, table: L2Table, low: int, weight: int) -> None:
        """The clusters that a table's compressed streams touch, all of which are in the window."""
        bits = repeat(self._header.cluster_bits)
        firsts = array("Q", map(rshift, table.compressed, bits))
        ends = map(add, table.compressed, map(sub, table.lengths, repeat(1)))
        lasts = array("Q", map(rshift, ends, bits))
        for cluster, times in Counter(firsts).items():
            used[cluster - low] += times * weight
        for first, last in compress(zip(firsts, lasts, strict=True), map(ne, firsts, lasts)):
            for cluster in range(first + 1, last + 1):
                used[cluster - low] += weight

    def report_overlap(self, window: Window) -> None:
        self.report_clusters("overlap", window.overlap, window.low, lambda at: "metadata overlaps something else")

    @property
    def per_block(self) -> int:
        """Clusters that one refcount block speaks for."""
        return (self._size * 8) >> self._header.refcount_order

    def _stored(self, blocks: Pointers, used: Words, low: int) -> Words:
        """The stored refcounts of the clusters from ``low`` on; zero where there is no block."""
        order, per_block, stored = self._header.refcount_order, self.per_block, used
        at, high = low, low + len(used)
        while at < high:
            block, inside = divmod(at, per_block)
            number = bisect_left(blocks.entries, block)
            there = number < len(blocks.entries) and blocks.entries[number] == block
            # Windows and blocks are powers of two: both ends lie on whole bytes, but for the file's end.
            raw = b""
            if there:
                end = min(at + per_block - inside, high)
                length = -(-(end - at << order) // 8)
                place = blocks.offsets[number] + (inside << order) // 8
                raw = self._file.pread(place, length).ljust(length, b"\0")
            else:
                end = min(blocks.entries[number] * per_block if number < len(blocks.entries) else high, high)
            stored = compared(used, stored, raw, order, at - low, end - low)
            at = end
        return stored

    def report_clusters(
        self, code: str, wrong: Sequence[int], low: int, what: Callable[[int], str], *, leak: bool = False
    ) -> None:
        self._found.entries(
            code,
            lambda at: f"cluster {low + at}: {what(at)}",
            wrong,
            low * self._size,
            self._size,
            leak=leak,
        )

    def refcount_at(self, cluster: int) -> int | None:
        """File offset of the byte that the refcount of a cluster begins in; None where it has none."""
        blocks = self._walk.refcount_blocks
        assert blocks is not None
        block, inside = divmod(cluster, self.per_block)
        at = bisect_left(blocks.entries, block)
        if at == len(blocks.entries) or blocks.entries[at] != block:
            return None
        return blocks.offsets[at] + (inside << self._header.refcount_order) // 8

    def copied_flags(self, window: Window, counts: Words) -> Iterator[CopiedFlags]:
        """Wrong flags of the active tables, where ``counts`` are the refcounts: set is to say exactly one."""
        walk, low = self._walk, window.low
        entries, offsets = walk.l1_pointers
        wrong = array("I")
        for at in self._led_to.get(low // WINDOW, ()):
            if (counts[offsets[at] // self._size - low] == 1) != (walk.l1[entries[at]] & COPIED != 0):
                wrong.append(entries[at])
        flags = bytes(walk.l1[entry] & COPIED != 0 for entry in wrong)
        yield CopiedFlags("L1", self._header.l1_offset, 8, wrong, flags)
        for index in window.near:
            offset = self._tables[index]
            active = bisect_left(self._active, offset)
            if active < len(self._active) and self._active[active] == offset:
                wrong, flags = self._wrong_flags(walk.l2_table(offset), low, counts)
                yield CopiedFlags("L2", offset, self._header.l2_entry_size, wrong, flags)

    def _wrong_flags(self, table: L2Table, low: int, counts: Words) -> tuple[Words, bytes]:
        wrong, flags = array("I"), bytearray()
        for entry, number, place, copied in zip(*table[:4], strict=True):
            first = (place >> self._header.cluster_bits) - low
            if first >= len(counts) or first + number <= 0:
                continue
            if number == 1:
                if (counts[first] == 1) != copied:
                    wrong.append(entry)
                    flags.append(copied)
                continue
            at, end = max(first, 0), min(first + number, len(counts))
            part = counts[at:end]
            if not copied or part != alike(1, end - at):
                before = len(wrong)
                wrong.extend(compress(count(entry + at - first), map(ne if copied else eq, part, repeat(1))))
                flags += bytes([copied]) * (len(wrong) - before)
        return wrong, bytes(flags)


def _add(used: Words, first: int, end: int, weight: int) -> None:
    """Clusters used some times more; of them those that are in the window."""
    first, end = max(first, 0), min(end, len(used))
    if end - first <= SHORT:
        for at in range(first, end):
            used[at] += weight
        return
    part = used[first:end]
    if part == alike(0, end - first):
        used[first:end] = array("Q", [weight]) * (end - first)
    else:
        used[first:end] = array("Q", map(add, part, repeat(weight)))
