"""What every command shares: where output goes, how progress is drawn, how errors and warnings look.

stdout carries the result only; progress and messages go to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from imagekit.cli.sizes import short_size
from imagekit.errors import ImagekitError, UsageError
from imagekit.progress import Callback, Progress
from imagekit.records import dataclass, field

PLAIN_SECONDS = 3.0
"""Between two plain lines of progress."""
JSON_SECONDS = 0.5


def clean(text: str) -> str:
    """The text with control characters and direction marks escaped: names come from images."""
    return "".join(one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode() for one in text)


def line(text: object) -> str:
    """The text as one line, whatever it holds: else a name from an image could add lines of its own."""
    return clean(str(text)).replace("\n", "\\n")


def lines(parts: Iterable[object]) -> str:
    """The parts, each on one line."""
    return "\n".join(map(line, parts))


@dataclass(slots=True)
class Ui:
    """How this run of a command talks."""

    output: str = "human"
    progress: str = "auto"
    quiet: bool = False
    verbose: bool = False
    drawn: Drawing | None = field(default=None, repr=False)

    @property
    def json(self) -> bool:
        return self.output == "json"

    def result(self, document: object, human: Callable[[], str] | str) -> None:
        """Print the result: the document in JSON mode, else the text."""
        self.done()
        if self.json:
            print(json.dumps(document, indent=2))
        else:
            print(clean(human if isinstance(human, str) else human()))

    def report(self, document: object, human: Callable[[], str]) -> None:
        """Print what was done, which nobody asked to know who asked for quiet: the exit code says enough."""
        if self.json or not self.quiet:
            self.result(document, human)
        else:
            self.done()

    def say(self, text: str) -> None:
        """A message for people, one line on stderr."""
        if not self.quiet:
            self.done()
            print(line(text), file=sys.stderr)

    def warn(self, text: str) -> None:
        self.say(f"warning: {text}")

    def callback(self) -> Callback | None:
        """What the library calls with progress; None when nobody wants to see it."""
        mode = self.progress
        if mode == "auto":
            mode = "bar" if sys.stderr.isatty() else "plain"
        if mode == "none" or (self.quiet and mode != "json"):
            return None
        self.drawn = {"bar": BarDrawing, "plain": PlainDrawing, "json": JsonDrawing}[mode]()
        return self.drawn.show

    def done(self) -> None:
        """End what is being drawn, so that text starts on a line of its own."""
        if self.drawn is not None:
            self.drawn.end()


class Drawing:
    """Shows progress; this one does not."""

    def show(self, progress: Progress) -> None:
        pass

    def end(self) -> None:
        pass


class PlainDrawing(Drawing):
    """A line every few seconds, and none for what is over before."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = clock()

    def show(self, progress: Progress) -> None:
        now = self._clock()
        if now - self._last >= PLAIN_SECONDS:
            self._last = now
            print(describe(progress), file=sys.stderr)


class JsonDrawing(Drawing):
    """JSON Lines: one object for each new phase, and some in between."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = 0.0
        self._phase = ""

    def show(self, progress: Progress) -> None:
        now = self._clock()
        if progress.phase == self._phase and now - self._last < JSON_SECONDS and progress.done < progress.total:
            return
        self._phase, self._last = progress.phase, now
        record = {"message_type": "progress", "phase": progress.phase}
        print(json.dumps({**record, "done": progress.done, "total": progress.total}), file=sys.stderr)


class BarDrawing(Drawing):
    """A bar on a terminal, drawn by rich."""

    def __init__(self) -> None:
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}

    def show(self, progress: Progress) -> None:
        if self._bars is None:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
            from rich.progress import Progress as Bars

            columns = (
                TextColumn("{task.description:<8}"),
                BarColumn(),
                DownloadColumn(binary_units=True),
                TransferSpeedColumn(),
                TimeRemainingColumn(compact=True),
            )
            self._bars = Bars(*columns, console=Console(stderr=True), transient=True)
            self._bars.start()
        if progress.phase not in self._tasks:
            self._tasks[progress.phase] = self._bars.add_task(progress.phase, total=progress.total or None)
        self._bars.update(self._tasks[progress.phase], completed=progress.done)

    def end(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
            self._tasks = {}


def describe(progress: Progress) -> str:
    """``copy: 1.2 GiB of 2.1 GiB (57 %)``."""
    if not progress.total:
        return progress.phase
    percent = 100 * progress.done // progress.total
    return f"{progress.phase}: {short_size(progress.done)} of {short_size(progress.total)} ({percent} %)"


def table(rows: Mapping[str, object]) -> str:
    """Names and values in two columns; rows without a value are left out."""
    shown = {line(name): line(value) for name, value in rows.items() if value not in (None, "", ())}
    width = max((len(name) for name in shown), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in shown.items())


def show_error(error: ImagekitError, *, as_json: bool) -> None:
    """The last words of a failed command, on stderr."""
    if as_json:
        document = {
            "message_type": "exit_error",
            "code": error.exit_code,
            "kind": type(error).__name__,
            "message": str(error),
            "hint": error.hint,
        }
        print(json.dumps(document), file=sys.stderr)
        return
    print(f"imagekit: {line(error)}", file=sys.stderr)
    if error.hint:
        print(f"hint: {line(error.hint)}", file=sys.stderr)


def refuse_from_environment(name: str, value: str, forbidden: str) -> None:
    """Some choices are made on the command line, by whoever runs this very command, or not at all."""
    if value == forbidden and os.environ.get(name) == forbidden:
        raise UsageError(f"{name}={forbidden} is not taken from the environment", hint="give it as an option")
