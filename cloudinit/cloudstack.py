"""Renders a spec as the config drive that CloudStack writes.

``cloudstack/`` holds a file a value, as CloudStack's ConfigDriveBuilder names them, ``openstack/latest`` what
cloud-init's ConfigDrive data source reads (its CloudStack data source reads no drive). Who needs the first are
Ignition's and afterburn's ``cloudstack`` platforms and CloudStack's own scripts for passwords.
"""

from __future__ import annotations

from imagekit.cloudinit.configdrive import content_files, openstack_files
from imagekit.cloudinit.model import Spec


def cloudstack_tree(spec: Spec) -> dict[str, bytes]:
    """Path to content of every file. Raises InvalidSpec as `config_drive_tree` does."""
    openstack = openstack_files(spec)
    networks = spec.network.networks if spec.network else ()
    addresses = [str(subnet.address.ip) for subnet in networks if subnet.version == 4 and subnet.address]
    values = {
        "availability-zone": spec.availability_zone or "",
        "cloud-identifier": "",
        "cloud-name": "imagekit",
        "hypervisor-host-name": "",
        "instance-id": spec.name,
        "local-hostname": spec.guest_hostname,
        "local-ipv4": addresses[0] if addresses else "",
        "public-hostname": spec.guest_hostname,
        "public-ipv4": "",
        "public-keys": "\n".join(spec.ssh_keys),
        "service-offering": "",
        "vm-id": spec.uuid or "",
    }
    tree = {f"cloudstack/metadata/{name}.txt": value.encode() for name, value in values.items()}
    if "user_data" in openstack:
        tree["cloudstack/userdata/user_data.txt"] = openstack["user_data"]
    if spec.password is not None and spec.guest == "windows":
        tree["cloudstack/password/vm_password.txt"] = spec.password.get_secret_value().encode()
    return tree | {f"openstack/latest/{name}": content for name, content in openstack.items()} | content_files(spec)
