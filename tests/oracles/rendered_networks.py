"""Reads what cloud-init wrote for a guest's network: netplan, ifupdown (eni), sysconfig and NetworkManager.

Each reader takes the folder that stands for the guest's root and knows just the files that cloud-init writes there.
"""

from __future__ import annotations

import configparser
import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from ipaddress import ip_interface, ip_network
from pathlib import Path
from typing import Any

import yaml

from tests.network_shapes import Device, Rendered


class _Collected:
    """Devices as they come together from several files and lines."""

    def __init__(self) -> None:
        self.fields: dict[str, dict[str, Any]] = defaultdict(dict)
        self.dns: set[str] = set()

    def add(self, name: str, field: str, *values: Any) -> None:
        self.fields[name].setdefault(field, set()).update(values)

    def set(self, name: str, **fields: Any) -> None:
        self.fields[name].update({key: value for key, value in fields.items() if value is not None})

    def rendered(self) -> Rendered:
        devices = {}
        for name, fields in self.fields.items():
            values: dict[str, Any] = {
                key: frozenset(value) if isinstance(value, set) else value for key, value in fields.items()
            }
            members = values.pop("members", frozenset())
            mode = values.pop("mode", None)
            if mode is not None:
                values["bond"] = (mode, members)
            devices[name] = Device(**values)
        return Rendered(devices, frozenset(self.dns))


def _cidr(address: str, netmask: str = "") -> str:
    return str(ip_interface(f"{address}/{netmask}" if netmask else address))


def _route(target: str, netmask: str = "") -> str:
    if target in ("default", "0.0.0.0", "::") and not netmask.strip("0."):
        return "::/0" if target == "::" else "0.0.0.0/0"
    return str(ip_network(f"{target}/{netmask}" if netmask else target))


def _everywhere(gateway: str) -> str:
    return "::/0" if ":" in gateway else "0.0.0.0/0"


def netplan(root: Path) -> Rendered:
    config = yaml.safe_load((root / "etc/netplan/50-cloud-init.yaml").read_text(encoding="utf-8"))["network"]
    found = _Collected()
    for section in ("ethernets", "bonds", "vlans"):
        for name, device in config.get(section, {}).items():
            found.set(name, mtu=device.get("mtu"), mac=device.get("match", {}).get("macaddress"))
            found.add(name, "addresses", *map(_cidr, device.get("addresses", [])))
            for key in ("gateway4", "gateway6"):
                if key in device:
                    found.add(name, "routes", (_everywhere(device[key]), device[key]))
            for route in device.get("routes", []):
                target = _everywhere(route["via"]) if route["to"] == "default" else _route(route["to"])
                found.add(name, "routes", (target, route["via"]))
            found.set(name, dhcp4=device.get("dhcp4"), auto6=device.get("dhcp6") or device.get("accept-ra"))
            found.dns.update(device.get("nameservers", {}).get("addresses", []))
            if section == "bonds":
                found.set(name, mode=device["parameters"]["mode"])
                found.add(name, "members", *device["interfaces"])
            if section == "vlans":
                found.set(name, vlan=(device["link"], device["id"]))
    return found.rendered()


def eni(root: Path) -> Rendered:
    found = _Collected()
    name = family = ""
    for line in (root / "etc/network/interfaces.d/50-cloud-init").read_text(encoding="utf-8").splitlines():
        words = line.split()
        if not words or words[0] in ("auto", "source", "source-directory") or words[:2] == ["iface", "lo"]:
            name = "" if words[:2] == ["iface", "lo"] else name
            continue
        if words[0] == "iface":
            name, family = words[1].split(":")[0], words[2]
            _eni_method(found, name, family, words[3])
        elif name or words[0] == "dns-nameservers":
            _eni_option(found, name, words)
    for fields in found.fields.values():
        if not fields.pop("is_bond", False):  # members repeat the mode
            fields.pop("mode", None)
    rules = root / "etc/udev/rules.d/70-persistent-net.rules"
    text = rules.read_text(encoding="utf-8") if rules.exists() else ""
    for mac, named in re.findall(r'ATTR\{address\}=="([^"]+)".*NAME="([^"]+)"', text):
        found.set(named, mac=mac)
    return found.rendered()


def _eni_method(found: _Collected, name: str, family: str, method: str) -> None:
    found.fields[name]
    if family == "inet" and method == "dhcp":
        found.set(name, dhcp4=True)
    if family == "inet6" and method in ("dhcp", "auto"):
        found.set(name, auto6=True)


def _eni_option(found: _Collected, name: str, words: list[str]) -> None:
    key, *values = words
    if key == "address":
        found.add(name, "addresses", _cidr(values[0]))
    elif key == "gateway":
        found.add(name, "routes", (_everywhere(values[0]), values[0]))
    elif key in ("dns-nameservers", "dns-nameserver"):
        found.dns.update(values)
    elif key == "mtu":
        found.set(name, mtu=int(values[0]))
    elif key in ("bond-mode", "bond_mode"):
        found.set(name, mode=values[0])
    elif key == "bond-slaves":
        found.set(name, is_bond=True)
    elif key in ("bond-master", "bond_master"):
        found.add(values[0], "members", name)
    elif key in ("vlan-raw-device", "vlan_raw_device"):
        found.set(name, vlan=(values[0], int(name.rpartition(".")[2])))
    elif key == "post-up":
        _eni_route(found, name, values)


