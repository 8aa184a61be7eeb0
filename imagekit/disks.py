"""Disks as such: create, grow or shrink, merge into the parent, give another parent.

A new disk is written like a conversion's target, complete or not at all. The others change a file in place: its
format decides every step before the first one is taken (imagekit.changes), the file is locked, and what interrupts
the run leaves a disk that opens and reads as before or as meant.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

from imagekit import policy
from imagekit.changes import apply
from imagekit.conversion import check_kinds, open_parent, target_format, writer_options
from imagekit.errors import SourceError, UnsupportedFeature, UsageError, VerificationFailed
from imagekit.formats import registry
from imagekit.formats.base import JSON, SECTOR, DiskFormat
from imagekit.formats.files import LocalFile, same_file
from imagekit.formats.raw import ZeroImage
from imagekit.plan import ConvertOptions, build_plan, target_size
from imagekit.progress import SILENT, Control
from imagekit.publish import check_space, check_target, new_file
from imagekit.records import dataclass, replace
from imagekit.references import Following, check_identity, link_to
from imagekit.report import SCHEMA
from imagekit.sources import Reading, located, open_source
from imagekit.verify import first_difference, verify_structure

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class DiskReport:
    """A disk that was made or changed. Sizes in bytes."""

    filename: str
    format: str
    subformat: str | None
    virtual_size: int
    file_size: int
    identifier: str | None = None
    parent: str | None = None
    old_virtual_size: int | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, JSON]:
        out: dict[str, JSON] = {
            "schema": SCHEMA,
            "filename": self.filename,
            "format": self.format,
            "subformat": self.subformat,
            "virtual-size": self.virtual_size,
            "size": self.file_size,
            "notes": list(self.notes),
        }
        optional = {"id": self.identifier, "backing-filename": self.parent, "old-virtual-size": self.old_virtual_size}
        return out | {key: value for key, value in optional.items() if value is not None}


def create_disk(target: PathLike, size: int | None, options: ConvertOptions) -> DiskReport:
    """Write a new disk of zeros, or with ``options.parent`` a child that reads as its parent does."""
    chosen = target_format(target, options)
    path = check_target(target, overwrite=options.overwrite, source=options.parent)
    parent = open_parent(options, chosen) if options.parent is not None else None
    try:
        if size is None and parent is None:
            raise UsageError("a new disk needs a size", hint="for example: imagekit create disk.vhdx 20G")
        link = None
        if parent is not None:
            link = link_to(parent.image, Path(parent.file.name), path, options.parent_map)
        asked = parent.image.virtual_size if size is None and parent is not None else (size or 0)
        virtual_size, notes = target_size(
            0, asked, unit=options.sector_size or (link.sector_size if link else SECTOR)
        )
        plan = build_plan(
            ZeroImage(virtual_size),
            source_format="raw",
            target_format=chosen.name,
            options=writer_options(options, link),
            virtual_size=virtual_size,
        )
    finally:
        if parent is not None:
            parent.close()
    with new_file(path) as pending:
        if options.preallocate:
            check_space(path.parent, plan.file_size)
            pending.file.preallocate(plan.file_size)
        pending.file.truncate(plan.file_size)
        for offset, data in plan.layout().metadata():
            pending.file.pwrite(offset, data)
        verify_structure(plan, pending.file)
        pending.commit(overwrite=options.overwrite, sync=options.sync)
    return DiskReport(
        filename=os.fspath(target),
        format=chosen.name,
        subformat=plan.writer_options.subformat or chosen.subformats[0],
        virtual_size=virtual_size,
        file_size=plan.file_size,
        identifier=str(plan.writer_options.identifier),
        parent=options.parent,
        notes=notes if virtual_size != asked else (),
    )


def resize_disk(
    image: PathLike, size: int, options: ConvertOptions, *, shrink: bool = False, control: Control = SILENT
) -> DiskReport:
    """Give a disk another virtual size, in place. Smaller only with ``shrink``, and where nothing is lost."""
    with _changing(image, options.source_format, options.allow) as (file, chosen):
        before = chosen.open(file)
        if size < before.virtual_size and not shrink:
            raise UsageError(
                f"the disk has {before.virtual_size} bytes, {size} would make it smaller",
                hint="--shrink does that where nothing but zeros is lost",
                path=file.name,
            )
        if size == before.virtual_size:
            return _report(image, chosen, file, notes=("it has that size already",))
        apply(chosen.resize(file, size), file, control=control)
        _check(chosen, file, size)
        return _report(image, chosen, file, old=before.virtual_size)


def rebase_disk(child: PathLike, parent: PathLike, options: ConvertOptions) -> DiskReport:
    """Make a differencing disk name another file as its parent; its content is not touched.

    The new parent must be the same disk as the old one (it moved), unless ``options.ignore_parent_id``.
    """
    following = Following(options.parent_map, options.ignore_parent_id)
    with open_source(parent, Reading(allow=options.allow, following=following)) as below:
        link = link_to(below.image, Path(below.file.name), Path(child), options.parent_map)
        # The caller names the parent: what the child says about it is not opened.
        with _changing(child, options.source_format, options.allow) as (file, chosen):
            references = chosen.open(file).info().references
            if not references or references[0].kind != "parent-file":
                raise UnsupportedFeature("it is not a differencing VHD or VHDX", path=file.name)
            check_kinds(below, chosen)
            if same_file(child, parent):
                raise UsageError("a disk cannot be its own parent", path=file.name)
            if any(same_file(child, one.original.name) for one in below.below()):
                raise UsageError("the new parent lies on this disk itself", path=file.name)
            check_identity(references[0], below.image, Path(parent), ignore=options.ignore_parent_id)
            apply(chosen.rebase(file, link), file)
            return _report(child, chosen, file, parent=os.fspath(parent))


def identify_disk(image: PathLike, identifier: UUID, options: ConvertOptions) -> DiskReport:
    """Give a disk another id, in place: a copy must not be the same disk to a guest, or to the parent's children."""
    with _changing(image, options.source_format, options.allow) as (file, chosen):
        apply(chosen.identify(file, identifier), file)
        return replace(_report(image, chosen, file), identifier=str(identifier))


