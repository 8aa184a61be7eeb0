"""What a batch shows of itself while it runs, on stderr: bars on a terminal, else lines; JSON Lines for programs.

Events come from several threads, and SIGUSR1 in the middle of anything: one lock, which may be taken again.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from imagekit.cli.sizes import short_size
from imagekit.cli.ui import Ui, line
from imagekit.progress import Progress

if TYPE_CHECKING:
    from imagekit.batch.runner import Event

LINE_SECONDS = 5.0
JSON_SECONDS = 1.0
UNKNOWN = 1 << 62
SHARES = {"copy": (0.0, 0.5), "verify": (0.5, 0.35), "sync": (0.85, 0.0), "hash": (0.85, 0.15)}
"""Phase of an item → how much of it is over when it begins, and how much the phase is."""
LONGEST_NAME = 28


@dataclass
class Board:
    """How far a run is: counted, not drawn."""

    total: int
    clock: Callable[[], float] = time.monotonic
    measured: int = 0
    ended: int = 0
    failed: int = 0
    before: int = 0
    """How many had ended when the first one was begun: done before, or not to be read."""

    measuring: bool = True
    running: dict[str, Progress | None] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    all_bytes: int = 0
    done_bytes: int = 0

    def __post_init__(self) -> None:
        self.began = self.clock()

    def count(self, event: Event) -> None:
        target = event.item.target
        if event.kind == "measured":
            self.measured += 1
            self.all_bytes += event.size
        elif event.kind == "progress":
            self.running[target] = event.progress
        elif event.kind == "started":
            if self.measuring:
                self.measuring, self.began, self.before = False, self.clock(), self.ended
            if 0 < event.size < UNKNOWN:
                self.sizes[target] = event.size
        else:
            self.running.pop(target, None)
            self.done_bytes += self.sizes.pop(target, 0)
            self.ended += 1
            self.failed += event.kind == "failed" or not event.result.get("ok", True)

    @property
    def bytes_so_far(self) -> float:
        """Of the images' data, those at work by how far they are."""
        return self.done_bytes + sum(
            self.sizes.get(target, 0) * part(step) for target, step in dict(self.running).items()
        )

    @property
    def seconds(self) -> float:
        return max(0.001, self.clock() - self.began)

    @property
    def rate(self) -> float:
        """Bytes of data a second."""
        return self.bytes_so_far / self.seconds

    @property
    def left(self) -> float | None:
        """Seconds still to go: by data where sizes are known, else by images; None when nobody can tell."""
        if self.measuring:
            return None
        if self.all_bytes:
            share = min(1.0, self.bytes_so_far / self.all_bytes)
        else:
            begun = self.total - self.before
            share = (self.ended - self.before) / begun if begun else 1.0
        return self.seconds * (1 - share) / share if share > 0 else None

    def line(self) -> str:
        """How far, how fast, how long still."""
        if self.measuring:
            return f"measuring: {self.measured} of {self.total} images, {self.failed} failed"
        words = [f"{self.ended} of {self.total} images", f"{self.failed} failed"]
        if self.seconds >= 1:
            words.append(f"{(self.ended - self.before) / self.seconds:.2f} images/s")
            words += [f"{short_size(self.rate)}/s"] if self.bytes_so_far else []
            words += [] if self.left is None else [f"{span(self.left)} left"]
        return ", ".join(words)


def part(step: Progress | None) -> float:
    """How much of an item is done, from 0 to 1."""
    if step is None:
        return 0.0
    before, share = SHARES.get(step.phase, (0.0, 0.0))
    return before + (share * step.done / step.total if step.total else 0.0)


