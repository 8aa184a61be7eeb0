"""Convert one image: open and judge, plan, copy, verify, publish.

This is the whole way of the data, a step a function; what each step does is in its own module.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from imagekit import copying, qemu_img
from imagekit.errors import UnsupportedFeature, UsageError
from imagekit.formats import registry
from imagekit.formats.base import DiskFormat, WriterOptions
from imagekit.plan import ConversionPlan, ConvertOptions, build_plan
from imagekit.progress import SILENT, Control
from imagekit.publish import Pending, check_space, check_target, new_file
from imagekit.report import Report
from imagekit.sources import Source, located, open_source
from imagekit.verify import verify_content, verify_structure

DEFAULTS = ConvertOptions()


@dataclass(frozen=True, slots=True)
class PlannedConversion:
    """An open source and the plan for it; lives as long as the source is open."""

    source: Source
    plan: ConversionPlan


def convert_image(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    options: ConvertOptions = DEFAULTS,
    *,
    control: Control = SILENT,
) -> Report:
    """Convert ``source`` to ``target`` and report. With ``options.dry_run`` nothing is written.

    Raises the error of whichever step failed; then no target exists, and an old one is untouched.
    """
    started = time.monotonic()
    chosen = target_format(target, options)
    target_path = check_target(target, overwrite=options.overwrite, source=os.fspath(source))
    with planned(source, chosen, options, control=control) as conversion:
        if options.dry_run:
            copied = copying.CopyResult(conversion.plan.data_bytes, 0)
            return _report(conversion, target_path, copied, started, verified="not written")
        copied = _write(conversion, target_path, options, control)
        return _report(conversion, target_path, copied, started, verified=options.verify)


@contextmanager
def planned(
    source: str | os.PathLike[str],
    chosen: DiskFormat,
    options: ConvertOptions,
    *,
    control: Control = SILENT,
) -> Iterator[PlannedConversion]:
    """Open and judge the source, and plan its conversion to the chosen format."""
    writer_options = WriterOptions(
        identifier=options.identifier or uuid.uuid4(),
        subformat=options.subformat,
        block_size=options.block_size,
    )
    if options.timestamp is not None:
        writer_options = replace(writer_options, timestamp=options.timestamp)
    with open_source(source, declared=options.source_format, allow=options.allow) as opened:
        with located(opened.file):
            plan = build_plan(
                opened.image,
                source_format=opened.format,
                target_format=chosen.name,
                options=writer_options,
                size=options.size,
                control=control,
            )
        yield PlannedConversion(opened, plan)


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
    return UnsupportedFeature(f"imagekit does not write {name}", hint=f"formats written: {writable}")


def _write(
    conversion: PlannedConversion, target: Path, options: ConvertOptions, control: Control
) -> copying.CopyResult:
    source, plan = conversion.source, conversion.plan
    check_space(target.parent, plan.file_size if options.preallocate else plan.data_bytes)
    with new_file(target) as pending:
        if options.preallocate:
            pending.file.preallocate(plan.file_size)
        with located(source.file):
            copied = copying.copy_image(
                plan, source.image, source.file, pending.file, jobs=options.jobs, control=control
            )
        source.check_unchanged()
        _verify(conversion, pending, options, control)
        source.check_unchanged()
        control.tell("sync", 0, plan.file_size)
        if options.sync:
            pending.file.flush()
        control.check()  # the last look: what has its name stays
        pending.commit(overwrite=options.overwrite, sync=options.sync)
    return copied


def _verify(conversion: PlannedConversion, pending: Pending, options: ConvertOptions, control: Control) -> None:
    if options.verify == "none":
        return
    source, plan = conversion.source, conversion.plan
    verify_structure(plan, pending.file)
    if options.verify == "content":
        written = registry.find(plan.target_format).open(pending.file)
        verify_content(source.image, written, jobs=options.jobs, control=control)
    elif options.verify == "qemu-img":
        path = pending.part or f"/proc/{os.getpid()}/fd/{pending.file.fileno()}"
        qemu_img.compare(source.file.name, plan.source_format, path, plan.target_format)


def _report(
    conversion: PlannedConversion, target: Path, copied: copying.CopyResult, started: float, *, verified: str
) -> Report:
    source, plan = conversion.source, conversion.plan
    warnings = tuple(finding.message for finding in source.findings)
    return Report(
        source=source.file.name,
        source_format=source.format,
        source_size=source.file.size,
        source_virtual_size=source.image.virtual_size,
        target=os.fspath(target),
        target_format=plan.target_format,
        subformat=plan.writer_options.subformat or registry.find(plan.target_format).subformats[0],
        virtual_size=plan.virtual_size,
        target_size=plan.file_size,
        identifier=str(plan.writer_options.identifier),
        data_bytes=copied.data_bytes,
        kernel_copied_bytes=copied.kernel_copied_bytes,
        seconds=time.monotonic() - started,
        verified=verified,
        notes=warnings + plan.notes,
    )
