"""Images of unknown origin are parsed and copied in a process that can do nothing else.

``convert`` and ``inspect`` start a fresh interpreter (imagekit.confinement.child), which confines itself *before* it
gets a job: limits of the kernel on memory, time, descriptors and file size, no file that it could open (Landlock), no
system call that opens, connects or starts anything (seccomp). Only then it gets the job, with open files instead of
names. What it needs besides (the target once the plan is known, a file to unpack to, the next image of a chain) it
asks for over one socket, and this side decides. Publishing stays here, and so does the network: of a file that is
still coming it gets what has come (imagekit.confinement.files).

What comes back is the same result or the same typed error as without. What is said there is not believed further
than it has to be: messages are JSON, taken apart piece by piece; the target's real size is watched from here; a
request for a reference is answered only where the caller follows references, and only for files handed out before.

Where a kernel lacks Landlock or seccomp the rest holds, and the report says which did (``confinement``). Elsewhere
than on Linux there is none of this.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from imagekit.confinement.channel import (
    Channel,
    ChannelClosed,
    Job,
    Nonsense,
    Request,
    as_error,
    as_finding,
    as_info,
    as_progress,
    as_report,
    as_request,
    error_message,
    understood,
)
from imagekit.confinement.files import Server
from imagekit.confinement.start import SECONDS as START_SECONDS
from imagekit.confinement.start import Started, place, started
from imagekit.errors import ImagekitError, TargetError, ToolError, UnsafeImage, UnsupportedFeature
from imagekit.formats import registry
from imagekit.formats.base import GiB, ImageInfo, MiB
from imagekit.formats.files import LocalFile
from imagekit.limits import over_limit
from imagekit.plan import ConvertOptions
from imagekit.policy import Finding
from imagekit.progress import INTERVAL, SILENT, Control
from imagekit.publish import Pending, check_space, finish, new_file
from imagekit.records import dataclass, field, replace
from imagekit.references import Following
from imagekit.remote.arriving import Arriving
from imagekit.report import Report
from imagekit.sources import OPENER
from imagekit.workers import usable_cores

Result = TypeVar("Result")
POSSIBLE = sys.platform == "linux"

BUFFER_BUDGET = 512 * MiB
BUFFERS_OF_A_THREAD = 16 * MiB
"""Its chunk, what that was decoded from or is encoded to, its stack, and what the allocator keeps."""
SPARE_MEMORY = 64 * MiB
SPARE_OUTPUT = 64 * MiB
"""What the file system may allocate ahead."""
DESCRIPTORS, DESCRIPTORS_FOR_CHAINS = 24, 160
MOST_SCRATCHES = 64
"""Files to unpack to: one a wrapper, for each image of a chain."""
BUG = "this is a bug: please report it"


def convert(
    source: str | os.PathLike[str] | LocalFile,
    target: Path,
    target_format: str,
    options: ConvertOptions,
    *,
    settle: Callable[[], None] = lambda: None,
    control: Control = SILENT,
) -> Report:
    """Convert in a confined process; ``target`` has been looked at (publish.check_target).

    ``settle`` raises an error where the source is not what it should be, and is called before the target has a name.
    """
    started = time.monotonic()
    _check_options(options)
    with ExitStack() as stack:
        files = [_opened(source, stack)]
        if options.parent is not None:
            files.append(stack.enter_context(LocalFile.open_source(options.parent)))
        host = _Host(options, control, files, target, stack)
        job = Job("convert", _resolved(options), tuple(file.name for file in files), os.fspath(target), target_format)
        said, confinement = host.run(job)
        report = host.understand(as_report, said)
        settle()
        if host.pending is not None:
            finish(host.pending, overwrite=options.overwrite, sync=options.sync, control=control)
    return replace(
        report,
        source=files[0].name,
        target=os.fspath(target),
        seconds=time.monotonic() - started,
        notes=report.notes + _weaknesses(confinement),
        confinement=confinement,
    )


@dataclass(frozen=True, slots=True)
class Inspected:
    """What a look into an image found: its headers, the policy's findings, and those below in its chain."""

    info: ImageInfo
    findings: tuple[Finding, ...]
    chain: tuple[tuple[str, ImageInfo], ...]
    file_size: int
    actual_size: int
    name: str
    confinement: tuple[str, ...]


def inspect(
    source: str | os.PathLike[str] | LocalFile,
    options: ConvertOptions,
    *,
    deep: bool = False,
    control: Control = SILENT,
) -> Inspected:
    """``info`` in a confined process; ``options`` say how to read."""
    _check_options(options)
    with ExitStack() as stack:
        file = _opened(source, stack)
        host = _Host(options, control.within(options.limits.seconds), [file], None, stack)
        said, confinement = host.run(Job("info", options, (file.name,), deep=deep))

        def as_inspected(said: Any) -> Inspected:
            return Inspected(
                info=as_info(said["info"]),
                findings=tuple(as_finding(one) for one in said["findings"]),
                chain=tuple((str(name), as_info(info)) for name, info in said["chain"]),
                file_size=file.size,
                actual_size=file.allocated_size,
                name=file.name,
                confinement=confinement,
            )

        return host.understand(as_inspected, said)


