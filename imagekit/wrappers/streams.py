"""Unpacking gzip, xz, bzip2 and zstd files, and raw deflate, piece by piece.

Follows RFC 1952 (gzip), RFC 8878 (zstd), "The .xz File Format" 1.2 and what libbz2 reads. All four may hold several
streams one after the other (parallel packers write them so), which together are the file. Every check the formats
have is done by the libraries: CRCs, sizes, xz' index.

Design notes
- Memory is what the format needs (xz, zstd: bounded), a piece of input and a piece of output.
- Behind the last stream only zeros may follow, as tapes and sector-wise copies leave them. A file with anything else
  there is two things at once.
- A stream costs time by itself, however short: streams that yield next to nothing are limited in number.

Not here: .lzma and LZMA in zip (no checks), lz4, compress (.Z), zstd dictionaries.
"""

from __future__ import annotations

import bz2
import lzma
import sys
import zlib
from collections.abc import Iterator
from typing import Any, Protocol

from imagekit.errors import CorruptImage, ImagekitError
from imagekit.formats.base import File, KiB
from imagekit.wrappers.parts import PIECE, Part, WrapperLimits, cut_short, first_data, over_limit

FIRST_READ = 4 * KiB
"""A stream's first read: what is read too much is read again for the next stream, and streams can be tiny."""
MOST_READ = 128 * KiB
FREE_STREAMS = 1000
LEAST_YIELD = 1 * KiB
"""Bytes a stream yields on average, beyond the first FREE_STREAMS of a file."""

GZIP_MAGIC = b"\x1f\x8b\x08"
XZ_MAGIC = b"\xfd7zXZ\0"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
BZIP2_BLOCKS = (b"1AY&SY", b"\x17rE8P\x90")
"""What follows "BZh" and a digit: the first block, or the end of an empty stream."""
MAX_SKIPPABLE = 4
"""Skippable zstd frames looked past at the start of a file; parallel packers write one."""


def detect_stream(file: File) -> str | None:
    """Which of the four the file starts as."""
    head = file.pread(0, 12)
    if head.startswith(ZSTD_MAGIC) or (_is_skippable(head) and _zstd_behind_skippable(file)):
        return "zstd"
    return next((kind for kind in ("gzip", "xz", "bzip2") if _starts(kind, head)), None)


def _starts(kind: str, head: bytes) -> bool:
    if kind == "gzip":
        return head.startswith(GZIP_MAGIC)
    if kind == "xz":
        return head.startswith(XZ_MAGIC)
    if kind == "bzip2":
        # A file cut inside the magic is a bzip2 file all the same.
        return (
            head.startswith(b"BZh")
            and head[3:4].isdigit()
            and head[3] != ord("0")
            and any(block.startswith(head[4:10]) for block in BZIP2_BLOCKS)
        )
    return head.startswith(ZSTD_MAGIC) or _is_skippable(head)


def _is_skippable(head: bytes) -> bool:
    return len(head) >= 8 and 0x50 <= head[0] <= 0x5F and head[1:4] == b"\x2a\x4d\x18"


def _zstd_behind_skippable(file: File) -> bool:
    # lz4 has the same skippable frames: what comes behind them tells.
    at = 0
    for _ in range(MAX_SKIPPABLE):
        head = file.pread(at, 8)
        if not _is_skippable(head):
            break
        at += 8 + int.from_bytes(head[4:8], "little")
    return file.pread(at, 4) == ZSTD_MAGIC


class _Decoder(Protocol):
    """What bz2, lzma and zstd objects have in common."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Inflate:
    """zlib with the manners of the others: it keeps the input it did not get to."""

    def __init__(self, wbits: int) -> None:
        self._zlib = zlib.decompressobj(wbits)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        out = self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)
        # Output that fills the room may have more behind it, even with all input taken.
        self.needs_input = not self._zlib.unconsumed_tail and len(out) < max_length
        return out


def _new_decoder(kind: str, limits: WrapperLimits) -> _Decoder:
    if kind == "deflate":
        return _Inflate(-15)
    if kind == "gzip":
        return _Inflate(31)
    if kind == "bzip2":
        return bz2.BZ2Decompressor()
    if kind == "xz":
        return lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=limits.memory)
    zstd = _zstd_module()
    window = min(max(limits.memory.bit_length() - 2, 10), 31)
    made: _Decoder = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: window})
    return made


def _zstd_module() -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd as module
    else:
        from backports import zstd as module
    return module


class Input:
    """The packed bytes from ``at`` to ``end`` of a file, or to its own end; ``at`` moves on as they are decoded."""

    def __init__(self, file: File, start: int = 0, end: int | None = None) -> None:
        self.file = file
        self.at = start
        self.end = end

    def read(self, length: int) -> bytes:
        data = self.file.pread(self.at, length if self.end is None else min(length, self.end - self.at))
        self.at += len(data)
        return data


def one_stream(source: Input, kind: str, limits: WrapperLimits) -> Iterator[bytes]:
    """The pieces of one stream; ``source.at`` stands right behind it at the end."""
    decoder, step, start = _new_decoder(kind, limits), FIRST_READ, source.at
    while not decoder.eof:
        data = b""
        if decoder.needs_input:
            data = source.read(step)
            step = min(step * 2, MOST_READ)
            if not data:
                raise cut_short(f"the {kind} stream from {start:#x}", source.file, source.at)
        try:
            piece = decoder.decompress(data, PIECE)
        except Exception as error:  # zlib.error, OSError, EOFError, LZMAError, ZstdError: one a library
            raise _damaged(error, source, kind, limits) from None
        if piece:
            yield piece
    source.at -= len(decoder.unused_data)


def _damaged(error: Exception, source: Input, kind: str, limits: WrapperLimits) -> ImagekitError:
    text = str(error)
    if "emory" in text and kind in ("xz", "zstd"):  # liblzma's memory limit, libzstd's window limit
        return over_limit(
            f"the {kind} stream needs more memory to unpack than {limits.memory >> 20} MiB allow",
            path=source.file.name,
            hint=f"unpack it by hand: {kind} -d",
        )
    return CorruptImage(
        f"the {kind} stream is damaged: {text or type(error).__name__}",
        hint="fetch the file again and compare its checksum",
        path=source.file.name,
        offset=source.at,
    )


def all_streams(source: Input, kind: str, limits: WrapperLimits) -> Iterator[Part]:
    """The parts that the streams of a whole file yield together."""
    done = count = 0
    while True:
        for piece in one_stream(source, kind, limits):
            yield done, piece
            done += len(piece)
        count += 1
        if not _another(source, kind):
            return
        if count > FREE_STREAMS and done < count * LEAST_YIELD:
            raise over_limit(
                f"{count} {kind} streams that hold {done} bytes together",
                path=source.file.name,
                hint="no packer writes such a file; unpack it by hand",
                offset=source.at,
            )


def _another(source: Input, kind: str) -> bool:
    """Whether a further stream follows. CorruptImage for anything else but zeros."""
    file, end = source.file, source.at
    at = first_data(file, end)
    if at is None:
        source.at = file.size
        return False
    padded = kind == "xz" and (at - end) % 4 == 0  # "Stream Padding" of the xz format
    if (at == end or padded) and _starts(kind, file.pread(at, 12)):
        source.at = at
        return True
    raise CorruptImage(
        f"the {kind} stream ends at {end:#x}, but {file.size - at} bytes that are none follow",
        hint="fetch the file again; if it is meant to be so, cut it there",
        path=file.name,
        offset=at,
    )
