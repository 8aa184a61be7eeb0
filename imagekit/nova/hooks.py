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

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from imagekit.child import Child
from imagekit.errors import ImagekitError, UsageError
from imagekit.nova.vhdutils import VHDUtils
from imagekit.warm import make_ready

CONVERTED = ("qcow2", "raw", "vmdk", "vdi")
READY = ("vhd", "vhdx")


def enable(
    driver: Any,
    *,
    formats: Iterable[str] = ("qcow2", "raw"),
    target: str = "vhdx",
    child: Child | None = None,
    allow: Iterable[str] = (),
) -> None:
    """Make a ``compute_hyperv.nova.driver.HyperVDriver`` take images in ``formats``, as ``target`` disks.

    Call it once, when the driver exists. ``child`` says which Python converts, here and in the driver's own
    :class:`VHDUtils` (imagekit.child); ``allow`` are rules of the safety policy that the operator allows. Raises
    UsageError for an object that is no such driver.
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
    make_ready()
    child = child or Child()
    for cache in caches:
        cache.fetch = _fetching(cache, wanted, target, child, tuple(sorted(allow)))
    for utilities in _unique(_parts(driver, "_vhdutils")):
        if isinstance(utilities, VHDUtils):
            utilities.run_with(child)
    for kind in {type(manager) for manager in managers}:
        known = kind._TYPE_FOR_DISK_FORMAT
        kind._TYPE_FOR_DISK_FORMAT = {**known, **dict.fromkeys(wanted, known["vhd"])}
    supported = {f"supports_image_type_{one}": True for one in wanted}
    driver.capabilities = {**driver.capabilities, **supported}


def _parts(driver: Any, name: str) -> Iterator[Any]:
    """The driver's objects of that name: its own, and those of its parts."""
    for owner in (driver, *getattr(driver, "__dict__", {}).values()):
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
            child.run(
                "adopt",
                {"path": path, "declared": declared, "formats": formats, "target": target, "allow": allow},
            )
        except ImagekitError as error:
            raise exception.ImageUnacceptable(image_id=image_id, reason=str(error)) from error

    return fetch
