"""Tasks in a process of their own: results, errors, progress and stopping are those of the library."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import imagekit
from imagekit.child import Child
from imagekit.child_main import LONG, SHORT, _function
from imagekit.errors import Cancelled, InvalidImage, ToolError, UnsafeImage, UsageError
from imagekit.formats.base import MiB
from imagekit.progress import Progress
from tests.disks import noise, text


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(noise(3 * MiB))
    return path


def test_a_conversion_elsewhere_is_the_same(raw: Path, tmp_path: Path) -> None:
    same: dict[str, Any] = {"identifier": "6f9c1d2e-0b1a-4c3d-8e5f-001122334455"}
    report = Child().run("convert", {"source": str(raw), "target": str(tmp_path / "child.vhd"), **same})
    imagekit.convert(raw, tmp_path / "here.vhd", **same)
    assert (tmp_path / "child.vhd").read_bytes() == (tmp_path / "here.vhd").read_bytes()
    assert report["target"]["virtual-size"] == 3 * MiB


@pytest.mark.parametrize("name", [*LONG, *SHORT])
def test_every_task_is_there_and_the_long_ones_can_be_followed(name: str) -> None:
    parameters = inspect.signature(_function(name)).parameters
    assert ({"progress", "cancel"} <= set(parameters)) == (name in LONG)


def test_a_task_loads_no_more_than_it_needs(raw: Path) -> None:
    """A child that hashes a file loads neither the readers nor HTTP."""
    code = (
        "import sys\n"
        "from imagekit import child_main\n"
        f"child_main.run('digest', path={str(raw)!r}, algorithm='md5')\n"
        "print({'http.client', 'imagekit.api', 'imagekit.formats.qcow2'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_progress_arrives(raw: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    Child().run("convert", {"source": str(raw), "target": str(tmp_path / "a.vhd")}, progress=seen.append)
    assert {step.phase for step in seen} & {"plan", "copy", "sync"}
    assert all(0 <= step.done <= max(step.done, step.total) for step in seen)


def test_errors_keep_their_kind_rule_hint_and_place(tmp_path: Path) -> None:
    cut = tmp_path / "cut.qcow2"
    cut.write_bytes(b"QFI\xfb" + bytes(20))
    with pytest.raises(InvalidImage) as caught:
        Child().run("info", {"image": str(cut)})
    assert (caught.value.path, caught.value.offset) == (str(cut), 0)
    promised = tmp_path / "promised.vhd"
    promised.write_bytes(bytes(MiB))
    with pytest.raises(UnsafeImage) as refused:
        Child().run("convert", {"source": str(promised), "target": str(tmp_path / "x.vhdx")})
    assert refused.value.rule == "name-mismatch"
    assert refused.value.hint


def test_a_task_nobody_knows_is_an_error() -> None:
    with pytest.raises(UsageError, match="no task is called 'format-c'"):
        Child().run("format-c", {})


def test_an_interpreter_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="cannot be started"):
        Child(python=str(tmp_path / "python")).run("info", {"image": "x"})


def test_an_interpreter_without_imagekit_says_so(tmp_path: Path) -> None:
    """-m fails there; its last words are in the error."""
    bare = Child(environment={"PYTHONPATH": "", "PATH": os.environ["PATH"]}, python=_isolated(tmp_path))
    with pytest.raises(ToolError, match=r"without a result.*imagekit"):
        bare.run("info", {"image": "x"})


def _isolated(folder: Path) -> str:
    script = folder / "isolated-python"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    script.chmod(0o755)
    return str(script)


def test_cancel_stops_the_child_and_leaves_nothing(tmp_path: Path, no_leftovers: Path) -> None:
    big = tmp_path / "big.raw"
    with big.open("wb") as file:
        for seed in range(256):
            file.write(text(MiB, seed))
    cancel = threading.Event()
    seen: list[Progress] = []

    def stop(step: Progress) -> None:
        seen.append(step)
        cancel.set()

    # Compressed by one thread: seconds of work, of which the first report comes at once.
    arguments = {"source": str(big), "target": str(no_leftovers / "big.qcow2"), "compression": "zlib", "jobs": 1}
    started = time.monotonic()
    with pytest.raises(Cancelled):
        Child().run("convert", arguments, progress=stop, cancel=cancel)
    assert time.monotonic() - started < 10
    assert seen


def test_a_child_that_is_killed_is_an_error_not_a_wait(raw: Path, tmp_path: Path) -> None:
    """A stand-in for the interpreter that dies at once, as by the kernel's out-of-memory killer."""
    if sys.platform == "win32":
        raise RuntimeError("not there on Windows")
    script = tmp_path / "dying-python"
    script.write_text("#!/bin/sh\nkill -9 $$\n")
    script.chmod(0o755)
    with pytest.raises(ToolError, match=rf"code -{signal.SIGKILL}"):
        Child(python=str(script)).run("info", {"image": str(raw)})


def test_a_child_has_a_lower_priority_than_its_caller(raw: Path, tmp_path: Path) -> None:
    """Told by a sitecustomize of the child, as it ends."""
    if sys.platform == "win32":
        pytest.skip("niceness is POSIX")
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        f"import atexit, os, pathlib\natexit.register(lambda: pathlib.Path({str(tmp_path / 'nice')!r}).write_text("
        "str(os.getpriority(os.PRIO_PROCESS, 0))))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    own = os.getpriority(os.PRIO_PROCESS, 0)
    for niceness in (0, 3):
        Child(environment=environment, niceness=niceness).run("info", {"image": str(raw)})
        assert int((tmp_path / "nice").read_text()) == min(19, own + niceness)


def test_no_more_children_start_at_once_than_there_are_processors(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagekit.child._starting", threading.BoundedSemaphore(1))
    site, log = tmp_path / "site", tmp_path / "log"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os, time\n"
        f"log = os.open({str(log)!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)\n"
        "os.write(log, b'+')\ntime.sleep(0.2)\nos.write(log, b'-')\n"
    )
    child = Child(environment={**os.environ, "PYTHONPATH": str(site)})
    with ThreadPoolExecutor(3) as pool:
        sizes = list(pool.map(lambda _: child.run("info", {"image": str(raw)})["virtual-size"], range(3)))
    assert sizes == [3 * MiB] * 3
    assert log.read_text() == "+-+-+-"


def test_what_a_library_prints_does_not_get_between_the_answers(raw: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("print('hello from a library')\n")
    environment = {**os.environ, "PYTHONPATH": str(site)}
    assert Child(environment=environment).run("info", {"image": str(raw)})["virtual-size"] == 3 * MiB
