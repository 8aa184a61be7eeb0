"""What a compute driver does with disks: root, ephemeral, config drive, resize, snapshot. Independent of Nova.

Each function makes one file, complete or not at all, and says what it made. What takes time runs in a process of its
own (imagekit.child). An instance's uuid decides the identity of its disks, so the same instance gets the same disks
again and two instances never share one. The exception are copy-on-write children of a VHDX: by the format they have
the disk id of their base, on every host.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID, uuid5

from imagekit.cache import Entry, Fetch, ImageCache, Target
from imagekit.child import Child
from imagekit.errors import TargetError, UnsupportedFeature, UsageError
from imagekit.formats import registry
from imagekit.formats.base import SECTOR, GiB
from imagekit.formats.files import LocalFile
from imagekit.nova.sizes import SizeRule, check_rule, internal_size, new_disk_size
from imagekit.progress import Callback
from imagekit.records import dataclass, field

if TYPE_CHECKING:
    from imagekit.guest import SpecLike

PathLike = str | os.PathLike[str]
DISK_FORMATS = ("vhd", "vhdx")


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk that was made. Sizes in bytes; ``base`` is what a copy-on-write disk is built on."""

    path: Path
    format: str
    subformat: str
    virtual_size: int
    base: Path | None = None
    entry: Entry | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Attachment:
    """A config drive that was written, and where a machine of that generation has it."""

    path: Path
    kind: Literal["dvd"]
    controller: Literal["ide", "scsi"]
    number: int
    slot: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One file that holds what a chain held. ``disk_format`` and ``container_format`` are Glance's words."""

    path: Path
    disk_format: str
    container_format: str
    virtual_size: int
    file_size: int


