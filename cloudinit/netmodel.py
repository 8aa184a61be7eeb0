"""The network of a spec: links (adapters, bonds, VLANs), the addresses on them, name servers.

Values are checked as far as they can be without knowing the guest or the host: references, addresses in their
networks, nothing given twice. The names of kinds are those of OpenStack's network_data.json.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, StrictInt, StrictStr, model_validator

from imagekit.cloudinit import fields

SubnetType = Literal[
    "ipv4",
    "ipv4_dhcp",
    "ipv6",
    "ipv6_dhcp",
    "ipv6_slaac",
    "ipv6_dhcpv6-stateful",
    "ipv6_dhcpv6-stateless",
]
BondMode = Literal["balance-rr", "active-backup", "balance-xor", "broadcast", "802.3ad", "balance-tlb", "balance-alb"]
BondOption = Literal["miimon", "xmit_hash_policy", "lacp_rate", "updelay", "downdelay", "primary"]
"""The options of Linux' bonding driver that every renderer knows."""
MAX_NAME = 15
"""Characters of an interface's name in Linux."""


class SpecModel(BaseModel):
    """What all parts of a spec have in common: unknown fields are errors, nothing changes, no value in messages."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class Link(SpecModel):
    """A network adapter, recognised by its MAC address (kept as lower-case, with colons); a bond; or a VLAN.

    In Windows, cloudbase-init renames the adapter to ``id``; Linux does so to ``name``. A bond has ``members``, a
    VLAN the ``link`` below it; both have the MAC address of what is below them unless they are given one.
    """

    id: fields.LinkId
    type: Literal["phy", "bond", "vlan"] = "phy"
    mac: fields.Mac | None = None
    mtu: fields.Mtu | None = None
    name: fields.InterfaceName | None = None
    members: tuple[StrictStr, ...] = ()
    mode: BondMode | None = None
    options: dict[BondOption, StrictStr | StrictInt] = {}
    link: StrictStr | None = None
    vlan: fields.VlanId | None = None

    @model_validator(mode="after")
    def _check(self) -> Link:
        bond: dict[str, object] = {"members": self.members, "mode": self.mode, "options": self.options}
        vlan: dict[str, object] = {"link": self.link, "vlan": self.vlan}
        own: dict[str, dict[str, object]] = {
            "phy": {"mac": self.mac},
            "bond": {"members": self.members, "mode": self.mode},
            "vlan": vlan,
        }
        needed = own[self.type]
        missing = [name for name, value in needed.items() if not value]
        if missing:
            raise ValueError(f"a link of type {self.type} needs {' and '.join(missing)}")
        others = {"phy": bond | vlan, "bond": vlan, "vlan": bond}[self.type]
        extra = [name for name, value in others.items() if value]
        if extra:
            raise ValueError(f"a link of type {self.type} takes no {' or '.join(extra)}")
        return self


class Route(SpecModel):
    """The gateway for one network."""

    network: fields.RouteTarget
    gateway: fields.Address


class Subnet(SpecModel):
    """One way a link gets an address; ``ipv4`` and ``ipv6`` are static and take address, gateway, routes."""

    link: StrictStr
    type: SubnetType
    address: fields.Interface | None = None
    gateway: fields.Address | None = None
    routes: tuple[Route, ...] = ()

    @property
    def is_static(self) -> bool:
        return self.type in ("ipv4", "ipv6")

    @property
    def version(self) -> int:
        """4 or 6."""
        return 4 if self.type.startswith("ipv4") else 6

    @model_validator(mode="after")
    def _check(self) -> Subnet:
        if not self.is_static:
            if self.address or self.gateway or self.routes:
                raise ValueError(f"type {self.type} takes no address, gateway or routes")
            return self
        if self.address is None:
            raise ValueError(f"type {self.type} needs an address with its prefix length")
        if self.address.version != self.version or not is_host(self.address):
            raise ValueError(f"{self.address} is not the IPv{self.version} address of one host in its network")
        for route in self.routes:
            if route.network.version != self.version:
                raise ValueError(f"the route to {route.network} is not IPv{self.version}")
            if self.gateway and route.network.prefixlen == 0:
                raise ValueError("a gateway and a route to everywhere: give one of them")
        for gateway in [self.gateway, *(route.gateway for route in self.routes)]:
            if gateway is not None and (problem := gateway_problem(gateway, self.address)):
                raise ValueError(problem)
        return self


def is_host(own: fields.IpInterface) -> bool:
    """Whether one host may have this address in this network."""
    address, network = own.ip, own.network
    if address.is_multicast or address.is_unspecified or address.is_loopback or network.prefixlen == 0:
        return False
    edges = (network.network_address, network.broadcast_address)
    return own.version == 6 or network.prefixlen >= 31 or address not in edges


def gateway_problem(gateway: fields.IpAddress, own: fields.IpInterface) -> str | None:
    """Why a host with the address ``own`` cannot send to ``gateway``; None if it can."""
    if gateway.version == own.version == 6 and gateway.is_link_local:
        return None  # on the link whatever the prefix
    if gateway not in own.network:
        return f"gateway {gateway} is outside {own.network}, the network of the address"
    return f"gateway {gateway} is the guest's own address" if gateway == own.ip else None


class Network(SpecModel):
    """Links, the networks on them, and name servers with the domains to search."""

    links: Annotated[tuple[Link, ...], fields.NOT_EMPTY]
    networks: Annotated[tuple[Subnet, ...], fields.NOT_EMPTY]
    dns: tuple[fields.Address, ...] = ()
    search: tuple[fields.Hostname, ...] = ()

    @classmethod
    def dhcp(cls, mac: str, *, link: str = "eth0") -> Network:
        """One link that asks DHCP for an IPv4 address."""
        return cls(links=(Link(id=link, mac=mac),), networks=(Subnet(link=link, type="ipv4_dhcp"),))

    @property
    def adapters(self) -> tuple[Link, ...]:
        """The links that are adapters of the machine."""
        return tuple(link for link in self.links if link.type == "phy")

    def mac_of(self, link: Link) -> str:
        """The MAC address that a link has: its own, or that of what is below it."""
        while link.mac is None:
            link = self.by_id(link.members[0] if link.type == "bond" else link.link or "")
        return link.mac

    def by_id(self, identifier: str) -> Link:
        return next(link for link in self.links if link.id == identifier)

    def device_name(self, link: Link) -> str:
        """What Linux will call it: ``name``, else made of the id, and for a VLAN ``below.number`` as usual."""
        if link.name is not None:
            return link.name
        if link.type == "vlan":
            return f"{self.device_name(self.by_id(link.link or ''))}.{link.vlan}"
        return link.id

    @model_validator(mode="after")
    def _check(self) -> Network:
        ids = [link.id for link in self.links]
        problems = [
            f"networks[{index}].link {subnet.link!r} is none of the links {', '.join(ids)}"
            for index, subnet in enumerate(self.networks)
            if subnet.link not in ids
        ]
        given = [f"link id {i!r}" for i in ids]
        given += [f"MAC address {link.mac}" for link in self.adapters]
        given += [f"interface name {link.name!r}" for link in self.links if link.name]
        given += [f"address {subnet.address.ip}" for subnet in self.networks if subnet.address]
        given += [f"{s.type} on link {s.link!r}" for s in self.networks if not s.is_static]
        given += [f"name server {address}" for address in self.dns]
        problems += [f"{what} is given twice" for what, count in Counter(given).items() if count > 1]
        problems += self._below()
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _below(self) -> Iterator[str]:
        """What is wrong with the links that bonds and VLANs stand on."""
        kinds = {link.id: link.type for link in self.links}
        members = Counter(member for link in self.links for member in link.members)
        for link in self.links:
            for member in link.members:
                if kinds.get(member) != "phy":
                    yield f"member {member!r} of bond {link.id!r} is no link of type phy"
            if link.type == "vlan" and kinds.get(link.link or "") not in ("phy", "bond"):
                yield f"VLAN {link.id!r} is on {link.link!r}, which is no link of type phy or bond"
        yield from (f"link {member!r} is in two bonds" for member, count in members.items() if count > 1)
        for subnet in self.networks:
            if subnet.link in members:
                yield f"link {subnet.link!r} is in a bond, so the bond has the addresses, not the link"
        tags = Counter((link.link, link.vlan) for link in self.links if link.type == "vlan")
        yield from (f"VLAN {vlan} is on link {link!r} twice" for (link, vlan), count in tags.items() if count > 1)
