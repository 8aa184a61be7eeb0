"""Writing VHDs: fixed, dynamic and differencing disks, laid out as Windows does it or as XenServer does.

Follows the same specification as vhd.py, and two sets of conventions:

    Windows 8 on    footer copy, header, BAT filled to a page with ones, blocks: each bitmap in the last bytes of a
                    page, so that data is 4 KiB-aligned, and the footer where the next bitmap would go. A disk laid
                    out otherwise works, but Windows reports it as not aligned.
    Windows 10      a differencing disk has its absolute locator at 0x1000, the BAT at 0x2000, the relative locator
                    behind it in 64 KiB of its own, then blocks as above.
    XenServer       creator ``tap``, host OS 0, blocks of 2 MiB only, behind the BAT a map of full blocks and then the
                    locators, the footer right behind the last block (blktap, libvhd.c). Its tools count whole blocks,
                    so a disk that ends inside one is refused here.

Design notes
- Original size = current size, geometry by the specification: readers that trust any of them agree.
- Blocks are written whole, and their bitmaps are all ones.
- A child of another size than its parent is refused: Windows does not open it (0xC03A0017). XenServer takes one that
  is larger.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from imagekit.errors import UnsupportedFeature
from imagekit.formats.base import SECTOR, BlockRuns, ImageWriter, KiB, ParentLink, SlotMap, WriterOptions, round_up
from imagekit.formats.raw import FlatWriter
from imagekit.formats.vhd_header import (
    BAT_OFFSET,
    DEFAULT_BLOCK,
    DIFFERENCING,
    DYNAMIC,
    FIXED,
    HEADER_OFFSET,
    MAX_BLOCK,
    MAX_ENTRIES,
    MAX_SIZE,
    NO_LOCATOR,
    NO_OFFSET,
    NOT_ALLOCATED,
    PAGE,
    VHD_EPOCH,
    XEN_APP,
    XEN_BLOCK,
    XEN_OS,
    XEN_VERSION,
    DynamicHeader,
    Footer,
    Locator,
    batmap,
    batmap_size,
    bitmap_size,
    geometry,
)
from imagekit.formats.vhd_locators import Name, encode_field, encode_names
from imagekit.formats.words import packed
from imagekit.records import dataclass, replace

SUBFORMATS = {"dynamic": DYNAMIC, "fixed": FIXED, "differencing": DIFFERENCING}
ABSOLUTE_AT = 0x1000
RELATIVE_ROOM = 64 * KiB


def make_writer(virtual_size: int, options: WriterOptions) -> ImageWriter:
    """A writer for a disk of ``virtual_size`` bytes; UnsupportedFeature for what a VHD cannot be."""
    if virtual_size > MAX_SIZE:
        raise UnsupportedFeature(
            f"a VHD holds at most 2040 GiB ({MAX_SIZE} bytes), the disk has {virtual_size}",
            hint="use VHDX, which holds 64 TiB",
        )
    if options.sector_size not in (None, SECTOR):
        raise UnsupportedFeature(
            f"a VHD has sectors of 512 bytes, not {options.sector_size}", hint="use VHDX, which takes 512 and 4096"
        )
    if options.compression is not None:
        raise UnsupportedFeature("a VHD is not compressed", hint="leave out --compress")
    if options.creator not in (None, "tap"):
        raise UnsupportedFeature(
            f"unknown conventions {options.creator!r}", hint="tap is XenServer's; leave it out for Windows'"
        )
    subformat = options.subformat or ("differencing" if options.parent else "dynamic")
    if subformat not in SUBFORMATS:
        raise UnsupportedFeature(
            f"VHD subformat {subformat!r} is not written", hint=f"choose one of: {', '.join(SUBFORMATS)}"
        )
    if (options.parent is not None) != (subformat == "differencing"):
        raise UnsupportedFeature(
            "a differencing disk needs a parent" if options.parent is None else f"a {subformat} disk has no parent",
            hint="--subformat differencing and --parent FILE go together",
        )
    if subformat == "fixed":
        if options.block_size is not None:
            raise UnsupportedFeature("a fixed VHD has no blocks", hint="leave out --block-size")
        return FlatWriter(virtual_size, new_footer(virtual_size, FIXED, options).pack())
    return DynamicWriter(virtual_size, options)


def new_footer(virtual_size: int, disk_type: int, options: WriterOptions) -> Footer:
    """A footer as Windows or XenServer writes it."""
    cylinders, heads, sectors = geometry(virtual_size)
    footer = Footer(
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
    return as_xen(footer) if options.creator == "tap" else footer


def as_xen(footer: Footer) -> Footer:
    """The same disk, as one of XenServer's own."""

    return replace(footer, creator_app=XEN_APP, creator_version=XEN_VERSION, creator_os=XEN_OS)


