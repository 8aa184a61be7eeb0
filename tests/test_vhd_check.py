"""The check of a VHD, and repairs that write over nothing that may be data."""

from __future__ import annotations

import dataclasses
import struct

import pytest

from fixtures import vhd_images
from imagekit import changes
from imagekit.formats.base import Barrier, Write
from imagekit.formats.files import MemoryFile
from imagekit.formats.vhd import FORMAT
from tests.disks import content, noise

BLOCK = 4096
FOOTER = vhd_images.Footer(size=4 * BLOCK)


def disk(head: bytes | None = None, tail: bytes | None = None) -> bytes:
    blocks = {0: noise(BLOCK), 2: noise(BLOCK, 1)}
    return vhd_images.dynamic(4 * BLOCK, blocks, block_size=BLOCK, footer=FOOTER, head=head, tail=tail)


def codes(data: bytes) -> list[str]:
    return [problem.code for problem in FORMAT.check(MemoryFile(data))]


def test_nothing_is_wrong_with_a_sound_disk() -> None:
    assert codes(disk()) == []
    assert codes(vhd_images.fixed(noise(BLOCK))) == []
    assert codes(vhd_images.differencing(4 * BLOCK, "parent.vhd")) == []


def test_a_resized_disk_is_sound() -> None:
    footer = dataclasses.replace(FOOTER, original_size=BLOCK)
    assert codes(vhd_images.dynamic(4 * BLOCK, {}, block_size=BLOCK, footer=footer)) == []


