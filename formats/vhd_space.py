"""Room in the file of a dynamic or differencing VHD: where what it holds ends, and where more can be put.

New blocks keep what the file has: data on 4 KiB, as Windows lays it out (vhd_writer.py), or packed sector by sector.
Holes that earlier changes left are not used again.
"""

from __future__ import annotations

from collections.abc import Iterator

from imagekit.formats.base import SECTOR, File, MiB, Write, round_up
from imagekit.formats.vhd import VhdImage, pages
from imagekit.formats.vhd_header import PAGE

PIECE = MiB
"""Bytes of one step or one look, where there are many."""


def end_of_claims(image: VhdImage) -> int:
    """Where the last table or block ends: blocks with all their data, also what a short file lacks of it."""
    assert image.dynamic is not None
    end = max(one.offset + one.length for one in image.metadata() if one.kind != "footer")
    last = max(image.bat(), default=-1)
    if last >= 0:
        end = max(end, last + image.dynamic.bitmap_size + image.dynamic.block_size)
    return round_up(end, SECTOR)


def is_aligned(image: VhdImage) -> bool:
    """Whether data lies on 4 KiB. Where there is none yet, the file's length tells what its maker would do."""
    assert image.dynamic is not None
    if image.dynamic.block_size < PAGE:
        return False
    taken, wanted = False, -image.dynamic.bitmap_size % PAGE
    for _, page in pages(image.bat()):
        taken = True
        if any(start % PAGE != wanted for start in page if start >= 0):
            return False
    return taken or image.file.size % PAGE == 0


def footer_place(end: int, *, aligned: bool) -> int:
    """Where the footer goes when everything ends at ``end``: aligned, where Windows puts the next bitmap."""
    return round_up(end + SECTOR, PAGE) - SECTOR if aligned else round_up(end, SECTOR)


def is_zero(file: File, start: int, end: int, *, most: int | None = None) -> bool:
    """Whether the file holds only zeros there; also False when more than ``most`` bytes must be read to say so."""
    looked_at = 0
    for at, length in file.data_ranges(start, end - start):
        looked_at += length
        if most is not None and looked_at > most:
            return False
        for offset in range(at, at + length, PIECE):
            if any(file.pread(offset, min(PIECE, at + length - offset))):
                return False
    return True


def zeros(start: int, end: int) -> Iterator[Write]:
    """Steps that write zeros there."""
    for at in range(start, end, PIECE):
        yield Write(at, bytes(min(PIECE, end - at)))
