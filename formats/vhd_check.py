"""Checks of a whole VHD, and the repairs that are certain.

What opening a VHD checks already (checksums, sizes, every block inside the file) is not repeated here: an image that
opens has passed it. This adds what takes a pass over the table: anything that lies on anything else, and what the
copies of the footer and the names of the parent have wrong. The parent itself is not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator

from imagekit.errors import CorruptImage, InvalidImage, UnsupportedFeature
from imagekit.formats.base import SECTOR, Barrier, Change, File, MiB, Problem, Truncate, Write, read_exactly, round_up
from imagekit.formats.vhd import WINDOW, Footers, VhdImage
from imagekit.formats.vhd_header import FIXED, NOT_ALLOCATED
from imagekit.formats.vhd_space import end_of_claims, footer_place, is_aligned, is_zero

_DAMAGE = {
    "footers-differ",
    "original-size-larger",
    "footer-missing",
    "footer-copy-missing",
    "footers-differ-slightly",
    "parent-locator-damaged",
    "parent-unnamed",
}
MOST_OVERLAPS = MOST_OUTSIDE = 100
"""A table full of them gives a list that can still be read."""
MOST_ZEROS = 16 * MiB
"""Bytes behind the last block that a repair reads, to know that nothing is there."""


def check(image: VhdImage) -> list[Problem]:
    """Everything wrong with the structure."""
    facts = image.info().facts
    problems = [Problem(fact.code, fact.message, fact.offset) for fact in facts if fact.code in _DAMAGE]
    return problems if image.dynamic is None else [*problems, *_overlaps(image), *_spare(image)]


def _overlaps(image: VhdImage) -> list[Problem]:
    """Blocks, tables and headers that lie on one another; the footer may, on a last block that ends early."""
    import numpy as np

    header = image.dynamic
    assert header is not None
    others = [one for one in image.metadata() if one.kind != "footer"]
    blocks = np.flatnonzero(image.bat() >= 0)
    starts = np.concatenate((image.bat()[blocks], np.array([one.offset for one in others], np.int64)))
    lengths = np.full(len(starts), header.bitmap_size + header.block_size, np.int64)
    lengths[len(blocks) :] = [one.length for one in others]
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], (starts + lengths)[order]
    reach = np.maximum.accumulate(ends)
    whose = np.maximum.accumulate(np.where(ends == reach, np.arange(len(ends)), 0))

    def name(at: int) -> str:
        index = int(order[at])
        return f"block {blocks[index]}" if index < len(blocks) else f"the {others[index - len(blocks)].kind}"

    problems = []
    for at in (np.flatnonzero(starts[1:] < reach[:-1])[:MOST_OVERLAPS] + 1).tolist():
        message = f"{name(int(whose[at - 1]))} and {name(at)} overlap at {int(starts[at]):#x}"
        index = int(order[at])
        where = header.bat_offset + 4 * int(blocks[index]) if index < len(blocks) else int(starts[at])
        problems.append(Problem("overlap", message, where))
    return problems


def _spare(image: VhdImage) -> Iterator[Problem]:
    """Entries past the disk's end that lead out of the file: no guest follows them, a disk that is grown would."""
    import numpy as np

    header = image.dynamic
    assert header is not None
    used = -(-image.virtual_size // header.block_size)
    length, listed = header.bitmap_size + header.block_size, 0
    for first in range(used, header.max_entries, WINDOW):
        count = min(WINDOW, header.max_entries - first) * 4
        raw = read_exactly(image.file, header.bat_offset + first * 4, count, "the BAT")
        sectors = np.frombuffer(raw, ">u4").astype(np.int64)
        outside = (sectors != NOT_ALLOCATED) & (sectors * SECTOR + length > image.footers.data_end)
        for at in np.flatnonzero(outside)[: MOST_OUTSIDE - listed].tolist():
            message = f"block {first + at}, past the disk's end, should lie at {int(sectors[at]) * SECTOR:#x}"
            yield Problem("outside", message, header.bat_offset + (first + at) * 4)
            listed += 1
        if listed == MOST_OUTSIDE:
            return


def repair(file: File) -> list[Change]:
    """Write the footer that counts over a copy that is missing or damaged."""
    footers = Footers(file)
    if footers.footer.disk_type == FIXED:
        return []
    data = footers.footer.pack()
    codes = {fact.code for fact in footers.facts}
    if "footer-copy-missing" in codes or "footers-differ-slightly" in codes:
        return [Write(0, data), Barrier()]
    if "footer-missing" not in codes:
        return []
    place = _missing_footer_place(file)
    shorten: list[Change] = [Truncate(place + SECTOR), Barrier()] if place + SECTOR < file.size else []
    return [*shorten, Write(place, data), Barrier()]


def _missing_footer_place(file: File) -> int:
    """Where it was when there are only zeros now; else behind the last byte, so that no data is written over."""
    behind = round_up(file.size, SECTOR)
    try:
        image = VhdImage(file)
        end = end_of_claims(image)
        place = footer_place(end, aligned=is_aligned(image))
    except (CorruptImage, InvalidImage, UnsupportedFeature):
        return behind
    return place if is_zero(file, end, file.size, most=MOST_ZEROS) else behind
