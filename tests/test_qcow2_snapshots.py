"""Internal snapshots as a source: the disk as it was, found by id or name, in tables that may say anything."""

from __future__ import annotations

import dataclasses
import re
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.qcow2_images import Cluster, Compressed, Plain, Qcow2, Recipe, Snapshot, Zero, make
from imagekit.errors import CorruptImage, ImagekitError, InvalidImage, UnsupportedFeature
from imagekit.formats.base import OpenOptions
from imagekit.formats.files import MemoryFile
from imagekit.formats.qcow2 import FORMAT, Qcow2Image
from imagekit.formats.raw import RawImage
from tests.disks import assert_extents_agree, content, noise, text

C = 4096
KEPT, PACKED = Plain(noise(C, 1)), Compressed(text(C, 1))
FIRST = Snapshot("1", "first", {0: KEPT, 2: PACKED, 5: Plain(noise(C, 2))})
SMALLER = Snapshot("2", "before it grew", {0: KEPT, 1: Zero(), 3: Plain(noise(C, 3))}, size=4 * C)
LARGER = Snapshot("3", "before it shrank", {600: Plain(noise(C, 4)), 2: PACKED}, size=601 * C)
EMPTY = Snapshot("4", "empty", {}, extra=b"")
RECIPE = Recipe(
    size=20 * C - 512,
    clusters={0: KEPT, 1: Plain(noise(C, 5)), 2: PACKED, 7: Compressed(text(C, 2))},
    cluster_bits=12,
    snapshots=(FIRST, SMALLER, LARGER, EMPTY),
)
MADE = make(RECIPE)


def at(snapshot: str, made: Qcow2 = MADE) -> Qcow2Image:
    return FORMAT.open(MemoryFile(made.data), options=OpenOptions(snapshot=snapshot))


@pytest.mark.parametrize("snapshot", RECIPE.snapshots, ids=lambda one: one.name)
@pytest.mark.parametrize("by", ["id", "name"])
def test_a_snapshot_shows_the_disk_as_it_was(snapshot: Snapshot, by: str) -> None:
    image = at(getattr(snapshot, by))
    expected = RECIPE.content(snapshot)
    assert image.virtual_size == image.info().virtual_size == len(expected)
    assert_extents_agree(image, image.file, expected)
    assert image.info().features["snapshot"] == snapshot.name


def test_without_a_choice_the_disk_is_as_it_is_now() -> None:
    image = FORMAT.open(MemoryFile(MADE.data))
    assert content(image) == RECIPE.content()
    assert "snapshot" not in image.info().features


def test_an_image_with_snapshots_is_sound() -> None:
    assert FORMAT.check(MemoryFile(MADE.data)) == []


def test_info_lists_the_snapshots_in_their_order() -> None:
    features = FORMAT.open(MemoryFile(MADE.data)).info().features
    assert features["snapshots"] == 4
    assert features["snapshot-list"] == [{"id": one.id, "name": one.name} for one in RECIPE.snapshots]


def test_what_a_snapshot_does_not_hold_is_that_of_the_backing_file() -> None:
    made = make(Recipe(size=3 * C, cluster_bits=12, backing="base", snapshots=(Snapshot("1", "x", {1: KEPT}),)))
    below = noise(3 * C, 9)
    image = FORMAT.open(
        MemoryFile(made.data),
        resolver=lambda _: RawImage(MemoryFile(below), len(below)),
        options=OpenOptions(snapshot="x"),
    )
    assert content(image) == below[:C] + KEPT.data + below[2 * C :]


def test_the_format_says_that_it_heeds_the_choice() -> None:
    assert "snapshot" in FORMAT.reads


# --- which one -------------------------------------------------------------------------------------------------


def named(*pairs: tuple[str, str]) -> Qcow2:
    """Snapshots by (id, name), each with its number in its first cluster."""
    snapshots = tuple(
        Snapshot(ident, name, {0: Plain(bytes([number % 256]) * C)}) for number, (ident, name) in enumerate(pairs)
    )
    return make(Recipe(size=C, cluster_bits=12, snapshots=snapshots))


def test_an_id_wins_over_a_name() -> None:
    made = named(("7", "2"), ("2", "other"))
    assert at("2", made).pread(0, 1) == b"\1"
    assert at("7", made).pread(0, 1) == b"\0"


