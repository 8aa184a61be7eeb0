"""The spec: what is taken, in which spelling, and how wrong fields are named."""

from __future__ import annotations

import json
import uuid
from ipaddress import ip_address, ip_interface
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagekit.cloudinit.model import Network, Spec, derive_mac, load_spec, parse_spec
from imagekit.errors import InvalidSpec, SourceError
from tests.cloudinit_specs import FULL, KEY, MAC, UUID, ssh_key

MIB = 1 << 20
LINK = {"id": "eth0", "mac": MAC}


def network(**fields: object) -> dict[str, Any]:
    """A spec with one link and one network of these fields."""
    return {"name": "a", "network": {"links": [LINK], "networks": [{"link": "eth0", **fields}]}}


def problem_of(values: dict[str, Any]) -> str:
    with pytest.raises(InvalidSpec) as caught:
        parse_spec(values)
    return str(caught.value)


def test_a_full_spec_comes_to_typed_values() -> None:
    spec = parse_spec(FULL)
    assert spec.network is not None
    static, _ = spec.network.networks
    assert static.address == ip_interface("192.0.2.10/24")
    assert static.gateway == ip_address("192.0.2.1")
    assert spec.user_data == b"#cloud-config\npackages: [nginx]\n"
    assert (spec.machine.generation, spec.machine.memory) == (1, 4096 * MIB)


def test_a_name_is_all_a_spec_needs() -> None:
    spec = parse_spec({"name": "web1"})
    assert (spec.uuid, spec.network, spec.user_data, spec.ssh_keys, spec.meta) == (None, None, None, (), {})
    assert (spec.machine.generation, spec.machine.secure_boot, spec.machine.memory) == (
        "auto",
        "auto",
        2048 * MIB,
    )


def test_models_may_stand_in_for_plain_values() -> None:
    given_network = Network.dhcp("02-15-5D-00-00-01")
    assert parse_spec({"name": "a", "network": given_network}).network == given_network
    assert [link.mac for link in given_network.links] == [MAC]


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse_spec({"name": "a"}).name = "b"


def test_neither_repr_nor_dump_shows_a_secret() -> None:
    spec = parse_spec({**FULL, "password": "hunter2", "user_data": "hunter2", "ssh_keys": [KEY]})
    assert "hunter2" not in repr(spec) + str(spec)
    assert "hunter2" not in str(spec.model_dump(exclude={"user_data"}))


@pytest.mark.parametrize(
    ("text", "mac"),
    [
        ("02:15:5D:00:00:01", MAC),
        ("02-15-5d-00-00-01", MAC),
        ("02155D000001", MAC),
    ],
)
def test_a_mac_address_is_kept_in_lower_case_with_colons(text: str, mac: str) -> None:
    assert Network.dhcp(text).links[0].mac == mac


@pytest.mark.parametrize("text", [UUID, UUID.upper(), f"urn:uuid:{UUID}"])
def test_a_uuid_is_kept_in_lower_case(text: str) -> None:
    assert parse_spec({"name": "a", "uuid": text}).uuid == UUID


@given(st.uuids())
def test_any_uuid_that_python_makes_is_taken(value: uuid.UUID) -> None:
    assert parse_spec({"name": "a", "uuid": str(value)}).uuid == str(value)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2048 * MIB),
        ("2G", 2048 * MIB),
        ("2 gib", 2048 * MIB),
        ("1.5GiB", 1536 * MIB),
        ("32M", 32 * MIB),
        ("1TiB", 1 << 40),
        ("2097152k", 2048 * MIB),
        ("0.03125GiB", 32 * MIB),
        (2048 * MIB, 2048 * MIB),
    ],
)
def test_memory_is_a_size(text: object, size: int) -> None:
    assert parse_spec({"name": "a", "machine": {"memory": text}}).machine.memory == size


