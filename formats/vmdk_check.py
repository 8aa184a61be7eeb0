"""The check of a whole VMDK: everything its tables lead to, and that nothing lies on anything else.

What opening and reading check already (every pointer inside the file and off the fixed metadata, redundant tables
equal to the primary ones) ends the check with its error. This adds the pass over all grains: overlaps, and the
markers of compressed ones. Of a text only what it says is checked: its extents are files of their own.
"""

from __future__ import annotations

from array import array

from imagekit.errors import CorruptImage
from imagekit.formats.base import SECTOR, Problem
from imagekit.formats.vmdk_extents import DescriptorImage
from imagekit.formats.vmdk_sparse import SparseImage
from imagekit.formats.vmdk_stream import GRAIN_MARKER_BYTES, Marker
from imagekit.formats.vmdk_tables import COMPRESSED, PLAIN, Run

LISTED = 100
"""Problems of a kind that are put into words."""

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
    import numpy as np

    layout, last = image.layout, image.layout.tables - 1
    used = layout.grains - last * layout.per_table
    place = int(image.tables.directory(last, 1)[0]) if last >= 0 else 0
    if not place or layout.width == 8:  # an SESparse entry is a number of a grain, with flags
        return []
    words = image.tables.read_tables(np.array([place], np.int64))[used:].astype(np.int64)
    wrong = np.flatnonzero(words * SECTOR >= image.file.size)[:LISTED].tolist()
    return [
        Problem(
            "outside",
            f"grain {layout.grains + at}, past the disk's end, should lie at {int(words[at]) * SECTOR:#x}",
            place + (used + at) * layout.width,
        )
        for at in wrong
    ]


class _Walk:
    """All claims of a file. No more are kept than can lie in it side by side: with one more, some overlap."""

    def __init__(self, image: SparseImage) -> None:
        self._image = image
        self._kinds: list[str] = []
        self._starts, self._ends, self._kind_of = array("q"), array("q"), array("q")
        self.markers: list[Problem] = []
        room = image.file.size // SECTOR + len(image.layout.fixed)
        for one in (*image.layout.fixed, *image.table_ranges()):
            self._claim(one.offset, one.length, one.kind)
            if len(self._starts) > room:
                return
        for run in image.tables.runs(0, image.virtual_size):
            if run.kind == PLAIN:
                self._claim(run.offset, run.length, "grain")
            elif run.kind == COMPRESSED:
                self._compressed(run)
            if len(self._starts) > room:
                return

    def _claim(self, offset: int, length: int, kind: str) -> None:
        if kind not in self._kinds:
            self._kinds.append(kind)
        self._starts.append(offset)
        self._ends.append(offset + length)
        self._kind_of.append(self._kinds.index(kind))

    def _compressed(self, run: Run) -> None:
        image, grain = self._image, self._image.layout.grain
        for index, offset in enumerate(run.offsets.tolist(), run.start // grain):
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
                self._claim(offset, GRAIN_MARKER_BYTES + marker.size, "grain")
            elif len(self.markers) < LISTED:
                self.markers.append(Problem("grain-marker", f"grain {index}: {wrong}", offset))

    def overlaps(self) -> list[Problem]:
        import numpy as np

        starts, ends, kinds = (np.frombuffer(one, "<i8") for one in (self._starts, self._ends, self._kind_of))
        order = np.argsort(starts, kind="stable")
        reach = np.maximum.accumulate(ends[order])
        wrong = np.flatnonzero(starts[order][1:] < reach[:-1]) + 1
        problems = []
        for at in wrong[:LISTED].tolist():
            where, before = int(starts[order[at]]), int(reach[at - 1])
            kind = self._kinds[int(kinds[order[at]])]
            problems.append(
                Problem("overlap", f"a {kind} at {where:#x} lies on what is there up to {before:#x}", where)
            )
        if len(wrong) > LISTED:
            problems.append(Problem("more", f"and {len(wrong) - LISTED} more overlaps"))
        return problems
