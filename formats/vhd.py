"""VHD (also called VPC): fixed and dynamic disks, read and written.

Follows Microsoft's "Virtual Hard Disk Image Format Specification" 1.0; where Windows' own files differ from it or go
beyond it, the files win: the layout written here is the one that Windows 8 and later write.

    fixed     data, footer
    dynamic   footer copy at 0, dynamic header at 512, BAT, blocks, footer
    block     sector bitmap (one bit a sector, rounded up to 512), then the data

Design notes
- All integers are big-endian. The BAT holds the 512-byte sector of each block's bitmap, all ones when not allocated.
- Windows fills the BAT's last page with ones, puts the bitmap at the end of a 4 KiB pad, so that data is 4
  KiB-aligned, and the footer where the next bitmap would go. A disk laid out otherwise works, but Windows reports
  it as not aligned.
- The guest's size is the current size, except for two creators that rounded to a geometry (`CHS_CREATORS`).
- In a dynamic disk the bitmap is not consulted: every writer leaves zeros under a clear bit.

Not here: differencing disks (reported, not read), the checks of a whole file (vhd_check.py).
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from imagekit.errors import CorruptImage, InvalidImage, UnsupportedFeature
from imagekit.formats.base import (
    AS_IS,
    JSON,
    SECTOR,
    BlockRuns,
    Change,
    DiskFormat,
    DiskImage,
    Extent,
    Fact,
    File,
    ImageInfo,
    ImageWriter,
    OpenOptions,
    Problem,
    Range,
    Reference,
    Resolver,
    SlotMap,
    WriterOptions,
    clip,
    merge_extents,
    read_exactly,
    round_up,
)
from imagekit.formats.raw import FlatWriter, flat_extents, read_flat
from imagekit.formats.vhd_header import (
    BAT_OFFSET,
    DEFAULT_BLOCK,
    DIFFERENCING,
    DYNAMIC,
    FIXED,
    FOOTER_COOKIE,
    HEADER_OFFSET,
    MAX_BLOCK,
    MAX_SIZE,
    NO_OFFSET,
    NOT_ALLOCATED,
    PAGE,
    SUBFORMATS,
    VHD_EPOCH,
    DynamicHeader,
    Footer,
    geometry,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


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


class VhdImage(DiskImage):
    def __init__(self, file: File) -> None:
        self.file = file
        self.footers = Footers(file)
        footer = self.footer = self.footers.footer
        self.virtual_size = footer.virtual_size
        self.dynamic: DynamicHeader | None = None
        self._bat: NDArray[np.int64] | None = None
        if footer.disk_type not in SUBFORMATS:
            raise UnsupportedFeature(
                f"VHD disk type {footer.disk_type}; 2 (fixed), 3 (dynamic) and 4 (differencing) exist",
                path=file.name,
                offset=self.footers.tail_offset + 60,
            )
        if footer.current_size % SECTOR:
            raise InvalidImage(
                f"current size {footer.current_size} is not a multiple of 512", path=file.name, offset=48
            )
        if footer.disk_type == FIXED:
            self._check_fixed()
        else:
            raw = read_exactly(file, footer.data_offset, 1024, "the VHD dynamic header")
            self.dynamic = DynamicHeader.parse(raw, offset=footer.data_offset)
            self.dynamic.validate(footer, file.size)

    def _check_fixed(self) -> None:
        if self.footers.data_end < self.virtual_size:
            raise CorruptImage(
                f"a fixed disk of {self.virtual_size} bytes, but only {self.footers.data_end} before the footer",
                hint="the file looks truncated; fetch it again and compare its checksum",
                path=self.file.name,
                offset=self.footers.data_end,
            )

    def info(self) -> ImageInfo:
        footer, header = self.footer, self.dynamic
        features: dict[str, JSON] = {
            "creator-app": footer.creator_app.decode("latin-1"),
            "creator-version": f"{footer.creator_version >> 16}.{footer.creator_version & 0xFFFF}",
            "creator-os": footer.creator_os.decode("latin-1"),
            "unique-id": str(uuid.UUID(bytes_le=footer.unique_id)),
            "geometry": f"{footer.cylinders}/{footer.heads}/{footer.sectors}",
            "original-size": footer.original_size,
            "current-size": footer.current_size,
            "saved-state": bool(footer.saved_state),
        }
        return ImageInfo(
            format="vhd",
            virtual_size=self.virtual_size,
            subformat=SUBFORMATS[footer.disk_type],
            block_size=header.block_size if header else None,
            features=features,
            references=tuple(self._references()),
            facts=tuple(self.footers.facts),
        )

    def _references(self) -> Iterator[Reference]:
        if self.footer.disk_type == DIFFERENCING:
            assert self.dynamic is not None
            name = self.dynamic.parent_name.decode("utf-16-be", "replace").split("\0", 1)[0]
            yield Reference("parent-file", name, "vhd")

    # --- the guest's view ------------------------------------------------------------------------------------

    def bat(self) -> NDArray[np.int64]:
        """File offset of each block's bitmap, -1 where none is allocated; checked against the file."""
        if self._bat is not None:
            return self._bat
        import numpy as np

        header = self.dynamic
        assert header is not None
        if self.footer.disk_type == DIFFERENCING:
            raise UnsupportedFeature(
                "a differencing disk: most of its content is in its parent file, which imagekit does not read yet",
                hint="merge it on the machine it comes from",
                path=self.file.name,
            )
        count = -(-self.virtual_size // header.block_size)
        raw = np.frombuffer(read_exactly(self.file, header.bat_offset, count * 4, "the BAT"), ">u4")
        bat = np.where(raw == NOT_ALLOCATED, -1, raw.astype(np.int64) * SECTOR)
        self._check_bat(bat)
        self._bat = bat
        return bat

    def _check_bat(self, bat: NDArray[np.int64]) -> None:
        """Every allocated block lies behind the BAT and, as far as the guest can see it, inside the file."""
        import numpy as np

        header = self.dynamic
        assert header is not None
        seen = np.full(len(bat), header.block_size, dtype=np.int64)
        if len(bat):
            seen[-1] = self.virtual_size - (len(bat) - 1) * header.block_size
        ends = bat + header.bitmap_size + seen
        first = header.bat_offset + header.max_entries * 4
        wrong = np.flatnonzero((bat >= 0) & ((ends > self.footers.data_end) | (bat < first)))
        if len(wrong):
            block = int(wrong[0])
            raise CorruptImage(
                f"block {block} lies at {int(bat[block]):#x}..{int(ends[block]):#x}, outside "
                f"{first:#x}..{self.footers.data_end:#x}",
                hint="the file looks damaged or truncated; fetch it again and compare its checksum",
                path=self.file.name,
                offset=header.bat_offset + block * 4,
            )

    def extents(self, start: int = 0, length: int | None = None) -> Iterator[Extent]:
        start, end = clip(start, length, self.virtual_size)
        if self.dynamic is None:
            return merge_extents(flat_extents(self.file, start, end))
        return merge_extents(self._dynamic_extents(start, end))

    def _dynamic_extents(self, start: int, end: int) -> Iterator[Extent]:
        import numpy as np

        header = self.dynamic
        assert header is not None
        bat, size = self.bat(), header.block_size
        window = 1 << 16  # blocks looked at by one step of numpy
        while start < end:
            first = start // size
            part = bat[first : min(first + window, -(-end // size))]
            absent = part < 0
            edges = np.concatenate(([0], np.flatnonzero(~(absent[1:] & absent[:-1])) + 1, [len(part)])).tolist()
            for one, other in pairwise(edges):
                stop = min(end, (first + other) * size)
                if absent[one]:
                    yield Extent(start, stop - start, data=False, zero=True, present=False)
                else:
                    inside = start - (first + one) * size
                    offset = int(part[one]) + header.bitmap_size + inside
                    yield Extent(start, stop - start, data=True, zero=False, offset=offset)
                start = stop

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        if self.dynamic is None:
            return read_flat(self.file, offset, buffer)
        size, bat, done = self.dynamic.block_size, self.bat(), 0
        while done < len(buffer):
            block, inside = divmod(offset + done, size)
            part = buffer[done : done + size - inside]
            if bat[block] < 0:
                part[:] = bytes(len(part))
            else:
                read_flat(self.file, int(bat[block]) + self.dynamic.bitmap_size + inside, part)
            done += len(part)
        return None

    def ranges(self) -> Iterator[Range]:
        if self.footers.tail is not None:
            yield Range(self.footers.tail_offset, self.file.size - self.footers.tail_offset, "footer")
        header = self.dynamic
        if header is None:
            yield Range(0, self.virtual_size, "data")
            return
        yield Range(0, SECTOR, "footer copy")
        yield Range(self.footer.data_offset, 1024, "dynamic header")
        yield Range(header.bat_offset, header.max_entries * 4, "BAT")
        for locator in header.locators:
            if locator.length:
                yield Range(locator.offset, locator.length, "parent locator")
        if self.footer.disk_type != DIFFERENCING:
            for offset in self.bat().tolist():
                if offset >= 0:
                    yield Range(offset, header.bitmap_size + header.block_size, "block")

    def close(self) -> None:
        self.file.close()


# --- writing ---------------------------------------------------------------------------------------------------


def new_footer(virtual_size: int, disk_type: int, options: WriterOptions) -> Footer:
    """A footer as Windows writes it. Original size = current size: readers that trust either agree."""
    cylinders, heads, sectors = geometry(virtual_size)
    return Footer(
        current_size=virtual_size,
        original_size=virtual_size,
        disk_type=disk_type,
        unique_id=options.identifier.bytes_le,
        data_offset=NO_OFFSET if disk_type == FIXED else HEADER_OFFSET,
        timestamp=min(max(0, options.timestamp - VHD_EPOCH), 0xFFFFFFFF),
        cylinders=cylinders,
        heads=heads,
        sectors=sectors,
    )


class DynamicLayout:
    """Windows' layout: data 4 KiB-aligned, each bitmap right before it, the footer where the next would go."""

    def __init__(self, footer: Footer, header: DynamicHeader, blocks: BlockRuns) -> None:
        self._footer = footer
        self._header = header
        self._slots = SlotMap(blocks)
        self.prefix = b"\xff" * header.bitmap_size
        pad = round_up(header.bitmap_size, PAGE)
        self._bat_end = round_up(header.bat_offset + header.max_entries * 4, PAGE)
        self._first_data = self._bat_end + pad
        self._stride = pad + header.block_size

    @property
    def file_size(self) -> int:
        return self._first_data + self._slots.count * self._stride

    def place(self, block: int) -> int:
        slot = self._slots.get(block)
        if slot is None:
            slot = self._slots.add(block)
        return self._first_data + slot * self._stride

    def metadata(self) -> Iterator[tuple[int, bytes]]:
        import numpy as np

        footer = self._footer.pack()
        yield 0, footer
        yield HEADER_OFFSET, self._header.pack()
        bat: NDArray[Any] = np.full((self._bat_end - self._header.bat_offset) // 4, NOT_ALLOCATED, ">u4")
        step = self._stride // SECTOR
        for first, count, slot in self._slots.runs():
            start = (self._first_data + slot * self._stride) // SECTOR - len(self.prefix) // SECTOR
            bat[first : first + count] = start + step * np.arange(count, dtype=np.int64)
        yield self._header.bat_offset, bat.tobytes()
        yield self.file_size - SECTOR, footer


class DynamicWriter:
    """Writes dynamic disks."""

    def __init__(self, virtual_size: int, options: WriterOptions) -> None:
        self.virtual_size = virtual_size
        self.block_size = options.block_size or DEFAULT_BLOCK
        if self.block_size & (self.block_size - 1) or not PAGE <= self.block_size <= MAX_BLOCK:
            raise UnsupportedFeature(
                f"block size {self.block_size}: a power of two from 4 KiB to 256 MiB is needed",
                hint="Windows supports 512K and 2M; leave out --block-size for 2M",
            )
        self._footer = new_footer(virtual_size, DYNAMIC, options)
        entries = max(1, -(-virtual_size // self.block_size))
        self._header = DynamicHeader(BAT_OFFSET, entries, self.block_size)

    def layout(self, blocks: BlockRuns = ()) -> DynamicLayout:
        return DynamicLayout(self._footer, self._header, blocks)


class VhdFormat(DiskFormat):
    name = "vhd"
    aliases = ("vpc",)
    suffixes = (".vhd",)
    subformats = ("dynamic", "fixed")

    def probe(self, file: File) -> str | None:
        if file.pread(0, 8) == FOOTER_COOKIE:
            return "VHD footer copy at 0"
        for length in (SECTOR, SECTOR - 1):
            if file.size >= length and file.pread(file.size - length, 8) == FOOTER_COOKIE:
                return f"VHD footer in the last {length} bytes"
        return None

    def open(self, file: File, *, resolver: Resolver | None = None, options: OpenOptions = AS_IS) -> VhdImage:
        return VhdImage(file)

    def writer(self, virtual_size: int, options: WriterOptions) -> ImageWriter:
        if virtual_size > MAX_SIZE:
            raise UnsupportedFeature(
                f"a VHD holds at most 2040 GiB ({MAX_SIZE} bytes), the disk has {virtual_size}",
                hint="use VHDX, which holds 64 TiB",
            )
        subformat = options.subformat or self.subformats[0]
        if subformat == "dynamic":
            return DynamicWriter(virtual_size, options)
        if subformat == "fixed":
            if options.block_size is not None:
                raise UnsupportedFeature("a fixed VHD has no blocks", hint="leave out --block-size")
            return FlatWriter(virtual_size, new_footer(virtual_size, FIXED, options).pack())
        raise UnsupportedFeature(
            f"VHD subformat {subformat!r} is not written", hint=f"choose one of: {', '.join(self.subformats)}"
        )

    def check(self, file: File) -> list[Problem]:
        from imagekit.formats.vhd_check import check

        return check(self.open(file))

    def repair(self, file: File) -> list[Change]:
        from imagekit.formats.vhd_check import repair

        return repair(file)


FORMAT = VhdFormat()
