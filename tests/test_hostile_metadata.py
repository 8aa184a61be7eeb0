"""Metadata of strangers, with anything in the place of everything: judged or refused, no crash, and not for long."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest
import yaml

from imagekit.cloudinit.agents import Medium, what_agents_see
from imagekit.cloudinit.configdrive import config_drive_tree
from imagekit.cloudinit.lint import judge
from imagekit.cloudinit.manifest import manifest
from imagekit.cloudinit.model import GUEST_PROFILES, parse_spec
from imagekit.cloudinit.nocloud import nocloud_tree
from imagekit.cloudinit.nova import nova_tree
from imagekit.cloudinit.tree import MetadataTree
from tests.cloudinit_specs import FULL

SPEC = parse_spec({key: value for key, value in FULL.items() if key != "password"})
TREES = [
    ("config-2", dict(nova_tree(SPEC))),
    ("config-2", dict(config_drive_tree(SPEC))),
    ("cidata", dict(nocloud_tree(SPEC, version=1))),
    ("cidata", dict(nocloud_tree(SPEC, version=2))),
]
USER_DATA = {
    "packages": ["a"],
    "users": ["default", {"name": "x"}],
    "runcmd": [["a"]],
    "write_files": [{"path": "/a"}],
}
ODD: list[Any] = [None, True, 0, -1, 1.5, "", "a/b", [], {}, [[]], [{}], {"a": 1}, [None], "fe80::1", 10**30, ["x"]]


def changed(value: Any, chance: random.Random) -> Any:
    """The value with something odd in the place of a part of it here and there."""
    if chance.random() < 0.12:
        return chance.choice(ODD)
    if isinstance(value, dict):
        out = {key: changed(inner, chance) for key, inner in value.items() if chance.random() > 0.05}
        return out | {chance.choice(["uuid", "mac", "files"]): chance.choice(ODD)} if chance.random() < 0.1 else out
    return [changed(inner, chance) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("seed", range(20))
def test_nothing_that_metadata_says_is_taken_for_what_it_should_be(seed: int) -> None:
    chance = random.Random(seed)
    label, tree = TREES[seed % len(TREES)]
    odd = {}
    for path, data in tree.items():
        if path.endswith(".json"):
            odd[path] = json.dumps(changed(json.loads(data), chance)).encode()
        elif path in ("meta-data", "network-config"):
            odd[path] = yaml.safe_dump(changed(yaml.safe_load(data), chance)).encode()
        else:
            odd[path] = b"#cloud-config\n" + yaml.safe_dump(changed(USER_DATA, chance)).encode()
    assert len(what_agents_see(Medium(label, "iso9660", odd, odd))) == 8
    assert len(json.dumps([entry.to_json() for entry in manifest(odd)])) > len(odd)
    recognised = MetadataTree.recognise(label, odd)
    assert recognised is not None
    for guest in GUEST_PROFILES:
        assert all(finding.why and finding.fix for finding in judge(recognised, guest=guest))


@pytest.mark.parametrize("path", ["user-data", "meta-data", "network-config"])
@pytest.mark.parametrize("text", ["a: " + "[" * 60_000, "a: " + "{a: " * 20_000], ids=["lists", "mappings"])
def test_nesting_without_end_takes_no_time(path: str, text: str) -> None:
    """PyYAML alone would take minutes."""
    tree = dict(TREES[2][1]) | {path: (b"#cloud-config\n" if path == "user-data" else b"") + text.encode()}
    started = time.process_time()
    found = judge(MetadataTree("nocloud", "cidata", tree))
    assert any(finding.where.startswith(path) for finding in found)
    assert len(what_agents_see(Medium("cidata", "vfat", tree, tree))) == 8
    assert manifest(tree)
    assert time.process_time() - started < 2