def check_parent(link: ParentLink, virtual_size: int, *, xen: bool) -> None:
    """UnsupportedFeature when no host would open a child of that size on that parent."""
    if link.virtual_size == virtual_size or (xen and link.virtual_size < virtual_size):
        return
    raise UnsupportedFeature(
        f"the disk has {virtual_size} bytes, its parent {link.virtual_size}: Windows opens a differencing VHD only "
        "where both are the same (0xC03A0017)",
        hint="leave out --size; what is to grow is merged first, then resized",
    )


@dataclass(frozen=True, slots=True)
class Front:
    """What stands before the blocks: where the table ends with its padding, where the names go, where all ends."""

    header: DynamicHeader
    table_end: int
    end: int
    names: tuple[tuple[int, bytes], ...] = ()
    batmap_at: int | None = None


def _windows_front(header: DynamicHeader, names: tuple[Name, ...]) -> Front:
    if not names:
        end = round_up(header.bat_offset + header.max_entries * 4, PAGE)
        return Front(header, end, end)
    absolute, relative = (names[0] if len(names) > 1 else None), names[-1]
    room = max(PAGE, round_up(len(absolute.data), PAGE) if absolute else 0)
    bat = ABSOLUTE_AT + room
    table_end = round_up(bat + header.max_entries * 4, PAGE)
    places = [(relative, RELATIVE_ROOM, table_end)]
    if absolute:
        places.insert(0, (absolute, room, ABSOLUTE_AT))
    return _with_names(header, bat, places, table_end, table_end + RELATIVE_ROOM)


def _xen_front(header: DynamicHeader, names: tuple[Name, ...]) -> Front:
    table_end = round_up(header.bat_offset + header.max_entries * 4, SECTOR)
    end = table_end + batmap_size(header.max_entries)
    places = []
    for name in names:
        room = round_up(len(name.data), SECTOR)
        places.append((name, room, end))
        end += room
    return _with_names(header, header.bat_offset, places, table_end, end, batmap_at=table_end)


def _with_names(
    header: DynamicHeader,
    bat_offset: int,
    places: list[tuple[Name, int, int]],
    table_end: int,
    end: int,
    batmap_at: int | None = None,
) -> Front:

    locators = [Locator(name.code, room, len(name.data), offset) for name, room, offset in places]
    locators += [NO_LOCATOR] * (8 - len(locators))
    header = replace(header, bat_offset=bat_offset, locators=tuple(locators))
    return Front(header, table_end, end, tuple((offset, name.data) for name, _, offset in places), batmap_at)


