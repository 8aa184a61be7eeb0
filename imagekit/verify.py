"""Does the target say what the source says?

*structure* re-opens the target with our own reader: sizes, tables, and exactly the planned blocks. *content* compares
every guest byte of two images, of whatever formats. Both read through the same readers a user would read with.

What the copy read is not read again from the source: its checksum is known (imagekit.sums), and the target, still in
the page cache, is held against that. All else that is data in either disk is compared byte by byte.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from imagekit.errors import VerificationFailed
from imagekit.formats import registry
from imagekit.formats.base import DiskImage, File
from imagekit.formats.raw import ZeroImage
from imagekit.plan import CHUNK, ConversionPlan, data_parts, merged_ranges
from imagekit.progress import SILENT, Control
from imagekit.sums import Part, Sum
from imagekit.workers import run as run_workers
from imagekit.workers import usable_cores

ZEROS = bytes(CHUNK)
Piece: TypeAlias = tuple[int, int, int | None]
"""Guest offset, length, and the sum of what the first image has there, where that is known."""


def verify_structure(plan: ConversionPlan, target: File, *, file_size: int | None = None) -> None:
    """Raise VerificationFailed when the target is not the disk that was planned. Its parent is not looked at.

    ``file_size`` is what a target that stores its blocks encoded came to; the plan knows a bound only.
    """
    file_size = plan.file_size if file_size is None else file_size
    chosen = registry.find(plan.target_format)
    image = chosen.open(target, resolver=lambda _: ZeroImage(plan.virtual_size))
    if target.size != file_size or file_size > plan.file_size:
        raise _failed(target, f"the file has {target.size} bytes, {file_size} were planned")
    if image.virtual_size != plan.virtual_size:
        raise _failed(target, f"the disk has {image.virtual_size} bytes, {plan.virtual_size} were planned")
    info = image.info()
    if info.facts:
        raise _failed(target, f"the target has oddities: {info.facts}")
    parent = plan.writer_options.parent
    if [one.identities[:1] for one in info.references] != ([] if parent is None else [(parent.identity,)]):
        raise _failed(target, f"the target refers to other files than planned: {info.references}")
    if info.block_size is None:
        return  # every block has its place
    problems = chosen.check(target)
    if problems:
        raise _failed(target, problems[0].message)
    planned = ((0, -(-plan.virtual_size // plan.block_size)),) if info.subformat == "fixed" else plan.blocks
    present = tuple(present_blocks(image, plan.block_size))
    if plan.writer_options.compression is not None:
        # Whoever compresses sees which of the planned blocks are zero after all, and leaves them out.
        present = tuple(merged_ranges(iter(present), iter(planned)))
    if present != planned:
        raise _failed(target, "the allocated blocks are not the planned ones")


def present_blocks(image: DiskImage, block_size: int) -> Iterator[tuple[int, int]]:
    """Runs (first, count) of the blocks an image has allocated, neighbours joined.

    An extent may begin inside a block: what was never written to a fixed disk is an extent of its own.
    """
    start = end = 0
    for extent in image.extents():
        if not extent.present:
            continue
        first = extent.start // block_size
        if first > end:
            if end > start:
                yield start, end - start
            start = first
        end = -(-extent.end // block_size)
    if end > start:
        yield start, end - start


def _failed(target: File, message: str) -> VerificationFailed:
    return VerificationFailed(
        f"verification failed: {message}", path=target.name, hint="please report this; nothing was published"
    )


def verify_content(
    source: DiskImage,
    target: DiskImage,
    *,
    known: Sequence[Part] = (),
    jobs: int | None = None,
    control: Control = SILENT,
) -> None:
    """Raise VerificationFailed when a guest byte differs; bytes behind the source's end must be zero.

    ``known`` are parts of the source that were read already, in their order.
    """
    at = first_difference(source, target, known=known, jobs=jobs, control=control)
    if at is not None:
        raise VerificationFailed(
            f"verification failed: the content differs at guest offset {at:#x}",
            hint="run it again; if it happens twice, check memory and disk, then report it",
        )


def first_difference(
    one: DiskImage,
    other: DiskImage,
    *,
    known: Sequence[Part] = (),
    jobs: int | None = None,
    control: Control = SILENT,
) -> int | None:
    """Guest offset of the first byte that differs, None when none does; the shorter disk ends in zeros.

    ``known`` are parts of the first, sorted.
    """
    comparison = _Comparison()
    total = max(one.virtual_size, other.virtual_size)
    run_workers(
        comparison.wanted(_pieces(one, other, known)),
        lambda: _make_comparer(one, other, comparison),
        jobs=jobs or usable_cores(),
        control=control,
        tick=lambda: control.tell("verify", comparison.position, total),
    )
    return comparison.found


class _Comparison:
    """The lowest difference found so far, and how far the pieces have been handed out."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.found: int | None = None
        self.position = 0

    def wanted(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            if self.found is not None and piece[0] > self.found:
                return
            self.position = piece[0]
            yield piece

    def differs(self, at: int) -> None:
        with self._lock:
            self.found = at if self.found is None else min(self.found, at)


def _pieces(one: DiskImage, other: DiskImage, known: Sequence[Part]) -> Iterator[Piece]:
    """All that is data in either image or known of the first, at most CHUNK each; in order, and nothing twice."""
    done, at = 0, 0
    for start, length in merged_ranges(
        data_parts(one.extents()), data_parts(other.extents()), ((part.start, part.length) for part in known)
    ):
        done = max(done, start // CHUNK * CHUNK)
        while done < start + length:
            if at < len(known) and known[at].start <= done:
                part = known[at]
                yield part
                done, at = part.start + part.length, at + 1
                continue
            stop = (done // CHUNK + 1) * CHUNK
            if at < len(known):
                stop = min(stop, known[at].start)
            yield done, stop - done, None
            done = stop


def _make_comparer(one: DiskImage, other: DiskImage, comparison: _Comparison) -> Callable[[Piece], None]:
    left, right = bytearray(CHUNK), bytearray(CHUNK)

    def read(image: DiskImage, start: int, length: int, buffer: bytearray) -> None:
        inside = max(0, min(length, image.virtual_size - start))
        image.pread_into(start, memoryview(buffer)[:inside])
        buffer[inside:length] = ZEROS[: length - inside]

    def compare(piece: Piece) -> None:
        start, length, value = piece
        read(other, start, length, right)
        if value is not None:
            found = Sum()
            found.add(memoryview(right)[:length])
            if found.value == value:
                return
        read(one, start, length, left)
        if left[:length] != right[:length]:
            comparison.differs(start + next(index for index in range(length) if left[index] != right[index]))
        elif value is not None:
            comparison.differs(start)  # it is what the source reads as now, and not what it read as before

    return compare
