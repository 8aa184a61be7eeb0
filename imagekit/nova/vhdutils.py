"""A drop-in for os-win's ``VHDUtils``: the same methods, results and errors, without Windows' virtual disk service.

compute-hyperv takes it by its import path, from os-win's ``utilsfactory.utils_map``; it works on Windows and on
Linux, on VHD and VHDX, and runs no other program. What takes time (convert, merge, resize) runs in a process of its
own. Attaching a disk to the host is Windows' business: there those methods are os-win's own, elsewhere they refuse.

Follows os_win.utils.storage.virtdisk.vhdutils of os-win 5.9 for names, parameters and results. Different on purpose:
sizes by file size are whole sectors (imagekit.nova.sizes), and every file is written complete or not at all.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from imagekit.child import Child
from imagekit.errors import SourceError, UnsupportedFeature
from imagekit.formats import registry
from imagekit.formats.base import DiskFormat, DiskImage
from imagekit.formats.files import LocalFile
from imagekit.nova.failures import (
    ERROR_FILE_EXISTS,
    ERROR_FILE_NOT_FOUND,
    ERROR_VHD_INVALID_TYPE,
    VHDException,
    api_failure,
    as_os_win,
)
from imagekit.nova.sizes import internal_size
from imagekit.progress import Callback
from imagekit.references import Following, find
from imagekit.sources import located
from imagekit.warm import make_ready

VHD, VHDX = "VHD", "VHDX"
VENDOR_MICROSOFT = "ec984aec-a0f9-47e9-901f-71415a66345b"
"""VIRTUAL_STORAGE_TYPE_VENDOR_MICROSOFT of virtdisk.h."""
DEVICE_IDS = {VHD: 2, VHDX: 3}
"""VIRTUAL_STORAGE_TYPE_DEVICE_…"""
FIXED, DYNAMIC, DIFFERENCING = 2, 3, 4
SUBTYPES = {"fixed": FIXED, "dynamic": DYNAMIC, "differencing": DIFFERENCING}
_SUBFORMATS = {number: name for name, number in SUBTYPES.items()}

# GET_VIRTUAL_DISK_INFO_… of virtdisk.h, and what os-win makes of each.
INFO_MEMBERS = {
    1: ("VirtualSize", "PhysicalSize", "BlockSize", "SectorSize"),
    3: ("ParentResolved", "ParentPath"),
    6: ("DeviceId", "VendorId"),
    7: ("ProviderSubtype",),
    13: ("IsLoaded",),
}
SIZE, PARENT_LOCATION, PROVIDER_SUBTYPE = 1, 3, 7

SIGNATURE_VHDX, SIGNATURE_VHD = b"vhdxfile", b"conectix"


class VHDUtils:
    """os-win's ``VHDUtils`` on imagekit. Raises the OSWinException family and nothing else for a disk's faults."""

    def __init__(
        self, *, child: Child | None = None, progress: Callback | None = None, cancel: threading.Event | None = None
    ) -> None:
        make_ready()
        self._child = child or Child()
        self._progress = progress
        self._cancel = cancel

    def run_with(self, child: Child) -> None:
        """Run what takes time with that interpreter; os-win makes these objects without arguments."""
        self._child = child

    # --- what a disk is ----------------------------------------------------------------------------------------

    def get_vhd_format(self, vhd_path: str) -> str:
        """``VHD`` or ``VHDX``: by the name, or for any other name by the signature."""
        by_name = PurePath(vhd_path).suffix[1:].upper()
        if by_name in DEVICE_IDS:
            return by_name
        found = _by_signature(vhd_path) if Path(vhd_path).exists() else None
        if found is None:
            raise VHDException(f"Could not retrieve VHD format: {vhd_path}")
        return found

    def get_vhd_info(
        self, vhd_path: str, info_members: Sequence[int] | None = None, open_parents: bool = False
    ) -> dict[str, Any]:
        """What Windows would tell of the disk; sizes in bytes. The parent is needed with ``open_parents`` only."""
        with self._open(vhd_path) as (file, image):
            info = image.info()
            parent = _parent_path(image, vhd_path)
            if open_parents and info.subformat == "differencing" and not _is_there(parent):
                raise api_failure(f"{vhd_path}: the parent {parent!r} is missing", ERROR_FILE_NOT_FOUND)
            everything: dict[str, Any] = {
                "VirtualSize": image.virtual_size,
                "PhysicalSize": file.size,
                "BlockSize": info.block_size or 0,
                "SectorSize": image.sector_size,
                "ParentResolved": _is_there(parent),
                "ParentPath": parent or "",
                "DeviceId": DEVICE_IDS[info.format.upper()],
                "VendorId": VENDOR_MICROSOFT,
                "ProviderSubtype": SUBTYPES[info.subformat or "dynamic"],
                "IsLoaded": self._is_loaded(vhd_path),
            }
        members = INFO_MEMBERS if info_members is None else info_members
        return {name: everything[name] for member in members for name in INFO_MEMBERS[member]}

    def get_vhd_size(self, vhd_path: str) -> dict[str, Any]:
        """``VirtualSize``, ``PhysicalSize``, ``BlockSize`` and ``SectorSize``."""
        return self.get_vhd_info(vhd_path, [SIZE])

    def get_vhd_parent_path(self, vhd_path: str) -> str | None:
        """Where a differencing disk's parent is, or should be; None for other disks."""
        return self.get_vhd_info(vhd_path, [PARENT_LOCATION])["ParentPath"] or None

    def get_vhd_type(self, vhd_path: str) -> int:
        """2 fixed, 3 dynamic, 4 differencing."""
        return int(self.get_vhd_info(vhd_path, [PROVIDER_SUBTYPE])["ProviderSubtype"])

    def get_internal_vhd_size_by_file_size(self, vhd_path: str, new_vhd_file_size: int) -> int:
        """The largest disk, in bytes, whose full file has at most that size. A child's is its base's."""
        with self._open(vhd_path) as (_, image):
            if image.info().subformat != "differencing":
                return internal_size(image, new_vhd_file_size)
            parent = _parent_path(image, vhd_path)
        if not parent:
            raise VHDException(f"{vhd_path}: the parent is not named")
        return self.get_internal_vhd_size_by_file_size(parent, new_vhd_file_size)

    def get_best_supported_vhd_format(self) -> str:
        """``VHDX``."""
        return VHDX

    # --- new disks ---------------------------------------------------------------------------------------------

    def create_vhd(
        self,
        new_vhd_path: str,
        new_vhd_type: int,
        src_path: str | None = None,
        max_internal_size: int = 0,
        parent_path: str | None = None,
        guid: str | None = None,
    ) -> None:
        """Make a disk: empty, or with the content of ``src_path`` (any chain below it included), or a child."""
        if os.path.lexists(new_vhd_path):
            raise api_failure(f"{new_vhd_path}: exists already", ERROR_FILE_EXISTS)
        if new_vhd_type not in _SUBFORMATS:
            raise VHDException(f"{new_vhd_path}: no VHD has the type {new_vhd_type}")
        options: dict[str, Any] = {
            "target": new_vhd_path,
            "target_format": self.get_vhd_format(new_vhd_path).lower(),
            "subformat": _SUBFORMATS[new_vhd_type],
            "identifier": guid,
        }
        if src_path is not None:
            self._run("convert", source=src_path, follow_references=True, size=max_internal_size or None, **options)
        else:
            self._run("create", size=max_internal_size or None, parent=parent_path, **options)

    def create_dynamic_vhd(self, path: str, max_internal_size: int) -> None:
        """Make an empty dynamic disk of that size in bytes."""
        self.create_vhd(path, DYNAMIC, max_internal_size=max_internal_size)

    def create_differencing_vhd(self, path: str, parent_path: str) -> None:
        """Make a disk that reads as its parent does, of the parent's size."""
        self.create_vhd(path, DIFFERENCING, parent_path=parent_path)

    def convert_vhd(self, src: str, dest: str, vhd_type: int = DYNAMIC) -> None:
        """Make another disk with the same content."""
        self.create_vhd(dest, vhd_type, src_path=src)

    def flatten_vhd(self, vhd_path: str) -> None:
        """Replace a differencing disk by one that needs no parent, under the same name."""
        options = {"target_format": self.get_vhd_format(vhd_path).lower(), "subformat": "dynamic"}
        path = Path(vhd_path)
        flat = path.with_name(f"{path.stem}.tmp{path.suffix}")
        self._run("convert", source=vhd_path, target=str(flat), follow_references=True, overwrite=True, **options)
        flat.replace(path)

    # --- changes -----------------------------------------------------------------------------------------------

    def resize_vhd(
        self, vhd_path: str, new_max_size: int, is_file_max_size: bool = True, validate_new_size: bool = True
    ) -> None:
        """Grow a disk to that size in bytes, or with ``is_file_max_size`` to what a file of that size holds."""
        size = self.get_internal_vhd_size_by_file_size(vhd_path, new_max_size) if is_file_max_size else new_max_size
        info = self.get_vhd_info(vhd_path)
        if validate_new_size and size < info["VirtualSize"]:
            raise VHDException(
                f"Cannot resize image {vhd_path} to a smaller size. Image virtual size: {info['VirtualSize']}, "
                f"Requested virtual size: {size}"
            )
        if size == info["VirtualSize"]:
            return
        if info["ProviderSubtype"] == DIFFERENCING and info["DeviceId"] == DEVICE_IDS[VHD]:
            raise api_failure(f"{vhd_path}: a differencing VHD has the size of its parent", ERROR_VHD_INVALID_TYPE)
        self._run("resize", image=vhd_path, size=size, shrink=not validate_new_size)

    def merge_vhd(self, vhd_path: str, delete_merged_image: bool = True) -> None:
        """Put a child's content into its immediate parent, which grows to the child's size; remove the child."""
        self._run("merge", child=vhd_path, follow_references=True)
        if delete_merged_image:
            Path(vhd_path).unlink()

    def reconnect_parent_vhd(self, child_path: str, parent_path: str) -> None:
        """Make a child name another file as its parent; that it is the same disk is the caller's word."""
        self._run("rebase", child=child_path, parent=parent_path, ignore_parent_id=True)

    def set_vhd_guid(self, vhd_path: str, guid: str) -> None:
        """Give a disk another id."""
        self._run("identify", image=vhd_path, identifier=guid)

    # --- the host's own ----------------------------------------------------------------------------------------

    def attach_virtual_disk(self, vhd_path: str, read_only: bool = True, detach_on_handle_close: bool = False) -> Any:
        """os-win's, on Windows."""
        return self._host("attach a disk").attach_virtual_disk(vhd_path, read_only, detach_on_handle_close)

    def detach_virtual_disk(self, vhd_path: str) -> None:
        """os-win's, on Windows. Elsewhere nothing is attached, so there is nothing to do."""
        if sys.platform == "win32":
            self._host("detach a disk").detach_virtual_disk(vhd_path)

    def get_virtual_disk_physical_path(self, vhd_path: str) -> str:
        """os-win's, on Windows."""
        return str(self._host("name an attached disk").get_virtual_disk_physical_path(vhd_path))

    def is_virtual_disk_file_attached(self, vhd_path: str) -> bool:
        """os-win's, on Windows; elsewhere no."""
        return self._is_loaded(vhd_path)

    def close(self, handle: Any) -> None:
        """Close what :meth:`attach_virtual_disk` returned."""
        self._host("close a disk").close(handle)

    def _is_loaded(self, vhd_path: str) -> bool:
        if sys.platform != "win32":
            return False
        return bool(self._host("look at a disk").is_virtual_disk_file_attached(vhd_path))  # not run here

    def _host(self, what: str) -> Any:
        """os-win's own utilities. Not run here: there is no Windows."""
        if sys.platform != "win32":
            with as_os_win():
                raise UnsupportedFeature(f"only Windows can {what}", hint="run this on the Hyper-V host")
        from os_win.utils.storage.virtdisk import vhdutils

        return vhdutils.VHDUtils()

    # --- how ---------------------------------------------------------------------------------------------------

    def _run(self, task: str, **arguments: Any) -> dict[str, Any]:
        with as_os_win():
            return self._child.run(task, arguments, progress=self._progress, cancel=self._cancel)

    @contextmanager
    def _open(self, vhd_path: str) -> Iterator[tuple[LocalFile, DiskImage]]:
        """The headers of a VHD or VHDX; what it refers to is not opened."""
        time.sleep(0)  # a few milliseconds of work follow: the other green threads first
        with as_os_win(), LocalFile.open_source(vhd_path) as file, located(file):
            chosen = _format_of(self.get_vhd_format(vhd_path))
            yield file, chosen.open(file)


def _is_there(path: str | None) -> bool:
    return path is not None and Path(path).exists()


def _format_of(name: str) -> DiskFormat:
    return registry.find(name.lower())


def _by_signature(path: str) -> str | None:
    with Path(path).open("rb") as file:
        if file.read(8) == SIGNATURE_VHDX:
            return VHDX
        size = file.seek(0, os.SEEK_END)
        if size >= 512:
            file.seek(size - 512)
            if file.read(8) == SIGNATURE_VHD:
                return VHD
    return None


def _parent_path(image: DiskImage, path: str) -> str | None:
    """The parent's file where it is found, else the name that the disk has for it."""
    for reference in image.info().references:
        if reference.kind == "parent-file":
            try:
                found = next(find(reference, Path(path), Following()))
            except SourceError:
                return reference.name
            return os.path.normpath(found)
    return None
