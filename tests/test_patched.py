"""A patched disk reads as the base with the patches over it, from any offset, and its extents say so."""

from __future__ import annotations

import dataclasses
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixtures import vhd_images
from imagekit.contents.patched import Patch, PatchedImage
from imagekit.formats import registry
from imagekit.formats.base import Extent
from imagekit.formats.files import MemoryFile
from imagekit.formats.raw import RawImage
from imagekit.plan import find_blocks
from tests.disks import assert_extents_agree, content, cut, disks, noise

KiB = 1 << 10


def raw(data: bytes) -> RawImage:
    return RawImage(MemoryFile(data), len(data))


def expected(base: bytes, patches: list[Patch], size: int) -> bytes:
    out = bytearray(base.ljust(size, b"\0"))
    for one in patches:
        out[one.offset : one.end] = one.data
    return bytes(out)


@st.composite
def patched(draw: st.DrawFn) -> tuple[bytes, list[Patch], int]:
    """A base, patches that touch neither each other nor anything outside, and a size."""
    base = draw(disks())
    size = len(base) + draw(st.integers(0, 4000))
    edges = sorted(draw(st.lists(st.integers(0, size), max_size=12, unique=True)))
    patches = [Patch(start, noise(end - start, start)) for start, end in zip(edges[::2], edges[1::2], strict=False)]
    return base, draw(st.permutations(patches)), size


@given(patched(), st.data())
def test_any_part_reads_as_the_base_with_the_patches_over_it(
    made: tuple[bytes, list[Patch], int], data: st.DataObject
) -> None:
    base, patches, size = made
    image = PatchedImage(raw(base), patches, size)
    whole = expected(base, patches, size)
    for _ in range(10):
        start = data.draw(st.integers(0, size))
        length = data.draw(st.integers(0, size))
        assert image.pread(start, length) == whole[start : start + length]


@given(patched(), st.data())
def test_extents_cover_the_disk_and_agree_with_its_bytes(
    made: tuple[bytes, list[Patch], int], data: st.DataObject
) -> None:
    base, patches, size = made
    image = PatchedImage(raw(base), patches, size)
    extents = assert_extents_agree(image, MemoryFile(base), expected(base, patches, size))
    start = data.draw(st.integers(0, size))
    length = data.draw(st.integers(0, size))
    assert list(image.extents(start, length)) == cut(extents, start, min(start + length, size))


def test_patched_bytes_are_data_that_lies_nowhere_in_the_file() -> None:
    image = PatchedImage(raw(b"x" * 1024), [Patch(512, b"y" * 100), Patch(2000, b"z")], 4096)
    assert list(image.extents()) == [
        Extent(0, 512, data=True, zero=False, offset=0),
        Extent(512, 100, data=True, zero=False),
        Extent(612, 412, data=True, zero=False, offset=612),
        Extent(1024, 976, data=False, zero=True, present=False),
        Extent(2000, 1, data=True, zero=False),
        Extent(2001, 2095, data=False, zero=True, present=False),
    ]


def test_a_plan_finds_the_blocks_of_patches_too() -> None:
    image = PatchedImage(raw(bytes(64 * KiB)), [Patch(70 * KiB, b"x")], 128 * KiB)
    assert list(find_blocks(image, 16 * KiB)) == [(4, 1)]


def test_a_dynamic_disk_below_keeps_its_offsets_and_holes() -> None:
    file = MemoryFile(vhd_images.dynamic(96 * KiB, {1: noise(32 * KiB)}, block_size=32 * KiB))
    base = registry.find("vhd").open(file)
    patches = [Patch(40 * KiB + 5, b"patch"), Patch(100 * KiB, b"behind")]
    image = PatchedImage(base, patches, 128 * KiB)
    extents = assert_extents_agree(image, file, expected(content(base), patches, 128 * KiB))
    assert any(extent.offset is not None for extent in extents)


def test_it_says_of_itself_what_the_base_says_but_for_its_size() -> None:
    base = raw(bytes(1024))
    base.disk_id = b"page 83"
    base.identity = b"write guid"
    base.sector_size = 4096
    image = PatchedImage(base, [], 4096)
    assert image.info() == dataclasses.replace(base.info(), virtual_size=4096)
    assert (image.disk_id, image.identity, image.sector_size) == (b"page 83", None, 4096)
    assert list(image.ranges()) == list(base.ranges())


def test_without_patches_it_is_the_base() -> None:
    data = noise(3000)
    image = PatchedImage(raw(data), [Patch(7, b"")])
    assert content(image) == data
    assert list(image.extents()) == list(raw(data).extents())


@pytest.mark.parametrize(
    ("patches", "size", "message"),
    [
        ([Patch(0, b"abc"), Patch(2, b"d")], None, "overlap"),
        ([Patch(4, b"d"), Patch(0, b"abcdef")], None, "overlap"),
        ([Patch(-1, b"abc")], None, "outside"),
        ([Patch(1022, b"abc")], None, "outside"),
        ([], 1023, "smaller than the base"),
    ],
)
def test_patches_that_make_no_sense_are_the_caller_s_mistake(
    patches: list[Patch], size: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PatchedImage(raw(bytes(1024)), patches, size)


def test_closing_it_closes_the_base() -> None:
    class Closing(RawImage):
        closed = False

        def close(self) -> None:
            self.closed = True

    base = Closing(MemoryFile(), 0)
    with PatchedImage(base, []):
        assert not base.closed
    assert base.closed


def test_threads_may_share_it() -> None:
    base = noise(256 * KiB)
    patches = [Patch(at, noise(700, at)) for at in range(0, 250 * KiB, 3 * KiB)]
    image = PatchedImage(raw(base), patches)
    whole, wrong = expected(base, patches, len(base)), list[int]()

    def read(seed: int) -> None:
        for at in range(seed * 100, len(base), 5000):
            if image.pread(at, 9000) != whole[at : at + 9000]:
                wrong.append(at)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
