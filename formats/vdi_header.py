"""The header of a VDI: 64 bytes of text, signature and version, then VirtualBox' header 1.1 (VDICore.h)."""

from __future__ import annotations

import struct
import uuid

from imagekit.errors import CorruptImage, InvalidImage, UnsupportedFeature
from imagekit.formats.base import SECTOR, KiB, MiB, round_up
from imagekit.records import dataclass

SIGNATURE = 0xBEDA107F
SIGNATURE_OFFSET = 64
VERSION = 0x00010001
DYNAMIC, STATIC, UNDO, DIFFERENCING = 1, 2, 3, 4
SUBFORMATS = {DYNAMIC: "dynamic", STATIC: "static", UNDO: "undo", DIFFERENCING: "differencing"}

HEADER_OFFSET = 72
MIN_HEADER = 384
"""Bytes of the header from `HEADER_OFFSET` on without the last geometry, as QEMU writes it; VirtualBox' has 400."""

HEAD_BYTES = HEADER_OFFSET + MIN_HEADER
MIN_BLOCK, MAX_BLOCK = 4 * KiB, 256 * MiB
"""VirtualBox and QEMU write 1 MiB."""

MAX_BLOCKS = 0x3FFFFFFF
"""QEMU's limit as well."""

NULL_ID = bytes(16)

_HEADER = struct.Struct("<64sIIIII256sIIIIIIIQIIII16s16s16s16s")


@dataclass(frozen=True, slots=True)
class VdiHeader:
    """The first 456 bytes. Sizes and offsets in bytes."""

    disk_size: int
    blocks: int
    map_offset: int
    data_offset: int
    image_type: int = DYNAMIC
    block_size: int = MiB
    blocks_allocated: int = 0
    block_extra: int = 0
    sector_size: int = SECTOR
    header_size: int = 400
    version: int = VERSION
    flags: int = 0
    text: bytes = b"<<< Oracle VM VirtualBox Disk Image >>>\n"
    comment: bytes = b""
    geometry: tuple[int, int, int] = (0, 0, 0)
    dummy: int = 0
    create_id: bytes = NULL_ID
    modify_id: bytes = NULL_ID
    link_id: bytes = NULL_ID
    parent_modify_id: bytes = NULL_ID

    @classmethod
    def parse(cls, data: bytes) -> VdiHeader:
        """From at least 456 bytes."""
        signature = int.from_bytes(data[SIGNATURE_OFFSET : SIGNATURE_OFFSET + 4], "little")
        if len(data) < HEAD_BYTES or signature != SIGNATURE:
            raise InvalidImage(
                f"no VDI header: {len(data)} bytes with the signature {signature:#010x}, expected {HEAD_BYTES} and "
                f"{SIGNATURE:#010x}",
                offset=SIGNATURE_OFFSET,
            )
        fields = _HEADER.unpack(data[:HEAD_BYTES])
        return cls(
            text=fields[0].rstrip(b"\0"),
            version=fields[2],
            header_size=fields[3],
            image_type=fields[4],
            flags=fields[5],
            comment=fields[6].rstrip(b"\0"),
            map_offset=fields[7],
            data_offset=fields[8],
            geometry=(fields[9], fields[10], fields[11]),
            sector_size=fields[12],
            dummy=fields[13],
            disk_size=fields[14],
            block_size=fields[15],
            block_extra=fields[16],
            blocks=fields[17],
            blocks_allocated=fields[18],
            create_id=fields[19],
            modify_id=fields[20],
            link_id=fields[21],
            parent_modify_id=fields[22],
        )

    def pack(self) -> bytes:
        return _HEADER.pack(
            self.text,
            SIGNATURE,
            self.version,
            self.header_size,
            self.image_type,
            self.flags,
            self.comment,
            self.map_offset,
            self.data_offset,
            *self.geometry,
            self.sector_size,
            self.dummy,
            self.disk_size,
            self.block_size,
            self.block_extra,
            self.blocks,
            self.blocks_allocated,
            self.create_id,
            self.modify_id,
            self.link_id,
            self.parent_modify_id,
        )

    @property
    def virtual_size(self) -> int:
        """Bytes the guest sees: whole sectors, though VBoxManage makes disks of any length from raw files."""
        return round_up(self.disk_size, SECTOR)

    @property
    def blocks_needed(self) -> int:
        """Blocks the guest can reach."""
        return -(-self.virtual_size // self.block_size)

    @property
    def parent(self) -> str | None:
        """The parent's id as text, empty where the type demands a parent that is not named; None without one."""
        for one in (self.link_id, self.parent_modify_id):
            if one != NULL_ID:
                return str(uuid.UUID(bytes_le=one))
        return "" if self.image_type in (UNDO, DIFFERENCING) else None

    def validate(self, file_size: int) -> None:
        """Bound every number before it is used; InvalidImage, CorruptImage or UnsupportedFeature."""
        if self.version != VERSION:
            raise UnsupportedFeature(
                f"VDI version {self.version >> 16}.{self.version & 0xFFFF}; imagekit reads 1.1", offset=68
            )
        if self.image_type not in SUBFORMATS:
            raise UnsupportedFeature(f"VDI type {self.image_type}; 1 (dynamic) to 4 (differencing) exist", offset=76)
        if self.block_extra:
            raise UnsupportedFeature(f"{self.block_extra} bytes before the data of each block", offset=380)
        if self.sector_size != SECTOR:
            raise InvalidImage(f"sectors of {self.sector_size} bytes, expected 512", offset=360)
        if self.block_size & (self.block_size - 1) or not MIN_BLOCK <= self.block_size <= MAX_BLOCK:
            raise InvalidImage(
                f"block size {self.block_size}, expected a power of two from 4 KiB to 256 MiB", offset=376
            )
        if self.blocks > MAX_BLOCKS:
            raise InvalidImage(f"{self.blocks} blocks, at most {MAX_BLOCKS}", offset=384)
        if not 0 < self.disk_size <= self.blocks * self.block_size:
            raise InvalidImage(
                f"a disk of {self.disk_size} bytes, and {self.blocks} blocks of {self.block_size}", offset=368
            )
        self._check_places(file_size)

    def _check_places(self, file_size: int) -> None:
        if self.header_size < MIN_HEADER or HEADER_OFFSET + self.header_size > self.map_offset:
            raise InvalidImage(
                f"a header of {self.header_size} bytes, expected at least {MIN_HEADER} and an end before the block "
                f"map at {self.map_offset:#x}",
                offset=72,
            )
        map_end = self.map_offset + self.blocks * 4
        if self.map_offset % SECTOR or self.data_offset % SECTOR or map_end > self.data_offset:
            raise InvalidImage(
                f"the block map lies at {self.map_offset:#x}..{map_end:#x} and the data at {self.data_offset:#x}: "
                "not on sectors, or on each other",
                offset=340,
            )
        if map_end > file_size:
            raise CorruptImage(
                f"the block map of {self.blocks} entries ends at {map_end:#x}, behind the file's end {file_size:#x}",
                hint="the file looks truncated; fetch it again and compare its checksum",
                offset=384,
            )
