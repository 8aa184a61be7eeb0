"""Merging a child into the VHD that is its parent: what the child holds itself is copied into the parent's file.

The child is any image, as long as it is not smaller. Only what it holds (extents of depth 0) is written, and over
nothing else: whatever step the merge has come to, the child on top of the parent hides it and reads as before.

    fixed           in place
    dynamic         in place; blocks that the parent does not have go behind the old end, their data first, then the
                    entries of the table
    differencing    the same, and the bits of the sectors written are set; zeros too take room here, because what is
                    not allocated shows the parent's own parent

Design notes
- A larger child makes the parent larger first (vhd_change.py).
- Pieces of a child that do not begin or end on a sector are widened: the child shows what is there already.
- In a dynamic disk too the bits of written sectors are set, for readers that go by them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress
from typing import NamedTuple

from imagekit.errors import UnsupportedFeature
from imagekit.formats.base import SECTOR, Barrier, Change, Copy, DiskImage, File, Write, round_up
from imagekit.formats.vhd import VhdImage
from imagekit.formats.vhd_change import check_size, grow_steps, open_sound, resize_fixed
from imagekit.formats.vhd_space import zeros
from imagekit.formats.vhd_workspace import Workspace


class _Span(NamedTuple):
    """Guest bytes that the child holds, whole sectors."""

    start: int
    end: int
    data: bool


def absorb(file: File, child: DiskImage) -> Iterable[Change]:
    """The steps of the merge. See :meth:`imagekit.formats.base.DiskFormat.absorb`."""
    image = open_sound(file)
    size = child.virtual_size
    if size < image.virtual_size:
        raise UnsupportedFeature(
            f"the child has {size} bytes, its parent {image.virtual_size}: what it does not have would be lost",
            hint="convert it to a new file",
            path=file.name,
        )
    if size > image.virtual_size:
        check_size(image, size)
    if image.dynamic is None:
        return _into_fixed(image, child)
    return _into_blocks(image, child)


def _held(child: DiskImage, behind: int) -> Iterator[_Span]:
    """What the child holds itself. Behind ``behind`` the parent has zeros, so that holes need no mention there."""
    done = 0
    for extent in child.extents():
        if extent.depth:
            continue
        start, end = extent.start, extent.end
        if not extent.present:
            end = min(end, behind)
        data = extent.data or start % SECTOR != 0 or end % SECTOR != 0
        start, end = max(done, start // SECTOR * SECTOR), min(round_up(end, SECTOR), child.virtual_size)
        if start < end:
            yield _Span(start, end, data)
            done = end


# --- fixed -----------------------------------------------------------------------------------------------------


def _into_fixed(image: VhdImage, child: DiskImage) -> Iterator[Change]:
    old_size, size = image.virtual_size, child.virtual_size
    if size > old_size:
        yield from resize_fixed(image, size)
    for span in _held(child, old_size):
        if span.data:
            yield Copy(span.start, span.start, span.end - span.start)
        else:
            yield from zeros(span.start, span.end)
    yield Barrier()


# --- dynamic and differencing ----------------------------------------------------------------------------------


def _into_blocks(image: VhdImage, child: DiskImage) -> Iterator[Change]:
    work, old_size, size = Workspace(image), image.virtual_size, child.virtual_size
    if size > old_size:
        work.grow(size)
    touched = bytearray(len(work.bat))
    block = work.header.block_size
    for span in _held(child, old_size):
        if span.data or image.parent is not None:
            first, end = span.start // block, -(-span.end // block)
            touched[first:end] = b"\1" * (end - first)
    new = array("I", (number for number in compress(range(len(touched)), touched) if work.bat[number] < 0))
    work.place_blocks(new)
    return _merged(work, child, new, old_size)


def _merged(work: Workspace, child: DiskImage, new: Sequence[int], old_size: int) -> Iterator[Change]:
    is_new = bytearray(len(work.bat))
    for block in new:
        is_new[block] = 1
    yield from work.begin()
    if child.virtual_size > old_size:
        yield from grow_steps(work, child.virtual_size)
    for block, pieces in _by_block(_held(child, old_size), work.header.block_size):
        if work.bat[block] >= 0:
            yield from _fill(work, block, pieces, is_new=bool(is_new[block]))
    yield Barrier()
    yield from work.write_entries(new)
    yield Barrier()
    yield from work.finish()


def _by_block(spans: Iterator[_Span], size: int) -> Iterator[tuple[int, list[_Span]]]:
    """The spans cut at the ends of blocks, a list for each block that has any."""
    current, pieces = -1, list[_Span]()
    for span in spans:
        for block in range(span.start // size, -(-span.end // size)):
            if block != current:
                if pieces:
                    yield current, pieces
                current, pieces = block, []
            pieces.append(_Span(max(span.start, block * size), min(span.end, (block + 1) * size), span.data))
    if pieces:
        yield current, pieces


def _fill(work: Workspace, block: int, pieces: list[_Span], *, is_new: bool) -> Iterator[Change]:
    """Put the child's pieces of one block into its place, and set the bits of their sectors."""
    place, start = int(work.bat[block]), block * work.header.block_size
    data = place + work.header.bitmap_size
    for one in pieces:
        at = data + one.start - start
        if one.data:
            yield Copy(at, one.start, one.end - one.start)
        elif not is_new:  # a new block has zeros where nothing is written
            yield from zeros(at, at + one.end - one.start)
    if is_new and work.image.parent is None:
        yield Write(place, b"\xff" * work.header.bitmap_size)
        return
    old = bytes(work.header.bitmap_size) if is_new else work.bitmap(block)
    bitmap = work.marked(old, [((one.start - start) // SECTOR, (one.end - start) // SECTOR) for one in pieces])
    if is_new or bitmap != old:
        yield Write(place, bitmap)
