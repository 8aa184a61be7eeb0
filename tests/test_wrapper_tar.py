"""tar: the one disk of an archive, sparse members, and headers that lie."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixtures.tar_archives import (
    BLOCK,
    END,
    gnu_sparse,
    header,
    member,
    padded,
    pax,
    pax_sparse,
)
from imagekit.errors import CorruptImage, ImagekitError, UnsafeImage, UnsupportedFeature
from imagekit.formats.files import LocalFile, MemoryFile
from imagekit.wrappers import tar as wrapper_tar
from imagekit.wrappers.parts import Member, WrapperLimits, without_gaps
from imagekit.wrappers.tar import tar_members
from imagekit.wrappers.unwrap import DEFAULT_LIMITS, detect, unwrap
from tests.disks import noise

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
DISK = noise(1300)
PIECES = [(0, noise(600)), (8192, noise(5000)), (70_000, noise(1))]
every_sparse_form = pytest.mark.parametrize("form", ["gnu", "pax"])


def members(data: bytes, limits: WrapperLimits = DEFAULT_LIMITS) -> list[Member]:
    return tar_members(MemoryFile(data, "archive.tar"), limits)


def content(one: Member) -> bytes:
    return b"".join(without_gaps(one.parts(), one.size))


def expanded(size: int, pieces: list[tuple[int, bytes]]) -> bytes:
    out = bytearray(size)
    for offset, data in pieces:
        out[offset : offset + len(data)] = data
    return bytes(out)


def sparse(form: str, size: int, pieces: list[tuple[int, bytes]], name: str = "disk.raw") -> bytes:
    return gnu_sparse(name.encode(), size, pieces) if form == "gnu" else pax_sparse(name, size, pieces)


def chosen(tmp_path: Path, data: bytes, limits: WrapperLimits = DEFAULT_LIMITS) -> tuple[str, bytes]:
    path = tmp_path / "archive.tar"
    path.write_bytes(data)
    with LocalFile.open_source(path) as file, unwrap(file, limits=limits) as inner:
        return inner.name, inner.file.pread(0, inner.file.size)


# --- plain archives --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["disk.raw", "a/" * 60 + "disk.raw", "ä" * 70 + ".raw", "n" * 99], ids=len)
def test_python_s_archives_are_read(form: int, name: str) -> None:
    out = io.BytesIO()
    if form == tarfile.USTAR_FORMAT and "ä" in name:
        name = name[:20]
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for one, data in (("empty", b""), (name, DISK)):
            entry = tarfile.TarInfo(one)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    assert [(one.name, content(one)) for one in members(out.getvalue())] == [("empty", b""), (name, DISK)]


def test_the_only_file_is_the_disk_whatever_its_name(tmp_path: Path) -> None:
    archive = header(b"folder/", kind=b"5") + member(b"folder/image", DISK) + END
    assert chosen(tmp_path, archive) == ("image", DISK)


def test_among_several_files_the_one_named_like_a_disk_is_it(tmp_path: Path) -> None:
    """As Vagrant packs its boxes."""
    files = [(b"./metadata.json", b"{}"), (b"./Vagrantfile", b"x"), (b"./box.img", DISK), (b"./info.json", b"{}")]
    assert chosen(tmp_path, b"".join(member(*one) for one in files) + END) == ("box.img", DISK)


def test_what_macos_puts_beside_a_file_is_no_disk(tmp_path: Path) -> None:
    assert chosen(tmp_path, member(b"._disk.raw", b"x") + member(b"disk.raw", DISK) + END) == ("disk.raw", DISK)


def test_two_disks_are_refused_by_their_names(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeature, match=r"more than one disk: 'a\.vmdk', 'b/c\.raw\.gz'"):
        chosen(tmp_path, member(b"a.vmdk", DISK) + member(b"readme") + member(b"b/c.raw.gz", DISK) + END)


def test_files_without_a_disk_among_them_are_refused_by_their_names(tmp_path: Path) -> None:
    archive = b"".join(member(b"file%d" % number) for number in range(10)) + END
    with pytest.raises(UnsupportedFeature, match=r"none of them named like a disk: 'file0', .* and 2 more"):
        chosen(tmp_path, archive)


def test_an_archive_of_folders_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeature, match="holds no file"):
        chosen(tmp_path, header(b"folder/", kind=b"5") + END)


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    """tar extracts both, and the last one stays; other readers take the first."""
    with pytest.raises(UnsafeImage, match=r"two members are called 'disk\.raw'") as caught:
        chosen(tmp_path, member(b"disk.raw", DISK) + member(b"./disk.raw", b"other") + END)
    assert caught.value.rule == "ambiguous"


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (b"1", "a hard link"),
        (b"2", "a symbolic link"),
        (b"3", "a character device"),
        (b"4", "a block device"),
        (b"6", "a FIFO"),
    ],
)
def test_what_is_no_file_is_refused(kind: bytes, what: str, tmp_path: Path) -> None:
    assert detect(MemoryFile(header(b"disk.raw", kind=kind, link=b"/dev/sda") + END)) == "tar"
    with pytest.raises(UnsafeImage, match=f"'disk.raw' is {what}") as caught:
        chosen(tmp_path, header(b"disk.raw", kind=kind, link=b"/dev/sda") + END)
    assert caught.value.rule == "wrapper-reference"


def test_an_unknown_type_of_member_is_refused() -> None:
    with pytest.raises(UnsupportedFeature, match="type b'V'"):
        members(header(b"volume", kind=b"V") + END)


def test_a_comment_for_the_whole_archive_is_passed_over() -> None:
    """As git archive writes it."""
    archive = pax([("comment", "0123")], kind=b"g") + member(b"disk.raw", DISK) + END
    assert [one.name for one in members(archive)] == ["disk.raw"]


@pytest.mark.parametrize("key", ["size", "path", "linkpath", "GNU.sparse.major"])
def test_a_global_header_may_not_be_about_members(key: str) -> None:
    with pytest.raises(UnsupportedFeature, match=f"sets '{key}' of every member"):
        members(pax([(key, "1")], kind=b"g") + member(b"disk.raw", DISK) + END)


def test_large_sizes_are_read_in_both_forms() -> None:
    """More than 8 GiB: GNU's binary numbers and pax' decimal ones. The file ends before, and that is said."""
    binary = b"\x80" + (20 * GiB).to_bytes(11, "big")
    for archive in (
        header(b"disk.raw", size_field=binary),
        pax([("size", str(20 * GiB))]) + header(b"disk.raw"),
    ):
        with pytest.raises(CorruptImage, match=r"member 'disk\.raw' of 21474836480 bytes is cut short"):
            members(archive + END)


# --- the end ---------------------------------------------------------------------------------------------------


def test_every_cut_is_noticed() -> None:
    archive = member(b"disk.raw", DISK)
    for length in range(len(archive) + 511):
        with pytest.raises(CorruptImage):
            members((archive + END)[:length])


@pytest.mark.parametrize("zeros", [512, 1024, 10240, 3 * MiB])
def test_zeros_at_the_end_are_as_many_as_there_are(zeros: int) -> None:
    assert len(members(member(b"disk.raw", DISK) + bytes(zeros))) == 1


@pytest.mark.parametrize("behind", [b"x", member(b"other", DISK)], ids=["byte", "archive"])
def test_anything_behind_the_end_is_refused(behind: bytes) -> None:
    archive = member(b"disk.raw", DISK) + END
    with pytest.raises(CorruptImage, match="ends, but more follows") as caught:
        members(archive + behind)
    assert caught.value.offset == len(archive)


def test_an_announced_member_that_does_not_come_is_noticed() -> None:
    with pytest.raises(CorruptImage, match="where a member was announced"):
        members(member(b"disk.raw", DISK) + pax([("path", "other")]) + END)


# --- sparse members --------------------------------------------------------------------------------------------


@every_sparse_form
@given(
    runs=st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 900)), max_size=60),
    behind=st.integers(0, 3000),
)
def test_a_sparse_member_has_its_pieces_and_zeros_between_them(
    form: str, runs: list[tuple[int, int]], behind: int
) -> None:
    at, pieces = 0, []
    for number, (gap, length) in enumerate(runs):
        pieces.append((at + gap, noise(length, number)))
        at += gap + length
    size = at + behind
    archive = sparse(form, size, pieces) + member(b"after", DISK) + END
    disk, after = members(archive)
    assert (disk.name, disk.size, content(disk)) == ("disk.raw", size, expanded(size, pieces))
    assert content(after) == DISK


@every_sparse_form
def test_holes_are_not_unpacked(form: str, tmp_path: Path) -> None:
    size = 4 * GiB
    path = tmp_path / "archive.tar"
    path.write_bytes(sparse(form, size, [(0, b"x"), (size - 1, b"y")]) + END)
    limits = WrapperLimits(zero_ratio=1, zero_ratio_from=0, ratio=10)
    with LocalFile.open_source(path) as file, unwrap(file, limits=limits) as inner:
        assert (inner.file.size, inner.file.pread(size - 1, 9)) == (size, b"y")
        assert inner.file.allocated_size < MiB


@every_sparse_form
def test_an_empty_piece_at_the_end_is_how_gnu_tar_marks_a_hole_there(form: str) -> None:
    (disk,) = members(sparse(form, 9000, [(0, b"x" * 512), (9000, b"")]) + END)
    assert content(disk) == b"x" * 512 + bytes(9000 - 512)


@every_sparse_form
@pytest.mark.parametrize(
    ("size", "pieces"),
    [
        (5000, [(1000, b"x" * 10), (0, b"y" * 10)]),
        (5000, [(0, b"x" * 10), (5, b"y" * 10)]),
        (5000, [(4995, b"x" * 10)]),
        (0, [(0, b"x")]),
    ],
    ids=["not in order", "on each other", "behind the end", "in nothing"],
)
def test_pieces_that_lie_are_refused(form: str, size: int, pieces: list[tuple[int, bytes]]) -> None:
    with pytest.raises(CorruptImage, match="a piece at"):
        members(sparse(form, size, pieces) + END)


def test_pieces_of_another_length_than_what_is_stored_are_refused() -> None:
    archive = bytearray(gnu_sparse(b"disk.raw", 9000, PIECES[:1]) + END)
    archive[386 + 12 : 386 + 24] = b"%011o\0" % 599
    archive[148:156] = b" " * 8
    archive[148:156] = b"%06o\0 " % sum(archive[:512])
    with pytest.raises(CorruptImage, match="599 bytes together, 600 are stored"):
        members(bytes(archive))


@pytest.mark.parametrize(
    "map_text",
    [b"", b"1\n0\n", b"x\n", b"-1\n", b"1\n0\n" + b"9" * 30 + b"\n", b"9" * 2000, b"2\n0\n1300\n"],
    ids=["none", "short", "letter", "negative", "long", "longer", "too few"],
)
def test_a_map_that_is_no_map_is_refused(map_text: bytes) -> None:
    with pytest.raises(CorruptImage):
        members(pax_sparse("disk.raw", 9000, [(0, DISK)], map_text=map_text) + END)


@every_sparse_form
def test_more_pieces_than_any_disk_has_are_refused(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrapper_tar, "MAX_RUNS", 50)
    pieces = [(number * 2, b"x") for number in range(80)]
    with pytest.raises(UnsafeImage, match="more than 50 pieces") as caught:
        members(sparse(form, 200, pieces) + END)
    assert caught.value.rule == "wrapper-limit"


def test_older_sparse_pax_forms_are_named() -> None:
    with pytest.raises(UnsupportedFeature, match=r"sparse pax format 0\.1"):
        members(pax_sparse("disk.raw", 9000, PIECES[:1], version=("0", "1")) + END)


def test_a_map_without_an_end_is_refused() -> None:
    archive = bytearray(gnu_sparse(b"disk.raw", 80_000, PIECES) + END)
    archive[482] = 1  # "more follows", and what follows is data
    archive[148:156] = b" " * 8
    archive[148:156] = b"%06o\0 " % sum(archive[:512])
    with pytest.raises(CorruptImage):
        members(bytes(archive))


# --- headers that lie ------------------------------------------------------------------------------------------


def test_a_number_that_is_none_is_refused() -> None:
    for field in (b"0000000009\0\0", b"-0000000001\0", b"\xff" * 12, b"1 1         "):
        with pytest.raises(CorruptImage, match="is not a number"):
            members(header(b"disk.raw", size_field=field) + END)


def test_a_folder_with_bytes_of_its_own_is_refused() -> None:
    """Readers disagree on whether bytes follow such a header."""
    with pytest.raises(CorruptImage, match="has 512 bytes of its own"):
        members(header(b"folder/", 512, kind=b"5") + bytes(512) + END)


@pytest.mark.parametrize(
    "records",
    [
        b"x",
        b"5 a=b",
        b"6 a=b\n ",
        b"99 a=b\n",
        b"6 a-b\n",
        b"0 a=b\n",
        b"-1 a=b\n",
        b"4 =\n\xff",
        b"18446744073709551616 a=b\n",
    ],
    ids=repr,
)
def test_pax_records_that_are_none_are_refused(records: bytes) -> None:
    archive = header(b"x", len(records), kind=b"x") + padded(records) + member(b"disk.raw", DISK) + END
    with pytest.raises(CorruptImage, match="damaged pax record"):
        members(archive)


def test_extensions_without_end_are_refused() -> None:
    with pytest.raises(CorruptImage, match="too many"):
        members(pax([("comment", "x")]) * 9 + member(b"disk.raw", DISK) + END)


def test_an_extension_too_long_for_a_name_is_refused() -> None:
    name = b"n" * (65 * KiB)
    with pytest.raises(CorruptImage, match="too long"):
        members(header(b"././@LongLink", len(name), kind=b"L") + padded(name) + member(b"x", DISK) + END)


@pytest.mark.parametrize("one", [member(b"file"), header(b"folder/", kind=b"5"), pax([("comment", "x")], kind=b"g")])
def test_members_are_limited_in_number(one: bytes) -> None:
    assert members(one * 5 + END, WrapperLimits(members=5)) is not None
    with pytest.raises(UnsafeImage, match="more than 5 members") as caught:
        members(one * 6 + END, WrapperLimits(members=5))
    assert caught.value.rule == "wrapper-limit"


def test_names_in_bytes_that_are_no_text_are_shown_all_the_same() -> None:
    (one,) = members(member(b"disk\xff\x1b.raw", DISK) + END)
    assert one.name == "disk\\xff\x1b.raw"


def test_a_checksum_of_signed_characters_is_understood() -> None:
    """As some old programs sum a name that is not ASCII."""
    block = bytearray(header(b"d\xe4.raw", len(DISK)))
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 8 * 32 + sum(block[156:]) - 256)
    archive = bytes(block) + padded(DISK) + END
    assert detect(MemoryFile(archive)) == "tar"
    assert content(members(archive)[0]) == DISK


@given(st.data())
def test_any_damage_to_headers_is_read_or_refused(data: st.DataObject) -> None:
    archive = bytearray(
        pax([("path", "disk.raw")]) + gnu_sparse(b"disk", 80_000, PIECES) + pax_sparse("b", 80_000, PIECES) + END
    )
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(archive) - 1))
        archive[at] = data.draw(st.sampled_from([0, 1, 0x30, 0x37, 0x39, 0x7F, 0x80, 0xFF]))
    for start in range(0, len(archive) - BLOCK, BLOCK):  # checksums right again: what lies is what is said
        if archive[start + 257 : start + 262] == b"ustar":
            archive[start + 148 : start + 156] = b" " * 8
            archive[start + 148 : start + 156] = b"%06o\0 " % sum(archive[start : start + BLOCK])
    try:
        for one in members(bytes(archive)):
            assert all(offset + len(piece) <= one.size for offset, piece in one.parts())
    except ImagekitError as error:
        assert type(error) in (CorruptImage, UnsupportedFeature, UnsafeImage)


def test_the_generator_agrees_with_python_on_sparse_members() -> None:
    """tarfile reads both forms: what the tests above are made of is what others mean by it."""
    for form in ("gnu", "pax"):
        archive = sparse(form, 80_000, PIECES) + END
        with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
            found = opened.extractfile("disk.raw")
            assert found is not None
            assert found.read() == expanded(80_000, PIECES)