@pytest.mark.parametrize(
    ("fields", "hostname"),
    [
        ({"name": "web1", "hostname": "Web1.example"}, "Web1.example"),
        ({"name": "web1"}, "web1"),
        ({"name": "Web_1"}, "web-1"),
        ({"name": "debian-12.5_"}, "debian-12-5"),
        ({"name": "a" * 64}, "a" * 63),
        ({"name": "a" * 62 + "_b"}, "a" * 62),
    ],
)
def test_the_host_name_is_made_of_the_name_where_none_is_given(fields: dict[str, str], hostname: str) -> None:
    assert parse_spec(fields).guest_hostname == hostname


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True))
def test_the_host_name_made_of_any_name_is_one(name: str) -> None:
    hostname = parse_spec({"name": name}).guest_hostname
    assert parse_spec({"name": name, "hostname": hostname}).guest_hostname == hostname


@pytest.mark.parametrize(
    "key",
    [
        KEY,
        f"  {KEY}\n",
        ssh_key(b"ssh-ed25519", bytes(32), comment=""),
        ssh_key(b"ssh-ed25519", bytes(32), comment="Jörg at home, 2nd laptop"),
        ssh_key(b"ssh-rsa", b"\1\0\1", b"\0" + b"\xab" * 256),
        ssh_key(b"ecdsa-sha2-nistp256", b"nistp256", b"\4" * 65),
        ssh_key(b"sk-ssh-ed25519@openssh.com", bytes(32), b"ssh:"),
        ssh_key(b"ssh-ed25519-cert-v01@openssh.com", bytes(32), bytes(32)),
    ],
)
def test_public_keys_of_every_type_are_taken(key: str) -> None:
    assert parse_spec({"name": "a", "ssh_keys": [key]}).ssh_keys == (key.strip(),)


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("", "one public key on one line"),
        ("ssh-ed25519", "one public key on one line"),
        (f"{KEY}\n{KEY}", "one public key on one line"),
        (f"{KEY}\x1b[2J", "one public key on one line"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\nhunter2", "one public key on one line"),
        (f"no-pty {KEY}", "whole base64 text after no-pty"),
        ("ssh-ed25519 hunter2", "whole base64 text after ssh-ed25519"),
        (KEY.replace("ssh-ed25519", "ssh-rsa"), "a key body that is of the type named before it, ssh-rsa"),
        ("ssh-ed25519 AAAA", "a key body that is of the type named before it"),
        (" ".join([KEY.split()[0], KEY.split()[1][:-4]]), "a whole key; this one is cut short"),
        (ssh_key(b"ssh-ed25519"), "a whole key; this one is cut short"),
        (12, "expected text"),
    ],
)
def test_what_is_no_public_key_is_refused_and_not_shown(key: object, problem: str) -> None:
    message = problem_of({"name": "a", "ssh_keys": [KEY, key]})
    assert "ssh_keys[1]: found " in message
    assert problem in message
    assert "hunter2" not in message


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({}, "name: missing"),
        ({"name": None}, "name: found nothing, expected text"),
        ({"name": 12}, "name: found 12, expected text (a number or true/false needs quotes to be text)"),
        ({"name": ""}, "name: found '', expected up to 64 letters"),
        ({"name": "-a"}, "name: found '-a', expected up to 64 letters"),
        ({"name": "a/b"}, "name: found 'a/b', expected up to 64 letters"),
        ({"name": "a" * 65}, "expected up to 64 letters"),
        ({"name": "a\n"}, "name: found 'a\\n', expected up to 64 letters"),
        ({"name": "a", "nmae": "b"}, "nmae: unknown field; the fields here are name, uuid,"),
        ({"name": "a", "uuid": "12"}, "uuid: found '12', expected a UUID such as"),
        ({"name": "a", "uuid": "{" + UUID + "}"}, "expected a UUID such as"),
        ({"name": "a", "uuid": "00000000-0000-0000-0000-000000000000"}, "not all zeros or ones"),
        ({"name": "a", "uuid": "ffffffff-ffff-ffff-ffff-ffffffffffff"}, "not all zeros or ones"),
        ({"name": "a", "hostname": "web_1"}, "hostname: found 'web_1', expected a host name"),
        ({"name": "a", "hostname": "-web"}, "expected a host name"),
        ({"name": "a", "hostname": "web."}, "expected a host name"),
        ({"name": "a", "hostname": "a" * 64}, "expected a host name"),
        ({"name": "a", "hostname": ".".join(["a" * 63] * 4)}, "expected a host name"),
        ({"name": "a", "hostname": "192.0.2.1"}, "expected a host name"),
        ({"name": "a", "ssh_keys": KEY}, "ssh_keys: found text, expected a list"),
        ({"name": "a", "password": 12345}, "password: found something that is not text, expected text"),
        ({"name": "a", "password": "pass\nword"}, "password: found text, expected 1 to 127 characters"),
        ({"name": "a", "password": ""}, "password: found text, expected 1 to 127 characters"),
        ({"name": "a", "user_data": ""}, "user_data: found text, expected at least one character"),
        ({"name": "a", "user_data": 5}, "user_data: found something that is not text, expected text"),
        ({"name": "a", "user_data": "\ud800"}, "user_data: found text, expected text that UTF-8 can express"),
        ({"name": "a", "meta": []}, "meta: found an empty list, expected fields such as 'role: web'"),
        ({"name": "a", "meta": {"n": 1}}, "meta.n: found 1, expected text"),
        ({"name": "a", "meta": {"n": "x" * 256}}, "meta.n: found "),
        ({"name": "a", "meta": {"a/b": "x"}}, "meta.a/b: found 'a/b', expected up to 255 letters"),
        ({"name": "a", "meta": {"a": "\ud800"}}, "expected text that UTF-8 can express"),
        ({"name": "a", "machine": "big"}, "machine: found 'big', expected fields, each with its value"),
        ({"name": "a", "machine": {"ram": 1}}, "machine.ram: unknown field; the fields here are generation,"),
        ({"name": "a", "machine": {"generation": 3}}, "machine.generation: found 3, expected 'auto', 1 or 2"),
        ({"name": "a", "machine": {"generation": "2"}}, "found '2', expected 'auto', 1 or 2"),
        ({"name": "a", "machine": {"generation": True}}, "found true, expected 'auto', 1 or 2"),
        ({"name": "a", "machine": {"cpus": 0}}, "machine.cpus: found 0, expected greater than or equal to 1"),
        ({"name": "a", "machine": {"cpus": "2"}}, "machine.cpus: found '2', expected a whole number"),
        ({"name": "a", "machine": {"cpus": True}}, "machine.cpus: found true, expected a whole number"),
        (
            {"name": "a", "machine": {"memory": "2GB"}},
            "machine.memory: found '2GB', expected a size such as 2GiB",
        ),
        ({"name": "a", "machine": {"memory": "33MiB"}}, "expected a multiple of 2MiB from 32MiB"),
        ({"name": "a", "machine": {"memory": "30MiB"}}, "expected a multiple of 2MiB from 32MiB"),
        (
            {"name": "a", "machine": {"memory": "999999TiB"}},
            "expected a multiple of 2MiB from 32MiB to 240TiB",
        ),
        ({"name": "a", "machine": {"memory": 2048}}, "a number without unit counts bytes"),
        ({"name": "a", "machine": {"memory": "0.1KiB"}}, "expected a whole number of bytes"),
        ({"name": "a", "machine": {"memory": 2.5}}, "machine.memory: found 2.5, expected a whole number"),
        (
            {"name": "a", "machine": {"vlan": 4095}},
            "machine.vlan: found 4095, expected less than or equal to 4094",
        ),
        ({"name": "a", "machine": {"switch": "a\tb"}}, "expected text without control characters"),
        (
            {"name": "a", "machine": {"secure_boot": "no"}},
            "found 'no', expected 'auto', 'linux', 'windows' or 'off'",
        ),
        ({"name": "a", "bad\nkey": 1}, "['bad\\nkey']: unknown field"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_found_and_expected(values: dict[str, Any], problem: str) -> None:
    message = problem_of(values)
    assert message.startswith("the spec has a wrong field:\n  ")
    assert problem in message


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"type": "static"}, "networks[0].type: found 'static', expected 'ipv4', 'ipv4_dhcp', "),
        ({"type": "ipv4"}, "networks[0]: type ipv4 needs an address with its prefix length"),
        ({"type": "ipv4", "address": "192.0.2.10"}, "expected an address with its prefix length"),
        (
            {"type": "ipv4", "address": "192.0.2.10/255.255.255.0"},
            "expected an address with its prefix length",
        ),
        ({"type": "ipv4", "address": "192.0.2.10/33"}, "expected an address with its prefix length"),
        ({"type": "ipv4", "address": 3221225994}, "expected an address with its prefix length"),
        ({"type": "ipv6", "address": "fe80::1%eth0/64"}, "expected an address with its prefix length"),
        (
            {"type": "ipv4", "address": "2001:db8::10/64"},
            "2001:db8::10/64 is not the IPv4 address of one host",
        ),
        ({"type": "ipv6", "address": "192.0.2.10/24"}, "192.0.2.10/24 is not the IPv6 address of one host"),
        ({"type": "ipv4", "address": "192.0.2.0/24"}, "is not the IPv4 address of one host"),
        ({"type": "ipv4", "address": "192.0.2.255/24"}, "is not the IPv4 address of one host"),
        ({"type": "ipv4", "address": "127.0.0.1/8"}, "is not the IPv4 address of one host"),
        ({"type": "ipv4", "address": "224.0.0.1/24"}, "is not the IPv4 address of one host"),
        ({"type": "ipv4", "address": "192.0.2.10/0"}, "is not the IPv4 address of one host"),
        ({"type": "ipv6", "address": "::/64"}, "is not the IPv6 address of one host"),
        (
            {"type": "ipv4", "address": "192.0.2.10/24", "gateway": "192.0.3.1"},
            "gateway 192.0.3.1 is outside 192.0.2.0/24",
        ),
        ({"type": "ipv4", "address": "192.0.2.10/24", "gateway": "192.0.2.10"}, "the guest's own address"),
        ({"type": "ipv4", "address": "192.0.2.10/24", "gateway": "fe80::1"}, "gateway fe80::1 is outside"),
        (
            {"type": "ipv4", "address": "192.0.2.10/24", "gateway": "192.0.2.1/24"},
            "expected the IP address of one",
        ),
        (
            {"type": "ipv4", "address": "192.0.2.10/24", "gateway": "0.0.0.0"},
            "expected the IP address of one host",
        ),
        (
            {"type": "ipv4_dhcp", "address": "192.0.2.10/24"},
            "type ipv4_dhcp takes no address, gateway or routes",
        ),
        ({"type": "ipv6_slaac", "gateway": "fe80::1"}, "type ipv6_slaac takes no address, gateway or routes"),
        ({"type": "ipv4", "link": "eth7"}, "networks[0]: type ipv4 needs"),
        ({"type": "ipv4_dhcp", "link": "eth7"}, "networks[0].link 'eth7' is none of the links eth0"),
        (
            {"type": "ipv4_dhcp", "dns": "192.0.2.1"},
            "networks[0].dns: unknown field; the fields here are link, type,",
        ),
    ],
)
def test_a_network_that_does_not_fit_together_is_refused(fields: dict[str, Any], problem: str) -> None:
    assert problem in problem_of(network(**fields))


