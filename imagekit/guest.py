"""Who a guest is: a spec from a file, from keywords, or both, completed so that everything can derive from it.

Keywords win over the file. The uuid is made up when nobody gave one; the MAC address and the disk's id derive from
it, so that two machines never share one and one machine never has two.
"""

from __future__ import annotations

import base64
import os
import re
import secrets
from collections.abc import Mapping
from uuid import UUID, uuid4, uuid5

from imagekit.cloudinit.model import Network, Spec, derive_mac, load_spec, parse_spec
from imagekit.cloudinit.passwords import generate_password as make_password
from imagekit.errors import InvalidSpec, UsageError
from imagekit.machine import Nic
from imagekit.records import dataclass
from imagekit.remote.addresses import file_name

SEED_SIZE = 512
"""Bytes of a random seed, as many as Nova gives."""
SpecLike = Spec | Mapping[str, object] | str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Guest:
    """A complete spec, and the MAC address of the first adapter."""

    spec: Spec
    uuid: str
    mac: str
    generated: bool = False
    """Whether the password was made here, so that somebody has to be told."""

    @property
    def nics(self) -> tuple[Nic, ...]:
        """One adapter a link of the network, one in any case."""
        network, machine = self.spec.network, self.spec.machine
        macs = [link.mac or self.mac for link in network.adapters] if network else [self.mac]
        return tuple(Nic(mac=mac, switch=machine.switch, vlan=machine.vlan) for mac in macs)

    def disk_identifier(self, index: int = 0) -> UUID:
        """The id of the guest's disk number ``index``."""
        return uuid5(UUID(self.uuid), f"imagekit disk {index}")


def make_guest(
    spec: SpecLike | None = None,
    *,
    default_name: str | None = None,
    default_uuid: str | None = None,
    default_guest: str | None = None,
    network: str | Mapping[str, object] | None = None,
    mac: str | None = None,
    generate_password: bool = False,
    **fields: object,
) -> Guest:
    """The guest that a spec (a file, plain values or a Spec) and keywords describe.

    ``fields`` are those of the spec, None for not given; ``machine`` and ``meta`` are merged key by key.
    ``network`` is ``"dhcp"`` or the spec's network section; ``generate_password`` makes up a password.
    Raises InvalidSpec, SourceError or UsageError.
    """
    given = {key: value for key, value in fields.items() if value is not None}
    if generate_password:
        if "password" in given:
            raise UsageError("a password, and one to be made", hint="leave out one of them")
        given["password"] = make_password()
    dhcp = network == "dhcp"
    if network is not None and not dhcp:
        given["network"] = network
    defaults: dict[str, object] = {"name": default_name, "uuid": default_uuid, "guest": default_guest}
    defaults = {key: value for key, value in defaults.items() if value is not None}
    parsed = _read(spec, given, defaults)
    uuid = parsed.uuid or default_uuid or str(uuid4())
    parsed = parsed.model_copy(update={"uuid": uuid})
    if mac is not None and parsed.network is not None and not dhcp:
        raise UsageError("a MAC address and a network with links", hint="write the MAC into the network's link")
    if mac is not None or dhcp:
        try:
            link = "Ethernet" if parsed.guest == "windows" else "eth0"  # what the adapter will be called
            asked = Network.dhcp(mac or derive_mac(uuid), link=link)
        except ValueError:
            raise InvalidSpec(
                f"{mac!r} is not the MAC address of an adapter", hint="write it like 02:15:5d:00:00:01"
            ) from None
        mac = asked.adapters[0].mac
        parsed = parsed.model_copy(update={"network": asked if dhcp else None})
    elif parsed.network is not None:
        mac = parsed.network.adapters[0].mac
    if parsed.random_seed == "random":
        seed = base64.b64encode(secrets.token_bytes(SEED_SIZE)).decode()
        parsed = parsed.model_copy(update={"random_seed": seed})
    return Guest(parsed, uuid, mac or derive_mac(uuid), generate_password)


def _read(spec: SpecLike | None, given: dict[str, object], defaults: dict[str, object]) -> Spec:
    if isinstance(spec, Spec):
        if given:
            raise UsageError(f"a Spec and keywords as well: {', '.join(given)}", hint="use spec.model_copy")
        return spec
    if isinstance(spec, str | os.PathLike):
        return load_spec(spec, defaults=defaults, overrides=given)
    return parse_spec({**defaults, **(spec or {}), **given})


def name_for(image: str | os.PathLike[str]) -> str:
    """A machine name made of an image's file name."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", file_name(image).split(".")[0]).strip("._-")
    return stem[:64] or "guest"
