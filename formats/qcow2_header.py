"""The qcow2 header and its extensions, as they lie in the first cluster (QEMU's docs/interop/qcow2.txt, "Header")."""

from __future__ import annotations

import struct

from imagekit.errors import CorruptImage, InvalidImage, UnsupportedFeature
from imagekit.formats.base import MiB
from imagekit.records import dataclass

MAGIC = b"QFI\xfb"
V2_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")  # bytes 0..71, the whole header of version 2
V3_HEADER = struct.Struct(">QQQII")  # bytes 72..103
MIN_CLUSTER, MAX_CLUSTER = 512, 2 * MiB
MAX_L1_BYTES = 32 * MiB  # QEMU's own limit (QCOW_MAX_L1_SIZE)
MAX_REFCOUNT_BYTES = 8 * MiB  # QEMU's own limit (QCOW_MAX_REFTABLE_SIZE)
MAX_BACKING_NAME = 1023
MAX_EXTENSIONS = 64

DIRTY, CORRUPT, DATA_FILE, COMPRESSION_TYPE, EXTENDED_L2 = (1 << bit for bit in range(5))
BITMAPS_VALID, RAW_EXTERNAL = 1, 2  # autoclear
KNOWN_AUTOCLEAR = BITMAPS_VALID | RAW_EXTERNAL
INCOMPATIBLE_AT, AUTOCLEAR_AT = 72, 88
KNOWN_INCOMPATIBLE = DIRTY | CORRUPT | DATA_FILE | COMPRESSION_TYPE | EXTENDED_L2

EXT_END = 0
EXT_BACKING_FORMAT = 0xE2792ACA
EXT_DATA_FILE = 0x44415441
EXT_BITMAPS = 0x23852875
EXT_CRYPTO_HEADER = 0x0537BE77
EXT_FEATURE_NAMES = 0x6803F857

_INCOMPATIBLE_NAMES = ("dirty bit", "corrupt bit", "external data file", "compression type", "extended L2 entries")
_FEATURE_NAME = struct.Struct(">BB46s")


