"""Lint, the files: is everything there that the guest looks for, and does it parse.

Also where a guest's metadata is on the tree (`View`), so that the other parts of lint need not know layouts.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from imagekit.cloudinit.lint_rules import CLOUD_INIT, Problem
from imagekit.cloudinit.model import GuestProfile
from imagekit.cloudinit.specfile import load_yaml
from imagekit.cloudinit.tree import LABELS, MetadataTree

_NEWEST_OF_CLOUD_INIT = "2018-08-27"
_CONSTANT_IDS = ("nocloud", "iid-local01", "iid-datasource-none", "i-abcdefg")
"""What other tools give every guest, and what cloud-init falls back to."""


@dataclass(frozen=True, slots=True)
class View:
    """What a guest would take from a tree: parsed, or None for what is missing; what did not parse is a problem."""

    meta_path: str
    meta: Mapping[str, Any] | None = None
    user_data_path: str = ""
    user_data: bytes | None = None
    network_path: str = ""
    network: object = None
    """JSON or YAML values; None when there is no file."""
    broken: tuple[Problem, ...] = field(default=())


def view_of(tree: MetadataTree, guest: GuestProfile) -> View:
    """Where this guest looks, and what it finds there."""
    broken: list[Problem] = []
    if tree.datasource == "nocloud":
        meta_path, user_path, network_path, folder = "meta-data", "user-data", "network-config", ""
    else:
        folder = f"openstack/{_version(tree, guest)}/"
        meta_path, user_path, network_path = (
            f"{folder}{name}" for name in ("meta_data.json", "user_data", "network_data.json")
        )
    meta = _parse(tree, meta_path, "meta-data-invalid", broken)
    if meta is not None and not isinstance(meta, dict):
        broken.append(Problem("meta-data-invalid", "it holds no fields", meta_path))
        meta = None
    network = _parse(tree, network_path, "network-invalid", broken)
    for name in ("vendor_data.json", "vendor_data2.json"):
        _parse(tree, f"{folder}{name}", "meta-data-invalid", broken)
    return View(
        meta_path=meta_path,
        meta=meta,
        user_data_path=user_path,
        user_data=tree.files.get(user_path),
        network_path=network_path,
        network=network,
        broken=tuple(broken),
    )


def _version(tree: MetadataTree, guest: GuestProfile) -> str:
    if guest not in CLOUD_INIT:
        return "latest"
    there = {path.split("/")[1] for path in tree.files if path.startswith("openstack/") and path.count("/") > 1}
    dated = [version for version in there if version[:1].isdigit() and version <= _NEWEST_OF_CLOUD_INIT]
    return max(dated, default="latest")


def _parse(tree: MetadataTree, path: str, rule: str, broken: list[Problem]) -> Any:
    content = tree.files.get(path)
    if content is None:
        return None
    as_json = path.endswith(".json")
    if not as_json and not content.strip():
        return {} if path == "meta-data" else None
    try:
        text = content.decode()
        return json.loads(text) if as_json else load_yaml(text)
    except UnicodeDecodeError:
        broken.append(Problem(rule, "it is not UTF-8", path))
    except json.JSONDecodeError as error:
        broken.append(Problem(rule, f"it is not JSON (line {error.lineno}, column {error.colno})", path))
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" (line {error.problem_mark.line + 1})"
        broken.append(Problem(rule, f"it is not YAML{line}", path))
    except (ValueError, yaml.YAMLError, RecursionError):
        broken.append(Problem(rule, f"it is not {'JSON' if as_json else 'YAML'}", path))
    return None


def problems(tree: MetadataTree, view: View, machine_uuid: str | None) -> Iterator[Problem]:
    """Everything about the tree but its network and its user data."""
    yield from view.broken
    yield from _label(tree)
    yield from _missing(tree, view)
    if tree.datasource == "nocloud":
        yield Problem("datasource", "NoCloud", tree.label)
        yield Problem("windows-nocloud", "NoCloud", tree.label)
    yield Problem("ignition-hyperv", "a drive for Ignition", tree.label)
    if view.meta is not None:
        yield from _identity(tree, view.meta, view.meta_path, machine_uuid)
        if tree.datasource != "nocloud":
            yield from _openstack(tree, view.meta, view.meta_path)
    if view.user_data is None or not view.user_data.strip(b"#cloud-config{} \r\n"):
        keys = any((view.meta or {}).get(name) for name in ("public_keys", "keys", "public-keys"))
        if not keys and not (view.meta or {}).get("admin_pass"):
            yield Problem("no-login", "neither key nor password nor user data", view.meta_path)


def _label(tree: MetadataTree) -> Iterator[Problem]:
    wanted = LABELS[tree.datasource]
    if tree.label.lower() != wanted:
        yield Problem("label", f"the label is {tree.label!r}, expected {wanted!r}", "the medium")
    elif tree.label != wanted:
        yield Problem("label-case", f"the label is {tree.label!r}, not {wanted!r}", "the medium")


def _missing(tree: MetadataTree, view: View) -> Iterator[Problem]:
    if tree.datasource == "nocloud":
        for path in ("meta-data", "user-data"):
            if path not in tree.files:
                rule = "meta-data-missing" if path == "meta-data" else "user-data-missing"
                yield Problem(rule, "there is no such file", path)
        for path in ("network-config", "vendor-data"):
            if path in tree.files and not tree.files[path].strip():
                yield Problem("empty-file", "it is empty", path)
        return
    if "openstack/latest/meta_data.json" not in tree.files:
        yield Problem("latest-missing", "there is no openstack/latest/meta_data.json", "openstack/latest")
    if view.meta_path not in tree.files:
        yield Problem("meta-data-missing", "there is no such file", view.meta_path)


def _identity(tree: MetadataTree, meta: Mapping[str, Any], path: str, machine_uuid: str | None) -> Iterator[Problem]:
    name = "instance-id" if tree.datasource == "nocloud" else "uuid"
    identifier = meta.get(name)
    if tree.datasource != "nocloud" and not identifier:
        yield Problem("uuid-missing", "there is no uuid", path)
        return
    if not identifier or str(identifier).lower() in _CONSTANT_IDS:
        yield Problem("instance-id-constant", f"{name} is {identifier or 'missing'}", path)
    elif machine_uuid is not None and str(identifier).lower() != machine_uuid.lower():
        yield Problem("bios-guid", f"{name} is {identifier}, the machine's UUID {machine_uuid}", path)


def _openstack(tree: MetadataTree, meta: Mapping[str, Any], path: str) -> Iterator[Problem]:
    if meta.get("admin_pass"):
        yield Problem("admin-pass", "there is an admin_pass", path)
    seed = meta.get("random_seed")
    if seed is not None:
        try:
            base64.b64decode(str(seed), validate=True)
        except (binascii.Error, ValueError):
            yield Problem("random-seed", "random_seed is not base64", path)
    files = meta.get("files")
    for entry in files if isinstance(files, list) else ():
        content = entry.get("content_path") if isinstance(entry, dict) else None
        if not isinstance(content, str) or f"openstack/{content.lstrip('/')}" not in tree.files:
            named = entry.get("path") if isinstance(entry, dict) else entry
            yield Problem("content-missing", f"the content of {named!r} is not on the drive", path)