@pytest.mark.parametrize(
    ("route", "problem"),
    [
        ({"network": "10.0.0.1/8", "gateway": "192.0.2.2"}, "no host bits"),
        ({"network": "10.0.0.0", "gateway": "192.0.2.2"}, "no host bits"),
        ({"network": "10.0.0.0/8"}, "routes[0].gateway: missing"),
        ({"network": "10.0.0.0/8", "gateway": "10.0.0.1"}, "gateway 10.0.0.1 is outside 192.0.2.0/24"),
        ({"network": "2001:db8::/32", "gateway": "192.0.2.2"}, "the route to 2001:db8::/32 is not IPv4"),
        ({"network": "0.0.0.0/0", "gateway": "192.0.2.2"}, "a gateway and a route to everywhere"),
        ({"to": "10.0.0.0/8"}, "routes[0].to: unknown field; the fields here are network, gateway"),
    ],
)
def test_a_route_that_does_not_fit_is_refused(route: dict[str, str], problem: str) -> None:
    fields = {"type": "ipv4", "address": "192.0.2.10/24", "gateway": "192.0.2.1", "routes": [route]}
    assert problem in problem_of(network(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "ipv4", "address": "192.0.2.0/31", "gateway": "192.0.2.1"},
        {"type": "ipv4", "address": "192.0.2.1/32"},
        {"type": "ipv6", "address": "2001:db8::/64", "gateway": "2001:db8::1"},
        {"type": "ipv6", "address": "2001:db8::1/128", "gateway": "fe80::1"},
        {"type": "ipv4", "address": "169.254.1.1/16"},
    ],
)
def test_unusual_addresses_that_work_are_taken(fields: dict[str, str]) -> None:
    taken = parse_spec(network(**fields)).network
    assert taken is not None and str(taken.networks[0].address) == fields["address"]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"links": [LINK, {"id": "eth0", "mac": "02:15:5d:00:00:02"}]}, "link id 'eth0' is given twice"),
        ({"links": [LINK, {"id": "eth1", "mac": "02-15-5D-00-00-01"}]}, f"MAC address {MAC} is given twice"),
        (
            {"networks": [{"link": "eth0", "type": "ipv4_dhcp"}] * 2},
            "ipv4_dhcp on link 'eth0' is given twice",
        ),
        (
            {"networks": [{"link": "eth0", "type": "ipv4", "address": "192.0.2.10/24"}] * 2},
            "address 192.0.2.10 is given twice",
        ),
        ({"dns": ["192.0.2.53", "192.0.2.53"]}, "name server 192.0.2.53 is given twice"),
        (
            {"dns": ["dns.example"]},
            "network.dns[0]: found 'dns.example', expected the IP address of one host",
        ),
        ({"dns": ["224.0.0.251"]}, "expected the IP address of one host"),
        ({"links": []}, "network.links: found an empty list, expected at least one entry"),
        ({"networks": []}, "network.networks: found an empty list, expected at least one entry"),
        ({"links": [{"id": "eth0"}]}, "network.links[0]: a link of type phy needs mac"),
        ({"links": [{**LINK, "mac": "01:00:5e:00:00:01"}]}, "neither multicast nor zero"),
        ({"links": [{**LINK, "mac": "00:00:00:00:00:00"}]}, "neither multicast nor zero"),
        ({"links": [{**LINK, "mac": "02:15-5d:00:00:01"}]}, "expected a MAC address such as"),
        ({"links": [{**LINK, "mac": "0215.5d00.0001"}]}, "expected a MAC address such as"),
        (
            {"links": [{**LINK, "mtu": 100}]},
            "network.links[0].mtu: found 100, expected greater than or equal to 576",
        ),
        (
            {"links": [{**LINK, "id": "eth/0"}]},
            "network.links[0].id: found 'eth/0', expected a name such as eth0",
        ),
    ],
)
def test_links_and_networks_that_clash_are_refused(values: dict[str, Any], problem: str) -> None:
    given_network = {"links": [LINK], "networks": [{"link": "eth0", "type": "ipv4_dhcp"}], **values}
    assert problem in problem_of({"name": "a", "network": given_network})


