"""``imagekit prepare`` as people and scripts see it: the generation, why, and the Secure Boot template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fixtures.efi_disks import ESP, UEFI_CA, Fat, gpt_disk, loader
from imagekit.cli.app import run
from imagekit.cloudinit.iso import read_iso
from imagekit.cloudinit.tree import MetadataTree
from imagekit.machine import Machine
from tests.cloudinit_specs import KEY


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


def test_a_network_for_another_machine_is_refused_before_anything_is_written(
    bios_image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, out = tmp_path / "b", tmp_path / "drive.iso"
    assert run(["prepare", str(bios_image), "--out", str(bundle), "--mac", "02:15:5d:00:00:01", "-q"]) == 0
    spec = tmp_path / "spec.json"
    link = {"id": "eth0", "mac": "02:15:5d:00:00:02"}
    network = {"links": [link], "networks": [{"link": "eth0", "type": "ipv4_dhcp"}]}
    spec.write_text(json.dumps({"name": "a", "network": network, "user_data": "#cloud-config\n{}\n"}))
    arguments = ["configdrive", str(out), "--spec", str(spec)]
    assert run([*arguments, "--machine", str(bundle)]) == 2
    assert "mac-unknown" in capsys.readouterr().err
    assert not out.exists()
    assert run(arguments) == 0


def test_strict_refuses_what_is_otherwise_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["configdrive", str(tmp_path / "a.iso")]) == 0
    assert "nobody will be able to log in" in capsys.readouterr().err
    assert run(["configdrive", str(tmp_path / "b.iso"), "--strict"]) == 2
    assert not (tmp_path / "b.iso").exists()


def test_the_schema_is_a_json_schema_of_the_spec(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["configdrive", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["$schema"].endswith("2020-12/schema")
    assert {"name", "network", "user_data_file"} <= schema["properties"].keys()


def test_a_password_that_was_made_goes_to_its_file_and_its_hash_to_the_guest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, secret = tmp_path / "a.iso", tmp_path / "secret"
    assert run(["configdrive", str(out), "--generate-password", "--password-out", str(secret)]) == 0
    password = secret.read_text().strip()
    assert len(password) == 20 and secret.stat().st_mode & 0o777 == 0o600
    assert password.encode() not in out.read_bytes() and b"$6$rounds=" in out.read_bytes()
    assert password not in "".join(capsys.readouterr())


def test_a_password_is_not_made_for_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = tmp_path / "key.pub"
    key.write_text(KEY + "\n")
    assert run(["configdrive", str(tmp_path / "a.iso"), "--generate-password", "--ssh-key", str(key)]) == 2
    assert "ssh-rsa key only, and there is ssh-ed25519" in capsys.readouterr().err
    assert not (tmp_path / "a.iso").exists()


@pytest.mark.parametrize("datasource", ["nocloud", "cloudstack"])
def test_the_data_source_decides_label_and_layout(tmp_path: Path, datasource: str) -> None:
    out = tmp_path / "a.iso"
    assert run(["configdrive", str(out), "--datasource", datasource, "-q"]) == 0
    content = read_iso(out.read_bytes())
    assert MetadataTree.recognise(content.label, content.tree) == MetadataTree(
        datasource,  # type: ignore[arg-type]
        content.label,
        content.tree,
    )


def test_a_windows_guest_gets_its_adapter_called_ethernet(tmp_path: Path) -> None:
    out = tmp_path / "a.iso"
    arguments = ["--guest", "windows", "--network", "dhcp", "--random-seed", "-q"]
    assert run(["configdrive", str(out), *arguments]) == 0
    tree = read_iso(out.read_bytes()).tree
    assert json.loads(tree["openstack/latest/network_data.json"])["links"][0]["id"] == "Ethernet"
    assert len(json.loads(tree["openstack/latest/meta_data.json"])["random_seed"]) == 684
