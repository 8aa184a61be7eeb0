"""The log of a VHDX: replayed in memory as it would be on disk, or refused; nothing of it is believed unchecked."""

from __future__ import annotations

import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.vhdx_images import LOG_ID
from fixtures.vhdx_logs import LOG_SECTOR, Data, Descriptor, Entry, Run, Zeros, log, rewrite
from imagekit.errors import CorruptImage, UnsupportedFeature
from imagekit.formats.files import MemoryFile
from imagekit.formats.vhdx_header import MAX_FILE, Header
from imagekit.formats.vhdx_log import MAX_LOG, EntryHeader, ReplayedFile, replay
from tests.disks import noise, text
from tests.timing import assert_within

KiB, MiB, TiB = 1 << 10, 1 << 20, 1 << 40
SIZE = 3 * MiB
TARGETS = 2 * MiB
"""Behind the headers and the log: what the logs of these tests write to."""

HEADER = Header(1, bytes(16), bytes(16), LOG_ID, log_offset=MiB, log_length=MiB)
GROUND = noise(MiB, 9)
PAGE = text(LOG_SECTOR, 1)


def file_with(*runs: Run, size: int = SIZE) -> MemoryFile:
    """1 MiB for headers, 1 MiB of log, and noise that the log is about."""
    data = bytearray(2 * MiB) + GROUND
    data[MiB : 2 * MiB] = log(*runs, file_size=size)
    return MemoryFile(data[:size], "image.vhdx")


def replayed(*runs: Run, size: int = SIZE) -> ReplayedFile:
    return replay(file_with(*runs, size=size), HEADER)


def entry(sequence: int, *descriptors: Descriptor, tail: int | None = None) -> Entry:
    return Entry(sequence=sequence, descriptors=descriptors, tail=tail)


