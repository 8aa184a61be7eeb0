"""The check of a whole qcow2: what its tables refer to against the refcounts it stores.

Follows QEMU's docs/interop/qcow2.txt and agrees with ``qemu-img check`` about what is damage (a cluster used more
often than its refcount says, a pointer that leads nowhere, a wrong copied flag) and what is a leak (the opposite).
Beyond it, metadata that overlaps anything is damage even where the refcounts allow for it, and so is what the reader
refuses to read.

Clusters are counted in windows of the file, in the order of the file; memory follows the window, not the image. What
a window needs of the L2 tables is read again: they are small, and most lead to few windows.

Not here: the walk through the tables (qcow2_claims.py), repairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from imagekit.errors import CorruptImage, UnsupportedFeature
from imagekit.formats.base import Problem
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
MAX_WINDOWS = 4096
LISTED = 100
"""Problems listed one by one, of damage and of leaks each."""


def check(image: Qcow2Image) -> list[Problem]:
    """Everything wrong with the structure; empty when sound. UnsupportedFeature for what is not understood."""
    header, found = image.header, _Found()
    unknown = header.incompatible & ~KNOWN_INCOMPATIBLE
    if unknown:
        raise UnsupportedFeature(f"unknown incompatible feature bits {unknown:#x}", path=image.file.name, offset=72)
    if header.incompatible & CORRUPT:
        found.add("corrupt-bit", "QEMU marked this image corrupt", 72)
    _Counting(image, found).run()
    if not found.damaged:
        _read_through(image, found)
    return found.problems()


def _read_through(image: Qcow2Image, found: _Found) -> None:
    """What the reader refuses is damage too: a cluster cut short by the file's end."""
    empty = RawImage(MemoryFile(), 0)
    try:
        for _ in Qcow2Image(image.file, resolver=lambda _: empty).extents():
            pass
    except CorruptImage as error:
        found.add("cut-short", error.message, error.offset)
    except UnsupportedFeature:
        return  # encrypted, or the data is elsewhere: the structure is all there is to check


class _Found:
    """The problems: the first of each kind one by one, the rest as a number."""

    def __init__(self) -> None:
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
        for entry in map(int, entries[: LISTED - len(listed)]):
            listed.append(Problem(code, what(entry), at + entry * step, leak))

    def problems(self) -> list[Problem]:
        out = []
        for leak, name in ((False, "problems"), (True, "leaked clusters")):
            out += self._listed[leak]
            more = self._total[leak] - len(self._listed[leak])
            if more:
                out.append(Problem("more", f"and {more} more {name}", None, leak))
        return out


class _Counting:
    """Counts the references to each cluster and compares with what is stored."""

    def __init__(self, image: Qcow2Image, found: _Found) -> None:
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

    def run(self) -> None:
        windows = self._look_at_tables()
        if self._walk.refcount_blocks is None:
            return  # said already; without refcounts there is nothing to compare with
        if len(windows) > MAX_WINDOWS:
            raise UnsupportedFeature(f"the image has references to {len(windows)} windows of {WINDOW} clusters")
        for window in sorted(windows):
            self._check_window(window * WINDOW, min((window + 1) * WINDOW, self._clusters))

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
            first = np.flatnonzero(blocks >= 0) * self._per_block
            for start in first[first < self._clusters].tolist():
                end = min(start + self._per_block, self._clusters)
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

    def _check_window(self, low: int, high: int) -> None:
        import numpy as np

        own, tables, data = (np.zeros(high - low, dtype=np.int64) for _ in range(3))
        for claim in self._metadata:
            self._add(own, self._touched(claim), low)
        self._add(tables, self._tables // self._header.cluster_size, low, self._weights)
        near = np.flatnonzero((self._reach[:, 0] < high) & (self._reach[:, 1] > low)).tolist()
        for index in near:
            self._add(data, self._data(int(self._tables[index])), low, int(self._weights[index]))
        stored = self._stored(low, high)
        self._compare(low, stored, (own + tables + data).astype(np.uint64))
        overlap = (own > 1) | ((own > 0) & (tables + data > 0)) | ((tables > 0) & (data > 0))
        self._report_clusters("overlap", overlap, low, lambda at: "metadata overlaps something else")
        self._check_copied(low, stored, near)

    @staticmethod
    def _add(counts: Offsets, clusters: Offsets, low: int, weight: Offsets | int = 1) -> None:
        import numpy as np

        inside = (clusters >= low) & (clusters < low + len(counts))
        np.add.at(counts, clusters[inside] - low, weight if isinstance(weight, int) else weight[inside])

    @property
    def _per_block(self) -> int:
        """Clusters that one refcount block speaks for."""
        return (self._header.cluster_size * 8) >> self._header.refcount_order

    def _stored(self, low: int, high: int) -> Counts:
        """The stored refcounts of clusters low..high; zero where there is no block."""
        import numpy as np

        out = np.zeros(high - low, dtype=np.uint64)
        blocks, per_block = self._walk.refcount_blocks, self._per_block
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

    def _compare(self, low: int, stored: Counts, used: Counts) -> None:
        def what(at: int) -> str:
            return f"used {int(used[at])} times, but its refcount is {int(stored[at])}"

        self._report_clusters("refcount-low", stored < used, low, what)
        self._report_clusters("leak", stored > used, low, what, leak=True)

    def _report_clusters(
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

    def _check_copied(self, low: int, stored: Counts, near: list[int]) -> None:
        """The copied flag of the active tables says that the refcount is exactly one."""
        import numpy as np

        walk = self._walk

        def report(
            name: str, places: Offsets, copied: NDArray[np.bool_], entries: Offsets, at: int, step: int
        ) -> None:
            clusters = places // self._header.cluster_size - low
            inside = np.flatnonzero((places >= 0) & (clusters >= 0) & (clusters < len(stored)))
            wrong = inside[(stored[clusters[inside]] == 1) != copied[inside]]
            what = f"{name} entry {{}}: the copied flag does not go with the refcount"
            self._found.entries("copied-flag", what.format, entries[wrong], at, step)

        every = np.arange(len(walk.l1), dtype=np.int64)
        report("L1", walk.l1_places, (walk.l1 & np.uint64(COPIED)) != 0, every, self._header.l1_offset, 8)
        for index in near:
            if self._active[index]:
                offset = int(self._tables[index])
                table = walk.l2_table(offset)
                report("L2", table.plain, table.copied, table.entries, offset, self._header.l2_entry_size)


def unpack_refcounts(raw: bytes, order: int) -> Counts:
    """Refcounts of 2^order bits as integers; those below a byte begin with its least significant bits."""
    import numpy as np

    if order >= 3:
        return np.frombuffer(raw, f">u{1 << (order - 3)}").astype(np.uint64)
    width = 1 << order
    bits = np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little").reshape(-1, width)
    return bits.astype(np.uint64) @ (np.uint64(1) << np.arange(width, dtype=np.uint64))
