"""VHD (also called VPC): fixed, dynamic and differencing disks, read.

Follows Microsoft's "Virtual Hard Disk Image Format Specification" 1.0; where Windows' own files differ from it or go
beyond it, the files win.

    fixed           data, footer
    dynamic         footer copy at 0, dynamic header at 512, BAT, blocks, footer
    differencing    the same, with the names of the parent between header and blocks
    block           sector bitmap (one bit a sector, rounded up to 512), then the data

Design notes
- All integers are big-endian. The BAT holds the 512-byte sector of each block's bitmap, all ones when not allocated.
- The guest's size is the current size, except for two creators that rounded to a geometry (`CHS_CREATORS`), or
  where the caller says which one counts.
- In a dynamic disk the bitmap is not consulted: every writer leaves zeros under a clear bit. In a differencing disk
  a set bit is a sector of this file, a clear one a sector of the parent. Of a bitmap only the part asked for is read;
  none is kept.
- The parent is opened at first need, through the caller's resolver (chain.py); its names are in vhd_locators.py.

Not here: writing (vhd_writer.py), changes in place (vhd_change.py), checks of a whole file (vhd_check.py).
"""

from __future__ import annotations

import sys
import uuid
from array import array
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from imagekit.errors import CorruptImage, InvalidImage, UnsupportedFeature
from imagekit.formats.base import (
    AS_IS,
    JSON,
    SECTOR,
    Change,
    DiskFormat,
    DiskImage,
    Extent,
    Fact,
    File,
    ImageInfo,
    ImageWriter,
    MiB,
    OpenOptions,
    ParentLink,
    Problem,
    Range,
    Reference,
    Resolver,
    WriterOptions,
    clip,
    merge_extents,
    read_exactly,
)
from imagekit.formats.chain import Below
from imagekit.formats.raw import flat_extents, read_flat
from imagekit.formats.vhd_header import (
    DIFFERENCING,
    FIXED,
    FOOTER_COOKIE,
    MAX_SIZE,
    NOT_ALLOCATED,
    SUBFORMATS,
    DynamicHeader,
    Footer,
    check_version,
)
from imagekit.formats.vhd_locators import ParentNames, read_names
from imagekit.formats.words import bits, words32

if TYPE_CHECKING:
    from imagekit.formats.words import Words

    Offsets: TypeAlias = array[int]

WINDOW = 1 << 16
"""Blocks whose entries are read together."""
PAGE_ENTRIES = 1024
"""Entries that cost next to nothing where they are all alike: 4 KiB, less than a file stores in one piece."""
PART = 8 * MiB
"""Guest bytes whose sector bits are looked at together: every other sector may lie elsewhere."""


_SIGN = 7 if sys.byteorder == "little" else 0
"""Where in an offset its highest byte is: 0xFF in -1, zero in every other."""
_CLEAR, _SET = b"01"


def pages(bat: Offsets) -> Iterator[tuple[int, Offsets]]:
    """(first block, offsets) of the parts of a table that have any block at all."""
    nothing = array("q", [-1]) * PAGE_ENTRIES
    for first in range(0, len(bat), PAGE_ENTRIES):
        page = bat[first : first + PAGE_ENTRIES]
        if page != nothing[: len(page)]:
            yield first, page


class Footers:
    """The footer that counts, from both ends of a file, and what was odd about them."""

    def __init__(self, file: File) -> None:
        size = file.size
        self.facts: list[Fact] = []
        self.tail_offset = size - (SECTOR - 1 if size % SECTOR == SECTOR - 1 else SECTOR)
        problems: list[InvalidImage | CorruptImage] = []
        self.head = self._parse(file, 0, problems)
        self.tail = self._parse(file, self.tail_offset, problems) if self.tail_offset > 0 else None
        # A fixed disk has no copy: what looks like one at 0 is the guest's.
        if self.tail is not None and self.tail.disk_type == FIXED:
            self.head = None
        elif self.tail is None and self.head is not None and self.head.disk_type == FIXED:
            missing = "a fixed disk ends in its footer, and there is none"
            problems.insert(0, CorruptImage(missing, offset=max(0, self.tail_offset)))
            self.head = None
        found = self.tail or self.head
        if found is None:
            error = problems[0]
            error.path = file.name
            error.hint = "both copies are lost; fetch the file again, or say -f raw if it is none"
            raise error
        self.footer = found
        self.data_end = self.tail_offset if self.tail is not None else size
        self._compare()

    @staticmethod
    def _parse(file: File, offset: int, problems: list[InvalidImage | CorruptImage]) -> Footer | None:
        data = file.pread(offset, SECTOR)
        try:
            return Footer.parse(data, offset=offset)
        except CorruptImage as error:
            problems.insert(0, error)  # a damaged footer says more than none at all
        except InvalidImage as error:
            problems.append(error)
        return None

    def _compare(self) -> None:
        footer = self.footer
        if self.tail is None:
            self.facts.append(
                Fact(
                    "footer-missing",
                    "no valid footer at the file's end; its copy at 0 counts",
                    self.tail_offset,
                )
            )
        elif footer.disk_type != FIXED and self.head is None:
            self.facts.append(Fact("footer-copy-missing", "the footer's copy at 0 is missing or damaged", 0))
        elif self.head is not None and self.head != self.tail:
            if self.head.content_fields != footer.content_fields:
                self.facts.append(Fact("footers-differ", "the two footers describe different disks", 0))
            else:
                self.facts.append(
                    Fact("footers-differ-slightly", "the two footers differ; the one at the end counts", 0)
                )
        if footer.original_size > footer.current_size:
            self.facts.append(
                Fact(
                    "original-size-larger",
                    f"original size {footer.original_size} is larger than current size {footer.current_size}",
                    self.tail_offset + 40,
                )
            )
        elif footer.original_size != footer.current_size:
            self.facts.append(
                Fact(
                    "original-size-differs",
                    f"original size {footer.original_size}, current size {footer.current_size}: it was resized",
                    self.tail_offset + 40,
                )
            )


