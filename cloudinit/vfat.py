"""Writes the VFAT medium a guest reads its metadata from: a FAT12 or FAT16 file system with long names.

Microsoft's FAT specification 1.03 (fatgen103). The whole disk is the file system, as on Nova's VFAT config drives, or
it has a master boot record and the file system is its one partition, a MiB from the start. Only as large as it has
to be, in whole MiB, at least `MIN_VOLUME`; up to 7 MiB it is FAT12, above that FAT16, and never near the number of
clusters at which readers count differently.

Every name that is not plain 8.3 in capitals has a long name, exact in its letters' case. Same tree, label, timestamp
and layout give the same bytes: files lie in the order of their paths, unbroken, and the ids of volume and disk are
made of the content, so that two guests' drives differ in them.

Not here: FAT32, GPT, changing what exists. `imagekit.contents.fat` reads, also what others wrote.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone

from imagekit.cloudinit.medium import MAX_MEDIUM, VFAT, check_label, check_size, check_tree, default_timestamp
from imagekit.errors import UsageError

__all__ = ["MIN_VOLUME", "PARTITION_START", "write_vfat"]

MIB = 1 << 20
SECTOR = 512
CLUSTER = 2048
MIN_VOLUME = 3 * MIB
"""Bytes; the least that Windows' own functions make a virtual disk of."""
PARTITION_START = MIB

_FIRST_FAT16, _LAST_FAT16 = 4085, 65524
"""Clusters; fewer are FAT12, more FAT32."""
_UNSURE = 16
"""So many clusters to either side of the border some programs take the one for the other."""
_RESERVED = 1  # sectors before the FATs: the boot sector
_FATS = 2
_ROOT_ENTRIES = 512
_ENTRY = 32
_FIXED_DISK = 0xF8
_ARCHIVE, _FOLDER, _LABEL, _LONG_NAME = 0x20, 0x10, 0x08, 0x0F
_LAST_LONG = 0x40
_UNITS = 13  # UTF-16 units of a long name in one entry
_SHORT = re.compile(r"[A-Z0-9_-]{1,8}(?:\.[A-Z0-9_-]{1,3})?")
_TYPE_FAT12, _TYPE_FAT16 = 0x01, 0x0E  # of a partition; 0E is addressed by sectors
_OTHER_DEVICE = b"\xcd\x18\xeb\xfe"  # int 18h: have the BIOS boot from the next device
_FIRST_DATE, _LAST_DATE = datetime(1980, 1, 1), datetime(2107, 12, 31, 23, 59, 58)


