"""The partitions of a disk, in a GPT or a master boot record, as far as whoever looks into them needs to know.

Nothing on the disk is an error here: a table that makes no sense has no partitions. Logical partitions, which lie in
an extended one, are not looked for.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Iterator

from imagekit.contents import gpt
from imagekit.formats.base import SECTOR, DiskImage
from imagekit.records import dataclass

_ENTRY_SIZE = 16
_EXTENDED = (0x00, 0x05, 0x0F, 0x85, gpt.PROTECTIVE)
"""Types that hold no file system: none, three for extended partitions, a GPT."""


@dataclass(frozen=True, slots=True)
class Partition:
    """Bytes of a disk, and what they are for: a GUID in a GPT, a byte in a master boot record."""

    number: int
    start: int
    length: int
    type: uuid.UUID | int


def partitions(image: DiskImage) -> Iterator[Partition]:
    """The partitions that lie on the disk, in the order of its table. Raises only what reading the image raises."""
    boot = image.pread(0, SECTOR)
    if not gpt.is_protective(boot):  # a GPT without that is of an earlier life
        yield from _in_boot_record(boot, image.sector_size)
        return
    table = gpt.find(image)
    if table is None:
        return
    for one in table.partitions:
        length = (one.last_lba - one.first_lba + 1) * table.sector_size
        yield Partition(one.number, one.first_lba * table.sector_size, length, one.type)


def _in_boot_record(boot: bytes, sector_size: int) -> Iterator[Partition]:
    at, signature = gpt.MBR_SIGNATURE
    if boot[at:] != signature:
        return
    for number in range(1, 5):
        entry = gpt.MBR_PARTITIONS + (number - 1) * _ENTRY_SIZE
        kind = boot[entry + 4]
        if kind not in _EXTENDED:
            first, count = struct.unpack_from("<II", boot, entry + 8)
            yield Partition(number, first * sector_size, count * sector_size, kind)
