"""Convert one image: open and judge, plan, copy, verify, publish.

This is the whole way of the data, a step a function; what each step does is in its own module.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeAlias

from imagekit import copying
from imagekit.errors import UnsupportedFeature, UsageError
from imagekit.formats import registry
from imagekit.formats.base import (
    SECTOR,
    DiskFormat,
    DiskImage,
    EncodedLayout,
    File,
    MiB,
    OpenOptions,
    ParentLink,
    WriterOptions,
)
from imagekit.formats.files import LocalFile
from imagekit.pictures import occupancy
from imagekit.plan import ConversionPlan, ConvertOptions, FoundBlocks, build_plan, draft_plan, target_size
from imagekit.progress import SILENT, Control
from imagekit.publish import Pending, check_space, check_target, finish, new_file
from imagekit.records import dataclass, replace
from imagekit.references import MAX_DEPTH, Following, link_to
from imagekit.remote import addresses
from imagekit.report import Report
from imagekit.sources import OPENER, Opener, Reading, Source, chain_too_long, located, open_source
from imagekit.sums import Sums
from imagekit.verify import verify_content, verify_structure

DEFAULTS = ConvertOptions()
BEFORE_JUDGED = 64 * MiB
"""Of a remote image that is to be converted: comes while the process starts that will judge it."""
NOT_CONFINED = "not confined: that needs Linux; the image was read in this process"
Maps: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
AnySource: TypeAlias = "str | os.PathLike[str] | Source | LocalFile | addresses.Opened"


@dataclass(frozen=True, slots=True)
class PlannedConversion:
    """An open source, the disk to be written, and the plan for it; lives as long as the source is open."""

    source: Source
    image: DiskImage
    """The source's disk, or that with a mended partition table."""

    plan: ConversionPlan
    parent: Source | None = None
    """What a differencing target builds on."""

    found: FoundBlocks | None = None
    """Where the source still arrives: its blocks, found while they are copied. The plan is a draft then."""

    @property
    def most_bytes(self) -> int:
        """Length that the target has at most."""
        return self.plan.file_size if self.found is None else self.plan.most()

    def check_unchanged(self) -> None:
        """SourceError when a file that is read changed meanwhile."""
        self.source.check_unchanged()
        if self.parent is not None:
            self.parent.check_unchanged()

    def open_target(self, file: File) -> DiskImage:
        """The target as a guest would see it."""
        chosen = registry.find(self.plan.target_format)
        parent = self.parent
        return chosen.open(file, resolver=None if parent is None else lambda _: parent.image)


def convert_image(
    source: AnySource,
    target: str | os.PathLike[str],
    options: ConvertOptions = DEFAULTS,
    *,
    control: Control = SILENT,
) -> Report:
    """Convert ``source`` to ``target`` and report. With ``options.dry_run`` nothing is written.

    A source that is open already stays open; a :class:`Source` was opened as :func:`reading` says. With
    ``options.confined`` (the default for what comes over a network) nothing of the image is parsed in this process
    (imagekit.confinement.jobs). Raises the error of whichever step failed; then no target exists, and an old one is
    untouched.
    """
    started = time.monotonic()
    control = control.within(options.limits.seconds)
    chosen = target_format(target, options)
    file = source.original if isinstance(source, Source) else source
    name = os.fspath(file) if isinstance(file, (str, os.PathLike)) else file.name
    target_path = check_target(target, overwrite=options.overwrite, source=name)
    wanted = options.is_confined(elsewhere=addresses.is_elsewhere(file))
    if wanted:
        from imagekit.confinement import jobs as confined

        if confined.POSSIBLE:
            with at_hand(file, options, scratch=target_path.parent, control=control) as here, here.blamed():
                if not options.dry_run:
                    addresses.want(here.file, BEFORE_JUDGED)
                asked = replace(options, stated_format=here.format or options.stated_format)
                settle = source.check_unchanged if isinstance(source, Source) else here.settle
                report = confined.convert(here.file, target_path, chosen.name, asked, settle=settle, control=control)
            return replace(report, notes=(*(finding.message for finding in here.findings), *report.notes))
    with planned(source, chosen, options, target=target_path, writing=True, control=control) as conversion:
        if options.dry_run:
            copied = copying.CopyResult(conversion.plan.data_bytes, 0, conversion.plan.file_size)
            report = make_report(conversion, target_path, copied, verified="not written")
        else:
            done, copied, maps = _write(conversion, target_path, options, control)
            report = replace(
                make_report(done, target_path, copied, verified=options.verify),
                source_map=maps[0],
                target_map=maps[1],
            )
    notes = report.notes
    if wanted:
        notes = (*notes, NOT_CONFINED)
    return replace(report, seconds=time.monotonic() - started, notes=notes)