def test_a_name_that_two_have_is_no_answer() -> None:
    made = named(("1", "twin"), ("2", "twin"), ("3", "other"))
    with pytest.raises(UnsupportedFeature, match="2 snapshots are called 'twin'") as caught:
        at("twin", made)
    assert caught.value.hint is not None
    assert "'twin' (id '1'), 'twin' (id '2')" in caught.value.hint
    assert "other" not in caught.value.hint
    assert at("2", made).pread(0, 1) == b"\1"


def test_an_unknown_name_is_answered_with_those_there_are() -> None:
    with pytest.raises(UnsupportedFeature, match="no snapshot has the id or name 'nope'") as caught:
        at("nope")
    assert caught.value.hint is not None
    assert "'first' (id '1'), 'before it grew' (id '2')" in caught.value.hint


def test_an_image_without_snapshots_says_so() -> None:
    with pytest.raises(UnsupportedFeature) as caught:
        at("1", make(Recipe(size=C)))
    assert caught.value.hint == "the image has no snapshots"


def test_names_cannot_move_the_cursor_or_fill_the_screen() -> None:
    evil = "\x1b[2J\x9b1m\r\n\u202e" + "x" * 5000
    with pytest.raises(UnsupportedFeature) as caught:
        at("nope\x1b[0m", named(*[(str(number), evil) for number in range(100)]))
    said = f"{caught.value}{caught.value.hint}"
    assert said.isprintable()
    assert len(said) < 5000
    assert "and 80 more" in said


def test_bytes_that_are_no_text_are_a_name_all_the_same() -> None:
    at_name = MADE.data.index(b"first")
    made = dataclasses.replace(MADE, data=MADE.data[:at_name] + b"f\xffrst" + MADE.data[at_name + 5 :])
    image = at("f\ufffdrst", made)
    assert content(image) == RECIPE.content(FIRST)


# --- tables that lie -------------------------------------------------------------------------------------------

TABLE = MADE.snapshot_table
ENTRY = struct.Struct(">QIHHIIQII")


def with_entry(*, l1: int = 0, entries: int = 0, name: int = 1, extra: bytes = b"", count: int = 1) -> Qcow2:
    """An image whose snapshot table, at the end of the file, begins with that entry."""
    body = ENTRY.pack(l1, entries, 1, name, 0, 0, 0, 0, len(extra)) + extra + b"1" + b"n"
    data = MADE.data[:TABLE].ljust(len(MADE.data), b"\0")
    data = data[:TABLE] + body + data[TABLE + len(body) :]
    return dataclasses.replace(MADE, data=data).poked(60, count, 4)


LYING = {
    "table unaligned": (MADE.poked(64, TABLE + 8), InvalidImage, "the snapshot table lies at .*, not on a cluster"),
    "table far": (MADE.poked(64, 1 << 40), CorruptImage, "snapshot 0 is cut short"),
    "table at 2^64": (MADE.poked(64, 2**64 - C), CorruptImage, "snapshot 0 is cut short"),
    "too many": (MADE.poked(60, 65537, 4), InvalidImage, "65537 snapshots, at most 65536"),
    "fewer than said": (MADE.poked(60, 65536, 4), CorruptImage, r"snapshot \d+ is cut short"),
    "extra too long": (with_entry(extra=bytes(1025)), InvalidImage, "1025 extra bytes, at most 1024"),
    "name too long": (with_entry(name=60000), CorruptImage, "snapshot 0 is cut short"),
    "L1 far": (with_entry(l1=1 << 40, entries=1), CorruptImage, r"snapshot 'n' \(id '1'\): the L1 table ends at"),
    "L1 at 2^64": (with_entry(l1=2**64 - C, entries=1), CorruptImage, "the L1 table ends at"),
    "L1 unaligned": (with_entry(l1=MADE.l1 + 8, entries=1), InvalidImage, "the L1 table lies at"),
    "L1 at 0": (with_entry(l1=0, entries=1), InvalidImage, "the L1 table lies at 0x0"),
    "L1 too small": (with_entry(l1=MADE.l1, entries=0), InvalidImage, "has 0 entries, the virtual size needs 1"),
    "L1 huge": (with_entry(l1=MADE.l1, entries=2**32 - 1), InvalidImage, "more than 32 MiB"),
    "disk huge": (
        with_entry(l1=MADE.l1, entries=1, extra=struct.pack(">QQ", 0, 2**64 - 1)),
        InvalidImage,
        "is not below 2",
    ),
    "disk larger than its table": (
        with_entry(l1=MADE.l1, entries=1, extra=struct.pack(">QQ", 0, 1 << 40)),
        InvalidImage,
        "the virtual size needs 524288",
    ),
}


