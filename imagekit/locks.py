"""Locks between processes, of the very kind that OpenStack's services take.

oslo.concurrency's external locks are fasteners' ``InterProcessLock`` on a file: whoever shares a folder with
compute-hyperv takes the same lock on the same name. On POSIX these locks belong to the process, so within one a
``threading.Lock`` a name comes first. Waiting is looking and sleeping: it never blocks the hub of green threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fasteners

from imagekit.errors import TargetError
from imagekit.progress import SILENT, Control

INTERVAL = 0.05
"""Seconds between two tries."""

_inside: dict[str, threading.Lock] = {}
_guard = threading.Lock()


@contextmanager
def held(path: Path, *, control: Control = SILENT, wait: bool = True) -> Iterator[bool]:
    """Hold the lock on that file; with ``wait`` False yield whether it is held. Cancelled while waiting, if asked."""
    with _guard:
        inner = _inside.setdefault(str(path.absolute()), threading.Lock())
    if not _taken(lambda: inner.acquire(blocking=False), control, wait=wait):
        yield False
        return
    try:
        lock = fasteners.InterProcessLock(str(path))
        try:
            taken = _taken(lambda: bool(lock.acquire(blocking=False)), control, wait=wait)
        except OSError as error:
            raise TargetError(f"cannot be locked: {error.strerror}", path=path) from error
        try:
            yield taken
        finally:
            if taken:
                lock.release()
    finally:
        inner.release()


def _taken(take: Callable[[], bool], control: Control, *, wait: bool) -> bool:
    while not take():
        if not wait:
            return False
        control.check()
        time.sleep(INTERVAL)
    return True
