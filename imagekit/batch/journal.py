"""What a batch has done, kept so that nothing but its end can lose it: an SQLite file beside the targets.

One row an item, in one transaction each. ``done`` is written after the target has its name, with the target's digest:
so a row that says done can be proven, and everything else is done again. Two runs never work on one folder at once
(a lock beside the journal).
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from imagekit.batch.manifest import Item
from imagekit.errors import TargetError
from imagekit.locks import held
from imagekit.records import dataclass, field

NAME = "journal.sqlite"
VERSION = 2
SYNC_SECONDS = 1.0
"""Between two commits that wait for the medium: waiting for each would cost more than the rest of the scheduler."""
WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"

_TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS items (
    target TEXT PRIMARY KEY,
    number INTEGER NOT NULL,
    source TEXT NOT NULL,
    options TEXT NOT NULL,
    state TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    started REAL,
    finished REAL,
    needed INTEGER,
    size INTEGER,
    digest TEXT,
    result TEXT
) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Row:
    """An item as the journal knows it; ``result`` is what its task returned."""

    item: Item
    state: str
    attempts: int = 0
    started: float | None = None
    finished: float | None = None
    result: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Of work, as far as it was counted; without that since it was handed out."""
        if phases := self.result.get("phases"):
            return float(sum(phases.values()))
        return 0.0 if self.started is None or self.finished is None else max(0.0, self.finished - self.started)


@dataclass(frozen=True, slots=True)
class Known:
    """What a run has to know of an item before it goes on."""

    item: Item
    state: str
    digest: str | None


class Journal:
    """The journal of one folder. Used by one thread."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._db = sqlite3.connect(self.path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._on_medium = 0.0
        self._commit_in_time()
        self._db.executescript(_TABLES)
        self._db.execute("INSERT OR IGNORE INTO meta VALUES ('version', ?)", (str(VERSION),))
        (found,) = self._db.execute("SELECT value FROM meta WHERE key = 'version'").fetchone()
        if found != str(VERSION):
            self._db.close()
            raise TargetError(
                f"its version is {found}, {VERSION} was expected", path=self.path, hint="another folder"
            )

    def enter(self, items: Iterable[Item]) -> None:
        """Make the journal hold exactly these items. An item that is another one than before starts anew."""
        self._db.execute("BEGIN IMMEDIATE")
        known = {
            target: (source, options)
            for target, source, options in self._db.execute("SELECT target, source, options FROM items")
        }
        wanted = {item.target: item for item in items}
        self._db.executemany("DELETE FROM items WHERE target = ?", [(one,) for one in known if one not in wanted])
        self._db.executemany(
            "INSERT INTO items (target, number, source, options, state) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (target) DO UPDATE SET number = excluded.number, source = excluded.source, "
            "options = excluded.options, state = excluded.state, attempts = 0, started = NULL, finished = NULL, "
            "needed = NULL, size = NULL, digest = NULL, result = NULL",
            [
                (item.target, item.number, item.source, _text(item.options), WAITING)
                for item in wanted.values()
                if known.get(item.target) != (item.source, _text(item.options))
            ],
        )
        self._db.execute("COMMIT")

    def start(self, target: str) -> None:
        self._db.execute(
            "UPDATE items SET state = ?, attempts = attempts + 1, started = ?, finished = NULL WHERE target = ?",
            (RUNNING, time.time(), target),
        )

    def _commit_in_time(self) -> None:
        """What was done in the last second may be lost with the power, and is done again then; nothing else."""
        late = time.monotonic() - self._on_medium >= SYNC_SECONDS
        self._db.execute(f"PRAGMA synchronous={'FULL' if late else 'NORMAL'}")
        if late:
            self._on_medium = time.monotonic()

    def finish(self, target: str, state: str, result: Mapping[str, Any]) -> None:
        self._commit_in_time()
        self._db.execute(
            "UPDATE items SET state = ?, finished = ?, digest = ?, result = ? WHERE target = ?",
            (state, time.time(), result.get("digest"), _text(result), target),
        )

    def measured(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Note what targets need on their medium, and how many bytes of data there are."""
        self._db.execute("BEGIN IMMEDIATE")
        self._db.executemany(
            "UPDATE items SET needed = ?, size = ? WHERE target = ?",
            [(needed, size, target) for target, (needed, size) in sizes.items()],
        )
        self._db.execute("COMMIT")

    def sizes(self) -> dict[str, tuple[int, int]]:
        """What was measured before."""
        query = "SELECT target, needed, size FROM items WHERE needed IS NOT NULL"
        return {target: (needed, size) for target, needed, size in self._db.execute(query)}

    def begun(self) -> bool:
        """Whether a run did anything here."""
        return self._db.execute("SELECT 1 FROM items WHERE state != ? LIMIT 1", (WAITING,)).fetchone() is not None

    def forget(self, targets: Iterable[str]) -> None:
        """Let items start anew."""
        self._db.execute("BEGIN IMMEDIATE")
        self._db.executemany(
            "UPDATE items SET state = ?, finished = NULL WHERE target = ? AND state != ?",
            [(WAITING, one, WAITING) for one in targets],
        )
        self._db.execute("COMMIT")

    def known(self) -> Iterator[Known]:
        """All items in the manifest's order, without their results: those of many are large."""
        query = "SELECT number, source, target, options, state, digest FROM items ORDER BY number"
        with closing(self._db.cursor()) as cursor:
            for number, source, target, options, state, digest in cursor.execute(query):
                yield Known(Item(number, source, target, json.loads(options)), state, digest)

    def rows(self) -> Iterator[Row]:
        """All items, in the manifest's order."""
        query = (
            "SELECT number, source, target, options, state, attempts, started, finished, result FROM items "
            "ORDER BY number"
        )
        with closing(self._db.cursor()) as cursor:
            for number, source, target, options, state, attempts, started, finished, result in cursor.execute(query):
                item = Item(number, source, target, json.loads(options))
                found = {} if result is None else json.loads(result)
                yield Row(item, state, attempts, started, finished, found)

    def close(self) -> None:
        self._db.close()


def _text(value: Mapping[str, Any]) -> str:
    return json.dumps(dict(value), sort_keys=True)


@contextmanager
def opened(folder: Path) -> Iterator[Journal]:
    """The folder's journal, for this run alone. TargetError when another run works there."""
    with held(folder / f".{NAME}.lock", wait=False) as taken:
        if not taken:
            raise TargetError(
                "another batch works on this folder", path=folder, hint="wait for it, or choose another"
            )
        try:
            journal = Journal(folder)
        except sqlite3.Error as error:
            raise TargetError(f"its journal cannot be used: {error}", path=folder) from error
        try:
            yield journal
        finally:
            journal.close()
