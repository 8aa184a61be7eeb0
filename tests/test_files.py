"""Files: positional reads and writes, holes, locks; the same in memory as on disk."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from imagekit.errors import SourceError, TargetError
from imagekit.formats.files import (
    MAX_IOV,
    LocalFile,
    MemoryFile,
    kernel_copy,
    lock_exclusively,
    same_file,
)
from tests.disks import noise
from tests.folders import unprivileged

MiB = 1 << 20
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="POSIX files")


@pytest.fixture(params=["disk", "memory"])
def new_file(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[bytes], LocalFile | MemoryFile]:
    """Makes a file, of either kind, that can be read and written."""

    def make(data: bytes) -> LocalFile | MemoryFile:
        if request.param == "memory":
            return MemoryFile(data)
        path = tmp_path / "file"
        path.write_bytes(data)
        file = LocalFile.open_for_change(path)
        request.addfinalizer(file.close)
        return file

    return make


NewFile = Callable[[bytes], "LocalFile | MemoryFile"]


def test_a_read_is_short_only_at_the_end_of_the_file(new_file: NewFile) -> None:
    file = new_file(b"0123456789")
    assert file.pread(2, 5) == b"23456"
    assert file.pread(8, 5) == b"89"
    assert file.pread(10, 5) == file.pread(99, 5) == b""
    buffer = bytearray(b"......")
    assert file.pread_into(7, memoryview(buffer)) == 3
    assert buffer == b"789..."


def test_buffers_are_written_one_behind_the_other(new_file: NewFile) -> None:
    file = new_file(b"__________")
    file.pwrite(2, b"ab", bytearray(), memoryview(b"cd"), b"e")
    assert file.pread(0, 20) == b"__abcde___"


def test_more_buffers_than_one_call_takes_are_all_written(new_file: NewFile) -> None:
    file = new_file(b"")
    file.pwrite(0, *(bytes([at % 251]) for at in range(3 * MAX_IOV + 7)))
    assert file.pread(0, 4 * MAX_IOV) == bytes(at % 251 for at in range(3 * MAX_IOV + 7))


def test_a_write_behind_the_end_leaves_zeros_between(new_file: NewFile) -> None:
    file = new_file(b"ab")
    file.pwrite(6, b"cd")
    assert file.pread(0, 20) == b"ab\0\0\0\0cd"


def test_truncating_cuts_or_adds_zeros(new_file: NewFile) -> None:
    file = new_file(b"abcdef")
    file.truncate(3)
    file.truncate(5)
    assert (file.size, file.pread(0, 9)) == (5, b"abc\0\0")


@given(st.lists(st.tuples(st.integers(0, 64), st.binary(max_size=16), st.integers(-1, 80)), max_size=20))
@example([(1, b"", -1)])
def test_memory_and_disk_are_the_same_after_any_changes(changes: list[tuple[int, bytes, int]]) -> None:
    if sys.platform != "linux":
        pytest.skip("memfd")
    memory = MemoryFile()
    with LocalFile(os.memfd_create("test"), "test") as disk:
        for offset, data, size in changes:
            for file in (memory, disk):
                file.pwrite(offset, data)
                if size >= 0:
                    file.truncate(size)
        assert disk.size == memory.size
        assert disk.pread(0, 200) == memory.pread(0, 200)


# --- opening ---------------------------------------------------------------------------------------------------


def test_a_missing_source_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file") as caught:
        LocalFile.open_source(tmp_path / "missing")
    assert caught.value.path == str(tmp_path / "missing")


@posix_only
def test_a_folder_is_not_a_source(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is a folder, not an image"):
        LocalFile.open_source(tmp_path)


@posix_only
def test_a_fifo_nobody_writes_to_is_refused_without_waiting(tmp_path: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("POSIX")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(SourceError, match="is a FIFO, not an image"):
        LocalFile.open_source(fifo)


@posix_only
def test_a_character_device_is_not_a_source() -> None:
    with pytest.raises(SourceError, match="is not a regular file, not an image"):
        LocalFile.open_source("/dev/zero")


@posix_only
def test_an_unreadable_source_is_said_to_be_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"x")
    path.chmod(0)
    with unprivileged(), pytest.raises(SourceError, match="cannot be opened: Permission denied"):
        LocalFile.open_source(path)


def test_a_name_through_a_file_is_a_source_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(SourceError):
        LocalFile.open_source(tmp_path / "file" / "below")


def test_what_is_missing_or_held_cannot_be_opened_for_change(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be opened for writing"):
        LocalFile.open_for_change(tmp_path / "missing")
    path = tmp_path / "image"
    path.write_bytes(b"x")
    with (
        LocalFile.open_for_change(path),
        pytest.raises(SourceError, match="is held by another program"),
    ):
        LocalFile.open_for_change(path)
    LocalFile.open_for_change(path).close()


def test_closing_twice_does_not_close_what_others_opened_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"x")
    file = LocalFile.open_source(path)
    file.close()
    with LocalFile.open_source(path) as other:
        file.close()
        assert other.pread(0, 1) == b"x"


@posix_only
def test_an_exclusive_lock_is_had_by_one_only(tmp_path: Path) -> None:
    path = tmp_path / "locked"
    one = os.open(path, os.O_RDWR | os.O_CREAT)
    other = os.open(path, os.O_RDWR)
    try:
        assert lock_exclusively(one)
        assert not lock_exclusively(other)
        os.close(one)
        assert lock_exclusively(other)
    finally:
        os.close(other)


def test_an_ordinary_file_is_held_by_nobody(tmp_path: Path) -> None:
    """Our own lock as a reader does not count, nor that of a second reader."""
    path = tmp_path / "image"
    path.write_bytes(bytes(512))
    with LocalFile.open_source(path) as one, LocalFile.open_source(path) as other:
        assert not one.held_for_writing
        assert not other.held_for_writing


# --- errors of the system --------------------------------------------------------------------------------------


def test_writing_to_a_file_opened_for_reading_is_a_target_error(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"x")
    with LocalFile.open_source(path) as file:
        with pytest.raises(TargetError, match="cannot be written"):
            file.pwrite(0, b"y")
        with pytest.raises(TargetError, match="cannot be written"):
            file.truncate(9)


@posix_only
@pytest.mark.parametrize("call", ["file.pwrite(0, bytes(1 << 20))", "file.truncate(1 << 20)"])
def test_a_limit_on_the_size_of_files_is_a_target_error_with_a_hint(call: str, tmp_path: Path) -> None:
    """EFBIG, in a process of its own: the limit cannot be lifted again."""
    code = f"""
