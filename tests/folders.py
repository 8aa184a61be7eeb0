"""Places where reading or writing fails, also for root: unreadable files, read-only folders, full disks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def unprivileged() -> Iterator[None]:
    """As a user for whom permissions count, also where the tests run as root."""
    if sys.platform == "win32":
        pytest.skip("POSIX permissions")
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if before == 0:
            os.seteuid(0)


@contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """The folder, made so that nothing can be created in it."""
    if sys.platform == "win32":
        pytest.skip("POSIX permissions")
    if os.geteuid() == 0:
        with _mounted(folder, "ro"):
            yield folder
        return
    folder.chmod(0o555)
    try:
        yield folder
    finally:
        folder.chmod(0o755)


@contextmanager
def small(folder: Path, size: int) -> Iterator[Path]:
    """The folder, on a file system of its own that holds ``size`` bytes."""
    with _mounted(folder, f"size={size}"):
        yield folder


@contextmanager
def _mounted(folder: Path, options: str) -> Iterator[None]:
    """A file system in memory over the folder. Only root may mount, and not in every container."""
    command = ["mount", "-t", "tmpfs", "-o", options, "imagekit-test", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True, capture_output=True)
