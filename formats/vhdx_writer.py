"""Writing VHDX: dynamic, fixed and differencing disks, laid out as Windows lays them out.

Follows Microsoft's MS-VHDX; where it leaves a choice, Windows' own files decide:

    0 identifier, headers, region tables    1 MiB log, empty    2 MiB metadata    3 MiB BAT    then payload blocks

Design notes
- A block that is not there has a BAT entry of all zeros, as Windows writes it. Hyper-V refuses the state ZERO with an
  offset, and a child must show its parent there.
- Nothing is written where only zeros would go: the log is empty, and of the BAT only pages that hold an entry are
  written. The BAT is made in windows, so that 64 TiB take no more memory than one of them.
- Every GUID derives from the caller's identifier, and there is no clock: same options, same bytes. The guest knows
  the disk by the identifier itself (page 83 data), which a child takes over from its parent.

Not here: changing a VHDX that exists (vhdx_change.py).
"""

from __future__ import annotations

import uuid
from array import array
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

from imagekit.errors import UnsupportedFeature
from imagekit.formats.base import BlockRuns, ImageWriter, Layout, MiB, ParentLink, SlotMap, WriterOptions
from imagekit.formats.vhdx_header import (
    BAT_REGION,
    HEADER_OFFSETS,
    MAX_BLOCK,
    MAX_SIZE,
    METADATA_REGION,
    MIN_BLOCK,
    NO_GUID,
    REGION_TABLE_OFFSETS,
    SECTOR_SIZES,
    FileIdentifier,
    Header,
    Region,
    RegionTable,
)
from imagekit.formats.vhdx_ids import uuid5
from imagekit.formats.vhdx_metadata import (
    ABSOLUTE_PATH,
    ENTRY_SIZE,
    FILE_PARAMETERS,
    FULLY_PRESENT,
    IS_REQUIRED,
    IS_VIRTUAL_DISK,
    LINKAGE,
    LINKAGE2,
    LOGICAL_SECTOR_SIZE,
    PAGE_83_DATA,
    PARENT_LOCATOR,
    PHYSICAL_SECTOR_SIZE,
    RELATIVE_PATH,
    TABLE_SIZE,
    VIRTUAL_DISK_SIZE,
    FileParameters,
    Geometry,
    Item,
    Metadata,
    MetadataTable,
    ParentLocator,
)
from imagekit.formats.words import is_zero, packed, sequence, stretches

if TYPE_CHECKING:
    from imagekit.formats.words import Words

SUBFORMATS = ("dynamic", "fixed", "differencing")
CREATOR = "imagekit"
LOG_OFFSET = MiB
METADATA_OFFSET = 2 * MiB
BAT_OFFSET = 3 * MiB
PHYSICAL_SECTOR = 4096
"""Hyper-V's own default: a disk that says 512 is slow on what disks are today."""

MAX_TEXT = 0xFFFE
"""Bytes of a parent's name: their count is stored in 16 bits."""

DEFAULT_BLOCKS = (1 * MiB, 2 * MiB, 8 * MiB, 32 * MiB)
DIFFERENCING_BLOCK = 2 * MiB
USUAL_BAT = 16 * MiB
"""The default block is the smallest of `DEFAULT_BLOCKS` that keeps the BAT within this."""

WINDOW = 1 << 16
"""BAT entries made at a time."""

PAGE_ENTRIES = 512
"""BAT entries in the 4 KiB that are written or left out together."""


def make_writer(virtual_size: int, options: WriterOptions) -> ImageWriter:
    """A writer for a disk of ``virtual_size`` bytes; UnsupportedFeature says what of the options cannot be."""
    return VhdxWriter(virtual_size, options)


