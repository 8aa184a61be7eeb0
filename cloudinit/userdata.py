"""User data: which kind it is, and how several become one.

Kinds are those of cloud-init ("User data formats"), cloudbase-init and Ignition, told by how the content begins.
Several parts become a MIME multi-part archive (RFC 2046), which cloud-init and cloudbase-init unpack; its
boundary derives from the content, so that the same parts give the same bytes.

What the spec asks for beyond the user's own data (a password, injected files where the data source has none,
Hyper-V's daemons) is one more ``#cloud-config`` part, merged so that lists grow and the user's values win.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from imagekit.cloudinit.model import Spec
from imagekit.cloudinit.passwords import hash_password
from imagekit.cloudinit.tree import Datasource
from imagekit.errors import InvalidSpec

MAX_USER_DATA = 65535
"""Bytes; the limit of Nova's user data."""

Kind = Literal[
    "cloud-config",
    "cloud-config-archive",
    "cloud-config-jsonp",
    "jinja",
    "script",
    "include",
    "boothook",
    "part-handler",
    "mime",
    "gzip",
    "powershell",
    "cmd",
    "tagged-script",
    "pem",
    "ignition",
    "unknown",
]
_BEGINNINGS: tuple[tuple[bytes, Kind], ...] = (
    (b"#cloud-config-archive", "cloud-config-archive"),
    (b"#cloud-config-jsonp", "cloud-config-jsonp"),
    (b"#cloud-config", "cloud-config"),
    (b"## template:", "jinja"),
    (b"#include", "include"),
    (b"#cloud-boothook", "boothook"),
    (b"#part-handler", "part-handler"),
    (b"#ps1", "powershell"),
    (b"#!", "script"),
    (b"rem cmd", "cmd"),
    (b"<script>", "tagged-script"),
    (b"<powershell>", "tagged-script"),
    (b"-----begin certificate", "pem"),
    (b"\x1f\x8b", "gzip"),
)
_MIME_TYPES: dict[Kind, str] = {
    "cloud-config": "text/cloud-config",
    "cloud-config-archive": "text/cloud-config-archive",
    "cloud-config-jsonp": "text/cloud-config-jsonp",
    "jinja": "text/jinja2",
    "script": "text/x-shellscript",
    "include": "text/x-include-url",
    "boothook": "text/cloud-boothook",
    "part-handler": "text/part-handler",
    "powershell": "text/x-shellscript",
    "cmd": "text/x-shellscript",
    "tagged-script": "text/x-shellscript",
    "gzip": "application/gzip",
}
_HYPERV_PACKAGES = {"debian12": "hyperv-daemons", "rhel": "hyperv-daemons"}
_HYPERV_BY_DISTRIBUTION = """\
{% if v1.distro == 'ubuntu' %}
packages: [linux-cloud-tools-virtual]
{% elif v1.distro in ('sles', 'opensuse', 'opensuse-leap', 'opensuse-tumbleweed') %}
packages: [hyper-v]
{% else %}
packages: [hyperv-daemons]
{% endif %}
"""
_MERGE = [
    {"name": "list", "settings": ["append"]},
    {"name": "dict", "settings": ["no_replace", "recurse_list"]},
    {"name": "str", "settings": ["no_replace"]},
]


@dataclass(frozen=True, slots=True)
class MimePart:
    """One part of a multi-part archive."""

    content: bytes
    type: str
    filename: str


def kind_of(data: bytes) -> Kind:
    """What guests will take this user data for."""
    start = data[:64].lstrip(b"\xef\xbb\xbf").lower()
    for beginning, kind in _BEGINNINGS:
        if start.startswith(beginning):
            return kind
    if start.startswith((b"content-type:", b"mime-version:", b"from ")):
        return "mime"
    return "ignition" if is_ignition(data) else "unknown"


def is_ignition(data: bytes) -> bool:
    """Whether it is JSON with an ``ignition`` section."""
    if not data.lstrip().startswith(b"{"):
        return False
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return isinstance(values, dict) and isinstance(values.get("ignition"), dict)


def build_user_data(spec: Spec, datasource: Datasource) -> bytes | None:
    """The user data of a guest, with everything that has to go there; None when there is nothing.

    Raises InvalidSpec when it is too long, or when something has to be added to data of a kind that takes nothing.
    """
    parts = [
        MimePart(part.content, part.type or _mime_type(part.content), part.filename or f"part-{number:03}")
        for number, part in enumerate(spec.user_data_parts, start=1)
    ]
    if spec.user_data is not None:
        parts = [MimePart(spec.user_data, "", "user-data")]
    own = own_part(spec, datasource, alone=not parts)
    if own is not None and parts:
        parts = [*(part if part.type else _typed(part) for part in parts), own]
    data = None if not parts and own is None else (own or parts[0]).content if not parts else _joined(parts, spec)
    if data is not None and len(data) > MAX_USER_DATA:
        raise InvalidSpec(
            f"user_data has {len(data)} bytes, a config drive takes {MAX_USER_DATA}",
            hint="compress it with gzip, which cloud-init unpacks, or fetch the rest with #include",
        )
    return data


