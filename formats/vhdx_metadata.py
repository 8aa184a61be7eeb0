"""The metadata of a VHDX: the metadata table, its items, the parent locator, and the arithmetic of the BAT.

Follows Microsoft's MS-VHDX, 2.6 "Metadata Region" and 2.5 "BAT". The metadata region begins with a table of 64 KiB
that names items by GUID; each item lies somewhere behind it in the region. An item that is required and not known
makes the image unreadable; one that is not required is skipped.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Callable
from itertools import pairwise

from imagekit.errors import CorruptImage, InvalidImage, UnsupportedFeature
from imagekit.formats.base import KiB, MiB, round_up
from imagekit.formats.vhdx_header import MAX_BLOCK, MAX_SIZE, MIN_BLOCK, NO_GUID, SECTOR_SIZES, UNIT
from imagekit.records import dataclass

METADATA_SIGNATURE = b"metadata"
TABLE_SIZE = 64 * KiB
MAX_ITEMS = 2047
MAX_ITEM = MiB

FILE_PARAMETERS = uuid.UUID("CAA16737-FA36-4D43-B3B6-33F0AA44E76B").bytes_le
VIRTUAL_DISK_SIZE = uuid.UUID("2FA54224-CD1B-4876-B211-5DBED83BF4B8").bytes_le
LOGICAL_SECTOR_SIZE = uuid.UUID("8141BF1D-A96F-4709-BA47-F233A8FAAB5F").bytes_le
PHYSICAL_SECTOR_SIZE = uuid.UUID("CDA348C7-445D-4471-9CC9-E9885251C556").bytes_le
PAGE_83_DATA = uuid.UUID("BECA12AB-B2E6-4523-93EF-C309E000C746").bytes_le
PARENT_LOCATOR = uuid.UUID("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C").bytes_le
GEOMETRY = uuid.UUID("DA02D7BC-3D3A-423C-AC88-2A36AB21479B").bytes_le
"""Cylinders and heads of old guests: known, so never a reason to refuse; not used."""

INCOMPLETE = uuid.UUID("71CC85F0-1B69-4E28-9558-C3BF83AE75D3").bytes_le
"""The program that made the file did not finish."""

ITEM_NAMES = {
    FILE_PARAMETERS: "file parameters",
    VIRTUAL_DISK_SIZE: "virtual disk size",
    LOGICAL_SECTOR_SIZE: "logical sector size",
    PHYSICAL_SECTOR_SIZE: "physical sector size",
    PAGE_83_DATA: "page 83 data",
    PARENT_LOCATOR: "parent locator",
    GEOMETRY: "geometry",
    INCOMPLETE: "incomplete",
}
ITEM_LENGTHS = {
    FILE_PARAMETERS: 8,
    VIRTUAL_DISK_SIZE: 8,
    LOGICAL_SECTOR_SIZE: 4,
    PHYSICAL_SECTOR_SIZE: 4,
    PAGE_83_DATA: 16,
}
"""The items every VHDX has, and their exact lengths in bytes."""

IS_USER, IS_VIRTUAL_DISK, IS_REQUIRED = 1, 2, 4
LEAVE_ALLOCATED, HAS_PARENT = 1, 2

LOCATOR_TYPE = uuid.UUID("B04AEFB7-D19E-4A81-B789-25B8E9445913").bytes_le
LINKAGE, LINKAGE2 = "parent_linkage", "parent_linkage2"
RELATIVE_PATH, VOLUME_PATH, ABSOLUTE_PATH = "relative_path", "volume_path", "absolute_win32_path"
PATHS = (RELATIVE_PATH, VOLUME_PATH, ABSOLUTE_PATH)
"""In the order in which a parent is looked for."""

# States of a payload block, the lowest three bits of a BAT entry.
NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED, OLD_UNMAPPED, FULLY_PRESENT, PARTIALLY_PRESENT = 0, 1, 2, 3, 5, 6, 7
BITMAP_PRESENT = 6
STATE_BITS = 0x7
RESERVED_BITS = 0xFFFF8
OFFSET_BITS = 0xFFFFFFFFFFF00000
ENTRY_SIZE = 8
BITMAP_SIZE = MiB
"""Bytes of a sector bitmap block: one bit for each logical sector of a chunk, the lowest bit first."""

_TABLE = struct.Struct("<8sHHIQQ")
_ITEM = struct.Struct("<16sIIII")
_LOCATOR = struct.Struct("<16sHH")
_PAIR = struct.Struct("<IIHH")


# --- the table ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Item:
    """An entry of the metadata table; ``offset`` counts from the start of the metadata region."""

    guid: bytes
    offset: int
    length: int
    flags: int = IS_REQUIRED

    @property
    def known(self) -> bool:
        return self.guid in ITEM_NAMES and not self.flags & IS_USER

    @property
    def name(self) -> str:
        """For messages."""
        return ITEM_NAMES[self.guid] if self.known else str(uuid.UUID(bytes_le=self.guid))


@dataclass(frozen=True, slots=True)
class MetadataTable:
    """The first 64 KiB of the metadata region."""

    items: tuple[Item, ...]

    @classmethod
    def parse(cls, data: bytes, *, offset: int = 0) -> MetadataTable:
        """From 65536 bytes; InvalidImage for what no table says."""
        if len(data) < TABLE_SIZE or data[:8] != METADATA_SIGNATURE:
            raise InvalidImage(
                f"no VHDX metadata table: signature {data[:8]!r}, expected {METADATA_SIGNATURE!r}", offset=offset
            )
        count = _TABLE.unpack_from(data)[2]
        if count > MAX_ITEMS:
            raise InvalidImage(f"the metadata table has {count} entries, at most {MAX_ITEMS} fit", offset=offset + 10)
        entries = data[_TABLE.size : _TABLE.size + count * _ITEM.size]
        return cls(tuple(Item(*fields[:4]) for fields in _ITEM.iter_unpack(entries)))

    def pack(self) -> bytes:
        items = b"".join(_ITEM.pack(one.guid, one.offset, one.length, one.flags, 0) for one in self.items)
        return (_TABLE.pack(METADATA_SIGNATURE, 0, len(self.items), 0, 0, 0) + items).ljust(TABLE_SIZE, b"\0")

    def find(self, guid: bytes) -> Item | None:
        """The known item of that GUID."""
        return next((one for one in self.items if one.guid == guid and one.known), None)

    def validate(self, region_length: int, *, offset: int = 0) -> None:
        """Each item known or optional, inside the region, and on no other's place."""
        taken: list[tuple[int, int, str]] = []
        for at, one in enumerate(self.items):
            where = offset + _TABLE.size + at * _ITEM.size
            if not one.known and one.flags & IS_REQUIRED:
                raise UnsupportedFeature(
                    f"the image needs the metadata item {one.name}, which imagekit does not know", offset=where
                )
            if one.known and one.guid == INCOMPLETE:
                raise CorruptImage(
                    "the program that made the image did not finish", hint="make it again", offset=where
                )
            if one.length == 0 and one.offset == 0:
                continue
            if one.length > MAX_ITEM or one.offset < TABLE_SIZE or one.offset + one.length > region_length:
                raise CorruptImage(
                    f"the metadata item {one.name} of {one.length} bytes at {one.offset:#x} does not lie in its "
                    f"region of {region_length:#x} bytes",
                    offset=where + 16,
                )
            taken.append((one.offset, one.offset + one.length, one.name))
        if len({(one.guid, one.flags & IS_USER) for one in self.items}) != len(self.items):
            raise InvalidImage("the metadata table names an item twice", offset=offset)
        taken.sort()
        for (_, end, first), (start, _, second) in pairwise(taken):
            if start < end:
                raise CorruptImage(f"the metadata items {first} and {second} overlap", offset=offset + start)


