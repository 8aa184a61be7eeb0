"""The spec of one guest: what it is called, who may log in, its network, its machine.

The fields are those of the README ("The spec"). Values are checked as far as they can be without knowing
the guest or the host: syntax, ranges, and that references and addresses fit together. What a particular
guest makes of a legal value is the business of lint, and what is written for it that of the renderers
(`configdrive`).

`load_spec` and `parse_spec` raise InvalidSpec that lists every wrong field; the classes, when called
directly, raise pydantic's ValidationError. Password, keys and user data appear in no message and in no
repr.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError, model_validator

from imagekit.cloudinit import fields
from imagekit.cloudinit.specfile import FieldPath, SpecText, read_regular_file, read_spec_file
from imagekit.errors import InvalidSpec, SourceError

MAX_USER_DATA_FILE = 4 << 20
"""Bytes read from a ``user_data_file``; each medium has its own, smaller limit."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class Link(_Model):
    """A network adapter, recognised by its MAC address (kept as lower-case, with colons).

    In Windows, cloudbase-init renames the adapter to ``id``.
    """

    id: fields.LinkId
    mac: fields.Mac
    mtu: fields.Mtu | None = None


class Route(_Model):
    """The gateway for one network."""

    network: fields.RouteTarget
    gateway: fields.Address


class Subnet(_Model):
    """One way a link gets an address; ``ipv4`` and ``ipv6`` are static and take address, gateway, routes."""

    link: StrictStr
    type: Literal["ipv4", "ipv4_dhcp", "ipv6", "ipv6_dhcp", "ipv6_slaac"]
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
        if self.address.version != self.version or not _is_host(self.address):
            raise ValueError(f"{self.address} is not the IPv{self.version} address of one host in its network")
        for route in self.routes:
            if route.network.version != self.version:
                raise ValueError(f"the route to {route.network} is not IPv{self.version}")
            if self.gateway and route.network.prefixlen == 0:
                raise ValueError("a gateway and a route to everywhere: give one of them")
        for gateway in [self.gateway, *(route.gateway for route in self.routes)]:
            if gateway is not None:
                _check_gateway(gateway, self.address)
        return self


def _is_host(own: fields.IpInterface) -> bool:
    address, network = own.ip, own.network
    if address.is_multicast or address.is_unspecified or address.is_loopback or network.prefixlen == 0:
        return False
    edges = (network.network_address, network.broadcast_address)
    return own.version == 6 or network.prefixlen >= 31 or address not in edges


def _check_gateway(gateway: fields.IpAddress, own: fields.IpInterface) -> None:
    if gateway.version == own.version == 6 and gateway.is_link_local:
        return  # on the link whatever the prefix
    if gateway not in own.network:
        raise ValueError(f"gateway {gateway} is outside {own.network}, the network of the address")
    if gateway == own.ip:
        raise ValueError(f"gateway {gateway} is the guest's own address")


class Network(_Model):
    """Links, the networks on them, and name servers."""

    links: Annotated[tuple[Link, ...], fields.NOT_EMPTY]
    networks: Annotated[tuple[Subnet, ...], fields.NOT_EMPTY]
    dns: tuple[fields.Address, ...] = ()

    @classmethod
    def dhcp(cls, mac: str) -> Network:
        """One link, ``eth0``, that asks DHCP for an IPv4 address."""
        return cls(links=(Link(id="eth0", mac=mac),), networks=(Subnet(link="eth0", type="ipv4_dhcp"),))

    @model_validator(mode="after")
    def _check(self) -> Network:
        ids = [link.id for link in self.links]
        problems = [
            f"networks[{index}].link {subnet.link!r} is none of the links {', '.join(ids)}"
            for index, subnet in enumerate(self.networks)
            if subnet.link not in ids
        ]
        given = [f"link id {i!r}" for i in ids]
        given += [f"MAC address {link.mac}" for link in self.links]
        given += [f"address {subnet.address.ip}" for subnet in self.networks if subnet.address]
        given += [f"{s.type} on link {s.link!r}" for s in self.networks if not s.is_static]
        given += [f"name server {address}" for address in self.dns]
        problems += [f"{what} is given twice" for what, count in Counter(given).items() if count > 1]
        if problems:
            raise ValueError("; ".join(problems))
        return self


class Machine(_Model):
    """The virtual machine. ``memory`` is in bytes here, text such as ``2GiB`` in a spec."""

    generation: fields.Generation = "auto"
    cpus: Annotated[StrictInt, Field(ge=1, le=2048)] = 2
    memory: fields.Memory = 2 << 30
    switch: fields.Text | None = None
    vlan: Annotated[StrictInt, Field(ge=1, le=4094)] | None = None
    secure_boot: Literal["auto", "linux", "windows", "off"] = "auto"


class Spec(_Model):
    """One guest. ``uuid`` and ``network`` may be None until whoever builds the guest fills them in."""

    name: fields.Name
    uuid: fields.Uuid | None = None
    hostname: fields.Hostname | None = None
    ssh_keys: Annotated[tuple[fields.SshKey, ...], Field(repr=False)] = ()
    password: fields.Password | None = None
    user_data: Annotated[fields.UserData | None, Field(repr=False)] = None
    network: Network | None = None
    machine: Machine = Machine()
    meta: dict[fields.MetaKey, fields.MetaValue] = {}

    @property
    def guest_hostname(self) -> str:
        """``hostname``, else ``name`` as Nova would: lower case, hyphens for what a host name cannot hold."""
        if self.hostname is not None:
            return self.hostname
        return re.sub("[^a-z0-9-]+", "-", self.name.lower())[:63].strip("-")


