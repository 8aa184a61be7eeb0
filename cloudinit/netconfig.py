"""Renders the network of a spec as cloud-init's network-config, version 1 or 2, for NoCloud.

Follows cloud-init's documentation ("Networking config Version 1", "Version 2"), without the forms that some of its
versions in use stumble over: no ``network:`` around it (refused by old ones), routes to everywhere as ``0.0.0.0/0``
(``default`` ends cloud-init 22.4, Debian 12's) and ``gateway6``, DHCP for IPv4 in version 1 as ``dhcp``
(cloudbase-init knows no ``dhcp4``). Adapters are found by their MAC address and by nothing else.

Version 1 is the default: every cloud-init translates it into what its guest speaks, where version 2 goes to netplan
as it is and loses more on the way to anything else.
"""

from __future__ import annotations

from typing import Any, Literal

from imagekit.cloudinit.netmodel import Link, Network, Subnet

Version = Literal[1, 2]

_BOND_V2 = {
    "miimon": "mii-monitor-interval",
    "xmit_hash_policy": "transmit-hash-policy",
    "lacp_rate": "lacp-rate",
    "updelay": "up-delay",
    "downdelay": "down-delay",
    "primary": "primary",
}
_DHCP_V1 = {"ipv4_dhcp": "dhcp", "ipv6_dhcp": "dhcp6"}


def network_config(network: Network, *, version: Version = 1) -> dict[str, Any]:
    """The content of network-config; a pure function of ``network``."""
    return _version_1(network) if version == 1 else _version_2(network)


def _version_1(network: Network) -> dict[str, Any]:
    config = [_device_1(link, network) for link in network.links]
    if network.dns or network.search:
        server: dict[str, Any] = {"type": "nameserver", "address": [str(address) for address in network.dns]}
        config.append(server | ({"search": list(network.search)} if network.search else {}))
    return {"version": 1, "config": config}


def _device_1(link: Link, network: Network) -> dict[str, Any]:
    kind = "physical" if link.type == "phy" else link.type
    device: dict[str, Any] = {"type": kind, "name": network.device_name(link)}
    device["mac_address"] = network.mac_of(link)
    if link.mtu is not None:
        device["mtu"] = link.mtu
    if link.type == "bond":
        device["bond_interfaces"] = [network.device_name(network.by_id(member)) for member in link.members]
        # With hyphens: not every renderer of cloud-init translates the other spelling.
        options = {f"bond-{name.replace('_', '-')}": value for name, value in sorted(_options(link, network).items())}
        device["params"] = {"bond-mode": link.mode, **options}
    if link.type == "vlan":
        device |= {"vlan_link": network.device_name(network.by_id(link.link or "")), "vlan_id": link.vlan}
    device["subnets"] = [_subnet_1(subnet, network) for subnet in network.networks if subnet.link == link.id]
    return device


def _options(link: Link, network: Network) -> dict[str, Any]:
    """A bond's options; the primary member by the name that Linux knows it by."""
    options: dict[str, Any] = {str(name): value for name, value in link.options.items()}
    ids = {other.id: network.device_name(other) for other in network.links}
    if "primary" in options:
        options["primary"] = ids.get(str(options["primary"]), options["primary"])
    return options


def _subnet_1(subnet: Subnet, network: Network) -> dict[str, Any]:
    if subnet.address is None:
        return {"type": _DHCP_V1.get(subnet.type, subnet.type)}
    # Not static6, which cloud-init 22.4 hands to NetworkManager as "automatic as well".
    rendered: dict[str, Any] = {"type": "static", "address": str(subnet.address)}
    if subnet.gateway is not None:
        rendered["gateway"] = str(subnet.gateway)
    if subnet.routes:
        rendered["routes"] = [
            {
                "network": str(route.network.network_address),
                "netmask": str(route.network.netmask),
                "gateway": str(route.gateway),
            }
            for route in subnet.routes
        ]
    # Also here: not every renderer heeds the global ones.
    if servers := [str(address) for address in network.dns if address.version == subnet.version]:
        rendered["dns_nameservers"] = servers
    return rendered


def _version_2(network: Network) -> dict[str, Any]:
    config: dict[str, Any] = {"version": 2}
    for link in network.links:
        device = _device_2(link, network)
        section = {"phy": "ethernets", "bond": "bonds", "vlan": "vlans"}[link.type]
        config.setdefault(section, {})[network.device_name(link)] = device
    return config


def _device_2(link: Link, network: Network) -> dict[str, Any]:
    device: dict[str, Any] = {}
    if link.type == "phy":
        device = {"match": {"macaddress": link.mac}, "set-name": network.device_name(link)}
    elif link.mac is not None:
        device["macaddress"] = link.mac
    if link.mtu is not None:
        device["mtu"] = link.mtu
    if link.type == "bond":
        device["interfaces"] = [network.device_name(network.by_id(member)) for member in link.members]
        options = {_BOND_V2[name]: value for name, value in sorted(_options(link, network).items())}
        device["parameters"] = {"mode": link.mode, **options}
    if link.type == "vlan":
        device |= {"id": link.vlan, "link": network.device_name(network.by_id(link.link or ""))}
    subnets = [subnet for subnet in network.networks if subnet.link == link.id]
    return device | _addresses_2(subnets, network)


def _addresses_2(subnets: list[Subnet], network: Network) -> dict[str, Any]:
    rendered: dict[str, Any] = {}
    kinds = {subnet.type for subnet in subnets}
    if "ipv4_dhcp" in kinds:
        rendered["dhcp4"] = True
    if kinds & {"ipv6_dhcp", "ipv6_dhcpv6-stateful", "ipv6_dhcpv6-stateless"}:
        rendered["dhcp6"] = True
    if kinds & {"ipv6_slaac", "ipv6_dhcpv6-stateless", "ipv6_dhcpv6-stateful"}:
        rendered["accept-ra"] = True
    elif "ipv6" in kinds:
        rendered["accept-ra"] = False
    static = [subnet for subnet in subnets if subnet.address is not None]
    if static:
        rendered["addresses"] = [str(subnet.address) for subnet in static]
    routes = []
    for subnet in static:
        if subnet.gateway is not None and subnet.version == 4:
            routes.append({"to": "0.0.0.0/0", "via": str(subnet.gateway)})
        elif subnet.gateway is not None:
            rendered["gateway6"] = str(subnet.gateway)  # cloud-init 22.4 makes ::/64 of a route to ::/0
        routes += [{"to": str(route.network), "via": str(route.gateway)} for route in subnet.routes]
    if routes:
        rendered["routes"] = routes
    # Where there is an address or a lease; an adapter without either resolves nothing.
    if subnets and (network.dns or network.search):
        servers = {"addresses": [str(address) for address in network.dns]} if network.dns else {}
        rendered["nameservers"] = servers | ({"search": list(network.search)} if network.search else {})
    return rendered
