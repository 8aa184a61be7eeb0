"""Verification: what was written is what was meant, or somebody hears of it."""

from __future__ import annotations

import dataclasses
import struct
import zlib
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures import vhd_images
from fixtures.qcow2_images import Recipe, make
from imagekit import copying, sums
from imagekit.errors import CorruptImage, ImagekitError, InvalidImage, VerificationFailed
from imagekit.formats import registry
from imagekit.formats.base import DiskImage, WriterOptions
from imagekit.formats.files import MemoryFile
from imagekit.formats.raw import RawImage
from imagekit.plan import ConversionPlan, build_plan
from imagekit.progress import Control, Progress
from imagekit.sums import Part, Sum
from imagekit.verify import first_difference, present_blocks, verify_content, verify_structure
from tests.disks import IDENTIFIER, OPTIONS, disks, noise, qcow2_recipes

KiB, MiB = 1 << 10, 1 << 20
DISK = bytes(2 * MiB) + noise(3 * MiB) + bytes(3 * MiB)


def raw(data: bytes) -> DiskImage:
    return RawImage(MemoryFile(data), len(data))


def converted(target: str = "vhd", options: WriterOptions = OPTIONS) -> tuple[ConversionPlan, MemoryFile]:
    image = raw(DISK)
    plan = build_plan(image, source_format="raw", target_format=target, options=options)
    file = MemoryFile(name="target.vhd")
    copying.copy_image(plan, image, MemoryFile(DISK), file)
    return plan, file


# --- structure -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "options"),
    [("raw", OPTIONS), ("vhd", OPTIONS), ("vhd", WriterOptions(IDENTIFIER, subformat="fixed"))],
    ids=["raw", "dynamic", "fixed"],
)
def test_what_was_written_as_planned_passes(target: str, options: WriterOptions) -> None:
    verify_structure(*converted(target, options))


@pytest.mark.parametrize(
    ("target", "options"),
    [("raw", OPTIONS), ("vhd", OPTIONS), ("vhd", WriterOptions(IDENTIFIER, subformat="fixed"))],
    ids=["raw", "dynamic", "fixed"],
)
@pytest.mark.parametrize("change", [-512, 512, 4096, -1])
def test_a_file_of_another_length_fails(target: str, options: WriterOptions, change: int) -> None:
    plan, file = converted(target, options)
    file.truncate(file.size + change)
    with pytest.raises((VerificationFailed, CorruptImage, InvalidImage)):
        verify_structure(plan, file)


def test_a_disk_of_another_size_fails() -> None:
    plan, file = converted()
    with pytest.raises(VerificationFailed, match="the disk has 8388608 bytes, 8389120 were planned"):
        verify_structure(dataclasses.replace(plan, virtual_size=plan.virtual_size + 512), file)


