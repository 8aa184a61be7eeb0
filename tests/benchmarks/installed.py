"""imagekit as a user has it: installed, not editable, whose finder of modules takes a tenth of a short command.

It goes into an environment of its own, made anew when a source changes, which finds what imagekit depends on where
the benchmark does. No network is needed.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from tests.cache import cache_dir, locked

ROOT = Path(__file__).parents[2]
SOURCES = ("imagekit", "formats", "cloudinit", "pyproject.toml", "README.md", "LICENSE")


@functools.cache
def command() -> str:
    """The path of the program."""
    place = cache_dir("installed")
    folder = place / _digest()
    with locked(place / "lock"):
        if not (folder / "complete").exists():
            for old in place.iterdir():
                if old.is_dir():
                    shutil.rmtree(old)
            _install(folder)
            (folder / "complete").touch()
    return str(folder / "bin" / "imagekit")


def _digest() -> str:
    digest = hashlib.sha256(sys.executable.encode())
    for path in sorted(path for name in SOURCES for path in [ROOT / name, *(ROOT / name).rglob("*")]):
        if path.is_file() and path.suffix != ".pyc":
            digest.update(f"{path} {path.stat().st_size} ".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _install(folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--clear", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(ask, check=True, stdout=subprocess.PIPE, text=True).stdout.strip())
    # A path in a .pth file is searched; the .pth files there, the editable one among them, are not read.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "imagekit"
        copy.mkdir()
        for one in SOURCES:
            if (ROOT / one).is_dir():
                shutil.copytree(ROOT / one, copy / one, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / one, copy / one)
        options = ("--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed")
        subprocess.run([python, "-m", "pip", "install", "-qq", *options, str(copy)], check=True)
