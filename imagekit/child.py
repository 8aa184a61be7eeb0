"""A task of the library in a process of its own: the caller's side.

For callers whose own process must stay free: under eventlet all Python threads of a process are one, and a
conversion in one of them would stall an agent for as long as it takes. The child is a fresh interpreter
(imagekit.child_main); which one is the caller's choice, since an agent's Python may be older or have other packages.

Both sides speak JSON Lines: the task goes in as one line, progress, the result or the error come out. All of it goes
through files, not pipes: nothing here ever waits for the child but by looking and sleeping, and ``time.sleep`` is
what every green-thread library replaces.

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
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from imagekit import errors
from imagekit.progress import Callback, Control

LAST_WORDS = 2000
"""Characters of the child's stderr that an error quotes."""
GRACE = 5.0
"""Seconds a child has to end after it was asked to."""


@dataclass(frozen=True, slots=True)
class Child:
    """How tasks are run elsewhere. Without fields of your own: the same interpreter, at once."""

    python: str = sys.executable
    """The interpreter that has imagekit: this one, or that of another environment."""

    interval: float = 0.05
    """Seconds between two looks at the child."""

    environment: Mapping[str, str] | None = None
    """The child's whole environment; None: this process's."""

    def run(
        self,
        task: str,
        arguments: Mapping[str, Any],
        *,
        progress: Callback | None = None,
        cancel: threading.Event | None = None,
    ) -> dict[str, Any]:
        """Do ``task`` (a name of imagekit.child_main.TASKS) and return its result as plain data.

        Raises the error the task raised there, ToolError when the child cannot be started or ends without a word,
        and Cancelled when the caller asked to stop; the child has ended in every case.
        """
        control = Control(progress, cancel)
        with tempfile.TemporaryDirectory() as folder, ExitStack() as files:
            request, answers, words = (
                files.enter_context((Path(folder) / name).open("w+b")) for name in ("request", "answers", "words")
            )
            asked = {"task": task, "arguments": dict(arguments), "caller": os.getpid()}
            request.write(json.dumps(asked).encode() + b"\n")
            request.seek(0)
            command = [self.python, "-m", "imagekit.child_main"]
            try:
                process = subprocess.Popen(
                    command, stdin=request, stdout=answers, stderr=words, env=self.environment, close_fds=True
                )
            except OSError as error:
                raise errors.ToolError(
                    f"{self.python} cannot be started: {error.strerror}", hint="name a Python that has imagekit"
                ) from error
            try:
                return self._follow(process, Path(answers.name), words, control)
            finally:
                _end(process, self.interval)

    def _follow(
        self, process: subprocess.Popen[bytes], answers: Path, words: IO[bytes], control: Control
    ) -> dict[str, Any]:
        with answers.open("rb") as reader:
            pending = b""
            while True:
                ended = process.poll() is not None
                *lines, pending = (pending + reader.read()).split(b"\n")
                for line in lines:
                    found = understood(line, control)
                    if found is not None:
                        return found
                if ended:
                    raise ended_silently(process.returncode, words)
                control.check()
                time.sleep(self.interval)


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


def _end(process: subprocess.Popen[bytes], interval: float) -> None:
    if process.poll() is None:
        process.terminate()
        deadline = time.monotonic() + GRACE
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(interval)
    if process.poll() is None:
        process.kill()
        while process.poll() is None:
            time.sleep(interval)
