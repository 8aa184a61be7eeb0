"""Putting a finished file under its name: complete or not at all.

The file is written without a name (``O_TMPFILE``) and linked when it is complete and on the medium, which fails if
the name exists meanwhile; after ``kill -9`` nothing is left. Where the file system or the platform cannot do that, it
is written as ``.NAME.RANDOM.part`` under a lock, and renamed; a later run removes parts whose lock is free.

``--overwrite`` replaces by rename, so that readers of the old file keep it.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from imagekit.errors import TargetError, UsageError
from imagekit.formats.files import LocalFile, lock_exclusively, same_file
from imagekit.progress import Control

PART = ".part"
_BINARY = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_NO_TMPFILE = {errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL}
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}


def check_target(path: str | os.PathLike[str], *, overwrite: bool, source: str | None = None) -> Path:
    """The target's path, once it is clear that it may be written. TargetError or UsageError say why not."""
    target = Path(path)
    name = os.fspath(path)
    if not target.name or name.endswith(("/", os.sep)):
        raise TargetError("is a folder, not a file name", path=name, hint="name the file to write")
    if sys.platform == "win32":
        check_windows_name(target)
    if source is not None and same_file(source, target):
        raise UsageError("target and source are the same file", path=name, hint="choose another target")
    try:
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        _check_folder(target.parent)
        return target
    except OSError as error:
        raise TargetError(f"cannot be looked at: {error.strerror}", path=name) from error
    if not stat.S_ISREG(mode):
        kinds = {
            stat.S_IFLNK: "a symbolic link",
            stat.S_IFIFO: "a FIFO",
            stat.S_IFDIR: "a folder",
            stat.S_IFBLK: "a block device",
            stat.S_IFCHR: "a device",
        }
        raise TargetError(
            f"is {kinds.get(stat.S_IFMT(mode), 'not a regular file')}; imagekit writes regular files only",
            path=name,
            hint="name a new file, and move or dd it from there",
        )
    if not overwrite:
        raise TargetError("exists already", path=name, hint="choose another name, or --overwrite")
    _check_folder(target.parent)
    return target


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        raise TargetError("the folder does not exist", path=folder, hint=f"make it first: mkdir -p {folder}")
    if not folder.is_dir():
        raise TargetError("is not a folder", path=folder)


_RESERVED = {
    "CON",
    "PRN",
    "AUX",
    "NUL",
    *(f"{kind}{number}" for kind in ("COM", "LPT") for number in range(1, 10)),
}


def check_windows_name(target: Path) -> None:
    """Names that Windows takes for something else: devices, streams, trailing dots. Not run on Windows."""
    name = target.name
    if name.split(".")[0].upper() in _RESERVED or ":" in name or name[-1] in ". ":
        raise TargetError("is a name that Windows reserves or changes", path=target, hint="choose another name")


def check_space(folder: Path, needed: int) -> None:
    """TargetError when the file system has less than ``needed`` bytes left."""
    if sys.platform == "win32":
        from shutil import disk_usage

        free = disk_usage(folder).free
    else:
        info = os.statvfs(folder)
        free = info.f_bavail * info.f_frsize
    if free < needed:
        raise TargetError(
            f"no space: {needed} bytes are needed, {free} are free",
            path=folder,
            hint="make room or go elsewhere",
        )


