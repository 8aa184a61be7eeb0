"""Repairs of a qcow2: what is certain, in an order that can stop anywhere, and nothing else."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.qcow2_images import (
    COMPRESSED,
    COPIED,
    Cluster,
    Compressed,
    Plain,
    Qcow2,
    Recipe,
    Snapshot,
    Split,
    Zero,
    make,
    pack_refcounts,
)
from imagekit import changes
from imagekit.errors import ImagekitError, UnsupportedFeature
from imagekit.formats import qcow2_check
from imagekit.formats.base import Barrier, Change, Write
from imagekit.formats.files import MemoryFile
from imagekit.formats.qcow2 import FORMAT
from imagekit.formats.qcow2_refcounts import pack_refcounts as packed
from imagekit.formats.qcow2_refcounts import unpack_refcounts
from tests.disks import content, noise, qcow2_recipes, text

C = 512
CLUSTERS: dict[int, Cluster] = {
    0: Plain(noise(C)),
    1: Compressed(text(C)),
    2: Compressed(text(C, 1)),
    3: Zero(noise(C)),
    70: Plain(noise(C, 2)),
}
SOUND = make(Recipe(size=100 * C, clusters=CLUSTERS, cluster_bits=9))
DIRTY, CORRUPT = 1, 2


def repair(made: Qcow2) -> list[Change]:
    return FORMAT.repair(MemoryFile(made.data))


def repaired(made: Qcow2) -> Qcow2:
    file = MemoryFile(made.data)
    changes.apply(FORMAT.repair(file), file)
    return dataclasses.replace(made, data=bytes(file.data))


def codes(made: Qcow2) -> list[str]:
    return sorted({problem.code for problem in FORMAT.check(MemoryFile(made.data))})


def place(cluster: int, made: Qcow2 = SOUND) -> int:
    return made.number(made.l2_entry(cluster)) & 0x00FFFFFFFFFFFE00


def counted(made: Qcow2, cluster: int, count: int) -> Qcow2:
    """A copy whose refcount of a cluster of the file is another."""
    order = made.recipe.refcount_order
    block, inside = divmod(cluster, made.recipe.cluster_size * 8 >> order)
    at = made.refcount_blocks[block]
    if order >= 3:
        width = 1 << (order - 3)
        return made.poked(at + inside * width, count, width)
    byte, shift = divmod(inside << order, 8)
    mask = ((1 << (1 << order)) - 1) << shift
    return made.poked(at + byte, made.data[at + byte] & ~mask | count << shift, 1)


def flagged(made: Qcow2) -> list[int]:
    """Where the entries with a place of their own lie: those that have a copied flag, right or wrong."""
    out = [made.l1_entry(index) for index in made.l2]
    for number, cluster in made.recipe.clusters.items():
        at = made.l2_entry(number)
        if not isinstance(cluster, Compressed) and made.number(at) & 0x00FFFFFFFFFFFE00:
            out.append(at)
    return out


# --- any damage of the kinds that are certain -------------------------------------------------------------------


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    recipe = draw(qcow2_recipes(cluster_bits=(9, 12, 14)))
    if draw(st.booleans()) or not recipe.clusters:
        return recipe
    kept = draw(st.sets(st.sampled_from(sorted(recipe.clusters))))
    snapshot = Snapshot("1", "one", {number: recipe.clusters[number] for number in kept})
    return dataclasses.replace(recipe, snapshots=(snapshot,), refcount_order=max(3, recipe.refcount_order))


@st.composite
def mistaken(draw: st.DrawFn) -> tuple[Qcow2, Qcow2]:
    """A sound image, and the same with wrong refcounts and copied flags."""
    sound = made = make(draw(recipes()))
    total = len(made.data) // made.recipe.cluster_size
    most = min(5, (1 << (1 << made.recipe.refcount_order)) - 1)
    for cluster in draw(st.sets(st.integers(0, total - 1), max_size=6)):
        made = counted(made, cluster, draw(st.integers(0, most)))
    for at in draw(st.sets(st.sampled_from(flagged(made)), max_size=4)) if made.l2 else ():
        made = made.poked(at, made.number(at) ^ COPIED)
    return sound, made


@given(mistaken())
@settings(max_examples=150)
def test_wrong_refcounts_and_flags_become_what_they_were(images: tuple[Qcow2, Qcow2]) -> None:
    sound, made = images
    assert repaired(made).data == sound.data


@given(mistaken(), st.sampled_from([8, 64]))
@settings(max_examples=30)
def test_it_makes_no_difference_how_many_clusters_are_counted_at_once(
    images: tuple[Qcow2, Qcow2], window: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qcow2_check, "WINDOW", window)
        patch.setattr(qcow2_check, "MAX_WINDOWS", 1 << 20)
        assert repaired(images[1]).data == images[0].data


def dangers(made: Qcow2, sound: Qcow2) -> set[tuple[str, int]]:
    """What lets the next writer overwrite something that is in use."""
    total, order = len(made.data) // made.recipe.cluster_size, made.recipe.refcount_order
    found: set[tuple[str, int]] = set()
    for block, at in enumerate(made.refcount_blocks):
        one, other = (
            unpack_refcounts(image.data[at : at + made.recipe.cluster_size], order) for image in (made, sound)
        )
        first = block * len(one)
        low = [index for index, (now, then) in enumerate(zip(one, other, strict=True)) if now < then]
        found |= {("too low", first + index) for index in low if first + index < total}
    shared = [at for at in flagged(sound) if not sound.number(at) & COPIED]
    return found | {("written in place", at) for at in shared if made.number(at) & COPIED}


@given(mistaken())
@settings(max_examples=60)
def test_stopping_anywhere_leaves_the_same_disk_and_no_new_danger(images: tuple[Qcow2, Qcow2]) -> None:
    sound, made = images
    expected = made.recipe.content()
    before = dangers(made, sound)
    for change in repair(made):
        if isinstance(change, Write):
            end = change.offset + len(change.data)
            made = dataclasses.replace(made, data=made.data[: change.offset] + change.data + made.data[end:])
        after = dangers(made, sound)
        assert after <= before
        before = after
        assert content(FORMAT.open(MemoryFile(made.data))) == expected
    assert before == set()


def test_counts_rise_before_flags_go_before_counts_fall_before_flags_come() -> None:
    """Each kind is on the medium before the next."""
    low, high = place(0) // C, place(70) // C
    made = counted(counted(SOUND, low, 0), high, 3)
    made = made.poked(SOUND.l2_entry(3), SOUND.number(SOUND.l2_entry(3)) ^ COPIED).poked(72, DIRTY)
    steps = repair(made)
    assert [isinstance(step, Barrier) for step in steps] == [False, True] * 4
    places = [step.offset for step in steps if isinstance(step, Write)]
    block = SOUND.refcount_blocks[0]
    assert places == [block + low * 2, block + high * 2, SOUND.l2_entry(3), 72]
    assert repaired(made).data == SOUND.data


@pytest.mark.parametrize("order", range(7))
@given(counts=st.data())
@settings(max_examples=30)
def test_refcounts_of_every_width_pack_as_the_book_says(order: int, counts: st.DataObject) -> None:
    numbers = counts.draw(st.lists(st.integers(0, 2 ** (1 << order) - 1), min_size=64, max_size=64))
    book = pack_refcounts(numbers, order)
    assert packed(unpack_refcounts(book, order), order) == book


# --- one by one ------------------------------------------------------------------------------------------------


def test_a_sound_image_is_left_alone() -> None:
    assert repair(SOUND) == []
    assert repair(make(Recipe(size=0))) == []


def test_what_is_counted_and_not_used_is_freed() -> None:
    """The cluster's only entry is gone."""
    made = SOUND.poked(SOUND.l2_entry(70), 0)
    assert codes(made) == ["leak"]
    assert codes(repaired(made)) == []


