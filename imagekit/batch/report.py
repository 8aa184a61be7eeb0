"""The report of a batch: ``report.json`` for programs, ``report.html`` for people (page.py).

Both are written in one pass over the journal; what is kept meanwhile is sums, the rows that the page shows and the
failures, so that many items cost no memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from imagekit.batch.journal import DONE, FAILED, Row
from imagekit.batch.page import page
from imagekit.formats.base import JSON, MiB
from imagekit.publish import Pending, new_file, write_file
from imagekit.records import dataclass, field
from imagekit.report import SCHEMA

JSON_NAME, HTML_NAME = "report.json", "report.html"
ROWS = 5000
"""Rows of the page; the JSON has all of them."""
FAILURES = 1000


@dataclass(slots=True)
class Totals:
    """Sums over a batch; sizes in bytes, times in seconds."""

    items: int = 0
    done: int = 0
    failed: int = 0
    waiting: int = 0
    source_bytes: int = 0
    disk_bytes: int = 0
    target_bytes: int = 0
    data_bytes: int = 0
    seconds: float = 0.0
    """Of all items together."""

    first: float | None = None
    last: float | None = None
    """When the first one began and the last one ended, since 1970."""

    phases: dict[str, float] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        self.items += 1
        if row.state == FAILED:
            self.failed += 1
        elif row.state != DONE:
            self.waiting += 1
        else:
            self.done += 1
            self._add_report(row.result.get("report") or {})
        self.seconds += row.seconds
        if row.started is not None and row.finished is not None:
            self.first = row.started if self.first is None else min(self.first, row.started)
            self.last = row.finished if self.last is None else max(self.last, row.finished)
        for phase, seconds in row.result.get("phases", {}).items():
            self.phases[phase] = self.phases.get(phase, 0.0) + seconds

    def _add_report(self, report: dict[str, Any]) -> None:
        if report:
            self.source_bytes += report["source"]["size"]
            self.disk_bytes += report["target"]["virtual-size"]
            self.target_bytes += report["target"]["size"]
            self.data_bytes += report["data-bytes"]

    def to_json(self) -> dict[str, JSON]:
        return {
            "items": self.items,
            "done": self.done,
            "failed": self.failed,
            "waiting": self.waiting,
            "source-bytes": self.source_bytes,
            "disk-bytes": self.disk_bytes,
            "target-bytes": self.target_bytes,
            "data-bytes": self.data_bytes,
            "seconds": round(self.seconds, 3),
            "first": self.first,
            "last": self.last,
            "phases": {phase: round(seconds, 3) for phase, seconds in self.phases.items()},
        }


def write_reports(rows: Iterable[Row], folder: Path, *, title: str) -> Totals:
    """Write both reports into the folder; the old ones are replaced."""
    totals = Totals()
    shown: list[Row] = []
    failures: list[Row] = []
    with new_file(folder / JSON_NAME) as pending:
        out = _Writer(pending)
        out.add(json.dumps({"schema": SCHEMA, "title": title})[:-1] + ', "items": [')
        for row in rows:
            out.add(("\n" if totals.items == 0 else ",\n") + json.dumps(_document(row)))
            totals.add(row)
            if len(shown) < ROWS:
                shown.append(row)
            if row.state == FAILED and len(failures) < FAILURES:
                failures.append(row)
        out.add('\n], "totals": ' + json.dumps(totals.to_json()) + "}\n")
        out.end()
        pending.commit(overwrite=True, sync=False)
    text = "".join(page(title, totals, shown, failures))
    write_file(folder / HTML_NAME, text.encode(), overwrite=True, sync=False)
    return totals


class _Writer:
    """Text into a new file, a piece at a time."""

    def __init__(self, pending: Pending) -> None:
        self._file, self._at, self._held = pending.file, 0, bytearray()

    def add(self, text: str) -> None:
        self._held += text.encode()
        if len(self._held) > MiB:
            self.end()

    def end(self) -> None:
        self._file.pwrite(self._at, bytes(self._held))
        self._at += len(self._held)
        self._held.clear()


def _document(row: Row) -> dict[str, Any]:
    return {
        "number": row.item.number,
        "source": row.item.source,
        "target": row.item.target,
        "options": dict(row.item.options),
        "state": row.state,
        "attempts": row.attempts,
        "seconds": round(row.seconds, 3),
        **{key: value for key, value in row.result.items() if key != "ok"},
    }