# --- the items ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FileParameters:
    """The item of that name, 8 bytes."""

    block_size: int
    leave_allocated: bool = False
    """A fixed disk: blocks stay where they are."""

    has_parent: bool = False

    @classmethod
    def parse(cls, data: bytes) -> FileParameters:
        block_size, flags = struct.unpack("<II", data)
        return cls(block_size, bool(flags & LEAVE_ALLOCATED), bool(flags & HAS_PARENT))

    def pack(self) -> bytes:
        return struct.pack(
            "<II", self.block_size, LEAVE_ALLOCATED * self.leave_allocated | HAS_PARENT * self.has_parent
        )


@dataclass(frozen=True, slots=True)
class ParentLocator:
    """The item of that name: keys and values."""

    pairs: tuple[tuple[str, str], ...]

    @classmethod
    def parse(cls, data: bytes, *, offset: int = 0) -> ParentLocator:
        """From the whole item. CorruptImage or UnsupportedFeature."""
        if len(data) < _LOCATOR.size:
            raise CorruptImage(f"the parent locator has {len(data)} bytes, 20 are needed", offset=offset)
        kind, _, count = _LOCATOR.unpack_from(data)
        if kind != LOCATOR_TYPE:
            raise UnsupportedFeature(
                f"the parent locator has the type {uuid.UUID(bytes_le=kind)}, which imagekit does not know",
                offset=offset,
            )
        end = _LOCATOR.size + count * _PAIR.size
        if end > len(data):
            raise CorruptImage(f"the parent locator has {count} entries, which do not fit in it", offset=offset + 18)
        places = list(_PAIR.iter_unpack(data[_LOCATOR.size : end]))
        if sum(key_length + value_length for _, _, key_length, value_length in places) > len(data) - end:
            # Each text may lie in the item, and all of them together be a thousand times as long.
            raise CorruptImage("the parent locator has texts that overlap, or lie behind its end", offset=offset)
        pairs = []
        for key, value, key_length, value_length in places:
            pairs.append((_text(data, key, key_length, offset), _text(data, value, value_length, offset)))
        if len({key for key, _ in pairs}) != len(pairs):
            raise CorruptImage("the parent locator has a key twice", offset=offset)
        return cls(tuple(pairs))

    def pack(self) -> bytes:
        texts = [text.encode("utf-16-le") for pair in self.pairs for text in pair]
        at = _LOCATOR.size + len(self.pairs) * _PAIR.size
        out = [_LOCATOR.pack(LOCATOR_TYPE, 0, len(self.pairs))]
        for key, value in zip(texts[0::2], texts[1::2], strict=True):
            out.append(_PAIR.pack(at, at + len(key), len(key), len(value)))
            at += len(key) + len(value)
        return b"".join(out + texts)

    def get(self, key: str) -> str | None:
        return dict(self.pairs).get(key)

    @property
    def paths(self) -> tuple[str, ...]:
        """The parent's names, in the order to try them."""
        return tuple(path for key in PATHS if (path := self.get(key)))

    @property
    def linkages(self) -> tuple[bytes, ...]:
        """The DataWriteGuids that the parent may have. CorruptImage when the locator names none."""
        first, second = self.get(LINKAGE), self.get(LINKAGE2)
        if first is None:
            raise CorruptImage(f"the parent locator has no {LINKAGE}: any file would pass for the parent")
        # Windows 10 writes a second one that is all zero: no alternative.
        more = () if second is None or _guid(second) == NO_GUID else (_guid(second),)
        return (_guid(first), *more)