@contextmanager
def planned(
    source: AnySource,
    chosen: DiskFormat,
    options: ConvertOptions,
    *,
    target: Path | None = None,
    parent_file: LocalFile | None = None,
    opener: Opener = OPENER,
    writing: bool = False,
    control: Control = SILENT,
) -> Iterator[PlannedConversion]:
    """Open and judge the source, and plan its conversion to the chosen format.

    ``writing`` says that it will be carried out: a source that still arrives is not waited for then.
    ``target`` is the path that will be written, which a differencing disk's link to its parent is relative to.
    ``parent_file`` is ``options.parent``, where somebody else opened that.
    """
    control = control.within(options.limits.seconds)
    with ExitStack() as stack:
        if isinstance(source, Source):
            opened = source
        else:
            scratch = None if target is None else target.parent
            asked = reading(options, scratch=scratch, deep=True, later=True)
            asked = replace(asked, opener=opener, whole=writing and not options.dry_run)
            file = source.file if isinstance(source, addresses.Opened) else source
            file = file.again() if type(file) is LocalFile else file
            opened = stack.enter_context(open_source(file, asked, control=control))
        if opened.opened is not None:
            stack.enter_context(opened.opened.blamed())
        parent = None
        if options.parent is not None:
            parent = stack.enter_context(open_parent(options, chosen, parent_file, opener))
        link = None
        if parent is not None:
            child = target or Path("child")
            link = link_to(parent.image, Path(options.parent or ""), child, options.parent_map)
        with located(opened.file):
            conversion = _decided(opened, chosen, options, parent, link, writing=writing, control=control)
        yield conversion
        if opened.opened is not None and opened.opened.proof is not None:
            opened.opened.proof.settle()  # also of what only measured or planned
            opened.opened.forget()


def _decided(
    source: Source,
    chosen: DiskFormat,
    options: ConvertOptions,
    parent: Source | None,
    link: ParentLink | None,
    *,
    writing: bool,
    control: Control,
) -> PlannedConversion:
    """The plan, or, where the copy is not to wait for the rest of the source, its draft."""
    size, notes = _disk_size(source.image, options)
    image, more = _with_gpt(source.image, size, fix=options.fix_gpt)
    asked, notes = writer_options(options, link), notes + more
    if writing and _as_it_comes(source, options):
        draft = draft_plan(image, source.format, chosen.name, asked, size, notes)
        if not isinstance(draft.layout(), EncodedLayout):  # which encodes whole blocks of a whole plan
            return PlannedConversion(source, image, draft, found=FoundBlocks(image, draft, options.limits, control))
    plan = build_plan(
        image,
        source_format=source.format,
        target_format=chosen.name,
        options=asked,
        virtual_size=size,
        notes=notes,
        parent=None if parent is None else parent.image,
        limits=options.limits,
        jobs=options.jobs,
        control=control,
    )
    options.limits.check("output_bytes", bytes_to_write(plan, options), "the target would take")
    return PlannedConversion(source, image, plan, parent)


def _as_it_comes(source: Source, options: ConvertOptions) -> bool:
    """Whether to copy while the rest of the source still arrives, instead of planning all of it first.

    What is to be made room for, or compared with a parent, is planned first.
    """
    if options.dry_run or options.preallocate or options.parent is not None:
        return False
    coming = addresses.arriving(source.file)
    return coming is not None and not coming.all_here


@contextmanager
def at_hand(
    source: str | os.PathLike[str] | LocalFile | addresses.Opened,
    options: ConvertOptions,
    *,
    scratch: Path | None = None,
    control: Control = SILENT,
) -> Iterator[addresses.Opened]:
    """The source as a confined process can take it, and its checksum taken, by this one.

    Whoever makes something of it calls ``settle`` before that has a name.
    """
    if isinstance(source, LocalFile):
        yield addresses.Opened(source, (), source.identity)
        return
    if isinstance(source, addresses.Opened):
        yield source  # whose owner closes it
        return
    access, following = reading(options).access, options.follow_references
    opened = addresses.open_named(source, access, folder=scratch, following=following, later=True, control=control)
    try:
        yield opened
        opened.settle()
        opened.forget()
    finally:
        opened.close()


def reading(
    options: ConvertOptions, *, scratch: Path | None = None, deep: bool = False, later: bool = False
) -> Reading:
    """How the source is to be opened; ``scratch`` is a folder for what has to be unpacked.

    ``deep`` judges all tables, not only headers; ``later``: the caller settles.
    """
    following = Following(options.parent_map, options.ignore_parent_id) if options.follow_references else None
    view = OpenOptions(snapshot=options.snapshot, size_from=options.size_from)
    return Reading(
        options.source_format,
        options.allow,
        following,
        view,
        scratch,
        options.limits,
        deep=deep,
        access=access_to(options),
        stated=options.stated_format,
        later=later,
    )


