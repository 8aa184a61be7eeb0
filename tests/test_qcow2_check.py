"""The check of a qcow2: what is used against what is counted, and nothing twice."""

from __future__ import annotations

import dataclasses
import struct

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
    Split,
    Zero,
    make,
    pack_refcounts,
)
from imagekit.errors import UnsupportedFeature
from imagekit.formats import qcow2_check
from imagekit.formats.base import Problem
from imagekit.formats.files import MemoryFile
from imagekit.formats.qcow2 import FORMAT
from imagekit.formats.qcow2_check import LISTED
from imagekit.formats.qcow2_refcounts import unpack_refcounts
from tests.disks import noise, qcow2_recipes, text

C = 512
CLUSTERS: dict[int, Cluster] = {
    0: Plain(noise(C)),
    1: Compressed(text(C)),
    2: Compressed(text(C, 1)),
    3: Zero(noise(C)),
    70: Plain(noise(C, 2)),
}
SOUND = make(Recipe(size=100 * C, clusters=CLUSTERS, cluster_bits=9))
BLOCK = SOUND.refcount_blocks[0]


def check(made: Qcow2) -> list[Problem]:
    return FORMAT.check(MemoryFile(made.data))


def codes(made: Qcow2) -> list[str]:
    return sorted({problem.code for problem in check(made)})


def refcount_at(offset: int) -> int:
    """Where the 16-bit refcount of the cluster at a file offset lies."""
    return BLOCK + offset // C * 2


def place(cluster: int) -> int:
    return SOUND.number(SOUND.l2_entry(cluster)) & 0x00FFFFFFFFFFFE00


# --- sound images ----------------------------------------------------------------------------------------------


@given(qcow2_recipes())
@settings(max_examples=60)
def test_nothing_is_wrong_with_a_sound_image(recipe: Recipe) -> None:
    assert check(make(recipe)) == []


@given(qcow2_recipes(cluster_bits=(9, 10)), st.sampled_from([8, 64]), st.data())
@settings(max_examples=60)
def test_it_makes_no_difference_how_many_clusters_are_counted_at_once(
    recipe: Recipe, window: int, data: st.DataObject
) -> None:
    """Sound or damaged: the windows of a large image lie side by side without seam."""
    made = make(recipe)
    at = data.draw(st.sampled_from([made.l1, *made.refcount_blocks, *made.l2.values()]))
    made = made.poked(at, data.draw(st.integers(0, 2**64 - 1) | st.just(made.number(at))))
    whole = check(made)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qcow2_check, "WINDOW", window)
        patch.setattr(qcow2_check, "MAX_WINDOWS", 1 << 20)
        by_window = check(made)
    if len(whole) < LISTED:
        assert set(by_window) == set(whole)
    assert len(by_window) == len(whole)


@pytest.mark.parametrize("order", range(7))
@given(counts=st.data())
def test_refcounts_of_every_width_unpack_as_they_were_packed(order: int, counts: st.DataObject) -> None:
    width = 1 << order
    numbers = counts.draw(st.lists(st.integers(0, 2**width - 1), min_size=64, max_size=64))
    assert unpack_refcounts(pack_refcounts(numbers, order), order).tolist() == numbers


# --- refcounts -------------------------------------------------------------------------------------------------


def test_a_cluster_counted_and_not_used_is_a_leak() -> None:
    made = SOUND.poked(SOUND.l2_entry(70), 0)
    assert check(made) == [
        Problem("leak", f"cluster {place(70) // C}: used 0 times, but its refcount is 1", place(70), leak=True)
    ]


def test_a_cluster_used_more_often_than_counted_is_damage() -> None:
    found = check(SOUND.poked(refcount_at(place(70)), 0, 2))
    assert [problem.code for problem in found] == ["refcount-low", "copied-flag"]
    assert found[0].offset == place(70)
    assert not any(problem.leak for problem in found)


def test_a_host_cluster_counts_once_for_each_stream_in_it() -> None:
    """Two compressed clusters share one host cluster, and one of them goes."""
    found = check(SOUND.poked(SOUND.l2_entry(1), 0))
    assert [(problem.code, problem.leak) for problem in found] == [("leak", True)]
    assert "used 1 times, but its refcount is 2" in found[0].message


