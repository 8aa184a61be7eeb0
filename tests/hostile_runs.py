"""Runs of the command line in this process, watched: what they print, what they open, what they cost.

As a program (``python -m tests.hostile_runs [--json]``) it takes the whole hostile corpus through ``info`` and
``convert``, each image in a process of its own with as much memory as there is before and 64 MiB more, and prints
what happened. Linux only.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import typer

from fixtures.hostile import CLASSES, Hostile, corpus
from imagekit.cli import app
from imagekit.formats.base import KiB, MiB

ROOT = Path(__file__).parents[1]
BUDGET = 64 * MiB
INTERNAL = 70
QUIET = ("--progress", "none")
PATIENCE = 20
"""Seconds after which a process that says nothing is killed: out of memory, a thread may not even start."""

_CODE = (str(ROOT), *{os.path.realpath(one) for one in (sys.prefix, sys.base_prefix, sys.exec_prefix)})
_FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "socket.getaddrinfo")


@dataclass(frozen=True, slots=True)
class Opened:
    """A path that was opened, or (``how`` is not ``read`` or ``write``) something that must never happen."""

    how: str
    path: str


@dataclass(frozen=True, slots=True)
class Ran:
    """What one command did. ``seconds`` are those of processors, of all threads together."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    opened: tuple[Opened, ...]

    @property
    def printed(self) -> str:
        return self.stdout + self.stderr

    def json(self) -> Any:
        """The result, where ``--output json`` was asked for."""
        return json.loads(self.stdout)


# --- what is opened --------------------------------------------------------------------------------------------

_record: list[Opened] | None = None


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _record is None:
        return
    if event == "open" and not isinstance(arguments[0], int):
        flags = arguments[2] or 0
        writes = flags & (os.O_WRONLY | os.O_RDWR) != 0
        _record.append(Opened("write" if writes else "read", os.fspath(os.fsdecode(arguments[0]))))
    elif event in _FORBIDDEN:
        _record.append(Opened(event, str(arguments[:2])))


@functools.cache
def _install() -> None:
    sys.addaudithook(_watch)  # for ever: hooks cannot be removed


def _is_code(path: str) -> bool:
    """Modules are imported at first need."""
    return os.path.realpath(path).startswith(_CODE) and not path.startswith("/proc")


@contextlib.contextmanager
def watched() -> Iterator[list[Opened]]:
    """Everything opened meanwhile, but for the program's own code."""
    global _record  # noqa: PLW0603 - audit hooks are of the process
    _install()
    found: list[Opened] = []
    _record = []
    try:
        yield found
    finally:
        found += [one for one in _record if one.how not in ("read", "write") or not _is_code(one.path)]
        _record = None


# --- runs ------------------------------------------------------------------------------------------------------


@functools.cache
def _built() -> Any:
    """The command line's parser, which is most of the time that a short command takes."""
    return typer.main.get_command(app.application())


def run(*arguments: str | Path) -> Ran:
    """One command line."""
    built = _built()
    out, err, before = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGTERM)
    with contextlib.ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGTERM, before)
        stack.enter_context(mock.patch.object(app, "application", lambda _: built))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        opened = stack.enter_context(watched())
        started = time.process_time()
        code = app.run([str(one) for one in arguments])
        seconds = time.process_time() - started
    return Ran(code, out.getvalue(), err.getvalue(), seconds, tuple(opened))


def convert(source: Path, target: Path, *options: str) -> Ran:
    return run("convert", source, target, "--no-sync", *QUIET, *options)


def given(entry: Hostile) -> Sequence[str]:
    """The options that the entry is about: what is allowed, and the limit that is set."""
    allowed = () if entry.allow is None else ("--allow", entry.allow)
    return (*allowed, *limit(entry))


def limit(entry: Hostile) -> Sequence[str]:
    return () if entry.limit is None else (f"--limit-{entry.limit[0]}", entry.limit[1])


# --- memory ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def limited(budget: int) -> Iterator[None]:
    """No more than ``budget`` bytes on top of what the process has: past that, MemoryError. Linux only."""
    if sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + budget, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def forget_peak() -> None:
    """Let the peak begin at what is resident now. Linux only."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def status(field: str) -> int:
    """Bytes of this process: ``VmRSS`` (resident), ``VmHWM`` (their peak), ``VmData`` (its own). Linux only."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * KiB for line in lines if line.startswith(f"{field}:"))


def _take(path: Path, entry: Hostile, out: Path) -> dict[str, Any]:
    """One image in little memory, and what that took."""
    forget_peak()
    before = status("VmRSS")
    with limited(BUDGET):
        runs = run("info", path, *limit(entry)), convert(path, out / "target.raw", "-m", "1", *given(entry))
    peak = status("VmHWM") - before
    made = (out / "target.raw").exists()
    (out / "target.raw").unlink(missing_ok=True)
    return {
        "peak": peak,
        "seconds": max(ran.seconds for ran in runs),
        "code": runs[1].code,
        "made": made,
        "failed": [ran.stderr for ran in runs if ran.code == INTERNAL],
    }


def _apart(path: Path, entry: Hostile, out: Path) -> Any:
    """The same in a process of its own, as a command is: what one image leaves behind is not the next one's."""
    if sys.platform == "win32":
        raise RuntimeError("not there on Windows")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(PATIENCE)
        try:
            os.write(writing, json.dumps(_take(path, entry, out)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        said = file.read()
    os.waitpid(child, 0)
    hung = {"peak": 0, "seconds": PATIENCE, "code": INTERNAL, "made": False, "failed": ["it was killed, or hung"]}
    return json.loads(said) if said else hung


def sweep(folder: Path) -> dict[str, Any]:
    """What became of every entry of the corpus, by name. Its sound images go first: they make all be imported."""
    out = folder / "out"
    out.mkdir()
    entries = corpus()
    for entry in entries.values():
        if entry.verdict == "sound":
            path = entry.made().write(folder / f"{entry.name}{entry.suffix}")
            run("info", path)
            assert convert(path, out / "target.raw", "-m", "1").code == 0, entry.name
            (out / "target.raw").unlink()
    found = {}
    for name, entry in entries.items():
        path = entry.made().write(folder / f"{name}{entry.suffix}")
        found[name] = _apart(path, entry, out)
        path.unlink()
    return found


def table(found: dict[str, Any]) -> str:
    """Class by verdict, and the worst of each, for people."""
    entries = corpus()
    head = "class", "entries", "refused", "read as it must be", "accepted", "crashed", "worst s", "worst MiB"
    lines = [" | ".join(head), "|".join(["---"] * len(head))]
    for kind in (*CLASSES, "all"):
        names = [name for name, one in entries.items() if kind in ("all", one.kind)]
        ran = [(entries[name], found[name]) for name in names]
        refused = sum(one.verdict == "refused" and not got["made"] for one, got in ran)
        accepted = sum(one.verdict == "refused" and got["made"] for one, got in ran)
        read = sum(one.verdict != "refused" and got["made"] for one, got in ran)
        light = [got for one, got in ran if not one.heavy]
        crashed = sum(bool(got["failed"]) for _, got in ran)
        seconds, peak = max(got["seconds"] for got in light), max(got["peak"] for got in light) / MiB
        row = kind, len(names), refused, read, accepted, crashed, f"{seconds:.2f}", f"{peak:.0f}"
        lines.append(" | ".join(map(str, row)))
    return "\n".join(lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir="/var/tmp") as made:
        results = sweep(Path(made))
    print(json.dumps(results) if "--json" in sys.argv else table(results))
