"""Files: positional reads and writes on local files and on memory. Everything OS-specific is here.

POSIX: ``pread``/``pwritev``, ``SEEK_DATA``, ``copy_file_range``, the byte locks that QEMU takes. Windows: the same
methods behind a lock, sharing modes instead of locks, FSCTLs (files_windows.py). *The Windows branches are
type-checked but were not run on Windows.*

What this file does not do: decide. It says that QEMU holds a file for writing; the policy says that it matters.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from imagekit.errors import SourceError, TargetError
from imagekit.formats.base import Buffer, File
from imagekit.records import dataclass

MAX_IOV = 1024
"""Buffers a single pwritev takes (IOV_MAX on Linux)."""

# QEMU marks the permissions it holds by read locks on bytes from 100, and those it does not grant to others on
# bytes from 200 (QEMU block/file-posix.c: RAW_LOCK_PERM_BASE, RAW_LOCK_SHARED_BASE; bit numbers: BLK_PERM_*).
QEMU_HELD = 100
QEMU_DENIED = 200
QEMU_CONSISTENT_READ, QEMU_WRITE, QEMU_RESIZE = 0, 1, 3

SMALL_READ = 1 << 20
"""A pread asked for more than this looks at the file's length first: the room for it is taken at once."""

MAX_OFFSET = 1 << 62
"""No file is longer, and the system's own numbers end soon after."""

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What must not change while a source is read."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    def differences(self, other: FileIdentity) -> list[str]:
        """Names of the fields that differ."""
        return [name for name in self.__slots__ if getattr(self, name) != getattr(other, name)]