def derive_mac(uuid: str, index: int = 0) -> str:
    """The MAC address of a guest's adapter ``index``: locally administered, always the same for one UUID."""
    digest = hashlib.sha256(f"{uuid.lower()}/{index}".encode()).digest()
    return ":".join(f"{byte:02x}" for byte in (0x02, *digest[:5]))


def load_spec(
    path: str | os.PathLike[str],
    *,
    defaults: Mapping[str, object] | None = None,
    overrides: Mapping[str, object] | None = None,
) -> Spec:
    """Read a spec file, YAML or (``.json``) JSON; ``user_data_file`` is relative to its folder.

    ``overrides`` win over fields of the file and ``defaults`` lose to them, ``machine`` and ``meta`` key by
    key. Raises SourceError when the file cannot be read, InvalidSpec for what is in it.
    """
    path = Path(path)
    text = read_spec_file(path)
    values = _merge(_merge(defaults or {}, text.values), overrides or {})
    return _parse(SpecText(values, text.lines), path.parent, path)


def parse_spec(values: Mapping[str, object], *, folder: Path | None = None) -> Spec:
    """Make a spec of plain values; ``user_data_file`` is relative to ``folder``, by default the current one.

    Raises InvalidSpec that lists every wrong field.
    """
    return _parse(SpecText(values), folder or Path(), None)


def _merge(low: Mapping[str, object], high: Mapping[str, object]) -> dict[str, object]:
    result = dict(low)
    user_data = {"user_data", "user_data_file"}
    if user_data & high.keys():
        result = {key: value for key, value in result.items() if key not in user_data}
    for key, value in high.items():
        old = result.get(key)
        both = key in ("machine", "meta") and isinstance(old, Mapping) and isinstance(value, Mapping)
        result[key] = {**old, **value} if both else value  # type: ignore[dict-item]
    return result


def _parse(text: SpecText, folder: Path, path: Path | None) -> Spec:
    values = dict(text.values)
    problems: list[str] = []
    if (name := values.pop("user_data_file", None)) is not None:
        try:
            values["user_data"] = _read_user_data_file(name, folder, "user_data" in values)
        except (ValueError, SourceError) as error:
            problems.append(_located(("user_data_file",), str(error), text.lines))
    try:
        spec = Spec.model_validate(values)
    except ValidationError as error:
        problems += [_located(*_describe(item), text.lines) for item in error.errors(include_url=False)]
    if not problems:
        return spec
    count = "a wrong field" if len(problems) == 1 else f"{len(problems)} wrong fields"
    raise InvalidSpec(f"the spec has {count}:\n" + "\n".join(f"  {p}" for p in problems), path=path)


def _read_user_data_file(name: object, folder: Path, also_inline: bool) -> bytes:
    if also_inline:
        raise ValueError("user_data is given too: give one of them")
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError("expected the name of a file")
    return read_regular_file(folder / name, limit=MAX_USER_DATA_FILE)


_MODELS: dict[FieldPath, type[_Model]] = {
    (): Spec,
    ("machine",): Machine,
    ("network",): Network,
    ("network", "links"): Link,
    ("network", "networks"): Subnet,
    ("network", "networks", "routes"): Route,
}
_EXPECTED = {
    "string_type": "text (a number or true/false needs quotes to be text)",
    "int_type": "a whole number",
    "bytes_type": "text",
    "tuple_type": "a list",
    "dict_type": "fields such as 'role: web'",
    "model_type": "fields, each with its value",
    "string_too_short": "at least one character",
    "invalid_key": "the name of a field",
    "string_unicode": "text that UTF-8 can express",
}
_SECRET = ("password", "user_data", "ssh_keys")


def _describe(error: Any) -> tuple[FieldPath, str]:
    """One of pydantic's errors as the field's path and a sentence: what was found, what was expected."""
    # "[key]" is pydantic's mark for a wrong key of a mapping, not a part of the path.
    path: FieldPath = tuple(part for part in error["loc"] if part != "[key]")
    if error["type"] == "missing":
        return path, "missing"
    if error["type"] == "extra_forbidden":
        place = tuple(part for part in path[:-1] if isinstance(part, str))
        known = [*_MODELS[place].model_fields, *(["user_data_file"] if place == () else [])]
        return path, f"unknown field; the fields here are {', '.join(known)}"
    value = error["input"]
    if error["type"] == "value_error":
        expected = str(error["ctx"]["error"])
        if isinstance(value, Mapping | _Model):  # the fields are right, but not together
            return path, expected
    else:
        expected = _EXPECTED.get(error["type"], error["msg"].removeprefix("Input should be "))
    return path, f"found {_found(value, hidden=path[0] in _SECRET)}, expected {expected}"


def _found(value: object, *, hidden: bool) -> str:
    """A short name for a value of a spec, for messages; ``hidden`` values are named by their type only."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "fields"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    if hidden:
        return "text" if isinstance(value, str | bytes) else "something that is not text"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:77]}..."


def _located(path: FieldPath, problem: str, lines: Mapping[FieldPath, int]) -> str:
    names = [part if isinstance(part, str) and part.isprintable() else [part] for part in path]
    name = "".join(f".{part}" if isinstance(part, str) else str(part) for part in names).removeprefix(".")
    known = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
    return f"{name}: {problem}" if known is None else f"{name} (line {known}): {problem}"
