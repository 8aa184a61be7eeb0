r"""Bring a bundle's files to a host: ``NAME.RUN.part`` first, checked there, then renamed to its name.

Three routes: the host is this computer; the folder is reached from here (a mounted share, or ``\\HOST\D$\…`` on
Windows); WinRM itself, for files below 64 MiB. The host reads what arrived and compares size and SHA-256 before the
file gets its name, and it never replaces a file: one that is attached would lose the rights Hyper-V gave its machine.

A transfer that breaks off leaves a ``.part`` that the journal names; nothing is resumed, what is small enough for
WinRM is sent again.
"""

from __future__ import annotations

import base64
import ntpath
import os
from pathlib import Path

from imagekit.errors import TargetError, UsageError, VerificationFailed
from imagekit.hyperv.host import Host
from imagekit.hyperv.journal import Journal
from imagekit.hyperv.request import is_unc
from imagekit.hyperv.transport import HostError
from imagekit.progress import SILENT, Control
from imagekit.records import dataclass

WINRM_LIMIT = 64 << 20
"""Larger files take a share: WinRM moves some 3 MB a second and keeps every byte in memory twice."""
CHUNK = 1 << 20
"""Bytes of a file in one call: as base64 below the 2 MiB that PowerShell's JSON reader takes."""
COPY_STEP = 4 << 20
HASH_RATE = 20 << 20
"""Bytes a second that a slow host hashes, for time-outs."""


@dataclass(frozen=True, slots=True)
class Item:
    """One file to bring: where it is here, what it is called there, and what it must be."""

    source: Path
    target: str
    size: int
    sha256: str


def hash_seconds(size: int) -> float:
    """How long hashing ``size`` bytes may take."""
    return 120 + size / HASH_RATE


def check_route(host: Host, store: str, items: list[Item], share: Path | None) -> None:
    """Refuse what cannot work before anything is sent."""
    if is_unc(store) and not host.local and not host.hops:
        raise UsageError(
            f"{store} is on another computer than {host.target}: the host would have to log in there as you, and a "
            "WinRM session by NTLM, or by Kerberos without delegation, cannot (the second hop)",
            hint="use a folder of the host's own; or --auth credssp, or Kerberos with --delegate where the domain "
            "allows it, and give the host's computer account rights to the share",
        )
    if share is not None and not share.is_dir():
        raise TargetError("is no folder here", hint="mount the host's share first", path=share)
    if share is None and not host.local:
        for item in items:
            if item.size >= WINRM_LIMIT:
                raise UsageError(
                    f"{item.source.name} has {item.size} bytes: WinRM itself takes files below {WINRM_LIMIT} only",
                    hint="mount the host's folder here and name it: --share FOLDER (the one that --store is there)",
                )


def push_file(
    host: Host, journal: Journal, item: Item, *, run: str, share: Path | None, store: str, control: Control = SILENT
) -> bool:
    """Bring one file; False when it is there already, byte for byte. Raises TargetError for another file there."""
    if _is_there(host, journal, item):
        return False
    part = f"{item.target}.{run}.part"
    journal.begin("file", part)
    if host.local:
        _copy(item, Path(part), control)
    elif share is not None:
        _copy(item, _on_share(share, part, store), control)
    else:
        _send(host, item, part, control)
    journal.made("file", part)
    journal.begin("file", item.target)
    parameters = {"part": part, "path": item.target, "size": item.size, "sha256": item.sha256}
    try:
        host.call("publish-file", parameters, timeout=hash_seconds(item.size))
    except HostError as error:
        if error.kind == "exists":
            # Somebody else's. After any other failure the .part tells whether ours got its name.
            journal.gone("file", item.target)
        if error.kind == "mismatch":
            raise VerificationFailed(f"{item.target} did not arrive as it was sent: {error.message}") from error
        raise
    journal.made("file", item.target)
    journal.gone("file", part)
    return True


def _is_there(host: Host, journal: Journal, item: Item) -> bool:
    found = host.call(
        "file-info", {"path": item.target, "hash": True, "size": item.size}, timeout=hash_seconds(item.size)
    )
    if not found["exists"]:
        return False
    if found["size"] == item.size and found.get("sha256") == item.sha256:
        return True
    whose = "from an earlier run, changed since" if journal.names("file", item.target) else "not from this bundle"
    raise TargetError(
        f"{item.target} is on {host.target} already, {whose}",
        hint="`imagekit hyperv delete` removes what the journal names; a file of others is yours to move",
    )


def _copy(item: Item, target: Path, control: Control) -> None:
    """A plain copy to a new file."""
    done = 0
    try:
        with item.source.open("rb") as read, target.open("xb") as write:
            while block := read.read(COPY_STEP):
                control.tell("push", done, item.size)
                write.write(block)
                done += len(block)
            write.flush()
            os.fsync(write.fileno())
    except OSError as error:
        raise TargetError(f"cannot be written: {error.strerror or error}", path=target) from error
    control.tell("push", done, item.size)


def _on_share(share: Path, path: str, store: str) -> Path:
    """Where a path below ``store`` on the host is on this computer."""
    return share.joinpath(*ntpath.relpath(path, store).split("\\"))


def _send(host: Host, item: Item, part: str, control: Control) -> None:
    """The file in pieces, each at its offset; the first makes the file."""
    offset = 0
    with item.source.open("rb") as file:
        while True:
            block = file.read(CHUNK)
            if not block and offset:
                break
            control.tell("push", offset, item.size)
            data = base64.b64encode(block).decode()
            host.call("write-chunk", {"path": part, "offset": offset, "data": data})
            offset += len(block)
            if not block:
                break
    control.tell("push", offset, item.size)