@dataclass(frozen=True, slots=True)
class Qcow2Header:
    """The fixed header; ``pack`` writes the form of its version."""

    version: int
    backing_offset: int
    backing_length: int
    cluster_bits: int
    size: int
    crypt_method: int
    l1_size: int
    l1_offset: int
    refcount_offset: int
    refcount_clusters: int
    snapshot_count: int
    snapshots_offset: int
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    header_length: int = V2_HEADER.size
    compression_type: int = 0

    @classmethod
    def parse(cls, data: bytes) -> Qcow2Header:
        """From the first bytes of the file (at least 105 where it has them)."""
        if len(data) < V2_HEADER.size or data[:4] != MAGIC:
            raise InvalidImage(f"no qcow2 header: {len(data)} bytes, starting {data[:4]!r}", offset=0)
        fields: tuple[int, ...] = V2_HEADER.unpack_from(data)[1:]
        if fields[0] == 2:
            return cls(*fields)
        if len(data) < V2_HEADER.size + V3_HEADER.size:
            raise InvalidImage(f"the version 3 header is cut short at {len(data)} bytes", offset=0)
        more: tuple[int, ...] = V3_HEADER.unpack_from(data, V2_HEADER.size)
        kind = data[104] if more[-1] > 104 and len(data) > 104 else 0
        return cls(*(*fields, *more, kind))

    def pack(self) -> bytes:
        fixed = V2_HEADER.pack(
            MAGIC,
            self.version,
            self.backing_offset,
            self.backing_length,
            self.cluster_bits,
            self.size,
            self.crypt_method,
            self.l1_size,
            self.l1_offset,
            self.refcount_offset,
            self.refcount_clusters,
            self.snapshot_count,
            self.snapshots_offset,
        )
        if self.version == 2:
            return fixed
        more = V3_HEADER.pack(
            self.incompatible, self.compatible, self.autoclear, self.refcount_order, self.header_length
        )
        return (fixed + more + bytes([self.compression_type])).ljust(self.header_length, b"\0")[: self.header_length]

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def extended_l2(self) -> bool:
        return bool(self.incompatible & EXTENDED_L2)

    @property
    def external_data(self) -> bool:
        """Whether the guest's data lies in another file, each cluster at the guest's own offset."""
        return bool(self.incompatible & DATA_FILE)

    @property
    def bitmaps_valid(self) -> bool:
        """Whether every program that wrote the image kept its bitmaps in step."""
        return bool(self.autoclear & BITMAPS_VALID)

    @property
    def l2_entry_size(self) -> int:
        return 16 if self.extended_l2 else 8

    @property
    def l2_entries(self) -> int:
        return self.cluster_size // self.l2_entry_size

    def validate(self, file_size: int) -> None:
        """Bound every number before it is used; InvalidImage or UnsupportedFeature."""
        if self.version not in (2, 3):
            raise UnsupportedFeature(
                f"qcow version {self.version} (2 and 3 are read)",
                hint="-f qcow --allow external-qemu-img has qemu-img read it" if self.version == 1 else None,
                offset=4,
            )
        if not 9 <= self.cluster_bits <= 21:
            raise InvalidImage(f"cluster_bits {self.cluster_bits}, expected 9..21", offset=20)
        if self.extended_l2 and self.cluster_bits < 14:
            raise InvalidImage(f"extended L2 entries with cluster_bits {self.cluster_bits} < 14", offset=20)
        if self.version == 3:
            if self.header_length < 104 or self.header_length % 8 or self.header_length > self.cluster_size:
                raise InvalidImage(f"header length {self.header_length}", offset=100)
            if bool(self.incompatible & COMPRESSION_TYPE) != (self.compression_type != 0):
                raise InvalidImage(f"compression type {self.compression_type} against its feature bit", offset=104)
            if self.refcount_order > 6:
                raise InvalidImage(f"refcount order {self.refcount_order}, expected 0..6", offset=96)
        self.validate_disk(file_size)

    def validate_disk(self, file_size: int) -> None:
        """Bound what is said of the disk itself: its size and its L1 table."""
        if self.size >= 1 << 63:
            raise InvalidImage(f"virtual size {self.size} is not below 2^63", offset=24)
        needed = -(-self.size // (self.cluster_size * self.l2_entries))
        if self.l1_size < needed:
            raise InvalidImage(f"the L1 table has {self.l1_size} entries, the virtual size needs {needed}", offset=36)
        if self.l1_size * 8 > MAX_L1_BYTES:
            raise InvalidImage(f"the L1 table has {self.l1_size} entries, more than 32 MiB", offset=36)
        if self.l1_size and (self.l1_offset % self.cluster_size or self.l1_offset == 0):
            raise InvalidImage(f"the L1 table lies at {self.l1_offset:#x}, not on a cluster", offset=40)
        if self.l1_offset + self.l1_size * 8 > file_size:
            raise CorruptImage(
                f"the L1 table ends at {self.l1_offset + self.l1_size * 8:#x}, behind the file's end {file_size:#x}",
                hint="the file looks truncated; fetch it again and compare its checksum",
                offset=40,
            )


@dataclass(frozen=True, slots=True)
class Extensions:
    """The header extensions that matter to a reader."""

    backing_format: str | None = None
    data_file: str | None = None
    bitmaps: int = 0
    bitmap_directory: tuple[int, int] | None = None
    """Offset and length in the file, as is ``crypto_header``."""
    crypto_header: tuple[int, int] | None = None

    @classmethod
    def parse(cls, data: bytes, start: int) -> Extensions:
        """``data`` is the header cluster as far as extensions may lie in it, ``start`` where they begin."""
        backing_format = data_file = bitmap_directory = crypto_header = None
        bitmaps = 0
        at, count = start, 0
        while at + 8 <= len(data):
            kind, length = struct.unpack_from(">II", data, at)
            if kind == EXT_END:
                break
            count += 1
            if count > MAX_EXTENSIONS:
                raise InvalidImage(f"more than {MAX_EXTENSIONS} header extensions", offset=at)
            body = data[at + 8 : at + 8 + length]
            if len(body) != length:
                raise InvalidImage(f"header extension {kind:#010x} of {length} bytes leaves its cluster", offset=at)
            if kind == EXT_BACKING_FORMAT:
                backing_format = body.decode("utf-8", "replace")
            elif kind == EXT_DATA_FILE:
                data_file = body.decode("utf-8", "replace")
            elif kind == EXT_BITMAPS and length >= 24:
                bitmaps, _, size, offset = struct.unpack_from(">IIQQ", body)
                bitmap_directory = offset, size
            elif kind == EXT_CRYPTO_HEADER and length >= 16:
                crypto_header = struct.unpack_from(">QQ", body)
            at += 8 + length + -length % 8
        return cls(backing_format, data_file, bitmaps, bitmap_directory, crypto_header)


def feature_names(incompatible: int) -> bytes:
    """The header extension that names those incompatible features, as QEMU calls them."""
    names = b"".join(
        _FEATURE_NAME.pack(0, bit, name.encode())
        for bit, name in enumerate(_INCOMPATIBLE_NAMES)
        if incompatible & 1 << bit
    )
    return struct.pack(">II", EXT_FEATURE_NAMES, len(names)) + names