import os, resource, signal
from imagekit.errors import TargetError
from imagekit.formats.files import LocalFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
file = LocalFile(os.open({str(tmp_path / "image")!r}, os.O_RDWR | os.O_CREAT), "image")
try:
    {call}
except TargetError as error:
    print(error, "/", error.hint)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == ""
    assert "cannot be written: File too large" in done.stdout
    assert "make room" in done.stdout


@posix_only
def test_a_source_that_cannot_be_read_on_is_a_source_error_with_the_offset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a failing disk: some bytes come, then EIO."""
    if sys.platform == "win32":
        pytest.skip("POSIX")
    path = tmp_path / "image"
    path.write_bytes(noise(8192))
    real, real_into = os.pread, os.preadv

    def failing(descriptor: int, length: int, offset: int) -> bytes:
        if offset >= 4096:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, min(length, 4096), offset)

    def failing_into(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if offset >= 4096:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real_into(descriptor, [buffers[0][:4096]], offset)

    with LocalFile.open_source(path) as file:
        monkeypatch.setattr(os, "pread", failing)
        monkeypatch.setattr(os, "preadv", failing_into)
        for read in (lambda: file.pread(0, 8192), lambda: file.pread_into(0, memoryview(bytearray(8192)))):
            with pytest.raises(SourceError, match="cannot be read: Input/output error") as caught:
                read()
            assert caught.value.offset == 4096


@posix_only
def test_a_read_that_the_system_answers_in_parts_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform == "win32":
        pytest.skip("POSIX")
    path = tmp_path / "image"
    path.write_bytes(noise(8192))
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: real(fd, min(length, 1000), offset))
    with LocalFile.open_source(path) as file:
        assert file.pread(100, 8192) == noise(8192)[100:]


def test_a_read_of_any_length_takes_no_more_memory_than_the_file_has(tmp_path: Path) -> None:
    """Lengths and offsets come from images."""
    path = tmp_path / "image"
    path.write_bytes(noise(1000))
    with LocalFile.open_source(path) as file:
        assert file.pread(10, 1 << 60) == noise(1000)[10:]
        assert file.pread(1 << 63, 512) == file.pread((1 << 62) - 1, 1 << 62) == file.pread(0, -1) == b""


@posix_only
def test_a_write_that_the_system_takes_in_parts_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform == "win32":
        pytest.skip("POSIX")
    path = tmp_path / "image"
    path.touch()
    real = os.pwritev

    def few(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return real(descriptor, [buffers[0][:3]], offset)

    with LocalFile.open_for_change(path) as file:
        monkeypatch.setattr(os, "pwritev", few)
        file.pwrite(1, b"0123456", b"", b"89", b"ab")
    assert path.read_bytes() == b"\x000123456" + b"89ab"


# --- holes and kernel copies -----------------------------------------------------------------------------------


def make_sparse(path: Path, parts: dict[int, bytes], size: int) -> None:
    with path.open("wb") as file:
        for offset, data in parts.items():
            file.seek(offset)
            file.write(data)
        file.truncate(size)


@posix_only
def test_the_holes_of_a_file_are_no_data(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    make_sparse(path, {MiB: noise(MiB), 5 * MiB: noise(MiB)}, 8 * MiB)
    with LocalFile.open_source(path) as file:
        found = list(file.data_ranges(0, 8 * MiB))
        if found == [(0, 8 * MiB)]:
            pytest.skip("this file system knows no holes")
        assert found == [(MiB, MiB), (5 * MiB, MiB)]
        assert list(file.data_ranges(MiB + 512, 4 * MiB)) == [(MiB + 512, MiB - 512), (5 * MiB, 512)]
        assert list(file.data_ranges(6 * MiB, 2 * MiB)) == []
        assert list(file.data_ranges(9 * MiB, MiB)) == []
        assert file.allocated_size < file.size


@posix_only
def test_who_goes_forward_through_data_asks_the_system_once_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look for the end of a stretch can cost as much as the stretch is long."""
    path = tmp_path / "disk"
    path.write_bytes(noise(4 * MiB))
    os.truncate(path, 8 * MiB)
    asked: list[int] = []
    seek = os.lseek

    def counted(fd: int, offset: int, how: int) -> int:
        if how == getattr(os, "SEEK_HOLE", -1):
            asked.append(offset)
        return seek(fd, offset, how)

    monkeypatch.setattr(os, "lseek", counted)
    with LocalFile.open_source(path) as file:
        parts = [list(file.data_ranges(at, 65536)) for at in range(0, 8 * MiB, 65536)]
        assert [part for part in parts if part] == [[(at, 65536)] for at in range(0, 4 * MiB, 65536)]
        assert asked == [0]


