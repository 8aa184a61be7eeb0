"""Running an outside program on a file of unknown origin: little to use, little to see, and an end to it.

The program gets no environment, no terminal, no input, limits on what it may use and, on Linux, a sandbox
(rights.py). It is killed at a time-out, on cancel, before the medium is full, and with us.

Windows has none of the limits and no sandbox, macOS some of the limits and no sandbox.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from imagekit.confinement import rights
from imagekit.errors import TargetError, ToolError
from imagekit.formats.base import GiB, KiB, MiB, TiB
from imagekit.progress import INTERVAL, SILENT, Control
from imagekit.records import dataclass

MOST_OUTPUT = 256 * KiB
"""Kept of what the program prints; more is read and forgotten."""
LAST_LINES, LAST_LENGTH = 5, 1000

SYSTEM = (
    *("/usr", "/lib", "/lib32", "/lib64", "/libx32", "/bin", "/sbin", "/opt", "/nix/store", "/gnu/store"),
    *("/etc/ld.so.cache", "/etc/ssl", "/etc/gnutls", "/etc/pki", "/etc/crypto-policies"),
    *("/dev/zero", "/dev/urandom", "/sys/devices/system/cpu"),
)
"""What a program needs to start, and holds no secrets."""
BESIDE = (".", "../lib", "../lib64", "../libexec", "../share", "../Cellar", "../opt")
"""What a program installed elsewhere needs, seen from its folder."""


@dataclass(frozen=True, slots=True)
class ToolLimits:
    """What an outside program may use. Sizes in bytes."""

    memory: int = 2 * GiB
    """Of address space."""

    cpu_seconds: int = 4 * 3600
    seconds: float = 4 * 3600.0
    """By the clock."""

    file_size: int = 64 * TiB
    """Of any file it writes, holes included."""

    descriptors: int = 64
    reserve: int = 256 * MiB
    """What stays free on the medium it writes to."""

    sandbox: bool = True
    """On Linux: no file but the system's and the two it works on. Off is for a program installed where none looks."""


@dataclass(frozen=True, slots=True)
class Finished:
    """How a program ended. ``returncode`` is negative for a signal."""

    returncode: int
    stdout: bytes
    stderr: bytes

    @property
    def last_words(self) -> str:
        """What it said last, on one line, without control characters."""
        lines = self.stderr.decode(errors="backslashreplace").splitlines()
        text = "; ".join(line.strip() for line in lines[-LAST_LINES:] if line.strip())
        shown = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
        return shown[-LAST_LENGTH:]


def run(
    command: Sequence[str],
    *,
    limits: ToolLimits,
    read_fds: Sequence[int] = (),
    write: Path | None = None,
    control: Control = SILENT,
    on_output: Callable[[bytes], None] | None = None,
) -> Finished:
    """Run a program (an absolute path first) to its end.

    It inherits ``read_fds``, whose files it may also open anew, and may write the one file ``write``. ``on_output``
    gets what it prints, in the caller's thread. Raises ToolError when it cannot be started or takes too long,
    TargetError when the medium of ``write`` gets full, Cancelled; how it ended is for the caller to judge.
    """
    name = Path(command[0]).name
    deadline = time.monotonic() + limits.seconds
    with _started(_confined(command, limits, read_fds, write), read_fds) as (process, stdout, stderr):
        while True:
            try:
                process.wait(INTERVAL)
                break
            except subprocess.TimeoutExpired:
                pass
            control.check()
            if on_output is not None and (said := stdout.news()):
                on_output(said)
            if write is not None:
                _check_room(write, limits)
            if time.monotonic() > deadline:
                raise ToolError(
                    f"{name} took longer than {limits.seconds:.0f} s", hint="give it more time, or a faster machine"
                )
    # Only now have the pipes been read to their ends.
    if on_output is not None and (said := stdout.news()):
        on_output(said)
    return Finished(process.returncode, stdout.kept(), stderr.kept())


def _confined(command: Sequence[str], limits: ToolLimits, read_fds: Sequence[int], write: Path | None) -> list[str]:
    """The command that limits itself first and then becomes the one given."""
    if sys.platform == "win32":
        return list(command)
    here = [str(Path(folder, beside)) for folder in _folders_of(command[0]) for beside in BESIDE]
    settings = {
        "limits": {
            "RLIMIT_AS": limits.memory,
            "RLIMIT_CPU": limits.cpu_seconds,
            "RLIMIT_FSIZE": limits.file_size,
            "RLIMIT_NOFILE": limits.descriptors,
            "RLIMIT_CORE": 0,
        },
        "environment": _environment(),
        "parent": os.getpid(),
        "sandbox": limits.sandbox,
        "reads": [*SYSTEM, *here],
        "read_fds": list(read_fds),
        "writes": ["/dev/null", *([] if write is None else [str(write)])],
    }
    return [sys.executable, "-I", "-S", rights.__file__, json.dumps(settings), *command]


def _folders_of(program: str) -> list[Path]:
    """Where a program lies, by the name it is called by and by its own."""
    return list({Path(program).parent, Path(program).resolve().parent})


def _environment() -> dict[str, str]:
    if sys.platform == "win32":
        return {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}
    # glibc reserves 64 MiB of address space for each thread's arena.
    return {"LC_ALL": "C", "MALLOC_ARENA_MAX": "2"}


class _Pipe:
    """Reads a pipe to its end in a thread of its own, and keeps the last of it."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()
        self._kept = self._news = b""
        self._thread = threading.Thread(target=self._read, name="imagekit-tool", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while data := os.read(self._pipe.fileno(), 64 * KiB):
            with self._lock:
                self._kept = (self._kept + data)[-MOST_OUTPUT:]
                self._news = (self._news + data)[-MOST_OUTPUT:]

    def news(self) -> bytes:
        """What came since the last call."""
        with self._lock:
            said, self._news = self._news, b""
            return said

    def kept(self) -> bytes:
        with self._lock:
            return self._kept

    def end(self) -> None:
        self._thread.join()
        self._pipe.close()


@contextmanager
def _started(command: list[str], read_fds: Sequence[int]) -> Iterator[tuple[subprocess.Popen[bytes], _Pipe, _Pipe]]:
    """A running process with its pipes; it is gone when the block is left."""
    try:
        if sys.platform == "win32":
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=_environment(),
                creationflags=subprocess.CREATE_NO_WINDOW,
            )
        else:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=_environment(),
                pass_fds=read_fds,
                cwd="/",
                start_new_session=True,  # Ctrl-C in the terminal is for us
            )
    except OSError as error:
        raise ToolError(f"cannot be started: {error.strerror or error}", path=command[0]) from error
    assert process.stdout is not None
    assert process.stderr is not None
    stdout, stderr = _Pipe(process.stdout), _Pipe(process.stderr)
    try:
        yield process, stdout, stderr
    finally:
        process.kill()  # does nothing to one that has ended
        process.wait()
        stdout.end()
        stderr.end()


def _check_room(written: Path, limits: ToolLimits) -> None:
    free = shutil.disk_usage(written.parent).free
    if free < limits.reserve:
        raise TargetError(
            f"no space: {free} bytes are free, {limits.reserve} are to stay so",
            path=written,
            hint="make room, or choose another folder",
        )
