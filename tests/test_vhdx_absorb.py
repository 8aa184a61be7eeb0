"""A child is merged into its parent: on top of it the child reads as before, wherever that is interrupted."""

from __future__ import annotations

import dataclasses
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fixtures import vhdx_images as made
from fixtures.vhdx_images import FULL, PARTIAL, ZERO, Block, Recipe
from imagekit import changes
from imagekit.errors import CorruptImage, UnsupportedFeature
from imagekit.formats import vhdx_absorb
from imagekit.formats.base import Write
from imagekit.formats.files import MemoryFile
from imagekit.formats.vhdx import FORMAT
from imagekit.formats.vhdx_image import VhdxImage
from tests.disks import content, noise
from tests.vhdx_disks import (
    CHILD,
    DISK,
    GRANDPARENT,
    KINDS,
    UNKNOWN_ID,
    WIDE,
    MiB,
    TiB,
    assert_interruptible,
    assert_sound,
    carried_out,
    file_of,
    grown,
    opened,
    prefixes,
    raw_disk,
    read,
    recipes,
    wide,
)


@st.composite
def families(draw: st.DrawFn) -> tuple[Recipe, Recipe]:
    """A parent of any kind and a child at least as large."""
    sector = draw(st.sampled_from([512, 4096]))
    parent, child = draw(recipes(sector=sector)), draw(recipes(sector=sector, kinds=("differencing",)))
    size = max(child.size, parent.size)
    return parent, dataclasses.replace(child, size=size, data_write=b"c" * 16, entries={})


def sectors_of(disks: tuple[bytes, ...], disk: bytes) -> bool:
    """Whether every sector of the disk is that of one of the others, all as long."""
    return all(disk[at : at + 512] in {one[at : at + 512] for one in disks} for at in range(0, len(disk), 512))


def assert_absorbed(parent: Recipe, child: Recipe) -> MemoryFile:
    """The child on top of the parent reads as before, wherever the merge stops; the parent alone at its end."""
    below = made.content(parent, GRANDPARENT)
    expected = made.content(child, below)
    child_file = file_of(child)

    def allowed(image: VhdxImage) -> bool:
        top = FORMAT.open(child_file, resolver=lambda _: image)
        mixed = grown(content(image), child.size)
        return content(top) == expected and sectors_of((grown(below, child.size), expected), mixed)

    file = assert_interruptible(
        parent, lambda file: FORMAT.absorb(file, opened(child_file, below)), allowed, opened(child_file, below)
    )
    image = assert_sound(file)
    assert read(file) == expected
    assert image.identity != parent.data_write
    return file


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(families())
def test_a_merged_parent_reads_as_its_child_did(family: tuple[Recipe, Recipe]) -> None:
    assert_absorbed(*family)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_of_many_batches_is_sound_between_them(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vhdx_absorb, "BATCH_STEPS", 1)
    parent = Recipe(
        size=2 * MiB + 512,
        blocks={number: Block(data=noise(MiB, number)) for number in ((0, 1, 2) if kind == "fixed" else (0, 2))},
        fixed=kind == "fixed",
        parent=made.linked_to(UNKNOWN_ID) if kind == "differencing" else None,
    )
    some = Block(state=PARTIAL, data=noise(MiB, 10), present=frozenset({1, 2, 2047}))
    child = Recipe(
        size=4 * MiB, blocks={0: some, 1: some, 2: Block(state=ZERO), 3: some}, parent=made.linked_to(b"p" * 16)
    )
    assert_absorbed(parent, child)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state", [FULL, PARTIAL, ZERO, None], ids=["full", "partial", "zero", "absent"])
