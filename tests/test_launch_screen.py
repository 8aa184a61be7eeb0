"""The display as picture and as text."""

from __future__ import annotations

import struct
import subprocess
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagekit.launch.screen import ppm_size, ppm_to_png, text_lines
from tests.oracles import need_tool


def chunks(png: bytes) -> dict[bytes, bytes]:
    """The chunks of a PNG by kind, each with its checksum verified."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, found = 8, {}
    while at < len(png):
        length, kind = struct.unpack_from(">I4s", png, at)
        data = png[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", png, at + 8 + length) == (zlib.crc32(kind + data),)
        found[kind] = data
        at += length + 12
    return found


@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_every_pixel_of_a_picture_survives(width: int, height: int, data: st.DataObject) -> None:
    pixels = data.draw(st.binary(min_size=width * height * 3, max_size=width * height * 3))
    ppm = b"P6\n%d %d\n255\n" % (width, height) + pixels
    found = chunks(ppm_to_png(ppm))
    assert struct.unpack(">IIBBBBB", found[b"IHDR"]) == (width, height, 8, 2, 0, 0, 0)
    rows = zlib.decompress(found[b"IDAT"])
    step = 1 + width * 3
    assert b"".join(rows[at + 1 : at + step] for at in range(0, len(rows), step)) == pixels
    assert set(rows[::step]) == {0}
    assert ppm_size(ppm) == (width, height)


@pytest.mark.parametrize(
    "ppm",
    [b"", b"P5\n1 1\n255\n\0\0\0", b"P6\n1 1\n65535\n" + bytes(6), b"P6\n2 1\n255\n" + bytes(5), b"P6\n0 1\n255\n"],
    ids=["empty", "grey", "16 bits", "cut short", "no width"],
)
def test_what_is_no_whole_picture_is_refused(ppm: bytes) -> None:
    with pytest.raises(ValueError, match="PPM"):
        ppm_to_png(ppm)


@pytest.mark.oracle
def test_another_program_sees_the_picture(tmp_path: Path) -> None:
    """``file`` reads the header: dimensions, depth and kind."""
    file = need_tool("file")
    (tmp_path / "screen.png").write_bytes(ppm_to_png(b"P6\n720 400\n255\n" + bytes(720 * 400 * 3)))
    said = subprocess.run([file, str(tmp_path / "screen.png")], capture_output=True, text=True, check=True)
    assert "PNG image data, 720 x 400, 8-bit/color RGB" in said.stdout


def test_the_text_page_is_read_without_its_colours_and_blank_rows() -> None:
    page = bytearray(b" \x07" * 2000)
    for at, sign in enumerate(b"Missing operating system\xc4"):
        page[160 * 3 + at * 2] = sign
    page[160 * 5] = 0
    assert text_lines(bytes(page)) == ["Missing operating system─"]
