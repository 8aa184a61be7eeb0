"""One spec through every renderer: which files, under which label, and what is in them."""

from __future__ import annotations

import email
import json
from typing import Any

import pytest
import yaml

from imagekit.cloudinit.model import Spec, parse_spec
from imagekit.cloudinit.render import Rendering
from imagekit.cloudinit.tree import MetadataTree
from imagekit.errors import InvalidSpec, UsageError
from tests.cloudinit_specs import FULL, KEY, MAC, UUID

LEAST = {"name": "web1", "uuid": UUID}


def render(values: dict[str, Any], datasource: Any = "configdrive", **how: Any) -> MetadataTree:
    return Rendering(datasource, **how).render(parse_spec({**LEAST, **values}))


def test_every_datasource_has_its_label() -> None:
    labels = {name: render({}, name).label for name in ("configdrive", "nocloud", "cloudstack")}
    assert labels == {"configdrive": "config-2", "nocloud": "cidata", "cloudstack": "config-2"}


def test_what_is_rendered_is_recognised_again() -> None:
    for name in ("configdrive", "nocloud", "cloudstack"):
        tree = render(FULL, name)
        assert MetadataTree.recognise(tree.label, tree.files) == tree
    assert MetadataTree.recognise("data", {"readme.txt": b""}) is None


def test_nocloud_has_both_files_it_needs_and_no_empty_ones() -> None:
    tree = render({}, "nocloud").files
    assert sorted(tree) == ["meta-data", "user-data"]
    assert yaml.safe_load(tree["meta-data"]) == {"instance-id": UUID, "local-hostname": "web1"}
    assert tree["user-data"].startswith(b"#cloud-config\n")


def test_nocloud_says_what_the_spec_says() -> None:
    tree = render(
        {**FULL, "password": None, "vendor_data": {"cloud-init": "#cloud-config\n{}\n"}}, "nocloud", network_config=2
    ).files
    assert sorted(tree) == ["meta-data", "network-config", "user-data", "vendor-data"]
    assert yaml.safe_load(tree["meta-data"])["public-keys"] == [KEY]
    assert tree["vendor-data"] == b"#cloud-config\n{}\n"
    config = yaml.safe_load(tree["network-config"])
    nic = config["ethernets"]["eth0"]
    assert (config["version"], nic["match"], nic["set-name"]) == (2, {"macaddress": MAC}, "eth0")
    assert {"to": "0.0.0.0/0", "via": "192.0.2.1"} in nic["routes"]
    assert nic["gateway6"] == "fe80::1"


def test_version_1_of_network_config_says_dhcp_as_every_reader_knows_it() -> None:
    links = {"links": [{"id": "eth0", "mac": MAC}], "networks": [{"link": "eth0", "type": "ipv4_dhcp"}]}
    tree = render({"network": links}, "nocloud", network_config=1).files
    (nic,) = yaml.safe_load(tree["network-config"])["config"]
    assert nic["subnets"] == [{"type": "dhcp"}]
    assert b"network:" not in tree["network-config"]


def test_vendor_data_that_nocloud_cannot_hold_is_refused() -> None:
    with pytest.raises(InvalidSpec, match="one text under the key cloud-init"):
        render({"vendor_data": {"other": "x"}}, "nocloud")


def test_cloudstack_has_its_own_files_and_those_that_cloud_init_reads() -> None:
    tree = render({**FULL, "guest": "windows"}, "cloudstack").files
    assert tree["cloudstack/metadata/vm-id.txt"] == UUID.encode()
    assert tree["cloudstack/metadata/local-ipv4.txt"] == b"192.0.2.10"
    assert tree["cloudstack/userdata/user_data.txt"] == tree["openstack/latest/user_data"]
    assert tree["cloudstack/password/vm_password.txt"] == b"correct horse"
    assert json.loads(tree["openstack/latest/meta_data.json"])["uuid"] == UUID