class _Run(NamedTuple):
    """Guest bytes that lie at ``offset`` of this file in one piece, or not in it at all (None)."""

    start: int
    end: int
    offset: int | None


class VhdImage(DiskImage):
    def __init__(self, file: File, resolver: Resolver | None = None, options: OpenOptions = AS_IS) -> None:
        self.file = file
        self.footers = Footers(file)
        footer = self.footer = self.footers.footer
        self.identity: bytes = footer.unique_id
        self.dynamic: DynamicHeader | None = None
        self._bat: Offsets | None = None
        if footer.disk_type not in SUBFORMATS:
            raise UnsupportedFeature(
                f"VHD disk type {footer.disk_type}; 2 (fixed), 3 (dynamic) and 4 (differencing) exist",
                path=file.name,
                offset=self.footers.tail_offset + 60,
            )
        check_version("footer", footer.version, self.footers.tail_offset + 12)
        self.size_from: Literal["current", "chs"] = options.size_from or footer.size_from
        self.virtual_size = self._size()
        if footer.disk_type == FIXED:
            self._check_fixed()
        else:
            raw = read_exactly(file, footer.data_offset, 1024, "the VHD dynamic header")
            self.dynamic = DynamicHeader.parse(raw, offset=footer.data_offset)
            check_version("dynamic header", self.dynamic.version, footer.data_offset + 24)
            self.dynamic.validate(self.virtual_size, file.size)
        self.parent: ParentNames | None = None
        if self.dynamic is not None and footer.disk_type == DIFFERENCING:
            self.parent = read_names(file, footer, self.dynamic)
        self._below = Below(self._reference(), resolver, file.name)

    def _size(self) -> int:
        size = self.footer.current_size
        if size % SECTOR or size > MAX_SIZE:
            raise InvalidImage(
                f"current size {size}, expected a multiple of 512 up to 2040 GiB",
                path=self.file.name,
                offset=self.footers.tail_offset + 48,
            )
        if self.size_from == "current":
            return size
        if not self.footer.chs_size:
            raise InvalidImage(
                "the size is to come from the geometry, and the footer has none",
                hint="leave out --size-from",
                path=self.file.name,
                offset=self.footers.tail_offset + 56,
            )
        return self.footer.chs_size

    def _check_fixed(self) -> None:
        if self.footers.data_end < self.virtual_size:
            raise CorruptImage(
                f"a fixed disk of {self.virtual_size} bytes, but only {self.footers.data_end} before the footer",
                hint="the file looks truncated; fetch it again and compare its checksum",
                path=self.file.name,
                offset=self.footers.data_end,
            )

    @property
    def container(self) -> File:
        return self.file

    def info(self) -> ImageInfo:
        footer, header = self.footer, self.dynamic
        features: dict[str, JSON] = {
            "creator-app": footer.creator_app.decode("latin-1"),
            "creator-version": f"{footer.creator_version >> 16}.{footer.creator_version & 0xFFFF}",
            "creator-os": footer.creator_os.decode("latin-1"),
            "unique-id": str(uuid.UUID(bytes_le=footer.unique_id)),
            "geometry": f"{footer.cylinders}/{footer.heads}/{footer.sectors}",
            "size-from": self.size_from,
            "original-size": footer.original_size,
            "current-size": footer.current_size,
            "chs-size": footer.chs_size,
            "saved-state": bool(footer.saved_state),
        }
        if header is not None and self.parent is not None:
            features["parent-id"] = str(uuid.UUID(bytes_le=header.parent_id))
        reference = self._reference()
        return ImageInfo(
            format="vhd",
            virtual_size=self.virtual_size,
            subformat=SUBFORMATS[footer.disk_type],
            block_size=header.block_size if header else None,
            features=features,
            references=() if reference is None else (reference,),
            facts=(*self.footers.facts, *(self.parent.facts if self.parent else ())),
            # The BAT, decoded, and what is made of it while it is searched.
            table_memory=0 if header is None else -(-self.virtual_size // header.block_size) * 28,
        )

    def _reference(self) -> Reference | None:
        if self.parent is None or self.dynamic is None:
            return None
        return Reference(
            "parent-file",
            self.parent.name,
            "vhd",
            names=self.parent.names,
            identities=(self.dynamic.parent_id,),
            size=self.virtual_size,
        )

    # --- the guest's view ------------------------------------------------------------------------------------

    def bat(self) -> Offsets:
        """File offset of each block's bitmap, -1 where none is allocated; checked against the file."""
        if self._bat is not None:
            return self._bat
        header = self.dynamic
        assert header is not None
        count = -(-self.virtual_size // header.block_size)
        bat = array("q")
        for first in range(0, count, WINDOW):
            length = min(WINDOW, count - first) * 4
            raw = read_exactly(self.file, header.bat_offset + first * 4, length, "the BAT")
            for at in range(0, length, PAGE_ENTRIES * 4):
                page = raw[at : at + PAGE_ENTRIES * 4]
                if page == b"\xff" * len(page):
                    bat.frombytes(page + page)
                else:
                    bat.extend(self._offsets(first + at // 4, words32(page, "big")))
        self._bat = bat
        return bat

    def _offsets(self, number: int, sectors: Words) -> Offsets:
        """Where the blocks from ``number`` lie: behind the BAT and, as far as the guest sees them, in the file."""
        header = self.dynamic
        assert header is not None
        size, limit = header.bitmap_size + header.block_size, self.footers.data_end
        first = header.bat_offset + header.max_entries * 4
        offsets = array("q", [sector * SECTOR if sector != NOT_ALLOCATED else -1 for sector in sectors])
        if min(sectors) * SECTOR >= first and max(offsets) + size <= limit:
            return offsets
        for block, start in enumerate(offsets, number):
            end = start + size - max(0, (block + 1) * header.block_size - self.virtual_size)
            if start >= 0 and (end > limit or start < first):
                raise CorruptImage(
                    f"block {block} lies at {start:#x}..{end:#x}, outside {first:#x}..{limit:#x}",
                    hint="the file looks damaged or truncated; fetch it again and compare its checksum",
                    path=self.file.name,
                    offset=header.bat_offset + block * 4,
                )
        return offsets

    def extents(self, start: int = 0, length: int | None = None) -> Iterator[Extent]:
        start, end = clip(start, length, self.virtual_size)
        if self.dynamic is None:
            return merge_extents(flat_extents(self.file, start, end))
        return merge_extents(self._extents(start, end))

    def _extents(self, start: int, end: int) -> Iterator[Extent]:
        for runs in self._runs(start, end):
            if self.parent is not None:
                yield from self._over_parent(runs)
                continue
            for one in runs:
                here = one.offset is not None
                yield Extent(one.start, one.end - one.start, here, not here, present=here, offset=one.offset)

    def _over_parent(self, runs: list[_Run]) -> Iterator[Extent]:
        """Runs of one block, or of none: where they are not in this file the parent's extents show."""
        holes = [one for one in runs if one.offset is None]
        below: Iterator[Extent] = iter(())
        if holes:
            # Asked for once: a bitmap may have a hole at every other sector.
            below = self._below.extents(holes[0].start, holes[-1].end - holes[0].start)
        under = Extent(0, 0, data=False, zero=True)
        for one in runs:
            if one.offset is not None:
                yield Extent(one.start, one.end - one.start, data=True, zero=False, offset=one.offset)
                continue
            at = one.start
            while at < one.end:
                while under.end <= at:
                    under = next(below)
                until = min(one.end, under.end)
                yield under.part(at, until)
                at = until

    def _runs(self, start: int, end: int) -> Iterator[list[_Run]]:
        """Runs that cover start..end: a list for each block or part of one, and for blocks not allocated in a row."""
        header = self.dynamic
        assert header is not None
        bat, size = self.bat(), header.block_size
        while start < end:
            first = start // size
            part = bat[first : min(first + WINDOW, -(-end // size))]
            absent = part.tobytes()[_SIGN::8]
            at = 0
            while at < len(part):
                other = at + 1
                if absent[at]:
                    other = absent.find(0, at)
                    other = other if other > 0 else len(part)
                stop = min(end, (first + other) * size)
                inside = start - (first + at) * size
                if absent[at]:
                    yield [_Run(start, stop, None)]
                elif self.parent is not None:
                    for piece in range(start, stop, PART):
                        yield self._sectors(part[at], piece, min(piece + PART, stop), inside + piece - start)
                else:
                    yield [_Run(start, stop, part[at] + header.bitmap_size + inside)]
                start, at = stop, other

    def _sectors(self, block: int, start: int, end: int, inside: int) -> list[_Run]:
        """Runs of a part of the block that begins at ``block`` in the file, ``inside`` bytes into its data."""
        assert self.dynamic is not None
        first, last = inside // SECTOR, -(-(inside + end - start) // SECTOR)
        low = first // 8
        raw = read_exactly(self.file, block + low, -(-last // 8) - low, "a sector bitmap")
        digits = bits(raw, self.footer.bit_order)[first - low * 8 : last - low * 8]
        base, data = start - inside, block + self.dynamic.bitmap_size
        runs, at = [], 0
        while at < len(digits):
            here = digits[at] == _SET
            other = digits.find(_CLEAR if here else _SET, at)
            other = other if other > 0 else len(digits)
            low, high = max(start, base + (first + at) * SECTOR), min(end, base + (first + other) * SECTOR)
            runs.append(_Run(low, high, data + low - base if here else None))
            at = other
        return runs

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        if self.dynamic is None:
            return read_flat(self.file, offset, buffer)
        for runs in self._runs(offset, offset + len(buffer)):
            for one in runs:
                part = buffer[one.start - offset : one.end - offset]
                if one.offset is not None:
                    read_flat(self.file, one.offset, part)
                elif self.parent is not None:
                    self._below.pread_into(one.start, part)
                else:
                    part[:] = bytes(len(part))
        return None

    def metadata(self) -> Iterator[Range]:
        """What the file holds besides blocks or a fixed disk's data."""
        if self.footers.tail is not None:
            yield Range(self.footers.tail_offset, self.file.size - self.footers.tail_offset, "footer")
        header = self.dynamic
        if header is None:
            return
        yield Range(0, SECTOR, "footer copy")
        yield Range(self.footer.data_offset, 1024, "dynamic header")
        yield Range(header.bat_offset, header.max_entries * 4, "BAT")
        for locator in header.locators:
            if locator.length and locator.offset + locator.length <= self.file.size:
                yield Range(locator.offset, locator.length, "parent locator")

    def ranges(self) -> Iterator[Range]:
        yield from self.metadata()
        header = self.dynamic
        if header is None:
            yield Range(0, self.virtual_size, "data")
            return
        for offset in self.bat():
            if offset >= 0:
                yield Range(offset, header.bitmap_size + header.block_size, "block")

    def close(self) -> None:
        self._below.close()
        self.file.close()


class VhdFormat(DiskFormat):
    name = "vhd"
    aliases = ("vpc",)
    suffixes = (".vhd", ".avhd")
    subformats = ("dynamic", "fixed", "differencing")
    writes = ("block_size", "creator")
    reads = ("size_from",)

    def probe(self, file: File) -> str | None:
        if file.pread(0, 8) == FOOTER_COOKIE:
            return "VHD footer copy at 0"
        for length in (SECTOR, SECTOR - 1):
            if file.size >= length and file.pread(file.size - length, 8) == FOOTER_COOKIE:
                return f"VHD footer in the last {length} bytes"
        return None

    def open(self, file: File, *, resolver: Resolver | None = None, options: OpenOptions = AS_IS) -> VhdImage:
        return VhdImage(file, resolver, options)

    def writer(self, virtual_size: int, options: WriterOptions) -> ImageWriter:
        from imagekit.formats.vhd_writer import make_writer

        return make_writer(virtual_size, options)

    def check(self, file: File) -> list[Problem]:
        from imagekit.formats.vhd_check import check

        return check(self.open(file))

    def repair(self, file: File) -> list[Change]:
        from imagekit.formats.vhd_check import repair

        return repair(file)

    def resize(self, file: File, size: int) -> Iterable[Change]:
        from imagekit.formats.vhd_change import resize

        return resize(file, size)

    def rebase(self, file: File, parent: ParentLink) -> Iterable[Change]:
        from imagekit.formats.vhd_change import rebase

        return rebase(file, parent)

    def identify(self, file: File, identifier: uuid.UUID) -> Iterable[Change]:
        from imagekit.formats.vhd_change import identify

        return identify(file, identifier)

    def absorb(self, file: File, child: DiskImage) -> Iterable[Change]:
        from imagekit.formats.vhd_merge import absorb

        return absorb(file, child)


FORMAT = VhdFormat()
