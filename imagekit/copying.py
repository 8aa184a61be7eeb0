"""The hot path: carry out a plan between two open files.

Threads take chunks of the plan from one iterator. A chunk whose bytes lie unencoded in the source is copied by the
kernel; anything else is decoded and written in bursts that a core's cache holds. Holes and zero clusters are
never written: the target begins as one hole. Memory is a buffer a thread, whatever the image.

Where the target stores blocks encoded, each thread encodes a run of whole blocks, and waits for its turn before they
get their places: the file is the same whatever the number of threads.

Nothing here opens a file, chooses a format or decides what to copy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from imagekit.formats import registry
from imagekit.formats.base import AS_IS, Buffer, DiskImage, EncodedLayout, Extent, File, KiB, Layout, OpenOptions
from imagekit.formats.files import kernel_copy
from imagekit.plan import CHUNK, Chunk, ConversionPlan, chunks, data_parts, tasks, whole_blocks
from imagekit.progress import SILENT, Control
from imagekit.records import dataclass
from imagekit.sums import Sum, Sums
from imagekit.workers import run as run_workers
from imagekit.workers import usable_cores

MAX_KERNEL_PARTS = 16
"""A chunk in more pieces than this is read and written in one go instead of piece by piece."""

BURST = 128 * KiB
"""What is decoded is written when it is this much: still in the core's own cache, which 2 MiB would not be."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class CopyResult:
    """Guest bytes copied, and how many of them by the kernel; length of the finished file, 0 when there is none."""

    data_bytes: int
    kernel_copied_bytes: int
    file_size: int = 0


class _Counter:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.chunks = 0
        self.reached = 0
        self.data = 0
        self.kernel = 0

    def add(self, start: int, chunk: int, data: int, kernel: int) -> None:
        with self._lock:
            self.chunks += chunk
            self.reached = max(self.reached, start + chunk)
            self.data += data
            self.kernel += kernel


def run(
    plan: ConversionPlan,
    source: File,
    target: File,
    *,
    view: OpenOptions = AS_IS,
    jobs: int | None = None,
    control: Control = SILENT,
) -> CopyResult:
    """Copy the plan's blocks and write the target's metadata. The target is empty and becomes complete.

    ``view`` is how the source was opened when the plan was made.
    """
    image = registry.find(plan.source_format).open(source, options=view)
    return copy_image(plan, image, source, target, jobs=jobs, control=control)


def copy_image(
    plan: ConversionPlan,
    image: DiskImage,
    source: File,
    target: File,
    *,
    jobs: int | None = None,
    sums: Sums | None = None,
    found: Iterable[tuple[int, int]] | None = None,
    control: Control = SILENT,
) -> CopyResult:
    """:func:`run` with the image already open in ``source``. ``sums`` gets the checksums of what was read.

    ``found`` gives the blocks of a draft (imagekit.plan.FoundBlocks), which are copied as they are found.
    """
    layout = plan.layout()
    counter, total = _Counter(), plan.data_bytes
    jobs = jobs or usable_cores()
    if found is None:
        target.truncate(plan.file_size)

    def tick() -> None:
        if found is None:
            control.tell("copy", counter.chunks, total)
        else:
            control.tell("copy", counter.reached, plan.source_virtual_size)

    if isinstance(layout, EncodedLayout):
        _copy_encoded(plan, layout, image, target, counter, jobs=jobs, control=control, tick=tick)
    else:
        lane = threading.Lock()
        run_workers(
            ([chunk] for chunk in chunks(plan, layout, found)) if found is not None else tasks(plan, layout, jobs),
            lambda: _make_copier(image, source, target, layout, counter, sums, lane, control),
            jobs=jobs,
            control=control,
            tick=tick,
        )
    if found is not None:
        target.truncate(layout.file_size)
        control.tell("copy", plan.source_virtual_size, plan.source_virtual_size)
    for offset, data in layout.metadata():
        target.pwrite(offset, data)
    return CopyResult(counter.data, counter.kernel, layout.file_size)


# --- as it is --------------------------------------------------------------------------------------------------


def _make_copier(
    image: DiskImage,
    source: File,
    target: File,
    layout: Layout,
    counter: _Counter,
    sums: Sums | None,
    lane: threading.Lock,
    control: Control,
) -> Callable[[list[Chunk]], None]:
    buffer = memoryview(bytearray(CHUNK))

    def through_buffer(start: int, length: int, at: int, prefix: bytes) -> None:
        at -= len(prefix)
        waiting: list[Buffer] = [prefix] if prefix else []
        size = len(prefix)
        total = None if sums is None else Sum()
        for piece in image.pieces(start, buffer[:length]):
            if total is not None:
                total.add(piece)
            waiting.append(piece)
            size += len(piece)
            if size >= BURST:
                target.pwrite(at, *waiting)
                at += size
                waiting, size = [], 0
        if waiting:
            target.pwrite(at, *waiting)
        if sums is not None and total is not None:
            sums.note(start, length, total.value)

    def by_kernel(chunk: Chunk, extents: list[Extent]) -> int:
        control.check()
        if prefix := layout.prefix if chunk.first_of_block else b"":
            target.pwrite(chunk.target - len(prefix), prefix)
        return _copy_by_kernel(extents, chunk, source, target)

    def ourselves(chunk: Chunk, extents: list[Extent], copied: int, prefix: bytes) -> None:
        data = sum(extent.length for extent in extents)
        if prefix and (not extents or extents[0].start > chunk.start):
            target.pwrite(chunk.target - len(prefix), prefix)
            prefix = b""
        for start, end in _behind(extents, copied):
            for at in range(start, end, CHUNK):
                control.check()
                through_buffer(at, min(CHUNK, end - at), chunk.target + at - chunk.start, prefix)
                prefix = b""
        counter.add(chunk.start, chunk.length, data, copied)

    def together(parts: list[tuple[Chunk, list[Extent]]]) -> None:
        with lane:  # the kernel lets in one writer of a file at a time: a second one would only spin
            copied = [by_kernel(*part) for part in parts]
        for part, done in zip(parts, copied, strict=True):
            ourselves(*part, done, b"")

    # None of these functions calls itself: the buffer that it holds on to would wait for the garbage collector.
    def copy(task: list[Chunk]) -> None:
        parts = []
        for chunk in task:
            extents = _data_extents(image, chunk, only_kernel=True)
            if not _kernel_can(extents):
                break
            parts.append((chunk, extents))
        if len(parts) == len(task):
            together(parts)
            return
        for chunk in (part for whole in task for part in whole.parts()):
            extents = _data_extents(image, chunk)
            if _kernel_can(extents):
                together([(chunk, extents)])
            else:
                ourselves(chunk, extents, 0, layout.prefix if chunk.first_of_block else b"")

    return copy


