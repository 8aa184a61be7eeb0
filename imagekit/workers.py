"""Threads that share one iterator of tasks: as many tasks in flight as threads, so memory is bounded by both.

Numbers and copies run outside the interpreter's lock, so plain threads use all cores.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from imagekit.progress import INTERVAL, Control

Task = TypeVar("Task")

# mallopt(3)
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


def usable_cores() -> int:
    """Processors this process may run on."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory instead of giving it back after every cluster. For a process of our own.

    Each cluster is decoded into memory that is freed at once; giving it back costs a page fault a page, a tenth
    of a conversion's time. Elsewhere than on glibc this does nothing.
    """
    if sys.platform != "linux":
        return
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, 64 << 20)
        mallopt(M_MMAP_THRESHOLD, 32 << 20)


class _Shared(Generic[Task]):
    """The iterator of tasks and the first error, behind one lock."""

    def __init__(self, tasks: Iterator[Task]) -> None:
        self._tasks = tasks
        self._lock = threading.Lock()
        self.error: BaseException | None = None
        self.stopped = False

    def next(self) -> Task | None:
        with self._lock:
            if self.stopped:
                return None
            return next(self._tasks, None)

    def fail(self, error: BaseException) -> None:
        with self._lock:
            self.error = self.error or error
            self.stopped = True


def run(
    tasks: Iterable[Task],
    make_worker: Callable[[], Callable[[Task], None]],
    *,
    jobs: int,
    control: Control,
    tick: Callable[[], None],
) -> None:
    """Do every task once; ``make_worker`` is called in each thread, for buffers of its own.

    ``tick`` is called from the caller's thread every INTERVAL seconds and at the end. The first error of a worker
    stops the others and is raised here, as is Cancelled; no thread is left behind in any case.
    """
    shared = _Shared(iter(tasks))

    def loop() -> None:
        try:
            work = make_worker()
            while (task := shared.next()) is not None:
                work(task)
        except BaseException as error:  # handed to the caller's thread, whatever it is
            shared.fail(error)

    threads = [threading.Thread(target=loop, name=f"imagekit-{number}", daemon=True) for number in range(jobs)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(INTERVAL)
                control.check()
                tick()
    finally:
        shared.stopped = True
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    if shared.error is not None:
        raise shared.error
    tick()
