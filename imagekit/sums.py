"""What a copy read, as checksums: so that reading the target back shows whether it holds the same.

CRC-32 and Adler-32 side by side, 64 bits for a part of at most a chunk: chance does not get past both, and somebody
who wants to has the source itself to change. By libdeflate both together cost a twentieth of a memory copy's time;
zlib has the same functions, slower.

Not here: what the kernel copied. Nobody read it, so there is nothing to know it by: it is compared.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable
from functools import cache
from typing import NamedTuple, TypeAlias

from imagekit.formats.base import Buffer

MAX_PARTS = 1 << 17
"""Parts that are remembered, about 30 MB; what is read after that is compared with the source."""

Checksum: TypeAlias = Callable[[Buffer, int], int]


class Part(NamedTuple):
    """Guest bytes as they were read from the source."""

    start: int
    length: int
    value: int


class Sum:
    """The sum of bytes that come in pieces."""

    def __init__(self) -> None:
        self._crc32, self._adler32 = functions()
        self._crc, self._adler = 0, 1

    def add(self, piece: Buffer) -> None:
        self._crc = self._crc32(piece, self._crc)
        self._adler = self._adler32(piece, self._adler)

    @property
    def value(self) -> int:
        return self._adler << 32 | self._crc


class Sums:
    """The parts noted by all threads of a copy."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._parts: list[Part] = []

    def note(self, start: int, length: int, value: int) -> None:
        with self._lock:
            if len(self._parts) < MAX_PARTS:
                self._parts.append(Part(start, length, value))

    def parts(self) -> list[Part]:
        """In the order of the disk."""
        return sorted(self._parts)


@cache
def functions() -> tuple[Checksum, Checksum]:
    """CRC-32 and Adler-32, by libdeflate where it is installed."""
    try:
        import deflate
    except ImportError:
        return zlib.crc32, zlib.adler32
    return deflate.crc32, deflate.adler32
