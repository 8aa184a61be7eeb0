"""One item of a batch, done: convert, prove, look at. Plain data in and out, so that it can be done anywhere.

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
from imagekit.progress import Callback, Control

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
        "source": source if "://" in source else str(Path(source).absolute()),
        "target": str((folder / target).absolute()),
        "options": {**asked, "identifier": identifier, "overwrite": True},
    }


def perform(task: Task, *, progress: Callback | None = None, cancel: threading.Event | None = None) -> dict[str, Any]:
    """Do it here. ``ok`` with ``report``, ``digest`` and ``maps``; else ``error``."""
    from imagekit import api
    from imagekit.bundle import file_digest  # brings pydantic along, which few tasks of a child need

    started = time.monotonic()
    try:
        target = Path(task["target"])
        target.parent.mkdir(parents=True, exist_ok=True)
        report = api.convert(task["source"], target, progress=progress, cancel=cancel, **task["options"])
        converted = time.monotonic()
        digest = file_digest(target, control=Control(cancel=cancel))
        hashed = time.monotonic()
        maps = {"source": picture(task["source"], task["options"]), "target": picture(str(target), {})}
    except ImagekitError as error:
        return {"ok": False, "error": described(error), "cancelled": isinstance(error, Cancelled)}
    except OSError as error:  # a folder that cannot be made, a disk that died
        return {"ok": False, "error": {"code": 14, "kind": "OSError", "message": str(error), "hint": None}}
    phases = {
        "convert": round(converted - started, 3),
        "digest": round(hashed - converted, 3),
        "map": round(time.monotonic() - hashed, 3),
    }
    return {"ok": True, "report": report.to_json(), "digest": digest, "phases": phases, "maps": maps}


def described(error: ImagekitError) -> dict[str, Any]:
    """An error as data: the fields of the command line's ``exit_error``."""
    return {
        "code": error.exit_code,
        "kind": type(error).__name__,
        "message": str(error),
        "hint": error.hint,
        "rule": getattr(error, "rule", "") or None,
    }


def picture(path: str, options: Mapping[str, Any]) -> list[int]:
    """How full each of CELLS equal parts of the disk is with data, in percent; empty when nobody can tell."""
    from imagekit import api

    reading = {key: options[key] for key in api.READING_OPTIONS if key in options}
    try:
        with api.open_image(path, format=options.get("source_format"), **reading) as disk:
            size = max(1, disk.virtual_size)
            cells = [0] * CELLS
            for extent in disk.extents():
                if not extent.data:
                    continue
                first, last = extent.start * CELLS // size, (extent.end - 1) * CELLS // size
                for cell in range(first, last + 1):
                    low, high = cell * size // CELLS, (cell + 1) * size // CELLS
                    cells[cell] += min(extent.end, high) - max(extent.start, low)
            return [min(100, -(-held * 100 * CELLS // size)) for held in cells]
    except (ImagekitError, OSError):
        return []
