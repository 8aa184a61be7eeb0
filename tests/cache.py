"""Where tests keep what is costly to make, outside the repository: unpacked samples, environments, guests."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl


def cache_dir(name: str) -> Path:
    """The folder ``name`` of the tests' cache, made if need be."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "imagekit-tests" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``, so that two test runs do not make the same thing at once.

    The kernel lets go of it when the process dies. On Windows there is no lock: run the tests once at a time.
    """
    with path.open("a") as file:
        if sys.platform != "win32":
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
