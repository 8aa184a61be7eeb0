"""The names of the files in an initramfs: cpio archives one after the other, packed or not.

Follows the Linux kernel's "initramfs buffer format": any number of "newc" archives (magic 070701 or 070702), each of
them plain or packed, with zeros between. Read for its names alone; file contents are passed over. What is packed in a
way that nothing here unpacks (lz4, lzo) is InitramfsError, as is damage: who asks then knows that nothing is known.
"""

from __future__ import annotations

import bz2
import lzma
import sys
import zlib
from collections.abc import Iterator
from typing import Any

from imagekit.formats.base import GiB, KiB, MiB

MAX_UNPACKED = 1 * GiB
MAX_FILES = 200_000
_PIECE = 1 * MiB
_HEADER = 110
_MAX_NAME = 4 * KiB
_TRAILER = "TRAILER!!!"
_CPIO = (b"070701", b"070702")
_OTHERS = {b"\x02\x21\x4c\x18": "lz4", b"\x04\x22\x4d\x18": "lz4", b"\x89LZO": "lzo"}


class InitramfsError(Exception):
    """The names cannot be read; the text says why."""


def names(data: bytes) -> Iterator[str]:
    """The path of every file. Raises InitramfsError."""
    at, files = 0, 0
    while True:
        while at < len(data) and data[at] == 0:
            at += 1
        if at >= len(data):
            return
        if data[at : at + 6] in _CPIO:
            source = _Plain(data, at)
            for name in _archive(source):
                files += 1
                _check_number(files)
                yield name
            at = source.at
            continue
        unpacked = _Packed(_decoder(data[at : at + 8]), data, at)
        while unpacked.peek():
            for name in _archive(unpacked):
                files += 1
                _check_number(files)
                yield name
            unpacked.skip_zeros()
        at = len(data)  # the kernel takes what is packed as the last


def _check_number(files: int) -> None:
    if files > MAX_FILES:
        raise InitramfsError(f"more than {MAX_FILES} files")


class _Plain:
    def __init__(self, data: bytes, at: int) -> None:
        self._data, self.at = data, at

    def take(self, length: int) -> bytes:
        piece = self._data[self.at : self.at + length]
        if len(piece) < length:
            raise InitramfsError("it ends in the middle of a file")
        self.at += length
        return piece

    def skip(self, length: int) -> None:
        if self.at + length > len(self._data):
            raise InitramfsError("it ends in the middle of a file")
        self.at += length


class _Packed:
    """What a decoder yields, piece by piece and bounded."""

    def __init__(self, decoder: Any, data: bytes, at: int) -> None:
        self._decoder, self._data, self._at = decoder, data, at
        self._ready = b""
        self._total = 0

    def peek(self) -> bool:
        return bool(self._ready) or self._more()

    def skip_zeros(self) -> None:
        while self.peek():
            self._ready = self._ready.lstrip(b"\0")
            if self._ready:
                return

    def take(self, length: int) -> bytes:
        while len(self._ready) < length:
            if not self._more():
                raise InitramfsError("it ends in the middle of a file")
        piece, self._ready = self._ready[:length], self._ready[length:]
        return piece

    def skip(self, length: int) -> None:
        while length:
            if not self._ready and not self._more():
                raise InitramfsError("it ends in the middle of a file")
            step = min(length, len(self._ready))
            self._ready = self._ready[step:]
            length -= step

    def _more(self) -> bool:
        """Unpack another piece; False at the end."""
        try:
            while not self._decoder.eof:
                piece = b""
                if getattr(self._decoder, "needs_input", True):
                    piece = self._data[self._at : self._at + _PIECE]
                    self._at += len(piece)
                    if not piece:
                        raise InitramfsError("what is packed is cut short")
                unpacked = self._decoder.decompress(piece, _PIECE)
                self._total += len(unpacked)
                if self._total > MAX_UNPACKED:
                    raise InitramfsError(f"more than {MAX_UNPACKED} bytes when unpacked")
                if unpacked:
                    self._ready += unpacked
                    return True
        except (zlib.error, lzma.LZMAError, OSError, ValueError, EOFError) as error:
            raise InitramfsError(f"what is packed is damaged: {error}") from error
        except _zstd_module().ZstdError as error:
            raise InitramfsError(f"what is packed is damaged: {error}") from error
        return False


class _Inflate:
    """zlib's decoder with the interface of the others."""

    def __init__(self) -> None:
        self._decoder = zlib.decompressobj(31)

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def needs_input(self) -> bool:
        return not self._decoder.unconsumed_tail

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._decoder.decompress(self._decoder.unconsumed_tail + data, max_length)


def _decoder(head: bytes) -> Any:
    if head.startswith(b"\x1f\x8b"):
        return _Inflate()
    if head.startswith(b"\xfd7zXZ"):
        return lzma.LZMADecompressor(memlimit=256 * MiB)
    if head.startswith(b"\x5d\x00\x00"):
        return lzma.LZMADecompressor(format=lzma.FORMAT_ALONE, memlimit=256 * MiB)
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        return _zstd_module().ZstdDecompressor()
    if head.startswith(b"BZh"):
        return bz2.BZ2Decompressor()
    for magic, name in _OTHERS.items():
        if head.startswith(magic):
            raise InitramfsError(f"it is packed with {name}, which is not unpacked here")
    raise InitramfsError("it begins with nothing known")


def _zstd_module() -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


def _archive(source: _Plain | _Packed) -> Iterator[str]:
    """The names in one archive, up to its trailer."""
    while True:
        header = source.take(_HEADER)
        if header[:6] not in _CPIO:
            raise InitramfsError("between files stands something else")
        try:
            size, name_size = int(header[54:62], 16), int(header[94:102], 16)
        except ValueError:
            raise InitramfsError("a file's header is damaged") from None
        if not 1 <= name_size <= _MAX_NAME:
            raise InitramfsError("a file's header is damaged")
        padded = (_HEADER + name_size + 3) // 4 * 4 - _HEADER
        name = source.take(padded)[: name_size - 1].decode("utf-8", "surrogateescape")
        if name == _TRAILER:
            return
        source.skip((size + 3) // 4 * 4)
        yield name