def prepare_root(
    cache: ImageCache,
    image_id: str,
    source: PathLike | Fetch,
    path: PathLike,
    *,
    size: int | None = None,
    instance: UUID | str | None = None,
    cow: bool = True,
    rescue: bool = False,
    size_rule: SizeRule = "virtual",
    digest: str | None = None,
    source_format: str | None = None,
    child: Child | None = None,
    progress: Callback | None = None,
    cancel: threading.Event | None = None,
) -> Disk:
    """Make an instance's root disk at ``path`` (``.vhd`` or ``.vhdx``) from an image.

    ``size`` is the flavor's, in bytes; None or 0 keeps the image's own. ``cow`` builds on the cached image, else the
    disk stands alone. A ``rescue`` disk keeps the image's size, which must fit. ``size_rule`` says what ``size``
    counts (imagekit.nova.sizes). Raises UsageError when the image is larger than the flavor, TargetError when the
    file exists, and what the conversion of a refused or damaged image raises.
    """
    rule, path = check_rule(size_rule), Path(path)
    kind = _kind(path)
    _check_new(path)
    runner = child or Child()
    told: dict[str, Any] = {"progress": progress, "cancel": cancel}
    entry = cache.get(
        image_id,
        source,
        digest=digest,
        target=Target("vhd" if kind == "vhd" else "vhdx"),
        source_format=source_format,
        user=path if cow else None,
        **told,
    )
    wanted = _root_size(entry, size, rule, rescue=rescue)
    if cow:
        base = entry
        if kind == "vhd":  # a differencing VHD has the size of its parent
            label = str(size // GiB) if size and size % GiB == 0 else None
            base = cache.resized(entry, wanted, label=label, user=path, **told)
        arguments: dict[str, Any] = {"target": path, "parent": base.path, "target_format": kind}
        arguments |= {"size": wanted, "identifier": _id(instance, "root")}
        made = runner.run("create", _plain(arguments), **told)
        return Disk(path, kind, "differencing", int(made["virtual-size"]), base.path, entry)
    arguments = {"source": entry.path, "source_format": kind, "target": path, "target_format": kind}
    made = runner.run("convert", _plain({**arguments, "size": wanted, "identifier": _id(instance, "root")}), **told)
    return Disk(path, kind, "dynamic", int(made["target"]["virtual-size"]), None, entry)


def create_ephemeral(
    path: PathLike,
    size: int,
    *,
    instance: UUID | str | None = None,
    index: int = 0,
    size_rule: SizeRule = "virtual",
    child: Child | None = None,
) -> Disk:
    """Make an empty dynamic disk of ``size`` bytes, by the size rule; ``index`` tells the instance's disks apart."""
    rule, path = check_rule(size_rule), Path(path)
    kind = _kind(path)
    wanted = size if rule == "virtual" else new_disk_size(kind, "dynamic", size)
    if wanted < SECTOR:
        raise UsageError(f"an ephemeral disk of {size} bytes", hint="give it at least one sector")
    identifier = _id(instance, f"ephemeral {index}")
    arguments = {"target": path, "size": wanted, "target_format": kind, "identifier": identifier}
    made = (child or Child()).run("create", _plain(arguments))
    return Disk(path, kind, "dynamic", int(made["virtual-size"]))


def resize_root(
    path: PathLike,
    size: int,
    *,
    size_rule: SizeRule = "virtual",
    child: Child | None = None,
    progress: Callback | None = None,
    cancel: threading.Event | None = None,
) -> Disk:
    """Grow an instance's disk to the new flavor's ``size`` in bytes.

    A VHDX grows in place, a copy-on-write one too. A differencing VHD cannot: it is replaced by a disk of its own,
    with all that its base holds. Raises UsageError for a size that would cut the disk off.
    """
    rule, path = check_rule(size_rule), Path(path)
    runner = child or Child()
    told: dict[str, Any] = {"progress": progress, "cancel": cancel}
    kind = _kind(path)
    with LocalFile.open_source(path) as file:
        image = registry.find(kind).open(file)
        info = image.info()
        now = image.virtual_size
        if rule == "virtual":
            wanted = size
        elif info.subformat == "differencing":
            wanted = new_disk_size(kind, "dynamic", size)
        else:
            wanted = internal_size(image, size)
    if wanted < now:
        raise UsageError(
            f"the disk has {now} bytes, the flavor leaves {wanted}: it would be cut off",
            hint="choose a flavor with a larger disk",
            path=path,
        )
    if wanted == now:
        return Disk(path, kind, info.subformat or "dynamic", now)
    if info.subformat == "differencing" and kind == "vhd":
        runner.run(
            "convert",
            _plain({"source": path, "target": path.with_suffix(f".{os.getpid()}.vhd"), "target_format": "vhd"})
            | {"follow_references": True, "size": wanted, "overwrite": True},
            **told,
        )
        path.with_suffix(f".{os.getpid()}.vhd").replace(path)
        return Disk(path, kind, "dynamic", wanted)
    runner.run("resize", _plain({"image": path, "size": wanted}), **told)
    return Disk(path, kind, info.subformat or "dynamic", wanted)


def attach_config_drive(
    folder: PathLike,
    spec: SpecLike,
    *,
    generation: Literal[1, 2] = 1,
    rescue: bool = False,
    overwrite: bool = False,
    **guest: Any,
) -> Attachment:
    """Write an instance's config drive into its folder, and say where the machine gets it.

    It is an ISO for both generations, as a DVD: generation 2 takes no VHD. ``spec`` and ``guest`` are those of
    :func:`imagekit.build_config_drive`; the file is readable by its owner only.
    """
    from imagekit.api import build_config_drive

    name = "configdrive-rescue.iso" if rescue else "configdrive.iso"
    written = build_config_drive(spec, Path(folder) / name, overwrite=overwrite, **guest)
    if generation == 2:
        return Attachment(written.path, "dvd", "scsi", 0, 1)
    return Attachment(written.path, "dvd", "ide", 1, 0)


def snapshot(
    path: PathLike,
    target: PathLike,
    *,
    format: str | None = None,
    compression: Literal["zlib", "zstd"] | None = None,
    child: Child | None = None,
    progress: Callback | None = None,
    cancel: threading.Event | None = None,
) -> Snapshot:
    """Merge a disk with all that lies below it into one file for Glance: VHD, VHDX or qcow2 (by the target's name).

    The disk must not be in use: take a checkpoint first, and give the disk that the checkpoint froze.
    """
    options = {"source": path, "target": target, "target_format": format, "compression": compression}
    made = (child or Child()).run(
        "convert", _plain({**options, "follow_references": True}), progress=progress, cancel=cancel
    )["target"]
    if made["format"] not in (*DISK_FORMATS, "qcow2", "raw"):
        raise UnsupportedFeature(f"Glance does not take {made['format']}")
    return Snapshot(Path(target), str(made["format"]), "bare", int(made["virtual-size"]), int(made["size"]))


def _root_size(entry: Entry, size: int | None, rule: SizeRule, *, rescue: bool) -> int:
    """The root disk's size in bytes, or one message with all sizes in it."""
    own = entry.virtual_size
    if not size:
        return own
    if rule == "virtual":
        fits = size
    else:
        with LocalFile.open_source(entry.path) as file:
            fits = internal_size(registry.find(entry.target.format).open(file), size)
    if fits < own:
        file_rule = "" if rule == "virtual" else f", of which a {entry.target.format} file leaves {fits} for the disk"
        raise UsageError(
            f"the image's disk has {own} bytes, the flavor's {size}{file_rule}",
            hint="choose a flavor with a larger disk" + (", or size_rule='virtual'" if file_rule else ""),
            path=entry.path,
        )
    return own if rescue else fits


def _kind(path: Path) -> str:
    kind = path.suffix[1:].lower()
    if kind not in DISK_FORMATS:
        raise UsageError(f"{path.name}: a disk for Hyper-V is called NAME.vhd or NAME.vhdx")
    return kind


def _check_new(path: Path) -> None:
    if os.path.lexists(path):
        raise TargetError("exists already", path=path, hint="remove it, or choose another name")


def _id(instance: UUID | str | None, what: str) -> str | None:
    return None if instance is None else str(uuid5(UUID(str(instance)), f"imagekit {what}"))


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """As JSON has it."""
    return {key: os.fspath(value) if isinstance(value, os.PathLike) else value for key, value in arguments.items()}
