"""Apply changes in place: what they are is decided before the first write, and the file is locked."""

from __future__ import annotations

from collections.abc import Iterable

from imagekit.formats.base import Barrier, Change, Copy, DiskImage, File, MiB, Truncate
from imagekit.formats.files import kernel_copy
from imagekit.progress import SILENT, Control

STEP = 2 * MiB
"""Bytes copied between two looks at whether to stop."""


def apply(
    changes: Iterable[Change], file: File, *, image: DiskImage | None = None, control: Control = SILENT
) -> None:
    """Take the steps in order; ``image`` is what a :class:`Copy` reads from.

    A step that was taken stays taken: plan so that every prefix is sound. Cancelled leaves such a prefix.
    """
    for change in changes:
        control.check()
        if isinstance(change, Barrier):
            file.flush()
        elif isinstance(change, Truncate):
            file.truncate(change.size)
        elif isinstance(change, Copy):
            assert image is not None
            _copy(change, image, file, control)
        else:
            file.pwrite(change.offset, change.data)


def _copy(change: Copy, image: DiskImage, file: File, control: Control) -> None:
    move = change.offset - change.start
    for extent in image.extents(change.start, change.length):
        start = extent.start
        origin = extent.file or image.container
        while start < extent.end:
            control.check()
            length = min(STEP, extent.end - start)
            done = 0
            if extent.data and extent.offset is not None and origin is not None:
                done = kernel_copy(origin, extent.offset + start - extent.start, file, start + move, length)
            if done < length:
                file.pwrite(start + done + move, image.pread(start + done, length - done))
            control.tell("merge", start, image.virtual_size)
            start += length
