"""Drives with which a guest would boot and be out of reach: lint refuses them, and cloud-init shows that it is right.

Each drive is written all the same, as another program would, and read by the real cloud-init as the guest would.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from imagekit.cloudinit.iso import read_iso, write_iso
from imagekit.cloudinit.lint import enforce, judge
from imagekit.cloudinit.model import parse_spec
from imagekit.cloudinit.render import Rendering
from imagekit.cloudinit.tree import MetadataTree
from imagekit.errors import InvalidSpec
from tests.cloudinit_specs import FULL, MAC
from tests.oracles import cloud_init

pytestmark = pytest.mark.oracle

SPEC = {**FULL, "password": None}
OTHER_MAC = "02:15:5d:00:00:99"
ADAPTER = "enp1s0"


@dataclass(frozen=True)
class Nic:
    mac: str


@dataclass(frozen=True)
class Computer:
    uuid: str
    nics: tuple[Nic, ...]


def refused_by_lint(tree: MetadataTree, mac: str) -> str:
    """The words with which lint refuses a drive for a machine with this adapter."""
    with pytest.raises(InvalidSpec) as caught:
        enforce(judge(tree, machine=Computer(str(FULL["uuid"]), (Nic(mac),))))
    return str(caught.value)


def on_a_drive(tree: MetadataTree, folder: Path) -> Path:
    """Write the drive and unpack it where cloud-init looks; the folder to give it."""
    for path, content in read_iso(write_iso(dict(tree.files), label=tree.label)).tree.items():
        file = folder / "seed/config_drive" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return folder


def configured(folder: Path, mac: str) -> set[str]:
    """The adapters that cloud-init configures from a drive, in a guest whose one adapter has this MAC address."""
    data = folder / "seed/config_drive/openstack/latest/network_data.json"
    written = cloud_init.netplan(data, out=folder / "out", nics={mac: ADAPTER})
    return set(yaml.safe_load(written)["network"].get("ethernets", {}))


def test_the_drive_that_lint_takes_configures_the_adapter(tmp_path: Path) -> None:
    tree = Rendering().render(parse_spec(SPEC))
    assert judge(tree, machine=Computer(str(FULL["uuid"]), (Nic(MAC),))) == []
    folder = on_a_drive(tree, tmp_path)
    (nic,) = cloud_init.read_config_drive(folder, nics={MAC: ADAPTER})["network"]["config"][:1]
    assert nic["name"] == ADAPTER
    assert configured(folder, MAC) == {ADAPTER}


def test_a_drive_for_another_mac_address_is_refused_and_ends_cloud_init(tmp_path: Path) -> None:
    """cloud-init ends there: no network, and no user, keys or user data either."""
    tree = Rendering().render(parse_spec(SPEC))
    assert "[mac-unknown;" in refused_by_lint(tree, OTHER_MAC)
    folder = on_a_drive(tree, tmp_path)
    with pytest.raises(pytest.fail.Exception, match="Unable to find a system nic"):
        cloud_init.read_config_drive(folder, nics={OTHER_MAC: ADAPTER})


def test_a_drive_with_an_empty_network_is_refused_and_configures_no_adapter(tmp_path: Path) -> None:
    """It is what Nova writes where it knows no network; None instead of an empty list would be DHCP."""
    tree = Rendering(nova_compatible=True).render(parse_spec({**SPEC, "network": None}))
    assert "[network-empty;" in refused_by_lint(tree, MAC)
    folder = on_a_drive(tree, tmp_path)
    network = cloud_init.read_config_drive(folder, nics={MAC: ADAPTER})["network"]
    assert network is not None
    assert [each for each in network["config"] if each["type"] == "physical"] == []
    assert configured(folder, MAC) == set()
