"""Every shape of network, through the real cloud-init, to what it writes for the guest: equal to what the model says.

18 shapes, as network_data.json and both versions of network-config, written as netplan, ifupdown, sysconfig and
NetworkManager. Where Debian 12's cloud-init (22.4) loses something on the way, the test says what and why.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from imagekit.cloudinit.model import parse_spec
from imagekit.cloudinit.render import Rendering
from tests.cloudinit_specs import UUID
from tests.network_shapes import MACS, SHAPES, Rendered, meant, network_of
from tests.oracles import cloud_init
from tests.oracles.rendered_networks import READERS

pytestmark = pytest.mark.oracle

WRITERS = {"netplan": "debian", "eni": "debian", "sysconfig": "rhel", "network-manager": "rhel"}
SOURCES = {
    "network_data.json": ("network_data.json", Rendering()),
    "network-config 1": ("yaml", Rendering("nocloud", network_config=1)),
    "network-config 2": ("yaml", Rendering("nocloud", network_config=2)),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what cloud-init wrote: SOURCE/WRITER/SHAPE."""
    top = tmp_path_factory.mktemp("networks")
    jobs = []
    for source, (kind, rendering) in SOURCES.items():
        for shape in SHAPES:
            tree = rendering.render(parse_spec({"name": "a", "uuid": UUID, "network": SHAPES[shape]})).files
            file = top / f"{source} {shape}"
            file.write_bytes(tree.get("network-config") or tree["openstack/latest/network_data.json"])
            for writer, distro in WRITERS.items():
                out = top / source / writer / shape
                jobs.append({"source": str(file), "kind": kind, "write": writer, "distro": distro, "out": str(out)})
    cloud_init.render_networks(jobs, nics={mac: name for name, mac in MACS.items()})
    return top


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("source", SOURCES)
def test_what_the_guest_gets_is_what_the_model_says(written: Path, source: str, writer: str, shape: str) -> None:
    found = READERS[writer](written / source / writer / shape)
    wanted = meant(network_of(shape))
    lost = losses(source, writer, shape)
    assert found.without(*lost) == wanted.without(*lost)


def losses(source: str, writer: str, shape: str) -> set[str]:
    """What cloud-init 22.4 does not hand on, or adds, whatever the metadata says."""
    lost = set()
    if writer == "network-manager":
        lost |= {"mtu"} if shape == "VLAN on a bond" else set()  # it writes the MTU of adapters only
        if source == "network_data.json":
            lost.add("dns")  # it takes name servers of a network, and network_data.json's are for all
            lost |= {"auto6"} if shape.startswith("static") else set()  # static6 is automatic as well
            lost |= {"bond"} if "bond" in shape else set()  # the mode under a name it does not know
    if writer == "sysconfig" and shape == "stateful" and source != "network-config 2":
        lost.add("dhcp4")  # BOOTPROTO=dhcp stands for both
    if source == "network-config 2" and writer != "netplan" and shape == "slaac":
        lost.add("auto6")  # accept-ra alone is not translated
    return lost


def test_the_default_loses_nothing_but_the_mtu_of_a_vlan_and_the_silence_of_dhcp() -> None:
    """Version 1 of network-config, for each way of writing it."""
    lost = {(writer, shape) for writer in WRITERS for shape in SHAPES if losses("network-config 1", writer, shape)}
    assert lost == {("network-manager", "VLAN on a bond"), ("sysconfig", "stateful")}


def test_there_are_enough_shapes() -> None:
    assert len(SHAPES) >= 12
    assert isinstance(meant(network_of("bond")), Rendered)
