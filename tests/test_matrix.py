"""Every readable kind of image to every writable one: whatever a disk holds, the target holds the same."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imagekit import copying
from imagekit.formats import registry
from imagekit.formats.base import DiskImage, KiB, MiB, ParentLink, round_up
from imagekit.formats.files import MemoryFile
from imagekit.formats.raw import RawImage
from imagekit.plan import build_plan, target_size
from imagekit.verify import verify_structure
from tests.disks import assert_extents_agree, content, md5, noise, text
from tests.variants import CHILDREN, SOURCES, TARGETS, Made, below


@st.composite
def disk_contents(draw: st.DrawFn) -> bytes:
    """Up to a few MiB: runs of noise, of text and of zeros that begin and end anywhere on sectors."""
    out = bytearray()
    for at in range(draw(st.integers(1, 6))):
        length = draw(st.integers(1, 2 * MiB // 512)) * 512
        out += draw(st.sampled_from([noise(length, at), text(length, at), bytes(length), bytes(length)]))
    return bytes(out)


PLAIN = noise(70 * KiB, 1) + bytes(2 * MiB) + text(600 * KiB, 2) + bytes(130 * KiB) + noise(512, 3) + bytes(512)
"""One disk with all that matters: data and zeros within a block, blocks of zeros, an end inside a sector of 4096."""


def whole(disk: bytes, image: DiskImage) -> bytes:
    """The disk as an image of that sector size has it: with zeros up to a whole sector."""
    return disk.ljust(image.virtual_size, b"\0")


@cache
def plain(source: str) -> Made:
    """The one disk as that kind."""
    return SOURCES[source](PLAIN)


def converted(made: Made, target: str) -> MemoryFile:
    """A conversion in memory, its structure verified as every conversion's is."""
    name, options = TARGETS[target]
    image = made.open()
    size, _ = target_size(image.virtual_size, unit=2 * MiB if options.creator else options.sector_size or 512)
    plan = build_plan(image, source_format=made.format, target_format=name, options=options, virtual_size=size)
    file = MemoryFile(name="target")
    copied = copying.copy_image(plan, image, MemoryFile(made.data), file, jobs=2)
    verify_structure(plan, file, file_size=copied.file_size)
    return file


def converted_on_parent(made: Made, target: str) -> tuple[MemoryFile, RawImage]:
    """A differencing disk of what an older state of the same disk does not hold, and that state."""
    name, options = CHILDREN[target]
    image = made.open()
    size, _ = target_size(image.virtual_size, unit=options.sector_size or 512)
    older = below(content(image)).ljust(size, b"\0")
    parent = RawImage(MemoryFile(older), size)
    link = ParentLink(b"p" * 16, size, f".\\parent.{name}", sector_size=options.sector_size or 512)
    options = replace(options, parent=link)
    plan = build_plan(
        image, source_format=made.format, target_format=name, options=options, virtual_size=size, parent=parent
    )
    file = MemoryFile(name="target")
    copied = copying.copy_image(plan, image, MemoryFile(made.data), file, jobs=2)
    verify_structure(plan, file, file_size=copied.file_size)
    return file, parent


def assert_holds(file: MemoryFile, target: str, expected: bytes) -> None:
    found = content(registry.find(TARGETS[target][0]).open(file))
    assert (len(found) - len(expected)) in range(2 * MiB)
    assert md5(found[: len(expected)]) == md5(expected)
    assert not any(found[len(expected) :])


def assert_holds_on_parent(made: Made, target: str, expected: bytes) -> RawImage:
    file, parent = converted_on_parent(made, target)
    child = registry.find(CHILDREN[target][0]).open(file, resolver=lambda _: parent)
    assert md5(content(child)) == md5(whole(expected, child))
    return parent


@pytest.mark.parametrize("source", SOURCES)
def test_pieces_together_are_what_a_read_gives(source: str) -> None:
    """Wherever the range begins and ends, and however the image hands it out."""
    image = plain(source).open()
    buffer = memoryview(bytearray(len(PLAIN)))
    for start, end in [(0, len(PLAIN)), (512, 512 * 9), (70 * KiB - 512, 2 * MiB), (len(PLAIN) - 2048, len(PLAIN))]:
        pieces = b"".join(bytes(piece) for piece in image.pieces(start, buffer[: end - start]))
        assert md5(pieces) == md5(PLAIN[start:end])


@pytest.mark.parametrize("source", SOURCES)
def test_every_kind_is_read_for_what_it_is(source: str) -> None:
    made = plain(source)
    image = made.open()
    assert image.virtual_size == round_up(len(PLAIN), image.sector_size)
    assert md5(content(image)) == md5(whole(PLAIN, image))
    assert_extents_agree(image, MemoryFile(made.data), whole(PLAIN, image))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_kind_becomes_every_other(source: str, target: str) -> None:
    assert_holds(converted(plain(source), target), target, PLAIN)


@pytest.mark.parametrize("target", CHILDREN)
@pytest.mark.parametrize("source", SOURCES)
def test_every_kind_becomes_a_child(source: str, target: str) -> None:
    parent = assert_holds_on_parent(plain(source), target, PLAIN)
    assert md5(content(parent)[: len(PLAIN)]) != md5(PLAIN)


@pytest.mark.parametrize("target", TARGETS)
def test_the_target_does_not_show_what_it_was_made_from(target: str) -> None:
    """The same disk gives the same bytes, but for what counts as data without a look: compressed clusters."""
    compressed = ("qcow2 zlib", "qcow2 zstd", "qcow2 mixed", "vmdk stream", "vmdk stream as qemu")
    same = [one for one in SOURCES if one not in compressed and plain(one).open().sector_size == 512]
    made = {source: md5(bytes(converted(plain(source), target).data)) for source in same}
    assert len(set(made.values())) == 1, made


def assert_survives(disk: bytes, source: str, target: str) -> None:
    made = SOURCES[source](disk)
    if target in CHILDREN:
        assert_holds_on_parent(made, target, disk)
    else:
        assert_holds(converted(made, target), target, disk)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow])
@given(disk_contents(), st.sampled_from(sorted(SOURCES)), st.sampled_from(sorted([*TARGETS, *CHILDREN])))
def test_any_disk_survives_any_conversion(disk: bytes, source: str, target: str) -> None:
    assert_survives(disk, source, target)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow])
@given(disk_contents(), st.sampled_from(sorted(SOURCES)), st.sampled_from(sorted([*TARGETS, *CHILDREN])))
def test_any_disk_survives_any_conversion_many_times(disk: bytes, source: str, target: str) -> None:
    assert_survives(disk, source, target)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow])
@given(disk_contents(), st.sampled_from(sorted(SOURCES)), st.data())
def test_any_part_of_any_disk_reads_like_the_whole(disk: bytes, source: str, data: st.DataObject) -> None:
    image = SOURCES[source](disk).open()
    for _ in range(5):
        start = data.draw(st.integers(0, len(disk) - 1))
        length = data.draw(st.integers(1, 3 * MiB))
        assert image.pread(start, length) == whole(disk, image)[start : start + length]
