"""A batch, run: items through an executor, a window at a time, and every step in the journal.

The executor is any of :mod:`concurrent.futures`' kind: crew.py has the one of this computer, cluster.py that of a
Dask scheduler. First every item is measured, which also refuses what cannot be read, and the sum is held against the
free space; then they are done, the largest first, so that none is left alone at the end. Only a window of items is
handed out at a time, so a million items cost no more than their names.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imagekit.batch.crew import Workforce
from imagekit.batch.journal import DONE, FAILED, Journal, Known
from imagekit.batch.manifest import Item
from imagekit.batch.tasks import is_elsewhere, task_of
from imagekit.digests import file_digest
from imagekit.errors import Cancelled, TargetError, ToolError, UsageError
from imagekit.progress import Control, Progress
from imagekit.publish import check_space
from imagekit.workers import usable_cores

LOOK = 0.2
UNKNOWN = 1 << 62
"""The size of what is elsewhere: it may be large, so it comes first."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to an item: ``measured``, ``started``, ``progress``, ``done``, ``failed``, ``skipped``.

    ``size`` is how many bytes of data it has, as far as that is known.
    """

    kind: str
    item: Item
    progress: Progress | None = None
    result: Mapping[str, Any] = field(default_factory=dict)
    size: int = 0


Listener = Callable[[Event], None]


@dataclass(slots=True)
class Summary:
    """How a run ended; ``seconds`` is the wall time."""

    done: int = 0
    failed: int = 0
    skipped: int = 0
    cancelled: bool = False
    seconds: float = 0.0


def run(
    journal: Journal,
    folder: Path,
    force: Workforce,
    *,
    resume: bool = False,
    retry_failed: bool = False,
    listen: Listener | None = None,
    cancel: threading.Event | None = None,
) -> Summary:
    """Do what the journal says is to be done.

    A row that says done is trusted when its target still has the digest noted then (``resume``); without ``resume``
    a folder that has done or started items is refused. ``retry_failed`` does failed ones again. TargetError when
    the targets do not fit; nothing is written then.
    """
    started = time.monotonic()
    if not resume and not retry_failed and journal.begun():
        raise UsageError("the folder has a batch that was started", hint="--resume goes on with it", path=folder)
    this = _Run(journal, folder, force, listen or (lambda event: None), cancel or threading.Event())
    try:
        todo = this.todo(retry_failed)
        sizes = this.measure(todo)
        todo = sorted(
            (item for item in todo if item.target in sizes), key=lambda item: (-sizes[item.target][1], item.number)
        )
        _check_space(folder, todo, sizes)
        this.convert(todo, sizes)
    except Cancelled:
        pass
    this.summary.cancelled = this.stop.is_set()
    this.summary.seconds = time.monotonic() - started
    return this.summary


Sizes = dict[str, tuple[int, int]]
"""Target → bytes it takes on its medium, bytes of data there are to convert."""


def _check_space(folder: Path, todo: Sequence[Item], sizes: Sizes) -> None:
    needed = sum(sizes[item.target][0] for item in todo)
    try:
        check_space(folder, needed)
    except TargetError as error:
        raise TargetError(
            f"{error.message}, for {len(todo)} targets together",
            path=folder,
            hint="make room, or make it several runs",
        ) from None


@dataclass
class _Run:
    journal: Journal
    folder: Path
    force: Workforce
    listen: Listener
    stop: threading.Event
    summary: Summary = field(default_factory=Summary)

    def todo(self, retry: bool) -> list[Item]:
        """What is not proven done."""
        todo, claimed = [], []
        for known in self.journal.known():
            if known.state == FAILED and not retry:
                self.summary.failed += 1
                self.listen(Event("skipped", known.item, result={"ok": False}))
            elif known.state == DONE:
                claimed.append(known)
            else:
                todo.append(known.item)
        with ThreadPoolExecutor(usable_cores()) as pool:
            for known, proven in zip(claimed, pool.map(self._is_proven, claimed), strict=True):
                if proven:
                    self.summary.skipped += 1
                    self.listen(Event("skipped", known.item, result={"ok": True}))
                else:
                    todo.append(known.item)
        self.journal.forget(item.target for item in todo)
        return todo

    def _is_proven(self, known: Known) -> bool:
        try:
            return file_digest(self.folder / known.item.target, control=Control(cancel=self.stop)) == known.digest
        except OSError:
            return False

    def measure(self, todo: Sequence[Item]) -> Sizes:
        """What each item takes; one that cannot be read has failed with that."""
        sizes = self.journal.sizes()
        there = {item.target for item in todo}
        sizes = {target: size for target, size in sizes.items() if target in there}
        unknown = [item for item in todo if item.target not in sizes]
        sizes |= {item.target: (0, UNKNOWN) for item in unknown if _is_measured_later(item)}
        found: Sizes = {}
        for item, result in self._each((item for item in unknown if item.target not in sizes), measure=True):
            if result.get("ok"):
                found[item.target] = int(result.get("needed", 0)), int(result.get("size", 0))
                self.listen(Event("measured", item, size=found[item.target][1]))
            else:
                self.journal.start(item.target)
                self._note(item, result)
        self.journal.measured(found)
        return sizes | found

    def convert(self, todo: Sequence[Item], sizes: Sizes) -> None:
        sized = {target: size for target, (_, size) in sizes.items()}
        for item, result in self._each(iter(todo), left=len(todo), sizes=sized):
            self._note(item, result)

    def _each(
        self, items: Iterator[Item], *, measure: bool = False, left: int = 1, sizes: Mapping[str, int] | None = None
    ) -> Iterator[tuple[Item, dict[str, Any]]]:
        """Items and results as they come; none that was cancelled. Raises Cancelled when all at work have ended."""
        force = self.force
        running: dict[Future[dict[str, Any]], Item] = {}
        asked = False
        try:
            while True:
                while len(running) < force.width + force.ahead and not self.stop.is_set():
                    item = next(items, None)
                    if item is None:
                        break
                    task = task_of(item.source, item.target, item.options, self.folder)
                    if measure:
                        task["measure"] = True
                    else:
                        self.journal.start(item.target)
                        self.listen(Event("started", item, size=(sizes or {}).get(item.target, 0)))
                        task["options"].setdefault("jobs", _threads(force.width, left))
                        left -= 1
                    running[_handed_out(force, task, item)] = item
                if not running:
                    break
                ended, _ = wait(running, timeout=LOOK, return_when=FIRST_COMPLETED)
                for future in ended:
                    item, result = running.pop(future), _result(future)
                    if not result.get("cancelled"):  # else it is still running, says the journal: it is done again
                        yield item, result
                if self.stop.is_set() and not asked:
                    asked = True
                    running = {future: item for future, item in running.items() if not future.cancel()}
                    force.stop()
        finally:
            for future in running:
                future.cancel()
        if self.stop.is_set():
            raise Cancelled("stopped on request")

    def _note(self, item: Item, result: dict[str, Any]) -> None:
        state = DONE if result.get("ok") else FAILED
        self.journal.finish(item.target, state, result)
        if state == DONE:
            self.summary.done += 1
        else:
            self.summary.failed += 1
        self.listen(Event("done" if state == DONE else "failed", item, result=result))


def _threads(width: int, left: int) -> int:
    """An item's share of the cores: the last ones have more."""
    return max(1, usable_cores() // max(1, min(width, left)))


def _is_measured_later(item: Item) -> bool:
    """What would have to be fetched twice, and what only qemu-img can read or write."""
    options = item.options
    return is_elsewhere(item.source) or "external-qemu-img" in options.get("allow", ())


def _handed_out(force: Workforce, task: Mapping[str, Any], item: Item) -> Future[dict[str, Any]]:
    try:
        return force.pool.submit(force.perform, task, item)
    except Exception as error:  # a scheduler that is gone says so in many ways
        raise ToolError(f"nobody takes work any more: {error}", hint="--resume goes on") from error


def _result(future: Future[dict[str, Any]]) -> dict[str, Any]:
    try:
        return future.result()
    except CancelledError:  # not by us: those are taken out before
        raise ToolError("the scheduler is gone, and what it had with it", hint="--resume goes on") from None
    except Exception as error:  # the executor lost it: a worker died too often, a result that cannot travel
        kind = type(error).__name__
        return {"ok": False, "error": {"code": 16, "kind": kind, "message": str(error) or kind, "hint": None}}
