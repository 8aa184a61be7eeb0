"""What a confined process and the one that started it say to each other.

One stream socket, no names. The starter's first message is trusted and a pickle; everything the confined process
says is JSON, taken apart here piece by piece: it may have been taken over by an image. Open files go along with a
message (SCM_RIGHTS), only ever towards the confined process.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from imagekit import errors
from imagekit.errors import ImagekitError, UnsafeImage
from imagekit.formats.base import JSON, Fact, ImageInfo, Reference
from imagekit.pictures import MOST_CELLS
from imagekit.plan import ConvertOptions
from imagekit.policy import Finding, Severity
from imagekit.progress import Progress
from imagekit.records import dataclass
from imagekit.report import Report

HEADER = struct.Struct("=IB")
"""Length of the message, number of files that come with it."""
MOST = 64 << 20
"""Bytes of a message."""
MOST_FILES = 4


@dataclass(frozen=True, slots=True)
class Job:
    """What a confined process is to do, with the files that come along: the source, and the target's parent."""

    do: Literal["convert", "info", "look"]
    options: ConvertOptions
    names: tuple[str, ...]
    """Of the files, as the caller knows them."""

    target: str = ""
    target_format: str = ""
    deep: bool = False
    """Whether ``info`` looks at all tables."""

    coming: int | None = None
    """The size of a source that is still coming; a socket comes along as the last of the files then."""


class ChannelClosed(Exception):
    """The other side is gone."""


class Nonsense(Exception):
    """The other side said what it never says unless something went wrong there."""


Understood = TypeVar("Understood")


def understood(understand: Callable[[Any], Understood], said: Any) -> Understood:
    """What was said, taken apart; Nonsense when it is not what it should be."""
    try:
        return understand(said)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise Nonsense(f"it said what makes no sense: {error!r}") from error


