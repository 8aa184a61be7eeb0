"""The outside programs that judge imagekit's work.

A test asks for one in a line, ``qemu_img = need_tool("qemu-img")``, and is skipped, saying why, where the
program is missing. Under CI nothing may be missing: there the same line fails the test.

Python packages that cannot share our environment (other pins, other licences) run as programs of their own,
from an environment made from the pins in ``tests/oracles/NAME.txt`` and kept in the tests' cache.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

import pytest

from tests.cache import cache_dir, locked

_SYSTEM_PYTHON = "/usr/bin/python3"
_PIECE = 1 << 20

_DISSECT_MD5 = """
import hashlib, importlib, sys
path, kind = sys.argv[1:]
module = importlib.import_module("dissect.hypervisor.disk." + kind)
with open(path, "rb") as file:
    disk = getattr(module, {"qcow2": "QCow2"}.get(kind, kind.upper()))(file)
    stream = disk.open() if hasattr(disk, "open") else disk
    digest = hashlib.md5(usedforsecurity=False)
    # No read of the smallest block size of any format crosses a block's end.
    while piece := stream.read(65536):
        digest.update(piece)
print(digest.hexdigest())
"""

_VHDI_MD5 = """
import hashlib, sys, pyvhdi
path, *parent = sys.argv[1:]
disk = pyvhdi.file()
disk.open(path)
if parent:
    below = pyvhdi.file()
    below.open(parent[0])
    disk.set_parent(below)
digest = hashlib.md5(usedforsecurity=False)
left = disk.get_media_size()
while left:
    piece = disk.read_buffer(min(left, 1 << 20))
    if not piece:
        sys.exit(f"{left} bytes before the end libvhdi reads nothing")
    digest.update(piece)
    left -= len(piece)
print(digest.hexdigest())
"""


def need_tool(name: str) -> str:
    """The path of the program ``name``; without it the test is skipped, or fails under CI."""
    everywhere = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    return shutil.which(name, path=everywhere) or missing(f"{name} is not installed")


def need_venv(name: str, *, python: str | None = None) -> Path:
    """The interpreter of an environment with what ``tests/oracles/NAME.txt`` pins, made at first use.

    ``python`` is the minor version ("3.10") that suits the pins best; where it is missing, ours has to do.
    """
    try:
        return _environment(name, _interpreter(python))
    except subprocess.CalledProcessError as error:
        last_words = " ".join((error.stderr or "").split("\n")[-3:])
        missing(f"tests/oracles/{name}.txt cannot be installed: {last_words}")


def qemu_img_md5(path: Path, fmt: str, **options: str) -> str:
    """MD5 of the guest content as qemu-img's driver ``fmt`` reads it, given the driver's own ``options``."""
    qemu_img = need_tool("qemu-img")
    source = {"driver": fmt, "file.filename": str(path), **options}
    described = ",".join(f"{key}={value.replace(',', ',,')}" for key, value in source.items())
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "content.raw"
        _run(qemu_img, "convert", "--image-opts", "-O", "raw", described, str(raw))
        digest = hashlib.md5(usedforsecurity=False)
        with raw.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    return digest.hexdigest()


def dissect_md5(path: Path, kind: str) -> str:
    """MD5 of the guest content as dissect reads it; ``kind`` is qcow2, vhd, vhdx, vmdk or vdi."""
    return _run(str(need_venv("dissect")), "-c", _DISSECT_MD5, str(path), kind).strip()


def vhdi_md5(path: Path, *, parent: Path | None = None) -> str:
    """MD5 of the guest content as libvhdi reads a VHD or VHDX; a differencing one needs its ``parent``."""
    _need_libvhdi()
    parents = [] if parent is None else [str(parent)]
    return _run(_SYSTEM_PYTHON, "-c", _VHDI_MD5, str(path), *parents).strip()


def missing(what: str) -> NoReturn:
    """Skip the test, or fail it under CI."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what}, and under CI no oracle may be missing", pytrace=False)
    pytest.skip(what)


def _run(*command: str) -> str:
    """What the oracle printed; when it fails, the test fails with the oracle's own words."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        pytest.fail(f"{Path(command[0]).name} exited {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def _interpreter(version: str | None) -> str:
    if version is None or sys.version_info[:2] == tuple(map(int, version.split("."))):
        return sys.executable
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python3"))
    found = pyenv[-1] if pyenv else shutil.which(f"python{version}")
    return sys.executable if found is None else str(found)


@functools.cache
def _environment(name: str, interpreter: str) -> Path:
    pins = Path(__file__).with_name(f"{name}.txt")
    made_with = platform.python_version() if interpreter == sys.executable else interpreter
    digest = hashlib.sha256(made_with.encode() + pins.read_bytes()).hexdigest()
    folder = cache_dir("venvs") / f"{name}-{digest[:16]}"
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    complete = folder / "complete"
    with locked(folder.with_suffix(".lock")):
        if not complete.exists():
            _checked(interpreter, "-m", "venv", "--clear", str(folder))
            _checked(str(python), "-m", "pip", "install", "--quiet", "--no-deps", "-r", str(pins))
            complete.touch()
    return python


def _checked(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@functools.cache
def _libvhdi_is_there() -> bool:
    try:
        return subprocess.run([_SYSTEM_PYTHON, "-c", "import pyvhdi"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def _need_libvhdi() -> None:
    if not _libvhdi_is_there():
        missing("libvhdi is not installed (Debian: python3-libvhdi)")