def _text(data: bytes, start: int, length: int, offset: int) -> str:
    if start + length > len(data):
        raise CorruptImage(f"the parent locator has text at {start:#x}, behind its end {len(data):#x}", offset=offset)
    try:
        text = data[start : start + length].decode("utf-16-le").rstrip("\0")
    except UnicodeDecodeError as error:
        raise CorruptImage("the parent locator has text that is not UTF-16", offset=offset + start) from error
    if "\0" in text:
        raise CorruptImage("the parent locator has text with an end in its middle", offset=offset + start)
    return text


def _guid(text: str) -> bytes:
    try:
        return uuid.UUID(text).bytes_le
    except ValueError:
        raise CorruptImage(f"the parent locator's linkage is {text!r}, no GUID in braces") from None


@dataclass(frozen=True, slots=True)
class Metadata:
    """What the items say."""

    parameters: FileParameters
    virtual_size: int
    logical_sector: int
    physical_sector: int
    page83: bytes
    locator: ParentLocator | None = None

    @classmethod
    def from_items(cls, read: Callable[[bytes], bytes | None]) -> Metadata:
        """From a function that gives an item's bytes by its GUID, None where there is none. Bounds every number."""
        items: dict[bytes, bytes] = {}
        for guid, length in ITEM_LENGTHS.items():
            data = read(guid)
            if data is None:
                raise CorruptImage(f"the image has no metadata item {ITEM_NAMES[guid]}")
            if len(data) != length:
                raise CorruptImage(f"the metadata item {ITEM_NAMES[guid]} has {len(data)} bytes, not {length}")
            items[guid] = data
        locator = read(PARENT_LOCATOR)
        metadata = cls(
            FileParameters.parse(items[FILE_PARAMETERS]),
            int.from_bytes(items[VIRTUAL_DISK_SIZE], "little"),
            int.from_bytes(items[LOGICAL_SECTOR_SIZE], "little"),
            int.from_bytes(items[PHYSICAL_SECTOR_SIZE], "little"),
            items[PAGE_83_DATA],
            None if locator is None else ParentLocator.parse(locator),
        )
        metadata.validate()
        return metadata

    def validate(self) -> None:
        """InvalidImage for numbers that no VHDX has."""
        block = self.parameters.block_size
        if block & (block - 1) or not MIN_BLOCK <= block <= MAX_BLOCK:
            raise InvalidImage(f"block size {block}, expected a power of two from 1 MiB to 256 MiB")
        for what, size in (("logical", self.logical_sector), ("physical", self.physical_sector)):
            if size not in SECTOR_SIZES:
                raise InvalidImage(f"{what} sector size {size}, expected 512 or 4096")
        if not 0 < self.virtual_size <= MAX_SIZE or self.virtual_size % self.logical_sector:
            raise InvalidImage(
                f"virtual size {self.virtual_size}, expected a multiple of {self.logical_sector} up to 64 TiB"
            )

    @property
    def geometry(self) -> Geometry:
        return Geometry(
            self.virtual_size, self.parameters.block_size, self.logical_sector, self.parameters.has_parent
        )


