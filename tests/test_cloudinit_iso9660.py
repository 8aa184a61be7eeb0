"""Reading ISO 9660 media that may be damaged or made to do harm."""

from __future__ import annotations

import io
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagekit.cloudinit import iso9660
from imagekit.cloudinit.iso import write_iso
from imagekit.cloudinit.iso9660 import SECTOR, read_iso
from imagekit.errors import CorruptImage, ImagekitError, InvalidImage, UnsupportedFeature

TREE = {"folder/" + "n" * 60: b"a" * 3000, "folder/b": b"b", "folder/inner/c": b"", "d": b"d" * 100}
MEDIUM = write_iso(TREE)


def records(medium: bytes, *, joliet: bool) -> dict[bytes, iso9660.DirectoryRecord]:
    """The records of the root folder and of the folder in it, by identifier."""
    descriptor = next(d for d in iso9660.volume_descriptors(medium) if d.joliet == joliet)
    root = iso9660.root_record(medium, descriptor)
    found = {record.identifier: record for record in iso9660.folder_records(medium, root)}
    folder = found["folder".encode("utf-16-be") if joliet else b"FOLDER"]
    return found | {r.identifier: r for r in iso9660.folder_records(medium, folder) if len(r.identifier) > 1}


def patched(medium: bytes, offset: int, new: bytes) -> bytes:
    return medium[:offset] + new + medium[offset + len(new) :]


def without(medium: bytes, *, joliet: bool, rock_ridge: bool) -> bytes:
    """The medium with the mark of a view blotted out."""
    if not joliet:
        medium = medium.replace(b"%/E", b"   ")
    return medium if rock_ridge else medium.replace(b"SP\x07\x01\xbe\xef", b"XX\x07\x01\xbe\xef")


@pytest.mark.parametrize("source", [MEDIUM, io.BytesIO(MEDIUM)], ids=["bytes", "file"])
def test_bytes_and_open_files_are_read_alike(source: bytes | io.BytesIO) -> None:
    assert read_iso(source).tree == TREE


def test_without_rock_ridge_the_joliet_names_are_the_tree() -> None:
    content = read_iso(without(MEDIUM, joliet=True, rock_ridge=False))
    assert (content.rock_ridge, content.tree, content.joliet) == (False, TREE, TREE)


def test_without_joliet_the_rock_ridge_names_are_the_tree() -> None:
    content = read_iso(without(MEDIUM, joliet=False, rock_ridge=True))
    assert (content.rock_ridge, content.tree, content.joliet, content.joliet_label) == (
        True,
        TREE,
        None,
        None,
    )


def test_with_neither_the_plain_names_are_the_tree() -> None:
    content = read_iso(without(MEDIUM, joliet=False, rock_ridge=False))
    assert set(content.tree) == {"D", "FOLDER/B", "FOLDER/INNER/C", "FOLDER/" + "N" * 30}


@pytest.mark.parametrize("data", [b"", b"\0" * 70000, b"PK" * 40000, MEDIUM[: 16 * SECTOR + 100]])
def test_what_is_no_iso_9660_medium_is_called_invalid(data: bytes) -> None:
    with pytest.raises(InvalidImage, match="not an ISO 9660 medium"):
        read_iso(data)


def test_a_medium_larger_than_the_limit_is_refused_unread() -> None:
    with pytest.raises(InvalidImage, match="larger than 1000 bytes"):
        read_iso(io.BytesIO(MEDIUM), max_size=1000)


