"""Who a guest is: spec, keywords, and what derives from the uuid."""

from __future__ import annotations

from pathlib import Path

import pytest

from imagekit.cloudinit.model import derive_mac, parse_spec
from imagekit.errors import InvalidSpec, UsageError
from imagekit.guest import make_guest, name_for

UUID = "8f2a6d5c-9d3e-4a54-8d4e-0f9b8d1f1c11"
OTHER = "8f2a6d5c-9d3e-4a54-8d4e-0f9b8d1f1c12"
STATIC = {
    "links": [{"id": "eth0", "mac": "02:15:5d:00:00:01"}, {"id": "eth1", "mac": "02:15:5d:00:00:02"}],
    "networks": [{"link": "eth0", "type": "ipv4_dhcp"}, {"link": "eth1", "type": "ipv4_dhcp"}],
}


def test_two_guests_never_share_uuid_mac_or_disk_id() -> None:
    one, other = make_guest(name="web"), make_guest(name="web")
    assert one.uuid != other.uuid
    assert one.mac != other.mac
    assert one.disk_identifier() != other.disk_identifier()


def test_one_uuid_always_gives_one_identity() -> None:
    one, other = make_guest(name="web", uuid=UUID), make_guest(name="other", uuid=UUID.upper())
    assert (one.mac, one.disk_identifier()) == (other.mac, other.disk_identifier())
    assert one.disk_identifier(0) != one.disk_identifier(1)
    assert one.mac.startswith("02:")


def test_without_a_network_the_machine_has_an_adapter_and_the_drive_says_nothing() -> None:
    guest = make_guest(name="web", uuid=UUID)
    assert guest.spec.network is None
    assert [nic.mac for nic in guest.nics] == [derive_mac(UUID)]


def test_the_mac_on_the_drive_is_the_mac_of_the_machine() -> None:
    for arguments in ({"network": "dhcp"}, {"network": "dhcp", "mac": "02-15-5D-00-00-07"}, {"network": STATIC}):
        guest = make_guest(name="web", uuid=UUID, **arguments)
        assert guest.spec.network is not None
        assert [nic.mac for nic in guest.nics] == [link.mac for link in guest.spec.network.links]


def test_a_mac_without_a_network_is_the_machine_s_alone() -> None:
    guest = make_guest(name="web", mac="02155D000007")
    assert guest.spec.network is None
    assert [nic.mac for nic in guest.nics] == ["02:15:5d:00:00:07"]


def test_a_mac_beside_a_network_with_links_is_refused() -> None:
    with pytest.raises(UsageError, match="MAC"):
        make_guest(name="web", network=STATIC, mac="02:15:5d:00:00:07")


def test_a_bad_mac_is_refused_by_name() -> None:
    with pytest.raises(InvalidSpec):
        make_guest(name="web", mac="zz:15:5d:00:00:07")


def test_keywords_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("name: file\nhostname: file.example\nmachine: {cpus: 3, memory: 1GiB}\n")
    guest = make_guest(path, default_name="default", hostname="flag.example", machine={"memory": 2 << 30})
    assert (guest.spec.name, guest.spec.hostname) == ("file", "flag.example")
    assert (guest.spec.machine.cpus, guest.spec.machine.memory) == (3, 2 << 30)
    assert make_guest(default_name="default").spec.name == "default"


def test_a_spec_object_takes_no_keywords() -> None:
    spec = parse_spec({"name": "web"})
    assert make_guest(spec).spec.name == "web"
    with pytest.raises(UsageError):
        make_guest(spec, hostname="other")


@pytest.mark.parametrize(
    ("image", "name"),
    [("debian-12.qcow2", "debian-12"), ("/a/b/My Image!.raw", "My-Image"), ("...", "guest"), ("x" * 99, "x" * 64)],
)
def test_a_name_is_made_of_the_image_s(image: str, name: str) -> None:
    assert name_for(image) == name
