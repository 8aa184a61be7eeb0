"""Apply changes in place: what they are is decided before the first write, and the file is locked."""

from __future__ import annotations

from collections.abc import Iterable

from imagekit.formats.base import Barrier, Change, Copy, DiskImage, File, MiB, Truncate
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
    buffer = memoryview(bytearray(min(STEP, change.length)))
    for done in range(0, change.length, STEP):
        control.check()
        part = buffer[: min(STEP, change.length - done)]
        image.pread_into(change.start + done, part)
        file.pwrite(change.offset + done, part)
        control.tell("merge", change.start + done, image.virtual_size)