class Channel:
    """Messages over one socket, used by one thread."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def send(self, data: bytes, files: tuple[int, ...] = ()) -> None:
        try:
            head = HEADER.pack(len(data), len(files))
            if files and sys.platform != "win32":
                socket.send_fds(self._socket, [head], list(files))
                self._socket.sendall(data)
            else:
                self._socket.sendall(head + data)
        except OSError as error:
            raise ChannelClosed from error

    def say(self, **message: JSON) -> None:
        """Send a JSON object."""
        self.send(json.dumps(message).encode())

    def receive(self) -> tuple[bytes, list[int]]:
        """The next message, with the open files that came along."""
        try:
            if sys.platform == "win32":
                raise OSError("files cannot be sent along here")
            head, files, _, _ = socket.recv_fds(self._socket, HEADER.size, MOST_FILES)
        except OSError as error:
            raise ChannelClosed from error
        head += self._exactly(HEADER.size - len(head)) if head else b""
        if not head:
            raise ChannelClosed
        length, count = HEADER.unpack(head)
        if length > MOST or count != len(files):
            raise Nonsense(f"a message of {length} bytes")
        return self._exactly(length), files

    def hear(self, timeout: float | None) -> dict[str, Any] | None:
        """The JSON object that the confined process says next; None when it says nothing in so many seconds."""
        if not select.select([self._socket], [], [], timeout)[0]:
            return None
        self._socket.settimeout(10.0)  # who starts a message also ends it
        data, _ = self.receive()
        return understood(_as_object, data)

    def _exactly(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            try:
                piece = self._socket.recv(min(length - len(data), 1 << 20))
            except OSError as error:
                raise ChannelClosed from error
            if not piece:
                raise ChannelClosed
            data += piece
        return bytes(data)

    def close(self) -> None:
        self._socket.close()


# --- errors ------------------------------------------------------------------------------------------------------


def error_message(error: ImagekitError) -> dict[str, JSON]:
    """An error as JSON."""
    return {
        "kind": type(error).__name__,
        "message": error.message,
        "hint": error.hint,
        "path": error.path,
        "offset": error.offset,
        "rule": error.rule if isinstance(error, UnsafeImage) else None,
    }


def as_error(said: Any) -> ImagekitError:
    """The same error, of the same kind."""
    message, hint, path, rule = (_text_or_none(said.get(name)) for name in ("message", "hint", "path", "rule"))
    offset = said.get("offset")
    kind = getattr(errors, str(said.get("kind")), None)
    if not (isinstance(kind, type) and issubclass(kind, ImagekitError)):
        kind = ImagekitError
    more: dict[str, Any] = {"rule": rule or ""} if kind is UnsafeImage else {}
    return kind(message or "", hint=hint, path=path, offset=_number(offset) if offset is not None else None, **more)


def _as_object(data: bytes) -> dict[str, Any]:
    message = json.loads(data)
    if not isinstance(message, dict):
        raise TypeError("not an object")
    return message


def _text_or_none(value: Any) -> str | None:
    return None if value is None else str(value)


def _number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is not a number")
    return value


# --- results -----------------------------------------------------------------------------------------------------


def report_message(report: Report) -> dict[str, JSON]:
    lists = ("notes", "confinement", "source_map", "target_map")
    values = {name: getattr(report, name) for name in Report.__match_args__}
    return {name: list(value) if name in lists else value for name, value in values.items()}


def as_report(said: Any) -> Report:
    texts = ("source", "source_format", "target", "target_format", "subformat", "identifier", "verified")
    numbers = (
        *("source_size", "source_virtual_size", "virtual_size", "target_size"),
        *("data_bytes", "kernel_copied_bytes"),
    )
    values: dict[str, Any] = {name: str(said[name]) for name in texts}
    values |= {name: _number(said[name]) for name in numbers}
    values |= {name: _map(said[name]) for name in ("source_map", "target_map")}
    return Report(**values, seconds=0.0, notes=tuple(str(note) for note in said["notes"]))


def _map(said: Any) -> tuple[int, ...]:
    if len(said) > MOST_CELLS:
        raise ValueError(f"a map of {len(said)} parts")
    return tuple(min(100, max(0, _number(one))) for one in said)


def info_message(info: ImageInfo) -> dict[str, JSON]:
    """What ``info`` shows of the headers; what else the image knows stays where it is read."""
    return {
        "format": info.format,
        "virtual_size": info.virtual_size,
        "subformat": info.subformat,
        "block_size": info.block_size,
        "features": dict(info.features),
        "references": [{"kind": one.kind, "name": one.name, "format": one.format} for one in info.references],
        "facts": [{"code": one.code, "message": one.message, "offset": one.offset} for one in info.facts],
    }


def as_info(said: Any) -> ImageInfo:
    kinds = ("backing-file", "data-file", "parent-file", "extent-file")
    block_size = said["block_size"]
    return ImageInfo(
        format=str(said["format"]),
        virtual_size=_number(said["virtual_size"]),
        subformat=_text_or_none(said["subformat"]),
        block_size=None if block_size is None else _number(block_size),
        features=dict(said["features"]),
        references=tuple(
            Reference(one["kind"], str(one["name"]), _text_or_none(one["format"]))
            for one in said["references"]
            if one["kind"] in kinds
        ),
        facts=tuple(Fact(str(one["code"]), str(one["message"]), _offset(one)) for one in said["facts"]),
    )


def finding_message(finding: Finding) -> dict[str, JSON]:
    return {**finding.to_json(), "offset": finding.offset}


def as_finding(said: Any) -> Finding:
    return Finding(str(said["rule"]), str(said["message"]), Severity(said["severity"]), _offset(said))


def _offset(said: Any) -> int | None:
    return None if said["offset"] is None else _number(said["offset"])


# --- references --------------------------------------------------------------------------------------------------


def reference_message(reference: Reference) -> dict[str, JSON]:
    """What it takes to look for the file."""
    return {
        "kind": reference.kind,
        "name": reference.name,
        "format": reference.format,
        "names": list(reference.names),
    }


@dataclass(frozen=True, slots=True)
class Request:
    """What a confined process may ask for: an open file."""

    kind: Literal["target", "scratch", "reference"]
    name: str = ""
    """Of a file to unpack to, for messages."""

    needed: int = 0
    file_size: int = 0
    """Of a target: bytes to be written, and its length."""

    reference: Reference | None = None
    origin: str = ""
    skip: int = 0
    """The file that refers to another, and how many that it may mean were looked at already."""


def as_request(said: Any) -> Request:
    kind = said["ask"]
    if kind == "target":
        return Request("target", needed=_number(said["needed"]), file_size=_number(said["file_size"]))
    if kind == "scratch":
        return Request("scratch", name=str(said["name"]))
    if kind == "reference":
        found = as_reference(said["reference"])
        return Request("reference", reference=found, origin=str(said["origin"]), skip=_number(said["skip"]))
    raise ValueError(f"it asked for {kind!r}")


def as_progress(said: Any) -> Progress:
    phase, done, total = said
    return Progress(str(phase), _number(done), _number(total))


def as_reference(said: Any) -> Reference:
    if said["kind"] not in ("backing-file", "data-file", "parent-file", "extent-file"):
        raise TypeError(f"{said['kind']!r} is no kind of reference")
    names = tuple(str(name) for name in said["names"])
    return Reference(said["kind"], str(said["name"]), _text_or_none(said["format"]), names=names)
