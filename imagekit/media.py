"""Packs a tree of guest metadata as a medium: ISO 9660 or VFAT, as it is or in a VHD or VHDX disk.

An ISO 9660 file system needs no DVD: on a disk it starts in the first sector, and is read like on a DVD. VFAT is the
whole of a raw file and a partition of a disk, unless asked otherwise. Disks have whole MiB, at least 3, the least
that Windows' own functions make; a VHD is a fixed one, a VHDX dynamic.

Every medium is read back, the disk by the reader of its format and the file system by one that did not write it,
before anybody gets it. All in memory: a medium has at most 64 MiB.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import PurePath
from typing import Literal, cast
from uuid import UUID

from imagekit.cloudinit.iso import verify_iso, write_iso
from imagekit.cloudinit.medium import check_size
from imagekit.cloudinit.vfat import MIN_VOLUME, write_vfat
from imagekit.contents.drives import read_volumes
from imagekit.copying import copy_image
from imagekit.errors import ImagekitError, UnsupportedFeature, UsageError, VerificationFailed
from imagekit.formats import registry
from imagekit.formats.base import MiB, WriterOptions, round_up
from imagekit.formats.files import MemoryFile
from imagekit.formats.raw import RawImage
from imagekit.plan import build_plan
from imagekit.records import dataclass
from imagekit.verify import verify_structure

MEDIA = ("iso", "vfat")
DISKS = ("vhd", "vhdx")
SUBFORMATS = {"vhd": "fixed", "vhdx": "dynamic"}
SUFFIXES = {"iso": ".iso", "vfat": ".img", "vhd": ".vhd", "vhdx": ".vhdx"}


@dataclass(frozen=True, slots=True)
class Packing:
    """What kind of medium. ``disk`` None: the file system is the file. ``partition`` None: one for VFAT on a disk."""

    media: Literal["iso", "vfat"] = "iso"
    disk: Literal["vhd", "vhdx"] | None = None
    partition: bool | None = None

    def __post_init__(self) -> None:
        if self.media not in MEDIA:
            raise UsageError(f"media {self.media!r}", hint=f"choose {' or '.join(MEDIA)}")
        if self.disk is not None and self.disk not in DISKS:
            raise UsageError(f"disk {self.disk!r}", hint=f"choose {' or '.join(DISKS)}")
        if self.partition and self.media == "iso":
            raise UsageError("ISO 9660 takes the whole disk, never a partition", hint="use the media vfat")

    @classmethod
    def by_name(cls, path: str | os.PathLike[str], media: Literal["iso", "vfat"] = "iso") -> Packing:
        """In a disk where the name's suffix is that of one."""
        suffix = PurePath(path).suffix.lower()
        return cls(media, "vhd" if suffix == ".vhd" else "vhdx" if suffix == ".vhdx" else None)

    @classmethod
    def choose(cls, media: str, disk: str | None = None, partition: bool | None = None) -> Packing | None:
        """The packing that words of the command line mean; None for the media ``none``."""
        if media == "none":
            if disk is not None or partition is not None:
                raise UsageError("no config drive, but a disk for it", hint="leave out --media none, or the rest")
            return None
        return cls(cast(Literal["iso", "vfat"], media), cast(Literal["vhd", "vhdx"] | None, disk), partition)

    @property
    def partitioned(self) -> bool:
        """Whether the file system lies in a partition."""
        if self.partition is None:
            return self.media == "vfat" and self.disk is not None
        return self.partition

    @property
    def suffix(self) -> str:
        """What the file's name ends in: Hyper-V goes by it."""
        return SUFFIXES[self.disk or self.media]

    @property
    def name(self) -> str:
        """In words."""
        inside = "ISO 9660" if self.media == "iso" else "VFAT"
        return inside if self.disk is None else f"{inside} in a {self.disk.upper()} disk"

    def check_generation(self, generation: object) -> None:
        """Raise UnsupportedFeature for a disk that a machine of this generation does not take."""
        if generation == 2 and self.disk == "vhd":
            raise UnsupportedFeature(
                "a machine of generation 2 takes no .vhd", hint="use a .vhdx (--disk vhdx), or --generation 1"
            )

    def check_name(self, path: str | os.PathLike[str]) -> None:
        """Raise UsageError for a suffix that promises something else: Hyper-V goes by it."""
        suffix = PurePath(path).suffix.lower()
        if suffix != self.suffix and (self.disk is not None or suffix in SUFFIXES.values()):
            raise UsageError(f"the medium is {self.name}", path=path, hint=f"name it NAME{self.suffix}")


def pack(
    tree: Mapping[str, bytes], *, label: str, packing: Packing, identifier: UUID, timestamp: int | None = None
) -> bytes:
    """The file that holds ``tree`` under ``label``; ``identifier`` is the disk's id.

    ``timestamp`` as in `write_iso`. Raises UsageError for what the medium cannot hold, VerificationFailed when it
    does not read back.
    """
    if packing.media == "iso":
        data = write_iso(tree, label=label, timestamp=timestamp)
        verify_iso(data, tree, label)
    else:
        data = write_vfat(tree, label=label, timestamp=timestamp, partitioned=packing.partitioned)
        _verify_vfat(data, tree, label)
    check_size(len(data))
    return data if packing.disk is None else _disk(data, packing.disk, identifier)


def _disk(data: bytes, disk: Literal["vhd", "vhdx"], identifier: UUID) -> bytes:
    """A virtual disk with ``data`` at its start."""
    size = max(MIN_VOLUME, round_up(len(data), MiB))
    content = MemoryFile(data)
    content.truncate(size)
    image = RawImage(content, size)
    options = WriterOptions(identifier, subformat=SUBFORMATS[disk])
    plan = build_plan(image, source_format="raw", target_format=disk, options=options, virtual_size=size)
    target = MemoryFile()
    copy_image(plan, image, content, target, jobs=1)
    verify_structure(plan, target)
    if registry.find(disk).open(target).pread(0, size) != content.data:
        raise VerificationFailed("the disk does not read back as what was put on it", hint="please report this")
    return bytes(target.data)


def _verify_vfat(data: bytes, tree: Mapping[str, bytes], label: str) -> None:
    try:
        volumes = list(read_volumes(RawImage(MemoryFile(data), len(data))))
    except ImagekitError as error:
        raise VerificationFailed(f"the medium does not read back: {error}") from error
    if [(volume.label, volume.tree) for volume in volumes] != [(label, dict(tree))]:
        raise VerificationFailed("the VFAT file system does not read back as the files that were put on it")
