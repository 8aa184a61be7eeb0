"""File systems to measure on: a folder of the one that holds the corpus, or XFS and btrfs in a file, mounted by loop.

The latter share blocks between files (reflink) and need root; elsewhere they are left out, and the table says so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cache import cache_dir

MAKERS = {"xfs": ("mkfs.xfs", "-q", "-m", "reflink=1"), "btrfs": ("mkfs.btrfs", "-q")}
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def missing(name: str) -> str | None:
    """Why that file system cannot be measured here; None when it can."""
    if name == "ext4":
        return None
    if sys.platform == "win32" or os.geteuid() != 0:
        return "needs root, for a loop mount"
    if shutil.which(MAKERS[name][0], path=PATH) is None:
        return f"needs {MAKERS[name][0]}"
    return None


@contextmanager
def mounted(name: str, size: int) -> Iterator[Path]:
    """A folder on that file system, empty, gone afterwards. ``ext4`` stands for whatever the cache lies on."""
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=cache_dir("benchmarks")) as folder:
        if name == "ext4":
            yield Path(folder)
            return
        medium, at = Path(folder, "medium"), Path(folder, "mounted")
        at.mkdir()
        with medium.open("wb") as file:
            file.truncate(size)
        environment = {**os.environ, "PATH": PATH}
        make = [*MAKERS[name], str(medium)]
        subprocess.run(make, check=True, env=environment, stdout=subprocess.DEVNULL)
        subprocess.run(["mount", "-o", "loop", str(medium), str(at)], check=True, env=environment)
        try:
            yield at
        finally:
            subprocess.run(["umount", str(at)], check=True, env=environment)