def test_injected_files_are_content_that_meta_data_points_to() -> None:
    files = [{"path": "/etc/motd", "content": "hello\n"}, {"path": "/opt/b", "content": b"\0"}]
    tree = render({"files": files}).files
    listed = json.loads(tree["openstack/latest/meta_data.json"])["files"]
    assert {one["path"]: tree["openstack" + one["content_path"]] for one in listed} == {
        "/etc/motd": b"hello\n",
        "/opt/b": b"\0",
    }
    written = yaml.safe_load(render({"files": files}, "nocloud").files["user-data"])["write_files"]
    assert [one["path"] for one in written] == ["/etc/motd", "/opt/b"]


def test_nova_s_versions_have_the_fields_of_their_time() -> None:
    device = {"type": "nic", "mac": MAC, "vlan": 7, "tags": ["lan"]}
    seed = "c2VlZA=="
    tree = render({"devices": [device], "random_seed": seed, "project_id": "p"}, nova_compatible=True).files
    fields = {
        version: json.loads(tree[f"openstack/{version}/meta_data.json"])
        for version in ("2012-08-10", "2013-04-04", "2015-10-15", "2016-06-30", "2017-02-22", "2018-08-27", "latest")
    }
    assert "random_seed" not in fields["2012-08-10"] and fields["2013-04-04"]["random_seed"] == seed
    assert "project_id" not in fields["2013-04-04"] and fields["2015-10-15"]["project_id"] == "p"
    assert "devices" not in fields["2015-10-15"]
    assert [set(fields[v]["devices"][0]) & {"vlan", "vf_trusted"} for v in list(fields)[3:6]] == [
        set(),
        {"vlan"},
        {"vlan", "vf_trusted"},
    ]
    assert "dedicated_cpus" not in fields["2018-08-27"] and fields["latest"]["dedicated_cpus"] == []
    assert len(tree) == 11 + 9 + 8 + 6 + 2


@pytest.mark.parametrize("datasource", ["nocloud", "cloudstack"])
def test_nova_writes_only_config_drives(datasource: str) -> None:
    with pytest.raises(UsageError, match=f"Nova writes no {datasource}"):
        render({}, datasource, nova_compatible=True)


def test_a_password_of_linux_is_a_hash_and_never_the_password() -> None:
    for datasource in ("configdrive", "nocloud", "cloudstack"):
        tree = render({"password": "correct horse"}, datasource)
        assert not any(b"correct horse" in content for content in tree.files.values())
    config = yaml.safe_load(render({"password": "correct horse"}).files["openstack/latest/user_data"])
    assert config["password"].startswith("$6$rounds=100000$")
    assert config["chpasswd"] == {"expire": False}


def test_a_password_of_windows_is_admin_pass_as_it_is() -> None:
    tree = render({"password": "correct horse", "guest": "windows"}).files
    assert json.loads(tree["openstack/latest/meta_data.json"])["admin_pass"] == "correct horse"
    assert "openstack/latest/user_data" not in tree


@pytest.mark.parametrize(
    ("values", "datasource", "problem"),
    [
        ({"password": "x", "guest": "fcos"}, "configdrive", "no place"),
        ({"password": "x", "guest": "windows"}, "nocloud", "NoCloud has no place"),
        ({"password_hash": "$6$abc$defghijk", "guest": "windows"}, "configdrive", "no password hash"),
        ({"hyperv_tools": True, "guest": "flatcar"}, "configdrive", "read-only"),
        ({"hyperv_tools": True, "user_data": "hello"}, "configdrive", "no kind that is known"),
    ],
)
def test_what_a_guest_cannot_take_is_refused(values: dict[str, Any], datasource: str, problem: str) -> None:
    with pytest.raises(InvalidSpec, match=problem):
        render(values, datasource)


