"""Lint, the user data: would this guest run it, and does it parse.

Archives are entered, gzip is unpacked within a limit. A ``#cloud-config`` is held against
`imagekit.cloudinit.cloudconfig`, and against cloud-init's own schema where cloud-init is installed. Nothing of the
content is quoted but names of settings: the rest may be secret.
"""

from __future__ import annotations

import difflib
import email
import zlib
from collections.abc import Iterator, Mapping
from email.errors import MessageError

import yaml

from imagekit.cloudinit.cloud_init_schema import schema_problems
from imagekit.cloudinit.cloudconfig import FLATCAR_KEYS, KEYS, NULLABLE, WINDOWS_KEYS, type_name
from imagekit.cloudinit.lint_rules import CLOUD_INIT, Problem
from imagekit.cloudinit.model import GuestProfile
from imagekit.cloudinit.specfile import load_yaml
from imagekit.cloudinit.userdata import MAX_USER_DATA, Kind, kind_of

MAX_UNPACKED = 16 << 20
MAX_DEPTH = 4
_BOM = b"\xef\xbb\xbf"
_RUNS: dict[GuestProfile, frozenset[Kind]] = {
    "windows": frozenset(
        ("cloud-config", "script", "powershell", "cmd", "tagged-script", "pem", "mime", "gzip", "boothook", "include")
    ),
    "flatcar": frozenset(("cloud-config", "script", "ignition", "gzip")),
    "fcos": frozenset(("ignition", "gzip")),
}
_OF_CLOUD_INIT: frozenset[Kind] = frozenset(
    (
        *("cloud-config", "cloud-config-archive", "cloud-config-jsonp", "jinja", "script", "include", "boothook"),
        *("part-handler", "mime", "gzip"),
    )
)
_NAMES: dict[Kind, str] = {
    "ignition": "an Ignition config",
    "tagged-script": "a script in tags",
    "pem": "a certificate",
}
_LF_ONLY: frozenset[Kind] = frozenset(("script", "boothook"))
_BY_TYPE: dict[str, Kind] = {
    "text/cloud-config": "cloud-config",
    "text/x-shellscript": "script",
    "text/cloud-boothook": "boothook",
    "text/jinja2": "jinja",
}


def problems(path: str, data: bytes, guest: GuestProfile, *, depth: int = 0) -> Iterator[Problem]:
    """What is wrong with user data."""
    if depth == 0 and len(data) > MAX_USER_DATA:
        yield Problem("user-data-size", f"{len(data)} bytes, {MAX_USER_DATA} are the most", path)
    if not data.strip():
        return
    if data.startswith(_BOM):
        yield Problem("user-data-bom", "it begins with a byte order mark", path)
        data = data[len(_BOM) :]
    yield from _content(path, data, kind_of(data), guest, depth)


def _content(path: str, data: bytes, kind: Kind, guest: GuestProfile, depth: int) -> Iterator[Problem]:
    if kind == "unknown":
        yield Problem("user-data-header", _mistaken(data), path)
        return
    if kind not in _RUNS.get(guest, _OF_CLOUD_INIT):
        yield Problem("user-data-kind", f"it is {_NAMES.get(kind, kind)}, for a {guest} guest", path)
        return
    if kind in _LF_ONLY and b"\r\n" in data.split(b"\n", 1)[0] + b"\n":
        yield Problem("user-data-crlf", "its first line ends with CR and LF", path)
    if kind == "cloud-config":
        yield from _cloud_config(path, data, guest)
    elif kind in ("mime", "gzip") and depth >= MAX_DEPTH:
        yield Problem("user-data-mime", f"packed {depth} times over", path)
    elif kind == "mime":
        yield from _archive(path, data, guest, depth)
    elif kind == "gzip":
        unpacker = zlib.decompressobj(wbits=31)
        try:
            unpacked = unpacker.decompress(data, MAX_UNPACKED)
        except zlib.error:
            unpacked = b""
        if unpacker.unconsumed_tail or not unpacker.eof:
            yield Problem("user-data-gzip", f"it is cut short, or more than {MAX_UNPACKED} bytes", path)
        else:
            yield from problems(f"{path}, unpacked", unpacked, guest, depth=depth + 1)


