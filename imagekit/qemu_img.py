"""qemu-img as a second opinion. Only ever run on files imagekit made or has judged, never to find out what one is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

from imagekit.errors import ToolError, VerificationFailed

INSTALL_HINT = "install it: apt-get install qemu-utils, dnf install qemu-img, or brew install qemu"
TIMEOUT = 3600.0
_QEMU_NAMES = {"vhd": "vpc"}


def find_qemu_img() -> str:
    """Path of qemu-img; ToolError when it is not installed."""
    path = shutil.which("qemu-img")
    if path is None:
        raise ToolError("qemu-img was not found", hint=INSTALL_HINT)
    return path


def image_options(path: str | os.PathLike[str], format_name: str) -> str:
    """A ``json:`` name that opens the path as exactly that format and lets it refer to nothing else."""
    driver = _QEMU_NAMES.get(format_name, format_name)
    node: dict[str, object] = {
        "driver": driver,
        "file": {"driver": "file", "filename": str(Path(path).absolute())},
    }
    if driver == "vpc":
        node["force_size_calc"] = "current_size"
    if driver == "qcow2":
        node["backing"] = None
    return "json:" + json.dumps(node)


def compare(one: str | os.PathLike[str], one_format: str, other: str | os.PathLike[str], other_format: str) -> None:
    """Raise VerificationFailed when qemu-img finds the contents of two images to differ."""
    command = [
        find_qemu_img(),
        "compare",
        "-U",
        image_options(one, one_format),
        image_options(other, other_format),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL)
    if result.returncode == 1:
        raise VerificationFailed(f"qemu-img compare: {result.stdout.strip()}", path=other)
    if result.returncode != 0:
        raise ToolError(f"qemu-img compare failed: {result.stderr.strip()}", path=other)
