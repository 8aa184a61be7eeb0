"""Renders the network of a spec as OpenStack's network_data.json.

Follows what Nova writes and its published schema (doc/api_schemas/network_data.json): links, networks,
services. Name servers are given twice, because older guests read only one of the places: globally, and
inside each static network those of its IP version.

Not here: bonds and VLAN links inside the guest, and cloud-init's own network-config formats.
"""

from __future__ import annotations

from typing import Any

from imagekit.cloudinit.fields import IpAddress, IpNetwork
from imagekit.cloudinit.model import Link, Network, Subnet

_EVERYWHERE = {4: ("0.0.0.0", "0.0.0.0"), 6: ("::", "::")}  # network and netmask of the default route


def network_data(network: Network) -> dict[str, Any]:
    """The content of network_data.json; a pure function of ``network``."""
    return {
        "links": [_link(link) for link in network.links],
        "networks": [
            _network(f"network{index}", subnet, network.dns) for index, subnet in enumerate(network.networks)
        ],
        "services": _services(network.dns),
    }


def _link(link: Link) -> dict[str, Any]:
    return {"id": link.id, "type": "phy", "ethernet_mac_address": link.mac, "mtu": link.mtu}


def _network(name: str, subnet: Subnet, dns: tuple[IpAddress, ...]) -> dict[str, Any]:
    rendered: dict[str, Any] = {"id": name, "network_id": name, "link": subnet.link, "type": subnet.type}
    if subnet.address is None:
        return rendered
    routes = [_route(route.network, route.gateway) for route in subnet.routes]
    if subnet.gateway is not None:
        network, netmask = _EVERYWHERE[subnet.version]
        routes.insert(0, {"network": network, "netmask": netmask, "gateway": str(subnet.gateway)})
    return {
        **rendered,
        "ip_address": str(subnet.address.ip),
        "netmask": str(subnet.address.netmask),
        "routes": routes,
        "services": _services(tuple(address for address in dns if address.version == subnet.version)),
    }


def _route(network: IpNetwork, gateway: IpAddress) -> dict[str, str]:
    return {
        "network": str(network.network_address),
        "netmask": str(network.netmask),
        "gateway": str(gateway),
    }


def _services(dns: tuple[IpAddress, ...]) -> list[dict[str, str]]:
    return [{"type": "dns", "address": str(address)} for address in dns]
