"""What the agents inside guests see of a medium: whether they find it, what they read of it, what they leave.

A table of the rules that the agents themselves follow, as their sources have them (cloud-init 22.4 to 26.2,
cloudbase-init 1.1.9, Ignition 2.26, Afterburn 5.9, Flatcar's coreos-cloudinit): labels, file systems, folders, and
the fields they need. Facts, not advice: what is unwise although it is read is the business of lint. No secret is in
what comes out: of passwords and user data only that they are there.

The medium may come from anyone: what cannot be parsed is said, never raised.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from imagekit.cloudinit.specfile import parse_yaml
from imagekit.cloudinit.userdata import Kind, is_ignition, kind_of
from imagekit.errors import InvalidSpec

CLOUD_INIT_VERSIONS = (
    *("2012-08-10", "2013-04-04", "2013-10-17", "2015-10-15"),
    *("2016-06-30", "2016-10-06", "2017-02-22", "2018-08-27"),
)
"""The folders that cloud-init asks for; it takes the newest that is there, else ``latest``."""
LATEST = "openstack/latest"
MAX_JSON, MAX_YAML = 1 << 20, 1 << 18
"""Bytes of a file that is parsed; Nova's largest have some KiB."""
_MAX_SHOWN = 8  # names in a row
_MAX_TEXT = 200


@dataclass(frozen=True, slots=True)
class Medium:
    """A file system as agents meet it: ``linux`` and ``windows`` are path to content, under either system's names."""

    label: str
    file_system: Literal["iso9660", "vfat"]
    linux: Mapping[str, bytes]
    windows: Mapping[str, bytes]
    partitioned: bool = False
    disk: bool = False
    """Whether it is a disk's content for sure; a file that is nothing but ISO 9660 is a DVD as well."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What one agent makes of a medium. ``facts`` are only there when it is ``found``."""

    agent: str
    system: Literal["Linux", "Windows"]
    found: bool
    reason: str
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "agent": self.agent,
            "system": self.system,
            "found": self.found,
            "reason": self.reason,
            "facts": self.facts,
        }


class _NotFound(Exception):
    """Why an agent does not take the medium."""


def what_agents_see(medium: Medium) -> tuple[Seen, ...]:
    """Every agent's view, in one order."""
    return tuple(_ask(agent, medium) for agent in _AGENTS)


@dataclass(frozen=True, slots=True)
class _Agent:
    name: str
    system: Literal["Linux", "Windows"]
    read: Callable[[Medium], tuple[str, dict[str, Any]]]


def _ask(agent: _Agent, medium: Medium) -> Seen:
    try:
        reason, facts = agent.read(medium)
    except _NotFound as error:
        return Seen(agent.name, agent.system, False, str(error))
    shown = {key: _shown(value) for key, value in facts.items() if value not in (None, "", [], {})}
    return Seen(agent.name, agent.system, True, reason, shown)


def _shown(value: object) -> str | list[str]:
    """A value of a medium that anyone may have made, as text of bearable length."""
    if isinstance(value, list):
        return [text for item in value if isinstance(text := _shown(item), str)]
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}…"


# --- what they have in common ----------------------------------------------------------------------------------


def _need_label(medium: Medium, *labels: str, ignore_case: bool = False) -> None:
    same = [label for label in labels if medium.label == label or (ignore_case and medium.label.lower() == label)]
    if not same:
        raise _NotFound(f"the label is {medium.label!r}, it looks for {' or '.join(labels)}")


def _content(tree: Mapping[str, bytes], path: str) -> bytes:
    if path not in tree:
        raise _NotFound(f"there is no {path}")
    return tree[path]


def _json(data: bytes, path: str) -> Any:
    if len(data) > MAX_JSON:
        raise _NotFound(f"{path} has {len(data)} bytes, {MAX_JSON} are the most that is read here")
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise _NotFound(f"{path} is not JSON") from None


def _fields(data: bytes, path: str) -> dict[str, Any]:
    value = _json(data, path)
    if not isinstance(value, dict):
        raise _NotFound(f"{path} is not a JSON object")
    return value


