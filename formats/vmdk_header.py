"""The headers of VMDK's sparse files, and where each says that its grains are.

Three layouts: hosted (``KDMV``; VMware's "Virtual Disk Format 5.0"), COWD (ESX, ``vmfsSparse``) and SESparse (ESX
6.5 and later). All are a directory of tables of grains; a :class:`GrainLayout` says what a reader must know of that,
whichever it is. All numbers are little-endian; offsets and lengths in the files are sectors of 512 bytes.

Everything is bounded here, before it is used: against the format's limits, and against the file's size.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import TypeAlias

from imagekit.errors import CorruptImage, InvalidImage, UnsupportedFeature
from imagekit.formats.base import SECTOR, GiB, MiB, Range
from imagekit.records import dataclass, replace

HOSTED_MAGIC = b"KDMV"
COWD_MAGIC = b"COWD"
SESPARSE_MAGIC = 0xCAFEBABE
SESPARSE_VOLATILE_MAGIC = 0xCAFECAFE
SESPARSE_VERSION = 0x0000000200000001

NEWLINE_TEST, REDUNDANT, ZERO_GRAINS = 1, 2, 4
COMPRESSED, MARKERS = 0x10000, 0x20000
MUST_KNOW = 0xFFFF0000
"""Flags in the upper half change what the data means; those in the lower half may be ignored."""

NEWLINES = b"\n \r\n"
"""Four bytes that a transfer as text would have changed."""

AT_END = 0xFFFFFFFFFFFFFFFF
"""Grain directory offset of a file that was written in one pass: the footer has the right one."""
DEFLATE = 1

MAX_SIZE = 1 << 62
"""Bytes. The formats have no limit of their own; this one keeps every sum inside 64 bits."""
MAX_TABLES = 1 << 25
"""Directory entries (QEMU's limit as well)."""
MAX_GRAIN = GiB
MAX_COMPRESSED_GRAIN = 8 * MiB
"""A compressed grain is decoded as a whole, in memory; writers use 64 KiB."""
COWD_TABLE = 4096
"""Entries of a grain table."""

_HOSTED = struct.Struct("<4sIIQQQQIQQQB4sH433s")
_COWD = struct.Struct("<4s7I")
_SESPARSE = struct.Struct("<26Q304s")
TRUNCATED = "the file looks truncated; fetch it again and compare its checksum"


@dataclass(frozen=True, slots=True)
class GrainLayout:
    """Where the grains of a sparse file are; sizes and offsets in bytes."""

    virtual_size: int
    grain: int
    per_table: int
    """Entries of a grain table."""

    directory: int
    backup: int | None = None
    """The redundant grain directory."""

    width: int = 4
    """Bytes of an entry, of tables and directories alike; 8 is SESparse."""

    tables_at: int = 0
    grains_at: int = 0
    """SESparse counts tables and grains from here."""

    overhead: int = 0
    """Metadata that comes before all grains."""

    zero_grains: bool = False
    compressed: bool = False
    fixed: tuple[Range, ...] = ()
    """What no table and no grain may lie on."""

    @property
    def grains(self) -> int:
        return -(-self.virtual_size // self.grain)

    @property
    def tables(self) -> int:
        return -(-self.grains // self.per_table)

    @property
    def table_bytes(self) -> int:
        return self.per_table * self.width

    def validate(self, name: str, size: int | None) -> None:
        """Bound every number; InvalidImage or CorruptImage. ``size`` is the file's, None while nobody knows it."""
        largest = MAX_COMPRESSED_GRAIN if self.compressed else MAX_GRAIN
        if self.grain & (self.grain - 1) or not SECTOR <= self.grain <= largest:
            raise InvalidImage(
                f"grains of {self.grain // SECTOR} sectors, expected a power of two up to {largest // SECTOR}",
                path=name,
            )
        if not 0 < self.virtual_size <= MAX_SIZE:
            raise InvalidImage(
                f"a capacity of {self.virtual_size // SECTOR} sectors, expected 1 to {MAX_SIZE // SECTOR}",
                path=name,
            )
        if self.tables > MAX_TABLES:
            raise InvalidImage(f"the capacity needs {self.tables} grain tables, at most {MAX_TABLES}", path=name)
        if size is not None and self.overhead > size:
            raise CorruptImage(
                f"the data should begin at {self.overhead:#x}, but the file ends at {size:#x}",
                hint=TRUNCATED,
                path=name,
                offset=64,
            )
        for one in self.fixed:
            if size is not None and one.offset + one.length > size:
                raise CorruptImage(
                    f"the {one.kind} at {one.offset:#x} ends at {one.offset + one.length:#x}, behind the file's end "
                    f"{size:#x}",
                    hint=TRUNCATED,
                    path=name,
                )
        for one, other in pairwise(sorted(self.fixed, key=lambda one: one.offset)):
            if one.offset + one.length > other.offset:
                raise InvalidImage(f"the {one.kind} and the {other.kind} overlap at {other.offset:#x}", path=name)


@dataclass(frozen=True, slots=True)
class HostedHeader:
    """The 512 bytes at the start of a hosted sparse file, or in its footer."""

    capacity: int
    """Sectors, as are all sizes and offsets here."""

    version: int = 1
    flags: int = NEWLINE_TEST | REDUNDANT
    grain_size: int = 128
    descriptor_offset: int = 0
    descriptor_size: int = 0
    table_entries: int = 512
    redundant_offset: int = 0
    directory_offset: int = 0
    overhead: int = 0
    unclean: int = 0
    newlines: bytes = NEWLINES
    compression: int = 0
    padding: bytes = bytes(433)

    @classmethod
    def parse(cls, data: bytes, *, offset: int = 0) -> HostedHeader:
        """From 512 bytes; what cannot be a header of a version known is an error."""
        if len(data) < SECTOR or data[:4] != HOSTED_MAGIC:
            raise InvalidImage(
                f"no VMDK header: {len(data)} bytes that start with {data[:4]!r}, expected 512 and {HOSTED_MAGIC!r}",
                offset=offset,
            )
        fields = _HOSTED.unpack(data[:SECTOR])
        header = cls(
            version=fields[1],
            flags=fields[2],
            capacity=fields[3],
            grain_size=fields[4],
            descriptor_offset=fields[5],
            descriptor_size=fields[6],
            table_entries=fields[7],
            redundant_offset=fields[8],
            directory_offset=fields[9],
            overhead=fields[10],
            unclean=fields[11],
            newlines=fields[12],
            compression=fields[13],
            padding=fields[14],
        )
        header._check(offset)
        return header

    def _check(self, offset: int) -> None:
        if not 1 <= self.version <= 3:
            raise UnsupportedFeature(
                f"VMDK version {self.version}; imagekit reads 1 to 3",
                offset=offset + 4,
                hint="convert it with VMware",
            )
        if self.flags & NEWLINE_TEST and self.newlines != NEWLINES:
            raise CorruptImage(
                f"the newline test reads {self.newlines!r}, expected {NEWLINES!r}: the file was transferred as text",
                hint="transfer it again, in binary mode",
                offset=offset + 73,
            )
        if self.compression not in (0, DEFLATE):
            raise UnsupportedFeature(f"unknown VMDK compression {self.compression}", offset=offset + 77)
        if bool(self.flags & COMPRESSED) != (self.compression == DEFLATE):
            raise InvalidImage(
                f"flags {self.flags:#x} and compression {self.compression} contradict each other", offset=offset + 8
            )
        if self.compressed and not self.flags & MARKERS:
            raise UnsupportedFeature("compressed grains without markers", offset=offset + 8)
        if not 1 <= self.table_entries <= 512:
            raise InvalidImage(f"{self.table_entries} entries in a grain table, expected 512", offset=offset + 44)

    def pack(self) -> bytes:
        return _HOSTED.pack(
            HOSTED_MAGIC,
            self.version,
            self.flags,
            self.capacity,
            self.grain_size,
            self.descriptor_offset,
            self.descriptor_size,
            self.table_entries,
            self.redundant_offset,
            self.directory_offset,
            self.overhead,
            self.unclean,
            self.newlines,
            self.compression,
            self.padding,
        )

    @property
    def compressed(self) -> bool:
        return bool(self.flags & COMPRESSED)

    @property
    def unknown_flags(self) -> int:
        """Flags that must be understood, and are not."""
        return self.flags & MUST_KNOW & ~(COMPRESSED | MARKERS)

    @property
    def content_fields(self) -> tuple[object, ...]:
        """What decides the content; header and footer must agree on it."""
        return (
            self.version,
            self.flags,
            self.capacity,
            self.grain_size,
            self.descriptor_offset,
            self.descriptor_size,
            self.table_entries,
            self.compression,
        )

    def layout(self) -> GrainLayout:
        """Where the grains are; not bounded yet."""
        layout = GrainLayout(
            virtual_size=self.capacity * SECTOR,
            grain=self.grain_size * SECTOR,
            per_table=self.table_entries,
            directory=self.directory_offset * SECTOR,
            backup=self.redundant_offset * SECTOR if self.flags & REDUNDANT and self.redundant_offset else None,
            overhead=self.overhead * SECTOR,
            zero_grains=bool(self.flags & ZERO_GRAINS),
            compressed=self.compressed,
        )
        length = layout.tables * 4 if layout.grain else 0
        fixed = [Range(0, SECTOR, "header"), Range(layout.directory, length, "grain directory")]
        if self.descriptor_offset and self.descriptor_size:
            fixed.append(Range(self.descriptor_offset * SECTOR, self.descriptor_size * SECTOR, "descriptor"))
        if layout.backup is not None:
            fixed.append(Range(layout.backup, length, "redundant grain directory"))
        return replace(layout, fixed=tuple(fixed))


@dataclass(frozen=True, slots=True)
class CowdHeader:
    """The start of a COWD file; the parent's name and other texts behind it are not used."""

    capacity: int
    grain_size: int = 1
    directory_offset: int = 4
    directory_entries: int = 0
    version: int = 1
    flags: int = 3
    file_sectors: int = 0

    @classmethod
    def parse(cls, data: bytes) -> CowdHeader:
        """From at least 32 bytes."""
        if len(data) < _COWD.size or data[:4] != COWD_MAGIC:
            raise InvalidImage(f"no COWD header: {len(data)} bytes that start with {data[:4]!r}", offset=0)
        _, version, flags, capacity, grain, offset, entries, sectors = _COWD.unpack(data[: _COWD.size])
        if version != 1:
            raise UnsupportedFeature(f"COWD version {version}; imagekit reads 1", offset=4)
        return cls(capacity, grain, offset, entries, version, flags, sectors)

    def layout(self) -> GrainLayout:
        """Where the grains are; the directory must have an entry for each table the capacity needs."""
        directory = Range(self.directory_offset * SECTOR, self.directory_entries * 4, "grain directory")
        layout = GrainLayout(
            virtual_size=self.capacity * SECTOR,
            grain=self.grain_size * SECTOR,
            per_table=COWD_TABLE,
            directory=directory.offset,
            fixed=(Range(0, SECTOR, "header"), directory),
        )
        if layout.grain and layout.tables > self.directory_entries:
            raise InvalidImage(
                f"the grain directory has {self.directory_entries} entries, the capacity needs {layout.tables}",
                offset=24,
            )
        return layout


@dataclass(frozen=True, slots=True)
class SeSparseHeader:
    """The constant header of an SESparse file; sectors throughout."""

    capacity: int
    volatile_offset: int
    directory_offset: int
    directory_size: int
    tables_offset: int
    tables_size: int
    grains_offset: int
    grains_size: int
    grain_size: int = 8
    table_size: int = 64

    @classmethod
    def parse(cls, data: bytes) -> SeSparseHeader:
        """From 512 bytes. Nothing documents the format: what is not as it always was is refused."""
        if len(data) < SECTOR or int.from_bytes(data[:8], "little") != SESPARSE_MAGIC:
            raise InvalidImage(f"no SESparse header: {len(data)} bytes that start with {data[:8]!r}", offset=0)
        *words, padding = _SESPARSE.unpack(data[:SECTOR])
        for name, at, expected in (
            ("version", 1, SESPARSE_VERSION),
            ("grain size", 3, 8),
            ("grain table size", 4, 64),
            ("flags", 5, 0),
            *(("reserved field", at, 0) for at in range(6, 10)),
        ):
            if words[at] != expected:
                raise UnsupportedFeature(
                    f"SESparse {name} {words[at]:#x}, imagekit reads {expected:#x} only", offset=at * 8
                )
        if any(padding):
            raise UnsupportedFeature(
                "something behind the fields of the SESparse header", offset=_SESPARSE.size - 304
            )
        return cls(words[2], words[10], words[16], words[17], words[18], words[19], words[24], words[25])

    def check_volatile(self, data: bytes) -> None:
        """UnsupportedFeature when the journal has something that the tables lack."""
        where = self.volatile_offset * SECTOR
        if len(data) < SECTOR or int.from_bytes(data[:8], "little") != SESPARSE_VOLATILE_MAGIC:
            raise CorruptImage("the SESparse volatile header is damaged or missing", offset=where, hint=TRUNCATED)
        if int.from_bytes(data[24:32], "little"):
            raise UnsupportedFeature(
                "the SESparse journal holds writes that are not in the tables yet",
                offset=where + 24,
                hint="start and stop the machine on ESX once, or consolidate the disk there",
            )

    def layout(self) -> GrainLayout:
        """Where the grains are; not bounded yet."""
        directory = Range(self.directory_offset * SECTOR, self.directory_size * SECTOR, "grain directory")
        layout = GrainLayout(
            virtual_size=self.capacity * SECTOR,
            grain=self.grain_size * SECTOR,
            per_table=self.table_size * SECTOR // 8,
            directory=directory.offset,
            width=8,
            tables_at=self.tables_offset * SECTOR,
            grains_at=self.grains_offset * SECTOR,
            zero_grains=True,
            fixed=(
                Range(0, SECTOR, "header"),
                Range(self.volatile_offset * SECTOR, SECTOR, "volatile header"),
                directory,
            ),
        )
        if layout.tables * 8 > directory.length:
            raise InvalidImage(
                f"the grain directory has {directory.length // 8} entries, the capacity needs {layout.tables}",
                offset=136,
            )
        for name, start in (("grain tables", self.tables_offset), ("grains", self.grains_offset)):
            if not 0 < start * SECTOR <= MAX_SIZE:
                raise InvalidImage(f"the {name} start at sector {start:#x}, which no file has", offset=144)
        return layout


SparseHeader: TypeAlias = HostedHeader | CowdHeader | SeSparseHeader
