"""Undo what the journal names: settle what is uncertain, then remove in reverse order.

Nothing is removed because of its name alone. A file goes when the journal says that we made it; one that was only
begun is looked at first. A machine goes when its notes carry our uuid, or when it has none and lies in our own
folder. A folder goes when it is empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from imagekit.errors import ToolError
from imagekit.hyperv.host import Host
from imagekit.hyperv.journal import Entry, Journal
from imagekit.hyperv.push import hash_seconds
from imagekit.hyperv.request import is_below


def settle(host: Host, journal: Journal, digests: Mapping[str, tuple[int, str]]) -> None:
    """Find out about files that were begun and whose end nobody saw; ``digests`` by final path: size, SHA-256.

    Publishing renames: while the ``.part`` is there it has not happened, so a file with the final name is another's;
    when the part is gone and the file is what we sent, it is ours.
    """
    for entry in journal.present("file"):
        if entry.state != "begun" or _is_part(entry.what):
            continue
        part = _part_of(entry, journal)
        pending = part is not None and host.call("file-info", {"path": part, "hash": False, "size": 0})["exists"]
        expected = digests.get(entry.what.lower())
        ours = False
        if expected is not None and not pending:
            size, sha256 = expected
            query = {"path": entry.what, "hash": True, "size": size}
            found = host.call("file-info", query, timeout=hash_seconds(size))
            ours = bool(found["exists"]) and found["size"] == size and found.get("sha256") == sha256
        if ours:
            journal.made("file", entry.what)
        else:
            journal.gone("file", entry.what)


def remove(host: Host, journal: Journal, entries: Iterable[Entry], machines: list[dict[str, Any]]) -> list[str]:
    """Remove what ``entries`` name, in their order; returns what was removed. ``machines``: those that are ours."""
    removed = []
    for entry in entries:
        if entry.kind == "machine":
            for machine in machines:
                host.call("delete", {"id": machine["id"], "uuid": machine.get("uuid") or ""})
                removed.append(f"machine {machine['name']}")
        elif entry.kind == "file":
            if host.call("remove-file", {"path": entry.what})["removed"]:
                removed.append(entry.what)
        elif host.call("remove-folder", {"path": entry.what})["removed"]:
            removed.append(entry.what)
        journal.gone(entry.kind, entry.what)
    return removed


def ours(found: Iterable[dict[str, Any]], *, uuid: str, name: str, folder: str) -> list[dict[str, Any]]:
    """Of the machines a host showed, those that are ours: with our uuid, or nameless in our own folder.

    A run that was killed between making a machine and writing its notes leaves one without a uuid; it lies in a
    folder whose name carries ours, where nobody else puts anything.
    """
    return [
        machine
        for machine in found
        if machine.get("uuid") == uuid
        or (not machine.get("uuid") and machine["name"] == name and is_below(machine["path"], folder))
    ]


def try_remove(host: Host, journal: Journal, entries: list[Entry], machines: list[dict[str, Any]]) -> list[str]:
    """Like :func:`remove`, but goes on after a failure; returns what is left behind, in words."""
    left = []
    for entry in entries:
        try:
            remove(host, journal, [entry], machines)
        except ToolError as error:
            left.append(f"{entry.kind} {entry.what} ({error.message})")
    return left


def _is_part(path: str) -> bool:
    return path.endswith(".part")


def _part_of(entry: Entry, journal: Journal) -> str | None:
    for other in journal.present("file"):
        if (
            _is_part(other.what)
            and other.run == entry.run
            and other.what.lower().startswith(entry.what.lower() + ".")
        ):
            return other.what
    return None