def _optional(tree: Mapping[str, bytes], path: str) -> dict[str, Any] | None:
    """A JSON file that the agent can do without; it cannot do with one that is broken."""
    return _fields(tree[path], path) if path in tree else None


def describe_user_data(data: bytes | None) -> str | None:
    """What user data is, by the way it begins, and how long; nothing of what it says."""
    if data is None:
        return None
    if not data:
        return "empty"
    kind = kind_of(data if len(data) <= MAX_JSON else data[:MAX_JSON])
    return f"{_KINDS.get(kind, kind)}, {len(data)} bytes"


_KINDS: dict[Kind, str] = {
    "jinja": "Jinja template",
    "include": "list of addresses to fetch",
    "boothook": "boot hook",
    "mime": "MIME multi-part",
    "powershell": "PowerShell",
    "cmd": "batch script",
    "tagged-script": "batch script or PowerShell",
    "pem": "X.509 certificate",
    "ignition": "Ignition",
    "unknown": "nothing that agents know by its first line",
}


def _is_ignition(data: bytes) -> bool:
    return len(data) <= MAX_JSON and is_ignition(data)


def _key_names(meta: Mapping[str, Any]) -> list[str]:
    """The names of the SSH keys, or how many when they have none."""
    keys = meta.get("public_keys", meta.get("public-keys"))
    if isinstance(keys, dict):
        return sorted(str(name) for name in keys)
    if isinstance(keys, list):
        return [f"key {number}" for number in range(1, len(keys) + 1)]
    return ["key 1"] if isinstance(keys, str) and keys else []


def _some(names: list[str]) -> list[str]:
    return names if len(names) <= _MAX_SHOWN else [*names[:_MAX_SHOWN], f"and {len(names) - _MAX_SHOWN} more"]


def _list(value: object) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _network(data: Mapping[str, Any] | None) -> dict[str, Any]:
    """network_data.json in a few words: adapters by MAC address, addresses, name servers."""
    if data is None:
        return {"network": "not said: the guest asks DHCP"}
    links, networks = _list(data.get("links")), _list(data.get("networks"))
    if not links or not networks:
        return {"network": "none: no adapter is configured, and DHCP is not asked either"}
    macs = {str(link.get("id")): str(link.get("ethernet_mac_address", link.get("type"))) for link in links}
    said = [
        f"{one.get('link')} ({macs.get(str(one.get('link')), 'no such link')}): {one.get('type')}"
        + (f" {one['ip_address']}" if "ip_address" in one else "")
        for one in networks
    ]
    servers = [str(service.get("address")) for service in _list(data.get("services"))]
    return {"network": _some(said), "dns": _some(servers)}


# --- the agents ------------------------------------------------------------------------------------------------


def _cloud_init_config_drive(medium: Medium) -> tuple[str, dict[str, Any]]:
    _need_label(medium, "config-2", "CONFIG-2")
    tree = medium.linux
    there = [version for version in CLOUD_INIT_VERSIONS if any(p.startswith(f"openstack/{version}/") for p in tree)]
    folder = f"openstack/{there[-1]}" if there else LATEST
    meta = _fields(_content(tree, f"{folder}/meta_data.json"), f"{folder}/meta_data.json")
    if not meta.get("uuid"):
        raise _NotFound(f"{folder}/meta_data.json has no uuid, which it takes for the instance id")
    network = _optional(tree, f"{folder}/network_data.json")
    for vendor in ("vendor_data.json", "vendor_data2.json"):
        if f"{folder}/{vendor}" in tree:
            _json(tree[f"{folder}/{vendor}"], f"{folder}/{vendor}")
    facts = {
        "folder": folder,
        "instance-id": meta["uuid"],
        "hostname": meta.get("hostname"),
        "keys": _some(_key_names(meta)),
        "user-data": describe_user_data(tree.get(f"{folder}/user_data")),
        "files": _some(list(_injected(tree, meta))),
    }
    if network is None and isinstance(meta.get("network_config"), dict):
        return "by its label", {**facts, "network": "the /etc/network/interfaces that network_config names"}
    return "by its label", {**facts, **_network(network)}


