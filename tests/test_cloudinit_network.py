"""network_data.json: one rendering of each kind of network."""

from __future__ import annotations

from typing import Any

import pytest

from imagekit.cloudinit.model import Network
from imagekit.cloudinit.network import network_data
from tests.cloudinit_specs import MAC

LINK = {"id": "eth0", "mac": MAC}


def rendered(*networks: dict[str, Any], dns: tuple[str, ...] = ()) -> dict[str, Any]:
    given = {"links": [LINK], "networks": [{"link": "eth0", **network} for network in networks], "dns": dns}
    return network_data(Network.model_validate(given))


def test_a_link_is_physical_with_its_mac_and_mtu() -> None:
    network = Network.model_validate(
        {
            "links": [
                {"id": "eth0", "mac": "02-15-5D-00-00-01", "mtu": 9000},
                {"id": "eth1", "mac": "02155d000002"},
            ],
            "networks": [{"link": "eth0", "type": "ipv4_dhcp"}],
        }
    )
    assert network_data(network)["links"] == [
        {"id": "eth0", "type": "phy", "ethernet_mac_address": MAC, "mtu": 9000},
        {"id": "eth1", "type": "phy", "ethernet_mac_address": "02:15:5d:00:00:02", "mtu": None},
    ]


@pytest.mark.parametrize("kind", ["ipv4_dhcp", "ipv6_dhcp", "ipv6_slaac"])
def test_a_network_that_gives_the_address_itself_has_only_its_type(kind: str) -> None:
    assert rendered({"type": kind}, dns=("192.0.2.53",)) == {
        "links": [{"id": "eth0", "type": "phy", "ethernet_mac_address": MAC, "mtu": None}],
        "networks": [{"id": "network0", "network_id": "network0", "link": "eth0", "type": kind}],
        "services": [{"type": "dns", "address": "192.0.2.53"}],
    }


def test_a_static_ipv4_network_has_mask_routes_and_name_servers_of_its_version() -> None:
    network = {
        "type": "ipv4",
        "address": "192.0.2.10/25",
        "gateway": "192.0.2.1",
        "routes": [{"network": "10.0.0.0/8", "gateway": "192.0.2.2"}],
    }
    assert rendered(network, dns=("192.0.2.53", "2001:db8::53"))["networks"] == [
        {
            "id": "network0",
            "network_id": "network0",
            "link": "eth0",
            "type": "ipv4",
            "ip_address": "192.0.2.10",
            "netmask": "255.255.255.128",
            "routes": [
                {"network": "0.0.0.0", "netmask": "0.0.0.0", "gateway": "192.0.2.1"},
                {"network": "10.0.0.0", "netmask": "255.0.0.0", "gateway": "192.0.2.2"},
            ],
            "services": [{"type": "dns", "address": "192.0.2.53"}],
        }
    ]


def test_a_static_ipv6_network_has_its_mask_as_an_address() -> None:
    network = {"type": "ipv6", "address": "2001:DB8:0::10/64", "gateway": "fe80::1"}
    (only,) = rendered(network, dns=("192.0.2.53", "2001:db8::53"))["networks"]
    assert (only["ip_address"], only["netmask"]) == ("2001:db8::10", "ffff:ffff:ffff:ffff::")
    assert only["routes"] == [{"network": "::", "netmask": "::", "gateway": "fe80::1"}]
    assert only["services"] == [{"type": "dns", "address": "2001:db8::53"}]


def test_name_servers_are_given_globally_too() -> None:
    """Some guests read only the global list, some only those of a network."""
    services = rendered({"type": "ipv4", "address": "192.0.2.10/24"}, dns=("192.0.2.53", "2001:db8::53"))["services"]
    assert services == [{"type": "dns", "address": "192.0.2.53"}, {"type": "dns", "address": "2001:db8::53"}]


def test_networks_on_one_link_have_ids_of_their_own() -> None:
    networks = rendered({"type": "ipv4_dhcp"}, {"type": "ipv6_slaac"})["networks"]
    assert [network["id"] for network in networks] == ["network0", "network1"]
