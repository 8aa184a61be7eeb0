"""Changes of a VHDX in place: repair it, resize it, give it another parent, merge a child into it.

Each function decides what is to be done, and refuses what cannot be, before it returns; what it returns are the
steps (imagekit.changes applies them). The single steps are in vhdx_edit.py, resizing in vhdx_resize.py, merging in
vhdx_absorb.py.

Not here: compacting a file. What a change leaves unused stays in the file until that is converted.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator

from imagekit.errors import UnsupportedFeature
from imagekit.formats.base import Barrier, Change, File, ParentLink, Write, read_exactly
from imagekit.formats.vhdx_absorb import absorb
from imagekit.formats.vhdx_edit import Edit, derived
from imagekit.formats.vhdx_header import HEADER_OFFSETS, NO_GUID, REGION_TABLE_OFFSETS, REGION_TABLE_SIZE
from imagekit.formats.vhdx_metadata import PAGE_83_DATA, PARENT_LOCATOR
from imagekit.formats.vhdx_resize import resize
from imagekit.formats.vhdx_writer import new_locator
from imagekit.records import replace

__all__ = ["absorb", "identify", "rebase", "repair", "resize"]


def repair(file: File) -> list[Change]:
    """Write back a log that was left, and a header or region table over its damaged copy. Nothing else is certain.

    CorruptImage when of two valid copies that differ nobody can tell which counts.
    """
    edit = Edit(file, whole=False)
    return [*_mended_headers(edit), *_mended_region_tables(edit)]


def _mended_headers(edit: Edit) -> Iterator[Change]:
    if edit.image.replayed is not None:
        yield from edit.write_log_back()
        file_write_guid = derived(edit.header.file_write_guid, "FileWriteGuid", "repair")
        edit.header = replace(edit.header, file_write_guid=file_write_guid, log_guid=NO_GUID)
        yield from edit.write_headers()
    elif None in edit.image.headers.copies:
        edit.header = replace(edit.header, sequence=edit.header.sequence + 1)
        yield Write(HEADER_OFFSETS[1 - edit.slot], edit.header.pack())
        yield Barrier()


def _mended_region_tables(edit: Edit) -> Iterator[Change]:
    tables = edit.image.region_tables
    if None in tables.copies:
        good = read_exactly(edit.file, tables.offset, REGION_TABLE_SIZE, "the region table")
        yield Write(REGION_TABLE_OFFSETS[tables.copies.index(None)], good)
        yield Barrier()


def rebase(file: File, parent: ParentLink) -> Iterable[Change]:
    """Name another parent. What the guest sees is the same when it is one that the disk knew, else it may not be."""
    edit = Edit(file, whole=False)
    old = edit.image.metadata.locator
    if not edit.geometry.differencing or old is None:
        raise UnsupportedFeature("it is not a differencing disk: it has no parent", path=file.name)
    if parent.sector_size != edit.image.sector_size:
        raise UnsupportedFeature(
            f"the parent has logical sectors of {parent.sector_size} bytes, its child of {edit.image.sector_size}",
            hint="convert the parent with --sector-size",
            path=file.name,
        )
    locator = new_locator(parent).pack()
    moving = list(edit.set_item(PARENT_LOCATOR, locator))  # refuses a locator that has no room
    known = parent.identity in old.linkages
    return [*edit.begin(f"rebase {parent.identity.hex()}", data=not known), *moving]


def identify(file: File, identifier: uuid.UUID) -> Iterable[Change]:
    """Give the disk another id (page 83 data, by which a guest knows it). A child has its parent's and keeps it."""
    edit = Edit(file, whole=False)
    if edit.geometry.differencing:
        raise UnsupportedFeature(
            "a differencing disk has the id of its parent", hint="give the parent another id", path=file.name
        )
    changed = list(edit.set_item(PAGE_83_DATA, identifier.bytes_le))
    return [*edit.begin(f"identify {identifier}", data=False), *changed]
