"""An image from a pipe: what comes is kept, without its zeros, in a nameless file, and read while it comes.

A pipe is read once, from its start to its end, by a thread that never waits for whoever reads the file. How long the
file is, is known when the pipe has ended: a reader that asks for the size, or for bytes at the end, waits for that.
Packed images do neither, and are unpacked as they come; a disk's own tables and a VHD's footer lie anywhere.

That a program at the other end failed cannot be told from its end: only a checksum, or the image's own structure,
says that something is missing.
"""

from __future__ import annotations

import os
import select
import stat
import sys
import tempfile
import threading
from pathlib import Path

from imagekit.errors import ImagekitError, SourceError, UsageError
from imagekit.formats.files import LocalFile, nameless
from imagekit.progress import INTERVAL, SILENT, Control
from imagekit.remote.arriving import MAX_SIZE, PIECE, Arriving, Digest
from imagekit.wrappers.parts import data_runs

NAME = "-"
LABEL = "<standard input>"
PHASE = "read"


class StreamFile(Arriving):
    """The bytes of a stream, as far as they came."""

    def __init__(self, stream: int, folder: Path | None = None, *, control: Control = SILENT) -> None:
        with nameless(folder or Path(tempfile.gettempdir()), LABEL) as made:
            super().__init__(made.again()._fd, LABEL)
        self._stream = os.dup(stream)
        self._control = control
        self._changed = threading.Condition()
        self._came = 0
        self._ended = self._closed = False
        self._error: ImagekitError | None = None
        self._thread = threading.Thread(target=self._work, name="imagekit-stream", daemon=True)
        self._thread.start()

    def __enter__(self) -> StreamFile:
        return self

    # --- the pipe ----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        error: ImagekitError | None = None
        try:
            while piece := self._read():
                self._keep(piece)
        except ImagekitError as caught:
            error = caught
        except OSError as caught:
            error = SourceError(f"cannot be read: {caught.strerror}", path=LABEL, offset=self._came)
        finally:
            os.close(self._stream)
        with self._changed:
            self._error, self._ended = error, True
            self._changed.notify_all()

    def _read(self) -> bytes:
        """What came, up to a piece; nothing at the end, or when nobody wants any more."""
        parts: list[bytes] = []
        left = PIECE
        while left and not self._closed:
            # Windows cannot wait for a pipe with a time-out: there the thread ends with the program.
            if sys.platform != "win32" and not select.select([self._stream], [], [], INTERVAL)[0]:
                if parts:
                    break
                continue
            part = os.read(self._stream, left)
            if not part:
                break
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def _keep(self, piece: bytes) -> None:
        at = self._came
        if at + len(piece) > MAX_SIZE:
            raise SourceError(f"more than {MAX_SIZE} bytes come", path=LABEL)
        with self._changed:
            if self._closed:
                return
            for start, end in data_runs(at, piece):
                LocalFile.pwrite(self, at + start, memoryview(piece)[start:end])
            LocalFile.truncate(self, at + len(piece))
            self._came += len(piece)
            self._changed.notify_all()

    # --- waiting -----------------------------------------------------------------------------------------------

    def need(self, offset: int, length: int) -> None:
        self._wait(offset + length, self._control)

    def _wait(self, end: int, control: Control) -> None:
        with self._changed:
            while self._came < end and not self._ended:
                control.check()
                if self._closed:
                    raise SourceError("is closed", path=self.name)
                self._changed.wait(INTERVAL)
            if self._error is not None:
                raise self._error

    def complete(self, *digests: Digest, control: Control | None = None) -> None:
        told, at = control or self._control, 0
        while True:
            self._wait(at + PIECE, told)
            data = self.pread_here(at, PIECE) if digests else b""
            for digest in digests:
                digest.update(data)
            told.tell(PHASE, min(at + PIECE, self._came), self._came)
            at += PIECE
            if self._ended and at >= self._came:
                return

    # --- as a file ---------------------------------------------------------------------------------------------

    def pread_here(self, offset: int, length: int) -> bytes:
        buffer = memoryview(bytearray(max(0, min(length, self._came - offset))))
        return bytes(buffer[: LocalFile.pread_into(self, offset, buffer)])  # LocalFile.pread would ask for the size

    def pread(self, offset: int, length: int) -> bytes:
        self.need(offset, length)
        return self.pread_here(offset, length)

    @property
    def size(self) -> int:
        self._wait(1 << 63, self._control)
        return self._came

    @property
    def size_so_far(self) -> int:
        return self._came

    @property
    def all_here(self) -> bool:
        return self._ended

    def here_from(self, offset: int) -> int:
        return max(offset, self._came)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if sys.platform != "win32":
            self._thread.join()
        super().close()


def open_stdin(folder: Path | None = None, *, control: Control = SILENT) -> LocalFile:
    """What standard input is: a file that was redirected, as itself, or what comes through a pipe."""
    try:
        descriptor = sys.stdin.fileno()
        info = os.fstat(descriptor)
    except (AttributeError, ValueError, OSError):
        raise SourceError("there is no standard input", path=NAME) from None
    if os.isatty(descriptor):
        raise UsageError("standard input is a terminal", hint="imagekit convert - disk.vhdx < image, or a pipe")
    if sys.platform == "win32":
        import msvcrt

        msvcrt.setmode(descriptor, os.O_BINARY)
    if stat.S_ISREG(info.st_mode) and os.lseek(descriptor, 0, os.SEEK_CUR) == 0:
        return LocalFile(os.dup(descriptor), LABEL)
    return StreamFile(descriptor, folder, control=control)
