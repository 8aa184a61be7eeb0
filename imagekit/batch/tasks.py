"""One item of a batch: measured, or converted, proven and drawn. Plain data in and out: it can be done anywhere.

A task never raises: what went wrong is part of its result, in the words of the command line. Doing it again is safe:
the target gets its name when it is complete, and the same options and id give the same bytes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

from imagekit.errors import Cancelled, ImagekitError
from imagekit.progress import Callback, Control, Progress

NAMESPACE = UUID("b1c1f5ce-54c4-4f0e-8d5e-3c2c3a1f6a11")
"""Disk ids of a batch derive from it and the item, so that a run that was resumed writes the same bytes."""
CELLS = 160
"""Parts of a disk that its picture shows."""

Task = Mapping[str, Any]


def task_of(source: str, target: str, options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What :func:`perform` needs to know. The paths are absolute: it may be done in another folder."""
    asked = dict(options)
    asked.setdefault("verify", "content")
    # A stranger's image, but for what a confined process cannot do: it starts no other program.
    asked.setdefault("confined", asked["verify"] != "qemu-img")
    identifier = asked.pop("id", None) or str(uuid5(NAMESPACE, target))
    return {
        "source": source if is_elsewhere(source) else str(Path(source).absolute()),
        "target": str((folder / target).absolute()),
        "options": {**asked, "identifier": identifier, "overwrite": True},
    }


def is_elsewhere(source: str) -> bool:
    """Whether the image has to be fetched: an address, or one of Glance's."""
    return "://" in source or source.startswith("glance:")


def perform(task: Task, *, progress: Callback | None = None, cancel: threading.Event | None = None) -> dict[str, Any]:
    """Do it here. ``ok`` with ``report``, ``digest``, ``phases`` and ``maps``, or, of a task to ``measure``, with
    ``needed`` and ``size``; else ``error``."""
    phases = _Phases(progress)
    try:
        target = Path(task["target"])
        target.parent.mkdir(parents=True, exist_ok=True)
        if task.get("measure"):
            return _measured(task, cancel)
        return _converted(task, target, phases, cancel)
    except ImagekitError as error:
        return {"ok": False, "error": described(error), "cancelled": isinstance(error, Cancelled)}
    except OSError as error:  # a folder that cannot be made, a disk that died
        return {"ok": False, "error": {"code": 14, "kind": "OSError", "message": str(error), "hint": None}}


def _measured(task: Task, cancel: threading.Event | None) -> dict[str, Any]:
    from imagekit import api

    report = api.convert(task["source"], task["target"], dry_run=True, cancel=cancel, **task["options"])
    needed = report.target_size if task["options"].get("preallocate") else report.data_bytes
    return {"ok": True, "needed": needed, "size": report.data_bytes}


def _converted(task: Task, target: Path, phases: _Phases, cancel: threading.Event | None) -> dict[str, Any]:
    from imagekit import api
    from imagekit.digests import file_digest

    report = api.convert(
        task["source"], target, progress=phases, cancel=cancel, map_cells=CELLS, **task["options"]
    ).to_json()
    digest = file_digest(target, control=Control(phases, cancel))
    maps = {side: report.pop(f"{side}-map", []) for side in ("source", "target")}
    return {"ok": True, "report": report, "digest": digest, "phases": phases.ended(), "maps": maps}


class _Phases:
    """Passes progress on, and counts the seconds of each phase; what comes before the first one is to open."""

    def __init__(self, progress: Callback | None) -> None:
        self._progress = progress
        self._seconds: dict[str, float] = {}
        self._phase, self._since = "open", time.monotonic()

    def __call__(self, step: Progress) -> None:
        if step.phase != self._phase:
            self._turn(step.phase)
        if self._progress is not None:
            self._progress(step)

    def _turn(self, phase: str) -> None:
        now = time.monotonic()
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now

    def ended(self) -> dict[str, float]:
        self._turn("")
        return {phase: round(seconds, 3) for phase, seconds in self._seconds.items()}


def described(error: ImagekitError) -> dict[str, Any]:
    """An error as data: the fields of the command line's ``exit_error``."""
    return {
        "code": error.exit_code,
        "kind": type(error).__name__,
        "message": str(error),
        "hint": error.hint,
        "rule": getattr(error, "rule", "") or None,
    }
