"""Checks a medium of guest metadata before a guest meets it: what is on it, who finds it, what is wrong with it.

Works on any medium, ours or others'. Nothing of what it reports is secret.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from imagekit.cloudinit.agents import Medium, Seen, what_agents_see
from imagekit.cloudinit.manifest import Entry, manifest
from imagekit.cloudinit.tree import MetadataTree
from imagekit.drives import Drive, Volume, read_drive
from imagekit.formats.base import JSON
from imagekit.report import SCHEMA
from imagekit.sources import Reading


@dataclass(frozen=True, slots=True)
class VolumeCheck:
    """One file system of a medium."""

    volume: Volume
    tree: MetadataTree | None
    """What its files are meant for, as far as they show; None when they are no metadata."""

    files: tuple[Entry, ...]
    seen: tuple[Seen, ...]
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        return {
            "file-system": self.volume.file_system,
            "label": self.volume.label,
            "partition": self.volume.partition,
            "details": list(self.volume.details),
            "datasource": None if self.tree is None else self.tree.datasource,
            "files": [entry.to_json() for entry in self.files],
            "agents": [seen.to_json() for seen in self.seen],
        }


@dataclass(frozen=True, slots=True)
class DriveCheck:
    """What a check of a medium came to. ``problems`` are reasons not to use it."""

    drive: Drive
    volumes: tuple[VolumeCheck, ...]
    problems: tuple[str, ...]

    @property
    def sound(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, object]:
        findings: list[JSON] = [finding.to_json() for finding in self.drive.findings]
        return {
            "schema": SCHEMA,
            "filename": os.fspath(self.drive.path),
            "format": self.drive.format,
            "virtual-size": self.drive.size,
            "sound": self.sound,
            "problems": list(self.problems),
            "volumes": [volume.to_json() for volume in self.volumes],
            "findings": findings,
        }


def check_drive(path: str | os.PathLike[str], *, reading: Reading | None = None) -> DriveCheck:
    """Read a medium and judge it. Raises what `read_drive` raises."""
    drive = read_drive(path, reading=reading)
    volumes = tuple(_check_volume(drive, volume) for volume in drive.volumes)
    problems = [problem for one in volumes for problem in one.problems]
    if not any(seen.found for one in volumes for seen in one.seen):
        problems.insert(0, "no guest agent reads it")
    return DriveCheck(drive, volumes, tuple(problems))


def _check_volume(drive: Drive, volume: Volume) -> VolumeCheck:
    medium = Medium(
        label=volume.label,
        file_system=volume.file_system,
        linux=volume.tree,
        windows=volume.windows,
        partitioned=volume.partition is not None,
        disk=drive.format != "raw",
    )
    tree = MetadataTree.recognise(volume.label, volume.tree)
    return VolumeCheck(volume, tree, manifest(volume.tree), what_agents_see(medium), tuple(_problems(volume)))


def _problems(volume: Volume) -> Iterator[str]:
    if volume.file_system == "iso9660" and "Joliet" not in volume.details and volume.tree != volume.windows:
        yield "the ISO has no Joliet names: Windows sees other names than Linux"
