"""A task of the library in a process of its own: the caller's side.

For callers whose own process must stay free: under eventlet all Python threads of a process are one, and a
conversion in one of them would stall an agent for as long as it takes. The child is a fresh interpreter
(imagekit.child_main); which one is the caller's choice, since an agent's Python may be older or have other packages.

Both sides speak JSON Lines: the task goes in as one line, progress, the result or the error come out. All of it goes
through files in memory (Linux; temporary ones elsewhere), not pipes: nothing here ever waits for the child but by
looking and sleeping, and ``time.sleep`` is what every green-thread library replaces.

The child has a lower priority than its caller, and no more of them start at once than there are processors: an
agent gets its turn however many disks are made.

Not here: what the tasks do (imagekit.api).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from imagekit import errors
from imagekit.progress import Callback, Control
from imagekit.records import dataclass

LAST_WORDS = 2000
"""Characters of the child's stderr that an error quotes."""
GRACE = 5.0
"""Seconds a child has to end after it was asked to."""
SHORTEST, SHARE = 0.005, 1 / 20
"""Seconds between two looks at a child at least, and as a part of the time it has taken so far."""
NICENESS = 10
"""What a child's priority is below its caller's: it gets about a tenth of a processor that both want."""

_starting = threading.BoundedSemaphore(os.cpu_count() or 1)
"""Held while an interpreter starts: that takes half a second of a processor, and many may be asked for at once."""


@dataclass(frozen=True, slots=True)
class Child:
    """How tasks are run elsewhere. Without fields of your own: the same interpreter, at once."""

    python: str = sys.executable
    """The interpreter that has imagekit: this one, or that of another environment."""

    interval: float = 0.05
    """Seconds between two looks at the child, at most."""

    environment: Mapping[str, str] | None = None
    """The child's whole environment; None: this process's."""

    niceness: int = NICENESS
    """How far the child's priority is below this process's (Windows: any but 0 is "below normal")."""

    def run(
        self,
        task: str,
        arguments: Mapping[str, Any],
        *,
        progress: Callback | None = None,
        cancel: threading.Event | None = None,
    ) -> dict[str, Any]:
        """Do ``task`` (a name in imagekit.child_main) and return its result as plain data.

        Raises the error the task raised there, ToolError when the child cannot be started or ends without a word,
        and Cancelled when the caller asked to stop; the child has ended in every case.
        """
        control = Control(progress, cancel)
        asked = {"task": task, "arguments": dict(arguments), "caller": os.getpid()}
        with _channel() as (request, answers, words, reader), ExitStack() as slot:
            request.write(json.dumps(asked).encode() + b"\n")
            request.seek(0)
            while not _starting.acquire(blocking=False):
                control.check()
                time.sleep(self.interval)
            slot.callback(_starting.release)
            process = self._start(request, answers, words)
            try:
                return self._follow(process, reader, words, control, slot)
            finally:
                self._end(process)

    def _start(self, request: IO[bytes], answers: IO[bytes], words: IO[bytes]) -> subprocess.Popen[bytes]:
        flags = 0
        if sys.platform == "win32" and self.niceness:
            flags = subprocess.BELOW_NORMAL_PRIORITY_CLASS
        try:
            process = subprocess.Popen(
                [self.python, "-m", "imagekit.child_main"],
                stdin=request,
                stdout=answers,
                stderr=words,
                env=self.environment,
                close_fds=True,
                creationflags=flags,
            )
        except OSError as error:
            raise errors.ToolError(
                f"{self.python} cannot be started: {error.strerror}", hint="name a Python that has imagekit"
            ) from error
        if sys.platform != "win32" and self.niceness:
            with suppress(OSError):  # it has ended already
                os.setpriority(os.PRIO_PROCESS, process.pid, os.getpriority(os.PRIO_PROCESS, 0) + self.niceness)
        return process

    def _follow(
        self,
        process: subprocess.Popen[bytes],
        reader: IO[bytes],
        words: IO[bytes],
        control: Control,
        slot: ExitStack,
    ) -> dict[str, Any]:
        pending = b""
        began = time.monotonic()
        while True:
            ended = process.poll() is not None
            *lines, pending = (pending + reader.read()).split(b"\n")
            if lines:
                slot.close()  # it has started: it speaks
            for line in lines:
                found = understood(line, control)
                if found is not None:
                    return found
            if ended:
                raise ended_silently(process.returncode, words)
            control.check()
            time.sleep(self._pause(began))

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        began = time.monotonic()
        if process.poll() is None:
            process.terminate()
            while process.poll() is None and time.monotonic() < began + GRACE:
                time.sleep(self._pause(began))
        if process.poll() is None:
            process.kill()
            while process.poll() is None:
                time.sleep(self.interval)

    def _pause(self, began: float) -> float:
        """Seconds until the next look: few while it may be a short task."""
        return min(self.interval, max(SHORTEST, (time.monotonic() - began) * SHARE))


@contextmanager
def _channel() -> Iterator[tuple[IO[bytes], IO[bytes], IO[bytes], IO[bytes]]]:
    """Files for the request, the answers and the child's stderr, and a reader of the answers with its own place."""
    names = ("request", "answers", "words")
    with ExitStack() as files:
        if sys.platform == "linux":
            # In no file system: there, who makes a file may have to wait until another's data are on the medium.
            made = [files.enter_context(os.fdopen(os.memfd_create(name), "w+b")) for name in names]
            again = Path(f"/proc/self/fd/{made[1].fileno()}")
        else:
            folder = Path(files.enter_context(tempfile.TemporaryDirectory()))
            made = [files.enter_context((folder / name).open("w+b")) for name in names]
            again = folder / "answers"
        yield made[0], made[1], made[2], files.enter_context(again.open("rb"))


def understood(line: bytes, control: Control) -> dict[str, Any] | None:
    """The result, when a line of the child's holds it. Raises the error that it holds; progress is passed on."""
    try:
        message = json.loads(line)
        kind = message["message_type"]
    except (ValueError, TypeError, KeyError):
        return None  # what a library printed
    if kind == "status":
        control.tell(message["phase"], message["done"], message["total"])
    elif kind == "exit_error":
        raise _error(message)
    elif kind == "result":
        result = message["result"]
        assert isinstance(result, dict)
        return result
    return None


def _error(message: Mapping[str, Any]) -> errors.ImagekitError:
    kind = getattr(errors, str(message["kind"]), errors.ImagekitError)
    more = {key: message[key] for key in ("hint", "path", "offset") if message.get(key) is not None}
    if kind is errors.UnsafeImage:
        return errors.UnsafeImage(message["message"], rule=str(message.get("rule", "")), **more)
    made = kind(message["message"], **more)
    assert isinstance(made, errors.ImagekitError)
    return made


def ended_silently(code: int, words: IO[bytes]) -> errors.ToolError:
    """What to say of a child that ended without a result; ``words`` is its stderr."""
    size = words.seek(0, 2)
    words.seek(max(0, size - LAST_WORDS))
    said = words.read().decode(errors="replace").strip()
    last = f": {said.splitlines()[-1]}" if said else ""
    return errors.ToolError(
        f"the process that did the work ended without a result (code {code}){last}",
        hint="try again; it may have been killed, or lack imagekit",
    )