def test_parts_become_one_archive_in_their_order() -> None:
    parts = [
        {"content": "#cloud-config\npackages: [nginx]\n"},
        {"content": "#!/bin/sh\ntrue\n", "filename": "run.sh"},
        {"content": bytes(range(256)), "type": "application/octet-stream"},
    ]
    data = render({"user_data_parts": parts}).files["openstack/latest/user_data"]
    message = email.message_from_bytes(data)
    read = [part for part in message.walk() if not part.is_multipart()]
    assert [part.get_content_type() for part in read] == [
        "text/cloud-config",
        "text/x-shellscript",
        "application/octet-stream",
    ]
    assert [part.get_payload(decode=True) for part in read] == [
        b"#cloud-config\npackages: [nginx]\n",
        b"#!/bin/sh\ntrue\n",
        bytes(range(256)),
    ]
    assert read[1].get_filename() == "run.sh"


@pytest.mark.parametrize(("guest", "package"), [("debian12", "hyperv-daemons"), ("rhel", "hyperv-daemons")])
def test_hyperv_tools_are_a_package_beside_the_user_s_own_data(guest: str, package: str) -> None:
    data = render({"hyperv_tools": True, "guest": guest, "user_data": "#!/bin/sh\ntrue\n"})
    message = email.message_from_bytes(data.files["openstack/latest/user_data"])
    script, own = (part.get_payload(decode=True) for part in message.walk() if not part.is_multipart())
    assert script == b"#!/bin/sh\ntrue\n"
    assert isinstance(own, bytes) and yaml.safe_load(own)["packages"] == [package]


def test_the_same_spec_gives_the_same_bytes() -> None:
    values = {**FULL, "hyperv_tools": True, "files": [{"path": "/etc/motd", "content": "x"}]}
    first, second = (render(values, "nocloud").files for _ in range(2))
    assert first == second


def test_a_bond_with_a_vlan_on_it_names_what_it_stands_on() -> None:
    spec = parse_spec({**LEAST, "network": BOND})
    assert isinstance(spec, Spec)
    tree = Rendering().render(spec).files
    links = {one["id"]: one for one in json.loads(tree["openstack/latest/network_data.json"])["links"]}
    assert links["bond0"]["bond_links"] == ["eth0", "eth1"]
    assert (links["v7"]["vlan_link"], links["v7"]["vlan_mac_address"]) == ("bond0", MAC)
    config = yaml.safe_load(Rendering("nocloud", network_config=2).render(spec).files["network-config"])
    assert config["bonds"]["bond0"]["parameters"] == {"mode": "active-backup", "mii-monitor-interval": 100}
    assert config["vlans"]["bond0.7"]["link"] == "bond0"


BOND: dict[str, Any] = {
    "links": [
        {"id": "eth0", "mac": MAC},
        {"id": "eth1", "mac": "02:15:5d:00:00:02"},
        {
            "id": "bond0",
            "type": "bond",
            "members": ["eth0", "eth1"],
            "mode": "active-backup",
            "options": {"miimon": 100},
        },
        {"id": "v7", "type": "vlan", "link": "bond0", "vlan": 7},
    ],
    "networks": [
        {"link": "bond0", "type": "ipv4_dhcp"},
        {"link": "v7", "type": "ipv4", "address": "192.0.2.10/24"},
    ],
}


@pytest.mark.parametrize(
    ("links", "problem"),
    [
        ([{"id": "b", "type": "bond", "members": ["x"], "mode": "802.3ad"}], "member 'x' of bond 'b'"),
        ([{"id": "v", "type": "vlan", "link": "x", "vlan": 1}], "VLAN 'v' is on 'x'"),
        ([{"id": "b", "type": "bond", "members": ["eth0"]}], "needs mode"),
        ([{"id": "v", "type": "vlan", "link": "eth0"}], "needs vlan"),
        ([{"id": "p", "mac": "02:00:00:00:00:09", "vlan": 3}], "takes no vlan"),
    ],
)
def test_links_that_stand_on_nothing_are_refused(links: list[dict[str, Any]], problem: str) -> None:
    network = {"links": [{"id": "eth0", "mac": MAC}, *links], "networks": [{"link": "eth0", "type": "ipv4_dhcp"}]}
    with pytest.raises(InvalidSpec, match=problem):
        parse_spec({**LEAST, "network": network})
