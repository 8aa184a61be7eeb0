"""What this computer made on a host, written down before and after it was made.

One line of JSON an entry, in a file beside the bundle, each on the medium before the next step. A begun entry without
its end is something that may or may not be there: a run that was killed, or a host that did not answer. Only what an
entry names is ever undone or deleted. The last line may be torn when this computer died while writing it; it was
about to begin something and had not.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from imagekit.errors import InvalidSpec, SourceError, TargetError
from imagekit.formats.files import lock_exclusively
from imagekit.records import dataclass

NAME = "hyperv-journal.jsonl"
MAX_SIZE = 4 << 20

Kind = Literal["folder", "file", "machine"]
State = Literal["begun", "made", "gone"]
UNDONE_FIRST: tuple[Kind, ...] = ("machine", "file", "folder")
"""A machine holds files, a folder holds both."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A thing on a host: a folder or file by its path, a machine by its id (its uuid until the host named one)."""

    host: str
    uuid: str
    kind: Kind
    what: str
    state: State
    run: str
    """Which run it was."""

    @property
    def key(self) -> tuple[str, str, str, str]:
        return (self.host, self.uuid, self.kind, self.what.lower())


class Journal:
    """The entries of one machine on one host; those of others in the same file are left alone.

    Open, it is this process's alone: two runs at once would take each other's things for their own. A context
    manager.
    """

    def __init__(self, path: str | os.PathLike[str], *, host: str, uuid: str, run: str) -> None:
        self._path = Path(path)
        self._host, self._uuid, self._run = host, uuid, run
        try:
            self._file = self._path.open("a+b", buffering=0)
        except OSError as error:
            raise TargetError(
                f"the journal cannot be written: {error.strerror or error}", hint=_ELSEWHERE, path=self._path
            ) from error
        try:
            if not lock_exclusively(self._file.fileno()):
                raise SourceError(
                    "another run of imagekit has this journal open", hint="wait until it is done", path=self._path
                )
            entries = list(_read(self._file, self._path))
        except BaseException:
            self._file.close()
            raise
        self._entries = [entry for entry in entries if (entry.host, entry.uuid) == (host, uuid)]

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others have it. The file stays, also an empty one: who waits for its lock has it open."""
        self._file.close()

    @property
    def run(self) -> str:
        """This run, as its entries and its ``.part`` files name it."""
        return self._run

    def begin(self, kind: Kind, what: str) -> None:
        """Say that ``what`` is about to be made."""
        self._write(kind, what, "begun")

    def made(self, kind: Kind, what: str) -> None:
        """Say that it is there, and that this run made it."""
        self._write(kind, what, "made")

    def gone(self, kind: Kind, what: str) -> None:
        """Say that it is not there any more."""
        self._write(kind, what, "gone")

    def present(self, kind: Kind | None = None, *, this_run: bool = False) -> list[Entry]:
        """What was begun or made and is not gone, in the order in which to undo it."""
        last = {entry.key: entry for entry in self._entries}
        found = [entry for entry in last.values() if entry.state != "gone" and kind in (None, entry.kind)]
        if this_run:
            # Begun by this run, whatever an earlier one says of the same thing.
            own = {entry.key for entry in self._entries if entry.run == self._run and entry.state == "begun"}
            found = [entry for entry in found if entry.key in own]
        order = {entry.key: at for at, entry in enumerate(self._entries)}
        return sorted(found, key=lambda entry: (UNDONE_FIRST.index(entry.kind), -order[entry.key]))

    def names(self, kind: Kind, what: str) -> bool:
        """Whether ``what`` is ours: begun or made, and not gone."""
        return any(entry.what.lower() == what.lower() for entry in self.present(kind))

    def _write(self, kind: Kind, what: str, state: State) -> None:
        entry = Entry(self._host, self._uuid, kind, what, state, self._run)
        line = json.dumps({name: getattr(entry, name) for name in Entry.__slots__}).encode() + b"\n"
        try:
            size = self._file.seek(0, os.SEEK_END)
            self._file.seek(max(0, size - 1))
            torn = size > 0 and self._file.read(1) != b"\n"
            self._file.write(b"\n" * torn + line)
            os.fsync(self._file.fileno())
        except OSError as error:
            raise TargetError(
                f"the journal cannot be written: {error.strerror or error}", hint=_ELSEWHERE, path=self._path
            ) from error
        self._entries.append(entry)


_ELSEWHERE = "name another place with --journal"


def _read(file: io.FileIO, path: Path) -> Iterator[Entry]:
    try:
        file.seek(0)
        data = file.read(MAX_SIZE + 1)
    except OSError as error:
        raise SourceError(f"the journal cannot be read: {error.strerror or error}", path=path) from error
    if len(data) > MAX_SIZE:
        raise InvalidSpec(f"larger than {MAX_SIZE} bytes: no journal", path=path)
    lines = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        entry = _entry(line)
        if entry is not None:
            yield entry
        elif _looks_torn(line):
            continue
        else:
            raise InvalidSpec(
                f"line {number} is no entry of a journal",
                hint="it says which files may be deleted on a host: repair or move it, do not guess",
                path=path,
            )


def _looks_torn(line: bytes) -> bool:
    """Whether the line is the beginning of an entry that was never finished."""
    return line.startswith(b'{"host"'[: len(line)]) and not line.rstrip().endswith(b"}")


def _entry(line: bytes) -> Entry | None:
    try:
        fields: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict) or set(fields) != set(Entry.__slots__):
        return None
    if not all(isinstance(value, str) for value in fields.values()):
        return None
    if fields["kind"] not in get_args(Kind) or fields["state"] not in get_args(State):
        return None
    return Entry(**fields)
