"""A file whose bytes are still coming: a nameless local file, and who reads from it waits until they are there.

What is common to files over a network (imagekit.remote.file) and to what a pipe brings (imagekit.remote.stream). The
nameless file takes the room of what came, and is gone with its descriptor, however the program ends.
"""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Protocol

from imagekit.errors import TargetError
from imagekit.formats.base import Buffer, MiB, TiB
from imagekit.formats.files import FileIdentity, LocalFile
from imagekit.progress import Control

PIECE = MiB
"""What comes is accounted for by pieces of this size."""
MAX_SIZE = 16 * TiB
"""Of a file that is fetched: the states of its pieces take 16 MiB then."""


class Digest(Protocol):
    """What hashlib's objects can do."""

    def update(self, data: Buffer, /) -> None: ...


class Arriving(LocalFile, ABC):
    """Reads wait for what is missing; safe to share between threads."""

    @abstractmethod
    def need(self, offset: int, length: int) -> None:
        """Return when those bytes are here, as far as the file goes."""

    @abstractmethod
    def complete(self, *digests: Digest, control: Control | None = None) -> None:
        """Wait for all that is missing; the digests get every byte, in order, while the rest still comes.

        ``control`` is told instead of the one that the file was opened with.
        """

    def want(self, end: int) -> None:
        """What lies before ``end`` will very likely be read: it may be fetched meanwhile."""

    def want_all(self) -> None:
        """All of it will be read sooner or later: what nobody waits for may be fetched meanwhile."""

    @property
    @abstractmethod
    def all_here(self) -> bool:
        """Whether nothing is missing any more."""

    @abstractmethod
    def here_from(self, offset: int) -> int:
        """How far the bytes from ``offset`` on are here without a gap."""

    @property
    def resumed(self) -> int:
        """Bytes that were there from an earlier run."""
        return 0

    def forget(self) -> None:
        """Delete what would be kept of it for another run."""

    def pread_here(self, offset: int, length: int) -> bytes:
        """Bytes that are here, without another look."""
        return super().pread(offset, length)

    def descriptor(self) -> int:
        """A new descriptor of the nameless file, for reading only where that is possible."""
        if sys.platform == "linux":
            return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
        return os.dup(self._fd)

    # --- as a file ---------------------------------------------------------------------------------------------

    def _cannot_write(self, error: OSError, offset: int | None = None) -> TargetError:
        told = super()._cannot_write(error, offset)
        return TargetError(f"what comes {told.message}", path=self.name, offset=offset, hint=told.hint)

    @property
    def allocated_size(self) -> int:
        return self.size

    @property
    def identity(self) -> FileIdentity:
        # The local file grows while it is read; that what comes stays the same is seen to where it comes.
        info = os.fstat(self._fd)
        return FileIdentity(info.st_dev, info.st_ino, 0, 0, 0)

    @property
    def held_for_writing(self) -> bool:
        return False

    def pread_into(self, offset: int, buffer: memoryview) -> int:
        self.need(offset, len(buffer))
        return super().pread_into(offset, buffer)

    def pread(self, offset: int, length: int) -> bytes:
        self.need(offset, length)
        return super().pread(offset, length)

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """All of it: where holes will be is not known."""
        if (end := min(offset + length, self.size)) > offset:
            yield offset, end - offset

    def fileno(self) -> int | None:
        """The descriptor, once everything is there: who has it reads past us."""
        return super().fileno() if self.all_here else None

    def again(self) -> LocalFile:
        """All of it, as a file that no longer waits for anything."""
        self.complete()
        return super().again()
