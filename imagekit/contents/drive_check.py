"""Checks a medium of guest metadata before a guest meets it: what is on it, who finds it, what is wrong with it.

Works on any medium, ours or others': lint judges what was read just as it judges what will be written. Nothing of
what is reported is secret.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from imagekit.cloudinit.agents import Medium, Seen, what_agents_see
from imagekit.cloudinit.lint import Finding, MachineLike, judge
from imagekit.cloudinit.manifest import Entry, manifest
from imagekit.cloudinit.model import GuestProfile
from imagekit.cloudinit.tree import MetadataTree
from imagekit.contents.drives import Drive, Volume, read_drive
from imagekit.formats.base import JSON, MiB
from imagekit.records import dataclass
from imagekit.report import SCHEMA
from imagekit.sources import Reading

MAX_JUDGED = 1 * MiB
"""Bytes of a file that lint parses; Nova's largest have 64 KiB."""


@dataclass(frozen=True, slots=True)
class VolumeCheck:
    """One file system of a medium."""

    volume: Volume
    tree: MetadataTree | None
    """What its files are meant for, as far as they show; None when they are no metadata."""

    files: tuple[Entry, ...]
    seen: tuple[Seen, ...]
    findings: tuple[Finding, ...]
    """Of lint, errors first."""

    problems: tuple[str, ...]
    """What else is wrong."""

    def to_json(self) -> dict[str, object]:
        return {
            "file-system": self.volume.file_system,
            "label": self.volume.label,
            "partition": self.volume.partition,
            "details": list(self.volume.details),
            "datasource": None if self.tree is None else self.tree.datasource,
            "files": [entry.to_json() for entry in self.files],
            "agents": [seen.to_json() for seen in self.seen],
            "lint": [finding.to_json() for finding in self.findings],
        }


@dataclass(frozen=True, slots=True)
class DriveCheck:
    """What a check of a medium came to. ``problems`` are reasons not to use it, ``warnings`` are none."""

    drive: Drive
    volumes: tuple[VolumeCheck, ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...] = ()

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
            "warnings": list(self.warnings),
            "volumes": [volume.to_json() for volume in self.volumes],
            "findings": findings,
        }


def check_drive(
    path: str | os.PathLike[str],
    *,
    guest: GuestProfile | None = None,
    machine: MachineLike | None = None,
    strict: bool = False,
    reading: Reading | None = None,
) -> DriveCheck:
    """Read a medium and judge it for a ``guest`` (None: Linux) and, where that is known, for its ``machine``.

    With ``strict`` warnings of lint are problems too. Raises what `read_drive` raises.
    """
    drive = read_drive(path, reading=reading)
    volumes = tuple(_check_volume(drive, volume, guest, machine) for volume in drive.volumes)
    problems = [problem for one in volumes for problem in one.problems]
    if not any(seen.found for one in volumes for seen in one.seen):
        problems.insert(0, "no guest agent reads it")
    findings = [finding for one in volumes for finding in one.findings]
    errors = [finding for finding in findings if strict or finding.severity == "error"]
    warnings = [str(finding) for finding in findings if finding not in errors]
    return DriveCheck(drive, volumes, (*problems, *map(str, errors)), tuple(warnings))


def _check_volume(
    drive: Drive, volume: Volume, guest: GuestProfile | None, machine: MachineLike | None
) -> VolumeCheck:
    medium = Medium(
        label=volume.label,
        file_system=volume.file_system,
        linux=volume.tree,
        windows=volume.windows,
        partitioned=volume.partition is not None,
        disk=drive.format != "raw",
    )
    tree = MetadataTree.recognise(volume.label, volume.tree)
    problems = list(_problems(volume))
    findings: tuple[Finding, ...] = ()
    if tree is not None:
        if too_long := [path for path, data in tree.files.items() if len(data) > MAX_JUDGED and _is_judged(path)]:
            problems.append(f"{too_long[0]} has more than {MAX_JUDGED} bytes, too many to be judged")
        else:
            findings = tuple(judge(tree, guest=guest, machine=machine))
    seen = what_agents_see(medium)
    return VolumeCheck(volume, tree, manifest(volume.tree), seen, findings, tuple(problems))


def _is_judged(path: str) -> bool:
    """Whether lint parses it: everything but injected files."""
    return not path.startswith("openstack/content/")


def _problems(volume: Volume) -> Iterator[str]:
    if volume.file_system == "iso9660" and "Joliet" not in volume.details and volume.tree != volume.windows:
        yield "the ISO has no Joliet names: Windows sees other names than Linux"