def pages(file: ReplayedFile) -> list[int]:
    """Which pages of the targets are written, by number."""
    return [(at - TARGETS) // LOG_SECTOR for at in file.pages]


def page(number: int, data: bytes = PAGE) -> Data:
    return Data(offset=TARGETS + number * LOG_SECTOR, data=data)


def zeros(first: int, count: int) -> Zeros:
    return Zeros(offset=TARGETS + first * LOG_SECTOR, length=count * LOG_SECTOR)


# --- replay ----------------------------------------------------------------------------------------------------

STEPS = st.one_of(
    st.builds(page, st.integers(0, 15), st.sampled_from([PAGE, noise(LOG_SECTOR), bytes(LOG_SECTOR)])),
    st.builds(zeros, st.integers(0, 15), st.integers(0, 8)),
)


@settings(max_examples=40)
@given(st.lists(st.lists(STEPS, max_size=6), min_size=1, max_size=5), st.integers(0, 255), st.data())
def test_a_file_reads_as_if_every_entry_had_been_written_to_it_in_order(
    entries: list[list[Descriptor]], start: int, data: st.DataObject
) -> None:
    """Wherever in the ring the entries lie, also around its end."""
    run = Run(start * LOG_SECTOR, [entry(7 + at, *steps) for at, steps in enumerate(entries)])
    raw = file_with(run)
    expected, before = bytearray(raw.data), bytes(raw.data)
    for step in (step for steps in entries for step in steps):
        length = LOG_SECTOR if isinstance(step, Data) else step.length
        expected[step.offset : step.offset + length] = step.data if isinstance(step, Data) else bytes(length)
    file = replay(raw, HEADER)
    assert (file.size, file.entries, file.fileno()) == (SIZE, len(entries), None)
    assert file.pread(0, SIZE) == expected
    for _ in range(5):
        at, count = data.draw(st.integers(TARGETS - 5, SIZE + 5)), data.draw(st.integers(0, 20000))
        assert file.pread(at, count) == expected[at : at + count]
    assert bytes(raw.data) == before
    where = 0
    for at, count, mapped in file.pieces(0, SIZE):
        assert (at, count > 0) == (where, True)
        assert not mapped or raw.pread(at, count) == expected[at : at + count]
        where = at + count
    assert where == SIZE


@pytest.mark.parametrize("count", [0, 1, 125, 126, 127, 128, 254, 255])
def test_descriptors_fill_as_many_sectors_as_they_need(count: int) -> None:
    """126 beside the entry's header, 128 in each further sector; data sectors come behind all of them."""
    steps = [page(at, bytes([at]) * LOG_SECTOR) for at in range(count - count // 2)]
    more = [zeros(200 + at, 1) for at in range(count // 2)]
    file = replayed(
        Run(0, [entry(1, *(one for pair in zip(steps, more, strict=False) for one in pair), *steps[-1:])])
    )
    assert len(file.pages) == len(steps)
    for at in range(len(steps)):
        assert file.pread(TARGETS + at * LOG_SECTOR, LOG_SECTOR) == bytes([at]) * LOG_SECTOR


@pytest.mark.parametrize("data", [bytes(LOG_SECTOR), b"\xff" * LOG_SECTOR, bytes(8) + PAGE[12:] + bytes(4)])
def test_the_bytes_that_lie_in_the_descriptor_come_back(data: bytes) -> None:
    """The first eight and the last four, also when they are zeros or look like an end of text."""
    assert replayed(Run(0, [entry(1, page(3, data))])).pread(TARGETS + 3 * LOG_SECTOR, LOG_SECTOR) == data


@pytest.mark.parametrize("start", [MiB - LOG_SECTOR, MiB - 2 * LOG_SECTOR])
def test_an_entry_may_lie_around_the_rings_end(start: int) -> None:
    assert pages(replayed(Run(start, [entry(1, page(0), page(1)), entry(2, page(2))]))) == [0, 1, 2]


def test_only_what_the_last_entry_still_needs_is_replayed() -> None:
    """The tail says where that begins; what lies before it was written back."""
    run = Run(0, [entry(1, page(1)), entry(2, page(2)), entry(3, page(3), tail=2 * LOG_SECTOR)])
    assert pages(replayed(run)) == [2, 3]
    assert replayed(run).entries == 2


def test_the_sequence_that_ends_with_the_highest_number_counts() -> None:
    older, newer = Run(0, [entry(1, page(1)), entry(2, page(2))]), Run(256 * KiB, [entry(9, page(9))])
    assert pages(replayed(older, newer)) == [9]
    assert pages(replayed(newer, older)) == [9]


@pytest.mark.parametrize("step", [0, 2, 5])
def test_a_sequence_goes_up_by_one(step: int) -> None:
    """What follows with another number belongs to another time; each stands for itself."""
    run = Run(0, [entry(5, page(1), tail=0), entry(5 + step, page(2), tail=2 * LOG_SECTOR)])
    if step == 0:
        with pytest.raises(CorruptImage, match="two sequences in the log end with number 5"):
            replayed(run)
    else:
        assert pages(replayed(run)) == [2]


def test_an_entry_that_was_not_written_to_its_end_was_never_written() -> None:
    good, torn = entry(1, page(1)), Entry(sequence=2, descriptors=[page(2)], crc_off_by=1)
    assert pages(replayed(Run(0, [good, torn]))) == [1]


def test_a_sequence_whose_tail_lies_elsewhere_is_none() -> None:
    """Not even the part of it before its last entry."""
    good, bad = entry(1, page(1)), entry(2, page(2), tail=64 * KiB)
    with pytest.raises(CorruptImage, match="no valid sequence"):
        replayed(Run(0, [good, bad]))
    other = Run(512 * KiB, [entry(1, page(3))])
    assert pages(replayed(Run(0, [good, bad]), other)) == [3]


def test_an_entry_may_fill_the_whole_ring() -> None:
    file = replayed(Run(0, [entry(1, *rewrite(TARGETS, noise(1016 * KiB - 8 * KiB, 3)))]))
    assert file.pread(TARGETS, 1008 * KiB) == noise(1008 * KiB, 3)


@pytest.mark.parametrize(
    "broken",
    [
        Entry(sequence=3, descriptors=[page(1)], crc_off_by=1),
        Entry(sequence=3, descriptors=[page(1)], log_guid=bytes(16)),
        Entry(sequence=3, descriptors=[page(1)], signature=b"logE"),
        Entry(sequence=0, descriptors=[page(1)]),
        Entry(sequence=3, descriptors=[page(1)], length=0),
        Entry(sequence=3, descriptors=[page(1)], length=2 * LOG_SECTOR + 512),
        Entry(sequence=3, descriptors=[page(1)], length=0xFFFFF000),
        Entry(sequence=3, descriptors=[page(1)], length=LOG_SECTOR),
        Entry(sequence=3, descriptors=[page(1)], count=0xFFFFFFFF),
        Entry(sequence=3, descriptors=[page(1)], count=2),
        Entry(sequence=3, descriptors=[page(1)], count=0),
        Entry(sequence=3, descriptors=[page(1)], tail=512),
        Entry(sequence=3, descriptors=[page(1)], tail=MiB),
        Entry(sequence=3, descriptors=[page(1)], tail=0xFFFFF000),
        entry(3, Data(offset=TARGETS, data=PAGE, sequence=4)),
        entry(3, Data(offset=TARGETS, data=PAGE, signature=b"desk")),
        entry(3, Data(offset=TARGETS, data=PAGE, sector_sequence=4)),
        entry(3, Data(offset=TARGETS, data=PAGE, sector_sequence=3 + (1 << 32))),
        entry(3, Data(offset=TARGETS, data=PAGE, sector_signature=b"date")),
        entry(3, Zeros(offset=TARGETS, sequence=2)),
    ],
    ids=[
        "checksum",
        "guid",
        "signature",
        "sequence",
        "no-length",
        "odd-length",
        "long",
        "short",
        "count",
        "more",
        "fewer",
        "odd-tail",
        "tail",
        "far-tail",
        "number",
        "descriptor",
        "sector",
        "sector-high",
        "data",
        "zero",
    ],
)
def test_an_entry_that_is_not_valid_does_not_count(broken: Entry) -> None:
    with pytest.raises(CorruptImage, match="its log holds no valid sequence") as caught:
        replayed(Run(0, [broken]))
    assert caught.value.hint
    assert (caught.value.path, caught.value.offset) == ("image.vhdx", MiB)
    assert pages(replayed(Run(0, [broken]), Run(512 * KiB, [entry(1, page(7))]))) == [7]


def test_a_log_without_anything_in_it_is_not_an_empty_log() -> None:
    with pytest.raises(CorruptImage, match="was not closed, and its log holds no valid sequence"):
        replayed()


# --- what a log may not do -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step",
    [
        Data(offset=0, data=PAGE),
        Data(offset=64 * KiB, data=PAGE),
        Data(offset=188 * KiB, data=PAGE),
        Data(offset=MiB, data=PAGE),
        Data(offset=2 * MiB - LOG_SECTOR, data=PAGE),
        Data(offset=TARGETS + 512, data=PAGE),
        Data(offset=MAX_FILE, data=PAGE),
        Data(offset=(1 << 64) - LOG_SECTOR, data=PAGE),
        Zeros(offset=0, length=LOG_SECTOR),
        Zeros(offset=192 * KiB, length=MiB),
        Zeros(offset=TARGETS, length=512),
        Zeros(offset=TARGETS, length=MAX_FILE),
        Zeros(offset=TARGETS, length=(1 << 64) - LOG_SECTOR),
        Zeros(offset=(1 << 64) - LOG_SECTOR, length=2 * LOG_SECTOR),
        Zeros(offset=(1 << 63), length=1 << 63),
    ],
    ids=[
        "start",
        "header",
        "second-header",
        "log",
        "log-end",
        "odd",
        "beyond",
        "far",
        "zero-start",
        "zero-log",
        "zero-odd",
        "zero-long",
        "zero-longer",
        "zero-far",
        "zero-wraps",
    ],
)
def test_a_log_that_writes_where_it_may_not_is_damage(step: Descriptor) -> None:
    with pytest.raises(CorruptImage, match="where a log may not change anything"):
        replayed(Run(0, [entry(1, page(1), step)]))


def test_region_tables_are_among_what_a_log_may_write() -> None:
    file = replayed(Run(0, [entry(1, Data(offset=192 * KiB, data=PAGE), Data(offset=MiB - LOG_SECTOR, data=PAGE))]))
    assert list(file.pages) == [192 * KiB, MiB - LOG_SECTOR]


def test_a_file_that_is_shorter_than_it_was_is_damage() -> None:
    with pytest.raises(CorruptImage, match=f"has {SIZE} bytes; it had {SIZE + 1} when its log was written"):
        replayed(Run(0, [Entry(sequence=1, flushed=SIZE + 1)]))
    assert replayed(Run(0, [Entry(sequence=1, flushed=SIZE)])).size == SIZE


@pytest.mark.parametrize(
    ("last", "size"),
    [(0, SIZE), (SIZE, SIZE), (SIZE + 1, 4 * MiB), (8 * MiB, 8 * MiB), (MAX_FILE, MAX_FILE)],
    ids=["nothing said", "the same", "a byte more", "more", "the most"],
)
def test_a_file_is_as_long_as_its_log_makes_it(last: int, size: int) -> None:
    """What is new reads as zero, and the file itself does not hold it."""
    file = replayed(Run(0, [Entry(sequence=1, last=last)]))
    assert file.size == size
    assert file.pread(SIZE - 4, 8) == GROUND[-4:] + bytes(min(4, size - SIZE))
    assert file.pread(size - 4, 8) == (GROUND[-4:] if size == SIZE else bytes(4))
    mapped = [(SIZE - 4, 4, True), (SIZE, 4, False)] if size > SIZE else [(SIZE - 4, 4, True)]
    assert list(file.pieces(SIZE - 4, min(8, size - SIZE + 4))) == mapped


def test_a_file_that_would_be_longer_than_any_is_damage() -> None:
    with pytest.raises(CorruptImage, match="more than any VHDX needs"):
        replayed(Run(0, [Entry(sequence=1, last=MAX_FILE + 1)]))


def test_a_page_behind_the_end_makes_the_file_longer() -> None:
    file = replayed(Run(0, [entry(1, Data(offset=SIZE + MiB, data=PAGE))]))
    assert file.size == SIZE + MiB + LOG_SECTOR
    assert file.pread(SIZE + MiB - 4, LOG_SECTOR + 8) == bytes(4) + PAGE


def test_zeros_behind_the_end_change_nothing() -> None:
    file = replayed(Run(0, [entry(1, Zeros(offset=SIZE, length=MiB), Zeros(offset=SIZE - MiB, length=2 * MiB))]))
    assert file.size == SIZE
    assert file.pread(SIZE - MiB, 2 * MiB) == bytes(MiB)


# --- bounds ----------------------------------------------------------------------------------------------------


def test_zeros_without_end_take_no_memory() -> None:
    """A range of 100 TiB is two numbers."""
    raw = file_with(Run(0, [Entry(sequence=1, descriptors=[Zeros(offset=TARGETS, length=100 * TiB)], last=99 * TiB)]))
    tracemalloc.start()
    file = replay(raw, HEADER)
    assert file.pread(50 * TiB, 4 * KiB) == bytes(4 * KiB)
    assert file.pread(TARGETS - 4, 8) == bytes(8)
    assert list(file.pieces(0, 99 * TiB)) == [(0, TARGETS, True), (TARGETS, 99 * TiB - TARGETS, False)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * MiB


def test_a_log_is_read_once_however_many_entries_claim_all_of_it() -> None:
    """256 sectors that each begin an entry as long as the ring: 256 MiB to be summed, if anybody believed them."""
    sector = EntryHeader(MiB, 0, 1, 0, LOG_ID, 0, 0).pack().ljust(LOG_SECTOR, b"\0")
    data = bytes(MiB) + sector * 256 + bytes(MiB)

    def looked() -> float:
        begin = time.perf_counter()
        with pytest.raises(CorruptImage, match="no valid sequence"):
            replay(MemoryFile(data), HEADER)
        return time.perf_counter() - begin

    assert_within(1, looked)


def test_a_ring_full_of_small_entries_is_one_sequence() -> None:
    run = Run(0, [entry(1 + at, zeros(at, 1), tail=0) for at in range(256)])
    file = replayed(run)
    assert file.entries == 256
    assert file.pread(TARGETS, MiB) == bytes(MiB)


def test_a_log_too_large_for_memory_is_not_replayed() -> None:
    header = Header(1, bytes(16), bytes(16), LOG_ID, log_offset=MiB, log_length=MAX_LOG + MiB)
    with pytest.raises(UnsupportedFeature, match=f"imagekit replays up to {MAX_LOG}"):
        replay(MemoryFile(b""), header)


def test_a_log_that_is_cut_short_is_damage() -> None:
    with pytest.raises(CorruptImage, match="the log is cut short"):
        replay(MemoryFile(bytes(MiB + 4096)), HEADER)


@settings(max_examples=50)
@given(st.integers(0, 4 * LOG_SECTOR - 1), st.integers(1, 255))
def test_a_byte_that_flips_within_an_entry_makes_it_none_and_nothing_else(at: int, flip: int) -> None:
    raw = file_with(Run(0, [entry(1, page(1)), entry(2, page(2))]))
    raw.data[MiB + at] ^= flip
    if at >= 2 * LOG_SECTOR:
        assert pages(replay(raw, HEADER)) == [1]
    else:
        with pytest.raises(CorruptImage, match="no valid sequence"):
            replay(raw, HEADER)


# --- the file over which it lies -------------------------------------------------------------------------------


def test_a_replayed_file_cannot_be_written() -> None:
    file = replayed(Run(0, [entry(1)]))
    with pytest.raises(UnsupportedFeature, match="in memory only"):
        file.pwrite(0, b"x")
    with pytest.raises(UnsupportedFeature, match="in memory only"):
        file.truncate(0)


def test_a_replayed_file_may_hold_data_anywhere() -> None:
    file = replayed(Run(0, [entry(1)]))
    assert list(file.data_ranges(MiB, 100 * MiB)) == [(MiB, 2 * MiB)]
    assert list(file.data_ranges(SIZE, 1)) == []
    assert file.allocated_size == SIZE


@given(
    st.integers(0, (1 << 32) - 1),
    st.integers(0, (1 << 64) - 1),
    st.binary(min_size=16, max_size=16),
    st.integers(0, 9),
)
def test_an_entrys_header_packs_to_what_it_is_parsed_from(small: int, large: int, guid: bytes, count: int) -> None:
    header = EntryHeader(small, small ^ 1, large, count, guid, large ^ 1, large ^ 2, small ^ 2)
    assert EntryHeader.parse(header.pack()) == header