class VhdxWriter:
    """Writes dynamic, fixed and differencing disks."""

    def __init__(self, virtual_size: int, options: WriterOptions) -> None:
        self.virtual_size = virtual_size
        subformat = options.subformat or SUBFORMATS[0]
        if subformat not in SUBFORMATS:
            raise UnsupportedFeature(
                f"VHDX subformat {subformat!r} is not written", hint=f"choose one of: {', '.join(SUBFORMATS)}"
            )
        parent = options.parent if subformat == "differencing" else None
        if subformat == "differencing" and parent is None:
            raise UnsupportedFeature("a differencing disk needs a parent", hint="name it with --parent")
        sector = _sector_size(options, parent)
        _check_size(virtual_size, sector)
        self.block_size = options.block_size or default_block(virtual_size, sector, differencing=parent is not None)
        _check_block(self.block_size)
        self._identifier = options.identifier
        disk_id = parent.disk_id if parent else None
        self._metadata = Metadata(
            FileParameters(self.block_size, leave_allocated=subformat == "fixed", has_parent=parent is not None),
            virtual_size,
            sector,
            PHYSICAL_SECTOR,
            disk_id or options.identifier.bytes_le,
            new_locator(parent) if parent else None,
        )

    def layout(self, blocks: BlockRuns = ()) -> Layout:
        return VhdxLayout(self._metadata, self._identifier, blocks)


