"""What an image's properties in Glance make of ``prepare``; conflicts come before a byte of the image is fetched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import imagekit
from fixtures.efi_disks import ESP, UEFI_CA, Fat, gpt_disk, loader
from imagekit.bundle import Bundle
from imagekit.cli.app import run
from imagekit.cloudinit.iso import read_iso
from imagekit.errors import ImagekitError, InvalidImage, SourceError, UnsupportedFeature, UsageError
from imagekit.formats.base import GiB, MiB
from tests.glance_service import FakeService, fake_service

GEN1, GEN2 = {"hw_machine_type": "hyperv-gen1"}, {"hw_machine_type": "hyperv-gen2"}
REQUIRED = {"os_secure_boot": "required"}
LINUX, WINDOWS = {"os_type": "linux"}, {"os_type": "windows"}


@pytest.fixture
def service() -> Iterator[FakeService]:
    with fake_service() as made:
        yield made


@pytest.fixture(scope="module")
def efi() -> bytes:
    """A disk that boots as generation 2, signed for Linux."""
    files = {"EFI/BOOT/BOOTX64.EFI": loader(signers=[UEFI_CA])}
    return gpt_disk([(ESP, Fat(files, bits=12).volume())])


BIOS = bytes(MiB)


def prepare(service: FakeService, out: Path, data: bytes, stated: dict[str, Any], **asked: Any) -> Bundle:
    service.add(data, disk_format="raw", **stated)
    asked = {"uuid": "8f2a6d5c-9d3e-4a54-8d4e-0f9b8d1f1c11", **asked}
    out.mkdir(exist_ok=True)
    return imagekit.prepare("glance:debian", out / "bundle", glance_url=service.address, sync=False, **asked)


@pytest.mark.parametrize(
    ("stated", "asked", "generation", "secure_boot"),
    [
        ({}, {}, 2, "linux"),
        (GEN1, {}, 1, "off"),
        (GEN2, {}, 2, "linux"),
        ({"hw_firmware_type": "bios"}, {}, 1, "off"),
        ({"hw_firmware_type": "UEFI", "hw_machine_type": "q35"}, {}, 2, "linux"),
        ({"os_secure_boot": "disabled"}, {}, 2, "off"),
        ({"os_secure_boot": "optional"}, {}, 2, "linux"),
        (REQUIRED | WINDOWS | GEN2, {}, 2, "windows"),
        (REQUIRED | LINUX, {}, 2, "linux"),
        (REQUIRED, {"machine": {"secure_boot": "windows"}}, 2, "windows"),
        (GEN2, {"machine": {"generation": 1}}, 1, "off"),
        ({"os_secure_boot": "disabled"}, {"machine": {"secure_boot": "linux"}}, 2, "linux"),
        (GEN1 | {"hw_firmware_type": "uefi"}, {"machine": {"generation": 2}}, 2, "linux"),
        (REQUIRED | GEN1, {"ignore_properties": True}, 2, "linux"),
    ],
)
def test_generation_and_secure_boot_follow_the_properties_unless_asked_otherwise(
    service: FakeService,
    tmp_path: Path,
    efi: bytes,
    stated: dict[str, Any],
    asked: dict[str, Any],
    generation: int,
    secure_boot: str,
) -> None:
    bundle = prepare(service, tmp_path, efi, stated, **asked)
    assert (bundle.machine.generation, bundle.machine.secure_boot) == (generation, secure_boot)
    assert bundle.machine.name == "debian"  # Glance's name, not the id


def test_the_reason_names_the_property_and_what_was_not_followed(
    service: FakeService, tmp_path: Path, efi: bytes
) -> None:
    stated = GEN1 | {"os_secure_boot": "disabled", "hypervisor_type": "qemu"}
    bundle = prepare(service, tmp_path, efi, stated, machine={"secure_boot": "off"})
    assert bundle.choice.generation_reason == "Glance states hw_machine_type=hyperv-gen1"
    assert any("for qemu" in warning for warning in bundle.warnings)
    service.images.clear()
    bundle = prepare(service, tmp_path / "two", efi, GEN2 | WINDOWS, guest="linux", machine={"generation": 1})
    assert bundle.choice.generation_reason == "as asked"
    assert any("generation 1 was asked for" in warning for warning in bundle.warnings)
    assert any("os_type=windows" in warning for warning in bundle.warnings)


def test_os_type_makes_the_guest_a_windows(service: FakeService, tmp_path: Path) -> None:
    """Seen in what it changes: the password goes to a Windows as it is."""
    bundle = prepare(service, tmp_path, BIOS, WINDOWS, password="Secret-1")
    assert "admin_pass" in json.dumps(_meta(bundle))


def _meta(bundle: Bundle) -> Any:
    files = read_iso((bundle.path / bundle.machine.media[1].path).read_bytes()).tree
    return json.loads(files["openstack/latest/meta_data.json"])


def test_the_least_of_disk_and_memory_is_given(service: FakeService, tmp_path: Path) -> None:
    bundle = prepare(service, tmp_path, BIOS, {"min_disk": 3, "min_ram": 3001})
    assert (bundle.report.virtual_size, bundle.machine.memory) == (3 * GiB, 3002 * MiB)
    service.images.clear()
    asked = {"size": 4 * GiB, "machine": {"memory": 4 * GiB}}
    bundle = prepare(service, tmp_path / "two", BIOS, {"min_disk": 3, "min_ram": 3000}, **asked)
    assert (bundle.report.virtual_size, bundle.machine.memory) == (4 * GiB, 4 * GiB)


@pytest.mark.parametrize(
    ("stated", "asked", "error", "said"),
    [
        (GEN1 | {"hw_firmware_type": "uefi"}, {}, InvalidImage, "hyperv-gen1 and hw_firmware_type=uefi"),
        (REQUIRED | LINUX | GEN1, {}, InvalidImage, "has no Secure Boot"),
        (REQUIRED | GEN2, {}, InvalidImage, "without os_type"),
        (REQUIRED | LINUX, {"machine": {"generation": 1}}, UsageError, "generation 1 was asked for"),
        (REQUIRED | LINUX, {"machine": {"secure_boot": "off"}}, UsageError, "--secure-boot off"),
        ({"min_disk": 3}, {"size": GiB}, UsageError, "min_disk=3 GiB"),
        ({"min_ram": 2048}, {"machine": {"memory": GiB}}, UsageError, "min_ram=2048 MiB"),
        ({"img_config_drive": "mandatory"}, {"media": "none"}, UsageError, "img_config_drive=mandatory"),
        (GEN2, {"disk": "vhd"}, UnsupportedFeature, "generation 2"),
        ({"hw_machine_type": "hyperv-gen3"}, {}, UnsupportedFeature, "hyperv-gen3"),
        ({"architecture": "aarch64"}, {}, UnsupportedFeature, "aarch64"),
        ({"os_vtpm": "required"}, {}, UnsupportedFeature, "os_vtpm"),
        ({"os_shielded_vm": "required"}, {}, UnsupportedFeature, "os_shielded_vm"),
        ({"status": "queued"}, {}, SourceError, "queued"),
        ({"disk_format": "iso"}, {}, UnsupportedFeature, "iso"),
    ],
)
def test_conflicts_are_explained_before_a_byte_is_fetched(
    service: FakeService,
    no_leftovers: Path,
    efi: bytes,
    stated: dict[str, Any],
    asked: dict[str, Any],
    error: type[ImagekitError],
    said: str,
) -> None:
    service.add(efi, **{"disk_format": "raw", **stated})
    with pytest.raises(error) as caught:
        imagekit.prepare("glance:debian", no_leftovers / "bundle", glance_url=service.address, **asked)
    assert said in str(caught.value)
    assert not any(request.endswith("/file") for request in service.requests)


def test_the_command_line_has_the_same_conflicts(service: FakeService, tmp_path: Path, efi: bytes) -> None:
    service.add(efi, disk_format="raw", **GEN2, os_type="linux", os_secure_boot="required", min_disk=1)
    command = ["prepare", "glance:debian", "--glance-url", service.address, "--out", str(tmp_path / "bundle")]
    assert run([*command, "--generation", "1"]) == 2
    assert run([*command, "--size", "512M"]) == 2
    assert run([*command, "--generation", "1", "--size", "512M", "--ignore-properties", "--no-sync"]) == 0
