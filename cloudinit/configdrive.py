"""Renders a spec as an OpenStack config drive (version 2): the tree of files, and the ISO medium with it.

Follows Nova's documentation ("Metadata", "Config drives") and what Nova writes, in two version folders
with the same content: ``latest``, the only one cloudbase-init, Ignition and afterburn read, and
``2018-08-27``, the newest that cloud-init asks for. Unlike Nova there is no random seed, so that one spec
always gives the same bytes, and no network_data.json when the network is unknown, because cloud-init
takes an empty one for "no network at all".

Not here: the EC2 tree, injected files, device tags. Everything stays in memory; publishing the medium,
readable by its owner only, is up to the caller.
"""

from __future__ import annotations

import json
from typing import Any

from imagekit.cloudinit.iso import verify_iso, write_iso
from imagekit.cloudinit.model import Spec
from imagekit.cloudinit.network import network_data
from imagekit.errors import InvalidSpec

LABEL = "config-2"
VERSIONS = ("2018-08-27", "latest")
MAX_USER_DATA = 65535
"""Bytes; the limit of Nova's user data."""
MAX_DRIVE = 64 << 20
"""Bytes; the size of Nova's config drives."""


def config_drive_tree(spec: Spec) -> dict[str, bytes]:
    """Path to content of every file. Raises InvalidSpec without uuid or with too much user data."""
    if spec.uuid is None:
        raise InvalidSpec(
            "the spec has no uuid, and the guest takes it for its instance id",
            hint="set uuid; uuid.uuid4() makes one",
        )
    if spec.user_data is not None and len(spec.user_data) > MAX_USER_DATA:
        raise InvalidSpec(
            f"user_data has {len(spec.user_data)} bytes, a config drive takes {MAX_USER_DATA}",
            hint="compress it with gzip, which cloud-init unpacks, or fetch the rest with #include",
        )
    files = {"meta_data.json": _json(_meta_data(spec)), "vendor_data.json": _json({})}
    if spec.user_data is not None:
        files["user_data"] = spec.user_data
    if spec.network is not None:
        files["network_data.json"] = _json(network_data(spec.network))
    return {f"openstack/{version}/{name}": content for version in VERSIONS for name, content in files.items()}


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


def _meta_data(spec: Spec) -> dict[str, Any]:
    meta_data: dict[str, Any] = {
        "uuid": spec.uuid,
        "name": spec.name,
        "hostname": spec.guest_hostname,
        "launch_index": 0,
        "availability_zone": None,
    }
    if spec.ssh_keys:
        names = [f"key{number}" for number in range(1, len(spec.ssh_keys) + 1)]
        meta_data["public_keys"] = dict(zip(names, spec.ssh_keys, strict=True))
        meta_data["keys"] = [
            {"name": name, "type": "ssh", "data": key} for name, key in zip(names, spec.ssh_keys, strict=True)
        ]
    if spec.meta:
        meta_data["meta"] = spec.meta
    if spec.password is not None:
        meta_data["admin_pass"] = spec.password.get_secret_value()
    return meta_data


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, sort_keys=True, ensure_ascii=False, indent=2) + "\n").encode()