class VhdxLayout:
    """Windows' layout: the payload behind the BAT, in arrival order; a fixed disk's blocks all there and in order."""

    prefix = b""

    def __init__(self, metadata: Metadata, identifier: uuid.UUID, blocks: BlockRuns) -> None:
        self._metadata = metadata
        self._geometry = metadata.geometry
        self._identifier = identifier
        self._fixed = metadata.parameters.leave_allocated
        self._slots = SlotMap([(0, self._geometry.blocks)] if self._fixed else blocks)
        self._first_block = BAT_OFFSET + self._geometry.bat_length

    @property
    def file_size(self) -> int:
        return self._first_block + self._slots.count * self._geometry.block_size

    def place(self, block: int) -> int:
        slot = self._slots.get(block)
        if slot is None:
            slot = self._slots.add(block)
        return self._first_block + slot * self._geometry.block_size

    def metadata(self) -> Iterator[tuple[int, bytes]]:
        yield 0, FileIdentifier(CREATOR).pack()
        file_guid, data_guid = (uuid5(self._identifier, name).bytes_le for name in ("FileWriteGuid", "DataWriteGuid"))
        for number, offset in enumerate(HEADER_OFFSETS, 1):
            yield offset, Header(number, file_guid, data_guid, log_offset=LOG_OFFSET).pack()
        table = RegionTable(
            (
                Region(BAT_REGION, BAT_OFFSET, self._geometry.bat_length),
                Region(METADATA_REGION, METADATA_OFFSET, MiB),
            )
        ).pack()
        for offset in REGION_TABLE_OFFSETS:
            yield offset, table
        yield METADATA_OFFSET, metadata_region(self._metadata)
        yield from self._bat()

    def _bat(self) -> Iterator[tuple[int, bytes]]:
        """The pages of the BAT that hold an entry."""
        for window, parts in groupby(self._window_parts(), key=itemgetter(0)):
            first_entry = window * WINDOW
            entries = array("Q", bytes(WINDOW * ENTRY_SIZE))
            for _, first, count, slot in parts:
                offset = self._first_block + slot * self._geometry.block_size
                set_present(entries, first_entry, self._geometry, first, count, offset)
            yield from pages_in_use(entries, BAT_OFFSET + first_entry * ENTRY_SIZE)

    def _window_parts(self) -> Iterator[tuple[int, int, int, int]]:
        """(window of the BAT, first block, count, first slot): the runs, cut where windows end."""
        ratio = self._geometry.chunk_ratio
        for start, count, slot in self._slots.runs():
            first, end = start, start + count
            while first < end:
                window = self._geometry.payload_index(first) // WINDOW
                next_entry = (window + 1) * WINDOW
                stop = min(end, next_entry - next_entry // (ratio + 1))
                yield window, first, stop - first, slot + first - start
                first = stop


def set_present(entries: Words, start: int, geometry: Geometry, block: int, count: int, offset: int) -> None:
    """Say that blocks lie one after another from ``offset``; ``entries`` are those of the BAT from ``start``."""
    ratio, end = geometry.chunk_ratio, block + count
    present = sequence(offset | FULLY_PRESENT, count, geometry.block_size)
    for first in range(block - block % ratio, end, ratio):  # a chunk
        one, other = max(first, block), min(first + ratio, end)
        at = one + first // ratio - start
        entries[at : at + other - one] = present[one - block : other - block]


def pages_in_use(entries: Words, offset: int) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of the runs of 4 KiB pages that are not all zero; ``entries`` lie at ``offset`` of the file."""
    raw, page = packed(entries, "little"), PAGE_ENTRIES * ENTRY_SIZE
    if is_zero(raw):
        return
    used = (at for at in range(len(raw) // page) if not is_zero(raw[at * page : (at + 1) * page]))
    for first, count in stretches(used):
        yield offset + first * page, raw[first * page : (first + count) * page]


def metadata_region(metadata: Metadata) -> bytes:
    """The metadata table and the items behind it, in Windows' order."""
    items = [
        (FILE_PARAMETERS, metadata.parameters.pack(), IS_REQUIRED),
        (VIRTUAL_DISK_SIZE, metadata.virtual_size.to_bytes(8, "little"), IS_VIRTUAL_DISK | IS_REQUIRED),
        (LOGICAL_SECTOR_SIZE, metadata.logical_sector.to_bytes(4, "little"), IS_VIRTUAL_DISK | IS_REQUIRED),
        (PHYSICAL_SECTOR_SIZE, metadata.physical_sector.to_bytes(4, "little"), IS_VIRTUAL_DISK | IS_REQUIRED),
        (PAGE_83_DATA, metadata.page83, IS_VIRTUAL_DISK | IS_REQUIRED),
    ]
    if metadata.locator is not None:
        items.append((PARENT_LOCATOR, metadata.locator.pack(), IS_REQUIRED))
    table, at = [], TABLE_SIZE
    for guid, data, flags in items:
        table.append(Item(guid, at, len(data), flags))
        at += len(data)
    return MetadataTable(tuple(table)).pack() + b"".join(data for _, data, _ in items)


def new_locator(parent: ParentLink, *, linkage2: bytes = NO_GUID) -> ParentLocator:
    """What a child says of its parent, in Windows' order. ``linkage2`` is another identity the parent may have."""
    pairs = [(LINKAGE, _braced(parent.identity)), (RELATIVE_PATH, parent.relative), (LINKAGE2, _braced(linkage2))]
    if parent.absolute is not None:
        pairs.insert(1, (ABSOLUTE_PATH, parent.absolute))
    for _, value in pairs:
        if len(value.encode("utf-16-le", "surrogatepass")) > MAX_TEXT:
            raise UnsupportedFeature(
                f"a parent's name of {len(value)} characters; {MAX_TEXT // 2} in UTF-16 fit",
                hint="move the parent to a folder with a shorter name",
            )
    return ParentLocator(tuple(pairs))


def _braced(guid: bytes) -> str:
    return f"{{{uuid.UUID(bytes_le=guid)}}}"


def default_block(virtual_size: int, sector_size: int, *, differencing: bool = False) -> int:
    """The block size nobody asked for: small, as long as the BAT stays small too. Windows' 2 MiB for children."""
    for block in DEFAULT_BLOCKS:
        usual = Geometry(virtual_size, block, sector_size, differencing).entries * ENTRY_SIZE <= USUAL_BAT
        if usual and not (differencing and block < DIFFERENCING_BLOCK):
            return block
    return DEFAULT_BLOCKS[-1]


def _sector_size(options: WriterOptions, parent: ParentLink | None) -> int:
    sector = options.sector_size or (parent.sector_size if parent else SECTOR_SIZES[0])
    if sector not in SECTOR_SIZES:
        raise UnsupportedFeature(f"logical sectors of {sector} bytes", hint="a VHDX has sectors of 512 or 4096 bytes")
    if parent and parent.sector_size != sector:
        raise UnsupportedFeature(
            f"the parent has logical sectors of {parent.sector_size} bytes, its child was to have {sector}",
            hint="leave out --sector-size",
        )
    return sector


def _check_size(virtual_size: int, sector: int) -> None:
    if not 0 < virtual_size <= MAX_SIZE:
        raise UnsupportedFeature(
            f"a VHDX holds from one sector to 64 TiB ({MAX_SIZE} bytes), the disk has {virtual_size}"
        )
    if virtual_size % sector:
        raise UnsupportedFeature(
            f"{virtual_size} bytes are not a multiple of the sector size {sector}",
            hint=f"give a size: --size {virtual_size + -virtual_size % sector}",
        )


def _check_block(block: int) -> None:
    if block & (block - 1) or not MIN_BLOCK <= block <= MAX_BLOCK:
        raise UnsupportedFeature(
            f"block size {block}: a power of two from 1 MiB to 256 MiB is needed",
            hint="leave out --block-size for one that fits the disk's size",
        )
