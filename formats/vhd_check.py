"""Checks of a whole VHD, and the repairs that are certain.

What opening a VHD checks already (checksums, sizes, every block inside the file) is not repeated here: an image that
opens has passed it. This adds what takes a pass over the table: anything that lies on anything else, and what the
copies of the footer and the names of the parent have wrong. The parent itself is not looked at.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from heapq import merge
from itertools import chain
from operator import attrgetter, sub
from typing import TYPE_CHECKING

from imagekit.errors import CorruptImage, InvalidImage, UnsupportedFeature
from imagekit.formats.base import (
    SECTOR,
    Barrier,
    Change,
    File,
    MiB,
    Problem,
    Range,
    Truncate,
    Write,
    read_exactly,
    round_up,
)
from imagekit.formats.vhd import PAGE_ENTRIES, WINDOW, Footers, VhdImage, pages
from imagekit.formats.vhd_header import FIXED, MAX_ENTRIES, NOT_ALLOCATED
from imagekit.formats.vhd_space import end_of_claims, footer_place, is_aligned, is_zero
from imagekit.formats.words import words32

if TYPE_CHECKING:
    from imagekit.formats.vhd import Offsets

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
MOST_SORTED = 1 << 20
"""Offsets sorted at once, of 40 bytes each: all that a disk of 2 TiB has in blocks of 2 MiB."""
_BITS = MAX_ENTRIES.bit_length()
"""Of a number, behind an offset below 2 TiB. There is room for some ranges besides blocks."""
MOST_ZEROS = 16 * MiB
"""Bytes behind the last block that a repair reads, to know that nothing is there."""


def check(image: VhdImage) -> list[Problem]:
    """Everything wrong with the structure."""
    facts = image.info().facts
    problems = [Problem(fact.code, fact.message, fact.offset) for fact in facts if fact.code in _DAMAGE]
    return problems if image.dynamic is None else [*problems, *_overlaps(image), *_spare(image)]


def _overlaps(image: VhdImage) -> list[Problem]:
    """Blocks, tables and headers that lie on one another; the footer may, on a last block that ends early."""
    header = image.dynamic
    assert header is not None
    bat, length = image.bat(), header.bitmap_size + header.block_size
    others = [one for one in image.metadata() if one.kind != "footer"]
    if len(bat) <= MOST_SORTED and _are_apart(bat, length, others):
        return []

    def name(index: int) -> str:
        return f"block {index}" if index < len(bat) else f"the {others[index - len(bat)].kind}"

    problems: list[Problem] = []
    reach, whose = 0, 0
    for start, index in _in_order(bat, others):
        if start < reach:
            message = f"{name(whose)} and {name(index)} overlap at {start:#x}"
            where = header.bat_offset + 4 * index if index < len(bat) else start
            problems.append(Problem("overlap", message, where))
            if len(problems) == MOST_OVERLAPS:
                break
        end = start + (length if index < len(bat) else others[index - len(bat)].length)
        if end >= reach:
            reach, whose = end, index
    return problems


def _are_apart(bat: Offsets, length: int, others: list[Range]) -> bool:
    """Whether no block touches another one nor anything else: what is true of nearly every disk, found quickly."""
    starts = sorted(chain.from_iterable(page for _, page in pages(bat)))
    del starts[: bisect_left(starts, 0)]
    if min(map(sub, starts[1:], starts), default=length) < length:
        return False
    end = 0
    for one in sorted(others, key=attrgetter("offset")):
        behind = bisect_right(starts, one.offset)
        if one.offset < end or (behind and starts[behind - 1] + length > one.offset):
            return False
        end = one.offset + one.length
        if behind < len(starts) and starts[behind] < end:
            return False
    return True


def _in_order(bat: Offsets, others: list[Range]) -> Iterator[tuple[int, int]]:
    """(offset, number) of all blocks and then of all others, sorted. What is kept has eight bytes for each."""
    parts: list[Iterable[int]] = [sorted(one.offset << _BITS | len(bat) + at for at, one in enumerate(others))]
    keys: list[int] = []
    for first, page in pages(bat):
        keys += [start << _BITS | block for block, start in enumerate(page, first) if start >= 0]
        if len(keys) >= MOST_SORTED // 4:  # a list takes five times as much memory
            parts.append(array("Q", sorted(keys)))
            keys = []
    for key in merge(*parts, sorted(keys)):
        yield key >> _BITS, key & ((1 << _BITS) - 1)


def _spare(image: VhdImage) -> Iterator[Problem]:
    """Entries past the disk's end that lead out of the file: no guest follows them, a disk that is grown would."""
    header = image.dynamic
    assert header is not None
    used = -(-image.virtual_size // header.block_size)
    last = (image.footers.data_end - header.bitmap_size - header.block_size) // SECTOR
    listed = 0
    for first in range(used, header.max_entries, WINDOW):
        count = min(WINDOW, header.max_entries - first) * 4
        raw = read_exactly(image.file, header.bat_offset + first * 4, count, "the BAT")
        for at in range(0, count, PAGE_ENTRIES * 4):
            page = raw[at : at + PAGE_ENTRIES * 4]
            sectors = words32(page, "big")
            if page == page[:4] * len(sectors) and not last < sectors[0] != NOT_ALLOCATED:
                continue
            for block, sector in enumerate(sectors, first + at // 4):
                if last < sector != NOT_ALLOCATED:
                    message = f"block {block}, past the disk's end, should lie at {sector * SECTOR:#x}"
                    yield Problem("outside", message, header.bat_offset + block * 4)
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
