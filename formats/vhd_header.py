"""The structures of a VHD: footer, dynamic header, geometry (specification 1.0, "Hard Disk Footer Format" and on).

XenServer's additions are known too where they change what is read or what must be written: its bitmaps were
little-endian before version 1.1, and its disks from 1.1 on have a map of full blocks behind the BAT (blktap, vhd.h).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Literal

from imagekit.errors import CorruptImage, InvalidImage, UnsupportedFeature
from imagekit.formats.base import SECTOR, GiB, KiB, MiB, round_up
from imagekit.formats.words import packed_bits
from imagekit.records import dataclass

FOOTER_COOKIE = b"conectix"
HEADER_COOKIE = b"cxsparse"
NO_OFFSET = 0xFFFFFFFFFFFFFFFF
NOT_ALLOCATED = 0xFFFFFFFF
VHD_EPOCH = 946684800
"""2000-01-01T00:00Z in Unix time; earlier times clamp to it."""
FIXED, DYNAMIC, DIFFERENCING = 2, 3, 4
SUBFORMATS = {FIXED: "fixed", DYNAMIC: "dynamic", DIFFERENCING: "differencing"}
MAX_SIZE = 2040 * GiB
MAX_ENTRIES = MAX_SIZE // (256 * KiB)
"""Entries of a BAT that are read: the largest disk in blocks half of the smallest that Windows makes."""
DEFAULT_BLOCK = 2 * MiB
MAX_BLOCK = 256 * MiB
HEADER_OFFSET = 512
BAT_OFFSET = 1536
PAGE = 4 * KiB
MAX_GEOMETRY = (65535, 16, 255)
CHS_CREATORS = (b"vpc ", b"qemu")
LOCATORS_OFFSET = 576
LOCATOR_SIZE = 24
XEN_APP, XEN_VERSION, XEN_OS = b"tap\0", 0x00010003, bytes(4)
XEN_BLOCK = 2 * MiB
BATMAP_COOKIE = b"tdbatmap"
BATMAP_VERSION = 0x00010002

_FOOTER = struct.Struct(">8sIIQI4sI4sQQHBBII16sB427s")
_HEADER = struct.Struct(">8sQQIIII16sII512s192s256s")
_LOCATOR = struct.Struct(">4sIIIQ")
_BATMAP = struct.Struct(">8sQIIIB")


def checksum(data: bytes) -> int:
    """One's complement of the sum of all bytes, the checksum field taken as zero."""
    return ~sum(data) & 0xFFFFFFFF


