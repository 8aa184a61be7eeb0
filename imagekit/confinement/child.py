"""The program that runs confined: takes its own rights away, then does one job (imagekit.confinement.jobs).

``main`` is called by a fresh interpreter with a JSON object of settings. Everything that a job may need is loaded
first, since nothing can be opened any more after that: a module that is missing then is a bug, and tests convert
every format to find it. There are no threads until the filter is in place.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import mmap
import os
import pickle
import pkgutil
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imagekit.formats
from imagekit import conversion
from imagekit.confinement import rights, seccomp
from imagekit.confinement.channel import (
    Channel,
    ChannelClosed,
    Job,
    as_error,
    error_message,
    finding_message,
    info_message,
    reference_message,
    report_message,
)
from imagekit.confinement.files import ServedFile
from imagekit.contents.looking import look, seen_message
from imagekit.copying import CopyResult
from imagekit.errors import ImagekitError
from imagekit.formats import registry
from imagekit.formats.base import JSON, Reference
from imagekit.formats.files import LocalFile
from imagekit.limits import over_limit
from imagekit.progress import Control, Progress
from imagekit.records import replace
from imagekit.references import Following
from imagekit.sources import Opener, located, open_source
from imagekit.workers import keep_freed_memory

STACK = 1 << 20
"""Of a thread: the system's 8 MiB would count against the limit of memory, used or not."""

MODULES = (
    "imagekit.contents.gpt",
    "imagekit.contents.patched",
    "imagekit.wrappers.unwrap",
    "lzma",
    "bz2",
    "hashlib",
)
CODECS = ("ascii", "latin-1", "utf-16", "utf-16-le", "utf-16-be", "utf-8-sig", "unicode-escape", "cp437", "idna")


def main(settings: dict[str, Any]) -> None:
    """Confine this process, then do the one job."""
    channel = Channel(socket.socket(fileno=settings["socket"]))
    _load()
    channel.say(ready=list(_confine(settings)))
    code = 0
    try:
        data, descriptors = channel.receive()
        _answer(channel, pickle.loads(data), descriptors)
    except ChannelClosed:
        code = 1
    os._exit(code)  # no clean-up: it would look for modules


def nursery(settings: dict[str, Any]) -> None:
    """Load everything, then fork a process for each that is asked for (imagekit.confinement.start); sees no image."""
    channel = Channel(socket.socket(fileno=settings["socket"]))
    _end_with(settings["parent"])
    _load()
    gc.freeze()  # the collector leaves alone what is shared
    try:
        while True:
            data, descriptors = channel.receive()
            asked = json.loads(data)
            if "wait" in asked:
                channel.say(code=_waited(asked["wait"], asked["seconds"]))
                continue
            if sys.platform == "win32":
                raise RuntimeError("not there on Windows")
            parent = os.getpid()
            pid = os.fork()
            if pid == 0:
                os.dup2(descriptors[1], 2)
                for one in (settings["socket"], descriptors[1]):
                    os.close(one)
                main({**asked["start"], "socket": descriptors[0], "parent": parent})
            for one in descriptors:
                os.close(one)
            channel.say(pid=pid)
    except ChannelClosed:
        os._exit(0)


def _waited(pid: int, seconds: float | None) -> int | None:
    """The exit code of a process of ours, or None when it is not over in time."""
    if sys.platform == "win32":
        raise RuntimeError("not there on Windows")
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, 0 if deadline is None else os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() > deadline:
            return None
        time.sleep(0.01)