@pytest.mark.parametrize(("made", "kind", "message"), LYING.values(), ids=LYING)
def test_a_table_that_lies_is_an_error_when_a_snapshot_is_asked_for(
    made: Qcow2, kind: type[ImagekitError], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        at("1", made)
    assert caught.value.path is not None


UNLISTABLE = [name for name in LYING if not name.startswith(("L1", "disk"))]


@pytest.mark.parametrize("name", UNLISTABLE)
def test_a_table_that_lies_is_a_fact_and_the_disk_of_today_is_read(name: str) -> None:
    image = FORMAT.open(MemoryFile(LYING[name][0].data))
    info = image.info()
    (fact,) = info.facts
    assert (fact.code, "snapshot-list" in info.features) == ("snapshot-table", False)
    assert content(image) == RECIPE.content()


def test_an_entry_without_a_size_has_the_size_of_today() -> None:
    """As QEMU wrote them before disks could grow."""
    for extra in (b"", bytes(8), bytes(15)):
        made = make(dataclasses.replace(RECIPE, snapshots=(dataclasses.replace(FIRST, extra=extra),)))
        assert content(at("1", made)) == RECIPE.content(FIRST)


def test_an_image_with_a_data_file_has_no_snapshots() -> None:
    made = make(Recipe(size=C, cluster_bits=12, snapshots=(Snapshot("1", "x"),))).poked(72, 4)
    with pytest.raises(InvalidImage, match="whose data lies in another file has no snapshots"):
        at("x", made)


def test_a_long_list_is_cut_in_info_but_not_for_finding_one() -> None:
    made = named(*[(str(number), f"s{number}") for number in range(1100)])
    listed = FORMAT.open(MemoryFile(made.data)).info().features["snapshot-list"]
    assert isinstance(listed, list)
    assert len(listed) == 1000
    assert at("s1099", made).virtual_size == C


@given(st.data())
@settings(max_examples=150)
def test_any_flipped_bits_give_a_snapshot_or_a_typed_error(data: st.DataObject) -> None:
    broken = bytearray(MADE.data)
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.sampled_from([56, TABLE, MADE.snapshot_l1[0], MADE.snapshot_l1[1]]))
        broken[start + data.draw(st.integers(0, 150))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        image = FORMAT.open(MemoryFile(broken), options=OpenOptions(snapshot=data.draw(st.sampled_from("123"))))
        image.info()
        if image.virtual_size < 1 << 24:
            assert len(content(image)) == image.virtual_size
    except ImagekitError as error:
        assert re.search(r"\w", error.message)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.booleans()), max_size=8), st.integers(9, 12))
@settings(max_examples=40)
def test_clusters_shared_between_states_in_any_way_read_as_in_each(
    shares: list[tuple[int, int, bool]], bits: int
) -> None:
    """State 0 is the disk of today."""
    pool: list[Cluster] = [Plain(noise(1 << bits, 7)), Compressed(text(1 << bits, 8)), Zero(noise(1 << bits, 9))]
    states: list[dict[int, Cluster]] = [{}, {}, {}, {}]
    for state, number, own in shares:
        states[state][number] = Plain(noise(1 << bits, number)) if own else pool[number % 3]
    snapshots = tuple(Snapshot(str(at), f"at {at}", states[at]) for at in (1, 2, 3))
    recipe = Recipe(size=10 << bits, clusters=states[0], cluster_bits=bits, snapshots=snapshots)
    made = make(recipe)
    assert FORMAT.check(MemoryFile(made.data)) == []
    assert content(FORMAT.open(MemoryFile(made.data))) == recipe.content()
    for snapshot in snapshots:
        assert content(at(snapshot.id, made)) == recipe.content(snapshot)
