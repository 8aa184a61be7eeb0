"""``imagekit prepare`` as people and scripts see it: the generation, why, and the Secure Boot template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fixtures.efi_disks import ESP, UEFI_CA, Fat, gpt_disk, loader
from imagekit.cli.app import run
from imagekit.machine import Machine


@pytest.fixture
def uefi_image(tmp_path: Path) -> Path:
    path = tmp_path / "uefi.raw"
    files = {"EFI/BOOT/BOOTX64.EFI": loader(signers=[UEFI_CA])}
    path.write_bytes(gpt_disk([(ESP, Fat(files, bits=12).volume())]))
    return path


@pytest.fixture
def bios_image(tmp_path: Path) -> Path:
    path = tmp_path / "bios.raw"
    path.write_bytes(bytes(1 << 20))
    return path


def test_the_generation_is_printed_with_its_reason(
    uefi_image: Path, bios_image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["prepare", str(uefi_image), "--out", str(tmp_path / "two")]) == 0
    said = capsys.readouterr().out
    assert r"2 (the EFI system partition has \EFI\BOOT\BOOTX64.EFI)" in said
    assert "linux (the boot loader is signed by the Microsoft UEFI CA)" in said
    assert run(["prepare", str(bios_image), "--out", str(tmp_path / "one")]) == 0
    assert "1 (the disk has no EFI system partition)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "generation", "secure_boot", "disk"),
    [
        ([], 2, "linux", "uefi.vhdx"),
        (["--generation", "auto", "--secure-boot", "auto"], 2, "linux", "uefi.vhdx"),
        (["--generation", "2", "--secure-boot", "off"], 2, "off", "uefi.vhdx"),
        (["--secure-boot", "windows"], 2, "windows", "uefi.vhdx"),
        (["--generation", "1"], 1, "off", "uefi.vhd"),
    ],
)
def test_generation_and_secure_boot_are_options(
    uefi_image: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    generation: int,
    secure_boot: str,
    disk: str,
) -> None:
    assert run(["prepare", str(uefi_image), "--out", str(tmp_path / "b"), "--output", "json", *options]) == 0
    printed = json.loads(capsys.readouterr().out)
    machine = Machine.load(tmp_path / "b")
    assert (machine.generation, machine.secure_boot, machine.media[0].path) == (generation, secure_boot, disk)
    assert printed["machine"] == json.loads(machine.dumps())
    assert set(printed["reasons"]) == {"generation", "secure-boot"}


def test_a_spec_says_it_too_and_an_option_wins(uefi_image: Path, tmp_path: Path) -> None:
    spec = tmp_path / "web1.yaml"
    spec.write_text("name: web1\nmachine: {generation: 2, secure_boot: off}\n")
    arguments = ["prepare", str(uefi_image), "--spec", str(spec), "-q"]
    assert run([*arguments, "--out", str(tmp_path / "a")]) == 0
    assert Machine.load(tmp_path / "a").secure_boot == "off"
    assert run([*arguments, "--out", str(tmp_path / "b"), "--secure-boot", "linux"]) == 0
    assert Machine.load(tmp_path / "b").secure_boot == "linux"


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--generation", "3"], 2),
        (["--secure-boot", "on"], 2),
        (["--generation", "1", "--secure-boot", "linux"], 12),
        (["--disk", "vhd"], 12),
        (["--disk", "raw"], 2),
        (["--media", "udf"], 2),
        (["--media", "none", "--disk", "vhdx"], 2),
        (["--media", "iso", "--partition"], 2),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(
    uefi_image: Path, tmp_path: Path, options: list[str], code: int
) -> None:
    assert run(["prepare", str(uefi_image), "--out", str(tmp_path / "b"), *options]) == code
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("options", "name", "described"),
    [
        ([], "c.iso", "ISO 9660"),
        (["--media", "vfat"], "c.img", "VFAT"),
        (["--media", "vfat", "--disk", "vhdx"], "c.vhdx", "VFAT in a VHDX disk"),
        (["--disk", "vhd"], "c.vhd", "ISO 9660 in a VHD disk"),
        ([], "c.vhdx", "ISO 9660 in a VHDX disk"),
        (["--media", "vfat", "--no-partition"], "c.vhdx", "VFAT in a VHDX disk"),
    ],
)
def test_configdrive_writes_media_of_every_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], name: str, described: str
) -> None:
    assert run(["configdrive", str(tmp_path / name), *options]) == 0
    assert f"{described}, " in capsys.readouterr().out
    assert run(["configdrive", str(tmp_path / f"json-{name}"), *options, "--output", "json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["media"], printed["label"]) == ("vfat" if "VFAT" in described else "iso", "config-2")
    assert printed["disk"] == (name[2:] if "disk" in described else None)


@pytest.mark.parametrize(
    ("arguments", "code", "hint"),
    [
        (["c.vhd", "--disk", "vhdx"], 2, "name it NAME.vhdx"),
        (["c.iso", "--media", "vfat"], 2, "name it NAME.img"),
        (["c.iso", "--media", "none"], 2, "choose iso or vfat"),
    ],
)
def test_a_medium_with_the_name_of_another_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, hint: str
) -> None:
    assert run(["configdrive", str(tmp_path / arguments[0]), *arguments[1:]]) == code
    assert hint in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