def test_all_wrong_fields_are_named_at_once_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("nam: a\nmachine:\n  cpus: x\nnetwork:\n  links:\n    - {id: eth0, mac: no}\n", encoding="utf-8")
    with pytest.raises(InvalidSpec) as caught:
        load_spec(path)
    assert str(caught.value).splitlines() == [
        f"{path}: the spec has 5 wrong fields:",
        "  name: missing",
        "  network.links[0].mac (line 6): found 'no', expected a MAC address such as 02:15:5d:00:00:01",
        "  network.networks (line 4): missing",
        "  machine.cpus (line 3): found 'x', expected a whole number",
        "  nam (line 1): unknown field; the fields here are name, uuid, hostname, ssh_keys, password, "
        "password_hash, user_data, user_data_parts, hyperv_tools, network, machine, guest, files, meta, "
        "availability_zone, launch_index, project_id, devices, dedicated_cpus, vendor_data, vendor_data2, "
        "random_seed, user_data_file",
    ]


def test_yaml_and_json_come_to_the_same_spec(tmp_path: Path) -> None:
    text = json.dumps(FULL)
    for name in ("spec.yaml", "spec.json"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert load_spec(tmp_path / name) == parse_spec(FULL)


def test_secure_boot_off_needs_no_quotes(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("name: a\nmachine: {secure_boot: off}\n", encoding="utf-8")
    assert load_spec(tmp_path / "spec.yaml").machine.secure_boot == "off"


def test_a_user_data_file_is_found_beside_the_spec_and_read_as_bytes(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "data.gz").write_bytes(b"\x1f\x8b\xff")
    (tmp_path / "inner/spec.yaml").write_text("name: a\nuser_data_file: ../data.gz\n", encoding="utf-8")
    assert load_spec(tmp_path / "inner/spec.yaml").user_data == b"\x1f\x8b\xff"
    assert parse_spec({"name": "a", "user_data_file": "data.gz"}, folder=tmp_path).user_data == b"\x1f\x8b\xff"


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"user_data_file": "none"}, "user_data_file: "),
        ({"user_data_file": "."}, "not a regular file"),
        ({"user_data_file": "empty"}, "user_data: found text, expected at least one character"),
        ({"user_data_file": 12}, "user_data_file: expected the name of a file"),
        ({"user_data_file": "a\0b"}, "user_data_file: expected the name of a file"),
        (
            {"user_data_file": "empty", "user_data": "x"},
            "user_data_file: user_data is given too: give one of them",
        ),
    ],
)
def test_a_wrong_user_data_file_is_refused(tmp_path: Path, values: dict[str, Any], problem: str) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(InvalidSpec) as caught:
        parse_spec({"name": "a", **values}, folder=tmp_path)
    assert problem in str(caught.value)


