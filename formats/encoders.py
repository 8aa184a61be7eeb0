"""Compression of one unit (cluster, grain); the counterpart of :mod:`imagekit.formats.decoders`.

Same bytes in, same bytes out, on any number of threads, for one version of the library behind it. The work is done
outside the interpreter's lock, so threads scale.

Raw deflate goes through zlib: readers of qcow2 keep a window of 4 KiB, and libdeflate knows no window but 32 KiB.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import TypeAlias

from imagekit.formats.base import Buffer
from imagekit.formats.decoders import zstd_module

Encoder: TypeAlias = Callable[[Buffer], bytes]

DEFLATE_WINDOW_LOG = 12
"""What QEMU writes and all that its reader keeps (block/qcow2-threads.c: window bits -12)."""
DEFLATE_MEMORY = 9


def deflate_raw(data: Buffer) -> bytes:
    """Raw deflate (RFC 1951) that can be read with a window of 4 KiB."""
    packer = zlib.compressobj(zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, -DEFLATE_WINDOW_LOG, DEFLATE_MEMORY)
    packed = packer.compress(data)
    return packed + packer.flush() if packed else packer.flush()


def zstd(data: Buffer) -> bytes:
    """One zstd frame (RFC 8878) that says how long its content is; its window is no larger than that."""
    packed: bytes = zstd_module().compress(data)
    return packed
