"""The digest of a file that is there: SHA-256, read in order, with progress and a way to stop."""

from __future__ import annotations

import hashlib
from pathlib import Path

from imagekit.formats.base import MiB
from imagekit.progress import SILENT, Control

STEP = 4 * MiB


def file_digest(path: Path, *, control: Control = SILENT) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest, done, size = hashlib.sha256(), 0, path.stat().st_size
    buffer = memoryview(bytearray(STEP))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            done += count
            control.tell("hash", done, size)
    return digest.hexdigest()