def _eni_route(found: _Collected, name: str, words: list[str]) -> None:
    """``route add -net TARGET netmask MASK gw GATEWAY``, ``-A inet6 TARGET/PREFIX gw GATEWAY``, ``default gw``."""
    gateway = words[words.index("gw") + 1]
    if "default" in words:
        target = _everywhere(gateway)
    elif "-net" in words:
        target = _route(
            words[words.index("-net") + 1], words[words.index("netmask") + 1] if "netmask" in words else ""
        )
    else:
        target = _route(words[words.index("inet6") + 1])
    found.add(name, "routes", (target, gateway))


def sysconfig(root: Path) -> Rendered:
    found = _Collected()
    folder = root / "etc/sysconfig/network-scripts"
    for path in sorted(folder.glob("ifcfg-*")):
        values = _shell(path)
        name = values["DEVICE"]
        mtu = values.get("MTU")
        found.set(name, mac=values.get("HWADDR"), mtu=None if mtu is None else int(mtu))
        for key, value in values.items():
            if match := re.fullmatch(r"IPADDR(\d*)", key):
                found.add(name, "addresses", _cidr(value, values[f"NETMASK{match[1]}"]))
            if key in ("IPV6ADDR", "IPV6ADDR_SECONDARIES"):
                found.add(name, "addresses", *map(_cidr, value.split()))
            if key in ("GATEWAY", "IPV6_DEFAULTGW"):
                found.add(name, "routes", (_everywhere(value), value))
            if re.fullmatch(r"DNS\d+", key):
                found.dns.add(value)
        dynamic = values.get("DHCPV6C") == "yes" or values.get("IPV6_AUTOCONF") == "yes"
        found.set(name, dhcp4=values["BOOTPROTO"] == "dhcp", auto6=dynamic)
        if "MASTER" in values:
            found.add(values["MASTER"], "members", name)
        if options := values.get("BONDING_OPTS"):
            found.set(name, mode=dict(option.split("=", 1) for option in options.split())["mode"])
        if values.get("VLAN") == "yes":
            found.set(name, vlan=(values["PHYSDEV"], int(name.rpartition(".")[2])))
    for path in sorted(folder.glob("route-*")):
        values = _shell(path)
        for key, target in values.items():
            if match := re.fullmatch(r"ADDRESS(\d+)", key):
                gateway, mask = values[f"GATEWAY{match[1]}"], values[f"NETMASK{match[1]}"]
                found.add(path.name.partition("-")[2], "routes", (_route(target, mask), gateway))
    for path in sorted(folder.glob("route6-*")):
        for target, gateway in re.findall(r"^(\S+) via (\S+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            found.add(path.name.partition("-")[2], "routes", (_route(target), gateway))
    resolv = root / "etc/resolv.conf"
    if resolv.exists():
        found.dns.update(re.findall(r"^nameserver (\S+)", resolv.read_text(encoding="utf-8"), re.MULTILINE))
    return found.rendered()


def _shell(path: Path) -> dict[str, str]:
    words = shlex.split(path.read_text(encoding="utf-8"), comments=True)
    return {key: value for key, _, value in (word.partition("=") for word in words)}


def network_manager(root: Path) -> Rendered:
    found = _Collected()
    files = sorted((root / "etc/NetworkManager/system-connections").glob("*.nmconnection"))
    profiles = {}
    for path in files:
        profile = configparser.ConfigParser(interpolation=None)
        profile.read(path, encoding="utf-8")
        profiles[path.stem.removeprefix("cloud-init-")] = profile
    by_uuid = {profile["connection"]["uuid"]: name for name, profile in profiles.items()}
    for name, profile in profiles.items():
        ethernet: Mapping[str, str] = profile["ethernet"] if profile.has_section("ethernet") else {}
        mac, mtu = ethernet.get("mac-address"), ethernet.get("mtu")
        found.set(name, mac=mac and mac.lower(), mtu=None if mtu is None else int(mtu))
        for family in ("ipv4", "ipv6"):
            if profile.has_section(family):
                _profile(found, name, family, profile[family])
        if master := profile["connection"].get("master"):
            found.add(by_uuid[master], "members", name)
        if profile.has_section("bond"):
            found.set(name, mode=profile["bond"].get("mode", "balance-rr"))
        if profile.has_section("vlan"):
            parent = profile["vlan"]["parent"]
            found.set(name, vlan=(by_uuid.get(parent, parent), int(profile["vlan"]["id"])))
    return found.rendered()


def _profile(found: _Collected, name: str, family: str, values: Mapping[str, str]) -> None:
    if values["method"] == "auto":
        found.set(name, **{"dhcp4" if family == "ipv4" else "auto6": True})
    for key, value in values.items():
        if re.fullmatch(r"address\d+", key):
            found.add(name, "addresses", _cidr(value))
        if key == "gateway":
            found.add(name, "routes", (_everywhere(value), value))
        if re.fullmatch(r"route\d+", key):
            target, _, gateway = value.partition(",")
            found.add(name, "routes", (_route(target), gateway))
        if key == "dns":
            found.dns.update(_items(value))


def _items(value: str) -> Iterable[str]:
    return [item for item in value.split(";") if item]


READERS: dict[str, Callable[[Path], Rendered]] = {
    "netplan": netplan,
    "eni": eni,
    "sysconfig": sysconfig,
    "network-manager": network_manager,
}