@pytest.mark.parametrize(("step", "overlapping"), [(0, True), (512, True), (BLOCK, True), (BLOCK + 512, False)])
def test_blocks_that_overlap_are_damage(step: int, *, overlapping: bool) -> None:
    """Two blocks on one place, on a part of it, on the last sector; and side by side."""
    data = bytearray(disk())
    first = int.from_bytes(data[1536:1540], "big")
    data[1536 + 8 : 1536 + 12] = struct.pack(">I", first + step // 512)
    found = FORMAT.check(MemoryFile(bytes(data)))
    assert [problem.code for problem in found] == ["overlap"] * overlapping
    if overlapping:
        assert "block 0 and block 2 overlap" in found[0].message
        assert found[0].offset in (1536, 1536 + 8)


@pytest.mark.parametrize(
    ("head", "tail", "code"),
    [
        (bytes(512), None, "footer-copy-missing"),
        (FOOTER.bytes(checksum_off_by=1), None, "footer-copy-missing"),
        (None, b"", "footer-missing"),
        (None, FOOTER.bytes(checksum_off_by=1), "footer-missing"),
        (None, dataclasses.replace(FOOTER, hidden=1).bytes(), "footers-differ-slightly"),
    ],
    ids=["no copy", "damaged copy", "no footer", "damaged footer", "a flag differs"],
)
def test_a_footer_that_is_missing_or_differs_is_found_and_mended(
    head: bytes | None, tail: bytes | None, code: str
) -> None:
    broken = disk(head, tail)
    assert codes(broken) == [code]
    file = MemoryFile(broken)
    before = content(FORMAT.open(file))
    steps = FORMAT.repair(file)
    assert isinstance(steps[-1], Barrier)
    changes.apply(steps, file)
    assert FORMAT.check(file) == []
    assert content(FORMAT.open(file)) == before
    assert FORMAT.repair(file) == []


def test_a_repair_never_writes_over_what_may_be_data() -> None:
    """A damaged last footer may be the guest's bytes of a longer disk: the new one goes behind it."""
    broken = disk(tail=FOOTER.bytes(checksum_off_by=1))
    (write,) = [step for step in FORMAT.repair(MemoryFile(broken)) if isinstance(step, Write)]
    assert write.offset == len(broken)
    cut = disk(tail=b"") + b"x" * 100
    (write,) = [step for step in FORMAT.repair(MemoryFile(cut)) if isinstance(step, Write)]
    assert (write.offset % 512, write.offset >= len(cut)) == (0, True)


def test_what_is_not_certain_is_left_alone() -> None:
    """Two footers that describe different disks: which one is right, nobody can tell."""
    other = dataclasses.replace(FOOTER, size=2 * BLOCK).bytes()
    assert codes(disk(head=other)) == ["footers-differ"]
    assert FORMAT.repair(MemoryFile(disk(head=other))) == []
    assert FORMAT.repair(MemoryFile(disk())) == []
    assert FORMAT.repair(MemoryFile(vhd_images.fixed(noise(BLOCK)))) == []


def test_a_contradiction_between_sizes_is_damage() -> None:
    footer = dataclasses.replace(FOOTER, original_size=8 * BLOCK)
    assert codes(vhd_images.dynamic(4 * BLOCK, {}, block_size=BLOCK, footer=footer)) == ["original-size-larger"]


def test_all_that_lies_in_a_table_is_on_it() -> None:
    """Not only what begins next."""
    locators = [vhd_images.Locator(b"W2ru", b"p\0", 1600), vhd_images.Locator(b"W2ku", b"q\0", 1700)]
    data = vhd_images.differencing(4 * BLOCK, "p.vhd", block_size=BLOCK, locators=locators, spare_entries=100)
    overlaps = [one.message for one in FORMAT.check(MemoryFile(data)) if one.code == "overlap"]
    assert overlaps == [
        "the BAT and the parent locator overlap at 0x640",
        "the BAT and the parent locator overlap at 0x6a4",
    ]


@pytest.mark.parametrize("at", [512, 1024])
def test_a_header_on_a_block_is_damage(at: int) -> None:
    """The header may lie anywhere, so a block behind the table can still be on it."""
    data = vhd_images.dynamic(BLOCK, {0: noise(BLOCK)}, block_size=BLOCK)
    place = int.from_bytes(data[1536:1540], "big") * 512 + at
    footer = dataclasses.replace(FOOTER, size=BLOCK, data_offset=place).bytes()
    data = footer + data[512:place] + data[512:1536] + data[place + 1024 : -512] + footer
    found = FORMAT.check(MemoryFile(data))
    assert [problem.message for problem in found] == [f"block 0 and the dynamic header overlap at {place:#x}"]


def test_a_last_block_that_ends_early_may_lie_under_the_footer() -> None:
    """As old QEMU wrote it."""
    data = vhd_images.dynamic(BLOCK - 1024, {0: noise(BLOCK)}, block_size=BLOCK)
    assert codes(data[: -512 - 1024] + data[-512:]) == []


@pytest.mark.parametrize("zeros", [512, 1024, 1 << 20])
def test_a_footer_goes_back_to_where_it_was_when_there_are_only_zeros_now(zeros: int) -> None:
    """So that what is put behind it later lies as it would have."""
    whole = disk()
    broken = whole[:-512] + bytes(zeros)
    file = MemoryFile(broken)
    changes.apply(FORMAT.repair(file), file)
    assert file.data == whole


def test_a_footer_goes_behind_more_zeros_than_are_worth_reading() -> None:
    broken = disk()[:-512] + bytes(17 << 20)
    file = MemoryFile(broken)
    changes.apply(FORMAT.repair(file), file)
    assert file.size == len(broken) + 512
    assert FORMAT.check(file) == []


def test_a_disk_that_does_not_open_gets_its_footer_all_the_same() -> None:
    broken = bytearray(disk(tail=b""))
    broken[1536:1540] = b"\xf0\0\0\0"
    (write,) = [step for step in FORMAT.repair(MemoryFile(broken)) if isinstance(step, Write)]
    assert write.offset == len(broken)


def test_a_table_full_of_overlaps_gives_a_list_that_can_be_read() -> None:
    data = bytearray(vhd_images.dynamic(1000 * 512, {0: noise(512)}, block_size=512))
    data[1536 : 1536 + 4000] = data[1536:1540] * 1000
    assert len(FORMAT.check(MemoryFile(bytes(data)))) == 100