def _joined(parts: list[MimePart], spec: Spec) -> bytes:
    return parts[0].content if len(parts) == 1 and not spec.user_data_parts else multipart(parts)


def _typed(part: MimePart) -> MimePart:
    return MimePart(part.content, _mime_type(part.content), part.filename)


def _mime_type(content: bytes) -> str:
    kind = kind_of(content)
    if kind == "mime":
        return "multipart/mixed"
    if kind not in _MIME_TYPES:
        raise InvalidSpec(
            f"user data that is {'an Ignition config' if kind == 'ignition' else 'of no kind that is known'} "
            "cannot be one of several parts",
            hint="begin it with #cloud-config or #!, or say its MIME type",
        )
    return _MIME_TYPES[kind]


def multipart(parts: list[MimePart]) -> bytes:
    """A MIME multi-part archive of the parts, in this order."""
    digest = hashlib.sha256(b"\0".join(part.type.encode() + b"\0" + part.content for part in parts)).hexdigest()
    boundary = f"=={digest[:32]}=="
    lines = [f'Content-Type: multipart/mixed; boundary="{boundary}"\nMIME-Version: 1.0\n\n'.encode()]
    for part in parts:
        lines.append(f"--{boundary}\n".encode())
        if part.type == "multipart/mixed":  # already an archive: it keeps its own headers, and is entered
            lines.append(part.content.rstrip(b"\n") + b"\n")
            continue
        plain = part.content.isascii() and b"\r" not in part.content and b"\0" not in part.content
        text = plain and all(len(line) < 998 for line in part.content.split(b"\n"))  # RFC 5322 2.1.1
        encoding = "7bit" if text else "base64"
        charset = '; charset="utf-8"' if part.type.startswith("text/") else ""
        filename = part.filename.replace("\\", "_").replace('"', "_")
        lines.append(
            f"Content-Type: {part.type}{charset}\nMIME-Version: 1.0\nContent-Transfer-Encoding: {encoding}\n"
            f'Content-Disposition: attachment; filename="{filename}"\n\n'.encode()
        )
        lines.append(part.content if text else base64.encodebytes(part.content))
        lines.append(b"\n")
    lines.append(f"--{boundary}--\n".encode())
    return b"".join(lines)


def own_part(spec: Spec, datasource: Datasource, *, alone: bool) -> MimePart | None:
    """What the spec asks the guest for through user data, besides the user's own."""
    _check_possible(spec, datasource)
    config: dict[str, Any] = {}
    if spec.guest != "windows":
        hashed = None
        if spec.password_hash is not None:
            hashed = spec.password_hash.get_secret_value()
        elif spec.password is not None:
            hashed = hash_password(spec.password.get_secret_value(), uuid=spec.uuid or spec.name)
        if hashed is not None:
            config |= {"password": hashed, "chpasswd": {"expire": False}}
    if datasource == "nocloud" and spec.files:
        config["write_files"] = [
            {"path": file.path, "encoding": "b64", "content": base64.b64encode(file.content).decode()}
            for file in spec.files
        ]
    by_distribution = spec.hyperv_tools and spec.guest == "linux"
    if spec.hyperv_tools and spec.guest in _HYPERV_PACKAGES:
        config["packages"] = [_HYPERV_PACKAGES[spec.guest]]
    if not config and not by_distribution:
        return None
    if not alone:
        config["merge_how"] = _MERGE
    text = "#cloud-config\n" + (yaml.safe_dump(config, sort_keys=True, width=1000) if config else "")
    if by_distribution:
        return MimePart(f"## template: jinja\n{text}{_HYPERV_BY_DISTRIBUTION}".encode(), "text/jinja2", "imagekit")
    return MimePart(text.encode(), "text/cloud-config", "imagekit")


def _check_possible(spec: Spec, datasource: Datasource) -> None:
    has_password = spec.password is not None or spec.password_hash is not None
    if has_password and spec.guest in ("flatcar", "fcos"):
        raise InvalidSpec(
            f"a password for a {spec.guest} guest, whose metadata has no place for one",
            hint="put passwordHash of a user into its Ignition config",
        )
    if spec.password_hash is not None and spec.guest == "windows":
        raise InvalidSpec("Windows takes no password hash", hint="give the password itself")
    if has_password and spec.guest == "windows" and datasource == "nocloud":
        raise InvalidSpec(
            "NoCloud has no place for the administrator's password of Windows", hint="use --datasource configdrive"
        )
    if spec.hyperv_tools and spec.guest in ("flatcar", "fcos"):
        raise InvalidSpec(
            f"Hyper-V's daemons cannot be installed in a {spec.guest} guest: its system is read-only",
            hint="run them in a container, by its Ignition config",
        )