def _end_with(parent: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(rights.PR_SET_PDEATHSIG, rights.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # it died before we asked to be told


def _load() -> None:
    for name in MODULES:
        importlib.import_module(name)
    for module in pkgutil.iter_modules(imagekit.formats.__path__):
        importlib.import_module(f"imagekit.formats.{module.name}")
    registry.formats()
    from imagekit.formats.decoders import raw_inflater, zstd_module

    raw_inflater()
    zstd_module()
    for codec in CODECS:
        "".encode(codec)


def _confine(settings: dict[str, Any]) -> Iterator[str]:
    """Take away all that a job does not need; yields what worked."""
    keep_freed_memory()
    threading.stack_size(STACK)
    libc = ctypes.CDLL(None, use_errno=True)
    _end_with(settings["parent"])
    used = int(Path("/proc/self/statm").read_text().split()[5]) * mmap.PAGESIZE
    rights.limit({**settings["limits"], "RLIMIT_DATA": used + settings["memory"]})
    yield "limits"
    if libc.prctl(rights.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return
    version = rights.landlock_version()
    if version:
        rights.restrict_files()
        yield f"landlock {version}"
    if seccomp.restrict_calls():
        yield "seccomp"


def _answer(channel: Channel, job: Job, descriptors: list[int]) -> None:
    try:
        files = _files(job, descriptors)
        result = _JOBS[job.do](_Asking(channel), job, files)
    except ImagekitError as error:
        channel.say(error=error_message(error))
    except MemoryError:
        most = job.options.limits.metadata_memory
        refusal = over_limit("metadata_memory", f"it needs more memory than the {most} bytes allowed for tables")
        channel.say(error=error_message(refusal))
    except ChannelClosed:
        raise
    except BaseException:
        channel.say(internal=traceback.format_exc())
    else:
        channel.say(done=result)


def _files(job: Job, descriptors: list[int]) -> list[LocalFile]:
    if job.coming is None or sys.platform == "win32":
        return [LocalFile(fd, name) for fd, name in zip(descriptors, job.names, strict=True)]
    *opened, questions = descriptors
    # All is said about it: finding that out takes calls that are not there any more.
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=questions)
    first: LocalFile = ServedFile(opened[0], job.names[0], job.coming, connection)
    return [first, *(LocalFile(fd, name) for fd, name in zip(opened[1:], job.names[1:], strict=True))]


class _Asking(Opener):
    """Asks the process outside for files, and tells it how far the job is."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def tell(self, progress: Progress) -> None:
        self._channel.say(progress=[progress.phase, progress.done, progress.total])

    def ask(self, **question: JSON) -> LocalFile | None:
        self._channel.say(**question)
        data, descriptors = self._channel.receive()
        answer = json.loads(data)
        if "error" in answer:
            raise as_error(answer["error"])
        return LocalFile(descriptors[0], answer["name"]) if descriptors else None

    def file(self, **question: JSON) -> LocalFile:
        found = self.ask(**question)
        assert found is not None
        return found

    def scratch(self, folder: Path | None, name: str) -> LocalFile:
        return self.file(ask="scratch", name=name)

    def referred(self, reference: Reference, origin: LocalFile, following: Following) -> Iterator[LocalFile]:
        skip = 0
        wanted = reference_message(reference)
        while (found := self.ask(ask="reference", reference=wanted, origin=origin.name, skip=skip)) is not None:
            yield found
            skip += 1


def _convert(asking: _Asking, job: Job, files: list[LocalFile]) -> dict[str, JSON]:
    options, target = job.options, Path(job.target)
    control = Control(asking.tell)
    with conversion.planned(
        files[0],
        registry.find(job.target_format),
        options,
        target=target,
        parent_file=files[1] if len(files) > 1 else None,
        opener=asking,
        writing=True,
        control=control,
    ) as planned:
        plan = planned.plan
        if options.dry_run:
            copied, verified = CopyResult(plan.data_bytes, 0, plan.file_size), "not written"
            maps: conversion.Maps = ((), ())
            done = planned
        else:
            needed = conversion.bytes_to_write(plan, options)
            made = asking.file(ask="target", needed=needed, file_size=planned.most_bytes)
            done, copied = conversion.carry_out(planned, made, options, control)
            verified = options.verify
            maps = conversion.draw_maps(done, made, options)
        report = conversion.make_report(done, target, copied, verified=verified)
        return report_message(replace(report, source_map=maps[0], target_map=maps[1]))


def _info(asking: _Asking, job: Job, files: list[LocalFile]) -> dict[str, JSON]:
    asked = replace(conversion.reading(job.options, deep=job.deep), allow=None, opener=asking)
    with open_source(files[0], asked, control=Control(asking.tell)) as source:
        return {
            "info": info_message(source.image.info()),
            "findings": [finding_message(one) for one in source.findings],
            "chain": [[one.original.name, info_message(one.image.info())] for one in source.below()],
        }


def _look(asking: _Asking, job: Job, files: list[LocalFile]) -> dict[str, JSON]:
    asked = replace(conversion.reading(job.options, deep=True), opener=asking, whole=True)
    with open_source(files[0], asked, control=Control(asking.tell)) as source, located(source.file):
        return seen_message(look(source.image))


_JOBS = {"convert": _convert, "info": _info, "look": _look}
