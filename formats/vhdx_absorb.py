"""Merging a child into a VHDX, in place: what the child holds itself goes into its parent.

While that is done, and wherever it stops, the child on top of the file reads as before: only what the child hides is
changed. Data go into the blocks that are there, or into new ones at the file's end; then, with barriers between, the
sector bitmaps and the BAT learn of them. This is done in batches, as every barrier waits for the medium.

Design notes
- Zeros of the child that cover a block take the block away: it becomes one that is not there, or where the file has a
  parent itself one in the state ZERO, which hides that. The room it took is not used again; a fixed disk keeps its
  blocks and gets the zeros written.
- Where the file has a parent itself, a block that was not there becomes a partially present one, unless the child
  covers it all.
- The DataWriteGuid changes before anything else does: other children of the file must not take it for what they knew.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from imagekit.errors import UnsupportedFeature
from imagekit.formats.base import Barrier, Change, Copy, DiskImage, File, MiB, Write
from imagekit.formats.vhdx_bat import ABSENT, HERE, PARTIAL, WINDOW, ZEROED
from imagekit.formats.vhdx_edit import PIECE, Edit, set_bits, zeros_over
from imagekit.formats.vhdx_metadata import (
    BITMAP_PRESENT,
    BITMAP_SIZE,
    FULLY_PRESENT,
    NOT_PRESENT,
    PARTIALLY_PRESENT,
    ZERO,
    Geometry,
)
from imagekit.formats.vhdx_resize import check_growth, check_size, grow

BATCH_BYTES = 256 * MiB
BATCH_STEPS = 4096
"""A batch ends when it has as many bytes to copy, or as many steps."""

# For bytes.translate: the kinds of blocks that zeros of a child take away, where there is a parent and where not.
_NOT_ZEROED = bytes(kind != ZEROED for kind in range(256))
_HERE = bytes(kind == HERE for kind in range(256))
_CHOSEN = re.compile(rb"\x01+")

Own = tuple[int, int, bool]
"""(start, end, whether it holds data) of a part of the guest's disk that is the child's."""


def absorb(file: File, child: DiskImage) -> Iterable[Change]:
    """The changes that put into ``file`` what ``child`` holds itself; errors come before the first of them."""
    edit = Edit(file)
    if child.sector_size != edit.image.sector_size:
        raise UnsupportedFeature(
            f"the child has logical sectors of {child.sector_size} bytes, its parent of {edit.image.sector_size}",
            hint="merge into a new file",
            path=file.name,
        )
    if child.virtual_size < edit.image.virtual_size:
        raise UnsupportedFeature(
            f"the child has {child.virtual_size} bytes, its parent {edit.image.virtual_size}",
            hint="resize the child first, or merge into a new file",
            path=file.name,
        )
    check_size(edit, child.virtual_size)
    check_growth(edit, child.virtual_size)
    for start, end, _ in _own(child):  # a pass that finds what is wrong with the child before anything is changed
        if (start | end) % child.sector_size:
            raise UnsupportedFeature(f"the child's part {start:#x}..{end:#x} is not whole sectors", path=file.name)
    return _absorbed(edit, child)


def _own(child: DiskImage) -> Iterator[Own]:
    """The parts of the disk that the child does not leave to what lies below."""
    for extent in child.extents():
        if extent.depth == 0:
            yield extent.start, extent.end, extent.data


def _absorbed(edit: Edit, child: DiskImage) -> Iterator[Change]:
    yield from edit.begin(f"absorb {(child.identity or b'').hex()}", data=True)
    if child.virtual_size > edit.image.virtual_size:
        yield from grow(edit, child.virtual_size)
    batch = Batch(edit)
    for block, count, parts in _by_block(_own(child), edit.geometry):
        if not any(data for _, _, data in parts) and count:
            for _ in batch.take_away(block, count):
                yield from batch.changes()
        else:
            batch.put(block, parts)
            if batch.is_full:
                yield from batch.changes()
    yield from batch.changes()


def _by_block(own: Iterator[Own], geometry: Geometry) -> Iterator[tuple[int, int, list[Own]]]:
    """The child's parts by block: (first block, how many blocks they cover, the parts).

    Zeros may cover many blocks at once; anything else comes block by block, and covers it (1) or does not (0).
    """
    size, disk = geometry.block_size, geometry.virtual_size
    parts: list[Own] = []
    for begin, end, data in own:
        start = begin
        if parts and parts[0][0] // size != start // size:
            yield _one_block(parts, geometry)
            parts = []
        while start < end:
            block, inside = divmod(start, size)
            # What reaches the disk's end covers the last block.
            covered = (geometry.blocks if end == disk else end // size) - block
            if not data and not inside and covered > 0:
                stop = min((block + covered) * size, disk)
                yield block, covered, [(start, stop, data)]
            else:
                stop = min((block + 1) * size, end)
                parts.append((start, stop, data))
                if stop % size == 0 or stop == disk:
                    yield _one_block(parts, geometry)
                    parts = []
            start = stop
    if parts:
        yield _one_block(parts, geometry)


def _one_block(parts: list[Own], geometry: Geometry) -> tuple[int, int, list[Own]]:
    block = parts[0][0] // geometry.block_size
    start = block * geometry.block_size
    end = min(start + geometry.block_size, geometry.virtual_size)
    return block, int(sum(stop - at for at, stop, _ in parts) == end - start), parts


class Batch:
    """Changes that share their barriers."""

    def __init__(self, edit: Edit) -> None:
        self._edit = edit
        self._geometry = edit.geometry
        self._data: list[Change] = []
        """Data, and bits that nobody looks at yet."""

        self._bits: list[Change] = []
        """Bits of data, and BAT entries of sector bitmaps."""

        self._entries: list[Change] = []
        """BAT entries of blocks."""

        self._bytes = 0

    @property
    def is_full(self) -> bool:
        steps = len(self._data) + len(self._bits) + len(self._entries)
        return steps >= BATCH_STEPS or self._bytes >= BATCH_BYTES

    def changes(self) -> Iterator[Change]:
        """All of it, in order; the batch is empty then."""
        if self._data or self._bits or self._entries:
            yield from self._edit.lengthen()
        for steps in (self._data, self._bits, self._entries):
            if steps:
                yield from steps
                yield Barrier()
                steps.clear()
        self._bytes = 0

    # --- blocks with data --------------------------------------------------------------------------------------

    def put(self, block: int, parts: list[Own]) -> None:
        """The child's parts of one block into the file."""
        kind, offset = self._edit.block(block)
        if kind == HERE:
            self._copy(parts, block, offset, zeros=True)
        elif kind == PARTIAL:
            self._copy(parts, block, offset, zeros=True)
            self._complete(block, offset, parts)
        elif kind == ABSENT and self._geometry.differencing:
            self._make(block, parts, hides=False)
        elif any(data for _, _, data in parts):
            self._make(block, parts, hides=True)

    def _make(self, block: int, parts: list[Own], *, hides: bool) -> None:
        """A new block; one that ``hides`` what is below shows zeros where the child has nothing."""
        offset = self._edit.allocate(self._geometry.block_size)
        self._copy(parts, block, offset, zeros=False)
        if hides or self._is_whole(parts):
            self._set_entry(block, offset | FULLY_PRESENT)
            return
        bits = bytearray(self._edit.bits_place(block)[1])
        self._set_bits(bits, block, parts)
        self._data.append(self._bits_write(block, bits))
        self._set_entry(block, offset | PARTIALLY_PRESENT)

    def _complete(self, block: int, offset: int, parts: list[Own]) -> None:
        """Tell that a partially present block has the parts now."""
        if self._is_whole(parts):
            self._set_entry(block, offset | FULLY_PRESENT)
            return
        bits = self._edit.bits_of(block)
        self._set_bits(bits, block, parts)
        self._bits.append(self._bits_write(block, bits))

    def _is_whole(self, parts: list[Own]) -> bool:
        return bool(_one_block(parts, self._geometry)[1])

    def _copy(self, parts: list[Own], block: int, offset: int, *, zeros: bool) -> None:
        """The child's data into the block at ``offset``, its zeros too unless there are zeros already."""
        start = block * self._geometry.block_size
        for at, stop in _joined((at, stop) for at, stop, data in parts if data or zeros):
            self._data.append(Copy(offset + at - start, at, stop - at))
            self._bytes += stop - at

    def _set_bits(self, bits: bytearray, block: int, parts: list[Own]) -> None:
        start, sector = block * self._geometry.block_size, self._geometry.sector_size
        for at, stop in _joined((at, stop) for at, stop, _ in parts):
            set_bits(bits, (at - start) // sector, (stop - start) // sector)

    def _bits_write(self, block: int, bits: bytearray) -> Write:
        """The bits into their sector bitmap, which is made where there is none."""
        chunk = block // self._geometry.chunk_ratio
        bitmap = self._edit.bitmap(chunk)
        if bitmap is None:
            bitmap = self._edit.bitmaps[chunk] = self._edit.allocate(BITMAP_SIZE)
            self._bits.append(self._edit.entry(self._geometry.bitmap_index(chunk), bitmap | BITMAP_PRESENT))
        self._bytes += len(bits)
        return Write(bitmap + self._edit.bits_place(block)[0], bytes(bits))

    def _set_entry(self, block: int, value: int) -> None:
        self._entries.append(self._edit.entry(self._geometry.payload_index(block), value))

    # --- blocks of zeros ---------------------------------------------------------------------------------------

    def take_away(self, first: int, count: int) -> Iterator[None]:
        """Blocks of which nothing is to be left but zeros; stops whenever the batch is full."""
        image, chosen = self._edit.image, _NOT_ZEROED if self._geometry.differencing else _HERE
        end = min(first + count, image.geometry.blocks)  # blocks by which the disk grew are zeros
        while first < end:
            number, inside = divmod(first, WINDOW)
            stop = min(end, (number + 1) * WINDOW)
            kinds = image.bat.window(number).kinds[inside : stop - number * WINDOW]
            for found in _CHOSEN.finditer(kinds.translate(chosen)):
                one, other = found.start() + first, found.end() + first
                if not self._edit.fixed:
                    self._forget(one, other)
                    continue
                for block in range(one, other):
                    self._zero(block)
                    if self.is_full:
                        yield
            if self.is_full:
                yield
            first = stop

    def _zero(self, block: int) -> None:
        _, offset = self._edit.block(block)
        for change in zeros_over(self._edit.file, offset, offset + self._geometry.block_size):
            self._data.append(change)
            self._bytes += PIECE

    def _forget(self, block: int, end: int) -> None:
        """BAT entries of blocks that are not there any more, those of a chunk in one write."""
        value, ratio = ZERO if self._geometry.differencing else NOT_PRESENT, self._geometry.chunk_ratio
        while block < end:
            stop = min(end, (block // ratio + 1) * ratio)
            at = self._edit.entry(self._geometry.payload_index(block), value)
            self._entries.append(Write(at.offset, at.data * (stop - block)))
            block = stop


def _joined(parts: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(start, end) of sorted parts, neighbours made one."""
    start = end = -1
    for at, stop in parts:
        if at != end:
            if end > start:
                yield start, end
            start = at
        end = stop
    if end > start:
        yield start, end