def write_vfat(
    tree: Mapping[str, bytes],
    *,
    label: str = "config-2",
    timestamp: int | None = None,
    partitioned: bool = False,
) -> bytes:
    """The medium that holds ``tree`` (path with ``/`` to content).

    ``timestamp`` is in seconds since 1970 UTC, by default SOURCE_DATE_EPOCH of the environment, else
    `DEFAULT_TIMESTAMP`; FAT knows no year before 1980 or after 2107, so the date is the nearest one.
    ``partitioned`` puts the file system into a partition. Raises UsageError for names or a label that one of the
    guests could not read, and for what does not fit into 64 MiB.
    """
    when = _date(default_timestamp() if timestamp is None else timestamp)
    check_label(label, VFAT)
    folders = check_tree(tree, VFAT)
    root = _tree(tree, folders)
    number = _identity(tree, label)
    start = PARTITION_START if partitioned else 0
    layout = _layout(root, start)
    check_size(start + layout.size)
    medium = bytearray(start + layout.size)
    _Volume(layout, when, medium, start).write(root, label, number, hidden=start // SECTOR)
    if partitioned:
        medium[:SECTOR] = _boot_record(layout, number)
    return bytes(medium)


# --- what there is to store ------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Node:
    """A file or a folder; ``children`` is None for a file. ``names`` are its entries for the long name."""

    short: bytes = b""
    names: list[bytes] = field(default_factory=list)
    content: bytes = b""
    children: dict[str, _Node] | None = None
    cluster: int = 0

    def entries(self) -> int:
        """How many entries a folder has for its children."""
        return sum(len(child.names) + 1 for child in (self.children or {}).values())

    def walk(self) -> Iterator[_Node]:
        """Everything below, folders before what is in them."""
        for child in (self.children or {}).values():
            yield child
            yield from child.walk()


def _tree(tree: Mapping[str, bytes], folders: Sequence[str]) -> _Node:
    root = _Node(children={})
    nodes = {"": root}
    for path in sorted([*folders, *tree]):
        parent, _, name = path.rpartition("/")
        node = _Node(children={}) if path not in tree else _Node(content=tree[path])
        siblings = nodes[parent].children
        assert siblings is not None
        siblings[name] = nodes[path] = node
    for node in nodes.values():
        taken = {name.upper() for name in node.children or {}}
        for name, child in (node.children or {}).items():
            short = _short_name(name, taken)
            taken.add(short)
            base, _, extension = short.partition(".")
            child.short = f"{base:<8}{extension:<3}".encode()
            child.names = [] if short == name else _long_name(name, child.short)
    return root


def _short_name(name: str, taken: set[str]) -> str:
    """The 8.3 name in capitals; made up when the name is none, as any that no other in the folder is called by."""
    if _SHORT.fullmatch(name.upper()) and name.isascii():
        return name.upper()
    stem, _, extension = name.lstrip(". ").rpartition(".")
    if not stem:
        stem, extension = extension, ""
    base, end = (re.sub("[^A-Z0-9_-]", "_", re.sub("[ .]", "", part.upper())) for part in (stem, extension))
    for number in itertools.count(1):
        tail = f"~{number}"
        found = f"{base[: 8 - len(tail)]}{tail}" + (f".{end[:3]}" if end else "")
        if found not in taken:
            return found
    raise AssertionError("unreachable")


def _long_name(name: str, short: bytes) -> list[bytes]:
    """The entries that stand before the short one's, the last part first."""
    checksum = 0
    for byte in short:
        checksum = ((checksum >> 1) + (checksum << 7) + byte) & 0xFF
    units = (name + "\0" if len(name) % _UNITS else name).encode("utf-16-le")
    parts = [units[at : at + 2 * _UNITS].ljust(2 * _UNITS, b"\xff") for at in range(0, len(units), 2 * _UNITS)]
    return [
        bytes([number | (_LAST_LONG if number == len(parts) else 0)])
        + (part[:10] + bytes([_LONG_NAME, 0, checksum]) + part[10:22] + b"\0\0" + part[22:])
        for number, part in reversed(list(enumerate(parts, start=1)))
    ]


def _identity(tree: Mapping[str, bytes], label: str) -> int:
    """The number that volume and disk are known by: never zero, another one for other content."""
    digest = hashlib.sha256(label.encode())
    for path, content in sorted(tree.items()):
        digest.update(b"%d %d " % (len(path.encode()), len(content)) + path.encode() + content)
    return int.from_bytes(digest.digest()[:4], "little") or 1


# --- where it goes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Layout:
    """The shape of a file system; all but ``size`` (bytes) counts sectors, entries or clusters."""

    size: int
    bits: int
    fat_sectors: int
    root_entries: int
    clusters: int

    @property
    def root(self) -> int:
        return (_RESERVED + _FATS * self.fat_sectors) * SECTOR

    @property
    def data(self) -> int:
        return self.root + self.root_entries * _ENTRY


def _layout(root: _Node, start: int) -> _Layout:
    """The smallest file system in whole MiB that holds everything."""
    # Entries of the root fill whole sectors; the label is one of them.
    root_entries = max(_ROOT_ENTRIES, -(-(root.entries() + 1) // 16) * 16)
    needed = sum(-(-_stored(node) // CLUSTER) for node in root.walk())
    smallest = max(MIN_VOLUME, needed * CLUSTER // MIB * MIB)
    for size in range(smallest, max(MAX_MEDIUM - start, smallest) + MIB, MIB):
        layout = _shape(size, root_entries)
        if layout is not None and layout.clusters >= needed:
            return layout
    raise UsageError(
        f"{needed * CLUSTER} bytes of files, more than a medium of {MAX_MEDIUM} bytes holds",
        hint="let the guest fetch what is large: put its address into the user data",
    )


def _stored(node: _Node) -> int:
    """Bytes of a file's or folder's clusters."""
    return len(node.content) if node.children is None else (node.entries() + 2) * _ENTRY


def _shape(size: int, root_entries: int) -> _Layout | None:
    """FATs as large as the clusters need that they leave room for; None for a size to stay away from."""
    sectors = size // SECTOR
    for bits in (12, 16):
        fat_sectors = 1
        while True:
            left = sectors - _RESERVED - _FATS * fat_sectors - root_entries * _ENTRY // SECTOR
            clusters = left * SECTOR // CLUSTER
            if fat_sectors * SECTOR * 8 >= (clusters + 2) * bits:
                break
            fat_sectors += 1
        if bits == 12 and 1 <= clusters < _FIRST_FAT16 - _UNSURE:
            return _Layout(size, bits, fat_sectors, root_entries, clusters)
        if bits == 16 and _FIRST_FAT16 + _UNSURE <= clusters <= _LAST_FAT16 - _UNSURE:
            return _Layout(size, bits, fat_sectors, root_entries, clusters)
    return None


@dataclass(frozen=True, slots=True)
class _Volume:
    """A file system being written into ``medium`` from ``start`` on."""

    layout: _Layout
    when: tuple[int, int]
    medium: bytearray
    start: int

    def write(self, root: _Node, label: str, number: int, *, hidden: int) -> None:
        layout = self.layout
        links = [0xF00 | _FIXED_DISK | (0xF000 if layout.bits == 16 else 0), (1 << layout.bits) - 1]
        for node in root.walk():
            count = -(-_stored(node) // CLUSTER)
            if count:
                node.cluster = len(links)
                links += [*range(node.cluster + 1, node.cluster + count), (1 << layout.bits) - 1]
        self._put(0, _boot_sector(layout, label, number, hidden))
        fat = _packed(links, layout.bits)
        for copy in range(_FATS):
            self._put((_RESERVED + copy * layout.fat_sectors) * SECTOR, fat)
        name = label.encode().ljust(11)
        self._put(layout.root, self._entry(name, _LABEL, 0, 0) + self._listing(root))
        self._put_below(root)

    def _put_below(self, folder: _Node) -> None:
        for child in (folder.children or {}).values():
            if child.children is None:
                content = child.content
            else:
                # ".." of a folder in the root names cluster 0, as the root has none.
                dots = ((b".", child.cluster), (b"..", folder.cluster))
                content = b"".join(self._entry(name.ljust(11), _FOLDER, cluster, 0) for name, cluster in dots)
                content += self._listing(child)
                self._put_below(child)
            if content:
                self._put(self.layout.data + (child.cluster - 2) * CLUSTER, content)

    def _listing(self, folder: _Node) -> bytes:
        out = b""
        for child in (folder.children or {}).values():
            kind = _ARCHIVE if child.children is None else _FOLDER
            out += b"".join(child.names) + self._entry(child.short, kind, child.cluster, len(child.content))
        return out

    def _entry(self, name: bytes, attributes: int, cluster: int, size: int) -> bytes:
        time, date = self.when
        return struct.pack("<11sBBBHHHHHHHI", name, attributes, 0, 0, time, date, date, 0, time, date, cluster, size)

    def _put(self, offset: int, data: bytes) -> None:
        at = self.start + offset
        self.medium[at : at + len(data)] = data


def _packed(links: list[int], bits: int) -> bytes:
    if bits == 16:
        return struct.pack(f"<{len(links)}H", *links)
    even = links + [0] * (len(links) % 2)
    pairs = zip(even[::2], even[1::2], strict=True)
    return b"".join((low | high << 12).to_bytes(3, "little") for low, high in pairs)


def _boot_sector(layout: _Layout, label: str, number: int, hidden: int) -> bytes:
    sectors = layout.size // SECTOR
    small = sectors if sectors <= 0xFFFF else 0
    parameters = struct.pack(
        "<HBHBHHBHHHII",
        *(SECTOR, CLUSTER // SECTOR, _RESERVED, _FATS, layout.root_entries, small, _FIXED_DISK, layout.fat_sectors),
        *(63, 255, hidden, 0 if small else sectors),  # the geometry that BIOSes make up for disks of this size
    )
    kind = f"FAT{layout.bits}".ljust(8).encode()
    extended = struct.pack("<BBBI11s8s", 0x80, 0, 0x29, number, label.encode().ljust(11), kind)
    head = b"\xeb\x3c\x90IMAGEKIT" + parameters + extended
    return (head + _OTHER_DEVICE).ljust(SECTOR - 2, b"\0") + b"\x55\xaa"


def _boot_record(layout: _Layout, number: int) -> bytes:
    kind = _TYPE_FAT12 if layout.bits == 12 else _TYPE_FAT16
    beyond = b"\xfe\xff\xff"  # in cylinders, heads and sectors: look at the sector numbers instead
    first, count = PARTITION_START // SECTOR, layout.size // SECTOR
    partition = struct.pack("<B3sB3sII", 0, beyond, kind, beyond, first, count)
    code = _OTHER_DEVICE.ljust(440, b"\0") + struct.pack("<IH", number, 0)
    return code + partition.ljust(64, b"\0") + b"\x55\xaa"


def _date(timestamp: int) -> tuple[int, int]:
    """(time, date) as FAT stores them, in steps of two seconds."""
    try:
        when = datetime(1970, 1, 1, tzinfo=timezone.utc) + timedelta(seconds=timestamp)
    except OverflowError:
        raise UsageError(f"timestamp {timestamp}: expected seconds since 1970") from None
    when = min(max(when.replace(tzinfo=None), _FIRST_DATE), _LAST_DATE)
    return (
        when.hour << 11 | when.minute << 5 | when.second // 2,
        (when.year - 1980) << 9 | when.month << 5 | when.day,
    )
