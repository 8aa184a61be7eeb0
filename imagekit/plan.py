"""What a conversion will do, decided before a byte is written.

A :class:`ConversionPlan` is frozen, serialisable and complete: with it and two open files, anybody can carry the
conversion out (imagekit.copying), in a thread, a confined child or on another machine.

Which blocks of the target hold data is decided *by content*: unencoded bytes are probed, so that a sparse and a dense
copy of one image give the same target. Compressed clusters count as data: nobody compresses zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from uuid import UUID

from imagekit.errors import UsageError
from imagekit.formats import registry
from imagekit.formats.base import (
    JSON,
    SECTOR,
    BlockRuns,
    DiskImage,
    Extent,
    KiB,
    Layout,
    MiB,
    WriterOptions,
    round_up,
)
from imagekit.progress import SILENT, Control

FIRST_PROBE = 4 * KiB
PROBE = 256 * KiB
ZEROS = bytes(PROBE)
CHUNK = 2 * MiB
"""Guest bytes copied by one task."""
TELL_EVERY = 64 * MiB
VERIFY_LEVELS = ("structure", "content", "qemu-img", "none")


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """Everything a caller can ask of a conversion. Picklable; None means: decide for me."""

    source_format: str | None = None
    target_format: str | None = None
    subformat: str | None = None
    block_size: int | None = None
    size: int | None = None
    identifier: UUID | None = None
    timestamp: int | None = None
    verify: str = "structure"
    sync: bool = True
    preallocate: bool = False
    overwrite: bool = False
    jobs: int | None = None
    dry_run: bool = False
    allow: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.verify not in VERIFY_LEVELS:
            raise UsageError(f"verify {self.verify!r}", hint=f"choose one of: {', '.join(VERIFY_LEVELS)}")
        if self.jobs is not None and self.jobs < 1:
            raise UsageError(f"jobs {self.jobs}, at least 1 is needed")
        if self.size is not None and self.size <= 0:
            raise UsageError(f"size {self.size}, at least one sector is needed")


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """The conversion, decided. ``blocks`` are the target's blocks that will hold data."""

    source_format: str
    source_virtual_size: int
    target_format: str
    virtual_size: int
    block_size: int
    blocks: BlockRuns
    file_size: int
    writer_options: WriterOptions
    notes: tuple[str, ...] = field(default=())

    @property
    def block_count(self) -> int:
        return sum(count for _, count in self.blocks)

    @property
    def data_bytes(self) -> int:
        """Guest bytes of the source that lie in the blocks to be written."""
        return sum(length for _, length in self.spans())

    def spans(self) -> Iterator[tuple[int, int]]:
        """(guest offset, length) of the runs of blocks, cut at the end of the source."""
        for first, count in self.blocks:
            start = first * self.block_size
            yield start, min(start + count * self.block_size, self.source_virtual_size) - start

    def layout(self) -> Layout:
        """Where everything will lie in the target."""
        writer = registry.find(self.target_format).writer(self.virtual_size, self.writer_options)
        return writer.layout(self.blocks)

    def to_json(self) -> dict[str, JSON]:
        out = asdict(self)
        out["blocks"] = [list(run) for run in self.blocks]
        out["notes"] = list(self.notes)
        out["writer_options"]["identifier"] = str(self.writer_options.identifier)
        return {key.replace("_", "-"): value for key, value in out.items()}


def build_plan(
    image: DiskImage,
    *,
    source_format: str,
    target_format: str,
    options: WriterOptions,
    size: int | None = None,
    control: Control = SILENT,
) -> ConversionPlan:
    """Decide the target's size and which of its blocks hold data. Reads the source, writes nothing."""
    chosen = registry.find(target_format)
    virtual_size, notes = target_size(image.virtual_size, size)
    writer = chosen.writer(virtual_size, options)
    blocks = tuple(find_blocks(image, writer.block_size, control=control))
    return ConversionPlan(
        source_format=source_format,
        source_virtual_size=image.virtual_size,
        target_format=chosen.name,
        virtual_size=virtual_size,
        block_size=writer.block_size,
        blocks=blocks,
        file_size=writer.layout(blocks).file_size,
        writer_options=options,
        notes=notes,
    )