@pytest.mark.parametrize("sectors", range(17, len(MEDIUM) // SECTOR))
def test_a_medium_cut_short_is_called_corrupt(sectors: int) -> None:
    with pytest.raises(CorruptImage):
        read_iso(MEDIUM[: sectors * SECTOR])


def test_other_block_sizes_are_called_unsupported() -> None:
    with pytest.raises(UnsupportedFeature, match="logical blocks of 512 bytes"):
        read_iso(patched(MEDIUM, 16 * SECTOR + 128, struct.pack("<H", 512)))


def test_a_multi_extent_file_is_called_unsupported() -> None:
    record = records(MEDIUM, joliet=False)[b"D.;1"]
    with pytest.raises(UnsupportedFeature, match="multi-extent"):
        read_iso(patched(MEDIUM, record.offset + 25, b"\x80"))


def test_a_symbolic_link_is_called_unsupported() -> None:
    """Following it, or leaving it out without a word, would both be wrong."""
    record = records(MEDIUM, joliet=False)[b"D.;1"]
    offset = MEDIUM.index(b"TF", record.offset)
    with pytest.raises(UnsupportedFeature, match="a symbolic link"):
        read_iso(patched(MEDIUM, offset, b"SL"))


def test_a_folder_that_contains_itself_is_called_corrupt() -> None:
    """The inner folder is made to start where the outer one does."""
    found = records(MEDIUM, joliet=False)
    start = struct.pack("<I", found[b"FOLDER"].start // SECTOR)
    with pytest.raises(CorruptImage, match="contain themselves"):
        read_iso(patched(MEDIUM, found[b"INNER"].offset + 2, start))


def test_a_file_past_the_end_of_the_medium_is_called_corrupt() -> None:
    record = records(MEDIUM, joliet=True)["d".encode("utf-16-be")]
    with pytest.raises(CorruptImage, match="past the end of the medium"):
        read_iso(patched(MEDIUM, record.offset + 10, struct.pack("<I", len(MEDIUM))))


def test_files_that_overlap_to_claim_more_than_the_medium_has_are_called_corrupt() -> None:
    """A few records could otherwise make a small medium unpack to any size."""
    medium = MEDIUM
    for identifier in (b"D.;1", b"B.;1"):
        record = records(MEDIUM, joliet=False)[identifier]
        size = len(MEDIUM) - 20 * SECTOR - len(identifier) - (identifier == b"B.;1")
        medium = patched(medium, record.offset + 2, struct.pack("<I", 16))
        medium = patched(medium, record.offset + 10, struct.pack("<I", size))
    with pytest.raises(CorruptImage, match="claim more bytes than the medium has"):
        read_iso(medium)


@pytest.mark.parametrize("name", [b"..", b"a/", b"\0x", b"b/"[:1] * 0 + b"./"])
def test_a_name_that_leads_elsewhere_is_called_corrupt(name: bytes) -> None:
    medium = write_iso({"zz": b""})
    with pytest.raises(CorruptImage, match="is not a file name"):
        read_iso(medium.replace(b"NM\x07\x01\x00zz", b"NM\x07\x01\x00" + name))


def test_the_same_name_twice_is_called_corrupt() -> None:
    medium = write_iso({"zz": b"1", "zy": b"2"})
    with pytest.raises(CorruptImage, match="'zz' is there twice"):
        read_iso(medium.replace(b"NM\x07\x01\x00zy", b"NM\x07\x01\x00zz"))


def test_a_folder_past_the_end_of_the_medium_is_called_corrupt() -> None:
    root = iso9660.root_record(MEDIUM, iso9660.volume_descriptors(MEDIUM)[0])
    with pytest.raises(CorruptImage, match="a folder ends at 0x80e000, past the end"):
        read_iso(patched(MEDIUM, root.offset + 10, struct.pack("<I", 0x800000)))


def test_a_folder_that_ends_inside_a_record_is_called_corrupt() -> None:
    root = iso9660.root_record(MEDIUM, iso9660.volume_descriptors(MEDIUM)[1])
    with pytest.raises(CorruptImage, match="a directory record crosses the end"):
        read_iso(patched(MEDIUM, root.offset + 10, struct.pack("<I", 34 + 34 + 10)))


@pytest.mark.parametrize(("position", "value"), [(0, 33), (32, 0), (32, 200)])
def test_a_record_whose_lengths_disagree_is_called_corrupt(position: int, value: int) -> None:
    """The length of the record is its first byte, that of the name its 33rd."""
    record = records(MEDIUM, joliet=True)["d".encode("utf-16-be")]
    with pytest.raises(CorruptImage, match=r"a directory record of \d+ bytes cannot be right"):
        read_iso(patched(MEDIUM, record.offset + position, bytes([value])))


@pytest.mark.parametrize("length", [3, 255])
def test_a_rock_ridge_entry_of_a_wrong_length_is_called_corrupt(length: int) -> None:
    record = records(MEDIUM, joliet=False)[b"D.;1"]
    offset = MEDIUM.index(b"TF", record.offset) + 2
    with pytest.raises(CorruptImage, match="a system use entry overruns its area"):
        read_iso(patched(MEDIUM, offset, bytes([length])))


@pytest.mark.parametrize(
    ("block", "offset", "problem"),
    [(0x7FFFFFFF, 0, "lies past the end of the medium"), (20, 2048, "crosses its sector")],
)
def test_a_continuation_that_leads_nowhere_is_called_corrupt(block: int, offset: int, problem: str) -> None:
    root = records(MEDIUM, joliet=False)[b"\0"]
    (entry,) = [e for e in iso9660.system_use_entries(MEDIUM, root) if e.signature == b"CE"]
    body = struct.pack("<IIIIII", block, 0, offset, 0, 100, 0)
    with pytest.raises(CorruptImage, match=problem):
        list(iso9660.system_use_entries(patched(MEDIUM, entry.offset + 4, body), root))


def test_continuations_without_end_are_called_corrupt() -> None:
    """The root's continuation area is made to continue in itself."""
    root = records(MEDIUM, joliet=False)[b"\0"]
    (entry,) = [e for e in iso9660.system_use_entries(MEDIUM, root) if e.signature == b"CE"]
    block, offset, size = struct.unpack("<I4xI4xI4x", entry.body)
    itself = MEDIUM[entry.offset : entry.offset + 28]
    medium = patched(MEDIUM, block * SECTOR + offset, itself.ljust(size, b"\0"))
    with pytest.raises(CorruptImage, match="more than 8 system use continuations"):
        list(iso9660.system_use_entries(medium, root))


@given(st.lists(st.tuples(st.integers(16 * SECTOR, len(MEDIUM) - 1), st.integers(0, 255)), max_size=8), st.data())
def test_damage_anywhere_ends_in_an_error_of_ours_or_in_names_and_bytes(
    changes: list[tuple[int, int]], data: st.DataObject
) -> None:
    medium = bytearray(MEDIUM)
    for offset, value in changes:
        medium[offset] = value
    end = data.draw(st.integers(0, len(medium)) | st.just(len(medium)))
    try:
        content = read_iso(bytes(medium[:end]))
    except ImagekitError:
        return
    assert sum(map(len, content.tree.values())) <= 2 * len(medium)