class Pending:
    """A file being written; it gets its name by :meth:`commit`, or never."""

    def __init__(self, target: Path, mode: int) -> None:
        self.target = target
        self.part: Path | None = None
        self.committed = False
        fd = self._open_nameless(mode)
        if fd is None:
            remove_stale_parts(target)
            self.part, fd = self._open_part(mode)
        self.file = LocalFile(fd, os.fspath(target))

    def _open_nameless(self, mode: int) -> int | None:
        flag = getattr(os, "O_TMPFILE", None)
        if flag is None:
            return None
        try:
            return os.open(self.target.parent, flag | os.O_RDWR | _BINARY, mode)
        except OSError as error:
            if error.errno in _NO_TMPFILE:
                return None
            raise _cannot_create(error, self.target) from error

    def _open_part(self, mode: int) -> tuple[Path, int]:
        while True:
            part = _part_name(self.target)
            try:
                fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | _BINARY, mode)
            except OSError as error:
                raise _cannot_create(error, self.target) from error
            # Before the lock is taken another run may take it for one that a killed run left, and remove it.
            if lock_exclusively(fd) and part.exists():
                return part, fd
            os.close(fd)

    def commit(self, *, overwrite: bool, sync: bool) -> None:
        """Make the file durable (unless told not to) and give it its name. TargetError when that is taken."""
        if sync:
            self.file.flush()
        if self.part is None and overwrite:
            # Linked only to be renamed at once; what a run killed in between left is removed by the next.
            remove_stale_parts(self.target)
            fd = self.file.fileno()
            assert fd is not None
            lock_exclusively(fd)
            part = _part_name(self.target)
            self._link(part)
            self.part = part
        if self.part is None:
            self._link(self.target)
        else:
            self._rename(overwrite=overwrite)
        self.committed = True
        if sync:
            try:
                flush_folder(self.target.parent)
            except TargetError:
                if not overwrite:  # the old file is gone already: the new one, complete, is better than none
                    self.target.unlink()  # a name that may be gone after a power cut is not published
                raise

    def _link(self, name: Path) -> None:
        fd = self.file.fileno()
        try:
            # The folder descriptor is not looked at (the path is absolute), but makes Python call linkat(), which
            # can follow the link that /proc holds; link() cannot.
            os.link(f"/proc/self/fd/{fd}", name, src_dir_fd=fd, follow_symlinks=True)
        except FileExistsError:
            raise _taken(self.target) from None
        except OSError as error:
            raise _cannot_create(error, self.target) from error

    def _rename(self, *, overwrite: bool) -> None:
        assert self.part is not None
        if sys.platform == "win32":
            self.file.close()  # an open file cannot be renamed there
        try:
            if overwrite:
                self.part.replace(self.target)
            elif sys.platform == "win32":
                self.part.rename(self.target)  # fails there when the name is taken
            else:
                self._give_name(self.part)
        except FileExistsError:
            raise _taken(self.target) from None
        except OSError as error:
            raise _cannot_create(error, self.target) from error

    def _give_name(self, part: Path) -> None:
        """Rename, but fail when the name is taken: what only a link does at once."""
        try:
            os.link(part, self.target)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # FAT and its like have no links: between this look and the rename another program may take the name.
            if os.path.lexists(self.target):
                raise FileExistsError from None
            part.rename(self.target)
        else:
            part.unlink()

    def discard(self) -> None:
        self.file.close()
        if self.part is not None and not self.committed:
            with suppress(OSError):
                self.part.unlink()


@contextmanager
def new_file(target: Path, *, mode: int = 0o666) -> Iterator[Pending]:
    """A new file for ``target``; without a commit nothing of it remains."""
    pending = Pending(target, mode)
    try:
        yield pending
    finally:
        pending.discard()


def finish(pending: Pending, *, overwrite: bool, sync: bool, control: Control) -> None:
    """Make a complete file durable and give it its name, unless the caller asked to stop."""
    control.tell("sync", 0, pending.file.size)
    if sync:
        pending.file.flush()
    control.check()  # the last look: what has its name stays
    pending.commit(overwrite=overwrite, sync=sync)


def write_file(
    path: str | os.PathLike[str],
    data: bytes,
    *,
    mode: int = 0o666,
    overwrite: bool = False,
    sync: bool = True,
) -> Path:
    """Publish ``data`` under ``path`` in one step."""
    target = check_target(path, overwrite=overwrite)
    with new_file(target, mode=mode) as pending:
        pending.file.pwrite(0, data)
        pending.commit(overwrite=overwrite, sync=sync)
    return target


def _part_name(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.urandom(4).hex()}{PART}")


def remove_stale_parts(target: Path) -> None:
    """Remove what a killed run left of this target: parts nobody holds a lock on."""
    prefix = f".{target.name}."
    for part in target.parent.iterdir():
        if not (part.name.startswith(prefix) and part.name.endswith(PART)):
            continue
        with suppress(OSError):
            fd = os.open(part, os.O_RDWR | _BINARY)
            try:
                if lock_exclusively(fd):
                    part.unlink()
            finally:
                os.close(fd)


def flush_folder(folder: Path) -> None:
    """Make a new name durable, where the platform has a way to."""
    if sys.platform == "win32":
        return
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | _BINARY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise TargetError(f"the folder cannot be synced: {error.strerror}", path=folder) from error
    finally:
        os.close(fd)


def _taken(target: Path) -> TargetError:
    return TargetError("exists already", path=target, hint="choose another name, or --overwrite")


def _cannot_create(error: OSError, target: Path) -> TargetError:
    return TargetError(f"cannot be created: {error.strerror}", path=target, hint="check the folder's permissions")
