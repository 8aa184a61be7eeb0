"""Changes of a VHD in place: another size, another parent. Merging a child is in vhd_merge.py, on the same ground.

Everything is decided from the file as it is, before the first step; every prefix of the steps leaves a file that
opens with the old content or the new. There are two ways to that:

    dynamic, differencing   What is new goes behind the old end, unseen; then one sector is written that makes it
                            count (vhd_workspace.py).
    fixed                   There is one footer, the last sector of the file. To grow, it is put far enough behind
                            the new end that everything in between can be made, and then cut off. To shrink, the
                            new one is written over the old one first.

Design notes
- A disk with damage is not changed, nor one that belongs to a saved machine.
- A differencing disk does not become smaller: its own file does not tell whether its parent has data there.
- After a resize original size = current size, the geometry fits, and a creator whose geometry would count instead of
  the size is replaced by Windows.

Not here: smaller files for disks that became smaller.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator

from imagekit.errors import CorruptImage, UnsupportedFeature
from imagekit.formats.base import SECTOR, Barrier, Change, File, ParentLink, Truncate, Write, round_up
from imagekit.formats.vhd import VhdImage
from imagekit.formats.vhd_check import check
from imagekit.formats.vhd_header import CHS_CREATORS, MAX_ENTRIES, MAX_SIZE, XEN_BLOCK, Footer, geometry
from imagekit.formats.vhd_locators import encode_names
from imagekit.formats.vhd_space import is_zero, zeros
from imagekit.formats.vhd_workspace import Workspace
from imagekit.formats.vhd_writer import check_parent
from imagekit.records import replace

MENDED_HERE = {
    "footer-missing",
    "footer-copy-missing",
    "footers-differ-slightly",
    "parent-locator-damaged",
    "parent-unnamed",
}
"""What a check finds and a change either mends by the way or leaves as it is."""


def resize(file: File, size: int) -> Iterable[Change]:
    """The steps that give the disk ``size`` bytes. See :meth:`imagekit.formats.base.DiskFormat.resize`."""
    image = open_sound(file)
    if size == image.virtual_size:
        return ()
    check_size(image, size)
    if image.dynamic is None:
        return resize_fixed(image, size)
    work = Workspace(image)
    if size < image.virtual_size:
        return _shrunk(work, size)
    work.grow(size)
    return _grown(work, size)


def rebase(file: File, parent: ParentLink) -> Iterable[Change]:
    """The steps that name another parent. See :meth:`imagekit.formats.base.DiskFormat.rebase`."""
    image = open_sound(file)
    if image.dynamic is None or image.parent is None:
        raise UnsupportedFeature("not a differencing disk: it has no parent to change", path=file.name)
    xen = image.footer.is_xen
    if parent.virtual_size > image.virtual_size:
        check_parent(parent, image.virtual_size, xen=xen)
    work = Workspace(image)
    work.name_parent(encode_names(parent, xen=xen), parent)
    return _rebased(work)


def identify(file: File, identifier: uuid.UUID) -> Iterable[Change]:
    """The steps that give the disk another unique id. See :meth:`imagekit.formats.base.DiskFormat.identify`."""
    image = open_sound(file)
    footer = replace(image.footer, unique_id=identifier.bytes_le)
    if image.dynamic is None:
        return (Write(image.footers.tail_offset, footer.pack()), Barrier())
    return _identified(Workspace(image), footer)


def open_sound(file: File) -> VhdImage:
    """The disk in ``file``; CorruptImage when something is wrong with it that a change would make worse."""
    image = VhdImage(file)
    for problem in check(image):
        if problem.code not in MENDED_HERE:
            raise CorruptImage(
                f"a damaged disk is not changed: {problem.message}",
                hint="imagekit check --repair mends what can be mended; else convert it to a new file",
                path=file.name,
                offset=problem.offset,
            )
    if image.footer.saved_state:
        raise UnsupportedFeature(
            "the disk belongs to a saved machine, whose memory expects it as it is",
            hint="start the machine, shut it down, and try again",
            path=file.name,
        )
    return image


def check_size(image: VhdImage, size: int) -> None:
    """UnsupportedFeature for a size that the disk cannot have, or not without losing data."""
    name = image.file.name
    if size <= 0 or size % SECTOR:
        raise UnsupportedFeature(f"{size} bytes are no whole number of sectors of 512 bytes", path=name)
    if size > MAX_SIZE:
        raise UnsupportedFeature(
            f"a VHD holds at most 2040 GiB ({MAX_SIZE} bytes), {size} were asked for",
            hint="convert it to VHDX, which holds 64 TiB",
            path=name,
        )
    header = image.dynamic
    if header is None:
        if size < image.virtual_size and not is_zero(image.file, size, image.virtual_size):
            raise _would_lose(image, size)
        return
    if -(-size // header.block_size) > MAX_ENTRIES:
        raise UnsupportedFeature(
            f"blocks of {header.block_size} bytes are too small for {size}", hint="convert it with --size", path=name
        )
    if image.footer.is_xen and size % XEN_BLOCK:
        raise UnsupportedFeature(
            f"{size} bytes: XenServer would not see the end of a disk that is not on 2 MiB",
            hint=f"choose {round_up(size, XEN_BLOCK)}",
            path=name,
        )
    if size < image.virtual_size:
        if image.parent is not None:
            raise UnsupportedFeature(
                "a differencing disk does not become smaller: what its parent holds there would be lost",
                hint="merge it first, or convert it to a new file",
                path=name,
            )
        for extent in image.extents(size):
            if extent.offset is None or extent.file is not None:
                continue
            if not is_zero(image.file, extent.offset, extent.offset + extent.length):
                raise _would_lose(image, size)


def _would_lose(image: VhdImage, size: int) -> UnsupportedFeature:
    return UnsupportedFeature(
        f"there is data behind {size}, which would be lost",
        hint="shrink its partitions and file systems first",
        path=image.file.name,
    )


def resized_footer(footer: Footer, size: int) -> Footer:
    """The footer of the same disk with another size, which counts for every reader."""
    cylinders, heads, sectors = geometry(size)
    return replace(
        footer,
        current_size=size,
        original_size=size,
        cylinders=cylinders,
        heads=heads,
        sectors=sectors,
        creator_app=b"win " if footer.creator_app in CHS_CREATORS else footer.creator_app,
    )


# --- fixed disks -----------------------------------------------------------------------------------------------


def resize_fixed(image: VhdImage, size: int) -> Iterator[Change]:
    """The steps for a fixed disk whose size has been checked."""
    tail, old, new = image.footers.tail_offset, image.footer.pack(), resized_footer(image.footer, size).pack()
    held = round_up(image.file.size, SECTOR)
    if size < image.virtual_size:
        # The old footer's place lies behind the new size, and so does the new one's: nothing of the disk changes.
        yield from (Write(tail, new), Barrier(), Write(size, new), Barrier(), Truncate(size + SECTOR), Barrier())
        return
    if tail < size + SECTOR:
        yield from (Write(max(size + SECTOR, held), old), Barrier())
    yield from zeros(image.virtual_size, min(size, held))
    yield from (Write(size, new), Barrier(), Truncate(size + SECTOR), Barrier())


# --- dynamic and differencing disks ----------------------------------------------------------------------------


def _grown(work: Workspace, size: int) -> Iterator[Change]:
    yield from work.begin()
    yield from grow_steps(work, size)
    yield from work.finish()


def grow_steps(work: Workspace, size: int) -> Iterator[Change]:
    """The steps, between ``begin`` and ``finish``, that make the disk as large as there is room for now."""
    yield from work.move_blocks()
    yield from work.extend_table()
    yield from work.blank_growth()
    yield from work.switch_footer(resized_footer(work.footer, size))


def _shrunk(work: Workspace, size: int) -> Iterator[Change]:
    yield from work.begin()
    yield from work.switch_footer(resized_footer(work.footer, size))
    yield from work.drop_blocks(-(-size // work.header.block_size))
    yield from work.finish()


def _rebased(work: Workspace) -> Iterator[Change]:
    yield from work.begin()
    yield from work.switch_names()
    yield from work.finish()


def _identified(work: Workspace, footer: Footer) -> Iterator[Change]:
    yield from work.begin()
    yield from work.switch_footer(footer)
    yield from work.finish()
