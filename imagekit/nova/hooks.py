"""compute-hyperv takes qcow2 and raw images, without a fork.

compute-hyperv 16 downloads an image to ``_base/ID`` and decides by its first and last bytes whether it is a VHD or a
VHDX; anything else it refuses, in three places. :func:`enable` opens these on a driver object:

    ImageCache.fetch                                the download is judged, and converted in place if need be
    BlockDeviceInfoManager._TYPE_FOR_DISK_FORMAT    qcow2 and raw are disks
    HyperVDriver.capabilities                       the scheduler sends such images here

Nothing of compute-hyperv is imported or replaced for anybody else but the driver given. Images that imagekit's policy
refuses become Nova's ``ImageUnacceptable``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from imagekit.child import Child
from imagekit.errors import ImagekitError, UnsafeImage, UsageError

CONVERTED = ("qcow2", "raw", "vmdk", "vdi")
READY = ("vhd", "vhdx")
_USED_LATER = (
    "numpy",
    "imagekit.nova.vhdutils",
    "imagekit.formats.raw",
    "imagekit.formats.qcow2",
    "imagekit.formats.vmdk",
    "imagekit.formats.vdi",
    "imagekit.formats.vhd",
    "imagekit.formats.vhd_header",
    "imagekit.formats.vhd_locators",
    "imagekit.formats.vhdx",
    "imagekit.formats.vhdx_image",
)


def enable(
    driver: Any,
    *,
    formats: Iterable[str] = ("qcow2", "raw"),
    target: str = "vhdx",
    child: Child | None = None,
    allow: Iterable[str] = (),
) -> None:
    """Make a ``compute_hyperv.nova.driver.HyperVDriver`` take images in ``formats``, as ``target`` disks.

    Call it once, when the driver exists. ``child`` says which Python converts (imagekit.child); ``allow`` are rules
    of the safety policy that the operator allows. Raises UsageError for an object that is no such driver.
    """
    wanted = tuple(formats)
    if unknown := sorted(set(wanted) - set(CONVERTED)):
        raise UsageError(f"cannot convert {', '.join(unknown)}", hint=f"choose from: {', '.join(CONVERTED)}")
    if target not in READY:
        raise UsageError(f"target {target!r}", hint=f"choose one of: {', '.join(READY)}")
    caches = _unique(_parts(driver, "_imagecache"))
    managers = _unique(_parts(driver, "_block_dev_man"))
    if not caches or not managers or not isinstance(getattr(driver, "capabilities", None), dict):
        raise UsageError("this is not compute-hyperv's driver", hint="give the HyperVDriver object, once it is made")
    # Now, not in the middle of a spawn: loading a module is time that an agent's other green threads wait.
    for module in _USED_LATER:
        importlib.import_module(module)
    for cache in caches:
        cache.fetch = _fetching(cache, wanted, target, child or Child(), tuple(sorted(allow)))
    for kind in {type(manager) for manager in managers}:
        known = kind._TYPE_FOR_DISK_FORMAT
        kind._TYPE_FOR_DISK_FORMAT = {**known, **dict.fromkeys(wanted, known["vhd"])}
    supported = {f"supports_image_type_{one}": True for one in wanted}
    driver.capabilities = {**driver.capabilities, **supported}


def _parts(driver: Any, name: str) -> Iterator[Any]:
    """The driver's objects of that name: its own, and those of its parts."""
    for owner in (driver, *vars(driver).values()):
        found = getattr(owner, "__dict__", {}).get(name)
        if found is not None:
            yield found


def _unique(objects: Iterable[Any]) -> list[Any]:
    return list({id(one): one for one in objects}.values())


def _fetching(
    cache: Any, formats: tuple[str, ...], target: str, child: Child, allow: tuple[str, ...]
) -> Callable[..., None]:
    """``ImageCache.fetch`` that leaves at ``path`` a disk that Hyper-V starts."""

    def fetch(context: Any, image_id: str, path: str, trusted_certs: Any = None) -> None:
        from nova import exception
        from nova.virt import images

        # Nova's own function limits concurrent work itself; doing so once more around it would wait for itself.
        images.fetch(context, image_id, path, trusted_certs)
        declared = str(cache.get_image_format(context, image_id) or "")
        if declared == "iso":
            return
        try:
            make_bootable(path, declared, formats=formats, target=target, child=child, allow=allow)
        except ImagekitError as error:
            raise exception.ImageUnacceptable(image_id=image_id, reason=str(error)) from error

    return fetch


def make_bootable(
    path: str,
    declared: str,
    *,
    formats: tuple[str, ...] = ("qcow2", "raw"),
    target: str = "vhdx",
    child: Child | None = None,
    allow: tuple[str, ...] = (),
) -> None:
    """Judge the image at ``path``, and replace it by a ``target`` disk unless it is a VHD or VHDX already.

    ``declared`` is Glance's disk_format; content in another format is refused (VHDX declared as VHD is not: that is
    how such images have been registered).
    """
    child = child or Child()
    if declared in READY:
        # Whatever its name: content decides which of the two it is. Opening it applies the policy.
        found = child.run("info", {"image": path})["format"]
        if found in READY:
            child.run("measure", {"source": path, "format": found, "source_format": found, "allow": allow})
            return
        raise UsageError(f"declared {declared}, found {found}", path=path)
    if declared not in formats:
        raise UsageError(f"images in the format {declared!r} are not taken", hint=f"formats: {', '.join(formats)}")
    if declared == "raw" and (found := child.run("info", {"image": path})["format"]) != "raw":
        # As raw it would be read as it is, and do no harm; but nobody means it, and Nova itself refuses it.
        raise UnsafeImage(f"declared raw, found {found}", rule="format-mismatch", path=path)
    part = f"{path}.part.{target}"
    try:
        child.run(
            "convert",
            {
                "source": path,
                "source_format": declared,
                "target": part,
                "target_format": target,
                "overwrite": True,
                "allow": allow,
                "verify": "structure",
                "confined": True,
            },
        )
        Path(part).replace(path)
    finally:
        with suppress(FileNotFoundError):
            Path(part).unlink()
