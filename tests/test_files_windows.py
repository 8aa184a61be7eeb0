"""What Windows is asked by FSCTL: the bytes of the questions, and the loops around the calls."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from imagekit.formats.base import GiB, KiB, MiB
from imagekit.formats.files_windows import (
    ALLOCATED_RANGE,
    CLONE_STEP,
    DUPLICATE_EXTENTS,
    DUPLICATE_EXTENTS_TO_FILE,
    GET_INTEGRITY_INFORMATION,
    INTEGRITY_INFORMATION,
    QUERY_ALLOCATED_RANGES,
    Query,
    allocated_ranges,
    clone_steps,
)


def control_code(function: int, method: int, access: int) -> int:
    """CTL_CODE of winioctl.h, for FILE_DEVICE_FILE_SYSTEM."""
    return 9 << 16 | access << 14 | function << 2 | method


def test_the_codes_are_those_of_the_headers() -> None:
    """winioctl.h: function number, METHOD_BUFFERED is 0 and METHOD_NEITHER 3, FILE_READ_DATA 1, FILE_WRITE_DATA 2."""
    assert control_code(51, 3, 1) == QUERY_ALLOCATED_RANGES
    assert control_code(159, 0, 0) == GET_INTEGRITY_INFORMATION
    assert control_code(209, 0, 2) == DUPLICATE_EXTENTS_TO_FILE


def test_the_structures_lie_as_64_bit_windows_has_them() -> None:
    packed = DUPLICATE_EXTENTS.pack(0x1122334455667788, 0x10000, 0x20000, 0x30000)
    assert packed.hex(" ", 8) == "8877665544332211 0000010000000000 0000020000000000 0000030000000000"
    assert ALLOCATED_RANGE.pack(1, 2).hex(" ", 8) == "0100000000000000 0200000000000000"
    answer = bytes.fromhex("0200 0000 01000000 00100000 00000100")
    assert INTEGRITY_INFORMATION.unpack(answer) == (2, 0, 1, 4096, 65536)


def volume(allocated: list[tuple[int, int]], at_once: int) -> Query:
    """A file system that answers with at most so many ranges a call; whole ones, as NTFS does."""

    def query(question: bytes) -> tuple[bytes, bool]:
        offset, length = ALLOCATED_RANGE.unpack(question)
        found = [one for one in allocated if one[0] < offset + length and sum(one) > offset]
        return b"".join(ALLOCATED_RANGE.pack(*one) for one in found[:at_once]), len(found) > at_once

    return query


@given(
    gaps=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), max_size=12),
    at_once=st.integers(1, 4),
    offset=st.integers(0, 40),
    length=st.integers(0, 60),
)
def test_ranges_are_asked_for_until_there_are_no_more(
    gaps: list[tuple[int, int]], at_once: int, offset: int, length: int
) -> None:
    """However few fit into one answer, and wherever the question begins and ends."""
    allocated, end = [], 0
    for gap, count in gaps:
        allocated.append((end + gap, count))
        end += gap + count
    found = list(allocated_ranges(volume(allocated, at_once), offset, offset + length))
    inside = {at for start, count in allocated for at in range(start, start + count)}
    assert [at for start, count in found for at in range(start, start + count)] == sorted(
        inside & set(range(offset, offset + length))
    )


def test_an_answer_that_leads_nowhere_means_that_all_may_be_data() -> None:
    assert list(allocated_ranges(lambda _: (b"", True), 100, 300)) == [(100, 200)]
    assert list(allocated_ranges(lambda _: (b"", False), 100, 300)) == []


def test_whole_clusters_are_shared_and_the_rest_is_left() -> None:
    assert list(clone_steps(8 * KiB, 64 * KiB, 10 * KiB, 4 * KiB)) == [(8 * KiB, 64 * KiB, 8 * KiB)]
    assert list(clone_steps(0, 0, 4095, 4096)) == []


def test_offsets_inside_a_cluster_cannot_be_shared() -> None:
    for offset, target in ((512, 0), (0, 512), (4 * KiB, 64 * KiB)):
        assert list(clone_steps(offset, target, MiB, 64 * KiB)) == []
    assert list(clone_steps(0, 0, MiB, 0)) == []


def test_no_call_shares_4_gib_or_more() -> None:
    steps = list(clone_steps(MiB, 0, 9 * GiB, 64 * KiB))
    assert [count for _, _, count in steps] == [CLONE_STEP] * 4 + [GiB]
    assert steps[-1] == (8 * GiB + MiB, 8 * GiB, GiB)
