"""Renders a spec as an OpenStack config drive (version 2).

Follows Nova's documentation ("Metadata", "Config drives") and what Nova writes, in two version folders
with the same content: ``latest``, the only one cloudbase-init, Ignition and afterburn read, and
``2018-08-27``, the newest that cloud-init asks for. Unlike Nova there is no random seed unless asked for, so that one
spec always gives the same bytes, and no network_data.json when the network is unknown, because cloud-init
takes an empty one for "no network at all". What Nova itself would write is `imagekit.cloudinit.nova`.

Everything stays in memory; publishing the medium, readable by its owner only, is up to the caller.
"""

from __future__ import annotations

import json
from typing import Any

from imagekit.cloudinit.iso import verify_iso, write_iso
from imagekit.cloudinit.model import Device, Spec
from imagekit.cloudinit.network import network_data
from imagekit.cloudinit.tree import LABELS
from imagekit.cloudinit.userdata import build_user_data
from imagekit.errors import InvalidSpec

LABEL = LABELS["configdrive"]
VERSIONS = ("2018-08-27", "latest")
MAX_DRIVE = 64 << 20
"""Bytes; the size of Nova's config drives."""


def config_drive_tree(spec: Spec) -> dict[str, bytes]:
    """Path to content of every file. Raises InvalidSpec without uuid or with too much user data."""
    files = openstack_files(spec)
    tree = {f"openstack/{version}/{name}": content for version in VERSIONS for name, content in files.items()}
    return tree | content_files(spec)


def openstack_files(spec: Spec) -> dict[str, bytes]:
    """The files of one version folder, by name."""
    require_uuid(spec)
    files = {
        "meta_data.json": json_bytes(_meta_data(spec)),
        "vendor_data.json": json_bytes(spec.vendor_data or {}),
    }
    if spec.vendor_data2 is not None:
        files["vendor_data2.json"] = json_bytes(spec.vendor_data2)
    if (user_data := build_user_data(spec, "configdrive")) is not None:
        files["user_data"] = user_data
    if spec.network is not None:
        files["network_data.json"] = json_bytes(network_data(spec.network))
    return files


def require_uuid(spec: Spec) -> str:
    if spec.uuid is None:
        raise InvalidSpec(
            "the spec has no uuid, and the guest takes it for its instance id",
            hint="set uuid; uuid.uuid4() makes one",
        )
    return spec.uuid


def content_files(spec: Spec) -> dict[str, bytes]:
    """The contents of injected files, where meta_data.json says they are."""
    return {f"openstack/content/{number:04}": file.content for number, file in enumerate(spec.files)}


def build_config_drive(spec: Spec, *, timestamp: int | None = None) -> bytes:
    """The ISO 9660 medium, read back and compared before it is returned.

    ``timestamp`` as in `write_iso`. Raises InvalidSpec, or VerificationFailed when it does not read back.
    """
    tree = config_drive_tree(spec)
    medium = write_iso(tree, label=LABEL, timestamp=timestamp)
    if len(medium) > MAX_DRIVE:
        raise InvalidSpec(f"the config drive would have {len(medium)} bytes, the most is {MAX_DRIVE}")
    verify_iso(medium, tree, LABEL)
    return medium


def identity(spec: Spec) -> dict[str, Any]:
    """The fields of meta_data.json that every version has."""
    meta_data: dict[str, Any] = {
        "uuid": spec.uuid,
        "name": spec.name,
        "hostname": spec.guest_hostname,
        "launch_index": spec.launch_index,
        "availability_zone": spec.availability_zone,
    }
    if spec.ssh_keys:
        named = {f"key{number}": key for number, key in enumerate(spec.ssh_keys, start=1)}
        meta_data["public_keys"] = named
        meta_data["keys"] = [{"name": name, "type": "ssh", "data": key} for name, key in named.items()]
    if spec.meta:
        meta_data["meta"] = spec.meta
    if spec.files:
        meta_data["files"] = [
            {"path": file.path, "content_path": f"/content/{number:04}"} for number, file in enumerate(spec.files)
        ]
    if spec.password is not None and spec.guest == "windows":
        meta_data["admin_pass"] = spec.password.get_secret_value()  # cloud-init ignores it, cloudbase-init does not
    return meta_data


def _meta_data(spec: Spec) -> dict[str, Any]:
    meta_data = identity(spec)
    if spec.random_seed is not None:
        meta_data["random_seed"] = spec.random_seed
    if spec.project_id is not None:
        meta_data["project_id"] = spec.project_id
    if spec.devices:
        meta_data["devices"] = [device_fields(device) for device in spec.devices]
    if spec.dedicated_cpus:
        meta_data["dedicated_cpus"] = sorted(spec.dedicated_cpus)
    return meta_data


def device_fields(device: Device, *, vlan: bool = True, vf_trusted: bool = True) -> dict[str, Any]:
    """An entry of ``devices``, as the version of the metadata has it."""
    fields: dict[str, Any] = {"type": device.type, "bus": device.bus, "address": device.address}
    fields["tags"] = list(device.tags)
    if device.type == "nic":
        fields["mac"] = device.mac
        if vlan and device.vlan is not None:
            fields["vlan"] = device.vlan
        if vf_trusted:
            fields["vf_trusted"] = device.vf_trusted
    if device.serial is not None:
        fields["serial"] = device.serial
    if device.path is not None:
        fields["path"] = device.path
    return fields


def json_bytes(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, sort_keys=True, ensure_ascii=False, indent=2) + "\n").encode()
