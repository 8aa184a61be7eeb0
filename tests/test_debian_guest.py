"""A real guest from end to end: Debian 12 as qcow2, prepared, booted, and served by our config drive."""

from __future__ import annotations

import base64
import os
import re
import secrets
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from uuid import uuid4

import pytest

import imagekit
from imagekit.contents.firmware import find_loader
from imagekit.digests import file_digest
from imagekit.errors import ToolError
from imagekit.launch.ovmf import find_firmware
from tests.oracles import need_tool

pytestmark = [pytest.mark.slow, pytest.mark.oracle]

TIMEOUT = 900.0
"""Seconds; without KVM the guest takes one to two minutes, with two of them on a busy machine up to five."""


@pytest.fixture(scope="session")
def debian_guest() -> Path:
    """The guest's qcow2: built once, kept outside the repository."""
    if sys.platform == "win32" or os.geteuid() != 0:
        pytest.skip("building the Debian guest needs root on Linux")
    from fixtures import debian_guest

    for tool in debian_guest.TOOLS:
        need_tool(tool)
    need_tool("qemu-system-x86_64")
    return debian_guest.cached_guest()


def public_key() -> str:
    """A key in the form of ssh-ed25519 that nobody has the other half of."""
    parts = (b"ssh-ed25519", secrets.token_bytes(32))
    blob = b"".join(struct.pack(">I", len(part)) + part for part in parts)
    return f"ssh-ed25519 {base64.b64encode(blob).decode()} test"


def test_the_guests_loader_is_shim_in_the_name_of_the_uefi_ca(debian_guest: Path) -> None:
    """What decides between the Secure Boot templates, in a loader that Microsoft really signed."""
    with imagekit.open_image(debian_guest) as disk:
        found = find_loader(disk)
    assert (found.found, found.signed, found.signer) == (True, True, "linux")


@dataclass(frozen=True)
class Drive:
    """A kind of config drive, the generation to try it on, and a pattern for the device that it is read from."""

    generation: Literal[1, 2]
    media: Literal["iso", "vfat"]
    disk: Literal["vhd", "vhdx"] | None
    name: str
    device: str


DRIVES = {
    "ISO on an IDE DVD": Drive(1, "iso", None, "web1-config.iso", "/dev/sr0"),
    "ISO on a SCSI DVD": Drive(2, "iso", None, "web1-config.iso", "/dev/sr0"),
    "VFAT in a VHDX": Drive(1, "vfat", "vhdx", "web1-config.vhdx", "/dev/sd[a-z]1"),
    "raw ISO in a VHDX": Drive(2, "iso", "vhdx", "web1-config.vhdx", "/dev/sd[a-z]"),
}

MAC = "02:15:5d:0a:0b:0c"
NETWORK = {
    "links": [{"id": "eth0", "mac": MAC, "mtu": 1400}],
    "networks": [
        {"link": "eth0", "type": "ipv4", "address": "192.0.2.10/24", "gateway": "192.0.2.1"},
        {"link": "eth0", "type": "ipv6", "address": "2001:db8::10/64", "gateway": "2001:db8::1"},
    ],
    "dns": ["192.0.2.53"],
}
REPORT = """\
#cloud-config
write_files:
  - path: /root/report
    content: |
      nic=$(ip -o link | grep -i {mac} | cut -d: -f2 | tr -d " ")
      addresses=$(ip -o addr show dev $nic scope global | awk '{{print $4}}' | sort | tr "\\n" ,)
      gateways=$({{ ip -4 route; ip -6 route; }} | awk '/^default/ {{print $3}}' | tr "\\n" ,)
      echo "{proof} id=$(cat /var/lib/cloud/data/instance-id) host=$(hostname)" \\
        "addresses=$addresses gateways=$gateways mtu=$(cat /sys/class/net/$nic/mtu)" \\
        "key=$(cut -d" " -f2 /home/debian/.ssh/authorized_keys)" \\
        "identified=$(grep -o "Found single datasource: .*" /run/cloud-init/ds-identify.log | cut -d" " -f4)" \\
        "source=$(cat /var/lib/cloud/instance/datasource)" > /dev/ttyS0
runcmd:
  - [sh, /root/report]
"""