def access_to(options: ConvertOptions) -> addresses.Access:
    """How what lies elsewhere may be reached."""
    return addresses.Access(
        redirect_hosts=options.redirect_hosts,
        timeout=options.http_timeout,
        checksum=options.checksum,
        keyring=options.keyring,
        partial_dir=options.partial_dir,
        glance_url=options.glance_url,
        os_cloud=options.os_cloud,
    )


def open_parent(
    options: ConvertOptions, chosen: DiskFormat, file: LocalFile | None = None, opener: Opener = OPENER
) -> Source:
    """The parent of a differencing target, with the chain below it: the caller named it."""
    assert options.parent is not None
    if "differencing" not in chosen.subformats:
        raise UsageError(f"a {chosen.name} has no parent", hint="differencing disks are VHD or VHDX")
    following = Following(options.parent_map, options.ignore_parent_id)
    asked = Reading(allow=options.allow, following=following, limits=options.limits, opener=opener)
    parent = open_source(file or options.parent, asked)
    try:
        check_kinds(parent, chosen)
        if parent.depth == MAX_DEPTH:
            raise chain_too_long(parent.original.name)
    except BaseException:
        parent.close()
        raise
    return parent


def check_kinds(parent: Source, chosen: DiskFormat) -> None:
    """UsageError unless parent and child have one format: hosts look for no other."""
    if parent.format != chosen.name:
        raise UsageError(
            f"the parent is a {parent.format}, its child a {chosen.name}",
            hint="both are VHD, or both VHDX; convert one of them",
            path=parent.original.name,
        )


def writer_options(options: ConvertOptions, parent: ParentLink | None = None) -> WriterOptions:
    """What the target's writer is to know."""
    subformat = options.subformat
    if parent is not None:
        if subformat not in (None, "differencing"):
            raise UsageError(f"a {subformat} disk has no parent", hint="leave out --parent or --subformat")
        subformat = "differencing"
    elif subformat == "differencing":
        raise UsageError("a differencing disk needs a parent", hint="add --parent FILE")
    made = WriterOptions(
        identifier=options.identifier or uuid.uuid4(),
        subformat=subformat,
        block_size=options.block_size,
        sector_size=options.sector_size,
        creator=options.creator,
        compression=options.compression,
        parent=parent,
    )
    return made if options.timestamp is None else replace(made, timestamp=options.timestamp)


def _may_have_gpt(head: bytes) -> bool:
    """Whether it is worth loading contents.gpt: a GPT's signature behind a sector of 512 or 4096, or a type EE."""
    return b"EFI PART" in (head[512:520], head[4096:]) or 0xEE in head[450:510:16]


def _with_gpt(image: DiskImage, size: int, *, fix: bool) -> tuple[DiskImage, tuple[str, ...]]:
    """The disk with its GPT's backup header in the last sector, or what to say where it is elsewhere."""
    if not _may_have_gpt(image.pread(0, 4104)):
        return image, ()
    from imagekit.contents import gpt
    from imagekit.contents.patched import PatchedImage

    found = gpt.find(image)
    if found is None:
        return image, ()
    notes = tuple(f"{problem.message} [{problem.code}]" for problem in found.problems)
    if gpt.backup_is_last(found, size):
        return image, notes
    if not fix:
        return image, (*notes, "the GPT's backup header is not in the last sector; --fix-gpt moves it there")
    patched = PatchedImage(image, gpt.moved_backup(image, size), size)
    return patched, (*notes, "the GPT's backup header was moved to the last sector")


def _disk_size(image: DiskImage, options: ConvertOptions) -> tuple[int, tuple[str, ...]]:
    unit = max(options.sector_size or SECTOR, options.align or SECTOR)
    return target_size(image.virtual_size, options.size, minimum=options.minimum_size, unit=unit)


def target_format(target: str | os.PathLike[str], options: ConvertOptions) -> DiskFormat:
    """What to write: as asked, else as the target's suffix says."""
    if options.target_format is not None:
        chosen = registry.find(options.target_format)
    else:
        found = registry.by_suffix(os.fspath(target))
        if found is None and (name := registry.suffix_format(os.fspath(target))):
            raise _not_written(name)
        if found is None:
            raise UsageError(
                f"{os.fspath(target)}: the name does not say which format to write",
                hint="add -O vhd, or name it NAME.vhd",
            )
        chosen = found
    if not chosen.subformats:
        raise _not_written(chosen.name)
    return chosen