def look(
    source: str | os.PathLike[str] | LocalFile,
    options: ConvertOptions,
    as_seen: Callable[[Any], Result],
    *,
    control: Control = SILENT,
) -> Result:
    """A look at the guest's files (imagekit.contents.looking) in a confined process."""
    _check_options(options)
    with ExitStack() as stack:
        file = _opened(source, stack)
        host = _Host(options, control.within(options.limits.seconds), [file], None, stack)
        said, _ = host.run(Job("look", options, (file.name,)))
        return host.understand(as_seen, said)


def _opened(source: str | os.PathLike[str] | LocalFile, stack: ExitStack) -> LocalFile:
    """The source; one that still comes is not waited for, and stays the caller's."""
    if isinstance(source, Arriving):
        return source
    opened = source.again() if isinstance(source, LocalFile) else LocalFile.open_source(source)
    return stack.enter_context(opened)


def _check_options(options: ConvertOptions) -> None:
    if options.verify == "qemu-img":
        raise UnsupportedFeature(
            "a confined process starts no other program, so it cannot verify by qemu-img", hint="--verify content"
        )
    declared = options.source_format
    if declared is not None and not registry.is_known(declared):
        raise UnsupportedFeature(
            f"{declared} is not read by imagekit itself, so not confined either",
            hint="leave out --confined: qemu-img is confined in its own way",
        )


def _resolved(options: ConvertOptions) -> ConvertOptions:
    """Paths that a link to a parent is made from, without the symbolic links that nobody there can follow."""
    parent = None if options.parent is None else os.path.realpath(options.parent)
    pairs = tuple((there, os.path.realpath(here)) for there, here in options.parent_map)
    return replace(options, parent=parent, parent_map=pairs)


def _weaknesses(confinement: tuple[str, ...]) -> tuple[str, ...]:
    missing = [name for name in ("landlock", "seccomp") if not any(one.startswith(name) for one in confinement)]
    return (f"confined without {' and '.join(missing)}, which this kernel lacks",) if missing else ()


def _crashed(what: str) -> UnsafeImage:
    return UnsafeImage(
        f"refused by rule confined-crash: the confined process that read the image failed: {what}",
        rule="confined-crash",
        hint="it may be made to attack what reads it; where its origin is trusted, please report it",
    )


# --- the process -------------------------------------------------------------------------------------------------


def _settings(options: ConvertOptions, jobs: int) -> dict[str, Any]:
    limits = options.limits
    return {
        **place(),
        "memory": limits.metadata_memory + jobs * BUFFERS_OF_A_THREAD + SPARE_MEMORY,
        "limits": {
            "RLIMIT_CPU": limits.seconds * min(jobs, usable_cores()) + 1,
            "RLIMIT_FSIZE": min(limits.virtual_size + GiB, (1 << 63) - 1),
            "RLIMIT_NOFILE": DESCRIPTORS_FOR_CHAINS if options.follow_references or options.parent else DESCRIPTORS,
            "RLIMIT_CORE": 0,
        },
    }


