"""The command batch: many images in one run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imagekit.cli.batch_progress import Shown
from imagekit.cli.options import Format, allowed, command, reading, remote, size_option, target
from imagekit.cli.sizes import short_size
from imagekit.cli.ui import Ui, line
from imagekit.errors import BatchFailed, Cancelled, UsageError
from imagekit.remote.addresses import Access

if TYPE_CHECKING:
    from imagekit.batch.crew import Workforce
    from imagekit.batch.manifest import Item
    from imagekit.progress import Progress

app = typer.Typer()


@app.command()
@command(allow=allowed, reading=reading, remote=remote, made=target)
def batch(
    ui: Ui,
    allow: frozenset[str],
    reading: dict[str, Any],
    remote: dict[str, Any],
    made: dict[str, Any],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder for targets, journal and report.")],
    manifest: Annotated[
        str | None,
        typer.Argument(
            metavar="[MANIFEST]", help="YAML, JSON, JSON Lines, CSV, a folder or a glob.", show_default=False
        ),
    ] = None,
    from_glance: Annotated[
        str | None,
        typer.Option(
            "--from-glance", metavar="QUERY", help="Instead: the images Glance lists for 'disk_format=qcow2'."
        ),
    ] = None,
    profile: Annotated[
        str | None, typer.Option("--for", metavar="PROFILE", help="The kind of host to write for.")
    ] = None,
    name: Annotated[
        str,
        typer.Option(
            "--name", metavar="TEMPLATE", help="Names of targets: {stem}{suffix}, {name}, {format}, {number}, {id}."
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
    resource: Annotated[
        list[str] | None,
        typer.Option("--resource", metavar="NAME=N", help="What a Dask worker must offer to do an item."),
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

    if (manifest is None) == (from_glance is None):
        raise UsageError("either a MANIFEST or --from-glance is needed", hint="imagekit batch images --out converted")
    _check(manifest, out, scheduler, jobs)
    defaults = {key: value for key, value in {**reading, **made, **remote}.items() if value not in (None, (), False)}
    defaults.pop("identifier", None)
    defaults |= {"verify": verify, "allow": sorted(allow)}
    more = {"profile": profile, "source_format": format, "size": size}
    defaults |= {key: one for key, one in more.items() if one is not None}
    if manifest is not None:
        items, title = manifests.load(manifest, defaults, name=name), Path(manifest).name
    else:
        access = Access(timeout=remote["http_timeout"], glance_url=remote["glance_url"], os_cloud=remote["os_cloud"])
        items, title = manifests.from_glance(from_glance or "", defaults, access, name=name), f"glance {from_glance}"
    out.mkdir(parents=True, exist_ok=True)
    cancel = threading.Event()
    shown = Shown(ui, len(items))
    with _signals(cancel, shown), journal.opened(out) as book:
        book.enter(items)
        with _workforce(scheduler, resource, jobs, cancel, shown) as force:
            summary = runner.run(
                book, out, force, resume=resume, retry_failed=retry_failed, listen=shown, cancel=cancel
            )
        totals = report.write_reports(book.rows(), out, title=f"imagekit batch {title}")
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
        + line(f"report: {out / report.HTML_NAME}")
    )
    ui.result(document, text)
    if summary.cancelled:
        raise Cancelled("stopped on request", hint="--resume goes on with it")
    if summary.failed:
        raise BatchFailed(
            f"{summary.failed} of {totals.items} images failed", hint=f"see {out / report.HTML_NAME}; --retry-failed"
        )


@contextmanager
def _workforce(
    scheduler: str | None, resource: list[str] | None, jobs: int | None, cancel: threading.Event, shown: Shown
) -> Iterator[Workforce]:
    """Who does the work; what is shown of it ends with it."""
    from imagekit.batch import cluster, crew
    from imagekit.batch.runner import Event

    def tell(item: Item, step: Progress) -> None:
        shown(Event("progress", item, step))

    try:
        if scheduler:
            with cluster.cluster(scheduler, _resources(resource)) as force:
                yield force
        else:
            with crew.local(jobs or crew.default_jobs(), cancel, tell) as force:
                yield force
    finally:
        shown.end()


def _resources(texts: list[str] | None) -> dict[str, float]:
    found = {}
    for text in texts or ():
        name, _, number = text.partition("=")
        try:
            found[name] = float(number)
        except ValueError:
            raise UsageError(f"--resource {text!r}", hint="write it like imagekit=1") from None
    return found


def _check(manifest: str | None, out: Path, scheduler: str | None, jobs: int | None) -> None:
    if manifest is not None and Path(manifest).is_dir() and Path(manifest).resolve() == out.resolve():
        raise UsageError("is the folder of the images too", path=out, hint="--out another folder")
    if out.exists() and not out.is_dir():
        raise UsageError("is not a folder", path=out)
    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs {jobs}, at least 1 is needed")
    if scheduler is not None and not scheduler.startswith(("tcp://", "tls://")):
        raise UsageError(f"{scheduler!r} is no scheduler's address", hint="tcp://HOST:8786 or tls://HOST:8786")


@contextmanager
def _signals(cancel: threading.Event, shown: Shown) -> Iterator[None]:
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
