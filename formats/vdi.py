"""VDI, VirtualBox' own disk format, for reading: dynamic and static disks.

There is no specification; the layout is that of VirtualBox' VDICore.h, as its files and those of QEMU show it.

    text, header      512 bytes in use
    block map         one number a block of the disk: which block of the data area, or one of two values for none
    data              blocks of 1 MiB, in the order in which they were first written

Design notes
- All integers are little-endian. The map is read in windows, each checked against the file as a whole.
- A static disk has all its blocks, in order, but its map is as good as a dynamic one's, so nothing depends on it.
- Bytes may be missing from the file past the disk's end, nowhere else.

Not here: writing; undo and differencing disks (their parent, known by its id only, is reported; reading is refused).
"""

from __future__ import annotations

import threading
import uuid
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from imagekit.errors import CorruptImage, UnsupportedFeature
from imagekit.formats.base import (
    AS_IS,
    JSON,
    DiskFormat,
    DiskImage,
    Extent,
    File,
    ImageInfo,
    OpenOptions,
    Problem,
    Range,
    Reference,
    Resolver,
    clip,
    merge_extents,
    read_exactly,
)
from imagekit.formats.raw import read_flat
from imagekit.formats.vdi_header import HEAD_BYTES, HEADER_OFFSET, SIGNATURE, SIGNATURE_OFFSET, SUBFORMATS, VdiHeader
from imagekit.formats.words import differing, words32

if TYPE_CHECKING:
    from imagekit.formats.words import Words

FREE, ZERO = 0xFFFFFFFF, 0xFFFFFFFE
"""Map entries of blocks that were never written, and that were discarded; both read as zero."""

NOT_THERE, READS_AS_ZERO = -1, -2
"""What the two are among file offsets."""

TEXTS = (b"<<< Orac", b"<<< Sun ", b"<<< inno", b"<<< QEMU")
"""How the text before the signature begins, by who wrote it: enough of it that no disk begins so."""

WINDOW = 1 << 14
"""Map entries that are read together: 64 KiB of the file."""

WINDOWS_KEPT = 64
LISTED = 100
"""Problems that are put into words."""


