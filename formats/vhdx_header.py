"""The structures at the start of a VHDX: file identifier, headers, region tables, and the numbers of the format.

Follows Microsoft's MS-VHDX, 2.2 "Headers". All integers are little-endian; GUIDs are kept as the 16 bytes stored
(``uuid.UUID(bytes_le=...)``). Each structure parses from and packs to the bytes that carry meaning; its place is
padded with zeros. ``parse`` checks what the structure itself says (signature, checksum, counts); what depends on
the file around it (is the region inside, does it overlap another?) is checked where the file is known.
"""

from __future__ import annotations

import struct
import uuid
from itertools import pairwise

from imagekit.errors import CorruptImage, InvalidImage, UnsupportedFeature
from imagekit.formats.base import KiB, MiB, TiB
from imagekit.formats.crc32c import crc32c
from imagekit.records import dataclass

FILE_SIGNATURE = b"vhdxfile"
HEADER_SIGNATURE = b"head"
REGION_SIGNATURE = b"regi"

IDENTIFIER_SIZE = 8 + 512
HEADER_SIZE = 4 * KiB
REGION_TABLE_SIZE = 64 * KiB
HEADER_OFFSETS = (64 * KiB, 128 * KiB)
REGION_TABLE_OFFSETS = (192 * KiB, 256 * KiB)
HEADER_AREA = MiB
"""Identifier, headers and region tables lie below; everything else above."""

UNIT = MiB
"""Regions, the log and blocks begin at multiples of this and are as long as one."""

MAX_SIZE = 64 * TiB
MIN_BLOCK, MAX_BLOCK = 1 * MiB, 256 * MiB
SECTOR_SIZES = (512, 4096)
MAX_REGIONS = 2047
MAX_FILE = 128 * TiB
"""No VHDX needs more: the disk, a sector bitmap and two copies of the BAT fit twice. Keeps offsets in an int64."""

NO_GUID = bytes(16)
BAT_REGION = uuid.UUID("2DC27766-F623-4200-9D64-115E9BFD4A08").bytes_le
METADATA_REGION = uuid.UUID("8B7CA206-4790-4B9A-B8FE-575F050F886E").bytes_le
REGION_NAMES = {BAT_REGION: "BAT", METADATA_REGION: "metadata"}

_HEADER = struct.Struct("<4sIQ16s16s16sHHIQ")
_REGION_TABLE = struct.Struct("<4sIII")
_REGION_ENTRY = struct.Struct("<16sQII")
_REQUIRED = 1


def with_checksum(data: bytes) -> bytes:
    """The structure with the CRC-32C of all of it at 4..8, where zeros stand in for it."""
    blank = data[:4] + bytes(4) + data[8:]
    return data[:4] + crc32c(blank).to_bytes(4, "little") + data[8:]


def check_structure(data: bytes, signature: bytes, what: str, offset: int) -> None:
    """InvalidImage for another signature, CorruptImage for a wrong CRC-32C at 4..8."""
    if data[:4] != signature:
        raise InvalidImage(f"no VHDX {what}: signature {data[:4]!r}, expected {signature!r}", offset=offset)
    found, expected = data[4:8], with_checksum(data)[4:8]
    if found != expected:
        raise CorruptImage(
            f"the VHDX {what}'s checksum is {int.from_bytes(found, 'little'):#010x}, "
            f"expected {int.from_bytes(expected, 'little'):#010x}",
            offset=offset + 4,
        )


@dataclass(frozen=True, slots=True)
class FileIdentifier:
    """The first 520 bytes. ``creator`` is informative, at most 256 UTF-16 units."""

    creator: str

    @classmethod
    def parse(cls, data: bytes) -> FileIdentifier:
        if data[:8] != FILE_SIGNATURE:
            raise InvalidImage(f"no VHDX: signature {data[:8]!r}, expected {FILE_SIGNATURE!r}", offset=0)
        return cls(data[8:IDENTIFIER_SIZE].decode("utf-16-le", "replace").split("\0", 1)[0])

    def pack(self) -> bytes:
        return (FILE_SIGNATURE + self.creator.encode("utf-16-le")[:512]).ljust(IDENTIFIER_SIZE, b"\0")


