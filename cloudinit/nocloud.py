"""Renders a spec for cloud-init's NoCloud data source.

Follows cloud-init's documentation ("NoCloud"): ``meta-data``, ``user-data``, ``network-config``, ``vendor-data``. The
first two always exist, the others only with content: an empty
network-config ends some versions of cloud-init.
"""

from __future__ import annotations

from typing import Any

import yaml

from imagekit.cloudinit.configdrive import require_uuid
from imagekit.cloudinit.model import Spec
from imagekit.cloudinit.netconfig import Version, network_config
from imagekit.cloudinit.userdata import build_user_data
from imagekit.errors import InvalidSpec

NOTHING = b"#cloud-config\n{}\n"
"""User data that asks for nothing, in a form that no reader complains about."""


def nocloud_tree(spec: Spec, *, version: Version = 1) -> dict[str, bytes]:
    """Path to content of every file; ``version`` is that of network-config."""
    meta_data: dict[str, Any] = {"instance-id": require_uuid(spec), "local-hostname": spec.guest_hostname}
    if spec.ssh_keys:
        meta_data["public-keys"] = list(spec.ssh_keys)
    if spec.meta:
        meta_data["meta"] = dict(spec.meta)
    tree = {"meta-data": _yaml(meta_data), "user-data": build_user_data(spec, "nocloud") or NOTHING}
    if spec.network is not None:
        tree["network-config"] = _yaml(network_config(spec.network, version=version))
    if spec.vendor_data is not None:
        text = spec.vendor_data.get("cloud-init")
        if not isinstance(text, str) or not text or len(spec.vendor_data) > 1:
            raise InvalidSpec(
                "vendor_data for NoCloud is one text under the key cloud-init",
                hint="use --datasource configdrive, or leave the rest out",
            )
        tree["vendor-data"] = text.encode()
    return tree


def _yaml(value: dict[str, Any]) -> bytes:
    return yaml.safe_dump(value, sort_keys=True, allow_unicode=True, width=1000).encode()
