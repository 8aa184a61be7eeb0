"""What a conversion will do, decided before a byte is written.

A :class:`ConversionPlan` is frozen, serialisable and complete: with it and two open files, anybody can carry the
conversion out (imagekit.copying), in a thread, a confined child or on another machine.

Which blocks of the target hold data is decided *by content*: unencoded bytes are probed, so that a sparse and a dense
copy of one image give the same target. Compressed clusters count as data: nobody compresses zeros.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, TypeAlias
from uuid import UUID

from imagekit.errors import UnsupportedFeature, UsageError
from imagekit.formats import registry
from imagekit.formats.base import (
    JSON,
    SECTOR,
    BlockRuns,
    DiskFormat,
    DiskImage,
    Extent,
    File,
    ImageWriter,
    KiB,
    Layout,
    MiB,
    WriterOptions,
    round_up,
)
from imagekit.limits import DEFAULT as DEFAULT_LIMITS
from imagekit.limits import Limits
from imagekit.pictures import MOST_CELLS
from imagekit.progress import SILENT, Control
from imagekit.records import dataclass, field, replace
from imagekit.workers import run as run_workers
from imagekit.workers import usable_cores

FIRST_PROBE = 4 * KiB
PROBE = 128 * KiB
"""Bytes looked at in one go: with the zeros they are compared with, half of a core's own cache."""

ZEROS, FIRST_ZEROS = bytes(PROBE), bytes(FIRST_PROBE)
LOOKS = 64
"""Parts of blocks that are looked at together."""

SIDE_BY_SIDE = 8 * MiB
"""Zeros, by what begins as such, from which on it is worth starting threads to read them."""

CHUNK = 2 * MiB
"""Guest bytes that are read and written in one go."""
TASK = 16 * MiB
"""Guest bytes handed to a thread at once; the kernel copies, or shares, what lies side by side by one call."""
TELL_EVERY = 64 * MiB
Look: TypeAlias = tuple[int, int, int, File | None, int]
"""Block, the part of it (start, end) to be looked at; where that lies unencoded: in which file, if any, and where."""

