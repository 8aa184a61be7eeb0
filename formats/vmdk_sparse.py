"""A sparse VMDK file: the whole disk of a monolithicSparse or streamOptimized image, or an extent of a larger one.

The file itself is the data, whatever the descriptor inside it says; what that says else is stated as facts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from imagekit.errors import CorruptImage, InvalidImage
from imagekit.formats.base import (
    SECTOR,
    Buffer,
    DiskImage,
    Extent,
    Fact,
    File,
    ImageInfo,
    KiB,
    MiB,
    Range,
    clip,
    merge_extents,
    read_exactly,
)
from imagekit.formats.raw import read_flat
from imagekit.formats.vmdk_descriptor import MAX_DESCRIPTOR, Descriptor
from imagekit.formats.vmdk_header import (
    AT_END,
    COWD_MAGIC,
    HOSTED_MAGIC,
    TRUNCATED,
    CowdHeader,
    GrainLayout,
    HostedHeader,
    SeSparseHeader,
    SparseHeader,
)
from imagekit.formats.vmdk_info import check_readable, sparse_info
from imagekit.formats.vmdk_stream import FOOTER_BYTES, GRAIN_MARKER_BYTES, Marker, check_footer, inflate
from imagekit.formats.vmdk_tables import COMPRESSED, HOLE, PLAIN, GrainTables, Run
from imagekit.records import replace

SPAN_BYTES = 128 * KiB
"""Compressed neighbours are read by one pread up to this much."""

COMPARE_BYTES = 32 * MiB
"""Grain tables of which ``info`` compares the two copies; the rest is compared when it is read."""


class SparseImage(DiskImage):
    def __init__(self, file: File) -> None:
        self.file = file
        self.header, self.layout = self._read_header()
        self.layout.validate(file.name, file.size)
        self.virtual_size = self.layout.virtual_size
        self.descriptor = self._read_descriptor()
        self.tables = GrainTables(file, self.layout)
        self._table_facts: tuple[Fact, ...] | None = None

    def _read_header(self) -> tuple[SparseHeader, GrainLayout]:
        file = self.file
        head = file.pread(0, SECTOR)
        if head[:4] == COWD_MAGIC:
            cowd = CowdHeader.parse(head)
            return cowd, cowd.layout()
        if head[:4] != HOSTED_MAGIC:
            sesparse = SeSparseHeader.parse(head)
            layout = sesparse.layout()
            layout.validate(file.name, file.size)
            sesparse.check_volatile(file.pread(sesparse.volatile_offset * SECTOR, SECTOR))
            return sesparse, layout
        header = HostedHeader.parse(head)
        if header.directory_offset != AT_END:
            return header, header.layout()
        at = max(0, file.size - FOOTER_BYTES)
        footer = check_footer(header, file.pread(at, FOOTER_BYTES), offset=at)
        layout = footer.layout()
        return header, replace(layout, fixed=(*layout.fixed, Range(at, FOOTER_BYTES, "footer")))

    def _read_descriptor(self) -> Descriptor | None:
        header = self.header
        if not isinstance(header, HostedHeader) or not header.descriptor_offset or not header.descriptor_size:
            return None
        start, length = header.descriptor_offset * SECTOR, header.descriptor_size * SECTOR
        if length > MAX_DESCRIPTOR:
            raise InvalidImage(
                f"a descriptor of {length} bytes, at most {MAX_DESCRIPTOR} are read", path=self.file.name, offset=36
            )
        return Descriptor.embedded(read_exactly(self.file, start, length, "the descriptor"), offset=start)

    @property
    def container(self) -> File:
        return self.file

    def info(self) -> ImageInfo:
        if self._table_facts is None:
            differs = self.tables.difference(COMPARE_BYTES)
            message = f"the redundant grain directory leads to something else for grain {differs}"
            self._table_facts = () if differs is None else (Fact("grain-directories-differ", message, 48),)
        return sparse_info(self.header, self.layout, self.descriptor, self._table_facts)

    # --- the guest's view ------------------------------------------------------------------------------------

    def extents(self, start: int = 0, length: int | None = None) -> Iterator[Extent]:
        check_readable(self.header, self.descriptor, self.file.name)
        return merge_extents(map(_extent, self.tables.runs(*clip(start, length, self.virtual_size))))

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        check_readable(self.header, self.descriptor, self.file.name)
        for run in self.tables.runs(offset, offset + len(buffer)):
            part = buffer[run.start - offset : run.start - offset + run.length]
            if run.kind == PLAIN:
                read_flat(self.file, run.offset, part)
            elif run.kind == COMPRESSED:
                at = 0
                for out in self._decoded(run):
                    part[at : at + len(out)] = out
                    at += len(out)
            else:
                part[:] = bytes(len(part))

    def pieces(self, offset: int, buffer: memoryview) -> Iterator[Buffer]:
        check_readable(self.header, self.descriptor, self.file.name)
        for run in self.tables.runs(offset, offset + len(buffer)):
            if run.kind == COMPRESSED:
                yield from self._decoded(run)
                continue
            part = buffer[run.start - offset : run.start - offset + run.length]
            if run.kind == PLAIN:
                read_flat(self.file, run.offset, part)
            else:
                part[:] = bytes(len(part))
            yield part

    def _decoded(self, run: Run) -> Iterator[Buffer]:
        """The bytes of a compressed run, a grain or what the run has of it at a time."""
        left = run.length
        index, inside = divmod(run.start, self.layout.grain)
        for group, blob in self._grouped(run.sectors):
            for offset in group:
                try:
                    out = self._inflate(blob[offset - group[0] :], index, offset)
                except CorruptImage as error:
                    raise CorruptImage(
                        f"grain {index}: {error.message}", hint=error.hint, path=self.file.name, offset=offset
                    ) from None
                piece = out[inside : inside + left]
                left, index, inside = left - len(piece), index + 1, 0
                yield piece

    def _grouped(self, sectors: Sequence[int]) -> Iterator[tuple[list[int], memoryview]]:
        """Neighbours in the file, each group with its bytes, read at once: up to the next grain if that is near."""
        grain = self.layout.grain
        group: list[int] = []
        for offset in [sector * SECTOR for sector in sectors]:
            if group:
                near = group[-1] < offset <= group[-1] + 2 * grain + SECTOR
                if not near or offset - group[0] >= SPAN_BYTES:
                    yield group, self._blob(group, offset if near else group[-1] + grain)
                    group = []
            group.append(offset)
        if group:
            yield group, self._blob(group, group[-1] + grain)

    def _blob(self, group: list[int], end: int) -> memoryview:
        return memoryview(self.file.pread(group[0], end - group[0]))

    def _inflate(self, data: memoryview, index: int, offset: int) -> memoryview:
        """The grain of that number, as far as the disk has it, from the bytes that begin with its marker.

        Few grains are longer than what they hold: such a one is read again, from its offset.
        """
        grain = self.layout.grain
        marker = Marker.parse(data)
        marker.check_grain(grain)
        if marker.value * SECTOR != index * grain:
            raise CorruptImage(f"the marker is of sector {marker.value}, expected {index * grain // SECTOR}")
        end = GRAIN_MARKER_BYTES + marker.size
        if len(data) < end:
            data = memoryview(self.file.pread(offset, end))
        if len(data) < end:
            raise CorruptImage(f"cut short: {end} bytes expected, {len(data)} found", hint=TRUNCATED)
        seen = min(grain, self.virtual_size - index * grain)
        return memoryview(inflate(data[GRAIN_MARKER_BYTES:end], seen, grain))[:seen]

    # --- claims ----------------------------------------------------------------------------------------------

    def ranges(self) -> Iterator[Range]:
        yield from self.layout.fixed
        yield from self.table_ranges()
        for offset, length in self.grain_ranges():
            yield Range(offset, length, "compressed data" if self.layout.compressed else "data")

    def table_ranges(self) -> Iterator[Range]:
        """The grain tables of each directory."""
        layout = self.layout
        for backup in (False, True):
            if backup and layout.backup is None:
                continue
            first = 0
            while (first := self.tables.next_table(first, layout.tables)) < layout.tables:
                count = min(self.tables.per_window, layout.tables - first)
                for offset in self.tables.directory(first, count, backup=backup):
                    if offset:
                        yield Range(offset, layout.table_bytes, "redundant grain table" if backup else "grain table")
                first += count

    def grain_ranges(self) -> Iterator[tuple[int, int]]:
        """(offset, length) of the grains in the file: of neighbours together, or as its marker says of each."""
        for run in self.tables.runs(0, self.virtual_size):
            if run.kind == COMPRESSED:
                for offset in [sector * SECTOR for sector in run.sectors]:
                    marker = Marker.parse(self.file.pread(offset, GRAIN_MARKER_BYTES))
                    yield offset, GRAIN_MARKER_BYTES + marker.size
            elif run.kind == PLAIN:
                yield run.offset, run.length

    def close(self) -> None:
        self.file.close()


def _extent(run: Run) -> Extent:
    if run.kind == PLAIN:
        return Extent(run.start, run.length, data=True, zero=False, offset=run.offset)
    if run.kind == COMPRESSED:
        return Extent(run.start, run.length, data=True, zero=False, compressed=True)
    return Extent(run.start, run.length, data=False, zero=True, present=run.kind != HOLE)
