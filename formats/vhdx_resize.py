"""Giving a VHDX another virtual size, in place.

Growing prepares everything that the new size will show while the old size still hides it: a longer BAT at the file's
end where the old one has no room, entries of the new blocks, what lies behind the disk's old end in its last block.
Then the size is written, in one write. Shrinking writes the size first, then frees what it hides.

Design notes
- Entries and bytes that no disk of the old size uses may hold anything: QEMU left junk there, and so does a disk
  that was shrunk. They are cleared before they show.
- A differencing disk must not show more of its parent, whose size is not known here: new blocks get the state ZERO,
  and a last block that was not present becomes a partially present one, with zeros in the sectors behind the old end.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from imagekit.errors import UnsupportedFeature
from imagekit.formats.base import Barrier, Change, File, Truncate, Write
from imagekit.formats.vhdx_bat import ABSENT, HERE, PARTIAL
from imagekit.formats.vhdx_edit import PIECE, Edit, set_bits, zeros_over
from imagekit.formats.vhdx_header import HEADER_AREA, MAX_SIZE, Region
from imagekit.formats.vhdx_metadata import (
    BITMAP_PRESENT,
    BITMAP_SIZE,
    ENTRY_SIZE,
    OFFSET_BITS,
    PARTIALLY_PRESENT,
    VIRTUAL_DISK_SIZE,
    ZERO,
    Geometry,
)
from imagekit.formats.vhdx_writer import pages_in_use, set_present
from imagekit.formats.words import differing, packed

if TYPE_CHECKING:
    from imagekit.formats.words import Words

WINDOW = 1 << 16
"""BAT entries looked at by one step."""


def resize(file: File, size: int) -> Iterable[Change]:
    """The changes that give the disk ``size`` bytes; UnsupportedFeature before the first when that cannot be."""
    edit = Edit(file)
    check_size(edit, size)
    old = edit.image.virtual_size
    if size == old:
        return ()
    if size < old:
        _refuse_loss(edit, size)
        return _shrink(edit, size)
    check_growth(edit, size)
    return _resized(edit, size)


def _resized(edit: Edit, size: int) -> Iterator[Change]:
    yield from edit.begin(f"resize {size}", data=True)
    yield from grow(edit, size)


def check_size(edit: Edit, size: int) -> None:
    """UnsupportedFeature for a size that no such disk can have."""
    sector = edit.image.sector_size
    if not 0 < size <= MAX_SIZE or size % sector:
        raise UnsupportedFeature(
            f"size {size}: a multiple of {sector} up to 64 TiB ({MAX_SIZE}) is needed", path=edit.raw.name
        )


def resized(geometry: Geometry, size: int) -> Geometry:
    return Geometry(size, geometry.block_size, geometry.sector_size, geometry.differencing)


# --- growing -----------------------------------------------------------------------------------------------------


def check_growth(edit: Edit, size: int) -> None:
    """UnsupportedFeature when the BAT has to move and cannot."""
    if resized(edit.geometry, size).bat_length > edit.bat_region.length:
        edit.check_region_can_move(edit.bat_region)


def grow(edit: Edit, size: int) -> Iterator[Change]:
    """From a disk whose change is announced to one of ``size`` bytes, larger than it is."""
    old, new = edit.geometry, resized(edit.geometry, size)
    if new.bat_length > edit.bat_region.length:
        yield from _move_bat(edit, new.bat_length)
    yield from _clear_end(edit)
    if edit.fixed and new.blocks > old.blocks:
        edit.grown_at = edit.allocate((new.blocks - old.blocks) * new.block_size)
        yield from edit.lengthen()
    yield from _new_entries(edit, new)
    yield Barrier()
    yield from edit.set_item(VIRTUAL_DISK_SIZE, size.to_bytes(8, "little"))
    edit.geometry = new


def _move_bat(edit: Edit, length: int) -> Iterator[Change]:
    """A copy of the BAT at the file's end that has room for more."""
    region, geometry = edit.bat_region, edit.geometry
    offset = edit.allocate(length)
    yield from edit.lengthen()
    for start in range(0, geometry.entries, WINDOW):
        stop = min(start + WINDOW, geometry.entries)
        entries = edit.entries(start, start + WINDOW)
        _clear(entries, slice(stop - start, WINDOW))
        if not geometry.differencing:
            _clear(entries, geometry.bitmap_slots(start, start + WINDOW))
        for at, data in pages_in_use(entries, offset + start * ENTRY_SIZE):
            yield Write(at, data)
    yield Barrier()
    yield from edit.move_region(region, offset, length)
    edit.bat_region = Region(region.guid, offset, length, region.required)