def _injected(tree: Mapping[str, bytes], meta: Mapping[str, Any]) -> Iterator[str]:
    for one in _list(meta.get("files")):
        content = "openstack/" + str(one.get("content_path", "")).lstrip("/")
        missing = "" if content in tree else f" ({content} is missing, so nothing is read at all)"
        yield f"{one.get('path')}{missing}"


def _cloud_init_no_cloud(medium: Medium) -> tuple[str, dict[str, Any]]:
    _need_label(medium, "cidata", "CIDATA")
    return "by its label", _no_cloud(medium.linux)


def _no_cloud(tree: Mapping[str, bytes]) -> dict[str, Any]:
    meta = _yaml(_content(tree, "meta-data"), "meta-data")
    user_data = _content(tree, "user-data")
    facts = {
        "instance-id": meta.get("instance-id") or "nocloud (the default of every guest without one)",
        "hostname": meta.get("local-hostname"),
        "keys": _some(_key_names(meta)),
        "user-data": describe_user_data(user_data),
    }
    if "network-config" not in tree:
        return {**facts, "network": "not said: the guest asks DHCP"}
    config = _yaml(tree["network-config"], "network-config")
    inner = config.get("network", config)
    version = inner.get("version") if isinstance(inner, Mapping) else None
    return {**facts, "network": f"network-config, version {version}" if version in (1, 2) else "no version: not read"}


def _yaml(data: bytes, path: str) -> Mapping[str, Any]:
    if len(data) > MAX_YAML:
        raise _NotFound(f"{path} has {len(data)} bytes, {MAX_YAML} are the most that is read here")
    try:
        return parse_yaml(data.decode("utf-8-sig")).values
    except UnicodeDecodeError:
        raise _NotFound(f"{path} is not UTF-8 text") from None
    except (InvalidSpec, RecursionError) as error:
        reason = error.message if isinstance(error, InvalidSpec) else "nested too deep"
        raise _NotFound(f"{path}: {reason}") from None


def _cloudbase_init_config_drive(medium: Medium) -> tuple[str, dict[str, Any]]:
    _need_label_in_windows(medium, "config-2")
    tree = _without_case(medium.windows)
    meta = _fields(_content(tree, f"{LATEST}/meta_data.json"), f"{LATEST}/meta_data.json")
    inner = meta.get("meta")
    more: Mapping[str, Any] = inner if isinstance(inner, dict) else {}
    facts = {
        "folder": LATEST,
        "instance-id": meta.get("uuid"),
        "hostname": meta.get("hostname"),
        "keys": _some(_key_names(meta)),
        "user-name": more.get("admin_username"),
        "password": "given (not shown)" if meta.get("admin_pass") or more.get("admin_pass") else None,
        "user-data": describe_user_data(tree.get(f"{LATEST}/user_data")),
    }
    network = _optional(tree, f"{LATEST}/network_data.json")
    if network is None:
        return _windows_way(medium), {**facts, "network": "not said: the adapters stay as they are"}
    static = [one for one in _list(network.get("networks")) if one.get("type") in ("ipv4", "ipv6")]
    names = sorted({str(one.get("link")) for one in static})
    if not static:
        return _windows_way(medium), {**facts, "network": "nothing static: the adapters stay as they are"}
    return _windows_way(medium), {**facts, **_network({**network, "networks": static}), "adapters-renamed-to": names}


def _need_label_in_windows(medium: Medium, label: str) -> None:
    """An ISO on a hard disk is taken whatever its label is, VFAT on a raw disk goes by mtools' word for it."""
    if medium.disk and medium.file_system == "iso9660":
        return
    if medium.file_system == "vfat" and not medium.partitioned:
        _need_label(medium, label, label.upper())
    else:
        _need_label(medium, label, ignore_case=True)


