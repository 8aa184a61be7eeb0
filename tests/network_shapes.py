"""Networks of every shape a spec can have, and what they come to in few words: `Device` by name, and name servers.

The words are those in which `tests.oracles.rendered_networks` reads what cloud-init wrote for a guest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from imagekit.cloudinit.model import parse_spec
from imagekit.cloudinit.netmodel import Network
from tests.cloudinit_specs import UUID

MACS = {"eth0": "02:15:5d:00:00:01", "eth1": "02:15:5d:00:00:02"}
_ETH0, _ETH1 = ({"id": name, "mac": mac} for name, mac in MACS.items())
_BOND = {"id": "bond0", "type": "bond", "members": ["eth0", "eth1"], "mode": "active-backup"}
_V4 = {"link": "eth0", "type": "ipv4", "address": "192.0.2.10/24", "gateway": "192.0.2.1"}
_V6 = {"link": "eth0", "type": "ipv6", "address": "2001:db8::10/64", "gateway": "2001:db8::1"}
_DNS = ["192.0.2.53", "2001:db8::53"]


def _shape(links: list[Any], networks: list[Any], **more: Any) -> dict[str, Any]:
    return {"links": links, "networks": networks, **more}


SHAPES: dict[str, dict[str, Any]] = {
    "dhcp for IPv4": _shape([_ETH0], [{"link": "eth0", "type": "ipv4_dhcp"}]),
    "dhcp for IPv6": _shape([_ETH0], [{"link": "eth0", "type": "ipv6_dhcp"}]),
    "dhcp for both": _shape([_ETH0], [{"link": "eth0", "type": f"ipv{version}_dhcp"} for version in (4, 6)]),
    "slaac": _shape([_ETH0], [{"link": "eth0", "type": "ipv4_dhcp"}, {"link": "eth0", "type": "ipv6_slaac"}]),
    "stateful": _shape([_ETH0], [{"link": "eth0", "type": "ipv6_dhcpv6-stateful"}]),
    "stateless": _shape([_ETH0], [{"link": "eth0", "type": "ipv6_dhcpv6-stateless"}]),
    "static IPv4": _shape([_ETH0], [_V4], dns=_DNS[:1]),
    "static IPv4 without gateway": _shape([_ETH0], [{k: v for k, v in _V4.items() if k != "gateway"}]),
    "static IPv4 with routes": _shape(
        [_ETH0],
        [
            {
                **_V4,
                "routes": [
                    {"network": "198.51.100.0/24", "gateway": "192.0.2.254"},
                    {"network": "203.0.113.0/24", "gateway": "192.0.2.253"},
                ],
            }
        ],
    ),
    "static IPv6": _shape([_ETH0], [_V6], dns=_DNS[1:]),
    "static IPv6 with a route": _shape(
        [_ETH0], [{**_V6, "routes": [{"network": "2001:db8:1::/48", "gateway": "2001:db8::2"}]}]
    ),
    "static both": _shape([_ETH0], [_V4, _V6], dns=_DNS),
    "two addresses": _shape([_ETH0], [_V4, {"link": "eth0", "type": "ipv4", "address": "192.0.2.11/24"}]),
    "jumbo frames": _shape([{**_ETH0, "mtu": 9000}], [_V4]),
    "two adapters": _shape([_ETH0, _ETH1], [_V4, {"link": "eth1", "type": "ipv4_dhcp"}], dns=_DNS[:1]),
    "bond": _shape([_ETH0, _ETH1, _BOND], [{**_V4, "link": "bond0"}]),
    "VLAN": _shape(
        [_ETH0, {"id": "v7", "type": "vlan", "link": "eth0", "vlan": 7}],
        [{"link": "eth0", "type": "ipv4_dhcp"}, {"link": "v7", "type": "ipv4", "address": "198.51.100.5/24"}],
    ),
    "VLAN on a bond": _shape(
        [_ETH0, _ETH1, _BOND, {"id": "v7", "type": "vlan", "link": "bond0", "vlan": 7, "mtu": 1400}],
        [{**_V4, "link": "v7"}],
    ),
}


@dataclass(frozen=True)
class Device:
    """An interface as the guest will have it; gateways are routes to everywhere."""

    mac: str | None = None
    mtu: int | None = None
    addresses: frozenset[str] = frozenset()
    routes: frozenset[tuple[str, str]] = frozenset()
    dhcp4: bool = False
    auto6: bool = False
    """DHCP, router advertisements, or both."""
    bond: tuple[str, frozenset[str]] | None = None
    vlan: tuple[str, int] | None = None


@dataclass(frozen=True)
class Rendered:
    """All interfaces, and all name servers wherever they stand."""

    devices: dict[str, Device]
    dns: frozenset[str]

    def without(self, *fields: str) -> Rendered:
        """The same without some fields of the devices, or ``dns``."""
        of_devices = [field for field in fields if field != "dns"]
        blank = {field: getattr(Device(), field) for field in of_devices}
        devices = {name: replace(device, **blank) for name, device in self.devices.items()}
        return Rendered(devices, frozenset() if "dns" in fields else self.dns)


def network_of(shape: str) -> Network:
    network = parse_spec({"name": "a", "uuid": UUID, "network": SHAPES[shape]}).network
    assert network is not None
    return network


def meant(network: Network) -> Rendered:
    """What a guest with this network should have, straight from the model."""
    devices = {}
    for link in network.links:
        subnets = [subnet for subnet in network.networks if subnet.link == link.id]
        routes = {(str(route.network), str(route.gateway)) for subnet in subnets for route in subnet.routes}
        for subnet in subnets:
            if subnet.gateway:
                routes.add(("0.0.0.0/0" if subnet.version == 4 else "::/0", str(subnet.gateway)))
        kinds = {subnet.type for subnet in subnets}
        below = None if link.link is None else network.device_name(network.by_id(link.link))
        devices[network.device_name(link)] = Device(
            mac=link.mac,
            mtu=link.mtu,
            addresses=frozenset(str(subnet.address) for subnet in subnets if subnet.address),
            routes=frozenset(routes),
            dhcp4="ipv4_dhcp" in kinds,
            auto6=any(kind.startswith("ipv6_") for kind in kinds),
            bond=(str(link.mode), frozenset(link.members)) if link.type == "bond" else None,
            vlan=None if below is None or link.vlan is None else (below, link.vlan),
        )
    return Rendered(devices, frozenset(str(address) for address in network.dns))
