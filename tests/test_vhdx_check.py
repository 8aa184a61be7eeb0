"""The check of a VHDX: what single entries say, and what lies on what."""

from __future__ import annotations

import dataclasses
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fixtures import vhdx_images as made
from fixtures.vhdx_images import FULL, PARTIAL, Block, Header, Recipe, RegionTable, linked_to, make
from fixtures.vhdx_logs import Entry, Run, with_log
from imagekit.formats import vhdx_check
from imagekit.formats.base import Problem
from imagekit.formats.files import LocalFile, MemoryFile
from imagekit.formats.vhdx import FORMAT
from tests.disks import noise
from tests.samples import sample

MiB, GiB, TiB = 1 << 20, 1 << 30, 1 << 40
BAT = 3 * MiB
PARENT = linked_to(made.DATA_WRITE)
BLOCKS = {2: Block(data=noise(MiB)), 0: Block(data=noise(MiB, 1))}
SOUND = Recipe(size=4 * MiB, blocks=BLOCKS)
CHILD = dataclasses.replace(
    SOUND, parent=PARENT, blocks={**BLOCKS, 1: Block(state=PARTIAL, data=noise(MiB), present=frozenset({3}))}
)


def problems(recipe: Recipe) -> list[Problem]:
    return FORMAT.check(MemoryFile(make(recipe).bytes()))


def codes(recipe: Recipe) -> list[str]:
    return [problem.code for problem in problems(recipe)]


@pytest.mark.parametrize(
    "recipe",
    [
        SOUND,
        dataclasses.replace(SOUND, fixed=True),
        dataclasses.replace(SOUND, layout="qemu"),
        dataclasses.replace(SOUND, layout="disk2vhd"),
        CHILD,
        dataclasses.replace(CHILD, bitmaps_last=True, sector=4096, block_size=2 * MiB, size=6 * MiB),
        Recipe(size=GiB),
        Recipe(size=GiB, parent=PARENT),
    ],
    ids=["dynamic", "fixed", "qemu", "disk2vhd", "child", "bitmaps last", "empty", "empty child"],
)
def test_nothing_is_wrong_with_a_sound_disk(recipe: Recipe) -> None:
    """Nor is a parent needed to know it."""
    assert problems(recipe) == []


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"headers": (Header(crc_off_by=1), Header())}, "header-invalid"),
        ({"headers": (Header(), Header(file_write=bytes(16)))}, "headers-differ"),
        ({"region_tables": (RegionTable(crc_off_by=1), RegionTable())}, "region-table-invalid"),
        (
            {"region_tables": (RegionTable(), RegionTable(regions=made.region_lines(SOUND)[::-1]))},
            "region-tables-differ",
        ),
    ],
)
def test_what_was_odd_when_it_was_opened_is_among_what_is_wrong(changes: dict[str, object], code: str) -> None:
    assert codes(dataclasses.replace(SOUND, **changes)) == [code]  # type: ignore[arg-type]


def test_a_log_that_was_not_written_back_is_among_what_is_wrong() -> None:
    assert codes(with_log(SOUND, Run(0, [Entry(sequence=1)]))) == ["log-replayed"]


# --- single entries --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "entry", "code", "message"),
    [
        (SOUND, 5, "old-state", "block 1 has the state 5"),
        (SOUND, 8 * MiB | 5, "old-state", "block 1 has the state 5"),
        (SOUND, 6 * MiB | PARTIAL, "partial-state", "block 1 is partially present, and there is no parent"),
        (SOUND, 4, "bat-entry", "block 1 has the state 4"),
        (SOUND, 99 * MiB | FULL, "bat-entry", "block 1 does not lie in the file"),
        (SOUND, MiB | FULL, "bat-entry", "block 1 does not lie in the file, or lies on one of its tables"),
    ],
    ids=["old", "old with a place", "partial", "no state", "behind the end", "on the log"],
)
def test_an_entry_that_is_not_as_it_should_be_is_found(recipe: Recipe, entry: int, code: str, message: str) -> None:
    recipe = dataclasses.replace(recipe, entries={1: entry}, file_size=8 * MiB)
    (found,) = problems(recipe)
    assert (found.code, found.offset, found.leak) == (code, BAT + 8, False)
    assert message in found.message


@pytest.mark.parametrize(
    ("entry", "codes_found"),
    [(0, ["no-bitmap"]), (7, ["bat-entry"]), (99 * MiB | 6, ["bat-entry"]), (MiB | 6, ["bat-entry"])],
    ids=["none", "no state", "behind the end", "on the log"],
)
def test_a_sector_bitmap_that_is_not_where_it_is_needed_is_found(entry: int, codes_found: list[str]) -> None:
    found = problems(dataclasses.replace(CHILD, entries={4096: entry}))
    assert [problem.code for problem in found] == codes_found
    assert found[0].offset == BAT + 4096 * 8


