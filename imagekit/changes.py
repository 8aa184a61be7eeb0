"""Apply changes in place: the list is complete before the first write, and the file is locked."""

from __future__ import annotations

from collections.abc import Iterable

from imagekit.formats.base import Barrier, Change, File


def apply(changes: Iterable[Change], file: File) -> None:
    """Take the steps in order. A step that was taken stays taken: plan so that every prefix is sound."""
    for change in changes:
        if isinstance(change, Barrier):
            file.flush()
        else:
            file.pwrite(change.offset, change.data)
