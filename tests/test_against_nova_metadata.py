"""--nova-compatible against Nova itself: the same instance gives the same tree, file by file."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from imagekit.cloudinit.model import parse_spec
from imagekit.cloudinit.render import Rendering
from tests.cloudinit_specs import FULL, KEY, MAC, UUID
from tests.oracles.nova_metadata import nova_tree

pytestmark = [pytest.mark.oracle, pytest.mark.slow]

DEVICES: list[dict[str, Any]] = [
    {
        "type": "nic",
        "bus": "pci",
        "address": "0000:00:02.0",
        "mac": MAC,
        "vlan": 7,
        "vf_trusted": True,
        "tags": ["a"],
    },
    {"type": "disk", "bus": "scsi", "address": "0:0:0:1", "serial": "d1", "path": "/dev/sda", "tags": ["db"]},
    {"type": "disk", "bus": "ide", "address": "0:1", "serial": "d2", "path": "/dev/sdb", "tags": []},
]
V4 = {
    "cidr": "192.0.2.0/24",
    "gateway": "192.0.2.1",
    "address": "192.0.2.10",
    "dns": ["192.0.2.53"],
    "routes": [{"cidr": "198.51.100.0/24", "gateway": "192.0.2.254"}],
}
V6 = {
    "cidr": "2001:db8::/64",
    "gateway": "2001:db8::1",
    "address": "2001:db8::10",
    "dns": ["2001:db8::53"],
    "routes": [],
}


def spec(network: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        **{key: FULL[key] for key in ("uuid", "name", "ssh_keys", "user_data", "meta")},
        "hostname": "web1",
        "guest": "windows",  # for whom the password is admin_pass
        "password": "correct horse",
        "project_id": "p1",
        "availability_zone": "nova",
        "launch_index": 2,
        "devices": [{**one, "tags": list(one["tags"])} for one in DEVICES],
        "files": [{"path": "/etc/motd", "content": "hello\n"}, {"path": "/opt/b", "content": b"\0\xff"}],
        "network": network,
        **more,
    }


def instance(subnets: list[dict[str, Any]], *, mtu: int | None = 1400) -> dict[str, Any]:
    number = UUID.replace("-", "")[:8]
    return {
        "uuid": UUID,
        "project_id": "p1",
        "hostname": "web1",
        "name": "web1",
        "launch_index": 2,
        "availability_zone": "nova",
        "reservation_id": f"r-{number}",
        "instance_id": f"i-{number}",
        "ami_id": f"ami-{number}",
        "flavor": "imagekit",
        "key": KEY,
        "user_data": base64.b64encode(FULL["user_data"].encode()).decode(),
        "meta": FULL["meta"],
        "devices": DEVICES,
        "subnets": subnets,
        "mac": MAC,
        "mtu": mtu,
        "files": [
            ("/etc/motd", base64.b64encode(b"hello\n").decode()),
            ("/opt/b", base64.b64encode(b"\0\xff").decode()),
        ],
        "extra": {"admin_pass": "correct horse"},
    }


def comparable(path: str, content: bytes) -> object:
    """JSON as values, without what is random or an id of Neutron's; anything else as it is."""
    if not path.endswith(".json"):
        return content
    values = json.loads(content)
    if path.endswith("meta_data.json"):
        values.pop("random_seed", None)
    if path.endswith("network_data.json"):
        for link in values["links"]:
            link.pop("vif_id", None)
            link["type"] = "phy"  # Nova names how its host does it
        for network in values["networks"]:
            network.pop("network_id", None)
    return values


STATIC = {
    "links": [{"id": "eth0", "mac": MAC, "mtu": 1400}],
    "networks": [
        {
            "link": "eth0",
            "type": "ipv4",
            "address": "192.0.2.10/24",
            "gateway": "192.0.2.1",
            "routes": [{"network": "198.51.100.0/24", "gateway": "192.0.2.254"}],
        },
        {"link": "eth0", "type": "ipv6", "address": "2001:db8::10/64", "gateway": "2001:db8::1"},
    ],
    "dns": ["192.0.2.53", "2001:db8::53"],
}
DHCP = {"links": [{"id": "eth0", "mac": MAC}], "networks": [{"link": "eth0", "type": "ipv4_dhcp"}]}


@pytest.mark.parametrize(
    ("network", "subnets", "mtu"),
    [
        pytest.param(STATIC, [V4, V6], 1400, id="static"),
        pytest.param(DHCP, [{**V4, "dhcp": True, "dns": [], "routes": []}], None, id="dhcp"),
    ],
)
def test_every_file_is_the_one_that_nova_writes(network: Any, subnets: Any, mtu: int | None) -> None:
    ours = Rendering(nova_compatible=True).render(parse_spec(spec(network))).files
    theirs = nova_tree(instance(subnets, mtu=mtu))
    assert len(theirs) >= 51
    assert sorted(ours) == sorted(theirs)
    for path in sorted(theirs):
        our, their = comparable(path, ours[path]), comparable(path, theirs[path])
        if network is DHCP and isinstance(our, dict) and isinstance(their, dict):
            # Neutron knows the address that its DHCP will give; a spec does not.
            our.pop("local-ipv4", None), their.pop("local-ipv4", None)
        assert our == their, path