@dataclass(frozen=True, slots=True)
class Header:
    """One of the two 4096-byte headers: which log counts, and what names the file's state."""

    sequence: int
    file_write_guid: bytes
    data_write_guid: bytes
    log_guid: bytes = NO_GUID
    log_offset: int = MiB
    log_length: int = MiB
    log_version: int = 0
    version: int = 1

    @classmethod
    def parse(cls, data: bytes, *, offset: int = 0) -> Header:
        """From 4096 bytes. InvalidImage when there is no header, CorruptImage when the checksum is wrong."""
        if len(data) < HEADER_SIZE:
            raise InvalidImage(f"no VHDX header: {len(data)} bytes are left, 4096 are needed", offset=offset)
        check_structure(data[:HEADER_SIZE], HEADER_SIGNATURE, "header", offset)
        fields = _HEADER.unpack_from(data)
        return cls(
            sequence=fields[2],
            file_write_guid=fields[3],
            data_write_guid=fields[4],
            log_guid=fields[5],
            log_version=fields[6],
            version=fields[7],
            log_length=fields[8],
            log_offset=fields[9],
        )

    def pack(self) -> bytes:
        data = _HEADER.pack(
            HEADER_SIGNATURE,
            0,
            self.sequence,
            self.file_write_guid,
            self.data_write_guid,
            self.log_guid,
            self.log_version,
            self.version,
            self.log_length,
            self.log_offset,
        )
        return with_checksum(data.ljust(HEADER_SIZE, b"\0"))

    @property
    def has_log(self) -> bool:
        """Whether the log may hold writes that the file has not got yet."""
        return self.log_guid != NO_GUID

    def validate(self, file_size: int, *, offset: int = 0) -> None:
        """Bound every number before it is used; UnsupportedFeature, InvalidImage or CorruptImage."""
        if self.version != 1:
            raise UnsupportedFeature(f"VHDX version {self.version}, 1 is known", offset=offset + 66)
        if self.has_log and self.log_version != 0:
            raise UnsupportedFeature(f"VHDX log version {self.log_version}, 0 is known", offset=offset + 64)
        if not self.has_log and self.log_length == 0:
            return
        if self.log_length == 0 or self.log_length % UNIT or self.log_offset % UNIT or self.log_offset < HEADER_AREA:
            raise InvalidImage(
                f"the log of {self.log_length} bytes at {self.log_offset:#x} is not whole MiB behind the first one",
                offset=offset + 68,
            )
        if self.log_offset + self.log_length > file_size:
            raise CorruptImage(
                f"the log at {self.log_offset:#x}..{self.log_offset + self.log_length:#x} ends behind the file's "
                f"end {file_size:#x}",
                hint="the file looks truncated; fetch it again and compare its checksum",
                offset=offset + 72,
            )


@dataclass(frozen=True, slots=True)
class Region:
    """An entry of the region table."""

    guid: bytes
    offset: int
    length: int
    required: bool = True

    @property
    def end(self) -> int:
        return self.offset + self.length

    @property
    def name(self) -> str:
        """For messages."""
        return REGION_NAMES.get(self.guid) or str(uuid.UUID(bytes_le=self.guid))


@dataclass(frozen=True, slots=True)
class RegionTable:
    """One of the two 64 KiB region tables."""

    regions: tuple[Region, ...]

    @classmethod
    def parse(cls, data: bytes, *, offset: int = 0) -> RegionTable:
        """From 65536 bytes. InvalidImage when there is no table, CorruptImage when the checksum is wrong."""
        if len(data) < REGION_TABLE_SIZE:
            raise InvalidImage(f"no VHDX region table: {len(data)} bytes are left, 65536 are needed", offset=offset)
        check_structure(data[:REGION_TABLE_SIZE], REGION_SIGNATURE, "region table", offset)
        count = _REGION_TABLE.unpack_from(data)[2]
        if count > MAX_REGIONS:
            raise InvalidImage(f"the region table has {count} entries, at most {MAX_REGIONS} fit", offset=offset + 8)
        end = _REGION_TABLE.size + count * _REGION_ENTRY.size
        return cls(
            tuple(
                Region(guid, where, length, bool(flags & _REQUIRED))
                for guid, where, length, flags in _REGION_ENTRY.iter_unpack(data[_REGION_TABLE.size : end])
            )
        )

    def pack(self) -> bytes:
        entries = b"".join(
            _REGION_ENTRY.pack(one.guid, one.offset, one.length, _REQUIRED * one.required) for one in self.regions
        )
        data = _REGION_TABLE.pack(REGION_SIGNATURE, 0, len(self.regions), 0) + entries
        return with_checksum(data.ljust(REGION_TABLE_SIZE, b"\0"))

    def find(self, guid: bytes) -> Region | None:
        """The region of that GUID."""
        return next((one for one in self.regions if one.guid == guid), None)

    def validate(self, header: Header, file_size: int, *, offset: int = 0) -> None:
        """Each region known or optional, whole MiB inside the file, and on no other's place nor on the log's."""
        taken = [(header.log_offset, header.log_offset + header.log_length, "the log")] if header.log_length else []
        for at, one in enumerate(self.regions):
            where = offset + _REGION_TABLE.size + at * _REGION_ENTRY.size
            if one.required and one.guid not in REGION_NAMES:
                raise UnsupportedFeature(
                    f"the image needs the region {one.name}, which imagekit does not know", offset=where
                )
            if one.offset % UNIT or one.offset < HEADER_AREA or one.length % UNIT or one.length == 0:
                raise InvalidImage(
                    f"the {one.name} region of {one.length} bytes at {one.offset:#x} is not whole MiB behind the "
                    "first one",
                    offset=where + 16,
                )
            if one.end > file_size:
                raise CorruptImage(
                    f"the {one.name} region at {one.offset:#x}..{one.end:#x} ends behind the file's end "
                    f"{file_size:#x}",
                    hint="the file looks truncated; fetch it again and compare its checksum",
                    offset=where + 16,
                )
            taken.append((one.offset, one.end, f"the {one.name} region"))
        if len({one.guid for one in self.regions}) != len(self.regions):
            raise InvalidImage("the region table names a region twice", offset=offset)
        taken.sort()
        for (_, end, first), (start, _, second) in pairwise(taken):
            if start < end:
                raise CorruptImage(f"{first} and {second} overlap at {start:#x}", offset=offset)
