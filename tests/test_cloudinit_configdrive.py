"""The OpenStack config drive: which files, what is in them, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from imagekit.cloudinit import configdrive
from imagekit.cloudinit.configdrive import build_config_drive, config_drive_tree
from imagekit.cloudinit.iso import read_iso
from imagekit.cloudinit.model import Spec, parse_spec
from imagekit.errors import InvalidSpec
from tests.cloudinit_specs import FULL, KEY, UUID, ssh_key

LEAST = {"name": "web_1", "uuid": UUID}


def meta_data(spec: Spec) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(config_drive_tree(spec)["openstack/latest/meta_data.json"])
    return loaded


def test_the_least_spec_gives_metadata_and_no_network_or_user_data() -> None:
    """An empty network_data.json would leave the guest without a network; a missing one means DHCP."""
    tree = config_drive_tree(parse_spec(LEAST))
    assert sorted(tree) == [
        "openstack/2018-08-27/meta_data.json",
        "openstack/2018-08-27/vendor_data.json",
        "openstack/latest/meta_data.json",
        "openstack/latest/vendor_data.json",
    ]
    assert json.loads(tree["openstack/latest/vendor_data.json"]) == {}


def test_a_full_spec_gives_every_file() -> None:
    tree = config_drive_tree(parse_spec(FULL))
    names = {path.removeprefix("openstack/latest/") for path in tree if "/latest/" in path}
    assert names == {"meta_data.json", "vendor_data.json", "network_data.json", "user_data"}


def test_both_versions_hold_the_same() -> None:
    tree = config_drive_tree(parse_spec(FULL))
    latest = {path.split("/")[2]: content for path, content in tree.items() if "/latest/" in path}
    dated = {path.split("/")[2]: content for path, content in tree.items() if "/2018-08-27/" in path}
    assert latest == dated


def test_meta_data_says_what_nova_would_say() -> None:
    assert meta_data(parse_spec({**FULL, "guest": "windows"})) == {
        "uuid": UUID,
        "name": "web1",
        "hostname": "web1.example",
        "launch_index": 0,
        "availability_zone": None,
        "public_keys": {"key1": KEY},
        "keys": [{"name": "key1", "type": "ssh", "data": KEY}],
        "meta": {"role": "web"},
        "admin_pass": "correct horse",
    }


def test_what_was_not_given_is_not_in_meta_data() -> None:
    assert set(meta_data(parse_spec(LEAST))) == {
        "uuid",
        "name",
        "hostname",
        "launch_index",
        "availability_zone",
    }


def test_every_key_gets_a_name_of_its_own() -> None:
    other = ssh_key(b"ssh-ed25519", bytes(32))
    assert meta_data(parse_spec({**LEAST, "ssh_keys": [KEY, other]}))["public_keys"] == {
        "key1": KEY,
        "key2": other,
    }


def test_text_beyond_ascii_is_utf_8() -> None:
    tree = config_drive_tree(parse_spec({**LEAST, "meta": {"city": "Köln"}}))
    assert "Köln".encode() in tree["openstack/latest/meta_data.json"]


def test_user_data_is_written_as_it_came() -> None:
    raw = bytes(range(256))
    assert config_drive_tree(parse_spec({**LEAST, "user_data": raw}))["openstack/latest/user_data"] == raw


def test_the_order_of_fields_does_not_change_the_drive() -> None:
    assert build_config_drive(parse_spec(FULL)) == build_config_drive(parse_spec(dict(reversed(FULL.items()))))


def test_the_drive_holds_the_tree_under_the_label_guests_look_for() -> None:
    spec = parse_spec(FULL)
    content = read_iso(build_config_drive(spec))
    assert (content.label, content.joliet_label) == ("config-2", "config-2")
    assert content.tree == content.joliet == config_drive_tree(spec)


def test_the_versions_share_their_files_on_the_drive() -> None:
    user_data = "#cloud-config\n" + "#" * 60000
    assert len(build_config_drive(parse_spec({**LEAST, "user_data": user_data}))) < 160_000


def test_a_spec_without_uuid_is_refused() -> None:
    with pytest.raises(InvalidSpec, match="no uuid") as caught:
        build_config_drive(parse_spec({"name": "web1"}))
    assert caught.value.hint


def test_user_data_up_to_the_limit_is_taken_and_one_byte_more_refused() -> None:
    build_config_drive(parse_spec({**LEAST, "user_data": b"#" * 65535}))
    with pytest.raises(InvalidSpec, match="65536 bytes, a config drive takes 65535"):
        build_config_drive(parse_spec({**LEAST, "user_data": b"#" * 65536}))


def test_a_drive_beyond_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits of the fields keep drives far below 64 MiB, so the limit is brought down to them."""
    monkeypatch.setattr(configdrive, "MAX_DRIVE", 70_000)
    with pytest.raises(InvalidSpec, match="the most is 70000"):
        build_config_drive(parse_spec(LEAST))
