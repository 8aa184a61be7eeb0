"""Renders a spec as the config drive that Nova itself writes: every version folder, ``ec2/``, ``content/``.

For tools that look for what Nova has and `imagekit.cloudinit.configdrive` leaves out. The files of a version hold the
fields that this version had; ``network_data.json`` is ``{}`` when the network is unknown, as in Nova, which lint
complains about, because cloud-init takes it for no network at all. There is a random seed only when the spec has one,
and then the same in every version.

EC2 ids are Nova's numbers of database rows; here they derive from the uuid.
"""

from __future__ import annotations

from typing import Any

from imagekit.cloudinit.configdrive import content_files, device_fields, identity, json_bytes, require_uuid
from imagekit.cloudinit.model import Spec
from imagekit.cloudinit.network import network_data
from imagekit.cloudinit.userdata import build_user_data

VERSIONS = (
    "2012-08-10",
    "2013-04-04",
    "2013-10-17",
    "2015-10-15",
    "2016-06-30",
    "2016-10-06",
    "2017-02-22",
    "2018-08-27",
    "2020-10-14",
    "2025-04-04",
    "latest",
)
EC2_VERSIONS = ("2009-04-04", "latest")
_RANDOM_SEED, _VENDOR_DATA, _NETWORK_DATA = "2013-04-04", "2013-10-17", "2015-10-15"
_PROJECT_ID, _DEVICES, _VENDOR_DATA_2 = "2015-10-15", "2016-06-30", "2016-10-06"
_VLAN, _VF_TRUSTED, _DEDICATED_CPUS = "2017-02-22", "2018-08-27", "2020-10-14"
_FLAVOR = "imagekit"


def nova_tree(spec: Spec) -> dict[str, bytes]:
    """Path to content of every file. Raises InvalidSpec as `config_drive_tree` does."""
    require_uuid(spec)
    user_data = build_user_data(spec, "configdrive")
    tree = content_files(spec)
    for version in VERSIONS:
        folder = f"openstack/{version}"
        tree[f"{folder}/meta_data.json"] = json_bytes(_meta_data(spec, version))
        if user_data is not None:
            tree[f"{folder}/user_data"] = user_data
        if version >= _VENDOR_DATA:
            tree[f"{folder}/vendor_data.json"] = json_bytes(spec.vendor_data or {})
        if version >= _NETWORK_DATA:
            network = {} if spec.network is None else network_data(spec.network)
            tree[f"{folder}/network_data.json"] = json_bytes(network)
        if version >= _VENDOR_DATA_2:
            static = {"static": spec.vendor_data or {}}
            tree[f"{folder}/vendor_data2.json"] = json_bytes(static | (spec.vendor_data2 or {}))
    for version in EC2_VERSIONS:
        tree[f"ec2/{version}/meta-data.json"] = json_bytes(_ec2(spec))
        if user_data is not None:
            tree[f"ec2/{version}/user-data"] = user_data
    return tree


def _meta_data(spec: Spec, version: str) -> dict[str, Any]:
    """The fields that ``version`` has; "latest" sorts after every date."""
    meta_data = identity(spec)
    if version >= _RANDOM_SEED and spec.random_seed is not None:
        meta_data["random_seed"] = spec.random_seed
    if version >= _PROJECT_ID:
        meta_data["project_id"] = spec.project_id
    if version >= _DEVICES:
        meta_data["devices"] = [
            device_fields(device, vlan=version >= _VLAN, vf_trusted=version >= _VF_TRUSTED) for device in spec.devices
        ]
    if version >= _DEDICATED_CPUS:
        meta_data["dedicated_cpus"] = sorted(spec.dedicated_cpus)
    return meta_data


def _ec2(spec: Spec) -> dict[str, Any]:
    number = (spec.uuid or "").replace("-", "")[:8]
    addresses = [subnet.address for subnet in spec.network.networks if subnet.version == 4] if spec.network else []
    static = [str(address.ip) for address in addresses if address is not None]
    meta_data: dict[str, Any] = {
        "ami-id": f"ami-{number}",
        "ami-launch-index": spec.launch_index,
        "ami-manifest-path": "FIXME",  # Nova's own word, and what readers have seen ever since
        "instance-id": f"i-{number}",
        "hostname": spec.guest_hostname,
        "local-hostname": spec.guest_hostname,
        "public-hostname": spec.guest_hostname,
        "local-ipv4": static[0] if static else "",
        "public-ipv4": "",
        "reservation-id": f"r-{number}",
        "security-groups": ["default"],
        "instance-type": _FLAVOR,
        "block-device-mapping": {"ami": "sda", "root": "/dev/sda"},
        "placement": {"availability-zone": spec.availability_zone},
        "instance-action": "none",
    }
    if spec.ssh_keys:
        meta_data["public-keys"] = {"0": {"_name": "0=key1", "openssh-key": spec.ssh_keys[0]}}
    return meta_data
