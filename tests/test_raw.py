"""Raw disks: the file is the disk, its holes are zeros, and bytes that are missing are an error."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagekit.errors import CorruptImage, UnsupportedFeature
from imagekit.formats.base import WriterOptions
from imagekit.formats.files import LocalFile, MemoryFile
from imagekit.formats.raw import FORMAT, RawImage
from tests.disks import IDENTIFIER, OPTIONS, assert_extents_agree, content, convert, cut, disks, noise

MiB = 1 << 20


@given(disks())
def test_extents_cover_the_disk_and_agree_with_its_bytes(data: bytes) -> None:
    file = MemoryFile(data)
    assert_extents_agree(FORMAT.open(file), file, data)


def test_holes_are_zeros_and_everything_has_its_own_offset(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    with path.open("wb") as out:
        out.seek(MiB)
        out.write(noise(MiB))
        out.truncate(4 * MiB)
    with LocalFile.open_source(path) as file:
        image = FORMAT.open(file)
        extents = assert_extents_agree(image, file, path.read_bytes())
        if len(extents) == 1:
            pytest.skip("this file system knows no holes")
        assert [(one.start, one.length, one.data, one.zero) for one in extents] == [
            (0, MiB, False, True),
            (MiB, MiB, True, False),
            (2 * MiB, 2 * MiB, False, True),
        ]
        for start, length in [(0, 1), (512, MiB), (MiB + 7, 2 * MiB), (3 * MiB, 9 * MiB)]:
            assert list(image.extents(start, length)) == cut(extents, start, start + length)


@given(disks(), st.lists(st.integers(1, 5000), min_size=1, max_size=30))
def test_reading_in_any_pieces_gives_the_same_bytes(data: bytes, lengths: list[int]) -> None:
    image, at, out = FORMAT.open(MemoryFile(data)), 0, b""
    for length in lengths:
        out += image.pread(at, length)
        at += length
    assert out == data[:at]


def test_a_disk_need_not_end_on_a_sector() -> None:
    image = FORMAT.open(MemoryFile(b"x" * 700))
    assert (image.virtual_size, content(image)) == (700, b"x" * 700)


def test_a_file_shorter_than_the_disk_is_an_error_and_no_zeros() -> None:
    """As when somebody cuts the file while it is read."""
    file = MemoryFile(bytes(1000))
    image = RawImage(file, 1000)
    file.truncate(600)
    with pytest.raises(CorruptImage, match="400 bytes expected, 100 found"):
        image.pread(500, 400)


@given(disks())
def test_what_is_written_is_the_disk(data: bytes) -> None:
    assert convert(MemoryFile(data), "raw", "raw").data == data


def test_a_raw_disk_has_no_blocks() -> None:
    with pytest.raises(UnsupportedFeature, match="a raw disk has no blocks"):
        FORMAT.writer(MiB, WriterOptions(IDENTIFIER, block_size=MiB))


def test_raw_claims_no_file_and_all_of_it() -> None:
    """No content is recognised as raw; what is opened as raw is data from end to end."""
    file = MemoryFile(noise(1000))
    assert FORMAT.probe(file) is None
    assert [(one.offset, one.length, one.kind) for one in FORMAT.open(file).ranges()] == [(0, 1000, "data")]
    assert FORMAT.open(file).info().references == ()
    with pytest.raises(UnsupportedFeature, match="no structure to check"):
        FORMAT.check(file)


def test_a_writer_may_get_its_blocks_in_any_order() -> None:
    writer = FORMAT.writer(5 * MiB, OPTIONS)
    layout = writer.layout()
    assert [layout.place(block) for block in (2, 0, 1)] == [4 * MiB, 0, 2 * MiB]
    assert layout.file_size == 5 * MiB
