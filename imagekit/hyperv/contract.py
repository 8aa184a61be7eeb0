"""The contract between the stage and a host: each operation, what it is told, what it must answer.

Both sides are checked against this table: parameters before they are sent, results before they are believed, and the
model of a host in our tests answers within it. What an operation does is said here in a line; how, in its script.

An answer is ``{"ok": true, "result": {…}}`` or ``{"ok": false, "error": {"kind": …, "message": …}}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from imagekit.errors import ImagekitError
from imagekit.hyperv.transport import HostError, TransportError
from imagekit.records import dataclass, field

ERROR_KINDS = frozenset(
    (
        *("denied", "exists", "not-found", "in-use", "mismatch"),
        *("invalid", "sparse", "unsupported", "timeout", "failed"),
    )
)
MAX_MESSAGE = 2000

Fields = Mapping[str, type | tuple[type, ...]]
_NONE = type(None)
_OPTIONAL_TEXT = (str, _NONE)


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation. ``result`` names what must be there; an answer may hold more. ``changes``: the host."""

    does: str
    parameters: Fields = field(default_factory=dict)
    result: Fields = field(default_factory=dict)
    changes: bool = True


_ID: Fields = {"id": str}
_PATH: Fields = {"path": str}

OPERATIONS: dict[str, Operation] = {
    "probe": Operation("what kind of host it is", {}, {"family": str, "store": str}, changes=False),
    "preflight": Operation(
        "folder, free space, memory and switches",
        {"store": str, "bytes": int, "memory": int, "switches": list},
        {"problems": list},
        changes=False,
    ),
    "find": Operation(
        "machines with this uuid in their notes, or with this name",
        {"uuid": str, "name": str, "folder": str},
        {"machines": list},
        changes=False,
    ),
    "file-info": Operation(
        "whether a file is there, its size and SHA-256",
        {"path": str, "hash": bool, "size": int},
        {"exists": bool},
        changes=False,
    ),
    "make-folder": Operation("make a folder; says whether it had to", _PATH, {"created": bool}),
    "write-chunk": Operation(
        "append to a new file at exactly this offset", {"path": str, "offset": int, "data": str}, {"size": int}
    ),
    "publish-file": Operation(
        "check size and SHA-256, make it fit for Hyper-V, give it its name; never replaces a file",
        {"part": str, "path": str, "size": int, "sha256": str},
    ),
    "remove-file": Operation("remove one file", _PATH, {"removed": bool}),
    "remove-folder": Operation("remove a folder if it is empty", _PATH, {"removed": bool}),
    "create": Operation(
        "make the machine, unless its name or uuid is taken, and write its notes",
        {"uuid": str, "name": str, "folder": str, "generation": int, "cpus": int, "memory": int, "spec": str},
        {"id": str},
    ),
    "configure": Operation(
        "network adapters, serial pipe, firmware tables, key-value pairs, integration services",
        {
            **_ID,
            "nics": list,
            "pipe": str,
            "serial_number": _OPTIONAL_TEXT,
            "asset_tag": _OPTIONAL_TEXT,
            "kvp": dict,
        },
    ),
    "attach": Operation(
        "disks and DVDs in their slots, start order, Secure Boot",
        {**_ID, "media": list, "secure_boot": bool, "template": _OPTIONAL_TEXT},
    ),
    "finish": Operation("say in the notes that the machine is complete", {**_ID, "spec": str}),
    "start": Operation("switch it on", _ID),
    "observe": Operation(
        "state, heartbeat, addresses from the guest and from the host's neighbour table",
        {**_ID, "macs": list},
        {"state": str, "heartbeat": _OPTIONAL_TEXT, "addresses": list, "neighbours": list},
        changes=False,
    ),
    "read-serial": Operation(
        "listen at the serial pipe for some seconds", {**_ID, "seconds": int}, {"data": str}, changes=False
    ),
    "eject": Operation("take the medium out of the DVD drives", _ID),
    "stop": Operation("shut down, or switch off", {**_ID, "force": bool}),
    "delete": Operation("switch off and remove the machine, no file", {**_ID, "uuid": str}, {"deleted": bool}),
    "selftest": Operation("versions, cmdlets, switches, volumes, rights", {}, {"checks": list}, changes=False),
    "hash-disk": Operation(
        "attach a disk read-only, hash its content, detach it", _PATH, {"size": int, "sha256": str}, changes=False
    ),
}

_MACHINE: Fields = {"id": str, "name": str, "uuid": str, "spec": str, "stage": str, "state": str, "path": str}


def check_parameters(operation: str, parameters: Mapping[str, Any]) -> None:
    """A mistake of ours, found before anything is sent."""
    known = OPERATIONS[operation].parameters
    wrong = set(known) ^ set(parameters)
    wrong |= {name for name in set(known) & set(parameters) if not _fits(parameters[name], known[name])}
    if wrong:
        raise ImagekitError(f"the operation {operation} was asked with wrong {', '.join(sorted(wrong))}")


def judge(operation: str, answer: Mapping[str, Any], target: str) -> dict[str, Any]:
    """The result of an answer. Raises HostError for a failure, TransportError for what is no answer."""
    if answer.get("ok") is False and isinstance(answer.get("error"), dict):
        raise _failure(operation, answer["error"], target)
    result = answer.get("result")
    if answer.get("ok") is not True or not isinstance(result, dict):
        raise TransportError(f"{target} gave no answer to {operation}")
    for name, kind in OPERATIONS[operation].result.items():
        _need(operation, result, name, kind, target)
    if operation == "find":
        for machine in result["machines"]:
            if not isinstance(machine, dict):
                raise TransportError(f"{target} answered {operation} with a machine that is none")
            for name, kind in _MACHINE.items():
                _need(operation, machine, name, kind, target)
    if operation == "preflight" and not all(isinstance(one, dict) and "message" in one for one in result["problems"]):
        raise TransportError(f"{target} answered {operation} with a problem that says nothing")
    if operation == "file-info" and result["exists"]:
        _need(operation, result, "size", int, target)
    return result


def _failure(operation: str, error: Mapping[str, Any], target: str) -> HostError:
    kind = str(error.get("kind") or "failed")
    words = " ".join(str(error.get("message") or "it does not say why").split())[:MAX_MESSAGE]
    return HostError(
        f"{target}, {operation}: {words}", kind=kind if kind in ERROR_KINDS else "failed", hint=HINTS.get(kind)
    )


HINTS = {
    "denied": "the account must be in Hyper-V Administrators and may write to the folder",
    "sparse": "the file must be neither sparse, compressed nor encrypted (0xC03A001A)",
    "in-use": "another machine or program has the file open",
    "unsupported": "`imagekit hyperv selftest` shows what this host can do",
}


def _need(operation: str, values: Mapping[str, Any], name: str, kind: type | tuple[type, ...], target: str) -> None:
    if name not in values or not _fits(values[name], kind):
        raise TransportError(f"{target} answered {operation} without a {name} of the kind expected")


def _fits(value: object, kind: type | tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, kind)
