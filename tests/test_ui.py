"""How progress and text look, on a clock of our own."""

from __future__ import annotations

import json

import pytest

from imagekit.cli.ui import BarDrawing, JsonDrawing, PlainDrawing, Ui, clean, describe, table
from imagekit.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_progress_is_a_line_every_few_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    drawing = PlainDrawing(clock=clock)
    for second in range(8):
        clock.now = float(second)
        drawing.show(Progress("copy", second * 1024, 8 * 1024))
    assert capsys.readouterr().err.splitlines() == ["copy: 3 KiB of 8 KiB (37 %)", "copy: 6 KiB of 8 KiB (75 %)"]


def test_what_is_over_at_once_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    PlainDrawing(clock=Clock()).show(Progress("copy", 1, 1))
    assert capsys.readouterr().err == ""


def test_json_progress_tells_each_phase_and_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    drawing = JsonDrawing(clock=Clock())
    for phase, done in (("plan", 0), ("plan", 5), ("plan", 10), ("copy", 0), ("copy", 10)):
        drawing.show(Progress(phase, done, 10))
    records = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(record["phase"], record["done"]) for record in records] == [
        ("plan", 0),
        ("plan", 10),
        ("copy", 0),
        ("copy", 10),
    ]


def test_a_bar_is_drawn_on_a_terminal_and_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich's way to call anything a terminal
    drawing = BarDrawing()
    drawing.show(Progress("copy", 1 << 20, 4 << 20))
    drawing.end()
    drawing.end()
    shown = capsys.readouterr().err
    assert "copy" in shown
    assert "1.0/4.2 MB" in shown or "1.0/4.0 MiB" in shown


def test_nobody_listening_costs_nothing() -> None:
    assert Ui(progress="none").callback() is None
    assert Ui(quiet=True).callback() is None
    assert Ui(quiet=True, progress="json").callback() is not None


def test_text_from_images_is_escaped() -> None:
    assert clean("a\x1b[0m\u202e\nb\x00") == "a\\x1b[0m\\u202e\nb\\x00"
    assert clean("Größe ✓") == "Größe ✓"


def test_rows_without_a_value_are_left_out() -> None:
    assert table({"name": "x", "nothing": None, "longer name": 0}) == "name         x\nlonger name  0"


def test_progress_without_a_total_is_only_named() -> None:
    assert describe(Progress("sync", 0, 0)) == "sync"
