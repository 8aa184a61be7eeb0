"""Decompression of one unit (cluster, grain) whose decoded length is known beforehand.

Every decoder returns exactly the length asked for or raises CorruptImage: a stream that ends early and one that
would go on are both damage. Bytes behind the stream are ignored: writers pad to sectors. The work is done outside
the interpreter's lock, so threads scale.

Raw deflate goes through libdeflate where it is installed, else ISA-L, else zlib; zstd through the standard interface
(``compression.zstd`` or its backport).
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

from imagekit.errors import CorruptImage
from imagekit.formats.base import Buffer

if TYPE_CHECKING:
    from types import ModuleType

Decoder: TypeAlias = Callable[[Buffer, int], Buffer]
"""(compressed bytes, decoded length) → exactly that many bytes."""

ZSTD_WINDOW_LOG = 23
"""Largest window accepted (8 MiB): four times the largest cluster, and a bound on memory per thread."""

ZSTD_FRAMES = 256
"""Frames of a unit: writers make one, and one takes nine bytes at least, so that empty ones would cost minutes."""


@cache
def raw_inflater() -> Decoder:
    """Raw deflate (RFC 1951) by the fastest library there is: libdeflate, ISA-L, or zlib. Chosen once."""
    try:
        import deflate
    except ImportError:
        pass
    else:
        return _by_libdeflate(deflate.deflate_decompress, deflate.DeflateError)
    try:
        from isal import isal_zlib
    except ImportError:
        return inflate_raw_zlib
    return _by_isal(isal_zlib)


def _by_libdeflate(decompress: Callable[[Buffer, int], bytearray], error: type[Exception]) -> Decoder:
    def inflate_raw_libdeflate(data: Buffer, length: int) -> Buffer:
        """Raw deflate through libdeflate, which wants the whole stream."""
        try:
            # Asked for more than there is it returns less, without an error.
            out = decompress(data, length)
        except error:
            # It says no more than no. A stream may lack its end if the whole unit came out before (qcow2 in QEMU
            # stops reading there): the slow decoder tells the cases apart.
            return inflate_raw_zlib(data, length)
        return out if len(out) == length else _exact(out, length, "deflate")

    return inflate_raw_libdeflate


def _by_isal(isal_zlib: Any) -> Decoder:
    def inflate_raw_isal(data: Buffer, length: int) -> Buffer:
        """Raw deflate through ISA-L, by zlib's interface."""
        try:
            out: bytes = isal_zlib.decompressobj(-15).decompress(data, length + 1)
        except isal_zlib.error:
            return inflate_raw_zlib(data, length)
        return out if len(out) == length else _exact(out, length, "deflate")

    return inflate_raw_isal


def inflate_raw_zlib(data: Buffer, length: int) -> Buffer:
    """Raw deflate through zlib: slower, exact about what is wrong."""
    try:
        out = zlib.decompressobj(-15).decompress(data, length + 1)
    except zlib.error as error:
        raise CorruptImage(f"the deflate stream is damaged: {error}") from None
    return _exact(out, length, "deflate")


def unzstd(data: Buffer, length: int) -> Buffer:
    """One or more zstd frames (RFC 8878) that together hold the unit."""
    decompressor, error_type, options = _zstd_parts()
    out = b""
    rest: Buffer = data
    for _ in range(ZSTD_FRAMES):  # each costs a copy of what is left
        if len(out) >= length:
            break
        frame = decompressor(options=options)
        try:
            piece: bytes = frame.decompress(rest, max_length=length - len(out) + 1)
        except error_type as error:
            raise CorruptImage(f"the zstd stream is damaged: {error}") from None
        out = out + piece if out else piece
        if not frame.eof:
            break
        rest = frame.unused_data
    return _exact(out, length, "zstd")


@cache
def _zstd_parts() -> tuple[Any, type[Exception], dict[int, int]]:
    """What :func:`unzstd` needs of the module, looked up once."""
    zstd = zstd_module()
    # A plain number as the key: the module's own enumeration takes a while to become one, each time.
    options = {int(zstd.DecompressionParameter.window_log_max): ZSTD_WINDOW_LOG}
    return zstd.ZstdDecompressor, zstd.ZstdError, options


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
