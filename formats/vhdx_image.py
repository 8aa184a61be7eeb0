"""VHDX: fixed, dynamic and differencing disks.

Follows Microsoft's MS-VHDX; where files made by Windows, QEMU and disk2vhd go beyond it, the files win.

    file identifier  →  headers  →  log, replayed in memory  →  region tables  →  metadata, BAT  →  blocks

Design notes
- The header with the higher sequence number counts. A log that was not written back is replayed over the file before
  anything but the headers is read (vhdx_log.py); the file itself is never written.
- Either region table will do when the other is damaged. Two that are valid and differ are a fact, and so are two
  headers of one sequence number: the next program may read the other one.
- The BAT is decoded window by window, at need (vhdx_bat.py): opening an image and ``info`` read nothing of it.
- A differencing disk names its parent by paths and knows it by its DataWriteGuid. Blocks, and sectors of partially
  present blocks, that are not here are read from below, through the resolver alone (chain.py).
- What lies under replayed pages has no offset in extents: the kernel would copy the bytes from before the replay.

Writing is in vhdx_writer.py, changes in place in vhdx_change.py, the checks of a whole file in vhdx_check.py.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator

from imagekit.errors import CorruptImage, ImagekitError, InvalidImage
from imagekit.formats.base import (
    JSON,
    DiskImage,
    Extent,
    Fact,
    File,
    ImageInfo,
    KiB,
    Range,
    Reference,
    Resolver,
    clip,
    merge_extents,
    read_exactly,
)
from imagekit.formats.chain import Below
from imagekit.formats.raw import flat_extents, read_flat
from imagekit.formats.vhdx_bat import ABSENT, HERE, WINDOW, Bat
from imagekit.formats.vhdx_header import (
    BAT_REGION,
    HEADER_OFFSETS,
    HEADER_SIZE,
    IDENTIFIER_SIZE,
    METADATA_REGION,
    REGION_TABLE_OFFSETS,
    REGION_TABLE_SIZE,
    FileIdentifier,
    Header,
    Region,
    RegionTable,
)
from imagekit.formats.vhdx_log import ReplayedFile, replay
from imagekit.formats.vhdx_metadata import BITMAP_SIZE, ENTRY_SIZE, TABLE_SIZE, Metadata, MetadataTable
from imagekit.records import replace

_BOTH_LOST = "both copies are lost; fetch the file again and compare its checksum"


class Headers:
    """The header that counts, of the two at the start of a file, and what was odd about them."""

    def __init__(self, file: File) -> None:
        self.facts: list[Fact] = []
        self.copies: list[Header | None] = []
        problems: list[InvalidImage | CorruptImage] = []
        for offset in HEADER_OFFSETS:
            try:
                self.copies.append(Header.parse(file.pread(offset, HEADER_SIZE), offset=offset))
            except (InvalidImage, CorruptImage) as error:
                self.copies.append(None)
                problems.append(error)
                self.facts.append(Fact("header-invalid", f"{error.message}; the other header counts", error.offset))
        valid = [(one.sequence, -slot) for slot, one in enumerate(self.copies) if one is not None]
        if not valid:
            raise _worst(problems)
        self.slot = -max(valid)[1]
        """0 or 1: which of the two counts; the first of two with one sequence number."""
        header = self.copies[self.slot]
        assert header is not None
        self.header = header
        self.offset = HEADER_OFFSETS[self.slot]
        first, second = self.copies
        if first is not None and second is not None and first.sequence == second.sequence and first != second:
            message = f"the two headers have the sequence number {first.sequence}, and differ"
            self.facts.append(Fact("headers-differ", message, HEADER_OFFSETS[1]))
        header.validate(file.size, offset=self.offset)


class RegionTables:
    """The region table that counts, of the two, and what was odd about them."""

    def __init__(self, file: File, header: Header) -> None:
        self.facts: list[Fact] = []
        self.copies: list[RegionTable | None] = []
        problems: list[InvalidImage | CorruptImage] = []
        for offset in REGION_TABLE_OFFSETS:
            try:
                self.copies.append(RegionTable.parse(file.pread(offset, REGION_TABLE_SIZE), offset=offset))
            except (InvalidImage, CorruptImage) as error:
                self.copies.append(None)
                problems.append(error)
                message = f"{error.message}; the other region table counts"
                self.facts.append(Fact("region-table-invalid", message, error.offset))
        first, second = self.copies
        table = first or second
        if table is None:
            raise _worst(problems)
        if first is not None and second is not None and first != second:
            self.facts.append(Fact("region-tables-differ", "the two region tables differ", REGION_TABLE_OFFSETS[1]))
        self.table = table
        self.offset = REGION_TABLE_OFFSETS[first is None]
        table.validate(header, file.size, offset=self.offset)

    def require(self, guid: bytes, name: str) -> Region:
        """The region of that GUID, which every VHDX has."""
        region = self.table.find(guid)
        if region is None:
            raise CorruptImage(f"the region table names no {name} region", offset=self.offset)
        return region


def _worst(problems: list[InvalidImage | CorruptImage]) -> InvalidImage | CorruptImage:
    """A damaged structure says more than none at all."""
    error = next((one for one in problems if isinstance(one, CorruptImage)), problems[0])
    error.hint = _BOTH_LOST
    return error


class VhdxImage(DiskImage):
    def __init__(self, file: File, *, resolver: Resolver | None = None) -> None:
        self.raw_file = file
        """As it is stored; ``file`` has the log replayed over it."""
        try:
            self._open(file)
        except ImagekitError as error:
            error.path = error.path or file.name
            raise
        self._below = Below(self.reference, resolver, file.name)

    def _open(self, file: File) -> None:
        self.identifier = FileIdentifier.parse(file.pread(0, IDENTIFIER_SIZE))
        self.headers = Headers(file)
        self.header = self.headers.header
        self.replayed: ReplayedFile | None = replay(file, self.header) if self.header.has_log else None
        self.file: File = file if self.replayed is None else self.replayed
        self.region_tables = RegionTables(self.file, self.header)
        self.regions = self.region_tables.table.regions
        self.bat_region = self.region_tables.require(BAT_REGION, "BAT")
        self.metadata_region = self.region_tables.require(METADATA_REGION, "metadata")
        self.metadata_table = self._read_metadata_table()
        self.metadata = Metadata.from_items(self._item)
        self.geometry = self.metadata.geometry
        if self.geometry.entries * ENTRY_SIZE > self.bat_region.length:
            raise CorruptImage(
                f"the BAT has room for {self.bat_region.length // ENTRY_SIZE} entries, a disk of "
                f"{self.metadata.virtual_size} bytes needs {self.geometry.entries}",
                offset=self.bat_region.offset,
            )
        self.virtual_size = self.metadata.virtual_size
        self.sector_size = self.metadata.logical_sector
        self.identity = self.header.data_write_guid
        self.disk_id = self.metadata.page83
        self.reference = self._parent()
        self.bat = Bat(self.file, self.geometry, self.bat_region.offset, self._taken())

    def _read_metadata_table(self) -> MetadataTable:
        region = self.metadata_region
        data = read_exactly(self.file, region.offset, TABLE_SIZE, "the metadata table")
        table = MetadataTable.parse(data, offset=region.offset)
        table.validate(region.length, offset=region.offset)
        return table

    def _item(self, guid: bytes) -> bytes | None:
        item = self.metadata_table.find(guid)
        if item is None:
            return None
        return read_exactly(self.file, self.metadata_region.offset + item.offset, item.length, f"the {item.name}")

    def _parent(self) -> Reference | None:
        locator = self.metadata.locator
        if not self.geometry.differencing:
            return None
        if locator is None:
            raise CorruptImage("a differencing disk that does not say what its parent is")
        names = locator.paths
        return Reference(
            "parent-file",
            names[0] if names else "",
            "vhdx",
            names=names,
            identities=locator.linkages,
            size=self.metadata.virtual_size,
        )

    def _taken(self) -> Iterator[tuple[int, int]]:
        """Where no block can lie."""
        if self.header.log_length:
            yield self.header.log_offset, self.header.log_offset + self.header.log_length
        for region in self.regions:
            yield region.offset, region.end

    # --- what the headers say --------------------------------------------------------------------------------

    @property
    def container(self) -> File:
        return self.raw_file

    def info(self) -> ImageInfo:
        parameters = self.metadata.parameters
        features: dict[str, JSON] = {
            "creator": self.identifier.creator,
            "logical-sector-size": self.metadata.logical_sector,
            "physical-sector-size": self.metadata.physical_sector,
            "disk-id": str(uuid.UUID(bytes_le=self.metadata.page83)),
            "data-write-guid": str(uuid.UUID(bytes_le=self.header.data_write_guid)),
            "file-write-guid": str(uuid.UUID(bytes_le=self.header.file_write_guid)),
            "has-parent": parameters.has_parent,
            "log-replayed": self.replayed is not None,
            "log-entries": 0 if self.replayed is None else self.replayed.entries,
        }
        subformat = "fixed" if parameters.leave_allocated else "dynamic"
        if parameters.has_parent:
            subformat = "differencing"
        return ImageInfo(
            format="vhdx",
            virtual_size=self.virtual_size,
            subformat=subformat,
            block_size=parameters.block_size,
            features=features,
            references=() if self.reference is None else (self.reference,),
            facts=tuple(self.facts()),
        )

    def facts(self) -> Iterator[Fact]:
        """What was odd, as far as it shows without reading the BAT."""
        yield from self.headers.facts
        yield from self.region_tables.facts
        if self.replayed is not None:
            yield Fact(
                "log-replayed",
                f"the image was not closed; {self.replayed.entries} entries of its log are replayed in memory",
                self.header.log_offset,
            )
        if self.metadata.locator is not None and not self.geometry.differencing:
            yield Fact(
                "parent-locator-unused",
                "the image names a parent and says that it has none",
                self.metadata_region.offset,
            )

    # --- the guest's view ------------------------------------------------------------------------------------

    def extents(self, start: int = 0, length: int | None = None) -> Iterator[Extent]:
        return merge_extents(self._extents(*clip(start, length, self.virtual_size)))

    def _extents(self, start: int, end: int) -> Iterator[Extent]:
        for run in self.bat.runs(start, end):
            if run.kind == HERE:
                yield from self._stored(run.start, run.offset, run.length)
            elif run.kind == ABSENT and self.reference is not None:
                yield from self._below.extents(run.start, run.length)
            else:
                yield Extent(run.start, run.length, data=False, zero=True, present=run.kind != ABSENT)

    def _stored(self, start: int, offset: int, length: int) -> Iterator[Extent]:
        """Extents of guest bytes from ``start`` that lie in the file from ``offset``."""
        move = start - offset
        if self.replayed is not None:
            for at, count, mapped in self.replayed.pieces(offset, length):
                yield Extent(at + move, count, data=True, zero=False, offset=at if mapped else None)
        elif self.metadata.parameters.leave_allocated:
            # All blocks of a fixed disk are there from the start: what the file has not got was never written.
            for extent in flat_extents(self.file, offset, offset + length):
                yield replace(extent, start=extent.start + move)
        else:
            yield Extent(start, length, data=True, zero=False, offset=offset)

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        for run in self.bat.runs(offset, offset + len(buffer)):
            part = buffer[run.start - offset : run.start - offset + run.length]
            if run.kind == HERE:
                read_flat(self.file, run.offset, part)
            elif run.kind == ABSENT and self.reference is not None:
                self._below.pread_into(run.start, part)
            else:
                part[:] = bytes(len(part))

    def ranges(self) -> Iterator[Range]:
        yield Range(0, 64 * KiB, "file identifier")
        for offset in HEADER_OFFSETS:
            yield Range(offset, 64 * KiB, "header")
        for offset in REGION_TABLE_OFFSETS:
            yield Range(offset, REGION_TABLE_SIZE, "region table")
        if self.header.log_length:
            yield Range(self.header.log_offset, self.header.log_length, "log")
        for region in self.regions:
            yield Range(region.offset, region.length, region.name)
        for number in range(-(-self.geometry.blocks // WINDOW)):
            for offset in filter(None, self.bat.window(number).offsets):
                yield Range(offset, min(self.geometry.block_size, self.file.size - offset), "block")
        for _, offset in self.bitmaps():
            yield Range(offset, BITMAP_SIZE, "sector bitmap")

    def bitmaps(self) -> Iterator[tuple[int, int]]:
        """(chunk, file offset) of all sector bitmaps."""
        if self.geometry.differencing:
            for chunk in range(self.geometry.chunks):
                offset = self.bat.bitmap(chunk)
                if offset is not None:
                    yield chunk, offset

    def close(self) -> None:
        self._below.close()
        self.file.close()
