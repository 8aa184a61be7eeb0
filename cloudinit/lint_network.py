"""Lint, the network: OpenStack's network_data.json and both versions of cloud-init's network-config.

All three come to the same few words (`Link`, `Use`), and the rules are about those: references, MAC addresses
that the machine has, addresses that fit their networks. What only one of the forms can get wrong is looked at
there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_interface
from typing import Any

from imagekit.cloudinit.fields import IpInterface
from imagekit.cloudinit.lint_rules import Problem
from imagekit.cloudinit.model import GuestProfile
from imagekit.cloudinit.netmodel import gateway_problem, is_host

_MAC = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}")
_INTERFACE = re.compile(r"[^\s/:]{1,15}")
_TAP = re.compile(r"(?:tap|qvo|vif|veth)[0-9a-f]", re.IGNORECASE)
"""How Open vSwitch and its like name adapters on the host, and Nova then names links."""
_STATIC = ("ipv4", "ipv6", "static", "static6")
_TYPES = (
    *_STATIC,
    *("ipv4_dhcp", "ipv6_dhcp", "ipv6_slaac", "ipv6_dhcpv6-stateful", "ipv6_dhcpv6-stateless"),
    *("dhcp", "dhcp4", "dhcp6", "manual", "ipv4_shared"),
)


@dataclass(frozen=True, slots=True)
class Link:
    """A link in any of the forms; ``mac`` as it is written, None without one."""

    id: str
    kind: str
    mac: str | None
    below: tuple[str, ...]
    where: str
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Use:
    """A network on a link."""

    link: str
    type: str
    where: str
    address: str | None = None
    netmask: str | None = None
    routes: tuple[Mapping[str, Any], ...] = ()
    gateway: str | None = None
    dns: tuple[str, ...] = ()


@dataclass(slots=True)
class Found:
    """What a form of network metadata says."""

    links: list[Link] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    dns: list[tuple[str, str]] = field(default_factory=list)
    """Address and where it is written."""
    problems: list[Problem] = field(default_factory=list)


def problems(path: str, network: object, macs: Collection[str] | None, *, guest: GuestProfile) -> Iterator[Problem]:
    """What is wrong with the network; ``network`` None is none, which is fine: guests then ask DHCP."""
    if network is None:
        return
    if not isinstance(network, dict):
        yield Problem("network-invalid", "it holds no fields", path)
        return
    as_json = path.endswith(".json")
    found = _network_data(network, path) if as_json else _network_config(network, path)
    yield from found.problems
    if not found.links:
        yield Problem("network-empty", "it has no link", path)
        return
    yield Problem("ignition-network", "there is a network", path)
    yield from _links(found, macs, path)
    for use in found.uses:
        yield from _use(use, {link.id for link in found.links})
    addresses = Counter(use.address.split("/")[0] for use in found.uses if use.address)
    yield from (
        Problem("address-repeated", f"{address} is given {count} times", path)
        for address, count in addresses.items()
        if count > 1
    )
    for address, where in found.dns:
        if _address(address) is None:
            yield Problem("dns-invalid", f"name server {address!r}", where)
    yield from _for_guests(found, path, as_json)


def _links(found: Found, macs: Collection[str] | None, path: str) -> Iterator[Problem]:
    ids = Counter(link.id for link in found.links)
    for identifier, count in ids.items():
        if count > 1:
            yield Problem("link-id-repeated", f"{count} links have the id {identifier!r}", path)
    own = Counter(link.mac.lower() for link in found.links if link.mac and link.kind == "phy")
    for mac, count in own.items():
        if count > 1:
            yield Problem("mac-repeated", f"{count} links have the address {mac}", path)
    for link in found.links:
        for below in link.below:
            if below not in ids:
                yield Problem(
                    "link-unknown", f"{link.kind} {link.id!r} is on {below!r}, which is no link", link.where
                )
        if link.kind != "phy":
            continue
        if not link.mac:
            yield Problem("mac-missing", f"link {link.id!r} has no MAC address", link.where)
        elif not _MAC.fullmatch(link.mac.lower()):
            yield Problem("mac-spelling", f"link {link.id!r} has the address {link.mac!r}", link.where)
        elif macs is not None and link.mac.lower() not in macs:
            there = ", ".join(sorted(macs)) or "none"
            yield Problem(
                "mac-unknown",
                f"link {link.id!r} has {link.mac.lower()}, the machine's adapters have {there}",
                link.where,
            )
    for mac in sorted(set(macs or ()) - own.keys()):
        yield Problem("nic-unconfigured", f"the machine has an adapter {mac}, and no link is about it", path)


def _use(use: Use, links: Collection[str]) -> Iterator[Problem]:
    if use.link not in links:
        yield Problem(
            "link-unknown", f"it is on link {use.link!r}, which is none of {', '.join(sorted(links))}", use.where
        )
    if use.type not in _TYPES:
        yield Problem("network-type", f"type {use.type!r}", use.where)
    if use.type not in _STATIC:
        return
    if not use.address:
        yield Problem("address-missing", "it is static and has no address", use.where)
        return
    own = _interface(use.address, use.netmask)
    if isinstance(own, str):
        yield Problem(own, f"address {use.address!r} with netmask {use.netmask!r}", use.where)
        return
    if not is_host(own):
        yield Problem("address-invalid", f"{own} is not the address of one host in its network", use.where)
    for route in use.routes:
        yield from _route(route, own, use.where)
    if use.gateway:
        yield from _gateway(use.gateway, own, use.where)


def _interface(address: str, netmask: str | None) -> IpInterface | str:
    """The address with its network, or the rule that it breaks."""
    bare, _, prefix = address.partition("/")
    if _address(bare) is None:
        return "address-invalid"
    mask = _prefix(netmask or prefix)
    if mask is None:
        return "netmask-invalid"
    if netmask and prefix:
        return "address-invalid"
    try:
        return ip_interface(f"{bare}/{mask}")
    except ValueError:
        return "netmask-invalid"


def _prefix(mask: str) -> int | None:
    """The length that a netmask, or a number, means; ``ipaddress`` knows no netmasks of IPv6."""
    if re.fullmatch("[0-9]{1,3}", mask):
        return int(mask)
    address = _address(mask)
    if address is None:
        return None
    bits = f"{int(address):0{address.max_prefixlen}b}"
    return None if "01" in bits else bits.count("1")


def _address(text: object) -> Any:
    try:
        return ip_address(text) if isinstance(text, str) else None
    except ValueError:
        return None


def _route(route: Mapping[str, Any], own: IpInterface, where: str) -> Iterator[Problem]:
    target = str(route.get("to") or route.get("network") or route.get("destination") or "")
    gateway = route.get("via") or route.get("gateway")
    if target == "default":
        yield Problem("route-to-default", "a route to default", where)
    else:
        network = _interface(target, str(route["netmask"]) if route.get("netmask") else None)
        if isinstance(network, str) or network.ip != network.network.network_address:
            yield Problem("route-invalid", f"a route to {target!r}", where)
    if gateway:
        yield from _gateway(str(gateway), own, where)


def _gateway(text: str, own: IpInterface, where: str) -> Iterator[Problem]:
    gateway = _address(text)
    if gateway is None:
        yield Problem("route-invalid", f"gateway {text!r} is no address", where)
    elif gateway.version == own.version and (problem := gateway_problem(gateway, own)):
        yield Problem("gateway-outside", problem, where)


def _for_guests(found: Found, path: str, as_json: bool) -> Iterator[Problem]:
    """What only some guests trip over."""
    kinds = {link.id: link.kind for link in found.links}
    if as_json:
        for server in dict.fromkeys(server for use in found.uses for server in use.dns):
            if server not in {address for address, _ in found.dns}:
                yield Problem("dns-only-in-networks", f"name server {server} is in a network only", path)
        if any(link.kind == "bond" for link in found.links):
            yield Problem("bond-options", "there is a bond", path)
    versions = {address.version for server, _ in found.dns if (address := _address(server))}
    families = Counter(use.link for use in found.uses if use.type in _STATIC)
    if len(versions) > 1 and any(count > 1 for count in families.values()):
        yield Problem("rhel-dns", "there are name servers of both IPv4 and IPv6", path)
    for link in found.links:
        if as_json and link.kind == "phy" and _TAP.match(link.id):
            yield Problem("windows-link-id", f"link {link.id!r}", link.where)
        if link.kind == "vlan" and not any(kinds.get(below) == "bond" for below in link.below):
            yield Problem("windows-vlan", f"VLAN {link.id!r} is on an adapter", link.where)
        name = link.name if as_json else link.id
        if name is not None and not _INTERFACE.fullmatch(name):
            yield Problem("link-name", f"{name!r}", link.where)
    for use in found.uses:
        routes = [route for route in use.routes if str(route.get("network") or route.get("to")) not in _EVERYWHERE]
        if routes:
            yield Problem("windows-routes", f"{len(routes)} routes besides the default", use.where)


_EVERYWHERE = ("0.0.0.0", "::", "0.0.0.0/0", "::/0", "default")


def _values(value: object) -> list[object]:
    """What is in a list; nothing for what is none."""
    return value if isinstance(value, list) else []


def _list(value: object) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _network_data(network: Mapping[str, Any], path: str) -> Found:
    found = Found()
    for index, link in enumerate(_list(network.get("links"))):
        kind = link.get("type")
        kind = kind if kind in ("bond", "vlan") else "phy"
        where = f"{path}, links[{index}]"
        needed = {
            "bond": ("bond_links", "bond_mode"),
            "vlan": ("vlan_link", "vlan_id", "vlan_mac_address"),
            "phy": (),
        }
        for name in ("id", "type", *needed[kind]):
            if link.get(name) in (None, "", []):
                found.problems.append(Problem("link-incomplete", f"it has no {name}", where))
        below = link.get("bond_links") if kind == "bond" else [link.get("vlan_link")] if kind == "vlan" else []
        mac = link.get("vlan_mac_address" if kind == "vlan" else "ethernet_mac_address")
        names = tuple(str(item) for item in below) if isinstance(below, list) else ()
        found.links.append(Link(str(link.get("id")), kind, _text(mac), names, where, _text(link.get("name"))))
    for index, net in enumerate(_list(network.get("networks"))):
        found.uses.append(
            Use(
                link=str(net.get("link")),
                type=str(net.get("type")),
                where=f"{path}, networks[{index}]",
                address=_text(net.get("ip_address")),
                netmask=_text(net.get("netmask")),
                routes=tuple(_list(net.get("routes"))),
                gateway=_text(net.get("gateway")),
                dns=tuple(str(one.get("address")) for one in _list(net.get("services")) if one.get("type") == "dns"),
            )
        )
    for index, service in enumerate(_list(network.get("services"))):
        if service.get("type") == "dns":
            found.dns.append((str(service.get("address")), f"{path}, services[{index}]"))
    return found


def _network_config(network: Mapping[str, Any], path: str) -> Found:
    found = Found()
    if isinstance(network.get("network"), dict):
        found.problems.append(Problem("network-wrapped", "everything is below a key network", path))
        network = network["network"]
    version = network.get("version")
    if version == 1:
        _version_1(network, path, found)
    elif version == 2:
        _version_2(network, path, found)
    else:
        found.problems.append(Problem("network-invalid", f"version {version!r}, expected 1 or 2", path))
    return found


def _version_1(network: Mapping[str, Any], path: str, found: Found) -> None:
    kinds = {"physical": "phy", "bond": "bond", "vlan": "vlan", "bridge": "bridge"}
    for index, item in enumerate(_list(network.get("config"))):
        where = f"{path}, config[{index}]"
        kind = str(item.get("type"))
        if kind == "nameserver":
            servers = item.get("address")
            servers = servers if isinstance(servers, list) else [servers]
            found.dns += [(str(server), where) for server in servers if server]
        if kind not in kinds:
            continue
        name = str(item.get("name"))
        ports = item.get("bond_interfaces") or item.get("bridge_interfaces") or [item.get("vlan_link")]
        below = () if kind == "physical" else tuple(str(one) for one in _values(ports))
        found.links.append(Link(name, kinds[kind], _text(item.get("mac_address")), below, where))
        for subnet in _list(item.get("subnets")):
            type_ = str(subnet.get("type"))
            if type_ == "dhcp4":
                found.problems.append(Problem("windows-network-config", "DHCP is written dhcp4", where))
            found.uses.append(
                Use(
                    link=name,
                    type=type_,
                    where=where,
                    address=_text(subnet.get("address")),
                    netmask=_text(subnet.get("netmask")),
                    routes=tuple(_list(subnet.get("routes"))),
                    gateway=_text(subnet.get("gateway")),
                )
            )


def _version_2(network: Mapping[str, Any], path: str, found: Found) -> None:
    for section, kind in (("ethernets", "phy"), ("bonds", "bond"), ("vlans", "vlan"), ("bridges", "bridge")):
        devices = network.get(section)
        for name, device in (devices if isinstance(devices, dict) else {}).items():
            if not isinstance(device, dict):
                found.problems.append(Problem("link-incomplete", "it holds no fields", f"{path}, {section}.{name}"))
                continue
            where = f"{path}, {section}.{name}"
            match = device.get("match")
            mac = match.get("macaddress") if isinstance(match, dict) else device.get("macaddress")
            by_name = kind == "phy" and mac is None
            if by_name:  # netplan allows it, and only cloudbase-init trips over it
                found.problems.append(Problem("windows-network-config", "no match by macaddress", where))
            below = _values(device.get("interfaces")) or ([device["link"]] if device.get("link") else [])
            shown = Link(str(name), "named" if by_name else kind, _text(mac), tuple(str(one) for one in below), where)
            found.links.append(shown)
            _addresses_2(device, str(name), where, found)


def _addresses_2(device: Mapping[str, Any], name: str, where: str, found: Found) -> None:
    addresses = [str(address) for address in _values(device.get("addresses")) if isinstance(address, str)]
    routes = _list(device.get("routes"))
    servers = device.get("nameservers")
    if isinstance(servers, dict):
        found.dns += [(str(server), where) for server in _values(servers.get("addresses"))]
    found.uses += [Use(name, version, where) for version in ("dhcp4", "dhcp6") if device.get(version)]
    for address in addresses:
        is_v6 = ":" in address
        mine = [route for route in routes if (":" in str(route.get("via"))) == is_v6]
        gateway = device.get("gateway6" if is_v6 else "gateway4")
        inside = [route for route in mine if _could_reach(route, address) or len(addresses) == 1]
        found.uses.append(Use(name, "static", where, address=address, routes=tuple(inside), gateway=_text(gateway)))
    if routes and not addresses:
        for route in routes:
            if str(route.get("to")) == "default":
                found.problems.append(Problem("route-to-default", "a route to default", where))


def _could_reach(route: Mapping[str, Any], address: str) -> bool:
    """Whether the route's gateway is in the network of this one of several addresses."""
    gateway, own = _address(route.get("via")), _interface(address, None)
    return not isinstance(own, str) and gateway is not None and gateway_problem(gateway, own) is None
