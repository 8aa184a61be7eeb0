"""zip: the one disk of an archive, and directories that say something else than the rest."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagekit.errors import CorruptImage, ImagekitError, UnsafeImage, UnsupportedFeature
from imagekit.formats.files import LocalFile, MemoryFile
from imagekit.wrappers.parts import WrapperLimits
from imagekit.wrappers.unwrap import DEFAULT_LIMITS, unwrap
from imagekit.wrappers.zip import zip_members
from tests.disks import noise, text

KiB, MiB = 1 << 10, 1 << 20
DISK = noise(900) + text(2000) + bytes(5000)
STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
every_method = pytest.mark.parametrize("method", [STORED, DEFLATED], ids=["stored", "deflated"])


def made(*members: tuple[str, bytes], method: int = DEFLATED, comment: bytes = b"") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data, method)
        archive.comment = comment
    return out.getvalue()


def chosen(tmp_path: Path, data: bytes, limits: WrapperLimits = DEFAULT_LIMITS) -> tuple[str, bytes]:
    path = tmp_path / "archive.zip"
    path.write_bytes(data)
    with LocalFile.open_source(path) as file, unwrap(file, limits=limits) as inner:
        assert inner.chain == ("zip",)
        return inner.name, inner.file.pread(0, inner.file.size)


def poked(archive: bytes, at: int, fmt: str, value: int) -> bytes:
    out = bytearray(archive)
    struct.pack_into("<" + fmt, out, at, value)
    return bytes(out)


def entry_at(archive: bytes, number: int = 0) -> int:
    """Where the directory has its entry of that number."""
    at = int.from_bytes(archive[archive.rfind(b"PK\5\6") + 16 :][:4], "little")
    for _ in range(number):
        at += 46 + sum(struct.unpack_from("<HHH", archive, at + 28))
    return at


# --- what is chosen --------------------------------------------------------------------------------------------


@every_method
def test_the_only_file_is_the_disk_whatever_its_name(method: int, tmp_path: Path) -> None:
    assert chosen(tmp_path, made(("folder/", b""), ("folder/image", DISK), method=method)) == ("image", DISK)


@pytest.mark.parametrize("name", ["disk.vhd", "folder\\disk.vhd", "größe/disk.vhd", "disk.vhd" * 100], ids=len)
def test_among_several_files_the_one_named_like_a_disk_is_it(name: str, tmp_path: Path) -> None:
    archive = made(("LICENSE.txt", b"x" * 100), (name, DISK), ("__MACOSX/._disk.vhd", b"y"), ("._disk.vhd", b"z"))
    found, data = chosen(tmp_path, archive)
    assert name.endswith(found)
    assert data == DISK


def test_two_disks_are_refused_by_their_names(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeature, match=r"more than one disk: 'a\.vhdx', 'b\.vhdx'"):
        chosen(tmp_path, made(("a.vhdx", DISK), ("b.vhdx", DISK), ("readme", b"x")))


def test_an_empty_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeature, match="holds no file"):
        chosen(tmp_path, made())


def test_members_written_to_a_pipe_are_read_by_the_directory(tmp_path: Path) -> None:
    """Their local headers hold no sizes: those come behind the data."""

    class Pipe(io.RawIOBase):
        def __init__(self) -> None:
            self.data = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, piece: object) -> int:
            self.data += bytes(piece)  # type: ignore[call-overload]
            return len(bytes(piece))  # type: ignore[call-overload]

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", DEFLATED) as archive:
        archive.writestr("disk.raw", DISK)
    assert struct.unpack_from("<H", pipe.data, 6)[0] & 8
    assert chosen(tmp_path, bytes(pipe.data)) == ("disk.raw", DISK)


def test_zip64_is_read(tmp_path: Path) -> None:
    """All sizes and places in the 64-bit fields, as for a disk beyond 4 GiB."""
    archive = made(("disk.raw", DISK))
    entry, end = entry_at(archive), archive.rfind(b"PK\5\6")
    packed, size = struct.unpack_from("<II", archive, entry + 20)
    extra = struct.pack("<HHHQQQ", 0x1234, 0, 1, 0, 0, 0)[:4] + struct.pack("<HHQQQ", 1, 24, size, packed, 0)
    directory = bytearray(archive[entry:end] + extra)
    struct.pack_into("<II", directory, 20, 0xFFFFFFFF, 0xFFFFFFFF)
    struct.pack_into("<H", directory, 30, len(extra))
    struct.pack_into("<I", directory, 42, 0xFFFFFFFF)
    end64 = entry + len(directory)
    record = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, len(directory), entry)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, end64, 1)
    last = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    whole = archive[:entry] + directory + record + locator + last
    with zipfile.ZipFile(io.BytesIO(whole)) as opened:
        assert opened.read("disk.raw") == DISK
    assert chosen(tmp_path, whole) == ("disk.raw", DISK)
    for at, value in ((end64, b"PK\0\0"), (end64 + 4, b"\x2d"), (entry + len(directory) - 26, b"\x10")):
        damaged = bytearray(whole)
        damaged[at : at + len(value)] = value
        with pytest.raises((CorruptImage, UnsafeImage)):
            chosen(tmp_path, bytes(damaged))


@every_method
def test_holes_of_the_archive_count_as_the_zeros_they_are(method: int, tmp_path: Path) -> None:
    data = noise(5000) + bytes(3 * MiB) + b"x" + bytes(2 * MiB)
    archive = made(("disk.raw", data), method=method)
    path = tmp_path / "sparse.zip"
    with path.open("wb") as out:
        for at in range(0, len(archive), 4096):
            piece = archive[at : at + 4096]
            if any(piece):
                out.seek(at)
                out.write(piece)
    with LocalFile.open_source(path) as file, unwrap(file) as inner:
        assert inner.file.pread(0, len(data) + 1) == data


# --- the end ---------------------------------------------------------------------------------------------------


def test_every_cut_is_noticed() -> None:
    archive = made(("disk.raw", DISK))
    for length in range(4, len(archive)):
        with pytest.raises(CorruptImage):
            zip_members(MemoryFile(archive[:length], "cut"), DEFAULT_LIMITS)


@pytest.mark.parametrize("comment", [b"", b"made by hand", bytes(65535)], ids=["none", "short", "longest"])
@pytest.mark.parametrize("padding", [0, 1, 60_000])
def test_a_comment_and_zeros_may_stand_at_the_end(comment: bytes, padding: int, tmp_path: Path) -> None:
    archive = made(("disk.raw", DISK), comment=comment) + bytes(padding)
    assert chosen(tmp_path, archive) == ("disk.raw", DISK)


def test_anything_behind_the_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptImage, match="without its end"):
        chosen(tmp_path, made(("disk.raw", DISK)) + b"x")


def test_two_ends_are_refused(tmp_path: Path) -> None:
    """The comment of one archive can be the directory of another: readers differ in which they find."""
    other = made(("disk.raw", b"other"))
    archive = made(("disk.raw", DISK), comment=other)
    with pytest.raises(UnsafeImage, match="two ends") as caught:
        chosen(tmp_path, archive)
    assert caught.value.rule == "ambiguous"


def test_bytes_between_the_directory_and_its_end_are_refused(tmp_path: Path) -> None:
    archive = made(("disk.raw", DISK))
    end = archive.rfind(b"PK\5\6")
    with pytest.raises(CorruptImage, match="does not end at its end record"):
        chosen(tmp_path, archive[:end] + b"hidden" + archive[end:])


def test_bytes_before_the_archive_are_refused(tmp_path: Path) -> None:
    """As of a program that unpacks itself."""
    archive = made(("disk.raw", DISK))
    with pytest.raises(CorruptImage):
        chosen(tmp_path, b"PK\3\4" + archive)


@pytest.mark.parametrize("at", [4, 6], ids=["this volume", "the directory's volume"])
def test_several_volumes_are_refused(at: int, tmp_path: Path) -> None:
    archive = made(("disk.raw", DISK))
    with pytest.raises(UnsupportedFeature, match="several volumes"):
        chosen(tmp_path, poked(archive, archive.rfind(b"PK\5\6") + at, "H", 1))
    with pytest.raises(UnsupportedFeature, match="several volumes"):
        chosen(tmp_path, b"PK\x07\x08" + archive)


# --- members that are not what they seem -----------------------------------------------------------------------


@every_method
def test_a_changed_byte_of_the_data_is_noticed(method: int, tmp_path: Path) -> None:
    archive = made(("disk.raw", DISK), method=method)
    for at in range(30 + 8, entry_at(archive), 97):
        with pytest.raises(CorruptImage):
            chosen(tmp_path, poked(archive, at, "B", archive[at] ^ 0x10))


@every_method
@pytest.mark.parametrize("change", [-1, 1, 100_000])
def test_a_size_that_is_not_the_data_s_is_noticed(method: int, change: int, tmp_path: Path) -> None:
    archive = made(("disk.raw", DISK), method=method)
    for at in (20, 24):
        wrong = struct.unpack_from("<I", archive, entry_at(archive) + at)[0] + change
        with pytest.raises(CorruptImage):
            chosen(tmp_path, poked(archive, entry_at(archive) + at, "I", wrong))


def test_a_stream_that_goes_on_beyond_its_size_is_cut_off_at_once(tmp_path: Path) -> None:
    """A megabyte packed, announced as ten bytes: no more than a piece of it is unpacked."""
    archive = made(("disk.raw", b"A" * (64 * MiB)))
    archive = poked(archive, entry_at(archive) + 24, "I", 10)
    with pytest.raises(CorruptImage, match="10 bytes in the directory, more unpacked"):
        chosen(tmp_path, archive, WrapperLimits(ratio=0, ratio_from=2 * MiB))


@pytest.mark.parametrize("flag", [1, 1 << 6, 1 << 13], ids=["classic", "strong", "directory"])
def test_an_encrypted_disk_is_refused(flag: int, tmp_path: Path) -> None:
    archive = made(("disk.raw", DISK))
    archive = poked(poked(archive, entry_at(archive) + 8, "H", flag), 6, "H", flag)
    with pytest.raises(UnsupportedFeature, match=r"'disk\.raw' is encrypted"):
        chosen(tmp_path, archive)


@pytest.mark.parametrize(("method", "name"), [(9, "Deflate64"), (14, "LZMA"), (97, "method 97")])
def test_other_methods_are_named(method: int, name: str, tmp_path: Path) -> None:
    archive = made(("disk.raw", DISK))
    archive = poked(poked(archive, entry_at(archive) + 10, "H", method), 8, "H", method)
    with pytest.raises(UnsupportedFeature, match=f"packed with {name}"):
        chosen(tmp_path, archive)


def test_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        link = zipfile.ZipInfo("disk.raw")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, "/dev/sda")
    with pytest.raises(UnsafeImage, match=r"'disk\.raw' is a symbolic link") as caught:
        chosen(tmp_path, out.getvalue())
    assert caught.value.rule == "wrapper-reference"


@pytest.mark.parametrize(
    ("at", "fmt", "value"), [(30, "B", ord("D")), (8, "H", 0), (6, "H", 1)], ids=["name", "method", "flags"]
)
def test_a_local_header_that_says_something_else_is_refused(at: int, fmt: str, value: int, tmp_path: Path) -> None:
    with pytest.raises(UnsafeImage, match="local header says something else") as caught:
        chosen(tmp_path, poked(made(("disk.raw", DISK)), at, fmt, value))
    assert caught.value.rule == "ambiguous"


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"):
        archive = made(("disk.raw", DISK), ("disk.raw", b"other"))
    with pytest.raises(UnsafeImage, match="two members are called") as caught:
        chosen(tmp_path, archive)
    assert caught.value.rule == "ambiguous"


@pytest.mark.parametrize("where", [1, 0xFFFFFFFE, 60])
def test_a_local_header_that_is_not_there_is_noticed(where: int, tmp_path: Path) -> None:
    archive = made(("disk.raw", DISK))
    with pytest.raises(CorruptImage, match="no local header"):
        chosen(tmp_path, poked(archive, entry_at(archive) + 42, "I", where))


def test_data_that_reaches_into_the_directory_is_noticed(tmp_path: Path) -> None:
    archive = made(("disk.raw", DISK))
    with pytest.raises(CorruptImage, match="reaches into the directory"):
        chosen(tmp_path, poked(archive, entry_at(archive) + 20, "I", len(archive)))


def test_members_are_limited_in_number(tmp_path: Path) -> None:
    archive = made(("disk.raw", DISK), *((f"file{number}", b"") for number in range(5)))
    assert chosen(tmp_path, archive, WrapperLimits(members=6)) == ("disk.raw", DISK)
    with pytest.raises(UnsafeImage, match="6 members in a zip archive") as caught:
        chosen(tmp_path, archive, WrapperLimits(members=5))
    assert caught.value.rule == "wrapper-limit"


def test_a_directory_of_any_length_is_not_read_into_memory(tmp_path: Path) -> None:
    entry = made(("disk.raw", DISK))
    one = entry[entry_at(entry) : entry.rfind(b"PK\5\6")]
    long = one[:32] + struct.pack("<H", 65535) + one[34:] + bytes(65535)
    directory = long * 70
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 70, 70, len(directory), entry_at(entry), 0)
    with pytest.raises(UnsafeImage, match="with a directory of 45") as caught:
        chosen(tmp_path, entry[: entry_at(entry)] + directory + end)
    assert caught.value.rule == "wrapper-limit"


@pytest.mark.parametrize("entries", [0, 2, 3])
def test_a_directory_of_another_number_of_entries_is_noticed(entries: int, tmp_path: Path) -> None:
    archive = made(("disk.raw", DISK))
    end = archive.rfind(b"PK\5\6")
    with pytest.raises(CorruptImage, match="zip directory"):
        chosen(tmp_path, poked(poked(archive, end + 8, "H", entries), end + 10, "H", entries))


@given(st.data())
def test_any_damage_is_read_or_refused(data: st.DataObject) -> None:
    archive = bytearray(made(("disk.raw", DISK), ("readme", b"x" * 50)))
    tables = [*range(38), *range(entry_at(bytes(archive)), len(archive))]
    for _ in range(data.draw(st.integers(1, 4))):
        archive[data.draw(st.sampled_from(tables))] = data.draw(st.integers(0, 255))
    try:
        for one in zip_members(MemoryFile(archive, "damaged"), DEFAULT_LIMITS):
            crc = 0
            for _, piece in one.parts():
                crc = zlib.crc32(piece, crc)
            if one.name == "disk.raw":
                assert crc == zlib.crc32(DISK) or one.size != len(DISK)
    except ImagekitError as error:
        assert type(error) in (CorruptImage, UnsupportedFeature, UnsafeImage)
