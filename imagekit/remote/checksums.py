"""Checksums of whole files: stated by a caller, or found in a list such as SHA256SUMS.

Lists are those of ``sha256sum`` and its like (``HEX  NAME``, ``HEX *NAME``), of BSD (``SHA256 (NAME) = HEX``), and a
file that holds nothing but one number. A checksum is computed over all bytes of the container, from the open file
that is read: before that, or (:class:`Proof`) meanwhile, so that one pass feeds the hash and the copy. MD5 and SHA-1
are computed where they are stated; that they prove little is said.
"""

from __future__ import annotations

import copy
import hashlib
import re
import threading
from collections.abc import Callable

from imagekit.errors import ImagekitError, SourceError, UnsupportedFeature, UsageError, VerificationFailed
from imagekit.formats.base import MiB
from imagekit.formats.files import LocalFile
from imagekit.progress import INTERVAL, SILENT, Control
from imagekit.records import dataclass
from imagekit.remote.arriving import Arriving

LENGTHS = {"md5": 32, "sha1": 40, "sha224": 56, "sha256": 64, "sha384": 96, "sha512": 128}
"""Hexadecimal digits."""
WEAK = frozenset(("md5", "sha1"))
BY_LENGTH = {length: name for name, length in LENGTHS.items()}
MAX_LIST = MiB
STEP = 4 * MiB

_STATED = re.compile(r"([A-Za-z0-9_-]{2,}):([0-9A-Fa-f]+)", re.ASCII)
_PLAIN = re.compile(r"\\?([0-9A-Fa-f]{32,128})(?:[ \t]+[ *]?(.+))?", re.ASCII)
_BSD = re.compile(r"([A-Za-z0-9-]+) ?\((.+)\) ?= ?([0-9A-Fa-f]+)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Checksum:
    """An algorithm of hashlib and the number that must come out, in small hexadecimal digits."""

    algorithm: str
    value: str

    @classmethod
    def of(cls, algorithm: str, value: str) -> Checksum:
        """Checked: an algorithm we compute, and a number of its length."""
        name = algorithm.lower().replace("-", "").replace("_", "")
        if name not in LENGTHS:
            raise UnsupportedFeature(f"checksum algorithm {algorithm!r}", hint=f"known: {', '.join(LENGTHS)}")
        if len(value) != LENGTHS[name] or not re.fullmatch("[0-9A-Fa-f]+", value):
            raise UsageError(f"a {name} has {LENGTHS[name]} hexadecimal digits, {len(value)} were given")
        return cls(name, value.lower())

    @property
    def weak(self) -> bool:
        return self.algorithm in WEAK

    def check(self, file: LocalFile, *, control: Control = SILENT) -> None:
        """Read all of the file; VerificationFailed unless it is the one that is meant."""
        digest = hashlib.new(self.algorithm, usedforsecurity=False)
        if isinstance(file, Arriving):
            file.complete(digest, control=control)
        else:
            size = file.size
            for offset in range(0, size, STEP):
                control.tell("hash", offset, size)
                digest.update(file.pread(offset, STEP))
        if digest.hexdigest() != self.value:
            hint = "fetch it again; if it stays so, ask who published it"
            if isinstance(file, Arriving):
                file.forget()
                if file.resumed:
                    hint = "run it again: what was kept of an earlier run is deleted now"
            raise VerificationFailed(
                f"its {self.algorithm} is {digest.hexdigest()}, {self.value} was expected", path=file.name, hint=hint
            )


class Proof:
    """Computes the checksum of a file while others read it, in ascending order; whoever publishes settles it first.

    Of a file that is still coming each byte is hashed as soon as all before it are here. What was read too early to
    be known good is used, and nothing that was made of it is published unless the whole file is the one meant.
    """

    def __init__(self, file: LocalFile, checksum: Checksum, control: Control = SILENT) -> None:
        self._checksum = checksum
        self._outer = control
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._file = file
        self._thread = threading.Thread(target=self._work, name="imagekit-hash", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        # Progress is told by the caller's own thread only.
        quiet = Control(None, self._stop, self._outer.deadline)
        try:
            self._checksum.check(self._file, control=quiet)
        except BaseException as error:
            self._error = error

    def settle(self) -> None:
        """Wait for the end of it; VerificationFailed unless the file is the one that is meant."""
        while self._thread.is_alive():
            self._outer.check()
            self._thread.join(INTERVAL)
        if isinstance(self._error, ImagekitError):
            raise copy.copy(self._error)
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Give up; the file is about to be closed."""
        self._stop.set()
        self._thread.join()


def find_checksum(text: str, name: str, read: Callable[[str], bytes], *, keyring: str | None = None) -> Checksum:
    """What ``ALGO:HEX``, or the list that ``read`` fetches from a path or address, says of the file ``name``.

    With a ``keyring`` the list must be signed by one of its keys.
    """
    stated = _STATED.fullmatch(text)
    if stated is not None:
        if keyring is not None:
            raise UsageError("a keyring is for lists of checksums", hint="leave out --keyring")
        return Checksum.of(stated[1], stated[2])
    data = read(text)
    if keyring is not None:
        from imagekit.remote.signatures import verified

        data = verified(data, text, read, keyring)
    return from_list(data, name, where=text)


def from_list(data: bytes, name: str, *, where: str) -> Checksum:
    """The entry about ``name``, whatever folder the list gives it; two that differ are refused."""
    entries = list(_entries(data.decode("utf-8", "replace")))
    found = {checksum for entry, checksum in entries if entry.rpartition("/")[2] == name}
    if not found and len(entries) == 1 and not entries[0][0]:
        found = {entries[0][1]}  # nothing but a number
    if not found:
        raise SourceError(f"no checksum of {name!r} is in it", path=where, hint="give ALGO:HEX")
    strongest = max(LENGTHS[checksum.algorithm] for checksum in found)
    best = [checksum for checksum in found if LENGTHS[checksum.algorithm] == strongest]
    if len(best) > 1:
        raise SourceError(f"there are different checksums of {name!r} in it", path=where, hint="give ALGO:HEX")
    return best[0]


def _entries(text: str) -> list[tuple[str, Checksum]]:
    entries = []
    for line in text.splitlines():
        if (bsd := _BSD.fullmatch(line.strip())) is not None:
            algorithm, name, value = bsd.groups()
        elif (plain := _PLAIN.fullmatch(line.strip())) is not None and len(plain[1]) in BY_LENGTH:
            algorithm, name, value = BY_LENGTH[len(plain[1])], plain[2] or "", plain[1]
        else:
            continue  # comments, and the lines of a signature around a list
        try:
            entries.append((name, Checksum.of(algorithm, value)))
        except (UnsupportedFeature, UsageError):
            continue
    return entries
