"""The library's way to Glance: an image file, or a conversion, as ``glance:NAME`` (imagekit.glance.upload)."""

from __future__ import annotations

import os
import tempfile
import threading
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagekit import api
from imagekit.conversion import access_to, target_format
from imagekit.errors import UsageError
from imagekit.glance.upload import Destination, Upload, UploadOptions, fixed_vhd
from imagekit.plan import ConvertOptions
from imagekit.profiles import apply_profile
from imagekit.progress import Callback, Control

if TYPE_CHECKING:
    from imagekit.report import Report

DEFAULT_PROFILE = "hyperv"
"""Of a conversion that names neither a file nor a format: VHDX, which both generations take."""


def upload(
    image: str | os.PathLike[str],
    target: str,
    *,
    format: str | None = None,
    progress: Callback | None = None,
    cancel: threading.Event | None = None,
    **options: Any,
) -> Upload:
    """Send an image file to Glance as ``glance:NAME``; active with our hash afterwards, or not there.

    min_disk and the properties for Hyper-V come from a look at the disk. ``options`` are the fields of
    :class:`~imagekit.glance.upload.UploadOptions` (``properties`` win over what was found, an empty one is left out),
    and those of :func:`imagekit.open_image`, with ``glance_url`` or ``os_cloud`` for where.
    """
    asked = _taken(options)
    reads = api.reading_options(format, options)
    if reads.follow_references or reads.snapshot is not None:
        raise UsageError(
            "a file is uploaded as it is", hint="convert_and_upload makes one disk of a chain or snapshot"
        )
    destination = Destination.open(target, access_to(reads), same_name=asked.same_name)
    return destination.fill(image, reads, asked, control=Control(progress, cancel))


def convert_and_upload(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str] | None,
    image: str,
    *,
    profile: str | None = None,
    progress: Callback | None = None,
    cancel: threading.Event | None = None,
    **options: Any,
) -> tuple[Report, Upload]:
    """Convert, and send the result as the image ``glance:NAME``; ``options`` are those of both.

    Without a ``target`` it is a temporary file, a VHDX unless said otherwise; one that was named stays, also when the
    upload fails. Who we are, and that the name is free, is looked at before the conversion. It is verified by content
    unless ``verify`` is ``"none"`` or ``"qemu-img"``.
    """
    asked = _taken(options)
    if options.get("dry_run"):
        raise UsageError("a dry run has nothing to upload", hint="leave out --upload")
    if options.get("verify", "structure") == "structure":
        options["verify"] = "content"
    if target is None and profile is None and options.get("target_format") is None:
        profile = DEFAULT_PROFILE
    wanted = api.make_options(options)
    if profile is not None:
        wanted = apply_profile(profile, wanted)
    kind = target_format(target or "", wanted)
    if asked.disk_format is None and (kind.name, wanted.subformat) == ("vhd", "fixed"):
        raise fixed_vhd("what would be written")
    destination = Destination.open(image, access_to(wanted), same_name=asked.same_name)
    with ExitStack() as stack:
        if target is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="imagekit-"))
            target = Path(folder) / f"disk{kind.suffixes[0]}"
        report = api.convert(source, target, profile=profile, progress=progress, cancel=cancel, **options)
        reads = ConvertOptions(source_format=kind.name, limits=wanted.limits)
        return report, destination.fill(target, reads, asked, control=Control(progress, cancel))


def _taken(options: dict[str, Any]) -> UploadOptions:
    """Those keywords that are about the image to be; they are taken out."""
    return UploadOptions(**{one.name: options.pop(one.name) for one in fields(UploadOptions) if one.name in options})
