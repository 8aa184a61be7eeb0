"""Publishing: a name stands for a complete file or for none, whatever happens on the way."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from imagekit import publish
from imagekit.errors import TargetError, UsageError
from imagekit.formats.files import lock_exclusively
from imagekit.publish import check_space, check_target, check_windows_name, new_file, remove_stale_parts, write_file
from tests.folders import read_only, small

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="POSIX files")


@pytest.fixture(params=["nameless", "part"])
def each_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of writing a file before it has its name: the second is for file systems without O_TMPFILE."""
    if request.param == "part":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    elif not hasattr(os, "O_TMPFILE"):
        pytest.skip("no O_TMPFILE here")
    way: str = request.param
    return way


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- may it be written -----------------------------------------------------------------------------------------


def test_a_name_that_is_free_may_be_written(tmp_path: Path) -> None:
    assert check_target(tmp_path / "new.vhd", overwrite=False) == tmp_path / "new.vhd"


def test_a_file_that_exists_is_left_alone_unless_told_otherwise(tmp_path: Path) -> None:
    target = tmp_path / "old.vhd"
    target.write_bytes(b"old")
    with pytest.raises(TargetError, match="exists already") as caught:
        check_target(target, overwrite=False)
    assert caught.value.hint is not None
    assert "--overwrite" in caught.value.hint
    assert check_target(target, overwrite=True) == target


def _fifo(path: Path) -> None:
    if sys.platform != "win32":
        os.mkfifo(path)


@posix_only
@pytest.mark.parametrize("overwrite", [False, True], ids=["", "overwrite"])
@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda path: path.symlink_to("/nowhere"), "a symbolic link"),
        (lambda path: path.symlink_to(__file__), "a symbolic link"),
        (_fifo, "a FIFO"),
        (lambda path: path.mkdir(), "a folder"),
    ],
    ids=["dangling link", "link to a file", "fifo", "folder"],
)
def test_what_is_no_regular_file_is_never_written_to(
    make: Callable[[Path], None], what: str, *, overwrite: bool, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    make(target)
    with pytest.raises(TargetError, match=f"is {what}") as caught:
        check_target(target, overwrite=overwrite)
    assert caught.value.hint is not None


@posix_only
def test_a_device_is_never_written_to() -> None:
    with pytest.raises(TargetError, match="is a device"):
        check_target("/dev/null", overwrite=True)


def test_a_folder_that_is_missing_or_is_none_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="the folder does not exist") as caught:
        check_target(tmp_path / "missing" / "a.vhd", overwrite=False)
    assert caught.value.hint == f"make it first: mkdir -p {tmp_path / 'missing'}"
    (tmp_path / "file").touch()
    with pytest.raises(TargetError, match="Not a directory"):
        check_target(tmp_path / "file" / "a.vhd", overwrite=False)


def test_a_name_that_ends_in_a_slash_is_no_file_name(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="is a folder, not a file name"):
        check_target(f"{tmp_path}/new/", overwrite=False)
    with pytest.raises(TargetError):
        check_target("", overwrite=False)


@posix_only
@pytest.mark.parametrize("how", ["same path", "hard link", "symbolic link"])
def test_the_source_is_never_the_target(how: str, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"x")
    if how == "same path":
        target = tmp_path / "." / "source"
    elif how == "hard link":
        target.hardlink_to(source)
    else:
        target.symlink_to(source)
    with pytest.raises(UsageError, match="target and source are the same file"):
        check_target(target, overwrite=True, source=os.fspath(source))


@pytest.mark.parametrize("name", ["CON", "nul.vhd", "com1.vhd", "LPT9", "a:b.vhd", "disk.", "disk "])
def test_names_that_windows_takes_for_something_else_are_refused(name: str) -> None:
    with pytest.raises(TargetError, match="reserves or changes"):
        check_windows_name(Path(name))


@pytest.mark.parametrize("name", ["console.vhd", "com10.vhd", "a.con.vhd", "disk.vhd"])
def test_names_that_only_look_like_those_are_fine(name: str) -> None:
    check_windows_name(Path(name))


def test_more_than_the_file_system_has_is_refused_beforehand(tmp_path: Path) -> None:
    check_space(tmp_path, 1)
    with pytest.raises(TargetError, match=f"no space: {1 << 62} bytes are needed"):
        check_space(tmp_path, 1 << 62)