def _not_written(name: str) -> UnsupportedFeature:
    writable = ", ".join(name for name, one in registry.formats().items() if one.subformats)
    from imagekit.qemu_img import EXTERNAL_TARGETS

    other = f"; -O {name} --allow external-qemu-img has qemu-img write it" if name in EXTERNAL_TARGETS else ""
    return UnsupportedFeature(f"imagekit does not write {name}", hint=f"formats written: {writable}{other}")


def bytes_to_write(plan: ConversionPlan, options: ConvertOptions) -> int:
    """What the target will really take on its medium, at most."""
    return plan.file_size if options.preallocate else plan.data_bytes


def _write(
    conversion: PlannedConversion, target: Path, options: ConvertOptions, control: Control
) -> tuple[PlannedConversion, copying.CopyResult, Maps]:
    plan = conversion.plan
    check_space(target.parent, bytes_to_write(plan, options))
    with new_file(target) as pending:
        if options.preallocate:
            pending.file.preallocate(plan.file_size)
        conversion, copied = carry_out(conversion, pending.file, options, control)
        if options.verify == "qemu-img":
            _verify_by_qemu_img(conversion, pending, options)
        maps = draw_maps(conversion, pending.file, options)
        conversion.check_unchanged()
        finish(pending, overwrite=options.overwrite, sync=options.sync, control=control)
    return conversion, copied, maps


def carry_out(
    conversion: PlannedConversion, target: LocalFile, options: ConvertOptions, control: Control
) -> tuple[PlannedConversion, copying.CopyResult]:
    """Copy to the empty file ``target``, read it back as far as we do that ourselves, look at the sources again.

    Returns the conversion with its whole plan as well.
    """
    source, plan, found = conversion.source, conversion.plan, conversion.found
    with located(source.file):
        sums = Sums() if options.verify == "content" else None
        copied = copying.copy_image(
            plan,
            conversion.image,
            source.file,
            target,
            jobs=options.jobs,
            sums=sums,
            found=found,
            control=control,
        )
    if found is not None:
        plan = found.plan()
        conversion = replace(conversion, plan=plan, found=None)
    conversion.check_unchanged()
    if options.verify != "none":
        verify_structure(plan, target, file_size=copied.file_size)
    if options.verify == "content":
        written = conversion.open_target(target)
        known = () if sums is None else sums.parts()
        verify_content(conversion.image, written, known=known, jobs=options.jobs, control=control)
        conversion.check_unchanged()
    return conversion, copied


def draw_maps(conversion: PlannedConversion, target: LocalFile, options: ConvertOptions) -> Maps:
    """Where source and target hold data; empty unless asked for."""
    if not options.map_cells:
        return (), ()
    with located(conversion.source.file):
        source = _map(conversion.image, options.map_cells)
    return source, _map(conversion.open_target(target), options.map_cells)


def _map(image: DiskImage, cells: int) -> tuple[int, ...]:
    return occupancy(image.extents(), image.virtual_size, cells)


def _verify_by_qemu_img(conversion: PlannedConversion, pending: Pending, options: ConvertOptions) -> None:
    source, plan = conversion.source, conversion.plan
    if source.chain or conversion.parent or conversion.image is not source.image or options.snapshot:
        raise UnsupportedFeature(
            "qemu-img does not see this disk as it was asked for (a chain, a snapshot, a mended GPT)",
            hint="--verify content",
        )
    from imagekit import qemu_img

    path = pending.part or _by_descriptor(pending.file)
    addresses.complete(source.file)
    nameless = source.wrappers or addresses.is_fetched(source.file)
    origin = _by_descriptor(source.file) if nameless else source.file.name
    qemu_img.compare(origin, plan.source_format, path, plan.target_format)


def _by_descriptor(file: LocalFile) -> str:
    return f"/proc/{os.getpid()}/fd/{file.fileno()}"


def make_report(conversion: PlannedConversion, target: Path, copied: copying.CopyResult, *, verified: str) -> Report:
    """The report, but for the time it took."""
    source, plan = conversion.source, conversion.plan
    warnings = tuple(finding.message for finding in source.findings)
    return Report(
        source=source.original.name,
        source_format=source.format,
        source_size=source.original.size,
        source_virtual_size=source.image.virtual_size,
        target=os.fspath(target),
        target_format=plan.target_format,
        subformat=plan.writer_options.subformat or registry.find(plan.target_format).subformats[0],
        virtual_size=plan.virtual_size,
        target_size=copied.file_size,
        identifier=str(plan.writer_options.identifier),
        data_bytes=copied.data_bytes,
        kernel_copied_bytes=copied.kernel_copied_bytes,
        seconds=0.0,
        verified=verified,
        notes=warnings + plan.notes,
    )
