"""The list of what is on a medium shows what helps and nothing that is secret."""

from __future__ import annotations

import json

import pytest

from imagekit.cloudinit.configdrive import config_drive_tree
from imagekit.cloudinit.manifest import HIDDEN, Entry, manifest
from imagekit.cloudinit.model import parse_spec
from tests.cloudinit_specs import FULL, KEY, UUID

SECRET = "correct horse"
SPEC = {
    **FULL,
    "meta": {"admin_pass": SECRET, "role": "web", "db": SECRET},
    "user_data": f"#cloud-config\n# {SECRET}\n",
}


def by_path(tree: dict[str, bytes]) -> dict[str, Entry]:
    return {entry.path: entry for entry in manifest(tree)}


def shown(path: str, content: bytes) -> object:
    return by_path({path: content})[path].content


def test_no_secret_of_a_spec_is_in_the_manifest_of_its_drive() -> None:
    tree = config_drive_tree(parse_spec(SPEC))
    assert SECRET.encode() in b"".join(tree.values())
    text = json.dumps([entry.to_json() for entry in manifest(tree)])
    assert SECRET not in text
    assert {"web1.example", UUID, "192.0.2.10", "admin_pass", "db"} <= set(
        text.replace('"', " ").replace(",", " ").split()
    )


def test_every_file_is_listed_once_and_equal_ones_are_named() -> None:
    tree = config_drive_tree(parse_spec(SPEC))
    entries = by_path(tree)
    assert list(entries) == sorted(tree)
    assert {path: entry.size for path, entry in entries.items()} == {path: len(data) for path, data in tree.items()}
    latest = entries["openstack/latest/meta_data.json"]
    assert (latest.same_as, latest.content) == ("openstack/2018-08-27/meta_data.json", None)


def test_keys_are_shown_by_their_fingerprints() -> None:
    """Compared with what ssh-keygen -l prints for the key."""
    content = shown("openstack/latest/meta_data.json", json.dumps({"public_keys": {"me": KEY}}).encode())
    assert content == {"public_keys": {"me": f"ssh-ed25519 SHA256:{FINGERPRINT} me"}}


FINGERPRINT = "ZkAslGjFiUHdGf/WUL8rQvkib4PTvQatUV0OUQSncCA"


@pytest.mark.parametrize(
    "name",
    [
        "admin_pass",
        "password",
        "random_seed",
        "secret-key",
        "api_token",
        "private_key",
        "seedfrom",
        "auth",
        "credentials",
    ],
)
def test_a_value_whose_name_suggests_a_secret_is_not_shown(name: str) -> None:
    for path in ("openstack/latest/meta_data.json", "ec2/latest/meta-data.json", "meta-data", "network-config"):
        value: object = {"outer": [{name: SECRET, "other": "shown"}]}
        assert shown(path, json.dumps(value).encode()) == {"outer": [{name: HIDDEN, "other": "shown"}]}


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("openstack/latest/user_data", "user data: nothing that agents know by its first line, 13 bytes"),
        ("user-data", "user data: nothing that agents know by its first line, 13 bytes"),
        ("cloudstack/userdata/user_data.txt", "user data: nothing that agents know by its first line, 13 bytes"),
        ("openstack/latest/vendor_data2.json", "vendor data"),
        ("vendor-data", "vendor data"),
        ("openstack/content/0000", "file"),
        ("cloudstack/password/vm_password.txt", "password"),
    ],
)
def test_of_other_files_nothing_is_shown(path: str, what: str) -> None:
    entry = by_path({path: SECRET.encode()})[path]
    assert entry.what == what
    assert entry.content in (None, HIDDEN)


def test_cloudstacks_text_files_are_shown_but_for_secrets() -> None:
    assert shown("cloudstack/metadata/local-hostname.txt", b"web1\n") == "web1"
    assert shown("cloudstack/metadata/public-keys.txt", KEY.encode()) == f"ssh-ed25519 SHA256:{FINGERPRINT} me"
    assert shown("cloudstack/metadata/api-token.txt", b"x") == HIDDEN


@pytest.mark.parametrize(
    ("path", "content", "said"),
    [
        ("openstack/latest/meta_data.json", b"{", "(not JSON)"),
        ("openstack/latest/meta_data.json", b"[" * 100_000, "(not JSON)"),
        ("openstack/latest/meta_data.json", b" " * (2 << 20), "(too long to be shown: 2097152 bytes)"),
        ("meta-data", b"\xff", "(not YAML)"),
        ("meta-data", b"a: &a [*a]\n", "(not YAML)"),
        ("meta-data", b"#" * 300_000, "(too long to be shown: 300000 bytes)"),
    ],
)
def test_what_cannot_be_parsed_is_said(path: str, content: bytes, said: str) -> None:
    assert shown(path, content) == said


def test_nothing_of_any_length_or_depth_is_shown_in_full() -> None:
    long = shown("openstack/latest/meta_data.json", json.dumps({"name": "x" * 5000}).encode())
    assert long == {"name": "(text of 5000 characters)"}
    deep = shown("openstack/latest/meta_data.json", b'{"a": ' * 60 + b"1" + b"}" * 60)
    assert "nested too deep" in json.dumps(deep)