def _mistaken(data: bytes) -> str:
    """What was probably meant by the first line."""
    first = data.split(b"\n", 1)[0][:80].decode("utf-8", "replace").strip().lower()
    letters = "".join(c for c in first if c.isalpha())
    if first.startswith("#") and difflib.get_close_matches(letters, ["cloudconfig"], cutoff=0.8):
        return "its first line is nearly #cloud-config"
    try:
        values = load_yaml(data[:MAX_USER_DATA].decode("utf-8", "replace"))
    except (yaml.YAMLError, RecursionError, ValueError):
        values = None
    if isinstance(values, dict) and set(values) & KEYS.keys():
        return "it looks like a cloud-config whose first line, #cloud-config, is missing"
    return "its first line is none that a guest knows"


def _archive(path: str, data: bytes, guest: GuestProfile, depth: int) -> Iterator[Problem]:
    try:
        message = email.message_from_bytes(data)
    except (MessageError, ValueError, RecursionError):
        yield Problem("user-data-mime", "it cannot be parsed", path)
        return
    parts = [part for part in message.walk() if not part.is_multipart()]
    if not message.is_multipart() and message.get_content_type() not in _BY_TYPE:
        yield Problem("user-data-mime", "it has no parts", path)
        return
    for number, part in enumerate(parts, start=1):
        content = part.get_payload(decode=True)
        where = f"{path}, part {number}"
        if not isinstance(content, bytes) or not content.strip():
            yield Problem("user-data-mime", "it is empty", where)
            continue
        kind = _BY_TYPE.get(part.get_content_type(), kind_of(content))
        if kind == "unknown":  # a part of a type of its own, for a handler that came before
            continue
        yield from _content(where, content, kind, guest, depth + 1)


def _cloud_config(path: str, data: bytes, guest: GuestProfile) -> Iterator[Problem]:
    try:
        text = data.decode()
        values = load_yaml(text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        yield Problem("cloud-config-yaml", "it is not UTF-8", f"{path}, line {data.count(10, 0, error.start) + 1}")
        return
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = path if mark is None else f"{path}, line {mark.line + 1}, column {mark.column + 1}"
        problem = (error.problem or "").split("'")[0].strip() or "it cannot be parsed"
        yield Problem("cloud-config-yaml", problem, where)
        return
    except (yaml.YAMLError, ValueError, RecursionError):
        yield Problem("cloud-config-yaml", "it cannot be parsed", path)
        return
    if values is None:
        return
    if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
        yield Problem("cloud-config-type", f"it is {type_name(values)}, expected settings", path)
        return
    lines: dict[object, int] = {}
    for key_node, _ in node.value:
        key = getattr(key_node, "value", None)
        line = key_node.start_mark.line + 1
        if isinstance(key, str) and key in lines:
            yield Problem("cloud-config-yaml", f"{key!r} is given twice, the last wins", f"{path}, line {line}")
        lines[str(key)] = line
    yield from _settings(path, values, lines, guest)
    if guest in CLOUD_INIT:
        for objection in schema_problems(data):
            setting = objection.setting or "the whole"
            where = f"{path}, line {lines.get(setting.partition('.')[0], 1)}"
            yield Problem("cloud-config-schema", f"{setting}: {objection.message}", where)


def _settings(
    path: str, values: Mapping[object, object], lines: Mapping[object, int], guest: GuestProfile
) -> Iterator[Problem]:
    known = {"windows": WINDOWS_KEYS, "flatcar": FLATCAR_KEYS}.get(guest)
    for key, value in values.items():
        where = f"{path}, line {lines.get(str(key), 1)}"
        if not isinstance(key, str):
            yield Problem("cloud-config-type", "a setting has a name that is not text", where)
            continue
        if known is not None:
            if key not in known:
                yield Problem("cloud-config-subset", f"{key!r}", where)
            continue
        if key not in KEYS:
            close = difflib.get_close_matches(key, KEYS, n=1)
            meant = f", perhaps {close[0]!r} is meant" if close else ""
            yield Problem("cloud-config-key", f"there is no setting {key!r}{meant}", where)
            continue
        if type_name(value) not in KEYS[key] and not (value is None and key in NULLABLE):
            wanted = " or ".join(KEYS[key])
            yield Problem("cloud-config-type", f"{key} is {type_name(value)}, expected {wanted}", where)
        if key == "network" and guest in CLOUD_INIT:
            yield Problem("cloud-config-network", "there is a setting network", where)
