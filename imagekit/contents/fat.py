"""A look into a FAT file system on a guest's disk: its label, a file by its path or all of them, a part of a file.

Follows Microsoft's FAT specification 1.03 (FAT12, FAT16, FAT32, long names) as far as an EFI system partition and a
config drive need. Read-only, and bounded whatever the bytes say: every number is checked before it is used, a chain
of clusters is never longer than the file it belongs to, a directory never longer than MAX_DIRECTORY, and all files
that are listed together claim no more bytes than there are. Damage is FatError, which says what is wrong; an image
that cannot be read raises its own errors.

No dates, no attributes, no other code pages than ASCII in short names. For one thread at a time.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from imagekit.formats.base import SECTOR, DiskImage, KiB, MiB, round_up
from imagekit.records import dataclass

MAX_DIRECTORY = 512 * KiB
"""16384 entries; the specification allows four times as many, an EFI system partition has a dozen."""
MAX_FILE = 256 * MiB
"""Of larger files nothing is read: the chain to follow would be too long."""
MAX_LEVELS = 32
"""Folders in folders that are listed; a path of Windows has 260 characters."""
MAX_LISTED = 16 * MiB
"""Of all directories that are read; a config drive has a few KiB."""
MAX_WINDOWS = 2048
"""Pieces of the FAT that are read. A chain in a row needs one for 2 MiB at least; one that jumps needs more."""

_WINDOW = 16 * KiB
"""The FAT is read in pieces of this many bytes."""

_ENTRY = 32
_END, _DELETED = 0x00, 0xE5
_VOLUME_LABEL, _DIRECTORY, _LONG_NAME = 0x08, 0x10, 0x0F
_LAST_LONG_NAME = 0x40
_LOWER_BASE, _LOWER_EXTENSION = 0x08, 0x10
"""Of the byte that Windows NT keeps for names that are short but for their capitals."""
_EXTENDED_BOOT = (0x28, 0x29)
_FAT12_CLUSTERS = 4085
"""Fewer clusters than this make it FAT12."""


class FatError(Exception):
    """There is no FAT file system, or it is damaged; the text says how."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file or directory: where its content begins. ``size`` in bytes, 0 for a directory."""

    cluster: int
    size: int
    is_directory: bool