@posix_only
def test_what_is_written_into_a_hole_is_data_from_then_on(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(noise(MiB))
    os.truncate(path, 8 * MiB)
    with LocalFile.open_for_change(path) as file:
        assert list(file.data_ranges(0, 8 * MiB)) == [(0, MiB)]
        file.pwrite(5 * MiB, noise(4096))
        assert list(file.data_ranges(0, 8 * MiB)) == [(0, MiB), (5 * MiB, 4096)]
        file.pwrite(MiB, noise(4096))
        found = list(file.data_ranges(0, 8 * MiB))
        assert sum(length for _, length in found) == MiB + 8192
        assert found[-1] == (5 * MiB, 4096)


@posix_only
def test_a_file_cut_while_its_holes_are_looked_for_raises_nothing_of_its_own(tmp_path: Path) -> None:
    """Whoever reads the data finds out; asking for holes must not end in an untyped error."""
    path = tmp_path / "sparse"
    make_sparse(path, {0: noise(MiB), 4 * MiB: noise(MiB)}, 8 * MiB)
    with LocalFile.open_source(path) as file:
        ranges = file.data_ranges(0, 8 * MiB)
        next(ranges)
        os.truncate(path, 100)
        assert len(list(ranges)) <= 1


@posix_only
def test_a_file_cut_between_data_and_hole_counts_as_data_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sparse"
    path.write_bytes(bytes(8192))
    real = os.lseek

    def cut_in_between(descriptor: int, position: int, how: int) -> int:
        if how == getattr(os, "SEEK_HOLE", -1):
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        return real(descriptor, position, how)

    with LocalFile.open_source(path) as file:
        monkeypatch.setattr(os, "lseek", cut_in_between)
        assert list(file.data_ranges(0, 8192)) == [(0, 8192)]


@pytest.mark.skipif(sys.platform != "linux", reason="copy_file_range")
def test_the_kernel_copies_between_files_at_any_offsets(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(noise(3 * MiB))
    target.write_bytes(bytes(16))
    with LocalFile.open_source(source) as one, LocalFile.open_for_change(target) as other:
        assert kernel_copy(one, 1000, other, 5, 2 * MiB) == 2 * MiB
        assert kernel_copy(one, 3 * MiB - 10, other, 0, 100) == 10
    assert target.read_bytes()[10:] == noise(3 * MiB)[1005 : 1000 + 2 * MiB]


def test_the_kernel_copies_nothing_where_there_is_no_descriptor(tmp_path: Path) -> None:
    assert kernel_copy(MemoryFile(b"abc"), 0, MemoryFile(), 0, 3) == 0


@posix_only
@pytest.mark.parametrize(
    ("number", "kind", "expected"),
    [
        (errno.EXDEV, None, 0),
        (errno.ENOSYS, None, 0),
        (errno.ENOSPC, TargetError, 0),
        (errno.EIO, SourceError, 0),
    ],
    ids=["other file system", "old kernel", "full disk", "broken disk"],
)
def test_a_kernel_copy_that_fails_is_done_otherwise_or_typed(
    number: int, kind: type[Exception] | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sys.platform != "linux":
        pytest.skip("copy_file_range")

    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    monkeypatch.setattr(os, "copy_file_range", refuse)
    with LocalFile.open_source(path) as one, LocalFile.open_for_change(path) as other:
        if kind is None:
            assert kernel_copy(one, 0, other, 0, 100) == expected
        else:
            with pytest.raises(kind):
                kernel_copy(one, 0, other, 0, 100)


@posix_only
def test_preallocated_room_is_taken_at_once(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with LocalFile.open_for_change(path) as file:
        file.preallocate(MiB)
        assert file.size == MiB
        assert file.allocated_size >= MiB
        file.flush()


# --- identity --------------------------------------------------------------------------------------------------


def test_what_changed_about_a_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"before")
    os.utime(path, (1, 1))
    with LocalFile.open_source(path) as file:
        before = file.identity
        assert before.differences(file.identity) == []
        path.write_bytes(b"after that")
        changed = before.differences(file.identity)
    assert {"size", "mtime_ns"} <= set(changed)
    assert "inode" not in changed


def test_two_paths_to_one_file_are_the_same_file(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"x")
    assert not same_file(one, other)
    other.write_bytes(b"x")
    assert not same_file(one, other)
    other.unlink()
    other.hardlink_to(one)
    assert same_file(one, other)
