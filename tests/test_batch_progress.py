"""What a batch shows while it runs: on a terminal of our own, off it, and to a program."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from imagekit.batch.manifest import Item
from imagekit.batch.runner import Event
from imagekit.cli.batch_progress import Board, Shown, part, span
from imagekit.cli.ui import Ui
from imagekit.formats.base import MiB
from imagekit.progress import Progress
from tests.disks import noise
from tests.test_ui import Clock

ONE, TWO = Item(1, "a.raw", "a.vhdx"), Item(2, "b.raw", "b.vhdx")


def events() -> list[tuple[float, Event]]:
    """A run of two images, with the second that each happens at."""
    return [
        (0.0, Event("measured", ONE, size=300 * MiB)),
        (0.5, Event("measured", TWO, size=100 * MiB)),
        (1.0, Event("started", ONE, size=300 * MiB)),
        (1.0, Event("started", TWO, size=100 * MiB)),
        (7.0, Event("progress", ONE, Progress("copy", 150 * MiB, 300 * MiB))),
        (
            9.0,
            Event("failed", TWO, result={"ok": False, "error": {"code": 11, "message": "b.raw: it is\x1b[2J cut"}}),
        ),
        (13.0, Event("progress", ONE, Progress("verify", 300 * MiB, 300 * MiB))),
        (14.0, Event("done", ONE, result={"ok": True})),
    ]


def shown(mode: str) -> Shown:
    clock = Clock()
    made = Shown(Ui(progress=mode), 2, clock)
    for now, event in events():
        clock.now = now
        made(event)
    return made


def test_rates_and_the_time_left_go_by_data() -> None:
    clock = Clock()
    board = Board(2, clock)
    assert board.line() == "measuring: 0 of 2 images, 0 failed"
    for now, event in events()[:5]:
        clock.now = now
        board.count(event)
    # A quarter of 300 MiB in 6 s: the copy is half of an item, and half of it is done; 400 MiB in all.
    assert board.line() == "0 of 2 images, 0 failed, 0.00 images/s, 12.5 MiB/s, 26 s left"
    clock.now = 9.0
    board.count(events()[5][1])
    assert board.line() == "1 of 2 images, 1 failed, 0.12 images/s, 21.9 MiB/s, 10 s left"


def test_an_item_is_over_when_its_target_is_hashed() -> None:
    steps = [Progress("plan", 1, 1), Progress("copy", 1, 2), Progress("verify", 0, 2), Progress("hash", 2, 2)]
    assert [part(step) for step in steps] == [0.0, 0.25, 0.5, 1.0]


def test_times_are_short() -> None:
    assert [span(one) for one in (0.4, 59, 61, 3600, 7320)] == ["0 s", "59 s", "1:01 min", "1:00 h", "2:02 h"]


def test_plain_lines_are_few_and_failures_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    shown("plain").end()
    assert capsys.readouterr().err.splitlines() == [
        "0 of 2 images, 0 failed, 0.00 images/s, 12.5 MiB/s, 26 s left",
        r"failed: b.raw: it is\x1b[2J cut",
        "1 of 2 images, 1 failed, 0.08 images/s, 29.6 MiB/s, 2 s left",
    ]


def test_programs_get_every_item_and_a_status_a_second(capsys: pytest.CaptureFixture[str]) -> None:
    shown("json").end()
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    items = [(line["state"], line["target"]) for line in lines if line["message_type"] == "item"]
    assert items == [
        *(("measured", "a.vhdx"), ("measured", "b.vhdx"), ("started", "a.vhdx"), ("started", "b.vhdx")),
        *(("failed", "b.vhdx"), ("done", "a.vhdx")),
    ]
    (failed,) = [line for line in lines if line.get("state") == "failed"]
    assert failed["error"]["code"] == 11
    statuses = [line for line in lines if line["message_type"] == "status"]
    assert statuses[-1]["ended"] == 2 and statuses[-1]["failed"] == 1
    assert statuses[-1]["bytes_done"] == statuses[-1]["bytes_total"] == 400 * MiB
    assert {"a.vhdx": {"phase": "copy", "done": 150 * MiB, "total": 300 * MiB}} in [one["items"] for one in statuses]


def test_nothing_is_shown_to_who_wants_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    shown("none").end()
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(sys.platform == "win32", reason="a pseudo-terminal is POSIX's")
def test_on_a_terminal_there_are_bars(tmp_path: Path) -> None:
    """The real command on a pseudo-terminal: a bar for all, one an image, gone at the end."""
    if sys.platform == "win32":
        raise RuntimeError("not there on Windows")
    import pty

    images = tmp_path / "images"
    images.mkdir()
    (images / "large.raw").write_bytes(noise(MiB) * 200)
    (images / "bad.qcow2").write_bytes(b"QFI\xfb" + bytes(100))
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "30"}
    process = subprocess.Popen(
        [sys.executable, "-m", "imagekit", "batch", "images", "--out", "out", "-O", "vhdx", "--jobs", "1"],
        cwd=tmp_path,
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=environment,
    )
    os.close(theirs)
    drawn = b""
    try:
        while piece := os.read(ours, 1 << 16):
            drawn += piece
    except OSError:  # Linux's way to say that the other end is closed
        pass
    os.close(ours)
    said, _ = process.communicate()
    assert process.returncode == 3
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.decode())
    assert re.search(r"all +[━╸╺]+ +\d+ % measuring: \d of 2 images, \d failed", text)
    assert re.search(r"all +[━╸╺]+ +\d+ % 1 of 2 images, 1 failed", text)
    assert re.search(r"large\.vhdx +[━╸╺]+ +\d+ % (copy|verify|hash|sync) +[\d.]+ [KMG]?i?B of [\d.]+ MiB", text)
    assert re.search(r"failed: images/bad\.qcow2: ", text)
    assert b"1 done, 1 failed" in said
    assert b"\x1b[?25h" in drawn, "the cursor is back"
