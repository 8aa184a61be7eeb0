"""The file of a dynamic or differencing VHD while its changes are decided: what goes where, and in which order.

Every step leaves a file that opens with the old content or the new:

- The footer's copy at the start is valid throughout; the one at the end is wiped first and restored last. At no time
  do two valid footers disagree.
- The file is made as long as it will be before anything is put behind its old end, and its last sector stays empty:
  a guest's bytes there might look like a footer.
- What is new lies where nothing points to; then one sector is written that makes it count: the footer's copy for
  another size, the header's first sector for a longer table, the entries of a block that moved. A header that
  differs in both of its sectors is written elsewhere too, and the footer's copy points there meanwhile.

Design notes
- Offsets of the table in memory are bytes, of the bitmap; -1 is not allocated.
- A table that outgrows its room moves the blocks behind it to the end of the file, and parent locators as well.
- A differencing disk that grows gets zero blocks for all it grows by: what its parent may have there stays hidden.
  They are holes in the file, but the file is as long as if they were not.
- XenServer's map of full blocks is emptied when blocks come or go: empty, it says nothing and is always right.

Not here: which changes are right for a disk (vhd_change.py, vhd_merge.py), using the holes that moved blocks leave.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from imagekit.errors import UnsupportedFeature
from imagekit.formats.base import SECTOR, Barrier, Change, ParentLink, Truncate, Write, read_exactly, round_up
from imagekit.formats.vhd import VhdImage, pages
from imagekit.formats.vhd_header import (
    BATMAP_COOKIE,
    NO_LOCATOR,
    NOT_ALLOCATED,
    PAGE,
    DynamicHeader,
    Footer,
    Locator,
    batmap,
    batmap_size,
)
from imagekit.formats.vhd_locators import MAX_LENGTH, Name, encode_field
from imagekit.formats.vhd_space import PIECE, end_of_claims, footer_place, is_aligned, is_zero, zeros
from imagekit.formats.words import bits, packed, packed_bits, stretches
from imagekit.records import replace

if TYPE_CHECKING:
    from imagekit.formats.vhd import Offsets

HEADER_SIZE = 1024


class _Move(NamedTuple):
    """A block that has to make room: which one, and the places of its bitmap."""

    block: int
    old: int
    new: int


class Workspace:
    """The file of a dynamic or differencing disk while its changes are decided.

    First everything is given its place (``grow``, ``place``, ``claim``), then the steps are taken from ``begin`` to
    ``finish``. ``bat`` holds the places to be, also of blocks that the file does not have yet.
    """

    def __init__(self, image: VhdImage) -> None:
        assert image.dynamic is not None
        self.image = image
        self.file = image.file
        self.footer: Footer = image.footer
        self.header: DynamicHeader = image.dynamic
        self.bat: Offsets = image.bat()[:]
        self.bitmaps: dict[int, bytes] = {}
        """Bitmaps that are not, or not where, they are in the file as it is."""
        self.aligned = is_aligned(image)
        self._wiped = image.footers.tail is not None
        self._held = image.footers.data_end
        """What the file holds ends here; behind it there are zeros once the footer is wiped."""
        self.end = max(end_of_claims(image), round_up(self._held, SECTOR))
        self._old_count = len(self.bat)
        self._moves: list[_Move] = []
        self._fresh: Sequence[int] | None = None  # blocks of a differencing disk that grows
        self._dirty_rest = False
        self._batmap_at = self._find_batmap()
        self._names: list[tuple[int, bytes]] = []  # (number of a locator, its data)
        self._renamed = self.header  # with the locators that these names are for
        self._entries = self.header.max_entries

    # --- places ----------------------------------------------------------------------------------------------

    def place(self, count: int = 1) -> tuple[int, int]:
        """Room for more blocks behind everything: where the first one's bitmap goes, and the step to the next."""
        bits, block = self.header.bitmap_size, self.header.block_size
        first = round_up(self.end + bits, PAGE) - bits if self.aligned else self.end
        step = round_up(bits, PAGE) + block if self.aligned else bits + block
        if count:
            self.end = first + (count - 1) * step + bits + block
        if self.end // SECTOR >= NOT_ALLOCATED:
            raise UnsupportedFeature(
                f"the file would have {self.end} bytes; a VHD's blocks lie in the first 2 TiB",
                hint="convert it to VHDX",
                path=self.file.name,
            )
        return first, step

    def place_blocks(self, blocks: Sequence[int]) -> None:
        """Give each of the blocks, which have none, a place."""
        for block, offset in zip(blocks, count(*self.place(len(blocks))), strict=False):
            self.bat[block] = offset

    def claim(self, length: int) -> int:
        """Room for something else, behind everything."""
        unit = PAGE if self.aligned else SECTOR
        at = round_up(self.end, unit)
        self.end = at + round_up(length, unit)
        return at

    def bitmap(self, block: int) -> bytes:
        """The sector bitmap of a block that has one, as it is to be so far."""
        if block in self.bitmaps:
            return self.bitmaps[block]
        if block >= self._old_count:
            return b"\xff" * self.header.bitmap_size
        return read_exactly(self.file, self.bat[block], self.header.bitmap_size, "a sector bitmap")

    def grow(self, size: int) -> None:
        """Find places for all that a disk of ``size`` bytes needs."""
        block = self.header.block_size
        needed = -(-size // block)
        first, inside = divmod(self.image.virtual_size, block)
        if inside and self.bat[first] >= 0:
            data = self.bat[first] + self.header.bitmap_size
            self._dirty_rest = not is_zero(self.file, data + inside, min(data + block, self._held))
        self.bat.extend(array("q", [-1]) * (needed - len(self.bat)))
        if needed > self.header.max_entries:
            self._make_room(needed)
        if self.image.parent is not None:
            # An array: a list of the numbers would take ten times as much.
            self._fresh = array("I", (block for block in range(first, needed) if self.bat[block] < 0))
            self.place_blocks(self._fresh)

    def _make_room(self, entries: int) -> None:
        """Move what lies where a table of so many entries needs to be."""
        start, end = self.header.bat_offset, round_up(self.header.bat_offset + entries * 4, SECTOR)
        if self._batmap_at is not None:
            self._batmap_at, end = end, end + batmap_size(entries)
        self.end = max(self.end, end)
        for one in self.image.metadata():
            if one.kind in ("footer copy", "dynamic header") and start < one.offset < end:
                raise UnsupportedFeature(
                    f"the {one.kind} lies at {one.offset:#x}, where the longer table has to be",
                    hint="convert it to a new file with --size",
                    path=self.file.name,
                )
        blocks = [block for first, page in pages(self.bat) for block, at in enumerate(page, first) if 0 <= at < end]
        first, step = self.place(len(blocks))
        for number, block in enumerate(blocks):
            self.bitmaps[block] = self.bitmap(block)
            self._moves.append(_Move(block, self.bat[block], first + number * step))
            self.bat[block] = first + number * step
        locators = list(self.header.locators)
        for number, old in enumerate(locators):
            if self._is_sound(old) and old.offset < end and old.offset + old.length > start:
                self._names.append((number, read_exactly(self.file, old.offset, old.length, "a parent locator")))
                room = round_up(old.length, SECTOR)
                locators[number] = Locator(old.code, room, old.length, self.claim(room))
        self._renamed = replace(self.header, locators=tuple(locators))
        self._entries = entries

    def _is_sound(self, locator: Locator) -> bool:
        return 0 < locator.length <= MAX_LENGTH and locator.offset + locator.length <= self.file.size

    def _find_batmap(self) -> int | None:
        """Where XenServer's map of full blocks is, if there is one and nothing else claims its place."""
        at = round_up(self.header.bat_offset + self.header.max_entries * 4, SECTOR)
        if not self.footer.is_xen or self.file.pread(at, len(BATMAP_COOKIE)) != BATMAP_COOKIE:
            return None
        end = at + batmap_size(self.header.max_entries)
        lowest = max(0, at - self.header.bitmap_size - self.header.block_size + 1)
        taken = any(lowest <= start < end for start in self.bat)
        others = (one for one in self.image.metadata() if one.offset < end and one.offset + one.length > at)
        return None if taken or any(others) else at

    def name_parent(self, names: Sequence[Name], link: ParentLink) -> None:
        """Find places for the names of another parent: where the old ones are, as far as they fit there."""
        rooms = self._rooms()
        locators = [NO_LOCATOR] * 8
        for number, (code, name) in enumerate(names):
            data = name
            fitting = sorted((old.code != code, room, old.offset) for old, room in rooms if room >= len(name))
            if fitting:
                _, room, at = fitting[0]
                old = next(old for old, _ in rooms if old.offset == at)
                rooms = [one for one in rooms if one[0] is not old]
                data = name.ljust(min(room, round_up(max(old.length, len(name)), SECTOR)), b"\0")
            else:
                room = round_up(len(name), PAGE)
                at = self.claim(room)
            locators[number] = Locator(code, room, len(name), at)
            self._names.append((number, data))
        self._renamed = replace(
            self.header,
            parent_id=link.identity,
            parent_timestamp=0,
            parent_name=encode_field(link, xen=self.footer.is_xen),
            locators=tuple(locators),
        )

    def _rooms(self) -> list[tuple[Locator, int]]:
        """Locators with the room that each has, in bytes, whole sectors: its own, up to whatever comes next."""
        starts = [one.offset for one in self.image.metadata()]
        rooms = []
        for one in self.header.locators:
            if self._is_sound(one) and one.offset % SECTOR == 0:
                after = [start for start in starts if start > one.offset]
                after += [self._held, min((at for at in self.bat if at > one.offset), default=self._held)]
                rooms.append((one, min(one.room, min(after) - one.offset) // SECTOR * SECTOR))
        return [one for one in rooms if one[1]]

    # --- steps -----------------------------------------------------------------------------------------------

    @property
    def _footer_at(self) -> int:
        return footer_place(self.end, aligned=self.aligned)

    @property
    def _spare(self) -> int:
        """Room for a second header and its names while they are exchanged; cut off in the end."""
        return self._footer_at + SECTOR

    def begin(self) -> Iterator[Change]:
        """Leave the footer's copy as the only one, and make the file as long as it will have to be."""
        if self.image.footers.head != self.footer:
            yield from (Write(0, self.footer.pack()), Barrier())
        if self._wiped:
            yield from (Write(self._held, bytes(SECTOR)), Barrier())
        size = self._spare
        if self._names:
            # Its last sector stays empty, so that no name can be a footer.
            size += HEADER_SIZE + sum(round_up(len(data), SECTOR) for _, data in self._names) + SECTOR
        if size > self._held + SECTOR or not self._wiped:
            yield from (Truncate(size), Barrier())

    def move_blocks(self) -> Iterator[Change]:
        """Copy what has to make room, then point to the copies."""
        size = self.header.bitmap_size + self.header.block_size
        for move in self._moves:
            held = min(size, self._held - move.old)
            for at in range(0, held, PIECE):
                data = read_exactly(self.file, move.old + at, min(PIECE, held - at), "a block")
                yield Write(move.new + at, data)
        if self._moves:
            yield Barrier()
            for move in self._moves:
                yield self._entry(move.block)
            yield Barrier()

    def _entry(self, first: int, count: int = 1) -> Write:
        """Entries of the BAT as they are to be."""
        entries = self.bat[first : first + count]
        sectors = array("I", [at // SECTOR if at >= 0 else NOT_ALLOCATED for at in entries])
        return Write(self.header.bat_offset + 4 * first, packed(sectors, "big"))

    def write_entries(self, blocks: Iterable[int]) -> Iterator[Change]:
        """The entries of the blocks, sorted, neighbours in one step."""
        most = PIECE // 4
        for first, length in stretches(blocks):
            for at in range(0, length, most):
                yield self._entry(first + at, min(most, length - at))

    def extend_table(self) -> Iterator[Change]:
        """Empty entries for the blocks that the disk did not have, then the header that counts them."""
        if self._names:
            yield from self.switch_names()
        table = self.header.bat_offset
        longer = self._entries > self.header.max_entries
        end = round_up(table + self._entries * 4, SECTOR) if longer else table + 4 * len(self.bat)
        yield from self._empty_entries(table + 4 * self._old_count, end)
        yield from self._clear_batmap()
        yield Barrier()
        if longer:
            yield from self._count_entries()

    def drop_blocks(self, count: int) -> Iterator[Change]:
        """Empty the entries of all blocks but the first ``count``, then cut the table: some readers go by its length.

        Only when the disk does not have these blocks any more.
        """
        table = self.header.bat_offset
        yield from self._empty_entries(table + 4 * count, table + 4 * self._old_count)
        self._entries = count
        if self._batmap_at is not None:
            self._batmap_at = round_up(table + 4 * count, SECTOR)
        yield from self._clear_batmap()
        yield Barrier()
        yield from self._count_entries()

    def _count_entries(self) -> Iterator[Change]:
        """The header with another number of entries: all that differs stands in its first sector."""
        self.header = replace(self.header, max_entries=self._entries)
        yield from (Write(self.footer.data_offset, self.header.pack()[:SECTOR]), Barrier())

    @staticmethod
    def _empty_entries(start: int, end: int) -> Iterator[Change]:
        for at in range(start, end, PIECE):
            yield Write(at, b"\xff" * min(PIECE, end - at))

    def _clear_batmap(self) -> Iterator[Change]:
        if self._batmap_at is not None:
            yield Write(self._batmap_at, batmap(self._batmap_at, self._entries))

    def switch_names(self) -> Iterator[Change]:
        """Put the header with the new locators in force, by way of a second header with names of its own."""
        new, at, spare = self._renamed, self.footer.data_offset, self._spare
        locators, place = list(new.locators), spare + HEADER_SIZE
        copies: list[Change] = []
        for number, data in self._names:
            locators[number] = replace(new.locators[number], offset=place)
            copies.append(Write(place, data))
            place += round_up(len(data), SECTOR)
        yield from (Write(spare, replace(new, locators=tuple(locators)).pack()), *copies, Barrier())
        yield from (Write(0, replace(self.footer, data_offset=spare).pack()), Barrier())
        yield from (Write(new.locators[number].offset, data) for number, data in self._names)
        yield from (Write(at, new.pack()), Barrier())
        yield from (Write(0, self.footer.pack()), Barrier())
        self.header = new

    def blank_growth(self) -> Iterator[Change]:
        """Make zeros of what the guest is to see for the first time. It does not see it yet."""
        first, inside = divmod(self.image.virtual_size, self.header.block_size)
        sectors = self.header.block_size // SECTOR
        if inside and first < self._old_count and self.image.bat()[first] >= 0:
            data = self.bat[first] + self.header.bitmap_size
            if self._dirty_rest:
                yield from zeros(data + inside, data + self.header.block_size)
            if self._fresh is not None:
                self.bitmaps[first] = self.marked(self.bitmap(first), [(inside // SECTOR, sectors)])
                yield Write(self.bat[first], self.bitmaps[first])
            yield Barrier()
        if self._fresh is None:
            return
        for block in self._fresh:
            if block < self._old_count:  # the parent shows through where the disk ended so far
                self.bitmaps[block] = self.marked(bytes(self.header.bitmap_size), [(inside // SECTOR, sectors)])
            yield Write(self.bat[block], self.bitmap(block))
        yield Barrier()
        yield from self.write_entries(self._fresh)
        yield Barrier()

    def marked(self, bitmap: bytes, sectors: Iterable[tuple[int, int]]) -> bytes:
        """The bitmap with the bits of these sectors, (first, end), set."""
        digits = bits(bitmap, self.footer.bit_order)
        for first, end in sectors:
            digits[first:end] = b"1" * (end - first)
        return packed_bits(digits, self.footer.bit_order)

    def switch_footer(self, footer: Footer) -> Iterator[Change]:
        """Make another footer the one that counts."""
        self.footer = footer
        yield from (Write(0, footer.pack()), Barrier())

    def finish(self) -> Iterator[Change]:
        """Put the footer back at the end."""
        if self._names:
            yield from (Truncate(self._footer_at + SECTOR), Barrier())
        yield from (Write(self._footer_at, self.footer.pack()), Barrier())
