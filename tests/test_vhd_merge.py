"""Differencing VHDs merged into their parents: what the parent holds then, and what the child shows meanwhile."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures import vhd_images
from imagekit import changes
from imagekit.errors import UnsupportedFeature
from imagekit.formats.base import Copy, DiskImage, Extent, Write, WriterOptions
from imagekit.formats.files import MemoryFile
from imagekit.formats.raw import RawImage
from imagekit.formats.vhd import FORMAT, VhdImage
from tests.disks import IDENTIFIER, assert_extents_agree, content, convert, noise
from tests.samples import sample
from tests.vhd_chains import (
    XEN_0_1,
    Child,
    assert_survives,
    chained,
    changed,
    child_of,
    children,
    link_to,
    on_zeros,
    over,
    raw,
)

KiB, MiB = 1 << 10, 1 << 20
BLOCK = 4 * KiB


def merged(parent: MemoryFile, child: DiskImage) -> bytes:
    return changed(bytes(parent.data), FORMAT.absorb(parent, child), child)


@given(children(smaller=False), st.sampled_from(["fixed", "dynamic", "aligned", "differencing", "backwards"]))
@settings(max_examples=25)
def test_a_child_merged_into_its_parent_is_hidden_by_it_until_the_end(child: Child, kind: str) -> None:
    """Wherever that is cut short, the child on top reads as before; in the end the parent reads as the child."""
    below = child.below[: len(child.content)]
    parent = {
        "fixed": lambda: vhd_images.fixed(below),
        "dynamic": lambda: convert_to_small_blocks(below),
        "aligned": lambda: bytes(convert(MemoryFile(below), "raw", "vhd", options=ALIGNED).data),
        "differencing": lambda: on_top(below),
        "backwards": lambda: on_top(below, dataclasses.replace(XEN_0_1, size=len(below))),
    }[kind]()
    base = raw(below)
    image = over(child.data, over(parent, base))

    def look(state: bytes) -> VhdImage:
        return over(child.data, over(state, base))

    steps = FORMAT.absorb(MemoryFile(parent), image)
    end = assert_survives(parent, steps, [child.content], image=image, look=look)
    assert content(over(end, base)) == child.content


ALIGNED = WriterOptions(IDENTIFIER, block_size=8 * KiB)


def convert_to_small_blocks(disk: bytes) -> bytes:
    """Every other block of the disk, packed; the others are missing where they are zero."""
    blocks = {at // BLOCK: disk[at : at + BLOCK] for at in range(0, len(disk), BLOCK)}
    return vhd_images.dynamic(len(disk), blocks, block_size=BLOCK)


def on_top(disk: bytes, footer: vhd_images.Footer | None = None) -> bytes:
    """A differencing disk of the same size, some sectors of which are its own and equal."""
    data = vhd_images.differencing(len(disk), "base.vhd", block_size=BLOCK, footer=footer)
    for at in range(0, len(disk), 5 * 512):
        data = vhd_images.write(data, at, disk[at : at + 512])
    return data


@pytest.mark.parametrize("kind", ["fixed", "dynamic", "differencing"])
def test_a_larger_child_makes_its_parent_larger(kind: str) -> None:
    """And where neither has anything there are zeros, whatever lies below."""
    small, large = 4 * BLOCK + 512, 700 * BLOCK
    deep = noise(large, 7)
    parent = {
        "fixed": vhd_images.fixed(noise(small)),
        "dynamic": vhd_images.dynamic(small, {0: noise(BLOCK), 3: noise(BLOCK, 3)}, block_size=BLOCK),
        "differencing": vhd_images.write(
            vhd_images.differencing(small, "deep.vhd", block_size=BLOCK), BLOCK, noise(1024, 3)
        ),
    }[kind]
    data = vhd_images.differencing(large, "p.vhd", block_size=BLOCK)
    for at in (512, 4 * BLOCK, 5 * BLOCK, 600 * BLOCK + 512):
        data = vhd_images.write(data, at, noise(1024, at))
    image = over(data, over(parent, raw(deep)))
    expected = content(image)

    def look(state: bytes) -> VhdImage:
        return over(data, over(state, raw(deep)))

    end = assert_survives(
        parent, FORMAT.absorb(MemoryFile(parent), image), [expected], image=image, look=look, most=12
    )
    assert content(over(end, raw(deep))) == expected
    assert on_zeros(end).identity == on_zeros(parent).identity


def test_zeros_that_a_child_holds_become_the_parents() -> None:
    """A child in another format may say zero without holding any bytes."""

    class Zeros(RawImage):
        def extents(self, start: int = 0, length: int | None = None) -> Iterable[Extent]:  # type: ignore[override]
            yield Extent(0, BLOCK, data=True, zero=False, depth=1)
            yield Extent(BLOCK, BLOCK + 512, data=False, zero=True)
            yield Extent(2 * BLOCK + 512, 2 * BLOCK - 512, data=False, zero=True, depth=1)

    expected = noise(BLOCK) + bytes(BLOCK + 512) + noise(4 * BLOCK)[2 * BLOCK + 512 :]
    for parent in (vhd_images.fixed(noise(4 * BLOCK)), convert_to_small_blocks(noise(4 * BLOCK))):
        assert content(on_zeros(merged(MemoryFile(parent), Zeros(MemoryFile(expected), 4 * BLOCK)))) == expected
    child = MemoryFile(vhd_images.differencing(4 * BLOCK, "deep.vhd", block_size=BLOCK))
    end = merged(child, Zeros(MemoryFile(expected), 4 * BLOCK))
    assert content(over(end, raw(noise(4 * BLOCK)))) == expected
    nothing = MemoryFile(vhd_images.dynamic(4 * BLOCK, {}, block_size=BLOCK))
    assert not any(one.present for one in on_zeros(merged(nothing, Zeros(MemoryFile(expected), 4 * BLOCK))).extents())


def test_pieces_that_do_not_end_on_a_sector_are_widened() -> None:
    class Odd(RawImage):
        def extents(self, start: int = 0, length: int | None = None) -> Iterable[Extent]:  # type: ignore[override]
            yield Extent(0, 700, data=True, zero=False, depth=1)
            yield Extent(700, 100, data=True, zero=False)
            yield Extent(800, 300, data=False, zero=True)
            yield Extent(1100, 4096 - 1100, data=True, zero=False, depth=1)

    expected = noise(800) + bytes(300) + noise(4096)[1100:]
    for parent in (vhd_images.fixed(noise(4096)), convert_to_small_blocks(noise(4096))):
        assert content(on_zeros(merged(MemoryFile(parent), Odd(MemoryFile(expected), 4096)))) == expected


def test_bits_of_what_was_merged_are_set_in_a_dynamic_disk_too() -> None:
    """Other readers go by them."""
    parent = bytearray(vhd_images.dynamic(BLOCK, {0: bytes(BLOCK)}, block_size=BLOCK))
    parent[2048 : 2048 + 512] = b"\x01" + bytes(511)
    child = vhd_images.write(vhd_images.differencing(BLOCK, "p.vhd", block_size=BLOCK), 512, noise(1024))
    end = merged(MemoryFile(parent), over(child, on_zeros(bytes(parent))))
    assert end[2048 : 2048 + 512] == b"\x61" + bytes(511)


def test_the_map_of_a_xenserver_disk_stays_true() -> None:
    """A bit that is clear says nothing: blocks that come are not in it, blocks that were in it stay whole."""
    disk = noise(2 * MiB).ljust(6 * MiB, b"\0")
    parent = convert(MemoryFile(disk), "raw", "vhd", options=WriterOptions(IDENTIFIER, creator="tap"))
    child = MemoryFile(vhd_images.write(bytes(child_of(parent, creator="tap").data), 2 * MiB - 512, noise(1024)))
    end = merged(parent, chained([parent, child]))
    assert end[0x800:0xC00] == parent.data[0x800:0xC00]
    assert end[0xA00] == 0x80
    assert content(on_zeros(end)) == vhd_images.overlaid(disk, 6 * MiB, [(2 * MiB - 512, noise(1024))])


@pytest.mark.parametrize("kind", ["fixed", "dynamic", "differencing"])
def test_steps_of_a_merge_are_the_same_whether_they_are_taken_or_listed(kind: str) -> None:
    """Moved blocks, a longer table and the child's sectors in one go."""
    small, large = 100 * BLOCK + 512, 900 * BLOCK
    parent = {
        "fixed": vhd_images.fixed(noise(small)),
        "dynamic": vhd_images.dynamic(small, {at: noise(BLOCK, at) for at in (0, 1, 2, 100)}, block_size=BLOCK),
        "differencing": vhd_images.write(
            vhd_images.differencing(small, "deep.vhd", block_size=BLOCK), 100 * BLOCK, noise(512)
        ),
    }[kind]
    data = vhd_images.differencing(large, "p.vhd", block_size=BLOCK)
    for at in (512, 100 * BLOCK, 101 * BLOCK, 800 * BLOCK):
        data = vhd_images.write(data, at, noise(1024, at))
    image = over(data, over(parent, raw(b"")))
    listed = list(FORMAT.absorb(MemoryFile(parent), image))
    file, taken = MemoryFile(parent), []
    for step in FORMAT.absorb(file, image):
        changes.apply([step], file, image=image)
        taken.append(step)
    assert taken == listed


