"""Changing a VHDX in place: the single steps, each of which leaves a file that opens.

Follows Microsoft's MS-VHDX, 2.2.2.1 "Updating the Headers". What the parts of a change share is here: the header that
announces it, a metadata item or a region that moves, blocks at the end of the file, the log written back.

Design notes
- A step is decided from the file as it was when it was opened (with its log replayed) and from the steps before it;
  what a step changes is not read again. So the steps can be listed before the first one is taken.
- A step takes effect by one write that a disk carries out whole or not at all: a header (which has a checksum, and a
  twin), a BAT entry, or a few bytes within one 512-byte sector. What it points to is on the medium before.
- Two valid region tables that differ are worse than one: the second is spoiled before the first changes.
- New blocks, sector bitmaps and BATs go to the file's end, where the file is made longer first: they start as zeros.
- New GUIDs derive from the old ones and from what is done: same file and same change, same bytes.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

from imagekit.errors import CorruptImage, UnsupportedFeature
from imagekit.formats.base import SECTOR, Barrier, Change, File, MiB, Truncate, Write, read_exactly, round_up
from imagekit.formats.vhdx_bat import ABSENT, HERE, WINDOW, ZEROED
from imagekit.formats.vhdx_check import check
from imagekit.formats.vhdx_header import (
    HEADER_OFFSETS,
    MAX_FILE,
    NO_GUID,
    REGION_TABLE_OFFSETS,
    REGION_TABLE_SIZE,
    UNIT,
    Region,
    with_checksum,
)
from imagekit.formats.vhdx_ids import uuid5
from imagekit.formats.vhdx_image import VhdxImage
from imagekit.formats.vhdx_metadata import ENTRY_SIZE, TABLE_SIZE
from imagekit.formats.words import words64
from imagekit.records import replace

if TYPE_CHECKING:
    from imagekit.formats.words import Words

PIECE = MiB
"""Bytes written by one step, at most; a block can have 256 MiB."""

_ZEROS = bytes(PIECE)
AMBIGUOUS = ("headers-differ", "region-tables-differ")
DAMAGE = ("bat-entry", "no-bitmap", "overlap")
_LAST_SEQUENCE = 2**64 - 3
_ITEM_PLACE = 16
"""Where in an entry of the metadata table, or of a region table, offset and length are."""

_TABLE_HEADER, _TABLE_ENTRY = 32, 32
_REGION_HEADER, _REGION_ENTRY = 16, 32


class Edit:
    """A VHDX that is to be changed: what is where, as the steps so far make it."""

    def __init__(self, file: File, *, whole: bool = True) -> None:
        """Open it. CorruptImage when it is damaged; ``whole`` False looks at the headers and tables only."""
        self.raw = file
        self.image = image = VhdxImage(file)
        self.file = image.file
        found = [(one.code, one.message, one.offset) for one in image.facts()]
        if whole:
            found += [(one.code, one.message, one.offset) for one in check(image)]
        for code, message, offset in found:
            if code in AMBIGUOUS or code in DAMAGE:
                hint = "a damaged image is not changed; convert it to a new file"
                raise CorruptImage(message, hint=hint, path=file.name, offset=offset)
        self.header = image.header
        self.slot = image.headers.slot
        if self.header.sequence > _LAST_SEQUENCE:
            raise UnsupportedFeature("the headers' sequence numbers are used up", hint="convert it", path=file.name)
        self.geometry = image.geometry
        self.fixed = image.metadata.parameters.leave_allocated and not self.geometry.differencing
        self.bat_region = image.bat_region
        self.end = round_up(max(self.file.size, self._last_block_end() if whole else 0), UNIT)
        self.size = self.file.size
        """Length of the file after the steps so far."""

        self.blocks: dict[int, tuple[int, int]] = {}
        """(kind, file offset) of blocks that the steps so far changed and that are looked at again."""

        self.bits: dict[int, bytes] = {}
        """The bits in the sector bitmap of such blocks."""

        self.bitmaps: dict[int, int] = {}
        """File offsets of sector bitmaps that the steps so far made, by chunk."""

        self.grown_at: int | None = None
        """Where the blocks lie by which a fixed disk grew."""

    def _last_block_end(self) -> int:
        """The last block may be cut short by the file's end."""
        window = self.image.bat.window((self.geometry.blocks - 1) // WINDOW)
        offset = window.offsets[-1]
        return offset + self.geometry.block_size if offset else 0

    # --- what is there -----------------------------------------------------------------------------------------

    def block(self, number: int) -> tuple[int, int]:
        """(kind, file offset) of a block."""
        old = self.image.geometry
        if number in self.blocks:
            return self.blocks[number]
        if number < old.blocks:
            window = self.image.bat.window(number // WINDOW)
            at = number % WINDOW
            return window.kinds[at], window.offsets[at]
        if self.grown_at is not None:
            return HERE, self.grown_at + (number - old.blocks) * old.block_size
        return ZEROED if old.differencing else ABSENT, 0

    def bitmap(self, chunk: int) -> int | None:
        """File offset of a chunk's sector bitmap."""
        if chunk in self.bitmaps:
            return self.bitmaps[chunk]
        return self.image.bat.bitmap(chunk) if chunk < self.image.geometry.chunks else None

    def bits_place(self, block: int) -> tuple[int, int]:
        """(byte within its chunk's sector bitmap, count of bytes) of a block's bits."""
        count = self.geometry.block_size // self.geometry.sector_size // 8
        return block % self.geometry.chunk_ratio * count, count

    def bits_of(self, block: int) -> bytearray:
        """A copy of the bits of a partially present block."""
        if block not in self.bits:
            at, count = self.bits_place(block)
            bitmap = self.bitmap(block // self.geometry.chunk_ratio)
            assert bitmap is not None  # the check found none missing
            return bytearray(read_exactly(self.file, bitmap + at, count, "a sector bitmap"))
        return bytearray(self.bits[block])

    def entries(self, start: int, stop: int) -> Words:
        """BAT entries as they were. Behind the BAT's end there are zeros."""
        region = self.image.bat_region
        inside = max(0, min(stop, region.length // ENTRY_SIZE) - start)
        raw = read_exactly(self.file, region.offset + start * ENTRY_SIZE, inside * ENTRY_SIZE, "the BAT")
        return words64(raw.ljust((stop - start) * ENTRY_SIZE, b"\0"), "little")

    # --- headers and log ---------------------------------------------------------------------------------------

    def begin(self, what: str, *, data: bool) -> Iterator[Change]:
        """Write the log back and announce the change, before anything is changed. ``data``: the guest's content."""
        yield from self.write_log_back()
        header = replace(self.header, file_write_guid=derived(self.header.file_write_guid, "FileWriteGuid", what))
        if data:
            header = replace(header, data_write_guid=derived(header.data_write_guid, "DataWriteGuid", what))
        self.header = replace(header, log_guid=NO_GUID)
        yield from self.write_headers()

    def write_headers(self) -> Iterator[Change]:
        """Write ``header`` over the one that does not count, then over the one that did."""
        for slot in (1 - self.slot, self.slot):
            self.header = replace(self.header, sequence=self.header.sequence + 1)
            yield Write(HEADER_OFFSETS[slot], self.header.pack())
            yield Barrier()

    def write_log_back(self) -> Iterator[Change]:
        """What is replayed in memory, into the file. The log still counts: any part of this may be done again."""
        replayed = self.image.replayed
        if replayed is None:
            return
        if replayed.size > self.raw.size:
            yield Truncate(replayed.size)
        for start, end in replayed.zeros.within(0, replayed.size):
            yield from zeros_over(self.raw, start, end)
        offset, data = 0, bytearray()
        for at, page in replayed.pages.items():
            if at != offset + len(data) or len(data) >= PIECE:
                if data:
                    yield Write(offset, bytes(data))
                offset, data = at, bytearray()
            data += page
        if data:
            yield Write(offset, bytes(data))
        yield Barrier()

    # --- room at the end ---------------------------------------------------------------------------------------

    def allocate(self, length: int) -> int:
        """The offset of ``length`` bytes of zeros behind everything; there once `lengthen` is done."""
        offset, self.end = self.end, self.end + length
        if self.end > MAX_FILE:
            raise UnsupportedFeature(
                "the file has no room left at its end", hint="convert it instead", path=self.raw.name
            )
        return offset

    def lengthen(self) -> Iterator[Change]:
        """Make the file as long as what was allocated needs."""
        if self.end > self.size:
            self.size = self.end
            yield Truncate(self.end)

    # --- pointers ----------------------------------------------------------------------------------------------

    def entry(self, index: int, value: int) -> Write:
        """Set one BAT entry."""
        return Write(self.bat_region.offset + index * ENTRY_SIZE, value.to_bytes(ENTRY_SIZE, "little"))

    def set_item(self, guid: bytes, data: bytes) -> Iterator[Change]:
        """Give a metadata item another value: in its place where that is one write, else beside it."""
        table, region = self.image.metadata_table, self.image.metadata_region
        item = table.find(guid)
        assert item is not None  # the image would not have opened
        place = region.offset + item.offset
        if len(data) == item.length and place // SECTOR == (place + len(data) - 1) // SECTOR:
            yield Write(place, data)
        else:
            fresh = self._fresh_place(len(data))
            yield Write(region.offset + fresh, data)
            yield Barrier()
            at = region.offset + _TABLE_HEADER + table.items.index(item) * _TABLE_ENTRY + _ITEM_PLACE
            yield Write(at, fresh.to_bytes(4, "little") + len(data).to_bytes(4, "little"))
        yield Barrier()

    def _fresh_place(self, length: int) -> int:
        """Where in the metadata region nothing lies, from its start."""
        region = self.image.metadata_region
        taken = sorted((one.offset, one.offset + one.length) for one in self.image.metadata_table.items)
        start = TABLE_SIZE
        for offset, end in [*taken, (region.length, region.length)]:
            if start + length <= offset:
                return start
            start = max(start, round_up(end, 8))
        raise UnsupportedFeature(
            f"the metadata region has no room for {length} bytes", hint="convert it instead", path=self.raw.name
        )

    def check_region_can_move(self, region: Region) -> None:
        """UnsupportedFeature when no single write can move it."""
        index = self.image.regions.index(region)
        if _REGION_HEADER + (index + 1) * _REGION_ENTRY > SECTOR:
            raise UnsupportedFeature(
                f"the {region.name} region is number {index + 1} of the region table; only the first 15 can be moved",
                hint="convert it instead",
                path=self.raw.name,
            )

    def move_region(self, region: Region, offset: int, length: int) -> Iterator[Change]:
        """Make both region tables name another place. No step leaves two that are valid and differ, or none."""
        good = self.image.region_tables.offset
        other = REGION_TABLE_OFFSETS[good == REGION_TABLE_OFFSETS[0]]
        old = read_exactly(self.file, good, REGION_TABLE_SIZE, "the region table")
        at = _REGION_HEADER + self.image.regions.index(region) * _REGION_ENTRY + _ITEM_PLACE
        place = offset.to_bytes(8, "little") + length.to_bytes(4, "little")
        new = with_checksum(old[:at] + place + old[at + len(place) :])
        yield Write(other, bytes(8))  # neither signature nor checksum
        yield Barrier()
        yield Write(good, new[:SECTOR])  # the checksum and the entry in one
        yield Barrier()
        yield Write(other, new)
        yield Barrier()


def derived(old: bytes, field: str, what: str) -> bytes:
    """The GUID that follows ``old`` when ``what`` is done."""
    return uuid5(uuid.UUID(bytes_le=old), f"{field} {what}").bytes_le


def zeros_over(file: File, start: int, end: int) -> Iterator[Change]:
    """Zeros over the parts of a range that hold anything else."""
    for at, length in file.data_ranges(start, end - start):
        for offset in range(at, at + length, PIECE):
            data = file.pread(offset, min(PIECE, at + length - offset))
            if data.count(0) != len(data):
                yield Write(offset, _ZEROS[: len(data)])


def set_bits(bits: bytearray, start: int, stop: int) -> None:
    """Set the bits from ``start`` up to ``stop``, the lowest bit of a byte first."""
    while start < stop and start % 8:
        bits[start // 8] |= 1 << start % 8
        start += 1
    whole = (stop - start) // 8
    bits[start // 8 : start // 8 + whole] = b"\xff" * whole
    for bit in range(start + whole * 8, stop):
        bits[bit // 8] |= 1 << bit % 8
