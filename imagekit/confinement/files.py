"""A file whose bytes are still coming, read by a confined process, which asks what of it is here.

The starter keeps the network (or the pipe) and the nameless file; the confined process gets that file, for reading,
and one end of a socket. A question is an offset and a length, the answer comes when those bytes are here and says up
to where they are, or is the error that ended it. No byte of the image crosses the socket.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
from contextlib import suppress

from imagekit.confinement.channel import as_error, error_message
from imagekit.errors import ImagekitError, SourceError
from imagekit.progress import SILENT, Control
from imagekit.remote.arriving import PIECE, Arriving, Digest

QUESTION = struct.Struct("=qq")
ANSWER = struct.Struct("=qI")
"""The offset up to which all is here from the one asked for on, and the length of an error that follows."""
ALL = (0, 0)
"""No question, and not answered: all of the file will be read."""
MOST = 1 << 16
MAX_OFFSET = 1 << 62


class Server:
    """Answers one confined process about one file, from a thread of its own, until the other end is closed."""

    def __init__(self, file: Arriving) -> None:
        self._file = file
        self._socket, self._theirs = socket.socketpair()
        self.descriptors = (file.descriptor(), self._theirs.fileno())
        """What the confined process gets: the file, and the socket."""
        self._thread = threading.Thread(target=self._work, name="imagekit-serve", daemon=True)

    def start(self) -> None:
        """Once the other side has its descriptors."""
        self._theirs.close()
        self._thread.start()

    def _work(self) -> None:
        with suppress(OSError), self._socket:
            while question := _exactly(self._socket, QUESTION.size):
                offset, length = QUESTION.unpack(question)
                if (offset, length) == ALL:
                    self._file.want_all()
                    continue
                if not (0 <= offset <= MAX_OFFSET and 0 < length <= MAX_OFFSET):
                    return  # it never asks so unless something went wrong there
                self._socket.sendall(self._answer(offset, length))

    def _answer(self, offset: int, length: int) -> bytes:
        try:
            self._file.need(offset, length)
        except ImagekitError as error:
            said = json.dumps(error_message(error)).encode()[:MOST]
            return ANSWER.pack(0, len(said)) + said
        return ANSWER.pack(self._file.here_from(offset), 0)

    def close(self) -> None:
        """Let go; a question that is still waited for ends with the file itself."""
        os.close(self.descriptors[0])
        self._theirs.close()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)


class ServedFile(Arriving):
    """The other side: the file, as the confined process sees it."""

    def __init__(self, fd: int, name: str, size: int, connection: socket.socket) -> None:
        super().__init__(fd, name)
        self._size = size
        self._socket = connection
        self._lock = threading.Lock()
        self._here = bytearray(-(-size // PIECE))

    @property
    def size(self) -> int:
        return self._size

    def need(self, offset: int, length: int) -> None:
        end = min(offset + length, self._size)
        if offset >= end or self._known(offset, end):
            return
        with self._lock:
            if self._known(offset, end):
                return
            self._note(offset, self._ask(offset, end - offset))

    def want_all(self) -> None:
        with self._lock, suppress(OSError):  # who fetches no more says so when it is asked
            self._socket.sendall(QUESTION.pack(*ALL))

    def _known(self, offset: int, end: int) -> bool:
        return self._here.find(0, offset // PIECE, (end - 1) // PIECE + 1) < 0

    def _note(self, offset: int, end: int) -> None:
        """What is here goes by whole pieces, so only those count."""
        first = offset // PIECE
        last = len(self._here) if end >= self._size else end // PIECE
        self._here[first:last] = b"\1" * (last - first)

    def _ask(self, offset: int, length: int) -> int:
        start = offset // PIECE * PIECE
        try:
            self._socket.sendall(QUESTION.pack(start, offset + length - start))
            head = _exactly(self._socket, ANSWER.size)
            here, more = ANSWER.unpack(head) if head else (0, 0)
            said = _exactly(self._socket, more) if more else b""
        except OSError:
            head = said = b""
        if said:
            raise as_error(json.loads(said))
        if not head:
            raise SourceError("nobody fetches it any more", path=self.name)
        return int(here)

    def complete(self, *digests: Digest, control: Control | None = None) -> None:
        told = control or SILENT
        for offset in range(0, self._size, PIECE):
            told.check()
            data = self.pread(offset, PIECE)
            for digest in digests:
                digest.update(data)

    @property
    def all_here(self) -> bool:
        return self._here.find(0) < 0

    def here_from(self, offset: int) -> int:
        end = self._here.find(0, offset // PIECE)
        return self._size if end < 0 else max(offset, end * PIECE)


def _exactly(connection: socket.socket, length: int) -> bytes:
    """As many bytes; none when the other end is gone."""
    data = b""
    while len(data) < length:
        piece = connection.recv(length - len(data))
        if not piece:
            return b""
        data += piece
    return data