# --- writing and naming ----------------------------------------------------------------------------------------


def test_a_file_has_its_name_only_when_it_is_complete(each_way: str, tmp_path: Path) -> None:
    target = tmp_path / "disk.vhd"
    with new_file(target) as pending:
        pending.file.pwrite(0, b"half")
        assert not target.exists()
        assert len(names(tmp_path)) == (1 if each_way == "part" else 0)
        pending.file.pwrite(4, b" and half")
        pending.commit(overwrite=False, sync=True)
        assert target.read_bytes() == b"half and half"
    assert names(tmp_path) == ["disk.vhd"]


@pytest.mark.usefixtures("each_way")
def test_without_a_commit_nothing_remains(no_leftovers: Path) -> None:
    with new_file(no_leftovers / "a") as pending:
        pending.file.pwrite(0, b"x")
    with pytest.raises(ZeroDivisionError), new_file(no_leftovers / "b"):
        raise ZeroDivisionError


@pytest.mark.usefixtures("each_way")
def test_a_name_taken_meanwhile_stays_with_who_took_it(tmp_path: Path) -> None:
    target = tmp_path / "disk.vhd"
    with pytest.raises(TargetError, match="exists already"), new_file(target) as pending:
        target.write_bytes(b"theirs")
        pending.commit(overwrite=False, sync=False)
    assert target.read_bytes() == b"theirs"
    assert names(tmp_path) == ["disk.vhd"]


@pytest.mark.usefixtures("each_way")
def test_overwriting_leaves_the_old_file_to_those_who_read_it(tmp_path: Path) -> None:
    target = tmp_path / "disk.vhd"
    target.write_bytes(b"old")
    with target.open("rb") as reader:
        write_file(target, b"new", overwrite=True)
        assert reader.read() == b"old"
    assert target.read_bytes() == b"new"
    assert names(tmp_path) == ["disk.vhd"]


@pytest.mark.usefixtures("each_way")
def test_the_old_file_stays_as_it_was_when_the_new_one_fails(tmp_path: Path) -> None:
    target = tmp_path / "disk.vhd"
    target.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), new_file(target) as pending:
        pending.file.pwrite(0, b"new")
        raise ZeroDivisionError
    assert (target.read_bytes(), names(tmp_path)) == (b"old", ["disk.vhd"])


@posix_only
@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize(("mode", "umask", "expected"), [(0o666, 0o022, 0o644), (0o600, 0, 0o600), (0o666, 0, 0o666)])
def test_the_file_has_the_mode_asked_for(mode: int, umask: int, expected: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_file(tmp_path / "secret", b"x", mode=mode, sync=False)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == expected


@pytest.mark.usefixtures("each_way")
def test_of_twenty_who_want_one_name_one_gets_it(tmp_path: Path) -> None:
    target = tmp_path / "disk.vhd"
    start, won, lost = threading.Barrier(20), list[bytes](), list[TargetError]()

    def write(number: int) -> None:
        data = b"%d" % number * 1000
        try:
            with new_file(target) as pending:
                pending.file.pwrite(0, data)
                start.wait()
                pending.commit(overwrite=False, sync=False)
            won.append(data)
        except TargetError as error:
            lost.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 19)
    assert target.read_bytes() == won[0]
    assert names(tmp_path) == ["disk.vhd"]


@posix_only
@pytest.mark.usefixtures("each_way")
def test_a_read_only_folder_is_a_target_error(tmp_path: Path) -> None:
    with read_only(tmp_path), pytest.raises(TargetError, match="cannot be created"):
        write_file(tmp_path / "disk.vhd", b"x")


@posix_only
@pytest.mark.usefixtures("each_way")
def test_a_full_file_system_is_a_target_error_and_leaves_nothing(tmp_path: Path) -> None:
    with small(tmp_path, 1 << 16) as folder:
        with pytest.raises(TargetError, match="No space left on device"):
            write_file(folder / "disk.vhd", bytes(1 << 20))
        assert names(folder) == []


@posix_only
@pytest.mark.usefixtures("each_way")
def test_a_name_longer_than_names_can_be_is_a_target_error(no_leftovers: Path) -> None:
    with pytest.raises(TargetError):
        write_file(no_leftovers / ("x" * 300), b"x")