if sys.platform == "win32":
    import ctypes
    import msvcrt
    import threading

    from imagekit.formats import files_windows

    _POSITION = threading.Lock()

    def _pread_into(fd: int, offset: int, buffer: memoryview) -> int:
        # os.pread does not exist here; one lock makes seek + read one step.
        with _POSITION:
            os.lseek(fd, offset, os.SEEK_SET)
            data = os.read(fd, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _pread(fd: int, offset: int, length: int) -> bytes:
        with _POSITION:
            os.lseek(fd, offset, os.SEEK_SET)
            return os.read(fd, length)

    def _pwrite(fd: int, offset: int, buffers: list[memoryview]) -> int:
        with _POSITION:
            os.lseek(fd, offset, os.SEEK_SET)
            return os.write(fd, buffers[0])

    def _open_source(path: str) -> int:
        generic_read, share_read, open_existing = 0x80000000, 0x00000001, 3
        kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
        kernel32.CreateFileW.restype = ctypes.c_void_p
        # Without FILE_SHARE_WRITE this fails while another program has the file open for writing.
        handle = kernel32.CreateFileW(path, generic_read, share_read, None, open_existing, 0, None)
        if handle in (None, ctypes.c_void_p(-1).value):
            raise ctypes.WinError(ctypes.get_last_error())
        return msvcrt.open_osfhandle(handle, os.O_RDONLY | os.O_BINARY)

    def _writable_by_qemu(fd: int) -> bool:
        return False  # a writer would have made the open fail

    def _lock_source(fd: int) -> None:
        return None  # the sharing mode of the open does it

    def lock_exclusively(fd: int) -> bool:
        """Take the whole file for this open file alone; False when somebody else has it."""
        try:
            os.lseek(fd, 0, os.SEEK_SET)
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def kernel_copy(source: File, offset: int, target: File, target_offset: int, length: int) -> int:
        """Let the kernel share clusters (ReFS); returns how many bytes it did, 0 when it cannot."""
        from_fd, to_fd = _readable(source, offset, length), target.fileno()
        if from_fd is None or to_fd is None:
            return 0
        return files_windows.clone(from_fd, offset, to_fd, target_offset, length)

    def _next_data(fd: int, offset: int, end: int) -> tuple[int, int] | None:
        for start, length in files_windows.data_ranges(fd, offset, end):
            return start, start + length
        return None

    def _allocated(info: os.stat_result) -> int:
        return info.st_size

else:
    import fcntl

    def _pread_into(fd: int, offset: int, buffer: memoryview) -> int:
        return os.preadv(fd, [buffer], offset)

    def _pread(fd: int, offset: int, length: int) -> bytes:
        return os.pread(fd, length, offset)

    def _pwrite(fd: int, offset: int, buffers: list[memoryview]) -> int:
        return os.pwritev(fd, buffers[:MAX_IOV], offset)

    def _open_source(path: str) -> int:
        # O_NONBLOCK: a FIFO nobody writes to must not hang us; it has no effect on regular files.
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)

    # struct flock of 64-bit systems, native order: l_type, l_whence, l_start, l_len, l_pid.
    _FLOCK = struct.Struct("hhqqi4x")

    def _lock_byte(fd: int, command: int, kind: int, byte: int) -> bytes:
        return fcntl.fcntl(fd, command, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))

    def _writable_by_qemu(fd: int) -> bool:
        if sys.platform != "linux":
            return False
        for bit in (QEMU_WRITE, QEMU_RESIZE):
            try:
                answer = _lock_byte(fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, QEMU_HELD + bit)
            except OSError:
                return False  # a file system without locks
            if _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
                return True
        return False

    def _lock_source(fd: int) -> None:
        # What qemu-img does for a source: QEMU then refuses to open it for writing meanwhile.
        if sys.platform != "linux":
            return
        for byte in (
            QEMU_HELD + QEMU_CONSISTENT_READ,
            QEMU_DENIED + QEMU_WRITE,
            QEMU_DENIED + QEMU_RESIZE,
        ):
            try:
                _lock_byte(fd, fcntl.F_OFD_SETLK, fcntl.F_RDLCK, byte)
            except OSError:
                return

    def lock_exclusively(fd: int) -> bool:
        """Take the whole file for this open file alone; False when somebody else has it."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True  # a file system without locks
        return True

    _CANNOT_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM}

    def kernel_copy(source: File, offset: int, target: File, target_offset: int, length: int) -> int:
        """Let the kernel copy up to ``length`` bytes; returns how many it did, 0 when it cannot."""
        from_fd, to_fd = _readable(source, offset, length), target.fileno()
        if from_fd is None or to_fd is None or sys.platform != "linux":
            return 0
        done = 0
        while done < length:
            try:
                count = os.copy_file_range(from_fd, to_fd, length - done, offset + done, target_offset + done)
            except OSError as error:
                if error.errno in _CANNOT_COPY:
                    return done
                if error.errno in NO_SPACE:
                    raise TargetError(
                        f"cannot be written: {error.strerror}",
                        path=target.name,
                        offset=target_offset + done,
                        hint="make room, or choose another folder",
                    ) from error
                raise SourceError(
                    f"cannot be copied: {error.strerror}", path=source.name, offset=offset + done
                ) from error
            if count == 0:
                return done
            done += count
        return done

    def _next_data(fd: int, offset: int, end: int) -> tuple[int, int] | None:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            # A hole to the end; else it cannot tell, and all of it may be data.
            return None if error.errno == errno.ENXIO else (offset, end)
        if start >= end:
            return None
        try:
            return start, os.lseek(fd, start, os.SEEK_HOLE)
        except OSError:
            return start, end  # the file was cut meanwhile; reading will tell

    def _allocated(info: os.stat_result) -> int:
        return info.st_blocks * 512


def _readable(source: File, offset: int, length: int) -> int | None:
    """A descriptor from which those bytes can be read, now that they are there."""
    if isinstance(source, LocalFile):
        source.need(offset, length)
        return source._fd
    return source.fileno()


def _views(buffers: tuple[Buffer, ...]) -> list[memoryview]:
    return [view for view in (memoryview(buffer).cast("B") for buffer in buffers) if len(view)]


class LocalFile:
    """A file of this machine. Closes its descriptor; safe to share between threads."""

    _last_data = (0, 0)
    """Where the stretch of data begins and ends that was found last. Some file systems look through all of a stretch
    to find its end, and whoever goes forward asks a hundred times for parts of one. It may be a hole by now: that
    reads as zeros, too."""

    def __init__(self, fd: int, name: str) -> None:
        self.name = name
        self._fd = fd

    @classmethod
    def open_source(cls, path: str | os.PathLike[str]) -> LocalFile:
        """Open a regular file or block device for reading; SourceError says why it cannot be."""
        name = os.fspath(path)
        try:
            fd = _open_source(name)
        except FileNotFoundError:
            raise SourceError("no such file", path=name, hint="check the path") from None
        except OSError as error:
            raise SourceError(f"cannot be opened: {error.strerror}", path=name) from error
        kind = stat.S_IFMT(os.fstat(fd).st_mode)
        if kind not in (stat.S_IFREG, stat.S_IFBLK):
            os.close(fd)
            what = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO"}.get(kind, "not a regular file")
            raise SourceError(f"is {what}, not an image", path=name, hint="give a file or a block device")
        _lock_source(fd)
        return cls(fd, name)

    @classmethod
    def open_for_change(cls, path: str | os.PathLike[str]) -> LocalFile:
        """Open an existing file for changes in place, locked exclusively."""
        name = os.fspath(path)
        try:
            fd = os.open(name, os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise SourceError(f"cannot be opened for writing: {error.strerror}", path=name) from error
        if not lock_exclusively(fd):
            os.close(fd)
            raise SourceError("is held by another program", path=name, hint="stop that program first")
        return cls(fd, name)

    def again(self) -> LocalFile:
        """The same open file, to be closed on its own."""
        return LocalFile(os.dup(self._fd), self.name)

    @property
    def size(self) -> int:
        info = os.fstat(self._fd)
        if stat.S_ISREG(info.st_mode):
            return info.st_size
        return os.lseek(self._fd, 0, os.SEEK_END)

    @property
    def size_so_far(self) -> int:
        """The same, or, of a file that still comes from somewhere, what came of it."""
        return self.size

    @property
    def allocated_size(self) -> int:
        return _allocated(os.fstat(self._fd))

    @property
    def identity(self) -> FileIdentity:
        info = os.fstat(self._fd)
        return FileIdentity(info.st_dev, info.st_ino, self.size, info.st_mtime_ns, info.st_ctime_ns)

    @property
    def held_for_writing(self) -> bool:
        """Whether QEMU has the file open for writing."""
        return _writable_by_qemu(self._fd)

    def need(self, offset: int, length: int) -> None:
        """Return when those bytes can be read; of a file of this machine they can."""

    def pread_into(self, offset: int, buffer: memoryview) -> int:
        done = 0
        while done < len(buffer):
            try:
                count = _pread_into(self._fd, offset + done, buffer[done:])
            except OSError as error:
                raise SourceError(
                    f"cannot be read: {error.strerror}", path=self.name, offset=offset + done
                ) from error
            if count == 0:
                break
            done += count
        return done

    def pread(self, offset: int, length: int) -> bytes:
        # Not through pread_into: a new buffer would be filled with zeros first, and copied afterwards.
        if length > SMALL_READ or offset > MAX_OFFSET:
            length = min(length, self.size - offset)
        parts = []
        while length > 0:
            try:
                part = _pread(self._fd, offset, length)
            except OSError as error:
                raise SourceError(f"cannot be read: {error.strerror}", path=self.name, offset=offset) from error
            if not part:
                break
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def pwrite(self, offset: int, *buffers: Buffer) -> None:
        views = _views(buffers)
        left = sum(map(len, views))
        while left:
            try:
                count = _pwrite(self._fd, offset, views)
            except OSError as error:
                raise self._cannot_write(error, offset) from error
            left -= count
            if not left:
                return
            offset += count
            while count >= len(views[0]):
                count -= len(views.pop(0))
            if count:
                views[0] = views[0][count:]

    def _cannot_write(self, error: OSError, offset: int | None = None) -> TargetError:
        hint = "make room, or choose another folder" if error.errno in NO_SPACE else None
        return TargetError(f"cannot be written: {error.strerror}", path=self.name, offset=offset, hint=hint)

    def truncate(self, size: int) -> None:
        try:
            os.ftruncate(self._fd, size)
        except OSError as error:
            raise self._cannot_write(error, size) from error

    def preallocate(self, size: int) -> None:
        """Make room for ``size`` bytes, so that later writes cannot run out of space."""
        if sys.platform == "win32" or not hasattr(os, "posix_fallocate"):
            return
        try:
            os.posix_fallocate(self._fd, 0, size)
        except OSError as error:
            raise self._cannot_write(error, size) from error

    def flush(self) -> None:
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise self._cannot_write(error) from error

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        end = min(offset + length, self.size)
        while offset < end:
            start, stop = self._last_data
            if not start <= offset < stop:
                found = _next_data(self._fd, offset, end)
                if found is None:
                    return
                start, stop = self._last_data = found
            start, stop = max(start, offset), min(stop, end)
            if stop <= start:
                stop = end  # it changes under our hands; reading will tell
            yield start, stop - start
            offset = stop

    def fileno(self) -> int | None:
        return self._fd

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> LocalFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MemoryFile:
    """A file that is a bytearray: for tests and for small media made in memory."""

    def __init__(self, data: Buffer = b"", name: str = "<memory>") -> None:
        self.name = name
        self.data = bytearray(data)

    @property
    def size(self) -> int:
        return len(self.data)

    @property
    def allocated_size(self) -> int:
        return len(self.data)

    def pread_into(self, offset: int, buffer: memoryview) -> int:
        piece = self.data[offset : offset + len(buffer)]
        buffer[: len(piece)] = piece
        return len(piece)

    def pread(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    def pwrite(self, offset: int, *buffers: Buffer) -> None:
        for buffer in _views(buffers):
            if offset > len(self.data):
                self.data.extend(bytes(offset - len(self.data)))
            self.data[offset : offset + len(buffer)] = buffer
            offset += len(buffer)

    def truncate(self, size: int) -> None:
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))

    def flush(self) -> None:
        pass

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        length = min(length, len(self.data) - offset)
        if length > 0:
            yield offset, length

    def fileno(self) -> int | None:
        return None

    def close(self) -> None:
        pass


def nameless(folder: Path, name: str) -> LocalFile:
    """A new file that only its descriptor leads to, readable by nobody else."""
    import tempfile

    try:
        with tempfile.TemporaryFile(dir=folder, prefix=".imagekit-", buffering=0) as made:
            return LocalFile(os.dup(made.fileno()), name)
    except OSError as error:
        raise TargetError(
            f"no temporary file can be made: {error.strerror}", path=folder, hint="choose another folder"
        ) from error


def free_space(file: LocalFile) -> int | None:
    """Bytes that are free on the file's medium; None where only a path could tell."""
    if sys.platform == "win32":
        return None
    info = os.fstatvfs(file.fileno() or 0)
    return info.f_bavail * info.f_frsize


def same_file(path: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether two paths lead to one existing file."""
    try:
        return Path(path).samefile(other)
    except OSError:
        return False
