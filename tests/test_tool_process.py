"""Outside programs: what they get, what they may not, and that they end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from imagekit.confinement import rights
from imagekit.errors import Cancelled, TargetError, ToolError
from imagekit.progress import Control
from imagekit.tool_process import MOST_OUTPUT, Finished, ToolLimits, run

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")

MiB = 1 << 20
LIMITS = ToolLimits(reserve=0)
linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
sandboxed = pytest.mark.skipif(rights.landlock_version() == 0, reason="this kernel has no Landlock")


def sh(script: str, *arguments: str, limits: ToolLimits = LIMITS, **options: object) -> Finished:
    shell = shutil.which("sh")
    assert shell is not None
    return run([shell, "-c", script, "sh", *arguments], limits=limits, **options)  # type: ignore[arg-type]


def said(script: str, limits: ToolLimits = LIMITS) -> str:
    finished = sh(script, limits=limits)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.decode().strip()


# --- what it gets ----------------------------------------------------------------------------------------------


def test_output_errors_and_status_come_back() -> None:
    assert sh("echo out; echo err >&2; exit 3") == Finished(3, b"out\n", b"err\n")


def test_the_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hidden")
    monkeypatch.setenv("LD_PRELOAD", "")
    names = {line.split("=")[0] for line in said("env").splitlines()}
    assert names - {"PWD", "SHLVL", "_", "OLDPWD"} == {"LC_ALL", "MALLOC_ARENA_MAX"}


def test_there_is_no_input_and_no_folder_of_ours() -> None:
    assert said("cat; pwd") == "/"


def test_descriptors_are_passed_by_name_only(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"one")
    with (tmp_path / "one").open("rb") as passed, (tmp_path / "one").open("rb") as kept:
        os.set_inheritable(kept.fileno(), True)
        code = f"import os; print(os.read({passed.fileno()}, 9)); os.fstat({kept.fileno()})"
        command = [sys.executable, "-I", "-S", "-c", code]
        finished = run(command, limits=ToolLimits(sandbox=False), read_fds=[passed.fileno()])
    assert finished.stdout == b"b'one'\n"
    assert b"Bad file descriptor" in finished.stderr


def test_limits_hold() -> None:
    limits = ToolLimits(memory=512 * MiB, cpu_seconds=77, file_size=8 * MiB, descriptors=33)
    script = "ulimit -v; ulimit -t; ulimit -n; ulimit -c"
    assert said(script, limits).split() == [str(512 * 1024), "77", "33", "0"]


def test_a_file_that_grows_too_large_is_not_written(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.touch()
    limits = ToolLimits(file_size=64 * 1024, reserve=0)
    finished = sh('head -c 1000000 /dev/zero > "$1"', str(target), limits=limits, write=target)
    assert finished.returncode != 0
    assert target.stat().st_size == 64 * 1024


def test_processor_time_is_limited() -> None:
    finished = sh("while :; do :; done", limits=ToolLimits(cpu_seconds=1))
    assert -finished.returncode in (9, 24)  # SIGKILL, SIGXCPU


def test_a_limit_is_never_raised() -> None:
    """Where a limit of ours is lower already, it stays."""
    code = (
        "import resource, sys; from imagekit.tool_process import run, ToolLimits;"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40));"
        "print(run(['/bin/sh', '-c', 'ulimit -n'], limits=ToolLimits(descriptors=64)).stdout.decode())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "40", done.stderr


# --- the sandbox -----------------------------------------------------------------------------------------------


@sandboxed
def test_files_that_it_is_not_about_cannot_be_read_or_written(tmp_path: Path) -> None:
    secret, target = tmp_path / "secret", tmp_path / "target"
    secret.write_bytes(b"secret")
    target.touch()
    script = (
        'cat "$1"; cat /etc/passwd; echo x >> "$1"; echo x > "$1"; ls "$2"; rm "$1"; echo x > "$2/new";echo ok > "$3"'
    )
    finished = sh(script, str(secret), str(tmp_path), str(target), write=target)
    assert finished.stdout == b""
    assert finished.stderr.count(b"ermission denied") >= 6
    assert (secret.read_bytes(), target.read_bytes()) == (b"secret", b"ok\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret", "target"]


@sandboxed
def test_a_passed_file_can_be_opened_anew_but_not_written(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"image")
    with path.open("rb") as file:
        finished = sh(
            f"cat /proc/self/fd/{file.fileno()}; echo x > /proc/self/fd/{file.fileno()}", read_fds=[file.fileno()]
        )
    assert finished.stdout == b"image"
    assert b"ermission denied" in finished.stderr
    assert path.read_bytes() == b"image"


@sandboxed
def test_without_the_sandbox_files_can_be_read(tmp_path: Path) -> None:
    """So that the tests above are about it."""
    (tmp_path / "secret").write_bytes(b"secret")
    finished = sh('cat "$1"', str(tmp_path / "secret"), limits=ToolLimits(sandbox=False))
    assert finished.stdout == b"secret"


@linux
def test_it_can_gain_no_rights() -> None:
    assert "NoNewPrivs:\t1" in said("cat /proc/self/status", ToolLimits(sandbox=False))


# --- the end ---------------------------------------------------------------------------------------------------


def test_a_program_that_takes_too_long_is_ended() -> None:
    started = time.monotonic()
    with pytest.raises(ToolError, match="sh took longer than 0 s"):
        sh("exec sleep 60", limits=ToolLimits(seconds=0.3))
    assert time.monotonic() - started < 20


def test_a_wish_to_stop_is_heard() -> None:
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    with pytest.raises(Cancelled):
        sh("exec sleep 60", control=Control(cancel=stop))


def test_a_medium_that_gets_full_ends_it(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.touch()
    with pytest.raises(TargetError, match="no space"):
        sh("exec sleep 60", write=target, limits=ToolLimits(reserve=1 << 60))


def test_output_without_end_is_not_kept() -> None:
    finished = sh("head -c 20000000 /dev/zero | tr '\\0' x; echo end")
    assert len(finished.stdout) == MOST_OUTPUT
    assert finished.stdout.endswith(b"xend\n")


def test_output_is_told_while_it_runs() -> None:
    pieces: list[bytes] = []
    sh("echo one; sleep 0.5; echo two", on_output=pieces.append)
    assert b"".join(pieces) == b"one\ntwo\n"
    assert len(pieces) == 2


def test_a_program_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    finished = run([str(tmp_path / "missing")], limits=LIMITS)
    assert finished.returncode != 0
    assert "No such file" in finished.last_words


def test_last_words_are_few_and_printable() -> None:
    words = Finished(1, b"", b"first\n" * 20 + b"\x1b[31mred\xff\n\n  last\n" + b"y" * 2000).last_words
    assert "\x1b" not in words
    assert len(words) == 1000
    assert Finished(1, b"", b"a\n\x1b[31mred\xff\n").last_words == "a; \\x1b[31mred\\xff"


@linux
def test_it_does_not_outlive_us(tmp_path: Path) -> None:
    code = (
        "from imagekit.tool_process import run, ToolLimits;"
        "run(['/bin/sh', '-c', 'echo $$; exec sleep 60'], limits=ToolLimits(), on_output=lambda pid:"
        f"open({str(tmp_path / 'pid')!r}, 'wb').write(pid))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_bytes():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.wait()
    child = int((tmp_path / "pid").read_bytes())
    while _runs(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_parent_that_is_gone_already_is_noticed() -> None:
    code = (
        "import json, sys; from imagekit.confinement import rights;"
        "settings = json.dumps(dict(limits={}, environment={}, parent=1 << 30, sandbox=False));"
        "sys.exit(rights.main([settings, '/bin/echo', 'ran']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert (done.returncode, done.stdout) == ((126, b"") if sys.platform == "linux" else (0, b"ran\n"))
