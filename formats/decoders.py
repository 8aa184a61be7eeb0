"""Decompression of one unit (cluster, grain) whose decoded length is known beforehand.

Every decoder returns exactly the length asked for or raises CorruptImage: a stream that ends early and one that
would go on are both damage. Bytes behind the stream are ignored: writers pad to sectors. The work is done outside
the interpreter's lock, so threads scale.

Raw deflate goes through libdeflate; zstd through the standard interface (``compression.zstd`` or its backport).
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from imagekit.errors import CorruptImage
from imagekit.formats.base import Buffer

if TYPE_CHECKING:
    from types import ModuleType

Decoder: TypeAlias = Callable[[Buffer, int], Buffer]
"""(compressed bytes, decoded length) → exactly that many bytes."""

ZSTD_WINDOW_LOG = 23
"""Largest window accepted (8 MiB): four times the largest cluster, and a bound on memory per thread."""

ZSTD_FRAMES = 1024
"""Frames of a unit: writers make one, and one takes nine bytes at least, so that empty ones would cost minutes."""


def inflate_raw(data: Buffer, length: int) -> Buffer:
    """Raw deflate (RFC 1951), through libdeflate."""
    import deflate

    try:
        out: bytearray = deflate.deflate_decompress(data, length)
    except deflate.DeflateError:
        # libdeflate wants a complete stream and says no more than no. A stream may lack its end if the whole
        # unit came out before (qcow2 in QEMU stops reading there): the slow decoder tells the cases apart.
        return inflate_raw_zlib(data, length)
    return _exact(out, length, "deflate")


def inflate_raw_zlib(data: Buffer, length: int) -> Buffer:
    """Raw deflate through zlib: slower, exact about what is wrong."""
    try:
        out = zlib.decompressobj(-15).decompress(data, length + 1)
    except zlib.error as error:
        raise CorruptImage(f"the deflate stream is damaged: {error}") from None
    return _exact(out, length, "deflate")


def unzstd(data: Buffer, length: int) -> Buffer:
    """One or more zstd frames (RFC 8878) that together hold the unit."""
    zstd = zstd_module()
    options = {zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG}
    out = b""
    rest: Buffer = data
    for _ in range(ZSTD_FRAMES):
        frame = zstd.ZstdDecompressor(options=options)
        try:
            piece: bytes = frame.decompress(rest, max_length=length - len(out) + 1)
        except zstd.ZstdError as error:
            raise CorruptImage(f"the zstd stream is damaged: {error}") from None
        out = out + piece if out else piece
        if not frame.eof or len(out) >= length:
            break
        rest = frame.unused_data
    return _exact(out, length, "zstd")


def _exact(out: Buffer, length: int, name: str) -> Buffer:
    if len(out) == length:
        return out
    found = f"only {len(out)}" if len(out) < length else "more"
    raise CorruptImage(f"the {name} stream does not yield its unit: {length} bytes expected, {found} found")


def zstd_module() -> Any:
    """The standard library's zstd, or its backport where that has none."""
    module: ModuleType
    if sys.version_info >= (3, 14):
        from compression import zstd as module
    else:
        from backports import zstd as module
    return module
