"""VHDX: the disks of Hyper-V since Windows Server 2012, read, written and changed in place.

Follows Microsoft's "Virtual Hard Disk v2 (VHDX) File Format" ([MS-VHDX]). This module is the door: what is behind it
is loaded when it is used.

    vhdx_image.py      the guest's view
    vhdx_header.py     file identifier, headers, region tables
    vhdx_metadata.py   metadata items, parent locator, the arithmetic of the BAT
    vhdx_log.py        the log, replayed in memory
    vhdx_bat.py        the BAT and the sector bitmaps, window by window
    vhdx_writer.py     new disks
    vhdx_change.py     changes in place: vhdx_resize.py, vhdx_absorb.py, vhdx_edit.py
    vhdx_check.py      the check of a whole file
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import TYPE_CHECKING

from imagekit.formats.base import (
    AS_IS,
    Change,
    DiskFormat,
    DiskImage,
    File,
    ImageWriter,
    OpenOptions,
    ParentLink,
    Problem,
    Resolver,
    WriterOptions,
)

if TYPE_CHECKING:
    from imagekit.formats.vhdx_image import VhdxImage

SIGNATURE = b"vhdxfile"


class VhdxFormat(DiskFormat):
    name = "vhdx"
    suffixes = (".vhdx", ".avhdx")
    subformats = ("dynamic", "fixed", "differencing")
    writes = ("block_size", "sector_size")

    def probe(self, file: File) -> str | None:
        return "VHDX file identifier at 0" if file.pread(0, 8) == SIGNATURE else None

    def open(self, file: File, *, resolver: Resolver | None = None, options: OpenOptions = AS_IS) -> VhdxImage:
        from imagekit.formats.vhdx_image import VhdxImage

        return VhdxImage(file, resolver=resolver)

    def writer(self, virtual_size: int, options: WriterOptions) -> ImageWriter:
        from imagekit.formats.vhdx_writer import make_writer

        return make_writer(virtual_size, options)

    def check(self, file: File) -> list[Problem]:
        from imagekit.formats.vhdx_check import check

        return check(self.open(file))

    def repair(self, file: File) -> list[Change]:
        from imagekit.formats.vhdx_change import repair

        return repair(file)

    def resize(self, file: File, size: int) -> Iterable[Change]:
        from imagekit.formats.vhdx_change import resize

        return resize(file, size)

    def rebase(self, file: File, parent: ParentLink) -> Iterable[Change]:
        from imagekit.formats.vhdx_change import rebase

        return rebase(file, parent)

    def identify(self, file: File, identifier: uuid.UUID) -> Iterable[Change]:
        from imagekit.formats.vhdx_change import identify

        return identify(file, identifier)

    def absorb(self, file: File, child: DiskImage) -> Iterable[Change]:
        from imagekit.formats.vhdx_change import absorb

        return absorb(file, child)


FORMAT = VhdxFormat()