def _data_extents(image: DiskImage, chunk: Chunk, *, only_kernel: bool = False) -> list[Extent]:
    """Where the chunk's data lie; ``only_kernel``: until it shows that the kernel cannot copy them."""
    found = []
    for extent in image.extents(chunk.start, chunk.length):
        if extent.data:
            found.append(extent)
            if only_kernel and (extent.offset is None or len(found) > MAX_KERNEL_PARTS):
                break
    return found


def _kernel_can(extents: list[Extent]) -> bool:
    return 0 < len(extents) <= MAX_KERNEL_PARTS and all(extent.offset is not None for extent in extents)


def _copy_by_kernel(extents: list[Extent], chunk: Chunk, source: File, target: File) -> int:
    """Bytes copied, from the first extent on; short when the kernel cannot copy between these files."""
    copied = 0
    for extent in extents:
        assert extent.offset is not None
        at = chunk.target + extent.start - chunk.start
        count = kernel_copy(extent.file or source, extent.offset, target, at, extent.length)
        copied += count
        if count < extent.length:
            break
    return copied


def _behind(extents: list[Extent], copied: int) -> list[tuple[int, int]]:
    """(start, end) of the parts with data that lie behind the first ``copied`` bytes of data."""
    parts = []
    for start, length in data_parts(iter(extents)):
        done = min(copied, length)
        copied -= done
        if done < length:
            parts.append((start + done, start + length))
    return parts


# --- encoded ---------------------------------------------------------------------------------------------------


class _Turns:
    """Lets threads do one thing each in the order of their tickets, which are handed out from 0."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next = 0
        self._stopped = False

    def take(self, ticket: int, action: Callable[[], Result]) -> Result | None:
        """Wait for the turn and do it; None when one that should come before never will."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._next == ticket)
            if self._stopped:
                return None
            result = action()
            self._next += 1
            self._changed.notify_all()
            return result

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


def _copy_encoded(
    plan: ConversionPlan,
    layout: EncodedLayout,
    image: DiskImage,
    target: File,
    counter: _Counter,
    *,
    jobs: int,
    control: Control,
    tick: Callable[[], None],
) -> None:
    turns = _Turns()

    def make_worker() -> Callable[[tuple[int, tuple[int, int]]], None]:
        encode = _make_encoder(plan, layout, image, target, turns, counter)

        def work(task: tuple[int, tuple[int, int]]) -> None:
            try:
                encode(task)
            except BaseException:
                turns.stop()  # nobody is to wait for a turn that was not taken
                raise

        return work

    run_workers(enumerate(whole_blocks(plan)), make_worker, jobs=jobs, control=control, tick=tick)
    target.truncate(layout.file_size)


def _make_encoder(
    plan: ConversionPlan, layout: EncodedLayout, image: DiskImage, target: File, turns: _Turns, counter: _Counter
) -> Callable[[tuple[int, tuple[int, int]]], None]:
    size = plan.block_size
    buffer = bytearray(max(CHUNK, size))

    def encode(task: tuple[int, tuple[int, int]]) -> None:
        ticket, (first, count) = task
        start, length = first * size, count * size
        inside = max(0, min(length, image.virtual_size - start))
        image.pread_into(start, memoryview(buffer)[:inside])
        buffer[inside:length] = bytes(length - inside)
        stored = [layout.encode(bytes(memoryview(buffer)[at : at + size])) for at in range(0, length, size)]
        places = turns.take(
            ticket, lambda: [layout.add(block, len(data)) for block, data in enumerate(stored, start=first)]
        )
        if places is None:
            return
        for at, pieces in _side_by_side(places, stored):
            target.pwrite(at, *pieces)
        counter.add(start, inside, size * sum(len(data) > 0 for data in stored), 0)

    return encode


def _side_by_side(places: list[int], stored: list[Buffer]) -> Iterator[tuple[int, list[Buffer]]]:
    """What is stored, neighbours in the file together."""
    start = end = 0
    pieces: list[Buffer] = []
    for at, data in zip(places, stored, strict=True):
        if not data:
            continue
        if pieces and at != end:
            yield start, pieces
            pieces = []
        start, end = (start, end + len(data)) if pieces else (at, at + len(data))
        pieces.append(data)
    if pieces:
        yield start, pieces
