"""A task of the library in a process of its own: the child's side (imagekit.child starts it).

One line of JSON comes in a task: ``{"task": NAME, "arguments": {…}, "caller": PID}``, the arguments being those of
the function of that name in imagekit.api. JSON Lines go out: ``started``; ``status`` with phase, done and total now
and then, and at the end of each task one ``result`` or one ``exit_error``, in the words of ``imagekit --progress
json``. Tasks are done one after the other, until no more comes.

SIGTERM, and the death of the caller where the platform tells, stop the task as Ctrl-C stops the command line:
nothing is left behind.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from imagekit.confinement import start as confined_start
from imagekit.ending import leave
from imagekit.errors import Cancelled, ImagekitError, ToolError, UsageError
from imagekit.formats.base import JSON, MiB
from imagekit.progress import Callback, Progress
from imagekit.workers import keep_freed_memory

STEP = 0.2
"""Seconds between two lines of progress."""
PR_SET_PDEATHSIG = 1
MANY = "--many"
"""Says that many tasks will come."""


def _digest(
    path: str, algorithm: str, *, progress: Callback | None = None, cancel: threading.Event | None = None
) -> dict[str, JSON]:
    """The checksum of a file's bytes."""
    made = hashlib.new(algorithm)
    with Path(path).open("rb") as file:
        total = os.fstat(file.fileno()).st_size
        while piece := file.read(MiB):
            made.update(piece)
            if cancel is not None and cancel.is_set():
                raise Cancelled("stopped on request")
            if progress is not None:
                progress(Progress("hash", file.tell(), total))
    return {"algorithm": algorithm, "value": made.hexdigest(), "size": total}


# Those that tell how far they are, and those that are over at once. A function is loaded when it is asked for.
LONG: dict[str, str | Callable[..., Any]] = {
    "convert": "imagekit.api:convert",
    "resize": "imagekit.api:resize",
    "merge": "imagekit.api:merge",
    "compare": "imagekit.api:compare",
    "measure": "imagekit.api:measure",
    "digest": _digest,
    "adopt": "imagekit.adopt:adopt",
    "perform": "imagekit.batch.tasks:perform",
    "import_image": "imagekit.glance.importing:import_image",
}
SHORT: dict[str, str | Callable[..., Any]] = {
    "create": "imagekit.api:create",
    "rebase": "imagekit.api:rebase",
    "identify": "imagekit.api:identify",
    "info": "imagekit.api:info",
    "check": "imagekit.api:check",
}
CONFINED = ("adopt", "import_image")
"""Tasks that read an image in a confined process without being asked to."""


def run(name: str, /, **arguments: Any) -> dict[str, JSON]:
    """The task of that name; its result as plain data."""
    result = _function(name)(**arguments)
    return dict(result if isinstance(result, Mapping) else result.to_json())


def _function(name: str) -> Callable[..., Any]:
    found = LONG.get(name) or SHORT.get(name)
    if found is None:
        raise UsageError(f"no task is called {name!r}", hint=f"tasks: {', '.join(sorted(LONG | SHORT))}")
    if isinstance(found, str):
        module, _, function = found.partition(":")
        loaded: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return loaded
    return found


def main() -> int:
    """Do the tasks that stdin names; the exit code is the last one's, that of the command line."""
    # What a library prints must not end up between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    cancel = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: cancel.set())
    keep_freed_memory()

    def say(message_type: str, **more: JSON) -> None:
        answers.write(json.dumps({"message_type": message_type, **more}) + "\n")

    many = MANY in sys.argv[1:]
    line = "" if many else sys.stdin.readline()
    # All that loads does so before "started": whoever asks sees to it that not too many do at once.
    if many:
        _make_ready("perform", confined=True)
    elif line:
        first = json.loads(line)
        _make_ready(first["task"], confined=first["task"] in CONFINED or bool(first["arguments"].get("confined")))
    say("started")
    code = 0
    while not cancel.is_set() and (line := line or sys.stdin.readline()):
        code = _answer(json.loads(line), say, cancel)
        line = ""
    confined_start.end()
    return code


def _make_ready(task: str, *, confined: bool) -> None:
    """Load what the task needs, and meanwhile the interpreter that reads its image. Errors come with the task."""
    with suppress(ToolError, UsageError):
        if confined:
            confined_start.prepare()
        _function(task)


def _answer(request: Mapping[str, Any], say: Callable[..., None], cancel: threading.Event) -> int:
    try:
        _end_with(int(request["caller"]))
        say("result", result=_done(request["task"], dict(request["arguments"]), say, cancel))
        return 0
    except ImagekitError as error:
        kind = type(error).__name__
        more = {"rule": rule} if (rule := getattr(error, "rule", "")) else {}
        say(
            "exit_error",
            code=error.exit_code,
            kind=kind,
            message=error.message,
            hint=error.hint,
            path=error.path,
            offset=error.offset,
            **more,
        )
        return error.exit_code


def _done(name: str, arguments: dict[str, Any], say: Callable[..., None], cancel: threading.Event) -> dict[str, JSON]:
    last = 0.0

    def tell(step: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= STEP:
            last = now
            say("status", phase=step.phase, done=step.done, total=step.total)

    return run(name, **arguments, **({"progress": tell, "cancel": cancel} if name in LONG else {}))


def _end_with(caller: int) -> None:
    """Be told when the caller dies, however it does (Linux; elsewhere the task goes on to its end)."""
    if sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != caller:  # it died before we asked
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    ended_with = main()
    leave(ended_with)
    sys.exit(ended_with)