def span(seconds: float) -> str:
    """``42 s``, ``3:05 min``, ``1:12 h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60}:{whole % 60:02} min" if whole < 3600 else f"{whole // 3600}:{whole % 3600 // 60:02} h"


class Shown:
    """The listener of a run."""

    def __init__(self, ui: Ui, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.board = Board(total, clock)
        self._lock = threading.RLock()
        mode = ui.progress
        if mode == "auto":
            mode = "bar" if sys.stderr.isatty() else "plain"
        if mode != "json" and (mode == "none" or ui.quiet):
            self._drawing: Lines | None = None
        else:
            self._drawing = {"bar": Bars, "plain": Lines, "json": JsonLines}[mode](self.board)

    def __call__(self, event: Event) -> None:
        with self._lock:
            self.board.count(event)
            if self._drawing is not None:
                self._drawing.show(event)

    def end(self) -> None:
        with self._lock:
            if self._drawing is not None:
                self._drawing.end()

    def say_status(self) -> None:
        """The line, and what is being worked on (on SIGUSR1)."""
        with self._lock:
            running = [f"  {line(name)}: {_stage(step)}" for name, step in self.board.running.items()]
            print(self.board.line(), *running, sep="\n", file=sys.stderr, flush=True)


def _stage(step: Progress | None) -> str:
    if step is None:
        return "begins"
    return f"{step.phase} {step.done * 100 // step.total} %" if step.total else step.phase


class Lines:
    """A line every few seconds, and one for each failure."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self._last = board.clock()

    def show(self, event: Event) -> None:
        if event.kind == "failed":
            print(failure(event), file=sys.stderr, flush=True)
        elif self._due(LINE_SECONDS):
            print(self.board.line(), file=sys.stderr, flush=True)

    def _due(self, seconds: float) -> bool:
        now = self.board.clock()
        if now - self._last < seconds:
            return False
        self._last = now
        return True

    def end(self) -> None:
        pass


def failure(event: Event) -> str:
    error = event.result.get("error", {})
    source = event.item.source
    return line(f"failed: {source}: {str(error.get('message', '')).removeprefix(f'{source}: ')}")


class JsonLines(Lines):
    """An object for each item that changes its state, and one a second for how far all of it is."""

    def show(self, event: Event) -> None:
        if event.kind != "progress":
            line: dict[str, Any] = {"message_type": "item", "state": event.kind, "target": event.item.target}
            if event.kind == "failed":
                line["error"] = event.result.get("error")
            self._print(line | {"source": event.item.source, "ended": self.board.ended, "total": self.board.total})
        if self._due(JSON_SECONDS):
            self._print(self._status())

    def _status(self) -> dict[str, Any]:
        board = self.board
        items = {
            name: {"phase": step.phase, "done": step.done, "total": step.total}
            for name, step in board.running.items()
            if step is not None
        }
        return {
            "message_type": "status",
            "stage": "measure" if board.measuring else "convert",
            "ended": board.ended,
            "failed": board.failed,
            "total": board.total,
            "bytes_done": round(board.bytes_so_far),
            "bytes_total": board.all_bytes,
            "seconds": round(board.seconds, 1),
            "seconds_left": None if board.left is None else round(board.left, 1),
            "items": items,
        }

    @staticmethod
    def _print(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=sys.stderr, flush=True)

    def end(self) -> None:
        self._print(self._status())


class Bars(Lines):
    """A bar for all of it and one for each item at work, drawn by rich."""

    def __init__(self, board: Board) -> None:
        super().__init__(board)
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[words]}", markup=False),
        )
        self._bars = RichProgress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=5)
        self._whole = self._bars.add_task(f"{'all':<{LONGEST_NAME}}", total=1.0, words="")
        self._items: dict[str, Any] = {}
        self._began: dict[str, tuple[str, float]] = {}
        self._show_all()
        self._bars.start()

    def show(self, event: Event) -> None:
        target = event.item.target
        if event.kind == "failed":
            print(failure(event), file=sys.stderr)  # rich prints it above the bars
        if event.kind == "progress" and event.progress is not None:
            self._show_item(target, event.progress)
        elif event.kind in ("done", "failed") and target in self._items:
            self._bars.remove_task(self._items.pop(target))
        self._show_all()

    def _show_item(self, target: str, step: Progress) -> None:
        if target not in self._items:
            name = line(target)
            name = name if len(name) <= LONGEST_NAME else "…" + name[1 - LONGEST_NAME :]
            self._items[target] = self._bars.add_task(f"{name:<{LONGEST_NAME}}", total=1.0, words="")
        now = self.board.clock()
        phase, began = self._began.get(target, ("", now))
        if phase != step.phase:
            self._began[target] = (step.phase, now)
            began = now
        words = f"{step.phase:<6} {short_size(step.done)} of {short_size(step.total)}" if step.total else step.phase
        if step.done and now > began:
            rate = step.done / (now - began)
            words += f", {short_size(rate)}/s, {span((step.total - step.done) / rate)}"
        self._bars.update(self._items[target], completed=part(step), words=words)

    def _show_all(self) -> None:
        board = self.board
        if board.measuring:
            share = board.measured / max(1, board.total)
        elif board.all_bytes:
            share = board.bytes_so_far / board.all_bytes
        else:
            share = board.ended / max(1, board.total)
        self._bars.update(self._whole, completed=min(1.0, share), words=board.line())

    def end(self) -> None:
        self._bars.stop()
