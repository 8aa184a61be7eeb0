"""A file that comes over a network while it is read: missing parts are fetched when they are needed.

Threads fetch what a reader waits for first, what lies behind it next, and then the rest where all of it is wanted
(for a checksum), in ascending order: a converter finds its bytes already there. Every byte is fetched once at most,
whatever is read twice; memory is a state a piece. From a server without ranges all of it is fetched before the first
read.

The nameless file takes the room of what was fetched, and is gone with its descriptor, however the program ends.
"""

from __future__ import annotations

import copy
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from imagekit.errors import ImagekitError, SourceError, UnsafeImage
from imagekit.formats.files import LocalFile, nameless
from imagekit.progress import INTERVAL, SILENT, Control
from imagekit.remote.arriving import MAX_SIZE, PIECE, Arriving, Digest
from imagekit.remote.http import Dropped, HttpOptions, Resource, Version
from imagekit.remote.partial import Keeping, Kept

RUN = 8
"""Pieces one request asks for at most."""
AHEAD = 64
"""Pieces fetched ahead of a reader that goes forward."""
BURST = 256 << 10
"""What came is written when it is this much, at a multiple of it: the page cache then holds it in large parts."""
NEAR = 4
"""Pieces that a reader may skip, or go back, and still goes forward."""
CONNECTIONS = 4
PHASE = "download"
MISSING, IN_FLIGHT, PRESENT = 0, 1, 2


class First(Protocol):
    """The answer to the first request: of a range, or, where there are none, of everything."""

    @property
    def partial(self) -> bool: ...

    @property
    def length(self) -> int | None: ...

    @property
    def version(self) -> Version: ...

    def pieces(self) -> Iterator[bytes]: ...


class Origin(Protocol):
    """Where the bytes come from: imagekit.remote.http, imagekit.remote.objects."""

    @property
    def name(self) -> str: ...

    @property
    def options(self) -> HttpOptions: ...

    def opened(self, length: int) -> AbstractContextManager[First]: ...

    def fetch(self, offset: int, length: int, sink: Callable[[int, bytes], None]) -> None: ...

    def close(self) -> None: ...


