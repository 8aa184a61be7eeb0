"""The check of a whole VMDK: sound ones have no problem, and nothing lies on anything else."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixtures.vmdk_images import Recipe, cowd, descriptor, hosted, qemu_stream, sesparse, sesparse_entry, stream
from imagekit.errors import CorruptImage
from imagekit.formats import vmdk_check
from imagekit.formats.base import Problem
from imagekit.formats.files import MemoryFile
from imagekit.formats.vmdk import FORMAT
from tests.disks import noise, text
from tests.vmdk_recipes import recipes, small

GRAIN = 8 << 10
RECIPE = Recipe(size=7 * GRAIN, grains={2: noise(GRAIN, 1), 0: text(GRAIN, 2), 5: noise(GRAIN, 3)}, redundant=False)


def check(data: bytes) -> list[Problem]:
    return FORMAT.check(MemoryFile(data))


def codes(data: bytes) -> list[str]:
    return [problem.code for problem in check(data)]


@given(recipes())
def test_a_sound_image_has_no_problem(recipe: Recipe) -> None:
    assert [check(made.data) for made in (hosted(recipe), stream(recipe), qemu_stream(recipe))] == [[], [], []]


@pytest.mark.parametrize("maker", [cowd, sesparse], ids=["COWD", "SESparse"])
def test_a_part_of_a_disk_is_sound_too(maker: type) -> None:
    assert check(maker(Recipe(size=3 << 12, grains={1: noise(1 << 12)}, grain_sectors=8)).data) == []
    assert check(hosted(dataclasses.replace(RECIPE, text=b"")).data) == []


def test_two_grains_in_one_place_overlap() -> None:
    made = hosted(RECIPE)
    found = check(made.poked(made.entry(4), made.number(made.entry(5))).data)
    at = made.grains[5]
    assert found == [Problem("overlap", f"a grain at {at:#x} lies on what is there up to {at + GRAIN:#x}", at)]


def test_a_grain_may_not_begin_within_another() -> None:
    made = hosted(RECIPE)
    assert codes(made.poked(made.entry(0), made.number(made.entry(0)) - 1).data) == ["overlap"]


def test_two_directory_entries_for_one_table_overlap() -> None:
    recipe = small(9 * 512, {1: noise(512), 5: noise(512)}, redundant=False)
    made = hosted(recipe)
    assert set(codes(made.poked(made.directory + 4, made.number(made.directory)).data)) == {"overlap"}


def test_a_table_on_a_grain_overlaps() -> None:
    recipe = small(9 * 512, {1: noise(512), 5: bytes(512)}, redundant=False)
    made = hosted(recipe)
    assert codes(made.poked(made.directory + 8, made.grains[5] // 512).data) == ["overlap"]


def test_two_sesparse_grains_in_one_place_overlap() -> None:
    made = sesparse(Recipe(size=3 << 12, grains={0: noise(1 << 12)}), entries={2: sesparse_entry(3, 0)})
    assert codes(made.data) == ["overlap"]


def test_as_much_aliasing_as_a_table_can_hold_is_found_at_once() -> None:
    """Half a million grains in one place: the first ones settle it, and a hundred are put into words."""
    recipe = Recipe(size=512 * 1024 * 512, grains={0: noise(512)}, grain_sectors=1, redundant=False)
    made = hosted(recipe)
    first, last = made.tables[0], max(made.tables.values()) + 2048
    sector = (made.grains[0] // 512).to_bytes(4, "little")
    data = made.data[:first] + sector * ((last - first) // 4) + made.data[last:]
    found = check(data)
    assert [problem.code for problem in found] == ["overlap"] * 100 + ["more"]
    assert len(str(found)) < 20_000


@pytest.mark.parametrize(
    ("offset", "value", "width", "message"),
    [
        (0, 16, 8, "grain 2: its marker is of sector 16"),
        (8, 0, 4, "grain 2: a compressed grain of 0 bytes"),
        (8, 1 << 31, 4, "grain 2: a compressed grain of 2147483648 bytes"),
        (8, 16000, 4, "a grain at"),
    ],
)
def test_a_marker_that_is_not_its_grains_is_a_problem(offset: int, value: int, width: int, message: str) -> None:
    made = stream(RECIPE)
    found = check(made.poked(made.grains[2] + offset, value, width).data)
    assert {problem.code for problem in found} == {"overlap" if message == "a grain at" else "grain-marker"}
    assert found[0].message.startswith(message)


def test_a_compressed_grain_behind_the_end_is_a_problem() -> None:
    made = qemu_stream(RECIPE)
    found = check(made.data[:-512])
    assert [problem.message for problem in found] == ["grain 5: it ends behind the file's end"]


def test_what_is_odd_about_the_image_is_a_problem() -> None:
    assert codes(hosted(dataclasses.replace(RECIPE, unclean=1)).data) == ["unclean-shutdown"]
    other = descriptor("monolithicSparse", 'RW 8 SPARSE "a"')
    assert codes(hosted(dataclasses.replace(RECIPE, text=other)).data) == ["descriptor-size-differs"]
    delta = descriptor("monolithicSparse", f'RW {7 * GRAIN // 512} SPARSE "a"', parent="12345678")
    assert codes(hosted(dataclasses.replace(RECIPE, text=delta)).data) == []


def test_what_cannot_be_followed_ends_the_check() -> None:
    made = hosted(RECIPE)
    with pytest.raises(CorruptImage, match="grain 2 should lie at"):
        check(made.poked(made.entry(2), 1 << 20).data)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9), st.sampled_from("ab"))), st.integers(1, 5))
def test_claims_come_sorted_however_many_are_sorted_at_once(parts: list[tuple[int, int, str]], at_once: int) -> None:
    with mock.patch.object(vmdk_check, "SORTED_AT_ONCE", at_once):
        claims = vmdk_check._Claims()
        for part in parts:
            claims.add(*part)
        found = list(claims)
    assert found == sorted(((at, at + length, kind) for at, length, kind in parts), key=lambda one: one[0])
