"""Nova 34's own InstanceMetadata, asked for the config drive of one instance.

It runs in an environment of its own; only the database and the security groups are stood in for.
"""

from __future__ import annotations

import base64
import json
import subprocess
from typing import Any

import pytest

from tests.oracles import need_venv

_ASK = """
import json, sys, warnings, base64
warnings.simplefilter("ignore")
from unittest import mock
asked = json.load(sys.stdin)
from nova import objects, context
import nova.conf
objects.register_all()
nova.conf.CONF([], project="nova", default_config_files=[])
nova.conf.CONF.set_override("dhcp_domain", "", group="api")
from nova.api.metadata import base
from nova.network import model
from nova.objects import virt_device_metadata as devices

ctx = context.get_admin_context()
inst = objects.Instance(
    context=ctx, id=1, uuid=asked["uuid"], project_id=asked["project_id"], user_id="u",
    hostname=asked["hostname"], display_name=asked["name"], launch_index=asked["launch_index"],
    availability_zone=asked["availability_zone"], reservation_id=asked["reservation_id"],
    key_name="key1", key_data=asked["key"], user_data=asked["user_data"], image_ref="", kernel_id="",
    ramdisk_id="", root_device_name="/dev/sda", default_ephemeral_device=None, default_swap_device=None,
    metadata=asked["meta"], system_metadata={}, config_drive="True", launched_at=None, host="h", node="n")
inst.flavor = objects.Flavor(
    name=asked["flavor"], flavorid="1", memory_mb=1, vcpus=1, root_gb=1, ephemeral_gb=0, swap=0)
inst.ec2_ids = objects.EC2Ids(
    instance_id=asked["instance_id"], ami_id=asked["ami_id"], kernel_id=None, ramdisk_id=None)
inst.keypairs = objects.KeyPairList(objects=[
    objects.KeyPair(name="key1", type="ssh", public_key=asked["key"])])
inst.numa_topology = None
inst.security_groups = objects.SecurityGroupList(objects=[])
buses = {"pci": devices.PCIDeviceBus, "scsi": devices.SCSIDeviceBus, "ide": devices.IDEDeviceBus}
listed = []
for one in asked["devices"]:
    fields = {"bus": buses[one["bus"]](address=one["address"]), "tags": one["tags"]}
    if one["type"] == "nic":
        listed.append(devices.NetworkInterfaceMetadata(
            mac=one["mac"], vlan=one["vlan"], vf_trusted=one["vf_trusted"], **fields))
    else:
        listed.append(devices.DiskMetadata(serial=one["serial"], path=one["path"], **fields))
inst.device_metadata = devices.InstanceDeviceMetadata(devices=listed)
subnets = []
for one in asked["subnets"]:
    routes = [model.Route(cidr=r["cidr"], gateway=model.IP(address=r["gateway"])) for r in one["routes"]]
    dhcp = {"dhcp_server": "192.0.2.2"} if one.get("dhcp") else {}
    subnets.append(model.Subnet(
        cidr=one["cidr"], gateway=model.IP(address=one["gateway"]), routes=routes,
        dns=[model.IP(address=d) for d in one["dns"]], ips=[model.FixedIP(address=one["address"])], **dhcp))
network = model.Network(id="net", bridge="br", label="lan", subnets=subnets, mtu=asked["mtu"])
vif = model.VIF(id="vif", address=asked["mac"], network=network, type="ovs", devname="eth0", details={}, profile={})
info = model.NetworkInfo([vif])
inst.info_cache = objects.InstanceInfoCache(network_info=info)
with mock.patch.object(objects.Instance, "get_bdms", return_value=objects.BlockDeviceMappingList(objects=[])), \\
     mock.patch("nova.api.metadata.base.security_group_api.get_instance_security_groups",
                return_value=[{"name": "default"}]):
    md = base.InstanceMetadata(
        inst, content=[(path, base64.b64decode(data)) for path, data in asked["files"]],
        extra_md=asked["extra"], network_info=info)
    tree = {}
    for path, value in md.metadata_for_config_drive():
        data = value.encode() if isinstance(value, str) else value
        tree[path] = base64.b64encode(data).decode()
print("TREE" + json.dumps(tree))
"""


def nova_tree(instance: dict[str, Any]) -> dict[str, bytes]:
    """Path to content of every file that Nova writes for the instance."""
    done = subprocess.run(
        [str(need_venv("nova_metadata")), "-c", _ASK], input=json.dumps(instance), capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.fail(f"Nova exited {done.returncode}: {done.stderr.strip()[-2000:]}")
    line = next(line for line in done.stdout.splitlines() if line.startswith("TREE"))
    return {path: base64.b64decode(data) for path, data in json.loads(line.removeprefix("TREE")).items()}
