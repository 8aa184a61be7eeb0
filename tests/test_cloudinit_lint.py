"""Lint: every trap is found before the boot, with the code of its rule, and a sound tree has none."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
import yaml

from imagekit.cloudinit.lint import Finding, enforce, judge
from imagekit.cloudinit.lint_rules import RULES
from imagekit.cloudinit.model import GUEST_PROFILES, GuestProfile, parse_spec
from imagekit.cloudinit.render import Rendering
from imagekit.cloudinit.tree import MetadataTree
from imagekit.errors import InvalidSpec, UsageError
from tests.cloudinit_specs import FULL, MAC, UUID

LATEST = "openstack/latest/"
SPEC = {**FULL, "password": None}


@dataclass(frozen=True)
class Nic:
    mac: str


@dataclass(frozen=True)
class Computer:
    uuid: str = UUID
    nics: tuple[Nic, ...] = (Nic(MAC),)


def drive(values: dict[str, Any] | None = None, datasource: Any = "configdrive", **how: Any) -> MetadataTree:
    return Rendering(datasource, **how).render(parse_spec({**SPEC, **(values or {})}))


def codes(found: list[Finding]) -> set[str]:
    return {finding.rule for finding in found}


def with_files(tree: MetadataTree, **files: bytes | None) -> MetadataTree:
    """The tree with these files of both version folders (or of the root) replaced; None takes one away."""
    kept = dict(tree.files)
    for word, content in files.items():
        name = word.replace("__", "-" if tree.datasource == "nocloud" else ".")
        for path in [p for p in kept if p.rpartition("/")[2] == name] or [name]:
            kept.pop(path, None)
            if content is not None:
                kept[path] = content
    return replace(tree, files=kept)


def network(**changes: Any) -> bytes:
    data = json.loads(drive().files[f"{LATEST}network_data.json"])
    return json.dumps({**data, **changes}).encode()


def judged(network_data: bytes, guest: GuestProfile = "linux") -> set[str]:
    return codes(judge(with_files(drive(), network_data__json=network_data), guest=guest, machine=Computer()))


@pytest.mark.parametrize("datasource", ["configdrive", "nocloud", "cloudstack"])
def test_a_sound_spec_has_no_findings(datasource: Any) -> None:
    assert judge(drive(datasource=datasource), machine=Computer()) == []
    assert judge(drive(datasource="nocloud", network_config=2), guest="debian12", machine=Computer()) == []


def test_a_spec_is_judged_by_what_is_rendered_of_it() -> None:
    assert judge(parse_spec(SPEC), machine=Computer()) == []
    assert codes(judge(parse_spec({"name": "a", "uuid": UUID}))) == {"no-login"}


def test_a_guest_nobody_knows_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="guest 'beos'"):
        judge(drive(), guest="beos")  # type: ignore[arg-type]


def test_a_mac_address_that_the_machine_has_not_is_an_error() -> None:
    """The guest that boots with it has no network, no user and no keys."""
    other = Computer(nics=(Nic("02:15:5d:00:00:99"),))
    for datasource in ("configdrive", "nocloud"):
        found = judge(drive(datasource=datasource), machine=other)
        assert codes(found) == {"mac-unknown", "nic-unconfigured"}
        with pytest.raises(InvalidSpec, match="mac-unknown"):
            enforce(found)


@pytest.mark.parametrize("content", [b"{}", b'{"links": [], "networks": [], "services": []}'])
def test_an_empty_network_is_an_error(content: bytes) -> None:
    """cloud-init would configure nothing, and not fall back to DHCP."""
    assert judged(content) == {"network-empty"}


def test_nova_s_own_empty_network_is_found_too() -> None:
    spec = parse_spec({**SPEC, "network": None})
    assert codes(judge(spec, rendering=Rendering(nova_compatible=True))) == {"network-empty"}


LINK = {"id": "eth0", "type": "phy", "ethernet_mac_address": MAC}
STATIC = {"id": "n", "link": "eth0", "type": "ipv4", "ip_address": "192.0.2.10", "netmask": "255.255.255.0"}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"links": [{**LINK, "ethernet_mac_address": "02-15-5D-00-00-01"}]}, "mac-spelling"),
        ({"links": [{**LINK, "ethernet_mac_address": None}]}, "mac-missing"),
        ({"links": [LINK, {**LINK, "id": "eth1"}]}, "mac-repeated"),
        ({"links": [LINK, LINK]}, "link-id-repeated"),
        ({"links": [{"type": "phy", "ethernet_mac_address": MAC}]}, "link-incomplete"),
        ({"links": [LINK, {"id": "v", "type": "vlan", "vlan_id": 7, "vlan_mac_address": MAC}]}, "link-incomplete"),
        (
            {"links": [LINK, {"id": "b", "type": "bond", "bond_mode": "802.3ad", "bond_links": ["x"]}]},
            "link-unknown",
        ),
        ({"networks": [{**STATIC, "link": "eth9"}]}, "link-unknown"),
        ({"networks": [{**STATIC, "type": "ipv5"}]}, "network-type"),
        ({"networks": [{**STATIC, "ip_address": None}]}, "address-missing"),
        ({"networks": [{**STATIC, "ip_address": "192.0.2.300"}]}, "address-invalid"),
        ({"networks": [{**STATIC, "ip_address": "192.0.2.10/24"}]}, "address-invalid"),
        ({"networks": [{**STATIC, "ip_address": "192.0.2.0"}]}, "address-invalid"),
        ({"networks": [{**STATIC, "netmask": "garbage255.128.0.0"}]}, "netmask-invalid"),
        ({"networks": [{**STATIC, "netmask": "255.0.255.0"}]}, "netmask-invalid"),
        ({"networks": [STATIC, {**STATIC, "id": "m"}]}, "address-repeated"),
        (
            {
                "networks": [
                    {**STATIC, "routes": [{"network": "0.0.0.0", "netmask": "0.0.0.0", "gateway": "10.0.0.1"}]}
                ]
            },
            "gateway-outside",
        ),
        (
            {"networks": [{**STATIC, "routes": [{"network": "10.0.0.1", "netmask": "255.0.0.0"}]}]},
            "route-invalid",
        ),
        ({"services": [{"type": "dns", "address": "example"}]}, "dns-invalid"),
        ({"services": []}, "dns-only-in-networks"),
    ],
)
def test_a_network_that_guests_stumble_over_is_found(changes: dict[str, Any], code: str) -> None:
    assert code in judged(network(**changes))


@pytest.mark.parametrize(
    ("guest", "changes", "code"),
    [
        ("windows", {"links": [{**LINK, "id": "tap12ab34cd-56"}]}, "windows-link-id"),
        (
            "windows",
            {
                "links": [
                    LINK,
                    {"id": "v", "type": "vlan", "vlan_link": "eth0", "vlan_id": 7, "vlan_mac_address": MAC},
                ]
            },
            "windows-vlan",
        ),
        ("windows", {}, "windows-routes"),
        ("flatcar", {}, "ignition-network"),
        ("rhel", {}, "rhel-dns"),
    ],
)
def test_some_traps_are_for_some_guests_only(guest: GuestProfile, changes: dict[str, Any], code: str) -> None:
    assert code in judged(network(**changes), guest)
    assert code not in judged(network(**changes), "linux")


def no_cloud(**config: Any) -> MetadataTree:
    return with_files(drive(datasource="nocloud"), network__config=yaml.safe_dump(config).encode())


V2 = {"match": {"macaddress": MAC}, "addresses": ["192.0.2.10/24"]}


def test_a_route_to_default_ends_debian_12_s_cloud_init() -> None:
    tree = no_cloud(version=2, ethernets={"eth0": {**V2, "routes": [{"to": "default", "via": "192.0.2.1"}]}})
    for guest, severity in (("debian12", "error"), ("linux", "warning")):
        (found,) = judge(tree, guest=guest, machine=Computer())  # type: ignore[arg-type]
        assert (found.rule, found.severity) == ("route-to-default", severity)


@pytest.mark.parametrize(
    ("config", "guest", "code"),
    [
        ({"network": {"version": 2, "ethernets": {"eth0": V2}}}, "linux", "network-wrapped"),
        ({"version": 3}, "linux", "network-invalid"),
        ({"version": 2, "ethernets": {"a name of too many": V2}}, "linux", "link-name"),
        ({"version": 2, "ethernets": {"eth0": {"dhcp4": True}}}, "windows", "windows-network-config"),
        (
            {
                "version": 1,
                "config": [{"type": "physical", "name": "eth0", "mac_address": MAC, "subnets": [{"type": "dhcp4"}]}],
            },
            "windows",
            "windows-network-config",
        ),
        ({"version": 2, "ethernets": {"eth0": {**V2, "addresses": ["192.0.2.10/40"]}}}, "linux", "netmask-invalid"),
    ],
)
def test_network_config_of_others_is_read_too(config: dict[str, Any], guest: GuestProfile, code: str) -> None:
    assert code in codes(judge(no_cloud(**config), guest=guest, machine=Computer()))


def test_an_empty_optional_file_is_an_error() -> None:
    found = judge(with_files(drive(datasource="nocloud"), network__config=b""), guest="rhel")
    assert codes(found) == {"empty-file"}


@pytest.mark.parametrize(
    ("tree", "guest", "code"),
    [
        (replace(drive(), label="CONFIG-2"), "flatcar", "label-case"),
        (replace(drive(), label="data"), "linux", "label"),
        (with_files(drive(), meta_data__json=None), "linux", "meta-data-missing"),
        (with_files(drive(), meta_data__json=b"{"), "linux", "meta-data-invalid"),
        (with_files(drive(), vendor_data__json=b""), "linux", "meta-data-invalid"),
        (with_files(drive(), meta_data__json=b'{"hostname": "a"}'), "linux", "uuid-missing"),
        (
            with_files(drive(), meta_data__json=json.dumps({"uuid": UUID, "random_seed": "?"}).encode()),
            "linux",
            "random-seed",
        ),
        (
            with_files(
                drive(),
                meta_data__json=json.dumps(
                    {"uuid": UUID, "files": [{"path": "/etc/motd", "content_path": "/content/0000"}]}
                ).encode(),
            ),
            "linux",
            "content-missing",
        ),
        (with_files(drive(datasource="nocloud"), meta__data=b""), "linux", "instance-id-constant"),
        (
            with_files(drive(datasource="nocloud"), meta__data=b"instance-id: iid-local01\n"),
            "linux",
            "instance-id-constant",
        ),
        (with_files(drive(datasource="nocloud"), user__data=None), "linux", "user-data-missing"),
        (drive(datasource="nocloud"), "flatcar", "datasource"),
        (drive(datasource="nocloud"), "windows", "windows-nocloud"),
        (drive(), "fcos", "ignition-hyperv"),
        (
            with_files(drive(), meta_data__json=json.dumps({"uuid": UUID, "admin_pass": "x"}).encode()),
            "linux",
            "admin-pass",
        ),
    ],
)
def test_a_tree_that_lacks_something_is_found(tree: MetadataTree, guest: GuestProfile, code: str) -> None:
    assert code in codes(judge(tree, guest=guest))


def test_only_the_newest_versions_are_not_enough_for_readers_of_latest() -> None:
    files = {path: content for path, content in drive().files.items() if "/latest/" not in path}
    tree = replace(drive(), files=files)
    assert judge(tree) == []
    assert "latest-missing" in codes(judge(tree, guest="windows"))


def test_a_machine_of_another_uuid_would_lose_the_instance_with_the_drive() -> None:
    found = judge(drive(), machine=Computer(uuid="11111111-2222-3333-4444-555555555555"))
    assert codes(found) == {"bios-guid"}


def of(user_data: bytes | str, guest: GuestProfile = "linux") -> list[Finding]:
    data = user_data.encode() if isinstance(user_data, str) else user_data
    return judge(with_files(drive(), user_data=data), guest=guest, machine=Computer())


@pytest.mark.parametrize(
    ("user_data", "code", "place"),
    [
        ("packages: [nginx]\n", "user-data-header", "first line, #cloud-config, is missing"),
        ("#cloud_config\npackages: [nginx]\n", "user-data-header", "nearly #cloud-config"),
        ("# cloud-config\n", "user-data-header", "nearly #cloud-config"),
        ("hello\n", "user-data-header", "none that a guest knows"),
        (b"\xef\xbb\xbf#cloud-config\n{}\n", "user-data-bom", "byte order mark"),
        ("#!/bin/sh\r\ntrue\r\n", "user-data-crlf", "CR and LF"),
        ("#cloud-config\npackages: [nginx\nruncmd: []\n", "cloud-config-yaml", "line 3"),
        ("#cloud-config\n\truncmd: []\n", "cloud-config-yaml", "line 2"),
        ("#cloud-config\n- a\n", "cloud-config-type", "a list, expected settings"),
        ("#cloud-config\npackages: nginx\n", "cloud-config-type", "line 2: packages is text, expected a list"),
        ("#cloud-config\nhostname: a\nhostname: b\n", "cloud-config-yaml", "line 3"),
        (
            "#cloud-config\n\nruncmds: []\n",
            "cloud-config-key",
            "line 3: there is no setting 'runcmds', perhaps 'runcmd'",
        ),
        ("#cloud-config\nnetwork: {version: 2}\n", "cloud-config-network", "line 2"),
        ('{"ignition": {"version": "3.4.0"}}', "user-data-kind", "an Ignition config"),
        ("#ps1\nexit\n", "user-data-kind", "powershell"),
        (gzip.compress(b"#cloud-config\npackages: nginx\n", mtime=0), "cloud-config-type", "unpacked, line 2"),
        (gzip.compress(b"#cloud-config\n", mtime=0)[:-4], "user-data-gzip", "cut short"),
        ("#cloud-config\n" + "#" * 65536, "user-data-size", "65535"),
        ("Content-Type: multipart/mixed; boundary=x\n\nnothing\n", "user-data-mime", "it has no parts"),
    ],
)
def test_user_data_that_would_not_do_what_it_says_is_found(user_data: bytes | str, code: str, place: str) -> None:
    found = [finding for finding in of(user_data) if finding.rule == code]
    assert found and place in str(found[0])


def test_parts_of_an_archive_are_looked_at_one_by_one() -> None:
    parts = [{"content": "#!/bin/sh\ntrue\n"}, {"content": "#cloud-config\npackages: nginx\n"}]
    tree = drive({"user_data": None, "user_data_parts": parts})
    (found,) = judge(tree)
    assert found.rule == "cloud-config-type" and "part 2, line 2" in found.where


@pytest.mark.parametrize(
    ("guest", "user_data", "code"),
    [
        ("windows", "#cloud-config\npackages: [a]\n", "cloud-config-subset"),
        ("flatcar", "#cloud-config\nruncmd: [a]\n", "cloud-config-subset"),
        ("fcos", "#cloud-config\n{}\n", "user-data-kind"),
        ("windows", '{"ignition": {"version": "3.4.0"}}', "user-data-kind"),
    ],
)
def test_each_guest_runs_what_its_agent_knows(guest: GuestProfile, user_data: str, code: str) -> None:
    assert code in codes(of(user_data, guest))


@pytest.mark.parametrize(
    ("guest", "user_data"),
    [
        ("windows", "#ps1_sysnative\nexit\n"),
        ("windows", "rem cmd\n"),
        ("windows", "<powershell>exit</powershell>"),
        ("fcos", '{"ignition": {"version": "3.4.0"}}'),
        ("flatcar", "#cloud-config\nhostname: a\n"),
        ("linux", "#include\nhttp://192.0.2.1/a\n"),
        ("linux", "## template: jinja\n#cloud-config\n{% if x %}\n"),
        ("linux", "#cloud-config\nusers: [default]\nntp:\nssh_pwauth: true\ntimezone: UTC\n"),
    ],
)
def test_what_a_guest_runs_is_not_complained_about(guest: GuestProfile, user_data: str) -> None:
    assert not {code for code in codes(of(user_data, guest)) if code.startswith(("user-data", "cloud-config"))}


def test_findings_quote_neither_user_data_nor_passwords() -> None:
    for text in ("hunter2\n", "#cloud-config\npassword: [hunter2\n", "#cloud-config\npassword: [hunter2]\n"):
        assert "hunter2" not in "".join(str(finding) + str(finding.to_json()) for finding in of(text))


def test_strict_makes_errors_of_warnings() -> None:
    found = judge(parse_spec({"name": "a", "uuid": UUID}))
    (warning,) = enforce(found)
    assert "nobody will be able to log in" in warning
    with pytest.raises(InvalidSpec, match="no-login"):
        enforce(found, strict=True)


def test_every_rule_is_about_guests_that_there_are() -> None:
    known = set(GUEST_PROFILES)
    for rule in RULES.values():
        assert rule.why and rule.fix
        assert (rule.guests or known) <= known and rule.errors_for <= (rule.guests or known)
