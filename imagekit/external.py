"""Targets that only qemu-img writes (VMDK, VDI, QED, Parallels): asked for by name, and allowed by the caller.

imagekit reads and judges the source and writes a raw disk; qemu-img, confined, makes the target of that disk, which
is of imagekit's own making. So no stranger's bytes but the guest's reach it.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from imagekit import policy, qemu_img
from imagekit.conversion import convert_image
from imagekit.errors import UnsupportedFeature
from imagekit.formats import registry
from imagekit.formats.base import MiB
from imagekit.formats.files import LocalFile, kernel_copy
from imagekit.plan import ConvertOptions
from imagekit.progress import SILENT, Control
from imagekit.publish import check_target, new_file
from imagekit.records import replace
from imagekit.report import Report
from imagekit.sources import located
from imagekit.verify import verify_content

STEP = 16 * MiB
"""Bytes copied between two looks at whether to stop."""


def is_external(options: ConvertOptions) -> bool:
    """Whether the format asked for is one that qemu-img has to write."""
    wanted = options.target_format
    if wanted is None or wanted not in qemu_img.EXTERNAL_TARGETS:
        return False
    known = registry.formats().get(wanted)
    return known is None or not known.subformats


def convert_by_qemu_img(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    options: ConvertOptions,
    *,
    control: Control = SILENT,
) -> Report:
    """Convert ``source`` to a target that qemu-img writes. UnsafeImage unless external-qemu-img is allowed."""
    name = options.target_format
    assert name is not None
    wanted = policy.finding("external-qemu-img", f"{name} is written by qemu-img only")
    policy.enforce([wanted], allow=options.allow)
    for option in ("block_size", "sector_size", "compression", "parent"):
        if getattr(options, option) is not None:
            raise UnsupportedFeature(f"qemu-img's {name} has no choice of {option.replace('_', ' ')}")
    if options.dry_run:
        raise UnsupportedFeature("what qemu-img will write is not known beforehand", hint="leave out --dry-run")
    if options.verify == "qemu-img":
        raise UnsupportedFeature("qemu-img cannot be the second opinion on its own work", hint="--verify content")
    path = check_target(target, overwrite=options.overwrite, source=os.fspath(source))
    # A VMDK holds its own name: it is made under that, in a folder of its own on the target's medium.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".imagekit-", ignore_cleanup_errors=True) as private:
        raw, made = Path(private, "disk.raw"), Path(private, "made", path.name)
        made.parent.mkdir()
        plain = replace(options, target_format="raw", subformat=None, sync=False, preallocate=False, overwrite=False)
        report = convert_image(source, raw, plain, control=control)
        qemu_img.convert_out(raw, name, made, subformat=options.subformat, control=control)
        verified = _verify(name, made, raw, options, control)
        size = made.stat().st_size
        with LocalFile.open_source(made) as file, new_file(path) as pending:
            _copy(file, pending.file, control)
            pending.commit(overwrite=options.overwrite, sync=options.sync)
    subformats = qemu_img.EXTERNAL_TARGETS[name]
    return replace(
        report,
        target=os.fspath(target),
        target_format=name,
        subformat=options.subformat or next(iter(subformats), "default"),
        target_size=size,
        verified=verified,
        notes=(*report.notes, f"written by qemu-img ({name})"),
    )


def _copy(file: LocalFile, target: LocalFile, control: Control) -> None:
    """All of a file to an empty one, its holes as holes."""
    target.truncate(file.size)
    for start, length in file.data_ranges(0, file.size):
        for offset in range(start, start + length, STEP):
            control.check()
            count = min(STEP, start + length - offset)
            done = kernel_copy(file, offset, target, offset, count)
            if done < count:
                target.pwrite(offset + done, file.pread(offset + done, count - done))


def _verify(name: str, made: Path, raw: Path, options: ConvertOptions, control: Control) -> str:
    """The level to which the target was verified: none, where imagekit does not read the format."""
    if options.verify == "none" or name not in registry.formats():
        return "none"
    chosen = registry.find(name)
    with LocalFile.open_source(made) as file, LocalFile.open_source(raw) as disk, located(file):
        written = chosen.open(file)
        list(written.extents(0, 1))
        if options.verify == "content":
            plain = registry.find("raw").open(disk)
            verify_content(plain, written, jobs=options.jobs, control=control)
    return options.verify
