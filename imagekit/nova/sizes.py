"""How large a disk fits: the two ways in which a compute driver counts a flavor's gigabytes.

``virtual``: the guest's disk has exactly as many bytes as the flavor says. ``file``: the *file*, were it full, has at
most as many; the disk is smaller by what the format needs for itself. compute-hyperv counts files, with os-win's
formulas (os_win.utils.storage.virtdisk.vhdutils), which these follow but for one thing: a disk is a whole number of
sectors, so the result is rounded down to one.
"""

from __future__ import annotations

from typing import Literal

from imagekit.errors import UsageError
from imagekit.formats import registry
from imagekit.formats.base import SECTOR, DiskImage, MiB

SizeRule = Literal["virtual", "file"]
SIZE_RULES = ("virtual", "file")

VHD_FOOTER = 512
VHD_OVERHEAD = 2048
"""Footer, its copy and the dynamic header."""
VHD_ENTRY = 4
VHDX_HEADERS = MiB
VHDX_ENTRY = 8


def check_rule(rule: str) -> SizeRule:
    """UsageError for a rule that does not exist."""
    if rule == "virtual":
        return "virtual"
    if rule == "file":
        return "file"
    raise UsageError(f"size rule {rule!r}", hint=f"choose one of: {', '.join(SIZE_RULES)}")


def internal_size(image: DiskImage, file_size: int) -> int:
    """The largest disk, in bytes, whose full file has at most ``file_size``; at least 0.

    ``image`` is a fixed or dynamic VHD or VHDX; of a differencing one ask for its parent.
    """
    info = image.info()
    if info.format == "vhdx":
        return max(0, _vhdx(image, file_size))
    if info.subformat == "fixed":
        size = file_size - VHD_FOOTER
    else:
        block = info.block_size or 2 * MiB
        size = (file_size - VHD_OVERHEAD) * block // (VHD_ENTRY + block)
    return max(0, size // SECTOR * SECTOR)


def _vhdx(image: DiskImage, file_size: int) -> int:
    from imagekit.formats.vhdx_image import VhdxImage

    assert isinstance(image, VhdxImage)
    block, ratio = image.geometry.block_size, image.geometry.chunk_ratio
    taken = VHDX_HEADERS + image.header.log_length + image.metadata_region.length
    room = file_size - taken - VHDX_ENTRY - VHDX_ENTRY // ratio
    size = block * ratio * room // (block * ratio + VHDX_ENTRY * ratio + VHDX_ENTRY)
    return size // block * block


def new_disk_size(format: str, subformat: str | None, file_size: int) -> int:
    """:func:`internal_size` of a disk that imagekit would write in that format."""
    if format == "vhd":
        if subformat == "fixed":
            return (file_size - VHD_FOOTER) // SECTOR * SECTOR
        return (file_size - VHD_OVERHEAD) * (2 * MiB) // (VHD_ENTRY + 2 * MiB) // SECTOR * SECTOR
    if format != registry.find("vhdx").name:
        return file_size
    # Windows' layout: log and metadata 1 MiB each behind the headers; the block size follows from the disk's own.
    for block in (MiB, 2 * MiB, 8 * MiB, 32 * MiB):
        ratio = (1 << 23) * SECTOR // block
        room = file_size - 3 * MiB - VHDX_ENTRY - VHDX_ENTRY // ratio
        size = block * ratio * room // (block * ratio + VHDX_ENTRY * ratio + VHDX_ENTRY) // block * block
        if size // block * VHDX_ENTRY <= 16 * MiB:
            return size
    return size
