"""What guest agents see of a medium, rule by rule; that the real ones see the same is shown in the oracle tests."""

from __future__ import annotations

import json
from typing import Any

import pytest

from imagekit.cloudinit.agents import MAX_JSON, Medium, Seen, describe_user_data, what_agents_see
from imagekit.cloudinit.configdrive import config_drive_tree
from imagekit.cloudinit.model import parse_spec
from tests.cloudinit_specs import FULL, KEY, MAC, UUID

TREE = config_drive_tree(parse_spec({**FULL, "guest": "windows"}))
NO_CLOUD = {
    "meta-data": f'instance-id: i-1\nlocal-hostname: web1\npublic-keys: ["{KEY}"]\n'.encode(),
    "user-data": b"#cloud-config\n",
    "network-config": b"version: 2\nethernets: {}\n",
}
IGNITION = b'{"ignition": {"version": "3.4.0"}}'


def seen(tree: dict[str, bytes], label: str = "config-2", **more: Any) -> dict[str, Seen]:
    medium = Medium(label, more.pop("file_system", "iso9660"), tree, more.pop("windows", tree), **more)
    return {one.agent: one for one in what_agents_see(medium)}


def changed(path: str, content: bytes | None) -> dict[str, bytes]:
    """The tree with another content in every version of a file, or without it."""
    tree = {name: data for name, data in TREE.items() if not name.endswith(path)}
    if content is not None:
        tree |= {f"openstack/{version}/{path}": content for version in ("latest", "2018-08-27")}
    return tree


def meta(**fields: object) -> bytes:
    return json.dumps({"uuid": UUID, **fields}).encode()


CLOUD_INIT, NO = "cloud-init (ConfigDrive)", "cloud-init (NoCloud)"
CLOUDBASE, CLOUDBASE_NO = "cloudbase-init (ConfigDrive)", "cloudbase-init (NoCloud)"


def found(by: dict[str, Seen]) -> set[str]:
    return {name for name, one in by.items() if one.found}


@pytest.mark.parametrize(
    ("label", "file_system", "agents"),
    [
        ("config-2", "iso9660", {CLOUD_INIT, CLOUDBASE, "coreos-cloudinit", "Afterburn (openstack)"}),
        ("config-2", "vfat", {CLOUD_INIT, CLOUDBASE, "coreos-cloudinit"}),
        ("CONFIG-2", "iso9660", {CLOUD_INIT, CLOUDBASE}),
        ("Config-2", "iso9660", {CLOUDBASE}),
        ("cidata", "iso9660", set()),
        ("", "vfat", set()),
    ],
)
def test_who_reads_a_config_drive_goes_by_label_and_file_system(
    label: str, file_system: str, agents: set[str]
) -> None:
    by = seen(TREE, label, file_system=file_system)
    assert found(by) == agents
    assert all(one.reason and not one.facts for one in by.values() if not one.found)


@pytest.mark.parametrize(
    ("label", "agents"),
    [("cidata", {NO, CLOUDBASE_NO}), ("CIDATA", {NO, CLOUDBASE_NO}), ("CiData", {CLOUDBASE_NO}), ("config-2", set())],
)
def test_who_reads_no_cloud_goes_by_the_label(label: str, agents: set[str]) -> None:
    assert found(seen(NO_CLOUD, label)) == agents


def test_the_facts_are_those_of_the_medium() -> None:
    facts = seen(TREE)[CLOUD_INIT].facts
    assert facts == {
        "folder": "openstack/2018-08-27",
        "instance-id": UUID,
        "hostname": "web1.example",
        "keys": ["key1"],
        "user-data": f"cloud-config, {len(FULL['user_data'])} bytes",
        "network": [f"eth0 ({MAC}): ipv4 192.0.2.10", f"eth0 ({MAC}): ipv6 2001:db8::10"],
        "dns": ["192.0.2.53", "2001:db8::53"],
    }
    assert seen(NO_CLOUD, "cidata")[NO].facts == {
        "instance-id": "i-1",
        "hostname": "web1",
        "keys": ["key 1"],
        "user-data": "cloud-config, 14 bytes",
        "network": "network-config, version 2",
    }