def _zeros(count: int) -> Words:
    return array("Q", bytes(count * ENTRY_SIZE))


def _clear(entries: Words, where: slice) -> None:
    entries[where] = _zeros(len(entries[where]))


def _new_entries(edit: Edit, new: Geometry) -> Iterator[Change]:
    """The BAT entries of the new blocks, where they are not what they should be already."""
    old, moved = edit.geometry, edit.bat_region is not edit.image.bat_region
    end = new.entries if new.differencing else new.payload_index(new.blocks - 1) + 1
    for start in range(old.payload_index(old.blocks - 1) + 1, end, WINDOW):
        stop = min(start + WINDOW, end)
        found = edit.entries(start, stop)
        if moved:
            _clear(found, slice(max(0, old.entries - start), len(found)))
        wanted = _wanted_entries(edit, new, start, found)
        yield from _differences(found, wanted, edit.bat_region.offset + start * ENTRY_SIZE)


def _wanted_entries(edit: Edit, new: Geometry, start: int, found: Words) -> Words:
    """What the entries from ``start``, which are not those of old blocks, should be in place of ``found``."""
    stop = start + len(found)
    wanted = _zeros(len(found))
    if new.differencing:
        zeroed = max(0, min(new.payload_index(new.blocks - 1) + 1, stop) - start)
        wanted[:zeroed] = array("Q", [ZERO]) * zeroed
        _clear(wanted, new.bitmap_slots(start, stop))
        kept = new.bitmap_slots(start, min(stop, edit.geometry.entries))
        wanted[kept] = found[kept]
    elif edit.grown_at is not None:
        block, end = (index - index // (new.chunk_ratio + 1) for index in (start, stop))
        offset = edit.grown_at + (block - edit.geometry.blocks) * new.block_size
        set_present(wanted, start, new, block, end - block, offset)
    return wanted


def _differences(found: Words, wanted: Words, offset: int) -> Iterator[Change]:
    if found != wanted:
        first = next(differing(found, wanted))
        stop = len(found) - next(differing(found[::-1], wanted[::-1]))
        yield Write(offset + first * ENTRY_SIZE, packed(wanted[first:stop], "little"))


def _clear_end(edit: Edit) -> Iterator[Change]:
    """What lies in the last block behind the disk's end becomes zeros, before it shows."""
    geometry = edit.geometry
    block, used = divmod(geometry.virtual_size, geometry.block_size)
    if not used:
        return
    kind, offset = edit.block(block)
    if kind == ABSENT and geometry.differencing:
        yield from _cut_off_parent(edit, block, used)
    if kind not in (HERE, PARTIAL):
        return
    yield from edit.lengthen()
    yield from zeros_over(edit.file, offset + used, offset + geometry.block_size)
    if kind == PARTIAL:
        yield Barrier()
        bits, chunk = edit.bits_of(block), block // geometry.chunk_ratio
        set_bits(bits, used // geometry.sector_size, len(bits) * 8)
        edit.bits[block] = bytes(bits)
        bitmap = edit.bitmap(chunk)
        assert bitmap is not None  # the check found none missing
        yield Write(bitmap + edit.bits_place(block)[0], bytes(bits))


def _cut_off_parent(edit: Edit, block: int, used: int) -> Iterator[Change]:
    """Make a block that shows its parent one that shows zeros from ``used`` on."""
    geometry = edit.geometry
    chunk = block // geometry.chunk_ratio
    at, count = edit.bits_place(block)
    offset, bitmap, fresh = edit.allocate(geometry.block_size), edit.bitmap(chunk), False
    if bitmap is None:
        bitmap, fresh = edit.allocate(BITMAP_SIZE), True
        edit.bitmaps[chunk] = bitmap
    yield from edit.lengthen()
    bits = bytearray(count)
    set_bits(bits, used // geometry.sector_size, count * 8)
    yield Write(bitmap + at, bytes(bits))
    yield Barrier()
    if fresh:
        yield edit.entry(geometry.bitmap_index(chunk), bitmap | BITMAP_PRESENT)
        yield Barrier()
    yield edit.entry(geometry.payload_index(block), offset | PARTIALLY_PRESENT)
    edit.blocks[block], edit.bits[block] = (PARTIAL, offset), bytes(bits)


# --- shrinking ---------------------------------------------------------------------------------------------------


def _refuse_loss(edit: Edit, size: int) -> None:
    """UnsupportedFeature unless everything behind ``size`` is zero, and known to be."""
    image = edit.image
    for run in image.bat.runs(size, image.virtual_size):
        if run.kind == ABSENT and edit.geometry.differencing:
            raise UnsupportedFeature(
                f"from {run.start:#x} on, behind the new end {size:#x}, the disk shows what its parent holds",
                hint="merge it with its parent first",
                path=edit.raw.name,
            )
        for at in range(0, run.length if run.kind == HERE else 0, PIECE):
            data = edit.file.pread(run.offset + at, min(PIECE, run.length - at))
            if data.count(0) != len(data):
                lost = run.start + at + len(data) - len(data.lstrip(b"\0"))
                raise UnsupportedFeature(
                    f"the disk holds data at {lost:#x}, behind the new end {size:#x}",
                    hint="shrink its partitions and file systems first",
                    path=edit.raw.name,
                )


def _shrink(edit: Edit, size: int) -> Iterator[Change]:
    old, new = edit.geometry, resized(edit.geometry, size)
    yield from edit.begin(f"resize {size}", data=True)
    yield from edit.set_item(VIRTUAL_DISK_SIZE, size.to_bytes(8, "little"))
    yield from _free_entries(edit, new, old.entries)
    yield Barrier()
    end = _used_end(edit, new)
    if end < edit.size:
        yield Truncate(end)
        yield Barrier()


def _free_entries(edit: Edit, new: Geometry, end: int) -> Iterator[Change]:
    """Zeros over the BAT entries up to ``end`` that the smaller disk has no use for."""
    for start in range(new.payload_index(new.blocks - 1) + 1, end, WINDOW):
        found = edit.entries(start, min(start + WINDOW, end))
        wanted = _zeros(len(found))
        if new.differencing:
            kept = new.bitmap_slots(start, min(start + len(found), new.entries))
            wanted[kept] = found[kept]
        yield from _differences(found, wanted, edit.bat_region.offset + start * ENTRY_SIZE)


def _used_end(edit: Edit, new: Geometry) -> int:
    """The end of the last thing in the file that a disk of that geometry has; places kept by trimmed blocks count."""
    image = edit.image
    ends = [HEADER_AREA, image.header.log_offset + image.header.log_length, *(one.end for one in image.regions)]
    stop = new.entries if new.differencing else new.payload_index(new.blocks - 1) + 1
    for start in range(0, stop, WINDOW):
        entries = edit.entries(start, min(start + WINDOW, stop))
        slots = new.bitmap_slots(start, start + len(entries))
        if new.differencing:
            ends.append((max(entries[slots], default=0) & OFFSET_BITS) + BITMAP_SIZE)
        del entries[slots]
        place = max(entries, default=0) & OFFSET_BITS
        if place:
            ends.append(place + new.block_size)
    return max(ends)
