"""Internal snapshots of qcow2: the table of them, and finding one by its id or name.

Follows QEMU's docs/interop/qcow2.txt, "Snapshots". A snapshot is an L1 table of its own, and the size the disk had.
The saved state of the machine, which lies in the same L1 table behind the disk's end, is not read.

The table has no length: every entry says how long it is. The numbers are bounded as QEMU bounds them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from imagekit.errors import CorruptImage, InvalidImage, UnsupportedFeature
from imagekit.formats.base import File, MiB, round_up
from imagekit.formats.qcow2_header import Qcow2Header
from imagekit.records import dataclass, replace

SNAPSHOT = struct.Struct(">QIHHIIQII")
"""L1 offset and entries, lengths of id and name, seconds, nanoseconds, clock, size of the state, extra length."""

_DISK_SIZE = struct.Struct(">8xQ")

# QEMU's own limits (block/qcow2.h): QCOW_MAX_SNAPSHOTS, QCOW_MAX_SNAPSHOTS_SIZE, QCOW_MAX_SNAPSHOT_EXTRA_DATA.
MAX_SNAPSHOTS = 65536
MAX_SNAPSHOT_BYTES = 64 * MiB
MAX_EXTRA = 1024

SHOWN = 20
"""Snapshots listed in an error."""
SHOWN_NAME = 64


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One entry. ``disk_size`` in bytes; None in old images: the size was never changed."""

    id: str
    name: str
    l1_offset: int
    l1_size: int
    disk_size: int | None

    def __str__(self) -> str:
        return f"{_shown(self.name)} (id {_shown(self.id)})"


def _shown(text: str) -> str:
    """Safe to print: an image's maker chose it."""
    return repr(text if len(text) <= SHOWN_NAME else text[:SHOWN_NAME] + "…")


def read_snapshots(file: File, header: Qcow2Header) -> Iterator[Snapshot]:
    """The entries in the order of the table; InvalidImage or CorruptImage where one cannot be."""
    at = start = header.snapshots_offset
    if header.snapshot_count > MAX_SNAPSHOTS:
        raise InvalidImage(f"{header.snapshot_count} snapshots, at most {MAX_SNAPSHOTS}", path=file.name, offset=60)
    if header.snapshot_count and start % header.cluster_size:
        raise InvalidImage(f"the snapshot table lies at {start:#x}, not on a cluster", path=file.name, offset=64)
    for number in range(header.snapshot_count):
        fixed = file.pread(at, SNAPSHOT.size)
        if len(fixed) != SNAPSHOT.size:
            raise _cut_short(file, number, at)
        l1_offset, l1_size, id_length, name_length, *_, extra = SNAPSHOT.unpack(fixed)
        if extra > MAX_EXTRA:
            message = f"snapshot {number} has {extra} extra bytes, at most {MAX_EXTRA}"
            raise InvalidImage(message, path=file.name, offset=at)
        length = extra + id_length + name_length
        if at + SNAPSHOT.size + length > start + MAX_SNAPSHOT_BYTES:
            raise InvalidImage(f"a snapshot table of more than {MAX_SNAPSHOT_BYTES} bytes", path=file.name, offset=at)
        rest = file.pread(at + SNAPSHOT.size, length)
        if len(rest) != length:
            raise _cut_short(file, number, at)
        size = _DISK_SIZE.unpack_from(rest)[0] if extra >= _DISK_SIZE.size else None
        words = (rest[extra : extra + id_length], rest[extra + id_length :])
        ident, name = (word.decode("utf-8", "replace") for word in words)
        yield Snapshot(ident, name, l1_offset, l1_size, size)
        at = round_up(at + SNAPSHOT.size + length, 8)


def _cut_short(file: File, number: int, at: int) -> CorruptImage:
    return CorruptImage(
        f"snapshot {number} is cut short by the file's end {file.size:#x}",
        hint="the file looks truncated; fetch it again and compare its checksum",
        path=file.name,
        offset=at,
    )


def find_snapshot(snapshots: Sequence[Snapshot], wanted: str, file: File) -> Snapshot:
    """The one with that id, else the one with that name; UnsupportedFeature lists them when there is none."""
    found = [one for one in snapshots if one.id == wanted] or [one for one in snapshots if one.name == wanted]
    if len(found) == 1:
        return found[0]
    among = found or snapshots
    listed = ", ".join(map(str, among[:SHOWN])) + (f" and {len(among) - SHOWN} more" if len(among) > SHOWN else "")
    if found:
        raise UnsupportedFeature(
            f"{len(found)} snapshots are called {_shown(wanted)}",
            hint=f"choose one by its id, where ids differ: {listed}",
            path=file.name,
        )
    raise UnsupportedFeature(
        f"no snapshot has the id or name {_shown(wanted)}",
        hint=f"snapshots in the image: {listed}" if snapshots else "the image has no snapshots",
        path=file.name,
    )


def as_header(header: Qcow2Header, snapshot: Snapshot, file: File) -> Qcow2Header:
    """The header that the image would have if the snapshot were its active state."""
    if header.external_data:
        raise InvalidImage("an image whose data lies in another file has no snapshots", path=file.name, offset=60)
    size = header.size if snapshot.disk_size is None else snapshot.disk_size
    then = replace(header, size=size, l1_offset=snapshot.l1_offset, l1_size=snapshot.l1_size)
    try:
        then.validate_disk(file.size)
    except (InvalidImage, CorruptImage) as error:
        raise type(error)(f"snapshot {snapshot}: {error.message}", hint=error.hint, path=file.name) from None
    return then
