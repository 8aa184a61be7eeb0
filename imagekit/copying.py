"""The hot path: carry out a plan between two open files.

Threads take chunks of the plan from one iterator. A chunk whose bytes lie unencoded in the source is copied by the
kernel; anything else is decoded into the thread's own buffer and written by one call. Holes and zero clusters are
never written: the target begins as one hole. Memory is a buffer a thread, whatever the image.

Nothing here opens a file, chooses a format or decides what to copy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from imagekit.formats import registry
from imagekit.formats.base import DiskImage, Extent, File, Layout
from imagekit.formats.files import kernel_copy
from imagekit.plan import CHUNK, Chunk, ConversionPlan, chunks, data_parts
from imagekit.progress import SILENT, Control
from imagekit.workers import run as run_workers
from imagekit.workers import usable_cores

MAX_KERNEL_PARTS = 16
"""A chunk in more pieces than this is read and written in one go instead of piece by piece."""


@dataclass(frozen=True, slots=True)
class CopyResult:
    """Guest bytes copied, and how many of them by the kernel."""

    data_bytes: int
    kernel_copied_bytes: int


class _Counter:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.chunks = 0
        self.data = 0
        self.kernel = 0

    def add(self, chunk: int, data: int, kernel: int) -> None:
        with self._lock:
            self.chunks += chunk
            self.data += data
            self.kernel += kernel


def run(
    plan: ConversionPlan, source: File, target: File, *, jobs: int | None = None, control: Control = SILENT
) -> CopyResult:
    """Copy the plan's blocks and write the target's metadata. The target is empty and becomes complete."""
    image = registry.find(plan.source_format).open(source)
    return copy_image(plan, image, source, target, jobs=jobs, control=control)


def copy_image(
    plan: ConversionPlan,
    image: DiskImage,
    source: File,
    target: File,
    *,
    jobs: int | None = None,
    control: Control = SILENT,
) -> CopyResult:
    """:func:`run` with the image already open in ``source``."""
    layout = plan.layout()
    target.truncate(plan.file_size)
    counter, total = _Counter(), plan.data_bytes
    run_workers(
        chunks(plan, layout),
        lambda: _make_copier(image, source, target, layout, counter),
        jobs=jobs or usable_cores(),
        control=control,
        tick=lambda: control.tell("copy", counter.chunks, total),
    )
    for offset, data in layout.metadata():
        target.pwrite(offset, data)
    return CopyResult(counter.data, counter.kernel)


def _make_copier(
    image: DiskImage, source: File, target: File, layout: Layout, counter: _Counter
) -> Callable[[Chunk], None]:
    buffer = memoryview(bytearray(CHUNK))

    def through_buffer(start: int, length: int, at: int, prefix: bytes) -> None:
        view = buffer[:length]
        image.pread_into(start, view)
        target.pwrite(at - len(prefix), prefix, view)

    def copy(chunk: Chunk) -> None:
        prefix = layout.prefix if chunk.first_of_block else b""
        extents = [extent for extent in image.extents(chunk.start, chunk.length) if extent.data]
        data, copied = sum(extent.length for extent in extents), 0
        by_kernel = _kernel_can(extents)
        if prefix and (by_kernel or not extents or extents[0].start > chunk.start):
            target.pwrite(chunk.target - len(prefix), prefix)
            prefix = b""
        if by_kernel:
            copied = _copy_by_kernel(extents, chunk, source, target)
        if copied < data:
            for start, length in _behind(extents, copied):
                through_buffer(start, length, chunk.target + start - chunk.start, prefix)
                prefix = b""
        counter.add(chunk.length, data, copied)

    return copy


def _kernel_can(extents: list[Extent]) -> bool:
    return 0 < len(extents) <= MAX_KERNEL_PARTS and all(extent.offset is not None for extent in extents)


def _copy_by_kernel(extents: list[Extent], chunk: Chunk, source: File, target: File) -> int:
    """Bytes copied, from the first extent on; short when the kernel cannot copy between these files."""
    copied = 0
    for extent in extents:
        assert extent.offset is not None
        at = chunk.target + extent.start - chunk.start
        count = kernel_copy(source, extent.offset, target, at, extent.length)
        copied += count
        if count < extent.length:
            break
    return copied


def _behind(extents: list[Extent], copied: int) -> list[tuple[int, int]]:
    """The parts with data that lie behind the first ``copied`` bytes of data."""
    parts = []
    for start, length in data_parts(iter(extents)):
        done = min(copied, length)
        copied -= done
        if done < length:
            parts.append((start + done, length - done))
    return parts
