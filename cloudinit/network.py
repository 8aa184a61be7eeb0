"""Renders the network of a spec as OpenStack's network_data.json.

Follows what Nova writes and its published schema (doc/api_schemas/network_data.json): links, networks,
services. Name servers are given twice, because older guests read only one of the places: globally, and
inside each static network those of its IP version. ``name``, which the schema lacks and cloud-init heeds, is
there when the spec has it; domains to search have no place in this format.
"""

from __future__ import annotations

from typing import Any

from imagekit.cloudinit.fields import IpAddress, IpNetwork
from imagekit.cloudinit.netmodel import Link, Network, Subnet

_EVERYWHERE = {4: ("0.0.0.0", "0.0.0.0"), 6: ("::", "::")}  # network and netmask of the default route


def network_data(network: Network) -> dict[str, Any]:
    """The content of network_data.json; a pure function of ``network``."""
    return {
        "links": [_link(link, network) for link in network.links],
        "networks": [
            _network(f"network{index}", subnet, network.dns) for index, subnet in enumerate(network.networks)
        ],
        "services": _services(network.dns),
    }


def _link(link: Link, network: Network) -> dict[str, Any]:
    rendered: dict[str, Any] = {"id": link.id, "type": link.type, "mtu": link.mtu}
    if link.name is not None:
        rendered["name"] = link.name
    mac = network.mac_of(link)
    if link.type == "vlan":
        return rendered | {"vlan_link": link.link, "vlan_id": link.vlan, "vlan_mac_address": mac}
    rendered["ethernet_mac_address"] = mac
    if link.type == "bond":
        options = {f"bond_{name}": value for name, value in sorted(link.options.items())}
        rendered |= {"bond_mode": link.mode, "bond_links": list(link.members), **options}
    return rendered


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