@pytest.mark.parametrize(
    ("entry", "sector"), [(1, 0xFFFFFFFF), (0, (0x1E00 + 2 * 0x201000) // 512)], ids=["one lost", "one too many"]
)
def test_blocks_other_than_the_planned_ones_fail(entry: int, sector: int) -> None:
    plan, file = converted()
    file.pwrite(1536 + entry * 4, struct.pack(">I", sector))
    with pytest.raises(ImagekitError):
        verify_structure(plan, file)


def test_a_lost_block_is_said_to_be_lost() -> None:
    plan, file = converted()
    file.pwrite(1536 + 4, b"\xff" * 4)
    with pytest.raises(VerificationFailed, match="the allocated blocks are not the planned ones") as caught:
        verify_structure(plan, file)
    assert caught.value.path == "target.vhd"


def test_two_blocks_on_one_place_fail() -> None:
    plan, file = converted()
    file.pwrite(1536 + 4, file.pread(1536 + 8, 4))
    with pytest.raises(VerificationFailed, match="overlap"):
        verify_structure(plan, file)


def test_a_footer_copy_that_was_not_written_fails() -> None:
    plan, file = converted()
    file.pwrite(0, bytes(512))
    with pytest.raises(VerificationFailed, match="oddities"):
        verify_structure(plan, file)


@given(disks(unit=4096), st.sampled_from([4096, 8192]))
def test_the_present_blocks_of_a_dynamic_disk_are_those_of_its_table(disk: bytes, block: int) -> None:
    count = -(-len(disk) // block)
    blocks = {
        at: disk[at * block : (at + 1) * block] for at in range(count) if any(disk[at * block : (at + 1) * block])
    }
    image = registry.find("vhd").open(MemoryFile(vhd_images.dynamic(len(disk), blocks, block_size=block)))
    runs = list(present_blocks(image, block))
    assert [first + at for first, length in runs for at in range(length)] == sorted(blocks)


# --- content ---------------------------------------------------------------------------------------------------


def naive_difference(one: bytes, other: bytes) -> int | None:
    length = max(len(one), len(other))
    one, other = one.ljust(length, b"\0"), other.ljust(length, b"\0")
    return next((at for at in range(length) if one[at] != other[at]), None) if one != other else None


@given(disks(), disks(), st.integers(1, 3))
def test_the_first_difference_is_found_in_whatever_follows(one: bytes, other: bytes, jobs: int) -> None:
    """The shorter disk goes on in zeros."""
    assert first_difference(raw(one), raw(other), jobs=jobs) == naive_difference(one, other)
    assert first_difference(raw(one), raw(one), jobs=jobs) is None


@given(qcow2_recipes(), st.data())
@settings(max_examples=40)
def test_a_changed_byte_is_found_across_formats(recipe: Recipe, data: st.DataObject) -> None:
    image, content = registry.find("qcow2").open(MemoryFile(make(recipe).data)), bytearray(recipe.content())
    assert first_difference(image, raw(bytes(content))) is None
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    assert first_difference(image, raw(bytes(content))) == at
    assert first_difference(raw(bytes(content)), image) == at


def test_the_lowest_of_many_differences_is_reported_in_any_number_of_threads() -> None:
    disk = bytearray(noise(MiB) * 24)
    for at in (23 * MiB, 11 * MiB + 5, 9 * MiB, 7 * MiB + 1, 22 * MiB):
        disk[at] ^= 1
    for jobs in (1, 2, 8):
        assert first_difference(raw(noise(MiB) * 24), raw(bytes(disk)), jobs=jobs) == 7 * MiB + 1


def test_a_difference_fails_the_verification_and_says_where() -> None:
    other = bytearray(DISK)
    other[4 * MiB + 3] ^= 1
    verify_content(raw(DISK), raw(DISK))
    with pytest.raises(VerificationFailed, match="the content differs at guest offset 0x400003"):
        verify_content(raw(DISK), raw(bytes(other)))


def sums_of(disk: bytes, parts: list[tuple[int, int]]) -> list[Part]:
    out = []
    for start, length in parts:
        total = Sum()
        total.add(disk[start : start + length // 2])
        total.add(memoryview(disk)[start + length // 2 : start + length])
        out.append(Part(start, length, total.value))
    return out


@given(disks(unit=4096), st.data())
@settings(max_examples=40)
def test_what_was_read_is_held_against_its_sum_and_all_else_is_compared(disk: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(disk)), max_size=8)))
    known = sums_of(disk, [(start, min(stop - start, 2 * MiB)) for start, stop in pairwise(cuts)][::2])
    reads: list[tuple[int, int]] = []

    class Watched(RawImage):
        def pread_into(self, offset: int, buffer: memoryview) -> None:
            reads.append((offset, len(buffer)))
            super().pread_into(offset, buffer)

    source = Watched(MemoryFile(disk), len(disk))
    assert first_difference(source, raw(disk), known=known, jobs=2) is None
    for part in known:
        assert not any(start < part.start + part.length and start + length > part.start for start, length in reads)
    changed, at = bytearray(disk), data.draw(st.integers(0, len(disk) - 1))
    changed[at] ^= 1
    assert first_difference(source, raw(bytes(changed)), known=known) == at


def test_a_source_that_reads_otherwise_than_it_did_fails_the_verification() -> None:
    """The copy is what was read then; which of the two readings was wrong nobody knows."""
    disk = noise(4 * MiB)
    known = sums_of(noise(4 * MiB, 1), [(MiB, MiB)])
    assert first_difference(raw(disk), raw(disk), known=known) == MiB


def test_sums_are_the_same_with_and_without_libdeflate(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = noise(100_000)
    fast = sums_of(disk, [(0, 100_000), (5, 7)])
    monkeypatch.setattr(sums, "functions", lambda: (zlib.crc32, zlib.adler32))
    assert sums_of(disk, [(0, 100_000), (5, 7)]) == fast
    assert fast[0].value == zlib.adler32(disk) << 32 | zlib.crc32(disk)


def test_only_so_many_parts_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "MAX_PARTS", 3)
    noted = sums.Sums()
    for start in (9, 3, 6, 0):
        noted.note(start, 1, 0)
    assert [part.start for part in noted.parts()] == [3, 6, 9]


def test_data_where_the_source_has_a_hole_is_a_difference() -> None:
    """And data behind the end of the source, where only zeros may be."""
    image = registry.find("vhd").open(MemoryFile(vhd_images.dynamic(8 * MiB, {2: noise(2 * MiB)})))
    empty = registry.find("qcow2").open(MemoryFile(make(Recipe(size=8 * MiB)).data))
    assert first_difference(empty, image) == 4 * MiB
    assert first_difference(raw(bytes(MiB)), image) == 4 * MiB
    assert first_difference(raw(bytes(MiB)), empty) is None


def test_comparing_tells_how_far_it_is() -> None:
    told: list[Progress] = []
    first_difference(raw(DISK), raw(DISK), control=Control(told.append))
    assert {one.phase for one in told} == {"verify"}
    assert told[-1].total == len(DISK)


def test_an_image_that_cannot_be_read_is_an_error_and_no_difference() -> None:
    broken = RawImage(MemoryFile(bytes(KiB)), MiB)
    with pytest.raises(CorruptImage):
        first_difference(raw(noise(MiB)), broken)