def test_the_place_that_a_zero_cluster_keeps_is_used() -> None:
    assert codes(SOUND.poked(SOUND.l2_entry(3), 1)) == ["leak"]


def test_a_wrong_copied_flag_is_damage() -> None:
    for at in (SOUND.l1_entry(0), SOUND.l2_entry(0)):
        assert codes(SOUND.poked(at, SOUND.number(at) ^ COPIED)) == ["copied-flag"]


def test_a_copied_flag_where_nothing_is_points_at_something_lost() -> None:
    assert codes(SOUND.poked(SOUND.l1_entry(0), COPIED)) == ["contradiction", "leak"]


def test_a_refcount_block_that_is_gone_leaves_everything_uncounted() -> None:
    assert "refcount-low" in codes(SOUND.poked(SOUND.refcount_table, 0))


@pytest.mark.parametrize(
    ("offset", "clusters"),
    [(SOUND.refcount_table + 8, 1), (1 << 50, 1), (SOUND.refcount_table, 1 << 20)],
    ids=["unaligned", "behind the end", "too large"],
)
def test_without_a_refcount_table_that_is_all_there_is_to_say(offset: int, clusters: int) -> None:
    made = SOUND.poked(48, offset).poked(56, clusters, 4)
    (problem,) = check(made)
    assert "refcount table" in problem.message
    assert not problem.leak


# --- pointers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "value", "code"),
    [
        (SOUND.l1_entry(0), SOUND.number(SOUND.l1_entry(0)) | 1 << 60, "reserved-bits"),
        (SOUND.l2_entry(0), SOUND.number(SOUND.l2_entry(0)) | 2, "reserved-bits"),
        (SOUND.refcount_table, BLOCK | 1, "reserved-bits"),
        (SOUND.refcount_table, BLOCK | 1 << 63, "reserved-bits"),
        (SOUND.l1_entry(1), 1 << 40 | COPIED, "outside"),
        (SOUND.l2_entry(0), 1 << 40 | COPIED, "outside"),
        (SOUND.l2_entry(1), 1 << 62 | 1 << 40, "outside"),
        (SOUND.refcount_table, 1 << 40, "outside"),
        (SOUND.l2_entry(1), SOUND.number(SOUND.l2_entry(1)) | COPIED, "contradiction"),
    ],
)
def test_an_entry_that_no_sound_image_has_is_damage(at: int, value: int, code: str) -> None:
    found = check(SOUND.poked(at, value))
    assert code in [problem.code for problem in found if not problem.leak]


def test_an_unaligned_pointer_is_damage_where_clusters_are_larger_than_what_entries_can_say() -> None:
    made = make(Recipe(size=1 << 16, clusters={0: Plain(noise(4096))}, cluster_bits=12))
    assert "unaligned" in codes(made.poked(made.l2_entry(0), made.number(made.l2_entry(0)) + 512))
    assert "unaligned" in codes(made.poked(made.l1_entry(0), made.number(made.l1_entry(0)) + 512))


def test_a_zero_flag_where_there_is_none_is_damage() -> None:
    made = make(Recipe(size=10 * C, clusters={0: Plain(noise(C))}, cluster_bits=9, version=2))
    assert "reserved-bits" in codes(made.poked(made.l2_entry(1), 1))


@pytest.mark.parametrize("bitmap", [1 << 32 | 1, 1], ids=["zero and allocated", "allocated nowhere"])
def test_a_bitmap_that_contradicts_its_entry_is_damage(bitmap: int) -> None:
    parts = (noise(512),) * 32
    clusters: dict[int, Cluster] = {0: Split(parts), 1: Zero(), 2: Compressed(text(1 << 14))}
    made = make(Recipe(size=1 << 18, clusters=clusters, cluster_bits=14, extended_l2=True))
    assert codes(made) == []
    assert "contradiction" in codes(made.poked(made.l2_entry(0 if bitmap > 1 else 1) + 8, bitmap))
    assert "contradiction" in codes(made.poked(made.l2_entry(2) + 8, bitmap))


# --- what only some images have ---------------------------------------------------------------------------------

