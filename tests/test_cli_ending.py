"""How the command ``imagekit`` ends: without the interpreter's clean-up, and with what it would have said."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

QUICK = "from imagekit.cli import program as end"
ORDINARY = "from imagekit.cli import main as end"
LINES = {
    "good": ["info", "disk.raw"],
    "version": ["--version"],
    "help": ["info", "--help"],
    "bad": ["info", "missing.raw"],
    "json": ["convert", "disk.raw", "disk.vhd", "--output", "json", "--overwrite", "--no-sync"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    return tmp_path


@contextmanager
def sink(kind: str) -> Iterator[int]:
    """Somewhere that stdout cannot go, or can."""
    if kind == "pipe that nobody reads":
        reading, writing = os.pipe()
        os.close(reading)
    else:
        writing = os.open({"full": "/dev/full", "null": os.devnull}[kind], os.O_WRONLY)
    try:
        yield writing
    finally:
        os.close(writing)


def run(code: str, arguments: list[str], folder: Path, stdout: int = subprocess.PIPE) -> tuple[int, bytes, bytes]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, cwd=folder, env=environment, timeout=60, close_fds=True
    )
    return done.returncode, done.stdout or b"", done.stderr


def last_line(text: bytes) -> bytes:
    return text.strip().rpartition(b"\n")[2]


@pytest.mark.skipif(sys.platform == "win32", reason="no /dev/full there")
@pytest.mark.parametrize(
    ("line", "kind"),
    [
        *[("good", "full"), ("good", "pipe that nobody reads"), ("version", "full")],
        *[
            ("version", "pipe that nobody reads"),
            ("help", "full"),
            ("bad", "null"),
            ("json", "null"),
            ("json", "full"),
        ],
    ],
)
def test_a_command_ends_with_the_same_code_and_last_word(line: str, kind: str, folder: Path) -> None:
    with sink(kind) as stdout:
        ordinary = run(f"{ORDINARY}; end()", LINES[line], folder, stdout)
        quick = run(f"{QUICK}; end()", LINES[line], folder, stdout)
    assert quick[0] == ordinary[0]
    assert last_line(quick[2]) == last_line(ordinary[2])


def test_all_that_was_printed_arrives(folder: Path) -> None:
    code = f"print('x' * 300_000); {QUICK}; end()"
    returned, out, _ = run(code, ["--version"], folder)
    assert (returned, len(out)) == (0, 300_001 + len("imagekit 0.1.0\n"))


def test_what_is_registered_for_the_end_is_run(folder: Path) -> None:
    code = f"import atexit; atexit.register(print, 'the end'); {QUICK}; end()"
    assert run(code, ["--version"], folder)[1].split(b"\n")[1] == b"the end"


def test_the_interpreters_own_clean_up_is_left_out(folder: Path) -> None:
    """What it would have destroyed last is not destroyed."""
    code = "class Last:\n def __del__(self): print('destroyed')\nlast = Last()\n"
    assert b"destroyed" in run(f"{code}{ORDINARY}; end()", ["--version"], folder)[1]
    assert b"destroyed" not in run(f"{code}{QUICK}; end()", ["--version"], folder)[1]


def test_a_thread_is_waited_for(folder: Path) -> None:
    code = "import threading, time\ndef late():\n time.sleep(0.3)\n print('late', flush=True)\n"
    code += f"threading.Thread(target=late).start()\n{QUICK}; end()"
    assert run(code, ["--version"], folder)[:2] == (0, b"imagekit 0.1.0\nlate\n")


def test_a_profile_is_not_lost(folder: Path) -> None:
    command = [sys.executable, "-m", "cProfile", "-m", "imagekit", "--version"]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE)
    assert b"function calls" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="a shell's >&- is meant")
def test_a_closed_stdout_is_no_error(folder: Path) -> None:
    command = [sys.executable, "-m", "imagekit", "info", "disk.raw"]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], cwd=folder, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")
