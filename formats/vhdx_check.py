"""Checks of a whole VHDX.

Opening a VHDX checks what takes no pass over its BAT: signatures, checksums, sizes, regions inside the file and
apart; an image that opens has passed that. This adds that pass: entries that point where no block can be, sector
bitmaps that are missing, blocks and bitmaps on one another's place, states that only old or strange programs write.

Design notes
- A window of the file is looked at in one go: all blocks that begin there, sorted by place, each against the furthest
  end before it. More blocks than have room in a window must overlap, so no more are gathered: memory is bounded
  whatever the BAT says.
- What QEMU left in entries that nobody uses is not damage (vhdx_bat.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from imagekit.errors import CorruptImage
from imagekit.formats.base import Problem, TiB
from imagekit.formats.vhdx_bat import WINDOW, Window
from imagekit.formats.vhdx_header import MAX_FILE, UNIT
from imagekit.formats.vhdx_image import VhdxImage
from imagekit.formats.vhdx_metadata import BITMAP_SIZE, ENTRY_SIZE, OLD_UNMAPPED, PARTIALLY_PRESENT

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MOST = 100
"""Problems of one kind that are listed."""

FILE_WINDOW = 4 * TiB


class _Claims(NamedTuple):
    """What begins in a window of the file: places, ends, and which entry of the BAT each is."""

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    indexes: NDArray[np.int64]


def check(image: VhdxImage) -> list[Problem]:
    """Everything wrong with the structure."""
    problems = [Problem(fact.code, fact.message, fact.offset) for fact in image.facts()]
    entries = list(_entries(image))
    return problems + entries + list(_overlaps(image))


def _windows(image: VhdxImage) -> Iterator[tuple[int, Window | CorruptImage]]:
    """(first block, window) of the whole BAT; the error in place of a window that has one."""
    for number in range(-(-image.geometry.blocks // WINDOW)):
        try:
            yield number * WINDOW, image.bat.window(number)
        except CorruptImage as error:
            yield number * WINDOW, error


def _bitmap(image: VhdxImage, chunk: int) -> int | CorruptImage | None:
    try:
        return image.bat.bitmap(chunk)
    except CorruptImage as error:
        return error


def _entries(image: VhdxImage) -> Iterator[Problem]:
    """What single entries of the BAT say that they should not; at most `MOST` of each kind."""
    import numpy as np

    geometry, listed = image.geometry, dict.fromkeys(("bat-entry", "old-state", "partial-state", "no-bitmap"), 0)
    for first, window in _windows(image):
        found: list[Problem] = []
        if isinstance(window, CorruptImage):
            found.append(Problem("bat-entry", window.message, window.offset))
        else:
            for at in np.flatnonzero(window.states == OLD_UNMAPPED)[:MOST].tolist():
                message = f"block {first + at} has the state 5, of a draft of the format; it reads as zeros"
                found.append(Problem("old-state", message, _place(image, first + at)))
            partial = np.flatnonzero(window.states == PARTIALLY_PRESENT)
            if not geometry.differencing:
                for at in partial[:MOST].tolist():
                    message = f"block {first + at} is partially present, and there is no parent; all of it is read"
                    found.append(Problem("partial-state", message, _place(image, first + at)))
            else:
                for chunk in np.unique((partial + first) // geometry.chunk_ratio).tolist():
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


def _place(image: VhdxImage, block: int) -> int:
    return image.bat_region.offset + image.geometry.payload_index(block) * ENTRY_SIZE


def _bitmap_place(image: VhdxImage, chunk: int) -> int:
    return image.bat_region.offset + image.geometry.bitmap_index(chunk) * ENTRY_SIZE


# --- overlaps ----------------------------------------------------------------------------------------------------


def _overlaps(image: VhdxImage) -> Iterator[Problem]:
    """Blocks and sector bitmaps that share a place in the file; at most `MOST`."""
    import numpy as np

    left, reach, owner = MOST, 0, -1
    for low in range(0, min(image.file.size, MAX_FILE), FILE_WINDOW):
        claims = _gather(image, low)
        order = np.argsort(claims.starts, kind="stable")
        starts, ends, indexes = (part[order] for part in claims)
        if not len(starts):
            continue
        # The furthest end before each, and whose it is; a block may reach in from the window before.
        before = np.maximum.accumulate(np.append(reach, ends[:-1]))
        for at in np.flatnonzero(starts < before)[:left].tolist():
            earlier = owner
            if at:
                candidates = ends[:at] == before[at]
                earlier = int(indexes[:at][candidates][-1]) if candidates.any() else owner
            left -= 1
            yield Problem(
                "overlap",
                f"{_name(image, earlier)} and {_name(image, int(indexes[at]))} overlap at {int(starts[at]):#x}",
                image.bat_region.offset + int(indexes[at]) * ENTRY_SIZE,
            )
        if int(ends.max()) > reach:
            reach, owner = int(ends.max()), int(indexes[int(ends.argmax())])
        if not left:
            return


def _gather(image: VhdxImage, low: int) -> _Claims:
    """What begins in the file from ``low`` on, up to more than there can be room for."""
    import numpy as np

    geometry, high = image.geometry, low + FILE_WINDOW
    none = np.empty(0, np.int64)
    parts = [_Claims(none, none, none)]
    room = min(image.file.size - low, FILE_WINDOW) // geometry.block_size + MOST + 1
    for first, window in _windows(image):
        if isinstance(window, CorruptImage):
            continue
        at = np.flatnonzero((window.offsets >= max(low, UNIT)) & (window.offsets < high))
        starts, blocks = window.offsets[at], at + first
        parts.append(_Claims(starts, starts + geometry.block_size, blocks + blocks // geometry.chunk_ratio))
        room -= len(at)
        if room < 0:
            break
    bitmaps = [
        (offset, geometry.bitmap_index(chunk))
        for chunk in (range(geometry.chunks) if geometry.differencing else ())
        if isinstance(offset := _bitmap(image, chunk), int) and low <= offset < high
    ]
    places = np.array(bitmaps, dtype=np.int64).reshape(-1, 2)
    parts.append(_Claims(places[:, 0], places[:, 0] + BITMAP_SIZE, places[:, 1]))
    return _Claims(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def _name(image: VhdxImage, index: int) -> str:
    """What the BAT entry is about, for messages."""
    chunk, inside = divmod(index, image.geometry.chunk_ratio + 1)
    if inside == image.geometry.chunk_ratio:
        return f"the sector bitmap of chunk {chunk}"
    return f"block {chunk * image.geometry.chunk_ratio + inside}"
