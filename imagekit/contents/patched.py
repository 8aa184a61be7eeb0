"""A disk with a few bytes changed, and perhaps with more room at its end: laid over an image that stays as it is."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import pairwise

from imagekit.formats.base import DiskImage, Extent, ImageInfo, Range, clip, merge_extents
from imagekit.records import dataclass, replace


@dataclass(frozen=True, slots=True)
class Patch:
    """Guest bytes that replace what is at ``offset``."""

    offset: int
    data: bytes

    @property
    def end(self) -> int:
        return self.offset + len(self.data)


class PatchedImage(DiskImage):
    """``base`` with patches laid over it; closing it closes the base. Safe to share between threads, as the base is.

    ``virtual_size`` may be larger than the base's: zeros follow. Patches lie inside of it and not on each other, else
    ValueError. The result is another disk than the base for whoever refers to it: it has no ``identity``.
    """

    def __init__(self, base: DiskImage, patches: Iterable[Patch], virtual_size: int | None = None) -> None:
        self.base = base
        self.virtual_size = base.virtual_size if virtual_size is None else virtual_size
        self.disk_id = base.disk_id
        self.sector_size = base.sector_size
        self.patches = tuple(sorted((one for one in patches if one.data), key=lambda one: one.offset))
        self._ends = [one.end for one in self.patches]
        if self.virtual_size < base.virtual_size:
            raise ValueError(f"{self.virtual_size} bytes, smaller than the base's {base.virtual_size}")
        if self.patches and (self.patches[0].offset < 0 or self.patches[-1].end > self.virtual_size):
            raise ValueError(f"a patch outside of a disk of {self.virtual_size} bytes")
        for one, other in pairwise(self.patches):
            if one.end > other.offset:
                raise ValueError(f"the patches at {one.offset:#x} and {other.offset:#x} overlap")

    def info(self) -> ImageInfo:
        return replace(self.base.info(), virtual_size=self.virtual_size)

    def extents(self, start: int = 0, length: int | None = None) -> Iterator[Extent]:
        return merge_extents(self._extents(*clip(start, length, self.virtual_size)))

    def _extents(self, start: int, end: int) -> Iterator[Extent]:
        for patch in self._patches(start, end):
            yield from self._below(start, patch.offset)
            first, last = max(start, patch.offset), min(end, patch.end)
            yield Extent(first, last - first, data=True, zero=False)
            start = last
        yield from self._below(start, end)

    def _below(self, start: int, end: int) -> Iterator[Extent]:
        inside = min(end, self.base.virtual_size)
        if start < inside:
            yield from self.base.extents(start, inside - start)
            start = inside
        if start < end:
            yield Extent(start, end - start, data=False, zero=True, present=False)

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        end = offset + len(buffer)
        inside = max(0, min(end, self.base.virtual_size) - offset)
        if inside:
            self.base.pread_into(offset, buffer[:inside])
        if inside < len(buffer):
            buffer[inside:] = bytes(len(buffer) - inside)
        for patch in self._patches(offset, end):
            first, last = max(offset, patch.offset), min(end, patch.end)
            buffer[first - offset : last - offset] = patch.data[first - patch.offset : last - patch.offset]

    def _patches(self, start: int, end: int) -> Iterator[Patch]:
        """The patches that touch a range, in order."""
        if start >= end:
            return
        for patch in self.patches[bisect_right(self._ends, start) :]:
            if patch.offset >= end:
                return
            yield patch

    def ranges(self) -> Iterator[Range]:
        """What the base claims in its file: patches are not in it."""
        return self.base.ranges()

    def close(self) -> None:
        self.base.close()
