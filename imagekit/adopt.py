"""A downloaded image becomes a disk that Hyper-V starts, in place: what a driver's cache does with it.

Judged first: content must be in the format that Glance declared, and the safety policy must have nothing against it.
A VHD or VHDX stays as it is; anything else is converted beside it and takes its place when it is complete.

Not here: the cache itself (imagekit.cache, compute-hyperv), and who calls this in a process of its own
(imagekit.child_main).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from imagekit import api
from imagekit.errors import UnsafeImage, UsageError
from imagekit.formats.base import JSON
from imagekit.progress import Callback

CONVERTED = ("qcow2", "raw", "vmdk", "vdi")
READY = ("vhd", "vhdx")


def adopt(
    path: str,
    declared: str,
    *,
    formats: Iterable[str] = ("qcow2", "raw"),
    target: str = "vhdx",
    allow: Iterable[str] = (),
    progress: Callback | None = None,
    cancel: threading.Event | None = None,
) -> dict[str, JSON]:
    """Judge the image at ``path``, and replace it by a ``target`` disk unless it is a VHD or VHDX already.

    ``declared`` is Glance's disk_format; content in another format is refused (VHDX declared as VHD is not: that is
    how such images have been registered). Raises what the conversion raises; then the file is what it was.
    """
    wanted = tuple(formats)
    if declared in READY:
        # Whatever its name: content decides which of the two it is. Planning a copy applies the whole policy.
        found = _found(path, cancel)
        if found not in READY:
            raise UsageError(f"declared {declared}, found {found}", path=path)
        api.convert(
            path,
            Path(f"{path}.part.{found}"),
            source_format=found,
            target_format=found,
            dry_run=True,
            allow=tuple(allow),
            confined=True,
            progress=progress,
            cancel=cancel,
        )
        return {"format": found, "converted": False}
    if declared not in wanted:
        raise UsageError(f"images in the format {declared!r} are not taken", hint=f"formats: {', '.join(wanted)}")
    if declared == "raw" and (found := _found(path, cancel)) != "raw":
        # As raw it would be read as it is, and do no harm; but nobody means it, and Nova itself refuses it.
        raise UnsafeImage(f"declared raw, found {found}", rule="format-mismatch", path=path)
    part = Path(f"{path}.part.{target}")
    try:
        api.convert(
            path,
            part,
            source_format=declared,
            target_format=target,
            overwrite=True,
            allow=tuple(allow),
            verify="structure",
            confined=True,
            progress=progress,
            cancel=cancel,
        )
        part.replace(path)
    finally:
        with suppress(FileNotFoundError):
            part.unlink()
    return {"format": target, "converted": True}


def _found(path: str, cancel: threading.Event | None) -> str:
    return api.info(path, confined=True, cancel=cancel).info.format