def test_entries_that_nobody_uses_are_not_looked_at() -> None:
    assert problems(dataclasses.replace(SOUND, entries={4: 7, 5: (1 << 64) - 1, 4096: 4})) == []
    assert problems(Recipe(size=20 * 256 * MiB, block_size=256 * MiB, entries={16: 7})) == []


def test_a_table_full_of_old_states_gives_a_list_that_can_be_read() -> None:
    assert codes(Recipe(size=GiB, entries=dict.fromkeys(range(1024), 5))) == ["old-state"] * 100


# --- overlaps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "overlapping"), [(0, True), (1, True), (2, False), (-1, True), (-2, False)])
def test_blocks_that_overlap_are_damage(step: int, *, overlapping: bool) -> None:
    """Two blocks on one place, on a part of it, and side by side."""
    entries = {0: 8 * MiB | FULL, 3: (8 + step) * MiB | FULL}
    found = problems(Recipe(size=8 * MiB, block_size=2 * MiB, entries=entries, file_size=12 * MiB))
    assert [problem.code for problem in found] == ["overlap"] * overlapping
    if overlapping:
        assert found[0].message in (
            f"block 0 and block 3 overlap at {(8 + max(step, 0)) * MiB:#x}",
            f"block 3 and block 0 overlap at {8 * MiB:#x}",
        )
        assert found[0].offset in (BAT, BAT + 3 * 8)


def test_a_block_on_a_sector_bitmap_is_damage() -> None:
    recipe = dataclasses.replace(CHILD, bitmaps_last=True)
    made_bytes = make(recipe).bytes()
    bitmap = int.from_bytes(made_bytes[BAT + 4096 * 8 :][:8], "little") & ~0xFFFFF
    (found,) = problems(dataclasses.replace(recipe, entries={3: bitmap | FULL}))
    assert found.code == "overlap"
    assert "block 3" in found.message
    assert "the sector bitmap of chunk 0" in found.message


def naive(places: list[int], size: int) -> int:
    """How many blocks begin before the end of one that begins before them, or at the same place."""
    count, reach = 0, 0
    for place in sorted(places):
        count += place < reach
        reach = max(reach, place + size)
    return count


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.integers(0, 63), st.integers(4, 90), max_size=40),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 3, 8, 100]),
)
def test_overlaps_are_the_same_however_much_of_the_file_is_looked_at_in_one_go(
    monkeypatch: pytest.MonkeyPatch, places: dict[int, int], block: int, window: int
) -> None:
    entries = {number: place * MiB | FULL for number, place in places.items()}
    recipe = Recipe(size=64 * block * MiB, block_size=block * MiB, entries=entries, file_size=96 * MiB)
    file = LazyFile(recipe)
    monkeypatch.setattr(vhdx_check, "FILE_WINDOW", window * MiB)
    found = FORMAT.check(file)
    assert {problem.code for problem in found} <= {"overlap"}
    assert len(found) == naive([place * MiB for place in places.values()], block * MiB)
    for problem in found:
        numbers = [int(word) for word in problem.message.split() if word.isdigit()]
        assert len(set(numbers)) == 2
        assert abs(places[numbers[0]] - places[numbers[1]]) < block


class LazyFile(MemoryFile):
    """A file of which only the first 4 MiB are anything."""

    def __init__(self, recipe: Recipe) -> None:
        whole = make(recipe)
        super().__init__(make(dataclasses.replace(recipe, file_size=4 * MiB)).bytes())
        self._size = whole.size

    @property
    def size(self) -> int:
        return self._size


def test_a_table_full_of_overlaps_gives_a_list_that_can_be_read(tmp_path: Path) -> None:
    """2 million blocks on one place, in bounded memory."""
    count = 1 << 21
    entries = (6 * MiB + 16 * MiB | FULL).to_bytes(8, "little") * (count + count // 4096)
    recipe = Recipe(size=count * MiB, patches=[(BAT, entries)], file_size=64 * MiB)
    with LocalFile.open_source(make(recipe).write(tmp_path / "disk.vhdx")) as file:
        tracemalloc.start()
        found = FORMAT.check(file)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert [problem.code for problem in found] == ["overlap"] * 100
    assert peak < 16 * MiB


@pytest.mark.parametrize(
    "name", ["fat-parent.vhdx", "fat-differential.vhdx", "ntfs-dynamic.vhdx", "ext2.vhdx", "test-disk2vhd.vhdx"]
)
def test_nothing_is_wrong_with_a_real_disk(name: str) -> None:
    """ext2.vhdx has junk in entries that nobody uses."""
    with LocalFile.open_source(sample(name)) as file:
        assert FORMAT.check(file) == []
