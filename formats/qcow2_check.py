"""The check of a whole qcow2: what its tables refer to against the refcounts it stores.

Follows QEMU's docs/interop/qcow2.txt and agrees with ``qemu-img check`` about what is damage (a cluster used more
often than its refcount says, a pointer that leads nowhere, a wrong copied flag) and what is a leak (the opposite).
Beyond it, metadata that overlaps anything is damage even where the refcounts allow for it, and so is what the reader
refuses to read.

Clusters are counted in windows of the file, in the order of the file; memory follows the window, not the image. What
a window needs of the L2 tables is read again: they are small, and most lead to few windows.

Not here: the walk through the tables (qcow2_claims.py), repairs (qcow2_repair.py), which begin with this count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from imagekit.errors import CorruptImage, InvalidImage, UnsupportedFeature
from imagekit.formats.base import SECTOR, Problem, Reference, round_up
from imagekit.formats.files import MemoryFile
from imagekit.formats.qcow2 import Qcow2Image
from imagekit.formats.qcow2_claims import COPIED, Claim, Walk
from imagekit.formats.qcow2_header import CORRUPT, KNOWN_INCOMPATIBLE
from imagekit.formats.raw import RawImage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Offsets = NDArray[np.int64]
    Counts = NDArray[np.uint64]

WINDOW = 1 << 20
"""Clusters counted at once: 64 GiB of a file with the usual clusters."""
MAX_WINDOWS = 1024
"""Each costs some 20 ms: more than the largest file that anybody has, and no hours for a few entries."""
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
        return f"used {int(used[at])} times, but its refcount is {int(stored[at])}"

    counting.report_clusters("refcount-low", stored < used, window.low, what)
    counting.report_clusters("leak", stored > used, window.low, what, leak=True)
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
        entries: Offsets | list[int],
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
        for entry in map(int, entries[:room]):
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
    stored: Counts
    used: Counts
    overlap: NDArray[np.bool_]
    near: list[int]


class CopiedFlags(NamedTuple):
    """Entries of one table, at ``table`` of the file and each ``step`` bytes long, whose copied flag is wrong."""

    name: str
    table: int
    step: int
    entries: Offsets
    set: NDArray[np.bool_]
    """Whether it is set, of each of them."""


class Counting:
    """Counts the references to each cluster and compares with what is stored."""

    def __init__(self, image: Qcow2Image, found: Found) -> None:
        import numpy as np

        self._file = image.file
        self._header = image.header
        self._found = found
        self._clusters = -(-image.file.size // image.header.cluster_size)
        self._walk = walk = Walk(image, found.entries)
        self._metadata = list(walk.metadata())
        self._tables, self._weights = walk.l2_tables()
        self._reach = np.zeros((len(self._tables), 2), dtype=np.int64)
        """First and last + 1 of the clusters that the entries of each table lead to."""
        active, times = np.unique(walk.l1_places[walk.l1_places >= 0], return_counts=True)
        self._active = np.isin(self._tables, active)
        found.entries(
            "overlap",
            lambda entry: f"{int(times[entry])} L1 entries lead to the L2 table at {int(active[entry]):#x}",
            np.flatnonzero(times > 1),
            self._header.l1_offset,
            0,
        )

    def report_aliases(self) -> None:
        """Say so when the guest's disk holds more than the file can: then clusters share their places."""
        import numpy as np

        walk = self._walk
        tables, times = np.unique(walk.l1_places[walk.l1_places >= 0], return_counts=True)
        plain = streams = stored = 0
        starts, repeated = np.empty(0, dtype=np.int64), False
        for offset, count in zip(tables.tolist(), times.tolist(), strict=True):
            table = walk.l2_table(offset)
            plain += len(table.plain) * count * walk.cluster
            streams += len(table.compressed) * count
            stored += int(table.lengths.sum()) * count
            # Among the first ones none may be there twice; how much all of them can be is counted in any case.
            kept = starts if len(starts) < MOST_COMPARED else starts[:0]
            seen = np.concatenate((kept, table.compressed))
            unique = np.unique(seen)
            repeated |= len(unique) < len(seen)
            starts = unique if len(starts) < MOST_COMPARED else starts
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
        if self._walk.refcount_blocks is None:
            return  # said already; without refcounts there is nothing to compare with
        if len(windows) > MAX_WINDOWS:
            raise UnsupportedFeature(f"the image has references to {len(windows)} windows of {WINDOW} clusters")
        for window in sorted(windows):
            yield self._count(window * WINDOW, min((window + 1) * WINDOW, self._clusters))

    def _look_at_tables(self) -> set[int]:
        """Report what is wrong with L2 entries; note which windows anything leads to."""
        import numpy as np

        windows = self._windows(self._tables // self._header.cluster_size)
        for claim in self._metadata:
            windows |= self._windows(self._touched(claim))
        for index, offset in enumerate(self._tables.tolist()):
            clusters = self._data(offset, report=True)
            if len(clusters):
                self._reach[index] = clusters.min(), clusters.max() + 1
                windows |= self._windows(clusters)
        blocks = self._walk.refcount_blocks
        if blocks is not None:
            first = np.flatnonzero(blocks >= 0) * self.per_block
            for start in first[first < self._clusters].tolist():
                end = min(start + self.per_block, self._clusters)
                windows.update(range(start // WINDOW, -(-end // WINDOW)))
        return windows

    def _windows(self, clusters: Offsets) -> set[int]:
        import numpy as np

        return set(np.unique(clusters[clusters < self._clusters] // WINDOW).tolist())

    def _touched(self, claim: Claim) -> Offsets:
        """The clusters that byte ranges touch, once a range."""
        import numpy as np

        size = self._header.cluster_size
        first = claim.offsets // size
        count = np.where(claim.lengths > 0, (claim.offsets + claim.lengths - 1) // size - first + 1, 0)
        before = np.cumsum(count) - count
        return np.repeat(first - before, count) + np.arange(int(count.sum()), dtype=np.int64)

    def _data(self, offset: int, *, report: bool = False) -> Offsets:
        """Clusters that the entries of an L2 table touch, once an entry."""
        import numpy as np

        table = self._walk.l2_table(offset, report=report)
        plain = Claim("data", table.plain, np.full(len(table.plain), self._header.cluster_size, dtype=np.int64))
        compressed = Claim("compressed data", table.compressed, table.lengths)
        return np.concatenate((self._touched(plain), self._touched(compressed)))

    # --- one window ------------------------------------------------------------------------------------------

    def _count(self, low: int, high: int) -> Window:
        import numpy as np

        own, tables, data = (np.zeros(high - low, dtype=np.int64) for _ in range(3))
        for claim in self._metadata:
            self._add(own, self._touched(claim), low)
        self._add(tables, self._tables // self._header.cluster_size, low, self._weights)
        near = np.flatnonzero((self._reach[:, 0] < high) & (self._reach[:, 1] > low)).tolist()
        for index in near:
            self._add(data, self._data(int(self._tables[index])), low, int(self._weights[index]))
        overlap = (own > 1) | ((own > 0) & (tables + data > 0)) | ((tables > 0) & (data > 0))
        used = (own + tables + data).astype(np.uint64)
        return Window(low, self._stored(low, high), used, overlap, near)

    def report_overlap(self, window: Window) -> None:
        self.report_clusters("overlap", window.overlap, window.low, lambda at: "metadata overlaps something else")

    @staticmethod
    def _add(counts: Offsets, clusters: Offsets, low: int, weight: Offsets | int = 1) -> None:
        import numpy as np

        inside = (clusters >= low) & (clusters < low + len(counts))
        np.add.at(counts, clusters[inside] - low, weight if isinstance(weight, int) else weight[inside])

    @property
    def per_block(self) -> int:
        """Clusters that one refcount block speaks for."""
        return (self._header.cluster_size * 8) >> self._header.refcount_order

    def _stored(self, low: int, high: int) -> Counts:
        """The stored refcounts of clusters low..high; zero where there is no block."""
        import numpy as np

        out = np.zeros(high - low, dtype=np.uint64)
        blocks, per_block = self._walk.refcount_blocks, self.per_block
        assert blocks is not None
        at = low
        while at < high and at // per_block < len(blocks):
            block, inside = divmod(at, per_block)
            count = min(per_block - inside, high - at)
            if blocks[block] >= 0:
                # Windows and blocks are powers of two: both ends lie on whole bytes, but for the file's end.
                start = (inside << self._header.refcount_order) // 8
                length = -(-(count << self._header.refcount_order) // 8)
                raw = self._file.pread(int(blocks[block]) + start, length).ljust(length, b"\0")
                out[at - low : at - low + count] = unpack_refcounts(raw, self._header.refcount_order)[:count]
            at += count
        return out

    def report_clusters(
        self, code: str, wrong: NDArray[np.bool_], low: int, what: Callable[[int], str], *, leak: bool = False
    ) -> None:
        import numpy as np

        size = self._header.cluster_size
        self._found.entries(
            code,
            lambda at: f"cluster {low + at}: {what(at)}",
            np.flatnonzero(wrong),
            low * size,
            size,
            leak=leak,
        )

    def has_refcount(self, window: Window) -> NDArray[np.bool_]:
        """Whether there is a refcount block for each of the window's clusters."""
        import numpy as np

        blocks = self._walk.refcount_blocks
        assert blocks is not None
        number = (window.low + np.arange(len(window.stored))) // self.per_block
        there: NDArray[np.bool_] = number < len(blocks)
        there[there] = blocks[number[there]] >= 0
        return there

    def refcount_at(self, cluster: int) -> int:
        """File offset of the byte that the refcount of a cluster with one begins in."""
        block, inside = divmod(cluster, self.per_block)
        blocks = self._walk.refcount_blocks
        assert blocks is not None
        return int(blocks[block]) + (inside << self._header.refcount_order) // 8

    def copied_flags(self, window: Window, counts: Counts) -> Iterator[CopiedFlags]:
        """Wrong flags of the active tables, where ``counts`` are the refcounts: set is to say exactly one."""
        import numpy as np

        def wrong(places: Offsets, copied: NDArray[np.bool_]) -> Offsets:
            clusters = places // self._header.cluster_size - window.low
            inside = np.flatnonzero((places >= 0) & (clusters >= 0) & (clusters < len(counts)))
            differ: Offsets = inside[(counts[clusters[inside]] == 1) != copied[inside]]
            return differ

        walk = self._walk
        copied = (walk.l1 & np.uint64(COPIED)) != 0
        entries = wrong(walk.l1_places, copied)
        yield CopiedFlags("L1", self._header.l1_offset, 8, entries, copied[entries])
        for index in window.near:
            if self._active[index]:
                offset = int(self._tables[index])
                table = walk.l2_table(offset)
                at = wrong(table.plain, table.copied)
                yield CopiedFlags("L2", offset, self._header.l2_entry_size, table.entries[at], table.copied[at])


def unpack_refcounts(raw: bytes, order: int) -> Counts:
    """Refcounts of 2^order bits as integers; those below a byte begin with its least significant bits."""
    import numpy as np

    if order >= 3:
        return np.frombuffer(raw, f">u{1 << (order - 3)}").astype(np.uint64)
    width = 1 << order
    bits = np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little").reshape(-1, width)
    return bits.astype(np.uint64) @ (np.uint64(1) << np.arange(width, dtype=np.uint64))