@dataclass(slots=True)
class _Host:
    """This side of one job: passes on progress, answers requests, watches the limits."""

    options: ConvertOptions
    control: Control
    files: list[LocalFile]
    target: Path | None
    stack: ExitStack
    pending: Pending | None = None
    handed_out: dict[str, LocalFile] = field(default_factory=dict)
    scratches: int = 0

    def run(self, job: Job) -> tuple[Any, tuple[str, ...]]:
        """The result, and what confined the process."""
        options = job.options
        jobs = max(1, min(options.jobs or usable_cores(), BUFFER_BUDGET // BUFFERS_OF_A_THREAD))
        job = replace(job, options=replace(options, jobs=jobs))
        self.handed_out |= {file.name: file for file in self.files}
        server = self._server()
        if server is not None:
            job = replace(job, coming=self.files[0].size)
        with started(_settings(options, jobs)) as (process, channel):
            ready = self._wait_for_start(channel, process)
            served = () if server is None else server.descriptors
            descriptors = (*served[:1], *map(_descriptor, self.files[len(served[:1]) :]), *served[1:])
            try:
                channel.send(pickle.dumps(job), descriptors)
                if server is not None:
                    server.start()
                return self._serve(channel, process), ready
            except ChannelClosed:
                raise _ended(process) from None
            except Nonsense as error:
                raise _crashed(str(error)) from error

    def _server(self) -> Server | None:
        """Who tells the confined process which bytes of its source are here, where some are still missing."""
        first = self.files[0]
        if not isinstance(first, Arriving) or first.all_here:
            return None
        server = Server(first)
        self.stack.callback(server.close)
        return server

    def understand(self, as_result: Callable[[Any], Result], said: Any) -> Result:
        """The result of :meth:`run`, taken apart."""
        try:
            return understood(as_result, said)
        except Nonsense as error:
            raise _crashed(str(error)) from error

    def _wait_for_start(self, channel: Channel, process: Started) -> tuple[str, ...]:
        deadline = time.monotonic() + START_SECONDS
        try:
            while time.monotonic() < deadline:
                message = channel.hear(INTERVAL)
                self.control.check()
                if message is not None:
                    return tuple(str(one) for one in message["ready"])
        except ChannelClosed:
            raise _not_started(process) from None
        raise ToolError(f"the confined process did not start within {START_SECONDS:.0f} s")

    def _serve(self, channel: Channel, process: Started) -> Any:
        while True:
            message = channel.hear(INTERVAL)
            self.control.check()
            self._watch_output()
            if message is None:
                continue
            if "done" in message:
                return message["done"]
            if "progress" in message:
                progress = understood(as_progress, message["progress"])
                self.control.tell(progress.phase, progress.done, progress.total)
            elif "error" in message:
                raise understood(as_error, message["error"])
            elif "internal" in message:
                trace = str(message["internal"])
                raise ImagekitError(f"internal error in the confined process: {trace}", hint=BUG)
            else:
                self._answer(understood(as_request, message), channel, process)

    def _watch_output(self) -> None:
        if self.pending is not None:
            taken = self.pending.file.allocated_size
            if taken > self.options.limits.output_bytes + SPARE_OUTPUT:
                raise over_limit("output_bytes", f"the target takes {taken} bytes on its medium")

    # --- requests

    def _answer(self, request: Request, channel: Channel, process: Started) -> None:
        try:
            file = self._asked_for(request, process)
        except TargetError:
            raise
        except ImagekitError as error:
            channel.say(error=error_message(error))
            return
        if file is None:
            channel.say(end=True)
        else:
            self.handed_out[file.name] = file
            channel.send(json.dumps({"name": file.name}).encode(), (_descriptor(file),))

    def _asked_for(self, request: Request, process: Started) -> LocalFile | None:
        if request.kind == "target":
            return self._make_target(request, process)
        if request.kind == "scratch":
            self.scratches += 1
            if self.scratches > MOST_SCRATCHES:
                raise Nonsense("it asked for one file after the other")
            file = OPENER.scratch(None if self.target is None else self.target.parent, request.name)
        else:
            found = self._referred(request)
            if found is None:
                return None
            file = found
        self.stack.callback(file.close)
        return file

    def _referred(self, request: Request) -> LocalFile | None:
        options, origin = self.options, self.handed_out.get(request.origin)
        if origin is None or request.reference is None or not (options.follow_references or options.parent):
            raise Nonsense("it asked for a file that nobody lets it see")
        following = Following(options.parent_map, options.ignore_parent_id)
        return next(islice(OPENER.referred(request.reference, origin, following), request.skip, None), None)

    def _make_target(self, request: Request, process: Started) -> LocalFile:
        if self.target is None or self.pending is not None or request.needed < 0 or request.file_size < 0:
            raise Nonsense("it asked for a target")
        self.options.limits.check("output_bytes", request.needed, "the target would take")
        check_space(self.target.parent, request.needed)
        self.pending = self.stack.enter_context(new_file(self.target))
        if self.options.preallocate:
            self.pending.file.preallocate(request.file_size)
        _limit_file_size(process.pid, request.file_size)
        return self.pending.file


def _not_started(process: Started) -> ImagekitError:
    code = process.wait()
    words = process.words().strip().splitlines()
    last = words[-1] if words else "it said nothing"
    return ToolError(f"the confined process did not start, it ended with {code}: {last}", hint=BUG)


def _ended(process: Started) -> ImagekitError:
    """Why it ended in the middle of its job."""
    try:
        code = process.wait(5.0)
    except subprocess.TimeoutExpired:
        return _crashed("it stopped talking")
    if code >= 0:
        return _crashed(f"it ended with {code}")
    name = signal.Signals(-code).name
    if name == "SIGXCPU":
        return over_limit("seconds", "it took more of the processor's time than is allowed")
    return _crashed(f"it was ended by {name}")


def _limit_file_size(process: int, size: int) -> None:
    if sys.platform == "linux":
        import resource

        resource.prlimit(process, resource.RLIMIT_FSIZE, (size, size))


def _descriptor(file: LocalFile) -> int:
    descriptor = file.fileno()
    assert descriptor is not None
    return descriptor