class DynamicLayout:
    """Data 4 KiB-aligned, each bitmap right before it, the footer behind the last block."""

    def __init__(self, footer: Footer, front: Front, blocks: BlockRuns) -> None:
        self._footer = footer
        self._front = front
        self._slots = SlotMap(blocks)
        block = front.header.block_size
        self.prefix = b"\xff" * bitmap_size(block)
        pad = round_up(len(self.prefix), PAGE)
        if front.batmap_at is None:
            self._first_data = round_up(front.end, PAGE) + pad
        else:
            self._first_data = round_up(front.end + len(self.prefix), PAGE)
        self._stride = pad + block
        self._check_end()

    def _check_end(self) -> None:
        """The last bitmap has a place that the BAT can name."""
        if self._first_data + self._slots.count * self._stride > NOT_ALLOCATED * SECTOR:
            raise UnsupportedFeature(
                f"the file would have {self.file_size} bytes; a VHD's blocks lie in the first 2 TiB",
                hint="use VHDX, which holds 64 TiB",
            )

    @property
    def file_size(self) -> int:
        end = self._first_data + self._slots.count * self._stride
        if self._front.batmap_at is None:
            return end  # the footer stands where the next bitmap would
        return SECTOR + (end - self._stride + self._front.header.block_size if self._slots.count else self._front.end)

    def place(self, block: int) -> int:
        slot = self._slots.get(block)
        if slot is None:
            slot = self._slots.add(block)
            self._check_end()
        return self._first_data + slot * self._stride

    def metadata(self) -> Iterator[tuple[int, bytes]]:
        footer, header = self._footer.pack(), self._front.header
        yield 0, footer
        yield HEADER_OFFSET, header.pack()
        runs = list(self._slots.runs())
        bat = array("I", [NOT_ALLOCATED]) * ((self._front.table_end - header.bat_offset) // 4)
        step = self._stride // SECTOR
        for first, count, slot in runs:
            start = (self._first_data + slot * self._stride) // SECTOR - len(self.prefix) // SECTOR
            bat[first : first + count] = array("I", range(start, start + step * count, step))
        if self._front.batmap_at is not None:
            bat[header.max_entries :] = array("I", bytes(bat.itemsize * (len(bat) - header.max_entries)))
        yield header.bat_offset, packed(bat, "big")
        if self._front.batmap_at is not None:
            full = ((first, count) for first, count, _ in runs)
            yield self._front.batmap_at, batmap(self._front.batmap_at, header.max_entries, full)
        yield from self._front.names
        yield self.file_size - SECTOR, footer


class DynamicWriter:
    """Writes dynamic and differencing disks."""

    def __init__(self, virtual_size: int, options: WriterOptions) -> None:
        self.virtual_size = virtual_size
        self.block_size = options.block_size or DEFAULT_BLOCK
        xen = options.creator == "tap"
        self._check(xen=xen)
        parent = options.parent
        entries = max(1, -(-virtual_size // self.block_size))
        header = DynamicHeader(BAT_OFFSET, entries, self.block_size)
        names: tuple[Name, ...] = ()
        if parent is not None:
            check_parent(parent, virtual_size, xen=xen)
            names = encode_names(parent, xen=xen)
            header = replace(header, parent_id=parent.identity, parent_name=encode_field(parent, xen=xen))
        self._footer = new_footer(virtual_size, DYNAMIC if parent is None else DIFFERENCING, options)
        self._front = (_xen_front if xen else _windows_front)(header, names)

    def _check(self, *, xen: bool) -> None:
        if self.block_size & (self.block_size - 1) or not PAGE <= self.block_size <= MAX_BLOCK:
            raise UnsupportedFeature(
                f"block size {self.block_size}: a power of two from 4 KiB to 256 MiB is needed",
                hint="Windows supports 512K and 2M; leave out --block-size for 2M",
            )
        if -(-self.virtual_size // self.block_size) > MAX_ENTRIES:
            raise UnsupportedFeature(
                f"block size {self.block_size} is too small for a disk of {self.virtual_size} bytes",
                hint="leave out --block-size for 2M",
            )
        if xen and self.block_size != XEN_BLOCK:
            raise UnsupportedFeature(
                f"block size {self.block_size}: XenServer has blocks of 2 MiB only", hint="leave out --block-size"
            )
        if xen and self.virtual_size % XEN_BLOCK:
            raise UnsupportedFeature(
                f"a disk of {self.virtual_size} bytes: XenServer would not see its end, which is not on 2 MiB",
                hint=f"--size {round_up(self.virtual_size, XEN_BLOCK)}",
            )

    def layout(self, blocks: BlockRuns = ()) -> DynamicLayout:
        return DynamicLayout(self._footer, self._front, blocks)
