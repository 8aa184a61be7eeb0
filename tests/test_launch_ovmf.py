"""UEFI firmware is found by what its descriptions say, in the order they ask for."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from imagekit.errors import ToolError
from imagekit.launch import ovmf
from imagekit.launch.ovmf import Flash, UefiFirmware, find_firmware

DESCRIPTION: dict[str, Any] = {
    "description": "UEFI firmware for x86_64",
    "interface-types": ["uefi"],
    "mapping": {
        "device": "flash",
        "executable": {"filename": "code.fd", "format": "raw"},
        "nvram-template": {"filename": "vars.fd", "format": "raw"},
    },
    "targets": [
        {"architecture": "aarch64", "machines": ["virt-*"]},
        {"architecture": "x86_64", "machines": ["pc-i440fx-*", "pc-q35-*"]},
    ],
    "features": ["acpi-s3"],
    "tags": [],
}
KEYS = ["acpi-s3", "enrolled-keys", "requires-smm", "secure-boot"]


@pytest.fixture
def prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a QEMU is installed, alone on this computer."""
    folders = [tmp_path / name / "firmware" for name in ("user", "etc", "share")]
    for folder in folders:
        folder.mkdir(parents=True)
    monkeypatch.setattr(ovmf, "_description_folders", lambda program: iter(folders))
    return tmp_path


def describe(prefix: Path, name: str, *, folder: str = "share", **changes: object) -> UefiFirmware:
    """Install a description with files of its own; what it describes."""
    fields = copy.deepcopy({**DESCRIPTION, **changes})
    for key in ("executable", "nvram-template"):
        if key in fields["mapping"]:
            file = prefix / f"{folder}-{name}-{fields['mapping'][key]['filename']}"
            file.write_bytes(b"firmware")
            fields["mapping"][key]["filename"] = str(file)
    (prefix / folder / "firmware" / name).write_text(json.dumps(fields))
    files = [Flash(prefix / f"{folder}-{name}-{file}") for file in ("code.fd", "vars.fd")]
    return UefiFirmware(files[0], files[1], needs_smm="requires-smm" in fields["features"])


def found(prefix: Path, *, secure_boot: bool = False) -> UefiFirmware:
    return find_firmware(str(prefix / "bin" / "qemu-system-x86_64"), secure_boot=secure_boot)


def test_secure_boot_gets_the_firmware_with_keys_and_only_secure_boot_does(prefix: Path) -> None:
    enrolled = describe(prefix, "40-enrolled.json", features=KEYS)
    plain = describe(prefix, "60-plain.json")
    assert found(prefix, secure_boot=True) == enrolled
    assert enrolled.needs_smm
    assert found(prefix) == plain


def test_without_secure_boot_firmware_that_needs_no_smm_comes_first(prefix: Path) -> None:
    describe(prefix, "50-secure.json", features=["requires-smm", "secure-boot"])
    plain = describe(prefix, "60-plain.json")
    assert found(prefix) == plain


def test_firmware_that_could_do_secure_boot_and_has_no_keys_does_without(prefix: Path) -> None:
    capable = describe(prefix, "50-secure.json", features=["requires-smm", "secure-boot"])
    assert found(prefix) == capable


def test_the_names_of_the_descriptions_are_the_order_of_preference(prefix: Path) -> None:
    describe(prefix, "60-b.json")
    first = describe(prefix, "50-a.json", folder="etc")
    assert found(prefix) == first


def test_a_users_own_description_hides_the_one_of_the_same_name(prefix: Path) -> None:
    describe(prefix, "50-a.json")
    own = describe(prefix, "50-a.json", folder="user")
    assert found(prefix) == own


def test_an_empty_description_hides_one_and_offers_nothing(prefix: Path) -> None:
    describe(prefix, "50-a.json")
    other = describe(prefix, "60-b.json")
    (prefix / "etc" / "firmware" / "50-a.json").write_bytes(b"")
    assert found(prefix) == other


@pytest.mark.parametrize(
    ("where", "to"),
    [
        (["interface-types"], ["bios"]),
        (["targets", 1, "architecture"], "i386"),
        (["targets", 1, "machines"], ["pc-i440fx-*"]),
        (["mapping", "device"], "memory"),
        (["mapping", "mode"], "stateless"),
        (["mapping", "executable", "format"], "vmdk"),
        (["mapping", "nvram-template"], None),
        (["mapping"], None),
        (["features"], None),
        (["targets"], [None]),
        (["targets", 1, "machines"], [7]),
    ],
    ids=[
        "a BIOS",
        "another processor",
        "another machine",
        "loaded into memory",
        "no variables",
        "an odd format",
        "no template",
        "no mapping",
        "no features",
        "no target",
        "no machine",
    ],
)
def test_firmware_for_something_else_is_passed_over(prefix: Path, where: list[str | int], to: object) -> None:
    good = describe(prefix, "60-good.json")
    fields = json.loads((prefix / "share" / "firmware" / "60-good.json").read_text())
    place = fields
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = to
    # Hides nothing and comes first; its files are there.
    odd = describe(prefix, "10-odd.json")
    text = json.dumps(fields).replace(str(good.code.path), str(odd.code.path))
    (prefix / "share" / "firmware" / "10-odd.json").write_text(text)
    assert found(prefix) == good


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '"x"', "[" * 100_000, '{"mapping": {}}'])
def test_a_description_that_says_nothing_is_passed_over(prefix: Path, text: str) -> None:
    (prefix / "share" / "firmware" / "10-odd.json").write_text(text)
    good = describe(prefix, "60-good.json")
    assert found(prefix) == good


def test_firmware_whose_files_are_missing_is_passed_over(prefix: Path) -> None:
    gone = describe(prefix, "10-gone.json")
    gone.variables.path.unlink()
    good = describe(prefix, "60-good.json")
    assert found(prefix) == good


@pytest.mark.parametrize("folder", ["bin/share", "share/qemu"], ids=["Windows", "below the prefix"])
def test_without_descriptions_the_firmware_that_comes_with_qemu_serves(prefix: Path, folder: str) -> None:
    share = prefix / folder
    share.mkdir(parents=True)
    for name in ("edk2-x86_64-code.fd", "edk2-i386-vars.fd"):
        (share / name).write_bytes(b"firmware")
    assert found(prefix) == UefiFirmware(
        Flash(share / "edk2-x86_64-code.fd"), Flash(share / "edk2-i386-vars.fd"), needs_smm=False
    )
    with pytest.raises(ToolError, match="Microsoft's keys"):
        found(prefix, secure_boot=True)


def test_without_any_firmware_the_error_says_what_to_install(prefix: Path) -> None:
    with pytest.raises(ToolError, match="generation 2 needs") as caught:
        found(prefix)
    assert caught.value.hint is not None and "apt install ovmf" in caught.value.hint


def test_without_keys_the_error_says_how_to_do_without(prefix: Path) -> None:
    describe(prefix, "60-plain.json")
    with pytest.raises(ToolError, match="Secure Boot needs") as caught:
        found(prefix, secure_boot=True)
    assert caught.value.hint is not None and "--secure-boot off" in caught.value.hint


def test_the_folders_are_those_of_the_specification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    program = Path("/opt/qemu/bin/qemu-system-x86_64")
    assert [folder.as_posix() for folder in ovmf._description_folders(program)] == [
        (tmp_path / "qemu/firmware").as_posix(),
        "/etc/qemu/firmware",
        "/usr/share/qemu/firmware",
        "/opt/qemu/bin/share/firmware",
        "/opt/qemu/share/qemu/firmware",
    ]