def test_windows_sees_the_password_is_there_and_what_its_adapters_will_be_called() -> None:
    facts = seen(TREE)[CLOUDBASE].facts
    assert facts["password"] == "given (not shown)"
    assert facts["adapters-renamed-to"] == ["eth0"]
    assert FULL["password"] not in repr(seen(TREE))


@pytest.mark.parametrize(
    ("versions", "folder"),
    [
        (["latest"], "latest"),
        (["2012-08-10", "latest"], "2012-08-10"),
        (["2016-10-06", "2018-08-27", "latest"], "2018-08-27"),
        (["2018-08-27", "2020-10-14", "2025-04-04", "latest"], "2018-08-27"),
        (["2025-04-04", "latest"], "latest"),
    ],
)
def test_cloud_init_takes_the_newest_folder_it_knows(versions: list[str], folder: str) -> None:
    tree = {f"openstack/{version}/meta_data.json": meta(hostname=version) for version in versions}
    facts = seen(tree)[CLOUD_INIT].facts
    assert (facts["folder"], facts["hostname"]) == (f"openstack/{folder}", folder)


def test_all_others_take_latest_only() -> None:
    assert found(seen({"openstack/2018-08-27/meta_data.json": meta()})) == {CLOUD_INIT}


@pytest.mark.parametrize(
    ("path", "content", "agents", "reason"),
    [
        ("meta_data.json", None, set(), "there is no openstack/2018-08-27/meta_data.json"),
        ("meta_data.json", b"{", set(), "is not JSON"),
        ("meta_data.json", b"[]", set(), "is not a JSON object"),
        ("meta_data.json", b"[" * 100_000, set(), "is not JSON"),
        ("meta_data.json", b" " * (MAX_JSON + 1), set(), "the most that is read here"),
        ("meta_data.json", b"{}", {CLOUDBASE}, "has no uuid"),
        ("network_data.json", b"{", set(), "is not JSON"),
        ("vendor_data.json", b"nothing", {CLOUDBASE}, "vendor_data.json is not JSON"),
    ],
)
def test_what_is_broken_or_missing_is_the_reason(
    path: str, content: bytes | None, agents: set[str], reason: str
) -> None:
    by = seen(changed(path, content))
    assert found(by) & {CLOUD_INIT, CLOUDBASE} == agents
    assert reason in by[CLOUD_INIT].reason


@pytest.mark.parametrize(
    ("network", "linux", "windows"),
    [
        (None, "not said: the guest asks DHCP", "not said: the adapters stay as they are"),
        (b"{}", "none: no adapter", "nothing static"),
        (b'{"links": [], "networks": []}', "none: no adapter", "nothing static"),
        (
            b'{"links": [{"id": "a", "ethernet_mac_address": "m"}],'
            b' "networks": [{"link": "a", "type": "ipv4_dhcp"}]}',
            "a (m): ipv4_dhcp",
            "nothing static",
        ),
        (b'{"links": [{"id": "a"}], "networks": [{"link": "b", "type": "ipv4"}]}', "no such link", "no such link"),
        (b'{"links": 1, "networks": "x"}', "none: no adapter", "nothing static"),
    ],
)
def test_what_the_network_comes_to(network: bytes | None, linux: str, windows: str) -> None:
    by = seen(changed("network_data.json", network))
    assert linux in str(by[CLOUD_INIT].facts["network"])
    assert windows in str(by[CLOUDBASE].facts["network"])


def test_an_iso_on_a_hard_disk_is_taken_by_cloudbase_init_whatever_its_label() -> None:
    assert seen(TREE, "anything", disk=True)[CLOUDBASE].found
    assert not seen(TREE, "anything", disk=True, file_system="vfat")[CLOUDBASE].found
    assert not seen(TREE, "anything")[CLOUDBASE].found