def test_blocks_of_the_child_may_be_smaller(kind: str, state: int | None) -> None:
    """Then zeros, too, cover a part of a block only."""
    parent = Recipe(
        size=4 * MiB,
        block_size=2 * MiB,
        blocks={0: Block(state=state, data=noise(2 * MiB, 1), present=frozenset(range(1000, 3000)))} if state else {},
        fixed=kind == "fixed",
        parent=made.linked_to(UNKNOWN_ID) if kind == "differencing" else None,
    )
    some = Block(state=PARTIAL, data=noise(MiB, 2), present=frozenset(range(10, 900)))
    child = Recipe(
        size=5 * MiB,
        blocks={0: some, 1: Block(state=ZERO), 3: Block(state=ZERO), 4: some},
        parent=made.linked_to(b"p" * 16),
    )
    if state != PARTIAL or kind == "differencing":
        assert_absorbed(parent, child)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_over_a_whole_block_take_it_away(kind: str) -> None:
    parent = Recipe(
        size=2 * MiB,
        blocks={0: Block(data=noise(MiB, 1)), 1: Block(data=noise(MiB, 2))},
        fixed=kind == "fixed",
        parent=made.linked_to(UNKNOWN_ID) if kind == "differencing" else None,
    )
    child = Recipe(size=2 * MiB, blocks={0: Block(state=ZERO)}, parent=made.linked_to(b"p" * 16))
    file = assert_absorbed(parent, child)
    states = {"dynamic": 0, "fixed": FULL, "differencing": ZERO}
    assert file.pread(3 * MiB, 1)[0] & 7 == states[kind]


def test_a_block_that_the_child_covers_whole_needs_no_bits() -> None:
    parent = Recipe(
        size=2 * MiB,
        blocks={0: Block(state=PARTIAL, data=noise(MiB, 1), present=frozenset({1}))},
        parent=made.linked_to(UNKNOWN_ID),
    )
    child = Recipe(
        size=2 * MiB,
        blocks={0: Block(data=noise(MiB, 2)), 1: Block(data=noise(MiB, 3))},
        parent=made.linked_to(b"p" * 16),
    )
    file = assert_absorbed(parent, child)
    assert [file.pread(3 * MiB + at, 1)[0] & 7 for at in (0, 8)] == [FULL, FULL]


@pytest.mark.parametrize("other", [True, False], ids=["bitmap", "no bitmap"])
@pytest.mark.parametrize("state", [FULL, PARTIAL, ZERO, None], ids=["full", "partial", "zero", "absent"])
def test_a_last_block_grows_and_takes_what_the_child_has_in_it(state: int | None, other: bool) -> None:
    """The file's own parent is larger than the file was: it must not show where the child shows zeros."""
    some = frozenset(range(5, 2048, 11))
    last = {2: Block(state=state, data=noise(MiB, 2), present=some if state == PARTIAL else None)} if state else {}
    first = {0: Block(state=PARTIAL, data=noise(MiB, 1), present=some)} if other else {}
    parent = Recipe(size=2 * MiB + 3 * 4096, blocks=last | first, parent=made.linked_to(UNKNOWN_ID))
    own = Block(state=PARTIAL, data=noise(MiB, 3), present=frozenset({0, 7, 23, 24, 25, 31, 1000}))
    child = Recipe(size=4 * MiB + 512, blocks={2: own, 3: own}, parent=made.linked_to(b"p" * 16))
    assert_absorbed(parent, child)


def test_a_fixed_disk_that_grows_takes_the_childs_data_in_its_own_blocks() -> None:
    parent = Recipe(size=MiB, blocks={0: Block(data=noise(MiB, 1))}, fixed=True)
    child = Recipe(size=4 * MiB, blocks={2: Block(data=noise(MiB, 2))}, parent=made.linked_to(b"p" * 16))
    file = assert_absorbed(parent, child)
    assert file.size == 8 * MiB
    assert [(one.data, one.offset) for one in FORMAT.open(file).extents()] == [(True, 4 * MiB)]