def test_only_what_the_child_holds_is_copied() -> None:
    parent = MemoryFile(vhd_images.fixed(noise(64 * BLOCK)))
    child = MemoryFile(vhd_images.write(bytes(child_of(parent, 1, BLOCK).data), 9 * BLOCK, noise(512)))
    steps = list(FORMAT.absorb(parent, chained([parent, child])))
    assert [one for one in steps if isinstance(one, Copy | Write)] == [Copy(9 * BLOCK, 9 * BLOCK, 512)]


def test_a_child_smaller_than_its_parent_is_not_merged() -> None:
    parent = MemoryFile(vhd_images.fixed(noise(4 * BLOCK)))
    with pytest.raises(UnsupportedFeature, match="what it does not have would be lost"):
        FORMAT.absorb(parent, on_zeros(vhd_images.differencing(BLOCK, "p.vhd")))


def test_blocks_merged_into_a_windows_disk_lie_where_windows_puts_them() -> None:
    parent = MemoryFile(sample("win8.vhd").read_bytes())
    child = MemoryFile(vhd_images.write(bytes(child_of(parent).data), 6 * MiB + 512, noise(1024)))
    end = merged(parent, chained([parent, child]))
    assert struct.unpack(">5I", end[1536:1556]) == (*[0xFFFFFFFF] * 3, 0x1E00 // 512, 0xFFFFFFFF)
    assert len(end) == 0x203000
    assert end[-512:] == end[:512]
    assert content(on_zeros(end)) == vhd_images.overlaid(b"", 40 * MiB, [(6 * MiB + 512, noise(1024))])


def test_a_chain_of_five_is_merged_step_by_step() -> None:
    """Made by our writer, written to by a host of its own, every kind of disk in it, merged from the top."""
    size = 20 * BLOCK
    disk = noise(size // 2).ljust(size, b"\0")
    files = [convert(MemoryFile(disk), "raw", "vhd", options=WriterOptions(IDENTIFIER, block_size=BLOCK))]
    expected = [disk]
    for number, block in enumerate((BLOCK, 16 * KiB, 8 * KiB, BLOCK), 1):
        data = bytes(child_of(files[-1], number, block).data)
        writes = [(at * 512 * number, noise(512 * (at % 5 + 1), 10 * number + at)) for at in range(1, 30, 7)]
        writes = [(at % (size - 4096), written) for at, written in writes]
        for at, written in writes:
            data = vhd_images.write(data, at, written)
        files.append(MemoryFile(data))
        expected.append(vhd_images.overlaid(expected[-1], size, writes))
        assert content(chained(files)) == expected[-1]
        assert_extents_agree(chained(files), files[-1], expected[-1])
    while len(files) > 1:
        child = chained(files)
        files = [*files[:-2], MemoryFile(merged(files[-2], child))]
        assert content(chained(files)) == expected[-1]
        assert FORMAT.check(files[-1]) == []
    assert files[0].data[:512] == files[0].data[-512:]


def test_a_child_left_over_is_given_another_parent_when_the_one_between_is_gone() -> None:
    """Merged in the middle: the child of what was merged now stands on what it was merged into."""
    base = MemoryFile(vhd_images.fixed(noise(8 * BLOCK)))
    middle = MemoryFile(vhd_images.write(bytes(child_of(base, 1, BLOCK).data), BLOCK, noise(BLOCK, 1)))
    top = MemoryFile(vhd_images.write(bytes(child_of(middle, 2, BLOCK).data), 3 * BLOCK, noise(BLOCK, 2)))
    expected = content(chained([base, middle, top]))
    base = MemoryFile(merged(base, chained([base, middle])))
    top = MemoryFile(changed(bytes(top.data), FORMAT.rebase(top, link_to(base, "base.vhd"))))
    assert content(chained([base, top])) == expected
    assert chained([base, top]).info().references[0].names[0] == ".\\base.vhd"
