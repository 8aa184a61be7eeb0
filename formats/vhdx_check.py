"""Checks of a whole VHDX.

Opening a VHDX checks what takes no pass over its BAT: signatures, checksums, sizes, regions inside the file and
apart; an image that opens has passed that. This adds that pass: entries that point where no block can be, sector
bitmaps that are missing, blocks and bitmaps on one another's place, states that only old or strange programs write.

Design notes
- A window of the file is looked at in one go: all blocks that begin there, sorted by place, each against the furthest
  end before it. More blocks than have room in a window must overlap, so no more are gathered: memory is bounded
  whatever the BAT says. What is gathered is one number each, and sorted part by part.
- What QEMU left in entries that nobody uses is not damage (vhdx_bat.py).
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from itertools import islice, pairwise
from typing import TYPE_CHECKING

from imagekit.errors import CorruptImage
from imagekit.formats.base import Problem, TiB
from imagekit.formats.vhdx_bat import WINDOW, Window
from imagekit.formats.vhdx_header import MAX_FILE, UNIT
from imagekit.formats.vhdx_image import VhdxImage
from imagekit.formats.vhdx_metadata import BITMAP_SIZE, ENTRY_SIZE, OLD_UNMAPPED, PARTIALLY_PRESENT
from imagekit.formats.words import is_zero, used

if TYPE_CHECKING:
    from imagekit.formats.words import Words

MOST = 100
"""Problems of one kind that are listed."""

FILE_WINDOW = 4 * TiB

PARTS = 16
"""Parts of a window of the file that are sorted one after another."""

# A claim is one number: the place in its upper bits, the number of a block, or `_BITMAP` and that of a chunk, below.
# Sorted, claims are in the order of their places, and blocks before the sector bitmap that begins where they do.
_WHAT_BITS = 29
_BITMAP = 1 << _WHAT_BITS - 1
_SHIFT = _WHAT_BITS - (UNIT.bit_length() - 1)
_NOWHERE = (-1, -1)


def check(image: VhdxImage) -> list[Problem]:
    """Everything wrong with the structure."""
    problems = [Problem(fact.code, fact.message, fact.offset) for fact in image.facts()]
    reaches: dict[int, tuple[int, int]] = {}
    entries = list(_entries(image, reaches))
    return problems + entries + list(_overlaps(image, reaches))


def _count(image: VhdxImage) -> int:
    """Windows of the BAT."""
    return -(-image.geometry.blocks // WINDOW)


def _window(image: VhdxImage, number: int) -> Window | CorruptImage:
    """A window of the BAT, or the error that it has."""
    try:
        return image.bat.window(number)
    except CorruptImage as error:
        return error


def _bitmap(image: VhdxImage, chunk: int) -> int | CorruptImage | None:
    try:
        return image.bat.bitmap(chunk)
    except CorruptImage as error:
        return error


def _entries(image: VhdxImage, reaches: dict[int, tuple[int, int]]) -> Iterator[Problem]:
    """What single entries of the BAT say that they should not; at most `MOST` of each kind.

    Windows without anything in them are noted in ``reaches``.
    """
    geometry, listed = image.geometry, dict.fromkeys(("bat-entry", "old-state", "partial-state", "no-bitmap"), 0)
    for number in range(_count(image)):
        first, window, found = number * WINDOW, _window(image, number), list[Problem]()
        if isinstance(window, CorruptImage):
            found.append(Problem("bat-entry", window.message, window.offset))
        elif is_zero(window.states):
            reaches[number] = _NOWHERE
        else:
            for at in islice(_positions(window.states, OLD_UNMAPPED), MOST):
                message = f"block {first + at} has the state 5, of a draft of the format; it reads as zeros"
                found.append(Problem("old-state", message, _place(image, first + at)))
            if not geometry.differencing:
                for at in islice(_positions(window.states, PARTIALLY_PRESENT), MOST):
                    message = f"block {first + at} is partially present, and there is no parent; all of it is read"
                    found.append(Problem("partial-state", message, _place(image, first + at)))
            else:
                for chunk in _partial_chunks(image, first, window):
                    if _bitmap(image, chunk) is None:
                        message = f"chunk {chunk} has blocks that are partially present, and no sector bitmap"
                        found.append(Problem("no-bitmap", message, _bitmap_place(image, chunk)))
        for problem in found:
            listed[problem.code] += 1
            if listed[problem.code] <= MOST:
                yield problem
    if geometry.differencing:
        for chunk in range(geometry.chunks):
            bitmap = _bitmap(image, chunk)
            if isinstance(bitmap, CorruptImage):
                yield Problem("bat-entry", bitmap.message, bitmap.offset)


def _positions(states: bytes, state: int) -> Iterator[int]:
    at = states.find(state)
    while at >= 0:
        yield at
        at = states.find(state, at + 1)


def _partial_chunks(image: VhdxImage, first: int, window: Window) -> Iterator[int]:
    """The chunks that have partially present blocks in the window from block ``first``."""
    ratio, stop = image.geometry.chunk_ratio, first + len(window.states)
    for chunk in range(first // ratio, -(-stop // ratio)):
        if PARTIALLY_PRESENT in window.states[max(chunk * ratio - first, 0) : (chunk + 1) * ratio - first]:
            yield chunk


def _place(image: VhdxImage, block: int) -> int:
    return image.bat_region.offset + image.geometry.payload_index(block) * ENTRY_SIZE


def _bitmap_place(image: VhdxImage, chunk: int) -> int:
    return image.bat_region.offset + image.geometry.bitmap_index(chunk) * ENTRY_SIZE


# --- overlaps ----------------------------------------------------------------------------------------------------


def _overlaps(image: VhdxImage, reaches: dict[int, tuple[int, int]]) -> Iterator[Problem]:
    """Blocks and sector bitmaps that share a place in the file; at most `MOST`."""
    left, reach, owner = MOST, 0, 0
    block_size = image.geometry.block_size
    for low in range(0, min(image.file.size, MAX_FILE), FILE_WINDOW):
        for part in _gather(image, low, reaches):
            for claim in sorted(part):
                start, what = (claim >> _WHAT_BITS) * UNIT, claim & ((1 << _WHAT_BITS) - 1)
                if start < reach:  # the furthest end before it; a block may reach in from the window before
                    message = f"{_name(owner)} and {_name(what)} overlap at {start:#x}"
                    yield Problem("overlap", message, _claim_place(image, what))
                    left -= 1
                    if not left:
                        return
                end = start + (BITMAP_SIZE if what & _BITMAP else block_size)
                if end >= reach:
                    reach, owner = end, what


def _gather(image: VhdxImage, low: int, reaches: dict[int, tuple[int, int]]) -> list[Words]:
    """What begins in the file from ``low`` on, in parts of it, up to more than there can be room for.

    ``reaches`` remembers, from one window of the file to the next, the first and last claim of windows of the BAT.
    """
    geometry, edges = image.geometry, [low + FILE_WINDOW * part // PARTS << _SHIFT for part in range(PARTS + 1)]
    parts = [array("Q") for _ in range(PARTS)]
    room = min(image.file.size - low, FILE_WINDOW) // geometry.block_size + MOST + 1
    for number in range(_count(image)):
        lowest, highest = reaches.get(number, (edges[0], edges[0]))
        if highest < edges[0] or lowest >= edges[-1]:
            continue
        claims = _claims(image, number)
        reaches[number] = (claims[0], claims[-1]) if claims else _NOWHERE
        room -= _spread(claims, edges, parts)
        if room < 0:
            break
    if geometry.differencing:
        bitmaps = ((_bitmap(image, chunk), chunk) for chunk in range(geometry.chunks))
        claims = sorted(at << _SHIFT | _BITMAP | chunk for at, chunk in bitmaps if isinstance(at, int))
        _spread(claims, edges, parts)
    return parts


def _claims(image: VhdxImage, number: int) -> list[int]:
    """The blocks of a window that lie in the file, by place."""
    window = _window(image, number)
    if isinstance(window, CorruptImage) or is_zero(window.kinds):
        return []
    first, offsets = number * WINDOW, window.offsets
    return sorted([offsets[at] << _SHIFT | first + at for at in used(offsets)])


def _spread(claims: list[int], edges: list[int], parts: list[Words]) -> int:
    """Add sorted claims to the parts that they begin in; how many those are."""
    cuts = [bisect_left(claims, edge) for edge in edges]
    for part, (start, stop) in zip(parts, pairwise(cuts), strict=True):
        part.fromlist(claims[start:stop])
    return cuts[-1] - cuts[0]


def _claim_place(image: VhdxImage, what: int) -> int:
    return _bitmap_place(image, what ^ _BITMAP) if what & _BITMAP else _place(image, what)


def _name(what: int) -> str:
    """What has the claim, for messages."""
    return f"the sector bitmap of chunk {what ^ _BITMAP}" if what & _BITMAP else f"block {what}"
