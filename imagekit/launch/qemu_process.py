"""One QEMU process: started, spoken to over QMP, and gone when we are.

QMP runs over an inherited socket pair, so there is no socket file, no limit on the length of its path and
nobody else who could connect; Windows, where a pair cannot be inherited, uses a loopback connection that
QEMU opens to us. On Linux the kernel kills QEMU when the thread that started it dies, whatever kills that.

Everything here belongs to one asyncio loop. What a run means is not decided here.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from qemu.qmp import ConnectError, EventListener, ExecuteError, QMPClient, QMPError

from imagekit.errors import ToolError
from imagekit.launch.evidence import escape
from imagekit.launch.screen import (
    TEXT_MODE_PICTURES,
    TEXT_PAGE_ADDRESS,
    TEXT_PAGE_SIZE,
    ppm_size,
    text_lines,
)
from imagekit.records import dataclass

QMP_TIMEOUT = 20.0
LAST_WORDS_SECONDS = 1.0
MAX_STDERR = 64 << 10
MAX_PICTURE = 64 << 20

INSTALL_HINT = (
    "install QEMU: apt install qemu-system-x86 qemu-utils (Debian, Ubuntu); "
    "dnf install qemu-system-x86 qemu-img (Fedora); zypper install qemu-x86 qemu-tools (openSUSE); "
    "brew install qemu (macOS); winget install SoftwareFreedomConservancy.QEMU (Windows)"
)

# Runs between us and QEMU, because the request must be made in the new process and Python code between fork
# and exec is not safe in a program with threads. 1 is PR_SET_PDEATHSIG, 9 SIGKILL; the check closes the
# race with our death.
_DIE_WITH_PARENT = """\
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""

if sys.platform == "win32":
    _NO_WINDOW = subprocess.CREATE_NO_WINDOW
else:
    _NO_WINDOW = 0

_logger = logging.getLogger("imagekit.launch.qmp")
_logger.addHandler(logging.NullHandler())


class QemuDied(Exception):
    """QEMU ended by itself, or its control channel is dead; the text is what it said about it."""


@dataclass(frozen=True, slots=True)
class Screen:
    """What the display shows: a picture (binary PPM), a digest of it, and its text if it is in text mode."""

    ppm: bytes
    digest: bytes
    lines: list[str]


def find_program(name: str) -> str:
    """The path of QEMU's program ``name``; ToolError that says what to install."""
    places = [os.environ.get("PATH", os.defpath)]
    if sys.platform == "win32":
        places.append(r"C:\Program Files\qemu")  # the installer does not extend PATH
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        raise ToolError(f"{name} was not found", hint=INSTALL_HINT)
    return str(Path(found).absolute())


