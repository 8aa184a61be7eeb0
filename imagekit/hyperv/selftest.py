"""Look at a host and change nothing: what it is, what it can, and whether it reads our disks as we do.

The report is made to be posted: it holds what the host says of itself, no names of people and no secrets. That it
passed is remembered on this computer, because the scripts for Windows Server 2008 R2 run on no host before.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from imagekit.errors import ToolError, UsageError, VerificationFailed
from imagekit.hyperv.host import Host
from imagekit.hyperv.passed import remember_passed
from imagekit.hyperv.push import hash_seconds
from imagekit.hyperv.request import check_host_path
from imagekit.hyperv.transport import HostError
from imagekit.progress import Callback, Control
from imagekit.records import dataclass
from imagekit.sources import Reading, open_source

STEP = 4 << 20


@dataclass(frozen=True, slots=True)
class DiskComparison:
    """A disk's content as this computer reads it, and as the host does."""

    path: str
    size: int
    sha256: str
    host_size: int
    host_sha256: str

    @property
    def same(self) -> bool:
        return (self.size, self.sha256) == (self.host_size, self.host_sha256)


@dataclass(frozen=True, slots=True)
class SelftestReport:
    """What was found; ``found`` is the host's own answer."""

    target: str
    family: str
    found: dict[str, Any]
    disk: DiskComparison | None = None

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [check for check in self.found["checks"] if check.get("status") == "failed"]

    def to_json(self) -> dict[str, object]:
        disk = self.disk
        return {
            "schema": 1,
            "family": self.family,
            "passed": not self.failed and (disk is None or disk.same),
            **self.found,
            "disk": None
            if disk is None
            else {
                "size": disk.size,
                "sha256": disk.sha256,
                "host-size": disk.host_size,
                "host-sha256": disk.host_sha256,
                "same": disk.same,
            },
        }

    def describe(self) -> str:
        lines = [f"{self.target}: a host of the kind {self.family}", ""]
        for check in self.found["checks"]:
            lines.append(f"{check.get('status', '?'):<8}{check.get('name', '?')}: {check.get('detail', '')}")
        if self.disk is not None:
            verdict = "the same on both" if self.disk.same else "DIFFERENT"
            lines += [
                "",
                f"content of {self.disk.path}: {verdict} ({self.disk.size} bytes, sha256 {self.disk.sha256})",
            ]
        return "\n".join(lines)

    def judge(self) -> None:
        """Raise when the host failed a check, or reads the disk in another way."""
        if self.disk is not None and not self.disk.same:
            raise VerificationFailed(
                f"{self.target} reads {self.disk.host_size} bytes with SHA-256 {self.disk.host_sha256}, "
                f"this computer {self.disk.size} with {self.disk.sha256}",
                path=self.disk.path,
                hint="please report it, with this report and the file's own SHA-256",
            )
        if self.failed:
            names = ", ".join(str(check.get("name")) for check in self.failed)
            raise ToolError(f"{self.target} does not pass: {names}", hint="the report says what was found")


def run_selftest(
    host: Host, *, disk: Path | None = None, there: str | None = None, progress: Callback | None = None
) -> SelftestReport:
    """Ask the host about itself; with ``disk`` also compare how both read it. ``there`` is its path on the host.

    The comparison needs Windows 8 or later and no Hyper-V: a computer without it is no failure then.
    """
    comparison = None
    if disk is not None:
        if there is None and not host.local:
            raise UsageError(
                "the disk must be on the host too", hint=r"copy it there and say where: --disk-there D:\VMs\disk.vhdx"
            )
        path = check_host_path(there) if there is not None else str(disk.resolve())
        size, sha256 = content_digest(disk, control=Control(progress))
        seen = host.call("hash-disk", {"path": path}, timeout=hash_seconds(size))
        comparison = DiskComparison(os.fspath(disk), size, sha256, seen["size"], str(seen["sha256"]).lower())
    try:
        report = SelftestReport(host.target, host.family, host.call("selftest", {}), comparison)
    except HostError as error:
        if comparison is None or error.kind != "unsupported":
            raise
        missing = {"name": "hyper-v", "status": "missing", "detail": error.message}
        return SelftestReport(host.target, "none", {"checks": [missing]}, comparison)
    if not report.failed:
        remember_passed(host.target, host.family)
    return report


def content_digest(path: Path, *, control: Control) -> tuple[int, str]:
    """Size and SHA-256 of the disk that a guest sees in an image."""
    digest = hashlib.sha256()
    with open_source(path, Reading()) as source:
        image = source.image
        for start in range(0, image.virtual_size, STEP):
            digest.update(image.pread(start, min(STEP, image.virtual_size - start)))
            control.tell("hash", start, image.virtual_size)
        return image.virtual_size, digest.hexdigest()