class _Bursts:
    """Bytes that come one after the other, written in parts that end at multiples of BURST, and at ``end``.

    Gathered in one buffer: a server may send them one by one.
    """

    def __init__(self, at: int, end: int, write: Callable[[int, bytearray], None]) -> None:
        self._written = at
        self._end = end
        self._write = write
        self._waiting = bytearray()

    def add(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            room = min(self._end, self._written // BURST * BURST + BURST) - self._written - len(self._waiting)
            self._waiting += view[:room]
            if len(view) >= room:
                self.flush()
            view = view[room:]

    def flush(self) -> None:
        if self._waiting:
            self._write(self._written, self._waiting)
        self._written += len(self._waiting)
        self._waiting = bytearray()


class RemoteFile(Arriving):
    """The bytes of a resource. Reads wait for what is missing; safe to share between threads."""

    ranges: bool
    """Whether the server has ranges; else the file was fetched as a whole when it was opened."""

    def __init__(
        self, resource: Origin, folder: Path | None, control: Control, keeping: Keeping | None = None
    ) -> None:
        with nameless(folder or Path(tempfile.gettempdir()), resource.name) as made:
            super().__init__(made.again()._fd, resource.name)
        self._resource = resource
        self._control = control
        self._keeping = keeping
        self._kept: Kept | None = None
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._wanted: set[int] = set()
        self._ahead = range(0)
        self._rest = range(0)
        self._last = 0
        self._error: ImagekitError | None = None
        self._closed = False
        self._size, self._fetched = 0, 0
        self._states = bytearray()

    @classmethod
    def open(
        cls,
        url: str,
        options: HttpOptions | None = None,
        *,
        folder: Path | None = None,
        expected: int | None = None,
        label: str = "",
        keeping: Keeping | None = None,
        control: Control = SILENT,
    ) -> RemoteFile:
        """Ask for the first piece, which says what there is. ``expected`` is the size it must have, if known."""
        resource = Resource(url, options or HttpOptions(), label=label)
        return cls.of(resource, folder=folder, expected=expected, keeping=keeping, control=control)

    @classmethod
    def of(
        cls,
        origin: Origin,
        *,
        folder: Path | None = None,
        expected: int | None = None,
        keeping: Keeping | None = None,
        control: Control = SILENT,
    ) -> RemoteFile:
        """The same, from any origin."""
        file = cls(origin, folder, control, keeping)
        try:
            file._begin(expected)
        except BaseException:
            file.close()
            raise
        return file

    def __enter__(self) -> RemoteFile:
        return self

    # --- fetching ----------------------------------------------------------------------------------------------

    def _begin(self, expected: int | None) -> None:
        attempts = 0
        while True:
            try:
                with self._resource.opened(PIECE) as answer:
                    self.ranges = answer.partial
                    self._prepare(answer, expected)
                    self._take(answer)
                if expected not in (None, self._size):
                    raise SourceError(f"{self._size} bytes came, {expected} were expected", path=self.name)
                return
            except Dropped as error:
                if self.ranges:
                    return  # what is missing of the first piece comes like any other
                attempts += 1
                if attempts > self._resource.options.retries:
                    raise SourceError(
                        f"cannot be fetched: {error} (and the server has no ranges to go on with)",
                        path=self.name,
                        hint="try again later",
                    ) from error

    def _prepare(self, answer: First, expected: int | None) -> None:
        size = max(answer.version.size, 0)
        if size > MAX_SIZE:
            raise UnsafeImage(
                f"refused by rule remote-size: the server states {size} bytes, at most {MAX_SIZE} are fetched",
                rule="remote-size",
                path=self.name,
            )
        if expected is not None and answer.length is not None and size != expected:
            raise SourceError(f"the server has {size} bytes, {expected} were expected", path=self.name)
        self._size, self._fetched = size, 0
        if answer.partial and self._keeping is not None and self._kept is None:
            self._resume(self._keeping.open(self.name, answer.version))
        LocalFile.truncate(self, size)
        self._states = bytearray(-(-size // PIECE))
        for piece in self._kept.pieces if self._kept is not None else ():
            self._states[piece] = PRESENT
        self._fetched = self.resumed

    def _resume(self, kept: Kept | None) -> None:
        """Go on in a file that outlives this run, instead of the nameless one."""
        if kept is not None:
            os.dup2(kept.part, self._fd, inheritable=False)
            self._kept = kept

    @property
    def resumed(self) -> int:
        return 0 if self._kept is None else min(len(self._kept.pieces) * PIECE, self._size)

    def forget(self) -> None:
        if self._kept is not None:
            self._kept.forget()

    def _take(self, answer: First) -> None:
        """The first answer's body: the first piece, or everything."""
        at = 0
        bursts = _Bursts(0, MAX_SIZE, self._store)
        for piece in answer.pieces():
            at += len(piece)
            if at > MAX_SIZE:
                raise SourceError(f"the server sends more than {MAX_SIZE} bytes", path=self.name)
            bursts.add(piece)
            self._control.tell(PHASE, at, max(self._size, at))
        bursts.flush()
        if not answer.partial:
            self._size = at
            self._states = bytearray((PRESENT,)) * -(-at // PIECE)
        elif at == min(PIECE, self._size) and at:
            self._states[0] = PRESENT
            if self._kept is not None:
                self._kept.note(0)

    def _store(self, at: int, data: bytearray) -> None:
        with self._changed:  # after close() the descriptor may be another file's
            if self._closed:
                raise SourceError("closed while it was fetched", path=self.name)
            LocalFile.pwrite(self, at, data)
            self._fetched += len(data)

    def _start(self) -> None:
        if not self._threads:
            for number in range(CONNECTIONS):
                thread = threading.Thread(target=self._work, name=f"imagekit-fetch-{number}", daemon=True)
                self._threads.append(thread)
                thread.start()

    def _work(self) -> None:
        try:
            while (run := self._next()) is not None:
                self._fetch(run)
        except ImagekitError as error:
            self._fail(error)
        except Exception as error:  # a thread's error must reach who waits for its bytes
            self._fail(ImagekitError(f"internal error while fetching: {error!r}", path=self.name))

    def _fail(self, error: ImagekitError) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def _next(self) -> range | None:
        """The pieces to fetch now: what somebody waits for, then what lies ahead."""
        with self._changed:
            while True:
                if self._closed or self._error is not None:
                    return None
                first = min((one for one in self._wanted if self._states[one] == MISSING), default=-1)
                for part in (self._ahead, self._rest):
                    if first < 0:
                        first = self._states.find(MISSING, part.start, part.stop)
                if first >= 0:
                    break
                self._changed.wait()
            end = first + 1
            while end < first + RUN and end < len(self._states) and self._may_follow(end):
                end += 1
            self._states[first:end] = bytes((IN_FLIGHT,)) * (end - first)
            return range(first, end)

    def _may_follow(self, piece: int) -> bool:
        return self._states[piece] == MISSING and any(
            piece in part for part in (self._ahead, self._rest, self._wanted)
        )

    def _fetch(self, run: range) -> None:
        start, end = run.start * PIECE, min(run.stop * PIECE, self._size)

        def write(at: int, data: bytearray) -> None:
            self._store(at, data)
            self._mark(run.start, at, at + len(data))

        bursts = _Bursts(start, end, write)
        self._resource.fetch(start, end - start, lambda _, data: bursts.add(data))

    def _mark(self, first: int, start: int, end: int) -> None:
        """Note the pieces that became complete with the bytes from ``start`` to ``end``; all before are here."""
        done = range(start // PIECE, len(self._states) if end == self._size else end // PIECE)
        if done:
            with self._changed:
                for piece in done:
                    self._states[max(piece, first)] = PRESENT
                    self._wanted.discard(piece)
                    if self._kept is not None:
                        self._kept.note(max(piece, first))
                self._changed.notify_all()

    # --- waiting -----------------------------------------------------------------------------------------------

    def need(self, offset: int, length: int) -> None:
        end = min(offset + length, self._size)
        if offset >= end:
            return
        pieces = range(offset // PIECE, (end - 1) // PIECE + 1)
        with self._changed:
            self._look_ahead(pieces)
            while missing := [piece for piece in pieces if self._states[piece] != PRESENT]:
                self._check()
                self._wanted.update(missing)
                self._start()
                self._changed.notify_all()
                self._changed.wait(INTERVAL)

    def _look_ahead(self, pieces: range) -> None:
        if self._last - NEAR <= pieces.start <= self._last + NEAR and pieces.start > 0:
            # Never shorter than it was: the reader may be one of several threads.
            stop = max(pieces.stop + AHEAD, self._ahead.stop if self._ahead.stop < pieces.stop + 2 * AHEAD else 0)
            self._ahead = range(pieces.stop, min(stop, len(self._states)))
            if self._threads:
                self._changed.notify_all()
        self._last = max(self._last, pieces.stop - 1) if pieces.start >= self._last - NEAR else pieces.stop - 1

    def _check(self) -> None:
        self._control.check()
        if self._error is not None:
            raise copy.copy(self._error)  # a traceback of its own for each thread that waits
        if self._closed:
            raise SourceError("is closed", path=self.name)

    def want(self, end: int) -> None:
        with self._changed:
            self._rest = range(max(self._rest.stop, min(-(-end // PIECE), len(self._states))))
            if not self.all_here:
                self._start()
                self._changed.notify_all()

    def want_all(self) -> None:
        self.want(self._size)

    def complete(self, *digests: Digest, control: Control | None = None) -> None:
        told = control or self._control
        for offset in range(0, self._size, PIECE):
            with self._changed:
                self._rest = range(offset // PIECE, len(self._states))
                while self._states[offset // PIECE] != PRESENT:
                    told.check()
                    self._check()
                    self._start()
                    self._changed.notify_all()
                    self._changed.wait(INTERVAL)
                    told.tell(PHASE, self._fetched, self._size)
            if digests:
                data = self.pread_here(offset, PIECE)
                for digest in digests:
                    digest.update(data)
            told.tell(PHASE, offset, self._size)

    # --- as a file ---------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        return self._size

    @property
    def fetched(self) -> int:
        """Bytes that came so far."""
        return self._fetched

    @property
    def all_here(self) -> bool:
        return self._states.count(PRESENT) == len(self._states)

    def here_from(self, offset: int) -> int:
        first = offset // PIECE
        end = first
        while end < len(self._states) and self._states[end] == PRESENT:
            end += 1
        return min(end * PIECE, self._size) if end > first else offset

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._resource.close()
        for thread in self._threads:
            thread.join(timeout=1.0)  # one that connects has nothing yet to be woken up from
        with self._changed:
            if self._kept is not None and self._fd >= 0:
                self._kept.close()
            super().close()
