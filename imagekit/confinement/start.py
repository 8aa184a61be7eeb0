"""How a confined process comes to be: a fresh interpreter, or, for many in a row, a fork of one that has loaded all.

A process that confines image after image (imagekit.child_main), or that will confine one and has other things to do
first (the command line, which loads itself meanwhile), calls :func:`prepare`. Then an interpreter is started, loads
what a job may need and does nothing else: it never sees an image, a job or a secret. Each confined process is forked
from it, in a hundredth of the time, and takes its rights away like a fresh one. What they share is the layout of
their memory.

Nothing heavy is imported here: what is started early should not wait for us.

Not here: what is taken away (imagekit.confinement.child), what is said to it (imagekit.confinement.jobs).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from imagekit.errors import ToolError

if TYPE_CHECKING:
    from imagekit.confinement.channel import Channel

BOOT = "import json, sys; s = json.loads(sys.argv[1]); sys.path[:] = s['path']; "
BOOT += "from imagekit.confinement import child; getattr(child, s['do'])(s)"
SECONDS = 60.0
"""An interpreter takes at most so long to load what it needs."""
WORDS = 4000
"""Bytes of its stderr that are looked at."""


class Started(Protocol):
    """A confined process."""

    @property
    def pid(self) -> int: ...

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, negative for a signal; TimeoutExpired when it is not over by then."""

    def kill(self) -> None: ...

    def words(self) -> str:
        """What it, having ended, said on stderr."""

    def close(self) -> None: ...


class _Fresh:
    """An interpreter of its own."""

    def __init__(self, settings: dict[str, Any], theirs: socket.socket) -> None:
        self._process = start_interpreter({**settings, "do": "main", "socket": theirs.fileno()}, theirs)
        self.pid = self._process.pid
        self.wait = self._process.wait
        self.kill = self._process.kill

    def words(self) -> str:
        assert self._process.stderr is not None
        return self._process.stderr.read(WORDS).decode(errors="backslashreplace")

    def close(self) -> None:
        assert self._process.stderr is not None
        self._process.stderr.close()


def start_interpreter(settings: dict[str, Any], theirs: socket.socket) -> subprocess.Popen[bytes]:
    """One that inherits nothing but a socket."""
    command = [sys.executable, "-I", "-S", "-c", BOOT, json.dumps(settings)]
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=_environment(),
            pass_fds=(theirs.fileno(),),
            cwd="/",
            start_new_session=True,  # Ctrl-C in the terminal is for us
        )
    except OSError as error:
        raise ToolError(f"the confined process cannot be started: {error.strerror}", path=sys.executable) from error


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    # glibc looks into /sys for how many arenas it may have unless told; OpenBLAS would start threads.
    return {**kept, "LC_ALL": "C.UTF-8", "MALLOC_ARENA_MAX": "2"}


class _Nursery:
    """The interpreter that others are forked from."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = start_interpreter({**place(), "do": "nursery", "socket": theirs.fileno()}, theirs)
            except BaseException:
                self._socket.close()
                raise
        self.parent = os.getpid()

    def ask(
        self, question: dict[str, Any], files: tuple[int, ...] = (), *, within: float | None = None
    ) -> dict[str, Any]:
        """Its answer; ChannelClosed when it is gone, or silent for so many seconds."""
        from imagekit.confinement.channel import Channel, ChannelClosed

        channel = Channel(self._socket)
        with self._lock:
            channel.send(json.dumps(question).encode(), files)
            answer = channel.hear(within)
        if answer is None:
            raise ChannelClosed
        return answer

    def close(self) -> None:
        self._socket.close()
        self._process.kill()
        self._process.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()


class _Forked:
    """A process forked there: its parent waits for it, and until then its number is nobody else's."""

    def __init__(self, nursery: _Nursery, settings: dict[str, Any], theirs: socket.socket) -> None:
        self._nursery = nursery
        self._code: int | None = None
        reader, writer = os.pipe()
        self._words: IO[bytes] = os.fdopen(reader, "rb")
        try:
            self.pid = int(nursery.ask({"start": settings}, (theirs.fileno(), writer), within=SECONDS)["pid"])
        except BaseException:
            self._words.close()
            raise
        finally:
            os.close(writer)

    def wait(self, timeout: float | None = None) -> int:
        if self._code is None:
            self._code = self._nursery.ask({"wait": self.pid, "seconds": timeout})["code"]
        if self._code is None:
            raise subprocess.TimeoutExpired("the confined process", timeout or 0.0)
        return self._code

    def kill(self) -> None:
        if self._code is None:
            os.kill(self.pid, 9)  # a zombie takes no harm

    def words(self) -> str:
        return self._words.read(WORDS).decode(errors="backslashreplace")

    def close(self) -> None:
        self._words.close()


_nurseries: list[_Nursery] = []
"""At most one, of this process."""


def place() -> dict[str, Any]:
    """Where its modules are, and whose end is its end."""
    return {"path": [str(Path(__file__).parents[2]), *sys.path], "parent": os.getpid()}


def prepare() -> None:
    """From now on this process forks its confined processes. For a process of our own, before it has threads."""
    if not _nurseries and sys.platform == "linux":
        _nurseries.append(_Nursery())


def end() -> None:
    """The interpreter that others are forked from is gone, and what it took is counted as this process's."""
    while _nurseries:
        _nurseries.pop().close()


def _start(settings: dict[str, Any], theirs: socket.socket) -> Started:
    from imagekit.confinement.channel import ChannelClosed

    for nursery in list(_nurseries):
        try:
            if nursery.parent == os.getpid():
                return _Forked(nursery, settings, theirs)
        except ChannelClosed:  # it was killed, or hangs
            _nurseries.remove(nursery)
            nursery.close()
    return _Fresh(settings, theirs)


@contextmanager
def started(settings: dict[str, Any]) -> Iterator[tuple[Started, Channel]]:
    """The process and the way to talk to it; it is gone when the block is left."""
    from imagekit.confinement.channel import Channel

    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = _start(settings, theirs)
        theirs.close()
        try:
            yield process, Channel(ours)
        finally:
            process.kill()  # does nothing to one that has ended
            process.wait()
            process.close()