def test_overrides_win_over_the_file_and_defaults_lose_to_it(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("name: file\nmachine: {cpus: 3, vlan: 7}\nmeta: {a: file}\n", encoding="utf-8")
    spec = load_spec(
        path,
        defaults={"name": "default", "uuid": UUID, "machine": {"cpus": 1, "memory": "1GiB"}},
        overrides={"machine": {"vlan": 8}, "meta": {"b": "flag"}, "hostname": "flag"},
    )
    assert (spec.name, spec.uuid, spec.hostname) == ("file", UUID, "flag")
    assert (spec.machine.cpus, spec.machine.memory, spec.machine.vlan) == (3, 1024 * MIB, 8)
    assert spec.meta == {"a": "file", "b": "flag"}


def test_user_data_of_a_flag_replaces_the_user_data_file_of_the_spec(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("name: a\nuser_data_file: not-there\n", encoding="utf-8")
    assert load_spec(path, overrides={"user_data": b"flag"}).user_data == b"flag"


def test_a_missing_spec_file_is_a_source_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        load_spec(tmp_path / "none.yaml")


def test_a_derived_mac_is_fixed_by_uuid_and_index() -> None:
    """These very values must never change: they are in machines that exist."""
    assert derive_mac(UUID) == derive_mac(UUID.upper(), 0)
    assert [derive_mac(UUID, index) for index in range(2)] == ["02:6d:3f:9c:5f:c6", "02:f8:2a:90:55:01"]


@given(st.uuids(), st.integers(0, 100))
def test_a_derived_mac_is_a_legal_one_of_its_own(value: uuid.UUID, index: int) -> None:
    mac = derive_mac(str(value), index)
    assert Network.dhcp(mac).links[0].mac == mac
    assert mac.startswith("02:")
    assert mac != derive_mac(str(value), index + 1)


def test_the_classes_themselves_refuse_without_showing_the_input() -> None:
    with pytest.raises(ValueError, match="password") as caught:
        Spec.model_validate({"name": "a", "password": ["hunter2"]})
    assert "hunter2" not in str(caught.value)
