"""The check of a whole VMDK: everything its tables lead to, and that nothing lies on anything else.

What opening and reading check already (every pointer inside the file and off the fixed metadata, redundant tables
equal to the primary ones) ends the check with its error. This adds the pass over all grains: overlaps, and the
markers of compressed ones. Of a text only what it says is checked: its extents are files of their own.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from heapq import merge
from itertools import islice
from operator import itemgetter, le

from imagekit.errors import CorruptImage
from imagekit.formats.base import SECTOR, Problem
from imagekit.formats.vmdk_extents import DescriptorImage
from imagekit.formats.vmdk_sparse import SparseImage
from imagekit.formats.vmdk_stream import GRAIN_MARKER_BYTES, Marker
from imagekit.formats.vmdk_tables import COMPRESSED, PLAIN, Run

LISTED = 100
"""Problems of a kind that are put into words."""

SORTED_AT_ONCE = 1 << 16
"""Claims: an image may have millions, mostly in order already."""

_NOT_DAMAGE = frozenset({"no-descriptor"})


def check(image: SparseImage | DescriptorImage) -> list[Problem]:
    """Everything wrong with the structure."""
    facts = image.info().facts
    problems = [Problem(one.code, one.message, one.offset) for one in facts if one.code not in _NOT_DAMAGE]
    if isinstance(image, SparseImage):
        walk = _Walk(image)
        problems += [*walk.markers, *walk.overlaps(), *_spare(image)]
    return problems


def _spare(image: SparseImage) -> list[Problem]:
    """Entries of the last grain table past the disk's end that lead out of the file: no guest follows them."""
    layout, last = image.layout, image.layout.tables - 1
    used = layout.grains - last * layout.per_table
    place = image.tables.directory(last, 1)[0] if last >= 0 else 0
    if not place or layout.width == 8:  # an SESparse entry is a number of a grain, with flags
        return []
    size, words = image.file.size, image.tables.words(image.tables.read_tables([place]))[used:]
    wrong = islice((at for at, word in enumerate(words) if word * SECTOR >= size), LISTED)
    return [
        Problem(
            "outside",
            f"grain {layout.grains + at}, past the disk's end, should lie at {words[at] * SECTOR:#x}",
            place + (used + at) * layout.width,
        )
        for at in wrong
    ]


class _Claims:
    """Parts of the file and what they are, by where they start; those that start together in the order they came."""

    def __init__(self) -> None:
        self._kinds: list[str] = []
        self._runs: list[tuple[array[int], array[int], array[int]]] = []
        """Sorted starts, their ends and kinds."""

        self._latest = array("q"), array("q"), array("B")
        self.count = 0

    def add(self, offset: int, length: int, kind: str) -> None:
        if kind not in self._kinds:
            self._kinds.append(kind)
        starts, ends, kinds = self._latest
        starts.append(offset)
        ends.append(offset + length)
        kinds.append(self._kinds.index(kind))
        self.count += 1
        if len(starts) == SORTED_AT_ONCE:
            self._sort()

    def _sort(self) -> None:
        latest, self._latest = self._latest, (array("q"), array("q"), array("B"))
        starts = latest[0]
        if not all(map(le, starts, islice(starts, 1, None))):
            order = sorted(range(len(starts)), key=starts.__getitem__)
            for one in latest:
                one[:] = array(one.typecode, map(one.__getitem__, order))
        if self._runs and self._runs[-1][0][-1] <= starts[0]:
            for one, more in zip(self._runs[-1], latest, strict=True):
                one.extend(more)
        else:
            self._runs.append(latest)

    def __iter__(self) -> Iterator[tuple[int, int, str]]:
        """(start, end, kind), sorted."""
        if self._latest[0]:
            self._sort()
        for start, end, kind in merge(*(zip(*run, strict=True) for run in self._runs), key=itemgetter(0)):
            yield start, end, self._kinds[kind]


class _Walk:
    """All claims of a file. No more are kept than can lie in it side by side: with one more, some overlap."""

    def __init__(self, image: SparseImage) -> None:
        self._image = image
        self._claims = _Claims()
        self.markers: list[Problem] = []
        room = image.file.size // SECTOR + len(image.layout.fixed)
        for one in (*image.layout.fixed, *image.table_ranges()):
            self._claims.add(one.offset, one.length, one.kind)
            if self._claims.count > room:
                return
        for run in image.tables.runs(0, image.virtual_size):
            if run.kind == PLAIN:
                self._claims.add(run.offset, run.length, "grain")
            elif run.kind == COMPRESSED:
                self._compressed(run)
            if self._claims.count > room:
                return

    def _compressed(self, run: Run) -> None:
        image, grain = self._image, self._image.layout.grain
        for index, sector in enumerate(run.sectors, run.start // grain):
            offset = sector * SECTOR
            marker = Marker.parse(image.file.pread(offset, GRAIN_MARKER_BYTES))
            wrong = None
            try:
                marker.check_grain(grain)
                if marker.value * SECTOR != index * grain:
                    wrong = f"its marker is of sector {marker.value}"
                elif offset + GRAIN_MARKER_BYTES + marker.size > image.file.size:
                    wrong = "it ends behind the file's end"
            except CorruptImage as error:
                wrong = error.message
            if wrong is None:
                self._claims.add(offset, GRAIN_MARKER_BYTES + marker.size, "grain")
            elif len(self.markers) < LISTED:
                self.markers.append(Problem("grain-marker", f"grain {index}: {wrong}", offset))

    def overlaps(self) -> list[Problem]:
        problems: list[Problem] = []
        reach, found = 0, 0
        for start, end, kind in self._claims:
            if start < reach:
                found += 1
                if found <= LISTED:
                    problems.append(
                        Problem("overlap", f"a {kind} at {start:#x} lies on what is there up to {reach:#x}", start)
                    )
            reach = max(reach, end)
        if found > LISTED:
            problems.append(Problem("more", f"and {found - LISTED} more overlaps"))
        return problems