VERIFY_LEVELS = ("structure", "content", "qemu-img", "none")


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """Everything a caller can ask of a conversion. Picklable; None means: decide for me."""

    source_format: str | None = None
    target_format: str | None = None
    subformat: str | None = None
    block_size: int | None = None
    sector_size: int | None = None
    compression: Literal["zlib", "zstd"] | None = None
    creator: str | None = None
    parent: str | None = None
    size: int | None = None
    minimum_size: int | None = None
    align: int | None = None
    fix_gpt: bool = False
    identifier: UUID | None = None
    timestamp: int | None = None
    verify: str = "structure"
    sync: bool = True
    preallocate: bool = False
    overwrite: bool = False
    jobs: int | None = None
    dry_run: bool = False
    map_cells: int = 0
    """Parts of the disk that the report's maps of source and target have; 0: no maps."""

    allow: frozenset[str] = frozenset()
    snapshot: str | None = None
    size_from: Literal["current", "chs"] | None = None
    follow_references: bool = False
    parent_map: tuple[tuple[str, str], ...] = ()
    ignore_parent_id: bool = False
    limits: Limits = DEFAULT_LIMITS
    confined: bool | None = None
    """None: what comes over a network is read in a confined process, unless something was asked that it cannot do."""
    redirect_hosts: tuple[str, ...] = ()
    http_timeout: float = 30.0
    checksum: str | None = None
    keyring: str | None = None
    partial_dir: str | None = None
    glance_url: str | None = None
    os_cloud: str | None = None
    stated_format: str | None = None
    """What a service says the image is: content in another format is refused, unless ``source_format`` is given."""

    def __post_init__(self) -> None:
        if self.verify not in VERIFY_LEVELS:
            raise UsageError(f"verify {self.verify!r}", hint=f"choose one of: {', '.join(VERIFY_LEVELS)}")
        if self.jobs is not None and self.jobs < 1:
            raise UsageError(f"jobs {self.jobs}, at least 1 is needed")
        if self.size is not None and self.size <= 0:
            raise UsageError(f"size {self.size}, at least one sector is needed")
        if self.align is not None and (self.align < SECTOR or self.align & (self.align - 1)):
            raise UsageError(f"align {self.align}, a power of two from 512 on is needed")
        if not 0 <= self.map_cells <= MOST_CELLS:
            raise UsageError(f"a map of {self.map_cells} parts, at most {MOST_CELLS} are possible")
        if not self.http_timeout > 0:
            raise UsageError(f"HTTP time-out {self.http_timeout}, more than 0 seconds are needed")

    def is_confined(self, *, elsewhere: bool) -> bool:
        """Whether to read in a confined process a source that comes from elsewhere, or does not."""
        if self.confined is not None:
            return self.confined
        known = self.source_format is None or registry.is_known(self.source_format)
        return elsewhere and known and self.verify != "qemu-img"


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
        return self._writer().layout(self.blocks)

    def with_blocks(self, blocks: BlockRuns) -> ConversionPlan:
        """The same with other blocks."""
        return replace(self, blocks=blocks, file_size=self._writer().layout(blocks).file_size)

    def most(self) -> int:
        """Length of the target if all its blocks held data."""
        return self._writer().layout(((0, -(-self.virtual_size // self.block_size)),)).file_size

    def _writer(self) -> ImageWriter:
        return registry.find(self.target_format).writer(self.virtual_size, self.writer_options)

    def to_json(self) -> dict[str, JSON]:
        from dataclasses import asdict  # which loads inspect

        out = asdict(self)
        out["blocks"] = [list(run) for run in self.blocks]
        out["notes"] = list(self.notes)
        options = out["writer_options"]
        options["identifier"] = str(self.writer_options.identifier)
        if self.writer_options.parent is not None:
            parent = options["parent"]
            parent["identity"] = self.writer_options.parent.identity.hex()
            parent["disk_id"] = (self.writer_options.parent.disk_id or b"").hex() or None
        return {key.replace("_", "-"): value for key, value in out.items()}


def build_plan(
    image: DiskImage,
    *,
    source_format: str,
    target_format: str,
    options: WriterOptions,
    virtual_size: int | None = None,
    notes: tuple[str, ...] = (),
    parent: DiskImage | None = None,
    limits: Limits = DEFAULT_LIMITS,
    jobs: int | None = None,
    control: Control = SILENT,
) -> ConversionPlan:
    """Decide which of the target's blocks hold data. Reads the source (and the target's parent), writes nothing.

    ``virtual_size`` is the target's, a multiple of its sector size; the source's, rounded up, unless given.
    """
    if virtual_size is None:
        virtual_size, notes = target_size(image.virtual_size)
    draft = draft_plan(image, source_format, target_format, options, virtual_size, notes)
    if parent is None:
        found = find_blocks(image, draft.block_size, jobs=jobs, control=control)
    else:
        found = find_differences(image, parent, draft.block_size, control=control)
    return draft.with_blocks(tuple(limits.counted(found)))


def draft_plan(
    image: DiskImage,
    source_format: str,
    target_format: str,
    options: WriterOptions,
    virtual_size: int,
    notes: tuple[str, ...] = (),
) -> ConversionPlan:
    """All that is decided before a look at the content: a plan without blocks."""
    chosen = registry.find(target_format)
    check_options(chosen, options)
    writer = chosen.writer(virtual_size, options)
    return ConversionPlan(
        source_format=source_format,
        source_virtual_size=image.virtual_size,
        target_format=chosen.name,
        virtual_size=virtual_size,
        block_size=writer.block_size,
        blocks=(),
        file_size=writer.layout().file_size,
        writer_options=options,
        notes=notes,
    )


def check_options(chosen: DiskFormat, options: WriterOptions) -> None:
    """UnsupportedFeature for a choice that the format does not have."""
    if options.subformat is not None and options.subformat not in chosen.subformats:
        raise UnsupportedFeature(
            f"{chosen.name} has no subformat {options.subformat!r}",
            hint=f"choose one of: {', '.join(chosen.subformats)}",
        )
    for name in ("block_size", "sector_size", "compression", "creator"):
        value = getattr(options, name)
        if value not in (None, SECTOR if name == "sector_size" else None) and name not in chosen.writes:
            raise UnsupportedFeature(f"{chosen.name} has no choice of {name.replace('_', ' ')}")


def target_size(
    source_size: int, wanted: int | None = None, *, minimum: int | None = None, unit: int = SECTOR
) -> tuple[int, tuple[str, ...]]:
    """The target's virtual size in bytes, a multiple of ``unit``, and what to say about it."""
    if wanted is not None and wanted < source_size:
        raise UsageError(
            f"size {wanted} is smaller than the disk's {source_size} bytes",
            hint="a disk can grow while it is converted; shrink its partitions and file systems first",
        )
    asked = source_size if wanted is None else wanted
    size = round_up(max(asked, minimum or 0), unit)
    if asked == 0:
        raise UsageError("the disk has no bytes at all", hint="give a size, or check the source")
    if size != asked:
        return size, (f"size rounded up from {asked} to {size} bytes",)
    if size > source_size:
        return size, (f"disk grown from {source_size} to {size} bytes",)
    return size, ()


def find_blocks(
    image: DiskImage, block_size: int, *, jobs: int | None = None, control: Control = SILENT
) -> Iterator[tuple[int, int]]:
    """Runs (first, count) of blocks that hold something other than zeros."""
    yield from _joined(_blocks_with_data(image, block_size, _Probe(image, jobs or usable_cores(), control)))
    control.tell("plan", image.virtual_size, image.virtual_size)


class FoundBlocks:
    """The blocks with data of a disk that still arrives, each handed out as soon as it is known to be one."""

    def __init__(self, image: DiskImage, plan: ConversionPlan, limits: Limits, control: Control) -> None:
        self._image = image
        self._plan = plan
        self._limits = limits
        # In one thread and one by one: what is looked at comes no faster than the network brings it.
        self._probe = _Probe(image, 1, replace(control, callback=None), together=1)
        self._runs: list[tuple[int, int]] = []
        self._known = 0
        self._complete = False

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(first, count) in order, neighbours not joined; UnsafeImage when they are more than the limits allow."""
        size, total = self._plan.block_size, 0
        for start, end in _blocks_with_data(self._image, size, self._probe):
            first = max(start, self._known)
            if first >= end:
                continue
            self._note(first, end)
            total += min(end * size, self._image.virtual_size) - first * size
            self._limits.check("output_bytes", total, "the target would take")
            yield first, end - first
        self._complete = True

    def _note(self, first: int, end: int) -> None:
        if self._runs and self._known == first:
            self._runs[-1] = (self._runs[-1][0], end)
        else:
            self._limits.check_runs(len(self._runs))
            self._runs.append((first, end))
        self._known = end

    def plan(self) -> ConversionPlan:
        """The plan that was carried out meanwhile. RuntimeError when that was not gone through to its end."""
        if not self._complete:
            raise RuntimeError("the blocks of a draft are not all found yet")
        return self._plan.with_blocks(tuple((first, end - first) for first, end in self._runs))


def find_differences(
    image: DiskImage, parent: DiskImage, block_size: int, *, control: Control = SILENT
) -> Iterator[tuple[int, int]]:
    """Runs (first, count) of blocks whose content is not the parent's; behind a disk's end there are zeros."""
    yield from _joined(_differing_blocks(image, parent, block_size, control))
    control.tell("plan", image.virtual_size, image.virtual_size)


def _differing_blocks(
    image: DiskImage, parent: DiskImage, block_size: int, control: Control
) -> Iterator[tuple[int, int]]:
    size = max(image.virtual_size, parent.virtual_size)
    known = 0
    for start, length in merged_ranges(data_parts(image.extents()), data_parts(parent.extents())):
        for block in range(max(known, start // block_size), -(-(start + length) // block_size)):
            known = block + 1
            for at in range(block * block_size, min((block + 1) * block_size, size), min(PROBE, block_size)):
                control.check()
                if _padded(image, at, min(PROBE, block_size)) != _padded(parent, at, min(PROBE, block_size)):
                    yield block, block + 1
                    break
        control.tell("plan", start, size)


def _padded(image: DiskImage, start: int, length: int) -> bytes:
    return image.pread(start, length).ljust(length, b"\0") if start < image.virtual_size else bytes(length)


def merged_ranges(*many: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(start, length) of all that lies in one of the sorted iterators of such, in order, without overlaps."""
    start = end = 0
    for first, length in heapq.merge(*many):
        if first > end:
            if end > start:
                yield start, end - start
            start = first
        end = max(end, first + length)
    if end > start:
        yield start, end - start


def _joined(runs: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Neighbouring or repeated (first, end) as runs (first, count)."""
    run_start = run_end = 0
    for first, last in runs:
        if first > run_end:
            if run_end > run_start:
                yield run_start, run_end - run_start
            run_start = first
        run_end = max(run_end, last)
    if run_end > run_start:
        yield run_start, run_end - run_start


def _blocks_with_data(image: DiskImage, block_size: int, probe: _Probe) -> Iterator[tuple[int, int]]:
    """Ranges (first, end) of blocks with data, in order; neighbours may repeat a block."""
    known = 0  # blocks below are decided as holding data
    looks: list[Look] = []
    for extent in image.extents():
        if not extent.data:
            continue
        first, end = extent.start // block_size, -(-extent.end // block_size)
        probe.at(extent.start)
        if extent.compressed:
            yield from probe.decided(looks)
            looks.clear()
            yield first, end
            known = end
            continue
        file = None if extent.offset is None else extent.file or image.container
        move = 0 if extent.offset is None else extent.offset - extent.start
        for block in range(max(first, known), end):
            start, stop = max(extent.start, block * block_size), min(extent.end, (block + 1) * block_size)
            looks.append((block, start, stop, file, start + move))
            if len(looks) == probe.together:
                for found in probe.decided(looks):
                    yield found
                    known = found[1]
                looks.clear()
    yield from probe.decided(looks)


class _Probe:
    """Looks whether ranges hold anything but zeros, and at the caller's wishes meanwhile."""

    def __init__(self, image: DiskImage, jobs: int, control: Control, *, together: int = LOOKS) -> None:
        self.together = together
        self._image = image
        self._jobs = jobs
        self._control = control
        self._told = 0

    def at(self, position: int) -> None:
        """Tell how far it has come, now and then; Cancelled at once."""
        self._control.check()
        if position - self._told >= TELL_EVERY:
            self._told = position
            self._control.tell("plan", position, self._image.virtual_size)

    def decided(self, looks: list[Look]) -> Iterator[tuple[int, int]]:
        """(block, block + 1) of the blocks with data, in order."""
        found: set[int] = set()
        rest = []
        for block, start, end, file, place in looks:
            self.at(start)
            if block in found:
                continue
            # Nearly all data shows itself at once; zeros have to be read whole. The extent has said where that is:
            # the image, asked for every block, would look it up again.
            head = min(FIRST_PROBE, end - start)
            data = b"" if file is None else file.pread(place, head)
            if len(data) < head:
                data = self._image.pread(start, head)
            if data != (FIRST_ZEROS if head == FIRST_PROBE else ZEROS[:head]):
                found.add(block)
            elif start + head < end:
                rest.append((block, start, end, file, place))
        if sum(one[2] - one[1] for one in rest) >= SIDE_BY_SIDE and self._jobs > 1:
            run_workers(rest, lambda: self._reader(found), jobs=self._jobs, control=self._control, tick=_nothing)
        elif rest:
            look = self._reader(found)
            for one in rest:
                look(one)
        yield from ((block, block + 1) for block in sorted(found))

    def _reader(self, found: set[int]) -> Callable[[Look], None]:
        """Adds to ``found`` the blocks that have data; of them a buffer each, used for all looks."""
        buffer = bytearray(PROBE)
        whole = memoryview(buffer)

        def look(one: Look) -> None:
            block, start, end, file, place = one
            self._control.check()
            for at in range(start, end, PROBE):
                if block in found:
                    return
                view = whole if end - at >= PROBE else whole[: end - at]
                if file is None or file.pread_into(place + at - start, view) != len(view):
                    self._image.pread_into(at, view)
                if (buffer if view is whole else bytes(view)) != ZEROS[: len(view)]:
                    found.add(block)

        return look


def _nothing() -> None:
    return None


def chunks(
    plan: ConversionPlan, layout: Layout, found: Iterable[tuple[int, int]] | None = None, *, most: int = CHUNK
) -> Iterator[Chunk]:
    """The parts of a copy, in the order of the source: what lies side by side in source and target, ``most`` bytes.

    ``found`` are the blocks of a draft (:class:`FoundBlocks`); the layout gives them their places now.
    """
    size = plan.block_size
    for first, count in plan.blocks if found is None else found:
        start, end = first * size, min((first + count) * size, plan.source_virtual_size)
        while start < end:
            block, inside = divmod(start, size)
            target = layout.place(block) + inside
            limit = min(start + most, end)
            stop = min((block + 1) * size, limit)
            while stop < limit and not layout.prefix and layout.place(stop // size) - target == stop - start:
                stop = min(stop + size, limit)
            yield Chunk(start, stop - start, target, inside == 0)
            start = stop


def tasks(plan: ConversionPlan, layout: Layout, jobs: int) -> Iterator[list[Chunk]]:
    """The parts of a copy as tasks for ``jobs`` threads: few and large, but some for each."""
    most = max(1, min(TASK, plan.data_bytes // (4 * jobs)) // CHUNK) * CHUNK
    together: list[Chunk] = []
    size = 0
    for chunk in chunks(plan, layout, most=most):
        if together and size + chunk.length > most:
            yield together
            together, size = [], 0
        together.append(chunk)
        size += chunk.length
    if together:
        yield together


def whole_blocks(plan: ConversionPlan) -> Iterator[tuple[int, int]]:
    """The tasks of a copy that encodes, in the order of the source: runs (first, count) of blocks, to a limit."""
    step = max(1, CHUNK // plan.block_size)
    for first, count in plan.blocks:
        for block in range(first, first + count, step):
            yield block, min(step, first + count - block)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Guest bytes that lie side by side in source and target, and where they go."""

    start: int
    length: int
    target: int
    first_of_block: bool

    def parts(self) -> Iterator[Chunk]:
        """The same in parts of CHUNK at most."""
        for done in range(0, self.length, CHUNK):
            length = min(CHUNK, self.length - done)
            yield Chunk(self.start + done, length, self.target + done, self.first_of_block and not done)


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