@pytest.mark.parametrize("drive", DRIVES.values(), ids=DRIVES)
def test_cloud_init_takes_everything_from_our_drive(debian_guest: Path, tmp_path: Path, drive: Drive) -> None:
    """The guest itself says on its serial port what it is, who may log in, its network, and where all that is from.

    The nonce is new in every run, so the line cannot come from anywhere but this run's user data; NoCloud is
    enabled in the guest as well, so ConfigDrive in the line means that the drive was recognised as what it is.
    Generation 2 is what the image gets by itself, with Secure Boot, which its kernel must confirm.
    """
    if drive.generation == 2:
        need_firmware_with_keys()
    nonce = secrets.token_hex(8)
    hostname, proof, key, uuid = f"web-{nonce}.example", f"PROOF-{nonce}", public_key(), str(uuid4())
    bundle = imagekit.prepare(
        debian_guest,
        out=tmp_path / "bundle",
        name="web1",
        uuid=uuid,
        hostname=hostname,
        ssh_keys=[key],
        network=NETWORK,
        user_data=REPORT.format(proof=proof, mac=MAC),
        machine={"generation": "auto" if drive.generation == 2 else 1},
        media=drive.media,
        disk=drive.disk,
    )
    assert bundle.machine.generation == drive.generation
    assert bundle.machine.media[1].path == drive.name
    before = digests(tmp_path / "bundle")
    result = imagekit.boot(bundle, on="qemu", timeout=TIMEOUT, marker=proof)
    if (result.verdict, result.accelerator) == ("timeout", "tcg"):
        # Seen once, not explained: what counts is that this disk can boot, and the next line says what happened.
        print(f"not there after {TIMEOUT:.0f} s, once more; it was at {result.stage}")
        result = imagekit.boot(bundle, on="qemu", timeout=TIMEOUT, marker=proof)
    assert {name: digest for name, digest in digests(tmp_path / "bundle").items() if name in before} == before
    assert result.console is not None
    console = result.console.read_text(errors="replace").splitlines()
    seen = [item.line for item in result.evidence]
    assert (result.verdict, result.stage) == ("booted", "marker"), "\n".join([*seen, *console[-60:]])
    (line,) = (line for line in console if line.startswith(proof))
    print(f"\n{line}\n{result.seconds:.0f} s, {result.accelerator}")  # with pytest -s, for the record
    said = dict(part.split("=", 1) for part in line.split()[1:] if "=" in part)
    assert (said["id"], said["host"]) == (uuid, hostname.split(".")[0])
    assert said["key"] == key.split()[1]
    assert said["addresses"] == "192.0.2.10/24,2001:db8::10/64,"
    assert (said["gateways"], said["mtu"]) == ("192.0.2.1,2001:db8::1,", "1400")
    assert said["identified"] == "ConfigDrive"
    assert "DataSourceConfigDrive" in line and re.search(f"source={drive.device}]", line)
    assert {"kernel", "init", "cloud-init"} <= {item.stage for item in result.evidence}
    assert any("Secure boot enabled" in line or "Secure Boot is enabled" in line for line in seen) == (
        drive.generation == 2
    )


def digests(folder: Path) -> dict[str, str]:
    """What a boot must leave as it is."""
    return {path.name: file_digest(path) for path in folder.iterdir()}


def need_firmware_with_keys() -> None:
    """OVMF with Microsoft's keys; without it the test is skipped, or fails under CI."""
    try:
        find_firmware(need_tool("qemu-system-x86_64"), secure_boot=True)
    except ToolError:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip("UEFI firmware with Microsoft's keys is not installed")