async def create_overlay(program: str, *, disk: Path, driver: str, overlay: Path) -> None:
    """Make ``overlay``, a qcow2 that takes all writes meant for ``disk``."""
    process = await asyncio.create_subprocess_exec(
        program,
        *("create", "-q", "-f", "qcow2", "-F", driver, "-b", str(disk), str(overlay)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        _, stderr = await process.communicate()
    finally:
        await _end(process)
    if process.returncode != 0:
        raise ToolError(f"qemu-img cannot use the disk: {_tail(stderr)}", path=disk)


class Qemu:
    """A running QEMU. Use ``async with running(…)``; it is killed at the end, never asked to leave."""

    def __init__(
        self, process: asyncio.subprocess.Process, folder: Path, on_console: Callable[[bytes], None]
    ) -> None:
        self._process = process
        self._folder = folder
        self._qmp = QMPClient()
        self._qmp.logger = _logger
        self._events = EventListener(names=("SHUTDOWN", "STOP"))
        self._qmp.register_listener(self._events)
        self._shutdown_reason = ""
        # From the start: a machine that cannot print does not answer either.
        self.failure: Exception | None = None
        """What ``on_console`` raised, if it did."""
        self._console = asyncio.create_task(self._read_console(on_console))
        self._errors = asyncio.create_task(self._read_errors())

    async def connect(self, link: _SocketPair | _Loopback) -> None:
        """Say hello over QMP; raises QemuDied when QEMU ends instead of answering."""
        accepting = asyncio.create_task(link.accept())
        ended = asyncio.create_task(self._process.wait())
        try:
            await asyncio.wait({accepting, ended}, timeout=QMP_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
            if not accepting.done():
                raise await self._death()
            await asyncio.wait_for(self._qmp.connect(accepting.result()), QMP_TIMEOUT)
        except (ConnectError, asyncio.TimeoutError) as error:
            raise await self._death() from error
        finally:
            accepting.cancel()
            ended.cancel()

    @property
    def version(self) -> str:
        """QEMU's version, as its greeting gives it."""
        version = {} if self._qmp.greeting is None else self._qmp.greeting.QMP.version["qemu"]
        assert isinstance(version, dict)
        return ".".join(str(version.get(part, "?")) for part in ("major", "minor", "micro"))

    async def stopped(self) -> tuple[str, str] | None:
        """The run state and the SHUTDOWN reason (or "") once the guest no longer runs, else None.

        Raises QemuDied, and what ``on_console`` raised.
        """
        if self.failure is not None:
            raise self.failure
        stopped = False
        while not self._events.empty():
            event = await self._events.get()
            stopped = True
            if isinstance(data := event.get("data"), dict):
                self._shutdown_reason = str(data.get("reason", ""))
        if not stopped:
            if self._process.returncode is not None:
                raise await self._death()
            return None
        status = await self._execute("query-status")
        assert isinstance(status, dict)
        return None if status["running"] else (str(status["status"]), self._shutdown_reason)

    async def screen(self) -> Screen | None:
        """The display now, or None while there is none."""
        picture = self._folder / "screen.ppm"
        try:
            await self._execute("screendump", filename=str(picture))
            if picture.stat().st_size > MAX_PICTURE:
                return None
            ppm = picture.read_bytes()
            lines = await self._text() if ppm_size(ppm) in TEXT_MODE_PICTURES else []
        except (ExecuteError, OSError, ValueError):
            return None
        return Screen(ppm, hashlib.blake2b(ppm, digest_size=16).digest(), lines)

    async def end(self) -> None:
        """Kill QEMU and wait for it."""
        await _end(self._process)
        # The stream's own complaint that the other side is gone is no news here.
        with contextlib.suppress(Exception):
            await self._qmp.disconnect()
        await asyncio.wait({self._console, self._errors})

    async def _text(self) -> list[str]:
        page = self._folder / "screen.txt"
        await self._execute("pmemsave", val=TEXT_PAGE_ADDRESS, size=TEXT_PAGE_SIZE, filename=str(page))
        return text_lines(page.read_bytes())

    async def _execute(self, command: str, **arguments: object) -> object:
        try:
            return await asyncio.wait_for(self._qmp.execute(command, arguments), QMP_TIMEOUT)
        except ExecuteError:
            raise
        except asyncio.TimeoutError as error:
            raise QemuDied(f"QEMU did not answer {command} for {QMP_TIMEOUT:.0f} s") from error
        except (QMPError, EOFError, OSError) as error:
            raise await self._death() from error

    async def _death(self) -> QemuDied:
        # The channel closes a moment before the process ends and says why.
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._process.wait(), LAST_WORDS_SECONDS)
        await _end(self._process)
        said = _tail(await self._errors)
        return QemuDied(f"QEMU ended with status {self._process.returncode}" + (f": {said}" if said else ""))

    async def _read_console(self, on_console: Callable[[bytes], None]) -> None:
        assert self._process.stdout is not None
        while data := await self._process.stdout.read(1 << 16):
            if self.failure is None:
                try:
                    on_console(data)
                except Exception as error:
                    self.failure = error

    async def _read_errors(self) -> bytes:
        assert self._process.stderr is not None
        kept = b""
        while data := await self._process.stderr.read(4096):
            kept = (kept + data)[-MAX_STDERR:]
        return kept


@contextlib.asynccontextmanager
async def running(
    command: Callable[[str], list[str]], *, folder: Path, on_console: Callable[[bytes], None]
) -> AsyncIterator[Qemu]:
    """Start QEMU with what ``command`` makes of its control chardev; killed when the block is left.

    ``folder`` is a private folder for what QEMU hands over as files. ``on_console`` gets what the serial port
    and the firmware print, as it comes; all of it before the block is left. Raises QemuDied when QEMU ends at
    once.
    """
    qemu = None
    link: _SocketPair | _Loopback = _Loopback() if sys.platform == "win32" else _SocketPair()
    try:
        process = await _start(command(link.chardev), link, folder)
        qemu = Qemu(process, folder, on_console)
        await qemu.connect(link)
        yield qemu
    finally:
        if qemu is not None:
            await qemu.end()
        link.close()
    if qemu.failure is not None:
        raise qemu.failure


class _SocketPair:
    """The control channel as a descriptor that QEMU inherits."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair()
        self.inherited = (self._theirs.fileno(),)
        self.chardev = f"socket,fd={self._theirs.fileno()}"

    async def accept(self) -> socket.socket:
        # With their end open here, the death of QEMU would never be seen as an end of file.
        self._theirs.close()
        return self._ours

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()


class _Loopback:
    """The control channel as a connection from QEMU to a port of ours, open to this computer only."""

    inherited: tuple[int, ...] = ()

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1)
        self._listener.setblocking(False)
        self.chardev = f"socket,host=127.0.0.1,port={self._listener.getsockname()[1]}"

    async def accept(self) -> socket.socket:
        ours, _ = await asyncio.get_running_loop().sock_accept(self._listener)
        return ours

    def close(self) -> None:
        self._listener.close()


async def _start(command: list[str], link: _SocketPair | _Loopback, folder: Path) -> asyncio.subprocess.Process:
    if sys.platform == "linux":
        command = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]
    # A session of its own: Ctrl-C in the terminal is for us, and we tell QEMU.
    own_session = sys.platform != "win32"
    try:
        return await asyncio.create_subprocess_exec(
            *command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=link.inherited,
            start_new_session=own_session,
            creationflags=_NO_WINDOW,
            cwd=folder,  # where a core file would go
        )
    except OSError as error:
        raise ToolError(f"QEMU cannot be started: {error.strerror or error}", path=command[0]) from error


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    await process.wait()


def _tail(stderr: bytes) -> str:
    lines = stderr.decode(errors="backslashreplace").splitlines()
    return "; ".join(escape(line) for line in lines[-5:] if line.strip())[-1000:]
