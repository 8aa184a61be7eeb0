"""Lists what is on a medium without giving away what is secret: paths, sizes, and what can be shown of the content.

Shown are the files that are descriptions: metadata, network data. Of them never a value whose name suggests a secret,
nor any value of ``meta``, where users keep what they like; of SSH keys the type, fingerprint and comment. Of user
data, vendor data and injected files only what they are and how long: any of them may hold a password.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from imagekit.cloudinit.agents import MAX_JSON, MAX_YAML, describe_user_data
from imagekit.cloudinit.specfile import parse_yaml
from imagekit.errors import InvalidSpec

HIDDEN = "(not shown)"
_SECRET = re.compile(r"pass|secret|token|private|seed|credential|auth(?!ori[sz]ed)|cert", re.IGNORECASE)
_KEY = re.compile(r"(?P<type>[a-z0-9@.-]+) +(?P<body>[A-Za-z0-9+/=]{16,})(?: +(?P<comment>.*))?", re.DOTALL)
_MAX_DEPTH = 32
_MAX_TEXT = 400


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a medium. ``content`` is what can be shown of it, None where nothing can."""

    path: str
    size: int
    what: str
    content: Any = None
    same_as: str | None = None
    """The first file with the same bytes."""

    def to_json(self) -> dict[str, Any]:
        out = {"path": self.path, "size": self.size, "what": self.what}
        more = {"content": self.content, "same-as": self.same_as}
        return out | {key: value for key, value in more.items() if value is not None}


def manifest(tree: Mapping[str, bytes]) -> tuple[Entry, ...]:
    """Every file of ``tree``, in the order of their paths; the content of equal files is shown once."""
    first: dict[bytes, str] = {}
    entries = []
    for path, data in sorted(tree.items()):
        original = first.setdefault(data, path)
        what, content = _describe(path, data)
        same = None if original == path or not data else original
        entries.append(Entry(path, len(data), what, None if same else content, same))
    return tuple(entries)


def _describe(path: str, data: bytes) -> tuple[str, Any]:
    name = path.rpartition("/")[2]
    if name in ("meta_data.json", "meta-data.json", "meta-data"):
        return "metadata", _structure(data, is_json=name.endswith(".json"))
    if name in ("network_data.json", "network-config"):
        return "network", _structure(data, is_json=name.endswith(".json"))
    if name.startswith(("vendor_data", "vendor-data")):
        return "vendor data", None
    if name in ("user_data", "user-data", "user_data.txt"):
        return f"user data: {describe_user_data(data)}", None
    if path.startswith("cloudstack/metadata/"):
        return "metadata", HIDDEN if _SECRET.search(name) else _value(_text(data).strip())
    if "password" in path.lower():
        return "password", HIDDEN if data else None
    return "file", None


def _structure(data: bytes, *, is_json: bool) -> Any:
    if len(data) > (MAX_JSON if is_json else MAX_YAML):
        return f"(too long to be shown: {len(data)} bytes)"
    try:
        value = json.loads(data) if is_json else dict(parse_yaml(data.decode("utf-8-sig")).values)
        return _value(value)
    except (ValueError, InvalidSpec, RecursionError):
        return f"(not {'JSON' if is_json else 'YAML'})"


def _value(value: Any, depth: int = 0) -> Any:
    """The value without what is secret in it."""
    if depth > _MAX_DEPTH:
        return "(nested too deep to be shown)"
    if isinstance(value, Mapping):
        return {
            str(name)[:_MAX_TEXT]: _hidden(inner, names_only=True)
            if name == "meta"
            else HIDDEN
            if _SECRET.search(str(name))
            else _value(inner, depth + 1)
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_value(item, depth + 1) for item in value]
    if isinstance(value, str):
        key = _KEY.fullmatch(value.strip())
        if key is not None:
            return _fingerprint(key)
        return value if len(value) <= _MAX_TEXT else f"(text of {len(value)} characters)"
    return value


def _hidden(value: Any, *, names_only: bool) -> Any:
    if names_only and isinstance(value, Mapping):
        return {str(name)[:_MAX_TEXT]: HIDDEN for name in value}
    return HIDDEN


def _fingerprint(key: re.Match[str]) -> str:
    """As ``ssh-keygen -l`` shows it."""
    try:
        body = base64.b64decode(key["body"], validate=True)
    except binascii.Error:
        return HIDDEN
    digest = base64.b64encode(hashlib.sha256(body).digest()).decode().rstrip("=")
    return f"{key['type']} SHA256:{digest} {key['comment'] or ''}".rstrip()[:_MAX_TEXT]


def _text(data: bytes) -> str:
    return data[: 2 * _MAX_TEXT].decode("utf-8", "replace")
