"""Our config drive against the cloud-init that guests run: what it reads is what the spec says."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from imagekit.cloudinit.configdrive import build_config_drive, config_drive_tree
from imagekit.cloudinit.iso import read_iso
from imagekit.cloudinit.model import Network, parse_spec
from imagekit.cloudinit.render import Rendering
from tests.cloudinit_specs import FULL, KEY, MAC, UUID
from tests.oracles import cloud_init

pytestmark = pytest.mark.oracle

NICS = {MAC: "enp1s0"}


def seed(folder: Path, tree: dict[str, bytes]) -> Path:
    """Put the drive's files where cloud-init looks for a drive that is already unpacked."""
    for path, content in tree.items():
        file = folder / "seed/config_drive" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return folder


def test_cloud_init_reads_back_what_the_spec_says(tmp_path: Path) -> None:
    spec = parse_spec({key: value for key, value in FULL.items() if key != "password"})  # it would be a second part
    read = cloud_init.read_config_drive(seed(tmp_path, read_iso(build_config_drive(spec)).tree), nics=NICS)
    assert read["instance_id"] == UUID
    assert (read["hostname"], read["fqdn"]) == ("web1", "web1.example")
    assert read["keys"] == [KEY]
    assert bytes.fromhex(read["user_data"]) == spec.user_data
    assert read["meta"] == {"role": "web"}


def test_cloud_init_takes_user_data_that_is_not_text(tmp_path: Path) -> None:
    user_data = bytes(range(256))
    tree = config_drive_tree(parse_spec({"name": "a", "uuid": UUID, "user_data": user_data}))
    read = cloud_init.read_config_drive(seed(tmp_path, tree), nics={})
    assert bytes.fromhex(read["user_data"]) == user_data


def test_cloud_init_finds_no_network_where_none_is_known(tmp_path: Path) -> None:
    """None makes cloud-init fall back to DHCP; an empty list would leave the guest without a network."""
    tree = config_drive_tree(parse_spec({"name": "a", "uuid": UUID}))
    assert cloud_init.read_config_drive(seed(tmp_path, tree), nics=NICS)["network"] is None


def test_cloud_init_asks_dhcp_on_the_adapter_with_our_mac(tmp_path: Path) -> None:
    tree = config_drive_tree(parse_spec({"name": "a", "uuid": UUID, "network": Network.dhcp(MAC)}))
    network = cloud_init.read_config_drive(seed(tmp_path, tree), nics=NICS)["network"]
    (nic,) = network["config"]
    assert (nic["name"], nic["mac_address"], nic["type"]) == ("enp1s0", MAC, "physical")
    assert [subnet["type"] for subnet in nic["subnets"]] == ["dhcp4"]


def test_cloud_init_configures_addresses_routes_and_name_servers(tmp_path: Path) -> None:
    tree = config_drive_tree(parse_spec(FULL))
    file = tmp_path / "network_data.json"
    file.write_bytes(tree["openstack/latest/network_data.json"])
    written = yaml.safe_load(cloud_init.netplan(file, out=tmp_path / "out", nics=NICS))["network"]
    nic = written["ethernets"]["enp1s0"]
    assert nic["match"] == {"macaddress": MAC}
    assert nic["mtu"] == 1400
    assert sorted(nic["addresses"]) == ["192.0.2.10/24", "2001:db8::10/64"]
    everywhere = {"0.0.0.0/0", "::/0", "default"}  # the last one from cloud-init 23 on
    assert {route["via"] for route in nic["routes"] if route["to"] in everywhere} == {"192.0.2.1", "fe80::1"}
    assert {"to": "198.51.100.0/24", "via": "192.0.2.254"} in nic["routes"]
    assert {"192.0.2.53", "2001:db8::53"} <= set(nic["nameservers"]["addresses"])


def test_cloud_init_reads_no_cloud_as_the_spec_says(tmp_path: Path) -> None:
    spec = parse_spec({**FULL, "password": None})
    folder = tmp_path / "seed/nocloud"
    folder.mkdir(parents=True)
    for path, content in Rendering("nocloud").render(spec).files.items():
        (folder / path).write_bytes(content)
    read = cloud_init.read_no_cloud(tmp_path)
    assert (read["instance_id"], read["local_hostname"]) == (UUID, "web1.example")
    assert read["keys"] == [KEY]
    assert bytes.fromhex(read["user_data"]) == spec.user_data
    assert read["network"]["config"][0]["mac_address"] == MAC


def test_what_is_added_to_user_data_grows_its_lists_and_changes_none_of_its_values(tmp_path: Path) -> None:
    own = "#cloud-config\npackages: [nginx]\nchpasswd: {expire: true}\nruncmd: [[touch, /a]]\n"
    values = {"name": "a", "uuid": UUID, "guest": "debian12", "hyperv_tools": True, "password": "x", "user_data": own}
    tree = config_drive_tree(parse_spec(values))
    merged = cloud_init.merged_cloud_config(tree["openstack/latest/user_data"], tmp_path)
    assert merged.pop("password").startswith("$6$")
    assert merged == {
        "packages": ["nginx", "hyperv-daemons"],
        "chpasswd": {"expire": True},
        "runcmd": [["touch", "/a"]],
    }


@pytest.mark.parametrize(
    ("distro", "package"),
    [
        ("debian", "hyperv-daemons"),
        pytest.param("fedora", "hyperv-daemons", marks=pytest.mark.slow),
        ("rhel", "hyperv-daemons"),
        pytest.param("almalinux", "hyperv-daemons", marks=pytest.mark.slow),
        ("ubuntu", "linux-cloud-tools-virtual"),
        ("opensuse-leap", "hyper-v"),
        pytest.param("opensuse-tumbleweed", "hyper-v", marks=pytest.mark.slow),
        pytest.param("sles", "hyper-v", marks=pytest.mark.slow),
    ],
)
def test_the_package_of_hyperv_s_daemons_is_that_of_the_distribution(
    tmp_path: Path, distro: str, package: str
) -> None:
    """For --guest linux, alone and beside user data with packages of its own."""
    for number, own in enumerate(({}, {"user_data": "#cloud-config\npackages: [nginx]\n"})):
        spec = parse_spec({"name": "a", "uuid": UUID, "guest": "linux", "hyperv_tools": True, **own})
        folder = tmp_path / str(number)
        folder.mkdir()
        data = config_drive_tree(spec)["openstack/latest/user_data"]
        merged = cloud_init.merged_cloud_config(data, folder, distro=distro)
        assert merged == {"packages": [*(["nginx"] if own else []), package]}
