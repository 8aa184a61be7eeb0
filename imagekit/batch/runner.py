"""A batch, run: items through an executor, a window at a time, and every step in the journal.

The executor is any of :mod:`concurrent.futures`' kind. Here it is threads that each wait for a child process of their
own (imagekit.child): an image can take down no more than its child. With a scheduler it is a Dask cluster's, and
:func:`imagekit.batch.tasks.perform` travels to its workers; what is sent is the task, a few hundred bytes.

The largest images go first, so that none is left alone at the end; only a window of items is handed out at a time, so
a million items cost no more than their names.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imagekit.batch.journal import DONE, FAILED, RUNNING, Journal, Row
from imagekit.batch.manifest import Item
from imagekit.batch.tasks import perform, task_of
from imagekit.bundle import file_digest
from imagekit.child import Child
from imagekit.errors import Cancelled, ImagekitError, ToolError, UsageError
from imagekit.formats.files import LocalFile
from imagekit.progress import Progress
from imagekit.workers import usable_cores

WINDOW = 3
"""Items handed out for each that can be worked on at once."""
LOOK = 0.2

Perform = Callable[..., dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to an item: ``started``, ``progress``, ``done``, ``failed`` or ``skipped``."""

    kind: str
    item: Item
    progress: Progress | None = None
    result: Mapping[str, Any] = field(default_factory=dict)


Listener = Callable[[Event], None]


@dataclass(slots=True)
class Summary:
    """How a run ended; ``seconds`` is the wall time."""

    done: int = 0
    failed: int = 0
    skipped: int = 0
    cancelled: bool = False
    seconds: float = 0.0


def default_jobs() -> int:
    """Items at once: one a core; each then converts on one thread."""
    return max(1, usable_cores())


@contextmanager
def local(jobs: int, cancel: threading.Event, listen: Listener | None) -> Iterator[tuple[Executor, Perform, int]]:
    """Threads of this process, a child process an item."""
    threads = max(1, usable_cores() // jobs)

    def in_child(task: Mapping[str, Any], item: Item) -> dict[str, Any]:
        tell = None if listen is None else (lambda step: listen(Event("progress", item, step)))
        options = {"jobs": threads, **task["options"]}
        try:
            return Child().run("perform", {"task": {**task, "options": options}}, progress=tell, cancel=cancel)
        except Cancelled:
            return {"ok": False, "cancelled": True, "error": {"code": 130, "kind": "Cancelled", "message": "stopped"}}
        except ImagekitError as error:  # the child died
            from imagekit.batch.tasks import described

            return {"ok": False, "error": described(error)}

    with ThreadPoolExecutor(jobs, thread_name_prefix="imagekit-item") as pool:
        yield pool, in_child, jobs


@contextmanager
def cluster(address: str) -> Iterator[tuple[Executor, Perform, int]]:
    """The workers of a Dask scheduler (extra ``batch``); they see the same folders under the same names."""
    try:
        from distributed import Client
    except ImportError:
        raise ToolError("--scheduler needs distributed", hint="pip install 'imagekit[batch]'") from None
    try:
        client = Client(address, timeout=20, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ToolError(f"the scheduler {address} does not answer: {error}", hint="dask scheduler") from None
    with client:
        workers = max(1, len(client.scheduler_info()["workers"]))
        yield client.get_executor(retries=2, pure=False), _remote, workers


def _remote(task: Mapping[str, Any], item: Item) -> dict[str, Any]:
    return perform(task)


def run(
    journal: Journal,
    folder: Path,
    executor: tuple[Executor, Perform, int],
    *,
    resume: bool = False,
    retry_failed: bool = False,
    listen: Listener | None = None,
    cancel: threading.Event | None = None,
) -> Summary:
    """Do what the journal says is to be done.

    A row that says done is trusted when its target still has the digest noted then (``resume``); without ``resume``
    a folder that has done or started items is refused. ``retry_failed`` does failed ones again.
    """
    started, summary = time.monotonic(), Summary()
    stop = cancel or threading.Event()
    rows = list(journal.rows())
    if not resume and not retry_failed and any(row.state in (DONE, FAILED, RUNNING) for row in rows):
        raise UsageError("the folder has a batch that was started", hint="--resume goes on with it", path=folder)
    todo = _todo(journal, rows, folder, retry_failed, summary, listen)
    _work(journal, folder, executor, todo, summary, listen, stop)
    summary.cancelled = stop.is_set()
    summary.seconds = time.monotonic() - started
    return summary


def _todo(
    journal: Journal, rows: Iterable[Row], folder: Path, retry: bool, summary: Summary, listen: Listener | None
) -> list[Item]:
    """What is not proven done, the largest first."""
    todo: list[Item] = []
    again: list[str] = []
    for row in rows:
        if row.state == FAILED and not retry:
            summary.failed += 1
            continue
        if row.state == DONE and _is_proven(row, folder):
            summary.skipped += 1
            if listen is not None:
                listen(Event("skipped", row.item, result=row.result))
            continue
        if row.state in (DONE, FAILED, RUNNING):
            again.append(row.item.target)
        todo.append(row.item)
    journal.forget(again)
    return sorted(todo, key=lambda item: (-_size(item.source), item.number))


def _is_proven(row: Row, folder: Path) -> bool:
    try:
        return file_digest(folder / row.item.target) == row.result.get("digest")
    except OSError:
        return False


def _size(source: str) -> int:
    """What it will cost, roughly: bytes on the medium, so that a sparse file is no giant."""
    try:
        with LocalFile.open_source(source) as file:
            return file.allocated_size
    except (ImagekitError, OSError):
        return 0


def _work(
    journal: Journal,
    folder: Path,
    executor: tuple[Executor, Perform, int],
    todo: Iterable[Item],
    summary: Summary,
    listen: Listener | None,
    stop: threading.Event,
) -> None:
    pool, do, width = executor
    waiting = iter(todo)
    running: dict[Future[dict[str, Any]], Item] = {}
    try:
        while True:
            while len(running) < width * WINDOW and not stop.is_set():
                item = next(waiting, None)
                if item is None:
                    break
                journal.start(item.target)
                if listen is not None:
                    listen(Event("started", item))
                task = task_of(item.source, item.target, item.options, folder)
                running[pool.submit(do, task, item)] = item
            if not running:
                return
            ended, _ = wait(running, timeout=LOOK, return_when=FIRST_COMPLETED)
            for future in ended:
                _note(journal, running.pop(future), future, summary, listen)
            if stop.is_set():
                for future in list(running):
                    if future.cancel():
                        running.pop(future)
    finally:
        for future in running:
            future.cancel()


def _note(
    journal: Journal, item: Item, future: Future[dict[str, Any]], summary: Summary, listen: Listener | None
) -> None:
    try:
        result = future.result()
    except Exception as error:  # the executor lost it: a worker died too often, a result that cannot travel
        result = {
            "ok": False,
            "error": {"code": 16, "kind": type(error).__name__, "message": str(error), "hint": None},
        }
    if result.get("cancelled"):
        return  # still running, says the journal: it will be done again
    state = DONE if result.get("ok") else FAILED
    journal.finish(item.target, state, result)
    if state == DONE:
        summary.done += 1
    else:
        summary.failed += 1
    if listen is not None:
        listen(Event("done" if state == DONE else "failed", item, result=result))