# --- the BAT -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where the BAT has what: after ``chunk_ratio`` payload blocks comes their sector bitmap."""

    virtual_size: int
    block_size: int
    sector_size: int = 512
    differencing: bool = False

    @property
    def chunk_ratio(self) -> int:
        """Payload blocks of a chunk: as many as the 2**23 sectors of one bitmap cover."""
        return (1 << 23) * self.sector_size // self.block_size

    @property
    def blocks(self) -> int:
        """Payload blocks of the disk."""
        return -(-self.virtual_size // self.block_size)

    @property
    def chunks(self) -> int:
        return -(-self.blocks // self.chunk_ratio)

    @property
    def entries(self) -> int:
        """BAT entries that the disk needs; a differencing disk ends in a bitmap, the others in a block."""
        if self.differencing:
            return self.chunks * (self.chunk_ratio + 1)
        return self.blocks + (self.blocks - 1) // self.chunk_ratio

    @property
    def bat_length(self) -> int:
        """Bytes of the BAT region."""
        return round_up(self.entries * ENTRY_SIZE, UNIT)

    def payload_index(self, block: int) -> int:
        """Which BAT entry is the block's."""
        return block + block // self.chunk_ratio

    def bitmap_index(self, chunk: int) -> int:
        """Which BAT entry is that of the chunk's sector bitmap."""
        return chunk * (self.chunk_ratio + 1) + self.chunk_ratio

    def bitmap_slots(self, start: int, stop: int) -> slice:
        """Which of the BAT entries from ``start`` up to ``stop`` are sector bitmaps', counted from ``start``."""
        step = self.chunk_ratio + 1
        return slice((self.chunk_ratio - start) % step, max(stop - start, 0), step)
