"""What may be sent to a host is checked before anything is."""

from __future__ import annotations

import ntpath
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagekit.cloudinit.iso import write_iso
from imagekit.errors import InvalidSpec, UnsupportedFeature, UsageError
from imagekit.hyperv.request import (
    as_family,
    check,
    check_host_path,
    check_name,
    check_switch,
    is_below,
    kvp_pairs,
    serial_number,
)
from imagekit.hyperv.settings import is_nocloud, settings_of
from imagekit.machine import Machine

UUID = "8f2a6d5c-9d3e-4a54-8d4e-0f9b8d1f1c11"
DISK: dict[str, Any] = {"format": "vhd", "kind": "disk", "controller": "ide", "size": 1, "sha256": "0" * 64}
GENERATION_1: dict[str, Any] = {
    "uuid": UUID,
    "name": "web1",
    "nics": [{"mac": "02:15:5d:00:00:01", "switch": "LAN"}],
    "media": [
        {"path": "web1.vhd", "format": "vhd", "kind": "disk", "controller": "ide", "size": 1, "sha256": "0" * 64}
    ],
}
GENERATION_2 = GENERATION_1 | {
    "generation": 2,
    "firmware": "uefi",
    "secure_boot": "linux",
    "media": [DISK | {"path": "web1.vhdx", "format": "vhdx", "controller": "scsi"}],
}


def machine(base: dict[str, Any] = GENERATION_1, **changes: Any) -> Machine:
    return Machine.parse(base | changes)


@pytest.mark.parametrize("name", ["web1", "a", "A.b-c_d", "x" * 64, "con1", "Com10.x"])
def test_a_plain_name_is_taken(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", "web*", "a b", "x" * 65, "-x", ".x", "x.", "CON", "nul.txt", "com1", "web'1", "wéb", "a/b", "a\\b", "x\n"],
)
def test_a_name_that_is_a_pattern_a_device_or_a_path_is_refused(name: str) -> None:
    with pytest.raises(InvalidSpec):
        check_name(name)


@pytest.mark.parametrize(
    ("path", "means"),
    [
        ("D:\\VMs", "D:\\VMs"),
        ("D:\\VMs\\", "D:\\VMs"),
        ("D:\\", "D:\\"),
        ("C:\\Cluster Storage\\Volume 1", "C:\\Cluster Storage\\Volume 1"),
        ("\\\\filer\\vms\\web", "\\\\filer\\vms\\web"),
    ],
)
def test_an_absolute_folder_is_taken(path: str, means: str) -> None:
    assert check_host_path(path) == means


@pytest.mark.parametrize(
    "path",
    [
        "",
        "VMs",
        "D:VMs",
        "\\VMs",
        "D:/VMs",
        "D:\\VMs\\..\\Windows",
        "D:\\VMs\\.",
        "D:\\VMs:stream",
        "D:\\VMs\\a.",
        "D:\\VMs\\a ",
        "D:\\a\\\\b",
        "D:\\nul",
        "D:\\a*",
        "D:\\$(calc)",
        "D:\\a;b",
        "\\\\?\\D:\\VMs",
        "\\\\.\\pipe\\x",
        "\\\\server",
        "D:\\a\nb",
    ],
)
def test_any_other_path_is_refused(path: str) -> None:
    with pytest.raises(InvalidSpec):
        check_host_path(path)


@given(st.text(max_size=40))
def test_a_path_that_is_taken_is_absolute_and_stays_where_it_is(path: str) -> None:
    try:
        taken = check_host_path(path)
    except InvalidSpec:
        return
    assert ntpath.isabs(taken) and ntpath.normpath(taken) == taken and check_host_path(taken) == taken


@pytest.mark.parametrize("name", ["LAN", "Default Switch", "vEthernet (Extern)", "Büro-Netz"])
def test_a_switch_may_have_the_names_that_switches_have(name: str) -> None:
    assert check_switch(name) == name


@pytest.mark.parametrize("name", ["", "LAN*", "[a]", "a`b", "$(x)", "a\x00", " LAN", "x" * 257])
def test_a_switch_whose_name_is_a_pattern_is_refused(name: str) -> None:
    with pytest.raises(InvalidSpec):
        check_switch(name)


