"""The command batch: many images in one run."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imagekit.cli.options import Format, allowed, command, reading, size_option, target
from imagekit.cli.sizes import short_size
from imagekit.cli.ui import Ui
from imagekit.errors import BatchFailed, Cancelled, UsageError

if TYPE_CHECKING:
    from imagekit.batch.runner import Event

app = typer.Typer()

LINE_SECONDS = 5.0


@app.command()
@command(allow=allowed, reading=reading, made=target)
def batch(
    ui: Ui,
    manifest: Annotated[
        str,
        typer.Argument(
            metavar="MANIFEST", help="YAML, JSON, JSON Lines, CSV, a folder or a glob.", show_default=False
        ),
    ],
    allow: frozenset[str],
    reading: dict[str, Any],
    made: dict[str, Any],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder for targets, journal and report.")],
    profile: Annotated[
        str | None, typer.Option("--for", metavar="PROFILE", help="The kind of host to write for.")
    ] = None,
    name: Annotated[
        str,
        typer.Option(
            "--name", metavar="TEMPLATE", help="Names of targets: {stem}{suffix}, {name}, {format}, {number}."
        ),
    ] = "{stem}{suffix}",
    format: Format = None,
    size: Annotated[int | None, size_option("--size", help="Grow every disk to this size.")] = None,
    verify: Annotated[
        str, typer.Option("--verify", metavar="structure|content|qemu-img", help="How to check each.")
    ] = "content",
    jobs: Annotated[
        int | None, typer.Option("--jobs", metavar="N", help="Items at once; default: one a core.")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option("--scheduler", metavar="ADDRESS", help="A Dask scheduler: tcp://HOST:8786.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Go on, and do what failed once more.")
    ] = False,
) -> None:
    """Convert many images, with a journal to go on from and a report.

    Each image is judged, converted and verified as convert does it; some that fail do not stop the others.
    """
    from imagekit.batch import journal, report, runner
    from imagekit.batch import manifest as manifests

    _check(out, scheduler, jobs)
    defaults = {**{key: value for key, value in {**reading, **made}.items() if value not in (None, (), False)}}
    defaults.pop("identifier", None)
    defaults |= {"verify": verify, "allow": sorted(allow)}
    more = {"profile": profile, "source_format": format, "size": size}
    items = manifests.load(manifest, defaults | {key: one for key, one in more.items() if one is not None}, name=name)
    out.mkdir(parents=True, exist_ok=True)
    cancel = threading.Event()
    shown = _Shown(ui, len(items))
    with _signals(cancel, shown), journal.opened(out) as book:
        book.enter(items)
        pool = runner.cluster(scheduler) if scheduler else runner.local(jobs or runner.default_jobs(), cancel, shown)
        with pool as executor:
            summary = runner.run(
                book, out, executor, resume=resume, retry_failed=retry_failed, listen=shown, cancel=cancel
            )
        totals = report.write_reports(book.rows(), out, title=f"imagekit batch {Path(manifest).name}")
    document = {
        "schema": 1,
        "done": summary.done,
        "failed": summary.failed,
        "skipped": summary.skipped,
        "cancelled": summary.cancelled,
        "seconds": round(summary.seconds, 3),
        "report": str(out / report.HTML_NAME),
        "totals": totals.to_json(),
    }
    text = (
        f"{summary.done} done, {summary.failed} failed, {summary.skipped} done before, {summary.seconds:.1f} s; "
        f"{short_size(totals.source_bytes)} in, {short_size(totals.target_bytes)} out\n"
        f"report: {out / report.HTML_NAME}"
    )
    ui.result(document, text)
    if summary.cancelled:
        raise Cancelled("stopped on request", hint="--resume goes on with it")
    if summary.failed:
        raise BatchFailed(
            f"{summary.failed} of {totals.items} images failed", hint=f"see {out / report.HTML_NAME}; --retry-failed"
        )


def _check(out: Path, scheduler: str | None, jobs: int | None) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError("is not a folder", path=out)
    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs {jobs}, at least 1 is needed")
    if scheduler is not None and not scheduler.startswith(("tcp://", "tls://")):
        raise UsageError(f"{scheduler!r} is no scheduler's address", hint="tcp://HOST:8786 or tls://HOST:8786")


class _Shown:
    """What a run shows of itself, on stderr: lines for people, JSON Lines for programs."""

    def __init__(self, ui: Ui, total: int) -> None:
        self._ui, self._total = ui, total
        self._lock = threading.Lock()
        self._ended = self._failed = 0
        self._running: dict[str, str] = {}
        self._began = self._last = time.monotonic()
        self._json = ui.progress == "json"
        self._quiet = ui.progress == "none" or (ui.quiet and not self._json)

    def __call__(self, event: Event) -> None:
        with self._lock:
            self._count(event)
            if self._quiet:
                return
            if self._json:
                self._line(event)
            elif event.kind == "failed":
                error = event.result.get("error", {})
                self._ui.say(f"failed: {event.item.source}: {error.get('message', '')}")
            elif event.kind in ("done", "skipped") and time.monotonic() - self._last >= LINE_SECONDS:
                self._last = time.monotonic()
                self._ui.say(self.status())

    def _count(self, event: Event) -> None:
        if event.kind == "progress" and event.progress is not None:
            step = event.progress
            percent = f" {step.done * 100 // step.total} %" if step.total else ""
            self._running[event.item.target] = f"{step.phase}{percent}"
        elif event.kind == "started":
            self._running[event.item.target] = "waits"
        else:
            self._running.pop(event.item.target, None)
            self._ended += 1
            self._failed += event.kind == "failed"

    def status(self) -> str:
        """One line: how far, how fast, how long still."""
        spent = max(0.001, time.monotonic() - self._began)
        left = spent / self._ended * (self._total - self._ended) if self._ended else None
        when = "" if left is None else f", {left:.0f} s left"
        return (
            f"{self._ended} of {self._total} images, {self._failed} failed, {self._ended / spent:.2f} a second{when}"
        )

    def say_status(self) -> None:
        """The line, and what is being worked on (on SIGUSR1)."""
        print(
            self.status(),
            *(f"  {name}: {what}" for name, what in dict(self._running).items()),
            sep="\n",
            file=sys.stderr,
        )

    def _line(self, event: Event) -> None:
        line: dict[str, Any] = {"message_type": "item", "state": event.kind, "target": event.item.target}
        line |= {"ended": self._ended, "total": self._total}
        if event.progress is not None:
            line |= {"phase": event.progress.phase, "done": event.progress.done, "bytes": event.progress.total}
        if event.kind == "failed":
            line["error"] = event.result.get("error")
        print(json.dumps(line), file=sys.stderr, flush=True)


@contextmanager
def _signals(cancel: threading.Event, shown: _Shown) -> Iterator[None]:
    """Ctrl-C stops after what cannot be left half, a second one at once; SIGUSR1 prints where the run is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if cancel.is_set():
            raise KeyboardInterrupt
        cancel.set()

    handlers = {signal.SIGINT: stop}
    if hasattr(signal, "SIGUSR1"):
        handlers[signal.SIGUSR1] = lambda *_: shown.say_status()
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
