"""What came of an interrupted download, kept for the next run: a folder with two files for each.

``KEY.part`` holds the bytes where they belong, ``KEY.have`` a byte for each piece that is there. The key is made of
where the file lies, of its version (size, ETag, Last-Modified), and of the checksum that it must have: without one
nothing is kept. What was kept is believed only as far as that checksum: it is computed over all bytes, kept ones too,
before anything is published, and what fails it is deleted.

One run at a time uses what is kept; another one that comes meanwhile fetches everything on its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

from imagekit.errors import TargetError
from imagekit.formats.files import lock_exclusively
from imagekit.records import dataclass
from imagekit.remote.arriving import PIECE
from imagekit.remote.http import Version

HAVE = b"\1"
FLAGS = (
    os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
)


@dataclass(frozen=True, slots=True)
class Keeping:
    """Where to keep what comes, and which checksum it must have in the end."""

    folder: Path
    checksum: str

    def open(self, name: str, version: Version) -> Kept | None:
        """What is kept of that version, or an empty place for it; None while another run has it."""
        parts = [name, version.size, version.etag, version.modified, self.checksum]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            return Kept.open(self.folder / f"{key}.part", version.size)
        except OSError as error:
            raise TargetError(
                f"nothing can be kept there: {error.strerror}", path=self.folder, hint="choose another --partial-dir"
            ) from error


@dataclass(slots=True)
class Kept:
    """The two files, held by this run."""

    path: Path
    part: int
    have: int
    pieces: list[int]
    """Which were there from an earlier run."""

    @classmethod
    def open(cls, path: Path, size: int) -> Kept | None:
        part = os.open(path, FLAGS, 0o600)
        if not lock_exclusively(part) or not _is_still(path, part):
            os.close(part)
            return None
        have = os.open(path.with_suffix(".have"), FLAGS, 0o600)
        count = -(-size // PIECE)
        states = b""
        if os.fstat(part).st_size == size and os.fstat(have).st_size == count:
            states = os.read(have, count)
        else:
            os.ftruncate(part, 0)
            os.ftruncate(have, 0)
            os.ftruncate(have, count)
        return cls(path, part, have, [number for number in range(len(states)) if states[number] == HAVE[0]])

    def note(self, piece: int) -> None:
        """A piece is there: its bytes were written before this."""
        with suppress(OSError):  # it is fetched again then
            os.lseek(self.have, piece, os.SEEK_SET)
            os.write(self.have, HAVE)

    def forget(self) -> None:
        """Nobody needs it any more."""
        for path in (self.path.with_suffix(".have"), self.path):
            with suppress(OSError):
                path.unlink()

    def close(self) -> None:
        os.close(self.part)
        os.close(self.have)


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether the file has its name still: who held it before may have deleted it."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False
