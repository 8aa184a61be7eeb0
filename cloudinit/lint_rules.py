"""The rules of lint: one code each, with what happens to whom, and what to do about it.

Data only. `guests` are the profiles a rule is about (None: all of them), `errors_for` those for whom it is an error
where others are only warned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning"]
CLOUD_INIT = frozenset(("linux", "debian12", "rhel"))
IGNITION = frozenset(("flatcar", "fcos"))
WINDOWS = frozenset(("windows",))
_NOBODY: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Rule:
    """Why something matters and what to do."""

    severity: Severity
    why: str
    fix: str
    guests: frozenset[str] | None = None
    errors_for: frozenset[str] = _NOBODY


@dataclass(frozen=True, slots=True)
class Problem:
    """What was found where, by the code of its rule."""

    rule: str
    message: str
    where: str


RULES: dict[str, Rule] = {
    # The medium and its files
    "label": Rule("error", "no guest looks at a volume of that name", "label it config-2, or cidata for NoCloud"),
    "label-case": Rule(
        "warning",
        "some readers compare the label letter by letter",
        "write config-2 or cidata in lower case",
        errors_for=IGNITION,
    ),
    "meta-data-missing": Rule("error", "guests take nothing else without it", "add the file"),
    "meta-data-invalid": Rule("error", "guests give up on a file they cannot parse", "write it anew"),
    "user-data-missing": Rule("error", "NoCloud takes the medium only with both files", "add it; it may be empty"),
    "latest-missing": Rule(
        "error", "this guest reads openstack/latest and no other version", "add openstack/latest", WINDOWS | IGNITION
    ),
    "uuid-missing": Rule("error", "it is the instance id, without which the drive is broken", "set uuid"),
    "instance-id-constant": Rule(
        "warning",
        "every guest has this id, so changed user data is not run again and clones are not told apart",
        "give each guest an id of its own",
        CLOUD_INIT,
    ),
    "bios-guid": Rule(
        "warning",
        "cloud-init forgets the instance when the drive is gone unless the machine's UUID is the instance id",
        "set the machine's BIOS GUID to the uuid",
        CLOUD_INIT,
    ),
    "random-seed": Rule("error", "cloud-init calls the drive broken", "write base64", CLOUD_INIT),
    "content-missing": Rule("error", "the injected file would not be written", "add it, or drop the entry"),
    "empty-file": Rule(
        "error", "an empty optional file ends some versions of cloud-init", "leave the file out", CLOUD_INIT
    ),
    "datasource": Rule("error", "this guest has no reader for NoCloud", "use --datasource configdrive", IGNITION),
    "windows-nocloud": Rule(
        "warning",
        "cloudbase-init's NoCloud knows no password, and not every form of network",
        "use --datasource configdrive",
        WINDOWS,
    ),
    "ignition-hyperv": Rule(
        "warning",
        "the images made for Hyper-V read Ignition from the key-value pairs of the host, not from a drive",
        "convert the image made for OpenStack, or pass the config by KVP",
        IGNITION,
    ),
    "admin-pass": Rule("warning", "cloud-init ignores admin_pass", "set a password hash in user data", CLOUD_INIT),
    "no-login": Rule("warning", "nobody will be able to log in", "add --ssh-key FILE"),
    # The network
    "network-invalid": Rule("error", "guests give up on a file they cannot parse", "write it anew, or leave it out"),
    "network-empty": Rule(
        "error",
        "cloud-init takes it for a machine without network, and does not even ask DHCP",
        "leave the file out when the network is unknown",
    ),
    "mac-unknown": Rule(
        "error",
        "cloud-init stops at an adapter it does not find: no network, no user, no keys, no user data",
        "give the machine's adapter this static MAC address, or the link that of the adapter",
    ),
    "mac-missing": Rule("error", "adapters are found by their MAC address", "add it"),
    "mac-spelling": Rule(
        "error", "cloud-init compares text and finds no such adapter", "write it like 02:15:5d:00:00:01"
    ),
    "mac-repeated": Rule("error", "two links would be one adapter", "give each its own"),
    "nic-unconfigured": Rule("warning", "this adapter of the machine stays without an address", "add a link for it"),
    "link-unknown": Rule("error", "it refers to a link that is not there", "name one of the links"),
    "link-id-repeated": Rule("error", "the second replaces the first", "give each its own id"),
    "link-incomplete": Rule("error", "cloud-init fails on it", "add what is missing"),
    "link-name": Rule(
        "error", "Linux takes no such name for an interface", "use up to 15 letters and digits", CLOUD_INIT
    ),
    "network-type": Rule("warning", "guests know no such type and leave it out", "use a type of OpenStack"),
    "address-missing": Rule("error", "a static network needs an address", "add it"),
    "address-invalid": Rule("error", "cloud-init fails on it", "write an address, its netmask in a field of its own"),
    "address-repeated": Rule("error", "two adapters would answer for one address", "give each its own"),
    "netmask-invalid": Rule("error", "cloud-init fails on it", "write a netmask such as 255.255.255.0"),
    "gateway-outside": Rule(
        "error", "the guest cannot reach it, and so nothing beyond", "name a host of the network"
    ),
    "route-invalid": Rule("error", "cloud-init fails on it", "write network, netmask and gateway"),
    "dns-invalid": Rule("error", "it is no address that could be asked", "write an IP address"),
    "dns-only-in-networks": Rule(
        "warning",
        "cloud-init 22.4 looks for name servers in the list services at the end only",
        "repeat them there",
        CLOUD_INIT,
    ),
    "rhel-dns": Rule(
        "warning",
        "with IPv4 and IPv6 on one adapter its ifcfg file keeps the name servers of one; resolv.conf has all",
        "nothing, unless NetworkManager is to know them all",
        frozenset(("rhel",)),
    ),
    "bond-options": Rule(
        "warning",
        "cloud-init 22.4 hands bond_mode to NetworkManager under another name, which then balances round-robin",
        "use NoCloud, or another mode once the guest is up",
        frozenset(("rhel",)),
    ),
    "network-wrapped": Rule(
        "warning", "older cloud-init knows no key network: around it", "begin with version:", CLOUD_INIT
    ),
    "route-to-default": Rule(
        "warning",
        "cloud-init 22.4 ends with 'default is not a valid ip address'",
        "write 0.0.0.0/0 or ::/0",
        CLOUD_INIT,
        frozenset(("debian12",)),
    ),
    "ignition-network": Rule(
        "warning", "this guest reads no network from a drive", "use its Ignition config", IGNITION
    ),
    "windows-link-id": Rule(
        "warning",
        "cloudbase-init renames the adapter to the link's id, which hangs on some versions with names like this",
        "use an id such as Ethernet",
        WINDOWS,
    ),
    "windows-vlan": Rule("error", "cloudbase-init makes VLANs on teams only", "put it on a bond", WINDOWS),
    "windows-routes": Rule(
        "warning", "cloudbase-init sets the default route only", "add routes by a script", WINDOWS
    ),
    "windows-network-config": Rule("error", "cloudbase-init fails on it", "match by macaddress; write dhcp", WINDOWS),
    # User data
    "user-data-size": Rule("error", "Nova takes no more, and neither do some readers", "compress it with gzip"),
    "user-data-header": Rule(
        "error", "guests tell its kind by the first line, and ignore what has none", "begin with #cloud-config or #!"
    ),
    "user-data-bom": Rule("error", "the mark before the first line hides it", "save as UTF-8 without BOM"),
    "user-data-crlf": Rule(
        "error", "Linux looks for an interpreter with a carriage return in its name", "save with LF", CLOUD_INIT
    ),
    "user-data-kind": Rule("error", "this guest runs nothing of the kind", "write it for this guest"),
    "user-data-mime": Rule("error", "guests find no parts in it", "let user_data_parts make it"),
    "user-data-gzip": Rule("error", "it does not unpack", "compress it anew"),
    "cloud-config-yaml": Rule("error", "cloud-init leaves all of it out", "mend the YAML"),
    "cloud-config-type": Rule("error", "cloud-init skips a setting of the wrong type", "write the type it expects"),
    "cloud-config-key": Rule("warning", "no cloud-init knows the setting, so nothing happens", "check the spelling"),
    "cloud-config-network": Rule(
        "warning", "cloud-init takes no network from user data", "use the network of the spec", CLOUD_INIT
    ),
    "cloud-config-subset": Rule(
        "warning", "this guest's agent knows a few settings only, and not this one", "do it by a script"
    ),
    "cloud-config-schema": Rule(
        "warning",
        "the schema of the cloud-init that is installed here says so; the guest's may be another version",
        "mend it",
        CLOUD_INIT,
    ),
}
