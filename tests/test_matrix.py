"""Every readable kind of image to every writable one: whatever a disk holds, the target holds the same."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imagekit import copying
from imagekit.formats import registry
from imagekit.formats.base import KiB, MiB
from imagekit.formats.files import MemoryFile
from imagekit.plan import build_plan, target_size
from imagekit.verify import verify_structure
from tests.disks import assert_extents_agree, content, md5, noise, text
from tests.variants import SOURCES, TARGETS, Made


@st.composite
def disk_contents(draw: st.DrawFn) -> bytes:
    """Up to a few MiB: runs of noise, of text and of zeros that begin and end anywhere on sectors."""
    out = bytearray()
    for at in range(draw(st.integers(1, 6))):
        length = draw(st.integers(1, 2 * MiB // 512)) * 512
        out += draw(st.sampled_from([noise(length, at), text(length, at), bytes(length), bytes(length)]))
    return bytes(out)


PLAIN = noise(70 * KiB, 1) + bytes(2 * MiB) + text(200 * KiB, 2) + bytes(130 * KiB) + noise(512, 3) + bytes(512)
"""One disk with all that matters: data and zeros within a block, blocks of zeros, an end inside a sector of 4096."""


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


def assert_holds(file: MemoryFile, target: str, expected: bytes) -> None:
    found = content(registry.find(TARGETS[target][0]).open(file))
    assert (len(found) - len(expected)) in range(2 * MiB)
    assert md5(found[: len(expected)]) == md5(expected)
    assert not any(found[len(expected) :])


@pytest.mark.parametrize("source", SOURCES)
def test_every_kind_is_read_for_what_it_is(source: str) -> None:
    made = plain(source)
    image = made.open()
    assert md5(content(image)) == md5(PLAIN)
    assert_extents_agree(image, MemoryFile(made.data), PLAIN)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_kind_becomes_every_other(source: str, target: str) -> None:
    assert_holds(converted(plain(source), target), target, PLAIN)


@pytest.mark.parametrize("target", TARGETS)
def test_the_target_does_not_show_what_it_was_made_from(target: str) -> None:
    """The same disk gives the same bytes, but for what counts as data without a look: compressed clusters."""
    compressed = ("qcow2 zlib", "qcow2 zstd", "qcow2 mixed", "vmdk stream", "vmdk stream as qemu")
    made = {source: md5(bytes(converted(plain(source), target).data)) for source in SOURCES}
    assert len({digest for source, digest in made.items() if source not in compressed}) == 1, made


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow])
@given(disk_contents(), st.sampled_from(sorted(SOURCES)), st.sampled_from(sorted(TARGETS)))
def test_any_disk_survives_any_conversion(disk: bytes, source: str, target: str) -> None:
    assert_holds(converted(SOURCES[source](disk), target), target, disk)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow])
@given(disk_contents(), st.sampled_from(sorted(SOURCES)), st.sampled_from(sorted(TARGETS)))
def test_any_disk_survives_any_conversion_many_times(disk: bytes, source: str, target: str) -> None:
    assert_holds(converted(SOURCES[source](disk), target), target, disk)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow])
@given(disk_contents(), st.sampled_from(sorted(SOURCES)), st.data())
def test_any_part_of_any_disk_reads_like_the_whole(disk: bytes, source: str, data: st.DataObject) -> None:
    image = SOURCES[source](disk).open()
    for _ in range(5):
        start = data.draw(st.integers(0, len(disk) - 1))
        length = data.draw(st.integers(1, 3 * MiB))
        assert image.pread(start, length) == disk[start : start + length]