def target_size(source_size: int, wanted: int | None) -> tuple[int, tuple[str, ...]]:
    """The target's virtual size in bytes, and what to say about it."""
    size = round_up(source_size if wanted is None else wanted, SECTOR)
    if wanted is not None and wanted < source_size:
        raise UsageError(
            f"size {wanted} is smaller than the disk's {source_size} bytes",
            hint="a disk can grow while it is converted; shrink its partitions and file systems first",
        )
    if size == 0:
        raise UsageError("the disk has no bytes at all", hint="give a size, or check the source")
    notes = []
    if size != (source_size if wanted is None else wanted):
        notes.append(f"size rounded up from {source_size if wanted is None else wanted} to {size} bytes")
    elif size > source_size:
        notes.append(f"disk grown from {source_size} to {size} bytes")
    return size, tuple(notes)


def find_blocks(image: DiskImage, block_size: int, *, control: Control = SILENT) -> Iterator[tuple[int, int]]:
    """Runs (first, count) of blocks that hold something other than zeros."""
    probe = _Probe(image, control)
    run_start = run_end = 0
    for first, last in _blocks_with_data(image, block_size, probe):
        if first > run_end:
            if run_end > run_start:
                yield run_start, run_end - run_start
            run_start = first
        run_end = max(run_end, last)
    if run_end > run_start:
        yield run_start, run_end - run_start
    control.tell("plan", image.virtual_size, image.virtual_size)


def _blocks_with_data(image: DiskImage, block_size: int, probe: _Probe) -> Iterator[tuple[int, int]]:
    """Ranges (first, end) of blocks with data, in order; neighbours may repeat a block."""
    known = 0  # blocks below are decided as holding data
    for extent in image.extents():
        if not extent.data:
            continue
        first, end = extent.start // block_size, -(-extent.end // block_size)
        probe.at(extent.start)
        if extent.compressed:
            yield first, end
            known = end
            continue
        for block in range(max(first, known), end):
            if probe.has_data(max(extent.start, block * block_size), min(extent.end, (block + 1) * block_size)):
                yield block, block + 1
                known = block + 1


class _Probe:
    """Looks whether a range holds anything but zeros; one buffer for all looks, and a look at the caller's wishes."""

    def __init__(self, image: DiskImage, control: Control) -> None:
        self._image = image
        self._control = control
        self._buffer = bytearray(PROBE)
        self._told = 0

    def at(self, position: int) -> None:
        """Tell how far it has come, now and then; Cancelled at once."""
        self._control.check()
        if position - self._told >= TELL_EVERY:
            self._told = position
            self._control.tell("plan", position, self._image.virtual_size)

    def has_data(self, start: int, end: int) -> bool:
        piece = FIRST_PROBE  # nearly all data shows itself at once; zeros have to be read whole
        while start < end:
            self.at(start)
            length = min(piece, end - start)
            if length == PROBE:
                self._image.pread_into(start, memoryview(self._buffer))
                if self._buffer != ZEROS:
                    return True
            elif self._image.pread(start, length) != ZEROS[:length]:
                return True
            start += length
            piece = PROBE
        return False


def chunks(plan: ConversionPlan, layout: Layout) -> Iterator[Chunk]:
    """The tasks of the copy, in the order of the source."""
    step = min(plan.block_size, CHUNK)
    for start, length in plan.spans():
        for offset in range(start, start + length, step):
            block, inside = divmod(offset, plan.block_size)
            yield Chunk(offset, min(step, start + length - offset), layout.place(block) + inside, inside == 0)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Guest bytes to copy by one task, and where they go."""

    start: int
    length: int
    target: int
    first_of_block: bool


def data_parts(extents: Iterator[Extent]) -> Iterator[tuple[int, int]]:
    """(start, length) of the parts with data; neighbours joined whatever their kind."""
    start = end = 0
    for extent in extents:
        if not extent.data:
            continue
        if extent.start != end:
            if end > start:
                yield start, end - start
            start = extent.start
        end = extent.end
    if end > start:
        yield start, end - start
