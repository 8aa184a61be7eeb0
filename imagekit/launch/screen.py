"""The display of a rehearsed machine: the picture as PNG, and the characters on it while it is in text mode.

QEMU hands out the picture as binary PPM on every version; PNG directly only from 7.1 on, so it is written
here (PNG specification, 3rd edition: one IHDR, one IDAT, no filtering). The characters are read from the
VGA text page, not recognised from pixels: a BIOS, boot loader or console that prints only to the screen can
be quoted.
"""

from __future__ import annotations

import re
import struct
import zlib

TEXT_PAGE_ADDRESS = 0xB8000
TEXT_COLUMNS, TEXT_ROWS = 80, 25
TEXT_PAGE_SIZE = TEXT_COLUMNS * TEXT_ROWS * 2
"""A character and an attribute byte for every cell of VGA mode 3."""

TEXT_MODE_PICTURES = frozenset({(720, 400), (640, 400)})
"""Width and height of 80×25 cells with 9 or 8 pixels a character."""

_PPM_HEADER = re.compile(rb"P6\s+(\d{1,5})\s+(\d{1,5})\s+255\s", re.ASCII)


def ppm_size(ppm: bytes) -> tuple[int, int]:
    """Width and height in pixels of a binary PPM of 8 bits a sample; ValueError when it is none."""
    width, height, _ = _parse(ppm)
    return width, height


def ppm_to_png(ppm: bytes) -> bytes:
    """The same picture as PNG; ValueError when ``ppm`` is no complete binary PPM."""
    width, height, start = _parse(ppm)
    row = width * 3
    # Every row is preceded by its filter type, 0: none.
    rows = b"".join(b"\0" + ppm[at : at + row] for at in range(start, start + row * height, row))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", header),
            _chunk(b"IDAT", zlib.compress(rows)),
            _chunk(b"IEND", b""),
        )
    )


def text_lines(page: bytes) -> list[str]:
    """The rows of a VGA text page that are not blank."""
    characters = page[:TEXT_PAGE_SIZE:2].replace(b"\0", b" ").decode("cp437")
    rows = (characters[at : at + TEXT_COLUMNS].rstrip() for at in range(0, len(characters), TEXT_COLUMNS))
    return [row for row in rows if row]


def _parse(ppm: bytes) -> tuple[int, int, int]:
    match = _PPM_HEADER.match(ppm)
    if match is None:
        raise ValueError("not a binary PPM with 8 bits a sample")
    width, height = int(match[1]), int(match[2])
    if width == 0 or height == 0 or len(ppm) - match.end() < width * height * 3:
        raise ValueError(f"a PPM of {width}×{height} pixels, cut short at {len(ppm)} bytes")
    return width, height, match.end()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