@pytest.mark.parametrize(
    ("base", "changes", "family", "what"),
    [
        (GENERATION_2, {}, "2012", "generation 2"),
        (GENERATION_2, {}, "2008r2", "generation 2"),
        (GENERATION_2, {}, "2012r2", "Secure Boot"),
        (GENERATION_1, {"cpus": 8}, "2008r2", "8 processors, at most 4"),
    ],
)
def test_what_a_host_cannot_build_is_said_with_what_to_do(
    base: dict[str, Any], changes: dict[str, Any], family: Any, what: str
) -> None:
    with pytest.raises(UnsupportedFeature, match=what) as caught:
        check(machine(base, **changes), "D:\\VMs", family)
    assert caught.value.hint is not None and "prepare the bundle again" in caught.value.hint


@pytest.mark.parametrize(
    ("base", "changes", "family"),
    [
        (GENERATION_2, {}, "2016"),
        (GENERATION_2, {"secure_boot": "off"}, "2012r2"),
        (GENERATION_1, {}, "2012"),
        (GENERATION_1, {}, "2008r2"),
    ],
)
def test_what_a_host_can_build_is_taken(base: dict[str, Any], changes: dict[str, Any], family: Any) -> None:
    place = check(machine(base, **changes), "D:\\VMs", family)
    assert place.folder == f"D:\\VMs\\web1-{UUID}"
    assert all(is_below(file, place.folder) for file in place.files)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"name": "web 1"}, "cannot be the name"),
        ({"nics": [{"mac": "02:15:5d:00:00:01", "vlan": 5}]}, "a VLAN but no switch"),
        ({"nics": [{"mac": "02:15:5d:00:00:01", "switch": "a*"}]}, "virtual switch"),
        ({"kvp": {"a b": "x"}}, "characters other than"),
        ({"kvp": {"a": "x" * 1025}}, "longer than 1024"),
        ({"media": [DISK | {"path": "web1.vhd", "sha256": None}]}, "no sha256"),
        ({"media": [DISK | {"path": "nul.vhd"}]}, "name of a file"),
    ],
)
def test_what_no_host_should_be_told_is_refused(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(InvalidSpec, match=what):
        check(machine(**changes), "D:\\VMs", "2016")


def test_a_folder_too_deep_for_hyper_vs_own_files_is_refused() -> None:
    with pytest.raises(InvalidSpec, match="too long"):
        check(machine(), "D:\\" + "x" * 180, "2016")


def test_ignition_is_split_at_one_kibibyte_and_never_within_a_character() -> None:
    text = "ü" * 1500 + "end"
    pairs = kvp_pairs(machine(kvp={"ignition.config": text, "other": "x"}))
    parts = [pairs[f"ignition.config.{index}"] for index in range(len(pairs) - 1)]
    assert "".join(parts) == text and all(0 < len(part.encode()) <= 1024 for part in parts)
    assert len(parts) == 3


def test_a_nocloud_drive_gets_a_hint_unless_the_machine_has_a_serial_number() -> None:
    assert serial_number(machine(), nocloud=True) == "ds=nocloud"
    assert serial_number(machine(), nocloud=False) is None
    assert serial_number(machine(smbios={"serial": "S1"}), nocloud=True) == "S1"


def test_a_nocloud_drive_is_known_by_its_volume(tmp_path: Path) -> None:
    for label, expected in (("cidata", True), ("CIDATA", True), ("config-2", False)):
        path = tmp_path / label
        path.write_bytes(write_iso({"meta-data": b"x"}, label=label))
        assert is_nocloud(path) is expected
    (tmp_path / "rubbish").write_bytes(b"x" * 100)
    assert not is_nocloud(tmp_path / "rubbish")


def test_the_digest_of_a_machine_follows_what_is_asked_for() -> None:
    def digest(**changes: Any) -> str:
        made = machine(**changes)
        return str(settings_of(made, check(made, "D:\\VMs", "2016"))["create"]["spec"])

    assert digest() == digest() != digest(cpus=2)


def test_a_kind_of_host_is_named_as_the_help_says() -> None:
    assert as_family("2012r2") == "2012r2"
    with pytest.raises(UsageError):
        as_family("2003")
