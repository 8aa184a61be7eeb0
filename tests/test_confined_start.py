"""Confined processes forked from one that has loaded all: like fresh ones, and gone with who started them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import imagekit
from imagekit import cli
from imagekit.confinement import jobs as confined
from imagekit.confinement import start as confined_start
from imagekit.digests import file_digest
from imagekit.errors import Cancelled, ToolError, UnsafeImage
from imagekit.plan import ConvertOptions
from tests.disks import IDENTIFIER, noise
from tests.oracles import need_tool

MiB = 1 << 20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Landlock and seccomp are Linux's")


@pytest.fixture
def nursery() -> Iterator[confined_start._Nursery]:
    confined_start.prepare()
    (made,) = confined_start._nurseries
    yield made
    while confined_start._nurseries:
        confined_start._nurseries.pop().close()


def started_by(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]


def test_it_makes_the_same_file_as_a_fresh_one(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(noise(MiB))
    for name in ("fresh", "forked", "again"):
        if name == "forked":
            confined_start.prepare()
        report = imagekit.convert(
            tmp_path / "disk.raw", tmp_path / f"{name}.vhdx", identifier=IDENTIFIER, confined=True, verify="content"
        )
        assert [one.split()[0] for one in report.confinement] == ["limits", "landlock", "seccomp"]
    confined_start._nurseries.pop().close()
    digests = {file_digest(tmp_path / f"{name}.vhdx") for name in ("fresh", "forked", "again")}
    assert len(digests) == 1


def test_it_is_a_child_of_the_nursery_with_no_way_to_it(nursery: confined_start._Nursery) -> None:
    with confined_start.started(confined._settings(ConvertOptions(), 1)) as (process, channel):
        assert channel.hear(60.0)
        assert started_by(process.pid) == str(nursery._process.pid)
        sockets = [str(one.readlink()) for one in Path(f"/proc/{process.pid}/fd").iterdir()]
        assert sum(one.startswith("socket:") for one in sockets) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_a_crash_is_a_refusal_and_the_next_one_works(tmp_path: Path, nursery: confined_start._Nursery) -> None:
    (tmp_path / "disk.raw").write_bytes(noise(MiB))
    with confined_start.started(confined._settings(ConvertOptions(), 1)) as (process, channel):
        assert channel.hear(60.0)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.05)
        process.kill()
        assert process.wait(5.0) == -9
        assert isinstance(confined._ended(process), UnsafeImage)
    imagekit.convert(tmp_path / "disk.raw", tmp_path / "disk.vhdx", confined=True)


def test_without_its_nursery_the_next_one_is_fresh(tmp_path: Path, nursery: confined_start._Nursery) -> None:
    (tmp_path / "disk.raw").write_bytes(noise(MiB))
    nursery._process.kill()
    nursery._process.wait()
    assert imagekit.convert(tmp_path / "disk.raw", tmp_path / "disk.vhdx", confined=True).confinement
    assert confined_start._nurseries == []


def test_a_nursery_that_hangs_while_it_loads_is_left_for_a_fresh_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk.raw").write_bytes(noise(MiB))
    monkeypatch.setattr(confined_start, "BOOT", "import time; time.sleep(60)")
    confined_start.prepare()
    (nursery,) = confined_start._nurseries
    monkeypatch.undo()
    monkeypatch.setattr(confined_start, "SECONDS", 0.2)
    assert imagekit.convert(tmp_path / "disk.raw", tmp_path / "disk.vhdx", confined=True).confinement
    assert confined_start._nurseries == []
    assert nursery._process.returncode == -9


def test_cancel_ends_it_soon(tmp_path: Path, no_leftovers: Path, nursery: confined_start._Nursery) -> None:
    (tmp_path / "disk.raw").write_bytes(noise(MiB))
    cancel = threading.Event()
    cancel.set()
    began = time.monotonic()
    with pytest.raises(Cancelled):
        imagekit.convert(tmp_path / "disk.raw", no_leftovers / "disk.vhdx", confined=True, cancel=cancel)
    assert time.monotonic() - began < 5


def test_all_of_it_ends_with_who_started_it() -> None:
    program = (
        "import time\n"
        "from imagekit.confinement import jobs as confined, start as confined_start\n"
        "from imagekit.plan import ConvertOptions\n"
        "confined_start.prepare()\n"
        "with confined_start.started(confined._settings(ConvertOptions(), 1)) as (process, channel):\n"
        "    assert channel.hear(60)\n"
        "    print(process.pid, confined_start._nurseries[0]._process.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    starter = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    pids = starter.stdout.readline().split()
    starter.kill()
    starter.wait()
    starter.stdout.close()
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while (left := [pid for pid in pids if is_at_work(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left == []


def is_at_work(pid: str) -> bool:
    """Neither gone nor waiting for somebody to collect it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("line", "asked", "expected"),
    [
        ("info a.vhd --confined", "", True),
        ("convert a.vhd b.vhd", "1", True),
        ("info https://images.example/a.qcow2", "", True),
        ("prepare glance:debian --out web1", "", True),
        ("info https://images.example/a.qcow2 --no-confined", "", False),
        ("info a.vhd", "", False),
        ("info a.vhd", "0", False),
        ("map a.vhd --confined", "1", False),
        ("", "1", False),
    ],
)
def test_the_command_line_starts_it_early_where_it_will_be_needed(
    line: str, asked: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGEKIT_CONFINED", asked)
    assert cli._will_confine(line.split()) is expected


@pytest.mark.oracle
def test_what_the_command_line_started_early_ends_with_it(tmp_path: Path) -> None:
    """Three processes: its own, the one that loaded everything, and the confined one."""
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MiB))
    command = [sys.executable, "-m", "imagekit", "info", str(path), "--confined", "--output", "json"]
    trace = tmp_path / "trace"
    done = subprocess.run(
        [need_tool("strace"), "-f", "-e", "trace=fork,vfork,clone,clone3", "-o", str(trace), *command],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "seccomp" in json.loads(done.stdout)["confinement"]
    ended = [one.split()[0] for one in trace.read_text().splitlines() if "+++" in one]
    assert len(set(ended)) >= 3
    assert all(not Path("/proc", number).exists() for number in ended)


def test_an_early_start_that_fails_is_said_like_every_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MiB))
    monkeypatch.setattr(sys, "argv", ["imagekit", "info", str(path), "--confined"])
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == ToolError.exit_code
    assert "the confined process cannot be started" in capsys.readouterr().err