def test_a_child_can_be_open_on_the_file_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is in a merge: only what the child holds itself is read, however the file below looks by then."""
    monkeypatch.setattr(vhdx_absorb, "BATCH_STEPS", 1)
    parent = Recipe(size=4 * MiB, blocks={number: Block(data=noise(MiB, number)) for number in (3, 1)})
    sectors = frozenset(range(0, 2048, 5))
    blocks = {number: Block(state=PARTIAL, data=noise(MiB, 9), present=sectors) for number in range(5)}
    child = Recipe(size=5 * MiB, blocks=blocks, parent=made.linked_to(b"p" * 16))
    file = file_of(parent)
    image = FORMAT.open(file_of(child), resolver=lambda _: FORMAT.open(file))
    changes.apply(FORMAT.absorb(file, image), file, image=image)
    assert content(assert_sound(file)) == made.content(child, made.content(parent))


def test_a_child_larger_than_the_bat_has_room_for_moves_it() -> None:
    parent = wide("differencing")
    child = dataclasses.replace(
        wide("differencing", size=WIDE), blocks={200_000: Block(data=noise(MiB, 9)), 3: Block(state=ZERO)}, entries={}
    )
    child_file, below = file_of(child), made.content(parent, GRANDPARENT)
    file = file_of(parent)
    image = opened(child_file, below)
    steps = list(FORMAT.absorb(file, image))
    for number in prefixes(file, carried_out(steps, image)):
        top = FORMAT.open(child_file, resolver=lambda _: opened(file))
        assert top.pread(0, 6 * MiB) == grown(below[: 3 * MiB] + bytes(MiB) + below[4 * MiB :], 6 * MiB), number
    merged = assert_sound(file)
    assert merged.virtual_size == WIDE
    assert opened(file).pread(200_000 * MiB - 512, 1024) == bytes(512) + noise(MiB, 9)[:512]


def test_a_disk_without_a_parent_replaces_all_there_was() -> None:
    for kind in KINDS:
        recipe = Recipe(
            size=3 * MiB,
            blocks={number: Block(data=noise(MiB, number)) for number in range(3)},
            fixed=kind == "fixed",
            parent=made.linked_to(UNKNOWN_ID) if kind == "differencing" else None,
        )
        disk = Recipe(size=4 * MiB, blocks={1: Block(data=noise(MiB, 5))})
        file = file_of(recipe)
        image = FORMAT.open(file_of(disk))
        changes.apply(FORMAT.absorb(file, image), file, image=image)
        assert read(file) == made.content(disk)
        data = [extent.data for extent in assert_sound(file).extents()]
        assert data == ([True] if kind == "fixed" else [False, True, False])


def test_terabytes_of_zeros_are_taken_away_window_by_window() -> None:
    parent = Recipe(size=8 * TiB, blocks={8_000_000: Block(data=noise(MiB)), 5: Block(data=noise(MiB))})
    medium = Sparse(made.make(parent))
    image = FORMAT.open(MemoryFile(made.make(Recipe(size=8 * TiB, block_size=256 * MiB)).bytes()))
    tracemalloc.start()
    try:
        steps = list(FORMAT.absorb(medium, image))
        assert tracemalloc.get_traced_memory()[1] < 64 * MiB
    finally:
        tracemalloc.stop()
    cleared = [one for one in steps if isinstance(one, Write) and one.offset >= 3 * MiB]
    places = [3 * MiB + parent.entry_of(number) * 8 for number in (5, 8_000_000)]
    assert cleared == [Write(place, bytes(8)) for place in places]


class Sparse(MemoryFile):
    """A file that is mostly a hole."""

    def __init__(self, file: made.Made) -> None:
        super().__init__()
        self._made = file

    @property
    def size(self) -> int:
        return self._made.size

    def pread(self, offset: int, length: int) -> bytes:
        out = bytearray(max(0, min(length, self.size - offset)))
        self.pread_into(offset, memoryview(out))
        return bytes(out)

    def pread_into(self, offset: int, buffer: memoryview) -> int:
        buffer[:] = bytes(len(buffer))
        for at, data in self._made.pieces:
            start, stop = max(at, offset), min(at + len(data), offset + len(buffer))
            if start < stop:
                buffer[start - offset : stop - offset] = data[start - at : stop - at]
        return len(buffer)


def test_a_child_smaller_than_its_parent_is_refused() -> None:
    with pytest.raises(UnsupportedFeature, match=r"the child has 1024 bytes, its parent"):
        FORMAT.absorb(file_of(DISK), raw_disk(bytes(1024)))


def test_a_child_of_other_sectors_is_refused() -> None:
    with pytest.raises(UnsupportedFeature, match="logical sectors of 4096 bytes, its parent of 512"):
        FORMAT.absorb(file_of(DISK), FORMAT.open(file_of(Recipe(size=8 * MiB, sector=4096))))


def test_what_is_wrong_with_the_child_comes_before_the_first_step() -> None:
    child = dataclasses.replace(CHILD, entries={3: 2 * MiB | FULL})
    with pytest.raises(CorruptImage, match="block 3"):
        FORMAT.absorb(file_of(DISK), opened(file_of(child)))