SNAPSHOT = struct.Struct(">QIHHIIQII")


def with_snapshot(l1: int, entries: int, *, count: int = 1, name: int = 0) -> Qcow2:
    """A snapshot table of one entry on a cluster of its own behind the image; nothing counts that cluster."""
    at = len(SOUND.data)
    entry = SNAPSHOT.pack(l1, entries, 0, name, 0, 0, 0, 0, 0).ljust(C, b"\0")
    made = dataclasses.replace(SOUND, data=SOUND.data + entry)
    return made.poked(60, count, 4).poked(64, at)


def found_in(made: Qcow2, words: str) -> list[str]:
    return [problem.code for problem in check(made) if words in problem.message]


def test_a_snapshot_table_and_what_it_leads_to_are_used() -> None:
    """Here nothing counted them: so every cluster of theirs is damage, and so is the L1 table that two lead to."""
    found = check(with_snapshot(SOUND.l1, 2))
    assert {problem.code for problem in found} == {"refcount-low", "overlap"}
    assert len(SOUND.data) in [problem.offset for problem in found]


@pytest.mark.parametrize(
    ("made", "words", "code"),
    [
        (SOUND.poked(60, 1, 4).poked(64, 1 << 40), "the snapshot table ends at", "outside"),
        (SOUND.poked(60, 1, 4).poked(64, 7), "the snapshot table lies at 0x7", "unaligned"),
        (SOUND.poked(60, 2**32 - 1, 4), "the snapshot table has 171798691800 bytes", "too-large"),
        (with_snapshot(SOUND.l1, 2, name=40_000), "snapshot 0 ends at", "outside"),
        (with_snapshot(SOUND.l1, 2, count=100), "the snapshot table ends at", "outside"),
        (with_snapshot(SOUND.l1 + 8, 2), "the L1 table of snapshot 0 lies at", "unaligned"),
        (with_snapshot(1 << 40, 2), "the L1 table of snapshot 0 ends at", "outside"),
        (with_snapshot(0, 2**32 - 1), "the L1 table of snapshot 0 has", "too-large"),
    ],
    ids=["far", "unaligned", "too many", "name too long", "fewer than said", "L1 unaligned", "L1 far", "L1 huge"],
)
def test_a_snapshot_that_leads_nowhere_is_damage(made: Qcow2, words: str, code: str) -> None:
    assert found_in(made, words) == [code]


def test_l1_tables_larger_than_the_file_are_not_walked() -> None:
    """Many snapshots may name one and the same stretch: the work would be a multiple of the file."""
    zeros, count = len(SOUND.data), 12
    table = SNAPSHOT.pack(zeros, 10 * C // 8, 0, 0, 0, 0, 0, 0, 0) * count
    made = dataclasses.replace(SOUND, data=SOUND.data + bytes(10 * C) + table.ljust(C, b"\0"))
    made = made.poked(60, count, 4).poked(64, zeros + 10 * C)
    assert found_in(made, "the L1 tables together are larger than the file") == ["overlap"]


def with_extension(kind: int, body: bytes) -> Qcow2:
    """A header extension where the list of them ended."""
    patch = struct.pack(">II", kind, len(body)) + body
    data = SOUND.data[:112] + patch + SOUND.data[112 + len(patch) :]
    return dataclasses.replace(SOUND, data=data).poked(88, 1)


@pytest.mark.parametrize(
    ("made", "words", "code"),
    [
        (with_extension(0x0537BE77, struct.pack(">QQ", 1 << 40, 512)), "the encryption header ends", "outside"),
        (with_extension(0x0537BE77, struct.pack(">QQ", 5, 512)), "the encryption header lies", "unaligned"),
        (with_extension(0x0537BE77, struct.pack(">QQ", 512, 1 << 40)), "the encryption header has", "too-large"),
        (with_extension(0x23852875, struct.pack(">IIQQ", 1, 0, 24, 1 << 40)), "the bitmap directory ends", "outside"),
        (with_extension(0x23852875, struct.pack(">IIQQ", 9, 0, 16, C)), "ends before bitmap 0", "cut-short"),
        (with_extension(0x23852875, struct.pack(">IIQQ", 1, 0, 24, BLOCK)), "the table of bitmap 0", "unaligned"),
    ],
    ids=["LUKS far", "LUKS unaligned", "LUKS huge", "directory far", "directory short", "bitmap"],
)
def test_an_extension_that_leads_nowhere_is_damage(made: Qcow2, words: str, code: str) -> None:
    assert code in found_in(made, words)


def test_what_an_extension_leads_to_is_used() -> None:
    found = check(with_extension(0x0537BE77, struct.pack(">QQ", place(70), 512)))
    assert ("overlap", place(70)) in [(problem.code, problem.offset) for problem in found]


def test_bitmaps_that_nobody_kept_in_step_are_nobodys() -> None:
    """A program that does not know them clears the bit: what they point to is leaked, and not read."""
    stale = with_extension(0x23852875, struct.pack(">IIQQ", 1, 0, 24, 1 << 40)).poked(88, 0)
    assert check(stale) == []


# --- overlaps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [SOUND.l1, SOUND.l2[0], SOUND.refcount_table, BLOCK],
    ids=["L1 table", "L2 table", "refcount table", "refcount block"],
)
def test_data_on_top_of_metadata_is_damage_even_if_the_refcounts_allow_it(target: int) -> None:
    made = SOUND.poked(SOUND.l2_entry(70), target).poked(refcount_at(place(70)), 0, 2)
    made = made.poked(refcount_at(target), 2, 2)
    assert "overlap" in codes(made)