def _windows_way(medium: Medium) -> str:
    if medium.file_system == "iso9660":
        return "as ISO 9660 on a hard disk, whatever its label" if medium.disk else "by its label, on a DVD"
    return "by its label, as a volume that Windows mounts" if medium.partitioned else "by its label, on the raw disk"


def _without_case(tree: Mapping[str, bytes]) -> dict[str, bytes]:
    """Windows finds a file whatever the case of its letters."""
    return {path.lower(): content for path, content in tree.items()}


def _cloudbase_init_no_cloud(medium: Medium) -> tuple[str, dict[str, Any]]:
    _need_label_in_windows(medium, "cidata")
    tree = _without_case(medium.windows)
    meta = _yaml(_content(tree, "meta-data"), "meta-data")
    facts = {
        "instance-id": meta.get("instance-id"),
        "hostname": meta.get("local-hostname"),
        "keys": _some(_key_names(meta)),
        "user-data": describe_user_data(tree.get("user-data")),
        "network": "network-config" if "network-config" in tree else "not said: the adapters stay as they are",
    }
    return _windows_way(medium), facts


def _ignition(medium: Medium) -> tuple[str, dict[str, Any]]:
    _need_label(medium, "config-2", "CONFIG-2")
    return _ignition_config(medium, f"{LATEST}/user_data")


def _ignition_cloudstack(medium: Medium) -> tuple[str, dict[str, Any]]:
    _need_label(medium, "config-2", "CONFIG-2")
    return _ignition_config(medium, "cloudstack/userdata/user_data.txt")


def _ignition_config(medium: Medium, path: str) -> tuple[str, dict[str, Any]]:
    data = _content(medium.linux, path)
    if not _is_ignition(data):
        raise _NotFound(f"{path} is not an Ignition configuration")
    version = json.loads(data)["ignition"].get("version")
    return "by its label, in an image for that platform", {"user-data": f"Ignition {version}, {len(data)} bytes"}


def _coreos_cloudinit(medium: Medium) -> tuple[str, dict[str, Any]]:
    _need_label(medium, "config-2")
    tree = medium.linux
    user_data = tree.get(f"{LATEST}/user_data")
    if f"{LATEST}/meta_data.json" not in tree and user_data is None:
        raise _NotFound(f"there is neither {LATEST}/meta_data.json nor {LATEST}/user_data")
    meta = _optional(tree, f"{LATEST}/meta_data.json") or {}
    if user_data is not None and _is_ignition(user_data):
        raise _NotFound("the user data is for Ignition, which comes before it")
    facts = {
        "hostname": meta.get("hostname"),
        "keys": _some(_key_names(meta)),
        "user-data": describe_user_data(user_data),
    }
    return "by its label", facts


def _afterburn(medium: Medium) -> tuple[str, dict[str, Any]]:
    _need_label(medium, "config-2")
    if medium.file_system != "iso9660":
        raise _NotFound("it mounts ISO 9660 only")
    meta = _fields(_content(medium.linux, f"{LATEST}/meta_data.json"), f"{LATEST}/meta_data.json")
    facts = {"instance-id": meta.get("uuid"), "hostname": meta.get("hostname"), "keys": _some(_key_names(meta))}
    return "by its label", facts


_AGENTS = (
    _Agent("cloud-init (ConfigDrive)", "Linux", _cloud_init_config_drive),
    _Agent("cloud-init (NoCloud)", "Linux", _cloud_init_no_cloud),
    _Agent("cloudbase-init (ConfigDrive)", "Windows", _cloudbase_init_config_drive),
    _Agent("cloudbase-init (NoCloud)", "Windows", _cloudbase_init_no_cloud),
    _Agent("Ignition (openstack)", "Linux", _ignition),
    _Agent("Ignition (cloudstack)", "Linux", _ignition_cloudstack),
    _Agent("coreos-cloudinit", "Linux", _coreos_cloudinit),
    _Agent("Afterburn (openstack)", "Linux", _afterburn),
)
