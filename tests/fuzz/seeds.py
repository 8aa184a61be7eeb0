"""Seeds, and the ways to damage them: the same cases on every machine.

A case is damage to a few bytes. Where a checksum covers them it is made right again, so that what reads behind the
checksum is reached, and what there are two copies of is changed in both.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache

from fixtures.hostile import corpus
from fixtures.vhd_images import with_checksum
from imagekit.formats.base import KiB, MiB
from imagekit.formats.crc32c import crc32c

VALUES = (0x00, 0x01, 0x7F, 0x80, 0xFF)
RANDOM = 300
"""Cases of every seed with bytes flipped, spliced in from another seed, or cut off."""

VHDX_HEADER, VHDX_REGIONS, VHDX_LOG, VHDX_METADATA = 64 * KiB, 192 * KiB, MiB, 2 * MiB


@dataclass(frozen=True, slots=True)
class Seed:
    """A sound image, and which of its bytes are structure."""

    name: str
    data: bytes
    places: tuple[int, ...]
    """Bytes that get each of VALUES in turn."""

    mend: Callable[[bytearray], None] = field(default=lambda data: None)
    """Makes checksums right, and copies equal."""

    @property
    def cases(self) -> int:
        return len(self.places) * len(VALUES) + RANDOM

    def swept(self, data: bytearray) -> Iterator[str]:
        """Every structural byte in turn set to every value, in ``data``, which is the seed's again afterwards."""
        for at in self.places:
            for value in VALUES:
                data[at] = value
                self.mend(data)
                yield f"{self.name}: {value:#x} at {at:#x}"
                data[:] = self.data

    def random(self) -> Iterator[tuple[str, bytes]]:
        """Flips (with and without right checksums), splices and cuts."""
        chance = random.Random(self.name)
        others = [seed.data for seed in seeds()]
        for number in range(RANDOM):
            data = bytearray(self.data)
            kind = ("flip", "mended", "structure", "splice", "cut")[number % 5]
            if kind == "cut":
                at = chance.choice((chance.randrange(len(data)), chance.randrange(1 + len(data) // 512) * 512))
                del data[at:]
            elif kind == "splice":
                other = chance.choice(others)
                start, at = chance.randrange(len(other)), chance.choice(self.places) & ~511
                piece = other[start : start + chance.choice((8, 64, 512, 4096))]
                data[at : at + len(piece)] = piece
            else:
                for _ in range(chance.choice((1, 2, 8, 64))):
                    at = chance.randrange(len(data)) if kind == "flip" else chance.choice(self.places)
                    data[at] = chance.choice((data[at] ^ 1 << chance.randrange(8), chance.randrange(256), *VALUES))
                if kind != "flip":
                    self.mend(data)
            yield f"{self.name}: {kind} {number}", bytes(data)


def _mend_vhd(data: bytearray) -> None:
    """Of a dynamic disk the copy at 0 is what was changed; of a fixed one the footer."""
    if data[512:520] == b"cxsparse" or data[:8] == b"conectix":
        data[512:1536] = with_checksum(bytes(data[512:1536]), 36)
        data[:512] = data[-512:] = with_checksum(bytes(data[:512]), 64)
    else:
        length = 512 if data[-512:-511] == b"c" else 511  # before 2004 it was a byte shorter
        data[-length:] = with_checksum(bytes(data[-length:]).ljust(512, b"\0"), 64)[:length]


def _with_crc(data: bytearray, at: int, length: int) -> None:
    data[at + 4 : at + 8] = bytes(4)
    data[at + 4 : at + 8] = struct.pack("<I", crc32c(data[at : at + length]))


def _mend_vhdx(data: bytearray) -> None:
    for at, length in ((VHDX_HEADER, 4 * KiB), (VHDX_REGIONS, 64 * KiB)):
        _with_crc(data, at, length)
        data[at + 64 * KiB : at + 64 * KiB + length] = data[at : at + length]
    if data[VHDX_LOG : VHDX_LOG + 4] == b"loge":
        _with_crc(data, VHDX_LOG, 4 * KiB)


def _vhdx_places(data: bytes) -> Iterator[int]:
    yield from range(8)
    yield from range(VHDX_HEADER, VHDX_HEADER + 80)
    yield from range(VHDX_REGIONS, VHDX_REGIONS + 16 + 2 * 32)
    yield from range(VHDX_METADATA, VHDX_METADATA + 32 + 5 * 32)
    yield from range(VHDX_METADATA + 64 * KiB, VHDX_METADATA + 64 * KiB + 40)
    yield from range(3 * MiB, 3 * MiB + 32)
    if data[VHDX_LOG : VHDX_LOG + 4] == b"loge":
        yield from range(VHDX_LOG, VHDX_LOG + 96)


def _qcow2_places(data: bytes) -> Iterator[int]:
    yield from range(200)
    l1, refcounts = struct.unpack_from(">QQ", data, 40)
    yield from range(refcounts, refcounts + 8)
    yield from range(l1, l1 + 16)
    l2 = struct.unpack_from(">Q", data, l1)[0] & 0xFFFFFFFFFFFE00
    yield from range(l2, l2 + 64)


def _vmdk_places(data: bytes) -> Iterator[int]:
    yield from range(1024)
    if data[-1024:-1020] == b"KDMV":
        yield from range(len(data) - 1024, len(data) - 1024 + 80)


@cache
def seeds() -> tuple[Seed, ...]:
    """From the corpus' sound images that are not packed."""
    found = []
    for name, entry in corpus().items():
        if entry.kind == "sound" or name == "x_log_waits":
            data = entry.made().bytes()
            if entry.suffix == ".vhd":
                places = range(1536) if data[:8] == b"conectix" else range(len(data) - 512, len(data))
                found.append(Seed(name, data, tuple(places), _mend_vhd))
            elif entry.suffix == ".vhdx":
                alike = bytearray(data)
                _mend_vhdx(alike)
                found.append(Seed(name, bytes(alike), tuple(_vhdx_places(data)), _mend_vhdx))
            elif entry.suffix == ".qcow2":
                found.append(Seed(name, data, tuple(_qcow2_places(data))))
            elif entry.suffix == ".vmdk":
                found.append(Seed(name, data, tuple(_vmdk_places(data))))
            elif entry.suffix == ".vdi":
                found.append(Seed(name, data, tuple(range(576))))
            elif entry.suffix in (".raw", ".img", ".iso"):
                found.append(Seed(name, data, tuple(range(16))))
    return tuple(found)