class VdiImage(DiskImage):
    def __init__(self, file: File) -> None:
        self.file = file
        self.header = VdiHeader.parse(file.pread(0, HEAD_BYTES))
        self.header.validate(file.size)
        self.virtual_size = self.header.virtual_size
        self._size = file.size
        self._lock = threading.Lock()
        self._cache: OrderedDict[int, Words] = OrderedDict()

    @property
    def container(self) -> File:
        return self.file

    def info(self) -> ImageInfo:
        header = self.header
        features: dict[str, JSON] = {
            "creator": header.text.decode("ascii", "replace").strip("<>\n "),
            "uuid": str(uuid.UUID(bytes_le=header.create_id)),
            "modification-uuid": str(uuid.UUID(bytes_le=header.modify_id)),
            "image-flags": header.flags,
            "blocks-allocated": header.blocks_allocated,
        }
        references = () if header.parent is None else (Reference("parent-file", header.parent, "vdi"),)
        return ImageInfo(
            format="vdi",
            virtual_size=self.virtual_size,
            subformat=SUBFORMATS[header.image_type],
            block_size=header.block_size,
            features=features,
            references=references,
        )

    def _check_readable(self) -> None:
        if self.header.parent is not None:
            raise UnsupportedFeature(
                f"what this disk does not hold is in its parent {self.header.parent!r}, which imagekit does not read",
                hint="clone the disk where it comes from (VBoxManage clonemedium), which makes it one file",
                path=self.file.name,
                offset=76,
            )

    # --- the block map ---------------------------------------------------------------------------------------

    def window(self, number: int) -> Words:
        """The map's entries from ``number * WINDOW`` on that the guest can reach; all of them lie in the file."""
        with self._lock:
            found = self._cache.get(number)
            if found is not None:
                self._cache.move_to_end(number)
                return found
        found = self.entries(number, self.header.blocks_needed)
        self._check_places(number * WINDOW, found)
        with self._lock:
            self._cache[number] = found
            while len(self._cache) > WINDOWS_KEPT:
                self._cache.popitem(last=False)
        return found

    def entries(self, number: int, end: int) -> Words:
        """The map's entries from ``number * WINDOW`` on, before ``end``, as stored."""
        first = number * WINDOW
        count = min(WINDOW, end - first)
        raw = read_exactly(self.file, self.header.map_offset + first * 4, count * 4, "the block map")
        return words32(raw, "little")

    def _check_places(self, first: int, entries: Words) -> None:
        """CorruptImage where one of the blocks from ``first`` on does not lie in the file with all of its bytes."""
        header = self.header
        size, room = header.block_size, self._size - header.data_offset
        last = header.blocks_needed - 1
        rest = self.virtual_size - last * size  # bytes of the last block
        for entry in entries[-1:] if _is_one_run(entries) else set(entries):
            if entry < ZERO and (entry + 1) * size > room:
                break
        else:
            return
        for index, entry in enumerate(entries):
            seen = rest if first + index == last else size
            if entry < ZERO and entry * size + seen > room:
                at = header.data_offset + entry * size
                raise CorruptImage(
                    f"block {first + index} should lie at {at:#x}..{at + seen:#x}, but the file ends at "
                    f"{self._size:#x}",
                    hint="the file looks damaged or truncated; fetch it again and compare its checksum",
                    path=self.file.name,
                    offset=header.map_offset + (first + index) * 4,
                )

    # --- the guest's view ------------------------------------------------------------------------------------

    def _runs(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(start, length, file offset or a negative value) that cover exactly the range."""
        header, size = self.header, self.header.block_size
        while start < end:
            number, inside = divmod(start // size, WINDOW)
            base = number * WINDOW * size
            part = self.window(number)[inside : -(-(end - base) // size)]
            for one, other in _runs_of(part):
                stop = min(end, base + (inside + other) * size)
                if part[one] < ZERO:
                    place = header.data_offset + part[one] * size + start - base - (inside + one) * size
                else:
                    place = NOT_THERE if part[one] == FREE else READS_AS_ZERO
                yield start, stop - start, place
                start = stop

    def extents(self, start: int = 0, length: int | None = None) -> Iterator[Extent]:
        self._check_readable()
        return merge_extents(self._extents(*clip(start, length, self.virtual_size)))

    def _extents(self, start: int, end: int) -> Iterator[Extent]:
        for begin, length, place in self._runs(start, end):
            if place < 0:
                yield Extent(begin, length, data=False, zero=True, present=place == READS_AS_ZERO)
            else:
                yield Extent(begin, length, data=True, zero=False, offset=place)

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        self._check_readable()
        for begin, length, place in self._runs(offset, offset + len(buffer)):
            part = buffer[begin - offset : begin - offset + length]
            if place < 0:
                part[:] = bytes(length)
            else:
                read_flat(self.file, place, part)

    def ranges(self) -> Iterator[Range]:
        header = self.header
        yield Range(0, HEADER_OFFSET + header.header_size, "header")
        yield Range(header.map_offset, header.blocks * 4, "block map")
        for _, length, place in self._runs(0, self.virtual_size):
            if place >= 0:
                yield Range(place, length, "data")

    def close(self) -> None:
        self.file.close()


def _is_one_run(entries: Words) -> bool:
    """Whether these blocks follow each other in the file, or there is none of them, for one reason."""
    first, count = entries[0], len(entries)
    if first >= ZERO:
        return entries.tobytes() == entries[:1].tobytes() * count
    if first + count - 1 != entries[-1] or entries[-1] >= ZERO:
        return False
    return entries.tobytes() == array("I", range(first, first + count)).tobytes()  # faster than array == array


def _runs_of(entries: Words) -> Iterator[tuple[int, int]]:
    """(first, end) of the runs of blocks that are one, in order."""
    if _is_one_run(entries):
        return iter(((0, len(entries)),))
    # The same for all of a run: the entry that the window's first block would have in it, or a low number.
    keys = [entry - at if entry < ZERO else -entry for at, entry in enumerate(entries)]
    return pairwise([0, *(at + 1 for at in differing(keys[:-1], keys[1:])), len(keys)])


class _Taken:
    """Which blocks of the data area some map entry leads to already: a bit each, so at most 128 MiB."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._bits = bytearray(blocks // 8 + 1)

    def again(self, slots: Sequence[int]) -> list[int]:
        """Take these; indexes of those that were taken before, here or in an earlier call."""
        again, bits = [], self._bits
        for index, slot in enumerate(slots):
            place, bit = slot >> 3, 1 << (slot & 7)
            if bits[place] & bit:
                again.append(index)
            else:
                bits[place] |= bit
        return again

    def take_run(self, first: int, count: int) -> bool:
        """Take the slots from ``first`` on, unless some of them were taken before."""
        start, end = first >> 3, (first + count + 7) >> 3
        have, wanted = int.from_bytes(self._bits[start:end], "little"), ((1 << count) - 1) << (first & 7)
        if have & wanted:
            return False
        self._bits[start:end] = (have | wanted).to_bytes(end - start, "little")
        return True


def check(image: VdiImage) -> list[Problem]:
    """Everything wrong with the structure: blocks that two map entries lead to, and a wrong number of blocks."""
    header, problems, total = image.header, list[Problem](), 0
    found = {"outside": 0, "overlap": 0}
    room = max(0, -(-(image.file.size - header.data_offset) // header.block_size))
    taken = _Taken(min(room, header.blocks))

    def report(code: str, blocks: list[int], what: str) -> None:
        room = max(LISTED - len(problems), int(not found[code]))  # none of one kind hides those of another
        found[code] += len(blocks)
        for block in blocks[:room]:
            problems.append(Problem(code, f"block {block} {what}", header.map_offset + block * 4))

    for number in range(-(-header.blocks // WINDOW)):
        if number * WINDOW < header.blocks_needed:
            image.window(number)  # its errors are what is found
        entries, first = image.entries(number, header.blocks), number * WINDOW
        if _is_one_run(entries):
            if entries[0] >= ZERO:
                continue
            if entries[-1] < taken.blocks and taken.take_run(entries[0], len(entries)):
                total += len(entries)
                continue
        slots = [entry for entry in entries if entry < ZERO]
        total += len(slots)
        inside = [slot for slot in slots if slot < taken.blocks]
        again = taken.again(inside)
        if again or len(inside) < len(slots):
            outside = [first + at for at, entry in enumerate(entries) if taken.blocks <= entry < ZERO]
            blocks = [first + at for at, entry in enumerate(entries) if entry < taken.blocks]
            report("outside", outside, f"lies behind the {taken.blocks} blocks that the data can have")
            report("overlap", [blocks[at] for at in again], "lies where another one lies")
    if sum(found.values()) > len(problems):
        return [*problems, Problem("more", f"and {sum(found.values()) - len(problems)} more blocks")]
    if total != header.blocks_allocated:
        what = f"the header counts {header.blocks_allocated} blocks, the block map {total}"
        problems.append(Problem("block-count", what, 388))
    return problems


class VdiFormat(DiskFormat):
    name = "vdi"
    suffixes = (".vdi",)

    def probe(self, file: File) -> str | None:
        head = file.pread(0, SIGNATURE_OFFSET + 4)
        if head[SIGNATURE_OFFSET:] == SIGNATURE.to_bytes(4, "little"):
            return f"VDI signature at {SIGNATURE_OFFSET:#x}"
        # What begins like one is none any more, and no raw disk.
        return "the text of a VDI at 0" if head.startswith(TEXTS) else None

    def open(self, file: File, *, resolver: Resolver | None = None, options: OpenOptions = AS_IS) -> VdiImage:
        return VdiImage(file)

    def check(self, file: File) -> list[Problem]:
        return check(self.open(file))


FORMAT = VdiFormat()
