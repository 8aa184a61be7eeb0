"""GUID partition tables: read from a disk, and moved to the end of a larger one.

Follows the UEFI specification 2.10, chapter 5 ("GUID Partition Table (GPT) Disk Layout"): a protective MBR, a header
and its entries at the start, and both again at the end, where the header is in the very last sector.

A disk that grows leaves its second copy in the middle. Firmware and kernels boot from the first, but tools complain,
and some refuse; here the changes are worked out that put it where it belongs. Sectors have 512 or 4096 bytes.

Not here: partitions that grow, repair of a table whose first copy is damaged (gdisk does that), MBR partitions.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Iterator

from imagekit.contents.patched import Patch
from imagekit.errors import UnsupportedFeature
from imagekit.formats.base import SECTOR, DiskImage, Fact, MiB, round_up
from imagekit.records import dataclass, replace

SIGNATURE = b"EFI PART"
REVISION = 0x00010000
SECTOR_SIZES = (512, 4096)
HEADER_SIZE = 92
ENTRY_SIZE = 128
MAX_ENTRY_SIZE = 4096
MAX_ENTRIES_LENGTH = 4 * MiB
"""Of all entries together; 128 entries, the usual, have 16 KiB."""

MBR_PARTITIONS = 446
MBR_SIGNATURE = (510, b"\x55\xaa")
PROTECTIVE = 0xEE
WHOLE_DISK = 0xFFFFFFFF
UNUSED = uuid.UUID(int=0)
SYSTEM_PARTITION = uuid.UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
"""The type of the partition that firmware boots from."""

_HEADER = struct.Struct("<8sIIII QQQQ 16s QIII")
_ENTRY = struct.Struct("<16s16sQQQ72s")


@dataclass(frozen=True, slots=True)
class Header:
    """One copy of the header. LBAs count sectors."""

    my_lba: int
    alternate_lba: int
    first_usable_lba: int
    last_usable_lba: int
    disk_guid: uuid.UUID
    entries_lba: int
    entry_count: int
    entry_size: int
    entries_crc: int
    rest: bytes = b""
    """What a header longer than this revision's holds behind it."""

    @property
    def entries_length(self) -> int:
        """Of the entries, in bytes."""
        return self.entry_count * self.entry_size

    def entries_sectors(self, sector_size: int) -> int:
        return -(-self.entries_length // sector_size)

    def pack(self) -> bytes:
        """The header's bytes, with its checksum."""
        fields = (
            *(self.my_lba, self.alternate_lba, self.first_usable_lba, self.last_usable_lba),
            self.disk_guid.bytes_le,
            *(self.entries_lba, self.entry_count, self.entry_size, self.entries_crc),
        )
        size = HEADER_SIZE + len(self.rest)
        crc = zlib.crc32(_HEADER.pack(SIGNATURE, REVISION, size, 0, 0, *fields) + self.rest)
        return _HEADER.pack(SIGNATURE, REVISION, size, crc, 0, *fields) + self.rest


@dataclass(frozen=True, slots=True)
class Partition:
    """An entry in use. LBAs count sectors, and ``last_lba`` belongs to it."""

    number: int
    type: uuid.UUID
    unique: uuid.UUID
    first_lba: int
    last_lba: int
    attributes: int
    name: str


@dataclass(frozen=True, slots=True)
class Gpt:
    """What of a GPT is on a disk. A copy that is damaged is None, and ``problems`` say what is wrong with it."""

    sector_size: int
    mbr: bytes
    primary: Header | None
    backup: Header | None
    partitions: tuple[Partition, ...]
    problems: tuple[Fact, ...]
    entries: bytes = b""
    """The table of partitions as it is stored, of the copy that counts."""

    @property
    def header(self) -> Header | None:
        """The copy that counts: the first, while it is sound."""
        return self.primary or self.backup


class _Bad(Exception):
    """Why a copy does not count."""


# --- reading ---------------------------------------------------------------------------------------------------


def find(image: DiskImage) -> Gpt | None:
    """The disk's GPT, sound or not; None when there is nothing of one.

    Errors are those of reading the image.
    """
    mbr = image.pread(0, SECTOR)
    sizes = sorted(SECTOR_SIZES, key=lambda size: size != image.sector_size)
    for size in sizes:
        if image.pread(size, len(SIGNATURE)) == SIGNATURE:
            return _read(image, mbr, size)
    if not is_protective(mbr):
        return None
    # The first copy is gone; the second shows the size of a sector.
    for size in sizes:
        last = image.virtual_size // size - 1
        if last > 1 and image.pread(last * size, len(SIGNATURE)) == SIGNATURE:
            return _read(image, mbr, size)
    return _read(image, mbr, sizes[0])


def is_protective(mbr: bytes) -> bool:
    """Whether the MBR says that the disk has a GPT."""
    return _protective_entry(mbr) is not None


def _protective_entry(mbr: bytes) -> int | None:
    """Where in the MBR the entry of type EE is."""
    at, signature = MBR_SIGNATURE
    if mbr[at : at + 2] != signature:
        return None
    places = range(MBR_PARTITIONS, MBR_PARTITIONS + 64, 16)
    return next((place for place in places if mbr[place + 4] == PROTECTIVE), None)


def _read(image: DiskImage, mbr: bytes, sector_size: int) -> Gpt:
    problems: list[Fact] = []
    last = image.virtual_size // sector_size - 1
    primary, entries = _copy(image, 1, sector_size, "primary", problems)
    backup_lba = primary.alternate_lba if primary is not None else last
    backup, backup_entries = None, b""
    if backup_lba > last:
        problems.append(
            Fact(
                "gpt-disk-cut",
                f"the GPT is of a disk of {backup_lba + 1} sectors, this one has {last + 1}: its end is missing",
                sector_size,
            )
        )
    elif backup_lba > 1:
        backup, backup_entries = _copy(image, backup_lba, sector_size, "backup", problems)
    if primary is not None and backup is not None and not _agree(primary, backup):
        problems.append(Fact("gpt-copies-differ", "the two copies of the GPT differ", backup_lba * sector_size))
    counts = primary or backup
    entries = entries if primary is not None else backup_entries
    partitions = () if counts is None else tuple(_partitions(counts, entries))
    return Gpt(sector_size, mbr, primary, backup, partitions, tuple(problems), entries)


def _copy(
    image: DiskImage, lba: int, sector_size: int, what: str, problems: list[Fact]
) -> tuple[Header | None, bytes]:
    """The copy whose header is at ``lba``, with its entries; what is wrong with it goes to ``problems``."""
    try:
        header = _header(image.pread(lba * sector_size, sector_size), lba, image.virtual_size // sector_size)
        entries = image.pread(header.entries_lba * sector_size, header.entries_length)
        if zlib.crc32(entries) != header.entries_crc:
            raise _Bad("its entries' checksum is wrong")
    except _Bad as error:
        problems.append(Fact(f"gpt-{what}-damaged", f"the {what} GPT does not count: {error}", lba * sector_size))
        return None, b""
    return header, entries


def _header(sector: bytes, lba: int, sectors: int) -> Header:
    """A header that is what it says, in a disk of that many sectors."""
    if sector[: len(SIGNATURE)] != SIGNATURE or len(sector) < HEADER_SIZE:
        raise _Bad("there is no header")
    _, revision, size, crc, _, *fields = _HEADER.unpack_from(sector)
    if revision != REVISION or not HEADER_SIZE <= size <= len(sector):
        raise _Bad(f"revision {revision:#x} with a header of {size} bytes, expected {REVISION:#x} with 92")
    found = zlib.crc32(sector[:16] + bytes(4) + sector[20:size])
    if found != crc:
        raise _Bad(f"its checksum is {crc:#010x}, expected {found:#010x}")
    mine, alternate, first, last, guid, entries_lba, count, entry_size, entries_crc = fields
    header = Header(
        *(mine, alternate, first, last, uuid.UUID(bytes_le=guid), entries_lba, count, entry_size, entries_crc),
        rest=sector[HEADER_SIZE:size],
    )
    if mine != lba:
        raise _Bad(f"it says that it is at sector {mine}")
    if not ENTRY_SIZE <= entry_size <= MAX_ENTRY_SIZE or entry_size & (entry_size - 1):
        raise _Bad(f"entries of {entry_size} bytes")
    if not 0 < header.entries_length <= MAX_ENTRIES_LENGTH:
        raise _Bad(f"{count} entries")
    used = header.entries_sectors(len(sector))
    end = entries_lba + used
    if entries_lba < 2 or end > sectors or not (end <= first or entries_lba > last) or entries_lba <= lba < end:
        raise _Bad(f"its entries at sectors {entries_lba}..{end} lie where they cannot")
    if first > last + 1 or first <= 1 or (lba == 1 and last >= alternate):
        raise _Bad(f"usable are the sectors {first}..{last}")
    return header


def _agree(primary: Header, backup: Header) -> bool:
    """Whether two copies describe the same partitions on the same disk."""
    return replace(
        backup,
        my_lba=primary.my_lba,
        alternate_lba=primary.alternate_lba,
        entries_lba=primary.entries_lba,
        rest=primary.rest,
    ) == primary and (backup.alternate_lba == primary.my_lba)


def _partitions(header: Header, entries: bytes) -> Iterator[Partition]:
    for number in range(header.entry_count):
        fields = _ENTRY.unpack_from(entries, number * header.entry_size)
        kind, unique = uuid.UUID(bytes_le=fields[0]), uuid.UUID(bytes_le=fields[1])
        if kind == UNUSED:
            continue
        name = fields[5].decode("utf-16-le", "replace").split("\0", 1)[0]
        yield Partition(number + 1, kind, unique, fields[2], fields[3], fields[4], name)


def backup_is_last(gpt: Gpt, virtual_size: int) -> bool:
    """Whether the second copy of the header is where it belongs on a disk of that many bytes: in its last sector."""
    last = virtual_size // gpt.sector_size - 1
    if gpt.primary is not None:
        return gpt.primary.alternate_lba == last
    return gpt.backup is not None and gpt.backup.my_lba == last


# --- moving ----------------------------------------------------------------------------------------------------


def moved_backup(image: DiskImage, new_size: int) -> tuple[Patch, ...]:
    """The changes that put the second copy at the end of a disk of ``new_size`` bytes, at least the image's size.

    Empty when there is no GPT, or nothing to change. The table that counts is the first copy; the partitions stay as
    they are. UnsupportedFeature when that copy is damaged, or a partition or the table is in the way.
    """
    gpt = find(image)
    if gpt is None:
        return ()
    if gpt.primary is None:
        raise UnsupportedFeature(
            f"the GPT cannot be moved to the end: {gpt.problems[0].message}",
            hint="repair it where the disk comes from: gdisk, command r",
            offset=gpt.problems[0].offset,
        )
    if new_size < image.virtual_size or new_size % gpt.sector_size:
        raise UnsupportedFeature(
            f"a disk of {image.virtual_size} bytes with sectors of {gpt.sector_size} cannot have {new_size} bytes",
            hint="give a larger size, a multiple of the sector",
        )
    if gpt.backup is not None and backup_is_last(gpt, new_size):
        return ()
    primary, backup = _moved_headers(gpt, gpt.primary, new_size)
    size = gpt.sector_size
    return (
        *_protective_patch(gpt.mbr, new_size // size),
        Patch(size, _whole_sector(primary, size)),
        *_old_header_patch(gpt, backup),
        Patch(backup.entries_lba * size, gpt.entries.ljust(round_up(len(gpt.entries), size), b"\0")),
        Patch(backup.my_lba * size, _whole_sector(backup, size)),
    )


def _moved_headers(gpt: Gpt, header: Header, new_size: int) -> tuple[Header, Header]:
    """Both headers as they are to be, once it is clear that nothing is in their way."""
    last = new_size // gpt.sector_size - 1
    entries_lba = last - header.entries_sectors(gpt.sector_size)
    first_lba = header.entries_lba + header.entries_sectors(gpt.sector_size)
    in_the_way = [f"partition {one.number}" for one in gpt.partitions if one.last_lba >= entries_lba]
    if entries_lba < first_lba or first_lba > header.first_usable_lba or entries_lba < header.first_usable_lba:
        in_the_way.append("its first copy")
    if in_the_way:
        raise UnsupportedFeature(
            f"the GPT's second copy needs the sectors {entries_lba}..{last}, and {in_the_way[0]} is in the way",
            hint=f"make the disk {last + 1 - entries_lba} sectors larger than its last partition needs",
        )
    primary = replace(header, alternate_lba=last, last_usable_lba=entries_lba - 1)
    return primary, replace(primary, my_lba=last, alternate_lba=1, entries_lba=entries_lba)


def _whole_sector(header: Header, sector_size: int) -> bytes:
    return header.pack().ljust(sector_size, b"\0")


def _protective_patch(mbr: bytes, sectors: int) -> Iterator[Patch]:
    """The MBR's entry for the whole disk, with the new size; left alone where it shares the disk with others."""
    place = _protective_entry(mbr)
    if place is None or any(mbr[at + 4] for at in range(MBR_PARTITIONS, MBR_PARTITIONS + 64, 16) if at != place):
        return
    first, length = struct.unpack_from("<II", mbr, place + 8)
    wanted = min(sectors - 1, WHOLE_DISK)
    if first == 1 and length != wanted:
        yield Patch(0, mbr[: place + 12] + struct.pack("<I", wanted) + mbr[place + 16 :])


def _old_header_patch(gpt: Gpt, backup: Header) -> Iterator[Patch]:
    """Zeros over the header that was the second copy: a program that searches must not find it."""
    old = gpt.backup
    if old is None or old.my_lba >= backup.entries_lba:
        return
    if not any(one.first_lba <= old.my_lba <= one.last_lba for one in gpt.partitions):
        yield Patch(old.my_lba * gpt.sector_size, bytes(gpt.sector_size))