def test_a_cluster_that_two_entries_lead_to_is_counted_twice_and_copied_before_it_is_written() -> None:
    made = SOUND.poked(SOUND.l2_entry(5), SOUND.number(SOUND.l2_entry(0)))
    assert codes(made) == ["refcount-low"]
    mended = repaired(made)
    assert codes(mended) == []
    assert not any(mended.number(mended.l2_entry(number)) & COPIED for number in (0, 5))


def test_where_a_refcount_block_is_missing_the_rest_is_mended_and_the_image_stays_dirty() -> None:
    made = make(Recipe(size=400 * C, clusters={at: Plain(noise(C, at)) for at in range(300)}, cluster_bits=9))
    assert len(made.refcount_blocks) == 2
    cluster = place(0, made) // C
    mended = repaired(counted(made, cluster, 9).poked(made.refcount_table + 8, 0).poked(72, DIRTY))
    assert mended.number(made.refcount_blocks[0] + cluster * 2, 2) == 1
    assert mended.number(72) == DIRTY
    assert "refcount-low" in codes(mended)


def test_a_count_that_does_not_fit_its_width_is_left() -> None:
    made = make(Recipe(size=100 * C, clusters=CLUSTERS | {5: Plain(noise(C))}, cluster_bits=9, refcount_order=0))
    twice = made.poked(made.l2_entry(5), made.number(made.l2_entry(0))).poked(72, DIRTY)
    mended = repaired(twice)
    assert codes(mended) == ["refcount-low"]
    assert mended.number(72) == DIRTY