@posix_only
def test_a_file_system_without_links_gets_the_file_by_its_name_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAT, and some network file systems: no nameless files there either."""

    def no_links(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    monkeypatch.setattr(os, "link", no_links)
    target = tmp_path / "disk.vhd"
    write_file(target, b"one")
    with pytest.raises(TargetError, match="exists already"), new_file(target) as pending:
        pending.commit(overwrite=False, sync=False)
    write_file(target, b"two", overwrite=True)
    assert (target.read_bytes(), names(tmp_path)) == (b"two", ["disk.vhd"])


# --- durable ---------------------------------------------------------------------------------------------------


@posix_only
def test_the_data_is_on_the_medium_before_the_name_and_the_name_before_we_say_so(
    each_way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, seen = tmp_path / "disk.vhd", list[tuple[str, bool]]()
    real = os.fsync

    def watched(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        seen.append((kind, target.exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    write_file(target, b"x")
    assert seen == [("file", False), ("folder", True)]
    seen.clear()
    write_file(target, b"y", overwrite=True, sync=False)
    assert seen == []


def failing_sync(*, of: str) -> Callable[[int], None]:
    real = os.fsync

    def sync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == (of == "folder"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    return sync


@posix_only
@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("of", ["file", "folder"])
def test_what_cannot_be_made_durable_is_not_published(
    of: str, no_leftovers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", failing_sync(of=of))
    with pytest.raises(TargetError, match="Input/output error"):
        write_file(no_leftovers / "disk.vhd", b"x")


@posix_only
@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize(("of", "expected"), [("file", b"old"), ("folder", b"new")])
def test_overwriting_never_ends_with_neither_file(
    of: str, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the old file is replaced it is gone: taking the new one away as well would lose both."""
    target = tmp_path / "disk.vhd"
    target.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", failing_sync(of=of))
    with pytest.raises(TargetError, match="Input/output error"):
        write_file(target, b"new", overwrite=True)
    assert (target.read_bytes(), names(tmp_path)) == (expected, ["disk.vhd"])


# --- what a killed run leaves ----------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from imagekit.publish import new_file
if sys.argv[2] == "part" and hasattr(os, "O_TMPFILE"):
    del os.O_TMPFILE
with new_file(Path(sys.argv[1])) as pending:
    pending.file.pwrite(0, b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@posix_only
def test_after_kill_9_there_is_no_name_and_the_next_run_tidies_up(each_way: str, tmp_path: Path) -> None:
    target = tmp_path / "disk.vhd"
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), each_way], capture_output=True)
    assert done.returncode == -9
    assert len(names(tmp_path)) == (1 if each_way == "part" else 0)
    write_file(target, b"whole")
    assert names(tmp_path) == ["disk.vhd"]


@posix_only
def test_only_parts_of_this_target_that_nobody_holds_are_removed(tmp_path: Path) -> None:
    target = tmp_path / "disk.vhd"
    stale, held = tmp_path / ".disk.vhd.0123.part", tmp_path / ".disk.vhd.4567.part"
    others = [tmp_path / ".other.vhd.0123.part", tmp_path / "disk.vhd.part", tmp_path / ".disk.vhd.0123"]
    for path in (stale, held, *others):
        path.write_bytes(b"x")
    descriptor = os.open(held, os.O_RDWR)
    try:
        assert lock_exclusively(descriptor)
        remove_stale_parts(target)
    finally:
        os.close(descriptor)
    assert names(tmp_path) == sorted(path.name for path in (held, *others))


@posix_only
def test_overwriting_tidies_up_too(each_way: str, tmp_path: Path) -> None:
    """Killed between link and rename, a run leaves a part also where files have no name at first."""
    (tmp_path / ".disk.vhd.0123.part").write_bytes(b"x")
    write_file(tmp_path / "disk.vhd", b"new", overwrite=True)
    assert names(tmp_path) == ["disk.vhd"]


@posix_only
def test_a_part_that_another_run_took_for_stale_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between making a part and locking it there is a moment in which it looks like one left behind."""
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    real, reaped = lock_exclusively, list[str]()

    def reaper_was_here(descriptor: int) -> bool:
        if not reaped:
            (part,) = tmp_path.iterdir()
            reaped.append(part.name)
            part.unlink()
        return real(descriptor)

    monkeypatch.setattr(publish, "lock_exclusively", reaper_was_here)
    write_file(tmp_path / "disk.vhd", b"x")
    assert names(tmp_path) == ["disk.vhd"]
    assert len(reaped) == 1