def test_two_l1_entries_that_lead_to_one_table_are_damage() -> None:
    made = SOUND.poked(SOUND.l1_entry(1), SOUND.number(SOUND.l1_entry(0)))
    assert "overlap" in codes(made)


def test_a_refcount_block_named_twice_is_damage() -> None:
    made = make(Recipe(size=400 * C, clusters={at: Plain(noise(C, at)) for at in range(300)}, cluster_bits=9))
    assert len(made.refcount_blocks) > 1
    assert "overlap" in codes(made.poked(made.refcount_table + 8, made.refcount_blocks[0]))


# --- the rest --------------------------------------------------------------------------------------------------


def test_the_corrupt_bit_is_a_problem_and_the_dirty_bit_is_none() -> None:
    assert codes(make(Recipe(size=C, cluster_bits=9, incompatible=2))) == ["corrupt-bit"]
    assert codes(make(Recipe(size=C, cluster_bits=9, incompatible=1))) == []


def test_a_cluster_cut_short_is_damage_although_every_pointer_is_right() -> None:
    made = make(Recipe(size=4096, clusters={0: Plain(noise(4096))}, cluster_bits=12))
    (problem,) = FORMAT.check(MemoryFile(made.data[:-1]))
    assert (problem.code, problem.leak) == ("cut-short", False)


def test_what_the_backing_file_holds_is_not_asked() -> None:
    assert check(make(Recipe(size=4096, clusters={0: Plain(noise(C))}, cluster_bits=9, backing="/nowhere"))) == []


def test_data_in_another_file_is_not_looked_for_in_this_one() -> None:
    made = make(Recipe(size=100 * C, cluster_bits=9, data_file="data", clusters={1: Zero(), 99: Plain(noise(C))}))
    assert codes(made) == []
    assert len(made.data) < 99 * C


@pytest.mark.parametrize("extended", [False, True], ids=["", "extended"])
@pytest.mark.parametrize(
    ("entry", "code"),
    [
        (2 << 14, "copied-flag"),
        (3 << 14 | COPIED, "contradiction"),
        (2 << 14 | 512 | COPIED, "contradiction"),
        (COMPRESSED | 1 << 14, "contradiction"),
    ],
    ids=["not copied", "elsewhere", "unaligned", "compressed"],
)
def test_an_entry_that_no_image_with_a_data_file_has_is_damage(entry: int, code: str, extended: bool) -> None:
    clusters: dict[int, Cluster] = {0: Plain(noise(1 << 14)), 2: Plain(noise(1 << 14))}
    made = make(Recipe(size=1 << 18, clusters=clusters, cluster_bits=14, data_file="data", extended_l2=extended))
    assert codes(made) == []
    assert codes(made.poked(made.l2_entry(2), entry)) == [code]


