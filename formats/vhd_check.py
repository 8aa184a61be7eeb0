"""Checks of a whole VHD, and the repairs that are certain.

What opening a VHD checks already (checksums, sizes, every block inside the file) is not repeated here: an image that
opens has passed it. This adds what takes a pass over the table: blocks that overlap, and copies that are missing.
"""

from __future__ import annotations

from imagekit.formats.base import SECTOR, Barrier, Change, File, Problem, Write
from imagekit.formats.vhd import Footers, VhdImage
from imagekit.formats.vhd_header import DIFFERENCING, FIXED

_DAMAGE = {
    "footers-differ",
    "original-size-larger",
    "footer-missing",
    "footer-copy-missing",
    "footers-differ-slightly",
}


def check(image: VhdImage) -> list[Problem]:
    """Everything wrong with the structure."""
    problems = [Problem(fact.code, fact.message, fact.offset) for fact in image.footers.facts if fact.code in _DAMAGE]
    if image.dynamic is None or image.footer.disk_type == DIFFERENCING:
        return problems
    import numpy as np

    bat = image.bat()
    blocks = np.flatnonzero(bat >= 0)
    order = blocks[np.argsort(bat[blocks], kind="stable")]
    starts = bat[order]
    ends = starts + image.dynamic.bitmap_size + image.dynamic.block_size
    for at in np.flatnonzero(starts[1:] < ends[:-1])[:100].tolist():
        problems.append(
            Problem(
                "overlap",
                f"blocks {int(order[at])} and {int(order[at + 1])} overlap at {int(starts[at + 1]):#x}",
                image.dynamic.bat_offset + int(order[at + 1]) * 4,
            )
        )
    return problems


def repair(file: File) -> list[Change]:
    """Write the footer that counts over a copy that is missing or damaged."""
    footers = Footers(file)
    if footers.footer.disk_type == FIXED:
        return []
    data = footers.footer.pack()
    codes = {fact.code for fact in footers.facts}
    if "footer-copy-missing" in codes or "footers-differ-slightly" in codes:
        return [Write(0, data), Barrier()]
    if "footer-missing" in codes:
        # Behind the last byte, on a sector: nothing that may be data is written over.
        return [Write(-(-file.size // SECTOR) * SECTOR, data), Barrier()]
    return []
