"""Who does the items of a batch on this computer: child processes that each do one after the other.

Each thread of a pool has a child of its own (imagekit.child_main), which stays: starting an interpreter an item would
cost more than many a conversion. An image is parsed in a confined process that the child starts for it, so it can
take down no more than that; where it takes the child along, the next item gets a new one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from imagekit.batch.manifest import Item
from imagekit.batch.tasks import described
from imagekit.child import ended_silently, understood
from imagekit.errors import Cancelled, ImagekitError
from imagekit.formats.base import MiB
from imagekit.progress import Callback, Control, Progress
from imagekit.records import dataclass
from imagekit.workers import usable_cores

TASKS_OF_A_CHILD = 500
"""After so many it is replaced, should a library not give back all memory."""
MEMORY_OF_A_JOB = 400 * MiB
JOBS_ON_A_BUSY_DISK, BUSY = 2, 50.0
"""While all programs wait for disks more than so many percent of the time, no more items than this are begun."""
GRACE = 5.0
STOPPED = {"ok": False, "cancelled": True, "error": {"code": 130, "kind": "Cancelled", "message": "stopped"}}

Perform = Callable[..., dict[str, Any]]
Tell = Callable[[Item, Progress], None]


@dataclass(frozen=True, slots=True)
class Workforce:
    """An executor, what it is to call with a task and its item, and how many it does at once."""

    pool: Executor
    perform: Perform
    width: int
    stop: Callable[[], None] = lambda: None
    """Ask those at work to drop what they do."""

    ahead: int = 1
    """Items handed out beyond those, so that nobody waits for the next one."""


class Child:
    """One process that does tasks in turn, for one thread."""

    def __init__(self) -> None:
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "imagekit.child_main", "--many"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
        )
        self.done = 0

    def run(self, task: str, arguments: Mapping[str, Any], progress: Callback | None) -> dict[str, Any]:
        """The task's result. Raises its error, and ToolError when the process ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self.done += 1
        line = json.dumps({"task": task, "arguments": dict(arguments), "caller": os.getpid()}).encode() + b"\n"
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except OSError:
            raise ended_silently(self._process.wait(), self._words) from None
        control = Control(progress)
        for answer in self._process.stdout:
            if (found := understood(answer, control)) is not None:
                return found
        raise ended_silently(self._process.wait(), self._words)

    def stop(self) -> None:
        """Ask it to drop its task; it ends."""
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._words.close()


class Crew:
    """The children of all threads, and when each may begin."""

    def __init__(self, cancel: threading.Event, tell: Tell | None) -> None:
        self._cancel, self._tell = cancel, tell
        self._mine = threading.local()
        self._guard = threading.Lock()
        self._all: list[Child] = []
        self._turn = threading.Condition()
        self._at_work = 0

    def perform(self, task: Mapping[str, Any], item: Item) -> dict[str, Any]:
        """One item, by the calling thread's child."""
        if self._cancel.is_set():
            return dict(STOPPED)
        tell = self._tell
        child = self._child()
        try:
            with self._admitted():
                return child.run("perform", {"task": task}, None if tell is None else lambda step: tell(item, step))
        except ImagekitError as error:
            self._drop(child)
            if self._cancel.is_set() or isinstance(error, Cancelled):
                return dict(STOPPED)
            return {"ok": False, "error": described(error)}

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        """More items at once than a disk can serve only make it move its heads."""
        with self._turn:
            while self._at_work >= JOBS_ON_A_BUSY_DISK and _waiting_for_disks() > BUSY and not self._cancel.is_set():
                self._turn.wait(1.0)
            self._at_work += 1
        try:
            yield
        finally:
            with self._turn:
                self._at_work -= 1
                self._turn.notify()

    def _child(self) -> Child:
        child: Child | None = getattr(self._mine, "child", None)
        if child is not None and child.done >= TASKS_OF_A_CHILD:
            self._drop(child)
            child = None
        if child is None:
            self._mine.child = child = Child()
            with self._guard:
                self._all.append(child)
        return child

    def _drop(self, child: Child) -> None:
        self._mine.child = None
        with self._guard:
            self._all.remove(child)
        child.close()

    def stop(self) -> None:
        with self._guard:
            for child in self._all:
                child.stop()

    def kill(self) -> None:
        with self._guard:
            for child in self._all:
                child.kill()

    def close(self) -> None:
        for child in self._all:
            child.close()


@contextmanager
def local(jobs: int, cancel: threading.Event, tell: Tell | None = None) -> Iterator[Workforce]:
    """``jobs`` threads of this process, each with a child; ``tell`` hears how far the items are."""
    crew = Crew(cancel, tell)
    with ThreadPoolExecutor(jobs, thread_name_prefix="imagekit-item") as pool:
        try:
            yield Workforce(pool, crew.perform, jobs, crew.stop)
        except BaseException:  # the second Ctrl-C: now
            cancel.set()
            crew.kill()
            raise
    crew.close()


def default_jobs() -> int:
    """Items at once: one a core, as far as memory goes."""
    return min(usable_cores(), max(1, _available_memory() // MEMORY_OF_A_JOB))


def _available_memory() -> int:
    try:
        text = Path("/proc/meminfo").read_text()
        return next(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return 1 << 62  # nobody can tell: the cores alone count


def _waiting_for_disks() -> float:
    """Percent of the last ten seconds in which all that runs here waited for a disk, as Linux counts it."""
    try:
        full = Path("/proc/pressure/io").read_text().splitlines()[1]
        return float(full.split()[1].removeprefix("avg10="))
    except (OSError, IndexError, ValueError):
        return 0.0