DAMAGED = {
    "pointer outside": SOUND.poked(SOUND.l2_entry(70), 1 << 40 | COPIED),
    "L1 pointer outside": SOUND.poked(SOUND.l1_entry(1), 1 << 40 | COPIED),
    "reserved bits": SOUND.poked(SOUND.l2_entry(70), SOUND.number(SOUND.l2_entry(70)) | 2),
    "data on metadata": SOUND.poked(SOUND.l2_entry(70), SOUND.l1 | COPIED),
    "one table twice": SOUND.poked(SOUND.l1_entry(1), SOUND.number(SOUND.l1_entry(0))),
    "stream outside": SOUND.poked(SOUND.l2_entry(1), COMPRESSED | 1 << 40),
    "no refcount table": SOUND.poked(48, 1 << 40),
}


@pytest.mark.parametrize("made", DAMAGED.values(), ids=DAMAGED)
def test_where_the_tables_may_not_say_all_that_is_used_nothing_is_freed(made: Qcow2) -> None:
    """The leak is what the lost pointer led to."""
    assert [code for code in codes(made) if code not in ("leak", "refcount-low", "copied-flag")]
    assert repair(counted(made, place(0) // C, 3).poked(72, DIRTY)) == []


def test_the_dirty_bit_alone_is_cleared() -> None:
    assert repair(SOUND.poked(72, DIRTY)) == [Write(72, bytes(8)), Barrier()]


def test_the_mark_that_an_image_is_corrupt_stays() -> None:
    """Refcounts are what the tables say; whether guest data was lost before, they do not say."""
    made = counted(SOUND, place(0) // C, 2).poked(72, DIRTY | CORRUPT)
    mended = repaired(made)
    assert mended.number(72) == CORRUPT
    assert codes(mended) == ["corrupt-bit"]


def test_features_to_be_kept_in_step_that_are_not_known_are_cleared_before_anything_else() -> None:
    made = counted(SOUND, place(0) // C, 2).poked(88, 1 << 9 | 3)
    first, second, *_ = repair(made)
    assert (first, second) == (Write(88, (3).to_bytes(8, "big")), Barrier())
    assert repair(SOUND.poked(88, 1 << 9)) == []


def test_features_that_are_not_known_cannot_be_repaired() -> None:
    with pytest.raises(UnsupportedFeature, match="unknown incompatible feature bits"):
        repair(SOUND.poked(72, 1 << 40))


def test_neighbouring_entries_are_mended_by_one_write() -> None:
    clusters = {number: Plain(noise(4096, number)) for number in range(100)}
    sound = make(Recipe(size=100 * 4096, clusters=clusters, cluster_bits=12))
    made = sound
    for number in (*range(20, 60), 80):
        made = made.poked(made.l2_entry(number), made.number(made.l2_entry(number)) ^ COPIED)
    writes = [step for step in repair(made) if isinstance(step, Write)]
    assert [(write.offset, len(write.data)) for write in writes] == [
        (made.l2_entry(20), 40 * 8),
        (made.l2_entry(80), 8),
    ]


def test_with_extended_entries_the_bitmaps_between_the_flags_are_not_touched() -> None:
    parts = (noise(512), None) * 16
    clusters: dict[int, Cluster] = {0: Split(parts), 1: Split(parts), 2: Plain(noise(1 << 14))}
    sound = make(Recipe(size=4 << 14, clusters=clusters, cluster_bits=14, extended_l2=True))
    made = sound
    for number in (0, 1, 2):
        made = made.poked(made.l2_entry(number), made.number(made.l2_entry(number)) ^ COPIED)
    assert repaired(made).data == sound.data


def test_data_in_another_file_is_not_counted() -> None:
    sound = make(Recipe(size=9 * C, clusters={1: Plain(noise(C)), 3: Zero()}, cluster_bits=9, data_file="data"))
    assert repair(sound) == []
    assert repaired(counted(sound, 2, 7)).data == sound.data


@given(st.data())
@settings(max_examples=150)
def test_any_damage_is_mended_or_left_or_a_typed_error_and_never_changes_the_disk(data: st.DataObject) -> None:
    broken = bytearray(SOUND.data)
    places = [0, SOUND.l1, SOUND.l2[0], SOUND.l2[1], SOUND.refcount_table, SOUND.refcount_blocks[0]]
    for _ in range(data.draw(st.integers(1, 3))):
        broken[data.draw(st.sampled_from(places)) + data.draw(st.integers(0, 127))] ^= 1 << data.draw(
            st.integers(0, 7)
        )
    file = MemoryFile(broken)

    def seen() -> bytes | type[ImagekitError]:
        try:
            image = FORMAT.open(file)
            return content(image) if image.virtual_size < 1 << 24 else b""
        except ImagekitError as error:
            return type(error)

    before = seen()
    try:
        found = len(FORMAT.check(file))
        changes.apply(FORMAT.repair(file), file)
    except ImagekitError:
        return
    assert len(FORMAT.check(file)) <= found
    assert seen() == before
