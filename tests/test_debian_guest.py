"""A real guest from end to end: Debian 12 as qcow2, prepared, booted, and served by our config drive."""

from __future__ import annotations

import base64
import os
import secrets
import struct
import sys
from pathlib import Path
from typing import Literal

import pytest

import imagekit
from imagekit.errors import ToolError
from imagekit.firmware import find_loader
from imagekit.launch.ovmf import find_firmware
from tests.oracles import need_tool

pytestmark = [pytest.mark.slow, pytest.mark.oracle]

TIMEOUT = 1200.0
"""Seconds; without KVM and on a busy machine the guest takes minutes, with Secure Boot a few more."""


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


@pytest.mark.parametrize("generation", [1, 2])
def test_cloud_init_sets_the_hostname_and_runs_the_user_data_from_our_drive(
    debian_guest: Path, tmp_path: Path, generation: Literal[1, 2]
) -> None:
    """The guest itself says on its serial port what it was told and by which data source.

    The nonce is new in every run, so the line cannot come from anywhere but this run's user data; NoCloud is
    enabled in the guest as well, so ConfigDrive in the line means that the drive was recognised as what it is.
    Generation 2 is what the image gets by itself, with Secure Boot, which its kernel must confirm.
    """
    if generation == 2:
        need_firmware_with_keys()
    nonce = secrets.token_hex(8)
    hostname = f"web-{nonce}"
    proof = f"PROOF-{nonce}"
    report = f'echo "{proof} $(hostname) $(cat /var/lib/cloud/instance/datasource)" > /dev/ttyS0'
    bundle = imagekit.prepare(
        debian_guest,
        out=tmp_path / "bundle",
        name="web1",
        hostname=hostname,
        ssh_keys=[public_key()],
        user_data=f"#cloud-config\nruncmd:\n  - [sh, -c, '{report}']\n",
        machine={"generation": "auto" if generation == 2 else 1},
    )
    assert bundle.machine.generation == generation
    result = imagekit.boot(bundle, on="qemu", timeout=TIMEOUT, marker=proof)
    assert (result.verdict, result.stage) == ("booted", "marker"), result.to_json()
    assert result.console is not None
    console = result.console.read_text(errors="replace").splitlines()
    (line,) = (line for line in console if line.startswith(proof))
    print(f"\n{line}\n{result.seconds:.0f} s, {result.accelerator}")  # with pytest -s, for the record
    assert line.split()[1] == hostname
    assert "DataSourceConfigDrive" in line and "/dev/sr0" in line
    assert {"kernel", "init", "cloud-init"} <= {item.stage for item in result.evidence}
    said = [item.line for item in result.evidence]
    assert any("Secure boot enabled" in line or "Secure Boot is enabled" in line for line in said) == (
        generation == 2
    )


def need_firmware_with_keys() -> None:
    """OVMF with Microsoft's keys; without it the test is skipped, or fails under CI."""
    try:
        find_firmware(need_tool("qemu-system-x86_64"), secure_boot=True)
    except ToolError:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip("UEFI firmware with Microsoft's keys is not installed")
