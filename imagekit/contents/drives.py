"""Reads the medium that a guest would read its metadata from: ours or others', whatever file it lies in.

A raw file or any disk format imagekit reads, packed or not, judged by the safety policy like every image. In it the
file systems that guest agents look for: ISO 9660 on the whole disk, VFAT on the whole disk or in a partition. All
files are taken into memory, so what is larger than `MAX_FILES` is refused before it is read.

What the agents make of it is not decided here (`imagekit.cloudinit.agents`).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from imagekit.cloudinit import iso9660
from imagekit.contents.fat import Fat, FatError
from imagekit.contents.partitions import partitions
from imagekit.errors import CorruptImage, InvalidImage, UnsupportedFeature
from imagekit.formats.base import SECTOR, DiskImage, MiB
from imagekit.policy import Finding
from imagekit.records import dataclass
from imagekit.sources import Reading, located, open_source

MAX_FILES = 256 * MiB
"""Bytes of all files of one file system; config drives have at most 64 MiB."""
_JUMPS = (0xEB, 0xE9)
"""How a boot sector of FAT begins; a master boot record that happens to look like one rarely does."""


@dataclass(frozen=True, slots=True)
class Volume:
    """One file system: path (with ``/``) to content, as Linux shows it and as Windows does.

    ``partition`` is None for one that is the whole disk. ``details`` are in the file system's own words.
    """

    file_system: Literal["iso9660", "vfat"]
    label: str
    tree: dict[str, bytes]
    windows: dict[str, bytes]
    partition: int | None = None
    details: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """Where it is, as people say it."""
        return "the whole disk" if self.partition is None else f"partition {self.partition}"


@dataclass(frozen=True, slots=True)
class Drive:
    """A medium: its file, its format and size as a disk, and the file systems on it."""

    path: Path
    format: str
    size: int
    volumes: tuple[Volume, ...]
    findings: tuple[Finding, ...] = ()


def read_drive(path: str | os.PathLike[str], *, reading: Reading | None = None) -> Drive:
    """Open, judge and read a medium.

    Raises what `open_source` raises, InvalidImage when there is no file system on it that a guest would look at,
    CorruptImage or UnsupportedFeature when that cannot be read.
    """
    with open_source(path, reading) as source:
        with located(source.file):
            volumes = tuple(read_volumes(source.image))
        source.check_unchanged()
        if not volumes:
            raise InvalidImage(
                "neither ISO 9660 nor FAT, on the disk or in one of its partitions: no guest reads metadata from it",
                path=source.original.name,
                hint="name a config drive: `imagekit configdrive OUT` writes one",
            )
        return Drive(Path(path), source.format, source.image.virtual_size, volumes, source.findings)


def read_volumes(image: DiskImage) -> Iterator[Volume]:
    """The file systems on a disk, with all their files."""
    if image.pread(16 * iso9660.SECTOR + 1, 5) == b"CD001":
        yield _read_iso(image)
        return
    if image.pread(16 * iso9660.SECTOR + 1, 5) == b"BEA01":
        raise UnsupportedFeature(
            "the medium is UDF without ISO 9660, which not every guest agent looks at",
            hint="have it written as ISO 9660 with Joliet, or let imagekit write it",
        )
    if _may_be_fat(image.pread(0, SECTOR)):
        yield _read_vfat(image, 0, image.virtual_size, None)
        return
    for partition in partitions(image):
        if _may_be_fat(image.pread(partition.start, SECTOR)):
            yield _read_vfat(image, partition.start, partition.length, partition.number)


def _may_be_fat(boot: bytes) -> bool:
    """Whether it is worth reading as FAT: a jump, a size of sectors, the mark at the end."""
    if len(boot) < SECTOR or boot[0] not in _JUMPS or boot[510:] != b"\x55\xaa":
        return False
    sector, cluster = struct.unpack_from("<HB", boot, 11)
    return sector in (512, 1024, 2048, 4096) and cluster > 0


def _read_iso(image: DiskImage) -> Volume:
    size = image.virtual_size
    if size > iso9660.DEFAULT_MAX_SIZE:  # a disk that is larger than the file system on it
        (blocks,) = struct.unpack("<I", image.pread(16 * iso9660.SECTOR + 80, 4))
        size = min(size, blocks * iso9660.SECTOR)
    if size > iso9660.DEFAULT_MAX_SIZE:
        raise InvalidImage(
            f"an ISO 9660 file system of {size} bytes, {iso9660.DEFAULT_MAX_SIZE} are the most that is read here"
        )
    content = iso9660.read_iso(image.pread(0, size))
    windows = content.joliet
    details = [name for name, there in (("Rock Ridge", content.rock_ridge), ("Joliet", windows is not None)) if there]
    return Volume(
        file_system="iso9660",
        label=content.label,
        tree=content.tree,
        windows=content.plain if windows is None else windows,
        details=tuple(details),
    )


def _read_vfat(image: DiskImage, start: int, length: int, partition: int | None) -> Volume:
    try:
        fat = Fat(image, start, length)
        label, listed = fat.label(), dict(fat.files())
        total = sum(entry.size for entry in listed.values())
        if total > MAX_FILES:
            raise InvalidImage(
                f"a FAT file system with {total} bytes of files, {MAX_FILES} are the most that is read"
            )
        tree = {path: fat.read(entry, 0, entry.size) for path, entry in sorted(listed.items())}
    except FatError as error:
        where = "the disk" if partition is None else f"partition {partition}"
        raise CorruptImage(f"the FAT file system of {where} is damaged: {error}", offset=start) from error
    return Volume("vfat", label, tree, tree, partition, (f"FAT{fat.bits}",))