def test_windows_finds_no_metadata_under_bare_iso_names() -> None:
    windows = {"OPENSTACK/LATEST/META_DAT.JSO": b"{}"}
    assert found(seen(TREE, windows=windows)) == {CLOUD_INIT, "coreos-cloudinit", "Afterburn (openstack)"}
    assert seen(TREE, windows={path.upper(): content for path, content in TREE.items()})[CLOUDBASE].found


def test_an_injected_file_without_its_content_is_said() -> None:
    files = [{"path": "/etc/motd", "content_path": "/content/0000"}, {"path": "/a", "content_path": "/content/0001"}]
    tree = {**changed("meta_data.json", meta(files=files)), "openstack/content/0000": b"hello"}
    listed = seen(tree)[CLOUD_INIT].facts["files"]
    assert listed[0] == "/etc/motd"
    assert "openstack/content/0001 is missing" in listed[1]


def test_ignition_takes_a_configuration_and_coreos_cloudinit_leaves_it() -> None:
    by = seen(changed("user_data", IGNITION))
    assert by["Ignition (openstack)"].facts == {"user-data": f"Ignition 3.4.0, {len(IGNITION)} bytes"}
    assert not by["coreos-cloudinit"].found
    assert seen({"cloudstack/userdata/user_data.txt": IGNITION})["Ignition (cloudstack)"].found


@pytest.mark.parametrize(
    ("missing", "reason"), [("meta-data", "there is no meta-data"), ("user-data", "there is no user-data")]
)
def test_no_cloud_needs_both_files(missing: str, reason: str) -> None:
    by = seen({path: data for path, data in NO_CLOUD.items() if path != missing}, "cidata")
    assert (by[NO].found, by[NO].reason) == (False, reason)


def test_no_cloud_with_empty_files_is_every_guests_same_instance() -> None:
    facts = seen({"meta-data": b"", "user-data": b""}, "cidata")[NO].facts
    assert facts["instance-id"].startswith("nocloud (the default")
    assert facts["user-data"] == "empty"


@pytest.mark.parametrize("content", [b"a: *b\n", b"- a\n", b"\xff", b"a: {" + b"[" * 10000])
def test_metadata_that_is_no_yaml_mapping_is_said(content: bytes) -> None:
    assert seen({**NO_CLOUD, "meta-data": content}, "cidata")[NO].reason.startswith("meta-data")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"#cloud-config\n", "cloud-config"),
        (b"#cloud-config-archive\n", "cloud-config-archive"),
        (b"#!/bin/sh\n", "script"),
        (b"#ps1_sysnative\n", "PowerShell"),
        (b"rem cmd\r\n", "batch script"),
        (b"Content-Type: multipart/mixed", "MIME multi-part"),
        (b"MIME-Version: 1.0", "MIME multi-part"),
        (b"\x1f\x8b\x08", "gzip"),
        (IGNITION, "Ignition"),
        (b"#include\nhttps://x", "list of addresses"),
        (b"#clod-config\n", "nothing that agents know"),
        (b'{"a": 1}', "nothing that agents know"),
        (b"", "empty"),
    ],
)
def test_user_data_is_known_by_how_it_begins(data: bytes, kind: str) -> None:
    described = describe_user_data(data)
    assert described is not None and described.startswith(kind)


def test_values_of_any_type_and_length_become_short_text() -> None:
    """A medium of strangers: nothing of it is taken for what it should be."""
    content = meta(hostname="x" * 10_000, public_keys={str(n): "k" for n in range(5000)})
    facts = seen(changed("meta_data.json", content))[CLOUD_INIT].facts
    assert len(facts["hostname"]) < 300
    assert len(facts["keys"]) == 9 and facts["keys"][-1] == "and 4992 more"
    odd = seen(changed("meta_data.json", b'{"uuid": [1], "hostname": {"a": null}, "public_keys": 7, "files": 3}'))
    assert odd[CLOUD_INIT].facts["instance-id"] == ["1"]
    assert json.dumps([one.to_json() for one in odd.values()])