def merge_into_parent(child: PathLike, options: ConvertOptions, *, control: Control = SILENT) -> DiskReport:
    """Write what a differencing disk holds into its parent, which then reads as the child did.

    The child is not changed, and is of no further use. Other children of that parent lose theirs: VHDX ones notice.
    """
    if not options.follow_references:
        raise UsageError(
            "the child decides which file would be written to",
            hint="where its origin is trusted: --follow-references",
        )
    following = Following(options.parent_map, options.ignore_parent_id)
    with open_source(child, Reading(options.source_format, options.allow, following)) as source:
        if not source.chain or source.image.info().references[0].kind != "parent-file":
            raise UnsupportedFeature("it is not a differencing VHD or VHDX", path=source.file.name)
        below = source.chain[0]
        with _changing(below.file.name, below.format, options.allow) as (file, chosen):
            if below.identity.differences(file.identity):
                raise SourceError("changed while its child was opened", path=file.name, hint="try again")
            old = below.image.virtual_size
            apply(chosen.absorb(file, source.image), file, image=source.image, control=control)
            _check(chosen, file, source.image.virtual_size)
            source_changed = source.identity.differences(source.original.identity)
            if source_changed:
                raise SourceError(f"changed while it was read ({', '.join(source_changed)})", path=source.file.name)
        _verify_merged(source.original.name, below.file.name, options, control)
        with LocalFile.open_source(below.file.name) as merged:
            return _report(
                below.file.name,
                registry.find(below.format),
                merged,
                old=old if old != source.image.virtual_size else None,
                notes=(f"{source.file.name} is merged; it can be removed, and must not be used on this parent",),
            )


def _verify_merged(child: str, parent: str, options: ConvertOptions, control: Control) -> None:
    """The parent alone must read as the child on it does."""
    if options.verify != "content":
        return
    following = Following(options.parent_map, ignore_parent_id=True)  # a VHDX parent has a new identity now
    with (
        open_source(child, Reading(options.source_format, options.allow, following)) as left,
        open_source(parent, Reading(None, options.allow, following)) as right,
    ):
        at = first_difference(left.image, right.image, jobs=options.jobs, control=control)
    if at is not None:
        raise VerificationFailed(
            f"verification failed: the merged disk differs from the child at guest offset {at:#x}",
            path=parent,
            hint="keep the child: parent and child together still hold everything; merge again, or report it",
        )


@contextmanager
def _changing(image: PathLike, declared: str | None, allow: frozenset[str]) -> Iterator[tuple[LocalFile, DiskFormat]]:
    """An image judged as any source is, then open for changes, locked. What it refers to is not opened."""
    with open_source(image, Reading(declared, allow=None)) as source:
        policy.enforce(source.findings, allow=allow | policy.REFERENCES, path=source.file.name)
        if source.wrappers:
            raise UnsupportedFeature(
                f"a packed image ({', '.join(source.wrappers)}) is not changed in place",
                path=source.original.name,
                hint="unpack it first, or convert it",
            )
        chosen = registry.find(source.format)
    with LocalFile.open_for_change(image) as file, located(file):
        if file.held_for_writing:
            raise SourceError("QEMU has the image open for writing", path=file.name, hint="stop the machine first")
        yield file, chosen


def _check(chosen: DiskFormat, file: LocalFile, size: int) -> None:
    """VerificationFailed unless the changed disk opens, is sound and has its size."""
    image = chosen.open(file)
    problems = [] if chosen.name == "raw" else [one for one in chosen.check(file) if not one.leak]
    if image.virtual_size != size or problems:
        what = problems[0].message if problems else f"the disk has {image.virtual_size} bytes, {size} were asked for"
        raise VerificationFailed(f"verification failed: {what}", path=file.name, hint="please report this")


def _report(
    name: PathLike,
    chosen: DiskFormat,
    file: LocalFile,
    *,
    old: int | None = None,
    parent: str | None = None,
    notes: tuple[str, ...] = (),
) -> DiskReport:
    info = chosen.open(file).info()
    return DiskReport(
        filename=os.fspath(name),
        format=chosen.name,
        subformat=info.subformat,
        virtual_size=info.virtual_size,
        file_size=file.size,
        parent=parent,
        old_virtual_size=old,
        notes=notes,
    )
