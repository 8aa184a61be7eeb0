"""The rehearsal of generation 2: real QEMU, real OVMF, and a guest of 12 KiB."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Literal

import pytest

from fixtures.tiny_guest import VHDX_NAME, make_uefi_bundle, uefi_disk
from imagekit.errors import ToolError
from imagekit.launch.ovmf import UefiFirmware, find_firmware
from imagekit.launch.rehearsal import rehearse
from tests.oracles import need_tool

pytestmark = pytest.mark.oracle

TIMEOUT = 120.0
"""Seconds; without KVM the firmware alone takes five, on a busy machine many more."""


@pytest.fixture
def qemu_img() -> str:
    return need_tool("qemu-img")


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the rehearsal keeps its temporary files."""
    folder = tmp_path / "scratch, here"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def need_firmware(*, secure_boot: bool) -> UefiFirmware:
    """UEFI firmware for QEMU; without it the test is skipped, or fails under CI."""
    try:
        return find_firmware(need_tool("qemu-system-x86_64"), secure_boot=secure_boot)
    except ToolError:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip("UEFI firmware for QEMU is not installed")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_guest_boots_and_finds_its_config_drive(tmp_path: Path, scratch: Path, qemu_img: str) -> None:
    """The bundle stays as it was, and so does the template of the firmware's variables."""
    firmware = need_firmware(secure_boot=False)
    bundle, template = tmp_path / "b", firmware.variables.path.read_bytes()
    make_uefi_bundle(bundle, uefi_disk(tmp_path / "u.raw"), qemu_img=qemu_img)
    before = digests(bundle)
    result = rehearse(bundle, accelerator="tcg", timeout=TIMEOUT)
    assert (result.verdict, result.stage) == ("booted", "marker")
    assert [item.stage for item in result.evidence if item.source == "console"] == [
        "firmware",
        "bootloader",
        "marker",
    ]
    assert result.console is not None
    assert "config drive found: config-2" in result.console.read_text(errors="replace")
    assert f"UEFI firmware: {firmware.code.path}" in [item.line for item in result.evidence]
    assert result.screenshot is not None and result.screenshot.exists()
    after = digests(bundle)
    assert {name: after[name] for name in before} == before
    assert firmware.variables.path.read_bytes() == template
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("secure_boot", ["linux", pytest.param("windows", marks=pytest.mark.slow)])
def test_secure_boot_lets_no_unsigned_loader_through(
    tmp_path: Path, scratch: Path, qemu_img: str, secure_boot: Literal["linux", "windows"]
) -> None:
    """The same guest that boots without it; the two templates also are two kinds of controller."""
    need_firmware(secure_boot=True)
    make_uefi_bundle(tmp_path / "b", uefi_disk(tmp_path / "u.raw"), qemu_img=qemu_img, secure_boot=secure_boot)
    result = rehearse(tmp_path / "b", accelerator="tcg", timeout=TIMEOUT)
    assert (result.verdict, result.stage) == ("no-boot", "firmware")
    failure = next(item for item in result.evidence if item.failure)  # a second one may follow: nothing else to boot
    assert failure.line.startswith("BdsDxe: failed to load Boot0001") and failure.line.endswith("Access Denied")
    assert ("Sata(" in failure.line) == (secure_boot == "windows")


@pytest.mark.slow
def test_a_disk_without_loader_does_not_boot_and_that_is_soon_known(
    tmp_path: Path, scratch: Path, qemu_img: str
) -> None:
    need_firmware(secure_boot=False)
    disk = uefi_disk(tmp_path / "u.raw", {"EFI/debian/grub.cfg": b"normal"})
    make_uefi_bundle(tmp_path / "b", disk, qemu_img=qemu_img)
    result = rehearse(tmp_path / "b", accelerator="tcg", timeout=TIMEOUT)
    assert (result.verdict, result.stage) == ("no-boot", "firmware")
    assert result.seconds < TIMEOUT / 2


def test_a_vhdx_that_qemu_cannot_read_is_named(tmp_path: Path, scratch: Path, qemu_img: str) -> None:
    need_firmware(secure_boot=False)
    make_uefi_bundle(tmp_path / "b", uefi_disk(tmp_path / "u.raw"), qemu_img=qemu_img)
    disk = tmp_path / "b" / VHDX_NAME
    disk.write_bytes(bytes(disk.stat().st_size))
    with pytest.raises(ToolError, match="qemu-img cannot use the disk") as caught:
        rehearse(tmp_path / "b", accelerator="tcg")
    assert caught.value.path == str(disk)