def geometry(size: int) -> tuple[int, int, int]:
    """Cylinders, heads, sectors per track for a size in bytes (specification, appendix "CHS calculation")."""
    total = min(size // SECTOR, 65535 * 16 * 255)
    if total >= 65535 * 16 * 63:
        per_track, heads = 255, 16
        tracks = total // per_track
    else:
        per_track = 17
        tracks = total // per_track
        heads = max(4, (tracks + 1023) // 1024)
        if tracks >= heads * 1024 or heads > 16:
            per_track, heads = 31, 16
            tracks = total // per_track
        if tracks >= heads * 1024:
            per_track, heads = 63, 16
            tracks = total // per_track
    return tracks // heads, heads, per_track


def check_version(what: str, version: int, offset: int) -> None:
    """UnsupportedFeature for a structure that is not of version 1, whose only minor one is 0."""
    if version >> 16 != 1:
        raise UnsupportedFeature(
            f"the VHD {what} has version {version >> 16}.{version & 0xFFFF}; version 1.0 is read", offset=offset
        )


@dataclass(frozen=True, slots=True)
class Footer:
    """The 512-byte footer. ``pack`` computes the checksum."""

    current_size: int
    disk_type: int
    unique_id: bytes
    data_offset: int = NO_OFFSET
    timestamp: int = 0
    creator_app: bytes = b"win "
    creator_version: int = 0x000A0000
    creator_os: bytes = b"Wi2k"
    original_size: int = 0
    cylinders: int = 0
    heads: int = 0
    sectors: int = 0
    features: int = 2
    version: int = 0x00010000
    saved_state: int = 0
    reserved: bytes = bytes(427)

    @classmethod
    def parse(cls, data: bytes, *, offset: int = 0) -> Footer:
        """From 512 bytes, or the 511 of files older than 2004. CorruptImage when the checksum is wrong."""
        if len(data) < SECTOR - 1:
            raise InvalidImage(f"no VHD footer: {len(data)} bytes are left, 511 or 512 are needed", offset=offset)
        data = data.ljust(SECTOR, b"\0")
        if data[:8] != FOOTER_COOKIE:
            raise InvalidImage(f"no VHD footer: cookie {data[:8]!r}, expected {FOOTER_COOKIE!r}", offset=offset)
        fields = _FOOTER.unpack(data)
        found, expected = fields[14], checksum(data[:64] + bytes(4) + data[68:])
        if found != expected:
            raise CorruptImage(
                f"the VHD footer's checksum is {found:#010x}, expected {expected:#010x}", offset=offset + 64
            )
        return cls(
            features=fields[1],
            version=fields[2],
            data_offset=fields[3],
            timestamp=fields[4],
            creator_app=fields[5],
            creator_version=fields[6],
            creator_os=fields[7],
            original_size=fields[8],
            current_size=fields[9],
            cylinders=fields[10],
            heads=fields[11],
            sectors=fields[12],
            disk_type=fields[13],
            unique_id=fields[15],
            saved_state=fields[16],
            reserved=fields[17],
        )

    def pack(self) -> bytes:
        data = _FOOTER.pack(
            FOOTER_COOKIE,
            self.features,
            self.version,
            self.data_offset,
            self.timestamp,
            self.creator_app,
            self.creator_version,
            self.creator_os,
            self.original_size,
            self.current_size,
            self.cylinders,
            self.heads,
            self.sectors,
            self.disk_type,
            0,
            self.unique_id,
            self.saved_state,
            self.reserved,
        )
        return data[:64] + checksum(data).to_bytes(4, "big") + data[68:]

    @property
    def chs_size(self) -> int:
        return self.cylinders * self.heads * self.sectors * SECTOR

    @property
    def size_from(self) -> Literal["current", "chs"]:
        """Which size counts by default: the geometry's only for creators that gave the guest no other."""
        by_geometry = self.creator_app in CHS_CREATORS and self.chs_size > 0
        return "chs" if by_geometry and (self.cylinders, self.heads, self.sectors) != MAX_GEOMETRY else "current"

    @property
    def virtual_size(self) -> int:
        """Bytes the guest sees."""
        return self.chs_size if self.size_from == "chs" else self.current_size

    @property
    def is_xen(self) -> bool:
        """Whether XenServer takes the disk for one of its own."""
        return self.creator_app[:3] == XEN_APP[:3]

    @property
    def bit_order(self) -> Literal["big", "little"]:
        """How sectors are counted in a byte of a bitmap; XenServer's version 0.1 was the other way round."""
        return "little" if self.is_xen and self.creator_version == 1 else "big"

    @property
    def content_fields(self) -> tuple[object, ...]:
        """What decides the content: two copies that differ here are two different disks."""
        return self.disk_type, self.virtual_size, self.current_size, self.data_offset, self.unique_id


@dataclass(frozen=True, slots=True)
class Locator:
    """Where one form of a parent's name lies in the file."""

    code: bytes
    space: int
    length: int
    offset: int

    @property
    def room(self) -> int:
        """Bytes kept for the name. ``space`` counts sectors by the specification and bytes in Windows' files."""
        if self.space < SECTOR:
            return max(self.space * SECTOR, self.length)
        return self.length if self.space % SECTOR else max(self.space, self.length)


NO_LOCATOR = Locator(bytes(4), 0, 0, 0)


@dataclass(frozen=True, slots=True)
class DynamicHeader:
    """The 1024-byte header of dynamic and differencing disks. ``pack`` computes the checksum."""

    bat_offset: int
    max_entries: int
    block_size: int
    next_offset: int = NO_OFFSET
    version: int = 0x00010000
    parent_id: bytes = bytes(16)
    parent_timestamp: int = 0
    reserved: int = 0
    parent_name: bytes = bytes(512)
    locators: tuple[Locator, ...] = (NO_LOCATOR,) * 8
    tail: bytes = bytes(256)

    @classmethod
    def parse(cls, data: bytes, *, offset: int = 0) -> DynamicHeader:
        """From 1024 bytes. CorruptImage when the checksum is wrong."""
        if data[:8] != HEADER_COOKIE:
            raise InvalidImage(
                f"no VHD dynamic header: cookie {data[:8]!r}, expected {HEADER_COOKIE!r}", offset=offset
            )
        fields = _HEADER.unpack(data)
        found, expected = fields[6], checksum(data[:36] + bytes(4) + data[40:])
        if found != expected:
            raise CorruptImage(
                f"the VHD dynamic header's checksum is {found:#010x}, expected {expected:#010x}",
                offset=offset + 36,
            )
        locators = tuple(
            Locator(code, space, length, where) for code, space, length, _, where in _LOCATOR.iter_unpack(fields[11])
        )
        return cls(
            next_offset=fields[1],
            bat_offset=fields[2],
            version=fields[3],
            max_entries=fields[4],
            block_size=fields[5],
            parent_id=fields[7],
            parent_timestamp=fields[8],
            reserved=fields[9],
            parent_name=fields[10],
            locators=locators,
            tail=fields[12],
        )

    def pack(self) -> bytes:
        data = _HEADER.pack(
            HEADER_COOKIE,
            self.next_offset,
            self.bat_offset,
            self.version,
            self.max_entries,
            self.block_size,
            0,
            self.parent_id,
            self.parent_timestamp,
            self.reserved,
            self.parent_name,
            b"".join(_LOCATOR.pack(one.code, one.space, one.length, 0, one.offset) for one in self.locators),
            self.tail,
        )
        return data[:36] + checksum(data).to_bytes(4, "big") + data[40:]

    @property
    def bitmap_size(self) -> int:
        """Bytes of a block's sector bitmap: a bit a sector, whole sectors."""
        return bitmap_size(self.block_size)

    def validate(self, virtual_size: int, file_size: int) -> None:
        """Bound every number before it is used; InvalidImage or CorruptImage."""
        if self.block_size & (self.block_size - 1) or not SECTOR <= self.block_size <= MAX_BLOCK:
            raise InvalidImage(f"block size {self.block_size}, expected a power of two up to 256 MiB")
        needed = -(-virtual_size // self.block_size)
        if self.max_entries < needed:
            raise InvalidImage(f"the BAT has {self.max_entries} entries, the virtual size needs {needed}")
        if needed > MAX_ENTRIES:
            raise InvalidImage(f"the virtual size needs a BAT of {needed} entries, expected at most {MAX_ENTRIES}")
        if self.bat_offset % SECTOR or self.bat_offset < SECTOR:
            raise InvalidImage(f"the BAT lies at {self.bat_offset:#x}, not on a sector")
        if self.bat_offset + self.max_entries * 4 > file_size:
            raise CorruptImage(
                f"the BAT of {self.max_entries} entries at {self.bat_offset:#x} ends behind the file's end "
                f"{file_size:#x}",
                hint="the file looks truncated; fetch it again and compare its checksum",
            )


def bitmap_size(block_size: int) -> int:
    """Bytes of the sector bitmap of a block."""
    return round_up(max(1, block_size // SECTOR // 8), SECTOR)


def batmap_size(entries: int) -> int:
    """Bytes of XenServer's map of full blocks, with its header."""
    return SECTOR + round_up(max(1, -(-entries // 8)), SECTOR)


def batmap(offset: int, entries: int, runs: Iterable[tuple[int, int]] = ()) -> bytes:
    """XenServer's map of full blocks, header first, for a file where it lies at ``offset``.

    ``runs`` are (first block, count). A bit that is clear says nothing, so none is set where XenServer does not look:
    it takes the map's length from the number of whole bytes.
    """
    length = batmap_size(entries) - SECTOR
    most, digits = round_up(max(1, entries // 8), SECTOR) * 8, bytearray()
    for first, count in runs:
        end = min(first + count, most)
        digits += b"0" * (end - len(digits))
        digits[first:end] = b"1" * (end - first)
    data = packed_bits(digits, "big").ljust(length, b"\0")
    fields = BATMAP_COOKIE, offset + SECTOR, length // SECTOR, BATMAP_VERSION, checksum(data), 0
    return _BATMAP.pack(*fields).ljust(SECTOR, b"\0") + data