def test_features_that_are_not_known_cannot_be_checked() -> None:
    with pytest.raises(UnsupportedFeature, match="unknown incompatible feature bits 0x10000000000"):
        check(make(Recipe(size=C, incompatible=1 << 40)))


def test_a_thousand_problems_are_a_list_and_a_number() -> None:
    """Of damage and of leaks each; the number is right."""
    made = make(Recipe(size=1000 * C, clusters={at: Plain(noise(C)) for at in range(1000)}, cluster_bits=9))
    for entry in range(16):
        made = made.poked(made.l1_entry(entry), 0)
    found = check(made)
    assert len(found) == LISTED + 1
    assert found[-1] == Problem("more", f"and {1016 - LISTED} more leaked clusters", None, leak=True)
    made = make(Recipe(size=1000 * C, clusters={at: Plain(noise(C)) for at in range(1000)}, cluster_bits=9))
    found = check(made.poked(made.refcount_table, 0))
    assert found[-1].message.startswith("and ")
    assert not found[-1].leak


def test_no_number_of_problems_hides_the_first_of_another_kind() -> None:
    """Refcounts that are wrong harm no reader; data on a table does."""
    made = make(Recipe(size=1000 * C, clusters={at: Plain(noise(C)) for at in range(999)}, cluster_bits=9))
    for block in made.refcount_blocks:
        made = dataclasses.replace(made, data=made.data[:block] + bytes(C) + made.data[block + C :])
    found = check(made.poked(made.l2_entry(999), COPIED | made.l1))
    assert len([one for one in found if one.code == "refcount-low"]) == LISTED
    assert [one.offset for one in found if one.code == "overlap"] == [made.l1]


def test_streams_that_tables_share_are_clusters_that_share_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no table has one twice, and where there are more of them than are compared one by one."""
    size, each = 4096, 4096 // 8
    clusters: dict[int, Cluster] = {at: Compressed(noise(size, at)) for at in range(60)}
    clusters |= {table * each: Plain(noise(size, table)) for table in range(1, 8)}
    sound = shared = make(Recipe(size=8 * each * size, clusters=clusters, cluster_bits=12))
    for table in range(1, 8):
        for at in range(60):
            shared = shared.poked(shared.l2[table] + at * 8, shared.number(shared.l2_entry(at)))
    assert codes(sound) == []
    assert "aliased" in codes(shared)
    monkeypatch.setattr(qcow2_check, "MOST_COMPARED", 0)
    assert "aliased" in codes(shared)
    assert codes(sound) == []


def test_an_image_with_references_all_over_a_huge_file_is_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each place costs a pass: a hostile image must not buy hours with a few entries."""
    monkeypatch.setattr(qcow2_check, "WINDOW", 8)
    monkeypatch.setattr(qcow2_check, "MAX_WINDOWS", 3)
    with pytest.raises(UnsupportedFeature, match="windows"):
        check(make(Recipe(size=100 * C, clusters={at: Plain(noise(C)) for at in range(50)}, cluster_bits=9)))


@given(qcow2_recipes(cluster_bits=(9, 12)))
@settings(max_examples=40)
def test_the_ranges_of_a_sound_image_are_all_of_its_file_and_overlap_only_where_streams_meet(recipe: Recipe) -> None:
    """Every cluster of these files is used by somebody: nothing is left out, nothing metadata claims is shared."""
    made, size = make(recipe), recipe.cluster_size
    users: dict[int, set[str]] = {}
    for one in FORMAT.open(MemoryFile(made.data)).ranges():
        for cluster in range(one.offset // size, -(-(one.offset + one.length) // size)):
            users.setdefault(cluster, set()).add(one.kind)
    expected = {0: "header", made.l1 // size: "L1 table", made.refcount_table // size: "refcount table"}
    expected |= {block // size: "refcount block" for block in made.refcount_blocks}
    expected |= {table // size: "L2 table" for table in made.l2.values()}
    if not recipe.size:
        return
    assert {cluster: kinds for cluster, kinds in users.items() if cluster in expected} == {
        cluster: {kind} for cluster, kind in expected.items()
    }
    assert set(users) == set(range(-(-len(made.data) // size)))