class Fat:
    """The FAT file system in ``length`` bytes from ``start`` of a disk."""

    def __init__(self, image: DiskImage, start: int, length: int) -> None:
        """Read the boot sector; FatError when there is none that makes sense."""
        self._image = image
        self._start = start
        self._length = length
        self._window = (0, b"")
        self._windows = 0
        self._listed = 0
        boot = self._read(0, SECTOR)
        sector, per_cluster, reserved, fats, root_entries, sectors, _, fat_size = struct.unpack_from(
            "<HBHBHHBH", boot, 11
        )
        wide_sectors, wide_fat_size = struct.unpack_from("<II", boot, 32)
        fat32 = fat_size == 0
        sectors, fat_size = sectors or wide_sectors, fat_size or wide_fat_size
        if boot[510:] != b"\x55\xaa" or sector not in (512, 1024, 2048, 4096):
            raise FatError("it holds no FAT file system")
        if per_cluster == 0 or per_cluster & (per_cluster - 1) or not (reserved and fats and fat_size):
            raise FatError("the boot sector of its FAT file system is damaged")
        root = reserved + fats * fat_size
        data = root + round_up(root_entries * _ENTRY, sector) // sector
        clusters = (sectors - data) // per_cluster
        self._cluster_size: int = sector * per_cluster
        self._fat: int = reserved * sector
        self._root: int = root * sector
        self._root_size: int = root_entries * _ENTRY
        self._data: int = data * sector
        self._bits = 32 if fat32 else 12 if clusters < _FAT12_CLUSTERS else 16
        # The first two entries of a FAT belong to no cluster.
        self._end = min(clusters + 2, fat_size * sector * 8 // self._bits)
        if self._end <= 2:
            raise FatError("the boot sector of its FAT file system leaves no room for files")
        self._root_cluster: int = struct.unpack_from("<I", boot, 44)[0] if fat32 else 0
        extended = boot[64 if fat32 else 36 :]
        self._boot_label = extended[7:18] if extended[2] in _EXTENDED_BOOT else b""

    @property
    def bits(self) -> int:
        """12, 16 or 32."""
        return self._bits

    def label(self) -> str:
        """The label, as Linux and Windows see it: an entry of the root, else what the boot sector says."""
        for raw, _ in self._named(Entry(self._root_cluster, 0, True)):
            if raw[11] & (_VOLUME_LABEL | _DIRECTORY) == _VOLUME_LABEL:
                return _text(raw[:11]).rstrip(" ")
        label = _text(self._boot_label).rstrip(" \0")
        return "" if label == "NO NAME" else label

    def files(self) -> Iterator[tuple[str, Entry]]:
        """Every file with its path, slashes between the parts and each spelt as Linux shows it."""
        pending = [("", Entry(self._root_cluster, 0, True))]
        entered: set[int] = set()
        claimed = 0
        while pending:
            prefix, folder = pending.pop()
            if folder.cluster in entered or prefix.count("/") > MAX_LEVELS:
                raise FatError("it has folders that contain themselves, or are nested too deep")
            entered.add(folder.cluster)
            seen: set[str] = set()
            for raw, long in self._named(folder):
                name = long or _shown(raw)
                if raw[11] & _VOLUME_LABEL or name in (".", ".."):
                    continue
                if not name or "/" in name or name.upper() in seen:
                    raise FatError(f"it has a file {prefix}{name} twice, or one without a name")
                seen.add(name.upper())
                entry = self._entry(raw)
                if entry.is_directory:
                    pending.append((f"{prefix}{name}/", entry))
                    continue
                claimed += entry.size
                if claimed > self._length:
                    raise FatError("its files claim more bytes than it has")
                yield prefix + name, entry

    def find(self, path: Sequence[str]) -> Entry | None:
        """The file or directory at ``path``, its parts from the root on, upper or lower case; None without it."""
        found = Entry(self._root_cluster, 0, True)
        for name in path:
            if not found.is_directory:
                return None
            wanted = name.upper()
            at = next((entry for names, entry in self._entries(found) if wanted in names), None)
            if at is None:
                return None
            found = at
        return found

    def read(self, entry: Entry, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes of the file from ``offset``; short only at its end."""
        if entry.size > MAX_FILE:
            raise FatError(f"a file has {entry.size} bytes, more than are looked at")
        end = min(offset + length, entry.size)
        out = bytearray()
        at = 0
        for cluster in self._chain(entry.cluster, entry.size):
            if at >= end:
                break
            low, high = max(at, offset), min(at + self._cluster_size, end)
            if low < high:
                out += self._read(self._place(cluster) + low - at, high - low)
            at += self._cluster_size
        if len(out) != max(0, end - offset):
            raise FatError("a file is longer than its clusters")
        return bytes(out)

    def _entries(self, folder: Entry) -> Iterator[tuple[set[str], Entry]]:
        """The names (short, and long if it has one; upper case) and places of what a directory holds."""
        for raw, long in self._named(folder):
            if not raw[11] & _VOLUME_LABEL:
                yield {_short_name(raw), *([] if long is None else [long.upper()])}, self._entry(raw)

    def _named(self, folder: Entry) -> Iterator[tuple[bytes, str | None]]:
        """The entries of a directory that are none for a long name, each with the long name before it."""
        parts: list[bytes] = []
        for raw in self._raw_entries(folder):
            first, attributes = raw[0], raw[11]
            if first == _END:
                return
            if first == _DELETED:
                parts = []
            elif attributes & 0x3F == _LONG_NAME:
                parts = [raw] if first & _LAST_LONG_NAME else [*parts, raw][:20]
            else:
                yield raw, _long_name(parts, raw)
                parts = []

    def _entry(self, raw: bytes) -> Entry:
        high, low, size = struct.unpack_from("<H4xHI", raw, 20)
        cluster = (high << 16 | low) if self._bits == 32 else low
        is_directory = bool(raw[11] & _DIRECTORY)
        # ".." of a directory in the root names cluster 0, the root itself.
        if is_directory:
            return Entry(cluster or self._root_cluster, 0, True)
        return Entry(cluster, size, False)

    def _raw_entries(self, folder: Entry) -> Iterator[bytes]:
        if folder.cluster == 0:  # the root of FAT12 and FAT16 lies outside the clusters
            places = (
                (self._root + at, min(SECTOR, self._root_size - at)) for at in range(0, self._root_size, SECTOR)
            )
        else:
            chain = self._chain(folder.cluster, MAX_DIRECTORY)
            places = ((self._place(cluster), self._cluster_size) for cluster in chain)
        for place, size in places:
            self._listed += size
            if self._listed > MAX_LISTED:
                raise FatError("its directories are longer than any that are looked at")
            piece = self._read(place, size)
            yield from (piece[at : at + _ENTRY] for at in range(0, size, _ENTRY))

    def _chain(self, first: int, size: int) -> Iterator[int]:
        """The clusters of ``size`` bytes at most, from ``first`` on."""
        cluster: int | None = first
        for _ in range(-(-size // self._cluster_size)):
            if cluster is None:
                return
            if not 2 <= cluster < self._end:
                raise FatError("a chain of clusters leaves its FAT file system")
            yield cluster
            cluster = self._next(cluster)

    def _next(self, cluster: int) -> int | None:
        """The cluster after this one, None after the last."""
        if self._bits == 12:
            pair = int.from_bytes(self._fat_bytes(cluster * 3 // 2, 2), "little")
            value = pair >> 4 if cluster & 1 else pair & 0xFFF
        else:
            width = self._bits // 8
            value = int.from_bytes(self._fat_bytes(cluster * width, width), "little") & 0x0FFFFFFF
        last = 0x0FFFFFF8 if self._bits == 32 else 0xFFF8 if self._bits == 16 else 0xFF8
        return None if value >= last else value

    def _fat_bytes(self, offset: int, length: int) -> bytes:
        start, piece = self._window
        if not start <= offset <= offset + length <= start + len(piece):
            self._windows += 1
            if self._windows > MAX_WINDOWS:
                raise FatError("its files lie scattered all over it")
            start = offset // _WINDOW * _WINDOW
            # One byte more: an entry of FAT12 may lie across the end.
            piece = self._read(self._fat + start, _WINDOW + 1, exactly=False)
            self._window = start, piece
        found = piece[offset - start : offset - start + length]
        if len(found) != length:
            raise FatError("its FAT is cut short")
        return found

    def _place(self, cluster: int) -> int:
        return self._data + (cluster - 2) * self._cluster_size

    def _read(self, offset: int, length: int, *, exactly: bool = True) -> bytes:
        """Bytes of the partition; never of what lies beyond it."""
        end = min(self._start + self._length, self._image.virtual_size)
        available = end - self._start - offset
        data = self._image.pread(self._start + offset, min(length, available)) if available > 0 else b""
        if exactly and len(data) != length:
            raise FatError("its FAT file system is longer than the partition")
        return data


def _text(raw: bytes) -> str:
    return raw.decode("ascii", "replace")


def _short_name(raw: bytes) -> str:
    return _joined(_text(raw[:8]), _text(raw[8:11])).upper()


def _shown(raw: bytes) -> str:
    """A short name in the letters that Windows NT remembers it to have."""
    base, extension = _text(raw[:8]), _text(raw[8:11])
    return _joined(
        base.lower() if raw[12] & _LOWER_BASE else base,
        extension.lower() if raw[12] & _LOWER_EXTENSION else extension,
    )


def _joined(base: str, extension: str) -> str:
    base, extension = base.rstrip(" "), extension.rstrip(" ")
    return f"{base}.{extension}" if extension else base


def _long_name(parts: list[bytes], raw: bytes) -> str | None:
    """The long name that stands before the entry ``raw``, if all its parts are there and belong to it."""
    checksum = 0
    for byte in raw[:11]:
        checksum = ((checksum >> 1) + (checksum << 7) + byte) & 0xFF
    numbers = [part[0] & 0x1F for part in parts]
    if not parts or numbers != list(range(len(parts), 0, -1)) or any(part[13] != checksum for part in parts):
        return None
    units = b"".join(part[1:11] + part[14:26] + part[28:32] for part in reversed(parts))
    return units.decode("utf-16-le", "replace").partition("\0")[0]
